"""One source's alignment checked, and its method made ready."""
