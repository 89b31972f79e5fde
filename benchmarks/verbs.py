"""Every verb on adapters of banking77, sst2 and gsm8k, and how exact what it wrote is.

python -m benchmarks.verbs [--only sst2,gsm8k]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import adapters
from benchmarks import parts

ROWS = 200  # of the test part: answers that are compared
MIXED = 32  # rows of one call, the adapters in turn
TARGETS = ("peft", "vllm", "tgi", "llama.cpp", "transformers", "onnx", "int8")


def apart(report: Any) -> str:
    """How far logits lie from those that they must be, as a share of their spread."""
    if report.max_difference is None:
        return "not compared"
    return f"{100 * report.max_difference / report.spread:.2g} %"


def asked(verb: Callable[[], str]) -> str:
    """What a verb gives, or why it refuses."""
    try:
        return verb()
    except adapters.NumbersError as fault:
        return f"refused: {str(fault.args[0]).partition('found ')[2].partition('. ')[0]}"
    except adapters.RequestError as fault:
        return f"refused: {str(fault.args[0]).partition(': ')[0]}"


def verbs(name: str, out: Path) -> Mapping[str, Callable[[], str]]:
    """A row of the table for each verb, on the adapters of a set."""
    one, two = parts.trained(name), parts.trained(name, seed=1)
    test = parts.rows(name)[1][:ROWS]
    head = one if parts.PARTS[name].task != "causal-lm" else None
    weights = {one: 0.6, two: 0.4}

    def combined(**options: Any) -> str:
        report = adapters.combine(weights, out / "combined", head=head, **options)
        return f"rank {report.ranks[1]}, {100 * report.error:.2g} % cut"

    def merged(method: str) -> str:
        return apart(adapters.combine(weights, out / "both", head=head, method=method, merged=True, rows=test))

    def extracted(rank: int | None) -> str:
        report = adapters.extract(one, out / "extracted", rank=rank, rows=test)
        return f"{100 * report.error:.2g} % cut, {apart(report)}"

    def swapped() -> str:
        shared = adapters.Shared(parts.backbone(name))
        names = [shared.load(folder, name=label) for folder, label in ((one, "one"), (two, "two"))]
        own = [adapters.load(folder) for folder in (one, two)]
        rows = [
            {key: value for key, value in row.items() if key not in ("label", "completion")} for row in test[:MIXED]
        ]
        texts = [row["text"] for row in rows] if head is not None else rows
        mixed = adapters.predict(shared, texts, adapter=[names[n % 2] for n in range(len(texts))])
        alone = [adapters.predict(adapted, texts) for adapted in own]
        same = sum(_same(found, alone[n % 2][n]) for n, found in enumerate(mixed))
        return f"{same} of {len(mixed)} answers the same"

    def onto(**options: Any) -> str:
        return apart(adapters.merge_on_disk(one, out / "merged", rows=test, **options))

    def exported(target: str) -> str:
        return apart(adapters.export(one, out / target, to=target, rows=test))

    def inspected() -> str:
        total = adapters.inspect(one).total
        return f"{100 * (total.relative or 0):.2g} % of the backbone, effective rank {total.effective:.2g}"

    return {
        "combine 0.6, 0.4": combined,
        "combine --method svd --rank 8": lambda: combined(method="svd", rank=8),
        "combine --merge": lambda: merged("linear"),
        "combine --method ties --merge": lambda: merged("ties"),
        "combine --method dare --merge": lambda: merged("dare"),
        "extract": lambda: extracted(None),
        "extract --rank 4": lambda: extracted(4),
        "two on one backbone, row by row": swapped,
        "merge": onto,
        "merge --dtype bfloat16": lambda: onto(dtype="bfloat16"),
        "merge --quantization int8": lambda: onto(quantization="int8"),
        **{f"export --to {target}": lambda target=target: exported(target) for target in TARGETS},  # type: ignore[misc]
        "inspect --changes": inspected,
        "diff, another seed": lambda: f"cosine {adapters.diff(one, two).total.cosine:.3f}",
    }


def _same(one: Any, other: Any) -> bool:
    """Whether two answers are the same but for rounding."""
    if isinstance(one, Mapping) and "score" in one:
        return bool(one["label"] == other["label"] and abs(one["score"] - other["score"]) < 1e-5)
    return bool(one == other)


def main(names: list[str]) -> None:
    """Print the table."""
    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as place:
        for name in names:
            for verb, act in verbs(name, Path(place) / name).items():
                found.setdefault(verb, []).append(asked(act))
                print(f"{name}: {verb}: {found[verb][-1]}", file=sys.stderr)
    print(f"| verb | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for verb, cells in found.items():
        print(f"| {verb} | {' | '.join(cells)} |")


if __name__ == "__main__":
    chosen = sys.argv[sys.argv.index("--only") + 1].split(",") if "--only" in sys.argv else list(parts.PARTS)
    main(chosen)
