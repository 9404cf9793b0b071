"""Every error that psa_store raises on purpose, and the exit code that the CLI gives it.

    PsaError                          exit code
    ├── UsageError                    2   the call or the command is wrong; nothing was changed
    │   ├── JobMismatch                   the job exists with another layout, optimizer, seed or world size
    │   ├── JobBusy                       another run of this job is going on
    │   └── UnknownJob                    there is no such job
    ├── UserCodeFailed                1   the training script raised, or its restarts are used up
    │   ├── NonFiniteGradient             a gradient held NaN or Inf
    │   └── OutOfMemory                   a model, or a stage of it, does not fit into a worker's memory
    ├── DependencyUnreachable         3   Redis or ZooKeeper does not answer
    │   └── DependencyUnfit               it answers, but must not be used as it is configured
    ├── DataIntegrity                 4   stored bytes are damaged or missing; nothing was guessed
    └── Interrupted                       not failures, but reasons why an action did not happen:
        ├── Fenced                        a newer term owns the shard
        ├── Rewound                       Redis lost something that it had acknowledged
        ├── Refused                       a peer refused the message and said why
        └── Disconnected                  the peer is gone
            └── Unproved                      it did not prove the key of the cluster, or refused our proof

A message says what happened, where, and what to do next. Foreign exceptions are translated at the door where
they occur (storage, coordination, wire), always with ``raise ... from``.
"""

from __future__ import annotations

from typing import ClassVar


class PsaError(Exception):
    """Base of all errors of this package."""

    exit_code: ClassVar[int] = 1


class UsageError(PsaError):
    """The call or the command is wrong. Nothing was changed."""

    exit_code = 2


class JobMismatch(UsageError):
    """The job exists already, with another layout, optimizer, seed or number of ranks."""


class JobBusy(UsageError):
    """Another run of the same job is going on."""


class UnknownJob(UsageError):
    """No job of this name is stored."""


class UserCodeFailed(PsaError):
    """The training script raised, or its processes died more often than the restart budget allows."""

    exit_code = 1


class NonFiniteGradient(UserCodeFailed):
    """A gradient held NaN or Inf, and the job's policy is to refuse it."""


class OutOfMemory(UserCodeFailed, MemoryError):
    """A model, or a stage of it, does not fit into the memory of this worker."""


class DependencyUnreachable(PsaError):
    """Redis or ZooKeeper does not answer in time."""

    exit_code = 3


class DependencyUnfit(DependencyUnreachable):
    """Redis or ZooKeeper answers, but its configuration would lose data."""


class DataIntegrity(PsaError):
    """Stored bytes are damaged or missing, and no undamaged version can replace them."""

    exit_code = 4


class Interrupted(PsaError):
    """An action did not happen, for a reason that the caller is expected to handle."""


class Fenced(Interrupted):
    """A newer term owns the shard; the caller has been replaced and must stop writing."""


class Rewound(Interrupted):
    """Redis went back in time: it lost what it had acknowledged. Write it again, or go back to what is left."""


class Refused(Interrupted):
    """A peer refused a message and said why."""


class Disconnected(Interrupted):
    """The connection to a peer ended before the exchange was complete."""


class Unproved(Disconnected):
    """The two sides did not prove to each other that they have the same key; nothing else was said."""
