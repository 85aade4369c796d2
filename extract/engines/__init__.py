"""Engines: their protocol, vLLM, transformers, and the memory they need."""
