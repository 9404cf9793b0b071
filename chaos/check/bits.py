"""B: the result is the undisturbed one bit by bit, and no reader ever saw anything else on the way.

User code and the reader outside write down what they saw at each version, of the whole model or of a stage. An
undisturbed run saw the same, so a mixture of two versions shows at once.
"""

from __future__ import annotations

from chaos.check.violation import Violation
from chaos.history import History, Reference, mode_of, whole_or_stage

_NAME = "bits"
_SHOWN = 5


def finished(history: History, _reference: Reference) -> list[Violation]:
    """Whether the job came to its end: all that can be said where bits depend on luck."""
    violations = [Violation(_NAME, str(event["why"]), event.t) for event in history.of("broken")]
    ends = history.of("end")
    if not ends or ends[-1]["exit_code"] != 0 or not history.of("finished"):
        violations.append(Violation(_NAME, "the job did not finish"))
    if not history.of("final"):
        violations.append(Violation(_NAME, "the final parameters and optimizer state cannot be read"))
    return violations


def check(history: History, reference: Reference) -> list[Violation]:
    """See the module. In rounds ranks have parameters of their own, so what user code sees is no version."""
    violations = finished(history, reference)
    finals = history.of("final")
    if finals and finals[-1]["digest"] != reference.final:
        violations.append(
            Violation(_NAME, "the final parameters and optimizer state are not those of an undisturbed run")
        )
    seen: dict[tuple[int, int | None], str] = {}
    wrong = []
    shown = [] if mode_of(history).in_rounds else history.of("batch")
    for event in [*shown, *history.of("read")]:
        what, digest = whole_or_stage(event), event["digest"]
        expected = reference.digests.get(what) or seen.setdefault(what, digest)
        if digest != expected:
            text = f"{event.role} {event.name} saw version {event['version']} with bits that it does not have"
            wrong.append(Violation(_NAME, text, event.t))
    return violations + wrong[:_SHOWN]
