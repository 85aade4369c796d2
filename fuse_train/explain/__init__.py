"""One segment looked at as the loss sees it (`train explain`)."""
