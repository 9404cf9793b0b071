"""The drill of the checkpoint barrier: members meet while a seeded fault schedule kills and stops them."""
