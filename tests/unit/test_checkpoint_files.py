"""Safetensors files of any layout hold every element once, in an order that loaders of others accept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from psa_store.checkpoint.files import folder as folders
from psa_store.checkpoint.files.folder import FileFacts, Folder
from psa_store.checkpoint.files.importing import Source
from psa_store.checkpoint.files.manifest import Export, export_from_json
from psa_store.checkpoint.files.tensor_files import (
    LENGTH_BYTES,
    header_bytes,
    index_of,
    param_key,
    read_header,
    split_into_files,
)
from psa_store.errors import DataIntegrity, DependencyUnreachable, UsageError
from psa_store.job.config import JobConfig
from psa_store.job.dtypes import ITEM_BYTES, TRAINABLE_DTYPES
from psa_store.job.layout import Layout, TensorRole, TensorSpec, make_layout
from psa_store.optim.tensors import to_torch
from psa_store.storage import Section

SHAPES = st.lists(st.integers(0, 40), max_size=3).map(tuple)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    specs = []
    for number in range(draw(st.integers(1, 8))):
        role = draw(st.sampled_from(list(TensorRole)))
        dtypes = sorted(TRAINABLE_DTYPES) if role is TensorRole.TRAINED else sorted(ITEM_BYTES)
        names = (f"t{number}", f"tied.{number}") if draw(st.booleans()) else (f"t{number}",)
        persistent = role is not TensorRole.BUFFER or draw(st.booleans())
        dtype = draw(st.sampled_from(dtypes))
        specs.append(TensorSpec(names, draw(SHAPES), dtype, role, persistent=persistent))
    return make_layout(specs, draw(st.sampled_from([4096, 8192, 1 << 20])))


def sections_of(layout: Layout) -> dict[int, list[Section]]:
    """As a trained job has them: parameters, and one float32 slot."""
    return {
        shard.index: [
            Section("param", shard.dtype, shard.size_bytes, ()),
            *([Section("slot", "float32", shard.numel * 4, ())] if shard.role is TensorRole.TRAINED else []),
        ]
        for shard in layout.shards
    }


def bytes_of(layout: Layout, shard: int, section: str, dtype: str) -> bytes:
    """What Redis would hold: each element has a value that tells its place in its tensor."""
    its = layout.shards[shard]
    whole = torch.zeros(its.numel, dtype=to_torch(dtype))
    for piece in its.pieces:
        values = torch.arange(piece.tensor_start, piece.tensor_start + piece.length)
        whole[piece.shard_start : piece.shard_start + piece.length] = (values + piece.tensor) % 100
    return whole.view(torch.uint8).numpy().tobytes()


@settings(max_examples=60)
@given(layouts(), st.sampled_from([1, 1000, 20_000, 1 << 30]))
def test_every_element_is_where_loaders_look_for_it(layout: Layout, max_file_bytes: int) -> None:
    sections = sections_of(layout)
    dtypes = {(shard, its.name): its.dtype for shard, some in sections.items() for its in some}
    found: dict[str, torch.Tensor] = {}
    for file in split_into_files(layout, sections, max_file_bytes):
        data = file.header()
        for shard, section, cuts in file.reads():
            whole = bytes_of(layout, shard, section, dtypes[shard, section])
            data += b"".join(whole[cut.low : cut.high] for cut in cuts)
        loaded = load(data)
        assert loaded.keys() == {entry.key for entry in file.entries} and not loaded.keys() & found.keys()
        assert len(file.entries) == 1 or sum(entry.size_bytes for entry in file.entries) <= max_file_bytes
        length = header_bytes(file.name, data[:LENGTH_BYTES], len(data))
        text = data[LENGTH_BYTES : LENGTH_BYTES + length]
        for key, stored in read_header(file.name, text, len(data)).items():
            assert stored.low % ITEM_BYTES[stored.dtype] == 0 and stored.high <= len(data)
            assert data[stored.low : stored.high] == loaded[key].flatten().view(torch.uint8).numpy().tobytes()
        found |= loaded
    for index, spec in enumerate(layout.tensors):
        keys = [param_key(spec)] + ([f"slot.{spec.name}"] if spec.role is TensorRole.TRAINED and spec.numel else [])
        for key in keys:
            tensor = found.pop(key)
            expected = (torch.arange(spec.numel) + index) % 100
            assert tuple(tensor.shape) == spec.shape
            assert torch.equal(tensor.flatten(), expected.to(tensor.dtype)), key
    assert not found


@settings(max_examples=40)
@given(layouts(), st.sampled_from([1000, 1 << 30]), st.sampled_from([4096, 12288, 1 << 20]))
def test_shards_of_another_size_come_back_from_files(layout: Layout, max_file_bytes: int, shard_bytes: int) -> None:
    sections = sections_of(layout)
    folder = Folder(f"memory://psa-unit/{uuid4().hex}")
    facts = []
    for file in split_into_files(layout, sections, max_file_bytes):
        with folder.draft(file.name) as draft:
            draft.write(file.header())
            for shard, section, cuts in file.reads():
                dtype = layout.shards[shard].dtype if section == "param" else "float32"
                whole = bytes_of(layout, shard, section, dtype)
                for cut in cuts:
                    draft.write(whole[cut.low : cut.high])
            draft.finish()
            folder.publish([draft])
        assert folder.facts(file.name) == draft.facts
        facts.append(draft.facts)
    config = JobConfig("job", 2, 0, {"name": "SGD", "lr": 0.1}, layout.fingerprint)
    scalars = tuple({"opt_step": 3.0} for _ in layout.shards)
    export = Export(folder.url, "", config, layout, 7, (), scalars, ("slot",), tuple(facts))
    other = make_layout(layout.tensors, shard_bytes)
    source = Source(export, replace(config, layout=other.fingerprint), other)
    source.look()
    states = list(source.states())
    assert [state.shard for state in states] == [shard.index for shard in other.shards]
    for state in states:
        expected = {its.name: its.dtype for its in sections_of(other)[state.shard]}
        assert {name: dtype for name, (dtype, _) in state.arrays.items()} == expected
        for name, (dtype, data) in state.arrays.items():
            assert data == bytes_of(other, state.shard, name, dtype), (state.shard, name)


@settings(max_examples=20)
@given(layouts())
def test_an_index_names_the_file_of_every_tensor(layout: Layout) -> None:
    files = [file for file in split_into_files(layout, sections_of(layout), 1000) if file.name.startswith("model")]
    index = index_of(files, "model")
    assert (index is None) == (len(files) < 2)
    if index is not None:
        assert index[0] == "model.safetensors.index.json"
        assert all(f'"{entry.key}": "{file.name}"' in index[1] for file in files for entry in file.entries)


@given(st.data())
def test_any_flipped_bit_of_the_manifest_is_found(data: st.DataObject) -> None:
    layout = make_layout([TensorSpec(("a",), (3,), "float32", TensorRole.TRAINED)])
    config = JobConfig("job", 2, 0, {"name": "SGD", "lr": 0.1}, layout.fingerprint)
    facts = (FileFacts("model.safetensors", 100, "0" * 32),)
    export = Export("here", "2026-01-01T00:00:00+00:00", config, layout, 7, (), ({"opt_step": 7},), (), facts)
    text = bytearray(export.to_json().encode())
    assert export_from_json("here", bytes(text)) == export
    text[data.draw(st.integers(0, len(text) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        assert export_from_json("here", bytes(text)) == export  # white space became other white space
    except DataIntegrity as error:
        assert "psa.json" in str(error)


class NoCredentials(Exception):
    """As those of cloud libraries: no OSError."""


class Broken(MemoryFileSystem):
    """Fails in whatever it is asked, once it is told to."""

    protocol = "psabroken"
    cachable = False
    failing = False

    def _fail(self) -> None:
        if Broken.failing:
            raise NoCredentials("no credentials\nfor psabroken://me:secret@there/x")

    def ls(self, *arguments: Any, **options: Any) -> Any:
        self._fail()
        return super().ls(*arguments, **options)

    def cat_file(self, *arguments: Any, **options: Any) -> Any:
        self._fail()
        return super().cat_file(*arguments, **options)

    def rm(self, *arguments: Any, **options: Any) -> None:
        self._fail()
        super().rm(*arguments, **options)

    def open(self, *arguments: Any, **options: Any) -> Any:
        self._fail()
        file = super().open(*arguments, **options)
        file.write = lambda data: self._fail()
        return file

    def mv(self, *arguments: Any, **options: Any) -> None:
        self._fail()

    def makedirs(self, *arguments: Any, **options: Any) -> None:
        self._fail()


class Unreachable(Broken):
    protocol = "psaunreachable"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        raise NoCredentials("psaunreachable://me:secret@there does not answer")


@pytest.fixture
def broken() -> Iterator[None]:
    fsspec.register_implementation("psabroken", Broken, clobber=True)
    fsspec.register_implementation("psaunreachable", Unreachable, clobber=True)
    Broken.failing = False
    yield
    Broken.failing = False


@pytest.mark.parametrize(
    "act",
    [
        Folder.names,
        Folder.make,
        lambda folder: folder.read("a"),
        lambda folder: folder.facts("a"),
        lambda folder: folder.draft("a").__enter__(),
        lambda folder: folder.publish([folders.Draft("a", "a.tmp-0", "a", None, False)]),
        lambda folder: folder.remove_all("a"),
    ],
)
def test_whatever_a_file_system_raises_is_one_line_without_passwords(
    broken: None, act: Callable[[Folder], object]
) -> None:
    folder = Folder("psabroken://me:secret@there/x")
    Broken.failing = True
    with pytest.raises(DependencyUnreachable, match=r"^[^\n]*NoCredentials: no credentials for [^\n]*$") as raised:
        act(folder)
    assert "secret" not in str(raised.value) and isinstance(raised.value.__cause__, NoCredentials)


def test_a_draft_translates_its_own_failures_only(broken: None) -> None:
    folder = Folder("psabroken://x")
    with pytest.raises(KeyError), folder.draft("a"):
        raise KeyError("a fault of the writer")
    with pytest.raises(DependencyUnreachable, match="NoCredentials"), folder.draft("a") as draft:
        Broken.failing = True
        draft.write(b"x")


def test_a_file_system_that_cannot_be_opened_is_unreachable_or_bad_usage(broken: None) -> None:
    with pytest.raises(DependencyUnreachable, match=r"me:\*\*\*@there.*does not answer"):
        Folder("psaunreachable://me:secret@there/x")
    with pytest.raises(DependencyUnreachable, match=r"ftp://user:\*\*\*@127\.0\.0\.1:1/x: Connection refused"):
        Folder("ftp://user:secret@127.0.0.1:1/x")
    with pytest.raises(UsageError, match="Protocol not known: nowhere"):
        Folder("nowhere://x")
    fsspec.register_implementation("psamissing", "psa_no_such.Files", clobber=True, errtxt="Install psa_no_such")
    with pytest.raises(UsageError, match="Install psa_no_such"):
        Folder("psamissing://x")


def test_every_folder_that_is_made_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(folders, "_sync_folder", synced.append)
    Folder(f"file://{tmp_path}/a/b/c").make()
    assert (tmp_path / "a" / "b" / "c").is_dir()
    assert sorted(synced) == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]
