"""A store: written, read, and found again."""
