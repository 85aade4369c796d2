"""Choose the best answer to each prompt by judges' scores and votes, and write them as a corpus."""
