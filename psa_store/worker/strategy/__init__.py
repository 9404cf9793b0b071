"""What a worker does in a mode."""
