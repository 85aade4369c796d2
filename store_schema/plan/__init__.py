"""The plan: all segments, and which shard each one is in."""
