"""External sources of contacts and suppressions: declared in YAML, landed by dlt, merged under the rules of consent. Knows nothing of Dagster."""
