"""Split documents into segments that fit every tokenizer, and assign segments to shards."""
