"""Trained adapters for the benchmarks of combining, extracting, swapping and exporting, trained once and kept.

    python -m benchmarks.parts        train those that are not there yet, and list them

banking77 and sst2 on MiniLM, gsm8k on a Llama of 260,000 parameters that was trained on children's stories; where rows
or models lack, others that are made here.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import made, texts
from benchmarks.harness import CACHE, ROOT, in_child, say, serve

MODEL = ROOT.parent / "shared" / "models" / "stories260K-llama"
STEP = {"per_device_train_batch_size": 16, "save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no"}


@dataclass(frozen=True)
class Part:
    """A set of rows with its backbone.

    Attributes:
        task: of Holdfast.
        train, test: rows.
        epochs: of a training.
        options: of the task.
    """

    task: str
    train: int
    test: int
    epochs: int
    options: Mapping[str, Any]


PARTS = {
    "banking77": Part("text-classification", 1000, 400, 1, {"max_length": 64}),
    "sst2": Part("text-classification", 1000, 400, 1, {"max_length": 64}),
    "gsm8k": Part("causal-lm", 400, 60, 1, {"max_length": 256}),
}


def rows(name: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and test rows: texts with labels, or prompts with completions."""
    part = PARTS[name]
    if part.task != "causal-lm":
        drawn = texts.draw(name, part.train, part.test)
        return drawn.train, drawn.test
    if not texts.is_real(name):
        sums = [_sum(random.Random(f"{name} {number}")) for number in range(part.train + part.test)]
        return sums[part.test :], sums[: part.test]
    import adapters.data

    splits = adapters.data.read(str(texts.SHARED / name))
    taken = []
    for split, count in (("train", part.train), ("test", part.test)):
        columns = zip(splits[split]["prompt"], splits[split]["completion"], strict=True)
        found = [{"prompt": prompt, "completion": completion} for prompt, completion in columns]
        random.Random(0).shuffle(found)
        taken.append(found[:count])
    return taken[0], taken[1]


def _sum(draw: random.Random) -> dict[str, str]:
    one, two = draw.randrange(100), draw.randrange(100)
    return {
        "prompt": f"There are {one} {draw.choice(made.THINGS)}s and {two} more. How many?",
        "completion": f"{one + two}",
    }


def backbone(name: str) -> str:
    """The folder of a set's backbone."""
    if PARTS[name].task != "causal-lm":
        return texts.backbone(texts.MINILM)
    return str(MODEL) if MODEL.is_dir() else str(made.once("llama", _llama))


def _llama(folder: Path) -> None:
    import torch
    import transformers

    words = made.trained_tokenizer([row["prompt"] for row in rows("gsm8k")[0]])
    torch.manual_seed(made.SEED)
    shape = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8}
    config = transformers.LlamaConfig(vocab_size=len(words), num_key_value_heads=4, **shape)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)


def trained(name: str, strategy: str = "lora", seed: int = 0, **options: Any) -> Path:
    """The folder of an adapter, trained in a process of its own where it is not there yet.

    Args:
        name: of `PARTS`.
        strategy: a name that `adapters.adapt` knows; options: its own.
        seed: of the training.
    """
    request = {"name": name, "strategy": strategy, "seed": seed, "options": options, "part": vars(PARTS[name])}
    key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:10]
    place = CACHE / "parts" / f"{name}-{strategy}-{seed}-{key}"
    if not (place / "adapter.json").is_file():
        say(f"training {strategy} on {name}, seed {seed} {options or ''}")
        in_child("benchmarks.parts", {**request, "place": str(place)})
    return place


def _train(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    import adapters

    name = request["name"]
    part = PARTS[name]
    train, test = rows(name)
    labels = {"labels": sorted({row["label"] for row in train + test})} if part.task != "causal-lm" else {}
    adapted = adapters.adapt(
        backbone(name),
        request["strategy"],
        task=part.task,
        seed=request["seed"],
        **labels,
        **part.options,
        **request["options"],
    )
    settings = {**STEP, "num_train_epochs": part.epochs, "seed": request["seed"]}
    adapters.Trainer(adapted, {"output_dir": str(folder / "run"), **settings}, train).train()
    adapters.save(adapted, request["place"])
    return {"metrics": adapters.evaluate(adapted, test)}


def main() -> None:
    """Train what the benchmarks ask for."""
    for name in PARTS:
        for seed in (0, 1):
            print(trained(name, seed=seed))
    for name, strategy in (("banking77", "dora"), ("banking77", "rslora"), ("banking77", "full"), ("gsm8k", "dora")):
        print(trained(name, strategy))


if __name__ == "__main__":
    import sys

    if len(sys.argv) > 1:
        serve(_train)
    else:
        main()
