"""Branches: which entries the source is asked to go on from, and their rows."""
