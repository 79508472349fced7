"""How a claim is made: its words, its refusals, the transaction on SQLite, the stored procedure on MySQL/MariaDB, and the rows that may not be mailed.

What belongs here: the steps of the one transaction that `dispatch.claims.open_claim` runs. Both ways of running it must mean the same:
`tests/dispatch/test_claims_alike.py` compares them.
"""
