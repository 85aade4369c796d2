"""Ray as a scheduler: it places workers on nodes and carries shard numbers, and nothing else."""
