"""What the store does when the master changes under it: behind a proxy that keeps old connections, and by Sentinel."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import redis

from chaos.proxy import Proxy
from psa_store.errors import DependencyUnfit, DependencyUnreachable, UsageError
from psa_store.launch import PrivateRedis
from psa_store.launch.child import remembered_ports
from psa_store.storage import History, RedisStore, examine_redis
from psa_store.storage.addresses import Kind, read_address
from psa_store.storage.sentinels import Sentinels as Asked
from tests.failover import NAME, PASSWORD, SENTINEL_PASSWORD, Sentinels, eventually, replicated, started_sentinel, told
from tests.harness import stop_process
from tests.integration.storage.shards import JOB, LAYOUT, commit, read

OPTIONS = {"password": SENTINEL_PASSWORD}


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[PrivateRedis]]:
    """A master and its replica."""
    with ExitStack() as stack:
        servers = replicated(tmp_path, 1)
        for server in servers:
            stack.callback(server.stop)
        yield servers


def fail_over(old: PrivateRedis, new: PrivateRedis) -> None:
    """What a person or a managed service does: nothing is lost."""
    with told(old).client() as client:
        client.set("the last", "write")
        assert client.execute_command("WAIT", 1, 60_000) == 1
    told(new).execute_command("REPLICAOF", "NO", "ONE")
    told(old).execute_command("REPLICAOF", *new.address)


def test_open_connections_to_a_demoted_master_are_given_up_by_every_user(pair: list[PrivateRedis]) -> None:
    old, new = pair
    with ExitStack() as stack:
        proxy = stack.enter_context(closing(Proxy(old.address)))
        url = f"redis://:{PASSWORD}@127.0.0.1:{proxy.port}"
        store = stack.enter_context(closing(RedisStore(url, timeout_s=20.0)))
        history = stack.enter_context(closing(History(JOB, url, timeout_s=20.0)))
        store.check()
        store.seal(JOB, [0], 1, LAYOUT)
        commit(store, 1)
        history.heartbeat("worker", "before")
        history.event("before")

        proxy.retarget(new.address)
        fail_over(old, new)

        history.heartbeat("worker", "after")
        history.event("after")
        manifest = commit(store, 2, expect=1)
        assert history.heartbeats() == {"worker": "after"} and history.events() == ["before", "after"]
        assert read(store, manifest)["param"] == bytearray([2]) * 100
        assert told(new).hexists("psa:{job:0}:head", manifest.field)


def test_what_too_few_replicas_acknowledge_is_not_durable(pair: list[PrivateRedis]) -> None:
    master, replica = pair
    with closing(RedisStore(master.tcp_url, timeout_s=2.0, replicas_acknowledge=1)) as store:
        store.check()
        store.seal(JOB, [0], 1, LAYOUT)
        assert store.acknowledged == 1
        stop_process(replica.pid)
        try:
            manifest = commit(store, 1)  # the master has it
            with pytest.raises(DependencyUnfit, match="0 of 1 replicas have acknowledged"):
                store.seal(JOB, [0], 1, LAYOUT)
        finally:
            os.kill(replica.pid, signal.SIGCONT)
        (head,) = store.seal(JOB, [0], 1, LAYOUT)
        assert store.acknowledged == 1 and head.manifests == (manifest,)
        assert told(replica).hexists("psa:{job:0}:head", manifest.field)


def test_a_reader_refuses_a_head_that_is_older_than_one_it_has_seen(
    store: RedisStore, raw: redis.Redis, url: str
) -> None:
    key = "psa:{job:0}:head"
    store.seal(JOB, [0], 5, LAYOUT)
    with closing(RedisStore(url, timeout_s=0.5, refuse_older=True)) as reader:
        assert reader.heads(JOB, [0])[0].term == 5
        raw.hset(key, "term", f"{4:016x}")
        assert store.heads(JOB, [0])[0].term == 4
        with pytest.raises(DependencyUnfit, match=r"term 4, and 5 was seen.*back in time"):
            reader.heads(JOB, [0])
        raw.hset(key, "term", f"{1 << 60:016x}")  # another program wrote it
        reader.heads(JOB, [0])
        store.seal(JOB, [0], 6, LAYOUT)
        assert reader.heads(JOB, [0])[0].term == 6


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[list[PrivateRedis], Sentinels]]:
    with ExitStack() as stack:
        servers = replicated(tmp_path, 2)
        for server in servers:
            stack.callback(server.stop)
        sentinels = Sentinels(tmp_path / "sentinels", servers[0])
        stack.callback(sentinels.stop)
        yield servers, sentinels


def test_sentinels_name_the_new_master_and_a_returned_old_one_takes_nothing(
    watched: tuple[list[PrivateRedis], Sentinels],
) -> None:
    servers, sentinels = watched
    old = servers[0]
    with closing(RedisStore(sentinels.url, timeout_s=60.0)) as store:
        store.check()
        store.seal(JOB, [0], 1, LAYOUT)
        commit(store, 1)
        with told(old).client() as client:
            client.function_flush()  # the one that is promoted has none
            assert client.execute_command("WAIT", 2, 60_000) == 2

        old.kill()
        commit(store, 2, expect=1)
        # Not all Sentinels may know of it yet: the old master is back before they do.
        (promoted,) = [each.address[1] for each in servers[1:] if told(each).info("replication")["role"] == "master"]

        old.start(120)  # as a master, until a Sentinel sees it
        with closing(RedisStore(sentinels.url, timeout_s=60.0)) as another:
            manifest = commit(another, 3, expect=2)
        with redis.Redis(port=promoted, password=PASSWORD) as client:
            assert client.hexists("psa:{job:0}:head", manifest.field)
        assert [each.version for each in store.heads(JOB, [0])[0].manifests] == [1, 2, 3]
        eventually(lambda: told(old).info("replication")["role"] == "slave")
        assert commit(store, 4, expect=3).version == 4


def test_a_sentinel_that_does_not_know_of_the_last_failover_is_not_believed(
    watched: tuple[list[PrivateRedis], Sentinels], tmp_path: Path
) -> None:
    servers, sentinels = watched
    (port,) = remembered_ports(tmp_path / "isolated-port", 1)
    folder = tmp_path / "isolated"
    folder.mkdir()
    unwatched = PrivateRedis(tmp_path / "unwatched", {"requirepass": PASSWORD}, tcp=True)
    isolated = None
    try:
        unwatched.start(120)
        isolated = started_sentinel(folder, sentinels.configuration(port, folder, unwatched))
        asked = Asked((*(("127.0.0.1", each) for each in sentinels.ports), ("127.0.0.1", port)), NAME, OPTIONS, 20.0)
        alone = Asked((("127.0.0.1", port),), NAME, OPTIONS, 20.0)
        eventually(lambda: alone.master() == unwatched.address)
        servers[0].kill()
        eventually(lambda: asked.master() != servers[0].address)
        begun_later = Asked(
            (("127.0.0.1", port), *(("127.0.0.1", each) for each in sentinels.ports)), NAME, OPTIONS, 20.0
        )
        assert begun_later.master() == asked.master(), "it asks all of them first"
        sentinels.stop()
        with pytest.raises(redis.exceptions.ConnectionError, match=f":{port} does not know of the last failover"):
            asked.master()
    finally:
        unwatched.stop()
        if isolated is not None:
            isolated.kill()
            isolated.wait()


def test_what_sentinels_say_of_a_wrong_name_or_password_is_said(
    watched: tuple[list[PrivateRedis], Sentinels],
) -> None:
    _, sentinels = watched
    for wrong, kind, why in (
        (sentinels.url.replace("/weights/", "/other/"), DependencyUnreachable, "No such master"),
        (sentinels.url.replace("barley", "wheat"), DependencyUnfit, "password"),
        (sentinels.url.replace(PASSWORD, "closed"), DependencyUnfit, "password"),
    ):
        with pytest.raises(kind, match=why) as caught, closing(RedisStore(wrong, timeout_s=1.0)) as store:
            store.check()
        assert not any(secret in str(caught.value) for secret in ("barley", "wheat", "closed"))


def test_users_and_tls_are_those_of_redis_and_of_sentinels(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    named = ["-subj", "/CN=redis", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out"]
    subprocess.run([*made, *named, str(certificate)], check=True, capture_output=True)
    tls = {"tls-cert-file": str(certificate), "tls-key-file": str(key), "tls-ca-cert-file": str(certificate)}
    tls |= {"tls-auth-clients": "no", "tls-replication": "yes"}
    redis_port, sentinel_port = remembered_ports(tmp_path / "ports", 2)
    master = PrivateRedis(tmp_path / "redis", {**tls, "tls-port": str(redis_port), "requirepass": PASSWORD})
    lines = [
        *(f"{name} {value}" for name, value in tls.items()),
        f"dir {tmp_path}",
        "port 0",
        f"tls-port {sentinel_port}",
        "user default off",
        "user watcher on >barley ~* &* +@all",
        f"sentinel monitor {NAME} 127.0.0.1 {redis_port} 1",
        f"sentinel auth-pass {NAME} {PASSWORD}",
    ]
    with ExitStack() as stack:
        master.start(120)
        stack.callback(master.stop)
        with redis.Redis.from_url(master.url) as raw:
            raw.execute_command("ACL", "SETUSER", "trainer", "on", ">closed", "~psa:*", "+@all", "-role")
        sentinel = started_sentinel(tmp_path, lines)
        stack.callback(lambda: (sentinel.kill(), sentinel.wait()))
        url = (
            f"rediss+sentinel://trainer:closed@127.0.0.1:{sentinel_port}/{NAME}/0"
            f"?sentinel_username=watcher&sentinel_password=barley&ssl_ca_certs={certificate}"
        )
        with closing(RedisStore(url, timeout_s=20.0)) as store:
            store.check()
            store.seal(JOB, [0], 1, LAYOUT)
            manifest = commit(store, 1)
            assert read(store, manifest)["param"] == bytearray([1]) * 100
        for wrong in (url.replace("watcher", "another"), url.replace("trainer", "another")):
            with pytest.raises(DependencyUnfit, match="password"), closing(RedisStore(wrong, timeout_s=1.0)) as store:
                store.check()
        with (
            pytest.raises(DependencyUnreachable, match="certificate"),
            closing(RedisStore(url.partition("&ssl")[0], timeout_s=1.0)) as store,
        ):
            store.check()


def test_a_node_of_a_cluster_is_refused_at_once(tmp_path: Path) -> None:
    node = PrivateRedis(tmp_path, {"cluster-enabled": "yes"}, tcp=True)
    node.start(120)
    try:
        with closing(RedisStore(node.url, timeout_s=5.0)) as store, pytest.raises(DependencyUnfit, match="cluster"):
            store.check()
        assert examine_redis(node.url, 5.0).in_cluster
    finally:
        node.stop()


def test_an_address_of_sentinels_is_read() -> None:
    found = read_address("redis+sentinel://me:p%40ss@one,two:7,[::1],[::2]:8/the%20name/3?sentinel_password=x")
    assert found.kind is Kind.SENTINEL and found.name == "the name"
    assert found.hosts == (("one", 26379), ("two", 7), ("::1", 26379), ("::2", 8))
    assert dict(found.options) == {"username": "me", "password": "p@ss", "db": 3}
    assert dict(found.sentinel_options) == {"password": "x"}
    tls = read_address("rediss+sentinel://one/name?ssl_ca_certs=/ca.pem")
    assert tls.options["connection_class"] is tls.sentinel_options["connection_class"] is redis.SSLConnection
    assert tls.options["ssl_ca_certs"] == tls.sentinel_options["ssl_ca_certs"] == "/ca.pem"


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://hunter2@one",
        "redis+sentinel://:hunter2@one:x/name",
        "redis+sentinel://:hunter2@/name",
        "redis+sentinel://:hunter2@one,,two/name",
        "redis+sentinel://:hunter2@one/name/zero",
        "redis+mirror://:hunter2@one/name",
    ],
)
def test_an_address_that_is_none_is_refused_without_its_password(url: str) -> None:
    refuse: Callable[[], object] = lambda: read_address(url)  # noqa: E731
    with pytest.raises(UsageError) as caught:
        refuse()
    assert ":hunter2" not in str(caught.value)
