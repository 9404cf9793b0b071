"""Write texts token by token, several at once: beam search, or greedily with a beam of 1. Knows nothing of models."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from psa_store.examples.pairs import BEGIN, END, PAD


class Writer(Protocol):
    """Knows what comes next in some texts, and keeps what it needs of the tokens before."""

    def predict(self, last: Tensor) -> Tensor:
        """The last token of each text (texts,) -> log-probabilities of the next (texts, vocabulary)."""

    def go_on_from(self, rows: Tensor) -> None:
        """From now on text i is what text ``rows[i]`` was."""


def search(writer: Writer, count: int, beam: int, longest: int) -> list[list[int]]:
    """The tokens of ``count`` texts, of each at most ``longest``, without END.

    Of each text the ``beam`` most probable beginnings go on, each with its most probable tokens; at the end the one
    counts whose tokens are the most probable in the mean.

    Args:
        writer: for ``count * beam`` texts, the beams of one text beside each other.
    """
    texts = torch.full((count * beam, 1), BEGIN)
    scores = torch.full((count, beam), -math.inf)
    scores[:, 0] = 0.0  # all beams of a text begin alike, so only one of them counts at first
    for _ in range(longest):
        last = texts[:, -1]
        has_ended = (last == END) | (last == PAD)
        if has_ended.all():
            break
        predicted = writer.predict(last)
        predicted[has_ended] = -math.inf
        predicted[has_ended, PAD] = 0.0  # an ended text stays as it is
        scores, chosen = (scores[..., None] + predicted.view(count, beam, -1)).flatten(1).topk(beam)
        beams, tokens = chosen // predicted.shape[-1], chosen % predicted.shape[-1]
        rows = (torch.arange(count)[:, None] * beam + beams).flatten()
        texts = torch.cat([texts[rows], tokens.view(-1, 1)], dim=1)
        writer.go_on_from(rows)
    lengths = (texts[:, 1:] != PAD).sum(1).view(count, beam)
    best = (scores / lengths).argmax(1) + torch.arange(count) * beam
    return [[token for token in text if token not in (PAD, END)] for text in texts[best, 1:].tolist()]
