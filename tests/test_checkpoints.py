"""Checkpoint folders: whole or not there, nobody else's files touched, one process at a time."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_resume import assert_same, run
from test_trainer import Cut, adapted_on

import adapters
from adapters import checkpoints, locks

STEPS: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}


def written(tmp_path: Path, **more: Any) -> Path:
    run(tmp_path, "probe", **{**STEPS, "save_total_limit": None, **more})
    return tmp_path / "run"


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# ---------------------------------------------------------------------- the lock


HOLD = """
import sys, time
from pathlib import Path
from adapters import locks
with locks.held(Path(sys.argv[1]), "there"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of tmp_path/run."""
    code = [sys.executable, "-c", HOLD, str(tmp_path / "run" / ".lock")]
    child = subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.communicate()


def test_two_processes_do_not_write_into_one_folder(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(adapters.FolderError, match=rf"another process.*{tmp_path / 'run'}.*process {holder.pid}\b"):
        run(tmp_path, "probe", **STEPS)
    assert names(tmp_path / "run") == [".lock"]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert names(tmp_path / "run") == [".lock"]  # stale: it keeps nobody out
    assert names(written(tmp_path)) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_a_lock_keeps_its_own_process_out_as_well(tmp_path: Path) -> None:
    with locks.held(tmp_path / ".lock", "there"):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
        with pytest.raises(adapters.FolderError, match=f"process {os.getpid()}"), locks.held(tmp_path / ".lock", "x"):
            pass
        assert (tmp_path / ".lock").exists()
    with locks.held(tmp_path / ".lock", "there"):
        pass
    assert names(tmp_path) == []


def test_a_lock_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(adapters.FolderError, match="the lock cannot be taken"), locks.held(tmp_path / ".lock", "x"):
        pass
    assert (tmp_path / "victim").read_text() == "mine"


# ---------------------------------------------------------------------- nobody else's files


def test_rotation_leaves_what_others_put_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import shutil

    folder = written(tmp_path)
    (folder / "checkpoint-2" / "thesis.txt").write_text("mine")
    (folder / "checkpoint-4" / "notes").mkdir()
    (folder / "checkpoint-4" / "notes" / "thesis.txt").write_text("mine")
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-4-mynotes")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-3").symlink_to(folder / "checkpoint-4-mynotes")
    checkpoints.rotate(folder, checkpoints.run_of(folder / "checkpoint-6"), 1, None)
    assert names(folder / "checkpoint-2") == ["thesis.txt"]
    assert names(folder / "checkpoint-4") == ["notes"]
    assert (folder / "checkpoint-4" / "notes" / "thesis.txt").read_text() == "mine"
    checkpoints.verify(folder / "checkpoint-4-mynotes")
    checkpoints.verify(folder / "checkpoint-6")
    assert (folder / "checkpoint-1").is_dir()
    assert "did not write: thesis.txt" in caplog.text


def test_what_stands_in_the_way_is_moved_aside_and_never_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.txt").write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoint-2").symlink_to(victim)
    (folder / f".staging-{os.getpid()}").symlink_to(victim)
    (folder / "checkpoint-4").mkdir()
    (folder / "checkpoint-4" / "thesis.txt").write_text("mine")
    (folder / "checkpoint-6").mkdir()
    written(tmp_path)
    for step in (2, 4, 6):
        checkpoints.verify(folder / f"checkpoint-{step}")
    assert names(victim) == ["thesis.txt"]
    assert (folder / "checkpoint-2.old-1").is_symlink()
    assert names(folder / "checkpoint-4.old-1") == ["thesis.txt"]
    assert not (folder / f".staging-{os.getpid()}").exists()


def test_a_link_in_a_replaced_adapter_folder_is_not_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim.json"
    victim.write_text("mine")
    adapted = adapted_on()
    adapters.save(adapted, tmp_path / "out")
    (tmp_path / "out" / "adapter_config.json").unlink()
    (tmp_path / "out" / "adapter_config.json").symlink_to(victim)
    adapters.save(adapted, tmp_path / "out")
    assert victim.read_text() == "mine"
    assert not (tmp_path / "out" / "adapter_config.json").is_symlink()
    adapters.load(tmp_path / "out", tiny.model("bert"))


def test_a_manifest_that_points_outside_deletes_nothing(tmp_path: Path) -> None:
    from adapters import shards

    folder = written(tmp_path)
    (tmp_path / "victim").write_text("mine")
    file = folder / "checkpoint-2" / "checkpoint.json"
    document = json.loads(file.read_text())
    document["files"]["../../victim"] = {"size": 4, "sha256": shards.sha256(tmp_path / "victim")}
    document["digest"] = shards.digest_of(document)
    file.write_text(json.dumps(document))
    with pytest.raises(adapters.FolderError, match="outside the checkpoint"):
        checkpoints.verify(folder / "checkpoint-2")
    checkpoints.rotate(folder, checkpoints.run_of(folder / "checkpoint-6"), 1, None)
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        written(tmp_path, max_steps=2)
        adapters.save(adapted_on(), tmp_path / "out")
    finally:
        os.umask(before)
    for folder in (tmp_path / "run", tmp_path / "out"):
        entries = list(folder.rglob("*"))
        assert len(entries) > 3
        for entry in entries:
            assert entry.stat().st_mode & 0o777 == (0o777 if entry.is_dir() else 0o666) & ~umask, entry


# ---------------------------------------------------------------------- the newest whole one


def damage_shorter(folder: Path) -> None:
    file = folder / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-1])


def damage_bit(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def damage_manifest(folder: Path) -> None:
    file = folder / "checkpoint.json"
    file.write_text(file.read_text().replace('"run"', '"ran"'))


def damage_gone(folder: Path) -> None:
    (folder / "trainer_state.json").unlink()


def damage_link(folder: Path) -> None:
    (folder / "scheduler.pt").rename(folder.parent.parent / "elsewhere.pt")
    (folder / "scheduler.pt").symlink_to(folder.parent.parent / "elsewhere.pt")


def damage_nonsense(folder: Path) -> None:
    (folder / "checkpoint.json").write_text("[1, 2]")


DAMAGES = [damage_shorter, damage_bit, damage_manifest, damage_gone, damage_link, damage_nonsense]


@pytest.mark.parametrize("damage", DAMAGES)
def test_resume_goes_back_to_the_newest_that_verifies(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    folder = written(tmp_path)
    shutil.copytree(folder / "checkpoint-6", folder / "checkpoint-6.bak")
    (folder / "checkpoint-99999").mkdir()
    damage(folder / "checkpoint-6")
    again = run(tmp_path, "probe", resume=True, **{**STEPS, "save_total_limit": None})
    assert again.state.global_step == 6
    assert "skipped checkpoint-99999: not a whole checkpoint" in caplog.text
    assert "skipped checkpoint-6: " in caplog.text
    checkpoints.verify(folder / "checkpoint-6")
    assert (folder / "checkpoint-6.bak").is_dir()


def test_stages_and_moves_of_dead_processes_are_put_right(tmp_path: Path) -> None:
    folder = written(tmp_path)
    (folder / ".staging-4194305").mkdir()
    (folder / ".staging-4194305" / "half").write_text("half")
    (folder / "checkpoint-6").rename(folder / "checkpoint-6.old-1")
    run(tmp_path, "probe", resume=True, **STEPS)
    assert names(folder) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


# ---------------------------------------------------------------------- disks that are full or fail


@pytest.mark.parametrize("size", [0, 100, 700, 3000, 9000])
def test_a_full_disk_leaves_the_last_checkpoint_whole(size: int, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(TrainerCallback):
        """From the fourth step on no file may be larger than this."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(adapters.DiskError, match=r"cannot be written.*checkpoint-4.*Make room") as caught:
            run(tmp_path, "probe", Full(), **STEPS, logging_steps=50)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert "resume" in str(caught.value)
    assert names(tmp_path / "run") == ["checkpoint-2"]
    checkpoints.verify(tmp_path / "run" / "checkpoint-2")
    again = run(tmp_path, "probe", resume=True, **STEPS, logging_steps=50)
    assert_same(again, run(tmp_path / "whole", "probe", max_steps=6, save_strategy="no", logging_steps=50))


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO])
def test_every_flush_that_fails_leaves_the_last_checkpoint_whole(
    fault: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, flushes, bad = os.fsync, 0, 0
    place = tmp_path / "checkpoint-7"

    def fsync(handle: int) -> None:
        nonlocal flushes
        flushes += 1
        if flushes == bad:
            raise OSError(fault, os.strerror(fault))
        real(handle)

    def write(text: str) -> None:
        nonlocal flushes
        flushes = 0
        with checkpoints.staged(place, {"run": "r", "terms": {}, "progress": {}}) as stage:
            (stage / place.name / "sub").mkdir(parents=True)
            (stage / place.name / "sub" / "new").write_text(text)
            (stage / place.name / "more").write_text(text)

    monkeypatch.setattr(os, "fsync", fsync)
    write("old")
    total = flushes
    assert total > 5
    for bad in range(1, total + 1):
        with pytest.raises(adapters.DiskError, match=os.strerror(fault)):
            write("new")
        checkpoints.verify(place)
        # Where only the last flush failed, of the folder above, the new one stands there already.
        assert (place / "more").read_text() == ("old" if bad < total else "new")
        assert not list(tmp_path.glob(".staging*"))


def test_a_full_disk_leaves_the_saved_adapter_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = adapted_on()
    adapters.save(adapted, tmp_path / "out")
    before = (tmp_path / "out" / "adapter.json").read_bytes()

    def fsync(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(adapters.DiskError, match=r"cannot be written.*out.*No space left.*Make room"):
        adapters.save(adapted, tmp_path / "out")
    assert (tmp_path / "out" / "adapter.json").read_bytes() == before
    assert names(tmp_path) == ["out"]


def test_a_crash_in_training_leaves_no_lock(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "probe", Cut(3), **STEPS)
    assert names(tmp_path / "run") == ["checkpoint-2"]
