"""Law 8 in several processes: what a plan says one of them holds and sends is what it holds and sends."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import divided
import pytest
import tiny
from many import Ended
from typer.testing import CliRunner

import adapters
from adapters import cli, engines
from adapters.budget import MARGIN, Line

Launch = Callable[..., list[Ended]]
ROWS, LENGTH = 4, 24
# How far a plan may lie above a run. FSDP's counts the buffer of a second unit, which is gathered ahead: on models of
# three blocks that is a twentieth of everything, and on the CPU it is not there at the peak of backward.
# ZeRO's counts both buffers of the gradients beside all activations, which are there only where all tensors train.
MOST = {"ddp": MARGIN, "zero1": MARGIN, "zero2": MARGIN, "fsdp": 0.12}


def planned(case: str, engine: str, processes: int) -> Line:
    _, auto, strategy = divided.CASES[case]
    sizes: dict[str, Any] = {"per_device_train_batch_size": ROWS, "per_device_eval_batch_size": ROWS}
    args = sizes | {"prefix_cache": False, "warm_head": False, "chunked_loss": False}
    goal: dict[str, Any] = {"labels": list(tiny.LABELS)}
    if auto == divided.GENERATES:
        goal = {"task": "causal-lm"}
    where: dict[str, Any] = {"length": LENGTH, "args": args, "device": "cpu", "processes": processes}
    return adapters.plan(divided.backbone(case), strategy, **goal, **where, sharding=engine.rstrip("12")).lines[0]


@pytest.mark.parametrize(
    ("engine", "processes", "cases"),
    [
        ("ddp", 2, ["bert full", "llama lora"]),
        ("fsdp", 2, ["llama lora", "gpt2 full"]),
    ],
)
def test_law_08_a_plan_is_what_each_process_holds_and_sends(
    many: Launch, tmp_path: Path, engine: str, processes: int, cases: list[str]
) -> None:
    assert_counted(many, tmp_path, engine, processes, cases)


def assert_counted(many: Launch, tmp_path: Path, engine: str, processes: int, cases: list[str]) -> None:
    runs = many("spread:spread", processes, tmp_path, cases, engine, ROWS, LENGTH, limit=300)
    for case in cases:
        gave: Mapping[str, Any] = runs[0].gave[case]
        line = planned(case, engine, processes)
        assert line.engine == engine.rstrip("12")
        assert abs(line.wire / gave["wire"] - 1) < 0.01, (case, line.wire, gave)
        assert -0.02 < line.peak / gave["peak"] - 1 < MOST[engine], (case, line, gave)


def test_the_bytes_of_ddp_and_fsdp_follow_from_their_sizes() -> None:
    """By hand, for a bias-free map of 10 x 7 that trains beside a frozen one of 10 x 5, in three processes."""
    trained = engines.Unit("a", 4 * 7 * 4, 280, 3 * 4 * 7 * 4, 112, 280, 280, 112, kept=False, again=True)
    frozen = engines.Unit("b", 4 * 5 * 4, 200, 3 * 4 * 5 * 4, 0, 0, 0, 0, kept=True, again=False)
    ddp = engines.replicated(480, 280, 3)
    assert (ddp.weights, ddp.buffers, ddp.wire) == (480, 280, 373)
    zero = engines.stepping(480, 280, 3)
    assert (zero.weights, zero.buffers, zero.wire) == (480, 560, 560)
    assert (zero.divided, zero.optimizer) == (1.0, 1 / 3)
    fsdp = engines.divided(480, [trained, frozen], 3)
    assert fsdp.weights == 112 + 80
    assert fsdp.divided == 0.4  # the first of three has four of ten rows
    assert fsdp.wire == (2 * 336 + 240) * 2 // 3 + 112 * 2
    assert engines.divided(480, [trained, frozen], 3, accumulated=4).wire == 4 * (2 * 336 + 240) * 2 // 3 + 112 * 2
    assert engines.divided(480, [trained, frozen], 3, passes=2).wire == (3 * 336 + 240) * 2 // 3 + 112 * 2


def test_what_fits_and_sends_least_is_the_cheapest() -> None:
    model = tiny.model("llama", auto=divided.GENERATES, num_hidden_layers=6, hidden_size=64)
    args = {"per_device_eval_batch_size": 1, "per_device_train_batch_size": 1}
    how: dict[str, Any] = {"task": "causal-lm", "length": 8, "args": args, "processes": 4}
    roomy = adapters.plan(model, "full", memory="1GB", **how)
    assert [line.name for line in roomy.fitting] == ["full/ddp", "full/fsdp"]
    ddp, fsdp = roomy.lines
    assert ddp.peak > 1.5 * fsdp.peak
    tight = adapters.plan(model, "full", memory=(1.1 * fsdp.peak + 630e6) / 1e9, **how)
    assert tight.cheapest is not None
    assert tight.cheapest.name == "full/fsdp"
    assert "sent a step" in str(tight)


def test_bad_requests(tmp_path: Path) -> None:
    model = tiny.model("bert")
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(adapters.RequestError, match="a number of processes"):
            adapters.plan(model, "lora", processes=wrong)  # type: ignore[arg-type]
    with pytest.raises(adapters.RequestError, match=r"unknown engine.*ddp, zero, fsdp"):
        adapters.plan(model, "lora", processes=2, sharding="zero3")
    with pytest.raises(adapters.RequestError, match="one process divides nothing"):
        adapters.plan(model, "lora", sharding="fsdp")


def test_the_command_plans_for_several_processes(tmp_path: Path) -> None:
    folder = tiny.folder("bert", tmp_path / "bert")
    words = ["plan", folder, "--strategy", "lora", "--length", "8", "--memory", "1GB", "--processes", "2", "--json"]
    told = CliRunner().invoke(cli.app, words)
    assert told.exit_code == 0, told.output
    document = json.loads(told.stdout.splitlines()[-1])
    assert [line["engine"] for line in document["lines"]] == ["ddp", "fsdp"]
    assert document["cheapest"] == "lora/ddp"
    assert document["processes"] == 2


def test_the_arithmetic_of_the_page_is_that_of_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a shape alone, by hand, and from the units of a model of that shape."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks import scale

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 128}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    monkeypatch.setitem(scale.SHAPES, "small", sizes)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16)
    names = {name for name, _ in model.named_parameters()}
    found = engines.divided(2 * sum(p.numel() for p in model.parameters()), engines.units(model, names, 4), 4, passes=2)
    hand = scale.by_hand("small", "full", 4)
    assert (found.shards, found.wire, found.buffers) == (hand["weights"], hand["wire"], hand["buffers"])
