"""One file for each selector: its options, and how it is made."""
