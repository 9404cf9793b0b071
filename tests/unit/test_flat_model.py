"""A model in flat memory: what a script does to gradients and buffers, seen without a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from psa_store.errors import UsageError
from psa_store.job.layout import make_layout
from psa_store.job.wire_layout import WireLayout
from psa_store.worker.flat_model import FlatModel, describe_model
from psa_store.worker.gradients import GradientMemory


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


@pytest.fixture
def flat(model: nn.Sequential) -> Iterator[FlatModel]:
    flat = FlatModel(model, make_layout(describe_model(model, lambda _name, _shape: 0)))
    yield flat
    flat.close()


def compute(model: nn.Sequential, flat: FlatModel, gradients: GradientMemory) -> None:
    flat.version_arrived()
    flat.begin(gradients, None)
    model(torch.randn(8, 4)).pow(2).sum().backward()


def numbers(gradients: GradientMemory) -> list[torch.Tensor]:
    return [each.clone() for each in gradients.numbers.values()]


def zero(model: nn.Sequential) -> None:
    model.zero_grad(set_to_none=False)


def zero_data(model: nn.Sequential) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.data.zero_()


def backward_again(model: nn.Sequential) -> None:
    model.eval()(torch.randn(8, 4)).sum().backward()
    model.train()


@pytest.mark.parametrize("write", [zero, zero_data, backward_again], ids=lambda each: each.__name__)
def test_what_is_written_to_a_gradient_after_the_step_changes_nothing(
    model: nn.Sequential, flat: FlatModel, write: Callable[[nn.Sequential], None]
) -> None:
    """Servers read it in place, until the last rank's is here."""
    layout = make_layout(describe_model(model, lambda _name, _shape: 0))
    gradients = GradientMemory(layout, WireLayout(layout))
    for _ in range(2):
        compute(model, flat, gradients)
        flat.end(1.0)
        before = numbers(gradients)
        for parameter, place in zip(model.parameters(), gradients.views.values(), strict=True):
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, place), "it can still be read"
        write(model)
        assert all(map(torch.equal, before, numbers(gradients)))


def grow(model: nn.Sequential) -> None:
    model[1].running_mean = torch.zeros(5)


def shrink(model: nn.Sequential) -> None:
    model[1].running_mean = torch.zeros(1)  # what a copy would spread over all elements


def retype(model: nn.Sequential) -> None:
    model[1].running_mean = torch.zeros(4, dtype=torch.float64)


def remove(model: nn.Sequential) -> None:
    model[1].running_mean = None  # type: ignore[assignment]


def add(model: nn.Sequential) -> None:
    model[0].register_buffer("count", torch.zeros(1))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (grow, r"buffer 1\.running_mean is torch.float32 of shape \(5,\) now, it was torch.float32 of shape \(4,\)"),
        (shrink, r"buffer 1\.running_mean is torch.float32 of shape \(1,\) now"),
        (retype, r"buffer 1\.running_mean is torch.float64 of shape"),
        (remove, r"buffer 1\.running_mean is gone"),
        (add, r"buffer 0\.count is new.*persistent=False"),
    ],
    ids=lambda each: each if isinstance(each, str) else each.__name__,
)
def test_buffers_stay_what_they_are(
    model: nn.Sequential, flat: FlatModel, change: Callable[[nn.Sequential], None], why: str
) -> None:
    layout = make_layout(describe_model(model, lambda _name, _shape: 0))
    compute(model, flat, GradientMemory(layout, WireLayout(layout)))
    change(model)
    with pytest.raises(UsageError, match=why):
        flat.end(1.0)


def test_their_values_and_caches_may_change(model: nn.Sequential, flat: FlatModel) -> None:
    layout = make_layout(describe_model(model, lambda _name, _shape: 0))
    compute(model, flat, GradientMemory(layout, WireLayout(layout)))
    model[1].running_mean = torch.ones(4)
    model[0].register_buffer("cache", torch.zeros(3), persistent=False)
    flat.end(1.0)
    flat.collect_buffers()
    assert torch.equal(model[1].running_mean, torch.ones(4))


def test_a_batch_may_be_given_up(model: nn.Sequential, flat: FlatModel) -> None:
    layout = make_layout(describe_model(model, lambda _name, _shape: 0))
    gradients = GradientMemory(layout, WireLayout(layout))
    compute(model, flat, gradients)
    before = model.get_buffer("1.running_mean").clone()
    flat.begin(gradients, None)
    assert not torch.equal(model.get_buffer("1.running_mean"), before), "as the version has it again"


def forward(model: nn.Sequential) -> None:
    model(torch.randn(8, 4))


def reset(model: nn.Sequential) -> None:
    model[1].reset_running_stats()  # type: ignore[operator]


def assign(model: nn.Sequential) -> None:
    model[1].running_mean = torch.ones(4)


@pytest.mark.parametrize("write", [forward, reset, assign], ids=lambda each: each.__name__)
@pytest.mark.parametrize("when", ["begin", "version_arrived"])
def test_what_is_written_to_buffers_between_steps_is_refused(
    model: nn.Sequential, flat: FlatModel, write: Callable[[nn.Sequential], None], when: str
) -> None:
    """The version's would take their place without a word."""
    layout = make_layout(describe_model(model, lambda _name, _shape: 0))
    gradients = GradientMemory(layout, WireLayout(layout))
    for _ in range(2):
        compute(model, flat, gradients)
        flat.end(1.0)
        flat.collect_buffers()
    model.eval()
    forward(model)
    model.train()
    compute(model, flat, gradients)
    flat.end(1.0)
    write(model)
    with pytest.raises(UsageError, match=r"buffer 1\.\w+ was written between worker\.step\(\) and the next batch"):
        flat.begin(gradients, None) if when == "begin" else flat.version_arrived()


def test_what_is_written_before_the_first_version_comes_is_refused(model: nn.Sequential, flat: FlatModel) -> None:
    """As loading weights inside of the `with` statement does."""
    model.load_state_dict(model.state_dict())
    with pytest.raises(UsageError, match=r"parameter 0\.weight was written by the script.*before psa\.Worker is made"):
        flat.version_arrived()


def test_a_model_that_changed_since_its_layout_was_made_is_refused(model: nn.Sequential) -> None:
    layout = make_layout(describe_model(model, lambda _name, _shape: 0))
    model[0].requires_grad_(False)
    with pytest.raises(UsageError, match=r"0\.bias was frozen.*between psa\.Worker"):
        FlatModel(model, layout)


def test_state_dict_can_be_saved(model: nn.Sequential, flat: FlatModel, tmp_path: Path) -> None:
    """Also with buffers of another dtype, and without the rest of the flat memory in the file."""
    torch.save({"0.bias": model.get_parameter("0.bias")}, tmp_path / "one.pt")
    torch.save(model.state_dict(), tmp_path / "all.pt")
    assert (tmp_path / "one.pt").stat().st_size < 4096
    saved = torch.load(tmp_path / "all.pt")
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
