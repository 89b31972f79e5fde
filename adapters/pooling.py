"""A head that reads elsewhere: another pooling of the hidden states, or a lower block, as a part of the live model.

Blocks above the one that the head reads hand their input on. Where the pooling is not the model class's own, the
output layer is given the pooled last hidden state of the same forward pass instead of what the class feeds it; what
lies between in the class (BERT's pooler, RoBERTa's dense layer, its dropout) is then outside of the computation. All
of it is hooks and instance-level forwards: classes, objects, names and bytes of the model stay, and `strip` takes it
out again.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Tensor, nn

from adapters import graph
from adapters.anatomy import block_lists, copied, own_name, owner
from adapters.errors import RequestError, message
from adapters.handing import form_of, hands_on, hidden_in, pass_over, take_back
from adapters.reading import Reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLACES: Final = 6  # of a row that a reading is tried on
SHORTER: Final = 2  # places of the second row that are padding
BOUND: Final = {torch.float32: 1e-4, torch.float64: 1e-6, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def pooled(states: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """The hidden states of each row as one.

    Args:
        states: hidden states, shape (rows, places, width).
        mask: 1 where a place is no padding, shape (rows, places), padding on either side; None for no padding.
        pooling: "first", "mean" or "last", of the places that are no padding. The mean is taken in float32 at least.

    Returns:
        Shape (rows, width), in the dtype of the states.
    """
    seen = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if mask is None else mask.bool()
    if pooling == "mean":
        wide = states if states.dtype == torch.float64 else states.float()
        total = wide.masked_fill(~seen.unsqueeze(-1), 0).sum(1)
        return (total / seen.sum(1, keepdim=True).clamp(min=1)).to(states.dtype)
    order = seen.int() if pooling == "first" else seen.int().flip(1)
    place = order.argmax(1)
    if pooling == "last":
        place = states.shape[1] - 1 - place
    return states[torch.arange(states.shape[0], device=states.device), place]


@final
class Reader:
    """Carries the pooled states of a forward pass from the base model to the output layer; keeps nothing after it.

    Args:
        pooling: how the states of a row become one.
        mask_at: the place of the attention mask among the base model's arguments; -1 where it takes none.
    """

    def __init__(self, pooling: str, mask_at: int) -> None:
        self.pooling = pooling
        self.mask_at = mask_at
        self._given: dict[int, Tensor] = {}  # by thread

    @property
    def told(self) -> tuple[str, int]:
        """What it does to a pass; see `graph.Telling`."""
        return self.pooling, self.mask_at

    def __deepcopy__(self, memo: dict[int, Any]) -> Reader:
        """Of a copy of the model, which is not in the middle of a pass."""
        memo[id(self)] = again = Reader(self.pooling, self.mask_at)
        return again

    def __getstate__(self) -> dict[str, Any]:
        """The same for pickles."""
        return {"pooling": self.pooling, "mask_at": self.mask_at, "_given": {}}

    def take(self, _base: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """After the base model: pool its last hidden state, (rows, places, width), by the mask of the same pass."""
        mask = kwargs.get("attention_mask")
        if mask is None and 0 <= self.mask_at < len(args):
            mask = args[self.mask_at]
        states = hidden_in(output)
        if states.ndim != 3 or (isinstance(mask, Tensor) and mask.shape != states.shape[:2]):
            raise RequestError(
                message(
                    "a head that pools hidden states needs one for each place, and a mask of the same places",
                    where="pooling",
                    expected="states (rows, places, width), mask (rows, places)",
                    found=f"{tuple(states.shape)}, {tuple(mask.shape) if isinstance(mask, Tensor) else 'no mask'}",
                )
            )
        self._given[threading.get_ident()] = pooled(states, mask if isinstance(mask, Tensor) else None, self.pooling)

    def give(self, _layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before the output layer: the pooled states; at every place where the class asks for a state of each."""
        states = self._given.pop(threading.get_ident())
        return (states if args[0].ndim == 2 else states.unsqueeze(1).expand(-1, args[0].shape[1], -1), *args[1:])

    def forget(self, _model: nn.Module, _args: Any, output: Any) -> Any:
        """After the whole model, whether it came to its end or not."""
        self._given.pop(threading.get_ident(), None)
        return output


@final
@dataclass(frozen=True)
class Placement:
    """What putting a reading into a model takes.

    Attributes:
        reading: where the head reads.
        forms: of the blocks that hand their input on, path -> what they return beside hidden states.
        output: the path of the output layer.
        unread: the parameters that the computation loses by it, by their own names: of the blocks above, and of what
            the class's own reading alone used.
    """

    reading: Reading
    forms: Mapping[str, Any]
    output: str
    unread: frozenset[str]


def place(model: PreTrainedModel, pooling: str | None = None, layer: int | None = None) -> Placement:
    """Let the head of a live model read elsewhere, in place of whatever reading was there before.

    Everything is tried on a copy of the graph around the same tensors first, on two made-up rows.

    Args:
        model: with its head.
        pooling: "first", "mean" or "last"; "own" or None for the model class's own.
        layer: how many blocks run below the head; None for all.

    Raises:
        RequestError: a model that cannot be read so; it is as it was.
    """
    reading = Reading(pooling or "own", layer)
    found = planned(model, reading) if reading.elsewhere else Placement(reading, {}, "", frozenset())
    strip(model)
    put(model, found)
    return found


@contextlib.contextmanager
def tried(model: PreTrainedModel, reading: Reading) -> Iterator[frozenset[str]]:
    """The model reads there from now on, instead of wherever an earlier adaptation of it read, unless an error follows.

    Yields:
        The parameters that the computation loses by it, by their own names.
    """
    found = planned(_whole(model), reading) if reading.elsewhere else None
    before = placed(model)
    strip(model)
    if found is not None:
        put(model, found)
    try:
        yield found.unread if found is not None else frozenset()
    except BaseException:
        place(model, before.pooling, before.layer)
        raise


def _whole(model: PreTrainedModel) -> PreTrainedModel:
    """The model, or where weights are still to arrive a copy with zeros in the memory of one in their place."""
    if not any(parameter.is_meta for parameter in model.parameters()):
        return model
    return copied(model, lambda t: torch.zeros((), dtype=t.dtype).expand(t.shape) if t.is_meta else t)


def put(model: PreTrainedModel, found: Placement) -> None:
    """Hooks and forwards of a placement, into a model that has none."""
    for path, form in found.forms.items():
        pass_over(model.get_submodule(path), form)
    if found.reading.plain:
        return
    names = list(inspect.signature(model.base_model.forward).parameters)
    reader = Reader(found.reading.pooling, names.index("attention_mask") if "attention_mask" in names else -1)
    model.base_model.register_forward_hook(reader.take, with_kwargs=True)
    model.get_submodule(found.output).register_forward_pre_hook(reader.give)
    model.register_forward_hook(reader.forget, always_call=True)


def strip(model: nn.Module) -> None:
    """Take a reading out of a model: the class's own again, all blocks running; no trace is left."""
    for module in model.modules():
        take_back(module)
        own = [key for key, hook in module._forward_pre_hooks.items() if _ours(hook)]
        own += [key for key, hook in module._forward_hooks.items() if _ours(hook)]
        for key in own:
            for hooks in (
                module._forward_pre_hooks,
                module._forward_hooks,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ):
                hooks.pop(key, None)


def _ours(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), Reader)


def refuse_unread(trained: set[str], unread: Collection[str], above: Collection[str], reading: Reading) -> None:
    """Refuse what would train without ever being computed; what the class's own reading alone used is left out instead.

    Args:
        trained: what the strategy trains; unread: what the computation loses; above: of that, in the blocks above the
            head's. All by their own names.
        reading: for the message.

    Raises:
        RequestError: naming the first of them.
    """
    owners = {owner(name) for name in unread}
    around = tuple(f"{path}." for path in owners)  # an adapter around a layer that is not computed
    inside = {name for name in trained if name.startswith(around) and owner(name) not in owners}
    lost = sorted(trained & set(above) | inside)
    if lost:
        raise RequestError(
            message(
                "what is to be trained lies above the place that the head reads",
                where=f"pooling, layer: {reading}",
                found=f"{len(lost)} tensors, {lost[0]} first",
                remedy="Take a higher layer, or leave these modules out of what the strategy trains.",
            )
        )


def placed(model: PreTrainedModel) -> Reading:
    """Where the head of a live model reads now."""
    hooks = (getattr(hook, "__self__", None) for hook in model.base_model._forward_hooks.values())
    pooling = next((hook.pooling for hook in hooks if isinstance(hook, Reader)), "own")
    lists = block_lists(model) if any(hands_on(module) for module in model.modules()) else []
    return Reading(pooling, lists[-1].length if lists else None)


# ---------------------------------------------------------------------- tried first


def planned(model: PreTrainedModel, reading: Reading) -> Placement:
    """What putting a reading into a model takes, tried on a copy around the same tensors; the model is left alone.

    Raises:
        RequestError: a class that cannot be read so: an encoder-decoder; for `layer` no stack of blocks, blocks that
            share weights, a number of blocks that is not there; for `pooling` no one output layer of the width of the
            hidden states, or outputs that are not those computed by hand.
    """
    return graph.known(model, reading, lambda: _planned(model, reading))


def _planned(model: PreTrainedModel, reading: Reading) -> Placement:
    """The same, found anew."""
    where = f"pooling, layer on {type(model).__name__}"
    if model.config.is_encoder_decoder:
        raise RequestError(
            message("the head of an encoder-decoder reads its decoder's end token", where=where, remedy=_LEAVE)
        )
    bare = _copy(model)
    above = _above(bare, reading, where)
    inputs = _two_rows(bare)
    try:
        whole = _Pass(bare, inputs)
        output = _output_layer(bare, whole, where) if not reading.plain else ""
        forms = {path: form_of(whole.outputs[path]) for path in above}
        found = Placement(reading, forms, output, frozenset())
        put(bare, found)
        cut = _Pass(bare, inputs)
        fault = _fault(bare, found, whole, cut, inputs)
    except RequestError:
        raise
    except Exception as error:  # model code may raise anything where a block does not do its part
        fault = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    if fault:
        raise RequestError(message(f"the head cannot read {reading}", where=where, found=fault, remedy=_LEAVE))
    idle = tuple(f"{path}." for path in above)
    lost = {name for name in whole.read - cut.read if not name.startswith(idle)}
    lost |= {own_name(name) for name, _ in bare.named_parameters() if name.startswith(idle)} if idle else set()
    return Placement(reading, forms, output, frozenset(lost))


def _copy(model: PreTrainedModel) -> PreTrainedModel:
    """The graph around the same tensors, with the class's own reading."""
    bare = copied(model, lambda tensor: tensor)
    for name in ("forward", "_original_forward"):  # what accelerate puts before the pass of the model itself
        vars(bare).pop(name, None)
    for module in bare.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes would rearrange the shared bytes
            vars(module)["support_avx512bf16_for_cpu"] = False
    strip(bare)
    return bare


_LEAVE: Final = "Leave the option out: the model class's own head reads there."


def _above(model: PreTrainedModel, reading: Reading, where: str) -> list[str]:
    """The paths of the blocks above the one that the head reads."""
    if reading.layer is None:
        return []
    lists = block_lists(model)
    reason = ""
    if not lists:
        reason = "no stack of blocks was found"
    elif len(lists) > 1:
        reason = "the model has several stacks of blocks"
    elif lists[0].shared:
        reason = "its blocks share one set of weights"
    if reason:
        raise RequestError(message(f"the head cannot read a lower block: {reason}", where=where, remedy=_LEAVE))
    depth = lists[0].length
    if not 1 <= reading.layer <= depth:
        raise RequestError(
            message("a wrong number of blocks", where=f"{where}: layer", expected=f"1 to {depth}", found=reading.layer)
        )
    return lists[0].names()[reading.layer :]


@final
class _Pass:
    """One forward pass in eval mode, looked at: outputs of every module, calls in their order, what was read.

    Attributes:
        outputs: path -> what the module returned last.
        calls: paths in the order in which the modules came to their ends.
        logits: the model's.
        read: the parameters that autograd reaches from the logits, by their own names.
    """

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
        self.outputs: dict[str, Any] = {}
        self.calls: list[str] = []
        hooks = [module.register_forward_hook(self._note(path)) for path, module in model.named_modules()]
        names = {}
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)  # the copy's own parameters around the model's memory
                names[id(parameter)] = own_name(name)
        try:
            model.train(False)
            with torch.enable_grad():
                self.logits: Tensor = model(**inputs).logits
        finally:
            for hook in hooks:
                hook.remove()
        self.read = {names[id(leaf)] for leaf in _leaves(self.logits) if id(leaf) in names}

    def _note(self, path: str) -> Any:
        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self.outputs[path] = output
            self.calls.append(path)

        return note


def _leaves(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors at the ends of an autograd graph."""
    seen, waiting = set(), [tensor.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf: Tensor | None = getattr(node, "variable", None)  # only the ends of the graph have one
        if leaf is not None:
            yield leaf
        waiting += [following for following, _ in node.next_functions]


def _output_layer(model: PreTrainedModel, whole: _Pass, where: str) -> str:
    """The path of the linear layer outside the base model that comes last and gives the logits."""
    base = {id(module) for module in model.base_model.modules()} if model.base_model is not model else set()
    modules = dict(model.named_modules())
    linear = [path for path in whole.calls if isinstance(modules[path], nn.Linear) and id(modules[path]) not in base]
    states = hidden_in(whole.outputs[_path_of(model, model.base_model)])
    found: Any = modules[linear[-1]] if linear else None
    if found is None or found.out_features != whole.logits.shape[-1] or states.ndim != 3:
        reason = "its head has no one linear layer over hidden states (rows, places, width)"
    elif found.in_features != states.shape[-1]:
        reason = f"its output layer reads {found.in_features} numbers, a hidden state has {states.shape[-1]}"
    else:
        return str(linear[-1])
    raise RequestError(message(f"the head cannot pool hidden states: {reason}", where=where, remedy=_LEAVE))


def _path_of(model: nn.Module, wanted: nn.Module) -> str:
    return str(next(path for path, module in model.named_modules() if module is wanted))


def _fault(model: PreTrainedModel, found: Placement, whole: _Pass, cut: _Pass, inputs: Mapping[str, Tensor]) -> str:
    """What is wrong with a pass through the placed model; empty where it is what is computed by hand."""
    if found.forms:
        names = block_lists(model)[-1].names()
        states = hidden_in(whole.outputs[names[-1]])
        last = hidden_in(cut.outputs[list(found.forms)[-1]])
        if not torch.equal(states, last):
            return f"above block {found.reading.layer} the hidden states are others than below"
    if found.reading.plain:
        return "" if cut.logits.shape == whole.logits.shape else "logits of another shape"
    layer = model.get_submodule(found.output)
    states = hidden_in(cut.outputs[_path_of(model, model.base_model)])
    mask = inputs.get("attention_mask")
    with torch.no_grad():
        wanted = layer.forward(_by_hand(states, mask, found.reading.pooling))
    gap = float((wanted - cut.logits.detach()).abs().max()) / max(float(wanted.float().std()), 1e-6)
    bound = BOUND.get(wanted.dtype, 5e-2)
    return "" if gap <= bound else f"logits differ by {gap:.1e} of their spread from those computed by hand"


def _by_hand(states: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """The pooling of each row by itself, its padding cut off."""
    rows = []
    for row, state in enumerate(states):
        own = state if mask is None else state[mask[row].bool()]
        rows.append({"first": own[0], "last": own[-1], "mean": own.float().mean(0).to(own.dtype)}[pooling])
    return torch.stack(rows)


def _two_rows(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two rows that the model takes: noise for pictures, or tokens, the second row shorter."""
    config: Any = model.config
    device = next(parameter.device for parameter in model.parameters() if parameter.device.type != "meta")
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or 32
        height, width = size if isinstance(size, list | tuple) else (size, size)
        noise = torch.randn((2, config.num_channels, height, width), generator=generator)
        return {"pixel_values": noise.to(device=device, dtype=model.dtype)}
    text = config.get_text_config()
    if text.pad_token_id is None:
        text.pad_token_id = 0  # the copy's config: classes of decoders look for the last token by it
    low = min(8, text.vocab_size - 1)
    ids = torch.randint(low, text.vocab_size, (2, PLACES), generator=generator)
    ids[ids == text.pad_token_id] = low
    mask = torch.ones_like(ids)
    ids[1, PLACES - SHORTER :], mask[1, PLACES - SHORTER :] = text.pad_token_id, 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
