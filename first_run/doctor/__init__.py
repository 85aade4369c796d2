"""`logitfuse doctor`: checks of the machine and of a run file, each with a remedy."""
