"""Which plan a worker follows, without servers: they are stood in for by what a session asks of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from psa_store.cluster import Plan, Server
from psa_store.job.config import JobConfig
from psa_store.optim import SGD
from psa_store.testing.journal import Journal
from psa_store.wire import Header, Kind, Reason
from psa_store.worker.health import Progress
from psa_store.worker.membership import Standing
from psa_store.worker.server_connections import Answer
from psa_store.worker.session import Follower, PlanSession, Tools


def plan_of(term: int, revision: int) -> Plan:
    server = Server(id="server-a", address="127.0.0.1:1", local="", host="here")
    return Plan(term=term, revision=revision, resume=30, servers=(server,), owners=(0,), cells=("worker-a",))


class Scene:
    """A session, and what it is told."""

    def __init__(self) -> None:
        self.refreshed = 0
        self.answers: list[Answer] = []
        self.membership = SimpleNamespace(standing=Standing("worker-a"), refresh=self._refresh)
        self.servers = SimpleNamespace(
            follow=lambda plan: None,
            connect=lambda job, member: True,
            disconnect=lambda: None,
            pump=lambda timeout_s: [self.answers.pop()] if self.answers else [],
        )
        config = JobConfig("demo", 1, 0, SGD().to_dict(), "layout")
        tools = SimpleNamespace(
            config=config,
            steps=None,
            read_config=lambda: config,
            layout=SimpleNamespace(versioned=(), shards_of=lambda role: ()),
            servers=self.servers,
            membership=self.membership,
            model=SimpleNamespace(hide=lambda: None),
            journal=Journal(None, "worker", "w"),
            progress=Progress(),
        )
        follower = SimpleNamespace(
            load=lambda plan: True,
            replanned=lambda: None,
            lost=lambda: None,
            refused=lambda header: None,
            place=None,
            awaited="",
        )
        self.session = PlanSession(cast(Tools, tools), cast(Follower, follower))

    def _refresh(self) -> None:
        self.refreshed += 1

    def learn(self, plan: Plan) -> None:
        self.membership.standing = Standing("worker-a", plan, (0,))

    def refuse(self, term: int, revision: int) -> None:
        """A server says that it follows another plan."""
        self.answers.append(Answer(Header(Kind.REFUSED, term, revision, reason=Reason.STALE), "server-a"))
        assert self.session.wait()


def test_a_plan_older_than_that_of_a_server_is_not_followed() -> None:
    scene = Scene()
    scene.learn(plan_of(3, 4))
    assert scene.session.settle()
    scene.refuse(3, 6)
    assert not scene.session.settle() and scene.refreshed == 2
    scene.learn(plan_of(3, 6))
    assert scene.session.settle()


def test_the_first_plan_after_zookeeper_has_lost_all_is_newer_than_any_of_a_term_before() -> None:
    """Found by chaos: a worker that had once been refused under revision 4 waited for ever beside revision 1."""
    scene = Scene()
    scene.learn(plan_of(3, 3))
    assert scene.session.settle()
    scene.refuse(3, 4)
    scene.learn(plan_of(4, 1))
    assert scene.session.settle()
    assert scene.session.term == 4


def test_a_plan_that_comes_while_something_is_asked_for_is_followed_before_it_is_asked_for_again() -> None:
    """Found by a worker that asked for the job's end without a pause, and queued 20 GB of questions."""
    scene = Scene()
    scene.learn(plan_of(3, 3))
    assert scene.session.settle()
    asked = []

    def ask(servers: set[str], version: int) -> None:
        asked.append(version)
        scene.learn(plan_of(3, 4))

    scene.servers.finish = ask
    assert not scene.session.finish(["server-a"], 12)
    assert asked == [12] and not scene.session.stands
    assert scene.session.settle() and scene.session.plan.revision == 4
