"""Opening a backbone in 4 bits: how long it takes and what memory it needs at most, ours beside transformers' own.

A Llama-shaped checkpoint in bf16 is made here. Every way opens it with its linear maps packed to nf4, double quantised,
on the CPU, in a process of its own, ways in turn. "Read whole" is how `adapters.adapt` opened it before weights arrived
one at a time, and how it still does where a `device_map` may take several devices. Memory is above the imports: the
highest resident size (VmHWM), in which pages of the mapped checkpoint count, and the highest anonymous memory (RssAnon,
looked at 200 times a second), which nobody can take back.

    python -m benchmarks.arriving                # 2 GB, two rounds
    python -m benchmarks.arriving --float32      # cast while it is read, as load={"dtype": "float32"} asks for
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import in_child, say, serve
from benchmarks.huge import Anonymous, make, status

OURS, WHOLE, PEER = "adapters.adapt", "adapters.adapt, read whole", "transformers, BitsAndBytesConfig"


def opening(request: dict[str, Any], _: Path) -> dict[str, Any]:
    """What a child does, and what it took."""
    import bitsandbytes  # noqa: F401
    import torch
    import transformers

    import adapters

    for name in adapters.__all__:
        getattr(adapters, name)
    transformers.LlamaForCausalLM  # noqa: B018  # loaded when it is named
    folder, way, dtype = request["folder"], request["way"], request["dtype"]
    before, began = status("VmHWM"), time.perf_counter()
    with Anonymous() as anonymous:
        if way == PEER:
            kind: Any = transformers.BitsAndBytesConfig
            config = kind(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=getattr(torch, dtype),
            )
            auto: Any = transformers.AutoModelForCausalLM
            model = auto.from_pretrained(folder, quantization_config=config, dtype=dtype)
        else:
            load = {"dtype": dtype} | ({"device_map": "auto"} if way == WHOLE else {})
            model = adapters.adapt(folder, "lora", task="causal-lm", quantization="nf4", load=load).model
        seconds = time.perf_counter() - began
    from adapters.quantize import nbytes

    return {
        "seconds": seconds,
        "resident": (status("VmHWM") - before) / 1e6,
        "anonymous": anonymous.bytes / 1e6,
        "model": sum(nbytes(parameter) for parameter in model.parameters()) / 1e6,
    }


def main() -> int:
    """Make the checkpoint, open it in every way, print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.arriving", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the checkpoint, in bf16 (2)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--float32", action="store_true", help="load in float32")
    asked = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {OURS: [], WHOLE: [], PEER: []}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as root:
        folder = Path(root) / "base"
        total = make(folder, asked.gigabytes, sparse=False)
        for _ in range(asked.rounds):
            for way, runs in results.items():
                request = {"folder": str(folder), "way": way, "dtype": "float32" if asked.float32 else "bfloat16"}
                runs.append(in_child("benchmarks.arriving", request))
                say(f"{way}: {runs[-1]}")
    print(f"| {total / 1e9:.2f} GB | seconds | resident, MB | anonymous, MB | the packed model, MB |")
    print("| --- | --- | --- | --- | --- |")
    for way, runs in results.items():
        found = {name: median(run[name] for run in runs) for name in runs[0]}
        print(
            f"| {way} | " + " | ".join(f"{found[n]:.0f}" for n in ("seconds", "resident", "anonymous", "model")) + " |"
        )
    return 0


if __name__ == "__main__":
    if len(sys.argv) == 2 and (Path(sys.argv[1]) / "request.json").is_file():
        serve(opening)
    else:
        sys.exit(main())
