"""How much servers may send, and when they stop by themselves."""
