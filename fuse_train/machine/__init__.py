"""What this process runs on: launchers, other processes, precision, memory."""
