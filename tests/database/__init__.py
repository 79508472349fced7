"""Tests of the central database."""
