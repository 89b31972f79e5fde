"""What a merge makes of each tensor of a checkpoint, planned from headers and the adapter alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from adapters import shards
from adapters.errors import BackboneError, FolderError, RequestError, message, nearest
from adapters.shards import Slot

if TYPE_CHECKING:
    from adapters.edits import Edit


WEIGHT_DTYPES = ("float32", "bfloat16", "float16", "float64")


@final
@dataclass(frozen=True)
class Step:
    """One tensor of the output: where it comes from, what happens to it, how it is written."""

    name: str
    source: Slot | None
    plain: str
    edit: Edit | None
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return shards.nbytes(self.dtype, self.shape)


def plan(
    document: Mapping[str, Any],
    edits: Mapping[str, Edit],
    slots: Mapping[str, Slot],
    dtype: str | None,
    where: str,
    left_out: Collection[str] = (),
    *,
    original: bool = False,
) -> list[Step]:
    """Every tensor of the output in the order of the backbone's files, named as this model class saves it.

    Args:
        document: the adapter's manifest; edits: by the backbone's own names.
        slots: the backbone's tensors; dtype: of the output, None for each tensor's own.
        where: for messages.
        left_out: the backbone's tensors that the output does not have, by the fingerprint's names.
        original: put an adapter that was trained on packed weights onto those that were packed.
    """
    backbone = document["backbone"]
    prefix = backbone["fingerprint"]["prefix"]
    names: Mapping[str, str] = backbone["names"]
    saved_as: Mapping[str, str] = backbone["saved_as"]
    known = set(backbone["fingerprint"]["tensors"])
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise RequestError(message(f"unknown dtype {dtype!r}", where="dtype", remedy=nearest(dtype, WEIGHT_DTYPES)))
    edits = dict(edits) if original else _on_packed(backbone, edits)
    pending = {names.get(name, name): edit for name, edit in edits.items()}
    head = {names.get(name, name) for name in document["head"]}
    grown = _grown(document, names)
    steps: list[Step] = []
    covered = set()
    for disk_name, slot in slots.items():
        plain = _plain_of(disk_name, prefix, known, names)
        name = saved_as.get(plain, f"{prefix}.{plain}" if prefix else plain)
        if disk_name in head:
            continue  # the adapter brings its own, of another size perhaps
        edit = pending.pop(name, None) or pending.pop(disk_name, None)
        if plain not in known and edit is None:
            continue  # heads that the adapted model class does not have
        if plain in covered:
            raise FolderError(message("the backbone holds a tensor twice", where=f"{where}: {disk_name}"))
        covered.add(plain)
        if plain in left_out:
            continue  # blocks above the one that the head reads
        floating = "float" in slot.dtype
        steps.append(
            Step(
                name if plain in known else disk_name,
                slot,
                plain if plain in known else "",
                edit,
                dtype if dtype and floating else slot.dtype,
                _shape(slot.shape, grown.get(name, grown.get(disk_name))),
            )
        )
    missing = sorted(known - covered)
    if missing:
        raise BackboneError(
            message(
                "the base lacks tensors of the adapter's backbone",
                where=where,
                found=f"{len(missing)} missing, {missing[0]} first",
                remedy="Give the folder of the backbone that the adapter was trained on.",
            )
        )
    like = dtype or next((step.dtype for step in steps if "float" in step.dtype), "float32")  # counters are integers
    foreign = sorted(set(pending) - head)
    if foreign:
        raise BackboneError(
            message(
                "the base does not hold tensors that the adapter changes",
                where=where,
                found=f"{len(foreign)} not there, {foreign[0]} first",
                remedy="Give the folder of the backbone that the adapter was trained on.",
            )
        )
    for name, edit in pending.items():
        new = edit(None)  # only a replacement can create a tensor; any other edit refuses
        steps.append(Step(name, None, "", edit, like, tuple(new.shape)))
    return steps


def _grown(document: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """The tensors that added tokens make longer: name on disk -> axis, entries."""
    vocabulary = document.get("vocabulary") or {"axes": {}, "whole": {}, "size": 0}
    axes = {**vocabulary["axes"], **vocabulary["whole"]}
    return {names.get(name, name): (axis, vocabulary["size"]) for name, axis in axes.items()}


def _shape(old: tuple[int, ...], grown: tuple[int, int] | None) -> tuple[int, ...]:
    if grown is None:
        return old
    axis, size = grown
    return (*old[:axis], size, *old[axis + 1 :])


def _on_packed(backbone: Mapping[str, Any], edits: Mapping[str, Edit]) -> dict[str, Edit]:
    """The edits, preceded by the trip through 4 bits wherever the adapter was trained on packed weights."""
    kind = backbone["quantization"]
    if kind is None:
        return dict(edits)
    from adapters.roundtrip import RoundTrip

    packed = {
        name: RoundTrip(kind, backbone["dtype"], transposed, edits.get(name))
        for name, transposed in backbone["packed"].items()
    }
    return {**edits, **packed}


def _plain_of(disk_name: str, prefix: str, known: set[str], names: Mapping[str, str]) -> str:
    """The fingerprint's name of a tensor on disk: with or without the base model's prefix, or an older spelling."""
    bare = disk_name.removeprefix(f"{prefix}.") if prefix else disk_name
    if bare in known:
        return bare
    # Checkpoints from before 2019 spell LayerNorm's parameters as TensorFlow did; transformers renames them on load.
    modern = bare.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return modern if modern in known else bare


# ---------------------------------------------------------------------- the fingerprint


def refuse_other(step: Step, prints: Mapping[str, Any]) -> None:
    """Before anything is read: the recorded shape; and where dtypes differ, the recorded samples."""
    from adapters.fingerprint import Fingerprint, TensorPrint, differences, print_of_slot

    if not step.plain or step.source is None:
        return
    recorded = TensorPrint.from_json(prints[step.plain])
    if recorded.shape != step.source.shape:
        raise _another(step)
    if recorded.dtype == step.source.dtype and recorded.hash:
        return  # every byte is compared as it passes
    found = Fingerprint({step.plain: print_of_slot(step.source, full=False)}, "")
    if differences(Fingerprint({step.plain: recorded}, ""), found):
        raise _another(step)


def expect(step: Step, prints: Mapping[str, Any], digest: str) -> None:
    """The hash of the source's bytes must be the recorded one, where one of this dtype was."""
    if not step.plain or step.source is None:
        return
    _, dtype, recorded, _ = prints[step.plain]
    if dtype == step.source.dtype and recorded and recorded != digest:
        raise _another(step)


def _another(step: Step) -> BackboneError:
    assert step.source is not None
    return BackboneError(
        message(
            "this is not the backbone that the adapter was trained on",
            where=f"{step.source.file}: {step.name}",
            expected="the recorded values",
            found="other values",
            remedy="Give the right base.",
        )
    )
