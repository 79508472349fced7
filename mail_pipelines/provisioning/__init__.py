"""Servers that come and go: their names in the DNS, and whether a server can send. Knows nothing of Dagster, and is not on the send path."""
