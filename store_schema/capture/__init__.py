"""Formats in which other programs keep distributions: DistillKit's compressed captures."""
