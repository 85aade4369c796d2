"""Output of a training: the final folder, its model card, the upload to the hub."""
