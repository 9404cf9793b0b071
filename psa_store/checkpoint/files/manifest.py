"""What ``psa.json`` says of the export beside it: the document, its writer and its reader, which believes nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from xxhash import xxh3_128_hexdigest

from psa_store.checkpoint.files.folder import FileFacts
from psa_store.checkpoint.files.tensor_files import INDEX, SUFFIX
from psa_store.errors import DataIntegrity
from psa_store.job.config import JobConfig, job_config_from_json
from psa_store.job.document import ADDED_LATER, from_fields, to_fields
from psa_store.job.layout import Layout, layout_from_json
from psa_store.job.position import DataRecord

MANIFEST = "psa.json"
_VERSION_END = 1 << 62


@dataclass(frozen=True, slots=True)
class Export:
    """What ``psa.json`` says. ``url``: of the folder."""

    url: str
    created: str
    """Time in UTC, ISO 8601."""
    config: JobConfig
    layout: Layout
    version: int
    clocks: tuple[int, ...]
    """By rank, how many of its pushes are in it, where they are applied on arrival; else empty."""
    scalars: tuple[Mapping[str, float | int], ...]
    """Of each shard."""
    slots: tuple[str, ...]
    """Sections that have an element for each of a parameter's: those of the optimizer, and what is published."""
    files: tuple[FileFacts, ...]
    origin: str = ""
    """Tells what it was written from (``export.origin_of``); exports of old have none."""
    data: DataRecord | None = None
    """How the job walks through its data, as far as that is known."""

    @property
    def model_files(self) -> list[str]:
        """Names of the files that loaders of the model want beside its tensors."""
        return [file.name for file in self.files if not file.name.endswith((SUFFIX, f"{SUFFIX}{INDEX}"))]

    @property
    def step(self) -> int:
        """Steps of each rank; where pushes are applied on arrival, their mean."""
        return self.version // self.config.updates_per_step

    def to_json(self) -> str:
        manifest = to_fields(
            _Manifest(
                created=self.created,
                job=self.config.facts(),
                layout=json.loads(self.layout.to_json()),
                origin=self.origin,
                version=self.version,
                step=self.step,
                clocks=self.clocks,
                scalars=self.scalars,
                slots=self.slots,
                files=self.files,
                data=self.data,
            )
        )
        return json.dumps({"digest": _digest(manifest), "manifest": manifest}, indent=1)


@dataclass(frozen=True, slots=True)
class _Manifest:
    """``psa.json``, but for its digest."""

    FORMAT: ClassVar[int] = 1

    created: str
    job: dict[str, Any]
    layout: dict[str, Any]
    version: int
    step: int
    clocks: tuple[int, ...]
    scalars: tuple[Mapping[str, float | int], ...]
    slots: tuple[str, ...]
    files: tuple[FileFacts, ...]
    origin: str = ""
    data: DataRecord | None = field(default=None, metadata=ADDED_LATER)


def export_from_json(url: str, text: bytes) -> Export:
    """Read ``psa.json``; raises DataIntegrity if it is damaged or of another format."""
    what = f"{url}: {MANIFEST}"
    try:
        document = json.loads(text)
        digest, fields = document["digest"], document["manifest"]
        whole = digest == _digest(fields)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataIntegrity(f"{what} cannot be read: {error!r}") from error
    if not whole:
        raise DataIntegrity(f"{what} is damaged, its digest does not match")
    manifest = from_fields(_Manifest, fields, what)
    config, layout = job_config_from_json(json.dumps(manifest.job)), layout_from_json(json.dumps(manifest.layout))
    if contradiction := _contradiction(manifest, config, layout):
        raise DataIntegrity(f"{what} cannot be believed: {contradiction}")
    return Export(
        url=url,
        created=manifest.created,
        config=config,
        layout=layout,
        version=manifest.version,
        clocks=manifest.clocks,
        scalars=manifest.scalars,
        slots=manifest.slots,
        files=manifest.files,
        origin=manifest.origin,
        data=manifest.data,
    )


def _contradiction(manifest: _Manifest, config: JobConfig, layout: Layout) -> str:
    """What of a manifest does not fit the rest; empty if all does."""
    names = [file.name for file in manifest.files]
    if config.layout != layout.fingerprint:
        return "its job has another layout"
    if len(manifest.scalars) != len(layout.shards):
        return f"it has scalars of {len(manifest.scalars)} shards, and its layout {len(layout.shards)}"
    if len(manifest.clocks) != config.clocks:
        return f"it has clocks of {len(manifest.clocks)} ranks, and its job {config.clocks}"
    if not all(0 <= number < _VERSION_END for number in (manifest.version, *manifest.clocks)):
        return "a version or clock is none"
    if any(not name or name.startswith(".") or "/" in name for name in names) or len(set(names)) < len(names):
        return "it lists what is no file in its folder, or one twice"
    return ""


def _digest(manifest: Mapping[str, Any]) -> str:
    return xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode())
