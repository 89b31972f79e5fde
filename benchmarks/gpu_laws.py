"""What has to hold on a device whatever its speed, each with the figure that was found and its bound.

A small Llama made here learns made rows by LoRA, in bfloat16 or over 4 bits, by the library's own trainer. Everything
that is compared was computed on the device. A law that breaks off has failed; the others go on.
"""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import gpu_made, made
from benchmarks.gpu_made import DTYPE, SHAPES

STEPS, HALF = 6, 3  # of the run that is broken off in the middle and resumed
FACTORS = 1e-1  # relative: of gradients of small factors through several blocks in bfloat16
COARSE = 2e-2  # relative: what bfloat16's 8 bits leave of sums taken in another order


@dataclass(frozen=True)
class Law:
    """One law: what was found is at most the bound, where there is one."""

    law: str
    figure: float
    bound: float | None
    fault: str = ""

    @property
    def holds(self) -> bool:
        """A figure that is no number does not."""
        return not self.fault and (self.bound is None or self.figure <= self.bound)


class Bench:
    """The checkpoint, the rows and the settings that the laws share.

    Args:
        request: device, strategy, shape and checkpoint.
        folder: an empty one.
    """

    def __init__(self, request: Mapping[str, Any], folder: Path) -> None:
        self.device, self.strategy = str(request["device"]), str(request["strategy"])
        self.shape, self.checkpoint, self.folder = SHAPES[request["shape"]], str(request["checkpoint"]), folder
        said = made.opinions(4 * STEPS, random.Random(gpu_made.SEED))
        answers = {"pos": " a good one", "neg": " a bad one"}
        self.rows = [{"prompt": row["text"], "completion": answers[row["label"]]} for row in said]

    def adapted(self, **options: Any) -> Any:
        """The backbone on the device, with adapters."""
        import adapters

        load = {"dtype": DTYPE, "device_map": self.device}
        return adapters.adapt(
            self.checkpoint, self.strategy, task="causal-lm", max_new_tokens=8, load=load, **{"r": 4, **options}
        )

    def trainer(self, adapted: Any, name: str, **settings: Any) -> Any:
        """A trainer over the rows, four a step, that logs every step."""
        import adapters

        given = {
            "output_dir": str(self.folder / name),
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": self.device != "cpu",
            "use_cpu": self.device == "cpu",
            **settings,
        }
        return adapters.Trainer(adapted, given, self.rows)

    def losses(self, name: str, options: Mapping[str, Any], **settings: Any) -> list[float]:
        """The loss of every step of a run."""
        trainer = self.trainer(self.adapted(**options), name, **settings)
        trainer.train()
        return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]

    def logits(self, model: Any) -> Any:
        """Of random tokens, in eval mode, (rows, tokens, vocabulary) in float32 on the CPU."""
        import torch

        draw = torch.Generator().manual_seed(gpu_made.SEED)
        ids = torch.randint(5, self.shape.vocabulary, (4, min(64, self.shape.length)), generator=draw)
        model.eval()
        with torch.no_grad():
            return model(input_ids=ids.to(self.device)).logits.float().cpu()


# ---------------------------------------------------------------------- figures


def apart(found: Any, wanted: Any) -> float:
    """The largest difference as a share of the spread of what is wanted."""
    return float((found - wanted).abs().max()) / max(float(wanted.std()), 1e-9)


def relative(found: Sequence[float], wanted: Sequence[float]) -> float:
    """The largest relative difference of two runs' losses; not a number where one has none."""
    if len(found) != len(wanted) or not wanted:
        return math.nan
    return max(abs(one - other) / max(abs(other), 1e-9) for one, other in zip(found, wanted, strict=True))


def different(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> float:
    """Tensors that are not equal bit for bit, or that one side lacks."""
    import torch

    odd = set(found) ^ set(wanted)
    return len(odd) + sum(not torch.equal(found[name].cpu(), wanted[name].cpu()) for name in set(found) & set(wanted))


# ---------------------------------------------------------------------- laws


def of_a_run(bench: Bench) -> Iterator[Law]:
    """Train, save, open, merge, and resume from the middle."""
    import transformers

    import adapters
    from adapters import checks, exactness

    adapted = bench.adapted(lora_dropout=0.1)
    before = checks.frozen(adapted)
    bench.trainer(adapted, "whole", save_strategy="steps", save_steps=HALF, save_total_limit=None).train()
    after = checks.frozen(adapted)
    yield Law("frozen tensors whose bytes changed in training", sum(before[n] != after.get(n) for n in before), 0)
    state = {name: tensor.detach().cpu().clone() for name, tensor in adapted.state().items()}
    logits, asked = bench.logits(adapted.model), [row["prompt"] for row in bench.rows[:4]]
    answers = adapters.predict(adapted, asked)
    saved = adapters.save(adapted, bench.folder / "adapter")
    del adapted
    opened = adapters.load(saved)
    yield Law("tensors that differ once saved and opened", different(opened.state(), state), 0)
    yield Law("logits once saved and opened, share of their spread", apart(bench.logits(opened.model), logits), 0)
    said = adapters.predict(opened, asked)
    yield Law("answers that differ once saved and opened", sum(a != b for a, b in zip(said, answers, strict=True)), 0)
    if bench.strategy != "qlora":  # a merge into packed weights is refused
        merged = bench.logits(adapters.merge(opened))
        yield Law("logits merged in memory, share of their spread", apart(merged, logits), exactness.BOUNDS[DTYPE])
    del opened
    adapters.merge_on_disk(saved, bench.folder / "merged", base=bench.checkpoint, check_logits=False)
    auto: Any = transformers.AutoModelForCausalLM
    plain = auto.from_pretrained(bench.folder / "merged", dtype=DTYPE, device_map=bench.device)
    yield Law(
        "logits merged on disk, share of their spread", apart(bench.logits(plain), logits), exactness.BOUNDS[DTYPE]
    )
    del plain
    again = bench.adapted(lora_dropout=0.1)
    middle = str(bench.folder / "whole" / f"checkpoint-{HALF}")
    resumed = bench.trainer(again, "resumed", save_strategy="steps", save_steps=HALF, save_total_limit=None)
    resumed.train(resume_from_checkpoint=middle)
    yield Law("tensors that differ once resumed from the middle", different(again.state(), state), 0)


def of_levers(bench: Bench) -> Iterator[Law]:
    """What makes it faster or smaller changes no loss."""
    plain = bench.losses("plain", {}, chunked_loss=False, fused=False)
    chunked = bench.losses("chunked", {}, chunked_loss=True, fused=False)
    yield Law("losses in chunks beside whole logits, relative", relative(chunked, plain), COARSE)
    fused = bench.losses("fused", {}, chunked_loss=False, fused=True)
    yield Law("losses with fused matmuls beside peft's own, relative", relative(fused, plain), COARSE)
    upper = {"layers_to_transform": list(range(bench.shape.blocks // 2, bench.shape.blocks))}
    twice = {"max_steps": -1, "num_train_epochs": 2.0, "prefix_cache_gb": 0}
    uncached = bench.losses("uncached", upper, prefix_cache=False, **twice)
    cached = bench.losses("cached", upper, prefix_cache=True, **twice)
    yield Law("losses from the kept prefix beside all computed, relative", relative(cached, uncached), COARSE)


def of_matmuls(bench: Bench) -> Iterator[Law]:
    """One pass through fused matmuls beside peft's own: the gradients of every factor."""
    import contextlib

    import torch

    from adapters import fused

    adapted = bench.adapted()
    model, device = adapted.model.train(), bench.device.partition(":")[0]
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    draw = torch.Generator().manual_seed(gpu_made.SEED)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw).to(parameter))
    ids = torch.randint(5, bench.shape.vocabulary, (4, 32), generator=draw).to(bench.device)

    def gradients(cast: bool, how: Any) -> dict[str, Any]:
        model.zero_grad()
        with contextlib.ExitStack() as stack:
            if how is not None:
                stack.enter_context(fused.fused(model, how))
            with torch.autocast(device, torch.bfloat16, enabled=cast):
                logits = model(input_ids=ids).logits.float()
                loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
        return {name: p.grad.double().cpu() for name, p in parameters.items() if p.grad is not None}

    for cast, words in ((False, "without autocast"), (True, "under autocast")):
        wanted, found = gradients(cast, None), gradients(cast, fused.Plan())
        if len(wanted) != len(parameters) or set(found) != set(wanted):
            raise RuntimeError(f"{len(wanted)} and {len(found)} of {len(parameters)} factors have gradients")
        norms = [float((found[name] - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-12)) for name in wanted]
        yield Law(f"gradients of fused matmuls beside peft's, {words}, relative", max(norms), FACTORS)


def of_packing(bench: Bench) -> Iterator[Law]:
    """What the device packs to 4 bits beside what the processor does: merges are made by the latter."""
    if bench.strategy != "qlora":
        return
    import torch

    from adapters import quantize

    bnb = quantize.bitsandbytes()
    dense = torch.randn(bench.shape.inner, bench.shape.width, generator=torch.Generator().manual_seed(1))

    def packed(device: str) -> tuple[Any, Any]:
        weight = bnb.nn.Params4bit(
            dense.to(torch.bfloat16).clone(), requires_grad=False, compress_statistics=True, quant_type="nf4"
        ).to(device)
        back = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        return weight.data.reshape(-1).cpu(), back.float().cpu()

    (here, back), (there, other) = packed("cpu"), packed(bench.device)
    yield Law("share of packed bytes that the processor packs otherwise", float((here != there).float().mean()), 1e-3)
    yield Law("weights unpacked on the device beside the processor's, share of their spread", apart(other, back), 0.3)


def of_memory(bench: Bench) -> Iterator[Law]:
    """Where memory runs out a batch is divided, and the loss is what it was; not of a processor."""
    if bench.device == "cpu":
        return
    import torch

    def step(name: str) -> tuple[list[float], list[str], int, int]:
        adapted = bench.adapted()
        bench.rows = many
        trainer = bench.trainer(adapted, name, max_steps=1, per_device_train_batch_size=len(many), chunked_loss=False)
        gc.collect()
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        if room:
            whole = torch.cuda.get_device_properties(bench.device).total_memory
            torch.cuda.set_per_process_memory_fraction((held + room) / whole, bench.device)
        trainer.train()
        losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        return losses, trainer.remarks, held, torch.cuda.max_memory_reserved()

    rows, many, room = bench.rows, bench.rows * 16, 0
    try:
        wanted, _, held, peak = step("roomy")
        gc.collect()
        room = int(0.7 * (peak - held))
        found, remarks, _, _ = step("narrow")
    finally:
        bench.rows = rows
        torch.cuda.set_per_process_memory_fraction(1.0, bench.device)
    if not any("memory ran out" in remark for remark in remarks):
        raise RuntimeError(f"memory did not run out at {room:,} bytes beside the model")
    yield Law("loss of a batch divided for want of memory, relative", relative(found, wanted), COARSE)


LAWS: Mapping[str, Callable[[Bench], Iterator[Law]]] = {
    "run": of_a_run,
    "levers": of_levers,
    "matmuls": of_matmuls,
    "packing": of_packing,
    "memory": of_memory,
}


def told(request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Every law of a strategy, as plain data."""
    import torch

    found: list[Law] = []
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # resumed runs are compared bit for bit
    try:
        for name, laws in LAWS.items():
            place = folder / name
            place.mkdir()
            try:
                found.extend(laws(Bench(request, place)))  # what came before a fault stays
            except Exception as fault:  # whatever breaks a law off, the next one is looked at
                told_so = " ".join(f"{type(fault).__name__}: {fault}".split())[:300]
                found.append(Law(f"{name}: broke off", math.inf, 0, told_so))
            gc.collect()
            if request["device"] != "cpu":
                torch.cuda.empty_cache()
    finally:
        torch.use_deterministic_algorithms(before)
    return {"laws": [{**asdict(law), "figure": str(law.figure), "holds": law.holds} for law in found]}
