"""What a merge of a QLoRA adapter costs, by the base that it is merged onto and the form that it is merged into.

    python -m benchmarks.merged_storage            # sst2 and banking77 on MiniLM
    python -m benchmarks.merged_storage --smoke    # sst2 alone, a few rows

Of each merged model, opened by plain transformers as it lies on the disk: bytes of its weights, the greatest difference
of its logits from the adapted model's on the test rows as a share of their spread, how many rows get the same label,
and test accuracy. The peer's way is peft's merge_and_unload into the full-precision checkpoint, saved, and what
transformers packs of that.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import parts

FORMS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("fp32", {"dtype": "float32"}),
    ("bf16", {"dtype": "bfloat16"}),
    ("fp16", {"dtype": "float16"}),
    ("nf4", {"quantization": "nf4"}),
    ("int8", {"quantization": "int8"}),
)
STEP = 32  # rows at a time


def logits(model: Any, tokenizer: Any, rows: Sequence[dict[str, str]]) -> Any:
    """The answers of a classifier, shape (rows, labels), float32."""
    import torch

    model.eval()
    found = []
    with torch.inference_mode():
        for start in range(0, len(rows), STEP):
            texts = [row["text"] for row in rows[start : start + STEP]]
            batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=64)
            found.append(model(**batch).logits.float())
    return torch.cat(found)


def weights(folder: Path) -> int:
    """Bytes of a checkpoint's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def peer(adapter: Path, base: str, labels: int, out: Path) -> dict[str, Callable[[], Any]]:
    """peft's merge into the full-precision checkpoint, and transformers' packing of it: name -> who opens it."""
    import peft
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    merged: Any = peft.PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload()
    merged.save_pretrained(out)
    kept = ["classifier", "bert.pooler.dense"]
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=kept
    )
    eight = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    opened: Any = AutoModelForSequenceClassification.from_pretrained
    return {
        "fp32": lambda: opened(out),
        "nf4": lambda: opened(out, quantization_config=four),
        "int8": lambda: opened(out, quantization_config=eight),
    }


def measure(name: str, count: int | None) -> list[str]:
    """The rows of the table for one data set."""
    import torch
    from transformers import AutoModelForSequenceClassification

    import adapters

    adapter = parts.trained(name, "qlora")
    test = parts.rows(name)[1][:count]
    adapted = adapters.load(adapter)
    names = list(adapted.task.labels)  # type: ignore[attr-defined]
    wanted = logits(adapted.model, adapted.processor, test)
    truth = torch.tensor([names.index(row["label"]) for row in test])
    spread = float(wanted.std())
    lines = []

    def line(who: str, onto: str, form: str, nbytes: int | None, found: Any) -> None:
        apart = float((found - wanted).abs().max()) / spread
        same = float((found.argmax(-1) == wanted.argmax(-1)).float().mean())
        right = float((found.argmax(-1) == truth).float().mean())
        size = f"{nbytes / 1e6:.1f}" if nbytes is not None else "-"
        lines.append(f"| {name} | {who} | {onto} | {form} | {size} | {apart:.1e} | {same:.1%} | {right:.1%} |")

    line("adapted", "nf4, as trained", "-", None, wanted)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "merged"
        for onto in ("training", "original"):
            for form, options in FORMS:
                report = adapters.merge_on_disk(adapter, out, onto=onto, check_logits=False, accept=True, **options)
                opened: Any = AutoModelForSequenceClassification.from_pretrained
                model = opened(report.output, dtype="auto")
                line("ours", onto, form, weights(out), logits(model, adapted.processor, test))
                shutil.rmtree(out)
        base = parts.backbone(name)
        theirs = Path(scratch) / "theirs"
        for form, opens in peer(adapter, base, len(names), theirs).items():
            size = weights(theirs) if form == "fp32" else None
            line("peft, transformers", "original", form, size, logits(opens(), adapted.processor, test))
    return lines


def main() -> None:
    """Train what is not there, merge, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="sst2 alone, 40 test rows")
    options: Any = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    print("| rows | by | onto | into | MB | logits apart, of their spread | same label | test accuracy |")
    print("|---|---|---|---|---:|---:|---:|---:|")
    for name in ("sst2",) if options.smoke else ("sst2", "banking77"):
        print("\n".join(measure(name, 40 if options.smoke else None)), flush=True)


if __name__ == "__main__":
    main()
