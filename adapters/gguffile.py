"""Low-rank factors in llama.cpp's own file: which of its tensors a module is, and the order of its rows there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import shards
from adapters.errors import RequestError, message
from adapters.lowrank import Factors
from adapters.served import Products, gguf_package

if TYPE_CHECKING:
    from torch import Tensor

FILE = "adapter.gguf"
ROTARY = {"llama": ("q_proj", "k_proj")}  # architectures whose query and key rows stand in another order there


def names(architecture: str, blocks: int, paths: Collection[str]) -> dict[str, str]:
    """Module path -> llama.cpp's name of its weight.

    Raises:
        RequestError: a module that the architecture does not have there.
    """
    package = gguf_package()
    kind = next(kind for kind, name in package.MODEL_ARCH_NAMES.items() if name == architecture)
    table = package.get_tensor_name_map(kind, blocks)
    found = {path: table.get_name(f"{path}.weight", try_suffixes=(".weight",)) for path in paths}
    odd = sorted(path for path, name in found.items() if name is None)
    if odd:
        raise RequestError(
            message("llama.cpp has no tensor for these modules", where=architecture, found=", ".join(odd[:3]))
        )
    return found


def heads(architecture: str, path: str, config: Any) -> int:
    """How many heads' rows have to change their order in a module; 0 for none."""
    last = path.rpartition(".")[2]
    if last not in ROTARY.get(architecture, ()):
        return 0
    return int(config.num_attention_heads if last == "q_proj" else config.num_key_value_heads)


def write(file: Path, architecture: str, factors: Mapping[str, Factors], config: Any, dtype: str) -> None:
    """A LoRA adapter in GGUF; every module at one rank, which is its alpha, so that its scale is 1.

    Args:
        file: new.
        architecture: llama.cpp's name of it.
        factors: by module path, at scale 1.
        config: the backbone's.
        dtype: float32 or float16.
    """
    import torch

    package = gguf_package()
    named = names(architecture, config.num_hidden_layers, factors)
    writer = package.GGUFWriter(file, architecture)
    writer.add_type(package.GGUFType.ADAPTER)
    writer.add_string(package.Keys.Adapter.TYPE, "lora")
    writer.add_float32(package.Keys.Adapter.LORA_ALPHA, float(next(iter(factors.values())).rank))
    writer.add_file_type(package.LlamaFileType.MOSTLY_F16 if dtype == "float16" else package.LlamaFileType.ALL_F32)
    kind = getattr(torch, dtype)
    for path, pair in factors.items():
        up = rotated(pair.up, heads(architecture, path, config))
        writer.add_tensor(f"{named[path]}.lora_a", pair.down.to(kind).contiguous().numpy())
        writer.add_tensor(f"{named[path]}.lora_b", up.to(kind).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with file.open("rb+") as stream:
        shards.flush(stream)


def rotated(rows: Tensor, heads: int) -> Tensor:
    """Rows in llama.cpp's order: it turns neighbours by a rotary position, transformers turns halves of a head."""
    if not heads:
        return rows
    return rows.view(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def paths(found: Products, architecture: str, config: Any, known: Collection[str]) -> Products:
    """Updates by llama.cpp's names as updates by module path, rows back in transformers' order.

    Written from the other side than `rotated`: row by row, where the two stand.
    """
    back = {name: path for path, name in names(architecture, config.num_hidden_layers, known).items()}
    result = {}
    for name, (down, up, scale) in found.factors.items():
        path = back[name]
        number = heads(architecture, path, config)
        result[path] = down, up[_places(len(up), number)] if number else up, scale
    return Products(result)


def _places(rows: int, heads: int) -> list[int]:
    """Where each of transformers' rows stands in llama.cpp's order."""
    size = rows // heads
    half = size // 2
    return [head * size + 2 * (row % half) + row // half for head in range(heads) for row in range(size)]
