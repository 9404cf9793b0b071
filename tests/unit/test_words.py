"""One word for one thing: words that were given up do not come back, in code, texts, logs, stored keys or dashboards.

psa_store/docs/explanation/words.md is the vocabulary. Names in code are split into their words; comments, docstrings,
messages and other files are read as prose.
"""

from __future__ import annotations

import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).relative_to(ROOT)

INSTEAD = {
    # things
    "arrival_course|course|courses": "strategy (of a worker), aggregator (of a server)",
    "epoch|epochs": "term",
    "fleet": "server connections",
    "lead|leads": "owned shard; to own",
    "letter|letters": "message",
    "publication": "shared parameters",
    "pulse|pulses": "heartbeat",
    "reception": "connections",
    "ruler|rulers": "time axis",
    "transport|transports": "compression; wire",
    "vitals": "metrics",
    "wish|wishes|wished": "request",
    "zygote|zygotes": "spawner",
    "engine|engines": "event loop",
    "plan layout": "make layout",
    "leads output": "is main",
    "psa plan": "psa estimate",
    "plans? of faults|chaos plans?|fault plans?": "fault schedule",
    "ranks? (?:will )?carry|ranks? (?:will )?carries|it carries from": "rank state",
    # verbs that only persons do
    "condemn|condemns|condemned": "mark corrupt",
    "greet|greets|greeted|greeting|greetings": "send state; say hello is HELLO",
    "hear|hears|heard|hearing": "receive; answer",
    "obey|obeys|obeyed|obeying": "handle, follow",
    "strike|strikes|struck": "inject a fault",
    "visit|visits|visited|visiting": "check",
    "patient|patients": "examined; timeout",
    # a process is it
    "who|whom|whoever|whose turn": "which process; that",
    "somebody|someone|anybody|anyone|nobody|everybody|everyone": "a process, another process, no process",
    "he|him|his|she|her|hers": "it, its",
}
"""What was given up, and what is said instead. Patterns are of whole words, in lower case."""

ALLOWED = {
    r"of course": "English",
    r"(?<!\w)leads?[ _]to": "English: has as its result, or its end",
    r"four[-_ ]letters?(?: words?)?": "ZooKeeper's name for its commands",
    r"letters?(?=,? (?:and |or )?(?:a )?digits?)|\ba letter\b": "of the alphabet",
    r"(?:people|users|person|those) who": "persons are who",
    r"https?://\S+": "addresses are not ours",
}
ALLOWED_IN = {
    "psa_store/job/sampling.py": ("epoch", "epochs"),  # a pass over the data, as everywhere in this field
    "psa_store/worker/sampler_order.py": ("epoch", "epochs"),
    "tests/unit/test_sampling.py": ("epoch", "epochs"),
    "tests/unit/test_sampler_order.py": ("epoch", "epochs"),
    "psa_store/docs/how-to/from-ddp.md": ("epoch", "epochs"),
    "psa_store/docs/explanation/optimizers.md": ("epoch",),  # an argument of torch
    "psa_store/optim/from_scheduler.py": ("epoch",),
    "psa_store/worker/shown_optimizer.py": ("epoch",),
    "psa_store/worker/streams.py": ("epoch",),  # as datasets call it
    "tests/unit/test_streams.py": ("epoch",),
    "tests/integration/test_lr_scheduler.py": ("epoch",),
    "psa_store/docs/how-to/transformers.md": ("epoch", "epochs"),
    "psa_store/integrations/transformers/trainer.py": ("epoch", "epochs"),
    "psa_store/integrations/ranks.py": ("epoch", "epochs"),
    "psa_store/integrations/lightning/arguments.py": ("epoch", "epochs"),
    "psa_store/integrations/lightning/place.py": ("epoch", "epochs"),
    "psa_store/integrations/rates.py": ("epoch", "epochs"),
    "psa_store/integrations/accelerate/accelerator.py": ("epoch", "everyone"),  # a method of Accelerate
    "psa_store/docs/how-to/accelerate.md": ("everyone",),
    "tests/integration/accelerate_job.py": ("epoch",),
    "psa_store/integrations/lightning/steps.py": ("epoch", "epochs"),
    "psa_store/integrations/lightning/strategy.py": ("epoch", "epochs"),
    "psa_store/docs/how-to/lightning.md": ("epoch", "epochs"),
    "tests/integration/lightning_job.py": ("epoch", "epochs"),
    "tests/integration/test_lightning.py": ("epoch", "epochs"),
    "psa_store/docs/explanation/words.md": ("epoch",),
    "psa_store/config/settings.py": ("transport",),  # names the setting that took its place
    "tests/unit/test_config.py": ("transport",),
    "psa_store/storage/sentinels.py": ("epoch",),  # a field of Sentinel's answer
    "psa_store/bench/contenders/rpc.py": ("transports",),  # an argument of torch
}
EXEMPT = ("CHANGELOG.md", "LICENSE", str(HERE), "psa_store/docs/reference/")
"""The changelog tells what was called what, and the reference is made of code that is checked."""

_BANNED = re.compile(rf"\b(?:{'|'.join(INSTEAD)})\b")
_ALLOWED = re.compile("|".join(ALLOWED))


def findings(text: str, python: bool) -> Iterator[tuple[int, str]]:
    """Line and word of everything that was given up."""
    for line, piece in _pieces(text) if python else enumerate(text.splitlines(), 1):
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", _ALLOWED.sub(" ", piece)).lower()
        for found in _BANNED.finditer(words):
            yield line, found[0]


def _pieces(code: str) -> Iterator[tuple[int, str]]:
    """Names, comments and strings, each line of them with its number. What is between names is left out."""
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.NAME or token.type == tokenize.COMMENT or "STRING" in tokenize.tok_name[token.type]:
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, line


def files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split() or [str(each.relative_to(ROOT)) for each in ROOT.rglob("*") if each.is_file()]
    return sorted(
        name for name in names if not name.startswith(EXEMPT) and not name.endswith(".png") and (ROOT / name).is_file()
    )


def found_in(name: str) -> list[tuple[int, str]]:
    text = (ROOT / name).read_text()
    return [each for each in findings(text, name.endswith(".py")) if each[1] not in ALLOWED_IN.get(name, ())]


@pytest.mark.parametrize("name", files())
def test_a_file_has_no_word_that_was_given_up(name: str) -> None:
    said = [f"{name}:{line}: {word!r}: say {_instead(word)}" for line, word in found_in(name)]
    assert not said, "\n".join(said)


def _instead(word: str) -> str:
    return next(instead for pattern, instead in INSTEAD.items() if re.fullmatch(pattern, word))


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("epoch = 3", "epoch"),
        ("class CourseOfWorker: ...", "course"),
        ("self._leads[shard]", "leads"),
        ("# whoever owns it", "whoever"),
        ("log.info('nobody owns the shards')", "nobody"),
        ('"""A fleet of servers."""', "fleet"),
        ('f"{name} obeys the plan"', "obeys"),
    ],
)
def test_a_word_that_was_given_up_is_found_wherever_it_stands(code: str, word: str) -> None:
    assert [found for _, found in findings(code, python=True)] == [word]


@pytest.mark.parametrize(
    "code", ["leader = 1", "# of course", "# that leads to a loss", "'letters, digits'", "here = 1"]
)
def test_words_that_only_look_like_it_are_not(code: str) -> None:
    assert not list(findings(code, python=True))


if __name__ == "__main__":
    print("\n".join(f"{name}:{line}: {word}" for name in files() for line, word in found_in(name)))
