"""Experts that memory holds as one tensor: stacks of matrices, beside which low-rank factors are put by peft's layers.

peft puts a layer around the module of the experts for each of its stacks, one inside the other in the order in which
the module holds them; the keys of its files say no more than how far inside a layer stands. So the order is part of
what an adapter means. peft's forward pass changes it (a parametrised tensor goes to the end of its module): it is put
right before the layers come and after they have gone.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from adapters import shards
from adapters.anatomy import block_lists, brought_by_peft, is_tuner_layer, matches, own_name, owner, tuner_layers
from adapters.edits import AddLowRanks
from adapters.errors import RequestError, message, nearest
from adapters.injection import in_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL = "all-experts"
OPTION = "target_parameters"
ORDER = "_order_before_adapters"  # of a module's parameters, kept on it while peft's layers are there


@final
@dataclass(frozen=True)
class Stack:
    """A stack of matrices, one an expert.

    Attributes:
        name: of the tensor.
        experts: how many.
        shape: (in, out) features of each, as peft counts them.
        transposed: the backbone keeps it as (experts, in, out), and says so.
        layer: the path of the layer that peft puts around the module for it.
    """

    name: str
    experts: int
    shape: tuple[int, int]
    transposed: bool
    layer: str = ""

    def to_json(self) -> list[Any]:
        """As plain data, without the name."""
        return [self.experts, *self.shape, self.transposed, self.layer]


def stacks(model: nn.Module) -> dict[str, Stack]:
    """The stacks of experts inside the blocks, by name: of three axes, as many matrices as their module has experts."""
    prefixes = tuple(f"{path}." for blocks in block_lists(model) for path in blocks.names())
    found = {}
    for path, module in model.named_modules():
        experts = getattr(module, "num_experts", None)
        if not isinstance(experts, int) or experts < 2:  # one expert is a matrix of its own; peft confuses its axes
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            name = own_name(f"{path}.{leaf}")
            if not (name.startswith(prefixes) and shards.is_stack(name, parameter.shape)):
                continue
            if parameter.shape[0] != experts or not parameter.is_floating_point():
                continue
            transposed = getattr(module, "is_transposed", False) is True
            size_in, size_out = tuple(parameter.shape[1:]) if transposed else tuple(parameter.shape[:0:-1])
            found[name] = Stack(name, experts, (size_in, size_out), transposed)
    return found


def chosen(
    model: PreTrainedModel, patterns: Sequence[str] | str | None, layers: Sequence[int] | int | None = None
) -> dict[str, Stack]:
    """The stacks that get factors, by name.

    Args:
        model: without adapters.
        patterns: None for none, "all-experts", or names and dotted suffixes, each of which must match.
        layers: only blocks of these numbers.

    Raises:
        RequestError: no experts in one tensor; a pattern that matches none of them.
    """
    if patterns is None or len(patterns) == 0:
        return {}
    known = stacks(model)
    asked = [patterns] if isinstance(patterns, str) else list(patterns)
    if not known:
        raise RequestError(
            message(
                "the backbone has no experts that lie in one tensor",
                where=f"{OPTION}={patterns!r}",
                expected="a mixture of experts as transformers 5 holds it, a tensor of three axes",
                found=type(model).__name__,
                remedy="Leave it out: linear maps are adapted by target_modules.",
            )
        )
    missing = [] if asked == [ALL] else [each for each in asked if not any(matches(each, name) for name in known)]
    if missing:
        leaves = {".".join(name.rsplit(".", 2)[1:]) for name in known}
        others = any(matches(missing[0], own_name(name)) for name, _ in model.named_parameters())
        raise RequestError(
            message(
                f"{', '.join(map(repr, missing))} {'is no stack' if others else 'match no stacks'} of experts",
                where=OPTION,
                expected=f"{ALL!r}, or names such as {', '.join(map(repr, sorted(leaves)))}",
                remedy="Linear maps are adapted by target_modules; unfrozen_parameters trains other tensors whole."
                if others
                else nearest(missing[0].rpartition(".")[2], {leaf.rpartition(".")[2] for leaf in leaves}),
            )
        )
    names = [name for name in known if asked == [ALL] or any(matches(each, name) for each in asked)]
    if layers is not None:
        names = in_layers(model, names, [layers] if isinstance(layers, int) else list(layers))
    return _placed(model, {name: known[name] for name in names})


def _placed(model: PreTrainedModel, found: Mapping[str, Stack]) -> dict[str, Stack]:
    """The same with the paths of peft's layers: the first stack of a module innermost."""
    by_owner: dict[str, list[str]] = {}
    for name in found:
        by_owner.setdefault(owner(name), []).append(name)
    fresh = _fresh(model) if by_owner else None
    made = {}
    for path, names in by_owner.items():
        assert fresh is not None
        order = [f"{path}.{leaf}" for leaf, _ in fresh.get_submodule(path).named_parameters(recurse=False)]
        names.sort(key=order.index)
        for depth, name in enumerate(reversed(names)):
            stack = found[name]
            made[name] = Stack(name, stack.experts, stack.shape, stack.transposed, f"{path}{'.base_layer' * depth}")
    return made


def _fresh(model: PreTrainedModel) -> PreTrainedModel:
    """The model as its class makes it, without memory: there each module holds its parameters in their own order."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        made: PreTrainedModel = type(model)(copy.deepcopy(model.config))
    return made


def refuse_options(found: Collection[str], asked: Mapping[str, tuple[object, bool, str]]) -> None:
    """Refuse what peft's factors of experts cannot have.

    Args:
        found: the stacks that get factors.
        asked: option -> its value, whether they take it, and what they take.

    Raises:
        RequestError: all such options at once.
    """
    wrong = [
        message(
            "an option that factors of experts do not have",
            where=f"{option}, with {OPTION}",
            expected=expected,
            found=repr(value),
            remedy=f"Leave it out, or leave {OPTION} out.",
        )
        for option, (value, fine, expected) in asked.items()
        if found and not fine
    ]
    if wrong:
        raise RequestError(*wrong)


# ---------------------------------------------------------------------- peft's layers


def ordered(model: nn.Module, layout: Mapping[str, Sequence[Any]]) -> None:
    """Put the stacks of each module into the order in which peft has to find them.

    Args:
        model: without adapters.
        layout: name -> what `Stack.to_json` says of it.
    """
    for path in {owner(name) for name in layout}:
        module = model.get_submodule(path)
        vars(module).setdefault(ORDER, tuple(module._parameters))
        names = [name for name in layout if owner(name) == path]
        inner_first = iter(sorted(names, key=lambda name: -str(layout[name][4]).count(".base_layer")))
        leaves = {name.rpartition(".")[2] for name in names}
        order = [next(inner_first).rpartition(".")[2] if leaf in leaves else leaf for leaf in module._parameters]
        _reorder(module, order)


def restored(model: nn.Module, names: Collection[str]) -> None:
    """Parameters in the order that they had before `ordered`."""
    for path in {owner(name) for name in names}:
        module = model.get_submodule(path)
        before = vars(module).pop(ORDER, None)
        if before is not None:
            _reorder(module, before)


def _reorder(module: nn.Module, order: Sequence[str]) -> None:
    held = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update({leaf: held[leaf] for leaf in order})


def adapted(model: nn.Module) -> dict[str, str]:
    """The stacks that have a layer of peft's, with the path of each layer."""
    import sys

    found: dict[str, str] = {}
    layers = sys.modules.get("peft.tuners.lora.layer")  # nothing of peft's stands in a model before peft is imported
    if layers is None:
        return found
    for path, tuner in tuner_layers(model):
        layer, here = tuner, path
        while isinstance(layer, layers.ParamWrapper):
            found[f"{own_name(f'{path}.')}{layer.parameter_name}"] = here
            layer, here = layer.base_layer, f"{here}.base_layer"
    return found


def refuse_misplaced(model: nn.Module, layout: Mapping[str, Sequence[Any]]) -> None:
    """Each stack must have its layer where its keys will say that it stands.

    Raises:
        RequestError: naming the first that has not.
    """
    found = adapted(model)
    wanted = {name: str(entry[4]) for name, entry in layout.items()}
    odd = sorted(name for name in set(found) | set(wanted) if found.get(name) != wanted.get(name))
    if odd:
        raise RequestError(
            message(
                "peft adapts other parameters than were chosen",
                where=odd[0],
                expected=wanted.get(odd[0], "none"),
                found=found.get(odd[0], "none"),
            )
        )


def edit(entry: Sequence[Any], down: Tensor, up: Tensor, scale: float) -> AddLowRanks:
    """The edit of a stack from factors as peft lays them out.

    Args:
        entry: what `Stack.to_json` says of it.
        down: shape (experts * r, in), expert by expert.
        up: shape (out, r * experts), rank by rank.
        scale: of the product.
    """
    experts, size_in, size_out, transposed = int(entry[0]), int(entry[1]), int(entry[2]), bool(entry[3])
    return AddLowRanks(
        down.reshape(experts, -1, size_in), up.reshape(size_out, -1, experts).permute(2, 0, 1), scale, transposed
    )


def flat(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of a stack as peft lays them out; the inverse of `edit`'s.

    Args:
        down: shape (experts, r, in).
        up: shape (experts, out, r).
    """
    return down.flatten(0, 1), up.permute(1, 2, 0).flatten(1)


# ---------------------------------------------------------------------- what is said


def left_out(model: nn.Module, trained: Collection[str]) -> str:
    """What is to be said where adapters train and the experts, which most parameters are, do not; else empty."""
    tuners = [path for path, _ in tuner_layers(model)]
    found = stacks(model) if tuners else {}
    own = {own_name(name) for name in trained}
    adapted = {own_name(f"{path}.") for path in tuners}
    if not found or any(name in own or f"{owner(name)}." in adapted for name in found):
        return ""
    count = sum(stack.experts * stack.shape[0] * stack.shape[1] for stack in found.values())
    layers = {path for path, module in model.named_modules() if is_tuner_layer(module)}
    total = sum(p.numel() for name, p in model.named_parameters() if not brought_by_peft(name, layers))
    leaves = sorted({".".join(name.rsplit(".", 2)[1:]) for name in found})
    return (
        f"the experts stay frozen: {len(found)} stacks ({', '.join(leaves)}) with {100 * count / total:.0f} % of the "
        f"parameters, which are tensors and no linear maps; {OPTION}={ALL!r} gives them factors, too"
    )
