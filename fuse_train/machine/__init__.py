"""The process's surroundings: launchers, other processes, precision, memory."""
