"""What may be said of where a server listens, and of what others are told."""

from __future__ import annotations

import pytest

from psa_store.config import load_settings
from psa_store.config.listening import Advertised, is_any, is_loopback, parse_advertised, parse_ports
from psa_store.errors import UsageError


def test_a_port_or_a_range_of_them() -> None:
    assert list(parse_ports("7000")) == [7000]
    assert list(parse_ports("7000-7002")) == [7000, 7001, 7002]


@pytest.mark.parametrize("text", ["0", "65536", "9-8", "-1", "7000-", "7000-7001-7002", "x", "7000-65536"])
def test_what_is_no_port_is_refused_by_name(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSA_PORT", text)
    with pytest.raises(UsageError, match=r"PSA_PORT=.*use a port, or LOW-HIGH"):
        load_settings()


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("db.example", "db.example", None),
        ("db.example:7000", "db.example", 7000),
        ("203.0.113.7", "203.0.113.7", None),
        ("fd00::7", "fd00::7", None),
        ("[fd00::7]", "fd00::7", None),
        ("[fd00::7]:7000", "fd00::7", 7000),
    ],
)
def test_an_address_with_and_without_a_port(text: str, host: str, port: int | None) -> None:
    assert parse_advertised(text) == Advertised(host, port)


@pytest.mark.parametrize("text", [":7000", "a:b", "a:0", "[::1", "[::1]7000", "a b", "a:", ""])
def test_what_is_no_address_is_refused_by_name(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSA_ADVERTISE", text)
    with pytest.raises(UsageError, match="PSA_ADVERTISE"):
        load_settings()


def test_addresses_that_no_other_machine_reaches() -> None:
    assert is_loopback("127.0.0.2") and is_loopback("::1") and is_loopback("localhost")
    assert is_any("0.0.0.0") and is_any("::")
    assert not any(check(host) for host in ("10.0.0.7", "fd00::7", "db.example") for check in (is_loopback, is_any))
