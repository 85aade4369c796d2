"""A grid of trainings over shared stores, compared with intervals over documents and seeds."""
