"""An adapter that was computed from others: factors and whole tensors written as an adapter folder like any other.

The model class is drawn without its weights, the strategy is resolved and applied to it, and the tensors must be the
ones that this strategy trains there: what is written opens with `load` as a trained adapter does, and trains on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapters import disk, facts, injection, progress, reading, shards
from adapters.anatomy import own_name
from adapters.blueprint import drawn
from adapters.changes import Changes
from adapters.errors import FolderError, NumbersError, RequestError, message
from adapters.manifest import CARD, FORMAT, WEIGHTS, refuse_foreign, seal
from adapters.quantize import Storage
from adapters.storage import strategy_of, task_of
from adapters.strategies.freeze import Freeze
from adapters.strategies.lora import Lora
from adapters.strategies.probe import Probe
from adapters.trial import tried
from adapters.vocabulary import of_manifest

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapters.contracts import Strategy
    from adapters.lowrank import Factors, FactorStack


def write(
    out: str | Path,
    like: Changes,
    base: Path,
    *,
    factors: Mapping[str, Factors],
    whole: Mapping[str, Tensor],
    made: Mapping[str, Any],
    notes: Sequence[str] = (),
    stacks: Mapping[str, FactorStack] | None = None,
) -> Path:
    """Write an adapter folder of computed tensors: LoRA where there are factors, `freeze` or `probe` where not.

    Args:
        out: the folder; new, empty, or an adapter of ours, which is replaced whole.
        like: the adapter whose backbone, task, head and processor it takes over.
        base: the backbone's folder.
        factors: by module path; the scale is 1.
        whole: by the backbone's own names: the head's tensors, and others that take the old ones' place; of a tensor
            that only grew by added tokens, the added entries.
        made: what the manifest says of how it was computed: at least "by" and "from".
        notes: remarks that belong to it.
        stacks: factors of stacks of experts, by name; the scale is 1.

    Returns:
        The folder.

    Raises:
        RequestError: nothing to hold; tensors that the model class does not have, or that no LoRA holds.
        FolderError: a tensor of another shape; a folder that holds something else.
        NumbersError: a tensor that is not finite.
        DiskError: the disk is full or fails; nothing is left behind.
    """
    target = Path(out).expanduser()
    refuse_foreign(target)
    with disk.staged(target) as stage:
        compose(stage, like, base, factors=factors, whole=whole, made=made, notes=notes, stacks=stacks)
    return target


def compose(
    stage: Path,
    like: Changes,
    base: Path,
    *,
    factors: Mapping[str, Factors],
    whole: Mapping[str, Tensor],
    made: Mapping[str, Any],
    notes: Sequence[str] = (),
    stacks: Mapping[str, FactorStack] | None = None,
) -> dict[str, Any]:
    """Write the adapter's files into an existing, empty folder; arguments and errors as for `write`.

    Returns:
        Its manifest.
    """
    document = like.document
    strategy, state, net = _resolved(like, base, factors, stacks or {}, whole)
    for name, tensor in state.items():
        if not bool(tensor.isfinite().all()):
            raise NumbersError(message("a computed tensor is not finite", where=name, remedy="Nothing was written."))
    with progress.Job("saving the adapter"):
        shards.save_tensors(stage / WEIGHTS, dict(sorted(state.items())), {"format": "pt", "holdfast": str(FORMAT)})
        backbone = document["backbone"]
        beside = facts.sidecars(
            strategy, of_manifest(document, str(like.folder)), backbone["name"], backbone["revision"]
        )
        elsewhere = reading.of(task_of(document, str(like.folder))).elsewhere  # peft would answer otherwise
        misread = next(filter(None, (injection.misread(net, config) for config in beside.values())), "")
        notes = [*notes, f"no adapter_config.json was written: {misread}"] if misread else notes
        for name, entry in ({} if elsewhere or misread else beside).items():
            shards.write_text(stage / name, json.dumps(entry, indent=2, sort_keys=True) + "\n")
        facts.hand_on(like.folder, document, stage)
        described = _manifest(document, strategy, state, made, notes)
        shards.write_text(stage / CARD, _card(described))
        seal(stage, described)
    return described


def copied(out: str | Path, like: Changes, *, made: Mapping[str, Any], notes: Sequence[str] = ()) -> Path:
    """Write an adapter as it is, strategy and tensors bit for bit, under a manifest that says what it was made of.

    Args:
        out, made, notes: as for `write`; `like` is the adapter.

    Raises:
        FolderError: a folder that holds something else.
        DiskError: the disk is full or fails; nothing is left behind.
    """
    target = Path(out).expanduser()
    refuse_foreign(target)
    with progress.Job("saving the adapter"), disk.writing(target), disk.staged(target) as stage:
        for name in like.document["files"]:
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            shards.copy(like.folder / name, stage / name)
        strategy = strategy_of(like.document, str(like.folder))
        described = _manifest(like.document, strategy, {}, made, notes)
        described |= {name: like.document[name] for name in ("strategy", "tensors")}
        shards.write_text(stage / CARD, _card(described))
        seal(stage, described)
    return target


def _resolved(
    like: Changes,
    base: Path,
    factors: Mapping[str, Factors],
    stacks: Mapping[str, FactorStack],
    whole: Mapping[str, Tensor],
) -> tuple[Strategy, dict[str, Tensor], PreTrainedModel]:
    """The strategy that trains exactly these tensors, they by their keys in the adapter file, and the model drawn."""
    document, where = like.document, str(like.folder)
    backbone = document["backbone"]
    if backbone.get("inside"):
        raise RequestError(
            message("the adapter holds its backbone", where=where, remedy="Take the adapter that it was merged from.")
        )
    task = task_of(document, where)
    print_ = drawn(base, task, backbone["load"])
    vocabulary = of_manifest(document, where)
    axes = dict(vocabulary.axes) if vocabulary is not None else {}
    beside = sorted(set(whole) - print_.head - set(axes))
    strategy: Strategy
    if factors or stacks:
        strategy = Lora.of_factors(factors, beside, stacks)
    elif beside:
        strategy = Freeze(pattern=tuple(f"^{name.replace('.', '[.]')}$" for name in beside))
    elif set(whole) & print_.head:
        strategy = Probe()
    else:
        raise RequestError(message("nothing is left for an adapter to hold", where=where))
    storage = Storage(backbone["quantization"])
    found = tried(print_.model, strategy, print_.head, print_.unread, reading.of(task), storage)
    strategy = found.strategy
    wanted: dict[str, tuple[str, torch.Size]] = {
        strategy.key(name): (own_name(name), parameter.shape)
        for name, parameter in found.ghost.named_parameters()
        if own_name(name) in found.names | (print_.head - print_.unread) and own_name(name) not in axes
    }
    state = cast("Lora", strategy).tensors(factors, stacks) if factors or stacks else {}
    state |= {key: whole[name] for key, (name, _) in wanted.items() if name in whole}
    grown = set(vocabulary.whole) if vocabulary is not None else set()
    odd = sorted(set(wanted) ^ set(state)) + sorted(set(whole) - {name for name, _ in wanted.values()} - set(axes))
    if odd:
        raise RequestError(
            message(
                "the tensors are not those that an adapter of this model holds",
                where=f"{type(print_.model).__name__}: {', '.join(odd[:3])}",
                expected=f"{len(wanted)} tensors",
                found=f"{len(state)}",
            )
        )
    for key, (name, shape) in wanted.items():
        if state[key].shape != shape and name not in grown:
            raise FolderError(
                message("a tensor of another shape", where=key, expected=tuple(shape), found=tuple(state[key].shape))
            )
    if vocabulary is not None:
        state |= {vocabulary.key(strategy, name): whole[name] for name in axes}
    return strategy, {key: tensor.detach().contiguous().cpu() for key, tensor in state.items()}, print_.model


def _manifest(
    document: Mapping[str, Any],
    strategy: Strategy,
    state: Mapping[str, Tensor],
    made: Mapping[str, Any],
    notes: Sequence[str],
) -> dict[str, Any]:
    """The manifest that it is like, with what was computed in the place of what was trained."""
    return {
        **{name: value for name, value in document.items() if name not in ("files", "digest")},
        "strategy": {"name": strategy.name, "options": facts.options_of(strategy)},
        "tensors": facts.described(dict(sorted(state.items()))),
        "data": {},
        "metrics": {},
        "settings": {},
        "notes": list(notes),
        "reproducible": False,
        "why_not_reproducible": f"it was computed, not trained: {made['by']}",
        "made": facts.plain(dict(made)),
        "holdfast": facts.version_of("holdfast"),
        "versions": facts.versions(),
    }


def _card(document: Mapping[str, Any]) -> str:
    made, backbone = document["made"], document["backbone"]
    name = Path(backbone["name"]).name if backbone["name"] else backbone["model_class"]
    lines = [
        f"# {document['strategy']['name']} adapter for {name}, computed by `adapters {made['by']}`",
        "",
        f"Task: {document['task']['name']}. It was not trained, but computed from:",
        "",
        *(f"- {source}" for source in made["from"]),
        "",
        "Nothing was measured on rows when it was written. `adapters evaluate` does that; `adapters inspect` says what "
        "it holds.",
        "",
        *(f"- {note}" for note in document["notes"]),
        "",
        "```python",
        "import adapters",
        "",
        'adapted = adapters.load("this folder")',
        "```",
        "",
    ]
    return "\n".join(lines)
