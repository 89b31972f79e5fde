"""What is found of a model's graph is found once, and anew as soon as anything of the graph is another."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from adapters import graph, order, pooling
from adapters.reading import Reading


def counted() -> tuple[list[int], Callable[[], int]]:
    """How often something was looked for, and what looks for it."""
    calls: list[int] = []

    def find() -> int:
        calls.append(len(calls))
        return calls[-1]

    return calls, find


def block(model: Any) -> Any:
    return model.bert.encoder.layer[0]


def another_module(model: Any) -> None:
    old = block(model).output.dense
    block(model).output.dense = nn.Linear(old.in_features, old.out_features)


def another_setting(model: Any) -> None:
    block(model).attention.self.dropout.p = 0.5


def a_hook(model: Any) -> None:
    block(model).register_forward_hook(lambda _m, _i, output: output)


def a_forward(model: Any) -> None:
    vars(block(model))["forward"] = lambda *args, **kwargs: args[0]


def a_wider_tensor(model: Any) -> None:
    model.resize_token_embeddings(model.config.vocab_size + 3)


def one_tensor_for_two(model: Any) -> None:
    model.bert.encoder.layer[1].output.dense.weight = block(model).output.dense.weight


def another_dtype(model: Any) -> None:
    model.to(torch.bfloat16)


def the_configuration(model: Any) -> None:
    model.config.is_decoder = True


def the_configuration_in_place(model: Any) -> None:
    model.config.id2label[0] = "another"


CHANGES = [
    another_module,
    another_setting,
    a_hook,
    a_forward,
    a_wider_tensor,
    one_tensor_for_two,
    another_dtype,
    the_configuration,
    the_configuration_in_place,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_known_ends_with_the_graph(change: Callable[[Any], None]) -> None:
    model = tiny.backbone("bert", 0, "AutoModelForSequenceClassification")
    calls, find = counted()
    for _ in range(2):
        assert graph.known(model, "a", find) == 0
    assert graph.known(model, "b", find) == 1
    change(model)
    assert graph.known(model, "a", find) == 2
    assert graph.known(model, "a", find) == 2
    assert len(calls) == 3


def test_weights_and_modes_do_not_count_and_an_earlier_graph_is_known_again() -> None:
    model = tiny.backbone("bert", 0, "AutoModelForSequenceClassification")
    calls, find = counted()
    graph.known(model, "a", find)
    with torch.no_grad():
        model.classifier.weight.add_(1)
    model.train()
    graph.known(model, "a", find)
    assert len(calls) == 1
    hook = block(model).register_forward_hook(lambda _m, _i, output: output)
    graph.known(model, "a", find)
    hook.remove()
    graph.known(model, "a", find)
    assert len(calls) == 2


def test_another_hook_in_the_place_of_one_is_noticed() -> None:
    """Even where the memory of the first is used again."""
    model = tiny.backbone("bert", 0, "AutoModelForSequenceClassification")
    calls, find = counted()
    for number in range(20):
        hook = block(model).register_forward_hook(lambda _m, _i, output, number=number: output)
        graph.known(model, "a", find)
        hook.remove()
    assert len(calls) == 20


def test_a_head_that_reads_elsewhere_again_is_the_same_graph() -> None:
    model = tiny.backbone("bert", 0, "AutoModelForSequenceClassification")
    calls, find = counted()
    for pooled, layer in (("mean", 1), ("mean", 1), ("last", 1), ("mean", None), ("mean", 1)):
        pooling.place(model, pooled, layer)
        graph.known(model, "a", find)
        pooling.strip(model)
    assert len(calls) == 3


def test_nothing_is_kept_alive_and_a_fault_is_not_known() -> None:
    model = tiny.backbone("bert", 0, "AutoModelForSequenceClassification")
    gone = weakref.ref(model)
    order.passage(model)
    pooling.planned(model, Reading("mean", 1))

    def fails() -> None:
        raise ValueError("not this time")

    for _ in range(2):
        with pytest.raises(ValueError, match="not this time"):
            graph.known(model, "c", fails)
    del model
    gc.collect()
    assert gone() is None


def test_the_order_of_running_is_seen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.backbone("bert", 0, "AutoModelForSequenceClassification")
    calls, passed = [], order._passed

    def passing(net: Any) -> Any:
        calls.append(net)
        return passed(net)

    monkeypatch.setattr(order, "_passed", passing)
    first = order.frozen_below(model, ["classifier.weight"])
    again = order.frozen_below(model, ["bert.encoder.layer.1.output.dense.weight"])
    assert len(calls) == 1
    assert len(again) < len(first)
