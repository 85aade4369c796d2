"""Optimizer steps: the objective, the loop around it, what it logs, and its checkpoints."""
