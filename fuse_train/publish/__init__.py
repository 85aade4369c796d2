"""What a training leaves: the final folder, its model card, the hub."""
