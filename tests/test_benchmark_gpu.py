"""`python -m benchmarks.gpu` where there is no GPU: every part of it runs, at a size that says nothing."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_child, gpu_laws, gpu_made, harness, kept, made
from benchmarks.gpu_laws import Bench, Law

TRIED = {"lora": ["peer"], "qlora": ["ours", "peer"], "upper": ["ours, prefix kept"], "uneven": ["ours, packed"]}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What processes were asked; each answers in this one, over few sides and the laws that are dear to nobody."""
    found: list[dict[str, Any]] = []

    def in_child(module: str, request: dict[str, Any], **_: Any) -> dict[str, Any]:
        assert module == gpu.CHILD
        found.append(request)
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            return gpu_child.answer(dict(request), Path(folder))

    monkeypatch.setattr(harness, "in_child", in_child)
    monkeypatch.setattr(made, "CACHE", tmp_path)
    rows = {
        n: replace(r, sides={s: r.sides[s] for s in TRIED[n]}, epochs=min(r.epochs, 2)) for n, r in gpu.ROWS.items()
    }
    monkeypatch.setattr(gpu, "ROWS", rows)
    laws = {name: gpu_laws.LAWS[name] for name in ("matmuls", "packing", "memory")}
    monkeypatch.setattr(gpu_laws, "LAWS", laws)
    return found


def test_the_whole_command_on_a_processor(
    asked: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    given = ["--device", "cpu", "--rounds", "1", "--steps", "1", "--results", str(tmp_path / "r.jsonl")]
    given += ["--only", "laws,qlora-tiny,upper-tiny,uneven-tiny"]
    assert gpu.main(given) == 0
    shown = capsys.readouterr().out
    kinds = [request["kind"] for request in asked]
    assert (kinds.count("machine"), kinds.count("weights"), kinds.count("laws"), kinds.count("speed")) == (1, 1, 2, 4)
    assert "**no**" not in shown
    assert shown.count("| nf4 |") == 4
    assert shown.count("| bfloat16 |") == 2
    for name in ("qlora", "upper", "uneven"):
        for side in TRIED[name]:
            (line,) = [text for text in shown.splitlines() if text.startswith(f"| {name}-tiny | {side} |")]
            assert "nan" not in line
    # The share of the device's own rate, where nothing is left out of what is counted.
    measured = {result.run.row: result.more for result in kept.known(tmp_path / "r.jsonl")}
    assert measured["qlora-tiny"]["operations"] > 0 == measured["upper-tiny"]["operations"]
    assert measured["uneven-tiny"]["tokens"] > 0
    assert measured["uneven-tiny"]["padding"] < 0.5

    asked.clear()
    assert gpu.main([*given, "--resume"]) == 0
    assert [request["kind"] for request in asked] == ["machine"]
    resumed = capsys.readouterr().out
    assert [line for line in resumed.splitlines() if line.startswith("| nf4")] == [
        line for line in shown.splitlines() if line.startswith("| nf4")
    ]
    asked.clear()
    assert gpu.main([*given, "--table"]) == 0
    assert capsys.readouterr().out == resumed
    assert not asked

    def broken(bench: Bench) -> Iterator[Law]:
        yield Law("a law", 2.0, 1.0)
        raise ValueError("it fell")

    monkeypatch.setattr(gpu_laws, "LAWS", {"broken": broken, "memory": gpu_laws.of_memory})
    assert gpu.main([*given, "--only", "laws"]) == 1
    shown = capsys.readouterr().out
    assert shown.count("| a law | 2 | 1 | **no** |") == 2
    assert shown.count("broken: broke off (ValueError: it fell) | inf | 0 | **no** |") == 2


def test_a_run_is_taken_and_its_time_is_limited(
    asked: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing begins once the time is up, which is said; memory that runs out is an answer."""
    given = ["--device", "cpu", "--shape", "tiny", "--only", "lora-tiny", "--rounds", "1", "--steps", "1"]
    given += ["--results", str(tmp_path / "r.jsonl")]
    assert gpu.main([*given, "--seconds", "1"]) == 1
    assert "the time was up" in capsys.readouterr().out
    assert [request["kind"] for request in asked] == ["machine"]

    def full(request: Any, folder: Path) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(gpu_child, "speed", full)
    assert gpu.main(given) == 0
    assert "| lora-tiny | peer | 2 x 64 | out of memory: CUDA out of memory." in capsys.readouterr().out


def test_a_run_that_goes_on_from_its_middle_ends_where_the_whole_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made, "CACHE", tmp_path)
    request = {"device": "cpu", "strategy": "lora", "shape": "tiny"}
    bench = Bench({**request, "checkpoint": gpu_made.checkpoint("tiny", "cpu")}, tmp_path / "laws")
    bench.folder.mkdir()
    found = list(gpu_laws.of_a_run(bench))
    assert len(found) == 7
    assert [law.law for law in found if not law.holds] == []


def test_what_is_counted_of_a_shape() -> None:
    assert gpu_made.SHAPES["8b"].weights == pytest.approx(16.06, abs=0.01)  # Llama 3.1 8B: 8.03e9 weights
    assert gpu_made.SHAPES["1b"].weights == pytest.approx(2.47, abs=0.01)  # Llama 3.2 1B: 1.236e9 weights
    assert gpu_made.SHAPES["8b"].batch(24) == 1
    assert gpu_made.SHAPES["8b"].batch(140) == 4
    assert gpu_made.sheet("NVIDIA H200 (compute capability 9.0)") == 989e12
    assert gpu_made.sheet("NVIDIA A100-SXM4-80GB") == 312e12
    assert gpu_made.sheet("NVIDIA L4") == 121e12
    assert gpu_made.sheet("AMD EPYC") is None
    assert gpu_laws.relative([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1)
    assert math.isnan(gpu_laws.relative([1.0], [1.0, 2.0]))
    assert not Law("x", math.nan, 1.0).holds


def test_operations_are_counted_from_the_matrices() -> None:
    layers = torch.nn.ModuleList([torch.nn.Linear(8, 4), torch.nn.Linear(4, 2), torch.nn.Embedding(9, 8)])
    layers[0].requires_grad_(False)
    shape = replace(gpu_made.SHAPES["tiny"], blocks=3, width=8, length=10)
    assert gpu_child.operations(layers, shape) == 4 * 32 + 6 * 8 + 6 * 3 * 8 * 10
