"""``python -m psa_store.cli`` is the same as ``psa``: it does not search the current directory for modules either."""

import os
import sys

import psa_store

_HERE = os.getcwd()
if sys.path and sys.path[0] in ("", _HERE) and not psa_store.__file__.startswith(f"{_HERE}{os.sep}"):
    del sys.path[0]

from psa_store.cli.app import main  # noqa: E402  # not before

main()
