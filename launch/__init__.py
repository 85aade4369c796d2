"""How work is run: whose shards, progress, signals, command lines, work logs, status, Slurm."""
