"""What comes back by mail: receiving it, reading it, and handing what it proves to `delivery.evidence`."""
