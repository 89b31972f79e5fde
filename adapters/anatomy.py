"""Where a transformers model keeps its blocks, linear maps and head, and what its tensors are called on disk.

Everything here is read off the module graph and transformers' own conversion tables; there is no table of
model names.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from adapters.errors import RequestError, message, nearest
from adapters.handing import hands_on

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@final
@dataclass(frozen=True)
class BlockList:
    """One stack of transformer blocks.

    Attributes:
        path: the module list, e.g. "bert.encoder.layer".
        length: how many module objects run; those above a head that reads further down hand their input on.
        shared: one block object stands for several layers (ALBERT): they cannot train apart.
    """

    path: str
    length: int
    shared: bool

    def names(self) -> list[str]:
        """The paths of the blocks, bottom to top."""
        return [f"{self.path}.{index}" for index in range(self.length)]


@final
@dataclass(frozen=True)
class LinearMap:
    """A matmul by a weight: nn.Linear, GPT-2's Conv1D, or their packed form.

    Attributes:
        path: the module's name.
        shape: (in, out) features.
        transposed: the backbone keeps the weight as (in, out), as Conv1D does.
        has_bias: whether there is a bias.
    """

    path: str
    shape: tuple[int, int]
    transposed: bool
    has_bias: bool


def own_name(name: str) -> str:
    """The backbone's own name of a tensor, whatever peft has wrapped around its module, even twice."""
    while ".base_layer." in name:
        name = name.replace(".base_layer.", ".")
    return name


def own_path(path: str) -> str:
    """The backbone's own path of a module, whatever peft has wrapped around it."""
    return own_name(f"{path}.").rstrip(".")


def is_tuner_layer(module: nn.Module) -> bool:
    """Whether peft has put this module around one of the backbone's."""
    import sys

    layers = sys.modules.get("peft.tuners.tuners_utils")  # nothing of peft's stands in a model before peft is imported
    return layers is not None and isinstance(module, layers.BaseTunerLayer)


def tuner_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers that peft has put around modules, by path; of those that stand in each other the outermost.

    Around a module of which several parameters are adapted (experts) peft puts one layer each, one in the other.
    """
    found = {path: module for path, module in model.named_modules() if is_tuner_layer(module)}
    inner = {f"{path}.base_layer" for path in found}
    return [(path, module) for path, module in found.items() if path not in inner]


def brought_by_peft(name: str, tuners: Collection[str]) -> bool:
    """Whether a tensor is peft's own, from its name and the paths of all of peft's layers."""
    path = owner(name)
    while path and path not in tuners:
        path = owner(path)
    return bool(path) and not name.startswith(f"{path}.base_layer.")


def class_name(model: nn.Module) -> str:
    """The name of a model's class, without the one that FSDP makes of it in place."""
    kind = type(model)
    first = kind.__bases__[0] if len(kind.__bases__) == 2 else None
    made = first is not None and first.__name__ == "FSDPModule" and first.__module__.startswith("torch.")
    return kind.__bases__[1].__name__ if made else kind.__name__


def count(tensors: Iterable[Tensor]) -> int:
    """Elements in all, packed 4-bit weights counted by the weights that they hold."""
    total = 0
    for tensor in tensors:
        state = getattr(tensor, "quant_state", None)
        total += state.shape.numel() if state is not None else tensor.numel()
    return total


def block_lists(model: nn.Module) -> list[BlockList]:
    """The stacks of blocks, in the order in which the model holds them; an encoder-decoder has two.

    A stack is a ModuleList of modules of one class, not inside another stack, that holds at least a quarter of
    the parameters of the largest such list.
    """
    found: list[tuple[str, nn.ModuleList, int]] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(path.startswith(f"{outer}.") for outer, _, _ in found):
            continue
        if len({type(child) for child in module}) == 1:
            found.append((path, module, count(module.parameters())))
    largest = max((size for _, _, size in found), default=0)
    config: Any = getattr(model, "config", None)
    depth = getattr(config, "num_hidden_layers", None)
    lists = []
    for path, module, size in found:
        if size == 0 or size * 4 < largest:
            continue
        layers = sum(isinstance(child, nn.ModuleList) for child in module[0].modules())
        repeats = isinstance(depth, int) and depth > len(module) and hasattr(config, "num_hidden_groups") and layers
        objects = len({id(child) for child in module})
        running = sum(not hands_on(child) for child in module)
        lists.append(BlockList(path, running, shared=bool(repeats) or objects < len(module)))
    return lists


def passed_over(model: nn.Module) -> set[str]:
    """The parameters of blocks that hand their input on, by name: they are in memory, and nothing depends on them."""
    idle = tuple(f"{path}." for path, module in model.named_modules() if hands_on(module))
    return {name for name, _ in model.named_parameters() if name.startswith(idle)} if idle else set()


def linear_maps(model: nn.Module) -> dict[str, LinearMap]:
    """The linear maps inside the blocks, by path: what LoRA adapts and 4-bit storage packs."""
    prefixes = tuple(f"{path}." for blocks in block_lists(model) for path in blocks.names())
    return {
        path: described
        for path, module in model.named_modules()
        if path.startswith(prefixes) and (described := linear_map(path, module)) is not None
    }


def linear_map(path: str, module: nn.Module) -> LinearMap | None:
    """The description of one module where it is a linear map, else None."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        features_in, features_out = module.weight.shape
        return LinearMap(path, (features_in, features_out), transposed=True, has_bias=True)
    if isinstance(module, nn.Linear):
        conv = getattr(module, "source_cls", None) is Conv1D  # a packed Conv1D: transposed on disk still
        return LinearMap(path, (module.in_features, module.out_features), conv, module.bias is not None)
    return None


def matches(pattern: str, path: str) -> bool:
    """Whether a dotted pattern names this module: the whole path, or its last components."""
    return path == pattern or path.endswith(f".{pattern}")


def select(patterns: Sequence[str], paths: Iterable[str], *, option: str) -> list[str]:
    """The paths that the patterns name; every pattern must name at least one.

    Raises:
        RequestError: a pattern matches nothing; the message lists the nearest names.
    """
    known = list(paths)
    leaves = {path.rpartition(".")[2] for path in known} - {""}
    missing = [pattern for pattern in patterns if not any(matches(pattern, path) for path in known)]
    if missing:
        raise RequestError(
            message(
                f"the pattern{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing))} match nothing",
                where=option,
                expected="names of modules in the backbone",
                remedy=nearest(missing[0].rpartition(".")[2], {leaf for leaf in leaves if not leaf.isdigit()}),
            )
        )
    return [path for path in known if any(matches(pattern, path) for pattern in patterns)]


def found_parameters(model: nn.Module, patterns: Sequence[str], where: str) -> set[str]:
    """The parameters, by the backbone's own names, that regular expressions find; each must find one.

    Args:
        model: with or without adapters.
        patterns: searched in the names.
        where: for messages.

    Raises:
        RequestError: no regular expression, or one that finds nothing.
    """
    names = [own_name(name) for name, _ in model.named_parameters()]
    found: set[str] = set()
    for pattern in patterns:
        try:
            hits = {name for name in names if re.search(pattern, name)}
        except re.error as fault:
            raise RequestError(message(f"{pattern!r} is no regular expression", where=where, found=fault)) from fault
        if not hits:
            raise RequestError(
                message(
                    f"the pattern {pattern!r} finds nothing",
                    where=where,
                    expected="a regular expression that finds parameter names",
                    remedy=f"Names look like {names[0]!r} and {names[len(names) // 2]!r}.",
                )
            )
        found |= hits
    return found


def shortest_suffixes(paths: Iterable[str], others: Iterable[str]) -> list[str]:
    """The shortest dotted suffixes that name all of `paths` and none of `others`.

    A saved target list stays as short as people write it ("query", "value") and still cannot name a head.
    """
    taken = list(others)
    suffixes: dict[str, None] = {}
    for path in paths:
        parts = path.split(".")
        for start in range(len(parts) - 1, -1, -1):
            suffix = ".".join(parts[start:])
            if start == 0 or not any(matches(suffix, other) for other in taken):
                suffixes[suffix] = None
                break
    return list(suffixes)


def outside_backbone(model: PreTrainedModel) -> set[str]:
    """The parameters that do not belong to the base model: a classification model's head.

    A few classes (T5's) hold the backbone's modules themselves; what transformers' own headless class of the same
    config does not have is the head there.

    Raises:
        RequestError: the model is nothing but a backbone.
    """
    base = model.base_model
    if base is not model:
        inside = {id(parameter) for parameter in base.parameters()}
        return {name for name, parameter in model.named_parameters() if id(parameter) not in inside}
    import transformers

    auto: Any = transformers.AutoModel
    outside: set[str] = set()
    if type(model.config) in auto._model_mapping:
        with torch.device("meta"):
            bare = {name for name, _ in auto.from_config(model.config).named_parameters()}
        outside = {name for name, _ in model.named_parameters() if name not in bare}
    if not outside:
        raise RequestError(
            message(
                "the model has no backbone apart from its head",
                where=type(model).__name__,
                expected="a model class with a base model and a head, such as AutoModelForSequenceClassification",
            )
        )
    return outside


def owner(name: str) -> str:
    """The path of the module that owns a parameter."""
    return name.rpartition(".")[0]


def put(net: nn.Module, names: Iterable[str], tensor: Tensor) -> None:
    """Let a tensor stand in a model under these names, several where it is tied: a parameter, or a buffer."""
    for name in names:
        module, leaf = net.get_submodule(owner(name)), name.rpartition(".")[2]
        held: Any = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
        held[leaf] = tensor


def longest_input(processor: Any, model: PreTrainedModel) -> int:
    """The number of tokens that tokenizer and model both take."""
    limits = [processor.model_max_length, 1 << 20]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        offset = counted_from(model)
        limits.append(positions - (offset + 1 if offset is not None else 0))
    return int(min(limits))


def counted_from(model: nn.Module) -> int | None:
    """The padding id from which RoBERTa and its kin count positions (so many of them are lost); None for others."""
    table = next((m for n, m in model.named_modules() if n.endswith("position_embeddings")), None)
    index: int | None = getattr(table, "padding_idx", None)
    return index


def copied(model: PreTrainedModel, stand_in: Callable[[Tensor], Tensor]) -> PreTrainedModel:
    """A copy of the module graph, with `stand_in` for every parameter and buffer; packed weights stay shared."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if getattr(parameter, "quant_state", None) is not None:
            memo[id(parameter)] = parameter  # peft reads how it is packed; nobody writes to it
            continue
        memo[id(parameter)] = nn.Parameter(stand_in(parameter.detach()), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = stand_in(buffer)
    # What follows is `copy.deepcopy`, without the detour that it takes for each of a module's many empty dicts.
    plain: list[Any] = [module for module in model.modules() if not _copies_itself(type(module))]
    for module in plain:
        memo[id(module)] = object.__new__(type(module))
    for module in plain:
        state = {name: _beside(value, memo) for name, value in module.__getstate__().items()}
        memo[id(module)].__setstate__(state)
    return copy.deepcopy(model, memo)


def _copies_itself(kind: type[nn.Module]) -> bool:
    """Whether a class has its own way to be copied; any other module is what its state says."""
    ways = ("__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__")
    return any(getattr(kind, way, None) is not getattr(nn.Module, way, None) for way in ways)


def _beside(value: Any, memo: dict[int, Any]) -> Any:
    if not value and type(value) in (dict, OrderedDict):
        return memo.setdefault(id(value), type(value)())  # what several hold stays one
    return copy.deepcopy(value, memo)


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the module graph on the meta device: same names, shapes and types, no memory.

    Strategies are tried on it first, so that nothing of the live model changes before every check has passed.
    """
    return copied(model, lambda tensor: torch.empty_like(tensor, device="meta"))


def never_saved(model: PreTrainedModel) -> set[str]:
    """Parameters that the model class computes and leaves out of its checkpoints (Marian's sinusoidal positions)."""
    return set(model._keys_to_ignore_on_save or ()) & {own_name(name) for name, _ in model.named_parameters()}


def backbone_state(model: PreTrainedModel, head: Iterable[str]) -> dict[str, Tensor]:
    """The backbone's tensors by their own names in memory: parameters and saved buffers, heads and adapters left out.

    Of tied tensors the first name stands for all; what no checkpoint holds is left out.
    """
    left_out = set(head) | never_saved(model)
    tuners = {path for path, module in model.named_modules() if is_tuner_layer(module)}
    saved = set(model.state_dict())
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in saved}
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not (tuners and brought_by_peft(name, tuners)) and own_name(name) not in left_out:
            state[own_name(name)] = tensor
    return state


def main_names(model: PreTrainedModel) -> dict[str, str]:
    """First name in memory of each tied parameter -> the one of its names that transformers saves.

    transformers declares which names are copies; the one that is none is saved, whichever was registered first
    (XLM-R's language model registers the copy first).
    """
    copies = set(model.all_tied_weights_keys or ())
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(own_name(name))
    return {
        shared[0]: next((name for name in shared if name not in copies), shared[0])
        for shared in names.values()
        if len(shared) > 1
    }


def saved_names(model: PreTrainedModel, state: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What transformers calls these tensors in a saved checkpoint.

    Returns:
        names: memory name -> name on disk, for the tensors that are saved one to one.
        tensors: name on disk -> tensor, for all; tensors that transformers splits on saving (fused experts) appear
            in their parts.
    """
    from transformers.core_model_loading import revert_weight_conversion

    by_id = {id(tensor): name for name, tensor in state.items()}
    mains = main_names(model)
    on_disk = revert_weight_conversion(model, {mains.get(name, name): tensor for name, tensor in state.items()})
    names = {by_id[id(tensor)]: name for name, tensor in on_disk.items() if id(tensor) in by_id}
    return names, on_disk


def plain_name(name: str, prefix: str) -> str:
    """A name on disk without the base model's prefix: checkpoints with and without a head then agree."""
    return name.removeprefix(f"{prefix}.") if prefix else name
