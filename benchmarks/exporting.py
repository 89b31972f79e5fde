"""Adapters exported to each reader: bytes, seconds, logits read back; and what the reader makes of the plain folder.

LoRA, rslora and DoRA adapters of a Llama trained on gsm8k. "read back" is the largest difference between the logits of
the adapted model and those of the backbone with what the reader computes from the written file, on test rows, as a
share of the logits' spread; the process that measures it is not in the seconds. "the plain folder" is the same for the
adapter's own folder, handed to the reader as it is. Where the package llama-cpp-python is installed, llama.cpp itself
opens the file on a GGUF of the backbone made here.

    python -m benchmarks.exporting              # three adapters x five readers
    python -m benchmarks.exporting --smoke      # one untrained adapter, two readers
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adapters
from adapters import fidelity, gguffile, readback, served
from adapters.export import TARGETS
from adapters.lint import TGI_NAME
from benchmarks import llamacpp, parts

READERS = ("peft", "vllm", "tgi", "llama.cpp", "transformers")
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"r": 16},
    "dora": {},
}
ROWS = 8


def plain(reader: str, folder: Path, adapted: Any, rows: Any) -> str:
    """What a reader makes of the adapter's own folder: the share by which its logits differ, or why it refuses."""
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(parts.backbone("gsm8k"), dtype="auto")
    names = [name for name, _ in net.named_modules() if TGI_NAME.fullmatch(name)]
    ways: dict[str, Callable[[], served.Served]] = {
        "vllm": lambda: served.vllm(folder),
        "tgi": lambda: served.tgi(folder, names),
        "llama.cpp": lambda: served.converted(folder),
    }
    if reader not in ways:
        return "-"
    try:
        found = ways[reader]()
    except adapters.AdaptersError as fault:
        return f"refused: {str(fault).rpartition('found ')[2]}"
    readback.put(net, found.deltas, found.whole)
    batches = fidelity.inputs(adapted, rows)
    apart = fidelity.apart(fidelity.outputs(adapted.model, batches), fidelity.outputs(net, batches))
    left = f", {len(found.ignored)} tensors left out" if found.ignored else ""
    return f"{100 * apart['max_difference'] / apart['spread']:.3g} %{left}"


def ways(strategy: str) -> Iterator[tuple[str, int | None]]:
    """Readers, and the ranks at which they are asked."""
    for reader in READERS:
        yield reader, None
        if strategy == "dora" and reader in ("vllm", "tgi", "llama.cpp"):
            for rank in (16, 64):
                yield reader, rank


def exported(reader: str, rank: int | None, folder: Path, out: Path, rows: Any) -> list[str]:
    """The cells of one export: bytes, seconds, what was cut, logits read back; or why it was refused."""
    begin = time.perf_counter()
    try:
        adapters.export(folder, out, to=reader, rank=rank, max_rank=64, check=False)
        seconds = time.perf_counter() - begin
        report = adapters.export(folder, out, to=reader, rank=rank, max_rank=64, rows=rows)
    except adapters.RequestError as fault:
        return ["-", f"{time.perf_counter() - begin:.1f}", "-", f"refused: {str(fault).partition(' (')[0]}"]
    cut = f"{100 * report.weight_error:.2g} %" if report.weight_error else "nothing"
    shown = report.skipped
    if report.max_difference is not None and report.spread:
        shown = f"{100 * report.max_difference / report.spread:.2g} %"
    return [f"{report.bytes:,}", f"{seconds:.1f}", cut, shown]


def llama_cpp(folder: Path, adapted: Any, place: Path, rows: Any) -> str:
    """llama.cpp's own logits with the exported file against the adapted model's."""
    import torch
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(parts.backbone("gsm8k"), dtype=torch.float32)
    model = place / "base.gguf"
    if not model.exists():
        llamacpp.base(net, model)
    batch = fidelity.inputs(adapted, rows)[0]
    ids = batch["input_ids"][0][batch["attention_mask"][0].bool()]
    with torch.no_grad():
        wanted = adapted.model.eval()(ids[None]).logits[0].float()
        bare = net.eval()(ids[None]).logits[0].float()
    found = llamacpp.logits(model, folder / gguffile.FILE, ids.tolist(), wanted.shape[1])
    agree = (found.argmax(-1) == wanted.argmax(-1)).float().mean()
    without = llamacpp.logits(model, None, ids.tolist(), wanted.shape[1])
    return (
        f"{100 * float((found - wanted).abs().max() / wanted.std()):.2g} % of the spread over {len(ids)} tokens, "
        f"{100 * float(agree):.0f} % equal best tokens; without the adapter "
        f"{100 * float((without - wanted).abs().max() / wanted.std()):.0f} %, "
        f"and the backbone alone differs by {100 * float((without - bare).abs().max() / bare.std()):.2g} %"
    )


def main() -> None:
    """Export, measure, print."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--smoke", action="store_true", help="one untrained adapter, two readers")
    smoke = asked.parse_args().smoke
    rows = parts.rows("gsm8k")[1][: 2 if smoke else ROWS]
    said = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        print("| adapter | reader | bytes | seconds | cut | read back | the plain folder |")
        print("|---|---|---|---|---|---|---|")
        for strategy, options in [("rslora", ADAPTERS["rslora"])] if smoke else ADAPTERS.items():
            folder = _untrained(place, strategy, options) if smoke else parts.trained("gsm8k", strategy, **options)
            adapted = adapters.load(folder)
            for number, (reader, rank) in enumerate(ways(strategy)):
                if smoke and reader not in ("vllm", "llama.cpp"):
                    continue
                out = place / f"{strategy}-{number}"
                cells = exported(reader, rank, folder, out, rows)
                before = plain(reader, folder, adapted, rows) if rank is None else "-"
                named = reader if rank is None else f"{reader} --rank {rank}"
                print(f"| {strategy} | {named} | {' | '.join(cells)} | {before} |", flush=True)
                if reader == "llama.cpp" and out.exists() and llamacpp.there() and rank != 16:
                    said.append(f"llama.cpp itself, {strategy}: {llama_cpp(out, adapted, place, rows)}")
    print()
    if not llamacpp.there():
        said.append("llama.cpp itself was not asked: llama-cpp-python is not installed.")
    print("\n".join(said))
    assert set(READERS) <= set(TARGETS)


def _untrained(place: Path, strategy: str, options: dict[str, Any]) -> Path:
    """An adapter whose factors were moved at random."""
    import torch

    with contextlib.redirect_stdout(None):
        adapted = adapters.adapt(parts.backbone("gsm8k"), strategy, task="causal-lm", **options)
    torch.manual_seed(0)
    parameters = dict(adapted.model.named_parameters())
    with torch.no_grad():
        for name in adapted.trained:
            parameters[name].add_(0.02 * torch.randn(parameters[name].shape))
    return adapters.save(adapted, place / "untrained")


if __name__ == "__main__":
    main()
