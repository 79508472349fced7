"""Completing a restored ledger from the servers' logs: which rows it calls unsent have been mailed since the backup.

    begin     the ledger gets a new generation, which no server knows: none can claim
    read      each server reads its own log and puts what became of its offers into the database
    apply     the ledger takes them over; where a log is gone, what may have been mailed becomes unknown
    finish    the servers take the new generation over, and send again

Each step may be killed and repeated. `standing` keeps where a recovery stands, `reading` is the server's step (`archived` in place of one that
is gone), `applying` the centre's.
"""
