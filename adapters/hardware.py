"""The hardware that a recipe needs: what of it only a GPU has, and how far a run of it fits a machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from adapters.budget import Line, Plan, gigabytes
from adapters.devices import CARDS, CONTEXT, MIB, here
from adapters.engines import FSDP, ZERO
from adapters.errors import AdaptersError, RequestError, message
from adapters.plan import MANY, plan, quiet

if TYPE_CHECKING:
    from datasets import Dataset

    from adapters.contracts import Task

NEARER: Final = (
    "qlora",
    "probe",
)  # tried where the recipe's own strategy does not fit: the least weights, the least steps
SHOWN: Final = 3  # cards that a line lists
LOOKED_AT: Final = 256  # rows
UNKEPT: Final = {"prefix_cache": False, "warm_head": False}  # of a stream: what needs all rows before they are learnt
ENGINES: Final = ("fsdp", "deepspeed")
STREAM: Final = "a stream: nothing of its rows is kept, and no head is solved on them"


def needs(recipe: Mapping[str, Any]) -> list[str]:
    """The settings of a recipe that only a GPU has, each as it is written; without torch.

    Args:
        recipe: its fields as plain data.
    """
    train, load = recipe.get("train") or {}, recipe.get("load") or {}
    found = [f"train.{name}: true" for name in ("bf16", "fp16", "tf32") if train.get(name) is True]
    if train.get("use_cpu") is True:
        found = [entry for entry in found if not entry.startswith("train.bf16")]
    if str(train.get("optim", "")).startswith("paged_"):
        found.append(f"train.optim: {train['optim']}")
    found += [f"train.{name}" for name in MANY if train.get(name) and not name.startswith(ENGINES)]  # CPUs have it too
    if str(load.get("attn_implementation", "")).startswith("flash_attention"):
        found.append(f"load.attn_implementation: {load['attn_implementation']}")
    placed = load.get("device_map")
    if placed is not None and _on_gpu(placed):
        found.append(f"load.device_map: {placed}")
    return found


def _on_gpu(placed: Any) -> bool:
    """Whether a device map names a GPU; "auto" and its kin take what there is."""
    values = list(placed.values()) if isinstance(placed, Mapping) else [placed]
    return any(isinstance(value, int) or str(value).startswith("cuda") for value in values)


def without(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without what only a GPU has."""
    train = dict(recipe.get("train") or {})
    for name in ("bf16", "fp16", "tf32", *MANY):
        train.pop(name, None)
    optim = str(train.get("optim", ""))
    if optim.startswith("paged_"):
        train["optim"] = {"paged_adamw_32bit": "adamw_torch"}.get(optim, optim.removeprefix("paged_"))
    load = dict(recipe.get("load") or {})
    if "device_map" in load and _on_gpu(load["device_map"]):
        load.pop("device_map")
    if str(load.get("attn_implementation", "")).startswith("flash_attention"):
        load.pop("attn_implementation")
    return {**recipe, "train": train, "load": load}


def of_recipe(
    recipe: Mapping[str, Any],
    strategies: str | Sequence[str] | None = None,
    *,
    labels: Any = None,
    rows: int | None = None,
    length: int | None = None,
    device: str | None = None,
    memory: str | float | None = None,
    processes: int = 1,
    sharding: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Plan:
    """The plan of a recipe.

    Args:
        recipe: its fields as plain data.
        strategies: others than its own; their options are those that they take of the recipe's.
        labels: the label names, where the rows have told them.
        rows, length: of the training rows, where they are known.
        device, memory, processes, say: as for `plan`.
        sharding: as for `plan`; None for the engine that the recipe asks for, if any.

    Raises:
        RequestError: as `plan` does.
    """
    chosen: Any = strategies if strategies is not None else recipe.get("strategy", "lora")
    streamed = bool(recipe.get("streaming"))
    train = recipe.get("train") or {}
    engine = (FSDP if train.get("fsdp") else ZERO if train.get("deepspeed") else None) if processes > 1 else None
    found = plan(
        recipe["model"],
        chosen,
        task=recipe.get("task", "text-classification"),
        labels=recipe.get("labels") or labels,
        quantization=recipe.get("quantization"),
        load=recipe.get("load") or {},
        length=length,
        rows=rows,
        args={**train, **(UNKEPT if streamed else {})},
        device=device,
        memory=memory,
        processes=processes,
        sharding=sharding or engine,
        say=say,
        **(recipe.get("options") or {}),
    )
    return replace(found, notes=(*found.notes, STREAM)) if streamed else found


def longest(recipe: Mapping[str, Any], task: Task, rows: Dataset) -> int | None:
    """Tokens of the longest training row as the task prepares it, by the backbone's own tokenizer.

    Only the `LOOKED_AT` rows with the most characters are prepared. None where there is no tokenizer, or no text.
    """
    from adapters import blueprint
    from adapters.backbones import open_processor, plan_padding

    if task.processor != "AutoTokenizer" or not len(rows):
        return None
    try:
        processor = open_processor(task.processor, str(recipe["model"]), {})
    except (AdaptersError, OSError, ValueError, KeyError, TypeError):
        return None
    drawn = blueprint.drawn(recipe["model"], task, recipe.get("load") or {})
    padding = plan_padding(drawn.model, processor)
    if padding is not None:
        padding.settle(drawn.model, processor)
    size = sorted(range(len(rows)), key=lambda row: len(str(rows[row])), reverse=True)
    with quiet():
        prepared, _ = task.prepare(rows.select(size[:LOOKED_AT]), processor, drawn.model, labelled=True)
    return max(prepared["length"]) if len(prepared) else None


def refuse_absent(recipe: Mapping[str, Any], labels: Any = None) -> None:
    """Refuse a recipe that asks for a GPU where there is none, with what it would need and the nearest that fits here.

    Raises:
        RequestError: naming the settings, the memory, cards that have it, and what to change.
    """
    asked = needs(recipe)
    if not asked or here() != "cpu":
        return
    what = "this recipe needs a GPU, and there is none here"
    try:
        there = of_recipe(recipe, labels=labels, device="h200").lines[0]
        expected = _wanted(there)
        remedy = _nearest(recipe, asked, labels)
    except AdaptersError as fault:  # a backbone that is not at hand: what it takes cannot be told
        expected, remedy = "a CUDA device", f"What it would take cannot be told: {fault}"
    raise RequestError(message(what, where=", ".join(asked), expected=expected, found="a CPU alone", remedy=remedy))


def _wanted(line: Line) -> str:
    if line.refused:
        return f"a CUDA device; and {line.refused}"
    need = int(1.1 * line.peak) + CONTEXT
    cards = sorted((mib, name) for name, (mib, _) in CARDS.items() if mib * MIB >= need)
    named = ", ".join(name for _, name in cards[:SHOWN]) or "no single card: spread it over several (FSDP)"
    return f"{gigabytes(line.peak)} of GPU memory at the peak of tensors ({named})"


def _nearest(recipe: Mapping[str, Any], asked: Sequence[str], labels: Any) -> str:
    """What of it fits this machine: the recipe itself without those settings, a smaller batch, another strategy."""
    plain = without(recipe)
    own = str(recipe.get("strategy", "lora"))
    smallest: Line | None = None
    for name in dict.fromkeys((own, *NEARER)):
        here_too = {**plain, "quantization": None} if name != own else plain
        known: Any = here_too if name == own else {**here_too, "options": {}}
        try:
            line = of_recipe(known, name, labels=labels, device="cpu").lines[0]
        except AdaptersError:
            continue
        if line.refused:
            continue
        if smallest is None or line.peak < smallest.peak:
            smallest = line
        rows = min(line.batch, line.largest or 0)
        if not rows or not line.largest_evaluated:
            continue
        changes = [] if name == own else [f"strategy: {name}"]
        if rows < line.batch:
            changes.append(f"train.per_device_train_batch_size: {rows}")
        if line.largest_evaluated < line.evaluated:
            changes.append(f"train.per_device_eval_batch_size: {line.largest_evaluated}")
        so = f" and with {', '.join(changes)}" if changes else ""
        left_out = ", ".join(entry.partition(":")[0] for entry in asked)
        return f"The nearest that fits here: {name} without {left_out}{so} ({gigabytes(line.peak)} planned)."
    least = f" (the least is {gigabytes(smallest.peak)}, {smallest.strategy})" if smallest else ""
    return f"Nothing of this model fits this machine{least}: take a smaller backbone, or a machine with a GPU."
