"""Convert between the arrays of `layout` and the arrays on disk."""
