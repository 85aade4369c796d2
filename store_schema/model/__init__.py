"""Model folders and files: checks before the weights are loaded, GGUF files, and loading."""
