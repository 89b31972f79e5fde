"""Several adapters made into one, or into a merged model, at weights that are given or found on rows."""

from __future__ import annotations

import functools
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, final

from adapters import exactness, lowrank, manifest, progress, reference, remake, storage
from adapters.arithmetic import METHODS, Method
from adapters.changes import Changes
from adapters.data import one
from adapters.errors import FolderError, RequestError, message, nearest
from adapters.formats import arrange
from adapters.gathering import opened
from adapters.merge import Proof, refuse_output, written
from adapters.mixture import Made, Mixture
from adapters.predict import evaluate
from adapters.weighing import Tried, chosen, weighed

logger = logging.getLogger(__name__)

TRIALS: Final = 40  # weights that a search measures at most


# What a merge on disk found in its logits check, in a report of its own and in this one.
SEEN: Final = ("logits_checked", "max_difference", "mean_difference", "agreement", "spread", "bound", "accepted")


@final
@dataclass(frozen=True)
class _Check:
    """What was asked for of a merged model's logits check, and whether the head was named."""

    rows: list[Any] | None
    logits: bool
    accept: bool
    named: bool


@final
@dataclass(frozen=True)
class CombineReport:
    """What was combined, and how exact it is.

    Attributes:
        output: the written folder.
        form: "adapter", or "merged" for a backbone with everything in it.
        method: how.
        parts: the folders; weights: of each, as they are in the result; head: whose head it has, empty for none.
        strategy: of the adapter that was written; empty for a merged model.
        modules: linear maps that hold factors; stacks: of experts, that hold factors; whole: tensors beside them, the
            head's among them.
        dense: of these, weights of linear maps, which no rank was asked for.
        ranks: the smallest and the largest rank; 0 without factors.
        parameters: of the adapter; tensors edited, of a merged model.
        bytes: of its weights.
        error: what was left out of the linear maps' change, as a share of its Frobenius norm; 0 where it is exact.
        worst: the module that lost the largest share; worst_error: which share.
        itself: one adapter at weight 1, which was copied bit for bit; of a merged model, which it answers as.
        searched: the weights that were tried, each with its numbers; empty where none were looked for.
        metric: by which the best of them was taken.
        against: what a merged model's logits were compared with, in words.
        logits_checked: of a merged model, whether they were; `skipped` says why not.
        max_difference, mean_difference: between these logits, absolute.
        agreement: share of rows whose best answer is the same.
        spread: standard deviation of the logits that it should give.
        bound: the share of the spread that the difference had to keep; accepted: it did not, and that was accepted.
    """

    output: str
    form: str
    method: str
    parts: tuple[str, ...]
    weights: tuple[float, ...]
    head: str = ""
    strategy: str = ""
    modules: int = 0
    stacks: int = 0
    whole: int = 0
    dense: int = 0
    ranks: tuple[int, int] = (0, 0)
    parameters: int = 0
    bytes: int = 0
    error: float = 0.0
    worst: str = ""
    worst_error: float = 0.0
    itself: bool = False
    searched: tuple[Mapping[str, Any], ...] = ()
    metric: str = ""
    against: str = ""
    logits_checked: bool = False
    skipped: str = ""
    max_difference: float | None = None
    mean_difference: float | None = None
    agreement: float | None = None
    spread: float | None = None
    bound: float | None = None
    accepted: bool = False

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def combine(
    parts: Mapping[str | Path, float] | Sequence[tuple[str | Path, float]],
    out: str | Path,
    *,
    method: str = "linear",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    scale: float = 1.0,
    seed: int = 0,
    head: str | Path | None = None,
    base: str | Path | None = None,
    merged: bool = False,
    dtype: str | None = None,
    rows: list[Any] | None = None,
    check_logits: bool = True,
    accept: bool = False,
    search: Any = None,
    trials: int = TRIALS,
) -> CombineReport:
    """Make one adapter of several, or merge them all into their backbone.

    What is added up is what training did to each tensor of the backbone, so that it does not matter how each adapter
    keeps it: rslora's scale, DoRA's magnitudes, biases, ranks that differ, whole tensors. One adapter at weight 1 is
    copied, bit for bit. Without `rank` and `energy` nothing is left out.

    A merged model must answer, read back from its folder, as what it was made of. One adapter at weight 1: as that
    adapter does on its backbone. Several, or another weight: as the backbone in memory, to whose tensors the method's
    change was added; for linear, cat, task-arithmetic and negate that is the weighted sum of what each adapter did, for
    ties, dare and della what the method makes of it, with the same draws. No trained model answers so.

    Args:
        parts: adapter folder -> weight, or pairs of them.
        out: the folder to write; new, empty, or an adapter (of `merged`: a merge) of ours, which is replaced whole.
        method: "linear", "cat" and "task-arithmetic" are the weighted sum (Ilharco et al., 2023); "svd" is the sum cut
            to a rank; "ties" leaves small entries out and lets the rest vote on each sign (Yadav et al., 2023); "dare"
            leaves entries out at random and scales up the others (Yu et al., 2024); "della" leaves small ones out more
            often, and votes (Deep et al., 2024); "negate" takes one adapter away.
        rank: of the factors at most; what that leaves out is reported.
        energy: instead of it, the share of each change's squared norm that is kept.
        density: the share of entries that ties, dare and della keep; None for 0.2, 0.5 and 0.5.
        scale: what every weight is multiplied by.
        seed: of what dare, della and the search draw.
        head: the adapter whose new head the result has, where several bring one.
        base: the backbone's folder, where it is not the one that the adapters name.
        merged: write the backbone with everything in it instead: a plain transformers folder, exactly.
        dtype: of a merged model's tensors; None keeps each tensor's own.
        rows: of a merged model: raw rows of the task (or texts) for the logits check; None makes some up.
        check_logits: of a merged model: compare its logits in a child process.
        accept: of a merged model: go on where rounding to 16 bits moves the logits further than the bound.
        search: labelled rows to look for better weights on, as `evaluate` takes them; it begins at the given ones.
        trials: how many weights are measured at most.

    Returns:
        The report.

    Raises:
        RequestError: an unknown method, a weight that is no number, a rank above the matrix, two new heads, other
            added tokens, another storage, tensors that the result's model class does not have.
        BackboneError: different backbones.
        FolderError: a damaged adapter, an output that holds something else or is one of the inputs.
        NumbersError: tensors that are not finite, a merged model that does not answer as it must; nothing is left.
        DataError: rows without labels.
        DiskError: the disk is full or fails; nothing is left behind.
    """
    exactness.refuse_rows(rows)
    pairs: list[tuple[Any, ...]] = [tuple(part) for part in (parts.items() if isinstance(parts, Mapping) else parts)]
    how, weights = _checked(pairs, method, scale, density, rank, energy)
    kept = how.density if density is None else float(density)
    target = Path(out).expanduser()
    folders: list[str | Path] = [pair[0] for pair in pairs]
    _refuse_same(target, [manifest.fetch(folder) for folder in folders])
    if merged:
        if rank is not None or energy is not None or how.cuts:
            raise RequestError(
                message(
                    "a merge is exact: there is no rank to cut",
                    where="rank, energy, method",
                    found=method,
                    remedy="Leave rank and energy out, with another method than svd; or merge what was combined.",
                )
            )
        refuse_output(target)
    else:
        manifest.refuse_foreign(target)
        if dtype is not None:
            raise RequestError(message("a dtype is a merged model's", where="dtype", remedy="Say merged as well."))
        if rows is not None or accept or not check_logits:
            where = "rows" if rows is not None else "accept" if accept else "check_logits"
            raise RequestError(
                message("the logits of a merged model are compared", where=where, remedy="Say merged as well.")
            )
    mix = opened(folders, method=how, density=kept, scale=scale, seed=seed, head=head, base=base)
    _refuse_same(target, [mix.base.folder])
    if base is not None:  # sums of factors never ask for its values, and yet it must be the adapters' own
        for name in [name for name in mix.names if name in mix.base.steps or name in mix.base.stacks]:
            mix.base.compare(name)
    mix.refuse_rank(rank, energy)
    signs = tuple(-weight for weight in weights) if how.single else weights
    tried, metric = _searched(mix, signs, rank, energy, search, trials, seed, base) if search is not None else ([], "")
    if tried:
        signs = chosen(tried).weights
        logger.info("the best of %d weights by %s: %s", len(tried), metric, _named(folders, signs))
    report = CombineReport(
        str(target),
        "merged" if merged else "adapter",
        method,
        tuple(map(str, folders)),
        signs,
        str(mix.like.folder) if mix.like.head else "",
        searched=tuple({"weights": list(found.weights), **found.numbers} for found in tried),
        metric=metric,
    )
    if merged:
        return _merged(mix, report, target, dtype, _Check(rows, check_logits, accept, named=head is not None))
    made = {
        "by": "combine",
        "from": list(report.parts),
        "digests": [part.document["digest"] for part in mix.parts],
        "method": method,
        "weights": [weight * scale for weight in signs],
        **({"density": kept} if how.thins is not None else {}),
        **({"seed": seed} if how.draws or tried else {}),
        **({"rank": rank} if rank is not None else {}),
        **({"energy": energy} if energy is not None else {}),
        **({"head": report.head} if report.head else {}),
        **({"search": {"metric": metric, "trials": len(tried), **chosen(tried).numbers}} if tried else {}),
    }
    itself = _itself(mix, signs, rank, energy)
    if itself is not None:
        made["error"] = 0.0
        remake.copied(target, itself, made=made, notes=list(itself.document["notes"]))
        return _described(report, target, Made({}, {}, {}), itself=True)
    with progress.Job("combining"):
        result = mix.made(signs, rank=rank, energy=energy)
    made |= {"error": result.error, "worst": dict([result.worst])} if result.fits else {"error": 0.0}
    held: dict[str, Any] = {"factors": result.factors, "stacks": result.stacks, "whole": result.whole}
    remake.write(target, mix.like, mix.base.folder, **held, made=made)
    return _described(report, target, result, mix.paths())


def _named(folders: Sequence[str | Path], weights: Sequence[float]) -> str:
    return ", ".join(f"{Path(folder).name} {weight:g}" for folder, weight in zip(folders, weights, strict=True))


def _described(
    report: CombineReport, target: Path, result: Made, maps: Sequence[str] = (), itself: bool = False
) -> CombineReport:
    """The report with what was written."""
    document = manifest.read_manifest(target)
    ranks = [pair.rank for pair in result.factors.values()] + [pair.rank for pair in result.stacks.values()] or [0]
    worst, share = result.worst
    return replace(
        report,
        strategy=document["strategy"]["name"],
        modules=len(result.factors),
        stacks=len(result.stacks),
        whole=len(result.whole),
        dense=sum(f"{path}.weight" in result.whole for path in maps),
        ranks=(min(ranks), max(ranks)),
        parameters=sum(math.prod(entry["shape"]) for entry in document["tensors"].values()),
        bytes=document["files"][manifest.WEIGHTS]["size"],
        error=result.error,
        worst=worst,
        worst_error=share,
        itself=itself,
    )


def _itself(mix: Mixture, weights: Sequence[float], rank: int | None, energy: float | None) -> Changes | None:
    """The one adapter that the whole is, where it is one."""
    there = [(part, weight) for part, weight in zip(mix.parts, weights, strict=True) if weight != 0]
    if rank is not None or energy is not None or mix.density != 1 or len(there) != 1:
        return None
    part, weight = there[0]
    return part if weight * mix.scale == 1 and part is mix.like else None


def _merged(mix: Mixture, report: CombineReport, target: Path, dtype: str | None, check: _Check) -> CombineReport:
    """Everything in the backbone, tensor by tensor, and proof that it answers as it must."""
    found = Changes(mix.like.folder, mix.like.document, mix.edits(report.weights))
    there = [p for p, weight in zip(mix.parts, report.weights, strict=True) if weight != 0 or p is mix.like]
    digests = list(dict.fromkeys(part.document["digest"] for part in there))
    itself = _itself(mix, report.weights, None, None) is not None
    how = "the weighted sum of" if mix.method.sums else f"what {report.method} makes of"
    whole = f"the backbone in memory, with {how} what the adapters did in it"
    against = "the adapter itself, on its backbone" if itself else whole
    mixed = {
        "folders": [str(part.folder) for part in mix.parts],
        "method": report.method,
        "density": mix.density,
        "scale": mix.scale,
        "seed": mix.seed,
        "head": str(mix.like.folder) if check.named else None,
    }
    measure = functools.partial(reference.measured, mixed, report.weights)
    done = written(
        found,
        target,
        base=mix.base.folder,
        dtype=dtype,
        merged=digests,
        rows=check.rows,
        check_logits=check.logits,
        accept=check.accept,
        proof=None if itself else Proof("the combined adapters do in memory", measure),
    )
    skipped = done.skipped if check.logits else "the logits check was not asked for"
    seen = {name: getattr(done, name) for name in SEEN}
    report = replace(report, whole=done.edited, parameters=done.edited, bytes=done.bytes, against=against)
    return replace(report, **seen, skipped=skipped, itself=itself)


# ---------------------------------------------------------------------- what is asked for


def _checked(
    pairs: Sequence[tuple[Any, ...]],
    method: str,
    scale: float,
    density: float | None,
    rank: int | None,
    energy: float | None,
) -> tuple[Method, tuple[float, ...]]:
    """The method and the weights; all faults of the request at once."""
    if method not in METHODS:
        raise RequestError(message(f"unknown method {method!r}", where="method", remedy=nearest(str(method), METHODS)))
    how, faults = METHODS[method], []
    lowrank.check_size(rank, energy)
    for pair in pairs:
        if len(pair) != 2 or not _is_number(pair[1]):
            found = repr(pair[1]) if len(pair) == 2 else repr(pair)
            faults.append(
                message("a weight that is no number", where=str(pair[0]), expected="a finite number", found=found)
            )
    if not pairs:
        faults.append(message("there is nothing to combine", expected="at least one adapter", remedy="Give folders."))
    elif not faults and not any(weight for _, weight in pairs):
        faults.append(message("every weight is 0", where="weights", remedy="Give one that is not."))
    if not _is_number(scale) or scale == 0:
        faults.append(message("a wrong scale", where="scale", expected="a number that is not 0", found=repr(scale)))
    if density is not None and how.thins is None:
        thinning = ", ".join(name for name, row in METHODS.items() if row.thins is not None)
        faults.append(
            message(
                "a density that nothing asks for",
                where=f"method {method!r}",
                expected=thinning,
                remedy="Leave density out, or take one of these methods.",
            )
        )
    elif density is not None and not (_is_number(density) and 0 < density <= 1):
        faults.append(
            message("a wrong density", where="density", expected="a share above 0, up to 1", found=repr(density))
        )
    if how.cuts and rank is None and energy is None:
        faults.append(message(f"{method} needs a rank or an energy", where="rank, energy", remedy="Give one."))
    if how.single and len(pairs) > 1:
        remedy = "Give one, or take others away by negative weights: method 'linear'."
        faults.append(message(f"{method} takes one adapter", where="adapters", found=len(pairs), remedy=remedy))
    if faults:
        raise RequestError(*faults)
    return how, tuple(float(weight) for _, weight in pairs)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refuse_same(target: Path, sources: Sequence[Path]) -> None:
    """The output never is one of the inputs.

    Raises:
        FolderError: it is.
    """
    for source in sources:
        if target.resolve() == source.resolve():
            raise FolderError(
                message("the output is one of the inputs", where=str(target), remedy="Give another output.")
            )


# ---------------------------------------------------------------------- weights


def _searched(
    mix: Mixture,
    start: Sequence[float],
    rank: int | None,
    energy: float | None,
    rows: Any,
    trials: int,
    seed: int,
    base: str | Path | None,
) -> tuple[list[Tried], str]:
    """What weights are worth on rows: one live model, whose adapter takes the tensors of each weights in place.

    Returns:
        What was tried, and the metric that decides.
    """
    if energy is not None:
        raise RequestError(
            message("a search needs ranks that stay", where="energy, search", remedy="Give a rank, or neither.")
        )
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise RequestError(message("a wrong number of trials", where="trials", expected="1 or more", found=trials))
    mix = Mixture(**{**{name: getattr(mix, name) for name in Mixture.__dataclass_fields__}, "kept": {}})
    made = mix.made(start, rank=rank, fixed=True)
    with tempfile.TemporaryDirectory(prefix="holdfast-") as place:
        folder = remake.write(
            Path(place) / "start",
            mix.like,
            mix.base.folder,
            factors=made.factors,
            stacks=made.stacks,
            whole=made.whole,
            made={"by": "combine", "from": []},
        )
        adapted = storage.load(folder, base)
        task = adapted.task
        raw, _ = arrange(one(rows), None, task.columns)
        prepared, _ = task.prepare(raw, adapted.processor, adapted.model, labelled=True)

        def measure(weights: tuple[float, ...]) -> Mapping[str, float]:
            tensors = mix.state(adapted, mix.made(weights, rank=rank, fixed=True))
            storage.put(adapted, tensors, str(folder))
            numbers = evaluate(adapted, prepared)
            job.advance()
            return numbers

        metric, greater = task.best_metric
        with progress.Job("trying weights", trials, "weights") as job:
            return weighed(start, measure, metric, greater, trials=trials, seed=seed), metric
