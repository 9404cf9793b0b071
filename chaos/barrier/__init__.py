"""The drill of the checkpoint barrier: members meet again and again while a seeded plan kills and stops them."""
