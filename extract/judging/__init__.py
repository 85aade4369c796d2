"""Which source's answer to a prompt is the best: judges score, votes choose, a corpus comes out."""
