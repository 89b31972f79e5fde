"""A plain checkpoint packed to 4 or 8 bits: bitsandbytes' tensors under the names by which transformers opens them.

Packing rounds, so what comes out is another model, near the one that went in: how near is to be measured (`exactness`).
4 bits are stored as QLoRA has them (Dettmers et al., 2023): blocks of 64 weights share a scale, 256 scales share one in
turn. 8 bits are LLM.int8()'s (Dettmers et al., 2022): a scale for each output.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from adapters import shards
from adapters.anatomy import LinearMap, backbone_state, saved_names
from adapters.backbones import MAX_CONFIG
from adapters.errors import NumbersError, RequestError, message, nearest
from adapters.progress import Job
from adapters.quantize import BLOCK, KINDS, bitsandbytes, packable
from adapters.shards import INDEX, Slot

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

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
    with Job("packing", len(slots), "tensors") as job:
        for file, here in by_file.items():
            entries: dict[str, Entry] = {}
            digests: dict[str, str] = {}
            for name, slot in here.items():
                for part, found, content in _parts(name, slot, packing):
                    entries[part] = found
                    digests[part] = _digest(content)
            _write(out / file, entries, here, packing, job)
            _read_back(out / file, digests)
            weight_map |= dict.fromkeys(entries, file)
            total += sum(nbytes for _, _, nbytes in entries.values())
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


def _parts(name: str, slot: Slot, packing: Packing) -> Iterator[tuple[str, Entry, Any]]:
    """A tensor of the checkpoint as it is written: name, what the header says of it, its bytes in pieces."""
    if name not in packing.weights:
        yield name, (slot.dtype, slot.shape, slot.nbytes), shards.read_bytes(slot)
        return
    weight = shards.read_tensor(slot)
    if packing.weights[name]:
        weight = weight.T.contiguous()
    for part, tensor in packed(name, weight, packing.form).items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        yield part, (dtype, tuple(tensor.shape), tensor.numel() * tensor.element_size()), [shards.tensor_bytes(tensor)]


def packed(name: str, weight: Tensor, form: str) -> dict[str, Tensor]:
    """The tensors that stand for a packed weight in a checkpoint.

    Args:
        name: of the weight on disk.
        weight: shape (out, in), in the dtype in which it is to come back.
        form: "nf4", "fp4" or "int8".

    Raises:
        NumbersError: a weight that float16 cannot hold, which 8 bits are made of.
    """
    import torch

    functional = bitsandbytes().functional
    if form in KINDS:
        data, state = functional.quantize_4bit(
            weight, blocksize=BLOCK, compress_statistics=True, quant_type=form, quant_storage=torch.uint8
        )
        return {name: data} | {f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    data, scales, _ = functional.int8_vectorwise_quant(weight.half())
    if not bool(torch.isfinite(scales).all()):
        raise NumbersError(message("a weight too large for 8 bits", where=name, expected="values that float16 holds"))
    stem = name.removesuffix("weight")
    return {name: data, f"{stem}SCB": scales, f"{stem}weight_format": torch.tensor(0, dtype=torch.uint8)}


def _digest(pieces: Any) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _write(file: Path, entries: Mapping[str, Entry], here: Mapping[str, Slot], packing: Packing, job: Job) -> None:
    """One file: header, then every tensor, made a second time; what was made first is what it must read back as.

    Wide values come first, so that each lies at a multiple of its width, as readers that map the file want it.
    """
    order = sorted(entries, key=lambda name: -shards.WIDTHS[entries[name][0]])
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        header = shards.header_bytes({name: entries[name] for name in order}, {"format": "pt"})
        shards.write_at(handle, memoryview(header), 0)
        os.ftruncate(handle, len(header) + sum(nbytes for _, _, nbytes in entries.values()))
        slots = shards.read_header(file)[0]
        for name, slot in here.items():
            for part, found, content in _parts(name, slot, packing):
                if entries[part] != found:
                    raise _otherwise(file, part)
                position = slots[part].start
                for piece in content:
                    shards.write_at(handle, piece, position)
                    position += len(piece)
            job.advance()
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_back(file: Path, digests: Mapping[str, str]) -> None:
    for name, slot in shards.read_header(file)[0].items():
        if _digest(shards.read_bytes(slot)) != digests[name]:
            raise _otherwise(file, name)


def _otherwise(file: Path, name: str) -> NumbersError:
    return NumbersError(message("a written tensor reads back otherwise", where=f"{file}: {name}"))
