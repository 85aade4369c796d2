"""Method `bytes`: the chain rule on bytes, as one compiled pass over a shard."""
