"""How tensors travel in fewer bytes: ``spec`` says how, ``codec`` does it."""

from psa_store.compression.spec import GRIDS, HALF_BLOCK, NONE, Compression, Form, Grid, parse_compression

__all__ = ["GRIDS", "HALF_BLOCK", "NONE", "Compression", "Form", "Grid", "parse_compression"]
