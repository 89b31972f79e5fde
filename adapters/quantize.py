"""How the frozen rest of a model is stored: as it is, or its matmuls packed to 4 bits by bitsandbytes.

Packing happens in place, one linear map after the other, on a model in full precision or one whose weights arrive from
the checkpoint as they are packed (`arrival`). Heads, new modules and whatever trains stay out of it by construction
(QLoRA: Dettmers et al., 2023).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from adapters import watermark
from adapters.anatomy import LinearMap, is_tuner_layer, linear_maps
from adapters.errors import BackboneError, MissingPackageError, RequestError, message, nearest
from adapters.progress import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Keep = Callable[[str, Mapping[str, Tensor]], Mapping[str, Tensor]]  # tensors under a name: the same, elsewhere
KINDS = {"nf4": 0.5, "fp4": 0.5}  # quantization -> bytes per packed weight
BLOCK = 64  # weights that share a scale
TRIMMED = 4 << 20  # weights that are packed before the allocator gives back what they took
NESTED = 256  # scales that share a scale in turn


@final
@dataclass(frozen=True)
class Storage:
    """How the frozen rest is kept.

    Attributes:
        quantization: None (as loaded), "nf4" or "fp4": 4 bits a weight in blocks of 64, the blocks' scales packed
            to 8 bits in turn.
    """

    quantization: str | None = None

    def __post_init__(self) -> None:
        if self.quantization is not None and self.quantization not in KINDS:
            raise RequestError(
                message(
                    f"unknown quantization {self.quantization!r}",
                    where="quantization",
                    remedy=nearest(str(self.quantization), KINDS),
                )
            )


def is_packed(module: nn.Module) -> bool:
    """Whether a linear map is stored in 4 bits."""
    return packing(module) is not None


def packing(module: nn.Module) -> Any:
    """How a linear map is packed, None where it is not; of divided bytes the layer knows it, whatever holds them."""
    held = getattr(getattr(module, "weight", None), "quant_state", None)
    return held if held is not None else vars(module).get("quant_state")


def is_rearranged(module: nn.Module) -> bool:
    """Whether bitsandbytes has put a packed layer's weights into the order that its CPU kernel reads."""
    weight: Any = module.get_parameter("weight")
    return bool(getattr(weight.quant_state, "packing_format_for_cpu", False))


def packed_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The packed linear maps of a model, by path."""
    return {path: module for path, module in model.named_modules() if is_packed(module) and not is_tuner_layer(module)}


def bitsandbytes() -> Any:
    """The package that packs.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as fault:
        raise MissingPackageError(
            message(
                "4-bit storage needs bitsandbytes",
                where="quantization",
                remedy='Install it: pip install "holdfast[qlora]".',
            )
        ) from fault
    return bitsandbytes


def packable(model: PreTrainedModel) -> list[LinearMap]:
    """The linear maps inside the blocks, but those that the model class keeps in full precision.

    T5's code reads the dtype of its "wo" weights and would cast what flows through to the packed bytes' own.
    """
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    return [found for path, found in linear_maps(model).items() if not any(f".{name}." in f".{path}." for name in kept)]


def refuse_nothing(maps: Sequence[LinearMap], storage: Storage) -> None:
    """Refuse a packing that would pack nothing.

    Raises:
        RequestError: every linear map trains.
    """
    if storage.quantization is not None and not maps:
        raise RequestError(
            message(
                "nothing to pack: every linear map inside the blocks trains",
                where=f"quantization={storage.quantization!r}",
                remedy="Take a strategy that leaves weights frozen, or leave quantization out.",
            )
        )


def refuse_foreign(model: PreTrainedModel, *, live: bool) -> None:
    """Refuse a backbone whose storage cannot be read back: it could be neither identified nor merged.

    Args:
        model: the backbone, before anything changes.
        live: the caller loaded it; only 4 bits that were packed from a full-precision checkpoint are taken then.

    Raises:
        BackboneError: packed weights that bitsandbytes rearranged at an evaluation on the CPU.
        RequestError: stored in another way than in full precision or bitsandbytes' 4 bits.
    """
    packed = packed_modules(model)
    moved = [path for path, module in packed.items() if is_rearranged(module)]
    if moved:
        raise BackboneError(
            message(
                "an evaluation on the CPU has rearranged the 4-bit weights; what they were cannot be read back exactly",
                where=type(model).__name__,
                found=f"{len(moved)} of {len(packed)} layers rearranged by bitsandbytes, {moved[0]} first",
                remedy="Load the model again and adapt it before it runs: from then on no byte of it moves.",
            )
        )
    quantizer = vars(model).get("hf_quantizer")  # transformers' own: set where from_pretrained quantized the model
    if quantizer is None or (live and packed and not quantizer.pre_quantized):
        return
    raise RequestError(
        message(
            "the backbone comes quantized: full-precision weights to identify it by and to merge into are missing"
            if quantizer.pre_quantized
            else "the backbone was quantized while it was loaded",
            where=str(model.name_or_path) or type(model).__name__,
            expected="weights in full precision",
            found=str(getattr(quantizer.quantization_config.quant_method, "value", quantizer.quantization_config)),
            remedy="Give the full-precision checkpoint, with quantization='nf4' for 4 bits.",
        )
    )


def refuse_unlike(model: PreTrainedModel, maps: Iterable[LinearMap], kind: str | None) -> None:
    """Refuse a live model whose 4 bits `pack` would not make again: its adapter would load onto other weights.

    Args:
        model: a live model with packed linear maps.
        maps: what `pack` would pack.
        kind: the packing asked for, which then goes for the rest too; None takes the model's own.

    Raises:
        RequestError: naming what differs, and the options that transformers needs.
    """
    packed = packed_modules(model)
    wanted = {described.path for described in maps}
    faults = [f"{path} is packed" for path in sorted(set(packed) - wanted)]
    faults += [f"{path} is not packed" for path in sorted(wanted - set(packed)) if kind is None]
    dtype = model.dtype
    for path, module in packed.items():
        weight: Any = module.get_parameter("weight")
        state = weight.quant_state
        kind = kind or str(state.quant_type)
        found = (state.quant_type, bool(state.nested), state.blocksize, state.dtype, module.compute_dtype or dtype)
        if found != (kind, True, BLOCK, dtype, dtype):
            double = "double" if state.nested else "no double"
            faults.append(
                f"{path}: {found[0]}, {double} quantization, blocks of {found[2]}, {found[3]}, computes in {found[4]}"
            )
    if faults:
        outside = sorted(set(packed) - wanted)
        skipped = f", llm_int8_skip_modules={outside}" if outside else ""
        raise RequestError(
            message(
                "the model was packed in another way than a reload of its adapter would pack it",
                where=type(model).__name__,
                expected=f"{kind}, double quantization, blocks of {BLOCK}, {dtype}, where the strategy leaves a linear "
                "map inside the blocks frozen",
                found=f"{len(faults)} faults: {'; '.join(faults[:2])}",
                remedy=f"Adapt the id or folder with quantization={kind!r}, or load it with BitsAndBytesConfig("
                f"load_in_4bit=True, bnb_4bit_quant_type={kind!r}, bnb_4bit_use_double_quant=True, "
                f"bnb_4bit_compute_dtype={dtype}{skipped}).",
            )
        )


def pack(
    model: nn.Module,
    maps: Iterable[LinearMap],
    storage: Storage,
    bring: Callable[[str], None] | None = None,
    keep: Keep | None = None,
) -> list[str]:
    """Replace linear maps by 4-bit ones around the same weights; biases stay the parameters that they were.

    Args:
        model: the live model, in full precision.
        maps: the linear maps to pack; what trains must not be among them.
        storage: the kind of packing.
        bring: called with a weight's name before it is packed, where weights arrive one at a time.
        keep: gives what is packed another place in the processor's memory, under a name; None leaves it where it is.

    Returns:
        The paths that are packed now, those found packed already included.
    """
    if storage.quantization is None:
        return []
    bnb = bitsandbytes()
    maps = list(maps)
    refuse_nothing(maps, storage)
    done = []
    passed = 0
    with Job("packing", len(maps), "layers") as job:
        for described in maps:
            if bring is not None:
                bring(f"{described.path}.weight")
            passed += math.prod(described.shape)
            if passed > TRIMMED:  # what each weight took lies free between the packed ones, in pieces
                watermark.trim()
                passed = 0
            module = model.get_submodule(described.path)
            if not is_packed(module):
                new = _packed(bnb, module, described, storage.quantization)
                if keep is not None:
                    _kept(new, f"{described.path}.weight.{storage.quantization}", keep)
                model.set_submodule(described.path, new)
            done.append(described.path)
            job.advance()
    # On CPUs with AVX512-BF16 bitsandbytes rearranges the weights in place at the first evaluation forward, and
    # everything read from them afterwards (merge, digest, export) is garbage. Switched off: no byte ever changes.
    for packed in packed_modules(model).values():
        packed.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    # peft chooses its 4-bit layer by this attribute, and falls back to a plain one without it.
    vars(model)["is_loaded_in_4bit"] = True
    return done


def _packed(bnb: Any, module: nn.Module, described: LinearMap, kind: str) -> nn.Module:
    weight = module.get_parameter("weight")
    new = bnb.nn.Linear4bit(
        *described.shape,
        bias=described.has_bias,
        compute_dtype=weight.dtype,
        compress_statistics=True,
        quant_type=kind,
        device="meta",
    )
    dense = weight.detach().T.contiguous() if described.transposed else weight.detach()
    new.weight = bnb.nn.Params4bit(
        dense.clone(), requires_grad=False, compress_statistics=True, quant_type=kind, module=new
    ).to(weight.device)
    if described.has_bias:
        new.bias = module.get_parameter("bias")
    new.source_cls = type(module)
    new.train(module.training)
    return new  # type: ignore[no-any-return]


def _kept(module: nn.Module, name: str, keep: Keep) -> None:
    """Give a packed weight and the scales of its blocks another place, where they lie in the processor's memory."""
    weight: Any = module.get_parameter("weight")
    if weight.device.type == "cpu":
        held = keep(name, {"weight": weight.data, "absmax": weight.quant_state.absmax})
        weight.data, weight.quant_state.absmax = held["weight"], held["absmax"]


def hollow(model: nn.Module, maps: Iterable[LinearMap], storage: Storage) -> None:
    """What `pack` makes, of the same shapes and bytes, around tensors that nobody has filled in.

    Args:
        model: on the meta device, or of tensors without memory, on whose device the new ones are made.
        maps: the linear maps to pack.
        storage: the kind of packing.
    """
    if storage.quantization is None:
        return
    bnb = bitsandbytes()
    for described in maps:
        module = model.get_submodule(described.path)
        weight = module.get_parameter("weight")
        new = bnb.nn.Linear4bit(*described.shape, bias=described.has_bias, compute_dtype=weight.dtype, device="meta")
        entries = weight.numel()
        blocks = -(-entries // BLOCK)

        def empty(*shape: int, dtype: torch.dtype = torch.float32, like: Tensor = weight) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=like.device)

        state = bnb.functional.QuantState(
            absmax=empty(blocks, dtype=torch.uint8),
            shape=torch.Size(reversed(described.shape)),
            code=empty(16),
            blocksize=BLOCK,
            quant_type=storage.quantization,
            dtype=weight.dtype,
            offset=empty(),
            state2=bnb.functional.QuantState(
                absmax=empty(-(-blocks // NESTED)), code=empty(256), blocksize=NESTED, dtype=torch.float32
            ),
        )
        packed: Any = nn.Parameter(empty(-(-entries // 2), 1, dtype=torch.uint8), requires_grad=False)
        packed.quant_state, packed.quant_type = state, storage.quantization
        packed.compress_statistics, packed.blocksize, packed.bnb_quantized = True, BLOCK, True
        new.weight = packed
        if described.has_bias:
            new.bias = module.get_parameter("bias")
        new.source_cls = type(module)
        new.support_avx512bf16_for_cpu = False
        new.train(module.training)
        model.set_submodule(described.path, new)
    vars(model)["is_loaded_in_4bit"] = True


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor, with the scales and tables of a packed one."""
    state = getattr(tensor, "quant_state", None)
    own = tensor.numel() * tensor.element_size()
    if state is None:
        return own
    parts = [state.absmax, state.code]
    parts += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return int(own + sum(part.numel() * part.element_size() for part in parts))


def dequantized(module: nn.Module) -> Tensor:
    """The weight that a packed linear map computes with, shape (out, in), float32."""
    bnb = bitsandbytes()
    weight = module.get_parameter("weight")
    dense: Tensor = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[attr-defined]
    return dense.float()


def repacked_differs(model: PreTrainedModel, read: Callable[[str], Tensor | None]) -> list[str]:
    """Packed weights of a live model that are not the reference checkpoint's weights packed the same way.

    Args:
        model: a model with packed linear maps.
        read: memory name of a weight -> the checkpoint's full-precision tensor.

    Returns:
        The names that differ, or that the checkpoint cannot tell.
    """
    from transformers.pytorch_utils import Conv1D

    bnb = bitsandbytes()
    wrong = []
    for path, module in packed_modules(model).items():
        name = f"{path.replace('.base_layer', '')}.weight"
        reference = read(name)
        if reference is None:
            wrong.append(name)
            continue
        weight: Any = module.get_parameter("weight")
        state = weight.quant_state
        dense = reference.T.contiguous() if getattr(module, "source_cls", None) is Conv1D else reference
        again = bnb.nn.Params4bit(
            dense.to(weight.device, state.dtype),
            requires_grad=False,
            compress_statistics=bool(state.nested),
            quant_type=state.quant_type,
            blocksize=state.blocksize,
        ).to(weight.device)
        pairs = [(again.data.reshape(-1), weight.data.reshape(-1)), (again.quant_state.absmax, state.absmax)]
        if state.nested:  # the scales are packed in turn: a weight times two differs in theirs alone
            pairs += [
                (again.quant_state.offset, state.offset),
                (again.quant_state.state2.absmax, state.state2.absmax),
            ]
        if not all(torch.equal(one, other) for one, other in pairs):
            wrong.append(name)
    return wrong


@contextlib.contextmanager
def accepted(model: Any) -> Iterator[None]:
    """transformers refuses to train a 4-bit model without a PeftModel around it; ours trains unpacked parts.

    This is the one place where its check is met: what trains is never packed (see `adapt.assemble`).
    """
    if getattr(model, "is_quantized", False) and not getattr(model, "_hf_peft_config_loaded", False):
        model._hf_peft_config_loaded = True
        try:
            yield
        finally:
            del model._hf_peft_config_loaded
    else:
        yield
