"""What a peft layer does to rows, without the weight that it would be merged into: factors, scales, small blocks.

A merged weight is as large as the backbone's own. Where a method is a scale of inputs or outputs, a low-rank term, or a
turn of the inputs by small blocks, a row can have that instead, at the method's own size. Methods without a row here
are merged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from adapters.edits import MergeLayer
from adapters.injection import ADAPTER
from adapters.inserts import Change, Kron, Pair, Turn


def form_of(edit: MergeLayer, weight: Tensor, bias: Tensor | None) -> Change | None:
    """What a layer's edits of its weight and of its bias do, as a change by rows.

    Args:
        edit: of the weight of a linear map.
        weight: of the backbone, (out, in); bias: of the backbone, or None. Their dtype is that of the form, float32 at
            least.

    Returns:
        The change, or None where the method, or an option of it, has no form that is smaller than a merged weight.
    """
    make = FORMS.get(str(getattr(edit.config.peft_type, "value", edit.config.peft_type)))
    if make is None:
        return None
    wide = torch.promote_types(torch.float32, weight.dtype)
    tensors = {name: tensor.to(wide) for name, tensor in edit.tensors.items()}
    with torch.no_grad():
        return make(edit, tensors, weight.to(wide), None if bias is None else bias.to(wide))


def _lora(edit: MergeLayer, tensors: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Change | None:
    """s B A x, with the bias that B may have; DoRA scales the sum with W x by m / |W + s B A| (Liu et al., 2024).

    The norm is a constant while nothing trains.
    """
    layer = _layer(edit, weight)
    down, up, offset = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.lora_B[ADAPTER].bias
    magnitude = layer.lora_magnitude_vector[ADAPTER].weight if ADAPTER in layer.lora_magnitude_vector else None
    known = [part.detach().to(weight.dtype) for part in (down, up, offset, magnitude) if part is not None]
    if len(known) != len(tensors) or (offset is not None and magnitude is not None):
        return None  # an option that brings more
    down, up, scale = known[0], known[1], float(layer.scaling[ADAPTER])
    if (up.shape[0], down.shape[1]) != weight.shape:
        return None  # grouped inputs
    if magnitude is None:
        return Change(Pair(down, (scale * up).T.contiguous()), shift=None if offset is None else scale * known[2])
    gain = known[2].flatten() / torch.linalg.vector_norm(torch.addmm(weight, up, down, alpha=scale), dim=1)
    shift = None if bias is None else bias - gain * bias  # the bias itself is not scaled
    return Change(Pair(down, (scale * up * gain[:, None]).T.contiguous()), gain=gain, shift=shift)


def _ia3(edit: MergeLayer, tensors: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Change | None:
    """A factor for each input of a feed-forward's last map, for each output, bias included, of the others."""
    if set(tensors) != {"ia3_l"}:
        return None
    factors = tensors["ia3_l"].flatten()
    return Change(turn=Turn(scale=factors)) if _layer(edit, weight).is_feedforward else Change(gain=factors)


def _oft(edit: MergeLayer, tensors: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Change | None:
    """The inputs' parts, each turned by its own block: read off peft's own module, which is given the unit vectors."""
    if set(tensors) != {"oft_R.weight"}:
        return None
    module = _layer(edit, weight).oft_R[ADAPTER].to(weight.dtype)
    size, width = int(module.block_size), weight.shape[1]
    units = torch.eye(size, dtype=weight.dtype).repeat(1, width // size)
    blocks = module(units).view(size, -1, size).transpose(0, 1)
    return Change(turn=Turn(blocks=(blocks[:1] if module.block_share else blocks).contiguous()))


def _hra(edit: MergeLayer, tensors: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Change | None:
    """A chain of r reflections of the inputs, (I - 2 u1 u1^T) ... (I - 2 ur ur^T) = I + P U^T (Yuan et al., 2024)."""
    if set(tensors) != {"hra_u"}:
        return None
    units = tensors["hra_u"]  # (in, r)
    if edit.config.apply_GS:
        units = torch.linalg.qr(units)[0]  # the same span; signs cancel in u u^T
    units = units / units.norm(dim=0)
    turned: list[Tensor] = []
    for index in range(units.shape[1]):
        unit = units[:, index]
        before = [column * (units[:, place] @ unit) for place, column in enumerate(turned)]
        turned.append(-2 * torch.stack([unit, *before]).sum(dim=0))
    return Change(turn=Turn(pair=Pair(units.T.contiguous(), torch.stack(turned))))


def _loha(edit: MergeLayer, tensors: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Change | None:
    """The entrywise product of two low-rank matrices is one of at most the product of their ranks (Hyeon-Woo, 2022)."""
    if set(tensors) != {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}:
        return None
    up = torch.einsum("oi,oj->oij", tensors["hada_w1_a"], tensors["hada_w2_a"]).flatten(1)
    down = torch.einsum("ik,jk->ijk", tensors["hada_w1_b"], tensors["hada_w2_b"]).flatten(0, 1)
    if up.numel() + down.numel() >= weight.numel():
        return None  # no smaller than the weight
    return Change(Pair(down, (float(_layer(edit, weight).scaling[ADAPTER]) * up).T.contiguous()))


def _lokr(edit: MergeLayer, tensors: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Change | None:
    """A Kronecker product of two small matrices, each of which may be low-rank itself (Yeh et al., 2024)."""
    small = []
    for which in ("lokr_w1", "lokr_w2"):
        names = (which,) if which in tensors else (f"{which}_a", f"{which}_b")
        if any(name not in tensors for name in names):
            return None
        small.append(torch.linalg.multi_dot([tensors[name] for name in names]) if len(names) > 1 else tensors[which])
    left, right = small
    if "lokr_t2" in tensors or (left.shape[0] * right.shape[0], left.shape[1] * right.shape[1]) != weight.shape:
        return None
    return Change(kron=Kron(float(_layer(edit, weight).scaling[ADAPTER]) * left, right.contiguous()))


def _layer(edit: MergeLayer, weight: Tensor) -> Any:
    """The peft layer with the trained tensors in it."""
    return edit.layer(weight.T if edit.transposed else weight)


FORMS: Final[Mapping[str, Callable[[MergeLayer, Mapping[str, Tensor], Tensor, Tensor | None], Change | None]]] = {
    "LORA": _lora,
    "IA3": _ia3,
    "OFT": _oft,
    "HRA": _hra,
    "LOHA": _loha,
    "LOKR": _lokr,
}
