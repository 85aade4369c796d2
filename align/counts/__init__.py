"""Counts of (source token, target token) pairs in training text: which text, counting, the file."""
