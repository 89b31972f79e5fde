"""How much memory a device has: by its name, by a number with a unit, or this machine's own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, final

from adapters.errors import RequestError, message, nearest

MIB: Final = 1 << 20
# Name -> MiB that its driver reports (vendors' data sheets; a "24 GB" card has 24564), and whether it multiplies
# bfloat16 natively.
CARDS: Final[dict[str, tuple[int, bool]]] = {
    "gtx 1080 ti": (11264, False),
    "rtx 2080 ti": (11264, False),
    "rtx 3060": (12288, True),
    "rtx 3070": (8192, True),
    "rtx 3080": (10240, True),
    "rtx 3090": (24576, True),
    "rtx 4060": (8188, True),
    "rtx 4060 ti 16gb": (16380, True),
    "rtx 4070": (12282, True),
    "rtx 4080": (16376, True),
    "rtx 4090": (24564, True),
    "rtx 5070": (12227, True),
    "rtx 5080": (16303, True),
    "rtx 5090": (32607, True),
    "rtx a4000": (16376, True),
    "rtx a5000": (24564, True),
    "rtx a6000": (49140, True),
    "rtx 6000 ada": (49140, True),
    "rtx pro 6000": (97887, True),
    "t4": (15360, False),
    "p100": (16384, False),
    "v100": (16384, False),
    "v100 32gb": (32768, False),
    "l4": (23034, True),
    "l40s": (46068, True),
    "a10": (23028, True),
    "a10g": (23028, True),
    "a30": (24576, True),
    "a40": (46068, True),
    "a100": (40960, True),
    "a100 80gb": (81920, True),
    "h100": (81559, True),
    "h200": (143771, True),
    "b200": (183359, True),
    "mi210": (65520, True),
    "mi300x": (196592, True),
}
UNITS: Final = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
CONTEXT: Final = 600 * MIB  # what a GPU's driver, its libraries and their kernels take beside all tensors


@final
@dataclass(frozen=True)
class Device:
    """Where a model is to train.

    Attributes:
        name: as people say it.
        kind: "cuda" or "cpu".
        bytes: of memory; None where nobody said.
        bfloat16: it multiplies bfloat16 natively.
    """

    name: str
    kind: str
    bytes: int | None
    bfloat16: bool

    @property
    def room(self) -> int | None:
        """Bytes that tensors may take: of a GPU without what its driver takes."""
        if self.bytes is None:
            return None
        return max(0, self.bytes - (CONTEXT if self.kind == "cuda" else 0))


def size(text: str | float, where: str = "memory") -> int:
    """Bytes of "24GB", "22.5 GiB", or of a number of GB (10^9 bytes).

    Raises:
        RequestError: anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    unit = (found[2] or "gb") if found else ""
    unit = {"g": "gb", "m": "mb", "t": "tb"}.get(unit, unit)
    if found is None or unit not in UNITS or isinstance(text, bool) or not float(found[1]):
        remedy = "Say 24GB (10^9 bytes) or 24GiB (2^30 bytes)."
        raise RequestError(message("not an amount of memory", where=where, found=repr(text), remedy=remedy))
    return round(float(found[1]) * UNITS[unit])


def device(name: str | None = None, memory: str | float | None = None) -> Device:
    """The device of a plan.

    Args:
        name: a card ("rtx 4090", "a100-80gb"), "cuda" for the one in this machine, "cpu" for this machine's memory;
            None for "cuda" where there is one, else "cpu"; with `memory` alone, a GPU of that size.
        memory: of it, where that is known better.

    Raises:
        RequestError: an unknown name, a GPU that is not there, no amount of memory.
    """
    given = size(memory) if memory is not None else None
    if name is None and given is not None:
        return Device(f"{memory} GPU" if isinstance(memory, str) else f"{memory} GB GPU", "cuda", given, True)
    plain = re.sub(r"[\s_-]+", " ", name.lower()).strip() if name is not None else here()
    plain = re.sub(r"^(nvidia|geforce|tesla|amd|instinct|quadro) ", "", re.sub(r"^nvidia ", "", plain))
    plain = re.sub(r"(\d) gb$", r"\1gb", plain)
    if plain in ("cpu", "ram"):
        return Device("cpu", "cpu", given or _memory(), _cpu_bfloat16())
    if plain in ("cuda", "gpu"):
        return _present(given)
    for spelt in (
        plain,
        re.sub(r" \d+gb$", "", plain),
        f"rtx {plain}",
        plain.removesuffix(" sxm").removesuffix(" pcie"),
    ):
        card = CARDS.get(spelt)
        if card is not None and _said(plain, card[0]):
            return Device(spelt, "cuda", given or card[0] * MIB, card[1])
    remedy = f"{nearest(plain, [*CARDS, 'cpu', 'cuda'])} Or say memory='24GB'."
    raise RequestError(message(f"unknown device {name!r}", where="device", expected=_all(), remedy=remedy))


def _all() -> str:
    return f"one of {', '.join(CARDS)}, cuda, cpu"


def _said(name: str, mib: int) -> bool:
    """Whether a size in a card's name is its size, give or take a tenth."""
    found = re.search(r" (\d+)gb$", name)
    return found is None or abs(int(found[1]) * 1024 - mib) < 0.1 * mib


def here() -> str:
    """Where a run on this machine would compute: "cuda" or "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _present(given: int | None) -> Device:
    import torch

    if not torch.cuda.is_available():
        raise RequestError(
            message("there is no GPU in this machine", where="device", remedy="Name the card: device='rtx 4090'.")
        )
    found = torch.cuda.get_device_properties(0)
    native = bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return Device(str(found.name), "cuda", given or int(found.total_memory), native)


def _memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _cpu_bfloat16() -> bool:
    import torch

    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def started() -> list[int]:
    """The numbers of the GPUs that this process has begun to use: a seed reaches their generators as well."""
    from torch import cuda

    return list(range(cuda.device_count())) if cuda.is_initialized() else []  # type: ignore[no-untyped-call]
