"""The GPT and the encoder-decoder of the examples have the same bits however many workers hold their cells."""

from __future__ import annotations

from pathlib import Path

import pytest

from psa_store.examples import gpt
from tests.harness import Site

STEPS = 6
TEXT = "".join(f"{number} times {number} is {number * number}; " for number in range(400))
PAIRS = "".join(f"what is {number} times {number}\t{number * number} it is\n" for number in range(120))
SMALL = ["--steps", str(STEPS), "--layers", "4", "--heads", "2", "--width", "16", "--dropout", "0.1", "--threads", "1"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("texts")
    text, pairs = folder / "text.txt", folder / "pairs.tsv"
    text.write_text(TEXT)
    pairs.write_text(PAIRS)
    return {
        "gpt": ["--data", str(text), "--block", "16", "--eval-batches", "0", "--sample", "0"],
        "seq2seq": ["--task", "translate", "--data", str(pairs), "--measure", "0", "--vocabulary", "300"],
    }


@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("stages", [2, *(pytest.param(each, marks=pytest.mark.long) for each in (1, 4))])
@pytest.mark.parametrize("example", [pytest.param("gpt", marks=pytest.mark.long), "seq2seq"])
def test_any_number_of_workers_gives_the_same_bits(
    site: Site, written: dict[str, list[str]], request: pytest.FixtureRequest, example: str, stages: int, ranks: int
) -> None:
    if example == "seq2seq":
        pytest.importorskip("tokenizers")
        pytest.importorskip("sacrebleu")
    everything = request.config.getoption("--long")
    digests = {}
    for workers in sorted({1, 2, 3, ranks * stages} if everything else {1, ranks * stages}):
        job = f"{example}-{stages}-{ranks}-by-{workers}"
        how = [*SMALL, *written[example], "--batch-size", "8", "--stages", str(stages), "--microbatches", "2"]
        how += ["--resident-stages", "1"] if workers == 1 else []
        script = Path(gpt.__file__).with_name(f"{example}.py")
        run = site.run(job, *how, script=script, workers=workers, ranks=ranks, servers=1)
        assert run.finish() == 0, run.output
        digests[workers] = site.digest(job, STEPS)
    assert len(set(digests.values())) == 1, digests
