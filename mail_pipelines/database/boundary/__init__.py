"""What the account of a dispatch server finds on MySQL/MariaDB: a schema of its own kind, with views and procedures under the names of the real ones.

A server is assumed stealable. It connects to this schema instead of the central one, so that every statement of the send path stays as it is, and
reads and changes only rows that are its own: the views ask which server the account is (`servers.account`), with their definer's rights.

What belongs here: what a server may do (`rights`), and putting it into the database (`installation`). What does not: accounts and their passwords
(`dispatch.accounts`), and the views that SQLite has as well (`database.views`).
"""
