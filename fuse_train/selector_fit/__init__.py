"""Training a selector on the stores alone, before or without a training of the target."""
