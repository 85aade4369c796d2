"""How work is run: whose shards, progress where people wait, signals, command lines, costs."""
