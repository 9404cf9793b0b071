"""Settings of real commands: `psa config show`, what reaches the processes of `psa run`, and completion in a shell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import Site

TIMEOUT_S = 300.0
SCRIPT = """\
import os
import sys

os.chdir(sys.argv[1])
from psa_store.config import load_settings

print("seen", load_settings().model_dump_json())
"""


def psa(site: Site, folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, with nothing of ours in its environment but ``env``."""
    return site.told(*arguments, env=env, folder=folder, only=True)


def test_show_tells_where_a_setting_comes_from(site: Site, tmp_path: Path) -> None:
    (tmp_path / "psa.toml").write_text(
        'redis = "redis://:secret@db:6379"\nzookeeper = "zk1:2181"\ncheckpoint_files = "ftp://me:secret@there/files"\n'
    )
    done = psa(site, tmp_path, "config", "show", "--origin", "--json", PSA_ZOOKEEPER="zk2:2181")
    assert done.returncode == 0, done.stderr
    found = {name: (each["value"], each["origin"]) for name, each in json.loads(done.stdout).items()}
    assert found["redis"] == ("redis://:***@db:6379", str(tmp_path / "psa.toml"))
    assert found["zookeeper"] == ("zk2:2181", "PSA_ZOOKEEPER")
    assert found["checkpoint_files"] == ("ftp://me:***@there/files", str(tmp_path / "psa.toml"))
    assert found["carrier"] == ("auto", "default")
    shown = psa(site, tmp_path, "config", "show", COLUMNS="200")
    assert shown.returncode == 0 and "redis://:***@db:6379" in shown.stdout and "secret" not in shown.stdout
    assert "psa.toml" not in shown.stdout, "origins were not requested"


@pytest.mark.parametrize("command", [["config", "show"], ["status"], ["server", "--job", "j"], ["down"]])
@pytest.mark.parametrize(
    ("written", "env", "said"),
    [
        ("redsi = 1", {}, "psa.toml: there is no setting 'redsi': did you mean 'redis'?"),
        ("ranks = 0", {}, "psa.toml: ranks: Input should be"),
        ("", {"PSA_REDSI": "redis://db"}, "PSA_REDSI in the environment is no setting: did you mean 'PSA_REDIS'?"),
        ("", {"PSA_CONFIG": "nowhere.toml"}, "PSA_CONFIG='nowhere.toml': there is no such file"),
    ],
)
def test_what_is_wrong_ends_every_command_with_one_line(
    site: Site, tmp_path: Path, command: list[str], written: str, env: dict[str, str], said: str
) -> None:
    (tmp_path / "psa.toml").write_text(written)
    done = psa(site, tmp_path, *command, **env)
    assert done.returncode == 2 and done.stdout == ""
    assert said in done.stderr and done.stderr.startswith("psa: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [["run", "--workers", "1", "--commit-every", "9"], ["worker"]])
def test_the_file_reaches_the_script_wherever_it_goes(site: Site, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "psa.toml").write_text(
        f'redis = "{site.redis}"\nzookeeper = "{site.zookeeper}"\nhome = "data"\nbind = "127.0.0.2"\ncommit_every = 3\n'
    )
    (tmp_path / "script.py").write_text(SCRIPT)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "psa.toml").write_text('carrier = "tcp"\nnonsense = 1\n')
    done = psa(site, tmp_path, *command, "script.py", str(elsewhere))
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("seen "))
    seen = json.loads(line.removeprefix("seen "))
    assert (seen["redis"], seen["bind"], seen["home"]) == (site.redis, "127.0.0.2", str(tmp_path / "data"))
    assert seen["carrier"] == "auto"
    assert seen["commit_every"] == (9 if command[0] == "run" else 3)


@pytest.mark.parametrize(
    ("typed", "completed"), [("conf", ["config"]), ("config sh", ["show"]), ("config show --o", ["--origin"])]
)
def test_bash_completes_commands_and_options(typed: str, completed: list[str]) -> None:
    words = ["psa", *typed.split()]
    # What bash does on Tab: the words so far, and which of them is being typed.
    script = f"""
        eval "$(psa --show-completion bash)"
        COMP_WORDS=({" ".join(words)})
        COMP_CWORD={len(words) - 1}
        _psa_completion psa
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env={**{name: value for name, value in os.environ.items() if not name.startswith("PSA_")}, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.stdout.split() == completed, done.stderr
