"""Named places in the code where a test injects a fault: the process kills or stops itself there, at the worst moment.

Off unless PSA_FAILPOINTS names a folder when a process passes its first failpoint. A failpoint that is *armed* in that
folder acts once, in the first process that passes it. Arming is writing a file with the name of the failpoint; a hit
begins with renaming that file, which the file system grants to one process only, and leaves it there as the proof that
the failpoint was reached, with the id of the process.
"""

from __future__ import annotations

import os
import signal
import threading
from enum import StrEnum
from functools import partial
from pathlib import Path

ENV = "PSA_FAILPOINTS"

FAILPOINTS = {
    "barrier.arrived": "a member has arrived at a barrier and has not read which others have",
    "barrier.before_decision": "a member knows the outcome of a barrier and has not written it",
    "barrier.decided": "a barrier is done or aborted, its writer has no answer yet",
    "barrier.opened": "a barrier is open, its members do not know",
    "cell.backward": "a cell is about to go backward; index: its micro-batch",
    "cell.sent": "a worker has sent what a cell of another worker needs, and has not gone on",
    "checkpoint.before_pins": "a version is committed for a checkpoint and not pinned",
    "checkpoint.done": "all servers have pinned, the checkpoint has no document",
    "checkpoint.opened": "a checkpoint's barrier is open, the plan does not name it",
    "checkpoint.pinned": "a server has pinned its shards and has not reported it",
    "checkpoint.written": "a checkpoint is complete and out of the plan, its requester has no answer yet",
    "commit.after_flip": "a shard is durable, its committer has no answer yet",
    "commit.before_flip": "all chunks of a shard are written, its head still names the old ones",
    "commit.before_sweep": "all shards are durable, what they replaced is not removed",
    "commit.chunk": "a chunk is written; index: how many of this commit are",
    "create.before_documents": "the first version of a job is written, the job does not exist yet",
    "create.sealed": "the first term is sealed, nothing is written",
    "fork.adopted": "the shards of a fork refer to what they share, the fork does not exist yet",
    "handover.frozen": "a server has stopped applying steps for a hand-over, its controller does not know",
    "handover.stopped": "a server has committed for a hand-over, its controller does not know",
    "push.done": "a worker has sent its whole gradient and has no acknowledgement",
    "push.middle": "a worker has sent a part of its gradient; index: the last shard of it",
    "rollback.begun": "the term of a rollback is sealed, nothing is changed",
    "rollback.restored": "the older version is in place, newer ones are still there",
    "rollback.unwound": "the older version is the newest, no plan says so",
    "serve.loaded": "a server has loaded its shards and serves no worker yet",
    "step.applied": "a version is applied, no worker knows",
    "step.complete": "all gradients of a step have arrived, none is applied",
    "takeover.elected": "the controller is about to take a term",
    "takeover.term": "the term is taken, nothing is sealed",
    "takeover.published": "the new plan is written, its controller has no answer yet",
    "takeover.sealed": "all shards are sealed, nothing is read",
    "takeover.trimmed": "Redis is ready for the term, the plan is not written",
    "worker.computing": "a worker has begun a step and has pushed nothing of it",
    "worker.loaded": "a worker has the parameters of a term and has computed nothing",
}
"""Every failpoint and what is true where it stands."""


class FailpointAction(StrEnum):
    """What happens to a process that passes an armed failpoint: SIGKILL, or SIGSTOP."""

    KILL = "kill"
    STOP = "stop"


_enabled = True
"""False once the environment was found to name no folder: from then on a failpoint costs one test of a flag."""


def are_on() -> bool:
    """Tell whether this process may be asked to act: a path that each step takes asks once, before."""
    return bool(os.environ.get(ENV))


def failpoint(name: str, index: int = 0) -> None:
    """Act here if that was asked for. ``index`` tells apart the passes of a loop through one place."""
    if _enabled:
        _pass(name, index)


def arm(folder: Path, name: str, action: FailpointAction, at_least: int = 0) -> None:
    """Make the next process act that passes ``name`` with an index of ``at_least`` or more.

    Forget earlier hits: the same process may be hit again.
    """
    assert name in FAILPOINTS, name
    for path in folder.glob(f"{name}.hit.*"):
        path.unlink()
    draft = folder / f".{name}"
    draft.write_text(f"{action.value} {at_least}")
    draft.rename(folder / name)


def disarm(folder: Path, name: str) -> bool:
    """Undo :func:`arm`; return False if the failpoint was hit already."""
    try:
        (folder / name).unlink()
    except FileNotFoundError:
        return False
    return True


def hit(folder: Path, name: str) -> list[int]:
    """Return the id of the process that has hit ``name`` since it was armed, if one has."""
    return [int(path.suffix[1:]) for path in folder.glob(f"{name}.hit.*")]


def _pass(name: str, index: int) -> None:
    folder = os.environ.get(ENV)
    if not folder:
        _set_enabled(False)
        return
    armed = Path(folder) / name
    try:
        action, at_least = armed.read_text().split()
        if index < int(at_least):
            return
        armed.rename(armed.with_name(f"{name}.hit.{os.getpid()}"))
    except FileNotFoundError:
        return  # not armed, or another process was faster
    # To this thread: another one would let it run on for a moment before the whole process stands still.
    signal.pthread_kill(threading.get_ident(), signal.SIGKILL if action == FailpointAction.KILL else signal.SIGSTOP)


def _set_enabled(enabled: bool) -> None:
    global _enabled
    _enabled = enabled


# A child that is forked from a preloaded process gets its environment after the fork.
os.register_at_fork(after_in_child=partial(_set_enabled, True))
