"""The matmuls of a run against the layers' own forward: outputs, gradients, and what is left behind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import adapters
from adapters import fused
from adapters.fused import Plan

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 1e-2}


def adapted_on(kind: str = "bert", strategy: str = "lora", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    adapted = adapters.adapt(
        tiny.model(kind, dtype=dtype),
        strategy,
        task="text-classification",
        labels=tiny.LABELS,
        processor=tiny.tokenizer(),
        **options,
    )
    parameters = dict(adapted.model.named_parameters())
    with torch.no_grad():
        for name in adapted.trained:  # factors that are not zero
            parameters[name].normal_(std=0.1)
    return adapted


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def given() -> dict[str, torch.Tensor]:
    """Three rows, one of them padded; the seed of what follows."""
    torch.manual_seed(1)
    ids = torch.randint(5, 30, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def passed(model: Any, dtype: torch.dtype = torch.float32, cast: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The logits, and all gradients, of one pass with the same random numbers."""
    model.zero_grad()
    with torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None):
        logits = model(**given()).logits
    logits.float().pow(2).sum().backward()
    found = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach().float(), **found}


def compared(ours: dict[str, torch.Tensor], peer: dict[str, torch.Tensor], tolerance: float) -> None:
    """Apart by no more than this share; a key's bias has no gradient but rounding."""
    assert ours.keys() == peer.keys()
    least = 0.01 * max(float(tensor.norm()) for tensor in peer.values())
    for name, tensor in peer.items():
        away = (ours[name] - tensor).norm() / tensor.norm().clamp(min=least)
        assert away < tolerance, (name, float(away))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_outputs_and_gradients_are_pefts(kind: str, dropout: float, dtype: torch.dtype) -> None:
    model = adapted_on(kind, dtype=dtype, lora_dropout=dropout, use_rslora=True, bias="lora_only").model.train()
    peer = passed(model)
    with fused.fused(model, Plan()) as count:
        assert count == len(layers(model)) > 6
        ours = passed(model)
    assert sum("lora_" in name for name in ours) == 2 * count
    compared(ours, peer, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("factors", [torch.float32, None], ids=str)
def test_a_layer_in_every_dtype(dtype: torch.dtype, factors: torch.dtype | None) -> None:
    layer = layers(adapted_on().model.to(torch.float64))[0].to(dtype).train()
    for part in (layer.lora_A, layer.lora_B):
        part.to(factors or dtype)
    found = []
    for forward in (layer.forward, fused.Forward(layer, None, True)):
        torch.manual_seed(0)
        inputs = torch.randn(2, 5, 32, dtype=dtype, requires_grad=True)
        result = forward(inputs)
        assert result.dtype == dtype
        result.float().pow(2).sum().backward()
        trained = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
        assert len(trained) == 2
        found.append({"result": result, "inputs": inputs.grad, **trained})
        found[-1] = {name: tensor.detach().double() for name, tensor in found[-1].items()}
        layer.zero_grad()
    compared(found[1], found[0], {torch.float64: 1e-6, torch.float32: 1e-6}.get(dtype, 1e-2))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keep", [False, True])
def test_under_autocast_it_answers_as_peft_does(cast: torch.dtype, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "LARGE", 1)
    model = adapted_on().model.train()
    peer = passed(model, cast=cast)
    with fused.fused(model, Plan(torch.bfloat16, keep)):
        ours = passed(model, cast=cast)
    compared(ours, peer, TOLERANCE[cast])


def test_over_four_bits_the_weight_is_unpacked_in_both_directions() -> None:
    pytest.importorskip("bitsandbytes")
    for dropout in (0.0, 0.3):
        model = adapted_on("llama", "qlora", lora_dropout=dropout).model.train()
        peer = passed(model)
        with fused.fused(model, Plan()) as count:
            assert count == len(layers(model))
            ours = passed(model)
        compared(ours, peer, TOLERANCE[torch.float32])


def test_one_layer_saves_its_input_and_rank_numbers_a_token() -> None:
    layer = layers(adapted_on().model)[0].train()
    inputs = torch.randn(2, 5, 32, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(inputs)
        peer, kept[:] = list(kept), []
        fused.Forward(layer, None, True)(inputs)
    own = {p.data_ptr() for p in layer.parameters()}
    assert sorted(t.numel() for t in kept if t.data_ptr() not in own) == [2 * 5 * 8, 2 * 5 * 32]
    assert sum(t.numel() for t in kept) <= sum(t.numel() for t in peer)


def test_no_gradient_goes_to_inputs_that_ask_for_none() -> None:
    layer = layers(adapted_on().model)[0].train()
    asked: list[Any] = []
    plain = fused.Joined.backward

    class Seen(torch.autograd.Function):
        forward = fused.Joined.forward

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            asked.append(plain(ctx, grad)[:2])
            return plain(ctx, grad)

    factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    how = (2.0, torch.float32, torch.float32, torch.float32, None)
    inputs = torch.randn(2, 5, 32)
    Seen.apply(inputs, inputs, *factors, None, layer.base_layer.weight, how).sum().backward()
    assert asked == [(None, None)]
    assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model = adapted_on(lora_dropout=0.3).model.train()
    with fused.fused(model, Plan()):
        plain = passed(model)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        again = passed(model)
    compared(again, plain, 1e-5)


def test_evaluation_is_pefts_own_bit_for_bit() -> None:
    model = adapted_on().model.eval()
    peer = passed(model)["logits"]
    with fused.fused(model, Plan(torch.bfloat16)):
        assert torch.equal(passed(model)["logits"], peer)


def test_what_it_cannot_do_stays_pefts() -> None:
    assert not list(fused._layers(adapted_on(use_dora=True).model))
    model = adapted_on().model
    chosen = layers(model)
    chosen[0].base_layer.register_forward_hook(lambda *_: None)
    chosen[1].lora_A["default"].register_forward_pre_hook(lambda *_: None)
    assert list(fused._layers(model)) == chosen[2:]
    model.train()
    with fused.fused(model, Plan()):
        for layer in chosen:
            layer.enable_adapters(False)
        alone = passed(model)["logits"]
    assert torch.equal(alone, passed(model)["logits"])


def test_it_leaves_nothing_and_copies_have_their_own() -> None:
    model = adapted_on().model.train()
    state, fields = set(model.state_dict()), [set(vars(module)) for module in model.modules()]
    with fused.fused(model, Plan()):
        assert set(model.state_dict()) == state
        other = copy.deepcopy(model)
        for mine, theirs in zip(layers(model), layers(other), strict=True):
            assert vars(theirs)["forward"].layer is theirs
            assert vars(mine)["forward"].layer is mine
        compared(passed(other), passed(model), 1e-7)
    assert [set(vars(module)) for module in model.modules()] == fields


def test_bfloat16_is_for_large_weights_and_hardware_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    model = adapted_on().model.train()
    assert fused.plan(model, cpu) == Plan()  # none is large
    monkeypatch.setattr(fused, "LARGE", 1)
    monkeypatch.setattr(fused, "native", lambda device: False)
    assert fused.plan(model, cpu) == Plan()
    monkeypatch.setattr(fused, "native", lambda device: True)
    how = fused.plan(model, cpu)
    assert how.dtype is torch.bfloat16
    assert how.keep
    assert "bfloat16" in how.why
    monkeypatch.setattr(fused, "free_memory", lambda device=None: 0)
    scarce = fused.plan(model, cpu)
    assert not scarce.keep
    assert "cast" in scarce.why
    plain = passed(model)
    seen = []
    for chosen in (how, scarce):
        with fused.fused(model, chosen):
            seen.append(passed(model))
        compared(seen[-1], plain, 5e-2)
        assert seen[-1]["logits"].dtype == torch.float32
        assert not torch.equal(seen[-1]["logits"], plain["logits"])
    compared(seen[0], seen[1], 1e-7)


# Of every strategy, what stands in blocks that a gradient passes: how many maps, and whether they train.
MAPS = {
    "full": ("bert", "full", {}, 18),
    "full, Conv1D": ("gpt2", "full", {}, 12),
    "full, one block that is run several times": ("albert", "full", {}, 6),
    "freeze": ("bert", "freeze", {"layers": 1}, 6),
    "freeze, Conv1D": ("gpt2", "freeze", {"layers": 1}, 4),
    "bitfit": ("bert", "bitfit", {}, 18),
    "ia3": ("llama", "ia3", {}, 21),
    "lora on some maps": ("bert", "lora", {"target_modules": ["query"]}, 15),
    "lora from a block on": ("bert", "lora", {"target_modules": ["query"], "layers_to_transform": [2]}, 5),
    "lora beside a trained map": ("bert", "lora", {"target_modules": ["query"], "unfrozen_parameters": "2.*key"}, 15),
    "probe": ("bert", "probe", {}, 0),
}


@pytest.mark.parametrize("name", MAPS)
def test_maps_that_a_gradient_passes_are_multiplied_in_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, strategy, options, count = MAPS[name]
    monkeypatch.setattr(fused, "LARGE", 1)
    model = adapted_on(kind, strategy, **options).model.eval()  # nothing is dropped
    peer = passed(model)
    assert len(list(fused._maps(model))) == count
    fields = [set(vars(module)) for module in model.modules()]
    for keep in (True, False):
        with fused.fused(model, Plan(torch.bfloat16, keep)):
            ours = passed(model)
            with torch.no_grad():
                assert torch.equal(model(**given()).logits, peer["logits"])
        compared(ours, peer, TOLERANCE[torch.bfloat16])
        assert torch.equal(ours["logits"], peer["logits"]) == (strategy == "probe")
    assert [set(vars(module)) for module in model.modules()] == fields


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_a_narrowed_product_keeps_what_backward_needs_and_answers_in_the_inputs_dtype(
    transposed: bool, trains: bool
) -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    module: Any = Conv1D(6, 4) if transposed else torch.nn.Linear(4, 6)
    module.weight.requires_grad_(trains)
    inputs = torch.randn(2, 5, 4, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = fused.Product(module, torch.bfloat16, keep=False)(inputs)
    assert result.dtype == torch.float32
    assert [(t.dtype, t.numel()) for t in kept] == [(torch.bfloat16, 40)] * trains + [(torch.bfloat16, 24)]
    result.pow(2).sum().backward()
    grads = [inputs.grad, module.bias.grad, module.weight.grad]
    if trains:
        assert module.weight.grad.stride() == module.weight.stride()
    inputs.grad = module.bias.grad = module.weight.grad = None
    module(inputs).pow(2).sum().backward()
    for ours, own in zip(grads, [inputs.grad, module.bias.grad, module.weight.grad], strict=True):
        assert (ours is None) == (own is None)
        if own is not None:
            assert ours.dtype == torch.float32
            assert (ours - own).norm() < 2e-2 * own.norm()


def test_a_trained_weight_is_never_an_old_one() -> None:
    """Whatever writes it, and however: a copy of a frozen weight is given up once the weight trains."""
    module = torch.nn.Linear(4, 6, bias=False).train()
    module.weight.requires_grad_(False)
    product, inputs = fused.Product(module, torch.bfloat16, keep=True), torch.eye(4, requires_grad=True)
    with torch.no_grad():
        module.weight.fill_(1)
    assert bool((product(inputs) == 1).all())
    module.weight.requires_grad_(True)
    for value in (2.0, 3.0):
        module.weight.data.fill_(value)  # past torch's count of changes
        assert bool((product(inputs) == value).all())
    module.weight.requires_grad_(False)
    assert bool((product(inputs) == 3).all())


def test_a_map_that_makes_its_weight_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "LARGE", 1)
    model = adapted_on(strategy="full").model
    before = list(fused._maps(model))
    torch.nn.utils.parametrizations.weight_norm(before[0])
    assert list(fused._maps(model)) == before[1:]


def test_it_lets_autocast_and_other_dtypes_alone() -> None:
    module = torch.nn.Linear(4, 6).train()
    product = fused.Product(module, torch.bfloat16, keep=True)
    inputs = torch.randn(3, 4)
    with torch.autocast("cpu", torch.float16):
        assert product(inputs).dtype == torch.float16
    with pytest.raises(RuntimeError, match="same dtype"):
        product(inputs.double())


def test_a_run_puts_it_in_and_takes_it_out(tmp_path: Path) -> None:
    for more, expected in (({}, 18), ({"fused": False}, 0)):
        adapted = adapted_on()
        trainer = adapters.Trainer(
            adapted, {"output_dir": str(tmp_path), "max_steps": 1, "report_to": "none", **more}, tiny.rows(8)
        )
        seen: list[bool] = []
        trainer._course.on_step_end = lambda *_, model=adapted.model, seen=seen, **__: seen.extend(  # type: ignore[method-assign]
            "forward" in vars(layer) for layer in layers(model)
        )
        trainer.train()
        assert len(seen) == 18
        assert sum(seen) == expected
        assert not any("forward" in vars(layer) for layer in layers(adapted.model))


@pytest.mark.parametrize(("strategy", "options"), [("lora", {}), ("freeze", {"layers": 1}), ("full", {})])
def test_bf16_false_keeps_every_product_in_its_own_dtype(
    strategy: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "LARGE", 1)
    monkeypatch.setattr(fused, "native", lambda device: True)
    for more, chosen in (({}, True), ({"bf16": False}, False), ({"fused": False}, False)):
        adapted = adapted_on(strategy=strategy, **options)
        arguments = {"output_dir": str(tmp_path), "max_steps": 1, "report_to": "none", **more}
        trainer = adapters.Trainer(adapted, arguments, tiny.rows(8))
        trainer.train()
        assert any("bfloat16" in remark for remark in trainer.remarks) is chosen
        assert {p.dtype for p in adapted.model.parameters()} == {torch.float32}
