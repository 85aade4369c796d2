"""From hidden states to entries: the output head, and what is kept of its rows."""
