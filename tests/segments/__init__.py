"""Tests of segments: criteria, snapshots, who matches."""
