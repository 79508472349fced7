"""What mailbox providers tell of us: Google of our sending domains, Microsoft of our servers' addresses. What follows from it is decided in `capacity`."""
