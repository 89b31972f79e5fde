"""One loaded backbone, lent to one adaptation after another, and proven to come back as it was.

An adaptation that is over leaves the live model: its modules are put back, what it trained is read from the checkpoint
again, and every byte is compared with those that were loaded. What loading made new begins anew for each, by the same
draw as in a load of its own. What cannot be put back in place (packed weights, grown embeddings) is opened again.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, final

from adapters.errors import BackboneError, FolderError, message

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from adapters.fingerprint import Fingerprint

Opener = Callable[[], tuple[Any, set[str], Any]]
FORWARDS = ("forward", "_original_forward")  # what accelerate puts before the pass of the model itself


@final
class Lent:
    """A backbone for one adaptation at a time; `adapt.assemble` and `storage.load` take it in the place of its name.

    Args:
        opener: opens it: the model, the parameters that loading made new, the processor.
        folder: where its checkpoint lies; None where that is not on this machine: then it is opened again where
            an adaptation has trained its own tensors.
        say: takes what is to be said.

    Attributes:
        prints: its fingerprint, by what counts as the head; taken once.
        opened: how often it was read from disk.
    """

    def __init__(self, opener: Opener, folder: Path | None, say: Callable[[str], None]) -> None:
        self._opener, self._folder, self._say = opener, folder, say
        self.prints: dict[frozenset[str], Fingerprint] = {}
        self.opened = 0
        self._given: tuple[PreTrainedModel, frozenset[str], Any] | None = None
        self._digests: dict[str, str] = {}
        self._modules: dict[str, nn.Module] = {}
        self._hooks: dict[str, int] = {}
        self._config: dict[str, Any] = {}
        self._copy: tuple[Any, bytes] | None = None  # of the processor, for who begins next; and what it held
        self._away = False

    def begin(self, processor: Any = None) -> tuple[PreTrainedModel, set[str], Any]:
        """The model as it was loaded, what is new in it at first values of torch's random state, and a processor.

        Args:
            processor: the borrower's own; None for one of the backbone's, which nobody else has.

        Raises:
            BackboneError: it is still away.
            RequestError: it cannot be opened.
        """
        if self._away:
            raise BackboneError(message("the backbone is lent already", where="Lent", remedy="Give it back first."))
        if self._given is None:
            net, new, own = self._opener()
            self.opened += 1
            self._given = net, frozenset(new), own
            self._take_down(net)
        else:
            net, found, own = self._given
            new = set(found)
            first_values(net, new)
        self._away = True
        if processor is not None:
            return net, set(new), processor
        if self._copy is None or not self._copy[1] or _content(self._copy[0]) != self._copy[1]:
            lent = copy.deepcopy(own)  # a long vocabulary takes several times as long to be copied as to be looked at
            self._copy = lent, _content(lent)
        return net, set(new), self._copy[0]

    @property
    def digest(self) -> str:
        """One digest over all bytes that were loaded, what is new left out."""
        import xxhash

        state = xxhash.xxh3_128()
        for name in sorted(self._digests):
            state.update(f"{name} {self._digests[name]}".encode())
        return state.hexdigest()

    def give_back(self, strip: Callable[[Any], None] | None) -> str:
        """Take the backbone back from an adaptation; the adaptation is of no use any more.

        Args:
            strip: of the strategy that was applied; None where that came to nothing.

        Returns:
            Why it has to be opened again, which the next `begin` does; empty where it is as it was, byte for byte.
        """
        from adapters import pooling

        if not self._away or self._given is None:
            return ""
        self._away = False
        net, new, _ = self._given
        if strip is not None:
            strip(net)
        pooling.strip(net)
        for name in FORWARDS:
            vars(net).pop(name, None)
        for module in net.modules():
            if vars(module).get("gradient_checkpointing"):
                vars(module)["gradient_checkpointing"] = False
        vars(net.config).update(copy.deepcopy(self._config))
        for parameter in net.parameters():
            parameter.grad = None
            parameter.requires_grad_(parameter.is_floating_point())
        why = self._unlike(net, new)
        if why:
            self.drop()
        return why

    def drop(self) -> None:
        """Forget the live model: the next `begin` opens it again."""
        self._given, self._copy, self._away = None, None, False
        self._modules, self._hooks = {}, {}

    # ------------------------------------------------------------------ what it was like

    def _take_down(self, net: PreTrainedModel) -> None:
        new = self._given[1] if self._given else frozenset[str]()
        digests = {name: _digest(tensor) for name, tensor in _tensors(net).items() if name not in new}
        if self._digests and digests != self._digests:
            raise BackboneError(
                message(
                    "the backbone's files have changed meanwhile", where=str(net.name_or_path or type(net).__name__)
                )
            )
        self._digests = digests
        self._modules = dict(net.named_modules())
        self._hooks = {path: _hooks(module) for path, module in self._modules.items()}
        flat = {name: value for name, value in vars(net.config).items() if not hasattr(value, "to_dict")}
        self._config = copy.deepcopy(flat)

    def _unlike(self, net: PreTrainedModel, new: frozenset[str]) -> str:
        """What is not as it was, after the tensors that were trained have been read again; empty where all is."""
        modules = dict(net.named_modules())
        odd = [path for path in {**modules, **self._modules} if modules.get(path) is not self._modules.get(path)]
        odd += [path for path, module in modules.items() if not odd and _hooks(module) != self._hooks[path]]
        if odd:
            return f"modules are not those that were loaded ({odd[0] or type(net).__name__} first, {len(odd)} in all)"
        tensors = {name: tensor for name, tensor in _tensors(net).items() if name not in new}
        if set(tensors) != set(self._digests):
            return "tensors came or went"
        other = [name for name, tensor in tensors.items() if _digest(tensor) != self._digests[name]]
        if other and not self._read_again(net, {name: tensors[name] for name in other}):
            return f"{len(other)} tensors cannot be read again one by one ({other[0]} first)"
        return ""

    def _read_again(self, net: PreTrainedModel, tensors: Mapping[str, Tensor]) -> bool:
        """The checkpoint's values for some tensors; False where they do not give the bytes that were loaded."""
        import torch

        from adapters import fingerprint

        if self._folder is None:
            return False
        try:
            slots = fingerprint.disk_slots(net, self._folder)
            for name, tensor in tensors.items():
                stored = fingerprint.read_backbone_tensor(slots, name)
                if stored is None or stored.shape != tensor.shape:
                    return False
                with torch.no_grad():
                    tensor.copy_(stored)
        except FolderError:  # older checkpoints hold no safetensors
            return False
        return all(_digest(tensor) == self._digests[name] for name, tensor in tensors.items())


def _tensors(net: PreTrainedModel) -> dict[str, Tensor]:
    """All parameters and buffers, tied ones once."""
    found: dict[str, Tensor] = dict(net.named_parameters())
    return found | dict(net.named_buffers())


def _content(processor: Any) -> bytes:
    """All that a tokenizer or image processor holds; empty where that cannot be told."""
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream)
    pickler.fast = True  # values alone count, not which of them are one object
    try:
        pickler.dump(processor)
    except Exception:  # classes may refuse with anything
        return b""
    return stream.getvalue()


def _digest(tensor: Tensor) -> str:
    import xxhash

    from adapters.shards import tensor_bytes

    return f"{tensor.dtype} {tuple(tensor.shape)} {xxhash.xxh3_128_hexdigest(tensor_bytes(tensor.detach()))}"


def _hooks(module: nn.Module) -> int:
    """How many hooks a module has, and whether its forward pass is its class's own."""
    counted = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return 2 * sum(map(len, counted)) + ("forward" in vars(module))


def first_values(net: PreTrainedModel, new: set[str]) -> None:
    """First values for what a checkpoint lacks, as transformers gives them when it loads one.

    transformers leaves alone what carries its mark; so the marks are taken off what is new and the modules around it.
    They are made on the CPU, as in a load, whose draw they then are.
    """
    import torch

    from adapters.anatomy import put

    if not new:
        return
    around = {name.rpartition(".")[0] for name in new}
    around |= {path.rsplit(".", count)[0] for path in around for count in range(1, path.count(".") + 1)} | {""}
    for name, tensor in _tensors(net).items():
        vars(tensor)["_is_hf_initialized"] = name not in new
    fresh: dict[str, tuple[list[str], nn.Parameter]] = {}
    named = list(net.named_parameters(remove_duplicate=False))
    for name in new:
        parameter = net.get_parameter(name)
        begun = torch.nn.Parameter(torch.full_like(parameter.detach(), float("nan"), device="cpu"))
        vars(begun)["_is_hf_initialized"] = False
        fresh[name] = [each for each, held in named if held is parameter], parameter
        put(net, fresh[name][0], begun)
    for path in around:
        vars(net.get_submodule(path))["_is_hf_initialized"] = False
    try:
        with torch.no_grad():
            net.initialize_weights()  # type: ignore[no-untyped-call]
            for name, (_, parameter) in fresh.items():
                begun = net.get_parameter(name)
                if not bool(torch.isfinite(begun).all()):
                    raise BackboneError(message("a new tensor has no first values", where=name))
                parameter.copy_(begun)
    finally:
        for names, parameter in fresh.values():
            put(net, names, parameter)
