"""The synchronous course: all ranks' gradients of a version, then the next version, for all shards alike.

The loop that matters is :meth:`SyncCourse.next_draw`: look at the plan, have the parameters of its epoch, and find a
rank of ours that has not pushed its gradient for the present version. Every disturbance (a new epoch, a lost
connection, a rank more or less) only changes what that loop finds the next time.
"""

from __future__ import annotations

from psa_store.consistency import RANK_OF_BUFFERS
from psa_store.errors import Disconnected
from psa_store.failpoints import failpoint
from psa_store.layout import Role
from psa_store.plan import Plan
from psa_store.wire import Kind
from psa_store.worker.course import NONE, Course, Tools
from psa_store.worker.feed import Draw
from psa_store.worker.fleet import Answer

_NEVER = 1 << 62
"""A version that no job reaches: waiting for it is waiting for something else."""


class SyncCourse(Course):
    """See the module."""

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self._pushed: set[int] = set()
        self._awaited = NONE
        self._brought: dict[str, int] = {}
        """The version that each server has brought since we wait for one."""
        self._arrived: dict[int, int] = {}
        """The version in which each shard has arrived since we began to load."""
        self._frozen_loaded = False

    # --- what the worker calls

    def next_draw(self) -> Draw | None:
        steps = self._tools.steps
        while not self._told_to_leave:
            plan = self._settle()
            if plan is None:
                self._wait()
            elif steps is not None and self.version >= steps:
                if self._make_durable(plan, [server.id for server in plan.servers], self.version):
                    return None
            elif self._plan_is_old(plan):
                self._wait()
            elif todo := [rank for rank in self._holding() if rank not in self._pushed]:
                if self._awaited != NONE:
                    # We told the servers that we have done with this version, so it may change where the model has it.
                    self._out_of_sync("more ranks came in the middle of a step")
                elif self._take_gradient_memory():
                    return Draw(self.version, todo[0])
            elif self._holding():
                self._await(self.version + 1)
            else:
                self._await(steps if steps is not None else _NEVER)
        return None

    def shards_ready(self, shards: list[int]) -> None:
        """Start pushing them."""
        self._push(shards)

    def hand_over(self) -> None:
        """With the gradient that is the step's last, wait for the next version and load it."""
        self._refuse_flaw()
        draw = self._draw
        if draw.rank == RANK_OF_BUFFERS:
            self._arena.collect_buffers()
            for shard in self._tools.layout.shards_of(Role.BUFFER):
                self._fleet.push_value(self._plan, draw.step, draw.rank, shard.index, self._arena.parameters(shard))
        self._record_pushed()
        self._pushed.add(draw.rank)
        if self._pushed.issuperset(self._holding()):
            self._await(self.version + 1)
        # An epoch may have ended in the middle of the new version: user code must not see a mixture.
        while self.synced_epoch == NONE and not self._told_to_leave:
            if self._settle() is None:
                self._wait()

    # --- waiting for a version

    def _disturbed(self) -> bool:
        """Whether there is something else to do than to wait for the present step."""
        standing = self._tools.membership.standing
        if standing.plan is None or standing.plan.epoch != self.synced_epoch:
            self.synced_epoch = NONE
            return True
        self._plan = standing.plan
        return self._told_to_leave or not self._pushed.issuperset(self._holding())

    def _await(self, version: int) -> None:
        """Wait until the model has ``version``; come back early when there is something else to do."""
        idle = not self._holding()
        try:
            owners = self._owners()
            if self._awaited != version:
                self._awaited = version
                self._brought = {}
                self._fleet.wait_for(self._plan, owners, version)
            while not self._disturbed():
                if len(self._brought) == len(owners):
                    if set(self._brought.values()) == {version}:
                        self._tools.journal.record("acked", epoch=self.synced_epoch, version=version)
                        self._version_arrived(version)
                    else:  # the job went on without us while our ranks were with others
                        self.synced_epoch = NONE
                    return
                self._pump()
        except Disconnected as error:
            self._out_of_sync(str(error))
        if idle:
            self.synced_epoch = NONE  # we watched from the side: the model is not at the present version

    def _version_arrived(self, version: int) -> None:
        self.version = version
        self._pushed.clear()
        self._awaited = NONE
        self._tools.pool.release()
        self._arena.version_arrived()

    def _take_gradient_memory(self) -> bool:
        """Have memory that nobody reads for the next gradient; False if something came in between.

        Where servers read gradients in place, each rank of a step needs its own. Where they are sent, one is enough,
        once it has left.
        """
        try:
            while not self._fleet.shares and self._fleet.sending:
                self._pump()
                if self._tools.membership.standing.plan is not self._plan or self._told_to_leave:
                    return False
        except Disconnected as error:
            self._out_of_sync(str(error))
        if self.synced_epoch == NONE:
            return False
        if not self._fleet.shares:
            self._tools.pool.release()
        self._gradients = self._tools.pool.take()
        return True

    # --- loading

    def _load(self, plan: Plan) -> bool:
        """Get all shards at one version of this epoch."""
        self._out_of_sync(f"epoch {plan.epoch}")
        if not self._connect(plan):
            return False
        self._plan = plan
        layout = self._tools.layout
        versioned = [shard.index for shard in layout.versioned]
        wanted = dict.fromkeys(versioned, plan.resume)
        if not self._frozen_loaded:
            wanted |= {shard.index: 0 for shard in layout.shards_of(Role.FROZEN)}
        newest = plan.resume
        try:
            while wanted:
                for shard, at_least in wanted.items():
                    self._arrived.pop(shard, None)
                    self._fleet.pull(plan, shard, at_least)
                while any(shard not in self._arrived for shard in wanted):
                    if self._epoch_is_over(plan):
                        return False
                    self._pump()
                # A step may complete while we read: then some shards are a version ahead of others.
                newest = max((self._arrived[shard] for shard in versioned), default=newest)
                wanted = {shard: newest for shard in versioned if self._arrived[shard] < newest}
        except Disconnected as error:
            self._out_of_sync(str(error))
            return False
        self._frozen_loaded = True
        self.synced_epoch = plan.epoch
        self._tools.journal.record("loaded", epoch=plan.epoch, version=newest)
        failpoint("worker.loaded")
        self._version_arrived(newest)
        return True

    def _out_of_sync(self, why: str) -> None:
        self._tools.pool.give_up()
        super()._out_of_sync(why)
        self._awaited = NONE
        self._arrived = {}
        self._pushed.clear()

    def _take(self, answer: Answer) -> None:
        header = answer.header
        match header.kind:
            case Kind.PARAMS:
                self._arrived[header.shard] = header.step
            case Kind.VERSION:
                self._brought[answer.server] = header.step
                if answer.descriptor is not None:
                    self._arena.show(answer.server, answer.descriptor, self._trained_shards_of(answer.server))
            case Kind.DURABLE:
                self._durable.add(answer.server)
            case Kind.REFUSED:
                self._on_refusal(header, answer.text)
                if header.step == self.version:
                    self._pushed.discard(header.rank)
            case _:
                pass

    def _trained_shards_of(self, server: str) -> list[int]:
        layout = self._tools.layout
        return [i for i in self._plan.shards_of(server) if layout.shards[i].role is Role.TRAINED]
