"""The log: one line per event, for people or for programs, and no secret in either."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psa_store import logs
from psa_store.logs import hide_passwords, printable, setup

CORE = "Kdj4Qx"
"""Part of every password here; nothing else contains it."""


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    former = setup._setup
    yield
    setup._setup = former


def written(act: Callable[[], object], *, as_json: bool, level: str = "info") -> list[str]:
    """The lines that the log gets."""
    with redirect_stderr(io.StringIO()) as stream:
        logs.configure(level, "worker", as_json=as_json)
        act()
    return stream.getvalue().splitlines()


def document(act: Callable[[], object]) -> dict[str, Any]:
    (line,) = written(act, as_json=True)
    found: dict[str, Any] = json.loads(line)
    return found


class TestForPrograms:
    def test_a_line_has_time_event_and_process(self) -> None:
        found = document(lambda: logs.get_logger().warning("a process died", died="worker-1", code=-9))
        assert list(found) == ["time", "level", "event", "role", "pid", "died", "code"]
        assert (found["level"], found["event"], found["code"]) == ("warning", "a process died", -9)
        assert (found["role"], found["pid"]) == ("worker", os.getpid())
        assert datetime.fromisoformat(found["time"]).utcoffset() == timedelta(0)

    def test_job_and_member_are_in_it_once_they_are_known_also_for_loggers_that_were_there_before(self) -> None:
        def act() -> None:
            log = logs.get_logger()
            logs.identify(job="demo", member="worker-1")
            log.info("hello")
            log.info("another", member="worker-2", job="demo")

        first, second = (json.loads(line) for line in written(act, as_json=True))
        assert (first["job"], first["member"]) == ("demo", "worker-1")
        assert (second["member"], second["about_member"]) == ("worker-1", "worker-2")

    def test_whatever_it_is_given_it_stays_one_object_a_line(self) -> None:
        thing = object()
        values = {"path": Path("/a"), "lines": "a\nb", "nan": float("nan"), "set": {1}, "by": {2: thing}, "none": None}
        found = document(lambda: logs.get_logger().info("odd", **values))
        assert found["path"] == "/a" and found["lines"] == "a\nb" and found["nan"] == "nan"
        assert found["set"] == [1] and found["by"] == {"2": repr(thing)} and found["none"] is None

    def test_an_exception_is_in_the_same_line(self) -> None:
        def act() -> None:
            try:
                raise ValueError("no data")
            except ValueError:
                logs.complain("user code failed", with_traceback=True)

        found = document(act)
        assert found["event"] == "user code failed" and found["exception"].endswith("ValueError: no data")
        assert "Traceback" in found["exception"]

    def test_below_its_level_nothing_is_written(self) -> None:
        assert written(lambda: logs.get_logger().info("quiet"), as_json=True, level="warning") == []


class TestForPeople:
    def test_a_line_shows_role_and_pid_and_not_job_and_member(self) -> None:
        def act() -> None:
            logs.identify(job="demo", member="worker-1")
            logs.get_logger().info("job created", shards=3)

        (line,) = written(act, as_json=False)
        assert "job created" in line and "shards=3" in line and "role=worker" in line and f"pid={os.getpid()}" in line
        assert "demo" not in line and "worker-1" not in line

    def test_the_reason_of_an_end_is_a_plain_line(self) -> None:
        assert written(lambda: logs.complain("no script x.py"), as_json=False) == ["psa: no script x.py"]


WRITER = """
import sys
from psa_store import logs
logs.configure("info", "worker", as_json=sys.argv[1] == "json")
sys.stdin.read()  # until all writers are ready
for index in range(100):
    logs.get_logger().info("x" * int(sys.argv[2]), index=index)
    logs.complain("psa" + "y" * int(sys.argv[2]))
"""


@pytest.mark.parametrize("kind", ["json", "people"])
@pytest.mark.parametrize(
    ("into", "length", "env"),
    [("pipe", 3500, {}), ("pipe", 3500, {"PYTHONUNBUFFERED": "1"}), ("file", 20_000, {})],
    ids=["pipe", "pipe-unbuffered", "file-long"],
)
def test_the_lines_of_processes_that_share_one_standard_error_do_not_mix(
    tmp_path: Path, kind: str, into: str, length: int, env: dict[str, str]
) -> None:
    """A pipe keeps a write of up to PIPE_BUF bytes whole; a file one of any length."""
    readable, pipe = os.pipe()
    sink = pipe if into == "pipe" else os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, kind, str(length)], stdin=subprocess.PIPE, stderr=sink, env=os.environ | env
        )
        for _ in range(4)
    ]
    os.close(sink)
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.close()
    if into == "pipe":
        with open(readable, "rb") as stream:
            text = stream.read()
    for writer in writers:
        assert writer.wait(60) == 0
    if into == "file":
        os.close(readable)
        os.close(pipe)
        text = (tmp_path / "log").read_bytes()
    lines = text.decode().splitlines()
    assert len(lines) == 2 * 100 * len(writers)
    for line in lines:
        assert line.count("x" * length) + line.count("y" * length) == 1, line[:200]
        assert kind == "people" or isinstance(json.loads(line), dict)


# What a password may hold in an address: anything but spaces, of which the log sees none there.
WORD = st.text(st.characters(exclude_categories=["Cs", "Z", "Cc"]), max_size=12)
PASSWORD = st.builds(lambda before, after: before + CORE + after, WORD, WORD)
URL = st.builds(
    lambda scheme, user, password, encoded: (
        f"{scheme}://{user}:{quote(password, '') if encoded else password}@db:6379/0"
    ),
    st.sampled_from(["redis", "rediss", "http", "REDIS"]),
    st.sampled_from(["", "me", "team-1"]),
    PASSWORD,
    st.booleans(),
)
BY_QUERY = st.builds(lambda password: f"unix:///run/redis.sock?db=1&password={quote(password, '')}", PASSWORD)
ADDRESS = st.one_of(URL, BY_QUERY)


class Holder:
    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return f"<Holder of {self.text}>"


@given(address=ADDRESS, as_json=st.booleans(), place=st.integers(0, 8))
def test_a_password_is_never_shown(address: str, as_json: bool, place: int) -> None:
    def raising() -> None:
        try:
            try:
                raise ConnectionError(f"{address} refused, b@c d")
            except ConnectionError as error:
                raise RuntimeError(address) from error
        except RuntimeError:
            logs.get_logger().error("died", exc_info=True)
            logs.complain("died", with_traceback=True)

    log = logs.get_logger()
    places: list[Callable[[], object]] = [
        lambda: log.info(f"connecting to {address} and waiting"),
        lambda: log.info("connecting", url=address),
        lambda: log.info("connecting", error=ConnectionError(f"cannot reach {address}: refused")),
        lambda: log.info("connecting", all=[{"first": (address,)}, {address}]),
        lambda: log.info("connecting", by={address: 1}),
        lambda: log.info("connecting", holder=Holder(address)),
        lambda: log.bind(url=address).info("connecting"),
        lambda: logs.complain(f"Redis at {address} is away"),
        raising,
    ]
    lines = written(places[place], as_json=as_json)
    assert lines and not any(CORE in line for line in lines)
    assert CORE not in printable(address)


@given(password=st.text(max_size=30).map(lambda text: text + CORE), name=st.sampled_from(["redis", "", "a-b"]))
def test_an_address_by_itself_may_even_hold_spaces(password: str, name: str) -> None:
    assert CORE not in printable(f"redis://{name}:{password}@db") and CORE not in printable(
        f"unix:///p?password={quote(password, ' ')}"
    )


@given(
    name=st.sampled_from(["password", "redis_password", "API_KEY", "auth_token", "client_secret"]),
    as_json=st.booleans(),
)
def test_values_whose_name_says_so_are_hidden_at_any_depth(name: str, as_json: bool) -> None:
    log = logs.get_logger()
    lines = written(lambda: log.info("asked", **{name: CORE}, nested=[{name: {"x": CORE}}]), as_json=as_json)
    assert CORE not in lines[0] and "***" in lines[0]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://:secret@host", "redis://:***@host"),
        ("rediss://me:se/c@ret@host:6379/0", "rediss://me:***@host:6379/0"),
        ("redis://host?password=secret&db=1", "redis://host?password=***&db=1"),
        ("at redis://me:pw@db, then mail me@x.org", "at redis://me:***@db, then mail me@x.org"),
        ("PSA_ZOOKEEPER=me:se/c%40ret@zk1:2181,zk2:2181/team", "PSA_ZOOKEEPER=me:***@zk1:2181,zk2:2181/team"),
        ("'me:secret@[::1]:2181'", "'me:***@[::1]:2181'"),
        ("at me:secret@10.0.0.1:2181. Is it running?", "at me:***@10.0.0.1:2181. Is it running?"),
    ],
)
def test_what_is_left_can_still_be_read(text: str, shown: str) -> None:
    assert hide_passwords(text) == shown == hide_passwords(shown)


@pytest.mark.parametrize(
    "text", ["redis://db:6379/0 is away", "zk1:2181,zk2:2181/team", "x = a @ b", "http://127.0.0.1:80/a?b=c", "a:b@c"]
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert hide_passwords(text) == text == printable(text).replace("%20", " ")
