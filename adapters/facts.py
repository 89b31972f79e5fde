"""What an adapter folder will say of a live adaptation: strategy, task, backbone, tensors, settings, versions."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import shards
from adapters.contracts import Adapted, Record, Strategy, Vocabulary
from adapters.errors import RequestError, message
from adapters.manifest import FORMAT, VOCABULARIES, WEIGHTS
from adapters.schema import load_fault

if TYPE_CHECKING:
    from torch import Tensor

SIDECAR = "adapter_config.json"  # by which peft and the servers read an adapter
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "safetensors")


def sidecars(
    strategy: Strategy, vocabulary: Vocabulary | None, backbone: str | None, revision: str | None
) -> dict[str, dict[str, Any]]:
    """The JSON files by which peft and the servers read an adapter, with the backbone that they ask for."""
    return {
        name: {
            **document,
            **_trainable_tokens(vocabulary, document),
            "base_model_name_or_path": backbone or None,
            "revision": revision or None,
        }
        for name, document in strategy.sidecars().items()
    }


def _trainable_tokens(vocabulary: Vocabulary | None, document: Mapping[str, Any]) -> dict[str, Any]:
    """peft's option for added tokens, which its LoRA has, so that plain peft reads the rows."""
    if vocabulary is None or document.get("peft_type") != "LORA":
        return {}
    weights = [name for name in vocabulary.axes if name.endswith(".weight")]
    return {"trainable_token_indices": {name.split(".")[-2]: list(vocabulary.ids) for name in weights}}


def processor_files(document: Mapping[str, Any]) -> list[str]:
    """What an adapter folder lists beside its tensors, their sidecar and a backbone in it: the processor's files."""
    backbone = document["backbone"]
    inside = f"{backbone['name']}/" if backbone.get("inside") else None
    return [
        name
        for name in document["files"]
        if name not in (WEIGHTS, SIDECAR) and not (inside is not None and name.startswith(inside))
    ]


def hand_on(adapter: Path, document: Mapping[str, Any], stage: Path) -> None:
    """Copy an adapter's processor into a folder that is being written."""
    for name in processor_files(document):
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        shards.copy(adapter / name, stage / name)


def described(state: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and digest of each tensor of an adapter file."""
    return {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "sha256": hashlib.sha256(shards.tensor_bytes(tensor)).hexdigest(),
        }
        for name, tensor in state.items()
    }


def trained(record: Record, state: Any, loss: float, seconds: float, read: Mapping[str, float]) -> None:
    """Take down what a run was.

    Args:
        record: of the adaptation.
        state: transformers' own, at the end.
        loss: the mean over its steps.
        seconds: that they took.
        read: tokens, their rate and padding.
    """
    record.metrics["train"] = {
        "loss": loss,
        "epochs": float(state.epoch or 0),
        "steps": int(state.global_step),
        "seconds": round(seconds, 2),
        **read,
    }


def versions() -> dict[str, str | None]:
    """Python's and those of the packages that made an adapter."""
    return {"python": platform.python_version()} | {name: version_of(name) for name in PACKAGES}


def plain(value: Any) -> Any:
    """A strategy's or task's fields as JSON holds them: tuples are lists."""
    return json.loads(json.dumps(value))


def options_of(instance: Any) -> dict[str, Any]:
    """The fields of a strategy or task that differ from their defaults, as JSON holds them."""
    kept = {}
    for entry in dataclasses.fields(instance):
        value = getattr(instance, entry.name)
        default = entry.default_factory() if entry.default_factory is not dataclasses.MISSING else entry.default
        if value != default:
            kept[entry.name] = plain(value)
    return kept


def of(adapted: Adapted, state: Mapping[str, Tensor]) -> dict[str, Any]:
    from adapters.anatomy import class_name

    record = adapted.record
    prefix = adapted.fingerprint.prefix
    config = {**adapted.task.config(), **record.config}
    saved_as = {}
    for name in adapted.names.values():
        bare = name.removeprefix(f"{prefix}.") if prefix else name
        if bare in adapted.fingerprint.tensors and name != f"{prefix}.{bare}":
            saved_as[bare] = name
    return {
        "format": FORMAT,
        "holdfast": version_of("holdfast"),
        "strategy": {"name": adapted.strategy.name, "options": options_of(adapted.strategy)},
        "task": {"name": adapted.task.name, "options": options_of(record.task or adapted.task)},
        "backbone": {
            "name": record.backbone or None,
            "revision": record.revision or None,
            "model_class": class_name(adapted.model),
            "quantization": adapted.storage.quantization,
            "packed": _packed(adapted),
            "dtype": str(adapted.model.dtype).removeprefix("torch."),
            "load": {name: value for name, value in record.load.items() if not load_fault({name: value})},
            "config": plain({key: _string_keys(value) for key, value in config.items()}),
            "names": {memory: disk for memory, disk in sorted(adapted.names.items()) if memory != disk},
            "saved_as": saved_as,
            "bytes": sum(p.numel() * p.element_size() for p in adapted.model.parameters()),
            "fingerprint": adapted.fingerprint.to_json(),
        },
        "head": sorted(adapted.head),
        "new": [name for name in record.new if name not in record.unread],
        "tensors": described(state),
        "vocabulary": adapted.vocabulary.to_json() if adapted.vocabulary is not None else None,
        "seed": record.seed,
        "data": record.data,
        "metrics": record.metrics,
        "settings": record.settings,
        "notes": record.notes,
        "reproducible": bool(record.recipe),
        **({} if record.recipe else {"why_not_reproducible": record.why_not}),
        "versions": versions(),
    }


def _packed(adapted: Adapted) -> dict[str, bool]:
    """The weights kept in 4 bits, by their own names -> whether the backbone keeps them as (in, out)."""
    from adapters.anatomy import linear_map, own_name
    from adapters.quantize import packed_modules

    found = {}
    for path, module in packed_modules(adapted.model).items():
        described = linear_map(path, module)
        found[own_name(f"{path}.weight")] = described is not None and described.transposed
    return found


def _string_keys(value: Any) -> Any:
    return {str(key): entry for key, entry in value.items()} if isinstance(value, Mapping) else value


@functools.cache  # asked at every save, and slow: it parses the package's metadata
def version_of(package: str) -> str | None:
    """A package's version; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def without_code(folder: Path) -> None:
    """Take the names of code out of a saved processor's settings: it is one of transformers' own and needs none.

    Raises:
        RequestError: the processor is code of its own.
    """
    code = sorted(file.name for file in folder.rglob("*.py"))
    if code:
        raise RequestError(
            message(
                "the processor brings code, which an adapter folder never holds",
                where=", ".join(code),
                remedy="Use a processor that transformers itself has.",
            )
        )
    for file in sorted(folder.glob("*.json")):
        settings = json.loads(file.read_text(encoding="utf-8")) if file.name not in VOCABULARIES else None
        if isinstance(settings, dict) and settings.pop("auto_map", None) is not None:
            file.unlink()
            shards.write_text(file, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def keep_input_names(processor: Any, folder: Path) -> None:
    """transformers' save leaves out which inputs a live tokenizer was told to make: the reload would make others."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    names = list(processor.model_input_names)
    if names != config.get("model_input_names", list(type(processor).model_input_names)):
        text = json.dumps({**config, "model_input_names": names}, indent=2, sort_keys=True, ensure_ascii=False)
        file.unlink()  # still staged: nothing reads it yet
        shards.write_text(file, text + "\n")
