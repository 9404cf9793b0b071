"""Named places in the code where a test acts: the process kills or stops itself there, at the worst moment.

Off unless PSA_FAILPOINTS names a folder; then one that is *armed* there acts once, in whichever process passes it
first. Arming is writing a file with the name of the failpoint; hitting begins with moving that file away, which the
file system lets one process do, and leaves it as the proof that the failpoint was reached, and by whom.
"""

from __future__ import annotations

import os
import signal
import threading
from enum import StrEnum
from pathlib import Path

ENV = "PSA_FAILPOINTS"

FAILPOINTS = {
    "barrier.arrived": "a member stands at a barrier, and has not looked who else does",
    "barrier.before_decision": "somebody knows what must become of a barrier, and has not written it",
    "barrier.decided": "a barrier is done or aborted, who wrote it does not know",
    "barrier.opened": "a barrier is open, its members have not been told",
    "checkpoint.before_pins": "a version is committed for a checkpoint, and not pinned",
    "checkpoint.done": "all servers have pinned, the checkpoint has no document",
    "checkpoint.opened": "a checkpoint's barrier is open, the plan does not name it",
    "checkpoint.pinned": "a server has pinned, and has not said so",
    "checkpoint.written": "a checkpoint is there and the plan names it no longer, who asked for it does not know",
    "commit.after_flip": "a shard is durable, its committer does not know",
    "commit.before_flip": "all chunks of a shard are written, its head names the old ones",
    "commit.before_sweep": "all shards are durable, what they replaced is not removed",
    "commit.chunk": "a chunk is written; index: how many are, in this commit",
    "create.before_documents": "its first version is written, but the job does not exist yet",
    "create.sealed": "the first term is sealed, nothing is written",
    "fork.adopted": "the shards of a fork name what they share, but it does not exist yet",
    "handover.frozen": "a server stands still for a hand-over, its controller does not know",
    "handover.stopped": "a server has committed for a hand-over, its controller does not know",
    "push.done": "a worker's whole gradient has left, its acknowledgement has not come",
    "push.middle": "some shards of a gradient have left; index: the last of them",
    "rollback.begun": "the term of a rollback is sealed, nothing is changed",
    "rollback.restored": "the older version is in its place, newer ones are there still",
    "rollback.unwound": "the older version is the newest, no plan says so",
    "serve.loaded": "a server has loaded its shards, and serves nobody yet",
    "step.applied": "a version is made, no worker knows",
    "step.complete": "all gradients of a step are here, none is applied",
    "takeover.elected": "the controller is about to begin a term",
    "takeover.term": "the term is taken, nothing is sealed",
    "takeover.published": "the new plan is written, its controller does not know",
    "takeover.sealed": "all shards are sealed, nothing is read",
    "takeover.trimmed": "Redis is ready for the term, the plan is not written",
    "worker.computing": "a worker has begun a step, and has pushed nothing of it",
    "worker.loaded": "a worker has the parameters of a term, and has computed nothing",
}
"""Every failpoint and what is true where it stands."""


class FailpointAction(StrEnum):
    """What happens to a process that passes an armed failpoint: SIGKILL, or SIGSTOP."""

    KILL = "kill"
    STOP = "stop"


def failpoint(name: str, index: int = 0) -> None:
    """Act here if that was asked for. ``index`` tells apart the many times that a loop passes one place."""
    folder = os.environ.get(ENV)
    if folder:
        _pass(Path(folder), name, index)


def arm(folder: Path, name: str, action: FailpointAction, at_least: int = 0) -> None:
    """Let the next process kill or stop itself that passes ``name`` with an index of ``at_least`` or more.

    Earlier hits are forgotten: the same process may be hit again.
    """
    assert name in FAILPOINTS, name
    for path in folder.glob(f"{name}.hit.*"):
        path.unlink()
    draft = folder / f".{name}"
    draft.write_text(f"{action.value} {at_least}")
    draft.rename(folder / name)


def disarm(folder: Path, name: str) -> bool:
    """Take back what :func:`arm` did; False if the failpoint was hit already."""
    try:
        (folder / name).unlink()
    except FileNotFoundError:
        return False
    return True


def hit(folder: Path, name: str) -> list[int]:
    """The process that has hit ``name`` since it was armed, if one has."""
    return [int(path.suffix[1:]) for path in folder.glob(f"{name}.hit.*")]


def _pass(folder: Path, name: str, index: int) -> None:
    armed = folder / name
    try:
        action, at_least = armed.read_text().split()
        if index < int(at_least):
            return
        armed.rename(folder / f"{name}.hit.{os.getpid()}")
    except FileNotFoundError:
        return  # not armed, or another process was faster
    # To this thread: another one would let it run on for a moment before the whole process stands still.
    signal.pthread_kill(threading.get_ident(), signal.SIGKILL if action == FailpointAction.KILL else signal.SIGSTOP)
