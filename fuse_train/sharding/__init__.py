"""Parts of a model: torch's `fully_shard`, and files of parts (`train.parallel: fsdp2`)."""
