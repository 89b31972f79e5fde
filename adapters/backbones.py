"""A backbone opened, and given a padding token: everything before a strategy touches it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from adapters import bars, loadoptions, places, processes, progress, shards
from adapters.contracts import Task
from adapters.errors import FolderError, MissingPackageError, RequestError, message, nearest
from adapters.lent import Lent, first_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from adapters.arrival import Later

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "source.spm",
)
# What a task's processor is called, and the files that one of them at least must be among.
PROCESSORS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "AutoTokenizer": ("tokenizer", TOKENIZER_FILES),
    "AutoImageProcessor": ("image processor", ("preprocessor_config.json", "processor_config.json")),
}
MAX_CONFIG = 16 << 20  # bytes
# What opens them. Two backends resize differently: the one that needs no torchvision makes the same pixels everywhere.
OPENED_WITH: Mapping[str, Mapping[str, str]] = {"AutoImageProcessor": {"backend": "pil"}}


def live_model(model: object) -> bool:
    """Whether `adapt` was given a model, not a name or what was opened by one."""
    return not isinstance(model, str | Path | Lent)


def opened(
    model: Any, task: Task, quantization: str | None, load: dict[str, Any], processor: Any
) -> tuple[PreTrainedModel, set[str], Any, Later | None]:
    """What `open_model` gives, or a lent backbone; and the weights that are to arrive before they are packed.

    Args:
        model: a live model, a folder, an id, or a backbone that is lent.
        task, load, processor: as for `open_model`.
        quantization: how the frozen rest is going to be packed; None where it is not.
    """
    import torch

    from adapters import arrival

    if isinstance(model, Lent):
        return *model.begin(None if isinstance(processor, Mapping) else processor), None
    if quantization is None or live_model(model):
        return *_here(open_model(model, task, load, processor), quantization), None
    loadoptions.check_packing(load, quantization)
    device, before = arrival.device_of(load), torch.get_rng_state()
    why = f"load={load}, or the run divides it"
    if device is not None:
        net, new, own = open_model(model, task, {**load, "device_map": {"": "meta"}}, processor)
        try:
            later = arrival.filled(net, local_folder(net.name_or_path or "", load), device, before, load)
        except FolderError as fault:
            why = str(fault)
            torch.set_rng_state(before)
        else:
            return net, new, own, later
    logger.info("%s is read whole before it is packed: %s", model, why)
    return *_here(open_model(model, task, load, processor), quantization), None


def _here(
    found: tuple[PreTrainedModel, set[str], Any], quantization: str | None
) -> tuple[PreTrainedModel, set[str], Any]:
    """What was opened, if all of it has values, and nothing of it is offloaded that is to be packed.

    Raises:
        RequestError: weights that stand in the model without memory; packing of what is offloaded.
    """
    from adapters import onload

    net = found[0]
    where = f"{net.name_or_path or type(net).__name__}, device_map"
    empty = [name for name, parameter in net.named_parameters() if parameter.is_meta]
    if empty:
        raise RequestError(
            message(
                "parts of the model have no values",
                where=where,
                expected="every weight on a device, in the processor's memory, or offloaded by from_pretrained",
                found=f"{len(empty)} parameters on the meta device, {empty[0]} first",
                remedy="Open it with from_pretrained(..., device_map=..., offload_folder=...), or give its name.",
            )
        )
    away = onload.placed(net)
    if away is not None and quantization is not None:
        raise RequestError(
            message(
                "what is packed to 4 bits is not offloaded",
                where=where,
                expected=f"one device for all of it, or no quantization={quantization!r}",
                found=f"{len(away.names)} parameters elsewhere, {min(away.names, default='')} first",
                remedy=loadoptions.PACKED,
            )
        )
    return found


def open_model(model: Any, task: Task, load: dict[str, Any], processor: Any) -> tuple[PreTrainedModel, set[str], Any]:
    """The model, the parameters that loading made new, and the processor.

    What accelerate has offloaded has its values again; what is new then begins as in a load that offloads nothing.

    Args:
        model: a live model, a folder or an id.
        task: that the model is for.
        load: what `from_pretrained` takes.
        processor: the caller's own, options over those of the backbone's image processor, or None.
    """
    from pickle import UnpicklingError  # raised for what torch refuses to unpickle

    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    from adapters import offload

    changes: Mapping[str, Any] = processor if isinstance(processor, Mapping) else {}
    own = None if isinstance(processor, Mapping) else processor
    if live_model(model):
        if own is None:
            own = _processor_of(task, model.name_or_path, load, changes, quiet=not changes)
        offload.taken_over(model)
        return model, set(), own
    name = str(model)
    loadoptions.check(load, name)
    trusted = _trusted(load)
    path = Path(name).expanduser()
    if not path.is_dir() and (isinstance(model, Path) or places.is_path(name)):
        raise RequestError(
            message("there is no such model folder", where=name, remedy="Give a folder that is there, or a hub id.")
        )
    if path.is_dir():
        name = str(path)
        if not (path / "config.json").exists():
            raise RequestError(message("not a model folder", where=name, expected="a config.json in it"))
        check_folder(path)
    auto: Any = getattr(transformers, task.auto_class)
    options = {"dtype": "auto", **load, **task.config(), "trust_remote_code": trusted}
    before = torch.get_rng_state()
    try:
        with _loading(name, local=path.is_dir()), processes.reading_all():
            options |= {"tqdm_class": bars.Bar}
            net, info = auto.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except (
        *(OSError, ValueError, TypeError, AttributeError, KeyError, IndexError, RuntimeError, ZeroDivisionError),
        *(SafetensorError, UnpicklingError, StrictDataclassError, MemoryError),
    ) as fault:
        raise RequestError(
            message(
                "the backbone cannot be loaded",
                where=f"{name}, load={load}" if load else name,
                found=" ".join(f"{type(fault).__name__}: {fault}".split())[:400],
                remedy="It brings code of its own. If you trust it: load={'trust_remote_code': True}."
                if "trust_remote_code" in str(fault)
                else "Check the id or folder; offline, only local folders and cached ids open.",
            )
        ) from fault
    loadoptions.check_settings(net, local_folder(name, load), load, task.config())
    parameters = {parameter_name for parameter_name, _ in net.named_parameters()}
    mismatched = {entry[0] if isinstance(entry, tuple | list) else entry for entry in info["mismatched_keys"]}
    new = (set(info["missing_keys"]) | mismatched) & parameters
    head = task.head(net)
    foreign = {key for key in mismatched if key not in head}
    if foreign:
        raise RequestError(
            message("the checkpoint does not fit its own config", where=name, found=", ".join(sorted(foreign)[:3]))
        )
    if offload.taken_over(net):
        torch.set_rng_state(before)
        first_values(net, new)
    return net, new, own if own is not None else _processor_of(task, name, load, changes, quiet=False)


def _trusted(load: Mapping[str, Any]) -> bool:
    """Whether the caller lets the backbone bring code of its own; said outright, or not at all."""
    said = load.get("trust_remote_code", False)
    if not isinstance(said, bool):
        raise RequestError(
            message("a wrong value", where="load: trust_remote_code", expected="True or False", found=repr(said))
        )
    return said


def check_folder(folder: Path) -> None:
    """Look at a backbone's folder before transformers reads it.

    Raises:
        FolderError: links, a config that is too large or no JSON, one that names other files or code to be fetched, or
            safetensors weights that are not whole or lie elsewhere.
    """
    check_config(folder)
    if (folder / shards.INDEX).exists() or (folder / shards.WEIGHTS).exists():
        shards.read_directory(folder)


def check_config(folder: Path) -> None:
    """The same of a folder's config alone."""
    places.refuse_strays(folder, deep=False)
    file = folder / "config.json"
    config = shards.read_json(file, MAX_CONFIG)
    if not isinstance(config, dict):
        raise FolderError(message("not a config", where=str(file), expected="a JSON object"))
    if "transformers_weights" in config:
        raise FolderError(message("a config that names a weights file of its own", where=str(file)))
    fetched = next(_fetched(config), None)
    if fetched is not None:
        raise FolderError(message("a config that names code to be fetched", where=str(file), found=fetched))


def _fetched(config: Any) -> Iterator[str]:
    """Attention or expert implementations that are the name of a repository."""
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        if str(key).endswith("_implementation") and "/" in str(value):
            yield f"{key}={value!r}"
        elif isinstance(value, dict | list):
            yield from _fetched(value)


@contextlib.contextmanager
def _loading(name: str, *, local: bool) -> Iterator[None]:
    """Within it a backbone is fetched and read, as jobs of ours instead of transformers' and the hub's bars."""
    from transformers.utils import logging as hub_logging

    job = progress.Job(f"loading {Path(name).name}") if local else bars.downloading(name)
    with job, hushed():
        before = hub_logging.set_tqdm_hook(bars.tensors)
        try:
            yield
        finally:
            hub_logging.set_tqdm_hook(before)


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """transformers reports a new head as a fault of the checkpoint; here it is the plan, and `Adapted` tells it.

    accelerate says of what it offloads that it is without values, which it has again before anybody looks.
    """
    from transformers.utils import logging as hub_logging

    level, spreading = hub_logging.get_verbosity(), logging.getLogger("accelerate.big_modeling")
    bars = hub_logging.is_progress_bar_enabled()
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    before, spreading.disabled = spreading.disabled, True
    hub_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        spreading.disabled = before
        hub_logging.set_verbosity(level)
        if bars:
            hub_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _processor_of(task: Task, name: str, load: Mapping[str, Any], changes: Mapping[str, Any], *, quiet: bool) -> Any:
    """The backbone's own tokenizer or image processor; None where a live model has no place to load one from."""
    if changes and task.processor != "AutoImageProcessor":
        raise RequestError(
            message("only an image processor takes options here", where="processor", found=", ".join(changes))
        )
    if not name or (quiet and not Path(name).is_dir()):
        return None
    kind, what = task.processor, PROCESSORS[task.processor][0]
    folder = Path(name).expanduser()
    lacking = processor_fault(kind, folder, name)
    if lacking:
        # transformers would make an empty tokenizer up, for which all texts are the same.
        if quiet:
            return None
        raise RequestError(lacking)
    kept = {key: value for key, value in load.items() if key in ("revision", "token", "trust_remote_code", "cache_dir")}
    try:
        opened = open_processor(kind, name, {**kept, **changes})
    except MissingPackageError:
        raise
    except Exception as fault:  # tokenizers raises bare exceptions for what it cannot read
        if changes:
            said = " ".join(str(fault).split())[:300]
            raise RequestError(
                message(f"the {what} does not open with these options", where=f"processor={dict(changes)}", found=said)
            ) from fault
        if quiet or not (isinstance(fault, OSError) or folder.is_dir()):
            return None
        raise RequestError(
            message(
                f"the backbone has no {what} that opens",
                where=name,
                found=" ".join(f"{type(fault).__name__}: {fault}".split())[:300],
                remedy=f"Mend its files, or pass processor={kind}.from_pretrained(...).",
            )
        ) from fault
    odd = sorted(changes.keys() - opened.to_dict().keys()) if changes else []
    if odd:
        raise RequestError(
            message(
                f"the image processor has no {odd[0]!r}",
                where="processor",
                remedy=nearest(odd[0], opened.to_dict()),
            )
        )
    return opened


def processor_fault(kind: str, folder: Path, name: str) -> str:
    """The fault of a backbone's folder that holds no file of its tokenizer or image processor; empty for none."""
    what, files = PROCESSORS[kind]
    if not folder.is_dir() or any((folder / file).exists() for file in files):
        return ""
    return message(
        f"the backbone has no {what}",
        where=name,
        expected=f"one of {', '.join(files[:3])} ..." if len(files) > 1 else files[0],
        remedy=f"Pass processor={kind}.from_pretrained(...).",
    )


def open_processor(kind: str, name: str, options: Mapping[str, Any]) -> Any:
    """A tokenizer or image processor from a folder or id; code that it brings runs only where the caller said so.

    Raises:
        MissingPackageError: image processors need Pillow.
    """
    import transformers

    given = {**OPENED_WITH.get(kind, {}), "trust_remote_code": False, **options}
    try:
        return getattr(transformers, kind).from_pretrained(name, **given)
    except ImportError as fault:
        raise MissingPackageError(
            message(
                f"a package is missing for the {PROCESSORS[kind][0]}",
                where=name,
                found=" ".join(str(fault).split())[:200],
                remedy='For pictures: pip install "holdfast[vision]".',
            )
        ) from fault


def config_at_hand(base: Any, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of a backbone: a live model's, or the file of one that lies on this machine; empty elsewhere."""
    if live_model(base):
        found: Mapping[str, Any] = base.config.to_dict()
        return found
    place = local_folder(str(base), options) if isinstance(base, str | Path) else None
    if place is None or not (place / "config.json").is_file():
        return {}
    config = shards.read_json(place / "config.json", MAX_CONFIG)
    return config if isinstance(config, dict) else {}


def local_folder(name: str, load: Mapping[str, Any]) -> Path | None:
    """Where a backbone's files lie on this machine: its folder, or the hub cache's snapshot; None for neither."""
    if not name:
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if places.is_path(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    for file in ("model.safetensors", "model.safetensors.index.json"):
        found = try_to_load_from_cache(name, file, revision=load.get("revision"))
        if isinstance(found, str):
            return Path(found).parent
    return None


@final
@dataclass(frozen=True)
class Padding:
    """How rows are padded, on the right: the token, its id, and a remark to be said once (empty where none is due)."""

    token: str
    id: int
    note: str

    def settle(self, model: PreTrainedModel, processor: Any) -> dict[str, Any]:
        """Give tokenizer and model the token; returns the config fields that were set."""
        if processor.pad_token is None:
            processor.pad_token = self.token
        processor.padding_side = "right"
        config = model.config.get_text_config()
        generation = model.generation_config if model.can_generate() else None
        if generation is not None and generation.pad_token_id is None:
            generation.pad_token_id = self.id
        if config.pad_token_id == self.id:
            return {}
        config.pad_token_id = model.config.pad_token_id = self.id
        return {"pad_token_id": self.id}


def plan_padding(model: PreTrainedModel, processor: Any) -> Padding | None:
    """One padding token for tokenizer and model; the end token where there is none. Changes neither.

    Models that pool the last token look for the id in their config, so both must name the same.

    Returns:
        None where the processor pads nothing.

    Raises:
        RequestError: no token to pad with, or a tokenizer whose padding the model's positions contradict.
    """
    if processor is None or not hasattr(processor, "pad_token"):
        return None
    from adapters.anatomy import counted_from

    token = processor.pad_token or processor.eos_token
    if token is None:
        raise RequestError(
            message(
                "the tokenizer has neither a padding nor an end token",
                where=type(processor).__name__,
                remedy="Set processor.pad_token.",
            )
        )
    pad = int(processor.convert_tokens_to_ids(token))
    start = counted_from(model)
    if start is not None and start != pad:
        raise RequestError(
            message(
                "tokenizer and model pad with different tokens",
                where=type(model).__name__,
                expected=f"id {start}, from which the model counts positions",
                found=f"id {pad} ({token!r})",
                remedy="Use the tokenizer that belongs to the model.",
            )
        )
    missing = processor.pad_token is None
    note = f"no padding token: the end token {token!r} is used, rows are padded on the right" if missing else ""
    return Padding(str(token), pad, note)
