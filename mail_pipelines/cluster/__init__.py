"""A centre and three dispatch servers on this machine, which send two campaigns at once: production in small, to be watched and counted."""
