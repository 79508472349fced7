"""Exim as a dispatch server: its main log read as the journal, and an own instance of it that is set up, started and watched."""
