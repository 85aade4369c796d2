"""Slurm: options of sbatch, scripts, the jobs that a run needs, and their submission."""
