"""Real parts that tests start for themselves: servers on free ports in temporary folders, stopped by process id."""
