"""Blocks, linear maps, heads and what lies below, read off the graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch

import adapters
from adapters import anatomy, order

BLOCKS = {
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "gpt2": "transformer.h",
    "llama": "model.layers",
}
MAPS = {"bert": 6, "roberta": 6, "gpt2": 4, "llama": 7}  # linear maps in a block


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_blocks_and_linear_maps(kind: str) -> None:
    model = tiny.model(kind)
    assert anatomy.block_lists(model) == [anatomy.BlockList(BLOCKS[kind], 3, shared=False)]
    maps = anatomy.linear_maps(model)
    assert len(maps) == 3 * MAPS[kind]
    for path, described in maps.items():
        weight = model.get_submodule(path).weight
        shape = described.shape if described.transposed else described.shape[::-1]
        assert tuple(weight.shape) == shape
    assert all(m.transposed for m in maps.values()) is (kind == "gpt2")


def test_blocks_that_share_weights_are_told() -> None:
    albert = tiny.model("albert")
    assert any(blocks.shared for blocks in anatomy.block_lists(albert))
    with pytest.raises(adapters.RequestError, match=r"share one set of weights.*Take 'lora'"):
        adapters.adapt(albert, "freeze")
    for strategy in ("lora", "probe", "bitfit", "full"):
        adapted = adapters.adapt(tiny.model("albert"), strategy)
        assert adapted.trained_count > 0


def test_targets_never_touch_the_head() -> None:
    adapted = adapters.adapt(tiny.model("roberta"), target_modules=["dense"])
    assert not any("classifier" in path for path in adapted.strategy.modules)
    assert {"classifier.dense.weight", "classifier.out_proj.weight"} <= adapted.head
    with pytest.raises(adapters.RequestError, match="part of the task's new head"):
        adapters.adapt(tiny.model("roberta"), target_modules=["out_proj"])


def test_the_saved_targets_are_short_and_exact() -> None:
    adapted = adapters.adapt(tiny.model("bert"))
    assert set(adapted.strategy.target_modules) == {
        "query",
        "key",
        "value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    } - {"attention.output.dense"}
    assert len(adapted.strategy.modules) == 18
    chosen = adapters.adapt(
        tiny.model("bert"), target_modules=r".*layer\.[02]\..*query", exclude_modules=["0.attention.self.query"]
    )
    assert list(chosen.strategy.modules) == ["bert.encoder.layer.2.attention.self.query"]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_freeze_trains_the_top(kind: str) -> None:
    adapted = adapters.adapt(tiny.model(kind), "freeze", layers=1)
    blocks = {name for name in adapted.trained if name.startswith(f"{BLOCKS[kind]}.")}
    assert blocks
    assert all(name.startswith(f"{BLOCKS[kind]}.2.") for name in blocks)
    assert not any("embed" in name or ".wte" in name for name in adapted.trained)
    above = {"bert": "bert.pooler.dense.weight", "gpt2": "transformer.ln_f.weight", "llama": "model.norm.weight"}
    if kind in above:
        assert above[kind] in adapted.trained


def test_below_is_what_runs_before_the_first_trained_module() -> None:
    adapted = adapters.adapt(tiny.model("bert"), layers_to_transform=[1])
    quiet = set(map(id, order.frozen_below(adapted.model, adapted.trained)))
    modules = dict(adapted.model.named_modules())
    assert id(modules["bert.embeddings"]) in quiet
    assert id(modules["bert.encoder.layer.0"]) in quiet
    assert id(modules["bert.encoder.layer.1"]) not in quiet
    assert id(modules["bert.encoder.layer.2.output.dropout"]) not in quiet
    everything = adapters.adapt(tiny.model("bert"), "full")
    below = order.frozen_below(everything.model, everything.trained)
    assert not any(list(module.parameters()) for module in below)


def test_the_skeleton_takes_no_memory_and_leaves_the_model_alone() -> None:
    model = tiny.model("llama")
    ghost = anatomy.skeleton(model)
    assert [n for n, _ in ghost.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert {p.device.type for p in ghost.parameters()} == {"meta"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_a_failed_request_leaves_the_live_model_as_it_was() -> None:
    model = tiny.model("bert")
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    config = model.config.to_dict()
    logits = tiny.logits(model)
    for options in (
        {"target_modules": ["q_proj"]},
        {"rank_pattern": {"nothing": 4}},
        {"r": 0},
        {"layers_to_transform": 9},
    ):
        with pytest.raises(adapters.RequestError):
            adapters.adapt(model, **options)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert model.config.to_dict() == config
    assert torch.equal(tiny.logits(model), logits)


def test_a_model_with_an_adapter_is_refused() -> None:
    model = tiny.model("bert")
    adapters.adapt(model)
    with pytest.raises(adapters.RequestError, match="carries an adapter already"):
        adapters.adapt(model)


def test_a_copied_graph_is_a_deep_copy_with_other_tensors() -> None:
    class Own(torch.nn.Module):
        def __deepcopy__(self, memo: dict[int, Any]) -> Own:
            return Own()

    model = tiny.model("gpt2", auto="AutoModelForCausalLM")  # its output layer is its embeddings
    shared: dict[str, int] = {}
    model.transformer.cache, model.lm_head.cache, model.own = shared, shared, Own()
    seen = model.transformer.register_forward_hook(lambda *_: None)
    found: Any = anatomy.copied(model, lambda tensor: torch.full_like(tensor, 0.5))
    wanted = copy.deepcopy(model)
    assert [(name, type(part)) for name, part in found.named_modules()] == [
        (name, type(part)) for name, part in wanted.named_modules()
    ]
    originals = set(map(id, model.modules()))
    assert not any(id(part) in originals for part in found.modules())
    assert found.own is not model.own
    assert found.lm_head.weight is found.transformer.wte.weight
    assert all(bool((tensor == 0.5).all()) for tensor in (*found.parameters(), *found.buffers()))
    assert found.config == model.config
    assert found.config is found.transformer.config
    assert found.config is not model.config
    found.transformer.cache["a"] = 1
    assert found.lm_head.cache == {"a": 1}
    assert shared == {}
    assert len(found.transformer._forward_hooks) == 1
    seen.remove()
    assert len(found.transformer._forward_hooks) == 1
