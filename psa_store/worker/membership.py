"""A worker's place in ZooKeeper and the newest plan, kept by a thread so that training never waits for ZooKeeper."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

from psa_store import logs
from psa_store.cluster import Member, Plan, ProcessRole, plan_from_json
from psa_store.coordination import Coordination
from psa_store.coordination.identity import new_member_id
from psa_store.errors import DependencyUnreachable, PsaError
from psa_store.wire import Mailbox, host_identity

_LOOK_AGAIN_S = 5.0
_RETRY_S = 0.1


@dataclass(frozen=True, slots=True)
class Standing:
    """Who we are in the job, and what the plan says."""

    member: str
    plan: Plan | None


class Membership:
    """Owns the thread ``psa-plan``. The standing is replaced as a whole, so any thread may read it.

    ``woken`` is set by ZooKeeper's watches; every change of the standing is posted to ``mailbox``.
    """

    def __init__(self, member: str, coordination: Coordination, woken: threading.Event, mailbox: Mailbox[None]) -> None:
        self._coordination = coordination
        self._woken = woken
        self._mailbox = mailbox
        self._log = logs.get_logger()
        self._generation = coordination.session_generation()
        self._closing = False
        self._standing = Standing(member, None)
        self._failure: PsaError | None = None
        self._join(member)
        self._thread = threading.Thread(target=self._run, name="psa-plan")
        self._thread.start()

    @property
    def standing(self) -> Standing:
        """What is known now; raises what made it impossible to know more (an unreadable plan)."""
        if self._failure is not None:
            raise self._failure
        return self._standing

    @property
    def alive(self) -> bool:
        """Whether the plan is still followed."""
        return self._thread.is_alive()

    def refresh(self) -> None:
        """Somebody has seen a newer plan: read it again."""
        self._woken.set()

    def close(self) -> None:
        self._closing = True
        self._woken.set()
        self._thread.join()

    def _run(self) -> None:
        pause_s = 0.0
        while not self._closing:
            try:
                standing = self._look()
                pause_s = _LOOK_AGAIN_S
            except DependencyUnreachable as error:
                self._log.debug("going on with the last known plan", why=str(error))
                standing, pause_s = self._standing, _RETRY_S
            except PsaError as error:
                self._failure = error
                self._mailbox.post(None)
                return
            if standing != self._standing:
                self._standing = standing
                self._mailbox.post(None)
            self._woken.wait(pause_s)
            self._woken.clear()

    def _look(self) -> Standing:
        member = self._standing.member
        generation = self._coordination.session_generation()
        if generation != self._generation:
            # Our session expired, so others may have been told that we are dead: come back as somebody else.
            member = new_member_id("worker")
            self._log.warning("the ZooKeeper session expired: joining again", member=member)
            self._join(member)
            self._generation = generation
        seen = self._coordination.read_plan(watch=True)
        return Standing(member, plan_from_json(seen.text) if seen is not None else None)

    def _join(self, member: str) -> None:
        text = Member(member, host_identity(), os.getpid()).to_json()
        self._coordination.join(ProcessRole.WORKER, member, text)
