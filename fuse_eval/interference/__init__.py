"""Interference: what fusing makes worse than the control, by document and domain."""
