"""Folders that a stranger might send: adapters, plain peft folders and backbones, each with one thing wrong in it.

Every case is built from a whole folder. Digests are made right again wherever a stranger could do so too, so that the
case is refused for what is wrong in it. Whatever a folder would have executed makes a file `executed` outside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny

WEIGHTS = "adapter_model.safetensors"
MANIFEST = "adapter.json"
LABELS = ["a", "b", "c"]
Build = Callable[[Path, Path], None]  # changes a folder; the second is a folder outside it


@dataclass(frozen=True)
class Case:
    """One hostile folder.

    Attributes:
        name: unique.
        kind: what it is opened as: "adapter", "alone" (without a backbone), "merge", "peft", "backbone", "base" (of a
            merge).
        build: changes a whole folder of that kind.
    """

    name: str
    kind: str
    build: Build


class Evil:
    """Unpickling makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


CODE = "import os\nos.mkdir({mark!r})\nclass Own:\n    pass\n"

# ---------------------------------------------------------------------- whole folders


def whole(root: Path) -> dict[str, Path]:
    """A backbone, an adapter on it, and a plain peft folder for it, by the kind of case that starts from them."""
    import adapters

    base = Path(tiny.folder("bert", root / "base"))
    adapted = adapters.adapt(str(base), "lora", labels=LABELS)
    tiny.shake(adapted)
    adapter = adapters.save(adapted, root / "adapter")
    plain = root / "peft"
    plain.mkdir()
    for name in (WEIGHTS, "adapter_config.json"):
        shutil.copy(adapter / name, plain / name)
    return {"adapter": adapter, "alone": adapter, "merge": adapter, "peft": plain, "backbone": base}


def open_as(kind: str, folder: Path, base: Path) -> Any:
    """Open a folder as a case of this kind is opened."""
    import adapters

    if kind == "peft":
        return adapters.load(folder, tiny.model("bert"))
    if kind == "backbone":
        return adapters.adapt(str(folder), "probe", labels=LABELS)
    if kind == "merge":
        return adapters.merge_on_disk(folder, folder.with_name("merged"), base=base, check_logits=False)
    return adapters.load(folder, None if kind == "alone" else base)


# ---------------------------------------------------------------------- the tools of a stranger


def digest(document: dict[str, Any]) -> str:
    """The digest that a manifest carries, computed as anybody can."""
    rest = {key: value for key, value in document.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def write(folder: Path, document: dict[str, Any]) -> None:
    """A manifest with its digest made right."""
    document["digest"] = digest(document)
    (folder / MANIFEST).write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8", errors="surrogatepass")


def seal(folder: Path) -> None:
    """The manifest's sizes and digests made right for the files as they are."""
    document = json.loads((folder / MANIFEST).read_text())
    for name in document["files"]:
        content = (folder / name).read_bytes()
        document["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write(folder, document)


def manifest(change: Callable[[dict[str, Any]], Any]) -> Build:
    """Change the manifest, digest made right."""

    def build(folder: Path, outside: Path) -> None:
        document = json.loads((folder / MANIFEST).read_text())
        change(document)
        write(folder, document)

    return build


def at(path: str, value: Any) -> Build:
    """Put a value at a dotted place of the manifest."""

    def change(document: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        for part in parents:
            document = document[part]
        document[last] = value

    return manifest(change)


def without(path: str) -> Build:
    """Take a field out of the manifest."""

    def change(document: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        for part in parents:
            document = document[part]
        del document[last]

    return manifest(change)


def file(name: str, content: bytes, *, sealed: bool = True) -> Build:
    """Put other bytes in a file."""

    def build(folder: Path, outside: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        if sealed and (folder / MANIFEST).exists() and name != MANIFEST:
            seal(folder)

    return build


def listed(name: str, content: bytes = b"{}") -> Build:
    """A file more, listed in the manifest with its right digest."""

    def build(folder: Path, outside: Path) -> None:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
        document = json.loads((folder / MANIFEST).read_text())
        document["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        write(folder, document)

    return build


def claimed(name: str) -> Build:
    """A file outside the folder, listed in the manifest."""
    entry = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    return manifest(lambda document: document["files"].update({name: entry}))


def pickled(name: str, also: bool = False) -> Build:
    """A pickle that acts when it is opened; listed in the manifest or just there."""

    def build(folder: Path, outside: Path) -> None:
        content = pickle.dumps(Evil(outside / "executed"))
        (listed(name, content) if also else file(name, content, sealed=False))(folder, outside)

    return build


def pack(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file from its header, whatever that says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def unpack(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def header(name: str, change: Callable[[dict[str, Any], bytes], bytes]) -> Build:
    """Write a safetensors file again from its header and data, digests made right."""

    def build(folder: Path, outside: Path) -> None:
        path = folder / name
        path.write_bytes(change(*unpack(path)))
        if (folder / MANIFEST).exists():
            seal(folder)

    return build


def tensors(name: str, change: Callable[[dict[str, Any]], Any], told: bool = False) -> Build:
    """Change the tensors of a safetensors file; with `told`, the manifest tells of the change."""

    def build(folder: Path, outside: Path) -> None:
        from safetensors.torch import load_file, save_file

        found = load_file(folder / name)
        change(found)
        save_file(found, folder / name, {"format": "pt"})
        if not (folder / MANIFEST).exists():
            return
        if told:
            document = json.loads((folder / MANIFEST).read_text())
            document["tensors"] = {
                key: {
                    "shape": list(tensor.shape),
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "sha256": hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest(),
                }
                for key, tensor in found.items()
            }
            write(folder, document)
        seal(folder)

    return build


def link(name: str, target: str = "") -> Build:
    """A link in a file's place, to the same bytes outside or to somewhere else."""

    def build(folder: Path, outside: Path) -> None:
        place = folder / name
        if place.is_file() or place.is_dir():
            shutil.move(place, outside / place.name)
        place.symlink_to(target or outside / place.name)

    return build


def fifo(name: str) -> Build:
    """A pipe in a file's place: reading it waits for ever."""

    def build(folder: Path, outside: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return build


def large(name: str, size: int) -> Build:
    """A file of this size that takes no room."""

    def build(folder: Path, outside: Path) -> None:
        os.truncate(folder / name, size)

    return build


def own_code(name: str, entry: dict[str, Any]) -> Build:
    """Settings that name a class in a Python file beside them."""

    def build(folder: Path, outside: Path) -> None:
        path = folder / name
        settings = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(settings | entry))
        (folder / "own.py").write_text(CODE.format(mark=str(outside / "executed")))
        if (folder / MANIFEST).exists():
            (folder / "own.py").rename(outside / "own.py")
            listed(name, path.read_bytes())(folder, outside)

    return build


# ---------------------------------------------------------------------- the cases

WRONG_KINDS: dict[str, Any] = {
    "null": None,
    "list": [1],
    "object": {"zzz": 1},
    "text": "zzz",
    "number": -1.5,
    "switch": True,
}


def _kinds(value: Any) -> set[str]:
    """The wrong values that are none for a field that holds this."""
    if isinstance(value, bool):
        return {"switch"}
    kinds = {type(None): "null", list: "list", dict: "object", str: "text", int: "", float: "number"}
    return {kinds[type(value)]}


# Fields whose value says nothing about another, so that only another kind of value is wrong.
FREE = {"holdfast", "data", "metrics", "settings", "notes", "versions", "why_not_reproducible"}
NULLABLE = {"vocabulary", "holdfast", "backbone/name", "backbone/revision", "backbone/quantization"}


def _of_manifest(document: dict[str, Any]) -> Iterator[Case]:
    for path, value in _fields(document):
        if path == "digest":
            continue
        if path not in ("why_not_reproducible",):
            yield Case(f"manifest without {path}", "adapter", without(path))
        for kind, wrong in WRONG_KINDS.items():
            fits = kind in _kinds(value) or (path in NULLABLE and kind in ("null", "text"))
            if path == "format" and kind == "switch":
                fits = False
            if not fits and not (path == "vocabulary" and kind == "null"):
                yield Case(f"manifest, {path} as {kind}", "adapter", at(path, wrong))
    for place in ("", "strategy/", "task/", "backbone/", "backbone/fingerprint/"):
        yield Case(f"manifest, unknown field {place}zzz", "adapter", at(f"{place}zzz", 1))
    for name in ("files", "tensors"):
        key = next(iter(document[name]))
        yield Case(f"manifest, unknown field in {name}", "adapter", at(f"{name}/{key}/zzz", 1))
        yield Case(f"manifest, no {name}", "adapter", at(name, {}))
    yield Case("manifest, format 0", "adapter", at("format", 0))
    yield Case("manifest, format 99", "adapter", at("format", 99))
    yield Case("manifest, another digest", "adapter", lambda f, _: _raw(f, lambda d: d.update(digest="0" * 64)))
    yield Case("manifest, edited", "adapter", lambda f, _: _raw(f, lambda d: d.update(seed=7)))
    yield Case("manifest, NaN", "adapter", lambda f, _: _raw(f, lambda d: d["metrics"].update(x=float("nan"))))
    yield Case("manifest, Infinity", "adapter", lambda f, _: _raw(f, lambda d: d["metrics"].update(x=float("inf"))))
    yield Case("manifest, a giant number", "adapter", at("seed", 10**400))
    yield Case("manifest, half a character", "adapter", at("notes", ["\ud800"]))
    yield Case("manifest, a key twice", "adapter", _twice)
    yield Case("manifest too large", "adapter", large(MANIFEST, (64 << 20) + 1))


def _fields(document: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in document.items():
        yield name, value
        if name in ("strategy", "task", "backbone"):
            for inner, found in value.items():
                yield f"{name}/{inner}", found
    for inner, found in document["backbone"]["fingerprint"].items():
        yield f"backbone/fingerprint/{inner}", found


def _raw(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest and leave its digest as it was."""
    document = json.loads((folder / MANIFEST).read_text())
    change(document)
    (folder / MANIFEST).write_text(json.dumps(document))


def _twice(folder: Path, outside: Path) -> None:
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"seed"', '"seed": 1, "seed"', 1))


NAMES = (
    *("../../etc/passwd", "/etc/passwd", "..", "a/b", "a\\b", "C:\\x", "a\x00b", "a\nb", "", "a..b", "../x", "./x"),
    *("~/x/y", "//host/share", "\x1b[31mred", "a/../b", "\u202ereversed"),
)
SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".h5", ".py", ".so", ".sh")
LINKED = (WEIGHTS, MANIFEST, "tokenizer.json", "tokenizer_config.json", "adapter_config.json", "README.md")
TEXTS: dict[str, bytes] = {
    "empty": b"",
    "half": b'{"a": ',
    "a list": b"[]",
    "null": b"null",
    "a number": b"5",
    "a text": b'"x"',
    "binary": bytes(range(256)),
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "latin-1": '{"a": "\xe9"}'.encode("latin-1"),
    "a mark in front": b"\xef\xbb\xbf{}",
    "a key twice": b'{"a": 1, "a": 2}',
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": -Infinity}',
    "a number that overflows": b'{"a": 1e999}',
    "a giant number": b'{"a": ' + b"9" * 5000 + b"}",
    "half a character": b'{"a": "\\ud800"}',
    "nested deep": b"[" * 200_000 + b"]" * 200_000,
    "objects nested deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a page": b"<!DOCTYPE html><html><body>404</body></html>",
    "two documents": b"{} {}",
    "a comment": b'{"a": 1} // x',
}
ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HEADERS: dict[str, Callable[[dict[str, Any], bytes], bytes]] = {
    "no bytes": lambda h, d: b"",
    "four bytes": lambda h, d: b"\0\0\0\0",
    "length 0": lambda h, d: struct.pack("<Q", 0) + d,
    "length 1": lambda h, d: struct.pack("<Q", 1) + b"{" + d,
    "length 2**63": lambda h, d: struct.pack("<Q", 1 << 63) + d,
    "length 2**64-1": lambda h, d: struct.pack("<Q", (1 << 64) - 1) + d,
    "length beyond the file": lambda h, d: struct.pack("<Q", len(d) + 10_000) + d,
    "no object": lambda h, d: pack([], d),
    "no JSON": lambda h, d: pack(b"{zzz", d),
    "a space in front": lambda h, d: pack(b" " + json.dumps(h).encode(), d),
    "utf-16": lambda h, d: pack(json.dumps(h).encode("utf-16-le"), d),
    "NaN": lambda h, d: pack(json.dumps(h | {"__metadata__": {"a": float("nan")}}).encode(), d),
    "nested deep": lambda h, d: pack(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, d),
    "a key twice": lambda h, d: pack(json.dumps(h).encode()[:-1] + b"," + json.dumps(h).encode()[1:], d),
    "bytes to spare": lambda h, d: pack(h, d + b"\0" * 16),
    "bytes missing": lambda h, d: pack(h, d[:-1]),
    "no data": lambda h, d: pack(h),
    "a pointer": lambda h, d: TEXTS["a pointer"],
    "a page": lambda h, d: TEXTS["a page"],
    "metadata a list": lambda h, d: pack(h | {"__metadata__": []}, d),
    "metadata a number": lambda h, d: pack(h | {"__metadata__": {"a": 1}}, d),
    "metadata nested": lambda h, d: pack(h | {"__metadata__": {"a": {"b": "c"}}}, d),
    "an entry more without data": lambda h, d: pack(h | {"zzz": ENTRY}, d),
    "a hole": lambda h, d: pack(h | {"zzz": ENTRY | {"data_offsets": [len(d) + 8, len(d) + 12]}}, d + b"\0" * 12),
    "a path": lambda h, d: pack(h | {"../../x": ENTRY | {"data_offsets": [len(d), len(d) + 4]}}, d + b"\0" * 4),
}
ENTRIES: dict[str, Any] = {
    "a number": 1,
    "a list": [],
    "null": None,
    "empty": {},
    "a negative shape": {"shape": [-1, -32]},
    "a shape of reals": {"shape": [1.0, 2.0]},
    "a shape of switches": {"shape": [True]},
    "a shape of texts": {"shape": ["1"]},
    "no shape": {"shape": None},
    "a giant shape": {"shape": [1 << 62, 1 << 62]},
    "an unknown dtype": {"dtype": "F33"},
    "a dtype of torch": {"dtype": "float32"},
    "a dtype that is a number": {"dtype": 1},
    "a narrower dtype": {"dtype": "F16"},
    "offsets reversed": {"data_offsets": [64, 0]},
    "negative offsets": {"data_offsets": [-4, 0]},
    "one offset": {"data_offsets": [0]},
    "three offsets": {"data_offsets": [0, 4, 8]},
    "offsets of reals": {"data_offsets": [0.0, 4.0]},
    "no offsets": {"data_offsets": None},
    "offsets beyond the file": {"data_offsets": [0, 1 << 40]},
    "a field more": {"zzz": 1},
}


def _entry(change: Any) -> Callable[[dict[str, Any], bytes], bytes]:
    def edit(found: dict[str, Any], data: bytes) -> bytes:
        name = next(key for key in found if key != "__metadata__")
        old = found[name]
        return pack(found | {name: old | change if isinstance(change, dict) and change else change}, data)

    return edit


def _of_weights(kind: str, name: str) -> Iterator[Case]:
    for said, change in HEADERS.items():
        yield Case(f"{kind}, {name}: {said}", kind, header(name, change))
    for said, entry in ENTRIES.items():
        yield Case(f"{kind}, {name}: entry with {said}", kind, header(name, _entry(entry)))
    for share in (1, 2, 3, 5, 8):
        yield Case(
            f"{kind}, {name}: cut to {share} tenths",
            kind,
            header(name, lambda h, d, share=share: (pack(h, d))[: len(pack(h, d)) * share // 10]),
        )


def _of_tensors(kind: str, keys: list[str], backbone: list[str], prefix: str) -> Iterator[Case]:
    import torch

    def set_to(key: str, value: float) -> Callable[[dict[str, Any]], Any]:
        return lambda found: found[key].view(-1)[-1:].fill_(value)

    def cast(key: str, dtype: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda found: found.update({key: found[key].to(dtype)})

    for key in keys:
        for value in (float("nan"), float("inf"), -float("inf")):
            yield Case(f"{kind}, {value} in {key}", kind, tensors(WEIGHTS, set_to(key, value), told=True))
        if not (kind == "peft" and "classifier" in key):  # a head that peft did not train is the live model's
            yield Case(f"{kind}, no {key}", kind, tensors(WEIGHTS, lambda found, key=key: found.pop(key), told=True))
        for dtype in (torch.int8, torch.bool, torch.int64):
            yield Case(f"{kind}, {key} as {dtype}", kind, tensors(WEIGHTS, cast(key, dtype), told=True))
        yield Case(
            f"{kind}, {key} longer",
            kind,
            tensors(
                WEIGHTS,
                lambda found, key=key: found.update({key: torch.zeros(*found[key].shape[:-1], 99)}),
                told=True,
            ),
        )
    for own in backbone:
        yield Case(
            f"{kind}, the backbone's {own}",
            kind,
            tensors(WEIGHTS, lambda found, own=own: found.update({f"{prefix}{own}": torch.zeros(4, 4)}), told=True),
        )
    for name in NAMES:
        yield Case(
            f"{kind}, a tensor {name!r}",
            kind,
            header(
                WEIGHTS,
                lambda h, d, name=name: pack(h | {name: ENTRY | {"data_offsets": [len(d), len(d) + 4]}}, d + b"\0" * 4),
            ),
        )


def _of_files() -> Iterator[Case]:
    for name in (*NAMES, "a//b", "x/", ".", "sub/../../x"):
        yield Case(f"a file {name!r}", "adapter", claimed(name))
    for suffix in SUFFIXES:
        yield Case(f"a file more, x{suffix}", "adapter", file(f"x{suffix}", b"x", sealed=False))
        yield Case(f"a file listed, x{suffix}", "adapter", listed(f"x{suffix}"))
        yield Case(f"a file below, sub/x{suffix}", "adapter", file(f"sub/x{suffix.upper()}", b"x", sealed=False))
    for name in ("adapter_model.bin", "pytorch_model.bin", "tokenizer.pkl", "x.pt"):
        yield Case(f"a pickle beside, {name}", "adapter", pickled(name))
        yield Case(f"a pickle listed, {name}", "adapter", pickled(name, also=True))
        yield Case(f"a pickle beside peft's, {name}", "peft", pickled(name))
    for name in ("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"):
        yield Case(f"a backbone's file listed, {name}", "adapter", listed(name))
    yield Case("other tensors beside", "adapter", file("model.safetensors", b"x", sealed=False))
    for name in LINKED:
        yield Case(f"a link, {name}", "adapter", link(name))
    for name, target in (("x", "/etc/passwd"), ("x.json", "/nowhere"), ("loop", "loop"), ("sub", "/etc"), ("up", "..")):
        yield Case(f"a link {name} to {target}", "adapter", link(name, target))
    for name in ("tokenizer.json", WEIGHTS, MANIFEST, "run.yaml"):
        yield Case(f"a pipe, {name}", "adapter", fifo(name))
    for name in (WEIGHTS, "adapter_config.json"):
        yield Case(f"a link of peft's, {name}", "peft", link(name))
        yield Case(f"a pipe of peft's, {name}", "peft", fifo(name))
        yield Case(f"peft without {name}", "peft", lambda folder, _, name=name: (folder / name).unlink())
    for name in ("tokenizer.json", WEIGHTS, "tokenizer_config.json"):
        yield Case(f"no {name}", "adapter", lambda folder, _, name=name: (folder / name).unlink())
    for said, content in TEXTS.items():
        yield Case(f"{MANIFEST}: {said}", "adapter", file(MANIFEST, content))
        yield Case(f"peft's config: {said}", "peft", file("adapter_config.json", content))
        yield Case(f"a backbone's config: {said}", "backbone", file("config.json", content))
        yield Case(f"a backbone's vocabulary: {said}", "backbone", file("tokenizer.json", content))
        if said not in ("a list", "null", "a number", "a text"):
            yield Case(f"tokenizer_config.json: {said}", "adapter", file("tokenizer_config.json", content))
            yield Case(f"adapter_config.json: {said}", "adapter", file("adapter_config.json", content))
        yield Case(f"tokenizer.json: {said}", "adapter", file("tokenizer.json", content))
    for name in ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json", "added.json"):
        for entry in ({"auto_map": {"AutoTokenizer": ["own.Own", None]}}, {"inner": [{"auto_map": {}}]}):
            yield Case(f"code named in {name}, {next(iter(entry))}", "adapter", own_code(name, entry))


def _of_values(document: dict[str, Any]) -> Iterator[Case]:
    loads = {
        "trust_remote_code": "True",
        "cache_dir": "/tmp/x",
        "attn_implementation": "someone/kernel",
        "subfolder": "../x",
        "revision": "../x",
        "dtype": "a/b",
        "code_revision": "main",
        "adapter_kwargs": "{}",
        "proxies": "x",
        "token": "x",
    }
    for name, value in loads.items():
        yield Case(f"loading option {name}", "alone", at("backbone/load", {name: value}))
    for name in ("outputs/run1", "./x", "../x", "/nowhere/x", "~/nowhere/x", "a/b/c", "runs\\x", "one", "tests/x"):
        yield Case(f"a backbone {name}", "alone", at("backbone/name", name))
    for name, value in {"auto_map": {}, "quantization_config": {}, "_name_or_path": "x", "architectures": []}.items():
        yield Case(f"config field {name}", "merge", at("backbone/config", {name: value}))
    for name in ("os.system", "a b", "", "../x"):
        yield Case(f"model class {name!r}", "adapter", at("backbone/model_class", name))
    options = {
        "zzz": 1,
        "r": 16,
        "lora_alpha": "16",
        "lora_dropout": 5.0,
        "bias": "some",
        "use_dora": "yes",
        "target_modules": ["nonexist"],
        "exclude_modules": ["query"],
        "rank_pattern": {"query": -1},
        "layers_to_transform": [99],
        "init_lora_weights": "eva",
        "modules_to_save": 5,
        "modules": {"bert.encoder.layer.0.attention.self.query": [1 << 40, 1 << 40, False, True]},
    }
    for name, value in options.items():
        yield Case(f"strategy option {name}", "adapter", at(f"strategy/options/{name}", value))
    yield Case("strategy option r, giant", "adapter", at("strategy/options/r", 1 << 40))
    yield Case("strategy MAGIC", "adapter", at("strategy/name", "MAGIC"))
    yield Case("strategy probe", "adapter", at("strategy", {"name": "probe", "options": {}}))
    yield Case("strategy full", "adapter", at("strategy", {"name": "full", "options": {}}))
    for name, value in {"zzz": 1, "labels": ["a", "b"], "problem": "magic", "max_length": -1}.items():
        yield Case(f"task option {name}", "adapter", at(f"task/options/{name}", value))
    yield Case("labels twice", "adapter", at("task/options/labels", ["a", "a", "b"]))
    yield Case("labels as text", "adapter", at("task/options/labels", "abc"))
    yield Case("task MAGIC", "adapter", at("task/name", "MAGIC"))
    yield Case("another task", "adapter", at("task", {"name": "image-classification", "options": {"labels": LABELS}}))
    vocabulary = {"tokens": ["zzz"], "ids": [64], "size": 65, "axes": {"bert.embeddings.x": 0}, "whole": {}}
    for name, value in {**vocabulary, "zzz": 1}.items():
        yield Case(f"vocabulary with {name}", "adapter", at("vocabulary", vocabulary | {name: value}))
        yield Case(f"vocabulary without {name}", "adapter", at("vocabulary", {k: 1 for k in vocabulary if k != name}))
    own = next(iter(document["backbone"]["fingerprint"]["tensors"]))
    place = f"backbone/fingerprint/tensors/{own}"
    shape, dtype, xxh, samples = document["backbone"]["fingerprint"]["tensors"][own]
    prints = {
        "empty": [],
        "a text": "x",
        "a field more": [shape, dtype, xxh, samples, 1],
        "a negative shape": [[-1], dtype, xxh, samples],
        "a shape of texts": [["a"], dtype, xxh, samples],
        "a function for a dtype": [shape, "load", xxh, samples],
        "another dtype": [shape, "float64", xxh, samples],
        "a short hash": [shape, dtype, "ab", samples],
        "another hash": [shape, dtype, "0" * 32, samples],
        "samples that are none": [shape, dtype, xxh, "%%%"],
        "no samples": [shape, dtype, xxh, ""],
        "numbers": [1, 2, 3, 4],
    }
    for said, entry in prints.items():
        yield Case(f"fingerprint: {said}", "adapter", at(place, entry))
    yield Case("fingerprint: another digest", "adapter", at("backbone/fingerprint/digest", "0" * 32))
    yield Case("fingerprint: no tensors", "adapter", at("backbone/fingerprint/tensors", {}))
    for said, entry in {"name": {"file": 1}, "sha256": {"size": 1, "sha256": "x"}, "size": {"size": -1}}.items():
        yield Case(f"a file's entry with another {said}", "adapter", at("files/tokenizer.json", entry))
    for name, content in {
        "run.yaml: broken": b"a: [1",
        "run.yaml: an object": b"!!python/object/apply:os.system ['true']",
        "run.yaml: a list": b"- 1",
        "run.yaml: binary": bytes(range(256)),
        "run.yaml: nested deep": b"[" * 100_000,
    }.items():

        def build(folder: Path, outside: Path, content: bytes = content) -> None:
            at("reproducible", True)(folder, outside)
            (folder / "run.yaml").write_bytes(content)

        yield Case(name, "adapter", build)


def _of_peft() -> Iterator[Case]:
    options = {
        "peft_type": "MAGIC",
        "zzz": 1,
        "r": "8",
        "lora_alpha": {},
        "lora_dropout": 5.0,
        "task_type": "FOO",
        "target_modules": ["nonexist"],
        "bias": "some",
        "init_lora_weights": "eva",
        "layers_to_transform": [99],
        "rank_pattern": {"zzz": 4},
        "use_dora": "yes",
    }
    for name, value in options.items():
        yield Case(f"peft's option {name}", "peft", _peft(lambda d, n=name, v=value: d.update({n: v})))
    yield Case("peft's option r, negative", "peft", _peft(lambda d: d.update(r=-1)))
    yield Case("peft's option r, another", "peft", _peft(lambda d: d.update(r=16)))
    yield Case("peft without a method", "peft", _peft(lambda d: d.pop("peft_type")))
    yield Case("peft, prompt tuning", "peft", _peft(lambda d: d.update(peft_type="PROMPT_TUNING")))


def _peft(change: Callable[[dict[str, Any]], Any]) -> Build:
    def build(folder: Path, outside: Path) -> None:
        path = folder / "adapter_config.json"
        options = json.loads(path.read_text())
        change(options)
        path.write_text(json.dumps(options))

    return build


def _of_backbones() -> Iterator[Case]:
    single, index = "model.safetensors", "model.safetensors.index.json"

    def indexed(weight_map: Any, shard: str = "one.safetensors", keep: bool = False) -> Build:
        """A folder of one shard, and an index that says something else."""

        def build(folder: Path, outside: Path) -> None:
            names = [name for name in unpack(folder / single)[0] if name != "__metadata__"]
            shutil.copy(folder / single, outside / shard)
            (shutil.copy if keep else shutil.move)(folder / single, folder / shard)
            made = weight_map(names, outside) if callable(weight_map) else weight_map
            (folder / index).write_text(json.dumps(made))

        return build

    def all_in(place: str) -> Callable[[list[str], Path], Any]:
        return lambda names, outside: {
            "metadata": {},
            "weight_map": dict.fromkeys(names, place.format(outside=outside, name=outside.name)),
        }

    for place in ("../{name}/one.safetensors", "{outside}/one.safetensors", "sub/../one.safetensors", "missing", ""):
        for kind in ("backbone", "base"):
            yield Case(f"{kind}, shards in {place!r}", kind, indexed(all_in(place)))
    for said, document in {
        "a list": [],
        "no map": {},
        "map a list": {"weight_map": []},
        "map empty": {"weight_map": {}},
        "numbers": {"weight_map": {"x": 1}},
        "another tensor": {"weight_map": {"x": "one.safetensors"}},
    }.items():
        yield Case(f"an index, {said}", "backbone", indexed(document))
        yield Case(f"a base's index, {said}", "base", indexed(document))
    yield Case("two sets of weights", "backbone", indexed(all_in("one.safetensors"), keep=True))
    for said, content in TEXTS.items():

        def build(folder: Path, outside: Path, content: bytes = content) -> None:
            indexed({})(folder, outside)
            (folder / index).write_bytes(content)

        yield Case(f"an index: {said}", "backbone", build)
    for name in (single, "config.json", "tokenizer.json"):
        for kind in ("backbone", "base"):
            yield Case(f"{kind}, a link {name}", kind, link(name))
            yield Case(f"{kind}, a pipe {name}", kind, fifo(name))
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        yield Case(f"a backbone with {name} of the hub", "backbone", _config({name: "someone/kernel"}))
    yield Case("a backbone with weights elsewhere", "backbone", _config({"transformers_weights": "../x.safetensors"}))
    yield Case(
        "a backbone with code of its own",
        "backbone",
        own_code("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}),
    )
    yield Case("a backbone of no type", "backbone", _config({"model_type": "zzz"}))
    yield Case("a backbone of another shape", "backbone", _config({"hidden_size": 64}))
    yield Case("a backbone of texts", "backbone", _config({"hidden_size": "32"}))
    yield Case("a backbone of negative size", "backbone", _config({"hidden_size": -32}))
    yield Case("a backbone, config too large", "backbone", large("config.json", (16 << 20) + 1))

    def evil(folder: Path, outside: Path) -> None:
        (folder / single).unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(outside / "executed")))

    yield Case("a backbone in a pickle", "backbone", evil)


def _config(entry: dict[str, Any]) -> Build:
    def build(folder: Path, outside: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entry))

    return build


def corpus(folders: dict[str, Path]) -> list[Case]:
    """Every case, for the whole folders that `whole` made."""
    document = json.loads((folders["adapter"] / MANIFEST).read_text())
    keys = sorted(document["tensors"])
    few = [keys[0], keys[len(keys) // 2], keys[-1]]
    backbone = sorted(document["backbone"]["fingerprint"]["tensors"])
    cases = [
        *_of_manifest(document),
        *_of_values(document),
        *_of_files(),
        *_of_weights("adapter", WEIGHTS),
        *_of_weights("peft", WEIGHTS),
        *_of_weights("backbone", "model.safetensors"),
        *_of_tensors("adapter", few, backbone, "base_model.model.bert."),
        *_of_tensors("peft", few, backbone[:8], "base_model.model.bert."),
        *_of_peft(),
        *_of_backbones(),
    ]
    return cases


def built(case: Case, folders: dict[str, Path], root: Path) -> Callable[[], Any]:
    """Build a case below `root`; what comes back opens it, and raises what that raises.

    Outside of the folder, in `root / "outside"`, lies what it must not read, and nothing that it has executed.
    """
    outside = root / "outside"
    outside.mkdir(parents=True)
    if case.kind == "base":  # a hostile backbone, met by a merge
        base = Path(shutil.copytree(folders["backbone"], root / "base"))
        case.build(base, outside)
        folder = Path(shutil.copytree(folders["adapter"], root / "folder"))
        return lambda: open_as("merge", folder, base)
    folder = Path(shutil.copytree(folders[case.kind], root / "folder"))
    case.build(folder, outside)
    return lambda: open_as(case.kind, folder, folders["backbone"])
