"""Columnar snapshots of contacts and engagement, and safe criteria evaluated on them."""
