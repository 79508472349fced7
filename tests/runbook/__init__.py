"""docs/runbook.md: its commands, typed against installations that are broken in the way of each chapter."""
