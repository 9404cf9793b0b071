"""Files that others may have written are judged by what they say, before memory is taken for what they promise."""

from __future__ import annotations

import base64
import json
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psa_store.checkpoint.files import export as exports
from psa_store.checkpoint.files.export import open_export
from psa_store.checkpoint.files.folder import FileFacts, Folder
from psa_store.checkpoint.files.importing import Source
from psa_store.checkpoint.files.manifest import MANIFEST, Export, _digest, export_from_json
from psa_store.checkpoint.files.tensor_files import LENGTH_BYTES, Stored, header_bytes, read_header
from psa_store.errors import DataIntegrity, UsageError
from psa_store.job import model_files
from psa_store.job.config import JobConfig
from psa_store.job.document import from_text
from psa_store.job.dtypes import ITEM_BYTES
from psa_store.job.layout import SHARDS_MAX, TensorRole, TensorSpec, layout_from_json, make_layout
from psa_store.job.model_files import ModelFiles

TENSOR = TensorSpec(("a",), (3, 2), "float32", TensorRole.TRAINED)
LAYOUT = make_layout([TENSOR, replace(TENSOR, names=("b",), shape=(4,))])
CONFIG = JobConfig("job", 2, 0, {"name": "SGD", "lr": 0.1}, LAYOUT.fingerprint)
HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]},
    "b": {"dtype": "F32", "shape": [4], "data_offsets": [24, 40]},
}
MEMORY_MAX_BYTES = 8 << 20
"""What may be taken for a document of some hundred bytes: nearly nothing, beside what imports and tests take."""

numbers = st.integers() | st.integers(0, 64) | st.sampled_from([2**31, 2**60, 2**63, 2**64 - 8, 10**400])
hostile = st.recursive(
    st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=3) | st.sampled_from(["F64", "U8", "F32"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=6,
)


@contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY_MAX_BYTES
    finally:
        tracemalloc.stop()


def whole(stored: dict[str, Stored], start: int, size_bytes: int) -> bool:
    """Whether tensors are disjoint, in the file, and as long as they say."""
    ranges = sorted((each.low, each.high) for each in stored.values())
    ends = [start, *(high for _, high in ranges)]
    return all(low == end for (low, _), end in zip(ranges, ends, strict=False)) and ends[-1] == size_bytes


@given(st.data())
def test_a_header_says_what_the_file_has_or_is_refused(data: st.DataObject) -> None:
    header = json.loads(json.dumps(HEADER))
    for _ in range(data.draw(st.integers(0, 2))):
        tensor = data.draw(st.sampled_from(["a", "b", "c"]))
        if data.draw(st.booleans()):
            header[tensor] = data.draw(hostile)
        elif isinstance(header.get(tensor), dict):
            field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            header[tensor][field] = data.draw(hostile | st.lists(numbers, min_size=1, max_size=2))
    text = json.dumps(header).encode()
    start = LENGTH_BYTES + len(text)
    size_bytes = start + data.draw(st.sampled_from([40, 39, 0, 2**60]))
    try:
        found = read_header("file", text, size_bytes)
    except DataIntegrity as error:
        assert str(error).startswith("file: ")
        assert header != HEADER or size_bytes != start + 40
        return
    assert whole(found, start, size_bytes)
    for key, stored in found.items():
        numel = 1
        for length in stored.shape:
            numel *= length
        assert stored.high - stored.low == numel * ITEM_BYTES[stored.dtype], key


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"b": {"dtype": "F32", "shape": [4], "data_offsets": [20, 36]}}, "begins at byte"),
        ({"b": {"dtype": "F32", "shape": [4], "data_offsets": [32, 48]}}, "begins at byte"),
        ({"b": {"dtype": "F32", "shape": [5], "data_offsets": [24, 44]}}, "end at byte"),
        ({"b": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [24, 40]}}, "shape"),
        ({"b": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [24, 24]}}, "shape"),
        ({"b": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [24, 40]}}, "shape"),
        ({"b": {"dtype": "F32", "shape": [True, 4], "data_offsets": [24, 40]}}, "shape"),
        ({"b": {"dtype": "F32", "shape": [1] * 100_000 + [4], "data_offsets": [24, 40]}}, "shape"),
        ({"b": {"dtype": "F32", "shape": [4], "data_offsets": [40, 24]}}, "shape"),
        ({"b": {"dtype": "X32", "shape": [4], "data_offsets": [24, 40]}}, "X32"),
        ({"b": [1]}, "header cannot be read"),
    ],
)
def test_what_is_wrong_with_a_header_is_named(changed: dict[str, Any], named: str) -> None:
    text = json.dumps(HEADER | changed).encode()
    with pytest.raises(DataIntegrity, match=named):
        read_header("file", text, LENGTH_BYTES + len(text) + 40)


@pytest.mark.parametrize("text", [b"[" * 50_000, b"[1]", b"\xff", b"", b"9" * 5000, b"null"])
def test_a_header_that_is_no_object_is_refused(text: bytes) -> None:
    with pytest.raises(DataIntegrity, match="file: its header cannot be read"):
        read_header("file", text, LENGTH_BYTES + len(text))


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 93, 100_000_001])
def test_a_header_is_no_longer_than_its_file(length: int) -> None:
    assert header_bytes("file", (92).to_bytes(LENGTH_BYTES, "little"), 100) == 92
    with pytest.raises(DataIntegrity, match="no file of safetensors"):
        header_bytes("file", length.to_bytes(LENGTH_BYTES, "little"), 100)


def exported(header: dict[str, Any], data: bytes = bytes(40), header_length: int | None = None) -> Export:
    """An export of one file with this header and these bytes, whatever they say."""
    folder = Folder(f"memory://psa-foreign/{uuid4().hex}")
    text = json.dumps(header).encode()
    length = len(text) if header_length is None else header_length
    facts = written(folder, "model.safetensors", length.to_bytes(LENGTH_BYTES, "little") + text + data)
    scalars = tuple({"opt_step": 3.0} for _ in LAYOUT.shards)
    return Export(folder.url, "", CONFIG, LAYOUT, 7, (), scalars, ("slot",), (facts,))


def written(folder: Folder, name: str, data: bytes) -> FileFacts:
    with folder.draft(name) as draft:
        draft.write(data)
        draft.finish()
        folder.publish([draft])
    return draft.facts


def test_tensors_are_what_the_job_has() -> None:
    source = Source(exported(HEADER), CONFIG, LAYOUT)
    source.look()
    assert [state.shard for state in source.states()] == [0]


@pytest.mark.parametrize(
    "header",
    [
        {"a": HEADER["a"], "c": HEADER["b"]},
        HEADER | {"a": {"dtype": "I32", "shape": [3, 2], "data_offsets": [0, 24]}},
        HEADER | {"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}},
        {
            "a": HEADER["a"],
            "b": {"dtype": "U8", "shape": [4], "data_offsets": [24, 28]},
            "c": {"dtype": "U8", "shape": [12], "data_offsets": [28, 40]},
        },
    ],
)
def test_tensors_of_another_name_shape_or_dtype_are_found_before_a_job_is_begun(header: dict[str, Any]) -> None:
    with pytest.raises(DataIntegrity, match="is missing, or has another shape or dtype"):
        Source(exported(header), CONFIG, LAYOUT).look()


def test_slots_of_one_shard_have_one_dtype() -> None:
    header = HEADER | {
        "slot.a": {"dtype": "U8", "shape": [3, 2], "data_offsets": [40, 46]},
        "slot.b": {"dtype": "F32", "shape": [4], "data_offsets": [46, 62]},
    }
    with pytest.raises(DataIntegrity, match=r"slot\.b"):
        Source(exported(header, data=bytes(62)), CONFIG, LAYOUT).look()


def test_a_tensor_is_in_one_file() -> None:
    export = exported(HEADER)
    with pytest.raises(DataIntegrity, match="in another file as well"):
        Source(replace(export, files=export.files * 2), CONFIG, LAYOUT).look()


def test_no_memory_is_taken_for_a_length_that_is_promised() -> None:
    source = Source(exported(HEADER, header_length=2**60), CONFIG, LAYOUT)
    with little_memory(), pytest.raises(DataIntegrity, match="no file of safetensors"):
        source.look()


def test_files_beside_tensors_are_not_read_if_they_are_too_long() -> None:
    export = exported(HEADER)
    facts = FileFacts("config.json", model_files.FILES_BYTES_MAX + 1, "0" * 32)
    source = Source(replace(export, files=(*export.files, facts)), CONFIG, LAYOUT)
    with pytest.raises(DataIntegrity, match="files beside its tensors"):
        source.model_files()


@pytest.mark.parametrize(
    "changed",
    [
        {"version": -1},
        {"version": 10**30},
        {"clocks": (1, 2)},
        {"scalars": ()},
        {"layout": make_layout([TENSOR])},
        {"files": (FileFacts("../../secret", 1, ""),)},
        {"files": (FileFacts("", 1, ""),)},
        {"files": (FileFacts("a", 1, ""), FileFacts("a", 1, ""))},
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(changed: dict[str, Any]) -> None:
    export = exported(HEADER)
    assert export_from_json(export.url, export.to_json().encode()) == export
    with pytest.raises(DataIntegrity, match=r"psa\.json cannot be believed"):
        export_from_json(export.url, replace(export, **changed).to_json().encode())


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest | {"format": 2},
        lambda manifest: manifest | {"job": manifest["job"] | {"format": 99}},
        lambda manifest: manifest | {"layout": manifest["layout"] | {"format": 99}},
        lambda manifest: {name: value for name, value in manifest.items() if name != "format"},
    ],
)
def test_another_format_is_named(change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    manifest = change(json.loads(exported(HEADER).to_json())["manifest"])
    text = json.dumps({"digest": _digest(manifest), "manifest": manifest})
    with pytest.raises(DataIntegrity, match="has format"):
        export_from_json("here", text.encode())


def test_a_manifest_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    export = exported(HEADER)
    text = export.to_json().encode()
    written(Folder(export.url), MANIFEST, text)
    monkeypatch.setattr(exports, "_MANIFEST_BYTES_MAX", len(text))
    assert open_export(export.url) == export
    monkeypatch.setattr(exports, "_MANIFEST_BYTES_MAX", len(text) - 1)
    with pytest.raises(DataIntegrity, match="is longer than"):
        open_export(export.url)


def stored_layout(**changed: Any) -> str:
    tensor = {"names": ["a"], "shape": [3], "dtype": "float32", "role": "trained"} | changed
    shard_bytes = tensor.pop("shard_bytes", 4096)
    return json.dumps({"format": 1, "shard_bytes": shard_bytes, "tensors": [tensor]})


@pytest.mark.parametrize(
    "changed",
    [
        {"shape": [2**45]},
        {"shape": [2**60]},
        {"shape": [2**31] * 8},
        {"shape": [-4, -4]},
        {"shape": [0, -1]},
        {"shape": [1] * 65},
        {"shape": [10**400]},
        {"shape": [4096 * SHARDS_MAX]},
        {"names": []},
        {"stages": []},
        {"shard_bytes": 0},
    ],
)
def test_a_layout_of_any_size_takes_no_memory(changed: dict[str, Any]) -> None:
    assert layout_from_json(stored_layout()).arena_bytes
    with little_memory(), pytest.raises(DataIntegrity):
        layout_from_json(stored_layout(**changed))


def test_files_that_unpack_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "FILES_BYTES_MAX", 1000)

    def read(*sizes: int, cut: int = 0) -> ModelFiles:
        packed = [zlib.compress(bytes(size)) for size in sizes]
        texts = {str(at): base64.b64encode(each[: len(each) - cut]).decode() for at, each in enumerate(packed)}
        document = json.dumps({"format": 1, "contents": texts})
        with little_memory():
            return from_text(ModelFiles, document, "files")

    assert {name: len(content) for name, content in read(600, 400).contents.items()} == {"0": 600, "1": 400}
    for sizes in ((1001,), (600, 401), (600, 500, 500), (64 << 20,)):
        with pytest.raises(DataIntegrity, match="unpacks to more"):
            read(*sizes)
    with pytest.raises(DataIntegrity, match="torn"):
        read(600, cut=5)
    with pytest.raises(UsageError, match="1,001 bytes"):
        ModelFiles({"a": bytes(1001)})
