"""The plan: which segment is in which shard."""
