"""One door: what other hosts can reach."""
