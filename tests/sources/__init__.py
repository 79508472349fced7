"""External sources: declaration, landing, merge under consent, failures."""
