"""What a head could read: features of the frozen backbone by pooling and layer, in one pass over the rows.

The features of the model class's own head are what enters its output layer, which hands its input on meanwhile: so a
pooler, a last token or a dense layer in between are the class's own work. The features of a lower layer come from a
second pass in which every block answers at once with what the first pass found there, so that only embeddings, final
norm and head are computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Tensor, nn

from adapters import graph
from adapters.anatomy import block_lists
from adapters.handing import hands_on, hidden_in, standing_in
from adapters.modes import evaluating
from adapters.pooling import pooled
from adapters.reading import OWN, Reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED: Final = -100  # the label of a place that nothing is learnt at
HELD: Final = 256 << 20  # bytes of hidden states of all blocks that a batch may have at once

Key = Callable[[Mapping[str, Any]], list[bytes]]


def output_layer(model: PreTrainedModel, inputs: Mapping[str, Any]) -> nn.Linear | None:
    """The linear map outside of the backbone that gives the logits; None where there is no such one.

    It is tried: with the layer handing its input on, the logits have its width, and the layer makes of them what the
    logits were.

    Args:
        model: with its head, whole.
        inputs: a batch, without labels.
    """
    path = graph.known(model, ("output layer", *sorted(inputs)), lambda: _output_path(model, inputs))
    layer = model.get_submodule(path) if path is not None else None
    return layer if isinstance(layer, nn.Linear) else None


def _output_path(model: PreTrainedModel, inputs: Mapping[str, Any]) -> str | None:
    """The path of that layer."""
    base = set(map(id, model.base_model.modules())) if model.base_model is not model else set()
    found: list[tuple[str, nn.Linear]] = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module).__name__ == "Linear" and id(module) not in base
    ]
    with evaluating(model), torch.no_grad():
        plain: Any = model(**inputs)
        logits = plain.get("logits") if hasattr(plain, "get") else None
        if not isinstance(logits, Tensor):
            return None
        for path, layer in reversed(found):
            if layer.out_features != logits.shape[-1] or "forward" in vars(layer):
                continue
            with standing_in({layer: _handing_on}):
                given: Tensor = model(**inputs).logits
            if given.shape == (*logits.shape[:-1], layer.in_features):
                made = nn.Linear.forward(layer, given)  # hooks belong to passes of the whole model
                spread = float(logits.float().std()) if logits.numel() > 1 else 1.0
                if float((made.float() - logits.float()).abs().max()) <= 1e-2 * max(spread, 1e-6):
                    return path
    return None


@final
@dataclass(frozen=True)
class Extract:
    """The features of some readings, batch by batch.

    Attributes:
        model: with its head, live; blocks above a fixed layer hand their input on already.
        output: its output layer.
        readings: where to read; the layers are counted among the blocks that run.
    """

    model: PreTrainedModel
    output: nn.Linear
    readings: tuple[Reading, ...]

    def batch(self, inputs: Mapping[str, Any]) -> Tensor:
        """The features of each row (rows, readings, width); of a head over tokens (rows, places, readings, width).

        Args:
            inputs: of the model, without labels.

        Returns:
            In float32, on the model's device.
        """
        blocks = self._blocks()
        depth, mask = len(blocks), inputs.get("attention_mask")
        outputs: dict[nn.Module, Any] = {}
        hooks = [block.register_forward_hook(lambda m, _in, out: outputs.update({m: out})) for block in blocks]
        found: dict[Reading, Tensor] = {}
        with evaluating(self.model), torch.no_grad(), standing_in({self.output: _handing_on}):
            try:
                passed = self._pass(inputs)
            finally:
                for hook in hooks:
                    hook.remove()
            for layer in sorted({one.layer or depth for one in self.readings}, reverse=True):
                if layer != depth:
                    with standing_in(_given(blocks, outputs, layer)):
                        passed = self._pass(inputs)
                own, states = passed
                for one in self.readings:
                    if (one.layer or depth) == layer:
                        read = own if one.pooling == OWN else pooled(states, mask, one.pooling)
                        found[one] = read.float()
        return torch.stack([found[one] for one in self.readings], dim=-2)

    def _pass(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """What enters the output layer, and the last hidden states of the base model."""
        base: list[Tensor] = []
        hook = self.model.base_model.register_forward_hook(lambda _m, _in, out: base.append(hidden_in(out)))
        try:
            own: Tensor = self.model(**inputs).logits
        finally:
            hook.remove()
        return own, base[-1] if base else own

    def _blocks(self) -> list[nn.Module]:
        """The blocks that run, where any reading is of another layer than the last."""
        if all(one.layer is None for one in self.readings):
            return []
        lists = block_lists(self.model)
        modules = (self.model.get_submodule(path) for path in lists[-1].names())
        return [module for module in modules if not hands_on(module)]

    def rows_at_once(self, inputs: Mapping[str, Any]) -> int:
        """Rows of a batch whose hidden states of all blocks are held."""
        first = inputs.get("input_ids")
        places = first.shape[1] if isinstance(first, Tensor) and first.ndim > 1 else 256
        width = 4 * self.output.in_features
        return max(1, HELD // (max(1, len(self._blocks())) * places * width))


def of_rows(
    extract: Extract, batches: Iterable[dict[str, Any]], kept: Any = None, keys: Key | None = None
) -> tuple[Tensor, Tensor]:
    """Features and labels of many rows, those that are kept taken from there.

    Args:
        extract: what is read.
        batches: model inputs with "labels", on the model's device, in their order.
        kept: rows' features by key, as `states.States` has them; None keeps nothing.
        keys: what the rows of a batch are known by, from their inputs.

    Returns:
        Features (items, readings, width) in float32 on the CPU, an item being a row or a labelled place; and labels.
    """
    features, labels = [], []
    for batch in batches:
        target = batch["labels"]
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        names = [_marked(key, row) for key, row in zip(keys(inputs), target, strict=True)] if keys is not None else []
        rows = [kept.get(name) for name in names]
        if not rows or any(row is None for row in rows):
            rows = []
            step = extract.rows_at_once(inputs)
            for begin in range(0, len(target), step):
                found = extract.batch({name: _part(value, begin, step, len(target)) for name, value in inputs.items()})
                part = target[begin : begin + step]
                rows += [
                    (row[one != IGNORED] if row.ndim == 3 else row).cpu() for row, one in zip(found, part, strict=True)
                ]
            for name, row in zip(names, rows, strict=False):  # no names where nothing is kept
                kept.add(name, row)
        features += [row if row.ndim == 3 else row[None] for row in rows]
        places = rows[0].ndim == 3
        labels.append(target[target != IGNORED].cpu() if places else target.cpu())
    return torch.cat(features), torch.cat(labels)


def _marked(key: bytes, target: Tensor) -> bytes:
    """The key of a row's features: where several places are labelled, the row with these places."""
    if target.ndim == 0 or target.is_floating_point():
        return key
    import xxhash

    learnt = (target != IGNORED).nonzero().flatten().cpu().numpy().tobytes()
    return xxhash.xxh3_128_digest(key + learnt)


def _part(value: Any, begin: int, step: int, rows: int) -> Any:
    sized = isinstance(value, Tensor) and value.ndim and len(value) == rows
    return value[begin : begin + step] if sized else value


def _given(blocks: Sequence[nn.Module], outputs: Mapping[nn.Module, Any], layer: int) -> dict[nn.Module, Any]:
    """Every block's answer in a model that ends with this many: what was found, and above it the same handed on."""
    top = hidden_in(outputs[blocks[layer - 1]])
    answers = [outputs[block] for block in blocks[:layer]]
    answers += [_around(outputs[block], top) for block in blocks[layer:]]
    return {block: _constant(answer) for block, answer in zip(blocks, answers, strict=True)}


def _around(output: Any, states: Tensor) -> Any:
    """An output of a block with other hidden states in it."""
    if isinstance(output, Tensor):
        return states
    if isinstance(output, tuple):
        return (states, *output[1:])
    return type(output)(**{**output, next(iter(output.keys())): states})


def _handing_on(states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return states


def _constant(answer: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: answer
