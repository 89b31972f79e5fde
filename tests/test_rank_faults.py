"""A process of a run that is killed, stopped, late or at fault: the others end soon and name it, and nothing is lost.

Each fault comes from inside a process, at a moment that is the same on any machine.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from many import Ended
from warm_host import ROOT, environment

import adapters
from adapters import attendance, locks, presence, processes, ranks
from adapters.errors import FolderError, NumbersError, RankError, message

STEPS = 6

# ---------------------------------------------------------------------- processes alone


def stepping(kind: str, culprit: int, step: int) -> list[Any]:
    """Steps with a collective in each; one process comes to grief at the beginning of one of them."""
    if kind == "deaf":
        presence.GRACE = 1.0
    ranks.join(2.0 if kind in ("stop", "late", "deaf") else 60.0)
    numbers = ranks.gathered(os.getpid())
    begin = time.monotonic()
    try:
        with attendance.attending():
            for number in range(1, STEPS + 1):
                attendance.at(f"step {number}")
                if (ranks.rank(), number) == (culprit, step):
                    _come_to_grief(kind)
                time.sleep(0.1)
                dist.all_reduce(torch.ones(3))
                ranks.gathered(number)
    except RankError as fault:
        if kind == "stop":
            with contextlib.suppress(ProcessLookupError):  # the other has done it
                os.kill(numbers[culprit], signal.SIGKILL)  # as a launcher does
        return ["RankError", str(fault), time.monotonic() - begin]
    except NumbersError as fault:
        return ["NumbersError", str(fault), 0.0]
    return ["nothing", "", 0.0]


def _come_to_grief(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "late":
        time.sleep(7)
    elif kind == "deaf":
        time.sleep(1000)
    elif kind == "raise":
        raise NumbersError(message("the loss is nan", where="step 4, rows 1, 2"))


CASES = [
    ("kill", 1, "rank 1 of 3 does not answer (step 4); found rank 1 last heard of"),
    ("kill", 0, "rank 0 of 3 does not answer (step 4); found rank 0 last heard of"),  # the store dies with it
    ("stop", 2, "rank 2 of 3 does not answer (step 4); found rank 2 last heard of"),
    ("late", 1, "rank 1 of 3 did not come to where the others waited (step 4); found rank 1 last heard of"),
    ("deaf", 1, "rank 1 of 3 did not come to where the others waited (step 4); found rank 1 last heard of"),
    ("raise", 1, "rank 1 of 3 failed, and the run with it (step 4); found NumbersError: the loss is nan"),
    ("raise", 0, "rank 0 of 3 failed, and the run with it (step 4); found NumbersError: the loss is nan"),
]


@pytest.mark.parametrize(("kind", "culprit", "said"), CASES, ids=[f"{kind}-{rank}" for kind, rank, _ in CASES])
def test_the_others_name_it(kind: str, culprit: int, said: str, many: Callable[..., list[Ended]]) -> None:
    ended = many("test_rank_faults:stepping", 3, kind, culprit, 4, limit=60, fails=True)
    for rank, one in enumerate(ended):
        print(rank, one.code, one.gave, one.err[-1500:])
    for rank, one in enumerate(ended):
        if rank != culprit:
            assert one.code == 0, one.err
            name, text = one.gave[:2]
            assert name == "RankError"
            assert text.startswith(said), text
            if kind in ("kill", "stop"):
                assert "ago at step 4" in text or culprit == 0, text  # of the store's own, what was heard before
                assert "--resume" in text
    culprits = ended[culprit]
    if kind in ("kill", "stop"):
        assert culprits.code == -signal.SIGKILL
    elif kind == "deaf":
        assert culprits.code == RankError.exit_code
        assert "adapters: rank 1 of 3 did not come" in culprits.err
    elif kind == "late":
        assert culprits.gave[0] == "RankError"
        assert culprits.gave[1].startswith(said), culprits.gave
    else:
        assert culprits.gave[:2] == ["NumbersError", "the loss is nan (step 4, rows 1, 2)"]


# ---------------------------------------------------------------------- runs

SETTINGS: dict[str, Any] = {
    "max_steps": 6,
    "num_train_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 3,
}
SETTINGS |= {"per_device_train_batch_size": 2, "eval_strategy": "steps", "eval_steps": 3, "learning_rate": 1e-3}


def armed(moment: str, after: int, act: Callable[[], None]) -> None:
    """Let something happen the n-th time that a function is called.

    Args:
        moment: "module.function" or "module:Class.function".
        after: n.
        act: what happens, before the function does.
    """
    path, _, name = moment.rpartition(".")
    module, _, kind = path.partition(":")
    owner = importlib.import_module(module)
    owner = getattr(owner, kind) if kind else owner
    inner, seen = getattr(owner, name), []

    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        if len(seen) == after:
            act()
        return inner(*args, **kwargs)

    setattr(owner, name, outer)


def training(folder: str, resume: Any = None, **more: Any) -> dict[str, Any]:
    """A run of six steps that saves after each: its log without times, and its adapter."""
    adapted = adapters.adapt(tiny.model("bert"), "lora", processor=tiny.tokenizer(), labels=list(tiny.LABELS))
    given = {"output_dir": folder, "disable_tqdm": True, "report_to": "none", "logging_steps": 1, **SETTINGS, **more}
    trainer = adapters.Trainer(adapted, given, tiny.rows(22), tiny.rows(11, seed=1))
    trainer.train(resume_from_checkpoint=resume)
    timed = ("_runtime", "_per_second", "flos")
    log = [{n: v for n, v in entry.items() if not n.endswith(timed)} for entry in trainer.state.log_history]
    return {"log": log, "state": {name: tensor.tolist() for name, tensor in adapted.state().items()}}


def struck(folder: str, number: int, culprit: int, moment: str, after: int, more: dict[str, Any] | None = None) -> Any:
    """A run one of whose processes gets a signal from inside; what the others end with."""
    ranks.join(3.0 if number == signal.SIGSTOP else 60.0)
    numbers = ranks.gathered(os.getpid())
    if ranks.rank() == culprit:
        armed(moment, after, lambda: os.kill(os.getpid(), number))
    try:
        return training(folder, **(more or {}))
    except RankError as fault:
        if number == signal.SIGSTOP:
            with contextlib.suppress(ProcessLookupError):  # the other has done it
                os.kill(numbers[culprit], signal.SIGKILL)  # as a launcher does
        return str(fault)


def resumed(folders: list[str], more: dict[str, Any] | None = None) -> list[Any]:
    """Runs one after the other, each going on from what is there."""
    ranks.join(60.0)
    return [training(folder, "auto", **(more or {})) for folder in folders]


KILL, STOP, TERM = int(signal.SIGKILL), int(signal.SIGSTOP), int(signal.SIGTERM)
STEP, SAVE = "adapters.trainer:Trainer.training_step", "adapters.trainer:Trainer._save_checkpoint"
STRIKES = {  # processes, signal, whom it strikes, moment, its n-th time, the newest checkpoint then
    "another in a step": (2, KILL, 1, STEP, 4, 3),
    "the writer in a step": (3, KILL, 0, STEP, 3, 2),
    "another at a save": (2, KILL, 1, SAVE, 3, 2),
    "the writer at its first save": (2, KILL, 0, "adapters.checkpoints._seal", 1, None),
    "the writer before it seals": (2, KILL, 0, "adapters.checkpoints._seal", 3, 2),
    "the writer before it moves": (2, KILL, 0, "adapters.checkpoints._set_aside", 3, 2),
    "the writer when it rotates": (2, KILL, 0, "adapters.checkpoints._discard", 1, 4),
    "another stopped in a step": (2, STOP, 1, STEP, 4, 3),
    "another told to end": (2, TERM, 1, STEP, 3, 3),
}


@pytest.fixture(scope="module")
def ends(
    many: Callable[..., list[Ended]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[list[Ended], list[str], dict[str, Any], dict[str, Any]]]:
    """By strike: how its processes ended, what lay there then, how the run went on, and how an undisturbed one ends."""
    place = tmp_path_factory.mktemp("strikes")
    left, there = {}, {}
    for name, (count, *strike, _) in STRIKES.items():
        left[name] = many("test_rank_faults:struck", count, place / name, *strike, limit=90, fails=True)
        there[name] = sorted(entry.name for entry in (place / name).iterdir()) if (place / name).is_dir() else []
    gone: dict[str, Any] = {}
    for count in (2, 3):
        names = [name for name, (number, *_) in STRIKES.items() if number == count]
        folders = [str(place / name) for name in [*names, f"undisturbed {count}"]]
        first, second, *_ = many("test_rank_faults:resumed", count, folders, limit=500)
        assert [one["state"] for one in first.gave] == [one["state"] for one in second.gave]
        gone |= dict(zip([*names, f"undisturbed {count}"], first.gave, strict=True))
    return lambda name: (left[name], there[name], gone[name], gone[f"undisturbed {STRIKES[name][0]}"])


@pytest.mark.parametrize("name", STRIKES)
def test_a_run_that_is_struck_goes_on_as_if_nothing_had_been(name: str, ends: Callable[[str], Any]) -> None:
    count, number, culprit, _, _, newest = STRIKES[name]
    left, there, again, undisturbed = ends(name)
    for rank, one in enumerate(left):
        if number == TERM:
            assert one.code == 128 + TERM, one.err
            assert ("stopped by SIGTERM after step 3" in one.err) == (rank in (0, culprit)), one.err
        elif rank == culprit:
            assert one.code == -KILL
        else:
            assert one.code == 0, one.err
            assert one.gave.startswith(f"rank {culprit} of {count} does not answer"), one.gave
            assert re.search(r"\d s ago at (step \d|its beginning|the (save|evaluation) after step \d)", one.gave), (
                one.gave
            )
    whole = [entry for entry in there if entry.startswith("checkpoint-") and ".old" not in entry]
    assert (f"checkpoint-{newest}" == whole[-1]) if newest else not whole, there
    assert again["state"] == undisturbed["state"]
    assert again["log"] == undisturbed["log"]


def test_what_the_dead_left_is_gone(ends: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    ends("another in a step")
    place = next(entry for entry in tmp_path_factory.getbasetemp().iterdir() if entry.name.startswith("strikes"))
    assert len(list(place.iterdir())) == len(STRIKES) + 2
    kept = [f"checkpoint-{step}" for step in (4, 5, 6)]
    for folder in place.iterdir():
        names = sorted(entry.name for entry in folder.iterdir())
        assert not [entry for entry in names if entry.startswith((".staging", ".lock"))], (folder.name, names)
        assert set(kept[1:]) <= set(names), (folder.name, names)


def refused(folder: str) -> list[str]:
    """A launch whose output is another's."""
    ranks.join(60.0)
    with pytest.raises(FolderError) as caught:
        training(folder)
    return [str(caught.value), *sorted(os.listdir(folder))]


def test_a_second_launch_is_refused_in_all_its_processes(many: Callable[..., list[Ended]], tmp_path: Path) -> None:
    with locks.held(tmp_path / ".lock", "the first launch"):
        for one in many("test_rank_faults:refused", 2, tmp_path):
            assert "another process is writing there" in one.gave[0]
            assert f"process {os.getpid()}" in one.gave[0]
            assert one.gave[1:] == [".lock"]


# ---------------------------------------------------------------------- a launcher that starts them again

LAUNCHED = """
import json, os, signal, sys
import test_rank_faults
from adapters import ranks
folder, result = sys.argv[1:]
if ranks.rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    test_rank_faults.armed(test_rank_faults.STEP, 4, lambda: os.kill(os.getpid(), signal.SIGKILL))
ranks.join(60.0)
found = test_rank_faults.training(folder)
if ranks.first():
    open(result, "w").write(json.dumps(found))
"""


def torchrun(restarts: int, script: Path, *words: Path) -> subprocess.CompletedProcess[str]:
    """Two processes of a script under the launcher, which starts them again so often."""
    where = environment() | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    where["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), where["PYTHONPATH"]])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--max_restarts", str(restarts)]
    command += ["--standalone", "--monitor_interval", "0.1", str(script), *map(str, words)]
    return subprocess.run(command, env=where, capture_output=True, text=True, check=False, timeout=240)


def test_torchrun_starts_it_again_and_it_goes_on(ends: Callable[[str], Any], tmp_path: Path) -> None:
    undisturbed = ends("another in a step")[3]
    script, result, folder = tmp_path / "script.py", tmp_path / "result.json", tmp_path / "run"
    script.write_text(LAUNCHED)
    earlier = next(tmp_path.parent.glob("strikes*/undisturbed 2")) / "checkpoint-6"
    shutil.copytree(earlier, folder / "checkpoint-6")  # another launch's, with the same terms: not where this goes on
    done = torchrun(1, script, folder, result)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"started again by the launcher: goes on from {folder}/checkpoint-3" in done.stderr
    found = json.loads(result.read_text())
    assert found["state"] == undisturbed["state"]
    assert found["log"] == undisturbed["log"]


MEETING = """
import os, signal
import torch
import torch.distributed as dist
from adapters import ranks
ranks.join(60.0)
dist.all_reduce(torch.ones(3))
there = ranks.gathered(ranks.rank())
os.write(1, f"met {os.environ['TORCHELASTIC_RESTART_COUNT']} {there}\\n".encode())  # whole, where two write
if ranks.rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] != "4":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_that_are_started_again_meet_each_time(tmp_path: Path) -> None:
    """The launcher keeps the store in which they met before; what the dead wrote there leads nobody astray."""
    (tmp_path / "script.py").write_text(MEETING)
    done = torchrun(4, tmp_path / "script.py")
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("met")]
    assert {f"met {again} [0, 1]" for again in range(5)} <= set(lines), lines


@pytest.mark.parametrize(("own", "said"), [(0, "no sign of rank 1 after 0:00:01"), (1, "adapters/meeting/to/")])
def test_who_does_not_come_to_the_meeting_is_said(own: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("adapters/meeting/from/1", "a word of one that is dead")
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    for name, value in (place | {"WORLD_SIZE": 2, "RANK": own, "ACCELERATE_USE_CPU": "true"}).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(RankError, match="do not find each other") as caught:
        ranks.join(1.0)
    assert said in str(caught.value)


# ---------------------------------------------------------------------- nodes

NODE = """
import json, os, pathlib, signal, sys
import test_rank_faults
from adapters import ranks
folder, result, fallen = sys.argv[1:]
def fall():
    pathlib.Path(fallen).touch()
    os.kill(os.getppid(), signal.SIGKILL)  # the launcher, as when a machine is switched off
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ["NODE"] == "second" and not os.path.exists(fallen):
    test_rank_faults.armed(test_rank_faults.STEP, 4, fall)
ranks.join(60.0)
found = test_rank_faults.training(folder)
if ranks.first():
    open(result, "w").write(json.dumps(found))
"""


def test_a_node_that_is_gone_and_comes_back_is_taken_in(ends: Callable[[str], Any], tmp_path: Path) -> None:
    """Two launchers, as on two machines: one is killed with its process, and started again by the same command."""
    undisturbed = ends("another in a step")[3]
    script, result, fallen = tmp_path / "script.py", tmp_path / "result.json", tmp_path / "fallen"
    script.write_text(NODE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def launched(node: str) -> subprocess.Popen[str]:
        where = {**environment(), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "NODE": node}
        where["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), where["PYTHONPATH"]])
        where["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        command += ["--rdzv_id", "7", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}"]
        command += ["--rdzv_conf", f"is_host={int(node == 'first')},keep_alive_interval=1,keep_alive_max_attempt=3"]
        command += ["--max_restarts", "3", "--monitor_interval", "0.1", "--local_addr", "127.0.0.1"]
        command += [str(script), str(tmp_path / "run"), str(result), str(fallen)]
        return subprocess.Popen(command, env=where, stderr=subprocess.PIPE, text=True)

    first, second = launched("first"), launched("second")
    try:
        said = second.communicate(timeout=120)[1]
        assert second.returncode == -signal.SIGKILL, said[-4000:]
        assert fallen.exists()
        time.sleep(4)  # longer than a node may be silent
        second = launched("second")
        others, own = second.communicate(timeout=120)[1], first.communicate(timeout=120)[1]
    finally:
        for one in (first, second):
            one.kill()
    assert (first.returncode, second.returncode) == (0, 0), own[-4000:] + others[-4000:]
    assert f"started again by the launcher: goes on from {tmp_path / 'run'}/checkpoint-3" in own + others
    found = json.loads(result.read_text())
    assert found["state"] == undisturbed["state"]
    assert found["log"] == undisturbed["log"]


@pytest.mark.parametrize(
    ("agent", "nodes", "restarts", "said"),
    [("True", "2", "3", True), ("False", "2", "3", False), ("True", "1", "3", False), ("True", "2", "0", False)],
)
def test_launchers_that_say_only_once_where_all_meet_are_known(
    agent: str, nodes: str, restarts: str, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
    monkeypatch.setenv("GROUP_WORLD_SIZE", nodes)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    assert processes.forgetful() is said
