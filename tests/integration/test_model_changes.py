"""Changes that a script makes to the model while the job runs are refused by name, whatever carries parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import psa_store as psa
from psa_store.errors import UsageError
from tests.harness import Servers, Site
from tests.integration.toy import make_data, make_model

pytestmark = pytest.mark.usefixtures("environment")
Change = Callable[[nn.Sequential], object]


def clamp(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[2].weight.clamp_(-0.01, 0.01)


def scale_data(model: nn.Sequential) -> None:
    for parameter in model.parameters():
        parameter.data *= 0.5


def load(model: nn.Sequential) -> None:
    model.load_state_dict(make_model().state_dict())


def freeze(model: nn.Sequential) -> None:
    model[2].weight.requires_grad_(False)


def unfreeze(model: nn.Sequential) -> None:
    model[0].weight.requires_grad_(True)


def write_frozen(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[0].weight.lerp_(torch.ones(50, 6), 0.1)


def replace_module(model: nn.Sequential) -> None:
    model[2] = nn.Linear(50, 50)


def replace_parameter(model: nn.Sequential) -> None:
    model[2].weight = nn.Parameter(torch.ones(50, 50))


def add_module(model: nn.Sequential) -> None:
    model.add_module("more", nn.Linear(1, 1))


def remove_module(model: nn.Sequential) -> None:
    model[2].register_parameter("bias", None)


def tie(model: nn.Sequential) -> None:
    model[2].bias.data = model[0].bias.data


def step_optimizer(model: nn.Sequential) -> None:
    torch.optim.SGD(model.parameters(), lr=0.1).step()


CHANGES: dict[Change, str] = {
    step_optimizer: "was written",
    clamp: "2.weight was written",
    scale_data: "was written",
    load: "was written",
    freeze: "2.weight has requires_grad=False",
    unfreeze: "0.weight has requires_grad=True",
    write_frozen: "0.weight was written",
    replace_module: "2.weight was replaced",
    replace_parameter: "2.weight was replaced",
    add_module: "more.weight is new",
    remove_module: "2.bias is gone",
    tie: "2.bias was written",
}


@pytest.mark.parametrize("carrier", ["auto", "tcp"])
def test_a_change_is_refused_at_that_step(site: Site, carrier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them in one job, each by a worker of its own, which the others' refusals must not disturb."""
    monkeypatch.setenv("PSA_CARRIER", carrier)
    name = f"changes-{carrier}"
    Servers(site, name, 1)
    for change, words in CHANGES.items():
        model = make_model()
        model[0].weight.requires_grad_(False)
        steps = 0
        rule = psa.optim.SGD(lr=0.01)
        with psa.Worker(name, model, optimizer=rule, steps=1000) as worker:
            batches = worker.batches(make_data(), batch_size=8)
            for x, y in batches:
                nn.functional.mse_loss(model(x), y).backward()
                if steps == 2:
                    before = worker.version
                    change(model)
                    with pytest.raises(UsageError, match=rf"parameter .*{words}.*worker\.step\(\): "):
                        worker.step()
                    assert worker.version == before, change.__name__
                    break
                worker.step()
                steps += 1
            batches.close()


def test_a_module_that_writes_to_its_own_weights_is_refused(site: Site) -> None:
    """In plain torch the shortened rows stay; here each process would shorten those that it looks up."""
    model = nn.Sequential(nn.Embedding(500, 16, max_norm=0.5), nn.Linear(16, 1))
    Servers(site, "changes-max-norm", 1)
    with psa.Worker("changes-max-norm", model, optimizer=psa.optim.SGD(lr=0.1), steps=3) as worker:
        for batch in worker.batches(torch.arange(96), batch_size=8):
            model(batch).sum().backward()
            with pytest.raises(UsageError, match=r"parameter 0\.weight was written"):
                worker.step()
            break
