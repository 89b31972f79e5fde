"""What a loop asks of all modules in every step, against torch's own way."""

from __future__ import annotations

import copy
from typing import Any

import tiny
import torch
from torch import nn

from adapters import modes


def state(model: nn.Module) -> dict[str, Any]:
    """Modes, and which parameters have a gradient."""
    found: dict[str, Any] = {path: module.training for path, module in model.named_modules()}
    return found | {name: p.grad is not None for name, p in model.named_parameters()}


def pulled(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


def test_train_and_zero_grad_are_torchs_own() -> None:
    model = tiny.model("bert")
    fields = set(vars(model))
    with modes.stepping(model):
        for mode in (True, False, True):
            for module in list(model.modules())[::3]:
                module.train(not mode)  # whatever somebody has set meanwhile
            assert model.train(mode) is model
            assert all(module.training is mode for module in model.modules())
        pulled(model)
        model.zero_grad()
        assert not any(p.grad is not None for p in model.parameters())
        pulled(model)
        model.zero_grad(set_to_none=False)
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert set(vars(model)) == fields


def test_modules_and_parameters_that_come_later_are_noticed() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.5)))
    with modes.stepping(model):
        model.train(False)
        model[1][0] = nn.Sequential(nn.Dropout(0.1), nn.BatchNorm1d(2))  # as many children as before
        model[0].weight = nn.Parameter(torch.zeros(2, 2))
        model.train(True)
        model.train(False)
        pulled(model)
        model.zero_grad()
        assert not any(state(model).values())
        model.append(nn.Linear(2, 2))
        model.train(False)
        assert not any(state(model).values())


def test_a_class_with_a_way_of_its_own_keeps_it() -> None:
    class Own(nn.Dropout):
        heard = 0

        def train(self, mode: bool = True) -> Own:
            self.heard += 1
            return super().train(mode)

    model = nn.Sequential(nn.Sequential(Own()))
    with modes.stepping(model):
        model.train(True)
        model.train(False)
    assert model[0][0].heard == 2
    assert not model[0][0].training


def test_a_copy_sets_its_own_modules() -> None:
    model = nn.Sequential(nn.Dropout(0.5))
    with modes.stepping(model):
        model.train(True)
        other = copy.deepcopy(model)
        other.train(False)
        assert (model[0].training, other[0].training) == (True, False)
