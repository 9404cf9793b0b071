"""How far the servers' updates are from torch's after 50 steps: the table of psa_store/docs/explanation/optimizers.md.

Each optimizer of the unit tests, with a schedule, a limit of the gradient's norm and groups, on random gradients,
beside the class of ``torch.optim`` tensor by tensor (Lion: beside the paper's algorithm).

    python -m tests.performance.optimizer_error
"""

from __future__ import annotations

from dataclasses import fields

from psa_store import optim
from tests.unit.optimizer_models import largest_error, with_all_of_it
from tests.unit.optimizers import OPTIMIZERS


def main() -> None:
    print("| optimizer | float32 | bfloat16 with a float32 master |")
    print("|---|---|---|")
    for optimizer in OPTIMIZERS.values():
        errors = [largest_error(with_all_of_it(optimizer), dtype) for dtype in ("float32", "bfloat16")]
        print(f"| `{label(optimizer)}` | {errors[0]:.1e} | {errors[1]:.1e} |", flush=True)


def label(optimizer: optim.Optimizer) -> str:
    """As it is written, without the rate."""
    options = [
        f"{f.name}={value!r}"
        for f in fields(optimizer)
        if f.name not in ("lr", "groups", "clip_grad_norm") and (value := getattr(optimizer, f.name)) != f.default
    ]
    return f"{type(optimizer).__name__}({', '.join(options)})"


if __name__ == "__main__":
    main()
