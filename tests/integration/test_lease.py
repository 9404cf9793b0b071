"""A server that ZooKeeper may have declared dead answers no read: another may own its shards by now."""

from __future__ import annotations

import time
from contextlib import closing

from chaos.proxy import Proxy
from psa_store.coordination import as_access
from psa_store.job.layout import TensorRole
from psa_store.wire import Kind
from tests.harness import Site
from tests.integration.peers import STEPS, Peer, look

SESSION_S = 4.0
ANSWER_S = 1.0


def read(peer: Peer, shard: int) -> int | None:
    """Ask for a shard; returns its version, or None if it does not come before long."""
    peer.say(Kind.PULL, shard=shard)
    try:
        return peer.next_of(Kind.PARAMS).header.step
    except TimeoutError:
        return None


def test_a_server_that_is_cut_off_from_zookeeper_answers_no_read(site: Site) -> None:
    job = "lease-of-a-server"
    (address,) = as_access(site.zookeeper).addresses
    with closing(Proxy(address)) as proxy:
        behind = site.zookeeper.replace("{}:{}".format(*address), f"127.0.0.1:{proxy.port}")
        run = site.run(job, *STEPS, env={"PSA_ZOOKEEPER": behind}, workers=1, servers=1)
        run.wait_for_step(5)
        with look(site, job) as scene:
            peer, shard = scene.peer("tcp"), scene.shard(TensorRole.TRAINED).index
            peer.hello(by_reference=False)
            assert read(peer, shard) is not None
            peer.sock.settimeout(ANSWER_S)
            proxy.stall()
            stalled_s = asked_s = time.monotonic()
            while read(peer, shard) is not None:
                assert asked_s < stalled_s + SESSION_S, "its session may be over, and it answers"
                asked_s = time.monotonic()
        run.kill()
