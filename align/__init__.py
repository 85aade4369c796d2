"""Carry source distributions into the target's tokens, on byte offsets, in linear time.

In `chain`, `first_token` and `continuation` say where the bytes of a source token go, `kernel` moves
one shard's mass, `project` is the pure function around it; `run` is the stage.
"""
