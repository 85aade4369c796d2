"""Pages for people: what they have in common, in looks and in code."""
