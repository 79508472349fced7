"""Exim as the dispatch server: its log, its configuration, and the promises that the built-in catcher keeps, too."""
