"""Unlearning: weights from influence, objectives, the training loop, the report; no HTTP, no SQL, no queue."""
