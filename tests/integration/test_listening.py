"""A server is reached at what it advertises, whatever it listens on; where that cannot be, it does not start."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from chaos.cluster.network import Host, Network, enter, namespaces_available
from chaos.proxy import Proxy
from psa_store.config import Settings
from psa_store.config.listening import Advertised
from psa_store.errors import UsageError
from psa_store.server.listening import advertised
from tests.harness import TRAIN, Run, Site

STEPS = "20"
KEY = "the key of a test, long enough"


def server_of(site: Site, job: str, **env: str) -> Run:
    return site.psa("server", "--job", job, env={"PSA_RANKS": "1", **env})


def worker_of(site: Site, job: str, **env: str) -> Run:
    env = {"PSA_RANKS": "1", "PSA_CARRIER": "tcp", **env}
    return site.psa("worker", str(TRAIN), "--job", job, "--steps", STEPS, env=env)


def a_free_port(host: str = "127.0.0.1") -> int:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        port: int = sock.getsockname()[1]
        return port


def test_a_server_behind_another_address_is_reached_there(site: Site) -> None:
    port = a_free_port()
    with closing(Proxy(("127.0.0.1", port))) as proxy:
        server = server_of(site, "behind-nat", PSA_PORT=str(port), PSA_ADVERTISE=f"localhost:{proxy.port}")
        worker = worker_of(site, "behind-nat")
        assert worker.finish() == 0, worker.output
        assert proxy.passed_bytes > 0
        server.process.send_signal(signal.SIGTERM)
        assert server.finish() == 0, server.output
    assert f"advertised=localhost:{proxy.port} on=127.0.0.1:{port}" in server.output


def test_of_a_range_of_ports_each_server_takes_one_that_is_free(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        low = taken.getsockname()[1]
        server = server_of(site, "in-range", PSA_PORT=f"{low}-{low + 20}")
        worker = worker_of(site, "in-range")
        assert worker.finish() == 0, worker.output
        (found,) = site.describe("in-range").servers
        server.process.send_signal(signal.SIGTERM)
        assert server.finish() == 0, server.output
        assert found.id
        only = server_of(site, "in-range", PSA_PORT=str(low))
        assert only.finish() == 3 and "PSA_PORT" in only.output, only.output


def test_an_ipv6_address(site: Site) -> None:
    try:
        a_free_port("::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    server = server_of(site, "sixth", PSA_BIND="::1")
    worker = worker_of(site, "sixth")
    assert worker.finish() == 0, worker.output
    server.process.send_signal(signal.SIGTERM)
    assert server.finish() == 0, server.output


@pytest.mark.parametrize("bind", ["0.0.0.0", "::"])
def test_any_address_is_none_to_advertise_where_the_network_does_not_tell_which(site: Site, bind: str) -> None:
    server = server_of(site, "anywhere", PSA_BIND=bind, PSA_KEY=KEY)
    assert server.finish() == 2, server.output
    assert f"PSA_BIND={bind}" in server.output and "set PSA_ADVERTISE" in server.output


# --- with other machines


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    missing = namespaces_available()
    if missing is not None:
        pytest.skip(missing)
    with Network(("here", "there")) as network:
        yield network.host("here"), network.host("there")


def on(host: Host, settings: Settings) -> Advertised | UsageError:
    """What a server on that host would tell others."""
    found: list[Advertised | UsageError] = []

    def ask() -> None:
        if host.namespace is not None:
            enter(host.namespace)
        try:
            found.append(advertised(settings))
        except UsageError as error:
            found.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return found[0]


def test_an_address_that_others_do_not_reach_is_refused_and_any_is_the_one_they_do(hosts: tuple[Host, Host]) -> None:
    here, there = hosts
    away = Settings(redis=f"redis://{there.address}:6379", zookeeper=f"{there.address}:2181", key=KEY)
    refusal = on(here, away)
    assert isinstance(refusal, UsageError) and "PSA_BIND=127.0.0.1 is reached from this machine alone" in str(refusal)
    assert on(here, away.model_copy(update={"advertise": "127.0.0.1"})) == Advertised("127.0.0.1")
    assert on(here, away.model_copy(update={"run": "of psa run"})) == Advertised("127.0.0.1")
    assert on(here, away.model_copy(update={"bind": "0.0.0.0"})) == Advertised(here.address)
    assert on(here, away.model_copy(update={"bind": here.address})) == Advertised(here.address)
    assert on(there, away) == Advertised("127.0.0.1"), "Redis and ZooKeeper are on its own machine"
    other = Settings(redis="redis://127.0.0.2:6379", zookeeper="127.0.0.3:2181")
    assert on(here, other) == Advertised("127.0.0.1"), "as they are under another address of it"
