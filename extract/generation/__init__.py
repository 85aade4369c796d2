"""Answers of a source to the prompts of the corpus, and documents made of them."""
