"""What the commands of this stage show people."""
