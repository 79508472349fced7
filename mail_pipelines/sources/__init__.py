"""External sources of contacts and suppressions: declared in YAML, landed by dlt, merged under the rules of consent, told what happened here.

Knows nothing of Dagster. Not sources of hosts (`provisioning.sources`), nor systems that are moved from once (`migration.source`).
"""
