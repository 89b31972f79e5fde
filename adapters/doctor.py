"""What is wrong with this machine's installation: versions, abilities, disk, caches, environment; nothing is changed.

Whatever could crash (torch, CUDA, bitsandbytes) is tried in a process of its own, whose end is a finding.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from adapters import processes
from adapters.places import cache_folder

DISTRIBUTION = "holdfast"
LEVELS = ("ok", "note", "fault")
LEAST_FREE = 2 << 30  # bytes on a disk, below which a run may not end
PATIENCE = 180  # seconds for one trial
# Extras for users: what each is for. Those of developers are not asked after.
EXTRAS = {
    "qlora": "4 bits (quantization, qlora)",
    "vision": "pictures",
    "quickstart": "the quickstart's model",
    "translation": "BLEU, chrF and ROUGE",
    "tagging": "F1 over entities",
    "report": "reports",
    "sweep": "sweeps by optuna",
    "onnx": "export to ONNX and int8",
    "gguf": "export to llama.cpp",
    "deepspeed": "runs on DeepSpeed",
}
# Variables that change what a run computes or where it looks -> what they do.
VARIABLES = {
    "HF_HUB_OFFLINE": "nothing is downloaded",
    "TRANSFORMERS_OFFLINE": "nothing is downloaded",
    "HF_ENDPOINT": "another hub than huggingface.co",
    "HF_HOME": "where models and data sets are kept",
    "HF_HUB_CACHE": "where models are kept",
    "HF_DATASETS_CACHE": "where data sets are kept",
    "XDG_CACHE_HOME": "where caches lie, kept states among them",
    "CUDA_VISIBLE_DEVICES": "which GPUs are seen",
    "CUBLAS_WORKSPACE_CONFIG": "whether sums on a GPU are repeatable",
    "NVIDIA_TF32_OVERRIDE": "the precision of products on a GPU",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "the precision of products on a GPU",
    "PYTORCH_CUDA_ALLOC_CONF": "how GPU memory is divided",
    "PYTORCH_ALLOC_CONF": "how GPU memory is divided",
    "OMP_NUM_THREADS": "threads of a CPU run, and with them the order of its sums",
    "MKL_NUM_THREADS": "threads of a CPU run, and with them the order of its sums",
    "ONEDNN_DEFAULT_FPMATH_MODE": "the precision of products on a CPU",
    "ONEDNN_MAX_CPU_ISA": "which instructions a CPU run takes",
    "ATEN_CPU_CAPABILITY": "which instructions a CPU run takes",
    "ACCELERATE_MIXED_PRECISION": "the precision of training",
    "ACCELERATE_USE_CPU": "the device",
    "ACCELERATE_USE_FSDP": "how a model is divided over GPUs",
    "ACCELERATE_USE_DEEPSPEED": "how a model is divided over GPUs",
    "WORLD_SIZE": "how many processes train",
    "TORCHDYNAMO_DISABLE": "whether anything is compiled",
    "WANDB_DISABLED": "whether wandb is logged to",
    "PYTHONPATH": "which packages are found first",
}

TORCH = """
import json, torch
found = {"version": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads(), "gpus": []}
if torch.cuda.is_available():
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        one = torch.ones(64, 64, device=f"cuda:{number}", dtype=torch.float16)
        assert float((one @ one)[0, 0]) == 64
        found["gpus"].append({"name": torch.cuda.get_device_name(number), "bytes": total, "free": free,
            "capability": list(torch.cuda.get_device_capability(number)), "bf16": torch.cuda.is_bf16_supported()})
found["mps"] = torch.backends.mps.is_available()
one = torch.ones(64, 64, dtype=torch.bfloat16)
assert float((one @ one)[0, 0]) == 64
told = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
import torch.distributed as dist
found["groups"] = []
if dist.is_available():
    if dist.is_gloo_available():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        dist.barrier()
        dist.destroy_process_group()
        found["groups"].append("gloo")
    if found["gpus"] and dist.is_nccl_available():
        found["groups"].append("NCCL")
found["cpu_bf16"] = bool(told and told()) or bool(amx and amx())
print(json.dumps(found))
"""
BITSANDBYTES = """
import json, torch, bitsandbytes
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
found = {"version": bitsandbytes.__version__, "devices": []}
for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    packed, state = quantize_4bit(weight, quant_type="nf4")
    error = float((dequantize_4bit(packed, state) - weight).abs().mean())
    assert error < 0.2, f"4 bits on {device} are off by {error}"
    found["devices"].append(device)
print(json.dumps(found))
"""
# What a run imports of each package: where packages do not go together, it shows there.
IMPORTED = {
    "transformers": "from transformers import AutoModel, Trainer; print('{}')",
    "peft": "import peft; print('{}')",
    "datasets": "import datasets; print('{}')",
    "accelerate": "import accelerate; print('{}')",
}


@final
@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: "python", "packages", "torch", "launch", "disk", "caches", "environment", "hub".
        name: what it is about.
        level: "ok", "note" (worth knowing) or "fault" (something will not work).
        said: what was found.
        remedy: what to do; empty where there is nothing to.
    """

    topic: str
    name: str
    level: str
    said: str
    remedy: str = ""


def diagnose(*, online: bool = False, trials: bool = True) -> list[Finding]:
    """Look at everything.

    Args:
        online: ask the hub whether it answers.
        trials: try torch, bitsandbytes and the packages around them in processes of their own, which takes seconds.
    """
    found = [*versions(), *clashes()]
    gpus: int | None = None
    if trials:
        found += _tried(found)
        gpus = sum(finding.topic == "torch" and finding.name == "gpu" and finding.level == "ok" for finding in found)
    found += launched(gpus)
    found += [*_disks(), *_caches(), *environment(os.environ)]
    if online:
        found.append(_hub())
    return found


def exit_code(found: list[Finding]) -> int:
    """2 where something will not work, else 0."""
    return 2 if any(finding.level == "fault" for finding in found) else 0


def lines(found: list[Finding]) -> list[str]:
    """For people: a line a finding, its remedy below it, and the sum."""
    made = []
    topic = ""
    for finding in found:
        if finding.topic != topic:
            topic = finding.topic
            made.append(f"{topic}")
        mark = {"ok": "ok   ", "note": "note ", "fault": "FAULT"}[finding.level]
        made.append(f"  {mark}  {finding.name:<22}{finding.said}")
        if finding.remedy:
            made.append(f"{'':31}{finding.remedy}")
    faults = sum(finding.level == "fault" for finding in found)
    made.append(f"{faults or 'no'} fault{'' if faults == 1 else 's'}, {sum(f.level == 'note' for f in found)} notes")
    return made


# ---------------------------------------------------------------------- versions


def requirements() -> tuple[list[str], str]:
    """What the installed package asks for, as its metadata says it, and the Python that it asks for.

    From pyproject.toml where the package runs from a checkout that is not installed.
    """
    file = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if file.is_file():  # a checkout's own, which may be newer than what was installed from it
        project: Mapping[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        if project.get("name") == DISTRIBUTION:
            listed = list(project["dependencies"])
            for extra, entries in project.get("optional-dependencies", {}).items():
                listed += [f'{entry} ; extra == "{extra}"' for entry in entries]
            return listed, str(project["requires-python"])
    metadata = importlib.metadata.metadata(DISTRIBUTION)
    return list(importlib.metadata.requires(DISTRIBUTION) or []), str(metadata["Requires-Python"])


def versions(wanted: list[str] | None = None, python: str | None = None) -> Iterator[Finding]:
    """Python and every package against the ranges that were tried.

    Args:
        wanted: requirements in pip's form; None for the package's own.
        python: the range of Python; None for the package's own.
    """
    try:
        from packaging.requirements import Requirement
        from packaging.specifiers import SpecifierSet
    except ImportError:
        remedy = "pip install packaging"
        yield Finding("packages", "packaging", "fault", "not installed: versions cannot be compared", remedy)
        return
    try:
        listed, range_ = requirements() if wanted is None or python is None else (wanted, python)
    except importlib.metadata.PackageNotFoundError:
        remedy = f"pip install {DISTRIBUTION}"
        yield Finding("packages", DISTRIBUTION, "fault", "not installed: nothing tells which versions it needs", remedy)
        return
    if wanted is not None:
        listed = wanted
    running = platform.python_version()
    fine = SpecifierSet(range_).contains(running, prereleases=True)
    yield Finding(
        "python",
        "python",
        "ok" if fine else "fault",
        f"{running}, needs {range_}",
        "" if fine else "Take another Python.",
    )
    for text in listed:
        need = Requirement(text)
        extra = next((name for name in EXTRAS if need.marker and f'"{name}"' in str(need.marker).replace("'", '"')), "")
        if need.marker is not None and not extra and "extra" in str(need.marker):
            continue  # a developer's
        if need.marker is not None and not need.marker.evaluate({"extra": extra}):
            continue  # another system's
        yield _version(need, extra)


def _version(need: Any, extra: str) -> Finding:
    """One package against its range."""
    what = f"{need.name}{need.specifier}"
    pip = f"pip install {json.dumps(what)}"
    try:
        version = importlib.metadata.version(need.name)
    except importlib.metadata.PackageNotFoundError:
        if extra:
            remedy = f'pip install "{DISTRIBUTION}[{extra}]"'
            return Finding("packages", need.name, "note", f"not installed; only for {EXTRAS[extra]}", remedy)
        return Finding("packages", need.name, "fault", f"not installed, needs {need.specifier}", pip)
    if need.specifier.contains(version, prereleases=True):
        return Finding("packages", need.name, "ok", f"{version} ({need.specifier or 'any'})")
    from packaging.version import Version

    lower = [Version(part.version) for part in need.specifier if part.operator in (">=", "==", "~=", ">")]
    old = bool(lower) and Version(version) < max(lower)
    said = f"{version} is too {'old' if old else 'new'}: {need.specifier} were tried"
    return Finding("packages", need.name, "fault", said, pip)


def clashes() -> Iterator[Finding]:
    """AdapterHub's `adapters` has the same import name: whichever was installed last is imported."""
    here = Path(__file__).resolve().parent
    imported: Any = sys.modules.get("adapters")
    place = Path(str(imported.__file__)).resolve().parent if imported is not None and imported.__file__ else here
    try:
        other = importlib.metadata.version("adapters")
    except importlib.metadata.PackageNotFoundError:
        yield Finding("packages", "adapters", "ok", f"imported from {place}; AdapterHub's package is not installed")
        return
    said = f"AdapterHub's adapters {other} is installed too, and both are imported as `adapters` (now from {place})"
    remedy = f"pip uninstall -y adapters && pip install --force-reinstall --no-deps {DISTRIBUTION}; or two environments"
    yield Finding("packages", "adapters", "fault", said, remedy)


# ---------------------------------------------------------------------- trials


def tried(code: str) -> tuple[dict[str, Any] | None, str]:
    """What a piece of code prints as JSON in a process of its own, or None and how the process ended."""
    try:
        child = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer within {PATIENCE} s"
    said = [line for line in child.stderr.splitlines() if line.strip()]
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name if -child.returncode in set(signal.Signals) else -child.returncode
        return None, f"the process crashed ({name}){': ' + said[-1][:200] if said else ''}"
    if child.returncode != 0:
        return None, said[-1][:300] if said else f"exit code {child.returncode}"
    try:
        document: dict[str, Any] = json.loads(child.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return None, f"it printed {child.stdout.strip()[-100:]!r}"
    return document, ""


def _tried(before: list[Finding]) -> list[Finding]:
    """Every trial, some at the same time; in the order of the table."""
    packs = not any(finding.name == "bitsandbytes" and "not installed" in finding.said for finding in before)
    trials: list[Callable[[], list[Finding]]] = [_torch, *([_packing] if packs else [])]
    trials += [functools.partial(_importable, name) for name in IMPORTED]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return [finding for found in pool.map(lambda trial: trial(), trials) for finding in found]


def _torch() -> list[Finding]:
    found, fault = tried(TORCH)
    if found is None:
        remedy = "Install torch for this machine: https://pytorch.org/get-started"
        return [Finding("torch", "torch", "fault", fault, remedy)]
    build = f"CUDA {found['cuda']}" if found["cuda"] else "no CUDA in this build"
    made = [Finding("torch", "torch", "ok", f"{found['version']}, {build}, {found['threads']} threads")]
    for gpu in found["gpus"]:
        bf16 = "bf16" if gpu["bf16"] else "no bf16: take fp16"
        said = f"{gpu['name']}, {gpu['free'] / 2**30:.1f} of {gpu['bytes'] / 2**30:.1f} GiB free, {bf16}"
        made.append(Finding("torch", "gpu", "ok", said))
    if not found["gpus"]:
        driver = shutil.which("nvidia-smi")
        remedy = "Its driver is here, torch does not see it: install torch for CUDA." if driver else ""
        said = "Apple's GPU (mps)" if found["mps"] else "none: runs take the CPU"
        made.append(Finding("torch", "gpu", "fault" if driver else "note", said, remedy))
    lacking = "gloo" not in found["groups"]
    groups = (
        "processes can form a group by " + " and ".join(found["groups"]) if found["groups"] else "no group is formed"
    )
    made.append(Finding("torch", "processes", "note" if lacking else "ok", groups))
    native = "natively" if found["cpu_bf16"] else "but slowly: no AVX512-BF16 or AMX"
    made.append(Finding("torch", "cpu", "ok", f"{os.cpu_count()} cores, multiplies bfloat16 {native}"))
    return made


def launched(gpus: int | None) -> Iterator[Finding]:
    """What a launcher has started this process as; nothing without one.

    Args:
        gpus: how many there are here; None where nobody has looked.
    """
    several = processes.count()
    if several == 1:
        return
    here = processes.here()
    said = f"{several} started, {here} of them on this machine; this is number {processes.number()}"
    crowded = bool(gpus) and here > int(gpus or 0)
    remedy = f"Start {gpus} on this machine: one a GPU." if crowded else ""
    yield Finding("launch", "processes", "fault" if crowded else "ok", said, remedy)


def _packing() -> list[Finding]:
    found, fault = tried(BITSANDBYTES)
    if found is None:
        remedy = f'pip install --force-reinstall "{DISTRIBUTION}[qlora]"; without it, leave quantization out'
        return [Finding("torch", "bitsandbytes", "fault", fault, remedy)]
    return [Finding("torch", "bitsandbytes", "ok", f"packs and unpacks 4 bits on {' and '.join(found['devices'])}")]


def _importable(name: str) -> list[Finding]:
    found, fault = tried(IMPORTED[name])
    if found is None:
        remedy = f"pip install --force-reinstall {name}"
        return [Finding("torch", name, "fault", f"does not import: {fault}", remedy)]
    return [Finding("torch", name, "ok", "imports")]


# ---------------------------------------------------------------------- places


def _cache_places() -> dict[str, Path]:
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    home = home.expanduser()
    return {
        "models": Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser(),
        "data sets": Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets").expanduser(),
        "kept states": cache_folder() / "holdfast",
    }


def _disks() -> Iterator[Finding]:
    for name, place in {"here": Path.cwd(), "temporary files": Path(os.environ.get("TMPDIR") or "/tmp")}.items():
        try:
            usage = shutil.disk_usage(place)
        except OSError as fault:
            yield Finding("disk", name, "fault", f"{place}: {fault.strerror}")
            continue
        level = "fault" if usage.free < LEAST_FREE else "ok"
        remedy = "Free some: a run needs room for its checkpoints." if level == "fault" else ""
        said = f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free in {place}"
        yield Finding("disk", name, level, said, remedy)


def _caches() -> Iterator[Finding]:
    for name, place in _cache_places().items():
        if not place.is_dir():
            yield Finding("caches", name, "ok", f"none yet, would be in {place}")
            continue
        count = size = 0
        for root, _, files in os.walk(place):
            for file in files:
                status = os.lstat(os.path.join(root, file))
                count, size = count + 1, size + status.st_size
        fine = os.access(place, os.W_OK)
        remedy = "" if fine else "It cannot be written to: change its owner, or name another."
        yield Finding(
            "caches", name, "ok" if fine else "fault", f"{size / 2**30:.2f} GiB in {count} files, {place}", remedy
        )


def environment(variables: Mapping[str, str]) -> Iterator[Finding]:
    """The variables that change what a run computes, or where it looks; nothing secret is shown."""
    for name, effect in VARIABLES.items():
        if name in variables:
            yield Finding("environment", name, "note", f"{variables[name]!r}: {effect}")


def _hub() -> Finding:
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return Finding("hub", "hub", "note", "HF_HUB_OFFLINE is set: nothing is asked", "Unset it to reach the hub.")
    try:
        with urllib.request.urlopen(f"{endpoint}/api/models?limit=1", timeout=10) as answer:
            said = f"{endpoint} answers ({answer.status})"
    except (urllib.error.URLError, OSError, ValueError) as fault:
        return Finding("hub", "hub", "fault", f"{endpoint}: {fault}", "Check the network and its proxy settings.")
    token = os.environ.get("HF_TOKEN") or (_cache_places()["models"].parent / "token").is_file()
    return Finding("hub", "hub", "ok", f"{said}; {'a token is here' if token else 'no token: public models only'}")
