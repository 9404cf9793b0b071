"""What an ACL refuses is found before a job begins, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import redis

from psa_store.errors import DependencyUnfit
from psa_store.launch import PrivateRedis
from psa_store.storage import RedisStore

COMMANDS = [
    *("info", "fcall", "mget", "exists", "get", "set", "hget", "hset", "hdel", "hlen", "hgetall", "hexists"),
    *("smembers", "sadd", "srem", "strlen", "persist", "expire", "pttl", "unlink", "type", "time"),
    *("xadd", "xlen", "xrange", "xrevrange", "xdel"),
]
USER = "trainer"


@pytest.fixture
def as_user(server: PrivateRedis, raw: redis.Redis, store: RedisStore) -> Iterator[Callable[..., RedisStore]]:
    """A store, of a user that may do what is said."""
    opened = []

    def open_store(*rules: str) -> RedisStore:
        raw.execute_command("ACL", "SETUSER", USER, "reset", "on", ">secret", *rules)
        opened.append(RedisStore(f"redis://{USER}:secret@{server.address[0]}:{server.address[1]}", timeout_s=2.0))
        return opened[-1]

    yield open_store
    for each in opened:
        each.close()
    raw.execute_command("ACL", "DELUSER", USER)


def allowed(*missing: str) -> list[str]:
    some = [f"+{each}" for each in COMMANDS if each not in missing]
    return ["~psa:*", *some, "+function|list", "+function|load"]


def test_these_commands_are_enough_and_nothing_is_left(as_user: Callable[..., RedisStore], raw: redis.Redis) -> None:
    as_user(*allowed()).rehearse()
    assert raw.keys() == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_missing_is_named(as_user: Callable[..., RedisStore], command: str) -> None:
    with pytest.raises(DependencyUnfit, match=rf"'{command}'.*ACL does not allow this"):
        as_user(*allowed(command)).rehearse()


def test_keys_that_are_not_ours_to_write_are_said(as_user: Callable[..., RedisStore]) -> None:
    with pytest.raises(DependencyUnfit, match=r"key.*ACL does not allow this"):
        as_user(*allowed()[1:], "~other:*").rehearse()


def test_a_wrong_password_is_said_at_once(server: PrivateRedis) -> None:
    host, port = server.address
    with (
        RedisStore(f"redis://:wrong@{host}:{port}", timeout_s=60.0) as store,
        pytest.raises(DependencyUnfit, match="user and password"),
    ):
        store.rehearse()
