"""A module imports only from lower floors, imports inside functions included."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import adapters

ROOT = Path(adapters.__file__).parent
FLOORS = {
    "served": 2,
    "gguffile": 3,
    "updates": 9,
    "lint": 9,
    "peftfolder": 10,
    "peftmerge": 6,
    "readback": 10,
    "factorfiles": 11,
    "export": 12,
    "errors": 0,
    "decomposition": 9,
    "extract": 10,
    "finetuned": 9,
    "packing": 9,
    "marks": 1,
    "deployment": 8,
    "exactness": 3,
    "requantize": 6,
    "stored": 2,
    "journal": 1,
    "machine": 1,
    "charts": 0,
    "findings": 2,
    "witness": 2,
    "census": 3,
    "dossier": 6,
    "report": 8,
    "interrupts": 0,
    "screen": 0,
    "progress": 1,
    "gauge": 2,
    "bars": 2,
    "identity": 1,
    "modes": 0,
    "handing": 0,
    "graph": 1,
    "onload": 1,
    "pages": 3,
    "offload": 4,
    "reading": 1,
    "pooling": 3,
    "relocation": 7,
    "lbfgs": 1,
    "principal": 1,
    "solve": 2,
    "features": 4,
    "featurestore": 7,
    "headstart": 8,
    "shortening": 3,
    "standalone": 6,
    "jsontext": 0,
    "crew": 1,
    "deferred": 0,
    "edits": 1,
    "memory": 1,
    "course": 1,
    "shards": 1,
    "places": 1,
    "metrics": 1,
    "tables": 1,
    "sources": 1,
    "rowfiles": 2,
    "streaming": 3,
    "corpora": 1,
    "squad": 1,
    "conversations": 1,
    "images": 1,
    "labels": 1,
    "options": 1,
    "installed": 1,
    "settings": 2,
    "anatomy": 1,
    "inserts": 3,
    "rowforms": 4,
    "mixing": 4,
    "trunks": 9,
    "residents": 10,
    "rowwise": 11,
    "shared": 12,
    "data": 2,
    "division": 3,
    "spans": 3,
    "finite": 4,
    "tags": 2,
    "order": 2,
    "rendering": 2,
    "disk": 2,
    "prefix": 3,
    "checkpoints": 3,
    "locks": 1,
    "states": 2,
    "forms": 1,
    "origin": 3,
    "kept": 5,
    "formats": 3,
    "fingerprint": 3,
    "quantize": 3,
    "arrival": 4,
    "roundtrip": 4,
    "once": 2,
    "classes": 3,
    "tokens": 3,
    "pixels": 3,
    "injection": 3,
    "fused": 4,
    "pace": 3,
    "chats": 3,
    "generation": 3,
    "documents": 4,
    "completions": 4,
    "frames": 4,
    "corruption": 1,
    "likelihood": 3,
    "cloze": 4,
    "words": 4,
    "windows": 4,
    "contracts": 4,
    "rehearsal": 4,
    "experts": 4,
    "schema": 3,
    "manifest": 4,
    "parts": 4,
    "stream": 5,
    "rewrite": 6,
    "strategies": 5,
    "tasks": 5,
    "loadoptions": 4,
    "backbones": 5,
    "recognition": 4,
    "lent": 4,
    "heads": 5,
    "vocabulary": 5,
    "arguments": 6,
    "bare": 5,
    "card": 5,
    "devices": 1,
    "footprint": 1,
    "engines": 2,
    "trial": 5,
    "blueprint": 6,
    "activations": 7,
    "plan": 8,
    "budget": 1,
    "hardware": 9,
    "facts": 5,
    "stops": 3,
    "epochs": 5,
    "chunked": 1,
    "throughput": 1,
    "readout": 5,
    "runs": 6,
    "inspection": 5,
    "adapt": 6,
    "checks": 7,
    "storage": 7,
    "predict": 7,
    "fidelity": 8,
    "merge": 9,
    "lowrank": 2,
    "aside": 2,
    "starts": 4,
    "agreement": 1,
    "sessions": 1,
    "int8": 1,
    "tracing": 10,
    "onnxfile": 11,
    "changes": 8,
    "readers": 1,
    "heatmap": 3,
    "spectra": 3,
    "profile": 9,
    "ledger": 10,
    "siblings": 10,
    "contrast": 10,
    "rounding": 5,
    "dissent": 8,
    "diff": 11,
    "remake": 9,
    "arithmetic": 2,
    "weighing": 1,
    "mixture": 9,
    "gathering": 10,
    "reference": 11,
    "combine": 12,
    "objective": 9,
    "trainer": 10,
    "portions": 7,
    "recipe": 11,
    "completed": 12,
    "axes": 2,
    "watermark": 1,
    "standings": 1,
    "scatter": 2,
    "trials": 12,
    "search": 13,
    "attempts": 13,
    "outcome": 13,
    "campaign": 14,
    "sweep": 15,
    "quickstart": 12,
    "doctor": 2,
    "survey": 2,
    "roles": 4,
    "fitness": 7,
    "soundness": 12,
    "validation": 13,
    "drafting": 14,
    "push": 5,
    "yamltext": 1,
    "console": 2,
    "commands": 16,
    "cli": 17,
    "script": 18,
    "__main__": 18,
    "processes": 1,
    "presence": 1,
    "meeting": 2,
    "attendance": 2,
    "ranks": 3,
    "restarts": 7,
    "launch": 2,
    "team": 8,
    "narration": 2,
    "sharded": 5,
    "pieces": 4,
    "zero": 5,
    "remarks": 1,
    "inflow": 1,
    "lanes": 5,
    "jointly": 5,
    "neighbours": 4,
    "onward": 6,
    "dividing": 8,
    "shares": 1,
    "exchange": 4,
    "evaluation": 6,
    "accord": 5,
    "unison": 8,
    "randomness": 4,
}
FORBIDDEN_NAMES = {"utils.py", "common.py", "helpers.py"}
FORBIDDEN_SUFFIXES = ("Manager", "Handler", "Engine", "Factory", "Mixin")
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def room(path: Path) -> str:
    """The room that a file belongs to: its module, or its folder."""
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, dotted module inside the package) of every import in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module == "adapters":
                found += [(node.lineno, f"adapters.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, node.module))
    return [(line, name.removeprefix("adapters.")) for line, name in found if name.startswith("adapters.")]


def test_every_room_has_a_floor() -> None:
    assert {room(path) for path in FILES} == set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    here = room(path)
    for line, name in imported(path):
        there = name.split(".")[0]
        if here == there:
            assert path.name == "__init__.py", f"{path}:{line}: files of one folder do not import each other"
        else:
            assert there in FLOORS, f"{path}:{line}: {there} is no room"
            assert FLOORS[there] < FLOORS[here], f"{path}:{line}: {here} (floor {FLOORS[here]}) imports {there}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_must_not_exist(path: Path) -> None:
    assert path.name not in FORBIDDEN_NAMES
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert not node.name.endswith(FORBIDDEN_SUFFIXES), f"{path}:{node.lineno}: {node.name}"
            assert not node.name.startswith("Base"), f"{path}:{node.lineno}: {node.name}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            assert "strategy" not in ast.unparse(node.args[0]) or room(path) == "adapt", f"{path}:{node.lineno}"
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and node.left.id == "strategy":
            assert room(path) == "adapt", f"{path}:{node.lineno}: a branch on the strategy"
    if path.name != "lora.py":
        assert '"lora" in' not in text
        assert '"lora_' not in text.replace('"lora_r"', "") or room(path) in ("options", "adapt"), path


def test_modules_stay_small() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in FILES}
    assert max(lengths.values()) <= 460, {str(p): n for p, n in lengths.items() if n > 460}
