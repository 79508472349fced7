"""Benchmarks of the budgets, one module each; `contract` has their common output."""
