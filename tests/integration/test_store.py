"""`psa.Store` reads whole versions while training goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import psa_store as psa
from tests.harness import Run, Site

SCRIPT = Path(__file__).parent / "versions.py"
STEPS = 200


def start(site: Site, job: str, steps: int = STEPS) -> Run:
    return site.run(job, str(steps), script=SCRIPT, workers=2, servers=2, commit_every=1)


def test_a_reader_never_sees_two_versions_mixed(site: Site) -> None:
    run = start(site, "mixed")
    run.wait_for_step(3)
    seen = []
    with psa.Store("mixed", site.redis) as store:
        while not seen or seen[-1] < STEPS:
            state = store.state_dict()
            values = {name: {float(v) for v in tensor.float().flatten().unique()} for name, tensor in state.items()}
            version = values.pop("seen")
            assert all(value == version for value in values.values()), values
            seen.append(int(version.pop()))
    assert run.finish() == 0, run.output
    assert seen == sorted(seen) and len(set(seen)) > 3


def test_every_way_to_read_gives_the_same_values(site: Site) -> None:
    run = start(site, "ways", steps=12)
    assert run.finish() == 0, run.output
    with psa.Store("ways", site.redis) as store:
        assert store.version() == 12 and store.versions() == [10, 11, 12]
        assert sorted(store.names()) == ["matrix", "narrow", "seen", "wide"]
        for version in store.versions():
            arrays, state = store.arrays(version), store.state_dict(version)
            for name in store.names():
                assert np.array_equal(arrays[name], store.get(name, version))
                assert np.array_equal(arrays[name], state[name].float().numpy())
                assert bool((arrays[name] == version).all())
        assert state["narrow"].dtype is torch.bfloat16 and state["matrix"].shape == (100, 7)
        with pytest.raises(psa.errors.UsageError, match=r"version 3\..*versions: 10, 11, 12"):
            store.state_dict(3)
        with pytest.raises(psa.errors.UsageError, match="no parameter 'absent'"):
            store.get("absent")
