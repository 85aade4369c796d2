"""Text in: files of any kind become documents, checked and split."""
