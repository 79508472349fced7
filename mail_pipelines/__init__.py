"""Self-hosted email marketing on Dagster: segments, frozen audiences, and sends that lose no recipient and mail none twice."""

__version__ = "0.1.0"
