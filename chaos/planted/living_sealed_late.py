"""A controller seals the shards of dead servers, reads all heads, and seals those of living servers later."""

from __future__ import annotations

import threading
from typing import Any

from psa_store.cluster import Plan, TakeOver
from psa_store.coordination import StoredPlan, known_plan
from psa_store.job.document import Damaged
from psa_store.server import controller
from psa_store.server.committer import Committer
from psa_store.server.controller import Controller
from psa_store.server.messages import Committed, Lost
from psa_store.server.work import Work
from psa_store.storage import Head, RedisStore

_SLOW_S = 1.5
"""What a commit takes where no controller is: so it is under way when the controller dies, which has committed."""
_BETWEEN_S = 3.0
_governs = threading.Event()
"""Whether this process is the controller."""


def plant() -> None:
    """Have the seal return, of the shards of living servers, what was there before it."""
    turn, commit, original = Controller.turn, Committer._commit, controller.take_over

    def note(self: Controller, member: str, seen: StoredPlan | Damaged | None) -> None:
        turn(self, member, seen)
        if self._elected:
            _governs.set()

    def commit_slowly(self: Committer, work: Work) -> Committed | Lost | None:
        _governs.wait(_SLOW_S)
        return commit(self, work)

    def take_over(action: TakeOver, seen: StoredPlan | Damaged | None, **named: Any) -> Plan | None:
        store: RedisStore = named["store"]
        plan = known_plan(seen)
        living = [] if plan is None else [shard for server in action.servers for shard in plan.shards_of(server.id)]
        early = {head.shard: head for head in store.heads(named["job"], living)}
        if early:
            threading.Event().wait(_BETWEEN_S)
        seal = store.seal

        def seal_late(*arguments: Any) -> list[Head]:
            return [early.get(head.shard, head) for head in seal(*arguments)]

        store.seal = seal_late  # type: ignore[method-assign]
        try:
            return original(action, seen, **named)
        finally:
            store.seal = seal  # type: ignore[method-assign]

    Controller.turn = note  # type: ignore[method-assign]
    Committer._commit = commit_slowly  # type: ignore[method-assign]
    controller.take_over = take_over  # type: ignore[assignment]
