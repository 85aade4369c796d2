"""What runs a model: the contract of an engine, vLLM, transformers, and the memory they take."""
