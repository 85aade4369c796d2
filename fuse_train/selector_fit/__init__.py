"""A selector learnt from the stores alone, before or without a training of the target."""
