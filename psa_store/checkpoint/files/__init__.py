"""Checkpoints as files: safetensors in a folder or at any URL that fsspec knows."""
