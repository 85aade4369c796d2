"""Right answers to held-out prompts: asking the models of a run, judging, counting."""
