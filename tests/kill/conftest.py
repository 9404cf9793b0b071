"""What tests that kill have in common: what they hit, and when, is drawn from a seed that is printed."""

from __future__ import annotations

import os
import random
import secrets

import pytest


@pytest.fixture
def rng() -> random.Random:
    seed = int(os.environ.get("PSA_TEST_SEED", secrets.randbelow(1 << 30)))
    print(f"PSA_TEST_SEED={seed}")
    return random.Random(seed)
