"""Segments: columnar snapshots of contacts and engagement, criteria over them, and who matches."""
