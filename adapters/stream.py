"""A checkpoint rewritten tensor by tensor: planned from headers, checked against the fingerprint, read back.

Memory holds one tensor at a time, whatever the size of the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from adapters import shards
from adapters.errors import BackboneError, FolderError, NumbersError, RequestError, message
from adapters.shards import INDEX, WEIGHTS, Slot

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
) -> list[Step]:
    """Every tensor of the output in the order of the backbone's files, named as this model class saves it.

    Args:
        document: the adapter's manifest; edits: by the backbone's own names.
        slots: the backbone's tensors; dtype: of the output, None for each tensor's own.
        where: for messages.
        left_out: the backbone's tensors that the output does not have, by the fingerprint's names.
    """
    backbone = document["backbone"]
    prefix = backbone["fingerprint"]["prefix"]
    names: Mapping[str, str] = backbone["names"]
    saved_as: Mapping[str, str] = backbone["saved_as"]
    known = set(backbone["fingerprint"]["tensors"])
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise RequestError(message(f"unknown dtype {dtype!r}", where="dtype", expected=", ".join(WEIGHT_DTYPES)))
    edits = _on_packed(backbone, edits)
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
    from adapters.quantize import RoundTrip

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


def write(stage: Path, steps: list[Step], source: Path, document: Mapping[str, Any]) -> dict[str, str]:
    """Write the weights in the shards of the source, each checked against the fingerprint as it passes.

    Returns:
        xxh3 of the written bytes, by tensor name.
    """
    by_file: dict[str, list[Step]] = {}
    last = next((step.source.file.name for step in reversed(steps) if step.source is not None), WEIGHTS)
    for step in steps:
        by_file.setdefault(step.source.file.name if step.source is not None else last, []).append(step)
    need = sum(step.nbytes for step in steps)
    room = os.statvfs(stage)
    if room.f_bavail * room.f_frsize < need:
        raise RequestError(
            message(
                "the disk is too full for the merged model",
                where=str(stage.parent),
                expected=f"{need:,} bytes",
                found=f"{room.f_bavail * room.f_frsize:,} bytes free",
            )
        )
    prints = document["backbone"]["fingerprint"]["tensors"]
    digests: dict[str, str] = {}
    for file_name, part in by_file.items():
        with (stage / file_name).open("xb") as stream:
            entries = {step.name: (step.dtype, step.shape, step.nbytes) for step in part}
            stream.write(shards.header_bytes(entries, {"format": "pt"}))
            for step in part:
                digests[step.name] = _write_one(stream, step, prints)
            shards.flush(stream)
    if (source / INDEX).exists():
        weight_map = {step.name: file for file, part in by_file.items() for step in part}
        index = {"metadata": {"total_size": need}, "weight_map": dict(sorted(weight_map.items()))}
        shards.write_text(stage / INDEX, json.dumps(index, indent=2) + "\n")
    return digests


def _write_one(stream: Any, step: Step, prints: Mapping[str, Any]) -> str:
    import xxhash

    written = xxhash.xxh3_128()
    if step.source is not None and step.edit is None and step.dtype == step.source.dtype:
        for chunk in shards.read_bytes(step.source):
            written.update(chunk)
            stream.write(chunk)
        _expect(step, prints, written.hexdigest())
        return written.hexdigest()
    if step.source is not None:
        whole = xxhash.xxh3_128()
        for chunk in shards.read_bytes(step.source):
            whole.update(chunk)
        _expect(step, prints, whole.hexdigest())
    for piece in _result(step):
        written.update(piece)
        stream.write(piece)
    return written.hexdigest()


def _expect(step: Step, prints: Mapping[str, Any], digest: str) -> None:
    """The source tensor must be the recorded one: by its hash, or by its samples where dtypes differ."""
    from adapters.fingerprint import Fingerprint, TensorPrint, differences, print_of_slot

    if not step.plain or step.source is None:
        return
    recorded = TensorPrint.from_json(prints[step.plain])
    if recorded.dtype == step.source.dtype and recorded.hash:
        same = recorded.hash == digest and recorded.shape == step.source.shape
    else:
        found = Fingerprint({step.plain: print_of_slot(step.source, full=False)}, "")
        same = not differences(Fingerprint({step.plain: recorded}, ""), found)
    if not same:
        raise BackboneError(
            message(
                "this is not the backbone that the adapter was trained on",
                where=f"{step.source.file}: {step.name}",
                expected="the recorded values",
                found="other values",
                remedy="Give the right base.",
            )
        )


def _result(step: Step) -> Iterator[memoryview]:
    """The bytes of an edited or cast tensor."""
    import torch

    old = shards.read_tensor(step.source) if step.source is not None else None
    if step.edit is not None:
        new = step.edit(old)
    else:
        assert old is not None
        new = old
    del old
    # A sum is finite only if every value is, and costs a fraction of looking at each.
    if not bool(torch.isfinite(new.sum())) and not bool(torch.isfinite(new).all()):
        raise NumbersError(message("the merged tensor is not finite", where=step.name))
    yield shards.tensor_bytes(new.to(getattr(torch, step.dtype)))


def verify(stage: Path, steps: list[Step], written: Mapping[str, str]) -> int:
    """Read every tensor again: its bytes are those that were written, and for edited ones those of a second edit."""
    import xxhash

    slots = {}
    for file in sorted(stage.glob("*.safetensors")):
        slots.update(shards.read_header(file)[0])
    verified = 0
    for step in steps:
        again = xxhash.xxh3_128()
        for chunk in shards.read_bytes(slots[step.name]):
            again.update(chunk)
        expected = again.hexdigest() if step.edit is None else _digest_of_result(step)
        if again.hexdigest() != written[step.name] or again.hexdigest() != expected:
            raise NumbersError(message("a written tensor reads back otherwise", where=step.name))
        verified += step.edit is not None
    return verified


def _digest_of_result(step: Step) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    for piece in _result(step):
        digest.update(piece)
    return digest.hexdigest()
