"""The records of dispatch servers in the DNS: which ones, and how they get there."""
