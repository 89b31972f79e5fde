"""Streams dealt to the processes and workers of a run: each row once, the same in every run, whatever their numbers."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from many import Ended

import adapters
from adapters import inflow, lanes, ranks, remarks
from adapters.contracts import Draw

SIZES = (0, 7, 1, 300, 20, 2, 140)  # rows of the shards: uneven, one empty, some longer than a block


def shards(folder: Path, sizes: tuple[int, ...] = SIZES) -> list[str]:
    """Files of rows whose texts are all different, each with a label."""
    texts, files = iter(tiny.rows(sum(sizes), seed=4)), []
    for number, size in enumerate(sizes):
        file = folder / f"train-{number}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in itertools.islice(texts, size)))
        files.append(str(file))
    return files


def stream(files: list[str]) -> Any:
    """The files as users give them."""
    import datasets

    return datasets.load_dataset("json", data_files=files, split="train", streaming=True)


def plain(rows: list[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[str]]:
    """Rows that need no preparation."""
    return [{"text": row["text"], "row": 0} for row in rows], []


def texts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of them."""
    return {"texts": [row["text"] for row in rows], "rows": [row["row"] for row in rows]}


def flow(source: Any, *, epoch: int = 0, buffer: int = 10, prepare: Any = plain) -> lanes.Flow:
    return lanes.Flow(inflow.opened(source), prepare, Draw(3, epoch), buffer)


def steps(made: lanes.Flow, workers: int, size: int = 4, most: int | None = None) -> list[list[list[str]]]:
    """What this process takes in each step, of what is left of an epoch."""
    made.deal(workers)
    loader = made.loader(size, texts, workers)
    batches = iter(loader)
    found: list[list[list[str]]] = []
    while most is None or len(found) < most:
        taken, blanks = made.step(batches, 2)
        if not taken:
            break
        found.append([b["texts"] for b, blank in zip(taken, blanks, strict=True) if not blank])
    return found


def reading(files: list[str], workers: int, few: int) -> Any:
    """In each process: an epoch as it is dealt, and one that breaks off after some steps and goes on."""
    ranks.join()
    found: dict[str, Any] = {}
    for name, source in (("many", files), ("few", files[3:4])):
        whole = flow(stream(source))
        found[name] = steps(whole, workers)
        assert not steps(whole, workers)  # nothing is left
        part = flow(stream(source))
        begun = steps(part, workers, most=few)
        again = flow(stream(source))
        again.resume(json.loads(json.dumps(part.position())))
        found[f"{name} again"] = begun + steps(again, workers)
        found[f"{name} begun"], found[f"{name} position"] = begun, part.position()
    return found


def rest(files: list[str], positions: list[Any], workers: int) -> list[Any]:
    """In each process: what it reads of epochs that other numbers of processes began; twice broken off."""
    ranks.join()
    found = []
    for name, position in positions:
        source = files if name == "many" else files[3:4]
        made = flow(stream(source))
        made.resume(position)
        begun = steps(made, workers, most=3)
        more = flow(stream(source))
        more.resume(json.loads(json.dumps(made.position())))
        found.append(begun + steps(more, workers))
    return found


def flat(found: Any) -> list[str]:
    """The rows of steps of batches."""
    return [text for step in found for batch in step for text in batch]


def test_each_row_is_read_once_whatever_reads_it(many: Callable[..., list[Ended]], tmp_path: Path) -> None:
    files = shards(tmp_path)
    wanted = {"many": [row["text"] for row in stream(files)], "few": [row["text"] for row in stream(files[3:4])]}
    assert len(set(wanted["many"])) == sum(SIZES)
    begun: list[tuple[str, Any, list[str]]] = []
    for processes, workers in ((1, 0), (2, 2), (3, 0)):
        ended = [one.gave for one in many("test_many_streams:reading", processes, files, workers, 5)]
        for name, rows in wanted.items():
            assert Counter(text for gave in ended for text in flat(gave[name])) == Counter(rows)
            assert len({len(gave[name]) for gave in ended}) == 1  # all take as many steps
            for gave in ended:
                assert gave[f"{name} again"] == gave[name]  # bit for bit, the order of the workers too
            behind = [text for gave in ended for text in flat(gave[f"{name} begun"])]
            assert 0 < len(behind) < len(rows)
            assert all(gave[f"{name} position"] == ended[0][f"{name} position"] for gave in ended)
            begun.append((name, ended[0][f"{name} position"], behind))
    positions = [[name, position] for name, position, _ in begun]
    for processes, workers in ((2, 2),):
        ended = [one.gave for one in many("test_many_streams:rest", processes, files, positions, workers)]
        for number, (name, _, behind) in enumerate(begun):
            read = behind + [text for gave in ended for text in flat(gave[number])]
            assert Counter(read) == Counter(wanted[name])  # neither lost nor read again


def test_the_order_follows_seed_epoch_and_buffer(tmp_path: Path) -> None:
    source = stream(shards(tmp_path, (50, 60)))
    plainly = [row["text"] for row in source]

    def order(**how: Any) -> list[str]:
        return [row["text"] for row in flow(source, **how)]

    assert order(buffer=0) == plainly
    assert order() == order() != plainly
    assert order(epoch=1) != order()
    assert sorted(order(epoch=1)) == sorted(plainly)


class Alive(dict[str, Any]):
    """A row that is counted while it lives."""

    now = most = 0

    def __init__(self, number: int) -> None:
        super().__init__(text=f"row {number}")
        Alive.now += 1
        Alive.most = max(Alive.most, Alive.now)

    def __del__(self) -> None:
        Alive.now -= 1


class Counting(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Rows made as they are read."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return map(Alive, range(self.rows))


def test_no_more_rows_are_alive_however_many_there_are() -> None:
    most = []
    for size in (2_000, 20_000):
        made = flow(Counting(size), buffer=300)
        Alive.most = 0
        assert len(flat(steps(made, 0, size=64))) == size
        most.append(Alive.most)
    assert most[0] == most[1] <= 300 + 2 * lanes.BLOCK + 1


def test_remarks_on_parts_are_those_on_the_whole() -> None:
    said = "{} of {} texts ({:.1f} %) are longer than 9 tokens: cut there"
    parts = [["100", said.format(3, 100, 3), "scores: f1"], ["50"], ["50", said.format(1, 50, 2), "scores: f1"]]
    assert remarks.merged(parts) == [said.format(4, 200, 2), "scores: f1"]


@pytest.mark.parametrize("change", ["middle", "end", "name", "shorter"])
def test_other_rows_are_found_out(change: str, tmp_path: Path) -> None:
    long = [json.dumps({"text": f"the same words {n:05}"}) for n in range(3000)]  # longer than both ends of a file
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(long))
    made = flow(stream([str(file)]))
    before = made.source.fingerprint()
    steps(made, 0, size=64, most=14)  # up to row 1792
    lines = list(long)
    if change == "middle":  # after the rows that the identity looks at, before where the run is
        lines[1500] = lines[1500].replace("same", "SAME")
    elif change == "end":
        lines[-1] = lines[-1].replace("same", "SAME")
    elif change == "shorter":
        del lines[1000:]
    file.write_text("\n".join(lines))
    if change == "name":
        file = file.rename(tmp_path / "other.jsonl")
    again = flow(stream([str(file)]))
    assert (again.source.fingerprint() == before) == (change == "middle")
    again.resume(made.position())
    if change in ("middle", "shorter"):
        with pytest.raises(adapters.RequestError, match="not those that the run has read"):
            steps(again, 0)
    else:
        assert steps(again, 0, most=1)


def test_a_stream_that_counts_across_shards_is_read_as_one(tmp_path: Path) -> None:
    source = stream(shards(tmp_path, (3, 40, 2)))
    assert inflow.opened(source).shards == 3
    assert inflow.opened(source.shuffle(seed=1, buffer_size=7).map(lambda row: row)).shards == 3
    for other in (source.take(20), source.skip(4), source.map(lambda row, n: row, with_indices=True)):
        assert inflow.opened(other).shards == 1
        assert [row["text"] for row in flow(other, buffer=0)] == [row["text"] for row in other]


def test_a_stream_that_was_divided_already_is_refused(tmp_path: Path) -> None:
    from datasets.distributed import split_dataset_by_node

    divided = split_dataset_by_node(stream(shards(tmp_path)), rank=0, world_size=2)
    with pytest.raises(adapters.RequestError, match="divided among processes already"):
        inflow.opened(divided)


def training(place: str, files: list[str], stop: int, resume: bool, settings: dict[str, Any]) -> dict[str, Any]:
    """A run over a stream in each process: its losses, and the digest of what it trained."""
    from test_trainer import Cut, adapted_on, trainer_for

    arguments = {"learning_rate": 1e-3, "max_steps": 9, "logging_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_for(
        Path(place),
        adapted_on(strategy="lora"),
        args={**arguments, **settings},
        train_dataset=stream(files),
        eval_dataset=None,
        callbacks=[Cut(stop)] if stop else [],
    )
    try:
        trainer.train(resume_from_checkpoint=resume or None)
    except KeyboardInterrupt:
        return {}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    state = {name: tensor.double().sum().item() for name, tensor in trainer.adapted.state().items()}
    return {"losses": losses, "state": state, "epochs": trainer.state.epoch}


def runs(place: str, files: list[str]) -> list[Any]:
    """A whole run, one that breaks off in its second epoch, and what goes on from there."""
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    whole = training(f"{place}/whole", files, 0, False, settings)
    training(f"{place}/cut", files, 6, False, settings)
    return [whole, training(f"{place}/cut", files, 0, True, settings)]


def test_a_run_over_a_stream_goes_on_bit_for_bit(many: Callable[..., list[Ended]], tmp_path: Path) -> None:
    files = shards(tmp_path, (30, 9, 2))  # 41 rows; of two processes one has 9 or 32 of them
    ended = [one.gave for one in many("test_many_streams:runs", 2, tmp_path, files)]
    for whole, again in ended:
        assert whole == ended[0][0]  # the processes are one run
        assert len(whole["losses"]) == 9
        assert again["losses"] == whole["losses"]
        assert again["state"] == whole["state"]
        assert again["epochs"] == whole["epochs"] > 1
