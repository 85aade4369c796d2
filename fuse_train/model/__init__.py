"""The target in training: loading, adapters, hidden states and head."""
