"""Check that one source can be aligned, and build the aligner."""
