"""Small random models, a word-level tokenizer, and rows that can be learnt, for the tests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LABELS = ("a", "b", "c")
WORDS = {
    "a": ["parcel", "late", "where", "track", "courier"],
    "b": ["refund", "money", "back", "charged", "twice"],
    "c": ["login", "password", "account", "reset", "email"],
}
FILLER = ["the", "my", "is", "please", "can", "you", "still", "not", "i", "it"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = SPECIAL + FILLER + [word for words in WORDS.values() for word in words]
KINDS = ("bert", "roberta", "gpt2", "llama")
# Families by kind of input, each named by transformers' own model type; which heads each has, `heads` reads off there.
TEXT = ("bert", "roberta", "xlm-roberta", "albert", "distilbert", "electra", "deberta-v2", "modernbert", "mpnet")
DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "mixtral")
ENCODER_DECODERS = ("t5", "bart", "marian")
IMAGES = ("vit", "deit", "dinov2", "swin", "resnet")
FAMILIES = TEXT + DECODERS + ENCODER_DECODERS + IMAGES
CLASSIFICATION = "AutoModelForSequenceClassification"
AUTO = (
    CLASSIFICATION,
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForImageClassification",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
)

COMMON = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = COMMON | SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 40}
PIXELS = {"image_size": 16, "num_channels": 3}
PATCHES = {name: SIZES[name] for name in SIZES} | PIXELS | {"patch_size": 4}
CODER = {
    **COMMON,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 40,
    "decoder_start_token_id": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": COMMON | SIZES | {"max_position_embeddings": 40},
    "roberta": COMMON | SIZES | {"max_position_embeddings": 42},
    "xlm-roberta": COMMON | SIZES | {"max_position_embeddings": 42},
    "albert": COMMON | SIZES | {"embedding_size": 16, "max_position_embeddings": 40},
    "distilbert": COMMON | {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40},
    "electra": COMMON | SIZES | {"embedding_size": 16, "max_position_embeddings": 40},
    "deberta-v2": COMMON
    | SIZES
    | {
        "max_position_embeddings": 40,
        "relative_attention": True,
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "pooler_hidden_size": 32,
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "modernbert": COMMON | SIZES | {"max_position_embeddings": 40, "cls_token_id": 2, "sep_token_id": 3},
    "mpnet": COMMON | SIZES | {"max_position_embeddings": 42, "pad_token_id": 1},
    "gpt2": COMMON | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40},
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 8},
    "phi3": GROUPED,
    "gemma": GROUPED | {"head_dim": 8},
    "gemma2": GROUPED | {"head_dim": 8},
    "mixtral": GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "t5": COMMON
    | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4}
    | {"eos_token_id": 3, "decoder_start_token_id": 0},
    "bart": CODER,
    "marian": CODER,
    "vit": PATCHES,
    "deit": PATCHES,
    "dinov2": PATCHES,
    "swin": PIXELS
    | {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    | {"window_size": 4},
    "resnet": {"num_channels": 3, "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2]}
    | {"layer_type": "basic"},
}


def heads(kind: str) -> tuple[str, ...]:
    """The Auto classes of `AUTO` that transformers has a class for, by its own tables."""
    import transformers as t

    made = t.CONFIG_MAPPING[kind]
    return tuple(auto for auto in AUTO if made in getattr(t, auto)._model_mapping)


def config(kind: str, **changes: Any) -> Any:
    """The config of a small model: 3 blocks, hidden 32."""
    import transformers as t

    made = t.CONFIG_MAPPING[kind](**CONFIGS[kind] | changes)
    made.architectures = made.architectures or []  # where a family has two classes for a head (DeiT), it is looked into
    return made


def model(kind: str, labels: int = 3, seed: int = 0, dtype: Any = None, auto: str | None = None, **changes: Any) -> Any:
    """A small model with random weights and the head of an Auto class: a classifier's where nothing else is named."""
    import torch
    import transformers as t

    auto = auto or heads(kind)[0]
    if auto.endswith("Classification"):
        changes["num_labels"] = labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = getattr(t, auto).from_config(config(kind, **changes))
    return made.to(dtype) if dtype is not None else made


def backbone(kind: str, seed: int = 0, auto: str = "AutoModel", **changes: Any) -> Any:
    """The same without a head, unless an Auto class names one."""
    import torch
    import transformers as t

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(t, auto).from_config(config(kind, **changes))


def tokenizer(pad: int = 0, words: Sequence[str] = ()) -> Any:
    """Words to ids, with the special tokens that BERT has; `pad` is the number of the padding token, 0 or 1.

    `words` come in addition to those of `VOCABULARY`.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    known = dict.fromkeys([*VOCABULARY, *words])
    vocabulary = {word: index for index, word in enumerate(known)} | {"[PAD]": pad, "[UNK]": 1 - pad}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=32,
    )


def image_processor(size: int = 16) -> Any:
    """Pictures to pixels of a square of this side."""
    from transformers import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": size, "width": size})


def processor(kind: str) -> Any:
    """The tokenizer or image processor that fits a family."""
    made = config(kind)
    return image_processor(getattr(made, "image_size", 32)) if kind in IMAGES else tokenizer(made.pad_token_id)


def folder(kind: str, path: Path | str, seed: int = 0, auto: str = "AutoModel", **changes: Any) -> str:
    """A backbone, headless unless an Auto class names a head, and its processor, saved where `adapt` can load them."""
    backbone(kind, seed, auto, **changes).save_pretrained(path)
    processor(kind).save_pretrained(path)
    return str(path)


def rows(n: int = 48, labels: tuple[str, ...] = LABELS, seed: int = 0) -> list[dict[str, str]]:
    """Short texts whose label can be learnt from their words; every text is different."""
    draw = random.Random(seed)
    made: dict[str, str] = {}
    while len(made) < n:
        label = labels[len(made) % len(labels)]
        words = draw.sample(FILLER, 3) + draw.sample(WORDS[LABELS[labels.index(label) % 3]], 2)
        draw.shuffle(words)
        made.setdefault(" ".join(words), label)
    return [{"text": text, "label": label} for text, label in made.items()]


def batch(n: int = 6, length: int = 9, seed: int = 0, vocabulary: int = 64) -> dict[str, Any]:
    """Token ids with padding on the right."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, vocabulary, (n, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(n):
        cut = length - row % 4
        ids[row, cut:] = 0
        mask[row, cut:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def inputs(net: Any, n: int = 5, seed: int = 0) -> dict[str, Any]:
    """Inputs that a model of any family takes: pixels, or rows of tokens with its padding and its end token."""
    import torch

    config = net.config
    if net.main_input_name == "pixel_values":
        generator = torch.Generator().manual_seed(seed)
        size = getattr(config, "image_size", 32)
        return {"pixel_values": torch.randn(n, config.num_channels, size, size, generator=generator)}
    made = batch(n, seed=seed)
    ids, mask = made["input_ids"], made["attention_mask"]
    ids[mask == 0] = config.pad_token_id
    ids[torch.arange(n), mask.sum(1) - 1] = 3  # encoder-decoders classify by the state at the end token
    if config.is_encoder_decoder and net.can_generate():
        made["decoder_input_ids"] = ids[:, :4].clone()
    return made


def logits(net: Any, inputs: dict[str, Any] | None = None) -> Any:
    """The model's answers in eval mode."""
    import torch

    net.eval()
    with torch.no_grad():
        return net(**(inputs or batch())).logits


def shake(adapted: Any, scale: float = 0.05, seed: int = 1) -> None:
    """Move every trained tensor as training would, so that an adapter does something."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    parameters = dict(adapted.model.named_parameters())
    with torch.no_grad():
        for name in adapted.trained:
            noise = torch.randn(parameters[name].shape, generator=generator)
            parameters[name].add_((scale * noise).to(parameters[name].dtype))


def adapter(place: Path, kind: str, strategy: str, name: str = "adapter", seed: int = 1, **options: Any) -> Any:
    """A saved classifier that does something, on a backbone on disk: what was adapted, and the folder."""
    import adapters

    base = place / "base"
    if not base.exists():
        folder(kind, base)
    task = "image-classification" if kind in IMAGES else "text-classification"
    adapted = adapters.adapt(str(base), strategy, task=task, labels=list(LABELS), **options)
    shake(adapted, seed=seed)
    return adapted, adapters.save(adapted, place / name)
