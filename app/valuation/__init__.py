"""Valuation: what training on a row would do to the loss on a validation set; no HTTP, no SQL, no queue."""
