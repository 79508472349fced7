"""Contacts, lists, subscriptions and suppressions: addresses, import, consent, the change feed."""
