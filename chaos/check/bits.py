"""B: the result is the undisturbed one bit by bit, and nobody ever saw anything else on the way.

User code and the reader outside write down what they saw at each version. An undisturbed run saw the same, so a
mixture of two versions shows at once.
"""

from __future__ import annotations

from chaos.check.violation import Violation
from chaos.journal import Journal, Truth

_NAME = "bits"
_SHOWN = 5


def check(journal: Journal, known: Truth) -> list[Violation]:
    """See the module."""
    violations = [Violation(_NAME, str(event["why"]), event.t) for event in journal.of("broken")]
    ends = journal.of("end")
    if not ends or ends[-1]["exit_code"] != 0 or not journal.of("finished"):
        violations.append(Violation(_NAME, "the job did not finish"))
    finals = journal.of("final")
    if not finals or finals[-1]["digest"] != known.final:
        violations.append(
            Violation(_NAME, "the final parameters and optimizer state are not those of an undisturbed run")
        )
    seen: dict[int, str] = {}
    wrong = []
    for event in [*journal.of("batch"), *journal.of("read")]:
        version, digest = event["version"], event["digest"]
        expected = known.digests.get(version) or seen.setdefault(version, digest)
        if digest != expected:
            text = f"{event.role} {event.name} saw version {version} with bits that it does not have"
            wrong.append(Violation(_NAME, text, event.t))
    return violations + wrong[:_SHOWN]
