"""What the training loss does at each position of one segment (`train explain`)."""
