"""What other readers make of the files that they are given: the update of each module, computed by their own rules.

Written from what their loaders do, apart from everything here that writes: so a scale, a name or a layout that they
would read otherwise shows as another number. vLLM, TGI and llama.cpp's converter read peft's folder; llama.cpp's loader
reads a GGUF file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from adapters import shards
from adapters.errors import FolderError, MissingPackageError, message

if TYPE_CHECKING:
    from torch import Tensor

MODULE = re.compile(r"(base_model\.model\.)?(?P<path>.+)\.lora_(?P<side>[AB])\.weight")
TABLE = re.compile(r"(base_model\.model\.)?(?P<path>.+)\.lora_embedding_(?P<side>[AB])")
NORMS = re.compile(r"_layernorm|\.norm")


@final
class Products(Mapping[str, "Tensor"]):
    """Updates of shape (out, in), float32, each computed when it is looked at: together they are as large as the model.

    Args:
        factors: name -> down, up and scale of scale x up @ down.
    """

    def __init__(self, factors: Mapping[str, tuple[Tensor, Tensor, float]]) -> None:
        self.factors = factors

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one."""
        down, up, scale = self.factors[name]
        return up[start:stop] @ down * scale

    def __getitem__(self, name: str) -> Tensor:
        """All of one."""
        return self.rows(name, 0, len(self.factors[name][1]))

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self.factors)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.factors)


@final
@dataclass(frozen=True)
class Served:
    """What a reader has of an adapter.

    Attributes:
        deltas: module path, or llama.cpp's tensor name -> what is added to its weight, shape (out, in), float32.
        whole: tensors that it puts in the place of the model's, by their names in the file.
        ignored: tensors that it leaves out without a word.
    """

    deltas: Products
    whole: Mapping[str, Tensor]
    ignored: tuple[str, ...]


def vllm(folder: Path, *, max_rank: int = 16, heads: bool = False) -> Served:
    """vLLM before it read patterns: one scale by r and lora_alpha (rslora known), every tensor a factor, or a refusal.

    Args:
        folder: peft's.
        max_rank: its --max-lora-rank.
        heads: it takes `classifier` and `score` in modules_to_save, as newer versions do.

    Raises:
        FolderError: what it refuses.
    """
    config, tensors = _peft(folder)
    known = {"classifier", "score"} if heads else set[str]()
    faults = {
        "modules_to_save": set(config.modules_to_save or ()) - known,
        "DoRA": config.use_dora,
        "bias": config.bias != "none",
        f"a rank above {max_rank}": config.r > max_rank,
        "no target_modules": config.target_modules is None,
    }
    if any(faults.values()):
        raise _refused("vLLM", folder, ", ".join(what for what, there in faults.items() if there))
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    pairs, rest = _pairs(tensors)
    whole = {name: tensor for name, tensor in rest.items() if name.split(".")[-2] in known}
    if set(rest) - set(whole):
        raise _refused("vLLM", folder, f"{sorted(set(rest) - set(whole))[0]} is no factor")
    return Served(Products({path: (*pair, scale) for path, pair in pairs.items()}), whole, ())


def tgi(folder: Path, names: Collection[str]) -> Served:
    """TGI: one scale (rslora known), factors under the names that it asks for, a kind only where no block lacks it.

    Args:
        folder: peft's.
        names: of the model's weights that it asks about: of all blocks.
    """
    config, tensors = _peft(folder)
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    deltas, used = dict[str, tuple["Tensor", "Tensor", float]](), set[str]()
    for of_a_kind in kinds.values():
        sides = {name: [f"base_model.model.{name}.lora_{side}.weight" for side in "AB"] for name in of_a_kind}
        if all(key in tensors for pair in sides.values() for key in pair):
            for name, (first, second) in sides.items():
                deltas[name] = tensors[first].float(), tensors[second].float(), scale
                used |= {first, second}
    return Served(Products(deltas), {}, tuple(sorted(set(tensors) - used)))


def converted(folder: Path) -> Served:
    """llama.cpp's converter: lora_alpha over the rank that each tensor has, whatever else the config says; no more.

    Raises:
        FolderError: a tensor at which it stops.
    """
    config, tensors = _peft(folder)
    pairs, rest = _pairs(tensors)
    odd = [name for name in rest if ".base_layer.weight" not in name and not NORMS.search(name)]
    if odd:
        raise _refused("llama.cpp's converter", folder, f"{odd[0]} is no factor")
    alpha = config.lora_alpha
    deltas = {path: (down, up, alpha / up.shape[1]) for path, (down, up) in pairs.items()}
    return Served(Products(deltas), {}, tuple(rest))


def gguf(file: Path) -> Served:
    """llama.cpp's loader: adapter.lora.alpha over each tensor's rank, or 1 where alpha is 0; by its tensor names.

    Raises:
        FolderError: no LoRA adapter, a tensor without its pair, or one that it does not know.
    """
    import torch

    reader = gguf_package().GGUFReader(file)
    said = {key: field.contents() for key, field in reader.fields.items()}
    if (said.get("general.type"), said.get("adapter.type")) != ("adapter", "lora"):
        raise _refused("llama.cpp", file, f"a file of type {said.get('general.type')!r}")
    alpha = float(said.get("adapter.lora.alpha", 0.0))
    sides: dict[str, dict[str, Tensor]] = {}
    for tensor in reader.tensors:
        name, dot, side = tensor.name.rpartition(".lora_")
        if not dot or side not in "ab":
            raise _refused("llama.cpp", file, f"{tensor.name} is no factor")
        # The shape in the file counts from the innermost dimension.
        values = torch.tensor(tensor.data).view(*reversed([int(size) for size in tensor.shape]))
        sides.setdefault(name, {})[side] = values.float()
    broken = [name for name, pair in sides.items() if set(pair) != {"a", "b"}]
    if broken:
        raise _refused("llama.cpp", file, f"{broken[0]} has one factor")
    deltas = {name: (pair["a"], pair["b"], alpha / pair["b"].shape[1] or 1.0) for name, pair in sides.items()}
    return Served(Products(deltas), {}, ())


def gguf_package() -> Any:
    """The package that reads and writes GGUF.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import gguf as package
    except ImportError as fault:
        raise MissingPackageError(
            message("GGUF files need the package gguf", where="--to llama.cpp", remedy="pip install 'holdfast[gguf]'.")
        ) from fault
    return package


READERS: dict[str, Callable[..., Served]] = {"vllm": vllm, "tgi": tgi, "llama.cpp": converted}


@final
@dataclass(frozen=True)
class _Config:
    """What the readers look at in adapter_config.json; they drop every other key."""

    r: int
    lora_alpha: float
    target_modules: Any = None
    bias: str = "none"
    modules_to_save: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False


def _peft(folder: Path) -> tuple[_Config, dict[str, Tensor]]:
    said = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    config = _Config(**{name: value for name, value in said.items() if name in _Config.__dataclass_fields__})
    slots, _ = shards.read_header(folder / "adapter_model.safetensors")
    return config, {name: shards.read_tensor(slot) for name, slot in slots.items()}


def _pairs(tensors: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Factors by module path, as (down, up) in float32; and every other tensor."""
    sides: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for name, tensor in tensors.items():
        found = MODULE.fullmatch(name) or TABLE.fullmatch(name)
        if found is None:
            rest[name] = tensor
        else:
            sides.setdefault(found["path"], {})[found["side"]] = tensor.float()
    return {path: (pair["A"], pair["B"]) for path, pair in sides.items() if len(pair) == 2}, rest


def _refused(reader: str, where: Path, found: str) -> FolderError:
    return FolderError(message(f"{reader} refuses it", where=str(where), found=found))
