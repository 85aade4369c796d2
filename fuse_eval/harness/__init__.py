"""Tasks of EleutherAI's lm-evaluation-harness, run on all models of a run."""
