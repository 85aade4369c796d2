"""Pairs of tokens that met in training text: counted, kept, and which text is read for it."""
