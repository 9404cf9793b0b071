"""A, where pushes are applied on arrival: every acknowledged push is in every shard once, every other one at most once.

A shard's clocks say what is in it. In each term its server begins with clocks from storage and applies, to each shard,
the pushes of each rank in order and without a gap; what it applied after its last commit is undone by the next term. A
push that a worker was told is durable is in the clocks with which every later term begins.
"""

from __future__ import annotations

from collections.abc import Mapping

from chaos.check.violation import Violation
from chaos.history import Event, History

_NAME = "arrival"


def check_arrivals(history: History) -> list[Violation]:
    """See the module."""
    violations = []
    clocks: dict[tuple[int, int], list[int]] = {}
    """By term and shard."""
    durable: dict[int, int] = {}
    """By rank, how many pushes were acknowledged so far."""
    for event in history.events:
        match event.event:
            case "serving":
                for shard, begun in _by_shard(event).items():
                    clocks[event["term"], shard] = list(begun)
                    violations += [
                        Violation(_NAME, f"term {event['term']} lost push {done - 1} of rank {rank}", event.t)
                        for rank, done in durable.items()
                        if begun[rank] < done
                    ]
            case "updated":
                own = clocks[event["term"], event["shard"]]
                if event["step"] != own[event["rank"]]:
                    text = f"shard {event['shard']} took push {event['step']} of rank {event['rank']} after {own}"
                    violations.append(Violation(_NAME, text, event.t))
                own[event["rank"]] = event["step"] + 1
            case "settled":
                durable[event["rank"]] = max(durable.get(event["rank"], 0), event["step"] + 1)
            case _:
                pass
    return violations


def _by_shard(event: Event) -> Mapping[int, list[int]]:
    return {int(shard): begun for shard, begun in event["clocks"].items()}
