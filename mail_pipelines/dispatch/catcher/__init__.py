"""The built-in mail catcher: a small SMTP server that stands in for a dispatch server and for all destinations behind it.

It keeps the same permit and journal as the real thing, so the embedded mode makes the same promises.
"""
