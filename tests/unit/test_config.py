"""Settings: flags, then the environment, then psa.toml, then defaults; whatever is unknown or wrong is named."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from psa_store import config
from psa_store.cli.config import show
from psa_store.config import (
    DEFAULT,
    FOR_PEOPLE,
    Settings,
    as_environment,
    check_environment,
    load_settings,
    origins,
    settings,
    with_flags,
)
from psa_store.errors import UsageError
from psa_store.launch.run import environment_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, and nothing of ours in the environment."""
    for variable in [name for name in os.environ if name.startswith("PSA_")]:
        monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestOrder:
    def test_the_environment_wins_over_the_file_and_the_file_over_defaults(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (here / "psa.toml").write_text('bind = "10.0.0.1"\nserver_threads = 3\n')
        monkeypatch.setenv("PSA_SERVER_THREADS", "4")
        found = load_settings()
        assert (found.server_threads, found.bind, found.carrier) == (4, "10.0.0.1", "auto")
        said = origins()
        assert (said["server_threads"], said["bind"], said["carrier"]) == (
            "PSA_SERVER_THREADS",
            str(here / "psa.toml"),
            DEFAULT,
        )

    def test_flags_win_over_all(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (here / "psa.toml").write_text('commit_every = 5\nmode = "async"\ncompress = "none"\nranks = 3\njob = "mine"\n')
        monkeypatch.setenv("PSA_MODE", "ssp:staleness=2")
        given = with_flags(load_settings(), ranks=8, commit_every=7, mode="sync", compress="bf16:both", restore=None)
        env = environment_of(given, "run", workers=2)
        flags = {"PSA_COMMIT_EVERY": "7", "PSA_MODE": "sync", "PSA_COMPRESS": "bf16:both", "PSA_RANKS": "8"}
        assert {name: env[name] for name in flags} == flags
        assert env["PSA_JOB"] == "mine", "what no flag says, the file says"

    def test_only_the_current_directory_is_looked_at(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (here / "psa.toml").write_text("server_threads = 3\n")
        (here / "below").mkdir()
        monkeypatch.chdir(here / "below")
        assert load_settings().server_threads == 2

    def test_a_variable_names_another_file_or_none(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (here / "psa.toml").write_text("server_threads = 3\n")
        (here / "other.toml").write_text("server_threads = 5\n")
        monkeypatch.setenv("PSA_CONFIG", "other.toml")
        assert load_settings().server_threads == 5
        assert origins()["server_threads"] == str(here / "other.toml")
        monkeypatch.setenv("PSA_CONFIG", "")
        assert load_settings().server_threads == 2

    def test_home_may_be_written_as_a_shell_would_expand_it(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(here))
        (here / "psa.toml").write_text('home = "~/data"\n')
        assert load_settings().home == here / "data"

    def test_another_process_has_the_same_settings_in_another_directory(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (here / "psa.toml").write_text(
            'redis = "redis://db"\nhome = "data"\nskip_nonfinite = false\nsession_timeout_s = 6.5\n'
            'compress = "topk:0.01"\n'
        )
        ours = load_settings()
        for name, value in as_environment(ours).items():
            monkeypatch.setenv(name, value)
        (here / "elsewhere").mkdir()
        (here / "elsewhere" / "psa.toml").write_text('job = "theirs"\n')
        monkeypatch.chdir(here / "elsewhere")
        assert load_settings() == ours.model_copy(update={"home": here / "data"})


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ('redsi = "redis://db"', "no setting 'redsi': did you mean 'redis'?"),
        ('PSA_REDIS = "redis://db"', "no setting 'PSA_REDIS': did you mean 'redis'?"),
        ("session-timeout-s = 4", "no setting 'session-timeout-s': did you mean 'session_timeout_s'?"),
        ("[redis_]\nhost = 1", "no setting 'redis_': did you mean 'redis'?"),
        ("transport = 'bf16'", "no setting 'transport': use compress = \"bf16:both\""),
        ("member = 'me'", "no setting 'member'"),
        ("qqqq = 1", "no setting 'qqqq'; `psa config show` lists all of them"),
        ("session_timeout_s = 'soon'", "session_timeout_s: Input should be a valid number"),
        ("session_timeout_s = 0.5", "session_timeout_s: Input should be greater than or equal to 1"),
        ("redis = 'db:6379'", "redis: String should match pattern"),
        ("log_level = 'loud'", "log_level: String should match pattern"),
        ("mode = 'asinc'", "mode: mode 'asinc': there is no 'asinc'"),
        ("compress = 'zip'", "compress: compression 'zip': there is no 'zip'"),
        ("bind = \nranks = 1", "Invalid value (at line 1"),
        ("bind = 'a'\nbind = 'b'\n", "Cannot overwrite a value (at line 2"),
    ],
)
def test_what_is_wrong_in_the_file_is_named_with_the_file(here: Path, written: str, said: str) -> None:
    (here / "psa.toml").write_text(written)
    with pytest.raises(UsageError) as caught:
        load_settings()
    assert str(caught.value).startswith(f"{here / 'psa.toml'}: ")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_no_text(here: Path) -> None:
    (here / "psa.toml").write_bytes(b'bind = "\xff"')
    with pytest.raises(UsageError, match=r"psa\.toml: .*utf-8"):
        load_settings()


def test_a_file_that_is_named_and_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSA_CONFIG", "nowhere.toml")
    with pytest.raises(UsageError, match=r"PSA_CONFIG='nowhere\.toml': there is no such file"):
        load_settings()


class TestEnvironment:
    def test_an_unknown_variable_is_named_with_its_neighbour(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PSA_ZOKEEPER", "zk:2181")
        with pytest.raises(UsageError, match=r"PSA_ZOKEEPER in the environment .* 'PSA_ZOOKEEPER'"):
            check_environment()
        load_settings()  # a script is not asked to answer for its environment

    def test_what_others_read_is_known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for variable in ("PSA_CONFIG", "PSA_FAILPOINTS", "PSA_TEST_SEED", "PSA_MEMBER", "PSA_DEFAULT_RANKS"):
            monkeypatch.setenv(variable, "1")
        monkeypatch.setenv("PSAS", "no business of ours")
        check_environment()

    def test_a_wrong_value_in_the_environment_is_named_even_if_the_file_has_a_good_one(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (here / "psa.toml").write_text("server_threads = 3\n")
        monkeypatch.setenv("PSA_SERVER_THREADS", "many")
        with pytest.raises(UsageError, match="PSA_SERVER_THREADS='many': Input should be"):
            load_settings()

    def test_a_wrong_url_does_not_show_its_password(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PSA_REDIS", "http://:secret@db")
        with pytest.raises(UsageError, match="PSA_REDIS: ") as caught:
            load_settings()
        assert "secret" not in str(caught.value)

    def test_every_variable_of_the_repository_is_known_and_no_other(self) -> None:
        files = [path for room in ("psa_store", "chaos", "tests") for path in (ROOT / room).rglob("*.py")]
        ours = (
            Path(__file__).name,
            Path(settings.__file__).name,
        )  # they name variables, misspelt ones too, and read none
        files = [path for path in files if path.name not in ours]
        read = {name for path in files for name in re.findall(r"""["'](PSA_[A-Z_]+)["']""", path.read_text())}
        known = {config.variable_of(name) for name in Settings.model_fields}
        assert read - known == settings._OTHER_VARIABLES


class TestShow:
    def test_passwords_are_hidden(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        for url, shown in [
            ("redis://:secret@host", "redis://:***@host"),
            ("rediss://me:secret@host:6379/0", "rediss://me:***@host:6379/0"),
            ("redis://host?password=secret&db=1", "redis://host?password=***&db=1"),
        ]:
            for as_json in (False, True):
                show(True, as_json, Settings(redis=url))
                printed = capsys.readouterr().out
                assert shown in printed and "secret" not in printed

    def test_a_program_finds_every_setting_with_value_meaning_and_origin(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (here / "psa.toml").write_text("commit_every = 5\n")
        show(True, True, load_settings())
        document = json.loads(capsys.readouterr().out)
        assert tuple(document) == FOR_PEOPLE and all(each["meaning"] for each in document.values())
        assert document["commit_every"]["value"] == 5
        assert document["commit_every"]["origin"] == str(here / "psa.toml")
        assert (document["redis"]["value"], document["redis"]["origin"]) == (None, "default")
        show(False, True, load_settings())
        assert "origin" not in json.loads(capsys.readouterr().out)["redis"]

    def test_values_are_printed_as_they_are(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        show(False, False, Settings(home=Path("/a/[red]/b"), zookeeper="zk:2181,:key:"))
        printed = capsys.readouterr().out
        assert "/a/[red]/b" in printed and ":key:" in printed
