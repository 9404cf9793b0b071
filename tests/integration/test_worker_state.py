"""worker.state: what the script keeps for itself, version by version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import psa_store as psa
from psa_store.errors import UsageError
from psa_store.worker.state import decode, encode
from tests.harness import Servers, Site
from tests.integration.toy import make_data, make_model

Touch = Callable[[psa.Worker], None]


pytestmark = pytest.mark.usefixtures("environment")


def run(
    site: Site,
    job: str,
    steps: int,
    in_batch: Touch = lambda worker: None,
    after: Touch = lambda worker: None,
    **options: Any,
) -> dict[str, Any]:
    """One stretch of a job; returns the state after it."""
    servers = Servers(site, job, 1)
    model = make_model()
    options = {"ranks": 2, "state": {"seen": [], "best": None}} | options
    try:
        with psa.Worker(job, model, optimizer=psa.optim.SGD(lr=0.1), steps=steps, seed=1, **options) as worker:
            for x, y in worker.batches(make_data(), batch_size=8):
                in_batch(worker)
                nn.functional.mse_loss(model(x), y).backward()
                worker.step()
                after(worker)
        assert not hasattr(model, "psa_state"), "the model is the script's again"
        return worker.state if options["state"] is not None else {}
    finally:
        servers.stop()


def note(worker: psa.Worker) -> None:
    if worker.rank == 0:
        worker.state["seen"].append(worker.version)
        worker.state["best"] = {"loss": 0.5 / (1 + worker.version), "weights": torch.arange(3) + worker.version}


def test_it_is_what_it_was_after_a_resume(site: Site) -> None:
    run(site, "state-resumed", 4, note)
    state = run(site, "state-resumed", 9, note)
    assert state["seen"] == list(range(9))
    assert state["best"]["loss"] == 0.5 / 9
    assert torch.equal(state["best"]["weights"], torch.arange(3) + 8)


def test_what_comes_between_steps_belongs_to_the_next_version(site: Site) -> None:
    def evaluate(worker: psa.Worker) -> None:
        if worker.version == 2 and "evaluated" not in worker.state:
            worker.state["evaluated"] = worker.version

    seen: list[object] = []
    run(site, "state-between", 5, after=evaluate)
    run(site, "state-between", 6, lambda worker: seen.append(worker.state["evaluated"]))
    assert seen == [2, 2]


def test_a_batch_sees_the_state_of_its_version(site: Site) -> None:
    """Rank 1 comes after rank 0 in the same process, and sees what it would see in another."""
    seen: list[tuple[int, int, int]] = []

    def look(worker: psa.Worker) -> None:
        seen.append((worker.version, worker.rank, len(worker.state["seen"])))
        note(worker)

    run(site, "state-ranks", 4, look)
    assert all(length == version for version, _, length in seen)
    assert {rank for _, rank, _ in seen} == {0, 1}


def test_other_ranks_may_not_change_it(site: Site) -> None:
    with pytest.raises(UsageError, match=r"changed in a batch of rank 1.*worker\.rank == 0"):
        run(site, "state-other", 4, lambda worker: worker.state.update(last=worker.rank))


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ((1, 2), r"worker\.state\['x'\] is a tuple"),
        ({1: 2}, r"worker\.state\['x'\] has a key that is no string"),
        (object(), "is a object"),
        ([{"y": torch.float32}], r"worker\.state\['x'\]\[0\]\['y'\] is a dtype"),
        (torch.zeros(1 << 19), r"has \d+ bytes, and there is room for 16384"),
    ],
    ids=["tuple", "key", "object", "nested", "large"],
)
def test_what_it_can_not_hold_is_refused(site: Site, value: object, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        run(site, f"state-{abs(hash(what))}", 4, lambda worker: worker.state.update(x=value))


@pytest.mark.parametrize("mode", ["async", "local:steps=2", "sync:backup=1"])
def test_modes_without_one_version_are_refused(site: Site, mode: str) -> None:
    with pytest.raises(UsageError, match="goes with mode sync"):
        run(site, f"state-mode-{mode[:3]}-{mode[-1]}", 4, mode=mode)


def test_a_worker_without_it_says_what_to_write(site: Site) -> None:
    with pytest.raises(UsageError, match=r"state=\{\}"):
        run(site, "state-none", 4, lambda worker: worker.state.update(x=1), state=None)


def test_it_does_not_change_what_is_trained(site: Site) -> None:
    run(site, "state-with", 5, note)
    run(site, "state-without", 5, state=None)
    with psa.Store("state-with", site.redis) as ours, psa.Store("state-without", site.redis) as theirs:
        left, right = ours.state_dict(), theirs.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_bytes_say_the_same_again() -> None:
    values = {
        "a": [1, 2.5, float("inf"), None, True, "ä"],
        "b": {"d": torch.tensor(7), "c": torch.randn(2, 3, dtype=torch.bfloat16)},
        "e": torch.zeros(0, 4),
    }
    again = decode(encode(values))
    assert again["a"] == values["a"]
    assert torch.equal(again["b"]["c"], values["b"]["c"]) and again["b"]["d"] == 7  # type: ignore[call-overload, index]
    assert again["e"].shape == (0, 4)
    assert encode(again) == encode(values)
