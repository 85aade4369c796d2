"""A model's folder or file, looked at before its weights are loaded."""
