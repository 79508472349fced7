"""Composing: content compiled once per campaign version, filled in per recipient; tokens in addresses and links."""
