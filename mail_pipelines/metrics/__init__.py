"""What Prometheus is told: by the centre about campaigns and the whole fleet, by each server's process about itself.

What belongs here: turning counters and standings into metrics, and the endpoint that tells them. What does not: counting (`delivery.counters`,
`dispatch.settler`) and judging (`infra/prometheus/rules.yml`). Nothing here reads the ledger, and no label names a person.
"""
