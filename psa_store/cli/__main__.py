"""``python -m psa_store.cli`` is the same as ``psa``."""

from psa_store.cli.app import main

main()
