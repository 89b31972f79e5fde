"""Adapters written for other programs: what they compute is what was trained, and what they cannot take is refused."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from warm_host import Warm

import adapters
from adapters import changes, exactness, factorfiles, gguffile, lint, lowrank, readback, served, shards
from adapters.export import TARGETS, findings
from adapters.readers import NOTED, REFUSED, REWRITTEN, ExportOptions

AUTO = {"bert": "text-classification", "gpt2": "causal-lm", "llama": "causal-lm", "t5": "seq2seq"}
HEADS = {"causal-lm": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM"}
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"r": 3},
    "rslora": {"r": 4, "rank_pattern": {".*1.*": 2}, "alpha_pattern": {".*2.*": 3.0}},
    "freeze": {"layers": 1},
    "oft": {"oft_block_size": 8},
    "pissa": {"r": 2},
}
LORA = ("lora", "rslora", "pissa")  # plain low-rank updates: exact everywhere
PEFT = (*LORA, "dora", "oft")  # what peft reads itself
STRATEGIES = (*PEFT, "full", "freeze", "bitfit")
SERVERS = ("vllm", "tgi", "llama.cpp")
IMPOSSIBLE = {("gpt2", "oft"), ("llama", "bitfit"), ("t5", "bitfit")}  # peft refuses the first; there are no biases
IMPOSSIBLE |= {("bert", "pissa"), ("t5", "pissa"), ("t5", "oft")}  # nor anything that the other cells do not show
CELLS = [(kind, strategy) for kind in AUTO for strategy in STRATEGIES if (kind, strategy) not in IMPOSSIBLE]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The logits are compared in this process, but where the command is run."""
    if request.function is not test_the_command:
        monkeypatch.setattr(
            readback,
            "compared",
            lambda target, adapter, base, written, rows, heads: readback.compare(
                target, str(adapter), str(base), str(written), rows, heads
            ),
        )


@cache
def made(place: Path, kind: str, strategy: str, task: str = "", **changed: Any) -> tuple[Path, Any]:
    """An adapter that does something, and the logits of its model."""
    task = task or AUTO[kind]
    base = place / f"{kind}-{task}"
    if not base.exists():
        tiny.folder(kind, base, auto=HEADS.get(task, "AutoModel"))
    options = OPTIONS.get(strategy, {}) | {name: list(v) if isinstance(v, tuple) else v for name, v in changed.items()}
    if task == "text-classification":
        options["labels"] = list(tiny.LABELS)
    adapted = adapters.adapt(str(base), strategy, task=task, **options)
    tiny.shake(adapted)
    name = "-".join([kind, task, strategy, *(f"{name}{value}" for name, value in changed.items())])
    folder = adapters.save(adapted, place / name.replace("/", "_").replace(" ", ""))
    return folder, tiny.logits(adapted.model, tiny.inputs(adapted.model))


def wanted(folder: Path) -> dict[str, torch.Tensor]:
    """What the adapter adds to each weight, as (out, in), from its edits and the backbone's values."""
    found = changes.read(folder)
    base = changes.originals(found)
    result = {}
    for name, edit in found.inside.items():
        delta = base.delta(name, edit)
        if delta.ndim == 2 and name.endswith(".weight"):
            flat = "gpt2" in folder.name and "h." in name
            result[name.removesuffix(".weight")] = delta.T if flat else delta
    return result


# ---------------------------------------------------------------------- what goes out


@pytest.mark.parametrize("target", ["peft", *SERVERS])
@pytest.mark.parametrize(("kind", "strategy"), CELLS)
def test_an_adapter_goes_out_exactly_or_is_refused(
    place: Path, tmp_path: Path, kind: str, strategy: str, target: str
) -> None:
    folder, logits = made(place, kind, strategy)
    served_here = {"llama": SERVERS, "gpt2": ("llama.cpp",)}.get(kind, ())
    fits = (target == "peft" and strategy in PEFT) or (target in served_here and strategy in LORA)
    if not fits:
        with pytest.raises(adapters.RequestError, match=f"^{target} cannot take"):
            adapters.export(folder, tmp_path / "out", to=target)
        assert not (tmp_path / "out").exists()
        assert any(finding.done == REFUSED for finding in findings(folder, to=target))
        return
    report = adapters.export(folder, tmp_path / "out", to=target)
    assert report.compared
    assert report.weight_error == 0
    assert report.spread is not None
    assert report.max_difference is not None
    assert report.max_difference <= 1e-4 * report.spread
    assert report.files == {
        file.relative_to(tmp_path / "out").as_posix(): file.stat().st_size
        for file in (tmp_path / "out").rglob("*")
        if file.is_file()
    }
    if target == "peft":
        assert peft_logits(kind, tmp_path / "out", place).sub(logits).abs().max() < 1e-5
        return
    assert findings(folder, to=target) == list(report.findings)
    got = read(target, tmp_path / "out", kind, place)
    ours = wanted(folder)
    assert set(got) == set(ours)
    for path, delta in ours.items():
        torch.testing.assert_close(got[path], delta, atol=1e-6, rtol=1e-5)


def peft_logits(kind: str, folder: Path, place: Path) -> torch.Tensor:
    """Plain peft over plain transformers."""
    import peft
    import transformers

    task = AUTO[kind]
    auto = getattr(transformers, HEADS.get(task, tiny.CLASSIFICATION))
    more = {"num_labels": 3} if task == "text-classification" else {}
    net = auto.from_pretrained(place / f"{kind}-{task}", **more)
    inputs = tiny.inputs(net)
    return tiny.logits(peft.PeftModel.from_pretrained(net, folder), inputs)


def read(target: str, folder: Path, kind: str, place: Path) -> dict[str, torch.Tensor]:
    """A server's deltas by module path."""
    net = tiny.model(kind, auto="AutoModelForCausalLM")
    return dict(readback.seen(target, folder, net, False, 16).deltas)


@pytest.mark.parametrize("target", ["peft", *SERVERS])
@pytest.mark.parametrize("strategy", ["dora", "oft", "lora"])
def test_a_rank_turns_any_method_into_plain_lora_at_a_measured_error(
    place: Path, tmp_path: Path, strategy: str, target: str
) -> None:
    folder, _ = made(place, "llama", strategy)
    whole = adapters.export(folder, tmp_path / "whole", to=target, rank=32, max_rank=32)
    assert whole.weight_error < 1e-6
    assert whole.max_difference is not None
    assert whole.spread is not None
    assert whole.max_difference <= 1e-4 * whole.spread
    cut = adapters.export(folder, tmp_path / "cut", to=target, rank=2)
    ours = wanted(folder)
    fits = [lowrank.factored(delta, rank=2) for delta in ours.values()]
    error = sum(fit.error**2 for fit in fits) ** 0.5 / sum(fit.norm**2 for fit in fits) ** 0.5
    assert cut.rank == 2
    assert cut.weight_error == pytest.approx(error, rel=1e-3)
    assert cut.weight_error > 0.1
    assert any(finding.done == REWRITTEN for finding in cut.findings)
    if target not in ("peft", "llama.cpp"):
        config = json.loads((tmp_path / "cut" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["use_rslora"], config["use_dora"]) == (2, 2, False, False)
        assert not config.get("rank_pattern")
        assert not config.get("alpha_pattern")


def test_whole_matrices_and_norms_go_to_peft_beside_the_factors(place: Path, tmp_path: Path) -> None:
    for strategy in ("full", "freeze"):
        folder, logits = made(place, "bert", strategy)
        report = adapters.export(folder, tmp_path / strategy, to="peft", rank=32)
        assert report.weight_error < 1e-6
        torch.testing.assert_close(peft_logits("bert", tmp_path / strategy, place), logits, atol=1e-4, rtol=1e-4)
        assert [finding.done for finding in report.findings if finding.what == "whole tensors"] == [NOTED]


def test_trained_biases_and_norms_are_seen_before_anything_is_written(place: Path, tmp_path: Path) -> None:
    norms, _ = made(place, "llama", "lora", unfrozen_parameters=("norm",))
    for target in SERVERS:
        with pytest.raises(adapters.RequestError, match=r"whole tensors.*layernorm.*--to transformers"):
            adapters.export(norms, tmp_path / "out", to=target)


def test_biases_that_only_a_merge_shows_are_refused(tmp_path: Path) -> None:
    """ia3 scales the outputs of keys and values, their biases with them."""
    net = tiny.backbone("gpt2", auto="AutoModelForCausalLM")
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    net.save_pretrained(tmp_path / "base")
    tiny.processor("gpt2").save_pretrained(tmp_path / "base")
    adapted = adapters.adapt(str(tmp_path / "base"), "ia3", task="causal-lm")
    tiny.shake(adapted)
    folder = adapters.save(adapted, tmp_path / "adapter")
    with pytest.raises(adapters.RequestError, match=r"whole tensors.*c_attn\.bias.*--to transformers"):
        adapters.export(folder, tmp_path / "out", to="llama.cpp", rank=32)
    assert [f.what for f in findings(folder, to="llama.cpp", rank=32) if f.done == REFUSED] == ["whole tensors"]
    report = adapters.export(folder, tmp_path / "out", to="peft", rank=32)
    assert report.compared
    assert report.weight_error < 1e-6


def test_tgi_gets_zeros_where_a_block_has_no_factors(place: Path, tmp_path: Path) -> None:
    """TGI leaves out a kind of module in silence where one block lacks it."""
    folder, _ = made(place, "llama", "lora", layers_to_transform=(1,))
    net = tiny.model("llama", auto="AutoModelForCausalLM")
    names = [name for name, _ in net.named_modules() if lint.TGI_NAME.fullmatch(name)]
    assert served.tgi(folder, names).deltas == {}
    report = adapters.export(folder, tmp_path / "out", to="tgi")
    got = served.tgi(tmp_path / "out", names)
    ours = wanted(folder)
    assert set(got.deltas) == set(names) - {"lm_head"}
    assert got.ignored == ()
    for path, delta in got.deltas.items():
        torch.testing.assert_close(delta, ours.get(path, torch.zeros_like(delta)), atol=1e-6, rtol=1e-5)
    assert "blocks without factors" in [finding.what for finding in report.findings]


@pytest.mark.parametrize("target", ["vllm", "tgi", "llama.cpp"])
def test_half_precision_is_held_to_its_own_bound(place: Path, tmp_path: Path, target: str) -> None:
    folder, _ = made(place, "llama", "lora")
    report = adapters.export(folder, tmp_path / "out", to=target, dtype="float16")
    assert report.max_weight_difference is not None
    assert 0 < report.max_weight_difference < 1e-3
    assert report.compared
    whole = adapters.export(folder, tmp_path / "whole", to=target)
    assert report.bytes < 0.8 * whole.bytes


# ---------------------------------------------------------------------- GGUF


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "gpt2"])
def test_gguf_names_and_rows_are_those_of_its_architecture(place: Path, tmp_path: Path, kind: str) -> None:
    folder, _ = made(place, kind, "lora", "causal-lm")
    report = adapters.export(folder, tmp_path / "out", to="llama.cpp")
    assert report.max_weight_difference is not None
    assert report.max_weight_difference < 1e-6
    found = served.gguf(tmp_path / "out" / gguffile.FILE).deltas
    assert len(found) == len(wanted(folder))
    assert all(name.startswith("blk.") and name.endswith(".weight") for name in found)


def test_query_and_key_rows_stand_in_neighbouring_pairs_in_llamas_file(place: Path, tmp_path: Path) -> None:
    """Written out for one head of 8 rows: halves (0..3, 4..7) become pairs."""
    rows = torch.arange(16.0)[:, None]
    assert gguffile.rotated(rows, 2).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    folder, _ = made(place, "llama", "lora")
    adapters.export(folder, tmp_path / "out", to="llama.cpp")
    found = served.gguf(tmp_path / "out" / gguffile.FILE).deltas
    ours = wanted(folder)
    for name, path in (("attn_q", "q_proj"), ("attn_v", "v_proj")):
        delta = ours[f"model.layers.1.self_attn.{path}"]
        moved = not torch.allclose(found[f"blk.1.{name}.weight"], delta, atol=1e-6)
        assert moved == (path == "q_proj")
        torch.testing.assert_close(found[f"blk.1.{name}.weight"].sort(0)[0], delta.sort(0)[0], atol=1e-6, rtol=1e-5)


def test_gguf_says_what_it_is(place: Path, tmp_path: Path) -> None:
    import gguf

    folder, _ = made(place, "llama", "rslora")
    adapters.export(folder, tmp_path / "out", to="llama.cpp")
    fields = gguf.GGUFReader(tmp_path / "out" / gguffile.FILE).fields
    said = {name: field.contents() for name, field in fields.items()}
    assert said["general.type"] == "adapter"
    assert said["adapter.type"] == "lora"
    assert said["general.architecture"] == "llama"
    assert said["adapter.lora.alpha"] == 4.0


# ---------------------------------------------------------------------- what servers would have made of it


def test_what_readers_would_silently_get_wrong_is_another_number(place: Path) -> None:
    """The readers written here tell a plain folder that is read rightly from one that is not."""
    right, _ = made(place, "llama", "lora")
    wrong, _ = made(place, "llama", "rslora")
    for folder, same in ((right, True), (wrong, False)):
        ours = wanted(folder)
        for reader in (served.vllm, served.converted):
            got = reader(folder).deltas
            assert set(got) == set(ours)
            assert all(torch.allclose(got[path], delta, atol=1e-6) for path, delta in ours.items()) == same
    dora, _ = made(place, "llama", "dora")
    with pytest.raises(adapters.FolderError, match="DoRA"):
        served.vllm(dora)
    with pytest.raises(adapters.FolderError, match="magnitude"):
        served.converted(dora)
    bert, _ = made(place, "bert", "lora")
    with pytest.raises(adapters.FolderError, match="modules_to_save"):
        served.vllm(bert)
    assert served.tgi(bert, ["model.layers.0.self_attn.q_proj"]).deltas == {}
    high, _ = made(place, "llama", "lora", r=20)
    with pytest.raises(adapters.FolderError, match="a rank above 16"):
        served.vllm(high)


def test_a_reader_that_computes_something_else_ends_the_export(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = made(place, "llama", "lora")
    inner = gguffile.rotated
    monkeypatch.setattr(gguffile, "rotated", lambda rows, heads: rows)
    with pytest.raises(adapters.NumbersError, match=r"llama.cpp computes another change .*q_proj|k_proj"):
        adapters.export(folder, tmp_path / "out", to="llama.cpp")
    monkeypatch.setattr(gguffile, "rotated", inner)
    monkeypatch.setattr(factorfiles, "_verified", lambda *args: 0.0)
    monkeypatch.setattr(gguffile, "rotated", lambda rows, heads: 1.01 * rows)
    with pytest.raises(adapters.NumbersError, match="does not answer as the adapted model does"):
        adapters.export(folder, tmp_path / "out", to="llama.cpp")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- refusals


def refusals(place: Path) -> Iterator[tuple[str, Path, dict[str, Any], str]]:
    llama, bert = (made(place, kind, "lora")[0] for kind in ("llama", "bert"))
    yield (
        "a class vLLM has no LoRA for",
        made(place, "gpt2", "lora")[0],
        {"to": "vllm"},
        r"no LoRA for this class.*GPT2LMH",
    )
    yield (
        "a class llama.cpp's layout is not known of",
        made(place, "t5", "lora")[0],
        {"to": "llama.cpp"},
        "not known here",
    )
    yield "names TGI skips", made(place, "gpt2", "lora")[0], {"to": "tgi"}, r"never asks for.*in silence.*c_attn"
    for target in SERVERS:
        yield "a head", bert, {"to": target}, rf"^{target} cannot take a trained head.*classifier.*--to transformers"
    high = made(place, "llama", "lora", r=20)[0]
    yield "a rank above vLLM's", high, {"to": "vllm"}, r"r 20\). Serve it with --max-lora-rank 32 .* --rank 16"
    yield "a rank asked above vLLM's", made(place, "llama", "dora")[0], {"to": "vllm", "rank": 24}, "--max-lora-rank 32"
    for target in SERVERS:
        yield "full rank", made(place, "llama", "dora")[0], {"to": target}, "changes of full rank.*--rank 16"
        yield "only biases", made(place, "gpt2", "bitfit")[0], {"to": target}, "without low-rank factors"
    tokens = made(place, "llama", "lora", added_tokens=("<a>", "<b>"))[0]
    for target in ("peft", *SERVERS):
        yield "added tokens", tokens, {"to": target}, r"added tokens.*'<a>', '<b>'.*--to transformers"
    table = made(place, "llama", "lora", target_modules=("embed_tokens", "q_proj"))[0]
    for target in ("vllm", "llama.cpp"):
        yield "an embedding", table, {"to": target}, "factors outside the blocks.*embed_tokens"
    yield "an embedding for TGI", table, {"to": "tgi"}, "never asks for.*embed_tokens"
    elsewhere = made(place, "bert", "lora", pooling="mean")[0]
    for target in ("peft", *SERVERS):
        yield "a head elsewhere", elsewhere, {"to": target}, "head that reads elsewhere.*mean"
    yield "an unknown target", llama, {"to": "vlm"}, "unknown target 'vlm'.*Did you mean 'vllm'"
    yield "a dtype", llama, {"to": "llama.cpp", "dtype": "bfloat16"}, "expected float32, float16; found bfloat16"
    yield "no rank", llama, {"to": "peft", "rank": 0}, "a wrong rank"
    yield "no highest rank", llama, {"to": "vllm", "max_rank": 0}, "a wrong rank"
    yield "a rank for a merge", llama, {"to": "transformers", "rank": 4}, "a merged model has no rank"
    yield "itself", llama, {"to": "peft", "out": llama}, "the output is the adapter itself"
    yield "inside itself", llama, {"to": "transformers", "out": llama / "x"}, "the output lies in the adapter's folder"


def test_what_a_reader_cannot_take_is_refused_with_its_reason(place: Path, tmp_path: Path) -> None:
    count = 0
    for case, folder, options, said in refusals(place):
        out = options.pop("out", tmp_path / "out")
        before = sorted(folder.iterdir())
        with pytest.raises(adapters.RequestError, match=said):
            adapters.export(folder, out, **options)
        assert not (tmp_path / "out").exists(), case
        assert sorted(folder.iterdir()) == before, case
        count += 1
    assert count == 32


def test_an_adapter_that_changes_nothing_is_refused(place: Path, tmp_path: Path) -> None:
    made(place, "llama", "lora")
    adapted = adapters.adapt(str(place / "llama-causal-lm"), "oft", task="causal-lm", oft_block_size=8)
    folder = adapters.save(adapted, tmp_path / "still")
    with pytest.raises(adapters.RequestError, match=r"without low-rank factors.*changes none.*'peft'"):
        adapters.export(folder, tmp_path / "out", to="vllm", rank=4)
    assert not (tmp_path / "out").exists()


def test_every_refusal_of_an_adapter_is_said_at_once(place: Path, tmp_path: Path) -> None:
    folder, _ = made(place, "bert", "full")
    with pytest.raises(adapters.RequestError) as fault:
        adapters.export(folder, tmp_path / "out", to="vllm")
    for what in ("a trained head", "this backbone", "whole tensors", "changes of full rank"):
        assert what in str(fault.value)


def test_a_head_goes_to_a_vllm_that_takes_it(place: Path, tmp_path: Path) -> None:
    folder, _ = made(place, "llama", "lora", "text-classification")
    with pytest.raises(adapters.RequestError, match=r"Newer versions take .*: --heads"):
        adapters.export(folder, tmp_path / "out", to="vllm")
    report = adapters.export(folder, tmp_path / "out", to="vllm", heads=True)
    assert report.compared
    got = served.vllm(tmp_path / "out", heads=True)
    assert [name.split(".")[-2] for name in got.whole] == ["score"]
    with pytest.raises(adapters.FolderError, match="modules_to_save"):
        served.vllm(tmp_path / "out")


def test_four_bits_are_told_and_not_compared_with_full_precision(place: Path, tmp_path: Path) -> None:
    folder, _ = made(place, "llama", "qlora")
    report = adapters.export(folder, tmp_path / "out", to="vllm")
    assert [finding.what for finding in report.findings if finding.done == NOTED] == ["frozen weights in nf4"]
    assert not report.compared
    assert "nf4" in report.skipped
    assert report.max_weight_difference is not None
    assert report.max_weight_difference < 1e-6


# ---------------------------------------------------------------------- folders


def test_a_folder_that_is_taken_stays(place: Path, tmp_path: Path) -> None:
    folder, _ = made(place, "llama", "lora")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(adapters.FolderError, match=r"already holds something else.*mine\.txt"):
        adapters.export(folder, tmp_path / "out", to="peft")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    again = tmp_path / "again"
    adapters.export(folder, again, to="peft")
    report = adapters.export(folder, again, to="llama.cpp")  # an earlier export is replaced whole
    assert sorted(entry.name for entry in again.iterdir()) == ["README.md", "adapter.gguf", "export.json"]
    mark = json.loads((again / "export.json").read_text())
    assert mark["target"] == "llama.cpp"
    assert mark["files"]["adapter.gguf"]["sha256"] == shards.sha256(again / "adapter.gguf")
    assert mark["max_difference"] == report.max_difference


def test_another_backbone_is_refused(place: Path, tmp_path: Path) -> None:
    folder, _ = made(place, "llama", "dora")
    other = tiny.folder("llama", tmp_path / "other", seed=7, auto="AutoModelForCausalLM")
    with pytest.raises(adapters.BackboneError):
        adapters.export(folder, tmp_path / "out", to="vllm", rank=8, base=other)
    plain, _ = made(place, "llama", "lora")  # whose factors need no value of the backbone
    for target in ("peft", "vllm", "llama.cpp"):
        with pytest.raises(adapters.BackboneError):
            adapters.export(plain, tmp_path / "out", to=target, base=other, check=False)
    bert = tiny.folder("bert", tmp_path / "bert")
    for target in ("peft", "vllm", "tgi", "llama.cpp", "transformers"):
        with pytest.raises(adapters.BackboneError, match=r"of type llama; found .*of type bert|base lacks tensors"):
            adapters.export(plain, tmp_path / "out", to=target, base=bert, check=False)
    with pytest.raises(adapters.BackboneError, match="of type llama; found"):
        findings(plain, to="vllm", base=bert)
    assert not (tmp_path / "out").exists()


def test_what_a_merge_rounds_may_be_accepted(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal says `--accept`, so the export takes it."""
    folder, _ = made(place, "llama", "lora")
    monkeypatch.setattr(exactness, "BOUNDS", {kind: 1e-4 * bound for kind, bound in exactness.BOUNDS.items()})
    options: dict[str, Any] = {"to": "transformers", "dtype": "bfloat16"}
    with pytest.raises(adapters.NumbersError, match=r"go on with accept=True \(--accept\)"):
        adapters.export(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    report = adapters.export(folder, tmp_path / "out", accept=True, **options)
    assert report.compared
    assert (report.max_difference or 0) > 0


@pytest.mark.parametrize(("target", "writer"), [("vllm", "save_tensors"), ("llama.cpp", "flush"), ("peft", "copy")])
def test_a_disk_that_is_full_half_way_leaves_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, writer: str
) -> None:
    folder, _ = made(place, "llama", "lora")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    adapters.export(folder, tmp_path / "out", to="vllm")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(shards, writer, full)
    with pytest.raises(adapters.DiskError, match="No space left"):
        adapters.export(folder, tmp_path / "out", to=target)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_an_exported_peft_folder_opens_here_too(place: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, logits = made(place, "llama", "rslora")
    adapters.export(folder, tmp_path / "out", to="vllm")
    net = AutoModelForCausalLM.from_pretrained(place / "llama-causal-lm")
    adapted = adapters.load(tmp_path / "out", net, verify="off")
    torch.testing.assert_close(tiny.logits(adapted.model, tiny.inputs(adapted.model)), logits, atol=1e-5, rtol=1e-4)


def test_peft_is_handed_its_own_tensors_bit_for_bit(place: Path, tmp_path: Path) -> None:
    folder, _ = made(place, "bert", "dora")
    adapters.export(folder, tmp_path / "out", to="peft")
    ours, theirs = (load_file(here / "adapter_model.safetensors") for here in (folder, tmp_path / "out"))
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not (tmp_path / "out" / "adapter.json").exists()


def test_the_whole_model_goes_out_where_nothing_else_does(place: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder, logits = made(place, "bert", "bitfit")
    report = adapters.export(folder, tmp_path / "out", to="transformers", check=False)
    assert report.skipped == "not asked for"
    net = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(tiny.logits(net, tiny.inputs(net)), logits, atol=1e-5, rtol=1e-4)
    assert "model.safetensors" in report.files


# ---------------------------------------------------------------------- lint and command


def test_lint_reads_no_weight_and_writes_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = made(place, "llama", "dora")
    found = changes.read(folder)
    from adapters.anatomy import linear_maps

    maps = linear_maps(tiny.model("llama", auto="AutoModelForCausalLM"))
    monkeypatch.setattr(shards, "read_tensor", lambda slot: pytest.fail("a tensor was read"))
    for target in TARGETS:
        first = lint.lint(found, maps, target, ExportOptions())
        assert first == lint.lint(found, maps, target, ExportOptions())
        assert all(finding.what and finding.where and finding.why for finding in first)
        assert all(finding.remedy for finding in first if finding.done == REFUSED)


def test_the_command(place: Path, tmp_path: Path, warm: Warm) -> None:
    folder, _ = made(place, "llama", "rslora")
    code, text, said = warm.command("export", folder, "-o", tmp_path / "out", "--to", "llama.cpp")
    assert code == 0, said
    assert "rewritten the scale" in text
    assert "logits within" in text
    assert f"--lora {tmp_path}/out/adapter.gguf" in text
    code, text, _ = warm.command("export", folder, "--to", "vllm", "--check")
    assert code == 0
    assert text.splitlines()[-1].split() == ["vllm", "takes", "it"]
    bert, _ = made(place, "bert", "lora")
    code, text, _ = warm.command("export", bert, "--to", "tgi", "--check", "--json")
    assert code == 0
    assert {finding["done"] for finding in json.loads(text)["findings"]} >= {"refused"}
    code, _, said = warm.command("export", bert, "-o", tmp_path / "no", "--to", "tgi")
    assert code == 2
    assert "tgi cannot take a trained head" in said
    code, _, said = warm.command("export", bert, "--to", "tgi")
    assert code == 2
    assert "Give -o FOLDER" in said
