"""How a job walks through its data, agreed upon by its workers: one record in Redis, which one of them changes at most.

A worker reads the record before it computes anything, again in each term, and under each name that it has:

* The job has none: it begins with what this script says.
* The script reads as the record says last: this worker is noted there.
* The job was told to have another batch size: that is noted in the record, from the step of the change on.
* It reads otherwise, and a worker lives that is noted: that one goes on, and this one is refused.
* It reads otherwise, and none lives: the change holds from the first step of which servers have no gradient. So all
  ranks of a step read alike, and steps that are made again after a loss read as they did.

Used by the thread that runs the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

from psa_store import logs
from psa_store.cluster import ProcessRole
from psa_store.coordination import Coordination
from psa_store.errors import DataIntegrity, DependencyUnreachable, Disconnected, JobMismatch
from psa_store.job.change import Change
from psa_store.job.document import Damaged
from psa_store.job.position import DataRecord, Reading, begin
from psa_store.logs import Waits
from psa_store.observe.formatting import names
from psa_store.storage import RedisStore
from psa_store.wire import Door, inspect
from psa_store.worker.membership import Membership

_POLL_S = 0.1
_GRACE_S = 2.0
_INSPECT_S = 2.0
_SERVERS_S = 60.0
"""How long servers may take to begin a term."""


class DataPosition:
    """``store``, ``coordination`` and ``membership`` stay the caller's.

    ``session_timeout_s``: after so long ZooKeeper knows that a worker has died. ``changes``: of the job, as they are
    in the term in which this worker stands.
    """

    def __init__(
        self,
        job: str,
        store: RedisStore,
        coordination: Coordination,
        membership: Membership,
        session_timeout_s: float,
        changes: Callable[[], Sequence[Change]],
        door: Door,
        waits: Waits,
    ) -> None:
        self._job = job
        self._changes = changes
        self._door = door
        self._waits = waits
        self._stored = store.data_record(job)
        self._coordination = coordination
        self._membership = membership
        self._patience_s = 2 * session_timeout_s + _GRACE_S
        self._log = logs.get_logger()
        self._names: set[str] = set()
        """Those that this worker has, or had."""
        self._agreed: tuple[str, int, Reading, int] | None = None
        self._record: DataRecord | None = None

    def record_for(self, reading: Reading, *, changed_data: bool) -> DataRecord:
        """The record, of which ``reading`` is the newest, but for a batch size that the job was told to have.

        Redis is asked in each term, and under each name, once.

        Raises:
            JobMismatch: other workers read otherwise, another data set was not announced by ``changed_data``, or the
                batch size that was set is none that this script says.
            DependencyUnreachable: Redis, ZooKeeper or servers do not answer.
        """
        standing = self._membership.standing
        changes = self._changes()  # of the term that is followed, where a newer one may be known already
        now = standing.member, standing.plan.term if standing.plan else 0, reading, len(changes)
        if self._record is not None and now == self._agreed:
            return self._record
        self._names.add(standing.member)
        try:
            self._record = self._agree(reading, changed_data)
        except DependencyUnreachable as error:
            only_the_term = self._agreed is not None and self._agreed[::2] == now[::2]
            if self._record is None or not only_the_term:
                raise
            # This worker is noted there under this name, so others can have noted changes of the job only.
            self._record = self._record.following(changes)
            self._log.warning("going on with the known position in the data", why=str(error))
        self._agreed = now
        return self._record

    def check(self, reading: Reading) -> None:
        """Refuse another data set than that of the job, or a batch size, at once, also where no step is left.

        Raises:
            JobMismatch, DependencyUnreachable: as above.
        """
        _, record = self._stored.read()
        if record is not None:
            record.check_data(self._job, reading)
            record.following(self._changes()).as_set(self._job, reading)

    def _agree(self, said: Reading, changed_data: bool) -> DataRecord:
        deadline_s = time.monotonic() + self._patience_s
        while True:
            seen, record = self._stored.look()
            if isinstance(record, Damaged) and self._record is None and time.monotonic() < deadline_s:
                time.sleep(_POLL_S)  # servers know better, and write it again
                continue
            if isinstance(record, Damaged) and self._record is None:
                raise DataIntegrity(
                    f"{record.where} in Redis is damaged, and no server that lives knows better: {record.why}. Delete "
                    "it if the job shall walk through its data as this script says from the beginning"
                )
            if not isinstance(record, DataRecord):  # lost or damaged: then this worker knows better
                record = self._record or begin(said)
            record = record.following(self._changes())
            reading = record.as_set(self._job, said)
            living = self._coordination.living(ProcessRole.WORKER)
            others = {each for each in record.readers if each in living and each not in self._names}
            if record.reading != reading:
                if not changed_data:
                    record.check_data(self._job, reading)
                if others and time.monotonic() < deadline_s:
                    what = f"workers that read other batches to be gone: {names(sorted(others))}"
                    self._waits.on("data", what, say_after_s=0.0)
                    time.sleep(_POLL_S)
                    continue
                self._waits.over("data")
                if others:
                    self._refuse(record.reading, reading, sorted(others)[0])
                step = self._first_untouched()
                self._log.info("batches change", step=step, before=asdict(record.reading), after=asdict(reading))
                record = record.changed(reading, step)
            record = record.known_to(others | {self._membership.standing.member})
            if self._stored.replace(seen, record):
                return record

    def _refuse(self, stored: Reading, reading: Reading, other: str) -> None:
        theirs, ours = asdict(stored), asdict(reading)
        what = next(name for name in theirs if theirs[name] != ours[name])
        name = {"batch": "batch_size"}.get(what, what)
        raise JobMismatch(
            f"job {self._job!r} trains with {name}={theirs[what]!r} in worker {other} at this moment, this process has "
            f"{name}={ours[what]!r}. End it first: then the job goes on with the new value"
        )

    def _first_untouched(self) -> int:
        """The first step of which no server has a gradient."""
        deadline_s = time.monotonic() + _SERVERS_S
        while time.monotonic() < deadline_s:
            plan = self._membership.standing.plan
            if plan is not None and plan.owners:
                owners = [server for server in plan.servers if plan.shards_of(server.id)]
                try:
                    reports = [inspect(each.address, each.local, each.host, _INSPECT_S, self._door) for each in owners]
                except Disconnected:
                    reports = []
                steps = [report.untouched for report in reports if report.term == plan.term]
                known = [step for step in steps if step is not None]
                if len(known) == len(owners):
                    self._waits.over("data")
                    return max(known)
            self._waits.on("data", "servers to say which step is the first that has no gradient yet")
            time.sleep(_POLL_S)
        raise DependencyUnreachable(f"job {self._job!r}: its servers do not say where it stands: see `psa status`")
