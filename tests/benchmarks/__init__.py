"""Benchmarks measure what they say, with sinks, references, distance and processor time that are what they say."""
