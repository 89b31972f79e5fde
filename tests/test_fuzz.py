"""The fuzzer's own parts, and a short blind run of it; the long guided one is `python -m benchmarks.fuzz`."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

import adapters

sys.path.insert(0, str(Path(adapters.__file__).resolve().parents[1]))
from benchmarks import fuzz


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> fuzz.Folder:
    return fuzz.Folder(tmp_path_factory.mktemp("fuzz"))


def test_the_whole_folder_is_read(folder: fuzz.Folder) -> None:
    assert [fuzz.one(folder, content) for content in fuzz.seeds(folder)] == ["read"] * len(fuzz.KINDS)


def test_what_is_damaged_without_a_seal_is_refused(folder: fuzz.Folder) -> None:
    for content in fuzz.seeds(folder)[::2]:
        assert fuzz.one(folder, content[:200] + b"\x00" + content[201:]) == "refused"
    assert fuzz.one(folder, b"") == "refused"


@pytest.mark.parametrize("kind", range(len(fuzz.KINDS)))
def test_changed_inputs_are_refused_or_read_as_written(kind: int, folder: fuzz.Folder) -> None:
    draw = random.Random(kind)

    def random_bytes(content: bytes) -> bytes:
        changed = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(1, len(changed))] = draw.randrange(256)
        return bytes(changed)

    outcomes = []
    for _ in range(150):
        content = fuzz.seeds(folder)[kind]
        for _ in range(draw.randint(1, 3)):
            content = fuzz.mutated(content, random_bytes, draw)
        outcomes.append(fuzz.one(folder, content))
    assert "refused" in outcomes


def test_a_reader_that_reads_something_else_is_found(folder: fuzz.Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapters import manifest

    monkeypatch.setattr(manifest.shards, "sha256", lambda file: folder.document["files"][file.name]["sha256"])
    weights = bytearray(fuzz.seeds(folder)[0])
    weights[-1] ^= 1
    with pytest.raises(AssertionError, match="other weights were read"):
        fuzz.one(folder, bytes(weights))
