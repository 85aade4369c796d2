"""Convert source distributions to the target's tokens, on byte offsets, in linear time.

In `chain`, `first_token` and `continuation` map the bytes of a source token to target tokens, `kernel`
moves the mass of one shard, and `project` is the pure function around it; `run` is the stage.
"""
