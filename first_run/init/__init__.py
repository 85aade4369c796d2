"""`logitfuse init`: a look at models and data, and a run file for them."""
