"""Generate answers of sources to the corpus's prompts, and make documents from them."""
