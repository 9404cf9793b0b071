"""Training scripts to run, read and start from: ``psa run --workers 2 psa_store/examples/gpt.py``."""
