"""How good written texts are, beside expected ones: what each task is judged by in its field."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from psa_store.examples.training import optional


@dataclass(frozen=True, slots=True)
class Score:
    """``value``: from 0 to 100."""

    name: str
    value: float

    def __str__(self) -> str:
        return f"{self.name} {self.value:.1f}"


Measure = Callable[[Sequence[str], Sequence[str]], tuple[Score, ...]]
"""Called with what was written and what was expected, in the same order, at least one each."""


def of_translations() -> Measure:
    """chrF2 and BLEU of sacrebleu, with its own settings."""
    sacrebleu = optional("sacrebleu")

    def measure(written: Sequence[str], expected: Sequence[str]) -> tuple[Score, ...]:
        references = [list(expected)]
        chrf, bleu = sacrebleu.corpus_chrf(list(written), references), sacrebleu.corpus_bleu(list(written), references)
        return Score("chrF", chrf.score), Score("BLEU", bleu.score)

    return measure


def of_summaries() -> Measure:
    """ROUGE-L of rouge-score, words without their endings: the mean of its F1."""
    scorer = optional("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)

    def measure(written: Sequence[str], expected: Sequence[str]) -> tuple[Score, ...]:
        found = [scorer.score(right, text)["rougeL"].fmeasure for text, right in zip(written, expected, strict=True)]
        return (Score("ROUGE-L", 100 * sum(found) / len(found)),)

    return measure


def of_answers() -> Measure:
    """Exact match and F1 over words, as SQuAD's evaluation has them (arXiv 1606.05250)."""

    def measure(written: Sequence[str], expected: Sequence[str]) -> tuple[Score, ...]:
        pairs = [(normalised(text), normalised(right)) for text, right in zip(written, expected, strict=True)]
        exact = sum(text == right for text, right in pairs)
        return (
            Score("exact match", 100 * exact / len(pairs)),
            Score("F1", 100 * sum(f1(text, right) for text, right in pairs) / len(pairs)),
        )

    return measure


def normalised(text: str) -> str:
    """As SQuAD compares answers: lower case, without punctuation, articles and spare spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(text: str, expected: str) -> float:
    """The harmonic mean of how many words of ``text`` are expected, and how many of the expected ones it has."""
    words, wanted = text.split(), expected.split()
    common = sum((Counter(words) & Counter(wanted)).values())
    if not words or not wanted:
        return float(words == wanted)
    return 2 * common / (len(words) + len(wanted))


MEASURES: dict[str, Callable[[], Measure]] = {
    "translate": of_translations,
    "summarise": of_summaries,
    "answer": of_answers,
}
"""Makes the measure of each task; raises UsageError where its package is not installed."""
