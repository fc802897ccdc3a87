"""What use costs: prices as data, billing months, and the ledger that is computed from rows."""
