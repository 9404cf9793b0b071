"""The server's synchronous course: what may be kept of it when the epoch ends in the middle of a step."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any, cast

from psa_store.journal import Journal
from psa_store.mode import SYNC
from psa_store.plan import Plan
from psa_store.server.course import Tools
from psa_store.server.letters import Applied
from psa_store.server.sync_course import SyncCourse
from psa_store.telemetry import Role, Vitals


class Lazy:
    """Arithmetic that has been asked, and is not done."""

    def __init__(self) -> None:
        self.asked = 0

    def on_all(self, *_: Any, **__: Any) -> None:
        self.asked += 1


def course_of_nothing(arithmetic: Lazy) -> SyncCourse:
    nothing = SimpleNamespace(
        answer=lambda now: None,
        finish_is_due=lambda version: False,
        begin_streaming=lambda version: False,
        readers=list,
        detach_all=lambda: None,
        adopt=lambda work: None,
    )
    tools = SimpleNamespace(
        config=SimpleNamespace(ranks=2, commit_every=0, mode=SYNC),
        layout=SimpleNamespace(versioned=()),
        optimizer=SimpleNamespace(clip_grad_norm=None),
        arithmetic=arithmetic,
        committer=nothing,
        publication=nothing,
        pending=nothing,
        reception=nothing,
        peers={},
        journal=Journal(None, "server", "s"),
        vitals=Vitals(Role.SERVER, "s"),
        report=lambda report: None,
    )
    plan = Plan(epoch=1, revision=1, resume=7, servers=(), owners=(), ranks=("a", "b"))
    return SyncCourse(cast(Tools, tools), plan, {})


def test_shards_in_the_middle_of_a_step_stand_at_no_version() -> None:
    """Found by reading: released then, they were kept as the version before, if that had been committed meanwhile."""
    arithmetic = Lazy()
    course = course_of_nothing(arithmetic)
    assert course.stands_at == 7
    course.advance()  # nobody is waited for: there are no shards
    assert arithmetic.asked == 1 and course.stands_at is None
    course.obey(Applied(1))
    assert course.stands_at == 8


def test_a_course_that_is_over_is_gone_at_once() -> None:
    """Its shards may be gigabytes, and nothing calls the garbage collector in a server that goes on."""
    gc.disable()
    try:
        course = weakref.ref(course_of_nothing(Lazy()))
        assert course() is None
    finally:
        gc.enable()
