"""Settings: from the environment (``PSA_*``), else from ``psa.toml``, else their documented defaults.

Flags of the CLI win over all of them. The file is looked for in the current directory only, or where ``PSA_CONFIG``
says; a name in it that is no setting is an error. In the environment such a name is an error for commands of the CLI
(:func:`check_environment`), not for scripts that use the package: the environment is not theirs alone.

What belongs to a *job* (optimizer, ranks, seed, layout) is stored with the job, see ``job.py``; a setting for it counts
when the job is created.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from psa_store.compression import parse_compression
from psa_store.config.listening import parse_advertised, parse_ports
from psa_store.config.own_files import SAFE_DIRECTORY, refuse_foreign_settings
from psa_store.errors import UsageError
from psa_store.job.mode import parse_mode
from psa_store.testing import failpoints

FILE = "psa.toml"
FILE_VARIABLE = "PSA_CONFIG"
"""Where the file is, if not in the current directory; empty: no file is read."""
DEFAULT = "default"
KEY_CHARACTERS_MIN = 16
"""Of a shorter key all could be tried."""
_PREFIX = "PSA_"
_OTHER_VARIABLES = frozenset(
    {
        FILE_VARIABLE,
        SAFE_DIRECTORY,  # by it a file is judged before it is read
        failpoints.ENV,  # read where a failpoint is passed, which must cost nothing
        "PSA_TEST_SEED",  # read by tests/kill, whose commands inherit it
        "PSA_BENCH_TEST",  # by which tests/integration/test_bench.py knows the processes of its commands
    }
)
"""Every variable of our own that is no setting. A test compares it with what the repository reads."""


def _taken_by(parse: Callable[[str], object]) -> AfterValidator:
    """Refuse here, with the name of the setting, the text that ``parse`` would refuse in every worker."""

    def check(text: str) -> str:
        try:
            parse(text)
        except UsageError as error:
            raise ValueError(str(error)) from error
        return text

    return AfterValidator(check)


# A shell expands ~ in the environment; in a file nothing does.
def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: this user has no home folder that ~ could mean") from error


def default_home() -> Path:
    """In the home folder of this user. Where there is none, one that no user can make: a home must be named then."""
    try:
        person = Path.home()
    except RuntimeError:  # no HOME, and a uid that no file knows, as in containers
        person = Path("/dev/null")
    return person / ".local" / "share" / "psa_store"


_Folder = Annotated[Path, AfterValidator(_expanded)]


class Settings(BaseSettings):
    """Where the dependencies are, how long to wait for them, and what a new job is like."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True, extra="ignore")

    redis: str | None = Field(
        default=None,
        pattern=r"^(rediss?(\+sentinel)?|unix)://",
        description="where Redis is: redis://host:port/db, rediss://…, unix:///path, or redis+sentinel://h1,h2/NAME/db",
    )
    replicas_acknowledge: int = Field(
        default=0,
        ge=0,
        le=16,
        description="replicas of Redis that must have a version before it counts as durable; 0: the master alone",
    )
    zookeeper: str | None = Field(
        default=None, description="where ZooKeeper is: host:port,host:port/chroot, or user:password@host:port/chroot"
    )
    zookeeper_credentials: _Folder | None = Field(
        default=None, description="file of mode 0600 that holds user:password for ZooKeeper, if its address does not"
    )
    zookeeper_ca: _Folder | None = Field(
        default=None, description="certificates (PEM) that ZooKeeper's must be signed by; with it connections are TLS"
    )
    zookeeper_cert: _Folder | None = Field(default=None, description="our certificate (PEM), if ZooKeeper wants one")
    zookeeper_key: _Folder | None = Field(default=None, description="the key (PEM) of that certificate")
    home: _Folder = Field(default=default_home(), description="data of the private servers")
    bind: str = Field(default="127.0.0.1", description="address on which servers and all endpoints listen")
    port: Annotated[str, _taken_by(parse_ports)] | None = Field(
        default=None,
        description="port on which a server listens, or LOW-HIGH, of which it takes the first that is free; else any",
    )
    advertise: Annotated[str, _taken_by(parse_advertised)] | None = Field(
        default=None,
        description="HOST or HOST:PORT at which others reach servers here, where it is not what they listen on (NAT)",
    )
    key: SecretStr | None = Field(
        default=None,
        min_length=KEY_CHARACTERS_MIN,
        description="the key of the cluster: processes of a job prove it to each other before they say anything else",
    )
    key_file: _Folder | None = Field(
        default=None, description="file with the key, instead of it; not readable to other users"
    )
    tls_cert: _Folder | None = Field(
        default=None, description="our certificate (PEM) for TLS between hosts; goes with tls_key and tls_ca"
    )
    tls_key: _Folder | None = Field(default=None, description="the private key (PEM) of tls_cert")
    tls_ca: _Folder | None = Field(
        default=None, description="certificates (PEM) that those of all other processes must be signed by"
    )
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
    checkpoint_every_s: float | None = Field(
        default=None, ge=1.0, description="seconds between automatic checkpoints; with it also one when a job ends"
    )
    checkpoint_keep: int = Field(default=3, ge=1, description="automatic checkpoints that are kept, the newest")
    checkpoint_keep_s: float | None = Field(
        default=None, gt=0.0, description="age in seconds at which automatic checkpoints go, even if they are fewer"
    )
    checkpoint_files: str | None = Field(
        default=None,
        description="folder, or URL of fsspec, to which checkpoints go as well, for `psa run --restore`",
    )
    restore: bool = Field(
        default=False, description="if Redis has lost the job, begin with the newest export in checkpoint_files"
    )
    log_level: str = Field(
        default="info", pattern="^(debug|info|warning|error)$", description="debug, info, warning or error"
    )
    log_json: bool = Field(default=False, description="logs as JSON, one object a line, for programs")
    tensorboard: _Folder | None = Field(
        default=None, description="folder in which `psa run` writes the curves of its job for TensorBoard"
    )
    log_dir: _Folder | None = Field(
        default=None, description="folder in which `psa run` keeps what each process prints, a file for each"
    )
    journal: _Folder | None = Field(
        default=None, description="existing folder in which every process writes down what it does, for `psa chaos`"
    )
    monitor: bool = Field(
        default=True, description="whether processes tell how they are: heartbeats, events and curve in Redis, and HTTP"
    )
    metrics_port: int = Field(
        default=0,
        ge=-1,
        le=65535,
        description="port of /metrics and /healthz: 0 a free one, N this or the next free one, -1 none",
    )
    http_hosts: str = Field(
        default="",
        description="further names, as a,b, by which browsers may ask for the page and /metrics; this host's are known",
    )
    http_token: str | None = Field(
        default=None,
        min_length=8,
        description="what the page and /metrics ask for: as a bearer token, or as the password of any user",
    )
    job: str | None = Field(default=None, description="job name, where the script does not give one")
    ranks: int | None = Field(default=None, ge=1, le=65536, description="world size of a new job")
    commit_every: int | None = Field(default=None, ge=0, description="steps between commits of a new job; 0: never")
    mode: Annotated[str, _taken_by(parse_mode)] | None = Field(
        default=None, description="sync, async, ssp:staleness=N or local:steps=H (new jobs)"
    )
    compress: Annotated[str, _taken_by(parse_compression)] | None = Field(
        default=None, description="none, bf16, bf16:both, fp16, int8, int4 or topk:F (new jobs)"
    )
    skip_nonfinite: bool | None = Field(default=None, description="skip steps with NaN or Inf gradients (new jobs)")
    # Set by `psa run` and `psa estimate` for the processes they start; not for people.
    member: str | None = Field(default=None, description="identity of this process in ZooKeeper")
    supervisor: Path | None = Field(default=None, description="socket of the supervisor that started this process")
    run: str | None = Field(default=None, description="id of the `psa run` that started this process")
    draft: Path | None = Field(default=None, description="where a Worker writes down its job, for `psa estimate`")
    default_ranks: int | None = Field(
        default=None, ge=1, description="world size of a new job, if nothing else says it"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The first source that has a value wins."""
        return init_settings, env_settings, _SettingsFile()


_SECRET = frozenset({"redis", "zookeeper", "key", "http_token"})
"""Names of settings that are a secret, or may hold one."""
FOR_PEOPLE = tuple(
    name for name in Settings.model_fields if name not in ("member", "supervisor", "run", "draft", "default_ranks")
)
"""Names of the settings that a person may choose, which are also the keys of the file."""


class _SettingsFile(TomlConfigSettingsSource):
    """What the file says, if there is one.

    Raises:
        UsageError: the file cannot be read, or has a key that is no setting.
    """

    def __init__(self) -> None:
        self.path = _file()
        try:
            super().__init__(Settings, toml_file=self.path)
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.path}: {error}. Correct or remove it.") from error
        for key in self.toml_data:
            if key not in FOR_PEOPLE:
                raise UsageError(f"{self.path}: there is no setting {key!r}{_nearest(key, FOR_PEOPLE)}")


def load_settings() -> Settings:
    """Read the environment and the file.

    Raises:
        UsageError: a value cannot be used, or the file cannot; the message names the value and where it stands.
    """
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name, why = str(first["loc"][0]), first["msg"].removeprefix("Value error, ")
        origin = origins()[name]
        if origin != variable_of(name):
            raise UsageError(f"{origin}: {name}: {why}. Correct or remove it.") from error
        value = "" if name in _SECRET else f"={first['input']!r}"
        raise UsageError(f"{origin}{value}: {why}. Correct or unset it.") from error


def with_flags(settings: Settings, **flags: object) -> Settings:
    """Settings in which the flags of a command win; None stands for a flag that was not given."""
    return settings.model_copy(update={name: value for name, value in flags.items() if value is not None})


def check_environment() -> None:
    """Raise UsageError if a ``PSA_*`` variable is one that is never read: most likely it is misspelt."""
    known = _OTHER_VARIABLES | {variable_of(name) for name in Settings.model_fields}
    for variable in sorted(os.environ):
        if variable.startswith(_PREFIX) and variable not in known:
            meant = _nearest(variable, [FILE_VARIABLE, *map(variable_of, FOR_PEOPLE)])
            raise UsageError(f"{variable} in the environment is no setting{meant}")


def origins() -> dict[str, str]:
    """Where the value of each setting comes from: a variable, the path of the file, or DEFAULT."""
    environment, file = EnvSettingsSource(Settings)(), _SettingsFile()
    return {
        name: variable_of(name) if name in environment else str(file.path) if name in file.toml_data else DEFAULT
        for name in Settings.model_fields
    }


def as_environment(settings: Settings) -> dict[str, str]:
    """The variables that give another process these settings, wherever it works: it reads no file."""
    values = settings.model_dump(include=set(FOR_PEOPLE), exclude_none=True)
    return {variable_of(name): _text_of(value) for name, value in values.items()} | {FILE_VARIABLE: ""}


def _text_of(value: object) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return str(value.absolute() if isinstance(value, Path) else value)


def variable_of(name: str) -> str:
    """The environment variable of a setting."""
    return _PREFIX + name.upper()


def _file() -> Path | None:
    named = os.environ.get(FILE_VARIABLE)
    path = Path(FILE if named is None else named)
    if path.is_file():
        if not named:
            refuse_foreign_settings(path.resolve())
        return path.absolute()
    if named:
        raise UsageError(f"{FILE_VARIABLE}={named!r}: there is no such file. Correct or unset it.")
    return None


def _nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name."""
    if name.lower().removeprefix(_PREFIX.lower()) == "transport":
        return ': use compress = "bf16:both".'
    by_lower = {each.lower(): each for each in known}
    close = get_close_matches(name.lower(), by_lower, n=1)
    return f": did you mean {by_lower[close[0]]!r}?" if close else "; `psa config show` lists all of them."
