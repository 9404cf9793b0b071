"""An ensemble of people with credentials and TLS: what we create is ours alone; what does not fit is said at once."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from kazoo.security import OPEN_ACL_UNSAFE

from chaos.neighbour import plain_client
from psa_store.config import Settings
from psa_store.coordination import Coordination, access_of, examine_zookeeper, probe_zookeeper
from psa_store.errors import DependencyUnfit, DependencyUnreachable
from psa_store.launch import PrivateZooKeeper

SECRET = "Qx7canary"


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a ZooKeeper that is open to all, as people's are."""
    server = PrivateZooKeeper(tmp_path_factory.mktemp("zookeeper"))
    server.start(120)
    client = plain_client(server.hosts)
    client.start(60)
    client.set_acls("/", OPEN_ACL_UNSAFE)
    client.stop()
    client.close()
    yield server.hosts.rpartition("@")[2]
    server.stop()


def door(address: str, **settings: Any) -> Coordination:
    return Coordination.from_settings(Settings(zookeeper=address, connect_timeout_s=20.0, **settings), "job")


def test_what_is_created_belongs_to_its_user_and_others_are_told_at_once(ensemble: str) -> None:
    ours = f"me:{SECRET}@{ensemble}/team"
    with door(ours) as mine:
        mine.next_term()
        assert mine.hold("run", "mine") is None
        with door(ours) as again:
            assert again.jobs() == ["job"]
        for other, said in [
            (f"me:{SECRET}wrong@{ensemble}/team", "does not let user 'me' in with this password"),
            (f"you:{SECRET}@{ensemble}/team", "does not let user 'you' in"),
            (f"{ensemble}/team", "lets only its owner in: put user and password into the address"),
        ]:
            begun_s = time.monotonic()
            with pytest.raises(DependencyUnfit, match=said) as caught, door(other):
                pass
            assert SECRET not in str(caught.value) and f"{ensemble}/team" in str(caught.value)
            assert time.monotonic() - begun_s < 15.0, "sooner than what does not answer"
            (member,) = examine_zookeeper(other, session_timeout_s=4.0, connect_timeout_s=20.0)
            assert said.partition(":")[0] in member.problem and SECRET not in repr(member)
        (member,) = examine_zookeeper(ours, session_timeout_s=4.0, connect_timeout_s=20.0)
        assert member.serves and member.address == ensemble


class TlsRelay:
    """Ends TLS in front of a ZooKeeper, and wants a certificate of its peers."""

    def __init__(self, target: str, folder: Path) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
        self._context.load_verify_locations(folder / "cert.pem")
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, name="tls-relay")]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(30)

    def _accept(self) -> None:
        while True:
            try:
                raw, _ = self._listener.accept()
                plain = socket.create_connection(self._target)
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._serve, args=(raw, plain), name="tls-relay-serve"))
            self._threads[-1].start()

    def _serve(self, raw: socket.socket, plain: socket.socket) -> None:
        with ExitStack() as stack:
            stack.enter_context(raw)
            stack.enter_context(plain)
            try:
                safe = stack.enter_context(self._context.wrap_socket(raw, server_side=True))
            except OSError:
                return  # a peer that has no certificate, or that trusts ours not
            back = threading.Thread(target=_copy, args=(plain, safe), name="tls-relay-back")
            back.start()
            _copy(safe, plain)
            back.join()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    try:
        while part := source.recv(4096):
            sink.sendall(part)
        sink.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


def test_by_tls_with_certificates_of_both_sides(ensemble: str, tmp_path: Path) -> None:
    def certificate(folder: Path, name: str) -> None:
        folder.mkdir(exist_ok=True)
        subject = ["-subj", "/CN=psa-test", "-addext", f"subjectAltName={name}"]
        files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
        made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        subprocess.run([*made, "-days", "2", *subject, *files], check=True, capture_output=True)

    ours, elsewhere = tmp_path / "ours", tmp_path / "elsewhere"
    certificate(ours, "IP:127.0.0.1")
    certificate(elsewhere, "IP:10.9.8.7")
    files = {"zookeeper_cert": ours / "cert.pem", "zookeeper_key": ours / "key.pem"}
    with closing(TlsRelay(ensemble, ours)) as relay:
        settings = Settings(zookeeper=f"me:{SECRET}@{relay.address}/tls", zookeeper_ca=ours / "cert.pem", **files)
        with Coordination.from_settings(settings, "job") as coordination:
            coordination.next_term()
        (member,) = probe_zookeeper(access_of(settings), 10.0)
        assert member.serves
        with pytest.raises(DependencyUnreachable, match="TLS: CERTIFICATE_VERIFY_FAILED"):
            door(relay.address, zookeeper_ca=elsewhere / "cert.pem", **files).start()
    with (
        closing(TlsRelay(ensemble, elsewhere)) as relay,
        pytest.raises(DependencyUnreachable, match="TLS: CERTIFICATE_VERIFY_FAILED"),
    ):
        door(relay.address, zookeeper_ca=elsewhere / "cert.pem", **files).start()
