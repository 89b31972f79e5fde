"""Peft layers in a live model: chosen, put in place, named on disk, merged, taken out again.

Everything is computed by peft; this room only sees to it that the right modules are wrapped, that their tensors
keep their names, and that the model is afterwards what it was before.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from adapters import deferred
from adapters.anatomy import (
    LinearMap,
    block_lists,
    is_tuner_layer,
    linear_map,
    linear_maps,
    matches,
    own_name,
    owner,
    select,
    tuner_layers,
)
from adapters.edits import Edit, MergeLayer, pattern_matches, replace_all
from adapters.errors import RequestError, message

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PREFIX = "base_model.model."  # what peft puts before a module path in its files
ADAPTER = "default"  # peft's name for the one adapter of a model


def candidates(model: PreTrainedModel, head: Collection[str]) -> dict[str, LinearMap]:
    """What peft may adapt, by path: linear maps and embeddings anywhere, except the head and new modules."""
    owners = {owner(name) for name in head}
    found: dict[str, LinearMap] = {}
    for path, module in model.named_modules():
        if path in owners:
            continue
        if isinstance(module, nn.Embedding):
            found[path] = LinearMap(path, (module.num_embeddings, module.embedding_dim), True, False)
        elif (described := linear_map(path, module)) is not None:
            found[path] = described
    return found


def choose(
    model: PreTrainedModel,
    head: Collection[str],
    *,
    patterns: Sequence[str] | str | None,
    exclude: Sequence[str] | str | None = None,
    layers: Sequence[int] | int | None = None,
) -> dict[str, LinearMap]:
    """The modules that a peft method adapts, by path.

    Args:
        model: the model without adapters.
        head: parameters of the head and of new modules; never adapted, because they train whole.
        patterns: None or "all-linear" for every linear map inside the blocks; a regular expression over whole
            paths; or a list of names and dotted suffixes, each of which must match.
        exclude: taken out again, in the same forms.
        layers: only blocks of these numbers.

    Raises:
        RequestError: a pattern that matches nothing, only the head, or a tied embedding; a block that is not there.
    """
    known = candidates(model, head)
    if patterns is None or patterns == "all-linear":
        inside = linear_maps(model)
        chosen = [path for path in inside if path in known]
        if not chosen:
            raise RequestError(
                message(
                    "no linear maps inside blocks were found",
                    where=type(model).__name__,
                    remedy="Name the modules: target_modules=[...]."
                    if known
                    else "Take 'freeze', 'bitfit', 'probe' or 'full': this backbone has no linear maps at all.",
                )
            )
    else:
        chosen = _named(patterns, known, model, head, option="target_modules")
    if exclude is not None:
        dropped = set(_named(exclude, known, model, head, option="exclude_modules"))
        chosen = [path for path in chosen if path not in dropped]
    if layers is not None and not isinstance(layers, int) and len(layers) == 0:
        raise RequestError(
            message("no blocks are named", where="layers_to_transform", remedy="Name one, or leave it out.")
        )
    if layers is not None:
        chosen = in_layers(model, chosen, [layers] if isinstance(layers, int) else list(layers))
    if not chosen:
        raise RequestError(message("nothing is left to adapt", where="target_modules, exclude_modules"))
    _refuse_tied(model, chosen)
    return {path: known[path] for path in chosen}


def _named(
    patterns: Sequence[str] | str, known: Mapping[str, LinearMap], model: nn.Module, head: Collection[str], option: str
) -> list[str]:
    if isinstance(patterns, str):
        try:
            expression = re.compile(patterns)
        except re.error as fault:
            raise RequestError(message(f"{patterns!r} is no regular expression", where=option, found=fault)) from fault
        chosen = [path for path in known if expression.fullmatch(path)]
        return chosen or select([patterns], known, option=option)
    head_only = [
        pattern
        for pattern in patterns
        if any(matches(pattern, owner(name)) for name in head) and not any(matches(pattern, path) for path in known)
    ]
    if head_only:
        raise RequestError(
            message(
                f"{head_only[0]!r} is part of the task's new head",
                where=option,
                expected="modules of the backbone",
                remedy="Leave it out: the head always trains whole and is saved with the adapter.",
            )
        )
    return select(list(patterns), known, option=option)


def in_layers(model: PreTrainedModel, paths: Sequence[str], layers: Sequence[int]) -> list[str]:
    lists = block_lists(model)
    depth = max((blocks.length for blocks in lists), default=0)
    wrong = [layer for layer in layers if not 0 <= layer < depth]
    if wrong:
        raise RequestError(
            message(
                f"there is no block {wrong[0]}",
                where="layers_to_transform",
                expected=f"numbers from 0 to {depth - 1}",
                found=list(layers),
            )
        )
    prefixes = tuple(f"{blocks.path}.{layer}." for blocks in lists for layer in layers)
    return [path for path in paths if path.startswith(prefixes)]


def _refuse_tied(model: PreTrainedModel, paths: Sequence[str]) -> None:
    users: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and not is_tuner_layer(module):
            users.setdefault(id(weight), []).append(path)
    for path in paths:
        sharing = users.get(id(model.get_submodule(path).weight), [])
        if len(sharing) > 1:
            raise RequestError(
                message(
                    f"{path!r} shares its weight with {', '.join(repr(p) for p in sharing if p != path)}",
                    where="target_modules",
                    remedy="Adapt other modules, or untie the weights first (config.tie_word_embeddings=False).",
                )
            )


def by_pattern(patterns: Mapping[str, float], path: str, default: float) -> float:
    """The value of the first pattern that means this module."""
    return next((value for pattern, value in patterns.items() if pattern_matches(pattern, path)), default)


def check_patterns(option: str, patterns: Collection[str], chosen: Collection[str]) -> None:
    """Each key of rank_pattern or alpha_pattern must mean one of the adapted modules.

    Raises:
        RequestError: naming the pattern.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as fault:
            raise RequestError(message(f"{pattern!r} is no regular expression", where=option, found=fault)) from fault
        if not any(pattern_matches(pattern, path) for path in chosen):
            raise RequestError(
                message(
                    f"the pattern {pattern!r} matches none of the adapted modules",
                    where=option,
                    expected=f"the end of a path such as {next(iter(chosen))!r}",
                )
            )


def layout(chosen: Mapping[str, LinearMap]) -> dict[str, list[Any]]:
    """The adapted modules as plain data: path -> [in, out, transposed, has bias]."""
    return {path: [*m.shape, m.transposed, m.has_bias] for path, m in chosen.items()}


def whole_modules(model: nn.Module, names: Collection[str]) -> list[str]:
    """The highest modules all of whose parameters are among `names`: peft's modules_to_save."""
    left = set(names)
    found: list[str] = []
    for path, module in model.named_modules():
        own = {f"{path}.{name}" for name, _ in module.named_parameters()}
        if path and own and own <= left:
            found.append(path)
            left -= own
    return found


def inject(model: nn.Module, config: Any, expected: Collection[str]) -> set[str]:
    """Put the peft layers in, their tensors in float32; returns the parameters that peft would train.

    Raises:
        RequestError: peft refuses, or would adapt other modules than the expected ones.
    """
    deferred.import_peft()
    import peft

    try:
        with _quiet(), deferred.unpacked(), _as_named():
            peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as fault:
        raise _refused(config, model, expected, " ".join(str(fault).split()).rstrip(".")) from fault
    wrapped = {own_name(f"{path}.").rstrip(".") for path, module in model.named_modules() if is_tuner_layer(module)}
    if wrapped != set(expected):
        odd = sorted(wrapped ^ set(expected))
        raise RequestError(
            message(
                "peft adapts other modules than were chosen",
                where=type(config).__name__,
                expected=f"{len(expected)} modules",
                found=f"{len(wrapped)}, differing in {', '.join(odd[:3])}",
            )
        )
    _refuse_adjusted(config, model)
    _widen(model)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _widen(model: nn.Module) -> None:
    """What peft put beside half-precision weights is kept in float32: bfloat16 would round small steps away.

    peft's own layers take inputs of either; peft does the same for a model that it wraps.
    """
    import torch
    from peft.tuners._buffer_dict import BufferDict

    half = (torch.bfloat16, torch.float16)
    for module in model.modules():
        if not is_tuner_layer(module):
            continue
        for name, parameter in module.named_parameters():
            if not name.startswith("base_layer.") and parameter.dtype in half:
                parameter.data = parameter.data.float()
        for inner in module.modules():
            if isinstance(inner, BufferDict) and ADAPTER in inner and inner[ADAPTER].dtype in half:
                inner[ADAPTER] = inner[ADAPTER].float()


def _refuse_adjusted(config: Any, model: nn.Module) -> None:
    """peft puts a size that fits in the place of one that does not (OFT's blocks), with a warning; here that is said.

    Its layers keep the sizes that they took under the names of the config's fields.
    """
    asked = {name: value for name, value in vars(config).items() if type(value) is int and value}
    if getattr(config, "rank_pattern", None) or getattr(config, "alpha_pattern", None):
        asked = {name: value for name, value in asked.items() if name != "r" and not name.endswith("alpha")}
    for path, module in model.named_modules():
        if not is_tuner_layer(module):
            continue
        for name, value in asked.items():
            taken = getattr(module, name, None)
            if isinstance(taken, dict) and taken.get(ADAPTER, value) != value:
                raise RequestError(
                    message(
                        f"the layer does not take {name}={value}",
                        where=f"{type(config).__name__}, {path}",
                        expected=f"{name} that fits it, such as {taken[ADAPTER]}",
                    )
                )


def _refused(config: Any, model: nn.Module, expected: Collection[str], found: str) -> RequestError:
    """peft's refusal with the layer at which it spoke: the first that it has not put its own around."""
    modules = dict(model.named_modules())
    left = [path for path in modules if path in expected and not is_tuner_layer(modules[path])]
    layer = f", {left[0]} ({type(modules[left[0]]).__name__})" if left else ""
    return RequestError(
        message(
            "peft refuses this adapter on this model",
            where=f"{type(config).__name__}{layer}",
            found=found,
            remedy="Change what peft names, leave such modules out of target_modules, or take 'lora' or 'ia3', which "
            "fit every linear map.",
        )
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """peft warns of what is handled here on purpose (tied targets are refused before it is asked)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _as_named() -> Iterator[None]:
    """The names of a config are those of the live model, whatever its class called them once.

    peft takes a `gate_proj` of DeepSeek's, GLM's or ERNIE's mixtures for an expert's from the time when each expert was
    a module, and gives the experts factors in the place of the shared expert's and the dense blocks' linear maps.
    """
    conversion: Any = importlib.import_module("peft.utils.transformers_weight_conversion")
    name = "convert_peft_config_for_transformers"
    kept = getattr(conversion, name)
    setattr(conversion, name, lambda *_, **__: None)
    try:
        yield
    finally:
        setattr(conversion, name, kept)


def misread(model: nn.Module, document: Mapping[str, Any]) -> str:
    """Why peft would adapt other modules than this adapter_config.json names; empty where it would not.

    Opening a folder, peft does what `_as_named` keeps it from doing here, and no spelling of the names avoids it.

    Args:
        model: whose class decides; its weights are not looked at.
        document: the config.
    """
    if document.get("peft_type") != "LORA":
        return ""
    deferred.import_peft()
    import peft
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    named = set(document["target_modules"])
    config = peft.LoraConfig(target_modules=list(named))
    # Where only some of the expert's maps are named, peft refuses them all.
    with contextlib.suppress(ValueError):
        convert_peft_config_for_transformers(config, model, None)
        if set(config.target_modules or ()) == named:
            return ""
    lost = sorted(named - set(config.target_modules or ())) or sorted(named)
    return (
        f"peft takes {', '.join(lost)} of {type(model).__name__} for names that experts had before transformers 5, and "
        "would put these factors elsewhere"
    )


def strip(model: PreTrainedModel) -> None:
    """Put the original module objects back and remove what peft left on the model."""
    for path, layer in tuner_layers(model):
        model.set_submodule(path, layer.get_base_layer())
    for leftover in ("peft_config", "_hf_peft_config_loaded"):
        if leftover in vars(model):
            delattr(model, leftover)


def switch(model: PreTrainedModel, enabled: bool) -> None:
    """Let the adapters work, or let the base layers answer alone."""
    for module in model.modules():
        if is_tuner_layer(module):
            tuner: Any = module
            tuner.enable_adapters(enabled)


def key(name: str) -> str:
    """The key of a trained parameter in a peft file."""
    return PREFIX + name.replace(f".{ADAPTER}.", ".").removesuffix(f".{ADAPTER}")


def grouped(
    state: Mapping[str, Tensor], modules: Collection[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """An adapter file's tensors, divided into those of adapted modules and whole backbone tensors.

    Returns:
        by_module: module path -> {name below the module: tensor}.
        whole: backbone tensor name -> tensor (heads, biases).
    """
    by_module: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in state.items():
        own = name.removeprefix(PREFIX)
        path = next((p for p in _ancestors(own) if p in modules), None)
        inner = own.removeprefix(f"{path}.") if path else ""
        if path is None or inner in ("weight", "bias") or inner.startswith("base_layer."):
            whole[own_name(own)] = tensor
        else:
            by_module.setdefault(path, {})[inner] = tensor
    return by_module, whole


def _ancestors(name: str) -> Iterator[str]:
    path = name
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def merge_edits(config: Any, modules: Mapping[str, Sequence[Any]], state: Mapping[str, Tensor]) -> dict[str, Edit]:
    """The edits of any peft method that can merge: one `MergeLayer` for each weight and each bias."""
    by_module, whole = grouped(state, modules)
    edits: dict[str, Edit] = {}
    for path, tensors in by_module.items():
        size_in, size_out, transposed, has_bias = modules[path]
        for part in ("weight", "bias") if has_bias else ("weight",):
            edits[f"{path}.{part}"] = MergeLayer(
                config, path, tensors, part, bool(transposed), (size_in, size_out), bool(has_bias)
            )
    return edits | replace_all(whole)
