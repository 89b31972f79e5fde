"""What a full fine-tuning and a DoRA adapter come to as plain LoRA at a rank, and as deltas.

Both were trained on banking77 by `benchmarks.parts`. For each rank: bytes of the weights, the share of the change that
is lost, how far logits lie from the source's on test rows, how many answers agree, accuracy on the test rows, seconds
of the extraction (without its logits check). Then the delta, and what packing it against the backbone saves; zlib on
the weights file stands beside it. Last the rank of a LoRA adapter, changed here on its factors and by peft's
`convert_to_lora`, which decomposes the whole matrices; both from imported libraries to a written folder, taking turns.

    python -m benchmarks.extracting            # about four minutes where the adapters are trained already
    python -m benchmarks.extracting --smoke    # two ranks, few rows
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import parts
from benchmarks.harness import machine, versions

SET = "banking77"
RANKS = (4, 8, 16, 32, 64, None)
ROUNDS = 3
RESIZED = 4  # the rank that an adapter of rank 8 is brought to
ROWS = 200  # test rows
WEIGHTS = "adapter_model.safetensors"


def timed(act: Callable[[], Any]) -> tuple[float, Any]:
    """Wall seconds, and what came back."""
    begin = time.perf_counter()
    found = act()
    return time.perf_counter() - begin, found


def accuracy(folder: Path, rows: Sequence[dict[str, str]]) -> float:
    """Of an adapter on labelled rows, in percent."""
    import adapters

    return 100 * adapters.evaluate(adapters.load(folder), list(rows))["accuracy"]


def ranks(strategy: str, wanted: Sequence[int | None], rows: Sequence[dict[str, str]], place: Path) -> Iterator[str]:
    """The table of one source."""
    import adapters
    from adapters import fidelity

    source, base = parts.trained(SET, strategy), parts.backbone(SET)
    size = (source / WEIGHTS).stat().st_size
    yield f"{strategy} on {SET}: {size / 1e6:.2f} MB, accuracy {accuracy(source, rows):.1f} % on {len(rows)} test rows"
    yield ""
    yield "| rank | MB | of the source | change lost | logits apart, of their spread | agree | accuracy | seconds |"
    yield "|---|---|---|---|---|---|---|---|"
    texts = [row["text"] for row in rows]
    for rank in wanted:
        out = place / f"{strategy}-{rank}"
        seconds, report = timed(lambda: adapters.extract(source, out, rank=rank, check_logits=False))  # noqa: B023
        found = fidelity.compare(str(source), str(out), base, texts)
        yield (
            f"| {rank or f'full ({report.ranks[0]} to {report.ranks[1]})'} | {report.bytes / 1e6:.2f} "
            f"| {report.bytes / size:.2f}x | {100 * report.error:.2g} % "
            f"| {found['max_difference'] / found['spread']:.1e} | {100 * found['agreement']:.1f} % "
            f"| {accuracy(out, rows):.1f} % | {seconds:.1f} |"
        )
    yield ""


def deltas(place: Path) -> Iterator[str]:
    """What a delta of the full fine-tuning weighs."""
    import adapters

    source = parts.trained(SET, "full")
    size = (source / WEIGHTS).stat().st_size
    yield "| full fine-tuning | MB | of the source | seconds |"
    yield "|---|---|---|---|"
    yield f"| every tensor | {size / 1e6:.2f} | 1.00x | - |"
    took, packed = timed(lambda: len(zlib.compress((source / WEIGHTS).read_bytes(), 6)))
    yield f"| the same file through zlib | {packed / 1e6:.2f} | {packed / size:.2f}x | {took:.1f} |"
    for form, begin, out in (
        ("delta", source, "delta"),
        ("packed", source, "packed"),
        ("delta", place / "packed", "unpacked"),
    ):
        took, report = timed(
            lambda: adapters.extract(begin, place / out, form=form, check_logits=False)  # noqa: B023
        )
        yield f"| {out} | {report.bytes / 1e6:.2f} | {report.bytes / size:.2f}x | {took:.1f} |"
    same = (place / "delta" / WEIGHTS).read_bytes() == (place / "unpacked" / WEIGHTS).read_bytes()
    yield ""
    yield f"Unpacked equals the delta, byte for byte: {'yes' if same else 'NO'}."
    yield ""


def resized(rounds: int, place: Path) -> Iterator[str]:
    """A LoRA adapter of rank 8 brought to a lower one, by both."""
    import adapters

    source, base = parts.trained(SET), Path(parts.backbone(SET))
    ours, theirs, out, other = [], [], place / "ours", place / "theirs"
    for _ in range(rounds):
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(other, ignore_errors=True)
        ours.append(timed(lambda: adapters.extract(source, out, rank=RESIZED, check_logits=False))[0])
        theirs.append(timed(lambda: _by_peft(source, base, other))[0])
    inside = _products(source)
    yield f"| a LoRA adapter from rank 8 to {RESIZED} | change lost | seconds, median of {rounds} |"
    yield "|---|---|---|"
    for name, folder, seconds in (("adapters.extract", out, ours), ("peft convert_to_lora", other, theirs)):
        found = _products(folder)
        lost = sum(float((inside[path] - found[path]).square().sum()) for path in inside)
        share = (lost / sum(float(product.square().sum()) for product in inside.values())) ** 0.5
        yield f"| {name} | {100 * share:.3g} % | {median(seconds):.2f} ({', '.join(f'{s:.2f}' for s in seconds)}) |"
    yield ""


def _by_peft(source: Path, base: Path, out: Path) -> None:
    """What a user of peft would write: the model, the adapter on it, converted, saved."""
    import peft
    from transformers import AutoModelForSequenceClassification

    import adapters.manifest

    labels = len(adapters.manifest.read_manifest(source)["task"]["options"]["labels"])
    net = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    wrapped = peft.PeftModel.from_pretrained(net, str(source))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a LoRA adapter already
        peft.save_as_lora(out, wrapped, rank=RESIZED)


def _products(folder: Path) -> dict[str, Any]:
    """scale * B A of every adapted module."""
    import json

    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / WEIGHTS)
    scale = config["lora_alpha"] / config["r"]
    down, up = ".lora_A.weight", ".lora_B.weight"
    return {
        key.removesuffix(down): scale * tensors[key.removesuffix(down) + up] @ tensor
        for key, tensor in tensors.items()
        if key.endswith(down)
    }


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two ranks, few rows, one round")
    options: Any = parser.parse_args()
    wanted: Sequence[int | None] = (4, None) if options.smoke else RANKS
    rows = parts.rows(SET)[1][: 32 if options.smoke else ROWS]
    print(f"{machine('cpu')}\n\n{versions()}\n", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for strategy in ("full", "dora"):
            for line in ranks(strategy, wanted, rows, place):
                print(line, flush=True)
        for line in deltas(place):
            print(line, flush=True)
        for line in resized(1 if options.smoke else ROUNDS, place):
            print(line, flush=True)


if __name__ == "__main__":
    main()
