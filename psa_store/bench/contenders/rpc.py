"""A parameter server over torch.distributed.rpc, as in PyTorch's tutorial on batch updates.

Workers push their gradient in a remote call, whose answer is the parameters of the next version. There are two of
them: one sends flat tensors, the other lists of tensors of 4 MiB with memory of their own (views would be copied before
they are sent). The latter is faster where page faults are dear, because the allocator has such sizes at hand when the
next message comes, whereas memory for one large tensor is asked of the kernel each time.

TensorPipe may move the bytes as it likes (it reads them from the other process's memory where the kernel lets it), but
must signal over sockets: otherwise, over shared memory, it spins in a thread of every process, also when there is
nothing to do, which is slower on machines with few cores and would slow down all other contenders.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from psa_store.bench.children import ChildProcesses, CommandPipe, Stepper
from psa_store.bench.contender import Contender
from psa_store.bench.names import RPC, RPC_PIECES
from psa_store.bench.workload import Pieces, Workload

_LOOPBACK = {"TP_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
_SERVER = "server"
_WITHOUT_LIMIT_S = 0.0


def why_not() -> str:
    """Why this torch cannot do it; empty if it can."""
    import torch.distributed as dist

    if not dist.is_available():
        return "this torch is built without torch.distributed"
    import torch.distributed.rpc as rpc

    return "" if rpc.is_available() else "this torch is built without torch.distributed.rpc"


def start_flat(workload: Workload, processes: ChildProcesses, folder: Path) -> Contender:
    """A server, and a process a rank; they meet in a file of ``folder``."""
    return _start(RPC, workload, [(0, workload.elements)], processes, str(folder / "rpc"))


def start_pieces(workload: Workload, processes: ChildProcesses, folder: Path) -> Contender:
    """As :func:`start_flat`, with a tensor for each of the model's."""
    return _start(RPC_PIECES, workload, workload.pieces(), processes, str(folder / "rpc-pieces"))


def _start(name: str, workload: Workload, pieces: Pieces, processes: ChildProcesses, meeting: str) -> Contender:
    server = processes.spawn(f"{name}, server", _serve, workload, pieces, meeting, env=_LOOPBACK)
    workers = [
        processes.spawn(f"{name}, worker {rank}", _worker, workload, pieces, rank, meeting, env=_LOOPBACK)
        for rank in range(workload.workers)
    ]
    return Contender(name, workers, [server])


def _join(name: str, member: int, workload: Workload, meeting: str) -> None:
    import torch.distributed.rpc as rpc

    warnings.filterwarnings("ignore", module="torch.distributed", category=UserWarning)  # of its own way to meet
    rpc.init_rpc(  # type: ignore[no-untyped-call]
        name,
        rank=member,
        world_size=workload.workers + 1,
        rpc_backend_options=rpc.TensorPipeRpcBackendOptions(
            init_method=f"file://{meeting}",
            rpc_timeout=_WITHOUT_LIMIT_S,
            num_worker_threads=workload.workers + 2,
            _transports=["uv"],
        ),
    )


def _serve(_orders: CommandPipe, workload: Workload, pieces: Pieces, meeting: str) -> None:
    import torch.distributed.rpc as rpc

    from psa_store.bench.contenders.rpc_server import set_up

    torch.set_num_threads(2)
    set_up(workload, pieces)
    _join(_SERVER, workload.workers, workload, meeting)
    rpc.shutdown()


def _worker(commands: CommandPipe, workload: Workload, pieces: Pieces, rank: int, meeting: str) -> None:
    import torch.distributed.rpc as rpc

    _join(f"worker{rank}", rank, workload, meeting)
    commands.handle(_Steps(workload, pieces, rank))
    rpc.shutdown()


class _Steps(Stepper):
    def __init__(self, workload: Workload, pieces: Pieces, rank: int) -> None:
        import torch.distributed.rpc as rpc

        from psa_store.bench.contenders.rpc_server import push

        self._call = rpc.rpc_sync
        self._push = push
        self._workload = workload
        self._gradient = [workload.gradient(rank, low, high) for low, high in pieces]
        self._parameters: list[Tensor] = []

    def step(self) -> None:
        self._parameters = self._call(_SERVER, self._push, args=(self._gradient,))

    def check(self, steps: int) -> None:
        self._workload.check(self._parameters, steps)
