"""What ``from_pretrained`` wants beside the tensors of a model of transformers, taken from the script's objects."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from psa_store import logs
from psa_store.errors import UsageError
from psa_store.job.model_files import ModelFiles


def model_files(model: nn.Module | None, tokenizer: Any) -> ModelFiles | None:
    """The files of a model's configuration, if it is one of transformers, and of a tokenizer; None if there are none.

    Args:
        tokenizer: or a processor, or None: anything with ``save_pretrained(folder)``.

    Raises:
        UsageError: the tokenizer cannot be saved.
    """
    contents: dict[str, bytes] = {}
    if _is_of_transformers(model):
        try:
            contents |= _saved(lambda folder: _save_config(model, folder))
        except Exception as error:  # of another package, about what training does not need
            logs.get_logger().warning("exports will be without config.json", why=f"{type(error).__name__}: {error}")
    if tokenizer is not None:
        if not hasattr(tokenizer, "save_pretrained"):
            raise UsageError(f"tokenizer={type(tokenizer).__name__}: give an object that has save_pretrained(folder)")
        try:
            contents |= _saved(tokenizer.save_pretrained)
        except Exception as error:
            raise UsageError(f"tokenizer: save_pretrained failed: {type(error).__name__}: {error}") from error
    return ModelFiles(contents) if contents else None


def _is_of_transformers(model: nn.Module | None) -> bool:
    """Whether names of its tensors are those that ``from_pretrained`` looks for: a module that contains one has others.

    The package is not imported for this: where it is not, no model is one of its.
    """
    package = sys.modules.get("transformers")
    return package is not None and isinstance(model, package.PreTrainedModel)


def _save_config(model: Any, folder: str) -> None:
    """As ``model.save_pretrained`` does, without its tensors, and without a trace in the script's objects."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _saved(save: Callable[[str], object]) -> dict[str, bytes]:
    with TemporaryDirectory(prefix="psa-model-") as folder:
        save(folder)
        written = sorted(Path(folder).iterdir())
        if left := [each.name for each in written if not each.is_file()]:
            logs.get_logger().warning("exports will be without some folders of the tokenizer", folders=left)
        return {each.name: each.read_bytes() for each in written if each.is_file()}
