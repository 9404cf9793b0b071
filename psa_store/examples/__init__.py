"""Training scripts to run, read and start from, as ``psa run --workers 2 psa_store/examples/gpt.py``."""
