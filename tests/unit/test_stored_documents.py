"""Documents that outlive a release: each reader ignores fields that it does not know, and names a format that it cannot
read."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from psa_store.checkpoint.catalog import Checkpoint, Reason, checkpoint_from_json
from psa_store.checkpoint.files.folder import FileFacts
from psa_store.checkpoint.files.manifest import Export, export_from_json
from psa_store.coordination.barrier import Barrier, BarrierState
from psa_store.coordination.request import CheckpointRequest, request_from_json
from psa_store.errors import DataIntegrity
from psa_store.job.config import JobConfig
from psa_store.job.document import from_text, to_text
from psa_store.job.layout import TensorRole, TensorSpec, make_layout
from psa_store.job.model_files import ModelFiles
from psa_store.storage import Manifest, Section
from psa_store.storage.head import manifest_from_text

LAYOUT = make_layout([TensorSpec(("weights",), (8,), "float32", TensorRole.TRAINED)])
CONFIG = JobConfig("job", 2, 0, {"name": "sgd"}, LAYOUT.fingerprint)
MANIFEST = Manifest(7, 3, "nonce", (Section("param", "float32", 32, ("digest",)),), {"opt_step": 7, "lr": 0.5})
EXPORT = Export(
    "somewhere",
    "2026-01-01T00:00:00",
    CONFIG,
    LAYOUT,
    7,
    (),
    ({"opt_step": 7},),
    ("momentum",),
    (FileFacts("model.safetensors", 100, "digest"),),
    "origin",
)
CHECKPOINT = Checkpoint("name", 7, 7, 3, 1.5, Reason.ASKED, named=True, bytes=32, config=CONFIG.facts())
MODEL_FILES = ModelFiles({"config.json": b"{}", "spiece.model": bytes(range(256))})
BARRIER = Barrier(3, ("a", "b"), BarrierState.DONE, {"a": 7, "b": 8})


DOCUMENTS: dict[str, tuple[Any, str, Callable[[str], Any]]] = {
    "the head in Redis": (MANIFEST, MANIFEST.to_json(), lambda text: manifest_from_text(text, "the head in Redis")),
    "the document of a checkpoint in Redis": (CHECKPOINT, CHECKPOINT.to_json(), checkpoint_from_json),
    "the barrier in ZooKeeper": (
        BARRIER,
        to_text(BARRIER),
        lambda text: from_text(Barrier, text, "the barrier in ZooKeeper"),
    ),
    "the files of a model in Redis": (
        MODEL_FILES,
        to_text(MODEL_FILES),
        lambda text: from_text(ModelFiles, text, "the files of a model in Redis"),
    ),
    "a request for a checkpoint in ZooKeeper": (
        CheckpointRequest(named=True),
        CheckpointRequest(named=True).to_json(),
        request_from_json,
    ),
}


@pytest.mark.parametrize("what", DOCUMENTS)
def test_what_is_written_is_read_back_whatever_a_newer_release_adds(what: str) -> None:
    document, text, read = DOCUMENTS[what]
    assert read(text) == document
    assert read(json.dumps({**json.loads(text), "added": {"later": 1}})) == document


@pytest.mark.parametrize("what", DOCUMENTS)
@pytest.mark.parametrize("number", [99, None])
def test_a_format_that_cannot_be_read_is_named(what: str, number: int | None) -> None:
    _, text, read = DOCUMENTS[what]
    with pytest.raises(DataIntegrity, match=f"{what} has format {number}, and this release .* reads format 1"):
        read(json.dumps({**json.loads(text), "format": number}))


@pytest.mark.parametrize("what", DOCUMENTS)
@pytest.mark.parametrize("text", ["", "[]", '{"format": 1, "named": 5, "version": "x"}'])
def test_what_is_no_such_document_is_refused(what: str, text: str) -> None:
    with pytest.raises(DataIntegrity, match=f"{what} cannot be read"):
        DOCUMENTS[what][2](text)


def signed(manifest: dict[str, Any]) -> bytes:
    """The text of a psa.json with this content, whatever release wrote it."""
    from psa_store.checkpoint.files.manifest import _digest

    return json.dumps({"digest": _digest(manifest), "manifest": manifest}).encode()


def test_an_export_is_read_whatever_a_newer_release_adds() -> None:
    assert export_from_json("somewhere", EXPORT.to_json().encode()) == EXPORT
    manifest = json.loads(EXPORT.to_json())["manifest"]
    assert export_from_json("somewhere", signed({**manifest, "added": [1]})) == EXPORT


def test_an_export_of_another_format_or_damaged_is_named() -> None:
    manifest = json.loads(EXPORT.to_json())["manifest"]
    with pytest.raises(DataIntegrity, match=r"somewhere: psa\.json has format 9, and this release .* reads format 1"):
        export_from_json("somewhere", signed({**manifest, "format": 9}))
    with pytest.raises(DataIntegrity, match=r"psa\.json is damaged"):
        export_from_json("somewhere", EXPORT.to_json().replace("float32", "float16").encode())
    for text in (b"", b"[]", b"{}"):
        with pytest.raises(DataIntegrity, match=r"psa\.json cannot be read"):
            export_from_json("somewhere", text)
