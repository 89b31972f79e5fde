"""How long a command takes before it does anything: `import adapters`, `--help`, `inspect`, beside `import peft`.

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
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def main() -> None:
    """Take turns and print medians."""
    import adapters
    from adapters.quickstart import backbone

    with tempfile.TemporaryDirectory() as scratch:
        folder = str(adapters.save(adapters.adapt(backbone(), labels=["a", "b"]), Path(scratch) / "adapter"))
        what = {
            "python -c pass": ["-c", "pass"],
            "import adapters": ["-c", "import adapters"],
            "adapters --help": ["-m", "adapters", "--help"],
            "adapters inspect": ["-m", "adapters", "inspect", folder],
            "import peft": ["-c", "import peft"],
        }
        found: dict[str, list[float]] = {name: [] for name in what}
        for _ in range(ROUNDS):
            for name, arguments in what.items():
                found[name].append(seconds(arguments))
    print("| process | seconds, median | fastest | slowest |\n|---|---|---|---|")
    for name, values in found.items():
        print(f"| `{name}` | {median(values):.3f} | {min(values):.3f} | {max(values):.3f} |")


if __name__ == "__main__":
    main()
