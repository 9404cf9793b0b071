"""Every key of Redis that this package uses. All keys of one shard share a hash tag, so scripts work in a cluster."""

from __future__ import annotations

from collections.abc import Iterable

JOBS = "psa:jobs"


def config(job: str) -> str:
    """What the job is: a JSON document, written once."""
    return f"psa:{{{job}}}:config"


def layout(job: str) -> str:
    """Its parameters and shards: a JSON document, written once."""
    return f"psa:{{{job}}}:layout"


def data(job: str) -> str:
    """How it walks through its data: a JSON document, replaced by compare-and-set when that changes."""
    return f"psa:{{{job}}}:data"


def model_files(job: str) -> str:
    """The small files of its model, for exports: a hash of a JSON document and its digest, replaced as a whole."""
    return f"psa:{{{job}}}:model-files"


def checkpoints(job: str) -> str:
    """Its checkpoints: a hash from name to JSON document."""
    return f"psa:{{{job}}}:checkpoints"


def heartbeats(job: str) -> str:
    """What each process says about itself: a hash from member to JSON document."""
    return f"psa:{{{job}}}:heartbeats"


def events(job: str) -> str:
    """What happened to the job: a stream of bounded length."""
    return f"psa:{{{job}}}:events"


def curve(job: str) -> str:
    """Loss, speed, versions and members over time: a stream of bounded length."""
    return f"psa:{{{job}}}:curve"


def curve_interval(job: str) -> str:
    """Seconds between two points of the curve; grows when the curve is thinned."""
    return f"psa:{{{job}}}:curve-interval"


def history(job: str) -> list[str]:
    """All four."""
    return [heartbeats(job), events(job), curve(job), curve_interval(job)]


def documents(job: str) -> list[str]:
    """All that is stored of a job but its shards."""
    return [config(job), layout(job), data(job), model_files(job), checkpoints(job), *history(job)]


def kinds(job: str, shards: Iterable[int]) -> dict[str, str]:
    """The type that Redis must say of each key of a job, but for chunks."""
    texts = (config(job), layout(job), data(job), curve_interval(job))
    hashes = (model_files(job), checkpoints(job), heartbeats(job), *(head(job, shard) for shard in shards))
    streams = (events(job), curve(job))
    return dict.fromkeys(texts, "string") | dict.fromkeys(hashes, "hash") | dict.fromkeys(streams, "stream")


def head(job: str, shard: int) -> str:
    """A hash of small fields: `term` and `layout`, `v:<version>` for each stored version, `c:<name>` for each pin."""
    return f"psa:{{{job}:{shard}}}:head"


def chunk(job: str, shard: int, version: int, term: int, nonce: str, section: str, index: int) -> str:
    """A part of at most 4 MiB of one section of one version; never written twice."""
    return f"psa:{{{job}:{shard}}}:{version}:{term}:{nonce}:{section}:{index}"


def probe(token: str, index: int) -> str:
    """A key of `psa doctor`. No job's begins like this: theirs have a brace at once."""
    return f"psa:probe:{{{token}}}:{index}"
