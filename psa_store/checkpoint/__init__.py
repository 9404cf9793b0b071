"""Checkpoints: versions of a job that are kept under a name, and what can be done with them."""
