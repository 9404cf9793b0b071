"""The rows of the matrix, as data: which faults a run gets, and on which kind of cluster."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial

from chaos.faults import FAULTS
from chaos.schedule import ScheduledFault, crowded_schedule, short_schedule
from psa_store.errors import UsageError


class Shape(Enum):
    """How the job's processes are run."""

    SUPERVISED = "psa run on one host: what dies is restarted at once, memory is shared"
    PROXIED = "psa run, with TCP proxies in front of Redis and ZooKeeper"
    HOSTS = "every process on its own host (network namespace), without supervisor: a death is the end of a session"


@dataclass(frozen=True, slots=True)
class Scenario:
    """One row. Seed n begins with kind n of ``kinds``, modulo their number."""

    name: str
    kinds: tuple[str, ...]
    shape: Shape = Shape.SUPERVISED
    small_disk: bool = False
    """Redis lives on a disk of a few megabytes."""
    sets_clock: bool = False
    """It sets the wall clock of the whole machine: played only when named."""
    commit_every: int = 10
    checkpoint_every_s: float | None = None
    """The interval of automatic checkpoints."""
    stages: int = 1
    """Into how many the model is cut."""
    steps: int = 200
    """How long a short run is."""
    at_once: bool = False
    """Its faults overlap."""
    mode: str = "sync"
    """How the job takes gradients, as `psa run --mode` has it."""

    def schedule(self, seed: int) -> list[ScheduledFault]:
        """Return the faults of a short run."""
        draw = crowded_schedule if self.at_once else short_schedule
        return draw(self.kinds, self.name, seed)


_staged = partial(Scenario, stages=4, steps=100)  # each step takes longer: cells wait for each other
_KILLS_OF_STAGES = (
    "kill-worker",
    "kill-server",
    "kill-controller",
    "kill-all-workers",
    "kill-all-servers",
    "kill-everything",
    "stop-worker",
    "stop-server",
)

_AT_ONCE = (
    "kill-worker",
    "kill-server",
    "kill-controller",
    "kill-all-workers",
    "kill-all-servers",
    "kill-starting-server",
    "kill-redis",
    "kill-zk-follower",
    "kill-zk-leader",
    "stop-worker",
    "stop-server",
    "stop-controller",
    "stop-redis",
    "stop-zk-leader",
    "flush-functions",
    "die-push.middle",
    "hang-step.complete",
    "die-commit.before_flip",
    "hang-commit.after_flip",
)
"""Faults that can happen whatever else does."""
_OF_MODES = (
    "kill-worker",
    "kill-server",
    "kill-all-workers",
    "kill-all-servers",
    "kill-redis",
    "kill-run",
    "stop-worker",
    "stop-server",
)


def _rows() -> list[Scenario]:
    supervised = [name for name in FAULTS if name.startswith(("kill-", "stop-"))]
    failpoints = sorted({name.partition("-")[2] for name in FAULTS if name.startswith(("die-", "hang-"))})
    in_one_piece = [name for name in failpoints if not name.startswith("cell.")]
    proxied = [name for name in FAULTS if name.startswith(("redis-torn", "redis-delay", "redis-throttle"))]
    proxied += ["redis-stall", "redis-refuse", "zk-torn-reply", "zk-delay", "zk-stall"]
    hosted = [name for name in FAULTS if name.startswith(("cut-", "mute-", "isolate-", "throttle-", "flap-"))]
    return [
        *(Scenario(name, (name,)) for name in supervised if name != "kill-redis-briefly"),
        Scenario("kill-redis-briefly", ("kill-redis-briefly",), commit_every=100),
        *(
            Scenario(name, (f"die-{name}", f"hang-{name}"), checkpoint_every_s=1.0 if "checkpoint" in name else None)
            for name in in_one_piece
        ),
        *(Scenario(name, (name,)) for name in ("wipe-redis", "wipe-zookeeper", "damage-value", "flush-functions")),
        Scenario("wipe-redis-between-commits", ("wipe-redis",), commit_every=100),
        *(Scenario(name, (name,)) for name in ("redis-memory-limit", "redis-disk-slow")),
        Scenario("redis-disk-full", ("redis-disk-full",), small_disk=True),
        *(Scenario(name, (name,), Shape.PROXIED) for name in proxied),
        *(Scenario(name, (name,), Shape.HOSTS) for name in hosted),
        *(
            Scenario(f"unsupervised-{name}", (name,), Shape.HOSTS)
            for name in ("kill-worker", "kill-server", "kill-controller", "stop-server")
        ),
        *(Scenario(name, (name,)) for name in FAULTS if name.startswith("neighbour-")),
        Scenario("at-once", _AT_ONCE, at_once=True),
        Scenario("mode-async", _OF_MODES, mode="async", commit_every=4),
        Scenario("mode-ssp", _OF_MODES, mode="ssp:staleness=2", commit_every=4),
        Scenario("mode-local", _OF_MODES, mode="local:steps=4", commit_every=3),
        Scenario("clock-jump", ("clock-jump",), sets_clock=True),
        *(
            _staged(f"stages-{name}", (f"die-{name}", f"hang-{name}"))
            for name in failpoints
            if name.partition(".")[0] in ("cell", "push", "step", "worker")
        ),
        *(_staged(f"stages-{name}", (name,)) for name in _KILLS_OF_STAGES),
        *(
            _staged(f"stages-unsupervised-{name}", (name,), Shape.HOSTS)
            for name in ("kill-worker", "stop-worker", "cut-worker-server")
        ),
    ]


SOAK = Scenario(
    "soak",
    (
        "kill-worker",
        "kill-server",
        "kill-controller",
        "kill-all-workers",
        "kill-all-servers",
        "kill-run",
        "kill-redis",
        "kill-zk-follower",
        "kill-zk-leader",
        "die-commit.before_flip",
        "die-commit.after_flip",
        "die-takeover.sealed",
        "die-push.middle",
        "die-step.complete",
        "flush-functions",
    ),
)
"""Many faults in one long run."""

MATRIX = {row.name: row for row in _rows()}
SCENARIOS = {**MATRIX, SOAK.name: SOAK}


def scenario(name: str) -> Scenario:
    """Return a row by name; raise UsageError that lists them all."""
    if name not in SCENARIOS:
        raise UsageError(f"no scenario {name!r}; there are: all, {', '.join(SCENARIOS)}")
    return SCENARIOS[name]
