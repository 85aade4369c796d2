"""What a method of alignment is, and those that need no map between vocabularies."""
