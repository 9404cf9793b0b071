"""Texts to read and the texts to write for them: files of them, their tokens, and batches of those."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from psa_store.errors import UsageError
from psa_store.examples import standard_library
from psa_store.examples.training import optional

COLUMNS = {
    "translate": ("text", "translation"),
    "summarise": ("text", "summary"),
    "answer": ("question", "context", "answer"),
}
"""Of a file of each task: what is read, then what is to be written."""

PAD, BEGIN, END, BETWEEN = range(4)
"""Tokens that are no text: fill short rows, begin and end what is written, stand between two texts that are read."""
SPECIAL = 4
BYTES = 256


class Pair(NamedTuple):
    """``texts``: what is read, one text or several; ``target``: what is to be written."""

    texts: tuple[str, ...]
    target: str


def read_pairs(path: Path, task: str) -> list[Pair]:
    """The examples of a file: UTF-8, one a line, columns between tabs, no header; empty lines are left out.

    Raises:
        UsageError: it cannot be read, a line has other columns than the task, or there is none.
    """
    columns = COLUMNS[task]
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: texts may hold other separators
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error}. Give a readable file.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8: {error}. Convert it, for instance with iconv.") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        texts = [text.strip() for text in line.split("\t")]
        if len(texts) != len(columns) or not all(texts):
            wanted = ", ".join(columns)
            found = f"{len(texts)} columns" if len(texts) != len(columns) else "an empty column"
            raise UsageError(f"{path}, line {number}: {found}. --task {task} needs, between tabs: {wanted}.")
        pairs.append(Pair(tuple(texts[:-1]), texts[-1]))
    if not pairs:
        raise UsageError(f"{path} is empty. Give a file with an example on each line: {', '.join(columns)}.")
    return pairs


class Pairs(NamedTuple):
    """Those to train with, and those to validate with."""

    training: list[Pair]
    validation: list[Pair]


def load_pairs(task: str, data: Path | None, valid: Path | None) -> Pairs:
    """Those of ``data`` and those of ``valid``; None: the last tenth of ``data``.

    Without ``data`` they are made of Python's standard library.
    """
    if valid is not None and data is None:
        raise UsageError(f"--valid {valid} without --data: give both, or none")
    pairs = [Pair(*made) for made in standard_library.EXAMPLES[task]()] if data is None else read_pairs(data, task)
    if valid is not None:
        return Pairs(pairs, read_pairs(valid, task))
    cut = len(pairs) * 9 // 10
    if cut == 0:
        raise UsageError(f"{data}: one example can not be split. Give more of them, or --valid FILE.")
    return Pairs(pairs[:cut], pairs[cut:])


class Subwords:
    """Text to tokens and back: pieces of words that are frequent in the training data (byte-pair encoding).

    Any text has tokens, down to single bytes, and no text has one of the special tokens: what the library counts from
    0 on begins here after them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.size: int = tokenizer.get_vocab_size() + SPECIAL

    @classmethod
    def learn(cls, texts: Iterable[str], size: int) -> Subwords:
        """Learn at most ``size`` tokens. Equal texts give equal tokens, in each process that learns them.

        The library breaks ties between pairs by their numbers, which begin with those of the bytes, in order. That is
        not so for all of its algorithms, so scripts compare :attr:`digest`.
        """
        if size < BYTES + SPECIAL:
            raise UsageError(f"--vocabulary {size}: give at least {BYTES + SPECIAL}, one for each byte and the special")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the cores are for the other processes
        library = optional("tokenizers")
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = library.decoders.ByteLevel()
        alphabet = library.pre_tokenizers.ByteLevel.alphabet()
        trainer = library.trainers.BpeTrainer(vocab_size=size - SPECIAL, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @property
    def digest(self) -> str:
        """Of all tokens and how text is cut into them."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text."""
        return [[token + SPECIAL for token in found.ids] for found in self._tokenizer.encode_batch(list(texts))]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; special ones have none."""
        text: str = self._tokenizer.decode([token - SPECIAL for token in tokens if token >= SPECIAL])
        return text.strip()


def refuse_other_tokens(job: str, theirs: str, ours: str) -> None:
    """Raise UsageError if a job that has tokens of one digest would be trained with those of another."""
    if theirs != ours:
        raise UsageError(
            f"job {job} has other tokens than were learnt here: give the --data and --vocabulary that it began with, "
            "and use the same release of tokenizers"
        )


def is_text(source: Tensor) -> Tensor:
    """(batch, length) int64 -> (batch, 1, 1, length) bool, False for what is padding."""
    return (source != PAD)[:, None, None]


class Batch(NamedTuple):
    """Three int64 tensors (batch, length), filled up with PAD to the longest row of each.

    Row by row: the tokens that are read; those that are written, after BEGIN; for each of these the one that follows.
    """

    source: Tensor
    inputs: Tensor
    outputs: Tensor

    @property
    def tokens(self) -> int:
        """How many are to be written: padding is none."""
        return int((self.outputs != PAD).sum())


@dataclass(frozen=True, slots=True)
class Limits:
    """How many tokens are read and written at most."""

    source: int
    target: int


class TokenPairs(Dataset[tuple[Tensor, Tensor]]):
    """Sample i: the tokens to read and those to write, END included.

    What is longer than ``limits`` is cut there and counted; a target that was cut has no END, as its text has none.
    """

    def __init__(self, pairs: Sequence[Pair], subwords: Subwords, limits: Limits) -> None:
        self.pairs = pairs
        self._sources: list[list[int]] = [[] for _ in pairs]
        for texts in zip(*(pair.texts for pair in pairs), strict=True):
            for source, tokens in zip(self._sources, subwords.encode(texts), strict=True):
                source += [BETWEEN, *tokens] if source else tokens
        self._targets = [[*tokens, END] for tokens in subwords.encode([pair.target for pair in pairs])]
        self._limits = limits
        self.cut_sources = sum(len(tokens) > limits.source for tokens in self._sources)
        self.cut_targets = sum(len(tokens) > limits.target + 1 for tokens in self._targets)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        source, target = self._sources[index], self._targets[index]
        if len(target) > self._limits.target + 1:
            target = target[: self._limits.target]
        return torch.tensor(source[: self._limits.source]), torch.tensor(target)

    @property
    def target_tokens(self) -> float:
        """The mean number of tokens to write."""
        return sum(map(len, self._targets)) / len(self)

    def __str__(self) -> str:
        cuts = f"{self.cut_sources} sources and {self.cut_targets} targets were longer than the model takes, and cut"
        return f"{len(self)} examples" + (f"; {cuts}" if self.cut_sources or self.cut_targets else "")


def collate(samples: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    """Put samples into one batch, in their order, filled up to the longest."""
    begin = torch.tensor([BEGIN])
    rows = [(source, torch.cat([begin, target[:-1]]), target) for source, target in samples]
    return Batch(*(pad_sequence(list(part), batch_first=True, padding_value=PAD) for part in zip(*rows, strict=True)))
