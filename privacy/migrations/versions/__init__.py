"""One module per revision of the privacy ledger's schema."""
