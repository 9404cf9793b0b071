"""The example's parts: pairs of texts and their tokens, the model, writing with it, its measures, the plain loop."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from psa_store.errors import UsageError
from psa_store.examples import standard_library
from psa_store.examples.beam import search
from psa_store.examples.measures import MEASURES, f1, normalised
from psa_store.examples.pairs import (
    BEGIN,
    BETWEEN,
    COLUMNS,
    END,
    PAD,
    SPECIAL,
    Batch,
    Limits,
    Pair,
    Subwords,
    TokenPairs,
    collate,
    load_pairs,
    read_pairs,
)
from psa_store.examples.seq2seq import (
    Seq2Seq,
    Seq2SeqConfig,
    Seq2SeqWriter,
    Workload,
    build,
    evaluate,
    parse_options,
    write,
    write_and_measure,
)
from psa_store.examples.training import evaluating, optional
from tests.performance.workloads import plain_loop

for package in ("rouge_score", "sacrebleu", "tokenizers"):
    pytest.importorskip(package)

TINY = ["--layers=2", "--heads=2", "--width=16", "--vocabulary=300", "--batch-size=4", "--steps=40", "--warmup=5"]
WORDS = ("red", "green", "blue", "very tall", "very small", "very old")
THINGS = ("house", "tree", "boat")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A language in which adjectives come last."""
    path = tmp_path / "data.tsv"
    path.write_text("".join(f"a {word} {thing}\ta {thing} {word}\n" for word in WORDS for thing in THINGS))
    return path


@pytest.fixture
def work(data: Path) -> Workload:
    return build(parse_options([*TINY, "--task=translate", f"--data={data}", f"--valid={data}"]))


@pytest.fixture
def subwords() -> Subwords:
    return Subwords.learn(["the cat sat on the mat", "the dog sat on the cat"], 280)


# --- pairs of texts


def test_a_file_has_an_example_on_each_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_bytes("\ufeffa b\t c\u2028d \r\n\r\ne\tf\n".encode())
    assert read_pairs(path, "summarise") == [(("a b",), "c\u2028d"), (("e",), "f")]


def test_a_question_has_a_context(tmp_path: Path) -> None:
    path = tmp_path / "questions.tsv"
    path.write_text("what?\ta context\tan answer\n")
    assert read_pairs(path, "answer") == [(("what?", "a context"), "an answer")]


@pytest.mark.parametrize(
    ("content", "task", "message"),
    [
        (b"", "translate", "is empty"),
        (b"\n \n", "translate", "is empty"),
        (b"a\tb\na b\n", "translate", "line 2: 1 columns. --task translate needs, between tabs: text, translation"),
        (b"a\tb\tc\n", "summarise", "line 1: 3 columns"),
        (b"a\tb\n", "answer", "needs, between tabs: question, context, answer"),
        (b"a\t \n", "translate", "line 1: an empty column"),
        ("ä\tb".encode("latin-1"), "translate", "is not UTF-8"),
    ],
)
def test_a_file_with_other_content_is_refused(tmp_path: Path, content: bytes, task: str, message: str) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_pairs(path, task)


def test_a_file_that_can_not_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_pairs(tmp_path / "missing.tsv", "translate")
    with pytest.raises(UsageError, match="cannot be read"):
        read_pairs(tmp_path, "translate")


def test_the_last_tenth_validates_where_no_other_file_does(data: Path, tmp_path: Path) -> None:
    training, validation = load_pairs("translate", data, None)
    assert (len(training), len(validation)) == (16, 2)
    assert training + validation == read_pairs(data, "translate")
    (tmp_path / "valid.tsv").write_text("x\ty\n")
    training, validation = load_pairs("translate", data, tmp_path / "valid.tsv")
    assert (len(training), validation) == (18, [(("x",), "y")])


def test_one_example_is_not_split_and_validation_alone_is_no_data(tmp_path: Path) -> None:
    path = tmp_path / "one.tsv"
    path.write_text("x\ty\n")
    with pytest.raises(UsageError, match="can not be split"):
        load_pairs("translate", path, None)
    with pytest.raises(UsageError, match="without --data"):
        load_pairs("translate", None, path)


@pytest.mark.parametrize("task", COLUMNS)
def test_the_standard_library_has_examples_for_each_task(task: str) -> None:
    examples = standard_library.EXAMPLES[task]()
    assert len(examples) > 300
    assert all(len(texts) + 1 == len(COLUMNS[task]) and all(texts) and target for texts, target in examples)
    if task == "answer":
        assert all(target in context for (_, context), target in examples)


# --- tokens


@pytest.mark.parametrize("text", ["the cat", "naïve ½ 猫 🐈", "[PAD] </s> <|endoftext|>", "tab\tand\nline"])
def test_any_text_has_tokens_that_are_its_own(subwords: Subwords, text: str) -> None:
    (tokens,) = subwords.encode([text])
    assert subwords.decode(tokens) == text
    assert min(tokens) >= SPECIAL and max(tokens) < subwords.size
    assert subwords.decode([BEGIN, *tokens, END, PAD]) == text


def test_frequent_words_are_one_token(subwords: Subwords) -> None:
    assert [len(tokens) for tokens in subwords.encode(["the", "cat", "xyzzy"])] == [1, 1, 6]


def test_a_vocabulary_without_room_for_all_bytes_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 260"):
        Subwords.learn(["text"], 259)


LEARN = """
from psa_store.examples.pairs import Subwords, load_pairs
pairs = load_pairs("summarise", None, None).training
print(Subwords.learn((text for pair in pairs for text in (*pair.texts, pair.target)), 1500).digest)
"""


def test_another_process_with_other_hashes_and_more_threads_learns_the_same_tokens() -> None:
    pairs = load_pairs("summarise", None, None).training
    here = Subwords.learn((text for pair in pairs for text in (*pair.texts, pair.target)), 1500)
    env = {**os.environ, "PYTHONHASHSEED": "77", "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "5"}
    there = subprocess.run([sys.executable, "-c", LEARN], env=env, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here.digest
    fewer = Subwords.learn((pair.target for pair in pairs), 1500)
    assert fewer.digest != here.digest


def test_what_is_too_long_is_cut_and_counted(subwords: Subwords) -> None:
    long = Pair(("the cat sat on the mat",), "the dog sat on the cat")
    pairs = TokenPairs([Pair(("cat",), "dog"), long, long], subwords, Limits(source=4, target=3))
    assert (pairs.cut_sources, pairs.cut_targets) == (2, 2)
    assert str(pairs) == "3 examples; 2 sources and 2 targets were longer than the model takes, and cut"
    assert [len(part) for part in pairs[0]] == [1, len(subwords.encode(["dog"])[0]) + 1]
    source, target = pairs[1]
    assert (len(source), len(target)) == (4, 3)
    assert pairs[0][1][-1] == END and END not in target


def test_what_just_fits_is_not_cut(subwords: Subwords) -> None:
    pair = Pair(("the cat",), "the cat")
    exact = len(subwords.encode(["the cat"])[0])
    pairs = TokenPairs([pair], subwords, Limits(exact, exact))
    assert str(pairs) == "1 examples"
    assert pairs[0][1].tolist() == [*subwords.encode(["the cat"])[0], END]


def test_a_batch_is_filled_up_to_its_longest_row() -> None:
    samples = [(torch.tensor([7, 8, 9]), torch.tensor([5, END])), (torch.tensor([7]), torch.tensor([5, 6, END]))]
    batch = collate(samples)
    assert batch.source.tolist() == [[7, 8, 9], [7, PAD, PAD]]
    assert batch.inputs.tolist() == [[BEGIN, 5, PAD], [BEGIN, 5, 6]]
    assert batch.outputs.tolist() == [[5, END, PAD], [5, 6, END]]
    assert batch.tokens == 5


# --- the model


def test_padding_changes_no_loss(work: Workload) -> None:
    work.model.eval()
    samples = [work.validation[index] for index in (0, 5, 17)]
    together = collate(samples)
    alone = [collate([sample]) for sample in samples]
    assert len({batch.source.shape for batch in alone}) == len({batch.outputs.shape for batch in alone}) == 2
    expected = sum(work.model.loss(batch).item() * batch.tokens for batch in alone) / together.tokens
    assert work.model.loss(together).item() == pytest.approx(expected, rel=1e-5)


def test_padding_gets_no_gradient(work: Workload) -> None:
    work.model.eval()
    first = collate([work.validation[0]])
    filled = Batch(*(torch.nn.functional.pad(part, (0, 4), value=PAD) for part in first))
    gradients = []
    for batch in (first, filled):
        work.model.zero_grad()
        work.model.loss(batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in work.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_a_written_token_changes_nothing_before_it_and_a_read_one_changes_all(work: Workload) -> None:
    work.model.eval()
    source, inputs = torch.arange(10, 18)[None], torch.arange(20, 26)[None]
    changed = inputs.clone()
    changed[0, 3] += 1
    before, after = work.model(source, inputs), work.model(source, changed)
    assert torch.equal(before[0, :3], after[0, :3])
    assert all(not torch.allclose(before[0, place], after[0, place]) for place in (3, 4, 5))
    other = work.model(torch.cat([source[:, :-1], source[:, -1:] + 1], dim=1), inputs)
    assert all(not torch.allclose(before[0, place], other[0, place]) for place in range(6))


def test_probabilities_add_up_to_one_and_what_was_read_is_copied(work: Workload) -> None:
    work.model.eval()
    predicted = work.model(torch.tensor([[30, 40, 50, PAD]]), torch.tensor([[BEGIN, 40]])).exp()
    assert predicted.shape == (1, 2, work.subwords.size)
    torch.testing.assert_close(predicted.sum(-1), torch.ones(1, 2))
    assert predicted[0, 1].argmax() == 50  # read after 40


def test_texts_and_output_share_one_embedding(work: Workload) -> None:
    assert work.model.head.weight is work.model.tokens.weight
    assert "head.weight" not in dict(work.model.named_parameters())


def test_heads_that_do_not_divide_the_width_into_pairs_are_refused() -> None:
    with pytest.raises(UsageError, match="2 times --heads 3"):
        Seq2Seq(Seq2SeqConfig(vocabulary=10, width=15, heads=3))


def test_the_loss_of_an_evaluation_is_the_mean_over_all_tokens(work: Workload) -> None:
    first = evaluate(work.model, work.validation)
    torch.rand(7)
    assert evaluate(work.model, work.validation) == first
    assert work.model.training
    work.model.eval()
    alone = [collate([work.validation[index]]) for index in range(len(work.validation))]
    tokens = sum(batch.tokens for batch in alone)
    assert first.tokens == tokens
    assert first.loss == pytest.approx(sum(work.model.loss(batch).item() * batch.tokens for batch in alone) / tokens)


# --- writing


def by_hand(model: Seq2Seq, source: Tensor, longest: int) -> list[int]:
    """Greedy, one text, everything computed anew for each token."""
    tokens = [BEGIN]
    while len(tokens) <= longest and tokens[-1] != END:
        predicted = model(source[None], torch.tensor([tokens]))[0, -1]
        predicted[:END] = predicted[END + 1 : SPECIAL] = -torch.inf
        tokens.append(int(predicted.argmax()))
    return [token for token in tokens[1:] if token != END]


class Anew:
    """Computes everything anew for each token: slow, and with nothing that could be kept wrongly."""

    def __init__(self, model: Seq2Seq, source: Tensor) -> None:
        self._model, self._source = model, source
        self._texts = torch.empty(len(source), 0, dtype=torch.int64)

    def predict(self, last: Tensor) -> Tensor:
        self._texts = torch.cat([self._texts, last[:, None]], dim=1)
        predicted = self._model(self._source, self._texts)[:, -1]
        predicted[:, :END] = predicted[:, END + 1 : SPECIAL] = -torch.inf
        return predicted

    def go_on_from(self, rows: Tensor) -> None:
        self._texts = self._texts[rows]


@pytest.fixture
def trained(work: Workload) -> Workload:
    """Enough to write this and that, not enough to be sure of it."""
    plain_loop(parse_options([*TINY, "--task=translate", "--lr=1e-2", "--steps=12"]), work, lambda *_: None)
    return work


def test_token_by_token_the_predictions_are_those_of_all_at_once(work: Workload) -> None:
    """But for special tokens, which are not written."""
    source = collate([work.validation[0], work.validation[17]]).source
    inputs = torch.tensor([[BEGIN, *range(70, 76)], [BEGIN, *range(80, 86)]])
    with evaluating(work.model):
        for parameter in work.model.parameters():
            parameter *= 8  # as small as at first, it would hardly matter where a token is
        writer = Seq2SeqWriter(work.model, source)
        found = torch.stack([writer.predict(last) for last in inputs.unbind(1)], dim=1)
        expected = work.model(source, inputs)
        moved = work.model(source, inputs[:, [0, 2, 1, 3, 4, 5, 6]])
    written = [END, *range(SPECIAL, work.subwords.size)]
    torch.testing.assert_close(found[..., written], expected[..., written], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(expected[:, -1], moved[:, -1], rtol=1e-2)
    assert found[..., [PAD, BEGIN, BETWEEN]].max() == -torch.inf


def test_a_beam_of_one_is_greedy(trained: Workload) -> None:
    """Whatever else is written beside it, and however its source is filled up."""
    samples = [trained.validation[index] for index in (0, 4, 8, 9, 13, 17)]
    sources = [source for source, _ in samples]
    assert len({len(source) for source in sources}) > 1
    with evaluating(trained.model):
        expected = [by_hand(trained.model, source, 9) for source in sources]
    assert len({len(text) for text in expected}) > 1
    assert write(trained.model, collate(samples).source, beam=1, longest=9) == expected


def test_what_a_beam_keeps_of_its_texts_is_what_computing_them_anew_gives(trained: Workload) -> None:
    source = collate([trained.validation[index] for index in (0, 4, 8, 9, 13, 17)]).source
    with evaluating(trained.model):
        expected = search(Anew(trained.model, source.repeat_interleave(4, dim=0)), len(source), 4, 9)
    assert write(trained.model, source, beam=4, longest=9) == expected
    assert write(trained.model, source, beam=1, longest=9) != expected
    assert trained.model.training


class Table:
    """A language whose next token depends on the last one only: rows of probabilities."""

    def __init__(self, rows: dict[int, dict[int, float]]) -> None:
        self._rows = rows

    def predict(self, last: Tensor) -> Tensor:
        predicted = torch.zeros(len(last), 8)
        for text, token in enumerate(last.tolist()):
            for following, probability in self._rows.get(token, {END: 1.0}).items():
                predicted[text, following] = probability
        return predicted.log()

    def go_on_from(self, rows: Tensor) -> None:
        """Nothing is kept."""


def found(rows: dict[int, dict[int, float]], beam: int, longest: int = 9) -> Sequence[int]:
    first, second = search(Table(rows), 2, beam, longest)
    assert first == second
    return first


def test_a_wider_beam_finds_what_is_more_probable_as_a_whole() -> None:
    rows = {BEGIN: {4: 0.6, 5: 0.4}, 4: {6: 0.5, 7: 0.5}, 5: {7: 1.0}}
    assert found(rows, beam=1) in ([4, 6], [4, 7])
    assert found(rows, beam=2) == [5, 7]


def test_the_mean_over_tokens_decides_so_a_longer_text_is_not_worse() -> None:
    rows = {BEGIN: {4: 0.5, END: 0.5}, 4: {5: 0.9, END: 0.1}, 5: {6: 1.0}}
    assert found(rows, beam=2) == [4, 5, 6]


def test_a_text_ends_where_it_is_as_long_as_allowed() -> None:
    assert found({BEGIN: {4: 1.0}, 4: {4: 1.0}}, beam=2, longest=5) == [4] * 5


# --- measures


def measured(task: str, written: list[str], expected: list[str]) -> dict[str, float]:
    return {score.name: pytest.approx(score.value, abs=0.05) for score in MEASURES[task]()(written, expected)}


def test_translations_are_measured_by_sacrebleu() -> None:
    text = "the quick brown fox jumps over the lazy dog"
    assert measured("translate", [text], [text]) == {"chrF": 100.0, "BLEU": 100.0}
    # 2 of 6 words and 1 of 5 pairs of them, no longer runs, which sacrebleu smooths to 1/8 and 1/12.
    bleu = measured("translate", ["a b x y z w"], ["a b c d e f"])["BLEU"]
    assert bleu == 100 * (2 / 6 * 1 / 5 * 1 / 8 * 1 / 12) ** 0.25
    assert measured("translate", ["zzz"], ["aaa"])["chrF"] == 0.0


def test_summaries_are_measured_by_rouge_l() -> None:
    # Longest common subsequence: "the cat sat", of 4 written and 5 expected words.
    assert measured("summarise", ["the cat sat down"], ["the big cat sat here"]) == {"ROUGE-L": 100 * 2 * 3 / (4 + 5)}
    assert measured("summarise", ["editors"], ["Editor"]) == {"ROUGE-L": 100.0}


def test_answers_are_measured_as_squad_does() -> None:
    assert normalised("  The Eiffel-Tower, a tower. ") == "eiffeltower tower"
    assert measured("answer", ["The cat!", "a red house"], ["cat", "red houses"]) == {"exact match": 50.0, "F1": 75.0}
    assert f1("", "") == 1.0 and f1("", "x") == 0.0
    assert f1("x x y", "x y y") == pytest.approx(2 / 3)


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UsageError, match=r"sacrebleu.*pip install 'psa_store\[examples\]'"):
        MEASURES["translate"]()
    assert optional("json").loads("1") == 1


# --- all of it


def test_the_plain_loop_learns_a_language_and_ends_with_the_same_bits_every_time(data: Path) -> None:
    arguments = [*TINY, "--task=translate", f"--data={data}", f"--valid={data}", "--lr=1e-2", "--steps=120"]
    options = parse_options([*arguments, "--decay-steps=120", "--dropout=0", "--beam=2"])
    losses: list[float] = []
    weights = []
    for _ in range(2):
        work = build(options)
        plain_loop(options, work, lambda _, loss: losses.append(loss))
        weights.append(torch.cat([parameter.flatten() for parameter in work.model.parameters()]))
    assert torch.equal(*weights)
    assert losses[119] < 0.2 < losses[0]
    written = write_and_measure(work, options)
    assert {score.name: score.value for score in written.scores}["chrF"] > 95
    assert written.samples(1) == "read      a red house\nexpected  a house red\nwritten   a house red"
