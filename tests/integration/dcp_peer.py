"""One of two processes of test_dcp: loads a job's tensors in shards, then saves them as another job.

Arguments: rank, file for torch's rendezvous, job to load, job to save.
"""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import psa_store as psa
from psa_store.integrations.dcp import PsaReader, PsaWriter
from tests.integration.test_dcp import SHARD_BYTES, Tied


def main(rank: int, rendezvous: str, source: str, target: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    mesh = init_device_mesh("cpu", (2,))
    model = Tied()
    state = {
        name: distribute_tensor(torch.zeros_like(tensor), mesh, [Shard(dim)]) if tensor.dim() else tensor.clone()
        for name, tensor in model.state_dict().items()
        for dim in [tensor.dim() - 1 if name == "matrix" else 0]
    }
    dcp.load(state, storage_reader=PsaReader(source))
    with psa.Store(source) as store:
        expected = store.state_dict()
    for name, tensor in state.items():
        whole = tensor.full_tensor() if tensor.dim() else tensor
        assert torch.equal(whole, expected[name]), name
    writer = PsaWriter(target, model, optimizer=psa.optim.SGD(lr=1.0), shard_bytes=SHARD_BYTES)
    dcp.save(state, storage_writer=writer)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
