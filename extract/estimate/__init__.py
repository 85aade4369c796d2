"""What a run will take, from configs, headers of weight files and first rows: nothing is loaded."""
