"""The matmuls of a run while it trains: an adapted one as one function, and products in bfloat16 where that pays.

peft computes base(x) + B(A(x)) * scale as four operations, each with an output of its own, and autograd keeps what any
of them might need. Here the term is added in place, backward adds both ways to the input in place too, and what is
kept is the input, rank numbers a token, and nothing of the frozen weight: 4-bit weights are unpacked again.

Where the hardware multiplies bfloat16 natively, products are taken there: frozen weights are copied to it once a run,
trained ones cast in each pass. What lies between the maps, what trains, its gradients and the optimizer's states stay
in their own dtype.

The layers' own forward is the reference, and answers whenever the model does not train: evaluation, the saved adapter
and, with an adapter on it, whatever this cannot do (more than one, DoRA and other variants, biases on the update, hooks
inside the layer).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from adapters import onload
from adapters.anatomy import block_lists, is_tuner_layer, linear_map, linear_maps
from adapters.injection import ADAPTER
from adapters.memory import free_memory
from adapters.quantize import is_packed, packing

LARGE = 1 << 17  # entries of a weight from which bfloat16 pays: below, the casts take what the product gains


@final
@dataclass(frozen=True)
class Plan:
    """How the matmuls of a model are computed while it trains.

    Attributes:
        dtype: of the products where that pays, None for each weight's own.
        keep: the frozen weights stand in that dtype beside the model as long as it trains; False casts them each time.
        why: what is to be said of it, empty where nothing is chosen.
    """

    dtype: torch.dtype | None = None
    keep: bool = True
    why: str = ""


def plan(model: nn.Module, device: torch.device) -> Plan:
    """bfloat16 for the products where the device has it and a weight is large enough, else the weights' own.

    Args:
        model: as it trains, with peft's layers in it, if any.
        device: on which it will train.
    """
    if not native(device):
        return Plan()
    # Copies that stay would take the memory that weights were offloaded for.
    return planned(model, 0 if onload.placed(model) is not None else free_memory(device))


def planned(model: nn.Module, room: int) -> Plan:
    """The same on a device that multiplies bfloat16 natively and has so many bytes left."""
    bases = [layer.get_base_layer() for layer in _layers(model)]
    large = [base for base in bases if _is_large(base)] + list(_maps(model))
    if not large:
        return Plan()
    copies = sum(2 * base.weight.numel() for base in large if not (is_packed(base) or base.weight.requires_grad))
    keep = copies <= room // 4
    return Plan(
        torch.bfloat16,
        keep,
        f"{len(large)} weights of the blocks are multiplied in bfloat16 while training, which this device does "
        "natively; what trains stays in its own dtype, and evaluation is as without it (bf16=False in a dict of args: "
        "not so)" + ("" if keep else "; memory is not to hold copies of them, so they are cast in every step"),
    )


def native(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@contextlib.contextmanager
def fused(model: nn.Module, how: Plan) -> Iterator[int]:
    """The matmuls of the model so while this is open; yields how many adapted ones are one function.

    The layers stay what they are, with their types, parameters and names: each has a forward of its own meanwhile,
    which is gone afterwards. A deep copy of the model has its own, too.
    """
    layers = list(_layers(model))
    maps = list(_maps(model)) if how.dtype is not None else []
    for layer in layers:
        base = layer.get_base_layer()
        vars(layer)["forward"] = Forward(layer, how.dtype if _is_large(base) else None, how.keep)
    for module in maps:
        assert how.dtype is not None
        vars(module)["forward"] = Product(module, how.dtype, how.keep)
    try:
        yield len(layers)
    finally:
        for module in (*layers, *maps):
            vars(module).pop("forward", None)


def _layers(model: nn.Module) -> Iterator[Any]:
    """The layers that are a frozen linear map with one low-rank term on it, and no more."""
    import sys

    layers = sys.modules.get("peft.tuners.lora.layer")
    packed = sys.modules.get("peft.tuners.lora.bnb")
    kinds = [layers.Linear.forward] if layers is not None else []
    kinds += [packed.Linear4bit.forward] if packed is not None and hasattr(packed, "Linear4bit") else []
    for path, module in model.named_modules():
        if is_tuner_layer(module) and type(module).forward in kinds and _is_plain(path, module):
            yield module


def _maps(model: nn.Module) -> Iterator[Any]:
    """The other large linear maps that a gradient may pass: those of the blocks from the first that trains on up."""
    from transformers.pytorch_utils import Conv1D

    blocks = [path for stack in block_lists(model) for path in stack.names()]
    trains = [any(p.requires_grad for p in model.get_submodule(path).parameters()) for path in blocks]
    if not any(trains):
        return
    reached = tuple(f"{path}." for path in blocks[trains.index(True) :])
    inside = {id(part) for layer in _layers(model) for part in layer.modules()}
    for path in linear_maps(model):
        module: Any = model.get_submodule(path)
        own = type(module) in (nn.Linear, Conv1D) and "forward" not in vars(module)  # a subclass may make its weight
        if own and path.startswith(reached) and id(module) not in inside and _is_large(module):
            yield module


def _is_plain(path: str, layer: Any) -> bool:
    base = layer.get_base_layer()
    if list(layer.lora_A) != [ADAPTER] or layer.active_adapters != [ADAPTER] or layer.lora_variant:
        return False
    if base.weight.requires_grad:
        return False
    if linear_map(path, base) is None or type(base).__module__.partition(".")[0] not in _OWN_FORWARDS:
        return False
    parts = [base, layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]]
    heard = any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in parts)
    replaced = any("forward" in vars(part) for part in (layer, *parts))
    return not (heard or replaced or layer.lora_bias[ADAPTER] or layer.lora_A[ADAPTER].bias is not None)


_OWN_FORWARDS = ("torch", "transformers", "bitsandbytes")  # whose linear maps compute what their name says


def _is_large(base: nn.Module) -> bool:
    weight = base.get_parameter("weight")
    if is_packed(base):
        size = base.in_features * base.out_features  # type: ignore[operator]
        return bool(size >= LARGE and base.compute_dtype == torch.float32)
    return weight.numel() >= LARGE and weight.dtype == torch.float32


# ---------------------------------------------------------------------- one layer


@final
class Weight:
    """The weight of a linear map as (out, in), in the dtype of the products where one is asked for.

    Args:
        module: a dense linear map.
        keep: a copy of a frozen weight in that dtype stays from the first time on.
    """

    def __init__(self, module: Any, keep: bool) -> None:
        described = linear_map("", module)
        self.module, self.keep = module, keep
        self.transposed = described is not None and described.transposed
        self._copy: Tensor | None = None

    def __call__(self, dtype: torch.dtype | None) -> Tensor:
        """A trained weight as it is: what follows casts it, and has to know its gradient."""
        weight: Tensor = self.module.weight
        if weight.requires_grad:
            self._copy = None
        elif dtype is not None and self._copy is not None and self._copy.dtype == dtype:
            return self._copy
        weight = weight.T if self.transposed else weight
        if dtype is None or dtype == weight.dtype or weight.requires_grad:
            return weight
        if self.keep and weight.numel() >= LARGE:
            self._copy = weight.detach().to(dtype).contiguous()
            return self._copy
        return weight


@final
class Forward:
    """The forward of one adapted layer: ours while it trains, else peft's.

    Args:
        layer: peft's, over a dense or packed linear map.
        dtype: of the frozen product, None for the weight's own.
        keep: a copy of the weight in that dtype stays from the first step on.
    """

    def __init__(self, layer: Any, dtype: torch.dtype | None, keep: bool) -> None:
        self.layer, self.dtype = layer, dtype
        self._weight = Weight(layer.get_base_layer(), keep)

    def __call__(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """inputs: (..., in) to (..., out)."""
        layer = self.layer
        if not layer.training or args or kwargs or layer.disable_adapters or layer.merged:
            result: Tensor = type(layer).forward(layer, inputs, *args, **kwargs)
            return result
        base, down, up = layer.base_layer, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        device = inputs.device.type
        cast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if cast else self.dtype
        dropout, dropped = layer.lora_dropout[ADAPTER], inputs
        if not isinstance(dropout, nn.Identity):
            dropped = dropout(inputs if inputs.dtype == down.dtype else inputs.to(down.dtype))
        packed = is_packed(base)
        if packed:
            weight, unpack = base.weight, _unpacked(base)
            dtype = dtype or base.compute_dtype
        else:
            weight, unpack = self._weight(dtype), None
        out = dtype if cast and not packed and dtype is not None else inputs.dtype
        how = (layer.scaling[ADAPTER], dtype or weight.dtype, dtype or down.dtype, out, unpack)
        joined: Tensor = Joined.apply(inputs, dropped, down, up, base.bias, weight, how)  # type: ignore[no-untyped-call]
        return joined


@final
class Product:
    """The forward of one linear map without a term of its own: in `dtype` where a gradient passes, else the class's.

    Args:
        module: dense, trained or frozen.
        dtype: of the product.
        keep: a copy of a frozen weight in that dtype stays from the first step on.
    """

    def __init__(self, module: Any, dtype: torch.dtype, keep: bool) -> None:
        self.module, self.dtype = module, dtype
        self._weight = Weight(module, keep)

    def __call__(self, inputs: Tensor) -> Tensor:
        """inputs: (..., in) to (..., out)."""
        module = self.module
        passed = torch.is_grad_enabled() and (inputs.requires_grad or module.weight.requires_grad)
        alike = inputs.dtype == module.weight.dtype and not torch.is_autocast_enabled(inputs.device.type)
        if not alike or not (passed or module.training):
            result: Tensor = type(module).forward(module, inputs)
            return result
        product: Tensor = Narrowed.apply(inputs, self._weight(self.dtype), module.bias, self.dtype)  # type: ignore[no-untyped-call]
        return product


def _unpacked(base: Any) -> Callable[[Tensor], Tensor]:
    """What makes a packed weight dense again, as (out, in)."""
    import bitsandbytes.functional as bnb

    state = packing(base)
    return lambda packed: bnb.dequantize_4bit(packed, state)


@final
class Joined(torch.autograd.Function):
    """y = x W^T + b + scale * d A^T B^T, with d = x or the dropped-out x; the derivative of everything but W."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,  # (..., in)
        dropped: Tensor,  # the same tensor where nothing is dropped
        down: Tensor,  # (rank, in)
        up: Tensor,  # (out, rank)
        bias: Tensor | None,  # (out,)
        weight: Tensor,  # (out, in), or packed
        how: tuple[float, torch.dtype, torch.dtype, torch.dtype, Callable[[Tensor], Tensor] | None],
    ) -> Tensor:
        """Saves d (in the dtype of the products), d A^T, and references to the factors and the frozen weight."""
        scale, wide, thin, out, unpack = how
        rows = inputs.reshape(-1, inputs.shape[-1]).to(wide)
        dense = (weight if unpack is None else unpack(weight)).to(wide)
        result = nn.functional.linear(rows, dense, None if bias is None else bias.to(wide))
        same = dropped is inputs
        kept = rows if same else dropped.reshape(rows.shape).to(thin)
        middle = kept.to(thin) @ down.to(thin).t()  # (tokens, rank)
        if thin == wide:
            result.addmm_(middle, up.to(thin).t(), alpha=scale)
        else:
            result = result.to(thin).addmm_(middle, up.to(thin).t(), alpha=scale)
        ctx.how, ctx.same, ctx.shape = how, same, inputs.shape
        ctx.save_for_backward(kept, middle, down, up, weight)
        return result.to(out).view(*inputs.shape[:-1], result.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs, the factors and the bias, of those that are asked for."""
        kept, middle, down, up, weight = ctx.saved_tensors
        scale, wide, thin, _, unpack = ctx.how
        of_inputs, of_dropped, of_down, of_up, of_bias = ctx.needs_input_grad[:5]
        rows = grad.reshape(-1, grad.shape[-1])
        narrow, rows = rows.to(thin), rows.to(wide)
        term = (narrow @ up.to(thin)).mul_(scale)  # (tokens, rank)
        back: Tensor | None = None
        apart: Tensor | None = None
        if of_inputs:
            back = rows @ (weight if unpack is None else unpack(weight)).to(wide)
            if ctx.same:
                back = back.to(thin).addmm_(term, down.to(thin))
            back = back.view(ctx.shape)
        if of_dropped and not ctx.same:
            apart = (term @ down.to(thin)).view(ctx.shape)
        return (
            back,
            apart,
            term.t() @ kept.to(thin) if of_down else None,
            (narrow.t() @ middle).mul_(scale) if of_up else None,
            rows.sum(0) if of_bias else None,
            None,
            None,
        )


@final
class Narrowed(torch.autograd.Function):
    """y = x W^T + b with every product, of the backward pass as well, in another dtype than x, W, b and y."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,  # (..., in)
        weight: Tensor,  # (out, in)
        bias: Tensor | None,  # (out,)
        dtype: torch.dtype,
    ) -> Tensor:
        """Saves x where W trains, and W where x has a gradient, both in the dtype of the products."""
        rows, narrow = inputs.reshape(-1, inputs.shape[-1]).to(dtype), weight.to(dtype)
        of_inputs, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(rows if of_weight else None, narrow if of_inputs else None)
        # A trained weight's gradient is made in the layout that the weight has in memory.
        ctx.how = inputs.shape, inputs.dtype, dtype, not weight.is_contiguous()
        result = nn.functional.linear(rows, narrow, None if bias is None else bias.to(dtype))
        return result.to(inputs.dtype).view(*inputs.shape[:-1], result.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input, the weight and the bias, of those that are asked for."""
        rows, narrow = ctx.saved_tensors
        shape, wide, dtype, transposed = ctx.how
        of_inputs, of_weight, of_bias = ctx.needs_input_grad[:3]
        flat = grad.reshape(-1, grad.shape[-1])
        pulls = flat.to(dtype)
        own: Tensor | None = None
        if of_weight:
            own = (rows.t() @ pulls).to(wide).t() if transposed else (pulls.t() @ rows).to(wide)
        return (
            (pulls @ narrow).to(wide).view(shape) if of_inputs else None,
            own,
            flat.sum(0) if of_bias else None,
            None,
        )
