"""Folders that appear complete or not at all, and checksums of their files."""
