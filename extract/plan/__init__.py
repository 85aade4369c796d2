"""Documents cut into segments that fit every tokenizer, and segments assigned to shards."""
