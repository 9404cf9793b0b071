"""Settings that come from the environment (``PSA_*``), with their documented defaults.

Flags of the CLI win over the environment; the environment wins over the defaults here. What belongs to a *job*
(optimizer, ranks, seed, layout) is not a setting: it is stored with the job, see ``job.py``.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from psa_store.errors import UsageError


class Settings(BaseSettings):
    """Where the dependencies are, and how patient to be with them."""

    model_config = SettingsConfigDict(env_prefix="PSA_", frozen=True, extra="ignore")

    redis: str | None = Field(default=None, description="redis://host:port/db, rediss://…, or unix:///path")
    zookeeper: str | None = Field(default=None, description="host:port,host:port/chroot")
    home: Path = Field(
        default=Path.home() / ".local" / "share" / "psa_store", description="data of the private servers"
    )
    bind: str = Field(default="127.0.0.1", description="address on which servers listen and which they advertise")
    session_timeout_s: float = Field(default=4.0, ge=1.0, le=120.0, description="ZooKeeper session timeout")
    connect_timeout_s: float = Field(
        default=5.0, gt=0.0, le=60.0, description="how long a dependency may take to answer"
    )
    leave_timeout_s: float = Field(
        default=30.0, gt=0.0, le=600.0, description="how long a server that is told to leave may take to hand over"
    )
    carrier: str = Field(
        default="auto",
        pattern="^(auto|tcp)$",
        description="how a worker reaches the servers of its own host: auto shares memory with them, tcp does not",
    )
    server_threads: int = Field(default=2, ge=1, le=64, description="threads of a server that reduce and update shards")
    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$")
    journal: Path | None = Field(
        default=None, description="existing folder in which every process writes down what it does, for `psa chaos`"
    )
    # Set by `psa run` for the processes it starts; not for people.
    member: str | None = Field(default=None, description="identity of this process in ZooKeeper")
    supervisor: Path | None = Field(default=None, description="socket of the supervisor that started this process")
    run: str | None = Field(default=None, description="id of the `psa run` that started this process")
    job: str | None = Field(default=None, description="job name, where the script does not give one")
    ranks: int | None = Field(default=None, ge=1, le=65536, description="world size of a new job")
    default_ranks: int = Field(default=1, ge=1, description="world size of a new job, if nobody says otherwise")
    commit_every: int | None = Field(default=None, ge=0, description="steps between commits of a new job; 0: never")
    mode: str | None = Field(default=None, description="sync, async, ssp:staleness=N or local:steps=H (new jobs)")
    compress: str | None = Field(default=None, description="none, bf16, fp16, int8, int4 or topk:F (new jobs)")
    transport: str | None = Field(
        default=None, pattern="^(exact|bf16)$", description="rounding between workers and servers (new jobs)"
    )
    skip_nonfinite: bool | None = Field(default=None, description="skip steps with NaN or Inf gradients (new jobs)")


def load_settings() -> Settings:
    """Read ``PSA_*`` from the environment.

    Raises:
        UsageError: a variable has a value that cannot be used; the message names it.
    """
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = "PSA_" + "_".join(str(part) for part in first["loc"]).upper()
        raise UsageError(f"{name}={first['input']!r}: {first['msg']}. Correct or unset it.") from error
