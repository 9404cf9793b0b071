"""An export of a model of transformers is a folder that ``from_pretrained`` loads, the tokenizer beside it.

With the real package: names of tied weights, files in parts and dtypes are its matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
from torch import nn

import psa_store as psa
from psa_store.checkpoint.catalog import read_job
from psa_store.checkpoint.files.archive import Archive
from psa_store.checkpoint.files.export import export_version, open_export, verify_export
from psa_store.checkpoint.files.manifest import MANIFEST
from psa_store.checkpoint.fork import fork
from psa_store.checkpoint.reader import open_version
from psa_store.cli.transfer import export_files, import_files
from psa_store.cluster import ProcessRole
from psa_store.config import load_settings
from psa_store.coordination import Coordination
from psa_store.errors import DataIntegrity, UsageError
from psa_store.job.model_files import ModelFiles
from psa_store.observe.metrics import Metrics
from psa_store.server.healing import Healing
from psa_store.server.work import Work
from psa_store.storage import RedisStore
from psa_store.worker.model_files import model_files
from tests.harness import Servers, Site

pytest.importorskip("transformers", minversion="5.0")
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = ["[PAD]", "[UNK]", "to", "be", "or", "not"]
CONFIG = {"config.json", "generation_config.json"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module", autouse=True)
def environment(site: Site) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in site.env.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def store(site: Site) -> Iterator[RedisStore]:
    with closing(site.store()) as opened:
        opened.check()
        yield opened


def make_tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    plain = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]")


def make_gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), **sizes))


def make_t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=len(WORDS), **sizes))


def train(job: str, model: nn.Module, tokenizer: Any = None, steps: int = 2, **options: Any) -> None:
    rows = [{"input_ids": torch.tensor([2, 3, 4, 5]), "labels": torch.tensor([3, 4, 5, 2])}] * 8
    options = {"optimizer": psa.optim.AdamW(lr=0.01), "ranks": 1} | options
    with psa.Worker(job, model, steps=steps, tokenizer=tokenizer, **options) as worker:
        for batch in worker.batches(rows, batch_size=2):
            model(**batch).loss.backward()
            worker.step()


@pytest.fixture(scope="module")
def t5(site: Site) -> nn.Module:
    """A model as job ``t5`` has it, whose second script alone gave a tokenizer."""
    servers = Servers(site, "t5", 1)
    try:
        train("t5", make_t5())
        with closing(site.store()) as store:
            first = store.model_files("t5").read()
            assert first is not None and first.contents.keys() == CONFIG
        model = make_t5()
        train("t5", model, make_tokenizer(), steps=3)
    finally:
        servers.stop()
    return model


def loaded(folder: Path, model: nn.Module) -> nn.Module:
    """What ``from_pretrained`` makes of a folder, without a complaint."""
    kind = AutoModelForSeq2SeqLM if isinstance(model, T5ForConditionalGeneration) else AutoModelForCausalLM
    found, notes = kind.from_pretrained(str(folder), output_loading_info=True)
    assert not any(notes.values()), notes
    assert type(found) is type(model)
    return found


def assert_equal(left: nn.Module, right: nn.Module) -> None:
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype is theirs[name].dtype and torch.equal(ours[name], theirs[name]), name


def names_beside(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir() if ".safetensors" not in each.name} - {MANIFEST}


def files_beside(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names_beside(folder)}


def test_a_causal_model_and_its_tokenizer_load_from_an_export(site: Site, store: RedisStore, tmp_path: Path) -> None:
    """In bfloat16, with tied weights; also what another job has of it by import and by fork, and the average."""
    model, tokenizer, settings = make_gpt2().bfloat16(), make_tokenizer(), load_settings()
    servers = Servers(site, "gpt2", 1)
    try:
        train("gpt2", model, tokenizer, average=psa.ema(0.9))
    finally:
        servers.stop()
    assert model.config.architectures is None, "the script's objects stay as they are"
    export_files("gpt2", None, str(tmp_path / "out"), settings)
    assert names_beside(tmp_path / "out") == CONFIG | TOKENIZER
    found = loaded(tmp_path / "out", model)
    assert_equal(found, model)
    assert found.lm_head.weight is found.transformer.wte.weight
    words = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert words("to be or not").input_ids == tokenizer("to be or not").input_ids == [2, 3, 4, 5]
    assert words.pad_token == "[PAD]"

    import_files(str(tmp_path / "out"), "gpt2-imported", settings, None, None)
    with Coordination.from_settings(settings, "gpt2-forked") as coordination:
        fork(store, coordination, "gpt2", "2", "gpt2-forked")
    for job in ("gpt2-imported", "gpt2-forked"):
        export_files(job, None, str(tmp_path / job), settings)
        assert files_beside(tmp_path / job) == files_beside(tmp_path / "out")

    export_files("gpt2", None, str(tmp_path / "average"), settings, average=True)
    average = loaded(tmp_path / "average", model)
    with psa.Store("gpt2", site.redis) as reader:
        stored = reader.state_dict(average=True)
    assert all(torch.equal(value, stored[name]) for name, value in average.state_dict().items())
    assert average.dtype is torch.float32, "the average is wider than the model"


def test_a_model_of_two_stacks_loads_from_files_in_parts(t5: nn.Module, tmp_path: Path, store: RedisStore) -> None:
    """One tensor has three names; the tokenizer is that of the newest script."""
    export_version(open_version(store, "t5"), str(tmp_path / "out"), 4000)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert names_beside(tmp_path / "out") == CONFIG | TOKENIZER
    assert_equal(loaded(tmp_path / "out", t5), t5)


def test_damaged_files_are_found_and_what_an_exporter_left_is_cleared(
    t5: nn.Module, tmp_path: Path, store: RedisStore
) -> None:
    out = tmp_path / "out"
    export_version(open_version(store, "t5"), str(out))
    (out / "config.json").write_bytes((out / "config.json").read_bytes().replace(b"16", b"17"))
    with pytest.raises(DataIntegrity, match=r"config\.json: damaged"):
        verify_export(open_export(str(out)))
    # All have their names but the manifest: the next exporter reads in its draft which files are an exporter's.
    (out / MANIFEST).rename(out / f"{MANIFEST}.tmp-left")
    verify_export(export_version(open_version(store, "t5"), str(out)))
    left = tmp_path / "t5" / "3"
    left.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (left / name).write_bytes(b"of one that failed while it gave names")
    verify_export(Archive(str(tmp_path), "t5").write(store, "3"))


def test_a_server_writes_the_files_again_that_redis_lost(t5: nn.Module, site: Site, store: RedisStore) -> None:
    stored, files = read_job(store, "t5"), store.model_files("t5")
    before = files.read()
    assert before is not None
    healing = Healing(store, stored.config, stored.layout, Metrics(ProcessRole.SERVER, "server-a"))
    work = Work(1, 3, {}, {})
    healing.heal(work, lambda lost: None)
    with redis.Redis.from_url(site.redis) as client:
        client.delete("psa:{t5}:model-files")  # as a failover to a replica that was behind does
    assert files.read() is None and files.digest() == ""
    healing.heal(work, lambda lost: None)
    assert files.read() == before


def test_files_that_are_too_large_are_refused_by_name(store: RedisStore) -> None:
    noise = torch.randint(0, 256, (13_000_000,), dtype=torch.uint8).numpy().tobytes()
    with pytest.raises(UsageError, match=r"at most 16,777,216 are kept with a job; the largest is 'tokenizer\.json'"):
        store.model_files("none").write(ModelFiles({"tokenizer.json": noise, "config.json": b"{}"}))
    assert store.model_files("none").read() is None


def test_what_has_other_names_or_can_not_be_saved_has_no_files() -> None:
    """Tensors of a module that contains a model have other names than ``from_pretrained`` looks for."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_gpt2()
            self.config = self.inner.config

    assert model_files(Wrapped(), None) is None
    found = model_files(Wrapped(), make_tokenizer())
    assert found is not None and found.contents.keys() == TOKENIZER
    with pytest.raises(UsageError, match=r"tokenizer=dict: give an object that has save_pretrained"):
        model_files(make_gpt2(), {"to": 1})
