"""One merge of the table, and the weights that it reads, which are made at the first call and kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from benchmarks import merging
from benchmarks.harness import CACHE, serve

WAYS = {"cp": merging.COPY, "ours": merging.OURS, "peer": merging.PEER}


def answer(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Seconds, and peak bytes above an interpreter with what the merge imports; the source is read before."""
    gigabytes, output = request["gigabytes"], Path(request["output"])
    root = CACHE / "made" / f"merge-{gigabytes:g}"
    if not (root / "adapter").is_dir():  # comes last, and whole; it names the backbone by its place
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        merging.make(root, gigabytes)
    for file in (root / "base").iterdir():
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass
    try:
        found = merging.run(WAYS[request["side"]], root / "base", root / "adapter", output)
    finally:
        shutil.rmtree(output, ignore_errors=True)
    peak = 1024**2 * found["megabytes"]
    return {"seconds": found["seconds"], "cpu_seconds": found.get("cpu"), "peak_bytes": peak}


if __name__ == "__main__":
    serve(answer)
