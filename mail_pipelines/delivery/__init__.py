"""Results: reply codes to classes, recording outcomes in the ledger, totals and statistics."""
