"""Folders that are there whole or not at all, and checksums of what is in them."""
