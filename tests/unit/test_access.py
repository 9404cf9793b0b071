"""The address of ZooKeeper: what is read from it, and that no message about it has its password."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psa_store.cli.config import show
from psa_store.config import Settings
from psa_store.coordination import Access, access_of, as_access
from psa_store.errors import UsageError

SECRET = "Qx7canary"


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("zk:2181", Access("zk:2181")),
        ("zk1:2181,zk2:2182/", Access("zk1:2181,zk2:2182")),
        ("zk//a/b/", Access("zk", "/a/b")),
        ("me:pw@zk1,zk2:1/team", Access("zk1,zk2:1", "/team", "me", "pw")),
        ("me:p%40%2Fw:x@[::1]:2181", Access("[::1]:2181", "", "me", "p@/w:x")),
        ("zk/a@b", Access("zk", "/a@b")),
    ],
)
def test_its_parts(text: str, read: Access) -> None:
    assert as_access(text) == read
    assert as_access(text).root == f"{read.chroot}/psa"


@pytest.mark.parametrize(
    "text",
    [
        f"me:{SECRET}@",
        f"me:{SECRET}@zk:port",
        f"me:{SECRET}/{SECRET}@zk:2181",
        f":{SECRET}@zk:2181",
        f"me%3Ax:{SECRET}@zk:2181",
    ],
)
def test_one_that_cannot_be_read_is_refused_without_its_password(text: str) -> None:
    with pytest.raises(UsageError, match=r"PSA_ZOOKEEPER=.*\*\*\*@") as caught:
        as_access(text)
    assert SECRET not in str(caught.value)


@given(
    user=st.text("abc-_.", min_size=1),
    password=st.text("xyz:%@/ \"'", max_size=9),
    hosts=st.sampled_from(["z", "z:1,y:2/a"]),
)
def test_no_password_is_shown(user: str, password: str, hosts: str) -> None:
    text = f"{user}:{SECRET}{password}@{hosts}"
    try:
        access = as_access(text)
    except UsageError as error:
        assert SECRET not in str(error)
    else:
        assert SECRET not in f"{access} {access!r}"


@pytest.mark.parametrize("hosts", ["zk:2181", "zk1,zk2/team", "zk"])
def test_settings_are_shown_without_it(hosts: str, capsys: pytest.CaptureFixture[str]) -> None:
    for as_json in (False, True):
        show(False, as_json, Settings(zookeeper=f"me:{SECRET}@{hosts}"))
        printed = capsys.readouterr().out
        assert SECRET not in printed and "me:***@" in printed


class TestFiles:
    def test_credentials_may_lie_in_a_file_that_is_closed(self, tmp_path: Path) -> None:
        file = tmp_path / "zk"
        file.write_text(f"me:{SECRET}\n")
        settings = Settings(zookeeper="zk:2181/team", zookeeper_credentials=file)
        file.chmod(0o640)
        with pytest.raises(UsageError, match="chmod 600"):
            access_of(settings)
        file.chmod(0o600)
        assert access_of(settings) == Access("zk:2181", "/team", "me", SECRET)
        named = Settings(zookeeper="you:pw@zk:2181", zookeeper_credentials=file)
        assert access_of(named).user == "you", "the address says it, too"

    @pytest.mark.parametrize("text", ["", SECRET, "me:", f":{SECRET}"])
    def test_a_file_without_both_is_refused(self, tmp_path: Path, text: str) -> None:
        file = tmp_path / "zk"
        file.touch(0o600)
        file.write_text(text)
        with pytest.raises(UsageError, match="user:password is expected") as caught:
            access_of(Settings(zookeeper="zk", zookeeper_credentials=file))
        assert SECRET not in str(caught.value)

    def test_files_for_tls_are_tried_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"nowhere\.pem"):
            access_of(Settings(zookeeper="zk", zookeeper_ca=tmp_path / "nowhere.pem"))
        with pytest.raises(UsageError, match="go with PSA_ZOOKEEPER_CA"):
            access_of(Settings(zookeeper="zk", zookeeper_cert=tmp_path / "cert.pem"))
