"""An adapted matmul as one function: the frozen product and its low-rank term, keeping what backward needs, no more.

peft computes base(x) + B(A(x)) * scale as four operations, each with an output of its own, and autograd keeps what any
of them might need. Here the term is added in place, backward adds both ways to the input in place too, and what is
kept is the input, rank numbers a token, and nothing of the frozen weight: 4-bit weights are unpacked again.

Where the hardware multiplies bfloat16 natively, the frozen weights are copied to it once a run, and the products are
taken there; what lies between the adapted maps, the trained factors and their gradients stay in their own dtype.

peft's own forward is the reference, and answers whenever the model does not train: evaluation, the saved adapter and
whatever this cannot do (more than one adapter, DoRA and other variants, biases on the update, hooks inside the layer).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from adapters import onload
from adapters.anatomy import is_tuner_layer, linear_map
from adapters.injection import ADAPTER
from adapters.memory import free_memory
from adapters.quantize import is_packed, packing

LARGE = 1 << 17  # entries of a weight from which bfloat16 pays: below, the casts take what the product gains


@final
@dataclass(frozen=True)
class Plan:
    """How the adapted matmuls of a model are computed while it trains.

    Attributes:
        dtype: of the frozen products where that pays, None for each weight's own.
        keep: the frozen weights stand in that dtype beside the model as long as it trains; False casts them each time.
        why: what is to be said of it, empty where nothing is chosen.
    """

    dtype: torch.dtype | None = None
    keep: bool = True
    why: str = ""


def plan(model: nn.Module, device: torch.device) -> Plan:
    """bfloat16 for the frozen products where the device has it and a weight is large enough, else the weights' own.

    Args:
        model: with peft's layers in it.
        device: on which it will train.
    """
    if not native(device):
        return Plan()
    # Copies that stay would take the memory that weights were offloaded for.
    return planned(model, 0 if onload.placed(model) is not None else free_memory(device))


def planned(model: nn.Module, room: int) -> Plan:
    """The same on a device that multiplies bfloat16 natively and has so many bytes left."""
    large = [layer.get_base_layer() for layer in _layers(model) if _is_large(layer.get_base_layer())]
    if not large:
        return Plan()
    copies = sum(2 * base.weight.numel() for base in large if not is_packed(base))
    keep = copies <= room // 4
    return Plan(
        torch.bfloat16,
        keep,
        f"{len(large)} adapted weights are multiplied in bfloat16 while training, which this device does natively; "
        "what trains stays in its own dtype, and evaluation is as without it (bf16=False in a dict of args: not so)"
        + ("" if keep else "; memory is not to hold copies of them, so they are cast in every step"),
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
    """Each adapted matmul of the model as one function while this is open; yields how many there are.

    The layers stay peft's, with their types, parameters and names: each has a forward of its own meanwhile, which is
    gone afterwards. A deep copy of the model has its own, too.
    """
    placed = list(_layers(model))
    for layer in placed:
        base = layer.get_base_layer()
        vars(layer)["forward"] = Forward(layer, how.dtype if _is_large(base) else None, how.keep)
    try:
        yield len(placed)
    finally:
        for layer in placed:
            vars(layer).pop("forward", None)


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


def _is_plain(path: str, layer: Any) -> bool:
    base = layer.get_base_layer()
    if list(layer.lora_A) != [ADAPTER] or layer.active_adapters != [ADAPTER] or layer.lora_variant:
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
    return weight.numel() >= LARGE and weight.dtype == torch.float32 and not weight.requires_grad


# ---------------------------------------------------------------------- one layer


@final
class Forward:
    """The forward of one adapted layer: ours while it trains, else peft's.

    Args:
        layer: peft's, over a dense or packed linear map.
        dtype: of the frozen product, None for the weight's own.
        keep: a copy of the weight in that dtype stays from the first step on.
    """

    def __init__(self, layer: Any, dtype: torch.dtype | None, keep: bool) -> None:
        self.layer, self.dtype, self.keep = layer, dtype, keep
        self._copy: Tensor | None = None

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
            weight, unpack = self._weight(base, dtype), None
        out = dtype if cast and not packed and dtype is not None else inputs.dtype
        how = (layer.scaling[ADAPTER], dtype or weight.dtype, dtype or down.dtype, out, unpack)
        joined: Tensor = Joined.apply(inputs, dropped, down, up, base.bias, weight, how)  # type: ignore[no-untyped-call]
        return joined

    def _weight(self, base: Any, dtype: torch.dtype | None) -> Tensor:
        """The frozen weight as (out, in)."""
        if dtype is not None and self._copy is not None and self._copy.dtype == dtype:
            return self._copy
        weight: Tensor = base.weight if linear_map("", base).transposed is False else base.weight.T  # type: ignore[union-attr]
        if dtype is None or dtype == weight.dtype:
            return weight
        if self.keep and weight.numel() >= LARGE:
            self._copy = weight.detach().to(dtype).contiguous()
            return self._copy
        return weight


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
