"""Options of `from_pretrained` by which a model would be another than the one that its name stands for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Final

from adapters.errors import RequestError, message

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

# Options by which transformers loads other weights than those that a name is fingerprinted, merged and exported by.
OTHER_WEIGHTS: Final[Mapping[str, str]] = {
    "subfolder": "Name the folder itself, {name}/{value}; what lies on the hub has to be downloaded first.",
    "variant": "Put the variant into a folder of its own, as model.safetensors, and name that.",
    "gguf_file": "Load it with transformers, save_pretrained it into a folder, and name that.",
    "state_dict": "Load the weights into a model, save_pretrained it into a folder, and name that.",
    "use_safetensors": "Leave it out.",
}

# What to do instead of offloading what is to be packed.
PACKED: Final = (
    "Say device_map='cuda': packing never holds more than one weight unpacked, and what is packed takes a quarter of "
    "16 bits; with offload_folder alone what is packed in the processor's memory is pages of files there. If that does "
    "not fit either, leave quantization out and offload."
)

# Settings that no output depends on, that an adapter brings, or that stand for what it is checked by.
BROUGHT: Final = (
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "quantization_config",
    "vocab_size",
    "pad_token_id",
)


def check(load: Mapping[str, Any], name: str) -> None:
    """Refuse options that would load other weights than those that the name stands for.

    Raises:
        RequestError: naming the option and what to do instead.
    """
    for option, remedy in OTHER_WEIGHTS.items():
        value = load.get(option)
        if value is None or (option == "use_safetensors" and value is not False):
            continue
        raise RequestError(
            message(
                "other weights than those that the name stands for",
                where=f"load: {option}",
                expected=f"the weights by which {name} is known again, merged and exported: its safetensors files",
                found=repr(value) if isinstance(value, str | bool) else type(value).__name__,
                remedy=remedy.format(name=name, value=value),
            )
        )


def spread(load: Mapping[str, Any]) -> bool:
    """Whether options put parts of a model elsewhere than on one device, as far as they say it themselves."""
    asked = load.get("device_map")
    places = {str(place) for place in (asked.values() if isinstance(asked, Mapping) else [asked])}
    return "disk" in places or ("cpu" in places and len(places) > 1)


def check_packing(load: Mapping[str, Any], quantization: str | None) -> None:
    """Refuse to offload what is to be packed, where the options say so already.

    Raises:
        RequestError: naming both.
    """
    if quantization is not None and spread(load):
        raise RequestError(
            message(
                "what is packed to 4 bits is not offloaded",
                where="load: device_map",
                expected=f"one device for all of it, or no quantization={quantization!r}",
                found=str(load["device_map"]),
                remedy=PACKED,
            )
        )


def check_settings(net: PreTrainedModel, folder: Path | None, load: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse options that change what the model computes: whoever opens the adapter gets the checkpoint's own settings.

    Dropout and first values, which are gone once the model is trained, may be changed.

    Args:
        net: as it was loaded with them.
        folder: where its checkpoint lies; None where that is not on this machine.
        load: the options.
        known: settings that an adapter does bring: its task's.

    Raises:
        RequestError: naming the option, and both values.
    """
    changed = _changed(net, folder, load, known)
    if changed:
        key, (own, here) = next(iter(changed.items()))
        raise RequestError(
            message(
                f"the option {key!r} changes what the backbone computes, and no adapter brings it",
                where=f"load: {', '.join(changed)}",
                expected=f"{key} = {own!r}, as in the config.json of {net.name_or_path}",
                found=repr(here),
                remedy="Put it into the config.json of a copy of the backbone, and name that.",
            )
        )


def said_of(net: PreTrainedModel, folder: Path | None, known: Collection[str]) -> str:
    """What is to be said of a live model whose settings are not those of the checkpoint that it is named after.

    Args:
        net, folder, known: as `check_settings` takes them.
    """
    changed = _changed(net, folder, vars(net.config), known)
    shown = ", ".join(f"{key} is {here!r}, was {own!r}" for key, (own, here) in changed.items())
    if not changed:
        return ""
    return (
        f"the model's settings are not those of {net.name_or_path}: {shown}. An adapter does not bring them: open it "
        "on a model with the same ones"
    )


def _changed(
    net: PreTrainedModel, folder: Path | None, keys: Collection[str], known: Collection[str]
) -> dict[str, tuple[Any, Any]]:
    """The settings among these that differ from the checkpoint's own: name -> its value, the model's."""
    from adapters.origin import BESIDE

    if folder is None or not (folder / "config.json").is_file():
        return {}
    plain = {*BESIDE, *known, *BROUGHT}
    asked = [key for key in keys if hasattr(net.config, key) and key not in plain and "drop" not in key]
    asked = [key for key in asked if not key.startswith(("initializer", "attn_", "_"))]
    if not asked:
        return {}
    own = type(net.config).from_json_file(str(folder / "config.json"))
    pairs = {key: (getattr(own, key, None), getattr(net.config, key)) for key in asked}
    return {key: pair for key, pair in pairs.items() if _plain(pair[0]) != _plain(pair[1])}


def _plain(value: Any) -> Any:
    """A setting as it stands in a file: an inner configuration as its dict, a tuple as a list."""
    value = value.to_dict() if hasattr(value, "to_dict") else value
    return list(value) if isinstance(value, tuple) else value
