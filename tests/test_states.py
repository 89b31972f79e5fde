"""Kept states: what was added comes back, from memory or from disk; the folder keeps its budget and survives damage."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adapters import locks, shards, states
from adapters.states import States, cache_folder, room_for

ROOM = 10**9


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def rows(count: int, dtype: torch.dtype = torch.float32, seed: int = 0, width: int = 8) -> dict[bytes, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key(1000 * seed + n): torch.randn(1 + n % 5, width, generator=generator).to(dtype) for n in range(1, count + 1)
    }


def filled(folder: Path | None, content: dict[bytes, torch.Tensor], budget: int = ROOM) -> tuple[States, list[str]]:
    said: list[str] = []
    kept = States(folder, budget, say=said.append)
    for name, tensor in content.items():
        assert kept.add(name, tensor)
    kept.flush()
    return kept, said


def holds(kept: States, content: dict[bytes, torch.Tensor]) -> None:
    for name, tensor in content.items():
        assert name in kept
        found = kept.get(name)
        assert found is not None
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_another_process_finds_what_was_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    content = rows(17, dtype)
    first, _ = filled(tmp_path / "a", content)
    holds(first, content)
    again = States(tmp_path / "a", ROOM)
    holds(again, content)
    assert len(again) == len(content)
    assert again.nbytes == sum(tensor.nbytes for tensor in content.values())
    assert again.digest(content) == first.digest(content) == filled(None, content)[0].digest(content)
    assert key(99) not in again
    assert again.get(key(99)) is None


def test_states_of_other_shapes_and_dtypes_go_to_other_parts(tmp_path: Path) -> None:
    content = {key(1): torch.randn(3, 4), key(2): torch.randn(5), key(3): torch.randn(2, 4).bfloat16()}
    content[key(4)] = torch.randn(2, 3, 4)
    content[key(5)] = torch.randn(0, 4)
    filled(tmp_path / "a", content)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == 4
    holds(States(tmp_path / "a", ROOM), content)


def test_what_is_read_is_a_map_and_writing_to_it_leaves_the_file(tmp_path: Path) -> None:
    content = rows(4)
    kept, _ = filled(tmp_path / "a", content)
    one, two = kept.get(key(1)), kept.get(key(2))
    assert one is not None
    assert two is not None
    assert one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr()
    one.zero_()
    holds(States(tmp_path / "a", ROOM), content)


def test_the_parts_are_plain_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    content = rows(6)
    filled(tmp_path / "a", content)
    file = next((tmp_path / "a").glob("*.safetensors"))
    found = load_file(file)
    assert found["states"].shape == (sum(map(len, content.values())), 8)
    assert found["lengths"].tolist() == [len(tensor) for tensor in content.values()]
    assert file.stat().st_mode & 0o077 == 0


def damaged(file: Path, how: str) -> None:
    slots, _ = shards.read_header(file)
    content = bytearray(file.read_bytes())
    if how == "bit":
        content[slots["states"].start + 5] ^= 4
    elif how == "key":
        content[slots["keys"].start] ^= 1
    elif how == "lengths":
        content[slots["lengths"].start] ^= 1
    elif how == "truncated":
        del content[-100:]
    else:
        content[:] = b"not at all"
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["bit", "key", "lengths", "truncated", "other"])
def test_a_damaged_part_is_set_aside_and_the_rest_stands(how: str, tmp_path: Path) -> None:
    content, others = rows(5), rows(5, seed=1)
    filled(tmp_path / "a", content)
    file = next((tmp_path / "a").glob("*.safetensors"))
    filled(tmp_path / "a", others)
    damaged(file, how)
    said: list[str] = []
    kept = States(tmp_path / "a", ROOM, say=said.append)
    assert not any(name in kept for name in content)
    holds(kept, others)
    assert len(said) == 1
    assert "damaged" in said[0]
    assert file.with_suffix(".damaged").exists()
    for name, tensor in content.items():
        kept.add(name, tensor)
    kept.flush()
    holds(States(tmp_path / "a", ROOM), content | others)


def test_folders_used_longest_ago_make_room(tmp_path: Path) -> None:
    content = rows(20, width=64)
    for number, name in enumerate(("old", "older", "new")):
        filled(tmp_path / name, content)
        os.utime(tmp_path / name / ".lock", (1000 - number, 1000 - number))
    size = sum(file.stat().st_size for file in (tmp_path / "old").iterdir())
    os.utime(tmp_path / "new" / ".lock")
    _, said = filled(tmp_path / "mine", content, budget=3 * size + size // 2)
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.is_dir()) == ["mine", "new", "old"]
    assert said == []


def test_a_folder_in_use_is_never_deleted(tmp_path: Path) -> None:
    content = rows(20, width=64)
    used, _ = filled(tmp_path / "used", content)
    os.utime(tmp_path / "used" / ".lock", (1, 1))
    size = sum(file.stat().st_size for file in (tmp_path / "used").iterdir())
    mine, said = filled(tmp_path / "mine", content, budget=size + size // 2)
    holds(used, content)
    holds(mine, content)  # in memory
    assert (tmp_path / "used").exists()
    assert len(said) == 1
    assert "stay in memory" in said[0]


HOLDER = """
import sys
from pathlib import Path
from adapters.states import States
kept = States(Path(sys.argv[1]), 10**9)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_that_another_process_uses_is_never_deleted(tmp_path: Path) -> None:
    content = rows(20, width=64)
    filled(tmp_path / "used", content)
    size = sum(file.stat().st_size for file in (tmp_path / "used").iterdir())
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "used")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    filled(tmp_path / "mine", content, budget=size + size // 2)
    assert (tmp_path / "used").exists()
    holder.communicate(b"")
    filled(tmp_path / "mine", content, budget=size + size // 2)
    assert not (tmp_path / "used").exists()


def test_rows_of_a_folder_that_nobody_asks_for_make_room_last(tmp_path: Path) -> None:
    content, others = rows(20, width=64), rows(20, width=64, seed=1)
    filled(tmp_path / "a", content)
    size = sum(file.stat().st_size for file in (tmp_path / "a").iterdir())
    kept, said = filled(tmp_path / "a", others, budget=size + size // 2)
    assert said == []
    holds(kept, others)
    assert not any(name in States(tmp_path / "a", ROOM) for name in content)


WRITER = """
import sys, torch
from pathlib import Path
from adapters.states import States
kept = States(Path(sys.argv[1]), 10**9)
for n in range(40):
    kept.add((1000 * int(sys.argv[2]) + n).to_bytes(16, "little"), torch.full((1 + n % 3, 4), float(n)))
    kept.flush()
"""


def test_processes_write_side_by_side(tmp_path: Path) -> None:
    started = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "a"), str(number)]) for number in range(2)
    ]
    assert [process.wait() for process in started] == [0, 0]
    kept = States(tmp_path / "a", ROOM)
    for number in range(80):
        found = kept.get(key(1000 * (number // 40) + number % 40))
        assert found is not None
        assert torch.equal(found, torch.full((1 + number % 40 % 3, 4), float(number % 40)))


def test_a_full_disk_is_said_once_and_memory_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(states, "_save", full)
    content = rows(9)
    kept, said = filled(tmp_path / "a", content)
    for name, tensor in rows(9, seed=1).items():
        kept.add(name, tensor)
    kept.flush()
    holds(kept, content | rows(9, seed=1))
    assert len(said) == 1
    assert os.strerror(errno.ENOSPC) in said[0]
    assert sorted(entry.name for entry in (tmp_path / "a").iterdir()) == [".lock"]


def test_a_place_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    content = rows(3)
    kept, said = filled(tmp_path / "file" / "a", content)
    holds(kept, content)
    assert len(said) == 1
    assert "stay in memory" in said[0]


def test_memory_is_bounded_where_there_is_no_disk() -> None:
    said: list[str] = []
    kept = States(None, ROOM, memory=1000, say=said.append)
    found = [kept.add(key(n), torch.zeros(4, 8)) for n in range(12)]
    assert found == [True] * 7 + [False] * 5
    assert kept.nbytes == 7 * 128
    assert len(said) == 1


def test_what_does_not_fit_memory_goes_to_the_map(tmp_path: Path) -> None:
    kept = States(tmp_path / "a", ROOM, memory=1000)
    content = rows(60)
    assert all(kept.add(name, tensor) for name, tensor in content.items())
    holds(kept, content)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == 5


def test_no_budget_is_memory_only(tmp_path: Path) -> None:
    content = rows(3)
    kept, said = filled(tmp_path / "a", content, budget=0)
    holds(kept, content)
    assert not (tmp_path / "a").exists()
    assert said == []


def test_what_a_dead_writer_left_is_taken_away(tmp_path: Path) -> None:
    filled(tmp_path / "a", rows(2))
    stray = tmp_path / "a" / ".x.staging"
    stray.write_bytes(b"half a part")
    (tmp_path / ".b.gone").mkdir()
    filled(tmp_path / "c", rows(2))
    assert not stray.exists()
    assert not (tmp_path / ".b.gone").exists()


def test_a_part_that_another_process_took_away_is_not_damaged(tmp_path: Path) -> None:
    content = rows(3)
    filled(tmp_path / "a", content)
    said: list[str] = []
    kept = States(tmp_path / "a", ROOM, say=said.append)
    next((tmp_path / "a").glob("*.safetensors")).unlink()
    assert key(1) not in kept
    assert kept.get(key(1)) is None
    assert said == []


def test_the_cache_folder_is_looked_up_when_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder().is_relative_to(tmp_path / "home")


def test_the_budget_is_what_was_asked_for_or_a_share_of_the_disk(tmp_path: Path) -> None:
    assert room_for(tmp_path / "not" / "there", 0.5) == 500_000_000
    assert room_for(tmp_path, 0) == 0
    assert 0 < room_for(tmp_path / "not" / "there", None) <= states.MOST


def test_a_lock_is_shared_or_whole(tmp_path: Path) -> None:
    file = tmp_path / "deep" / ".lock"
    one, two = locks.joined(file), locks.joined(file)
    with locks.alone(file, wait=False) as ours:
        assert not ours
    os.close(one)
    with locks.alone(file, wait=False) as ours:
        assert not ours
    os.close(two)
    with locks.alone(file, wait=False) as ours:
        assert ours
