"""Reputation: asking Google and Microsoft, keeping what they tell, showing it."""
