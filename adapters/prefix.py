"""The frozen prefix, computed once a row and kept: what runs below the first trained module never changes.

Hidden states are kept (see `states`) by the content of the row, unpadded, and put back where the prefix ends: in the
output of the last frozen block, or of a wholly frozen encoder. Everything else in the model's forward pass (masks,
positions, rotary tables, the blocks above) stays the model's own work. For which rows of a run that is done, and
whether it pays, is said in `kept`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Tensor, nn

from adapters.anatomy import block_lists, owner
from adapters.forms import Form
from adapters.handing import form_of, hidden_in, made, standing_in
from adapters.modes import evaluating
from adapters.order import frozen_below
from adapters.states import States

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
        states: where they are kept; None for memory alone.
        form: of what the modules below the cut return, where it is known already.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cut: Cut,
        dtype: torch.dtype | None = None,
        states: States | None = None,
        form: Form | None = None,
    ) -> None:
        self.model = model
        self.cut = cut
        self.dtype = dtype
        self.states = States(None, 0) if states is None else states
        self.form = form
        self._sets: list[tuple[Any, Mapping[int, bytes]]] = []

    # ------------------------------------------------------------------ rows

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return self.states.nbytes

    def keys(self, inputs: Mapping[str, Any]) -> list[bytes]:
        """What each row of a batch is known by; see `row_keys`."""
        return row_keys(inputs, decoder=not self.model.config.is_encoder_decoder)

    def add(self, inputs: Mapping[str, Any]) -> list[bytes]:
        """Compute and keep the rows of a batch, on the model's device; those that are kept already stay as they are.

        Returns:
            What the rows are known by.
        """
        keys = self.keys(inputs)
        fresh = [row for row, key in enumerate(keys) if key not in self.states]
        if not fresh:
            return keys
        if len(fresh) < len(keys):
            inputs = _some(inputs, fresh)
        states = self.run(inputs)
        lengths = _lengths(inputs)
        for place, row in enumerate(fresh):
            state = states[place] if lengths is None else states[place, : lengths[place]]
            self.states.add(keys[row], state.to(dtype=self.dtype or state.dtype))
        return keys

    def know(self, rows: Any, keys: Mapping[int, bytes]) -> None:
        """Take down what the rows of a prepared set are known by, by their numbers in its column "row"."""
        self._sets.append((rows, keys))

    def known(self, rows: Any) -> Mapping[int, bytes] | None:
        """What was taken down of this very set; None where nothing was."""
        return next((keys for known, keys in self._sets if known is rows), None)

    def digest(self) -> str:
        """One digest over the kept states of all sets that were taken down."""
        return self.states.digest(key for _, keys in self._sets for key in keys.values())

    def run(self, inputs: Mapping[str, Any]) -> Tensor:
        """One pass up to the cut, in eval mode and without gradients."""
        passed: dict[int, Any] = {}
        hooks = [
            block.register_forward_hook(lambda module, _inputs, output: passed.update({id(module): form_of(output)}))
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
        states = hidden_in(caught[0])
        self.form = Form(form_of(caught[0]), tuple(passed[id(block)] for block in self.cut.passed), states.dtype)
        return states.detach()

    # ------------------------------------------------------------------ a forward pass that starts at the cut

    @contextlib.contextmanager
    def given(self, inputs: Mapping[str, Any], keys: Sequence[bytes] | None = None) -> Iterator[bool]:
        """Within it the model's forward pass over this batch takes the kept states; yields whether it does.

        A batch with a row that is not kept is computed as ever. Rows padded on the left are known with their padding.

        Args:
            inputs: of the model.
            keys: what the rows are known by; None looks at their content.
        """
        form = self.form
        found = self._gathered(inputs, self.keys(inputs) if keys is None else keys, form) if form else None
        if found is None or form is None:
            yield False
            return
        with answering(self.cut, form, found):
            yield True

    def _gathered(self, inputs: Mapping[str, Any], keys: Sequence[bytes], form: Form) -> Tensor | None:
        """The batch's states, padded with zeros to the batch's width; no value of the batch is looked at."""
        kept = [row for key in keys if (row := self.states.get(key)) is not None]
        width = _width(inputs)
        if not kept or len(kept) < len(keys) or len(keys) != _rows(inputs):
            return None
        longest = max(map(len, kept))
        if longest > width >= 0 or (width < 0 and any(len(row) != longest for row in kept)):
            return None
        padded = nn.utils.rnn.pad_sequence(kept, batch_first=True)
        if longest < width:
            padded = torch.cat([padded, padded.new_zeros((len(kept), width - longest, *padded.shape[2:]))], dim=1)
        device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
        return padded.to(device=device, dtype=form.dtype)

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
        computed = self.form.dtype if self.form is not None else torch.float32
        bound = max(BOUND.get(computed, 1e-5), BOUND.get(self.dtype, 0) if self.dtype is not None else 0)
        for name, value in whole.items():
            if isinstance(value, Tensor) and value.is_floating_point() and isinstance(cut.get(name), Tensor):
                gap = _gap(value, cut[name], inputs)
                if not gap <= bound:
                    return f"{name} would differ by {gap:.1e} of their spread"
        return ""


def row_keys(inputs: Mapping[str, Any], *, decoder: bool = True) -> list[bytes]:
    """What each row of a batch is known by: the bytes of its inputs, without padding, without labels.

    Args:
        inputs: of the model.
        decoder: what a decoder reads counts too; not where only an encoder's states are kept.
    """
    import xxhash

    lengths = _lengths(inputs)
    width = _width(inputs)
    names = sorted(name for name, value in inputs.items() if isinstance(value, Tensor) and name != "labels")
    if not decoder:
        names = [name for name in names if not name.startswith("decoder_")]
    count = _rows(inputs)
    plain = {name: inputs[name].detach().cpu().contiguous() for name in names}
    raw = {name: value.reshape(count, -1).view(torch.uint8).numpy() for name, value in plain.items()}
    keys = []
    for row in range(count):
        state = xxhash.xxh3_128()
        for name in names:
            shape, content = tuple(plain[name].shape[1:]), raw[name][row]
            if lengths is not None and shape and shape[0] == width:
                content = content[: lengths[row] * (len(content) // max(1, width))]
                shape = (lengths[row], *shape[1:])
            state.update(f"{name} {plain[name].dtype} {shape}".encode())
            state.update(content)
        keys.append(state.digest())
    return keys


def unpadded(inputs: Mapping[str, Any]) -> bool:
    """Whether the rows of a batch can be known without their padding."""
    return _lengths(inputs) is not None or not ("attention_mask" in inputs or "input_ids" in inputs)


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


def _some(inputs: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Some rows of a batch, as wide as the longest of them."""
    count, width = _rows(inputs), _width(inputs)
    some = {
        name: value[list(rows)] if isinstance(value, Tensor) and value.ndim and len(value) == count else value
        for name, value in inputs.items()
    }
    lengths = _lengths(some)
    if lengths is None:
        return some
    longest = max(lengths)
    return {
        name: value[:, :longest] if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == width else value
        for name, value in some.items()
    }


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


@contextlib.contextmanager
def answering(cut: Cut, form: Form, states: Tensor) -> Iterator[None]:
    """Within it a forward pass of the cut's model takes these hidden states, (rows, places, width), at the cut."""
    replaced: dict[nn.Module, Callable[..., Any]] = {
        block: _handing_on(each) for block, each in zip(cut.passed, form.passed, strict=True)
    }
    replaced[cut.holder] = _answering(form.output, states)
    with standing_in(replaced):
        yield


def _handing_on(form: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return made(form, args[0] if args else kwargs["hidden_states"])

    return forward


def _answering(form: Any, states: Tensor) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: made(form, states)
