"""A plain checkpoint packed to 4 or 8 bits: bitsandbytes' tensors under the names by which transformers opens them.

Packing rounds, so what comes out is another model, near the one that went in: how near is to be measured (`exactness`).
4 bits are stored as QLoRA has them (Dettmers et al., 2023): blocks of 64 weights share a scale, 256 scales share one in
turn. 8 bits are LLM.int8()'s (Dettmers et al., 2022): a scale for each output.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from adapters import progress, shards
from adapters.anatomy import LinearMap, backbone_state, saved_names
from adapters.backbones import MAX_CONFIG
from adapters.errors import NumbersError, RequestError, message, nearest
from adapters.progress import Job
from adapters.quantize import BLOCK, KINDS, NESTED, bitsandbytes, packable
from adapters.shards import INDEX, Slot
from adapters.stored import Stored

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PIECE = 32 << 20  # bytes of a weight that are packed at once
Entry = tuple[str, tuple[int, ...], int]  # what a header says of a tensor: dtype, shape, bytes
FORMS = (*KINDS, "int8")
# bitsandbytes' CPU kernel takes 4-bit weights only in such shapes, and dies of others: they stay as they are.
OUTPUTS = 32


@final
@dataclass(frozen=True)
class Packing:
    """Which weights of a checkpoint are packed, and how.

    Attributes:
        form: "nf4", "fp4" or "int8".
        weights: name on disk -> whether the checkpoint keeps the weight as (in, out).
        kept: the linear maps that stay as they are, by path in memory.
    """

    form: str
    weights: Mapping[str, bool]
    kept: tuple[str, ...]


@final
@dataclass(frozen=True)
class Outcome:
    """What was written: tensors, their bytes, weights packed, linear maps left as they were."""

    tensors: int
    bytes: int
    packed: int
    kept: int


def refuse_unknown(form: str | None) -> None:
    """Refuse a form that nothing is packed into.

    Raises:
        RequestError: with the nearest that is known.
    """
    if form is not None and form not in FORMS:
        raise RequestError(
            message(f"unknown quantization {form!r}", where="quantization", remedy=nearest(str(form), FORMS))
        )


def planned(folder: Path, model_class: str, form: str) -> Packing:
    """Which weights of a plain checkpoint folder would be packed, by its config and headers alone.

    Packed are the linear maps inside the blocks. Heads, embeddings, tied weights, what the class keeps in float32, and
    4-bit weights of shapes that bitsandbytes' CPU kernel does not take stay as they are.

    Raises:
        RequestError: no such model class; nothing to pack.
    """
    import torch
    import transformers
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    kind: Any = getattr(transformers, model_class, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise RequestError(message("transformers has no such model class", where="backbone", found=model_class))
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        net: PreTrainedModel = kind(config)
    slots = shards.read_directory(folder)
    names, _ = saved_names(net, backbone_state(net, ()))
    linear = {path for path, module in net.named_modules() if isinstance(module, Conv1D) or type(module) is nn.Linear}
    maps = {
        found.path: found
        for found in packable(net)
        if found.path in linear and names.get(f"{found.path}.weight") in slots and _takes(form, found)
    }
    whole = list(net._keep_in_fp32_modules or ())
    while True:  # transformers also leaves out what a name in its list is the end or the beginning of
        kept = sorted(linear - set(maps))
        odd = [path for path in maps if not should_convert_module(path, [*kept, *whole])]
        if not odd:
            break
        maps = {path: found for path, found in maps.items() if path not in odd}
    if not maps:
        raise RequestError(
            message(
                "nothing to pack",
                where=f"quantization={form!r}, {model_class}",
                expected="linear maps inside the blocks"
                + (f", of widths that {BLOCK} divides into outputs that {OUTPUTS} divides" if form in KINDS else ""),
                found=f"none of {len(linear)} linear maps",
                remedy="Merge into bfloat16 instead.",
            )
        )
    weights = {names[f"{path}.weight"]: found.transposed for path, found in maps.items()}
    return Packing(form, weights, tuple(kept))


def _takes(form: str, found: LinearMap) -> bool:
    width, outputs = found.shape
    return form not in KINDS or (width % BLOCK == 0 and outputs % OUTPUTS == 0)


def pack_folder(folder: Path, out: Path, packing: Packing, dtype: str) -> Outcome:
    """Write the packed form of a plain checkpoint: weights read one at a time, all that is written read back.

    Args:
        folder: a whole transformers folder, written by us a moment ago; its other files are moved to `out`.
        out: an existing folder; the shards there are those of `folder`.
        packing: of `planned`.
        dtype: that the packed maps compute in.

    Raises:
        NumbersError: a weight that the form cannot hold, or bytes that read back otherwise.
    """
    slots = shards.read_directory(folder)
    by_file: dict[str, dict[str, Slot]] = {}
    for name, slot in slots.items():
        by_file.setdefault(slot.file.name, {})[name] = slot
    weight_map: dict[str, str] = {}
    total = 0
    with Job("packing", 2 * sum(slot.nbytes for slot in slots.values()), "bytes"):
        for file, here in by_file.items():
            written = _write(out / file, here, packing)
            weight_map |= dict.fromkeys(written, file)
            total += sum(written.values())
    if (folder / INDEX).exists():
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        shards.write_text(out / INDEX, json.dumps(index, indent=2) + "\n")
    config = shards.read_json(folder / "config.json", MAX_CONFIG) | {"quantization_config": _settings(packing, dtype)}
    shards.write_text(out / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    for entry in sorted(folder.iterdir()):
        if entry.name not in {"config.json", INDEX, *by_file}:
            os.replace(entry, out / entry.name)
    return Outcome(len(weight_map), total, len(packing.weights), len(packing.kept))


def _settings(packing: Packing, dtype: str) -> dict[str, Any]:
    """What the config says of the packing, in transformers' own words."""
    from transformers import BitsAndBytesConfig

    skipped = list(packing.kept)
    kind: Any = BitsAndBytesConfig
    if packing.form in KINDS:
        made = kind(
            load_in_4bit=True,
            bnb_4bit_quant_type=packing.form,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skipped,
        )
    else:
        made = kind(load_in_8bit=True, llm_int8_skip_modules=skipped)
    settings: dict[str, Any] = made.to_dict()
    return settings


def packed(name: str, rows: Iterable[Tensor], shape: tuple[int, int], form: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors that stand for a packed weight in a checkpoint, each by its name or in parts that follow each other.

    Args:
        name: of the weight on disk.
        rows: the weight, some rows after the others, in the dtype in which it is to come back. For 4 bits as many
            values each time as a number of blocks has.
        shape: of all of it, (out, in).
        form: "nf4", "fp4" or "int8".

    Yields:
        Name and values.

    Raises:
        NumbersError: a weight that float16 cannot hold, which 8 bits are made of.
    """
    import torch

    functional = bitsandbytes().functional
    if form not in KINDS:
        stem, scales = name.removesuffix("weight"), []
        for part in rows:
            data, scale, _ = functional.int8_vectorwise_quant(part.half())
            if not bool(torch.isfinite(scale).all()):
                raise NumbersError(
                    message("a weight too large for 8 bits", where=name, expected="values that float16 holds")
                )
            scales.append(scale)
            yield name, data
        yield f"{stem}SCB", torch.cat(scales)
        yield f"{stem}weight_format", torch.tensor(0, dtype=torch.uint8)
        return
    scales = []
    state: Any = None
    for part in rows:
        data, state = functional.quantize_4bit(part, blocksize=BLOCK, quant_type=form, quant_storage=torch.uint8)
        scales.append(state.absmax)
        yield name, data
    # What quantize_4bit does with the scales of a weight that it has whole.
    scale = torch.cat(scales)
    offset = scale.mean()
    nested, inner = functional.quantize_blockwise(scale - offset, blocksize=NESTED)
    made = functional.QuantState(
        absmax=nested,
        shape=torch.Size(shape),
        dtype=state.dtype,
        blocksize=BLOCK,
        code=state.code,
        quant_type=form,
        offset=offset,
        state2=inner,
    )
    for what, tensor in made.as_dict(packed=True).items():
        yield f"{name}.{what}", tensor


def _rows(slot: Slot, *, transposed: bool) -> Iterator[Tensor]:
    """A weight of shape (out, in), some rows after the others; whole where the checkpoint keeps it the other way."""
    if transposed:
        yield shards.read_tensor(slot).T.contiguous()
        return
    stored = Stored(slot)
    at_once = max(1, PIECE // max(1, slot.nbytes // max(1, slot.shape[0])))
    for start in range(0, slot.shape[0], at_once):
        yield stored.part(start, start + at_once)


def _entries(name: str, slot: Slot, packing: Packing) -> dict[str, Entry]:
    """What the header says of the tensors that stand for one of the checkpoint.

    What bitsandbytes says of a packing in words is as long as it is, and has no entry here.
    """
    if name not in packing.weights:
        return {name: (slot.dtype, slot.shape, slot.nbytes)}
    size = _size(slot, transposed=packing.weights[name])
    count = math.prod(size)
    stem = name.removesuffix("weight")
    if packing.form not in KINDS:
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            name: ("int8", size),
            f"{stem}SCB": ("float32", size[:1]),
            f"{stem}weight_format": ("uint8", ()),
        }
    else:
        blocks = -(-count // BLOCK)
        found = {
            name: ("uint8", (-(-count // 2), 1)),
            f"{name}.absmax": ("uint8", (blocks,)),
            f"{name}.quant_map": ("float32", (16,)),
            f"{name}.nested_absmax": ("float32", (-(-blocks // NESTED),)),
            f"{name}.nested_quant_map": ("float32", (256,)),
        }
    return {part: (dtype, shape, shards.nbytes(dtype, shape)) for part, (dtype, shape) in found.items()}


def _planned(here: Mapping[str, Slot], packing: Packing) -> tuple[dict[str, Entry], dict[str, str]]:
    """What becomes of a file's tensors: what its header says of them, and the hash of each.

    Wide values come first, so that each lies at a multiple of its width, as readers that map the file want it.
    """
    import xxhash

    entries: dict[str, Entry] = {}
    digests: dict[str, Any] = {}
    for name, slot in here.items():
        found = _entries(name, slot, packing)
        for part, content in _made(name, slot, packing):
            if part not in found:
                found[part] = ("uint8", (len(content),), len(content))
            digests.setdefault(part, xxhash.xxh3_128()).update(content)
        entries |= found
        progress.count(slot.nbytes)
    order = sorted(entries, key=lambda name: -shards.WIDTHS[entries[name][0]])
    empty = xxhash.xxh3_128()
    return {name: entries[name] for name in order}, {name: digests.get(name, empty).hexdigest() for name in order}


def _write(file: Path, here: Mapping[str, Slot], packing: Packing) -> dict[str, int]:
    """One file: header, then every tensor, made a second time; what was made first is what it must read back as."""
    import xxhash

    entries, digests = _planned(here, packing)
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        header = shards.header_bytes(entries, {"format": "pt"})
        shards.write_at(handle, memoryview(header), 0)
        os.ftruncate(handle, len(header) + sum(nbytes for _, _, nbytes in entries.values()))
        slots = shards.read_header(file)[0]
        position = {name: slot.start for name, slot in slots.items()}
        for name, slot in here.items():
            for part, content in _made(name, slot, packing):
                if part not in slots or position[part] + len(content) > slots[part].start + slots[part].nbytes:
                    raise _otherwise(file, part)
                shards.write_at(handle, content, position[part])
                position[part] += len(content)
            progress.count(slot.nbytes)
        os.fsync(handle)
    finally:
        os.close(handle)
    for name, slot in shards.read_header(file)[0].items():
        again = xxhash.xxh3_128()
        for chunk in shards.read_bytes(slot):
            again.update(chunk)
        if again.hexdigest() != digests[name]:
            raise _otherwise(file, name)
    return {name: nbytes for name, (_, _, nbytes) in entries.items()}


def _made(name: str, slot: Slot, packing: Packing) -> Iterator[tuple[str, memoryview]]:
    """What is written for a tensor of the checkpoint: names, and bytes in pieces that follow each other."""
    if name not in packing.weights:
        for chunk in shards.read_bytes(slot):
            yield name, chunk
        return
    transposed = packing.weights[name]
    rows = _rows(slot, transposed=transposed)
    for part, tensor in packed(name, rows, _size(slot, transposed=transposed), packing.form):
        yield part, shards.tensor_bytes(tensor)


def _size(slot: Slot, *, transposed: bool) -> tuple[int, int]:
    """Outputs and inputs of a weight."""
    return (slot.shape[1], slot.shape[0]) if transposed else (slot.shape[0], slot.shape[1])


def _otherwise(file: Path, name: str) -> NumbersError:
    return NumbersError(message("a written tensor reads back otherwise", where=f"{file}: {name}"))
