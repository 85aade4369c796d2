"""How commands run: assignment of shards, progress, signals, options, work logs, status, Slurm."""
