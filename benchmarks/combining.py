"""Two adapters made into one: how far the answers lie from the sum of what each did, ours beside peft's.

The reference is computed in float64: the backbone plus weighted differences of models that peft itself merged, one
adapter at a time, in float64. An error is the distance of the logits from the reference's, as a share of how far the
reference moved from the backbone alone (the same head on both). Seconds are those of making and writing the adapter:
ours reads both folders and verifies them; peft's adapters are loaded before its clock starts. Sides take turns; of
rounds and seeds the median. The head is the first adapter's everywhere: peft combines no two that bring one, so that
it gets folders without.

    python -m benchmarks.combining            sst2 on MiniLM, trained once and kept
    python -m benchmarks.combining --smoke    a small BERT with random adapters: tries the command
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import machine, say, versions

WEIGHTS = (0.6, 0.4)
RANK = 16  # of every svd; two adapters of rank 8 have this much together
BIASED = {"config": {"peft_type": "LORA", "r": 8, "lora_bias": True, "target_modules": ["query", "key", "value"]}}
# Kind -> strategy and options of the first and of the second adapter.
KINDS: Mapping[str, tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = {
    "lora": (("lora", {}), ("lora", {})),
    "rslora": (("rslora", {}), ("rslora", {})),
    "dora": (("dora", {}), ("dora", {})),
    "lora_bias": (("peft", BIASED), ("peft", BIASED)),
    "ranks 8 and 4, patterns": (
        ("lora", {}),
        ("lora", {"r": 4, "rank_pattern": {"query": 8}, "alpha_pattern": {"query": 32.0}}),
    ),
}
OURS = {
    "adapters combine": {},
    f"adapters combine --method svd --rank {RANK}": {"method": "svd", "rank": RANK},
}
PEER = ("linear", "cat", "svd")


def sample(smoke: bool, place: Path) -> tuple[Callable[[str, dict[str, Any], int], Path], list[str], str]:
    """What gives a trained adapter by strategy, options and seed; texts to answer; the backbone's folder."""
    from benchmarks import parts

    if not smoke:
        texts = [row["text"] for row in parts.rows("sst2")[1][:100]]
        return (
            (lambda strategy, options, seed: parts.trained("sst2", strategy, seed, **options)),
            texts,
            parts.backbone("sst2"),
        )
    import torch
    import transformers

    import adapters
    from benchmarks import made

    texts = [row["text"] for row in made.rows("sst2", "test", 24)]
    words = made.trained_tokenizer(texts)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(place / "base")
    words.save_pretrained(place / "base")

    def shaken(strategy: str, options: dict[str, Any], seed: int) -> Path:
        adapted = adapters.adapt(str(place / "base"), strategy, labels=["neg", "pos"], **options)
        torch.manual_seed(seed)
        parameters = dict(adapted.model.named_parameters())
        with torch.no_grad():
            for name in adapted.trained:
                parameters[name].add_(0.1 * torch.randn_like(parameters[name]))
        return adapters.save(adapted, place / f"adapter-{strategy}-{seed}-{len(list(place.iterdir()))}")

    return shaken, texts, str(place / "base")


def headless(folder: Path, out: Path) -> Path:
    """The folder as peft reads it, without the head."""
    from safetensors.torch import load_file, save_file

    out.mkdir(parents=True)
    own = set(json.loads((folder / "adapter.json").read_text())["head"])
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name.removeprefix("base_model.model.") not in own}
    save_file(kept, out / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": None}))
    return out


class Bench:
    """One pair of adapters: the model with the first one's head, the reference, and each way's answers."""

    def __init__(self, base: str, pair: tuple[Path, Path], texts: list[str], place: Path) -> None:
        import transformers

        self.base, self.pair, self.place = base, pair, place
        words = transformers.AutoTokenizer.from_pretrained(base)
        self.batch = dict(words(texts, padding=True, truncation=True, max_length=64, return_tensors="pt"))
        self.bare = [headless(folder, place / f"bare-{number}") for number, folder in enumerate(pair)]
        self.reference, self.start = self._exact()

    def model(self) -> Any:
        """The backbone with the first adapter's head."""
        import transformers
        from safetensors.torch import load_file

        document = json.loads((self.pair[0] / "adapter.json").read_text())
        tensors = load_file(self.pair[0] / "adapter_model.safetensors")
        kind: Any = transformers.AutoModelForSequenceClassification
        labels = len(document["task"]["options"]["labels"])
        net = kind.from_pretrained(self.base, num_labels=labels, dtype="float32").eval()
        head = {
            n: t for name, t in tensors.items() if (n := name.removeprefix("base_model.model.")) in document["head"]
        }
        net.load_state_dict(head, strict=False)
        return net

    def logits(self, net: Any) -> Any:
        """Answers to the texts, float64."""
        import torch

        with torch.no_grad():
            return net.eval()(**self.batch).logits.double()

    def _exact(self) -> tuple[Any, Any]:
        import peft

        net = self.model().double()
        start = self.logits(net)
        old = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        total = {name: tensor.clone() for name, tensor in old.items()}
        for folder, weight in zip(self.bare, WEIGHTS, strict=True):
            one = peft.PeftModel.from_pretrained(self.model().double(), folder).double().merge_and_unload()
            for name, tensor in one.state_dict().items():
                total[name] += weight * (tensor - old[name])
        net.load_state_dict(total)
        return self.logits(net), start

    def ours(self, **options: Any) -> dict[str, float]:
        """Seconds, answers and bytes of ours."""
        import adapters

        out = self.place / "ours"
        shutil.rmtree(out, ignore_errors=True)
        began = time.perf_counter()
        report = adapters.combine(
            list(zip(self.pair, WEIGHTS, strict=True)), out, head=self.pair[0], base=self.base, **options
        )
        seconds = time.perf_counter() - began
        return self._told(adapters.load(out, self.base).model, seconds, report.bytes)

    def peer(self, way: str) -> dict[str, float]:
        """The same of peft's.

        Raises:
            ValueError, RuntimeError: it refuses, or breaks.
        """
        import peft

        both = peft.PeftModel.from_pretrained(self.model(), self.bare[0])
        both.load_adapter(str(self.bare[1]), "second")
        rank = {"svd_rank": RANK} if way == "svd" else {}
        out = self.place / "peft"
        shutil.rmtree(out, ignore_errors=True)
        began = time.perf_counter()
        both.add_weighted_adapter(["default", "second"], list(WEIGHTS), "sum", combination_type=way, **rank)
        both.save_pretrained(str(out), selected_adapters=["sum"])
        seconds = time.perf_counter() - began
        both.set_adapter("sum")
        return self._told(both, seconds, (out / "sum" / "adapter_model.safetensors").stat().st_size)

    def _told(self, net: Any, seconds: float, size: int) -> dict[str, float]:
        found = self.logits(net)
        apart = float((found - self.reference).norm() / (self.reference - self.start).norm())
        same = float((found.argmax(-1) == self.reference.argmax(-1)).double().mean())
        return {"seconds": seconds, "apart": apart, "same": same, "bytes": float(size)}


def measured(
    smoke: bool, rounds: int, seeds: int, place: Path, kinds: Sequence[str]
) -> dict[tuple[str, str], list[dict[str, float]] | str]:
    """Every way's numbers by kind of adapter; why it refuses, where it does."""
    trained, texts, base = sample(smoke, place)
    found: dict[tuple[str, str], list[dict[str, float]] | str] = {}
    for kind in kinds:
        first, second = KINDS[kind]
        for seed in range(seeds):
            pair = (trained(*first, 2 * seed), trained(*second, 2 * seed + 1))
            work = place / f"{kind.split()[0]}-{len(found)}-{seed}"
            bench = Bench(base, pair, texts, work)
            for number in range(rounds):
                say(f"{kind}, seed {seed}, round {number + 1} of {rounds}")
                for name, options in OURS.items():
                    _put(found, (kind, name), partial(bench.ours, **options))
                for way in PEER:
                    _put(found, (kind, f"peft {way}"), partial(bench.peer, way))
            shutil.rmtree(work)
    return found


def _put(found: dict[tuple[str, str], Any], key: tuple[str, str], act: Callable[[], dict[str, float]]) -> None:
    try:
        found.setdefault(key, []).append(act())
    except (ValueError, RuntimeError) as fault:  # what peft says of ranks that differ
        found[key] = " ".join(str(fault).split())[:60]


def table(found: Mapping[tuple[str, str], list[dict[str, float]] | str]) -> str:
    """The numbers as markdown."""
    lines = ["| adapters | way | logits off by | same answer | seconds | MB |", "|---|---|---|---|---|---|"]
    for (kind, way), results in found.items():
        if isinstance(results, str):
            lines.append(f"| {kind} | {way} | no: {results} | | | |")
            continue
        apart, same, seconds, size = (median(r[n] for r in results) for n in ("apart", "same", "seconds", "bytes"))
        lines.append(
            f"| {kind} | {way} | {100 * apart:.2g} % | {100 * same:.0f} % | {seconds:.2f} | {size / 1e6:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a small model and random adapters")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="combining-") as name:
        rounds, seeds = (1, 1) if given.smoke else (given.rounds, given.seeds)
        found = measured(given.smoke, rounds, seeds, Path(name), given.kinds)
    print(table(found))
    print(f"\n{machine('cpu')}; {versions()}; weights {WEIGHTS[0]} and {WEIGHTS[1]}")


if __name__ == "__main__":
    main()
