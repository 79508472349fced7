"""The demonstration: a whole campaign on one machine."""
