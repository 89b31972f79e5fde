"""Small random models, a word-level tokenizer, and rows that can be learnt, for the tests."""

from __future__ import annotations

import random
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


def config(kind: str, **changes: Any) -> Any:
    """The config of a small model: 3 blocks, hidden 32."""
    import transformers as t

    common: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    kinds = {
        "bert": lambda: t.BertConfig(**common | sizes | changes, max_position_embeddings=40),
        "roberta": lambda: t.RobertaConfig(**common | sizes | changes, max_position_embeddings=42),
        "gpt2": lambda: t.GPT2Config(**common | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40} | changes),
        "llama": lambda: t.LlamaConfig(
            **common | sizes | {"num_key_value_heads": 2} | changes, max_position_embeddings=40
        ),
        "albert": lambda: t.AlbertConfig(
            **common | sizes | {"embedding_size": 16} | changes, max_position_embeddings=40
        ),
    }
    return kinds[kind]()


def model(kind: str, labels: int = 3, seed: int = 0, dtype: Any = None, **changes: Any) -> Any:
    """A small sequence classifier with random weights."""
    import torch
    import transformers as t

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = t.AutoModelForSequenceClassification.from_config(config(kind, num_labels=labels, **changes))
    return made.to(dtype) if dtype is not None else made


def backbone(kind: str, seed: int = 0, **changes: Any) -> Any:
    """The same without a head."""
    import torch
    import transformers as t

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return t.AutoModel.from_config(config(kind, **changes))


def tokenizer() -> Any:
    """Words to ids, with the special tokens that BERT has."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
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


def folder(kind: str, path: Path | str, seed: int = 0, **changes: Any) -> str:
    """A headless backbone and its tokenizer, saved where `adapt` can load them."""
    backbone(kind, seed, **changes).save_pretrained(path)
    tokenizer().save_pretrained(path)
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
