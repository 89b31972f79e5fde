"""Coverage-guided fuzzing of what reads an adapter folder: `python -m benchmarks.fuzz --seconds 60`.

Needs `pip install atheris` (libFuzzer for Python). Each input is a byte that says what it is, and the bytes of one file
of a small adapter folder: the weights or the manifest, as they are or with every digest made right again, as a
stranger could. The folder must be refused with an error of the library's, or read as it was written: anything else is a
crash, and its input is written to `--crashes`. A file of an earlier crash is tried again with `--input FILE`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

WEIGHTS, MANIFEST = "adapter_model.safetensors", "adapter.json"
KINDS = ("weights", "weights, sealed", "manifest", "manifest, sealed")
VALUES: tuple[Any, ...] = (None, True, -1, 0, 1 << 62, 1 << 70, 1.5, float("nan"), "", "../x", "\ud800", [], {}, [[]])


class Folder:
    """A whole adapter folder on the disk, one file of which is replaced for every input."""

    def __init__(self, root: Path) -> None:
        import torch

        from adapters import shards

        self.path = root / "adapter"
        self.path.mkdir()
        tensors = {
            "base_model.model.bert.a.lora_A.weight": torch.arange(8.0).reshape(2, 4),
            "base_model.model.bert.a.lora_B.weight": torch.ones(4, 2, dtype=torch.bfloat16),
            "base_model.model.classifier.bias": torch.zeros(2),
        }
        shards.save_tensors(self.path / WEIGHTS, tensors, {"format": "pt"})
        (self.path / "tokenizer_config.json").write_text('{"model_max_length": 32}')
        own = torch.ones(3).numpy().tobytes()
        document: dict[str, Any] = {
            "format": 1,
            "holdfast": "0.1.0",
            "strategy": {"name": "lora", "options": {"r": 2, "modules": {"bert.a": [4, 4, False, True]}}},
            "task": {"name": "text-classification", "options": {"labels": ["a", "b"]}},
            "backbone": {
                "name": "base",
                "revision": None,
                "model_class": "BertForSequenceClassification",
                "quantization": None,
                "packed": {},
                "dtype": "float32",
                "load": {"dtype": "float32"},
                "config": {"num_labels": 2},
                "names": {},
                "saved_as": {},
                "bytes": 12,
                "fingerprint": {
                    "digest": "0" * 32,
                    "prefix": "bert",
                    "tensors": {"a.bias": [[3], "float32", "0" * 32, _base64(own)]},
                },
            },
            "head": ["classifier.bias"],
            "new": [],
            "tensors": {
                name: {
                    "shape": list(tensor.shape),
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "sha256": hashlib.sha256(shards.tensor_bytes(tensor)).hexdigest(),
                }
                for name, tensor in tensors.items()
            },
            "vocabulary": None,
            "seed": 0,
            "data": {"rows": 3},
            "metrics": {"test": {"accuracy": 0.5}},
            "settings": {},
            "notes": ["a remark"],
            "reproducible": False,
            "versions": {"torch": "2"},
            "files": {},
        }
        document["files"] = {name: self._entry(name) for name in (WEIGHTS, "tokenizer_config.json")}
        document["digest"] = _digest(document)
        (self.path / MANIFEST).write_text(json.dumps(document))
        self.whole = {name: (self.path / name).read_bytes() for name in (WEIGHTS, MANIFEST)}
        self.document = document

    def _entry(self, name: str) -> dict[str, Any]:
        content = (self.path / name).read_bytes()
        return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def put(self, kind: str, body: bytes) -> None:
        """The folder with one file replaced."""
        for name, content in self.whole.items():
            (self.path / name).write_bytes(content)
        if kind.startswith("weights"):
            (self.path / WEIGHTS).write_bytes(body)
            document = dict(self.document)
            if kind.endswith("sealed"):
                document["files"] = {**document["files"], WEIGHTS: self._entry(WEIGHTS)}
                document["digest"] = _digest(document)
            (self.path / MANIFEST).write_text(json.dumps(document))
            return
        if kind.endswith("sealed"):
            try:
                found = json.loads(body)
                found["digest"] = _digest(found)
                body = json.dumps(found, ensure_ascii=False).encode("utf-8", "surrogatepass")
            except (ValueError, TypeError, AttributeError, RecursionError):
                pass  # no JSON object: as it is
        (self.path / MANIFEST).write_bytes(body)


def _base64(content: bytes) -> str:
    import base64

    return base64.b64encode(content).decode()


def _digest(document: dict[str, Any]) -> str:
    rest = {key: value for key, value in document.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def one(folder: Folder, content: bytes) -> str:
    """Try one input; returns "refused" or "read", and raises whatever the library must not.

    Raises:
        AssertionError: a folder that was read otherwise than it was written.
    """
    from adapters import inspection, manifest, storage, vocabulary
    from adapters.errors import AdaptersError, FolderError

    kind, body = KINDS[content[0] % len(KINDS)] if content else KINDS[0], content[1:]
    folder.put(kind, body)
    refusal = ""
    try:
        document = manifest.read_manifest(folder.path)
        inspection.lines(inspection.describe(folder.path))
        tensors = manifest.read_tensors(folder.path, document)
    except FolderError as fault:
        refusal = str(fault)
    if refusal:
        assert refusal.isprintable(), refusal
        return "refused"
    if kind == "weights":
        assert body == folder.whole[WEIGHTS], "other weights were read"
    elif kind == "manifest":
        assert document == folder.document, "another manifest was read"
    _as_safetensors(folder.path / WEIGHTS, tensors)
    try:
        storage.strategy_of(document, "fuzz")
        storage.task_of(document, "fuzz")
        vocabulary.of_manifest(document, "fuzz")
    except AdaptersError:
        return "refused"
    return "read"


def _as_safetensors(file: Path, tensors: dict[str, Any]) -> None:
    """What was read is what safetensors itself reads."""
    import torch
    from safetensors.torch import load_file

    theirs = load_file(file)
    assert set(theirs) == set(tensors), "other names were read"
    for name, tensor in tensors.items():
        assert torch.equal(tensor, theirs[name]), f"other values were read: {name}"


def seeds(folder: Folder) -> list[bytes]:
    """The whole files, one input for each kind."""
    names = (WEIGHTS, WEIGHTS, MANIFEST, MANIFEST)
    return [bytes([number]) + folder.whole[name] for number, name in enumerate(names)]


def mutated(content: bytes, random_bytes: Callable[[bytes], bytes], draw: random.Random) -> bytes:
    """A change that keeps the form: a value of the JSON (of the manifest or of the weights' header), else of bytes."""
    if len(content) < 20 or draw.random() < 0.3:
        return random_bytes(content)
    weights = content[0] % len(KINDS) < 2
    try:
        length = struct.unpack("<Q", content[1:9])[0] if weights else 0
        document = json.loads(content[9 : 9 + length] if weights else content[1:])
    except (ValueError, RecursionError, OverflowError):
        return random_bytes(content)
    for _ in range(draw.randint(1, 3)):
        _change(document, draw)
    text = json.dumps(document).encode()
    if not weights:
        return content[:1] + text
    return content[:1] + struct.pack("<Q", len(text)) + text + content[9 + length :]


def _change(document: Any, draw: random.Random) -> None:
    """One value replaced, added, doubled or taken away, somewhere."""
    target = document
    while isinstance(target, dict | list):
        keys = (
            list(target) if isinstance(target, dict) else list(range(len(target))) if isinstance(target, list) else []
        )
        if not keys:
            return
        key = draw.choice(keys)
        inner = target[key]
        if not (isinstance(inner, dict | list) and inner) or draw.random() < 0.25:
            break
        target = inner
    else:
        return
    what = draw.randrange(5)
    if what == 0:
        del target[key]
    elif what == 1 and isinstance(inner, int | float) and not isinstance(inner, bool):
        target[key] = inner + draw.choice((-1, 1, 4, 1 << 32))
    elif what == 2 and isinstance(target, dict):
        target[draw.choice(("zzz", "../x", "", f"{key}x"))] = inner
    elif what == 3 and isinstance(target, list):
        target.append(inner)
    else:
        target[key] = draw.choice(VALUES)


def main() -> None:
    """Fuzz each kind of input in a process of its own; ends with the exit code of the first that crashed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60, help="for all kinds together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--crashes", default="fuzz-crashes", help="folder for inputs that crashed")
    parser.add_argument("--input", help="try this one input again")
    parser.add_argument("--kind", type=int, choices=range(len(KINDS)), help=f"0 to 3: {', then '.join(KINDS)}")
    options = parser.parse_args()
    if options.input:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
            print(one(Folder(Path(root)), Path(options.input).read_bytes()))
        return
    Path(options.crashes).mkdir(parents=True, exist_ok=True)
    if options.kind is not None:
        _fuzz(options.kind, options.seconds, options.seed, options.crashes)
    codes = []
    for kind, name in enumerate(KINDS):
        same = ["--seed", str(options.seed), "--crashes", options.crashes, "--kind", str(kind)]
        share = ["--seconds", str(max(1, options.seconds // len(KINDS)))]
        with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
            child = subprocess.run(
                [sys.executable, "-m", "benchmarks.fuzz", *share, *same],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "TMPDIR": scratch},
            )
        said = child.stdout + child.stderr
        lines = [line for line in said.splitlines() if line.startswith(("Done", "Test unit")) or "Error: " in line]
        reached = re.findall(r"cov: (\d+)", said)
        lines += [f"{reached[0]} branches reached by the whole file, {reached[-1]} in the end"] if reached else []
        print(f"{name}: exit code {child.returncode}; {'; '.join(lines) or said[-400:]}", flush=True)
        codes.append(child.returncode)
    raise SystemExit(next((code for code in codes if code), 0))


def _fuzz(kind: int, seconds: int, seed: int, crashes: str) -> None:
    """One kind, by libFuzzer, which ends the process."""
    import atheris

    with atheris.instrument_imports(include=["adapters"]):
        import adapters.inspection
        import adapters.manifest
        import adapters.storage
        import adapters.vocabulary  # noqa: F401
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    folder = Folder(root)
    corpus = root / "corpus"
    corpus.mkdir()
    assert one(folder, seeds(folder)[kind]) == "read"
    (corpus / "whole").write_bytes(seeds(folder)[kind])

    def test_one_input(content: bytes) -> None:
        one(folder, bytes([kind]) + content[1:])

    def mutate(content: bytes, max_size: int, seed: int) -> bytes:
        changed = mutated(content, lambda old: atheris.Mutate(old, max_size), random.Random(seed))
        return changed[:max_size]

    arguments = [f"-max_total_time={seconds}", f"-seed={seed}", f"-artifact_prefix={crashes}/", "-max_len=16384"]
    arguments += ["-timeout=20", "-rss_limit_mb=4096", str(corpus)]
    atheris.Setup([sys.argv[0], *arguments], test_one_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
