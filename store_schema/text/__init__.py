"""Tokenizers, chat templates, and vocabularies as bytes."""
