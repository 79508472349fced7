"""Thin wrappers that turn answers of pure functions into run requests and events."""
