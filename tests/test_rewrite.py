"""The threads of a merge: what they write, and what is left when one of them meets a fault."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import adapters
from adapters import crew, rewrite, shards
from adapters.edits import AddLowRank, Blend, Edit, PutEntries, Replace, by_rows


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """LoRA over a backbone in several shards."""
    tiny.backbone("llama").save_pretrained(tmp_path / "base", max_shard_size="20KB")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    adapted = adapters.adapt(str(tmp_path / "base"), labels=list(tiny.LABELS))
    tiny.shake(adapted)
    return adapters.save(adapted, tmp_path / "adapter")


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    torches = torch.get_num_threads()
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("crew-")]
    assert torch.get_num_threads() == torches


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def left_behind(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir() if each.name not in ("base", "adapter"))


# ---------------------------------------------------------------------- what is written


EDITS: dict[str, tuple[Edit, tuple[int, ...], tuple[int, ...]]] = {
    "replaced": (Replace(torch.randn(9, 5)), (9, 5), (9, 5)),
    "a vector": (Replace(torch.randn(9)), (9,), (9,)),
    "low rank": (AddLowRank(torch.randn(2, 5), torch.randn(9, 2), 0.5), (9, 5), (9, 5)),
    "transposed": (AddLowRank(torch.randn(2, 9), torch.randn(5, 2), 0.5, transposed=True), (9, 5), (9, 5)),
    "grown": (PutEntries((2, 9, 11), torch.randn(3, 5), 0, 12), (9, 5), (12, 5)),
    "blended": (Blend([(0.3, Replace(torch.randn(9, 5))), (0.7, Replace(torch.randn(9, 5)))]), (9, 5), (9, 5)),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("rows", [1, 4, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_by_row_an_edit_is_itself(name: str, rows: int, dtype: torch.dtype) -> None:
    edit, before, after = EDITS[name]
    old = torch.randn(before).to(dtype)
    part = by_rows(edit, before, after)
    assert part is not None
    pieces = [part(start, min(start + rows, after[0]))(old[start : start + rows]) for start in range(0, after[0], rows)]
    torch.testing.assert_close(torch.cat(pieces), edit(old), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("edit", "before", "after"),
    [
        (Replace(torch.zeros(9, 5)), (8, 5), (8, 5)),
        (AddLowRank(torch.zeros(2, 5), torch.zeros(9, 2), 1.0), (8, 5), (8, 5)),
        (PutEntries((0,), torch.zeros(1, 5), 0, 4), (8, 5), (4, 5)),
        (PutEntries((0,), torch.zeros(9, 1), 1, 6), (9, 5), (9, 6)),
        (Replace(torch.zeros(())), (), ()),
    ],
    ids=["too long", "low rank too long", "shorter than before", "along the other axis", "a number"],
)
def test_what_does_not_fit_is_left_to_the_whole_edit(
    edit: Edit, before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    assert by_rows(edit, before, after) is None


def test_the_size_of_a_piece_changes_no_value(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters.merge_on_disk(adapter, tmp_path / "large", check_logits=False)
    monkeypatch.setattr(rewrite, "PIECE", 128)
    monkeypatch.setattr(rewrite, "UNFLUSHED", 512)
    monkeypatch.setattr(shards, "WRITE", 48)
    report = adapters.merge_on_disk(adapter, tmp_path / "small", check_logits=False)
    large, small = weights(tmp_path / "large"), weights(tmp_path / "small")
    assert report.verified == report.edited > 10
    assert set(large) == set(small)
    for name, tensor in large.items():
        torch.testing.assert_close(small[name], tensor, rtol=1e-6, atol=1e-7)


def test_untouched_tensors_keep_their_bytes(adapter: Path, tmp_path: Path) -> None:
    adapters.merge_on_disk(adapter, tmp_path / "out", check_logits=False)
    before, after = weights(tmp_path / "base"), weights(tmp_path / "out")
    norms = [name for name in before if "norm" in name or "embed" in name]
    assert norms
    assert all(torch.equal(before[name], after[f"model.{name}"]) for name in norms)


# ---------------------------------------------------------------------- faults


def failing(count: int, fault: BaseException) -> Callable[..., None]:
    """`shards.write_at` whose so manieth call meets a fault."""
    whole, lock, seen = shards.write_at, threading.Lock(), [0]

    def write(handle: int, content: memoryview, position: int) -> None:
        with lock:
            seen[0] += 1
            now = seen[0]
        if now == count:
            raise fault
        whole(handle, content, position)

    return write


def test_a_full_disk_leaves_nothing(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "write_at", failing(20, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(adapters.DiskError, match="No space left") as caught:
        adapters.merge_on_disk(adapter, tmp_path / "out", check_logits=False)
    assert caught.value.errno == errno.ENOSPC
    assert left_behind(tmp_path) == []


def test_an_earlier_merge_outlives_a_full_disk(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters.merge_on_disk(adapter, tmp_path / "out", check_logits=False)
    before = weights(tmp_path / "out")
    monkeypatch.setattr(shards, "write_at", failing(20, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(adapters.DiskError):
        adapters.merge_on_disk(adapter, tmp_path / "out", check_logits=False)
    assert left_behind(tmp_path) == ["out"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path / "out").items())


def test_a_disk_that_fails_to_flush_leaves_nothing(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(adapters.DiskError, match="Input/output error"):
        adapters.merge_on_disk(adapter, tmp_path / "out", check_logits=False)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("kind", ["untouched", "edited"])
def test_one_changed_value_in_the_middle_is_another_backbone(adapter: Path, tmp_path: Path, kind: str) -> None:
    word = "post_attention_layernorm" if kind == "untouched" else "down_proj"
    file, name = next(
        (file, name)
        for file in sorted((tmp_path / "base").glob("*.safetensors"))
        for name in load_file(file)
        if word in name
    )
    tensors = load_file(file)
    tensors[name].view(-1)[7] += 1e-4
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(adapters.BackboneError, match=rf"not the backbone.*{word}"):
        adapters.merge_on_disk(adapter, tmp_path / "out", check_logits=False)
    assert left_behind(tmp_path) == []


def test_bytes_that_read_back_otherwise_are_refused(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shards.write_at

    def flip(handle: int, content: memoryview, position: int) -> None:
        changed = bytearray(content)
        if position > 4096:
            changed[-1] ^= 1
        whole(handle, memoryview(changed), position)

    monkeypatch.setattr(shards, "write_at", flip)
    with pytest.raises(adapters.NumbersError, match="reads back otherwise"):
        adapters.merge_on_disk(adapter, tmp_path / "out", check_logits=False)
    assert left_behind(tmp_path) == []


def test_a_second_edit_that_differs_is_refused(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = AddLowRank.__call__

    def unsteady(edit: AddLowRank, old: torch.Tensor | None) -> torch.Tensor:
        return whole(edit, old) + torch.rand(())

    monkeypatch.setattr(AddLowRank, "__call__", unsteady)
    with pytest.raises(adapters.NumbersError, match="reads back otherwise"):
        adapters.merge_on_disk(adapter, tmp_path / "out", check_logits=False)


def test_a_value_too_large_for_float16_is_refused(tmp_path: Path) -> None:
    adapted = adapters.adapt(tiny.folder("llama", tmp_path / "base"), labels=list(tiny.LABELS))
    tiny.shake(adapted)
    with torch.no_grad():
        next(p for n, p in adapted.model.named_parameters() if n in adapted.trained and p.dim() == 2).mul_(1e7)
    adapters.save(adapted, tmp_path / "adapter")
    adapters.merge_on_disk(tmp_path / "adapter", tmp_path / "full", check_logits=False)
    with pytest.raises(adapters.NumbersError, match=r"not finite.*float16"):
        adapters.merge_on_disk(tmp_path / "adapter", tmp_path / "half", dtype="float16", check_logits=False)
    assert left_behind(tmp_path) == ["full"]


def test_an_interrupt_ends_the_threads(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, lock, seen = shards.write_at, threading.Lock(), [0]

    def write(handle: int, content: memoryview, position: int) -> None:
        with lock:
            seen[0] += 1
            if seen[0] == 20:
                signal.raise_signal(signal.SIGINT)  # delivered to the main thread, which waits
        whole(handle, content, position)

    monkeypatch.setattr(shards, "write_at", write)
    with pytest.raises(KeyboardInterrupt):
        adapters.merge_on_disk(adapter, tmp_path / "out", check_logits=False)
    assert left_behind(tmp_path) == []


def test_the_first_fault_of_a_crew_is_raised_and_ends_the_rest() -> None:
    team = crew.Crew(3)
    begun = threading.Barrier(3)
    done: list[int] = []

    def bad() -> None:
        begun.wait(10)
        raise ZeroDivisionError("the first")

    def long() -> None:
        begun.wait(10)
        while True:
            team.check()

    rest: list[Any] = [lambda number=number: done.append(number) for number in range(50)]
    with pytest.raises(ZeroDivisionError, match="the first"):
        team.run([bad, long, long, *rest])
    assert done == []


def test_a_crew_does_every_task_once() -> None:
    done: list[int] = []
    crew.Crew(4).run([lambda number=number: done.append(number) for number in range(200)])  # type: ignore[misc]
    assert sorted(done) == list(range(200))
