"""torch.distributed.checkpoint reads a job and begins one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

import psa_store as psa
from psa_store.errors import UnknownJob, UsageError
from psa_store.integrations.dcp import PsaReader, PsaWriter
from tests.harness import Servers, Site

SHARD_BYTES = 4096
STEPS = 3


class Tied(nn.Module):
    """Larger than a shard, with bfloat16, tied weights and buffers of both kinds."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.matrix = nn.Parameter(torch.randn(90, 50, generator=draw))
        self.narrow = nn.Parameter(torch.randn(34, generator=draw).to(torch.bfloat16))
        self.first = nn.Linear(4, 4, bias=False)
        self.first.weight = nn.Parameter(torch.randn(4, 4, generator=draw))
        self.last = nn.Linear(4, 4, bias=False)
        self.last.weight = self.first.weight
        self.register_buffer("seen", torch.tensor(5 + seed))
        self.register_buffer("hidden", torch.full((3,), 7.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.last(self.first(x)).sum() + self.matrix.sum() + self.narrow.float().sum() + self.hidden.sum()


@pytest.fixture(autouse=True)
def environment(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in site.env.items():
        monkeypatch.setenv(name, value)


def save(job: str, model: nn.Module, state: dict[str, object] | None = None) -> None:
    writer = PsaWriter(job, model, optimizer=psa.optim.SGD(lr=1.0), shard_bytes=SHARD_BYTES)
    dcp.save(model.state_dict() if state is None else state, storage_writer=writer, no_dist=True)


def load(job: str, version: int | None = None) -> nn.Module:
    model = Tied(seed=1)
    dcp.load(model.state_dict(), storage_reader=PsaReader(job, version), no_dist=True)
    return model


def equal(ours: nn.Module, theirs: nn.Module) -> bool:
    mine, other = ours.state_dict(), theirs.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def train(site: Site, job: str) -> Tied:
    """Go on with a job for a few steps; its server leaves."""
    servers, model = Servers(site, job), Tied(seed=2)
    with psa.Worker(job, model, optimizer=psa.optim.SGD(lr=1.0), steps=STEPS, shard_bytes=SHARD_BYTES) as worker:
        for batch in worker.batches(torch.ones(8, 4), batch_size=2):
            model(batch).backward()
            worker.step()
    servers.stop()
    return model


def test_what_is_saved_is_trained_on_and_read(site: Site) -> None:
    begun = Tied()
    save("dcp-begun", begun)
    assert equal(load("dcp-begun"), begun)
    trained = train(site, "dcp-begun")
    assert int(trained.seen) == int(begun.seen) + STEPS
    assert equal(load("dcp-begun"), trained) and not equal(trained, begun)
    with psa.Store("dcp-begun") as store:
        assert store.versions()[-1] == STEPS
        assert torch.equal(load("dcp-begun", store.versions()[-1]).matrix, trained.matrix)


def test_two_processes_read_and_write_in_shards(site: Site, tmp_path: Path) -> None:
    save("dcp-shards", Tied())
    program = [sys.executable, "-m", "tests.integration.dcp_peer"]
    peers = [
        subprocess.Popen(
            [*program, str(rank), str(tmp_path / "rendezvous"), "dcp-shards", "dcp-shards-again"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        for peer in peers:
            output, _ = peer.communicate(timeout=300)
            assert peer.returncode == 0, output
    finally:
        for peer in peers:
            peer.kill()
            peer.wait()
    assert equal(load("dcp-shards-again"), Tied())


def test_errors_say_what_to_do(site: Site) -> None:
    save("dcp-errors", Tied())
    with pytest.raises(UsageError, match="'dcp-errors' exists in Redis"):
        save("dcp-errors", Tied())
    with pytest.raises(UnknownJob, match="no job 'dcp-absent'"):
        PsaReader("dcp-absent")
    with pytest.raises(UsageError, match=r"neither a checkpoint nor a version 4"):
        PsaReader("dcp-errors", 4)
    whole = Tied().state_dict()
    for state, why in (
        ({**whole, "term": 3}, "term: is no tensor"),
        ({**whole, "other": torch.zeros(2)}, "'other' is not in the model"),
        ({name: tensor for name, tensor in whole.items() if name != "narrow"}, "'narrow' is in the model, but"),
        ({**whole, "matrix": torch.zeros(2)}, r"'matrix': dcp.save was given torch.float32 of \(2,\)"),
    ):
        with pytest.raises(CheckpointException, match=why):
            save("dcp-refused", Tied(), state)
    with pytest.raises(UnknownJob):
        PsaReader("dcp-refused")
