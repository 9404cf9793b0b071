"""A small Transformer that reads a text and writes another: translate, summarise, answer questions. ::

    psa run --workers 2 psa_store/examples/seq2seq.py --task translate --data train.tsv --valid test.tsv
    psa run --workers 2 psa_store/examples/seq2seq.py --task summarise
    psa run --workers 2 psa_store/examples/seq2seq.py --task answer

A file has an example on each line, with tabs between: a text and its translation, a text and its summary, or a
question, a context and the answer. Without ``--data`` the model learns from docstrings of Python's standard library,
so that nothing needs to be downloaded.

In reading order: model, writing with it, evaluation, training. Kill any process at any moment: the others go on, and
the result has the same bits. Files and tokens are in ``pairs.py``, the tasks' measures in ``measures.py``. Needs the
packages of ``pip install 'psa_store[examples]'``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import psa_store as psa
from psa_store.examples.beam import search
from psa_store.examples.layers import feed_forward, initialise, turned
from psa_store.examples.measures import MEASURES, Measure, Score
from psa_store.examples.pairs import (
    BEGIN,
    BETWEEN,
    COLUMNS,
    PAD,
    Batch,
    Limits,
    Pair,
    Subwords,
    TokenPairs,
    collate,
    is_text,
    load_pairs,
    refuse_other_tokens,
)
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
    positive,
    say_how_to_go_on,
)

KeysValues = tuple[Tensor, Tensor]
"""Of attention, each (batch, heads, length, width / heads)."""


@dataclass(frozen=True, slots=True)
class Seq2SeqConfig:
    """The shape of the model. ``layers``: of the encoder and of the decoder, each."""

    vocabulary: int
    layers: int = 3
    heads: int = 4
    width: int = 192
    dropout: float = 0.1


class Attention(nn.Module):
    """Every token gathers from those that it may see, in several heads side by side.

    ``has_places``: whether it matters how far tokens are apart; not so between two texts.
    """

    def __init__(self, config: Seq2SeqConfig, *, has_places: bool) -> None:
        super().__init__()
        self.heads, self.has_places = config.heads, has_places
        self.project_query = nn.Linear(config.width, config.width, bias=False)
        self.project_seen = nn.Linear(config.width, 2 * config.width, bias=False)
        self.project_out = nn.Linear(config.width, config.width, bias=False)

    def _per_head(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def keys_values(self, x: Tensor, first: int = 0) -> KeysValues:
        """Of tokens that are to be seen; ``first``: the place of the first of them."""
        key, value = self.project_seen(x).chunk(2, dim=-1)
        key, value = self._per_head(key), self._per_head(value)
        return (turned(key, first) if self.has_places else key), value

    def forward(
        self, x: Tensor, seen: KeysValues, mask: Tensor | None = None, *, is_causal: bool = False, first: int = 0
    ) -> Tensor:
        """``mask``: (batch, 1, 1, length seen), False for what is padding."""
        query = self._per_head(self.project_query(x))
        query = turned(query, first) if self.has_places else query
        gathered = F.scaled_dot_product_attention(query, *seen, attn_mask=mask, is_causal=is_causal)
        projected: Tensor = self.project_out(gathered.transpose(1, 2).flatten(2))
        return projected


class EncoderLayer(nn.Module):
    """Attention to the whole text, then a small network. Both read a normalised copy and add to the original."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, bias=False)
        self.attention = Attention(config, has_places=True)
        self.mlp_norm = nn.LayerNorm(config.width, bias=False)
        self.mlp = feed_forward(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        x = x + self.dropout(self.attention(normed, self.attention.keys_values(normed), mask))
        out: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return out


class DecoderLayer(nn.Module):
    """Attention to what is written so far, then to what was read, then a small network."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, bias=False)
        self.attention = Attention(config, has_places=True)
        self.reading_norm = nn.LayerNorm(config.width, bias=False)
        self.reading = Attention(config, has_places=False)
        self.mlp_norm = nn.LayerNorm(config.width, bias=False)
        self.mlp = feed_forward(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, read: KeysValues, mask: Tensor, before: KeysValues | None = None
    ) -> tuple[Tensor, KeysValues]:
        """``before``: of the tokens before ``x``, which is one token then. Also returns it with that of ``x``."""
        normed = self.attention_norm(x)
        first = 0 if before is None else before[0].shape[-2]
        key, value = self.attention.keys_values(normed, first)
        if before is not None:
            key, value = torch.cat([before[0], key], dim=-2), torch.cat([before[1], value], dim=-2)
        x = x + self.dropout(self.attention(normed, (key, value), is_causal=before is None, first=first))
        x = x + self.dropout(self.reading(self.reading_norm(x), read, mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x))), (key, value)


class Seq2Seq(nn.Module):
    """A text in, for each place of another the log-probabilities of the token after it out.

    The next token is written from the vocabulary or copied from the source: one softmax over both (arXiv 1603.06393),
    so that the model can write names that it has never seen. Both texts and the output share one embedding.
    """

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        if config.width % (2 * config.heads):
            raise psa.errors.UsageError(f"--width {config.width} must be a multiple of 2 times --heads {config.heads}")
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        self.encoder_norm = nn.LayerNorm(config.width, bias=False)
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.decoder_norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        self.copy_query = nn.Linear(config.width, config.width, bias=False)
        initialise(self, additions=3 * config.layers)
        nn.init.eye_(self.copy_query.weight)  # a token begins by fitting itself: what has been read once is read on

    def encode(self, source: Tensor, mask: Tensor) -> Tensor:
        """(batch, length) int64 -> (batch, length, width)."""
        x = self.dropout(self.tokens(source))
        for layer in self.encoder:
            x = layer(x, mask)
        out: Tensor = self.encoder_norm(x)
        return out

    def read(self, memory: Tensor) -> list[KeysValues]:
        """What each layer of the decoder needs of the source."""
        return [layer.reading.keys_values(memory) for layer in cast(Iterable[DecoderLayer], self.decoder)]

    def predict(self, x: Tensor, source: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """What the decoder made of each token -> log-probabilities of the next.

        A token of the source is copied if the one before it fits what the decoder is at.
        """
        x = self.decoder_norm(x)
        before = F.pad(memory, (0, 0, 1, 0))[:, :-1]
        to_copy = self.copy_query(x) @ before.transpose(1, 2) / math.sqrt(self.config.width)
        to_copy = to_copy.masked_fill(~mask.squeeze(1), -math.inf)
        joint = F.softmax(torch.cat([self.head(x), to_copy], dim=-1), dim=-1)
        written, copied = joint.tensor_split([self.config.vocabulary], dim=-1)
        probabilities = written.scatter_add(-1, source[:, None].expand_as(copied), copied)
        return probabilities.clamp_min(torch.finfo(torch.float32).tiny).log()

    def forward(self, source: Tensor, inputs: Tensor) -> Tensor:
        """(batch, length of source), (batch, length) int64 -> (batch, length, vocabulary)."""
        mask = is_text(source)
        memory = self.encode(source, mask)
        x = self.dropout(self.tokens(inputs))
        for layer, read in zip(self.decoder, self.read(memory), strict=True):
            x, _ = layer(x, read, mask)
        return self.predict(x, source, memory, mask)

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy, in nats per token that is to be written; padding counts nothing."""
        predicted = self(batch.source, batch.inputs)
        return F.nll_loss(predicted.flatten(0, 1), batch.outputs.flatten(), ignore_index=PAD)

    def weighted_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same, and of how many tokens it is the mean, as a last stage returns it."""
        return self.loss(batch), (batch.outputs != PAD).sum()


class Seq2SeqWriter:
    """Writes several texts at once; keeps what attention needs of their sources and of the tokens before."""

    def __init__(self, model: Seq2Seq, source: Tensor) -> None:
        self._model, self._source, self._mask = model, source, is_text(source)
        memory = model.encode(source, self._mask)
        self._read, self._memory = model.read(memory), memory
        self._before: list[KeysValues | None] = [None] * len(self._read)

    def predict(self, last: Tensor) -> Tensor:
        """The last token of each text (texts,) -> log-probabilities of the next (texts, vocabulary)."""
        x = self._model.tokens(last[:, None])
        for index, layer in enumerate(self._model.decoder):
            x, self._before[index] = layer(x, self._read[index], self._mask, self._before[index])
        predicted = self._model.predict(x, self._source, self._memory, self._mask)[:, -1]
        predicted[:, [PAD, BEGIN, BETWEEN]] = -math.inf  # they are no text
        return predicted

    def go_on_from(self, rows: Tensor) -> None:
        """From now on text i is what text ``rows[i]``, which has the same source, was."""
        self._before = [seen and (seen[0][rows], seen[1][rows]) for seen in self._before]


def write(model: Seq2Seq, source: Tensor, *, beam: int, longest: int) -> list[list[int]]:
    """The tokens that the model writes for each row of ``source``, at most ``longest``. A beam of 1 is greedy."""
    with evaluating(model):
        return search(Seq2SeqWriter(model, source.repeat_interleave(beam, dim=0)), len(source), beam, longest)


@dataclass(frozen=True, slots=True)
class Workload:
    """What every process makes alike of equal options."""

    subwords: Subwords
    training: TokenPairs
    validation: TokenPairs
    model: Seq2Seq
    measure: Measure


def build(options: argparse.Namespace) -> Workload:
    """Read the data, learn the tokens, build the untrained model."""
    measure = MEASURES[options.task]()  # first: a package that is missing is told before all work
    pairs = load_pairs(options.task, options.data, options.valid)
    texts = (text for pair in pairs.training for text in (*pair.texts, pair.target))
    subwords = Subwords.learn(texts, options.vocabulary)
    limits = Limits(options.source_max, options.target_max)
    training, validation = (TokenPairs(part, subwords, limits) for part in pairs)
    torch.manual_seed(options.seed)
    model = Seq2Seq(Seq2SeqConfig(subwords.size, options.layers, options.heads, options.width, options.dropout))
    return Workload(subwords, training, validation, model, measure)


EVAL_PAIRS = 64
"""Examples in one batch of an evaluation: a constant, as another number would give other last bits."""


def evaluate(model: Seq2Seq, pairs: TokenPairs) -> Evaluation:
    """The mean loss over all tokens to write."""
    total, tokens = 0.0, 0
    with evaluating(model):
        for batch in DataLoader(pairs, batch_size=EVAL_PAIRS, collate_fn=collate):
            total += model.loss(batch).item() * batch.tokens
            tokens += batch.tokens
    return Evaluation(total / tokens, tokens)


@dataclass(frozen=True, slots=True)
class Written:
    """What the model wrote for some validation examples, and how good it is."""

    pairs: Sequence[Pair]
    texts: Sequence[str]
    scores: Sequence[Score]

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.scores))} ({len(self.texts)} examples)"

    def samples(self, count: int) -> str:
        """The first of them, to be looked at."""
        return "\n\n".join(
            f"read      {' | '.join(pair.texts)}\nexpected  {pair.target}\nwritten   {text}"
            for pair, text in list(zip(self.pairs, self.texts, strict=True))[:count]
        )


def write_and_measure(work: Workload, options: argparse.Namespace) -> Written:
    """Write for some validation examples, spread evenly over all, the same ones every time."""
    count = min(options.measure, len(work.validation))
    indices = [place * len(work.validation) // count for place in range(count)]
    texts: list[str] = []
    for first in range(0, count, EVAL_PAIRS):
        batch = collate([work.validation[index] for index in indices[first : first + EVAL_PAIRS]])
        written = write(work.model, batch.source, beam=options.beam, longest=options.target_max)
        texts += map(work.subwords.decode, written)
    pairs = [work.validation.pairs[index] for index in indices]
    return Written(pairs, texts, work.measure(texts, [pair.target for pair in pairs]))


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small encoder-decoder Transformer. Run it with `psa run`.")
    add_options(parser, job="seq2seq", steps=2000)
    add = parser.add_argument
    add("--task", choices=COLUMNS, required=True)
    add("--data", type=Path, metavar="FILE", help="TSV of examples (default: docstrings of Python's standard library)")
    add("--valid", type=Path, metavar="FILE", help="TSV to validate with (default: the last tenth of --data)")
    add("--batch-size", type=int, default=24, help="examples per step, over all ranks")
    add("--vocabulary", type=int, default=4000, help="tokens to learn, at most")
    add("--source-max", type=positive, default=160, help="tokens that the model reads, at most")
    add("--target-max", type=positive, default=48, help="tokens that it writes, at most")
    add("--layers", type=positive, default=3, help="of the encoder and of the decoder, each")
    add("--heads", type=positive, default=4)
    add("--width", type=positive, default=192)
    add("--dropout", type=float, default=0.1)
    add("--beam", type=positive, default=4, help="beginnings of a text that are kept while it is written; 1: greedy")
    add("--measure", type=int, default=500, metavar="N", help="validation examples to write for at the end; 0: none")
    return parser.parse_args(arguments)


def train(options: argparse.Namespace) -> None:
    """What every process does. Ranks come and go between processes, and the batches with them."""
    torch.set_num_threads(options.threads)
    work = build(options)
    model, digest = work.model, work.subwords.digest
    layers = [f"{part}.{index}" for part in ("encoder", "decoder") for index in range(options.layers)]
    loader = DataLoader(work.training, shuffle=True, collate_fn=collate)
    told = f"training with {work.training}\nvalidating with {work.validation}"
    progress = Progress(options.steps, round(options.batch_size * work.training.target_tokens), told)
    timer = StepTimer()

    with psa.Worker(
        options.job,
        **parts(options, model, model.weighted_loss, layers),
        optimizer=build_optimizer(options),
        ranks=options.ranks,
        steps=options.steps,
        seed=options.seed,
        state=None if is_in_stages(options) else {"tokens": digest},
    ) as worker:
        with progress:
            for batch in worker.batches(loader, batch_size=options.batch_size):
                before = worker.version
                if is_in_stages(options):
                    loss = worker.compute(batch)
                    worker.step(loss)
                else:
                    refuse_other_tokens(options.job, worker.state["tokens"], digest)
                    loss = model.loss(batch)
                    loss.backward()  # type: ignore[no-untyped-call]
                    worker.step(loss, weight=batch.tokens)
                if worker.version == before or loss is None or not worker.is_main:
                    continue  # this process has another rank to compute for the step, or shows nothing
                progress.show(worker.version, loss.item(), worker.members, worker.term)
                timer.passed(worker.version, worker.members)
                if evaluation_is_due(options, worker.version):
                    load_if_in_stages(options, model)
                    progress.note(f"step {worker.version}: {evaluate(model, work.validation)}")
        if worker.is_main:
            load_if_in_stages(options, model)
            report(options, worker, work)
            if options.timing:
                timer.write(options.timing)


def report(options: argparse.Namespace, worker: psa.Worker, work: Workload) -> None:
    """Say what came out, with three samples, and how to go on."""
    if worker.finished:
        print(evaluate(work.model, work.validation))
    if worker.finished and options.measure > 0:
        written = write_and_measure(work, options)
        print(f"{written}\n\n{written.samples(3)}\n")
    say_how_to_go_on(options, worker)


if __name__ == "__main__":
    train(parse_options())
