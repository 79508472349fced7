"""What Prometheus is told, and the alerts about it. Running servers are asked in `tests/dispatch/test_metrics.py`."""
