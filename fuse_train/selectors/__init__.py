"""Who of the sources counts at each position, and how much."""
