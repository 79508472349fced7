"""The commands of `mail-pipelines`, one module for each noun. Thin: they parse, call a domain package and print."""
