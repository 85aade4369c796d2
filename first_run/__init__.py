"""Before the first run: `logitfuse init` writes a run file, `logitfuse doctor` looks for what would
stop it. Both only read what the stages read, with the stages' own code."""
