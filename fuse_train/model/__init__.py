"""The target as a model that trains: loaded, with adapters, seen as hidden states and a head."""
