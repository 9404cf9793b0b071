"""The Redis door, against a real Redis."""
