"""Dagster assets, one file per group: thin adapters that call the domain packages and turn numbers into metadata.

No SQL, no SMTP, no arithmetic.
"""
