"""One Redis with a password for all of these tests, reached over TCP, a Unix socket, and a link that can be cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
import redis

from chaos.proxy import Proxy
from psa_store.launch import PrivateRedis
from psa_store.storage import RedisStore


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateRedis]:
    private = PrivateRedis(tmp_path_factory.mktemp("redis"), {"requirepass": "sesame"}, tcp=True)
    private.start(120)
    yield private
    private.stop()


@pytest.fixture(params=["tcp", "unix"])
def url(server: PrivateRedis, request: pytest.FixtureRequest) -> str:
    return server.tcp_url if request.param == "tcp" else server.url


@pytest.fixture
def raw(url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(url) as client:
        client.flushdb()
        yield client


@pytest.fixture
def store(url: str, raw: redis.Redis) -> Iterator[RedisStore]:
    with closing(RedisStore(url, timeout_s=5.0)) as store:
        store.check()
        yield store


@pytest.fixture
def hasty(url: str, store: RedisStore) -> Iterator[RedisStore]:
    """The same with less patience, for what is refused until patience ends."""
    with closing(RedisStore(url, timeout_s=1.0)) as hasty:
        yield hasty


@pytest.fixture
def proxy(server: PrivateRedis) -> Iterator[Proxy]:
    """A link to Redis that can be cut."""
    with closing(Proxy(server.address)) as proxy:
        yield proxy


@pytest.fixture
def distant(proxy: Proxy) -> Iterator[RedisStore]:
    """A store at the other end of ``proxy``."""
    with closing(RedisStore(f"redis://:sesame@127.0.0.1:{proxy.port}", timeout_s=1.0)) as store:
        yield store
