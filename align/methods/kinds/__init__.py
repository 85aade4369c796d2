"""One file for each method: its options, and how its aligner is made for a source."""
