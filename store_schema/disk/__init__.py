"""Where files are kept, and how those of strangers are read."""
