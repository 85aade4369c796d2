"""Stores: writing, reading, and checking that a store is the one that a run needs."""
