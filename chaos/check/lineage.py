"""Which term made which version: the history of a job, in which each term goes on from where it found storage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from chaos.history import Event, History


@dataclass(frozen=True, slots=True)
class Term:
    """One term: where it began, which servers served it, and what they applied."""

    number: int
    resume: int
    published_at: float
    serving: Mapping[str, Event]
    """By server. One that died before serving is not here: it has applied nothing."""
    applied: Mapping[int, list[Event]]
    """By version: one event of each server, steps that were skipped included."""

    @property
    def newest(self) -> int:
        """The newest version that all servers of the term have applied."""
        whole = [version for version, events in self.applied.items() if {e.name for e in events} >= set(self.serving)]
        return max(whole, default=self.resume)


def terms(history: History) -> list[Term]:
    """Return all terms that were published, in ascending order."""
    serving: dict[int, dict[str, Event]] = defaultdict(dict)
    for served in history.of("serving"):
        serving[served["term"]][served.name] = served
    applied: dict[int, dict[int, list[Event]]] = defaultdict(lambda: defaultdict(list))
    for each in [*history.of("applied"), *history.of("skipped")]:
        applied[each["term"]][each["version"]].append(each)
    # A controller that is killed between writing the plan and recording it leaves a term that only its servers
    # have recorded: it began where they began.
    published = {plan["term"]: plan for plan in history.of("published")}
    found = []
    for number in sorted({*published, *serving}):
        event: Event | None = published.get(number)
        first = min(serving[number].values(), key=lambda each: each.t, default=event)
        source = event or first
        assert source is not None
        found.append(
            Term(
                number=number,
                resume=source["resume"],
                published_at=source.t,
                serving={name: each for name, each in serving[number].items() if each["shards"]},
                applied=applied[number],
            )
        )
    return found


def makers(found: list[Term], final: int) -> dict[int, Term]:
    """By version of the final history, the term that made it: the last one that goes through it."""
    history: dict[int, Term] = {}
    for index, term in enumerate(found):
        later = [each.resume for each in found[index + 1 :]]
        end = min([final, *later])
        for version in range(term.resume + 1, end + 1):
            history[version] = term
    return history
