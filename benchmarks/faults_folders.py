"""Adapter folders that are damaged by single bits, and folders that somebody made to do harm."""

from __future__ import annotations

import os
import random
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import adapters
from benchmarks.faults_outcomes import CAUGHT, EXECUTED, HUNG, NOTHING, OUTSIDE, RAW, SILENT, WARNED, Case, Found
from benchmarks.faults_runs import fresh
from benchmarks.faults_sides import OURS, SIDES, Side, Unanswered, answer_of, child, digest, in_child, listening, told
from benchmarks.faults_trace import PASS, READS, Call, Verdict, watch, watched
from benchmarks.harness import ROOT

WEIGHTS = "adapter_model.safetensors"
BATCH = 250  # flips in one child
GROUPS = {"data": "weights, data", "header": "weights, header", "json": "JSON files"}
SHARES = {"data": 0.4, "header": 0.3, "json": 0.3}


# ---------------------------------------------------------------------- bits


def flips(name: str, count: int, place: Path) -> Iterator[Case]:
    """Single bits turned over in the data and the header of the weights, and in the JSON that loading reads."""
    side, folder = SIDES[name], place / "flipped"
    in_child(lambda: _saved(side, fresh(folder)), place)
    for what, share in SHARES.items():
        bits = _bits(side, folder, what, round(count * share))
        for begin in range(0, len(bits), BATCH):
            chosen = bits[begin : begin + BATCH]
            title = f"{what}, flips {begin + 1} to {begin + len(chosen)} of {len(bits)}"
            yield Case("flips", name, title, partial(_flipped, side, folder, what, chosen, place))


def _saved(side: Side, folder: Path) -> None:
    adapted = side.adapted()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in side.module(adapted).parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    side.save(adapted, folder)


Bit = tuple[str, int]  # a file, and the place of a bit in it


def _bits(side: Side, folder: Path, what: str, count: int) -> list[Bit]:
    weights = (folder / WEIGHTS).read_bytes()
    header = 8 + struct.unpack("<Q", weights[:8])[0]
    draw = random.Random(what)
    if what == "data":
        return [(WEIGHTS, draw.randrange(8 * header, 8 * len(weights))) for _ in range(count)]
    if what == "header":
        length = [(WEIGHTS, bit) for bit in range(min(64, count))]  # of the header's length, all
        return length + [(WEIGHTS, draw.randrange(64, 8 * header)) for _ in range(count - len(length))]
    sizes = {file.name: 8 * file.stat().st_size for file in sorted(folder.glob("*.json"))}
    names = draw.choices(list(sizes), weights=list(sizes.values()), k=count)
    return [(name, draw.randrange(sizes[name])) for name in names]


def _flipped(side: Side, folder: Path, what: str, bits: list[Bit], place: Path) -> Found:
    def act() -> dict[str, Any]:
        counts: Counter[str] = Counter()
        first: dict[str, str] = {}
        good = _identity(side, side.load(folder))
        for name, bit in bits:
            file = folder / name
            whole = file.read_bytes()
            changed = bytearray(whole)
            changed[bit // 8] ^= 1 << bit % 8
            file.write_bytes(changed)
            came, words = opened(side, folder, good)
            file.write_bytes(whole)
            counts[came] += 1
            first.setdefault(came, f"{name}, bit {bit}: {words}")
        return {"counts": counts, "words": first}

    return Found(GROUPS[what], len(bits), **in_child(act, place))


def _identity(side: Side, adapted: Any) -> tuple[str, str]:
    """The trained tensors, and what the model answers."""
    module = side.module(adapted).eval()
    ids = torch.arange(5, 25).reshape(2, 10)
    with torch.no_grad():
        logits = module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return digest(side.state(adapted)), digest({"logits": logits})


def opened(side: Side, folder: Path, good: tuple[str, str] | None) -> tuple[str, str]:
    """Load a folder: the outcome, and the words that came with it."""
    with listening() as said:
        try:
            adapted = side.load(folder)
        except Exception as fault:
            raw = side is OURS and not isinstance(fault, adapters.AdaptersError)
            return RAW if raw else CAUGHT, told(fault)
    lines = [line for line in said if "is_gradient_checkpointing" not in line]
    if good is not None and _identity(side, adapted) == good:
        return NOTHING, "; ".join(lines)
    return (WARNED, lines[0][:300]) if lines else (SILENT, "")


# ---------------------------------------------------------------------- hostile folders

SECONDS = 30  # after these a load counts as hung


def folders(name: str, count: int, place: Path) -> Iterator[Case]:
    """Folders made to do harm: each is loaded in a process whose opens, execs and connects are watched."""
    sys.path.insert(0, str(ROOT / "tests"))
    import hostile

    side, good, folder, outside = SIDES[name], place / "good", place / "hostile", place / "outside"
    in_child(lambda: _saved(OURS, fresh(good)), place)  # peft reads it too
    known: set[str] = set()  # what loading a good folder opens

    def load(seen: Callable[[Call], Verdict]) -> tuple[str, str]:
        file = place / "load.json"

        def act() -> tuple[str, str]:
            watched(READS)
            return opened(side, folder, None)

        status = watch(child(act, file, SECONDS), seen)
        try:
            came, words = answer_of(file)
        except Unanswered:
            return HUNG, f"wait status {status}"
        return came, words

    def learn(call: Call) -> Verdict:
        known.add(os.path.realpath(call.path))
        return PASS

    def act(title: str, build: Callable[[Path, Path], None]) -> Found:
        if not known:
            shutil.copytree(good, fresh(folder))
            load(learn)
        fresh(outside).mkdir()
        shutil.copytree(good, fresh(folder), symlinks=True)
        build(folder, outside)
        strange: list[str] = []

        def seen(call: Call) -> Verdict:
            path = os.path.realpath(call.path)
            if call.name in ("execve", "connect") or not _expected(path, folder, known):
                strange.append(f"{call.name} {path}")
            return PASS

        came, words = load(seen)
        if (outside / "executed").exists() or any(each.startswith("execve") for each in strange):
            came, words = EXECUTED, f"{words}; {strange}"
        elif strange:
            came, words = OUTSIDE, f"{words}; {strange}"
        return Found("hostile folders", 1, {came: 1}, {came: f"{title}: {words}"})

    for title, build in hostile.folders(count):
        yield Case("folders", name, title, partial(act, title, build))


def _expected(path: str, folder: Path, known: set[str]) -> bool:
    """Whether loading may open a file: the folder's, the interpreter's, its packages', what a good load opens."""
    own = {str(folder), *(str(folder.parent / name) for name in ("load.json", "load.log"))}
    rooms = (f"{folder}/", f"{sys.prefix}/", f"{sys.base_prefix}/lib/", f"{ROOT}/adapters/", "/proc/", "/sys/")
    return path in known | own or path.startswith(rooms)
