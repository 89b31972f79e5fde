"""How long a command takes before it does anything: `import adapters`, `--help`, `inspect`, beside `import peft`.

Then two small jobs from the start of the process to its end, a merge and one answer, the latter beside the same process
with bitsandbytes imported, as `import peft` does.

python -m benchmarks.startup
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROUNDS = 11


def seconds(arguments: list[str]) -> float:
    """Wall seconds of one process."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin


def measure(rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Wall seconds of each kind of process, taking turns."""
    import adapters
    from adapters.quickstart import backbone

    with tempfile.TemporaryDirectory() as scratch:
        folder = str(adapters.save(adapters.adapt(backbone(), labels=["a", "b"]), Path(scratch) / "adapter"))
        merge = f"import adapters; adapters.merge_on_disk({folder!r}, {scratch + '/merged'!r}, check_logits=False)"
        answer = f"import adapters; adapters.predict(adapters.load({folder!r}), ['one text'])"
        what = {
            "python -c pass": ["-c", "pass"],
            "import adapters": ["-c", "import adapters"],
            "adapters --help": ["-m", "adapters", "--help"],
            "adapters inspect": ["-m", "adapters", "inspect", folder],
            "import torch": ["-c", "import torch"],
            "import peft": ["-c", "import peft"],
            "adapters.merge_on_disk": ["-c", merge],
            "adapters.load and predict": ["-c", answer],
            "the same after import bitsandbytes": ["-c", f"import bitsandbytes; {answer}"],
        }
        found: dict[str, list[float]] = {name: [] for name in what}
        for _ in range(rounds):
            for name, arguments in what.items():
                found[name].append(seconds(arguments))
    return found


def main() -> None:
    """Print medians."""
    found = measure()
    print("| process | seconds, median | fastest | slowest |\n|---|---|---|---|")
    for name, values in found.items():
        print(f"| `{name}` | {median(values):.3f} | {min(values):.3f} | {max(values):.3f} |")


if __name__ == "__main__":
    main()
