"""Rows of one batch, each through its own adapter: what every changed module of a model does then.

The frozen product of a linear map is taken once for the whole batch; each row's low-rank term is added by one batched
product (x A^T) B^T over the factors of the rows, and rows whose inputs are turned or whose outputs are scaled have that
done before and after. Whole tensors of a norm or a bias go by row, too; any other module with tensors of its own runs
once for each adapter, on that adapter's rows. Of a batch whose rows all take the same adapter nothing is gathered.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from adapters.anatomy import linear_map
from adapters.errors import RequestError, message
from adapters.inserts import Change, Kron, Pair, by_both, in_blocks
from adapters.quantize import is_packed

SMALL = 1 << 24  # bytes of the weights of all rows up to which they are put side by side


@final
class Choice:
    """Which adapter each row of the pass in progress takes; one object for all modules of a model.

    Attributes:
        names: adapter by row; empty outside a pass.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self._seen: set[Any] = set()
        self._kept: dict[Any, Any] = {}

    @contextlib.contextmanager
    def made(self, names: Sequence[str]) -> Iterator[None]:
        """Within it the rows of every pass take these adapters, row by row."""
        before = self.names, self._seen, self._kept
        self.names, self._seen, self._kept = tuple(names), set(), {}
        try:
            yield
        finally:
            self.names, self._seen, self._kept = before

    def gathered(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives; kept from the second pass on (generation goes token by token): one pass needs little."""
        if key in self._kept:
            return self._kept[key]
        made = make()
        if key in self._seen:
            self._kept[key] = made
        self._seen.add(key)
        return made


@final
class Mixed:
    """The forward pass of one module of which adapters change something.

    Args:
        path: of the module, for messages.
        module: as the backbone has it.
        choice: of the model.

    Attributes:
        changes: by adapter.
    """

    def __init__(self, path: str, module: nn.Module, choice: Choice) -> None:
        self.path, self.module, self.choice = path, module, choice
        self.changes: dict[str, Change] = {}
        self._linear = linear_map(path, module)
        self._plain: Callable[..., Any] = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own, with the rows first in its first argument."""
        names = self.choice.names
        present = dict.fromkeys(names)
        if not any(name in self.changes for name in present):
            return self._plain(*args, **kwargs)
        if len(present) == 1:
            return self.alone(self.changes[names[0]], *args, **kwargs)
        inputs = args[0] if args else next(iter(kwargs.values()))
        rows = len(names)
        if not isinstance(inputs, Tensor) or inputs.ndim < 1 or inputs.shape[0] % rows:
            shape = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise RequestError(
                message("a pass of another number of rows", where=self.path, expected=f"{rows} rows", found=shape)
            )
        if self._linear is not None:
            return self._mapped(inputs, names, list(present))
        if type(self.module) is nn.LayerNorm:
            return self._normed(inputs, names)
        return self._by_group(names, args, kwargs)

    # ------------------------------------------------------------------ one adapter

    def alone(self, change: Change, *args: Any, **kwargs: Any) -> Any:
        """The module with one adapter's change."""
        if "weight" in change.whole and is_packed(self.module):
            bias = change.whole.get("bias", self.module._parameters.get("bias"))
            return nn.functional.linear(args[0], change.whole["weight"].to(args[0].dtype), bias)
        given = args if change.turn is None else (change.turn(args[0]), *args[1:])
        with standing_in(self.module, change.whole):
            output = self._plain(*given, **kwargs)
        if not change.by_rows:
            return output
        made = output if change.gain is None else output * change.gain
        made = made if change.shift is None else made + change.shift
        for term in (change.pair, change.kron):
            made = made if term is None else made + term.term(args[0])
        return made.to(output.dtype)

    # ------------------------------------------------------------------ several adapters

    def _mapped(self, inputs: Tensor, names: Sequence[str], present: list[str]) -> Tensor:
        """A linear map: (rows, ..., in) to (rows, ..., out)."""
        changed = {name: self.changes[name] for name in present if name in self.changes}
        dense = [name for name, change in changed.items() if "weight" in change.whole]
        turned = self._turned(inputs, names, changed)
        output = self._dense(turned, names, dense) if dense else self._plain(turned)
        flat = output.view(len(names), -1, output.shape[-1])
        if any(change.gain is not None for change in changed.values()):
            gain = self.choice.gathered((self, "gain"), lambda: self._gains(names))[:, None]
            flat = flat * gain
        if any(_adds(name, change, dense) for name, change in changed.items()):
            shift = self.choice.gathered((self, "shift"), lambda: self._shifts(names, dense))[:, None]
            flat = flat + shift if flat.dtype != shift.dtype else flat.add_(shift)
        pairs = {name: change.pair for name, change in changed.items() if change.pair is not None}
        if pairs:
            down, up = self.choice.gathered((self, "pair"), lambda: _factors(names, pairs))
            rows = inputs.reshape(len(names), -1, inputs.shape[-1])
            if flat.dtype == down.dtype == rows.dtype:
                flat.baddbmm_(torch.bmm(rows, down.transpose(1, 2)), up)
            else:
                flat = flat + torch.bmm(torch.bmm(rows.to(down.dtype), down.transpose(1, 2)), up)
        krons = {name: change.kron for name, change in changed.items() if change.kron is not None}
        for shapes in dict.fromkeys(kron.shapes for kron in krons.values()):
            own = {name: kron for name, kron in krons.items() if kron.shapes == shapes}
            places = _whose(names, own, flat.device)
            left = self.choice.gathered((self, shapes, 0), functools.partial(_picked, names, _side(own, "left")))
            right = self.choice.gathered((self, shapes, 1), functools.partial(_picked, names, _side(own, "right")))
            rows = inputs.reshape(len(names), -1, inputs.shape[-1])[places]
            flat = flat.to(_widest((flat, left))).index_add(0, places, by_both(rows.to(left.dtype), left, right))
        return flat.to(output.dtype).view(output.shape)

    def _turned(self, inputs: Tensor, names: Sequence[str], changed: Mapping[str, Change]) -> Tensor:
        """The inputs, of which those of some adapters are turned; (rows, ..., in)."""
        turns = {name: change.turn for name, change in changed.items() if change.turn is not None}
        if not turns:
            return inputs
        flat = inputs.reshape(len(names), -1, inputs.shape[-1])
        scales = {name: turn.scale for name, turn in turns.items() if turn.scale is not None}
        if scales:
            flat = flat * self.choice.gathered((self, "scale"), lambda: _stacked(names, scales, 1.0))[:, None]
        pairs = {name: turn.pair for name, turn in turns.items() if turn.pair is not None}
        if pairs:
            down, up = self.choice.gathered((self, "turn"), lambda: _factors(names, pairs))
            flat = flat + torch.bmm(torch.bmm(flat.to(down.dtype), down.transpose(1, 2)), up)
        blocks = {name: turn.blocks for name, turn in turns.items() if turn.blocks is not None}
        for shape in dict.fromkeys(each.shape for each in blocks.values()):
            own = {name: each for name, each in blocks.items() if each.shape == shape}
            rows = _whose(names, own, flat.device)
            stack = self.choice.gathered((self, shape), functools.partial(_picked, names, own))
            part = in_blocks(flat[rows].to(stack.dtype), stack)  # (rows, places, in)
            flat = flat.to(part.dtype).index_copy(0, rows, part)
        return flat.to(inputs.dtype).view(inputs.shape)

    def _dense(self, inputs: Tensor, names: Sequence[str], dense: Sequence[str]) -> Tensor:
        """The product where some adapters have a weight of their own: once for each of them, once for all others."""
        first = self.changes[dense[0]].whole["weight"]
        if len(dense) == len(set(names)) and len(names) * first.numel() * first.element_size() <= SMALL:
            return self._small(inputs, names)
        times = inputs.shape[0] // len(names)
        others = set(names) - set(dense)
        parts, places = [], []
        for group in (*({name} for name in dense), others):
            picked = _places(names, group, times, inputs.device)
            if not len(picked):
                continue
            own = inputs.index_select(0, picked)
            change = self.changes[next(iter(group))] if group is not others else Change()
            parts.append(self.alone(Change(whole=change.whole), own))
            places.append(picked)
        return _back(parts, places)

    def _small(self, inputs: Tensor, names: Sequence[str]) -> Tensor:
        """The product where each row has a small weight of its own (heads): one batched product."""
        own = self.module._parameters.get("bias")

        def gathered() -> tuple[Tensor, Tensor | None]:
            wholes = [self.changes[name].whole for name in names]
            bias = None if own is None else torch.stack([whole.get("bias", own) for whole in wholes])
            return torch.stack([whole["weight"] for whole in wholes]), bias

        weights, bias = self.choice.gathered((self, "dense"), gathered)
        turned = self._linear is not None and self._linear.transposed and not is_packed(self.module)
        flat = inputs.reshape(len(names), -1, inputs.shape[-1]).to(weights.dtype)
        output = torch.bmm(flat, weights if turned else weights.transpose(1, 2))
        output = output if bias is None else output + bias[:, None]
        return output.to(inputs.dtype).view(*inputs.shape[:-1], output.shape[-1])

    def _gains(self, names: Sequence[str]) -> Tensor:
        """What each row's outputs are multiplied by, (rows, out)."""
        gains = {name: change.gain for name, change in self.changes.items() if change.gain is not None}
        return _stacked(names, gains, 1.0)

    def _shifts(self, names: Sequence[str], dense: Sequence[str]) -> Tensor:
        """What comes on top of each row's outputs, (rows, out); of a bias of its own what that adds to the module's."""
        shifts = {name: change.shift for name, change in self.changes.items() if change.shift is not None}
        for name, change in self.changes.items():
            if "bias" in change.whole and name not in dense:
                shifts[name] = change.whole["bias"] - self.module.get_parameter("bias")
        return _stacked(names, {name: shift for name, shift in shifts.items() if name in names}, 0.0)

    def _normed(self, inputs: Tensor, names: Sequence[str]) -> Tensor:
        """A layer norm whose scale and shift go by row."""
        module: Any = self.module

        def gathered() -> list[Tensor | None]:
            found: list[Tensor | None] = []
            for leaf in ("weight", "bias"):
                own = module._parameters.get(leaf)
                rows = [self.changes[n].whole.get(leaf, own) if n in self.changes else own for n in names]
                found.append(None if own is None else torch.stack(rows))
            return found

        scale, shift = self.choice.gathered(self, gathered)
        shape = module.normalized_shape
        if len(shape) != 1 or scale is None:
            return self._by_group(names, (inputs,), {})  # type: ignore[no-any-return]
        flat = nn.functional.layer_norm(inputs, shape, None, None, module.eps).view(len(names), -1, shape[0])
        flat = flat * scale[:, None] if shift is None else torch.addcmul(shift[:, None], flat, scale[:, None])
        return flat.view(inputs.shape)

    def _by_group(self, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Any other module: once for each adapter, on its rows."""
        first = args[0] if args else next(iter(kwargs.values()))
        count, times = first.shape[0], first.shape[0] // len(names)
        parts, places = [], []
        for name in dict.fromkeys(names):
            picked = _places(names, {name}, times, first.device)

            def own(value: Any, picked: Tensor = picked) -> Any:
                follows = isinstance(value, Tensor) and value.ndim and value.shape[0] == count
                return value.index_select(0, picked) if follows else value

            with self.choice.made([name]):
                change = self.changes.get(name, Change())
                parts.append(self.alone(change, *map(own, args), **{key: own(value) for key, value in kwargs.items()}))
            places.append(picked)
        return _back(parts, places)


def _adds(name: str, change: Change, dense: Sequence[str]) -> bool:
    """Whether something is added to an adapter's outputs that has not been added already."""
    return change.shift is not None or ("bias" in change.whole and name not in dense)


def _stacked(names: Sequence[str], known: Mapping[str, Tensor], rest: float) -> Tensor:
    """The tensors of the rows, one above the other; rows that have none get this number everywhere."""
    none = torch.full_like(next(iter(known.values())), rest)
    wide = _widest(known.values())
    return torch.stack([known.get(name, none).to(wide) for name in names])


def _widest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype that holds the values of all."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def _whose(names: Sequence[str], known: Collection[str], device: torch.device) -> Tensor:
    """The numbers of these adapters' rows."""
    return torch.tensor([row for row, name in enumerate(names) if name in known], device=device)


def _side(krons: Mapping[str, Kron], side: str) -> dict[str, Tensor]:
    """One of the two matrices of each."""
    return {name: kron.left if side == "left" else kron.right for name, kron in krons.items()}


def _picked(names: Sequence[str], known: Mapping[str, Tensor]) -> Tensor:
    """The tensors of those rows that have one."""
    return torch.stack([known[name] for name in names if name in known])


def _factors(names: Sequence[str], known: Mapping[str, Pair]) -> tuple[Tensor, Tensor]:
    """The factors of the rows, (rows, rank, in) and (rows, rank, out); smaller ranks are filled up with zeros."""
    wide = _widest(pair.down for pair in known.values())
    pairs = {name: pair.to(wide) for name, pair in known.items()}
    rank = max(pair.down.shape[0] for pair in pairs.values())
    pad = nn.functional.pad
    for name, pair in list(pairs.items()):
        lack = rank - pair.down.shape[0]
        if lack:
            pairs[name] = Pair(pad(pair.down, (0, 0, 0, lack)), pad(pair.up, (0, 0, 0, lack)))
    if len(pairs) < len(set(names)):
        like = next(iter(pairs.values()))
        nothing = Pair(torch.zeros_like(like.down), torch.zeros_like(like.up))
        pairs |= {name: nothing for name in names if name not in pairs}
    rows = [pairs[name] for name in names]
    return torch.stack([pair.down for pair in rows]), torch.stack([pair.up for pair in rows])


@contextlib.contextmanager
def standing_in(module: nn.Module, whole: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it these tensors stand in the place of the module's own parameters."""
    before = {leaf: module._parameters[leaf] for leaf in whole}
    module._parameters.update(whole)  # type: ignore[arg-type]
    try:
        yield
    finally:
        module._parameters.update(before)


def _places(names: Sequence[str], group: set[str], times: int, device: torch.device) -> Tensor:
    """Where along the first axis the rows of some adapters lie, each row `times` entries long."""
    rows = torch.tensor([row for row, name in enumerate(names) if name in group], dtype=torch.long, device=device)
    if times == 1:
        return rows
    return (rows[:, None] * times + torch.arange(times, device=device)).reshape(-1)


def _back(parts: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
    """Rows that were taken apart, in their order again."""
    order = torch.cat(list(places))
    joined = torch.cat(list(parts))
    return torch.empty_like(joined).index_copy_(0, order, joined)


def _forward(module: nn.Module) -> Any:
    return vars(module).get("forward")


def put(model: nn.Module, choice: Choice, name: str, changes: Mapping[str, Change]) -> None:
    """Take one adapter in: each module that it changes is mixed from now on."""
    for path, change in changes.items():
        module = model.get_submodule(path)
        if not isinstance(_forward(module), Mixed):
            vars(module)["forward"] = Mixed(path, module, choice)
        _forward(module).changes[name] = change


def take_out(model: nn.Module, name: str, paths: Iterable[str]) -> None:
    """Let one adapter go: a module that none changes any more is the class's own again."""
    for path in paths:
        module = model.get_submodule(path)
        slot = _forward(module)
        if isinstance(slot, Mixed):
            slot.changes.pop(name, None)
            if not slot.changes:
                vars(module).pop("forward")


def confirm(model: nn.Module, paths: Sequence[str], inputs: Mapping[str, Any]) -> set[str]:
    """The modules that compute each row by itself, seen in three passes: rows come first in what they take and give.

    The passes are of 5 and of 7 rows, and of 5 rows of which the first is another one: then the other rows' share of
    what a module takes must stay as it is.

    Args:
        model: in eval mode.
        paths: of the modules that are asked about.
        inputs: one row, without padding.
    """
    main = model.main_input_name if isinstance(model.main_input_name, str) else "input_ids"
    many = {count: _repeated(inputs, count) for count in (5, 7)}
    other = dict(many[5])
    for name in {main, "decoder_input_ids"} & set(other):
        changed = other[name].clone()
        changed[0] = changed[0].roll(1, -1)
        other[name] = changed
    five, seven, moved = (_seen(model, paths, given) for given in (many[5], many[7], other))
    found = set()
    for path in paths:
        calls = list(zip(five.get(path, ()), seven.get(path, ()), moved.get(path, ()), strict=False))
        alike = len(five.get(path, ())) == len(seven.get(path, ())) == len(moved.get(path, ()))
        if calls and alike and all(_by_rows(*call) for call in calls):
            found.add(path)
    return found


def _repeated(inputs: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {
        name: value[:1].repeat(count, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) and value.ndim else value
        for name, value in inputs.items()
    }


def _seen(model: nn.Module, paths: Sequence[str], inputs: Mapping[str, Any]) -> dict[str, list[tuple[Any, Any]]]:
    """What each module takes and gives in one pass, call by call."""
    seen: dict[str, list[tuple[Any, Any]]] = {}

    def note(path: str) -> Any:
        def noted(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen.setdefault(path, []).append((args[0] if args else next(iter(kwargs.values()), None), output))

        return noted

    hooks = [model.get_submodule(path).register_forward_hook(note(path), with_kwargs=True) for path in paths]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _by_rows(five: tuple[Any, Any], seven: tuple[Any, Any], moved: tuple[Any, Any]) -> bool:
    taken, given = zip(five, seven, moved, strict=True)
    if not all(isinstance(part, Tensor) and part.ndim for part in (*taken, *given)):
        return False
    for part in (taken, given):
        times = part[0].shape[0] // 5
        if times < 1 or [each.shape[0] for each in part] != [5 * times, 7 * times, 5 * times]:
            return False
    before, after = taken[0], taken[2]
    times = before.shape[0] // 5
    if before.shape != after.shape:
        return False
    return bool(torch.allclose(before[times:].float(), after[times:].float(), atol=1e-4, rtol=1e-4))
