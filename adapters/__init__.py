"""Holdfast: adapt pretrained transformers models, and keep the promise.

If a run finishes, what was saved is what was trained, on the backbone you named, and merged means the same
outputs. The public names load on first use, so that `import adapters` imports no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AdaptersError": "errors",
    "BackboneError": "errors",
    "ContractError": "errors",
    "DataError": "errors",
    "DiskError": "errors",
    "FolderError": "errors",
    "MissingPackageError": "errors",
    "NumbersError": "errors",
    "RankError": "errors",
    "RequestError": "errors",
    "SpentError": "errors",
    "Adapted": "contracts",
    "Strategy": "contracts",
    "Task": "contracts",
    "STRATEGIES": "adapt",
    "TASKS": "tasks",
    "adapt": "adapt",
    "disabled": "adapt",
    "Trainer": "trainer",
    "evaluate": "predict",
    "predict": "predict",
    "pseudo_perplexity": "cloze",
    "save": "storage",
    "load": "storage",
    "merge": "merge",
    "merge_on_disk": "merge",
    "MergeReport": "merge",
    "extract": "extract",
    "ExtractReport": "extract",
    "combine": "combine",
    "CombineReport": "combine",
    "export": "export",
    "ExportReport": "readers",
    "inspect": "profile",
    "Profile": "profile",
    "diff": "diff",
    "Difference": "diff",
    "plan": "plan",
    "Plan": "budget",
    "Recipe": "recipe",
    "validate": "validation",
    "push": "push",
    "Shared": "shared",
    "Sweep": "sweep",
    "run_recipe": "script",
}
__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from adapters.adapt import STRATEGIES as STRATEGIES
    from adapters.adapt import adapt as adapt
    from adapters.adapt import disabled as disabled
    from adapters.budget import Plan as Plan
    from adapters.cloze import pseudo_perplexity as pseudo_perplexity
    from adapters.combine import CombineReport as CombineReport
    from adapters.combine import combine as combine
    from adapters.contracts import Adapted as Adapted
    from adapters.contracts import Strategy as Strategy
    from adapters.contracts import Task as Task
    from adapters.diff import Difference as Difference
    from adapters.diff import diff as diff
    from adapters.errors import AdaptersError as AdaptersError
    from adapters.errors import BackboneError as BackboneError
    from adapters.errors import ContractError as ContractError
    from adapters.errors import DataError as DataError
    from adapters.errors import DiskError as DiskError
    from adapters.errors import FolderError as FolderError
    from adapters.errors import MissingPackageError as MissingPackageError
    from adapters.errors import NumbersError as NumbersError
    from adapters.errors import RankError as RankError
    from adapters.errors import RequestError as RequestError
    from adapters.errors import SpentError as SpentError
    from adapters.export import export as export
    from adapters.extract import ExtractReport as ExtractReport
    from adapters.extract import extract as extract
    from adapters.merge import MergeReport as MergeReport
    from adapters.merge import merge as merge
    from adapters.merge import merge_on_disk as merge_on_disk
    from adapters.plan import plan as plan
    from adapters.predict import evaluate as evaluate
    from adapters.predict import predict as predict
    from adapters.profile import Profile as Profile
    from adapters.profile import inspect as inspect
    from adapters.push import push as push
    from adapters.readers import ExportReport as ExportReport
    from adapters.recipe import Recipe as Recipe
    from adapters.script import run_recipe as run_recipe
    from adapters.shared import Shared as Shared
    from adapters.storage import load as load
    from adapters.storage import save as save
    from adapters.sweep import Sweep as Sweep
    from adapters.tasks import TASKS as TASKS
    from adapters.trainer import Trainer as Trainer
    from adapters.validation import validate as validate


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'adapters' has no attribute {name!r}")
    value = getattr(import_module(f"adapters.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """`adapters.adapt` is the function, though the room it lives in has the same name (so have merge, predict)."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (isinstance(value, ModuleType) and name in _HOMES):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
