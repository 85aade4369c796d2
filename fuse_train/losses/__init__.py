"""The losses of a training step, as sums over rows, without dense targets."""
