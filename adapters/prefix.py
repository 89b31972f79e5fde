"""The frozen prefix, computed once a row and kept: what runs below the first trained module never changes.

Hidden states are kept by the content of the row, unpadded, and put back where the prefix ends: in the output of the
last frozen block, or of a wholly frozen encoder. Everything else in the model's forward pass (masks, positions,
rotary tables, the blocks above) stays the model's own work. Every row is computed in a batch that the data alone
decides, so that a resumed run finds the very numbers that an uninterrupted one had.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Tensor, nn

from adapters.anatomy import block_lists, owner
from adapters.handing import form_of, hidden_in, made
from adapters.modes import evaluating
from adapters.order import frozen_below

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

TOKENS: Final = 8192  # of a batch of the prefix, padding included
ROWS: Final = 256  # of a batch at most
BOUND: Final = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}  # of the outputs' spread


@final
@dataclass(frozen=True)
class Cut:
    """Where the prefix ends.

    Attributes:
        path: the module whose output is kept.
        holder: that module.
        passed: the blocks before it, which only hand their input on.
    """

    path: str
    holder: nn.Module
    passed: tuple[nn.Module, ...]


def cut_of(model: PreTrainedModel, trained: Sequence[str]) -> Cut | None:
    """The highest place below which nothing trains; None where there is nothing worth to be kept.

    Of an encoder-decoder that is its whole encoder. Where blocks share their weights (ALBERT) it is their whole stack.
    """
    quiet = {id(module) for module in frozen_below(model, trained)}
    modules = dict(model.named_modules())
    wanted = set(trained)

    def frozen(path: str) -> bool:
        inside = {f"{path}.{name}" for name, _ in modules[path].named_parameters()}
        return id(modules[path]) in quiet and not inside & wanted

    if model.config.is_encoder_decoder:
        encoder: Any = model.get_encoder()
        path = next((path for path, module in modules.items() if module is encoder), "")
        return Cut(path, encoder, ()) if path and frozen(path) else None
    lists = block_lists(model)
    if not lists:
        return None
    blocks = lists[-1]
    if blocks.shared:
        stack = owner(blocks.path)
        return Cut(stack, modules[stack], ()) if frozen(stack) else None
    names = blocks.names()
    depth = next((index for index, path in enumerate(names) if not frozen(path)), len(names))
    if depth == 0:
        return None
    return Cut(names[depth - 1], modules[names[depth - 1]], tuple(modules[path] for path in names[: depth - 1]))


class _Reached(Exception):
    """The prefix has been computed; what is above it need not run."""


@final
class Prefix:
    """Hidden states of a cut, by the content of the rows.

    Args:
        model: a live model.
        cut: where its prefix ends.
        dtype: of the states as they are kept; None for the one that the model computes.
    """

    def __init__(self, model: PreTrainedModel, cut: Cut, dtype: torch.dtype | None = None) -> None:
        self.model = model
        self.cut = cut
        self.dtype = dtype
        self.states: dict[bytes, Tensor] = {}
        self._output: Any = None  # one output of the holder, for its form
        self._forms: list[Any] = []  # one output of each block that is passed, without its tensors
        self._computed: torch.dtype = torch.float32

    # ------------------------------------------------------------------ rows

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(state.nbytes for state in self.states.values())

    def keys(self, inputs: Mapping[str, Any]) -> list[bytes]:
        """What each row of a batch is known by: the bytes of its inputs, without padding, without labels."""
        import xxhash

        lengths = _lengths(inputs)
        width = _width(inputs)
        names = sorted(name for name, value in inputs.items() if isinstance(value, Tensor) and name != "labels")
        plain = {name: inputs[name].detach().cpu() for name in names}
        keys = []
        for row in range(_rows(inputs)):
            state = xxhash.xxh3_128()
            for name in names:
                value = plain[name][row]
                if lengths is not None and value.ndim and plain[name].shape[1] == width:
                    value = value[: lengths[row]]
                state.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                state.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
            keys.append(state.digest())
        return keys

    def add(self, inputs: Mapping[str, Any]) -> None:
        """Compute and keep the rows of a batch, on the model's device; those that are kept already stay as they are."""
        keys = self.keys(inputs)
        if all(key in self.states for key in keys):
            return
        states = self._run(inputs)
        lengths = _lengths(inputs)
        for row, key in enumerate(keys):
            if key not in self.states:
                state = states[row] if lengths is None else states[row, : lengths[row]]
                self.states[key] = state.to(device="cpu", dtype=self.dtype or state.dtype, copy=True)

    def _run(self, inputs: Mapping[str, Any]) -> Tensor:
        """One pass up to the cut, in eval mode and without gradients."""
        forms: dict[int, Any] = {}
        hooks = [
            block.register_forward_hook(lambda module, _inputs, output: forms.update({id(module): form_of(output)}))
            for block in self.cut.passed
        ]
        caught: list[Any] = []

        def reached(_module: nn.Module, _inputs: Any, output: Any) -> None:
            caught.append(output)
            raise _Reached

        hooks.append(self.cut.holder.register_forward_hook(reached))
        try:
            with evaluating(self.model), torch.no_grad(), contextlib.suppress(_Reached):
                self.model(**{name: value for name, value in inputs.items() if name != "labels"})
        finally:
            for hook in hooks:
                hook.remove()
        self._output = form_of(caught[0])
        self._forms = [forms[id(block)] for block in self.cut.passed]
        states = hidden_in(caught[0])
        self._computed = states.dtype
        return states.detach()

    # ------------------------------------------------------------------ a forward pass that starts at the cut

    @contextlib.contextmanager
    def given(self, inputs: Mapping[str, Any]) -> Iterator[bool]:
        """Within it the model's forward pass over this batch takes the kept states; yields whether it does.

        A batch with a row that is not kept is computed as ever. Rows padded on the left are known with their padding.
        """
        found = self._gathered(inputs)
        if found is None:
            yield False
            return
        replaced = [(block, _handing_on(form)) for block, form in zip(self.cut.passed, self._forms, strict=True)]
        replaced.append((self.cut.holder, _answering(self._output, found)))
        try:
            for module, forward in replaced:
                vars(module)["forward"] = forward
            yield True
        finally:
            for module, _ in replaced:
                vars(module).pop("forward", None)

    def _gathered(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The batch's states, padded with zeros to the batch's width."""
        if not self.states:
            return None
        rows = [self.states.get(key) for key in self.keys(inputs)]
        if any(row is None for row in rows):
            return None
        kept = [row for row in rows if row is not None]
        device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
        if _lengths(inputs) is None:
            return torch.stack(kept).to(device=device, dtype=self._computed)
        padded = kept[0].new_zeros((len(kept), _width(inputs), *kept[0].shape[1:]))
        for place, row in zip(padded, kept, strict=True):
            place[: len(row)] = row
        return padded.to(device=device, dtype=self._computed)

    # ------------------------------------------------------------------ the law

    def fault(self, inputs: Mapping[str, Any]) -> str:
        """Why this model cannot be cut here, tried on a batch; empty where the outputs are the same.

        The outputs are compared at every place that is not padding; the bound is a share of their spread.
        """
        plain = {name: value for name, value in inputs.items() if name != "labels"}
        try:
            self.add(inputs)
            with evaluating(self.model), torch.no_grad():
                whole = self.model(**plain)
                with self.given(inputs):
                    cut = self.model(**plain)
        except Exception as fault:  # model code may raise anything where a block does not do its part
            return f"{type(fault).__name__}: {' '.join(str(fault).split())[:120]}"
        bound = max(BOUND.get(self._computed, 1e-5), BOUND.get(self.dtype, 0) if self.dtype is not None else 0)
        for name, value in whole.items():
            if isinstance(value, Tensor) and value.is_floating_point() and isinstance(cut.get(name), Tensor):
                gap = _gap(value, cut[name], inputs)
                if not gap <= bound:
                    return f"{name} would differ by {gap:.1e} of their spread"
        return ""


@final
@dataclass(frozen=True)
class Request:
    """What the cache of a run is made of.

    Attributes:
        sets: prepared rows, each with a column "length"; the training rows first.
        collate: a batch of a set's features; the flag asks for the training rows' random draw.
        redraw: moves that draw to another epoch and back: whether the rows are the same in every epoch is tried.
        dtype: of the kept states; None for the model's own.
        device: where the model computes.
        noisy: dropout is asked for in the frozen part.
    """

    sets: Sequence[Any]
    collate: Callable[[Sequence[Mapping[str, Any]], bool], dict[str, Any]]
    redraw: Callable[[int], None]
    dtype: torch.dtype | None
    device: torch.device
    noisy: bool


def kept(model: PreTrainedModel, trained: Sequence[str], request: Request) -> tuple[Prefix | None, str]:
    """Every row's frozen prefix, and what is to be said of it.

    Nothing is kept where the rows vary from epoch to epoch, where the model cannot be cut, or where half of the free
    memory would not hold it: then the model computes everything in every epoch, and the remark says why.
    """
    cut = cut_of(model, trained)
    if cut is None:
        return None, ""
    again = "the frozen prefix is computed in every epoch"
    if request.noisy:
        return None, f"{again}: frozen_dropout asks for dropout in it"
    if any("length" not in (getattr(part, "column_names", None) or ()) for part in request.sets):
        return None, f"{again}: rows that come one by one, or prepared without a column 'length', are not kept"
    prefix = Prefix(model, cut, request.dtype)
    rows = request.sets[0]
    lengths = [list(part["length"]) for part in request.sets]
    ends = sorted(range(len(rows)), key=lambda row: lengths[0][row])
    picks = sorted({ends[0], ends[len(ends) // 2], ends[-1]})
    some = [rows[index] for index in picks]

    def batch(features: Sequence[Mapping[str, Any]], training: bool) -> dict[str, Any]:
        made = request.collate(features, training)
        made.pop("row", None)
        return {name: v.to(request.device) if isinstance(v, Tensor) else v for name, v in made.items()}

    first = batch(some, True)
    request.redraw(1)
    second = batch(some, True)
    request.redraw(0)
    if prefix.keys(first) != prefix.keys(second):
        return None, f"{again}: the training rows are drawn anew in each"
    fault = prefix.fault(first)
    if fault:
        return None, f"{again}: {type(model).__name__} cannot be cut ({fault})"
    counted = sum(lengths[0][index] for index in picks)
    needed = prefix.nbytes * sum(map(sum, lengths)) // max(1, counted)
    if needed > _free_memory() // 2:
        return None, (
            f"{again}: keeping it would take about {needed / 1e9:.1f} GB, "
            f"more than half of the free memory ({_free_memory() / 1e9:.1f} GB)"
        )
    prefix.states.clear()  # the rows that were tried stood in a batch of their own
    for number, part in enumerate(request.sets):
        for indices in batches(lengths[number]):
            prefix.add(batch([part[index] for index in indices], number == 0))
    logger.info("the frozen prefix up to %s is kept: %.1f MB", cut.path, prefix.nbytes / 1e6)
    return prefix, ""


def _free_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Rows in batches of like length, the longest first: a function of the lengths alone."""
    found: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        here = found[-1] if found else []
        if here and len(here) < ROWS and (len(here) + 1) * max(1, lengths[here[0]]) <= TOKENS:
            here.append(index)
        else:
            found.append([index])
    return found


# ---------------------------------------------------------------------- batches


def _rows(inputs: Mapping[str, Any]) -> int:
    return int(next(value.shape[0] for value in inputs.values() if isinstance(value, Tensor)))


def _width(inputs: Mapping[str, Any]) -> int:
    mask = inputs.get("attention_mask")
    return int(mask.shape[1]) if isinstance(mask, Tensor) and mask.ndim == 2 else -1


def _lengths(inputs: Mapping[str, Any]) -> list[int] | None:
    """Places of each row that are not padding; None where there is no mask, or padding that is not on the right."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    lengths = mask.sum(1)
    places = torch.arange(mask.shape[1], device=mask.device)
    if not bool((mask.bool() == (places[None] < lengths[:, None])).all()):
        return None
    return [int(length) for length in lengths.tolist()]


def _gap(whole: Tensor, cut: Tensor, inputs: Mapping[str, Any]) -> float:
    """The largest difference as a share of the spread, padding left out."""
    if whole.shape != cut.shape:
        return float("inf")
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and whole.shape[:2] == mask.shape:
        whole, cut = whole[mask.bool()], cut[mask.bool()]
    spread = float(whole.float().std()) if whole.numel() > 1 else 1.0
    return float((whole.float() - cut.float()).abs().max()) / max(spread, 1e-6)


# ---------------------------------------------------------------------- what modules return


def _handing_on(form: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return made(form, args[0] if args else kwargs["hidden_states"])

    return forward


def _answering(form: Any, states: Tensor) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: made(form, states)
