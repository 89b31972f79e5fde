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
from benchmarks.faults_sides import (
    OURS,
    PLAIN,
    SIDES,
    Side,
    Unanswered,
    answer_of,
    child,
    digest,
    in_child,
    listening,
    told,
)
from benchmarks.faults_trace import PASS, READS, Call, Verdict, watch, watched
from benchmarks.harness import ROOT

WEIGHTS = "adapter_model.safetensors"
BATCH = 100  # flips in one child
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
            came, words = opened(side, partial(side.load, folder), lambda adapted: _identity(side, adapted) == good)
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


def opened(side: Side, load: Callable[[], Any], unchanged: Callable[[Any], bool]) -> tuple[str, str]:
    """Open a folder: the outcome, and the words that came with it."""
    with listening() as said:
        try:
            adapted = load()
        except Exception as fault:
            raw = side is OURS and not isinstance(fault, adapters.AdaptersError)
            return RAW if raw else CAUGHT, told(fault)
    lines = [line for line in said if "is_gradient_checkpointing" not in line]
    if unchanged(adapted):
        return NOTHING, "; ".join(lines)
    return (WARNED, lines[0][:300]) if lines else (SILENT, "")


# ---------------------------------------------------------------------- hostile folders

SECONDS = 20  # after these an open counts as hung
PLAINLY = ("peft", "backbone")  # the kinds of folder that the plain stack reads


def folders(name: str, count: int | None, place: Path) -> Iterator[Case]:
    """The corpus of tests/hostile.py: each folder is opened in a process whose opens, execs and connects are watched.

    Args:
        name: the side.
        count: how many of them, spread over all; None for all.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    import hostile

    def make() -> dict[str, str]:
        return {kind: str(folder) for kind, folder in hostile.whole(fresh(place / "whole")).items()}

    (place / "whole").mkdir()
    whole = {kind: Path(folder) for kind, folder in in_child(make, place).items()}
    every = [case for case in hostile.corpus(whole) if name == "ours" or case.kind in PLAINLY]
    chosen = every if count is None else every[:: max(1, len(every) // count)][:count]
    good = {
        kind: _watched(name, hostile.Case("good", kind, lambda folder, outside: None), whole, place / "attack", set())
        for kind in dict.fromkeys(case.kind for case in every)
    }
    for kind, (came, words, _) in good.items():
        if came in (CAUGHT, RAW, HUNG):
            raise RuntimeError(f"a good folder is not opened as {kind}: {words}")
    known = {path for _, _, paths in good.values() for path in paths}
    for case in chosen:
        yield Case("folders", name, case.name, partial(_attacked, name, case, whole, place / "attack", known))


def _attacked(name: str, case: Any, whole: dict[str, Path], root: Path, known: set[str]) -> Found:
    came, words, strange = _watched(name, case, whole, root, known)
    if (root / "outside" / "executed").exists() or any(path.startswith("execve") for path in strange):
        came = EXECUTED
    elif strange:
        came = OUTSIDE
    group = "a backbone" if case.kind in ("backbone", "base") else "a plain peft folder" if case.kind == "peft" else ""
    return Found(group or "an adapter folder", 1, {came: 1}, {came: " ".join([words, *strange])[:500]})


def _watched(name: str, case: Any, whole: dict[str, Path], root: Path, known: set[str]) -> tuple[str, str, list[str]]:
    """Build a folder and open it: the outcome, its words, and the files opened that nobody expects."""
    import hostile

    good = "" if name == "ours" else in_child(partial(_weights, case.kind, whole), root.parent)
    outside, folder, base = fresh(root) / "outside", root / "folder", whole["backbone"]
    outside.mkdir(parents=True)
    if case.kind == "base":  # a hostile backbone, met by a merge
        base = root / "base"
        shutil.copytree(whole["backbone"], base)
    shutil.copytree(whole["adapter" if case.kind == "base" else case.kind], folder)
    case.build(base if case.kind == "base" else folder, outside)
    rooms = tuple(f"{path}/" for path in (folder, base, root / "merged", sys.prefix, f"{sys.base_prefix}/lib"))
    rooms += (f"{root}/.merged", f"{ROOT}/adapters/", "/proc/", "/sys/", "/dev/shm/sem.")  # the last: locks of Python's
    expected = known | {
        str(each) for each in (folder, base, root, root / "merged", root / "open.json", root / "open.log")
    }
    strange: list[str] = []

    def seen(call: Call) -> Verdict:
        path = os.path.realpath(call.path)
        if call.name in ("execve", "connect"):
            strange.append(f"{call.name} {path}")
        elif path not in expected and not path.startswith(rooms):
            strange.append(path)
        return PASS

    def act() -> tuple[str, str]:
        watched(READS)
        if name == "ours":
            kind = "merge" if case.kind == "base" else case.kind
            return opened(OURS, lambda: hostile.open_as(kind, folder, base), lambda _: False)  # it must not open
        return opened(PLAIN, partial(_plainly, case.kind, folder), lambda model: digest(model.state_dict()) == good)

    status = watch(child(act, root / "open.json", SECONDS), seen)
    try:
        came, words = answer_of(root / "open.json")
    except Unanswered:
        return HUNG, f"wait status {status}", strange
    return came, words, strange


def _weights(kind: str, whole: dict[str, Path]) -> str:
    """What the plain stack loads where nothing is wrong."""
    return digest(_plainly(kind, whole[kind]).state_dict())


def _plainly(kind: str, folder: Path) -> Any:
    """Open a folder as the documentation of peft and transformers says; a new head starts the same every time."""
    import peft
    import tiny
    import transformers

    torch.manual_seed(0)
    if kind == "backbone":
        transformers.AutoTokenizer.from_pretrained(folder)
        return transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    return peft.PeftModel.from_pretrained(tiny.model("bert"), str(folder))
