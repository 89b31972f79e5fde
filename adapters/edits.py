"""What training did to one tensor of the backbone: a function from the old tensor to the new one.

An edit takes the backbone's tensor in its own layout and dtype and returns the new one in float32.
Merging, blending and extracting are loops over a dict of edits; none of them knows which strategy made it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from adapters import deferred
from adapters.errors import FolderError, RequestError, message


class Edit(Protocol):
    """A pure function old tensor -> new tensor in float32; `old` is None where the edit creates the tensor."""

    def __call__(self, old: Tensor | None) -> Tensor: ...


class Values(Protocol):
    """A tensor in memory, or one that is read from its file where its values are asked for."""

    @property
    def shape(self) -> torch.Size: ...

    def float(self) -> Tensor: ...

    def __getitem__(self, rows: Any, /) -> Values: ...


@final
@dataclass(frozen=True)
class Replace:
    """The trained tensor takes the place of the old one (full, freeze, bitfit, heads)."""

    new: Values

    def __call__(self, old: Tensor | None) -> Tensor:
        if old is not None and old.shape != self.new.shape:
            raise RequestError(
                message(
                    "the trained tensor does not fit the backbone's",
                    expected=f"shape {tuple(old.shape)}",
                    found=f"shape {tuple(self.new.shape)}",
                )
            )
        return self.new.float()


@final
@dataclass(frozen=True)
class PutEntries:
    """Some entries along one axis are put in place; the tensor grows where it is too short (added tokens).

    Attributes:
        ids: which entries.
        values: their values, with len(ids) entries along the axis.
        axis: the axis.
        size: entries along the axis afterwards.
    """

    ids: tuple[int, ...]
    values: Values
    axis: int
    size: int

    def __call__(self, old: Tensor | None) -> Tensor:
        if old is None and len(self.ids) == self.size:
            return self.values.float()  # all of it is there: a head that grew
        if old is None or old.shape[self.axis] > self.size:
            raise RequestError(
                message(
                    "added tokens do not fit the backbone's tensor",
                    expected=f"at most {self.size} entries along axis {self.axis}",
                    found="no tensor" if old is None else f"shape {tuple(old.shape)}",
                )
            )
        shape = list(old.shape)
        shape[self.axis] = self.size
        values = self.values.float()
        new = torch.zeros(shape, dtype=torch.float32, device=values.device)
        new.narrow(self.axis, 0, old.shape[self.axis]).copy_(old)
        places = torch.tensor(self.ids, dtype=torch.long, device=values.device)
        return new.index_copy_(self.axis, places, values)


def replace_all(state: Mapping[str, Tensor]) -> dict[str, Edit]:
    """The edits of every strategy that trains the backbone's own tensors where they stand."""
    return {name: Replace(tensor) for name, tensor in state.items()}


@final
@dataclass(frozen=True)
class AddLowRank:
    """old + scale * up @ down, the LoRA update (Hu et al., 2021, eq. 3).

    Attributes:
        down: lora_A, shape (r, in).
        up: lora_B, shape (out, r).
        scale: lora_alpha / r, or lora_alpha / sqrt(r) for rslora.
        transposed: the backbone keeps this weight as (in, out), as GPT-2's Conv1D and embeddings do.
    """

    down: Tensor
    up: Tensor
    scale: float
    transposed: bool = False

    @property
    def nothing(self) -> bool:
        """Whether it changes nothing, as at the start of training: one of the factors is zero."""
        return not (bool(self.up.any()) and bool(self.down.any()))

    def delta(self) -> Tensor:
        """The update in the weight's own layout, float32."""
        left, right = self._factors()
        return (left @ right) * self.scale

    def _factors(self) -> tuple[Tensor, Tensor]:
        """The factors whose product has the weight's own layout."""
        up, down = self.up.float(), self.down.float()
        return (down.T, up.T) if self.transposed else (up, down)

    def __call__(self, old: Tensor | None) -> Tensor:
        left, right = self._factors()
        shape = (left.shape[0], right.shape[1])
        if old is None or old.shape != shape:
            raise RequestError(
                message(
                    "the low-rank update does not fit the backbone's tensor",
                    expected=f"shape {shape}",
                    found="no tensor" if old is None else f"shape {tuple(old.shape)}",
                )
            )
        return torch.addmm(old.float(), left, right, alpha=self.scale)  # one pass over the weight


@final
@dataclass(frozen=True)
class AddLowRanks:
    """old[e] + scale * up[e] @ down[e] for each matrix e of a stack: LoRA's update of experts that lie in one tensor.

    Attributes:
        down: shape (experts, r, in).
        up: shape (experts, out, r).
        scale: as for `AddLowRank`.
        transposed: the backbone keeps the stack as (experts, in, out), as gpt-oss does.
    """

    down: Tensor
    up: Tensor
    scale: float
    transposed: bool = False

    @property
    def nothing(self) -> bool:
        """Whether it changes nothing, as at the start of training: one of the factors is zero."""
        return not (bool(self.up.any()) and bool(self.down.any()))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the stack."""
        experts, out, size_in = self.up.shape[0], self.up.shape[1], self.down.shape[2]
        return (experts, size_in, out) if self.transposed else (experts, out, size_in)

    def entry(self, index: int) -> AddLowRank:
        """What it does to one matrix."""
        return AddLowRank(self.down[index], self.up[index], self.scale, self.transposed)

    def rows(self, index: int, start: int, stop: int) -> AddLowRank:
        """What it does to some rows of one matrix."""
        down, up = self.down[index], self.up[index]
        if self.transposed:
            return AddLowRank(down[:, start:stop], up, self.scale, True)
        return AddLowRank(down, up[start:stop], self.scale)

    def delta(self) -> Tensor:
        """The update in the stack's own layout, float32."""
        return torch.stack([self.entry(index).delta() for index in range(self.shape[0])])

    def __call__(self, old: Tensor | None) -> Tensor:
        if old is None or old.shape != self.shape:
            raise RequestError(
                message(
                    "the low-rank update does not fit the backbone's stack of experts",
                    expected=f"shape {self.shape}",
                    found="no tensor" if old is None else f"shape {tuple(old.shape)}",
                )
            )
        return torch.stack([self.entry(index)(matrix) for index, matrix in enumerate(old)])


@final
@dataclass(frozen=True)
class MergeLayer:
    """What a peft layer makes of its weight or bias: build that one layer, load its tensors, merge, read back.

    Exact for whatever peft can merge (DoRA, rslora, lora_bias, IA3, OFT, ...), because peft itself computes it.
    Weight and bias are merged apart: no peft method lets one depend on the other.

    Attributes:
        config: the peft config, resolved.
        module: the full path of the linear map, e.g. "encoder.layer.0.output.dense"; patterns match against it.
        tensors: the layer's trained tensors by their name below the module, such as a factor's weight.
        part: "weight" or "bias".
        transposed: the backbone keeps the weight as (in, out).
        shape: (in, out) features of the linear map.
        has_bias: whether the linear map has a bias.
    """

    config: Any
    module: str
    tensors: Mapping[str, Tensor]
    part: str
    transposed: bool
    shape: tuple[int, int]
    has_bias: bool

    def __call__(self, old: Tensor | None) -> Tensor:
        if old is None:
            raise RequestError(
                message("a peft layer needs the backbone's tensor to merge into", where=f"{self.module}.{self.part}")
            )
        layer = self.layer(old)
        with torch.no_grad():
            layer.merge()
        merged: Tensor = layer.get_base_layer().get_parameter(self.part)
        return merged.detach().clone()

    def layer(self, old: Tensor) -> Any:
        """The one peft layer around the old weight or bias, with the trained tensors in it, float32."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():  # building a layer draws numbers; none of them stays
            return self._layer(old)

    def _layer(self, old: Tensor) -> Any:
        deferred.import_peft()
        import peft

        layer: Any = plain_layer(self.shape, self.transposed, self.has_bias)
        for name, parameter in layer.named_parameters():
            if name == self.part:
                parameter.copy_(old.float())
            else:
                parameter.zero_()
        root = grown({self.module: layer})
        with deferred.unpacked():
            peft.inject_adapter_in_model(single(self.config, [self.module]), root)
        layer = root.get_submodule(self.module)
        own = {
            name.replace(".default", ""): parameter
            for name, parameter in layer.named_parameters()
            if not name.startswith("base_layer.")
        }
        if set(own) != set(self.tensors):
            raise FolderError(
                message(
                    "the tensors are not those of the peft layer",
                    where=self.module,
                    expected=", ".join(sorted(own)),
                    found=", ".join(sorted(self.tensors)),
                )
            )
        for name, parameter in own.items():
            parameter.copy_(self.tensors[name].float())
        return layer


def plain_layer(shape: tuple[int, int], transposed: bool, has_bias: bool) -> nn.Module:
    """The layer that a description stands for: Conv1D keeps (in, out) and always has a bias, an embedding never."""
    from transformers.pytorch_utils import Conv1D

    features_in, features_out = shape
    if transposed and has_bias:
        return Conv1D(features_out, features_in)  # type: ignore[no-untyped-call]
    if transposed:
        return nn.Embedding(features_in, features_out)
    return nn.Linear(features_in, features_out, bias=has_bias)


def single(config: Any, modules: Sequence[str]) -> Any:
    """A copy of a peft config for these modules alone, by their full paths."""
    config = copy.deepcopy(config)
    config.target_modules, config.exclude_modules = list(modules), None
    config.layers_to_transform = config.layers_pattern = None
    config.modules_to_save = None
    for option in ("rank_pattern", "alpha_pattern"):  # of a pattern that means none of them peft warns each time
        patterns = vars(config).get(option) or {}
        here = {key: value for key, value in patterns.items() if any(pattern_matches(key, path) for path in modules)}
        if len(here) < len(patterns):
            setattr(config, option, here)
    return config


def pattern_matches(pattern: str, path: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern means this module, by peft's own rule."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def grown(layers: Mapping[str, nn.Module]) -> nn.Module:
    """A module tree in which each layer stands at its path, so that peft's patterns see the names they know."""
    root = nn.Module()
    for path, leaf in layers.items():
        here = root
        *parents, last = path.split(".")
        for name in parents:
            if name not in dict(here.named_children()):
                here.add_module(name, nn.Module())
            here = here.get_submodule(name)
        here.add_module(last, leaf)
    return root


@final
@dataclass(frozen=True)
class Blend:
    """old + sum of weight * (edit(old) - old): several adapters on one tensor, each at its weight."""

    edits: Sequence[tuple[float, Edit]]

    def __call__(self, old: Tensor | None) -> Tensor:
        if old is None:
            raise RequestError("tensors that an adapter creates (new heads) cannot be blended: merge one at a time")
        if len(self.edits) == 1 and self.edits[0][0] == 1.0:
            return self.edits[0][1](old)  # one adapter at weight 1 is itself, bit for bit
        start = old.float()
        total = start.clone()
        for weight, edit in self.edits:
            total += weight * (edit(old) - start)
        return total


def blend(parts: Sequence[tuple[float, Mapping[str, Edit]]]) -> dict[str, Edit]:
    """One dict of edits from several, each at its weight; a tensor that only one adapter edits keeps the rest as is."""
    names = {name: None for _, edits in parts for name in edits}
    return {name: Blend([(weight, edits[name]) for weight, edits in parts if name in edits]) for name in names}


def by_rows(edit: Edit, old: tuple[int, ...], new: tuple[int, ...]) -> Callable[[int, int], Edit] | None:
    """The same edit a few rows at a time: (start, stop) -> the edit of those rows along the first axis.

    Args:
        edit: of the whole tensor.
        old, new: shapes of the whole tensor before and after.

    Returns:
        A function, or None where the edit needs all of the tensor, or does not fit it (which applying it will say).
    """
    if not old or old[1:] != new[1:]:
        return None
    match edit:
        case Replace(trained) if trained.shape == old == new:
            return lambda start, stop: Replace(trained[start:stop])
        case AddLowRank(down, up, scale, transposed) if old == new:
            rows, columns = (down, up) if transposed else (up, down)
            if old != (rows.shape[int(transposed)], columns.shape[int(not transposed)]):
                return None
            up, down = up.float(), down.float()  # once, not for every few rows
            if transposed:
                return lambda start, stop: AddLowRank(down[:, start:stop], up, scale, transposed)
            return lambda start, stop: AddLowRank(down, up[start:stop], scale, transposed)
        case AddLowRanks(down, up, scale, transposed) if edit.shape == old == new:
            return lambda start, stop: AddLowRanks(down[start:stop], up[start:stop], scale, transposed)
        case PutEntries(ids, values, 0, size) if old[0] <= size == new[0]:
            if ids == tuple(range(size)):  # a whole tensor that has grown: its rows as they lie
                return lambda start, stop: PutEntries(tuple(range(stop - start)), values[start:stop], 0, stop - start)
            return lambda start, stop: _entries(ids, values, start, stop)
        case Blend(parts):
            divided = [(weight, by_rows(part, old, new)) for weight, part in parts]
            whole = [(weight, rows) for weight, rows in divided if rows is not None]
            if len(whole) < len(divided):
                return None
            return lambda start, stop: Blend([(weight, rows(start, stop)) for weight, rows in whole])
    return None


def _entries(ids: tuple[int, ...], values: Values, start: int, stop: int) -> PutEntries:
    """Of entries along the first axis those from `start` to `stop`, counted from `start`."""
    here = [place for place, entry in enumerate(ids) if start <= entry < stop]
    return PutEntries(tuple(ids[place] - start for place in here), values[here], 0, stop - start)
