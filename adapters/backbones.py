"""A backbone opened, identified, and given a padding token: everything before a strategy touches it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from adapters import bars, places, processes, progress, shards
from adapters.contracts import Task
from adapters.errors import BackboneError, FolderError, MissingPackageError, RequestError, message, nearest
from adapters.lent import Lent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from adapters.fingerprint import Fingerprint


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


def open_model(model: Any, task: Task, load: dict[str, Any], processor: Any) -> tuple[PreTrainedModel, set[str], Any]:
    """The model, the parameters that loading made new, and the processor.

    Args:
        model: a live model, a folder or an id.
        task: that the model is for.
        load: what `from_pretrained` takes.
        processor: the caller's own, options over those of the backbone's image processor, or None.
    """
    from pickle import UnpicklingError  # raised for what torch refuses to unpickle

    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    changes: Mapping[str, Any] = processor if isinstance(processor, Mapping) else {}
    own = None if isinstance(processor, Mapping) else processor
    if live_model(model):
        if own is None:
            own = _processor_of(task, model.name_or_path, load, changes, quiet=not changes)
        return model, set(), own
    trusted = _trusted(load)
    name = str(model)
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
    parameters = {parameter_name for parameter_name, _ in net.named_parameters()}
    mismatched = {entry[0] if isinstance(entry, tuple | list) else entry for entry in info["mismatched_keys"]}
    new = (set(info["missing_keys"]) | mismatched) & parameters
    head = task.head(net)
    foreign = {key for key in mismatched if key not in head}
    if foreign:
        raise RequestError(
            message("the checkpoint does not fit its own config", where=name, found=", ".join(sorted(foreign)[:3]))
        )
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
    """transformers reports a new head as a fault of the checkpoint; here it is the plan, and `Adapted` tells it."""
    from transformers.utils import logging as hub_logging

    level = hub_logging.get_verbosity()
    bars = hub_logging.is_progress_bar_enabled()
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hub_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
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


def identify(
    model: PreTrainedModel,
    head: frozenset[str],
    folder: Path | None,
    *,
    trust: bool,
    full: bool = True,
    claimed: Fingerprint | None = None,
) -> Fingerprint:
    """The backbone's fingerprint: from its checkpoint where there is one, else from memory.

    Args:
        model: the live model.
        head: what is left out.
        folder: where its checkpoint may lie.
        trust: the model has just been loaded from there; a live model is compared with it first.
        full: hash every byte.
        claimed: the caller's word, taken where packed weights cannot be identified; None refuses them.

    Raises:
        BackboneError: packed weights whose full-precision checkpoint is not at hand or is another one.
    """
    from adapters import fingerprint as prints
    from adapters.quantize import packed_modules

    packed = {f"{path}.weight".replace(".base_layer.", ".") for path in packed_modules(model)}
    on_disk = None
    if folder is not None:
        with contextlib.suppress(FolderError):  # older checkpoints hold no safetensors: identified from memory
            on_disk = prints.of_folder(model, head | packed if not trust else head, folder, full=full)
    if packed and not trust:
        try:
            return _of_packed(model, head, packed, folder, on_disk, full=full)
        except BackboneError:
            if claimed is None:
                raise
            return claimed
    if on_disk is not None and trust:
        return on_disk
    in_memory = prints.of_model(model, head, full=full)
    if on_disk is not None and not prints.differences(on_disk, in_memory):
        return on_disk  # the finer of the two, where the live model was loaded in fewer bits
    return in_memory


def _of_packed(
    model: PreTrainedModel,
    head: frozenset[str],
    packed: set[str],
    folder: Path | None,
    on_disk: Fingerprint | None,
    *,
    full: bool,
) -> Fingerprint:
    """The fingerprint of a live model in 4 bits: its checkpoint's, once packing that gives the same bytes."""
    from adapters import fingerprint as prints
    from adapters.quantize import repacked_differs

    if folder is None or on_disk is None:
        raise BackboneError(
            message(
                "a model in 4 bits can only be identified beside its full-precision checkpoint",
                where=type(model).__name__,
                expected="a name_or_path that opens",
                found=repr(model.name_or_path),
                remedy="Adapt the id or folder with quantization='nf4', or say adapters.load(..., verify='off').",
            )
        )
    slots = prints.disk_slots(model, folder)
    wrong = repacked_differs(model, lambda name: prints.read_backbone_tensor(slots, name))
    if wrong:
        raise BackboneError(
            message(
                "the packed weights are not those of the model's own checkpoint",
                where=f"{model.name_or_path}: {', '.join(wrong[:3])}",
                found=f"{len(wrong)} of {len(packed)} differ",
            )
        )
    if prints.differences(on_disk, prints.of_model(model, head, skip=packed, full=full)):
        raise BackboneError(message("the live 4-bit model differs from its checkpoint", where=str(model.name_or_path)))
    return prints.of_folder(model, head, folder, full=full)


def packed_kind(model: PreTrainedModel) -> str:
    from adapters.quantize import packed_modules

    module = next(iter(packed_modules(model).values()))
    state: Any = module.get_parameter("weight")
    return str(state.quant_state.quant_type)


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
