"""How many versions Redis must keep: whenever servers die, all of them have one in common."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from psa_store.cluster import newest_common
from psa_store.consistency import SyncStep
from psa_store.consistency.instructions import (
    Applied,
    Apply,
    Commit,
    Committed,
    Copied,
    Copy,
    CopyDelayed,
    NormsTold,
    TellNorms,
)
from psa_store.job.config import JobConfig

COMMIT_EVERY = 2
KEPT = JobConfig("job", 1, 0, {"name": "SGD"}, "layout").versions_kept


class Server:
    """The owner of one shard, and what of it is in Redis. A commit takes as long as the test likes."""

    def __init__(self, shard: int) -> None:
        self.shard = shard
        self.step = SyncStep(
            version=0,
            ranks=1,
            trained=[shard],
            buffers=[],
            all_shards=(0, 1),
            needs_norms=False,
            commit_every=COMMIT_EVERY,
        )
        self.stored = [0]
        self.committing: int | None = None

    def work(self, peer: Server) -> None:
        """Do all that can be done now, with the gradient of the present step."""
        self.step.accept(self.step.version, self.shard, 0)
        while todo := self.step.ready(may_copy=self.committing is None):
            for instruction in todo:
                match instruction:
                    case Copy() if self.committing is None:
                        self.step.handle(Copied())
                    case Copy():
                        self.step.handle(CopyDelayed())
                    case Commit():
                        self.committing = instruction.version
                    case TellNorms():
                        peer.step.handle(NormsTold(instruction.step, instruction.squared_norms))
                    case Apply():
                        self.step.handle(Applied())
                        self.step.accept(self.step.version, self.shard, 0)

    def be_done(self) -> None:
        """Redis has what is being committed, and drops what it keeps no longer."""
        if self.committing is not None:
            self.stored = [*self.stored, self.committing][-KEPT:]
            self.step.handle(Committed(self.committing))
            self.committing = None


def servers() -> tuple[Server, Server]:
    return Server(0), Server(1)


@settings(max_examples=50)
@given(st.lists(st.sampled_from(["here", "there", "here is durable", "there is durable"]), max_size=60))
def test_all_servers_have_a_version_in_common_however_long_each_commit_takes(actions: list[str]) -> None:
    here, there = servers()
    for action in actions:
        match action:
            case "here":
                here.work(there)
            case "there":
                there.work(here)
            case "here is durable":
                here.be_done()
            case _:
                there.be_done()
        assert newest_common({0: here.stored, 1: there.stored}) is not None


def test_the_worst_case_is_two_commits_apart() -> None:
    """One server commits at once, and the commit of the other never ends: what it has is the oldest that is kept."""
    fast, slow = servers()
    for _ in range(10):
        for server, peer in ((fast, slow), (slow, fast)):
            server.work(peer)
        fast.be_done()
    assert (fast.stored, slow.stored, slow.committing) == ([0, 2, 4], [0], 2)
    assert newest_common({0: fast.stored, 1: slow.stored}) == 0
