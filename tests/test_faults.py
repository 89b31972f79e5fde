"""The benchmark of faults at its smallest, so that it stays able to find what it looks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
POSSIBLE = sys.platform == "linux" and os.uname().machine == "x86_64"
WATCHED = pytest.mark.skipif(not POSSIBLE, reason="system calls are watched on Linux, x86-64, alone")
WATCHING = ("writes", "folders")  # parts that watch them


def results_in(folder: Path) -> list[dict[str, object]]:
    """What the runs in a folder have found."""
    results = folder / "results.jsonl"
    return [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []


def quick(parts: str, folder: Path) -> tuple[subprocess.CompletedProcess[str], list[dict[str, object]]]:
    """A quick run of some parts in a process of its own, which forks: nothing else may have run in it."""
    command = [sys.executable, "-m", "benchmarks.faults", "--quick", "--only", parts]
    command += ["--results", str(folder / "results.jsonl"), "--folder", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    return done, results_in(folder)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """All parts that can be measured here, in one run, and its folder."""
    folder = tmp_path_factory.mktemp("faults")
    return quick("kills,states,flips" + (",".join(("", *WATCHING)) if POSSIBLE else ""), folder)[0], folder


@pytest.mark.slow
@pytest.mark.parametrize("part", ["kills", "states", "flips", *(pytest.param(p, marks=WATCHED) for p in WATCHING)])
def test_ours_stands_every_fault(part: str, measured: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, folder = measured
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"### {part}" in done.stdout
    for side in ("ours", "plain"):
        assert any((result["part"], result["side"]) == (part, side) for result in results_in(folder))


@pytest.mark.slow
def test_a_run_of_the_benchmark_goes_on_where_it_stopped(
    measured: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    _, folder = measured
    first = results_in(folder)
    assert first
    assert quick("flips", folder)[1] == first


def test_what_ours_may_not_come_to_is_counted_and_ends_with_a_status(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    lines = [
        {"part": "flips", "side": side, "case": "made up", "group": "JSON files", "faults": 3, "counts": counts}
        | {"words": {}, "machine": "m", "versions": "v"}
        for side, counts in (("ours", {"refused": 2, "loads otherwise, SILENT": 1}), ("plain", {"refused": 3}))
    ]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "benchmarks.faults", "--table", "--results", str(results)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "1 results of ours are not what they should be" in done.stderr
    assert "| JSON files | ours | 3 | 2 | 1 |" in done.stdout
    assert "| JSON files | peft + transformers | 3 | 3 | 0 |" in done.stdout


STORY = """
import os, sys
from pathlib import Path
from benchmarks.faults_trace import CHANGES, Fault, watch, watched
folder, number, mode = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
fault = Fault(folder, number, mode)
process = os.fork()
if not process:
    watched(CHANGES)
    try:
        with (folder / "file").open("wb", buffering=0) as stream:
            told = stream.write(b"12345678")
            os.fsync(stream.fileno())
        (folder / "file").rename(folder / "other")
        os._exit(told)
    except OSError as found:
        os._exit(found.errno + 100)
status = watch(process, fault)
print(os.waitstatus_to_exitcode(status), ",".join(fault.seen), sorted(e.name for e in folder.iterdir()))
"""


@WATCHED
@pytest.mark.parametrize(
    ("number", "mode", "told"),
    [
        (9, "EIO", "8 openat,write,fsync,rename ['other']"),
        (1, "ENOSPC", "128 openat []"),
        (2, "EIO", "105 openat,write ['file']"),
        (2, "short", "4 openat,write,fsync,rename ['other']"),
        (3, "EIO", "105 openat,write,fsync ['file']"),
        (4, "ENOSPC", "128 openat,write,fsync,rename ['file']"),
        (4, "kill", "-9 openat,write,fsync,rename ['file']"),
    ],
)
def test_the_call_that_is_to_fail_fails(number: int, mode: str, told: str, tmp_path: Path) -> None:
    folder = tmp_path / "watched"
    folder.mkdir()
    command = [sys.executable, "-c", STORY, str(folder), str(number), mode]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == told
