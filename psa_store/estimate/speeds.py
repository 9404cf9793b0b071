"""Measures how fast this machine does what a step of a given job consists of, on scratch memory. Takes seconds."""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from psa_store.compression.codec import decode, encode
from psa_store.estimate.forecast import Speeds
from psa_store.job.average import Average
from psa_store.job.config import JobConfig
from psa_store.job.dtypes import ITEM_BYTES
from psa_store.job.layout import Layout, TensorRole, TensorSpec, make_layout
from psa_store.optim import Optimizer, from_dict
from psa_store.optim.kernels import ShardKernel, init_slots, make_scratch
from psa_store.optim.tensors import to_torch
from psa_store.wire import measure_loopback

_SCRATCH_BYTES = 32 << 20
"""At most: more than the caches hold, so that a larger model takes as long for each element."""
_LOOPBACK_BYTES = 128 << 20
_LOOPBACK_S = 2.0
_LOOKS = 5
_MORE_RANKS = 3


def measure(config: JobConfig, layout: Layout, redis_bytes_per_s: float | None) -> Speeds:
    """Measure; torch runs in one thread meanwhile, as it does in servers.

    Raises:
        Disconnected: there is no loopback.
        DataIntegrity: the optimizer cannot be read.
    """
    counts = Counter[str]()
    for shard in layout.shards_of(TensorRole.TRAINED):
        counts[shard.dtype] += shard.numel
    dtype, most = counts.most_common(1)[0] if counts else ("float32", 1)
    elements = min(most, _SCRATCH_BYTES // ITEM_BYTES[dtype])
    flat = torch.full((elements,), 1e-3, dtype=to_torch(dtype))
    server_rule = from_dict(config.server_optimizer)
    with _one_thread():
        copy = torch.empty_like(flat)
        update_s = with_more_s = _update_s(server_rule, flat, dtype, 1, config.average)
        if config.ranks > 1:
            with_more_s = _update_s(server_rule, flat, dtype, 1 + _MORE_RANKS, config.average)
        encode_s, decode_s = _codec_s(config, flat, dtype)
        return Speeds(
            cores=len(os.sched_getaffinity(0)),
            copy_bytes_per_s=flat.nbytes / _typical_s(lambda: copy.copy_(flat)),
            wire_bytes_per_s=measure_loopback(_LOOPBACK_BYTES, _LOOPBACK_S),
            check_s=_typical_s(lambda: torch.linalg.vector_norm(flat)) / elements,
            encode_s=encode_s,
            decode_s=decode_s,
            update_s=update_s,
            part_s=max(0.0, with_more_s - update_s) / _MORE_RANKS,
            local_update_s=_update_s(from_dict(config.optimizer), flat, dtype, 1) if config.ranks_update else 0.0,
            redis_bytes_per_s=redis_bytes_per_s,
        )


def _update_s(optimizer: Optimizer, flat: Tensor, dtype: str, parts: int, average: Average | None = None) -> float:
    """Seconds per element of one update with the gradients of so many ranks."""
    spec = TensorSpec(("scratch",), (flat.numel(),), dtype, TensorRole.TRAINED)
    layout = make_layout([spec], _SCRATCH_BYTES)
    (shard,) = layout.shards
    param = torch.zeros(shard.numel, dtype=flat.dtype)
    gradient = torch.zeros_like(param)
    gradient[: flat.numel()] = flat
    gradients = [gradient.clone() for _ in range(parts)]
    slots = init_slots(optimizer, param, shard, layout, average)
    kernel = ShardKernel(optimizer, layout, shard, param, slots, average=average)
    scratch = make_scratch()

    def step() -> None:
        if optimizer.clip_grad_norm is not None:
            kernel.squared_norm(gradients, scratch)
        kernel.apply(gradients, scratch, step=1, opt_step=1, grad_scale=1.0)

    return _typical_s(step) / flat.numel()


def _codec_s(config: JobConfig, flat: Tensor, dtype: str) -> tuple[float, float]:
    """Seconds per element of compressing a gradient and of reading it; 0 where none is compressed."""
    compression = config.compression
    if not compression.applies_to(dtype):
        return 0.0, 0.0
    payload = torch.empty(compression.payload_bytes(flat.numel()), dtype=torch.uint8)
    residual = torch.zeros_like(flat) if compression.needs_residual else None
    out = torch.empty_like(flat)
    encode_s = _typical_s(lambda: encode(compression, flat, payload, stream=1, residual=residual))
    return encode_s / flat.numel(), _typical_s(lambda: decode(compression, payload, out)) / flat.numel()


def _typical_s(action: Callable[[], object]) -> float:
    """The median of a few, after one that warms up."""
    action()
    taken = []
    for _ in range(_LOOKS):
        started_s = time.perf_counter()
        action()
        taken.append(time.perf_counter() - started_s)
    return statistics.median(taken)


@contextmanager
def _one_thread() -> Iterator[None]:
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(former)
