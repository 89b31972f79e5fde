"""Four-bit storage: what is packed, what is not, and that nothing moves once it is."""

from __future__ import annotations

import sys
from typing import Any

import bitsandbytes
import pytest
import tiny
import torch
from torch import Tensor, nn

import adapters
from adapters import anatomy, quantize, roundtrip
from adapters.edits import AddLowRank
from adapters.errors import MissingPackageError, RequestError

FAMILIES = ["bert", "gpt2", "llama"]
QUANTIZATIONS = ["nf4", "fp4"]
STRATEGIES = [(strategy, kind) for strategy in ("lora", "probe", "freeze", "bitfit") for kind in FAMILIES]
STRATEGIES.remove(("bitfit", "llama"))  # no biases


def four_bit(model: nn.Module) -> dict[str, Any]:
    """Path -> module of what bitsandbytes stores in 4 bits; peft's layers around them left out."""
    return {path: module for path, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}


def pack(model: Any, quantization: str | None) -> list[str]:
    return quantize.pack(model, anatomy.linear_maps(model).values(), quantize.Storage(quantization))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# ---------------------------------------------------------------------- packing


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_linear_maps_of_the_blocks_are_packed_and_nothing_else(kind: str, quantization: str) -> None:
    model = tiny.model(kind)
    maps = anatomy.linear_maps(model)
    before = dict(model.named_parameters())
    done = pack(model, quantization)
    assert set(done) == set(maps) == set(four_bit(model))
    for path, module in four_bit(model).items():
        assert module.weight.quant_type == quantization
        size_in, size_out = maps[path].shape
        assert module.weight.numel() * module.weight.element_size() == size_in * size_out // 2
    after = dict(model.named_parameters())
    packed = {f"{path}.weight" for path in done}
    assert set(after) == set(before)
    for name in set(before) - packed:  # biases, embeddings, norms, poolers, heads: the very same objects
        assert after[name] is before[name], name


@pytest.mark.parametrize("kind", FAMILIES)
def test_packing_twice_is_packing_once(kind: str) -> None:
    model = tiny.model(kind)
    once = pack(model, "nf4")
    modules = four_bit(model)
    assert quantize.pack(model, anatomy.linear_maps(model).values(), quantize.Storage("nf4")) == once
    assert all(four_bit(model)[path] is module for path, module in modules.items())


def test_no_quantization_changes_nothing() -> None:
    model = tiny.model("bert")
    modules = list(model.modules())
    assert pack(model, None) == []
    assert all(one is other for one, other in zip(modules, model.modules(), strict=True))


def test_packed_answers_stay_near() -> None:
    model = tiny.model("bert")
    wanted = tiny.logits(model)
    pack(model, "nf4")
    found = tiny.logits(model)
    assert not torch.equal(found, wanted)
    assert float((found - wanted).abs().max()) <= 0.1


@pytest.mark.parametrize("name", ["nf5", "int4", "4bit", "NF4"])
def test_an_unknown_quantization_is_refused_by_name(name: str) -> None:
    with pytest.raises(RequestError, match=rf"unknown quantization '{name}'.*fp4, nf4"):
        quantize.Storage(name)
    with pytest.raises(RequestError, match=rf"unknown quantization '{name}'"):
        adapters.adapt(tiny.model("bert"), "probe", quantization=name)


def test_a_missing_bitsandbytes_is_said_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("bert")
    before = weights(model)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingPackageError, match=r"holdfast\[qlora\]"):
        pack(model, "nf4")
    assert not quantize.packed_modules(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


# ---------------------------------------------------------------------- under a strategy


@pytest.mark.parametrize(("strategy", "kind"), STRATEGIES)
def test_what_trains_is_never_packed_and_what_is_packed_never_trains(strategy: str, kind: str) -> None:
    adapted = adapters.adapt(tiny.model(kind), strategy, quantization="nf4")
    packed = four_bit(adapted.model)
    assert packed
    inside = {f"{path}.weight" for path in packed}
    assert not inside & set(adapted.trained)
    parameters = dict(adapted.model.named_parameters())
    for name in inside:
        assert not parameters[name].requires_grad
    for name in adapted.trained:
        assert parameters[name].requires_grad
        assert parameters[name].is_floating_point()
    own = {anatomy.own_name(path) for path in packed}
    trained = {anatomy.owner(anatomy.own_name(name)) for name in adapted.trained if name.endswith("weight")}
    assert not own & trained
    assert not any(path.startswith(("classifier", "score")) for path in own)
    if strategy != "freeze":  # the two blocks that train stay in full precision
        assert len(own) == len(anatomy.linear_maps(tiny.model(kind)))


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_packed_modules_are_the_packed_modules(kind: str) -> None:
    for strategy in ("probe", "lora"):
        adapted = adapters.adapt(tiny.model(kind), strategy, quantization="nf4")
        assert set(quantize.packed_modules(adapted.model)) == set(four_bit(adapted.model))


def test_qlora_is_lora_over_nf4() -> None:
    one = adapters.adapt(tiny.model("bert"), "qlora")
    two = adapters.adapt(tiny.model("bert"), "lora", quantization="nf4")
    assert one.storage == two.storage == quantize.Storage("nf4")
    assert one.trained == two.trained
    assert torch.equal(tiny.logits(one.model), tiny.logits(two.model))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize(("strategy", "kind"), STRATEGIES)
def test_evaluation_changes_no_byte(strategy: str, kind: str, quantization: str) -> None:
    adapted = adapters.adapt(tiny.model(kind), strategy, quantization=quantization)
    before = {name: tensor.detach().clone() for name, tensor in adapted.model.state_dict().items()}
    first = tiny.logits(adapted.model)
    assert torch.equal(tiny.logits(adapted.model), first)
    after = adapted.model.state_dict()
    assert set(after) == set(before)
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), name


def test_training_moves_what_trains_and_no_packed_byte() -> None:
    adapted = adapters.adapt(tiny.model("bert"), "qlora")
    before = {name: tensor.detach().clone() for name, tensor in adapted.model.state_dict().items()}
    parameters = [parameter for parameter in adapted.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    adapted.model.train()
    labels = torch.arange(6) % 3
    for _ in range(3):
        optimizer.zero_grad()
        adapted.model(**tiny.batch(), labels=labels).loss.backward()
        optimizer.step()
    moved = {name for name, tensor in adapted.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(adapted.trained)


@pytest.mark.parametrize("kind", FAMILIES)
def test_nothing_left_to_pack_is_refused_and_leaves_the_model_alone(kind: str) -> None:
    model = tiny.model(kind)
    before, config, modules = weights(model), model.config.to_dict(), list(model.modules())
    with pytest.raises(RequestError, match="nothing to pack"):
        adapters.adapt(model, "full", quantization="nf4", labels=["x", "y", "z"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
    assert all(one is other for one, other in zip(modules, model.modules(), strict=True))
    assert model.config.to_dict() == config


# ---------------------------------------------------------------------- what four bits make of a weight


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_round_trip_is_what_the_packed_layer_computes_with(kind: str, dtype: torch.dtype, quantization: str) -> None:
    model = tiny.model(kind, dtype=dtype)
    maps, before = anatomy.linear_maps(model), weights(model)
    pack(model, quantization)
    for path, module in four_bit(model).items():
        old = before[f"{path}.weight"]
        edit = roundtrip.RoundTrip(quantization, str(dtype).removeprefix("torch."), maps[path].transposed)
        found = edit(old)
        assert found.dtype == torch.float32
        assert found.shape == old.shape
        assert not torch.equal(found, old.float())
        dense = found.T if maps[path].transposed else found  # (out, in)
        assert torch.equal(dense, quantize.dequantized(module)), path
        with torch.no_grad():
            columns = module(torch.eye(dense.shape[1], dtype=dtype)) - (0 if module.bias is None else module.bias)
        assert float((columns.float().T - dense).abs().max()) <= (1e-6 if dtype == torch.float32 else 1e-2), path


def test_what_the_adapter_did_comes_after_the_round_trip() -> None:
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(64, 32, generator=generator)
    add = AddLowRank(torch.randn(4, 32, generator=generator), torch.randn(64, 4, generator=generator), 2.0)
    rounded = roundtrip.RoundTrip("nf4", "float32", False)(old)
    assert torch.equal(roundtrip.RoundTrip("nf4", "float32", False, add)(old), add(rounded))
    assert not torch.equal(rounded, old)


def test_a_round_trip_changes_nothing_it_was_given() -> None:
    old = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    before = old.clone()
    for transposed in (False, True):
        roundtrip.RoundTrip("nf4", "float32", transposed)(old)
    assert torch.equal(old, before)


def test_a_packed_weight_must_be_in_the_backbone() -> None:
    with pytest.raises(RequestError, match="must be in the backbone"):
        roundtrip.RoundTrip("nf4", "float32", False)(None)


# ---------------------------------------------------------------------- packed weights and their checkpoint


@pytest.mark.parametrize("kind", FAMILIES)
def test_packed_weights_are_known_by_their_checkpoint(kind: str) -> None:
    model = tiny.model(kind)
    reference = weights(model)
    paths = pack(model, "nf4")
    assert quantize.repacked_differs(model, reference.get) == []
    chosen = f"{paths[3]}.weight"
    assert quantize.repacked_differs(model, {**reference, chosen: reference[chosen] + 0.1}.get) == [chosen]
    del reference[chosen]
    assert quantize.repacked_differs(model, reference.get) == [chosen]


@pytest.mark.parametrize("factor", [0.5, 1.01, 2.0])
def test_a_packed_weight_of_another_scale_is_another_weight(factor: float) -> None:
    # Packed codes and packed scales of a scaled weight are the same bytes: the scale of the scales differs alone.
    model = tiny.model("bert")
    reference = weights(model)
    chosen = f"{pack(model, 'nf4')[3]}.weight"
    reference[chosen] *= factor
    assert quantize.repacked_differs(model, reference.get) == [chosen]
