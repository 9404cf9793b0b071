"""B: the result is the undisturbed one bit by bit, and no reader ever saw anything else on the way.

User code and the reader outside write down what they saw at each version, of the whole model or of a stage. An
undisturbed run saw the same, so a mixture of two versions shows at once.
"""

from __future__ import annotations

from chaos.check.violation import Violation
from chaos.history import History, Reference, whole_or_stage

_NAME = "bits"
_SHOWN = 5


def check(history: History, reference: Reference) -> list[Violation]:
    """See the module."""
    violations = [Violation(_NAME, str(event["why"]), event.t) for event in history.of("broken")]
    ends = history.of("end")
    if not ends or ends[-1]["exit_code"] != 0 or not history.of("finished"):
        violations.append(Violation(_NAME, "the job did not finish"))
    finals = history.of("final")
    if not finals or finals[-1]["digest"] != reference.final:
        violations.append(
            Violation(_NAME, "the final parameters and optimizer state are not those of an undisturbed run")
        )
    seen: dict[tuple[int, int | None], str] = {}
    wrong = []
    for event in [*history.of("batch"), *history.of("read")]:
        what, digest = whole_or_stage(event), event["digest"]
        expected = reference.digests.get(what) or seen.setdefault(what, digest)
        if digest != expected:
            text = f"{event.role} {event.name} saw version {event['version']} with bits that it does not have"
            wrong.append(Violation(_NAME, text, event.t))
    return violations + wrong[:_SHOWN]
