"""Counting and comparing; the cluster as a whole is in `production/test_cluster.py`."""
