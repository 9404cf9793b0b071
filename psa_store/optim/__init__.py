"""Optimizers and learning-rate schedules as data: what users write as ``psa.optim.…``.

    optimizer = psa.optim.AdamW(
        lr=psa.optim.warmup_cosine(1e-3, warmup=100, total=2000),
        weight_decay=0.1,
        clip_grad_norm=1.0,
        groups=[psa.optim.group("vectors", weight_decay=0.0)],
    )

An optimizer is a name from an allow-list and numbers. It travels as JSON and is applied by the servers'
kernels (``kernels.py``, ``rules.py``, ``reduce.py``), so no code ever comes from a job's configuration.
"""

from psa_store.optim.schedule import Schedule, constant, linear, polynomial, warmup_cosine
from psa_store.optim.schedules import (
    exponential,
    inverse_sqrt,
    milestones,
    one_cycle,
    step_decay,
    table,
    warmup_stable_decay,
)
from psa_store.optim.spec import (
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Group,
    Lion,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    from_dict,
    group,
)

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Group",
    "Lion",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "Schedule",
    "constant",
    "exponential",
    "from_dict",
    "group",
    "inverse_sqrt",
    "linear",
    "milestones",
    "one_cycle",
    "polynomial",
    "step_decay",
    "table",
    "warmup_cosine",
    "warmup_stable_decay",
]
