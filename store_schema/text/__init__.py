"""Between text and token ids: tokenizers, and vocabularies as bytes."""
