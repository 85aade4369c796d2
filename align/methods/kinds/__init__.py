"""One file for each method: its options, and how it is made ready for a source."""
