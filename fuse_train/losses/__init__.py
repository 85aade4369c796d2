"""What a step minimises, as sums over rows, without dense targets."""
