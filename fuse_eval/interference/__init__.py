"""What fusing makes worse than the control: document by document, by domain, beside another run."""
