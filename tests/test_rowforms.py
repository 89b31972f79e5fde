"""What peft layers do to rows, beside what the same layers make of a weight when they are merged."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from adapters import injection, rowforms
from adapters.edits import MergeLayer, grown, plain_layer, single
from adapters.inserts import Change

WIDTHS = (16, 24)  # in, out
PATH = "layer.0.output.dense"
LORA = {"peft_type": "LORA", "r": 3, "lora_alpha": 7}
HAVE: dict[str, dict[str, Any]] = {
    "dora": LORA | {"use_dora": True},
    "rsdora": LORA | {"use_dora": True, "use_rslora": True},
    "lora_bias": LORA | {"lora_bias": True},
    "ia3": {"peft_type": "IA3", "feedforward_modules": []},
    "ia3 of inputs": {"peft_type": "IA3", "feedforward_modules": ["dense"]},
    "oft": {"peft_type": "OFT", "oft_block_size": 4},
    "oft, one block for all": {"peft_type": "OFT", "oft_block_size": 8, "block_share": True},
    "oft by an inverse": {"peft_type": "OFT", "oft_block_size": 4, "use_cayley_neumann": False},
    "oft near the start": {"peft_type": "OFT", "oft_block_size": 4, "coft": True, "eps": 0.05},
    "hra": {"peft_type": "HRA", "r": 5},
    "hra, orthogonal": {"peft_type": "HRA", "r": 4, "apply_GS": True},
    "loha": {"peft_type": "LOHA", "r": 2, "alpha": 5},
    "lokr": {"peft_type": "LOKR", "r": 2, "alpha": 5},
    "lokr of factors": {"peft_type": "LOKR", "r": 1, "decompose_both": True, "decompose_factor": 4},
}
HAVE_NOT: dict[str, dict[str, Any]] = {
    "boft": {"peft_type": "BOFT", "boft_block_size": 4},
    "loha of many ranks": {"peft_type": "LOHA", "r": 4},  # 16 * (16 + 24) numbers are more than 16 * 24
}
CONV1D = ("dora", "rsdora", "ia3", "ia3 of inputs")  # what peft puts around GPT-2's layers as well


def peft_config(options: dict[str, Any]) -> Any:
    import peft

    options = dict(options)
    return peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(options.pop("peft_type"))](**options)


def edits_of(options: dict[str, Any], *, transposed: bool = False, bias: bool = True) -> dict[str, Any]:
    """A layer with random trained tensors, as the edits of its weight and its bias."""
    config = peft_config(options)
    if transposed:
        config.fan_in_fan_out = True
    config = single(config, [PATH])
    layer = plain_layer(WIDTHS, transposed, bias)
    root = grown({PATH: layer})
    torch.manual_seed(0)
    names = injection.inject(root, config, [PATH])
    parameters = dict(root.named_parameters())
    state = {}
    for name in sorted(names):
        moved = parameters[name].detach() + 0.3 * torch.randn(parameters[name].shape)
        state[injection.key(name)] = moved
    return dict(injection.merge_edits(config, {PATH: [*WIDTHS, transposed, bias]}, state))


def answered(change: Change, weight: torch.Tensor, bias: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
    """The formula at the head of `adapters.inserts`."""
    turned = inputs if change.turn is None else change.turn(inputs)
    found = torch.nn.functional.linear(turned, weight, bias)
    found = found if change.gain is None else found * change.gain
    for term in (change.pair, change.kron):
        found = found if term is None else found + term.term(inputs)
    return found if change.shift is None else found + change.shift


CELLS = [(name, False, True) for name in HAVE] + [(name, True, True) for name in CONV1D]
CELLS += [(name, False, False) for name in HAVE if name != "lora_bias"]  # peft puts none beside a layer without


@pytest.mark.parametrize(("name", "transposed", "bias"), CELLS)
def test_rows_are_answered_as_by_the_merged_layer(name: str, transposed: bool, bias: bool) -> None:
    edits = edits_of(HAVE[name], transposed=transposed, bias=bias)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(WIDTHS[1], WIDTHS[0], generator=generator)
    own = torch.randn(WIDTHS[1], generator=generator) if bias else None
    inputs = torch.randn(2, 3, WIDTHS[0], generator=generator)
    edit = edits[f"{PATH}.weight"]
    assert isinstance(edit, MergeLayer)
    change = rowforms.form_of(edit, weight, own)
    assert change is not None
    assert change.by_rows
    assert not change.whole
    merged = edit(weight.T if transposed else weight)
    wanted = torch.nn.functional.linear(
        inputs, merged.T if transposed else merged, None if own is None else edits[f"{PATH}.bias"](own)
    )
    found = answered(change, weight, own, inputs)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
    assert float((wanted - torch.nn.functional.linear(inputs, weight, own)).abs().max()) > 0.05  # it does something
    half = rowforms.form_of(edit, weight.bfloat16(), None if own is None else own.bfloat16())
    assert half is not None
    assert {tensor.dtype for tensor in tensors(half)} == {torch.float32}
    double = rowforms.form_of(edit, weight.double(), None if own is None else own.double())
    assert double is not None
    assert {tensor.dtype for tensor in tensors(double)} == {torch.float64}


def tensors(change: Change) -> list[torch.Tensor]:
    pair = [] if change.pair is None else [change.pair.down, change.pair.up]
    turn = [] if change.turn is None else list(change.turn.tensors())
    kron = [] if change.kron is None else [change.kron.left, change.kron.right]
    return [*pair, *turn, *kron, *(each for each in (change.gain, change.shift) if each is not None)]


@pytest.mark.parametrize("name", HAVE_NOT)
def test_methods_without_a_smaller_form_have_none(name: str) -> None:
    edit = edits_of(HAVE_NOT[name])[f"{PATH}.weight"]
    assert rowforms.form_of(edit, torch.randn(WIDTHS[1], WIDTHS[0]), None) is None


def test_tensors_of_another_method_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that brings tensors of its own is not taken for the plain method."""
    edit = edits_of(HAVE["dora"])[f"{PATH}.weight"]
    weight = torch.randn(WIDTHS[1], WIDTHS[0])
    options: dict[str, Any] = {"ia3": {"peft_type": "HRA"}, "oft": {"peft_type": "IA3"}, "hra": {"peft_type": "OFT"}}
    for name, given in options.items():
        taken = edits_of(HAVE[name])[f"{PATH}.weight"]
        other = peft_config(given)
        assert rowforms.form_of(dataclasses.replace(taken, config=other), weight, None) is None
    layer = edit.layer(weight)
    layer.lora_B["default"].bias = torch.nn.Parameter(torch.ones(WIDTHS[1]))
    monkeypatch.setattr(MergeLayer, "layer", lambda self, old: layer)
    assert rowforms.form_of(edit, weight, None) is None
