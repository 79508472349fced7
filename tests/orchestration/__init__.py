"""The Dagster layer: definitions, sensors, partitions, and that nothing mails by accident."""
