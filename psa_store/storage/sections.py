"""What the parts of a shard's state are called where it is stored: sections are arrays, scalars numbers.

The optimizer's slots are sections, too, by the names that it gives them (:mod:`psa_store.optim.kernels`).
"""

PARAM = "param"
"""Section of every shard: its parameters or buffers."""
PUBLISHED = "published"
"""Section of a shard whose parameters travel compressed: as workers have them."""
RANK = "rank."
"""Begins the name of a section that holds rank state, see :mod:`psa_store.optim.rank_state`."""
CLOCK = "clock."
"""Begins the name of a scalar that counts the pushes of a rank, where they are applied on arrival."""
SKIPPED = "skipped."
"""Begins the name of a scalar that counts from how many updates a tensor was left out, for lack of a gradient; without
it, from none."""
OPT_STEP = "opt_step"
"""Scalar: updates that the optimizer's state has behind it."""
