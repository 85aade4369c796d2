"""Aligned stores as batches, in an order that depends on seed and plan alone."""
