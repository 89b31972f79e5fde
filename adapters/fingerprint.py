"""The identity of a backbone: names on disk, shapes, dtypes, content; never the device or the moment.

A fingerprint is compared tensor by tensor. Where both sides have the same dtype the hash over every byte decides;
where one side is coarser (a bf16 load of an fp32 checkpoint), the finer side's samples cast to the coarser dtype
must be equal: three optimizer steps already change a third of the bf16 values of a model, so exactness separates
siblings.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from adapters import once
from adapters.anatomy import backbone_state, main_names, plain_name, saved_names
from adapters.progress import Job, count
from adapters.shards import Slot, read_bytes, read_directory, read_tensor, tensor_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES = 32  # values per tensor, evenly spaced
PRECISION = {"float64": 4, "float32": 3, "float16": 2, "bfloat16": 1}  # a cast to a lower rank loses digits


@final
@dataclass(frozen=True)
class TensorPrint:
    """One tensor's identity.

    Attributes:
        shape, dtype: as in the checkpoint, or in memory where there is none.
        hash: xxh3-128 over all bytes, hexadecimal; empty where only samples were taken.
        samples: the bytes of 32 evenly spaced values, in the tensor's dtype.
    """

    shape: tuple[int, ...]
    dtype: str
    hash: str
    samples: bytes

    def to_json(self) -> list[Any]:
        """Shape, dtype, hash, samples as a JSON list."""
        return [list(self.shape), self.dtype, self.hash, base64.b64encode(self.samples).decode()]

    @classmethod
    def from_json(cls, entry: list[Any]) -> TensorPrint:
        """Read back what `to_json` wrote."""
        return cls(tuple(entry[0]), str(entry[1]), str(entry[2]), base64.b64decode(entry[3]))


@final
@dataclass(frozen=True)
class Fingerprint:
    """The identity of a backbone, head excluded.

    Attributes:
        tensors: print of each tensor, by its name on disk without the base model's prefix.
        prefix: the base model's prefix in checkpoints with a head, e.g. "bert".
    """

    tensors: Mapping[str, TensorPrint]
    prefix: str

    @property
    def digest(self) -> str:
        """One xxh3-128 over all prints, for people to compare."""
        import xxhash

        state = xxhash.xxh3_128()
        for name in sorted(self.tensors):
            entry = self.tensors[name]
            state.update(f"{name} {entry.dtype} {entry.shape} {entry.hash}".encode())
        return state.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The form that stands in the manifest."""
        return {
            "digest": self.digest,
            "prefix": self.prefix,
            "tensors": {name: self.tensors[name].to_json() for name in sorted(self.tensors)},
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Fingerprint:
        """Read back what `to_json` wrote."""
        prints = {name: TensorPrint.from_json(entry) for name, entry in document["tensors"].items()}
        return cls(prints, str(document["prefix"]))


def print_of(tensor: Tensor, *, full: bool = True) -> TensorPrint:
    """The print of a tensor in memory; `full=False` takes the samples alone."""
    import xxhash

    flat = tensor.detach().reshape(-1)
    picks = flat[_positions(flat.numel()).to(flat.device)]
    digest = xxhash.xxh3_128_hexdigest(tensor_bytes(flat)) if full else ""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorPrint(tuple(tensor.shape), dtype, digest, bytes(tensor_bytes(picks)))


def print_of_slot(slot: Slot, *, full: bool = True) -> TensorPrint:
    """The print of a tensor on disk, read in chunks."""
    import xxhash

    width = slot.nbytes // max(1, _numel(slot.shape))
    positions = _positions(_numel(slot.shape)).tolist()
    samples = bytearray()
    if not full:
        with slot.file.open("rb") as stream:
            for position in positions:
                stream.seek(slot.start + position * width)
                samples += stream.read(width)
        return TensorPrint(slot.shape, slot.dtype, "", bytes(samples))
    state = xxhash.xxh3_128()
    offset = 0
    waiting = [position * width for position in positions]
    for chunk in read_bytes(slot):
        state.update(chunk)
        while waiting and waiting[0] < offset + len(chunk):  # widths divide the chunk size: a value is never split
            begin = waiting.pop(0) - offset
            samples += chunk[begin : begin + width]
        offset += len(chunk)
        count(len(chunk))
    return TensorPrint(slot.shape, slot.dtype, state.hexdigest(), bytes(samples))


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _positions(numel: int) -> Tensor:
    if numel == 0:
        return torch.empty(0, dtype=torch.long)
    taken = min(SAMPLES, numel)
    return torch.arange(taken, dtype=torch.long) * numel // taken


def of_model(
    model: PreTrainedModel, head: Collection[str], *, skip: Collection[str] = (), full: bool = True
) -> Fingerprint:
    """The fingerprint of a live model's backbone, from memory.

    Args:
        model: the model; adapters around its layers are looked through.
        head: parameter names left out: the task's head and whatever loading made new.
        skip: further names left out, such as packed weights that cannot be hashed as they are.
        full: hash every byte; False takes samples alone.
    """
    state = {name: tensor for name, tensor in backbone_state(model, head).items() if name not in set(skip)}
    _, on_disk = saved_names(model, state)
    prefix = model.base_model_prefix
    prints = {}
    with Job("fingerprinting", sum(t.nbytes for t in on_disk.values()), "bytes") as job:
        for name, tensor in on_disk.items():
            prints[plain_name(name, prefix)] = print_of(tensor, full=full)
            job.advance(tensor.nbytes)
    return Fingerprint(prints, prefix)


def disk_slots(model: PreTrainedModel, folder: Path) -> dict[str, tuple[Slot, str]]:
    """The checkpoint's tensors that this model uses: plain name -> (slot, memory name), as transformers loads them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    slots = read_directory(folder)
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = backbone_state(model, ())
    names, _ = saved_names(model, state)
    mains = main_names(model)
    firsts = {mains.get(name, name): name for name in state}  # checkpoints know tied tensors by their main names
    known = {main: state[name] for main, name in firsts.items()}
    prefix = model.base_model_prefix
    used: dict[str, tuple[Slot, str]] = {}
    for disk_name, slot in slots.items():
        main, _ = rename_source_key(disk_name, renamings, converters, prefix, known)
        if main in firsts:
            memory_name = firsts[main]
            used[plain_name(names.get(memory_name, disk_name), prefix)] = (slot, memory_name)
    return used


def of_folder(model: PreTrainedModel, head: Collection[str], folder: Path, *, full: bool = True) -> Fingerprint:
    """The fingerprint of the checkpoint that a live model was loaded from.

    Whatever of the backbone the checkpoint does not hold (and loading did not report as new) is taken from memory,
    so that all that the model uses is covered.
    """
    left_out = set(head)
    slots = disk_slots(model, folder)
    wanted = {name: slot for name, (slot, memory_name) in slots.items() if memory_name not in left_out}

    def taken() -> dict[str, Any]:
        return {name: print_of_slot(slot, full=full).to_json() for name, slot in wanted.items()}

    with Job("fingerprinting", sum(slot.nbytes for slot in wanted.values()), "bytes"):
        found = once.on_machine(sorted(wanted), {slot.file for slot in wanted.values()}, taken) if full else taken()
    prints = {name: TensorPrint.from_json(entry) for name, entry in found.items()}
    state = backbone_state(model, head)
    covered = {memory_name for _, memory_name in slots.values()}
    rest = {name: tensor for name, tensor in state.items() if name not in covered}
    if rest:
        names, _ = saved_names(model, state)
        prefix = model.base_model_prefix
        prints |= {plain_name(names.get(name, name), prefix): print_of(t, full=full) for name, t in rest.items()}
    return Fingerprint(prints, model.base_model_prefix)


def read_backbone_tensor(slots: Mapping[str, tuple[Slot, str]], memory_name: str) -> Tensor | None:
    """The checkpoint's tensor for a memory name that is stored one to one, else None."""
    for slot, name in slots.values():
        if name == memory_name:
            return read_tensor(slot)
    return None


def differences(reference: Fingerprint, found: Fingerprint) -> list[str]:
    """How the backbone at hand differs from the reference: one line a tensor, empty when it is the same.

    Both sides cover exactly what the model class uses, so a tensor that only one of them has is a difference too.
    """
    lines = [f"{name}: not in the recorded backbone" for name in sorted(set(found.tensors) - set(reference.tensors))]
    for name in sorted(reference.tensors):
        if name not in found.tensors:
            lines.append(f"{name}: missing")
            continue
        fault = _difference(reference.tensors[name], found.tensors[name])
        if fault:
            lines.append(f"{name}: {fault}")
    return lines


def _difference(reference: TensorPrint, found: TensorPrint) -> str:
    if reference.shape != found.shape:
        return f"shape {found.shape}, recorded {reference.shape}"
    if reference.dtype == found.dtype:
        if reference.hash and found.hash:
            return "" if reference.hash == found.hash else "other values"
        return "" if reference.samples == found.samples else "other values"
    ranks = PRECISION.get(reference.dtype), PRECISION.get(found.dtype)
    if ranks[0] is None or ranks[1] is None:
        return f"dtype {found.dtype}, recorded {reference.dtype}"
    finer, coarser = (reference, found) if ranks[0] > ranks[1] else (found, reference)
    cast = _values(finer).to(getattr(torch, coarser.dtype))
    samples = _values(coarser)
    if coarser.dtype == "float16":  # subnormals round differently between converters: one unit in the last place
        near = (cast.view(torch.int16).int() - samples.view(torch.int16).int()).abs() <= 1
        return "" if bool(near.all()) else "other values"
    return "" if torch.equal(cast, samples) else "other values"


def _values(entry: TensorPrint) -> Tensor:
    if not entry.samples:
        return torch.empty(0)
    dtype: torch.dtype = getattr(torch, entry.dtype)
    return torch.frombuffer(bytearray(entry.samples), dtype=dtype)
