"""What kept states were computed by, as one digest: two runs with the same digest compute the same states of a row.

It covers all of a model that runs up to the cut: every tensor there by its bytes as they are in memory (so new tensors,
packed weights and running statistics cannot be missed), the classes of its modules, the configuration, and what else
decides the numbers: dtype, attention implementation, kind of device, autocast and matmul precision, versions.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from adapters.anatomy import block_lists, is_tuner_layer, own_name, own_path, owner, plain_name
from adapters.handing import hands_on
from adapters.order import passage
from adapters.shards import tensor_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT: Final = 1  # of the folders: another number and none of the old ones is read
LIBRARIES: Final = ("torch", "transformers", "bitsandbytes", "flash_attn")  # that compute
KNOWN: Final = ("torch.", "transformers.", "bitsandbytes.", "accelerate.", "peft.", "adapters.")  # code with a version
# What a configuration says that no hidden state depends on.
BESIDE: Final = {
    "_name_or_path",
    "architectures",
    "dtype",
    "finetuning_task",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "task_specific_params",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def below(model: PreTrainedModel, path: str) -> list[str]:
    """The modules that a forward pass may use up to the end of a module, by their paths.

    Left out are the blocks behind it, what first runs later, and what stands outside of the backbone. A module that is
    never called goes with the nearest one around it that is. Of a module outside of the backbone, as a head, it is not
    known what runs before it: all of the model may.
    """
    calls = passage(model)
    ends = [last for here, (_, last) in calls.items() if _inside(here, path)]
    if not ends:
        return [here for here, _ in model.named_modules()]
    end = max(ends)
    later: set[str] = set()
    for blocks in block_lists(model):
        names = blocks.names()
        if path in names:
            later |= set(names[names.index(path) + 1 :])
    found = []
    for here, _ in model.named_modules():
        called = own_name(f"{here}.").rstrip(".")
        if any(_inside(called, block) for block in later):
            continue
        while called not in calls and called:
            called = owner(called)
        if called in calls and calls[called][0] <= end:
            found.append(here)
    return found


def _inside(path: str, around: str) -> bool:
    return path == around or path.startswith(f"{around}.")


def weights(model: PreTrainedModel, paths: Iterable[str]) -> int:
    """Numbers in the matrices of these modules, embeddings left out: two operations of each a token."""
    total = 0
    for path in paths:
        module = model.get_submodule(path)
        if not isinstance(module, nn.Embedding):
            held = module.parameters(recurse=False)
            packed = [parameter.quant_state.shape.numel() for parameter in held if hasattr(parameter, "quant_state")]
            plain = [p.numel() for p in module.parameters(recurse=False) if p.ndim > 1 and not packed]
            total += sum(packed) + sum(plain)
    return total


def of(
    model: PreTrainedModel,
    path: str,
    *,
    fingerprint: str,
    kept: torch.dtype | None,
    device: torch.device,
    more: str = "",
    apart: frozenset[str] = frozenset(),
    silent: frozenset[str] = frozenset(),
) -> tuple[str, str]:
    """The digest of what computes the states of a cut; empty where it cannot be named, and then why.

    Args:
        model: the live model.
        path: the module whose output is kept.
        fingerprint: of the backbone.
        kept: dtype of the states as they are kept; None for the model's own.
        device: where the model computes.
        more: what else tells these states from others.
        apart: modules that do not count, by their own paths: they stand above what is kept, or are never read.
        silent: modules whose adapters change nothing yet: they count as the backbone's own.
    """
    import transformers
    import xxhash

    paths = [here for here in below(model, path) if own_path(here) not in apart and not _is_added(here, silent)]
    named = plain_name(path, model.base_model_prefix)
    state = xxhash.xxh3_128(f"{FORMAT} {fingerprint} {named} {kept} {more}".encode())
    for here in paths:
        module = model.get_submodule(here)
        described, fault = _described(module)
        if fault:
            return "", f"{here or type(model).__name__} {fault}"
        state.update(f"{plain_name(own_path(here), model.base_model_prefix)} {described}".encode())
    tensors = {own_name(name): tensor for name, tensor in _tensors(model, set(paths)).items()}
    for name, tensor in sorted(tensors.items()):
        if tensor.is_meta:
            return "", f"{name} is not in memory"
        state.update(f"{plain_name(name, model.base_model_prefix)} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor_bytes(tensor))
    config: Any = model.config
    facts = {
        "class": f"{type(model.base_model).__module__}.{type(model.base_model).__qualname__}",
        "config": _plain(config.to_dict()),
        "attention": config._attn_implementation,
        "dtype": str(model.dtype),
        "device": device.type,
        "autocast": str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else "",
        "matmul": torch.get_float32_matmul_precision(),
        "versions": [str(getattr(sys.modules.get(name), "__version__", "")) for name in LIBRARIES],
        "transformers": transformers.__version__,
    }
    state.update(json.dumps(facts, sort_keys=True, default=str).encode())
    return state.hexdigest(), ""


def _is_added(path: str, wrapped: frozenset[str]) -> bool:
    """Whether a module is peft's layer around one of these, or part of it, and not the backbone's own within."""
    around = path
    while around and around not in wrapped:
        around = owner(around)
    return around in wrapped and not _inside(path, f"{around}.base_layer")


def _described(module: nn.Module) -> tuple[str, str]:
    """What a module is made of beside its tensors; and what makes it one that no digest can cover."""
    kind = type(module)
    if is_tuner_layer(module):
        return "", "is an adapter below all that trains"
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    for function in [*hooks, vars(module).get("forward")]:
        source = getattr(function, "__module__", None) or type(function).__module__
        if function is not None and not f"{source}.".startswith(KNOWN):
            return "", "has a hook or a forward pass of its own"
    text = f"{kind.__module__}.{kind.__qualname__} {module.extra_repr()}{' hands on' if hands_on(module) else ''}"
    if not f"{kind.__module__}.".startswith(KNOWN):
        try:
            text += Path(inspect.getfile(kind)).read_text()
        except (OSError, TypeError, ValueError):
            return "", f"is a {kind.__qualname__}, whose code is not to be found"
    return text, ""


def _tensors(model: PreTrainedModel, paths: set[str]) -> dict[str, torch.Tensor]:
    """The tensors of these modules: parameters, buffers that are saved or not, and how packed weights are packed."""
    modules = {path for path, _ in model.named_modules()}
    tensors: dict[str, Any] = {**dict(model.named_buffers()), **model.state_dict()}
    found = {}
    for name, tensor in tensors.items():
        home = owner(name)
        while home not in modules:
            home = owner(home)
        if home in paths and isinstance(tensor, torch.Tensor):
            found[name] = tensor
    return found


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what no hidden state depends on, those inside it too."""
    return {
        name: _plain(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if name not in BESIDE
    }
