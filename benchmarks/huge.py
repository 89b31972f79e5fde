"""A checkpoint far larger than memory: adapted, merged, packed to 4 bits and exported, with the memory that each takes.

The checkpoint is made here, shard by shard, in the shape of a large Llama, and nothing of it is ever held whole. Each
step is a process of its own. Its memory is counted twice: the highest resident size above the imports (VmHWM), in which
pages of mapped files count although the system may take them back at any time, and the highest anonymous memory
(RssAnon, looked at 200 times a second), which nobody can take back. What was written is read again at random rows and
compared with W + s B A in float64.

    python -m benchmarks.huge --place DIR                  # 31 GB; --gigabytes N for another size
    python -m benchmarks.huge --place DIR --sparse         # mostly holes, which take no room on the disk
    python -m benchmarks.huge --place DIR --only adapt,merge
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

from benchmarks.harness import in_child, say, serve

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, GROUPS = 8192, 28672, 128256, 64, 8  # of Llama 3 with 70 billion weights
SHARD = 4_000_000_000  # bytes of a shard of the checkpoint, about
FILLED = 64  # of a sparse checkpoint every so manieth row has values
SAMPLED = 4  # rows of each tensor that are compared
STEPS: Mapping[str, str] = {
    "adapt": "adapters.adapt(folder), save",
    "merge": "adapters.merge_on_disk, no logits check",
    "checked": "the logits check of it",
    "nf4": "adapters.merge_on_disk(quantization='nf4')",
    "peft": "adapters.export(to='peft')",
    "gguf": "adapters.export(to='llama.cpp')",
}


# ---------------------------------------------------------------------- the checkpoint


def shape(gigabytes: float) -> dict[str, Any]:
    """Settings of a Llama in bf16 of about this size, as wide as the large ones; narrower below 8 GB."""
    narrow = 1 if gigabytes >= 8 else 8
    hidden, intermediate, vocabulary = HIDDEN // narrow, INTERMEDIATE // narrow, VOCABULARY // narrow
    block = (
        hidden * hidden * (2 + 2 * GROUPS // HEADS) + hidden * hidden // HEADS * GROUPS * 2 + 3 * hidden * intermediate
    )
    blocks = max(2, round((gigabytes * 1e9 / 2 - 2 * vocabulary * hidden) / block))
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "num_hidden_layers": blocks,
        "num_attention_heads": HEADS // narrow,
        "num_key_value_heads": GROUPS // min(narrow, GROUPS),
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def tensors(settings: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order of the files."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**settings))
    for name, parameter in model.named_parameters():
        yield name, tuple(parameter.shape)


def make(base: Path, gigabytes: float, *, sparse: bool) -> int:
    """The checkpoint, written a few megabytes at a time; gives the bytes of its tensors."""
    import torch
    from transformers import LlamaConfig

    from adapters import shards
    from benchmarks.merging import _tokenizer

    base.mkdir(parents=True)
    settings = shape(gigabytes)
    files: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, size in tensors(settings):
        count = shards.nbytes("bfloat16", size)
        if files[-1] and filled + count > SHARD:
            files.append([])
            filled = 0
        files[-1].append((name, size))
        filled += count
    noise = shards.tensor_bytes(torch.randn(16 << 20, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16())
    ones = shards.tensor_bytes(torch.ones(settings["hidden_size"], dtype=torch.bfloat16))
    weight_map: dict[str, str] = {}
    total = 0
    for number, part in enumerate(files, 1):
        file = base / f"model-{number:05}-of-{len(files):05}.safetensors"
        entries = {name: ("bfloat16", size, shards.nbytes("bfloat16", size)) for name, size in part}
        header = shards.header_bytes(entries, {"format": "pt"})
        with file.open("xb", buffering=0) as stream:
            stream.truncate(len(header) + sum(count for _, _, count in entries.values()))
            shards.write_at(stream.fileno(), memoryview(header), 0)
            for name, slot in shards.read_header(file)[0].items():
                weight_map[name] = file.name
                total += slot.nbytes
                if len(slot.shape) == 1:
                    shards.write_at(stream.fileno(), ones, slot.start)
                    continue
                row = slot.nbytes // slot.shape[0]
                start = zlib.crc32(name.encode()) % (len(noise) // 2) & ~1
                step, length = (FILLED * row, row) if sparse else (len(noise) - start, len(noise) - start)
                for at in range(0, slot.nbytes, step):
                    length = min(length, slot.nbytes - at)
                    begin = start + (at // row * 2 % 65536 if sparse else 0)
                    shards.write_at(stream.fileno(), noise[begin : begin + length], slot.start + at)
            os.fsync(stream.fileno())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (base / shards.INDEX).write_text(json.dumps(index, indent=2))
    LlamaConfig(**settings, architectures=["LlamaForCausalLM"]).save_pretrained(base)
    _tokenizer().save_pretrained(base)
    return total


# ---------------------------------------------------------------------- one step, in a process of its own


def step(request: dict[str, Any], _: Path) -> dict[str, Any]:
    """What a child does, and the memory that it took."""
    import torch

    import adapters

    for name in adapters.__all__:
        getattr(adapters, name)
    import transformers

    transformers.LlamaForCausalLM  # noqa: B018  # loaded when it is named
    base, adapter, out = request["base"], request["adapter"], request["out"]
    before = status("VmHWM")
    began = time.perf_counter()
    with Anonymous() as anonymous:
        found = _act(request["step"], base, adapter, out)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "resident": status("VmHWM") - before,
        "anonymous": anonymous.bytes,
        "threads": torch.get_num_threads(),
        **found,
    }


def _act(name: str, base: str, adapter: str, out: str) -> dict[str, Any]:
    import torch

    import adapters

    if name == "adapt":
        adapted = adapters.adapt(base, "lora", task="causal-lm", r=16, target_modules="all-linear")
        parameters = dict(adapted.model.named_parameters())
        with torch.no_grad():
            for each in adapted.trained:
                parameters[each].normal_(std=0.02)
        adapters.save(adapted, adapter)
        return {}
    if name == "checked":
        from adapters.fidelity import compare

        return {"report": compare(adapter, out, base, None)}
    if name in ("peft", "gguf"):
        target = {"peft": "peft", "gguf": "llama.cpp"}[name]
        return {"report": adapters.export(adapter, out, to=target, base=base, check=False).to_json()}
    form = "nf4" if name == "nf4" else None
    found = adapters.merge_on_disk(adapter, out, base=base, check_logits=False, quantization=form, accept=True)
    return {"report": found.to_json()}


@final
class Anonymous:
    """The most anonymous memory of this process within a `with`, above what it had; the kernel keeps no mark of it."""

    def __enter__(self) -> Anonymous:
        self.first = self.most = status("RssAnon")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.001):
            self.most = max(self.most, status("RssAnon"))

    @property
    def bytes(self) -> int:
        """What came on top."""
        return self.most - self.first


def status(field: str) -> int:
    """A field of this process's status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) << 10


# ---------------------------------------------------------------------- what was written


def verified(base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """Random rows of every tensor against W + s B A in float64.

    A value may be half a unit of bfloat16 away, and what float32 rounds on the way: some units of its own of the terms
    that are summed, which counts where they cancel.

    Returns:
        How many rows were compared, how many of them are edited, and the largest distance over what it may be.
    """
    import torch
    from safetensors import safe_open

    from adapters import shards

    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    generator = torch.Generator().manual_seed(1)
    sources, results = shards.read_directory(base), shards.read_directory(out)
    if sources.keys() != results.keys():
        raise SystemExit("other tensors were written than there were")
    rows, farthest, edited = 0, 0.0, 0
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        keys = set(file.keys())
        for name, slot in sources.items():
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            for row in torch.randint(0, slot.shape[0], (SAMPLED,), generator=generator).tolist():
                wanted, new = (_row(each[name], row).double() for each in (sources, results))
                terms = torch.zeros_like(wanted)
                if f"{stem}.lora_A.weight" in keys:
                    a = file.get_tensor(f"{stem}.lora_A.weight").double()
                    b = file.get_slice(f"{stem}.lora_B.weight")[row : row + 1].double()
                    terms = wanted.abs() + scale * (b.abs() @ a.abs())[0]
                    wanted = wanted + scale * (b @ a)[0]
                    edited += 1
                unit = torch.exp2(torch.floor(torch.log2(wanted.abs().clamp_min(1e-30))) - 7)
                allowed = unit / 2 + 4 * 2**-24 * terms
                farthest = max(farthest, float(((new - wanted).abs() / allowed).max()))
                rows += 1
    return {"rows": rows, "edited rows": edited, "farthest, of what it may be": farthest}


def _row(slot: Any, row: int) -> Any:
    """One row of a tensor on disk."""
    from adapters import shards

    width = slot.nbytes // slot.shape[0]
    entry = slot.shape[1:] or (1,)
    return shards.read_tensor(shards.Slot(slot.file, slot.dtype, entry, slot.start + row * width, width))


# ---------------------------------------------------------------------- the command


def main() -> int:
    """Make, run every step that was asked for, print a table, delete."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.huge", description=__doc__)
    parser.add_argument("--place", type=Path, required=True, help="a folder with room; what is made in it goes again")
    parser.add_argument("--gigabytes", type=float, default=31.0, help="of the checkpoint, in bf16 (31)")
    parser.add_argument("--sparse", action="store_true", help="one row of 64 has values; the others are holes")
    parser.add_argument("--only", default=",".join(STEPS), help=f"of {', '.join(STEPS)}")
    parser.add_argument(
        "--keep", action="store_true", help="leave what was made, and take it where it is there already"
    )
    asked = parser.parse_args()
    root: Path = asked.place / "huge"
    base, adapter = root / "base", root / "adapter"
    try:
        if not base.exists():
            began = time.perf_counter()
            total = make(base, asked.gigabytes, sparse=asked.sparse)
            say(f"made {total / 1e9:.2f} GB in {time.perf_counter() - began:.0f} s")
        total = json.loads((base / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
        print(f"| step ({total / 1e9:.1f} GB of tensors) | seconds | GB/s | resident, MB | anonymous, MB |")
        print("| --- | --- | --- | --- | --- |", flush=True)
        for name in asked.only.split(","):
            out = root / ("merge" if name == "checked" else name)
            request = {"step": name, "base": str(base), "adapter": str(adapter), "out": str(out)}
            found = in_child("benchmarks.huge", request)
            print(
                f"| {STEPS[name]} | {found['seconds']:.0f} | {total / 1e9 / found['seconds']:.2f} "
                f"| {found['resident'] / 1e6:.0f} | {found['anonymous'] / 1e6:.0f} |",
                flush=True,
            )
            say(json.dumps(found))
            if name == "merge":
                say(json.dumps(verified(base, adapter, out)))
            elif name not in ("adapt", "checked") and not asked.keep:
                shutil.rmtree(out)
    finally:
        if not asked.keep:
            shutil.rmtree(root, ignore_errors=True)
    return 0


if __name__ == "__main__":
    if len(sys.argv) == 2 and (Path(sys.argv[1]) / "request.json").is_file():
        serve(step)
    else:
        sys.exit(main())
