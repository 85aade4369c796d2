"""The first run: `logitfuse demo` shows one, `logitfuse init` writes a run file for your models, and
`logitfuse doctor` looks for what would stop it. The last two only read what the stages read, with the
stages' own code."""
