"""Sending domains: their DKIM keys, the DNS records they need, and whether the DNS has them."""
