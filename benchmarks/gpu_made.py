"""What the GPU benchmark runs on: checkpoints and rows made here, and what the device is and can do."""

from __future__ import annotations

import platform
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import harness, made

DTYPE = "bfloat16"
SEED = 0


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes, and how much of it a run reads.

    Attributes:
        width, inner, blocks, heads, groups, vocabulary: of the model; groups are its key and value heads.
        tied: embeddings and output layer are one matrix.
        length: tokens of a row.
        rows: of a batch, at most; `batch` takes fewer where the device is small.
        each: gigabytes of device memory for a row of a batch, about, beside the weights.
    """

    width: int
    inner: int
    blocks: int
    heads: int
    groups: int
    vocabulary: int
    tied: bool
    length: int
    rows: int
    each: float

    @property
    def weights(self) -> float:
        """Gigabytes of the checkpoint, in bfloat16."""
        head = self.width // self.heads
        block = self.width * (2 * self.width + 2 * self.groups * head + 3 * self.inner)
        return 2e-9 * (self.blocks * block + (1 if self.tied else 2) * self.vocabulary * self.width)

    def batch(self, gigabytes: float) -> int:
        """Rows of a batch on a device of this much memory."""
        return max(1, min(self.rows, int((gigabytes - self.weights) / self.each)))


SHAPES: Mapping[str, Shape] = {
    "tiny": Shape(64, 128, 2, 2, 1, 4096, False, 64, 2, 0.1),
    "law": Shape(512, 1408, 4, 8, 2, 4096, False, 128, 8, 0.1),
    "1b": Shape(2048, 8192, 16, 32, 8, 128_256, True, 2048, 8, 6.0),  # as Llama 3.2 1B
    "8b": Shape(4096, 14_336, 32, 32, 8, 128_256, False, 2048, 4, 18.0),  # as Llama 3.1 8B
}


def checkpoint(name: str, device: str) -> str:
    """The folder of a Llama of a shape with random weights in bfloat16 and a tokenizer, made once, on the device."""

    def make(folder: Path) -> None:
        import torch
        import transformers

        shape = SHAPES[name]
        words = made.trained_tokenizer([row["text"] for kind in made.SETS for row in made.rows(kind, "train", 300)])
        words.save_pretrained(folder)
        config = transformers.LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.blocks,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.groups,
            max_position_embeddings=max(shape.length, 512),
            tie_word_embeddings=shape.tied,
            pad_token_id=words.pad_token_id,
            bos_token_id=words.cls_token_id,
            eos_token_id=words.sep_token_id,
        )
        torch.manual_seed(SEED)
        with torch.device(device):  # thousands of millions of draws take minutes on a processor
            auto: Any = transformers.AutoModelForCausalLM
            auto.from_config(config, dtype=getattr(torch, DTYPE)).save_pretrained(folder, max_shard_size="2GB")

    return str(made.once(f"llama-{name}", make))


def even(shape: Shape, count: int) -> Any:
    """Prepared rows of one length, of random tokens, all learnt."""
    from adapters import tokens

    draw = random.Random(SEED)
    rows = [[draw.randrange(5, shape.vocabulary) for _ in range(shape.length)] for _ in range(count)]
    return tokens.numbered({"input_ids": rows, "labels": rows})


def uneven(shape: Shape, count: int, *, packed: bool) -> Any:
    """Prepared rows of lengths like those of instructions: a quarter of the longest in the middle, half of them learnt.

    Packed, as many of them as fit stand in a block of the longest's length.
    """
    from adapters import completions, tokens

    draw = random.Random(SEED)
    rows = []
    for _ in range(count):
        size = min(shape.length, max(8, int(draw.lognormvariate(0, 0.7) * shape.length / 4)))
        ids = [draw.randrange(5, shape.vocabulary) for _ in range(size)]
        rows.append({"input_ids": ids, "labels": [-100] * (size // 2) + ids[size // 2 :]})
    if packed:
        rows, _ = completions.packed(rows, shape.length)
    return tokens.numbered({name: [row[name] for row in rows] for name in rows[0]})


# ---------------------------------------------------------------------- the device

# Dense bfloat16 products with sums in float32, in 10^12 operations a second, as NVIDIA's data sheets have them
# (of the cards for games: the Ada and Ampere white papers). The first name that the device's own contains is taken.
SHEETS: Mapping[str, float] = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A10G": 70,
    "A10": 125,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71,
    "A6000": 154.8,
}


def sheet(name: str) -> float | None:
    """What the data sheet says of a device, in operations a second; None where none is known."""
    found = next((value for known, value in SHEETS.items() if known.casefold() in name.casefold()), None)
    return None if found is None else found * 1e12


def described(device: str) -> dict[str, Any]:
    """What the device is called, its memory in GB, its power limit and driver where nvidia-smi tells, and versions."""
    import torch

    found: dict[str, Any] = {"device": harness.machine("cpu"), "memory_gb": 0.0, "versions": harness.versions()}
    if device == "cpu":
        import psutil

        return {**found, "memory_gb": psutil.virtual_memory().total / 1e9}
    facts: Any = torch.cuda.get_device_properties(device)
    more = [f"compute capability {facts.major}.{facts.minor}", f"CUDA {torch.version.cuda}"]
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
        told = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=30)
        if told.returncode == 0 and told.stdout.strip():
            driver, power, clock = (part.strip() for part in told.stdout.splitlines()[0].split(","))
            more += [f"driver {driver}", f"power limit {power}", f"{clock} at most"]
    versions = f"{found['versions']}, {platform.system()}"
    return {"device": f"{facts.name} ({', '.join(more)})", "memory_gb": facts.total_memory / 1e9, "versions": versions}


def synchronized(device: str) -> None:
    """Wait until the device has done all that it was given."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize(device)


def product_rate(device: str, dtype: str, size: int, seconds: float) -> float:
    """Operations a second of square products of random numbers: the median over about so many seconds."""
    import torch

    kind = getattr(torch, dtype)
    left, right = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    out = torch.empty_like(left)

    def once(times: int) -> float:
        synchronized(device)
        begin = time.perf_counter()
        for _ in range(times):
            torch.mm(left, right, out=out)
        synchronized(device)
        return (time.perf_counter() - begin) / times

    once(3)
    times = max(1, int(0.05 / max(once(1), 1e-6)))
    return 2 * size**3 / median(_until(seconds, lambda: once(times)))


def _until(seconds: float, act: Callable[[], float]) -> list[float]:
    end = time.perf_counter() + seconds
    found = [act(), act(), act()]
    while time.perf_counter() < end:
        found.append(act())
    return found


def rates(device: str) -> dict[str, float]:
    """What the device multiplies at, by dtype, and how fast bytes come from it to the processor's memory."""
    import torch

    large = device != "cpu"
    found = {
        dtype: product_rate(device, dtype, 8192 if large else 256, 2.0 if large else 0.1)
        for dtype in ("bfloat16", "float32")
    }
    some = torch.empty((1 << 28) if large else (1 << 20), dtype=torch.uint8, device=device)
    synchronized(device)
    begin = time.perf_counter()
    some.cpu()
    return {**found, "bytes_to_host": some.numel() / (time.perf_counter() - begin)}
