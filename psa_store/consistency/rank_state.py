"""Whether a push brings the state of its rank: with the versions that are committed, and at the end of the job.

At such a version servers can give the rank's state to another worker, so a term begins only there in a job whose
``ranks_stay``. Workers ask here what to push; a server asks what to expect, and a push may say that it brings more.
"""

from __future__ import annotations

from psa_store.job.config import JobConfig


def push_brings_rank_state(config: JobConfig, version: int, last_version: int | None) -> bool:
    """Whether the push that makes ``version`` brings the state of its rank.

    ``last_version``: where this worker ends, if it ends; another may go on from there, if every shard is pushed then.
    """
    if version == last_version and config.mode.fragments == 1 and config.keeps_rank_state:
        return True
    return config.rank_state_is_due(version)
