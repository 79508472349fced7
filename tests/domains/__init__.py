"""Sending domains: keys, records, the DNS, rotation, and what is signed with them."""
