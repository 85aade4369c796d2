"""The papers' methods, for comparison: FuseLLM, FuseChat."""
