"""Aligned stores as batches, in an order that seed and plan fix."""
