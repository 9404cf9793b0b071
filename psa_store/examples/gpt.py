"""A small GPT that learns to write text, trained by as many processes as you like. ::

    psa run --workers 2 psa_store/examples/gpt.py --data shakespeare.txt

The defaults are the CPU settings that nanoGPT publishes for character-level Shakespeare (4 layers, 4 heads, 128 wide,
2,000 steps of 12 windows of 64 characters), with rotary places instead of learned ones; they end near a validation
loss of 1.79. Without ``--data`` the model learns from the source text of Python's standard library, so that nothing
needs to be downloaded.

In reading order: text, model, evaluation and sampling, training. Kill any process at any moment: the
others go on, and the result has the same bits. Its parts can be imported; the benchmarks and tests do.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

import psa_store as psa
from psa_store.examples.layers import feed_forward, initialise, turned
from psa_store.examples.progress import Progress, StepTimer
from psa_store.examples.training import (
    Evaluation,
    add_options,
    build_optimizer,
    evaluating,
    evaluation_is_due,
    is_in_stages,
    load_if_in_stages,
    parts,
    say_how_to_go_on,
)

STDLIB_CHARACTERS_MAX = 1 << 20  # about the size of the Shakespeare text
TEXT_SUFFIXES = (".md", ".py", ".rst", ".txt")
CHARACTERS_MAX = 256


def load_text(source: Path | None) -> str:
    """The text of a file, or of all text files below a folder in order of their paths; None: the standard library."""
    if source is None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    elif source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.suffix in TEXT_SUFFIXES)
    else:
        files = [source]
    try:
        text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in files)
    except OSError as error:
        raise psa.errors.UsageError(f"--data {source} cannot be read: {error}. Give a readable path.") from error
    if not text:
        suffixes = ", ".join(TEXT_SUFFIXES)
        raise psa.errors.UsageError(f"--data {source}: no text. Give a text file, or a folder of {suffixes} files.")
    return text if source else text[:STDLIB_CHARACTERS_MAX]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Text to tokens and back: one token for each character that occurs, or, without ``characters``, for each byte."""

    characters: str | None

    @classmethod
    def of(cls, text: str, *, force_bytes: bool = False) -> Vocabulary:
        """The characters of ``text``, or bytes where there are more than 256 different ones."""
        characters = "".join(sorted(set(text)))
        return cls(None if force_bytes or len(characters) > CHARACTERS_MAX else characters)

    @property
    def size(self) -> int:
        return 256 if self.characters is None else len(self.characters)

    def encode(self, text: str) -> Tensor:
        """A 1-D int64 tensor. Without bytes, every character of ``text`` must be in the vocabulary."""
        if self.characters is None:
            return torch.tensor(list(text.encode()), dtype=torch.int64)
        token_of = {character: token for token, character in enumerate(self.characters)}
        return torch.tensor([token_of[character] for character in text], dtype=torch.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        if self.characters is None:
            return bytes(tokens).decode(errors="replace")
        return "".join(self.characters[token] for token in tokens)


class TextWindows(Dataset[tuple[Tensor, Tensor]]):
    """Sample i: the ``block`` tokens from place i on, and for each of them the token that follows it."""

    def __init__(self, tokens: Tensor, block: int) -> None:
        if len(tokens) <= block:
            raise psa.errors.UsageError(
                f"{len(tokens)} tokens are too few for windows of {block}. Use a longer text or a smaller --block."
            )
        self.tokens = tokens
        self.block = block

    def __len__(self) -> int:
        return len(self.tokens) - self.block

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self.tokens[index : index + self.block + 1]
        return window[:-1], window[1:]


def split(tokens: Tensor, block: int) -> tuple[TextWindows, TextWindows]:
    """The first 90% for training, the last 10% for validation."""
    cut = len(tokens) * 9 // 10
    return TextWindows(tokens[:cut], block), TextWindows(tokens[cut:], block)


@dataclass(frozen=True, slots=True)
class GPTConfig:
    """The shape of the model. ``block``: how many tokens it sees at most."""

    vocabulary: int
    block: int = 64
    layers: int = 4
    heads: int = 4
    width: int = 128
    dropout: float = 0.0


class Attention(nn.Module):
    """Every token gathers from itself and the tokens before it, in several heads side by side."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.project_in = nn.Linear(config.width, 3 * config.width, bias=False)
        self.project_out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        per_head = self.project_in(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = per_head.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        gathered = F.scaled_dot_product_attention(turned(query), turned(key), value, dropout_p=dropout, is_causal=True)
        projected: Tensor = self.project_out(gathered.transpose(1, 2).reshape(batch, length, width))
        return projected


class Layer(nn.Module):
    """Attention, then a small network for each token alone. Both read a normalised copy and add to the original."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, bias=False)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width, bias=False)
        self.mlp = feed_forward(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        out: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return out


class GPT(nn.Module):
    """Tokens in, for each place the logits of the token after it out. Input and output share one embedding."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.width % config.heads:
            raise psa.errors.UsageError(f"--width {config.width} must be a multiple of --heads {config.heads}")
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        initialise(self, additions=2 * config.layers)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length <= block) int64 -> (batch, length, vocabulary)."""
        x = self.dropout(self.tokens(tokens))
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Mean cross-entropy, in nats per token, of a batch of (tokens, next tokens)."""
        tokens, following = batch
        return F.cross_entropy(self(tokens).flatten(0, 1), following.flatten())


EVAL_WINDOWS = 64
"""Windows in one batch of an evaluation: a constant, as another number would give other last bits."""


def evaluate(model: GPT, windows: TextWindows, batches: int) -> Evaluation:
    """The mean loss over windows spread evenly over the text, the same ones every time.

    ``batches``: of 64 windows, at most; fewer where the windows would overlap.
    """
    count = max(1, min(batches * EVAL_WINDOWS, len(windows) // windows.block))
    starts = [place * (len(windows) - 1) // max(1, count - 1) for place in range(count)]
    total = 0.0
    with evaluating(model):
        for tokens, following in DataLoader(Subset(windows, starts), batch_size=EVAL_WINDOWS):
            total += model.loss((tokens, following)).item() * len(tokens)
    return Evaluation(total / count, count * windows.block)


def sample(model: GPT, start: Tensor, count: int, *, seed: int, temperature: float = 0.8) -> list[int]:
    """``count`` tokens that the model writes after the 1-D ``start``; equal seeds write equal texts."""
    generator = torch.Generator().manual_seed(seed)
    tokens = start
    with evaluating(model):
        for _ in range(count):
            logits = model(tokens[None, -model.config.block :])[0, -1]
            probabilities = F.softmax(logits / temperature, dim=-1)
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)])
    return tokens[len(start) :].tolist()


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small GPT. Run it with `psa run`.")
    add_options(parser, job="gpt", steps=2000)
    add = parser.add_argument
    add("--data", type=Path, help="file or folder of text (default: source of Python's standard library)")
    add("--bytes", action="store_true", help="one token per byte, not per character")
    add("--batch-size", type=int, default=12, help="windows per step, over all ranks")
    add("--mode", help="sync, async, ssp:staleness=N, or local:steps=H (default: sync)")
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=4)
    add("--width", type=int, default=128)
    add("--block", type=int, default=64, help="tokens that the model sees at most")
    add("--dropout", type=float, default=0.0)
    add("--eval-batches", type=int, default=32, help="of 64 windows, per evaluation; 0: no evaluation")
    add("--sample", type=int, default=300, metavar="N", help="characters to write at the end")
    return parser.parse_args(arguments)


def build_model(options: argparse.Namespace, vocabulary: Vocabulary) -> GPT:
    """The untrained model, equal in all processes that have equal options."""
    torch.manual_seed(options.seed)
    shape = (options.block, options.layers, options.heads, options.width, options.dropout)
    return GPT(GPTConfig(vocabulary.size, *shape))


def train(options: argparse.Namespace) -> None:
    """What every process does. Ranks come and go between processes, and the batches with them."""
    torch.set_num_threads(options.threads)
    text = load_text(options.data)
    vocabulary = Vocabulary.of(text, force_bytes=options.bytes)
    training, validation = split(vocabulary.encode(text), options.block)
    model = build_model(options, vocabulary)
    progress = Progress(options.steps, options.batch_size * options.block)
    timer = StepTimer()

    with psa.Worker(
        options.job,
        **parts(options, model, model.loss, [f"layers.{index}" for index in range(options.layers)]),
        optimizer=build_optimizer(options),
        ranks=options.ranks,
        steps=options.steps,
        seed=options.seed,
        mode=options.mode,
    ) as worker:
        with progress:
            for batch in worker.batches(training, batch_size=options.batch_size):
                before = worker.version
                if is_in_stages(options):
                    loss = worker.compute(batch)
                else:
                    loss = model.loss(batch)
                    loss.backward()  # type: ignore[no-untyped-call]
                worker.step(loss)
                if worker.version == before or loss is None or not worker.is_main:
                    continue  # this process has another rank to compute for the step, or shows nothing
                progress.show(worker.version, loss.item(), worker.members, worker.term)
                timer.passed(worker.version, worker.members)
                if options.eval_batches and evaluation_is_due(options, worker.version):
                    load_if_in_stages(options, model)
                    evaluation = evaluate(model, validation, options.eval_batches)
                    progress.note(f"step {worker.version}: {evaluation}")
        if worker.is_main:
            load_if_in_stages(options, model)
            report(options, worker, model, vocabulary, validation)
            if options.timing:
                timer.write(options.timing)


def report(
    options: argparse.Namespace,
    worker: psa.Worker,
    model: GPT,
    vocabulary: Vocabulary,
    validation: TextWindows,
) -> None:
    """Say what came out and how to go on."""
    if worker.finished and options.eval_batches:
        print(evaluate(model, validation, options.eval_batches))
    if worker.finished and options.sample:
        tokens = sample(model, validation.tokens[:1], options.sample, seed=options.seed)
        print(f"\n{vocabulary.decode(tokens)}\n")
    say_how_to_go_on(options, worker)


if __name__ == "__main__":
    train(parse_options())
