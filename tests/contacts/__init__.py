"""Addresses, consent, lists and import."""
