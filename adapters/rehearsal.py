"""A peft method tried on a few small layers, before the live model changes.

peft adapts some layers with some methods, merges some of them, and says so at different times: on injection, in the
first forward pass, when merging, or not at all. Here every answer comes at once, from real numbers: the layers can be
trained, the backbone's weights stay, and merged by our edits they answer as they did adapted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapters.anatomy import LinearMap, is_tuner_layer
from adapters.edits import grown, plain_layer, single
from adapters.errors import RequestError, message
from adapters.injection import inject, key, merge_edits
from adapters.quantize import Storage, dequantized, is_packed, pack

BOUND = 1e-3  # how far merged answers may lie from adapted ones, as a share of the largest
SHAPES = 2  # of each kind of layer the smallest in so many shapes


def rehearse(config: Any, modules: Mapping[str, Sequence[Any]], *, packed: bool) -> None:
    """Put the method around small layers with random weights, run them forwards and backwards, merge, compare.

    Args:
        config: the peft config, resolved.
        modules: path -> [in, out, transposed, has bias] of the modules that will be adapted.
        packed: the model's linear maps are, or will be, stored in 4 bits.

    Raises:
        RequestError: naming the method, a layer, and what peft said or what came out.
    """
    chosen = _smallest(modules)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        root = grown({path: _layer(described) for path, described in chosen.items()})
        with torch.no_grad():
            for parameter in root.parameters():
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        if packed:
            maps = [LinearMap(p, (m[0], m[1]), m[2], m[3]) for p, m in chosen.items() if m[3] or not m[2]]
            pack(root, maps, Storage("nf4"))
        config = single(config, list(chosen))
        storage = "4-bit layers" if packed else "layers"
        where = f"{type(config).__name__} on {storage} such as {', '.join(chosen)}"
        try:
            _run(root, config, chosen, where)
        except RequestError:
            raise
        except Exception as fault:  # in a forward pass and in a merge peft lets through whatever torch raises
            raise _unfit("peft cannot run or merge this method", where, " ".join(str(fault).split())[:200]) from fault


def _smallest(modules: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    """A few modules that stand for all: of each kind (transposed, bias) the smallest in each of two shapes."""
    kinds: dict[tuple[bool, bool], dict[tuple[int, int], str]] = {}
    for path, (size_in, size_out, transposed, has_bias) in modules.items():
        kinds.setdefault((transposed, has_bias), {}).setdefault((size_in, size_out), path)
    found: dict[str, Sequence[Any]] = {}
    for shapes in kinds.values():
        for shape in sorted(shapes, key=lambda shape: shape[0] * shape[1])[:SHAPES]:
            found[shapes[shape]] = modules[shapes[shape]]
    return found


def _run(root: nn.Module, config: Any, chosen: Mapping[str, Sequence[Any]], where: str) -> None:
    old = _weights(root, chosen)
    trained = inject(root, config, chosen)
    if any(not torch.equal(tensor, old[name]) for name, tensor in _weights(root, chosen).items()):
        raise _unfit(
            "the method puts other weights in the backbone's place when it starts", where, type(config).__name__
        )
    parameters = dict(root.named_parameters())
    with torch.no_grad():
        for name in sorted(trained):
            parameters[name].add_(0.1 * torch.randn(parameters[name].shape).to(parameters[name].dtype))
    inputs = {path: _inputs(m) for path, m in chosen.items()}
    answers = [root.get_submodule(path)(entry).float() for path, entry in inputs.items()]
    torch.stack([answer.square().mean() for answer in answers]).sum().backward()  # type: ignore[no-untyped-call]
    root.eval()
    edits = merge_edits(config, chosen, {key(name): parameters[name].detach() for name in trained})
    with torch.no_grad():
        for path, entry in inputs.items():
            adapted = root.get_submodule(path)(entry).float()
            merged = _layer(chosen[path])
            for part, parameter in merged.named_parameters():
                name = f"{path}.{part}"
                parameter.copy_(edits[name](old[name]) if name in edits else old[name])
            apart = float((merged(entry) - adapted).abs().max() / adapted.abs().max())
            if not apart <= BOUND:
                found = f"{path}: {apart:.1e} of the largest answer apart"
                raise _unfit("merged layer by layer the method does not answer as it does adapted", where, found)


def _layer(described: Sequence[Any]) -> nn.Module:
    size_in, size_out, transposed, has_bias = described
    return plain_layer((size_in, size_out), transposed, has_bias)


def _inputs(described: Sequence[Any]) -> Tensor:
    """Two rows of three tokens, as the layer takes them."""
    size_in, _, transposed, has_bias = described
    return torch.randint(size_in, (2, 3)) if transposed and not has_bias else torch.randn(2, 3, size_in)


def _weights(root: nn.Module, chosen: Mapping[str, Sequence[Any]]) -> dict[str, Tensor]:
    """Copies of the weights and biases that the layers stand on, in their own layout, float32."""
    found: dict[str, Tensor] = {}
    for path, (_, _, transposed, _) in chosen.items():
        module: Any = root.get_submodule(path)
        base = module.get_base_layer() if is_tuner_layer(module) else module
        for part, parameter in base.named_parameters(recurse=False):
            if part == "weight" and is_packed(base):
                dense = dequantized(base)
                found[f"{path}.{part}"] = dense.T.contiguous() if transposed else dense
            else:
                found[f"{path}.{part}"] = parameter.detach().float().clone()
    return found


def _unfit(what: str, where: str, found: str) -> RequestError:
    return RequestError(
        message(
            what, where=where, found=found, remedy="Take 'lora' or 'ia3', which fit every linear map, packed or not."
        )
    )
