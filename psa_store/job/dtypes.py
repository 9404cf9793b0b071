"""Names of dtypes, as layouts and stored sections have them, and the size of an element. Pure, and without torch."""

from __future__ import annotations

from collections.abc import Mapping

ITEM_BYTES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
HALF_DTYPES = frozenset({"bfloat16", "float16"})
TRAINABLE_DTYPES = HALF_DTYPES | {"float64", "float32"}
