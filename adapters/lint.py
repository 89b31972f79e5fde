"""What a reader of adapters takes, refuses, or gets wrong without a word: one adapter held against its rules.

The rules are facts about the loaders' sources and documentation: vLLM's peft helper and LoRA model, TGI's adapter
loader, llama.cpp's converter and loader. `docs/howto/export.md` has them as a table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from adapters import reading
from adapters.edits import AddLowRank, AddLowRanks, MergeLayer
from adapters.facts import SIDECAR
from adapters.readers import NOTED, REFUSED, REWRITTEN, ExportOptions, Finding
from adapters.storage import task_of

if TYPE_CHECKING:
    from adapters.anatomy import LinearMap
    from adapters.changes import Changes
    from adapters.edits import Edit

PEFT, VLLM, TGI, LLAMA_CPP = "peft", "vllm", "tgi", "llama.cpp"
FACTORS = (PEFT, VLLM, TGI, LLAMA_CPP)  # readers of low-rank factors; the others read whole models
MERGED = "Write the whole model: --to transformers."
# Ranks that vLLM's --max-lora-rank can be set to.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_HEADS = ("classifier", "score")  # what newer versions take beside the factors
# Language models of transformers for which vLLM's table of models has LoRA.
_VLLM = (
    "Apertus Arcee Cohere Cohere2 Cwm DeepseekV2 DeepseekV3 Ernie4_5 Ernie4_5_Moe Exaone4 FalconH1 Gemma Gemma2 "
    "Gemma3 GPTBigCode Glm Glm4 Glm4Moe GptOss Granite GraniteMoe GraniteMoeHybrid GraniteMoeShared HunYuanDenseV1 "
    "Lfm2 Llama Mistral Mixtral Nemotron OPT Olmo Olmo2 Olmo3 Phi Phi3 Qwen2 Qwen2Moe Qwen3 Qwen3Moe Qwen3Next "
    "SeedOss SmolLM3 Starcoder2 VaultGemma"
)
VLLM_MODELS = frozenset(f"{name}ForCausalLM" for name in _VLLM.split())
# Where TGI looks for factors: it asks for these names, and never for others.
TGI_NAME = re.compile(
    r"model\.layers\.(?P<block>\d+)\."
    r"(?P<layer>self_attn\.(q|k|v|o)_proj|mlp\.(gate_proj|up_proj|down_proj|c_fc|c_proj))|lm_head"
)
# transformers' class -> llama.cpp's architecture, where the two differ by no more than names, the order of rows that
# rotary positions need (llama), and the side on which the input stands (gpt2).
GGUF_MODELS = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Phi3ForCausalLM": "phi3",
    "GPT2LMHeadModel": "gpt2",
}


def lint(changes: Changes, maps: Mapping[str, LinearMap], target: str, options: ExportOptions) -> list[Finding]:
    """What the target makes of an adapter; reads no weights and changes nothing.

    Args:
        changes: the adapter's.
        maps: the linear maps inside the backbone's blocks.
        target: a reader's name.
        options: of the export.
    """
    found = [*_of_the_model(changes, target, options)]
    if target not in FACTORS:
        return found
    low = {name.removesuffix(".weight"): edit for name, edit in changes.inside.items() if isinstance(edit, AddLowRank)}
    full, others = divided(changes, maps)
    experts = sorted(name for name, edit in changes.inside.items() if isinstance(edit, AddLowRanks))
    if not low and not full and not (experts and target == PEFT):
        found.append(nothing(changes, target))
    if target == PEFT and native(changes, options):
        return found
    found += _of_experts(experts, target)
    found += beside([name for name in others if name not in experts], target)
    if low or full:
        found += _ranks(low, full, target, options)
        found += _scales(changes, low, target)
        found += _names(sorted([*low, *full]), maps, target)
    return found


def _of_experts(names: Sequence[str], target: str) -> list[Finding]:
    """Factors beside stacks of experts."""
    if not names:
        return []
    remedy = "Leave --rank out: then the adapter goes out as it is." if target == PEFT else MERGED
    why = {
        PEFT: "cut to another rank they are not written here",
        VLLM: "it looks for the factors of each expert by itself, under other names",
        TGI: "it never asks for them, so they would be left out in silence",
        LLAMA_CPP: "its converter knows factors of linear maps alone",
    }[target]
    return [Finding("factors of experts", _few(names), REFUSED, why, remedy)]


def nothing(changes: Changes, target: str) -> Finding:
    """An adapter that changes no linear map inside the blocks."""
    where = f"strategy {changes.document['strategy']['name']!r}"
    why = f"{target} adds two factors' product to linear maps inside blocks, and this adapter changes none"
    return Finding("an adapter without low-rank factors", where, REFUSED, why, MERGED)


def native(changes: Changes, options: ExportOptions) -> bool:
    """Whether peft reads the adapter's own tensors: then they are handed over bit for bit."""
    return SIDECAR in changes.document["files"] and options.rank is None


def divided(changes: Changes, maps: Mapping[str, LinearMap]) -> tuple[dict[str, Edit], list[str]]:
    """Linear maps changed by more than factors, by path; names of other tensors of the backbone that are replaced.

    Whether a peft layer changes its bias is known only when it is merged: `beside` is asked again then.
    """
    full: dict[str, Edit] = {}
    beside = []
    for name, edit in changes.inside.items():
        path = name.removesuffix(".weight")
        if isinstance(edit, AddLowRank) or (isinstance(edit, MergeLayer) and edit.part == "bias"):
            continue
        if path in maps and path != name:
            full[path] = edit
        else:
            beside.append(name)
    return full, beside


# ---------------------------------------------------------------------- the rules


def _of_the_model(changes: Changes, target: str, options: ExportOptions) -> list[Finding]:
    document = changes.document
    backbone, kind = document["backbone"], document["backbone"]["model_class"]
    found = []
    read = reading.of(task_of(document, str(changes.folder)))
    if target in FACTORS and (backbone.get("inside") or read.elsewhere):
        place = "its folder" if backbone.get("inside") else str(read)
        why = f"{target} opens the plain model class, whose head reads at its own place"
        found.append(Finding("a head that reads elsewhere", f"{kind}, {place}", REFUSED, why, MERGED))
    if document["vocabulary"] is not None and target in FACTORS:
        tokens = ", ".join(map(repr, document["vocabulary"]["tokens"][:3]))
        why = f"{target} keeps the backbone's own vocabulary, in which these tokens have no rows"
        found.append(Finding("added tokens", tokens, REFUSED, why, MERGED))
    if backbone["quantization"] and target != "transformers":
        why = "the adapter was fitted to what they stood for then; over full-precision weights the answers differ"
        found.append(Finding("frozen weights in " + backbone["quantization"], kind, NOTED, why))
    heads = sorted({name.rpartition(".")[0] for name in document["head"]})
    if heads and target in (VLLM, TGI, LLAMA_CPP) and not (target == VLLM and options.heads and _served(heads)):
        new = (
            f"Newer versions take an output layer called {' or '.join(VLLM_HEADS)}: --heads. Else: --to transformers."
            if target == VLLM and _served(heads)
            else MERGED
        )
        found.append(Finding("a trained head", ", ".join(heads), REFUSED, f"{target} loads factors only", new))
    known = {VLLM: VLLM_MODELS, LLAMA_CPP: frozenset(GGUF_MODELS)}.get(target)
    if known is not None and _generator(kind, heads, options) not in known:
        why = "its table of models has no LoRA for this class" if target == VLLM else "how this class is laid out there"
        why = why if target == VLLM else f"{why} is not known here; known are {', '.join(sorted(known))}"
        found.append(Finding("this backbone", kind, REFUSED, why, MERGED))
    return found


def _served(heads: Sequence[str]) -> bool:
    return all(name.rpartition(".")[2] in VLLM_HEADS for name in heads)


def _generator(kind: str, heads: Sequence[str], options: ExportOptions) -> str:
    """The class that generates where a classifier is asked about: vLLM makes the one of the other."""
    return kind.replace("ForSequenceClassification", "ForCausalLM") if heads and options.heads else kind


def beside(names: Sequence[str], target: str) -> list[Finding]:
    """Whole tensors of the backbone that changed beside its matrices."""
    if not names:
        return []
    where = _few(names)
    if target == PEFT:
        why = "peft's loader copies them over the backbone's by their names, since it loads without strict keys"
        return [Finding("whole tensors", where, NOTED, why)]
    why = {
        VLLM: "its loader stops at a tensor that is no factor",
        TGI: "it never asks for them, so they would be left out in silence",
        LLAMA_CPP: "its loader stops at them, or leaves norms out in silence",
    }[target]
    return [Finding("whole tensors", where, REFUSED, why, MERGED)]


def _ranks(low: Mapping[str, Edit], full: Mapping[str, Edit], target: str, options: ExportOptions) -> list[Finding]:
    found = []
    if full:
        what = "changes of full rank"
        why = f"{target} adds products of two factors"
        if options.rank is None:
            remedy = "Give a rank: --rank 16 keeps the largest directions and measures the error. " + MERGED
            found.append(Finding(what, _few(list(full)), REFUSED, why, remedy))
        else:
            found.append(Finding(what, _few(list(full)), REWRITTEN, f"{why}: their largest {options.rank} directions"))
    ranks = {path: int(edit.down.shape[0]) for path, edit in low.items() if isinstance(edit, AddLowRank)}
    highest = max(ranks.values(), default=0)
    if options.rank is not None and highest > options.rank:
        above = [path for path, rank in ranks.items() if rank > options.rank]
        why = f"--rank {options.rank} keeps the largest directions of rank {highest}"
        found.append(Finding("a rank above the one asked for", _few(above), REWRITTEN, why))
    if target == VLLM:
        found += _served_rank(min(highest, options.rank or highest) if not full else options.rank or highest, options)
    if len(set(ranks.values())) > 1:
        why = f"{target} reads one rank for all; zeros make up for the difference"
        found.append(Finding("modules of different ranks", _few(list(ranks)), REWRITTEN, why))
    return found


def _served_rank(rank: int, options: ExportOptions) -> list[Finding]:
    if rank <= options.max_rank:
        return []
    serving = next((size for size in VLLM_RANKS if size >= rank), None)
    way = (
        f"Serve it with --max-lora-rank {serving} and export it with --max-rank {serving}, or cut" if serving else "Cut"
    )
    return [
        Finding(
            "the rank",
            f"r {rank}",
            REFUSED,
            f"the server takes up to {options.max_rank} (its --max-lora-rank, 16 unless set)",
            f"{way} it with --rank {min(options.max_rank, VLLM_RANKS[-1])}.",
        )
    ]


def _scales(changes: Changes, low: Mapping[str, Edit], target: str) -> list[Finding]:
    scales = {edit.scale for edit in low.values() if isinstance(edit, AddLowRank)}
    options = changes.document["strategy"]["options"]
    found = []
    if scales - {1.0}:
        own = [name for name in ("use_rslora", "rank_pattern", "alpha_pattern") if options.get(name)]
        why = {
            VLLM: "older versions know no patterns and scale every module alike",
            TGI: "it knows no patterns and scales every module alike",
            LLAMA_CPP: "it knows lora_alpha alone, neither rslora nor patterns",
            PEFT: "one rule for all modules",
        }[target]
        where = f"{', '.join([*own, 'lora_alpha'])}: {', '.join(f'{s:.4g}' for s in sorted(scales)[:3])}"
        found.append(Finding("the scale", where, REWRITTEN, f"{why}: it goes into B, and lora_alpha is r"))
    return found


def _names(paths: Sequence[str], maps: Mapping[str, LinearMap], target: str) -> list[Finding]:
    tables = [path for path in paths if path not in maps]
    if target == TGI:
        return _tgi_names(paths, maps)
    if tables and target in (VLLM, LLAMA_CPP):
        why = f"{target} is written linear maps inside the blocks"
        return [Finding("factors outside the blocks", _few(tables), REFUSED, why, MERGED)]
    return []


def _tgi_names(paths: Sequence[str], maps: Mapping[str, LinearMap]) -> list[Finding]:
    odd = [path for path in paths if TGI_NAME.fullmatch(path) is None]
    found = []
    if odd:
        why = "TGI asks for the q/k/v/o, gate/up/down, c_fc/c_proj and lm_head of model.layers and skips other names"
        found.append(Finding("modules that TGI never asks for", _few(odd), REFUSED, f"{why} in silence", MERGED))
    if gaps := missing(paths, maps):
        why = "TGI leaves out a kind of module in silence where one block lacks it: these get factors of zeros"
        found.append(Finding("blocks without factors", _few(gaps), REWRITTEN, why))
    return found


def missing(paths: Sequence[str], maps: Mapping[str, LinearMap]) -> list[str]:
    """Modules without factors whose likes in other blocks have some, as TGI tells likes."""
    kinds = {found["layer"] for path in paths if (found := TGI_NAME.fullmatch(path)) is not None}
    return [
        path
        for path in maps
        if path not in paths and (found := TGI_NAME.fullmatch(path)) is not None and found["layer"] in kinds - {None}
    ]


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more
