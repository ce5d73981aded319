"""The science: per-sample gradients, projections, the index and its answers.

Imports nothing else of ours, knows no HTTP, SQL or queue, and runs in a notebook. Start with `gradients.py`.
"""
