"""Tests of moving from other systems."""
