"""Right answers to held-out prompts: the models of a run answer, a judge scores, we count."""
