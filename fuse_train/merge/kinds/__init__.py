"""One file a method of merging."""
