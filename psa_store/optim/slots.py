"""The state that an optimizer keeps of a shard: names and dtypes of the flat arrays beside its parameters.

Pure, and without torch: a forecast of what a job takes need not load it.
"""

from __future__ import annotations

from psa_store.job.dtypes import HALF_DTYPES
from psa_store.optim.spec import SGD, Adadelta, Adagrad, Adam, Adamax, Lion, NAdam, Optimizer, RAdam, RMSprop

MASTER = "master"
"""The float32 copy of parameters of half precision."""


def slot_names(optimizer: Optimizer, dtype: str) -> tuple[str, ...]:
    """Names of the flat arrays that a shard has beside its parameters, in the order they are stored in."""
    master = (MASTER,) if dtype in HALF_DTYPES else ()
    return master + state_names(optimizer)


def slot_dtype(optimizer: Optimizer, dtype: str) -> dict[str, str]:
    """The dtype of each slot of a shard of the given dtype."""
    wide = "float32" if dtype in HALF_DTYPES else dtype
    return dict.fromkeys(slot_names(optimizer, dtype), wide)


def state_names(optimizer: Optimizer) -> tuple[str, ...]:
    """As torch.optim names them; an array exists if any group needs it."""
    match optimizer:
        case SGD():
            return ("momentum_buffer",) if _has_momentum(optimizer) else ()
        case Adam(amsgrad=True):
            return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        case Adam() | NAdam() | RAdam():
            return ("exp_avg", "exp_avg_sq")
        case Adamax():
            return ("exp_avg", "exp_inf")
        case Adadelta():
            return ("square_avg", "acc_delta")
        case Lion():
            return ("exp_avg",)
        case Adagrad():
            return ("sum",)
        case RMSprop():
            average = ("grad_avg",) if optimizer.centered else ()
            momentum = ("momentum_buffer",) if _has_momentum(optimizer) else ()
            return ("square_avg", *average, *momentum)
    raise AssertionError(f"no kernel for {type(optimizer).__name__}")


def _has_momentum(optimizer: SGD | RMSprop) -> bool:
    return any(optimizer.in_group(group).momentum > 0.0 for group in range(len(optimizer.groups) + 1))
