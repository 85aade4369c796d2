"""One source over the pending shards of a plan: checked, run, written into its store."""
