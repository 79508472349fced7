"""Dagster assets, one file per group: thin adapters that turn partition keys into calls of the domain packages and numbers into metadata. No SQL, no SMTP, no arithmetic."""
