"""The example's parts: text in and out, the model, its evaluation, its samples, and the plain loop around it."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest
import torch

from psa_store.errors import UsageError
from psa_store.examples.gpt import (
    GPT,
    STDLIB_CHARACTERS_MAX,
    GPTConfig,
    TextWindows,
    Vocabulary,
    build_model,
    evaluate,
    load_text,
    parse_options,
    sample,
    split,
)
from psa_store.examples.progress import Progress, StepTimer
from psa_store.examples.training import parts
from tests.performance.gpt_step import plain_loop

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 20
TINY = ["--layers=2", "--heads=2", "--width=16", "--block=8", "--batch-size=4", "--steps=30", "--warmup=5"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def vocabulary() -> Vocabulary:
    return Vocabulary.of(TEXT)


@pytest.fixture
def model(vocabulary: Vocabulary) -> GPT:
    return build_model(parse_options([*TINY, "--dropout=0.2"]), vocabulary)


def windows(vocabulary: Vocabulary) -> TextWindows:
    return TextWindows(vocabulary.encode(TEXT), 8)


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "any.name").write_text("añb\n", encoding="utf-8")
    assert load_text(tmp_path / "any.name") == "añb\n"


def test_the_text_files_below_a_folder_are_joined_in_order_of_their_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, text in {"c.md": "3", "b/x.txt": "2", "a.py": "1", "image.png": "no"}.items():
        (tmp_path / name).write_text(text)
    assert load_text(tmp_path) == "123"


def test_without_data_the_text_is_the_start_of_the_standard_library() -> None:
    text = load_text(None)
    first = min(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    assert len(text) == STDLIB_CHARACTERS_MAX
    assert text.startswith(first.read_text(encoding="utf-8"))


def test_a_path_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_text(tmp_path / "missing.txt")
    with pytest.raises(UsageError, match="no text"):
        load_text(tmp_path)


@pytest.mark.parametrize("force_bytes", [False, True])
def test_what_is_encoded_decodes_to_the_same_text(force_bytes: bool) -> None:
    text = "Zoë says: ½ is enough\n"
    vocabulary = Vocabulary.of(text, force_bytes=force_bytes)
    tokens = vocabulary.encode(text)
    assert tokens.dtype == torch.int64
    assert tokens.max() < vocabulary.size
    assert vocabulary.decode(tokens.tolist()) == text
    assert len(tokens) == len(text.encode() if force_bytes else text)


def test_more_than_256_characters_become_bytes() -> None:
    few, many = "".join(map(chr, range(256))), "".join(map(chr, range(257)))
    assert Vocabulary.of(few).characters == few
    assert Vocabulary.of(many) == Vocabulary(None)


def test_a_window_is_followed_by_itself_shifted_by_one() -> None:
    samples = TextWindows(torch.arange(20), 8)
    x, y = samples[len(samples) - 1]
    assert x.tolist() == list(range(11, 19))
    assert y.tolist() == list(range(12, 20))


def test_training_and_validation_share_no_token() -> None:
    training, validation = split(torch.arange(1000), 8)
    assert (len(training.tokens), validation.tokens[0]) == (900, 900)
    assert len(validation.tokens) == 100


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(UsageError, match="smaller --block"):
        TextWindows(torch.arange(8), 8)


def test_there_are_logits_for_every_place_of_any_length(model: GPT, vocabulary: Vocabulary) -> None:
    for length in (1, 8):
        assert model(torch.zeros(3, length, dtype=torch.int64)).shape == (3, length, vocabulary.size)


def test_the_defaults_have_the_expected_number_of_parameters() -> None:
    model = build_model(parse_options([]), Vocabulary("".join(map(chr, range(65)))))
    by_hand = 65 * 128 + 4 * (12 * 128 * 128 + 2 * 128) + 128
    assert sum(parameter.numel() for parameter in model.parameters()) == by_hand


def test_input_and_output_embedding_are_one_parameter(model: GPT) -> None:
    assert model.head.weight is model.tokens.weight
    assert "head.weight" not in dict(model.named_parameters())


def test_projections_into_the_residual_stream_start_smaller() -> None:
    model = build_model(parse_options(["--layers=8"]), Vocabulary("abc"))
    parameters = dict(model.named_parameters())
    assert parameters["layers.0.attention.project_in.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert parameters["layers.0.attention.project_out.weight"].std().item() == pytest.approx(0.005, rel=0.05)
    assert parameters["layers.0.mlp.2.weight"].std().item() == pytest.approx(0.005, rel=0.05)


def test_a_token_changes_no_logits_before_it(model: GPT) -> None:
    model.eval()
    tokens = torch.arange(8)[None]
    changed = tokens.clone()
    changed[0, 5] += 1
    before, after = model(tokens), model(changed)
    assert torch.equal(before[0, :5], after[0, :5])
    assert all(not torch.allclose(before[0, place], after[0, place]) for place in (5, 6, 7))


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(UsageError, match="multiple of --heads"):
        GPT(GPTConfig(vocabulary=10, width=16, heads=3))


def test_an_evaluation_has_no_chance_in_it_and_leaves_the_model_in_training(model: GPT, vocabulary: Vocabulary) -> None:
    first = evaluate(model, windows(vocabulary), 2)
    torch.rand(7)
    assert evaluate(model, windows(vocabulary), 2) == first
    assert model.training


def test_an_evaluation_reads_the_whole_text_or_as_many_batches_as_it_may() -> None:
    samples = TextWindows(torch.zeros(64 * 8 * 3 + 1, dtype=torch.int64), 8)
    model = GPT(GPTConfig(vocabulary=2, block=8, layers=1, heads=1, width=4))
    whole, one_batch = 8 * ((len(samples)) // 8), 8 * 64
    assert evaluate(model, samples, 100).tokens == whole
    assert evaluate(model, samples, 1).tokens == one_batch


def test_the_loss_of_an_evaluation_is_the_mean_over_all_its_windows(model: GPT, vocabulary: Vocabulary) -> None:
    samples = windows(vocabulary)
    evaluation = evaluate(model, samples, 100)
    count = len(samples) // 8
    starts = [place * (len(samples) - 1) // (count - 1) for place in range(count)]
    model.eval()
    pairs = [samples[start] for start in starts]
    expected = model.loss([torch.stack(side) for side in zip(*pairs, strict=True)])
    assert evaluation.loss == pytest.approx(expected.item(), rel=1e-5)


def test_equal_seeds_write_equal_samples_longer_than_a_window(model: GPT, vocabulary: Vocabulary) -> None:
    start = vocabulary.encode("the")
    first, again, other = (sample(model, start, 40, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len(vocabulary.decode(first)) == 40


def test_the_plain_loop_learns_and_ends_with_the_same_bits_every_time(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    options = parse_options([*TINY, f"--data={tmp_path}", "--lr=1e-2"])
    losses, weights = [], []
    for _ in range(2):
        vocabulary = Vocabulary.of(TEXT)
        training, _ = split(vocabulary.encode(TEXT), options.block)
        model = build_model(options, vocabulary)
        plain_loop(options, model, training, lambda step, loss: losses.append((step, loss)))
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert [step for step, _ in losses] == 2 * [*range(1, 31)]
    assert losses[29][1] < losses[0][1] - 0.5
    assert torch.equal(*weights)


def test_the_timer_counts_steps_after_the_twentieth(tmp_path: Path) -> None:
    timer = StepTimer()
    for step in range(1, 31):
        timer.passed(step, workers=1 if step == 25 else 2)
    timer.write(tmp_path / "timing.json")
    timing = json.loads((tmp_path / "timing.json").read_text())
    assert timing.pop("seconds") > 0
    assert timing == {"steps": 10, "first_step": 20, "workers": 1}


def test_the_timer_of_a_run_that_is_too_short_counts_nothing(tmp_path: Path) -> None:
    timer = StepTimer()
    timer.passed(3, workers=2)
    timer.write(tmp_path / "timing.json")
    assert json.loads((tmp_path / "timing.json").read_text())["steps"] == 0


def test_progress_shows_the_last_step_and_no_more_than_its_interval_allows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Progress(steps=50, tokens_per_step=100) as progress:
        for step in range(1, 51):
            progress.show(step, loss=1.5, workers=2, term=3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("step 50/50  loss 1.5000")
    assert lines[0].endswith("workers 2  term 3")


def test_what_is_said_of_stages_comes_to_the_worker(vocabulary: Vocabulary) -> None:
    options = parse_options([*TINY, "--stages=2", "--microbatches=2", "--resident-stages=1"])
    model = build_model(options, vocabulary)
    found = parts(options, model, model.loss, ["layers.0", "layers.1"])
    assert (len(found["stages"]), found["microbatches"], found["resident_stages"]) == (2, 2, 1)
