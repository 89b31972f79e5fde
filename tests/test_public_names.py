"""The public surface is a list, and importing it costs nothing."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import FunctionType

import pytest

import adapters

PUBLIC = {
    "Adapted",
    "AdaptersError",
    "BackboneError",
    "CombineReport",
    "ContractError",
    "DataError",
    "Difference",
    "DiskError",
    "ExportReport",
    "FolderError",
    "MergeReport",
    "MissingPackageError",
    "NumbersError",
    "Plan",
    "Profile",
    "Recipe",
    "RequestError",
    "STRATEGIES",
    "Shared",
    "RankError",
    "SpentError",
    "Strategy",
    "Sweep",
    "TASKS",
    "Task",
    "Trainer",
    "__version__",
    "adapt",
    "combine",
    "disabled",
    "evaluate",
    "ExtractReport",
    "extract",
    "export",
    "diff",
    "inspect",
    "load",
    "merge",
    "merge_on_disk",
    "plan",
    "predict",
    "pseudo_perplexity",
    "push",
    "run_recipe",
    "save",
    "validate",
}


def python(code: str) -> str:
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


def test_the_list() -> None:
    assert set(adapters.__all__) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_each_name_opens(name: str) -> None:
    assert getattr(adapters, name) is not None


@pytest.mark.parametrize("name", ["adapt", "combine", "diff", "export", "extract", "merge", "predict"])
def test_functions_win_over_their_rooms(name: str) -> None:
    importlib.import_module(f"adapters.{name}")
    assert isinstance(getattr(adapters, name), FunctionType)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'adpat'"):
        adapters.adpat  # noqa: B018


def test_import_brings_no_torch() -> None:
    heavy = "torch transformers peft datasets numpy pandas pydantic typer yaml"
    code = f"import sys, adapters; print([m for m in {heavy.split()!r} if m in sys.modules])"
    assert python(code) == "[]"


def test_the_strategies_fill_without_torch() -> None:
    code = "import sys; from adapters import STRATEGIES, TASKS; print(len(STRATEGIES), 'torch' in sys.modules)"
    assert python(code) == f"{len(adapters.STRATEGIES)} False"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["inspect", "--help"]])
def test_help_brings_no_torch(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['adapters', *{arguments!r}]\n"
        "from adapters.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print('TORCH' if 'torch' in sys.modules else 'none')"
    )
    assert python(code).splitlines()[-1] == "none"
