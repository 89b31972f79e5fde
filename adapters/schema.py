"""What a manifest may say: every field, its kind and its range, and nothing beside them."""

from __future__ import annotations

import base64
import binascii
import math
from pathlib import PurePosixPath
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from adapters import reading, shards
from adapters.places import lies_inside

SAMPLES = 32  # values that a fingerprint keeps of a tensor
# What may hold code or pickles, whatever it is called: never part of an adapter, listed or not.
REFUSED_SUFFIXES = frozenset(
    {
        *(".bin", ".ckpt", ".h5", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"),
        *(".dll", ".dylib", ".exe", ".py", ".pyc", ".pyd", ".pyw", ".sh", ".so"),
    }
)
# Files of a backbone, which an adapter would put in the place of the backbone's own when it is merged.
RESERVED = frozenset({"config.json", "generation_config.json", shards.INDEX, shards.WEIGHTS})
# Loading options that open the same weights again. Whatever names other places or lets code run is left to the caller.
LOAD_OPTIONS = frozenset({"dtype", "attn_implementation", "device_map", "revision"})


def load_fault(options: dict[str, str]) -> str:
    """Which of an adapter's loading options is none, or a place in a value's stead; empty for none."""
    for name, value in options.items():
        if name not in LOAD_OPTIONS or not is_word(value):
            return f"{name}={value!r}"
    return ""


def is_word(value: str) -> bool:
    """Whether a value can be neither a path nor the name of a repository."""
    return value.isprintable() and not any(mark in value for mark in ("/", "\\", ".."))


def _load(options: dict[str, str]) -> dict[str, str]:
    fault = load_fault(options)
    if fault:
        raise ValueError(f"no loading option of an adapter: {fault}")
    return options


def _tensor_name(name: str) -> str:
    if not shards.is_name(name):
        raise ValueError(f"no name of a tensor: {name[:80]!r}")
    return name


def _file_name(name: str) -> str:
    if not lies_inside(name):
        raise ValueError(f"a file outside the folder: {name[:80]!r}")
    if PurePosixPath(name).suffix.lower() in REFUSED_SUFFIXES:
        raise ValueError(f"a file that may hold code, which no adapter does: {name[:80]!r}")
    if name.lower() in RESERVED:
        raise ValueError(f"a file of a backbone: {name[:80]!r}")
    return name


def _dtype(name: str) -> str:
    if name not in shards.WIDTHS:
        raise ValueError(f"no dtype: {name[:40]!r}")
    return name


def _trainable(name: str) -> str:
    if "float" not in _dtype(name):
        raise ValueError(f"no dtype that trains: {name}")
    return name


def _print(entry: list[Any]) -> list[Any]:
    """Shape, dtype, hash and samples of one tensor of the backbone."""
    if len(entry) != 4 or not isinstance(entry[0], list) or not all(isinstance(part, str) for part in entry[1:]):
        raise ValueError("expected shape, dtype, hash, samples")
    shape, dtype, digest, samples = entry
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError("no shape")
    _dtype(dtype)
    if digest and (len(digest) != 32 or not set(digest) <= set("0123456789abcdef")):
        raise ValueError("no hash")
    try:
        taken = len(base64.b64decode(samples, validate=True))
    except (binascii.Error, ValueError):
        raise ValueError("no samples") from None
    if taken != min(SAMPLES, math.prod(shape)) * shards.WIDTHS[dtype]:
        raise ValueError("another number of samples")
    return entry


Tensor = Annotated[str, AfterValidator(_tensor_name)]
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=200)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class Named(_Strict):
    """A strategy or a task: its name and the options that differ from their defaults."""

    name: str
    options: dict[str, Any]


class TaskEntry(Named):
    """A task; where its head reads is checked before any model is opened."""

    @model_validator(mode="after")
    def _reads(self) -> Self:
        wrong = reading.faults(self.options.get("pooling"), self.options.get("layer"))
        if wrong:
            raise ValueError(wrong[0])
        return self


class Print(_Strict):
    """The backbone's fingerprint."""

    digest: str
    prefix: str
    tensors: Annotated[dict[Tensor, Annotated[list[Any], AfterValidator(_print)]], Field(min_length=1)]


class Backbone(_Strict):
    """What the adapter was trained on."""

    name: str | None
    revision: str | None
    model_class: Identifier
    quantization: str | None
    packed: dict[Tensor, bool]
    dtype: Annotated[str, AfterValidator(_dtype)]
    load: Annotated[dict[str, str], AfterValidator(_load)]
    config: dict[str, Any]
    names: dict[Tensor, Tensor]
    saved_as: dict[Tensor, Tensor]
    bytes: Count
    fingerprint: Print
    inside: bool = False  # the backbone lies in this folder, under its name

    @model_validator(mode="after")
    def _lies_inside(self) -> Self:
        plain = self.name is not None and "/" not in self.name and lies_inside(self.name) and is_word(self.name)
        if self.inside and (not plain or self.revision is not None or self.quantization is not None):
            raise ValueError("a backbone in this folder that is named, stored or dated as one elsewhere")
        return self


class TensorEntry(_Strict):
    """One trained tensor."""

    shape: list[Count]
    dtype: Annotated[str, AfterValidator(_trainable)]
    sha256: Sha256


class FileEntry(_Strict):
    """One file beside the manifest."""

    size: Count
    sha256: Sha256


class VocabularyEntry(_Strict):
    """The tokens that were added."""

    tokens: list[str]
    ids: list[Count]
    size: Count
    axes: dict[Tensor, Count]
    whole: dict[Tensor, Count]


class Manifest(_Strict):
    """adapter.json."""

    format: Annotated[int, Field(ge=1)]
    holdfast: str | None
    strategy: Named
    task: TaskEntry
    backbone: Backbone
    head: list[Tensor]
    new: list[Tensor]
    tensors: Annotated[dict[Tensor, TensorEntry], Field(min_length=1)]
    vocabulary: VocabularyEntry | None
    seed: int
    data: dict[str, Any]
    metrics: dict[str, Any]
    settings: dict[str, Any]
    notes: list[str]
    reproducible: bool
    why_not_reproducible: str = ""
    made: dict[str, Any] = {}  # of an adapter that was computed: by what, from which others, how exactly
    versions: dict[str, str | None]
    files: dict[Annotated[str, AfterValidator(_file_name)], FileEntry]
    digest: Sha256


def faults(document: Any) -> list[str]:
    """What is wrong with a manifest's fields, each with its place; empty for nothing."""
    try:
        Manifest.model_validate(document)
    except ValidationError as fault:
        return [_line(error) for error in fault.errors(include_url=False, include_input=False)]
    return []


def _line(error: Any) -> str:
    path = ".".join(str(part)[:80] for part in error["loc"] if part != "[key]")
    if error["type"] == "extra_forbidden":
        return f"{path}: an unknown field"
    return f"{path}: {str(error['msg']).removeprefix('Value error, ')}"
