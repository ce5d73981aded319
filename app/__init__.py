"""Headwater: which training samples made a language model say this."""
