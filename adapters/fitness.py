"""Whether a backbone fits a task and a strategy, told from its config and file headers alone, without torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

from adapters import backbones, installed, loadoptions, places, shards
from adapters.adapt import Row
from adapters.errors import FolderError, RequestError, message, nearest
from adapters.tasks import TASKS, headless

DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
DECODER_DEPTH = ("num_decoder_layers", "decoder_layers", *DEPTH)  # blocks are counted from the top: the decoder's
POSITIONS = ("max_position_embeddings", "n_positions")
CONV1D = ("gpt2", "openai-gpt", "imagegpt")  # their weights are (in, out)
QUANTIZATIONS = ("nf4", "fp4")


@final
@dataclass(frozen=True)
class Sketch:
    """What is known of a backbone before it is opened.

    Attributes:
        name: as it was given.
        folder: where its files lie.
        config: its config.json.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """The `model_type`."""
        return str(self.config.get("model_type", ""))

    @property
    def two_sided(self) -> bool:
        """Whether it is an encoder-decoder."""
        said = self.config.get("is_encoder_decoder")
        return said if isinstance(said, bool) else self.kind in installed.heads("AutoModelForSeq2SeqLM")

    @property
    def depth(self) -> int | None:
        """How many blocks it has; of an encoder-decoder the decoder's."""
        return self._number(DECODER_DEPTH if self.two_sided else DEPTH)

    @property
    def positions(self) -> int | None:
        """How many tokens a row may have."""
        return self._number(POSITIONS)

    @cached_property
    def tensors(self) -> frozenset[str]:
        """The tensors of its safetensors files; empty where it has none, or they cannot be read."""
        if not any((self.folder / name).exists() for name in (shards.INDEX, shards.WEIGHTS)):
            return frozenset()
        try:
            return frozenset(shards.read_directory(self.folder))
        except FolderError:
            return frozenset()

    def _number(self, names: Collection[str]) -> int | None:
        inner = self.config.get("text_config")
        for part in (self.config, inner if isinstance(inner, Mapping) else {}):
            for name in names:
                if type(part.get(name)) is int:
                    return int(part[name])
        return None


def sketch(name: str, load: Mapping[str, Any]) -> Sketch | None:
    """What a backbone's folder says, or the hub cache's; None for an id whose files are not on this machine.

    Raises:
        FolderError: a damaged or dangerous folder.
        RequestError: a folder that is not there or holds no model.
    """
    loadoptions.check(load, name)
    folder: Path | None = Path(name).expanduser()
    if folder is not None and not folder.is_dir():
        if places.is_path(name):
            raise RequestError(
                message("there is no such model folder", where=name, remedy="Give a folder that is there, or a hub id.")
            )
        folder = backbones.local_folder(name, load)
    if folder is None:
        return None
    if not (folder / "config.json").exists():
        raise RequestError(message("not a model folder", where=name, expected="a config.json in it"))
    if places.is_path(name) or Path(name).is_dir():
        backbones.check_folder(folder)
    return Sketch(name, folder, shards.read_json(folder / "config.json", backbones.MAX_CONFIG))


def faults(
    found: Sketch, task: Any, row: Row, options: Mapping[str, Any], load: Mapping[str, Any] | None = None
) -> Iterator[str]:
    """Why this backbone cannot be adapted like that, as far as that can be known here.

    Args:
        found: the backbone.
        task: a task's class.
        row: a strategy's row.
        options: of both.
        load: what `from_pretrained` takes.
    """
    trusted = bool((load or {}).get("trust_remote_code"))
    if not found.kind and not trusted:
        where = str(found.folder / "config.json")
        yield message("the config names no kind of model", where=where, expected="a 'model_type'")
        return
    tables = {other.auto_class: installed.heads(other.auto_class) for other in TASKS.values()}
    known = any(found.kind in table for table in tables.values())
    if not known and not trusted and found.kind not in installed.model_types():
        yield message(
            f"the installed transformers knows no model of type {found.kind!r}",
            where=found.name,
            remedy="Upgrade transformers; or, for a model with code of its own that you trust, say "
            f"load: {{trust_remote_code: true}}. {nearest(found.kind, installed.model_types())}",
        )
        return
    fault = "" if trusted else headless(found.kind, task, tables, found.name)
    if fault:
        yield fault
    elif task.auto_class == "AutoModelForMaskedLM" and found.two_sided:
        what = "an encoder-decoder writes texts anew instead of filling masks in"
        yield message(what, where=found.name, remedy="Take the task denoising.")
    if lacking := backbones.processor_fault(task.processor, found.folder, found.name):
        yield lacking
    yield from _strategy_faults(found, task, row)
    yield from _count_faults(found, options)


def _strategy_faults(found: Sketch, task: Any, row: Row) -> Iterator[str]:
    """What the strategy needs and the backbone has not."""
    where = f"{row.method or row.strategy.name} on {found.name}"
    if row.needs == "a head" and task.auto_class in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
        remedy = "Take lora, or freeze for the last blocks."
        yield message("there is no head to train: the output layer belongs to the backbone", where=where, remedy=remedy)
    if row.needs == "biases" and found.tensors and not any(name.endswith("bias") for name in found.tensors):
        yield message("there are no biases to train", where=where, remedy="Take lora.")
    groups, depth = found.config.get("num_hidden_groups"), found.depth
    if row.needs == "own blocks" and isinstance(groups, int) and depth is not None and groups < depth:
        what = "the backbone's blocks share one set of weights: the last cannot train apart from the first"
        yield message(what, where=where, remedy="Take lora, bitfit, probe or full.")
    if row.needs == "linear maps" and found.kind in CONV1D:
        yield message("peft's method does not take this model's Conv1D layers", where=where, remedy="Take lora or ia3.")


def _count_faults(found: Sketch, options: Mapping[str, Any]) -> Iterator[str]:
    """Numbers of blocks that the backbone has not."""
    depth = found.depth
    if depth is None:
        return
    for name in ("layers", "layer"):
        value = options.get(name)
        if type(value) is int and value > depth:
            yield message("a wrong number of blocks", where=f"options: {name}", expected=f"1 to {depth}", found=value)
    asked = options.get("layers_to_transform")
    listed = [asked] if type(asked) is int else asked if isinstance(asked, list) else []
    odd = [value for value in listed if type(value) is int and value >= depth]
    if odd:
        where = "options: layers_to_transform"
        yield message("blocks that are not there", where=where, expected=f"0 to {depth - 1}", found=odd)


def package_faults(task: Any, quantization: Any) -> Iterator[str]:
    """Packages of extras that this run needs and that are not installed."""
    needed = [("bitsandbytes", "qlora", "4 bits need bitsandbytes")] if quantization is not None else []
    if task.processor == "AutoImageProcessor":
        needed.append(("PIL", "vision", "pictures need Pillow"))
    for package, extra, what in needed:
        if find_spec(package) is None:
            yield message(what, remedy=f'Install it: pip install "holdfast[{extra}]".')
