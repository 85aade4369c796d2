"""Between the arrays of the layout and what lies on disk."""
