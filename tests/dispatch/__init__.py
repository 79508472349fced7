"""Sending: every part alone, then whole sessions, then everything that can be killed."""
