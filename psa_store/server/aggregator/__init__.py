"""What a server does with gradients, by the job's mode."""
