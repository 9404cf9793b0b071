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
import math
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

import psa_store as psa
from psa_store.examples.progress import Progress, StepTimer

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


@cache
def rotation(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (length, size / 2), of the angles by which each place turns each pair of elements."""
    frequencies = 10_000.0 ** -(torch.arange(0, size, 2, device=device) / size)
    angles = torch.arange(length, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def turned(x: Tensor) -> Tensor:
    """Rotary places (arXiv 2104.09864): (..., length, size), so that products tell how far two tokens are apart."""
    cosines, sines = rotation(x.shape[-2], x.shape[-1], x.device)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, first * sines + second * cosines), dim=-1)


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
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width, bias=False),
            nn.GELU(),
            nn.Linear(4 * config.width, config.width, bias=False),
        )
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
        self._initialise()

    def _initialise(self) -> None:
        """Every layer adds twice to the residual stream: scaled down, the stream starts out as wide as its input."""
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                into_stream = name.endswith(("project_out.weight", "mlp.2.weight"))
                scale = math.sqrt(2 * self.config.layers) if into_stream else 1.0
                nn.init.normal_(parameter, std=0.02 / scale)

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


@dataclass(frozen=True, slots=True)
class Evaluation:
    loss: float
    tokens: int

    def __str__(self) -> str:
        return f"validation loss {self.loss:.4f} ({self.tokens} tokens)"


@torch.no_grad()
def evaluate(model: GPT, windows: TextWindows, batches: int) -> Evaluation:
    """The mean loss over windows spread evenly over the text, the same ones every time.

    ``batches``: of 64 windows, at most; fewer where the windows would overlap.
    """
    count = max(1, min(batches * EVAL_WINDOWS, len(windows) // windows.block))
    starts = [place * (len(windows) - 1) // max(1, count - 1) for place in range(count)]
    was_training = model.training
    model.eval()
    total = 0.0
    for tokens, following in DataLoader(Subset(windows, starts), batch_size=EVAL_WINDOWS):
        total += model.loss((tokens, following)).item() * len(tokens)
    model.train(was_training)
    return Evaluation(total / count, count * windows.block)


@torch.no_grad()
def sample(model: GPT, start: Tensor, count: int, *, seed: int, temperature: float = 0.8) -> list[int]:
    """``count`` tokens that the model writes after the 1-D ``start``; equal seeds write equal texts."""
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    tokens = start
    for _ in range(count):
        logits = model(tokens[None, -model.config.block :])[0, -1]
        probabilities = F.softmax(logits / temperature, dim=-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)])
    model.train(was_training)
    return tokens[len(start) :].tolist()


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small GPT. Run it with `psa run`.")
    add = parser.add_argument
    add("--data", type=Path, help="file or folder of text (default: source of Python's standard library)")
    add("--bytes", action="store_true", help="one token per byte, not per character")
    add("--job", default="gpt", help="name of the training run; running it again resumes it")
    add("--steps", type=int, default=2000, help="where the job ends; may be raised later")
    add("--batch-size", type=int, default=12, help="windows per step, over all ranks")
    add("--ranks", type=int, help="world size of a new job (default: as `psa run` says)")
    add("--stages", type=int, default=1, help="parts of the model, which different workers may compute")
    add("--microbatches", type=int, default=1, help="parts in which a rank's windows go through the stages")
    add("--mode", help="sync, async, ssp:staleness=N, or local:steps=H (default: sync)")
    add("--seed", type=int, default=1337)
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=4)
    add("--width", type=int, default=128)
    add("--block", type=int, default=64, help="tokens that the model sees at most")
    add("--dropout", type=float, default=0.0)
    add("--lr", type=float, default=1e-3)
    add("--min-lr", type=float, default=1e-4)
    add("--warmup", type=int, default=100, help="steps in which the learning rate rises")
    add("--decay-steps", type=int, default=2000, help="step at which it has fallen to --min-lr")
    add("--weight-decay", type=float, default=0.1)
    add("--clip", type=float, default=1.0, help="largest norm of a step's gradient")
    add("--eval-every", type=int, default=0, metavar="N", help="evaluate every N steps (default: at the end)")
    add("--eval-batches", type=int, default=32, help="of 64 windows, per evaluation; 0: no evaluation")
    add("--sample", type=int, default=300, metavar="N", help="characters to write at the end")
    add("--threads", type=int, default=1, help="threads of this process")
    add("--timing", type=Path, metavar="FILE", help="write the time per step to FILE, as JSON")
    return parser.parse_args(arguments)


def build_model(options: argparse.Namespace, vocabulary: Vocabulary) -> GPT:
    """The untrained model, equal in all processes that have equal options."""
    torch.manual_seed(options.seed)
    shape = (options.block, options.layers, options.heads, options.width, options.dropout)
    return GPT(GPTConfig(vocabulary.size, *shape))


def build_optimizer(options: argparse.Namespace) -> psa.optim.AdamW:
    """AdamW with weight decay for matrices only. It belongs to the job and cannot change while the job lives."""
    return psa.optim.AdamW(
        lr=psa.optim.warmup_cosine(options.lr, warmup=options.warmup, total=options.decay_steps, final=options.min_lr),
        betas=(0.9, 0.99),
        weight_decay=0.0,
        clip_grad_norm=options.clip,
        groups=[psa.optim.group("matrices", weight_decay=options.weight_decay)],
    )


def parts(options: argparse.Namespace, model: GPT) -> dict[str, Any]:
    """What the worker trains: the model, or stages of it, each of about as many layers."""
    if options.stages == options.microbatches == 1:
        return {"model": model}
    if not 1 <= options.stages <= options.layers:
        raise psa.errors.UsageError(
            f"--stages {options.stages}: a model of {options.layers} layers has so many at most"
        )
    cuts = [f"layers.{stage * options.layers // options.stages}" for stage in range(1, options.stages)]
    return {"stages": psa.split(model.loss, cuts), "microbatches": options.microbatches}


def evaluation_is_due(options: argparse.Namespace, step: int) -> bool:
    """Whether to evaluate after ``step`` steps; after the last of them the report does."""
    if not options.eval_every or not options.eval_batches or step == options.steps:
        return False
    return step % int(options.eval_every) == 0


def train(options: argparse.Namespace) -> None:
    """What every process does. Ranks come and go between processes, and the batches with them."""
    torch.set_num_threads(options.threads)
    text = load_text(options.data)
    vocabulary = Vocabulary.of(text, force_bytes=options.bytes)
    training, validation = split(vocabulary.encode(text), options.block)
    model = build_model(options, vocabulary)
    progress = Progress(options.steps, options.batch_size * options.block)
    timer = StepTimer()

    trained = parts(options, model)
    with psa.Worker(
        options.job,
        **trained,
        optimizer=build_optimizer(options),
        ranks=options.ranks,
        steps=options.steps,
        seed=options.seed,
        mode=options.mode,
    ) as worker:
        with progress:
            for batch in worker.batches(training, batch_size=options.batch_size):
                before = worker.version
                if "stages" in trained:
                    loss = worker.compute(batch)
                else:
                    loss = model.loss(batch)
                    loss.backward()  # type: ignore[no-untyped-call]
                worker.step(loss)
                if worker.version == before or loss is None or not worker.is_main:
                    continue  # this process has another rank to compute for the step, or shows nothing
                progress.show(worker.version, loss.item(), worker.members, worker.term)
                timer.passed(worker.version, worker.members)
                if evaluation_is_due(options, worker.version):
                    load_if_in_stages(options, trained, model)
                    evaluation = evaluate(model, validation, options.eval_batches)
                    progress.note(f"step {worker.version}: {evaluation}")
        if worker.is_main:
            load_if_in_stages(options, trained, model)
            report(options, worker, model, vocabulary, validation)
            if options.timing:
                timer.write(options.timing)


def load_if_in_stages(options: argparse.Namespace, trained: dict[str, Any], model: GPT) -> None:
    """Where no process has the whole model, read it as the job has it: its newest durable version."""
    if "stages" in trained:
        model.load_state_dict(psa.Store(options.job).state_dict())


def report(
    options: argparse.Namespace,
    worker: psa.Worker,
    model: GPT,
    vocabulary: Vocabulary,
    validation: TextWindows,
) -> None:
    """Say what came out and how to go on. The job's other processes may be gone already."""
    if not worker.finished:
        print(f"stopped at step {worker.version} of {options.steps}; the same command goes on from there")
        return
    if options.eval_batches:
        print(evaluate(model, validation, options.eval_batches))
    if options.sample:
        tokens = sample(model, validation.tokens[:1], options.sample, seed=options.seed)
        print(f"\n{vocabulary.decode(tokens)}\n")
    print(f"job {options.job} is at step {worker.version}; the same command with a larger --steps goes on from there")
    print(f"`psa status {options.job}` shows it (after `psa up`, if its Redis and ZooKeeper were private)", flush=True)


if __name__ == "__main__":
    train(parse_options())
