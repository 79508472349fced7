"""What the benchmarks measure with: sinks, references, distance and processor time."""
