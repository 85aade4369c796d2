"""One file for each method of merging."""
