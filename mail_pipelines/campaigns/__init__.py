"""Campaigns: states, content versions, YAML form, the frozen audience."""
