"""What servers keep of a shard beside its parameters, optimizer and average: names and dtypes of flat arrays.

Pure, and without torch: a forecast of what a job takes need not load it.
"""

from __future__ import annotations

from psa_store.job.average import Average
from psa_store.job.dtypes import HALF_DTYPES
from psa_store.optim.spec import SGD, Adadelta, Adagrad, Adam, Adamax, Lion, NAdam, Optimizer, RAdam, RMSprop

MASTER = "master"
"""The float32 copy of parameters of half precision."""
AVERAGE = "average"
"""The average of the parameters over the steps, of a job that has one."""


def slot_names(optimizer: Optimizer, dtype: str, average: Average | None = None) -> tuple[str, ...]:
    """Names of the flat arrays that a shard has beside its parameters, in the order they are stored in."""
    master = (MASTER,) if dtype in HALF_DTYPES else ()
    return master + state_names(optimizer) + ((AVERAGE,) if average is not None else ())


def slot_dtype(optimizer: Optimizer, dtype: str, average: Average | None = None) -> dict[str, str]:
    """The dtype of each slot of a shard of the given dtype."""
    return dict.fromkeys(slot_names(optimizer, dtype, average), wide_dtype(dtype))


def wide_dtype(dtype: str) -> str:
    """In which dtype servers compute with parameters of this one."""
    return "float32" if dtype in HALF_DTYPES else dtype


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
