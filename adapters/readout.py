"""A language model whose output layer hands its input on, so that losses are taken from it chunk by chunk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from adapters.chunked import Logits
from adapters.handing import standing_in
from adapters.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from adapters.contracts import Task

PAYS = 1 << 24  # bytes of all logits in float32 from which chunks are used unasked
ROWS, TOKENS = 2, 32  # of the batch that is tried first
BOUND = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative difference of the losses; 3e-2 for coarser dtypes
FAULTS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)  # what a model or task may raise


@final
class Readout:
    """The way from a model's last hidden states to its loss.

    Within `passing` the output layer does nothing, and `read` puts `chunked.Logits` where the logits would be. Before
    that is done for the first time it is tried on the beginning of two real rows: a model that scales, caps or shifts
    its logits behind the output layer (Cohere, Granite, Gemma 2, BART), and a task that wants more of them than their
    cross-entropy, keep all logits, and that is said once.

    Args:
        model, task, processor: of the adaptation.
        say: takes what is said once.
        wanted: True for every batch, False for none, None where the batch's logits would take at least `PAYS` bytes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        task: Task,
        processor: Any,
        say: Callable[[str], None],
        *,
        wanted: bool | None = None,
    ) -> None:
        self.model, self.task, self.processor = model, task, processor
        self._say = say
        self._wanted = wanted
        self._fits: bool | None = None  # None: not tried yet
        self._dtype: torch.dtype | None = None  # of the output layer, where it handed its input on in this pass

    def settle(self, *, fits: bool) -> None:
        """Whether the model can do without its logits, where that is known and need not be tried."""
        self._fits = fits

    @contextlib.contextmanager
    def passing(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Within it a forward pass over these inputs, labels among them, leaves its logits uncomputed where it pays."""
        labels, layer = inputs.get("labels"), output_layer(self.model)
        if self._wanted is False or layer is None or not isinstance(labels, Tensor):
            yield
            return
        pays = self._wanted or 4 * labels.numel() * layer.out_features >= PAYS
        if pays and self._fits is None:
            why_not = self._tried(layer, inputs)
            self._fits = not why_not
            if why_not:
                self._say(f"all logits of a batch are held at once: {type(self.model).__name__} {why_not}")
        if not pays or not self._fits:
            yield
            return
        with self._handing_on(layer):
            yield

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Within it all logits are computed."""
        wanted, self._wanted = self._wanted, False
        try:
            yield
        finally:
            self._wanted = wanted

    def read(self, outputs: Any) -> Any:
        """The outputs of a pass, with uncomputed logits where the output layer handed its input on."""
        dtype, self._dtype = self._dtype, None
        layer = output_layer(self.model, handing_on=True)
        if dtype is not None and layer is not None:
            outputs["logits"] = Logits(outputs["logits"], layer, dtype)
        return outputs

    @contextlib.contextmanager
    def _handing_on(self, layer: nn.Linear) -> Iterator[None]:
        def forward(hidden: Tensor) -> Tensor:
            kind = hidden.device.type
            self._dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else layer.weight.dtype
            return hidden

        self._dtype = None
        try:
            with standing_in({layer: forward}):
                yield
        finally:
            self._dtype = None

    def _tried(self, layer: nn.Linear, inputs: Mapping[str, Any]) -> str:
        """Why the loss cannot be taken from the output layer's input; empty where it can."""
        batch = beginning(inputs)
        labels = torch.arange(batch["labels"].numel(), device=batch["labels"].device) % layer.out_features
        batch["labels"] = labels.view(batch["labels"].shape)
        given = {name: value for name, value in batch.items() if name != "labels"}
        calls: list[Tensor] = []
        handle = layer.register_forward_hook(lambda _layer, _inputs, output: calls.append(output))
        with evaluating(self.model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                plain: Any = self.model(**given)
            finally:
                handle.remove()
            logits = plain.get("logits")
            if len(calls) != 1 or not isinstance(logits, Tensor):
                return "does not read its logits off one pass of its output layer"
            if logits.shape != calls[0].shape or not torch.equal(logits.float(), calls[0].float()):
                return "changes its logits behind the output layer"
            try:
                with self._handing_on(layer):
                    read = self.read(self.model(**given))
            except FAULTS:
                return "changes its logits behind the output layer"
            try:
                found = [
                    (
                        self.task.loss(outputs, batch["labels"], 1),
                        *self.task.measured(outputs, batch, self.model, self.processor),
                    )
                    for outputs in (plain, read)
                ]
            except FAULTS as fault:
                return f"can do without them, but its task cannot ({type(fault).__name__}: {str(fault)[:80]})"
        bound = BOUND.get(self.model.dtype, 3e-2)
        for one, other in zip(*found, strict=True):
            if one.shape != other.shape:
                return "gives other measures without them"
            if one.is_floating_point() and not torch.allclose(one, other.to(one), rtol=bound, atol=bound):
                return f"gives another loss without them ({float((one - other).abs().max()):.2g} apart)"
        return ""


def output_layer(model: PreTrainedModel, *, handing_on: bool = False) -> nn.Linear | None:
    """The plain linear map from hidden states to the vocabulary; None where there is none, or something is around it.

    Args:
        model: a live model.
        handing_on: the layer's forward pass may have been replaced, by us.
    """
    layer: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    plain = type(layer) is nn.Linear and (handing_on or "forward" not in vars(layer))
    return layer if plain else None


def large(model: PreTrainedModel, positions: int) -> bool:
    """Whether all logits of so many positions would take at least `PAYS` bytes."""
    layer = output_layer(model)
    return layer is not None and 4 * positions * layer.out_features >= PAYS


class _Reached(Exception):
    """The output layer has its input; its logits need not be computed."""


def last_states(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """What the output layer is given in a pass in eval mode, shape (rows, tokens, width); it does not run."""
    layer, caught = output_layer(model), []

    def reached(_layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        caught.append(given[0])
        raise _Reached

    assert layer is not None
    handle = layer.register_forward_pre_hook(reached)
    try:
        with evaluating(model), torch.inference_mode(), contextlib.suppress(_Reached):
            model(**inputs)
    finally:
        handle.remove()
    return caught[0]


def beginning(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The first tokens of the first rows of a batch: whatever has rows and tokens is cut."""
    return {
        name: value[:ROWS, :TOKENS].contiguous() if isinstance(value, Tensor) and value.ndim > 1 else value
        for name, value in inputs.items()
    }
