"""Tests of assets: run as Dagster runs them, on real databases."""
