"""A centre with dispatch servers: launcher, workers, broker, orders, units of systemd."""
