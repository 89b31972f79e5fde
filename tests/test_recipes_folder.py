"""The recipes: script and YAML twin are one Recipe, every key fits, and each runs two steps with a tiny model, offline.

The rows have the columns, types and splits of the hub's data sets, so that a recipe's `columns` are tried, too.
"""

from __future__ import annotations

import inspect
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny

import adapters
from adapters import cli, processes, script
from adapters.errors import RequestError

ROOT = Path(adapters.__file__).parents[1]
FOLDER = ROOT / "recipes"
SCRIPTS = sorted(FOLDER.glob("*.py"))
SHARDED = "qlora_70b_fsdp"
QUICK = {"train.max_steps": 2, "train.per_device_train_batch_size": 4, "train.gradient_accumulation_steps": 1}


def recipes_of(file: Path) -> dict[str, adapters.Recipe]:
    """The recipes of a script, by the names of their YAML twins."""
    found = {name: value for name, value in runpy.run_path(str(file)).items() if isinstance(value, adapters.Recipe)}
    return {file.stem if len(found) == 1 else f"{file.stem}_{name.lower()}": found[name] for name in found}


ALL = {name: recipe for file in SCRIPTS for name, recipe in recipes_of(file).items()}


# ---------------------------------------------------------------------- tiny models and rows


def texts(n: int, start: int = 0) -> list[str]:
    return [row["text"] for row in tiny.rows(n + start, seed=start)][start:]


def classes(n: int, names: list[str], start: int, column: str = "label") -> Any:
    from datasets import ClassLabel, Dataset, Features, Value

    rows = {"text": texts(n, start), column: [index % len(names) for index in range(n)]}
    return Dataset.from_dict(rows, features=Features({"text": Value("string"), column: ClassLabel(names=names)}))


def emotions(n: int, start: int) -> Any:
    from datasets import ClassLabel, Dataset, Features, List, Value

    named = List(ClassLabel(names=["joy", "fear", "calm"]))
    features = Features({"text": Value("string"), "labels": named, "id": Value("string")})
    given = [[index % 3, 2] if index % 3 < 2 else [2] for index in range(n)]
    rows = {"text": texts(n, start), "labels": given, "id": [str(index) for index in range(n)]}
    return Dataset.from_dict(rows, features=features)


def tagged(n: int, start: int) -> Any:
    from datasets import ClassLabel, Dataset, Features, List, Value

    words = [text.split() for text in texts(n, start)]
    tags = [[0, 0, 1, 2] + [0] * (len(row) - 4) for row in words]
    named = List(ClassLabel(names=["O", "B-PER", "I-PER"]))
    features = Features({"id": Value("string"), "tokens": List(Value("string")), "pos_tags": named, "ner_tags": named})
    rows = {"id": list(map(str, range(n))), "tokens": words, "pos_tags": tags, "ner_tags": tags}
    return Dataset.from_dict(rows, features=features)


def questions(n: int, start: int) -> Any:
    from datasets import Dataset

    contexts = texts(n, start)
    answers = [{"text": [text.split()[2]], "answer_start": [len(" ".join(text.split()[:2])) + 1]} for text in contexts]
    asked = {"id": [f"{start}-{i}" for i in range(n)], "title": ["t"] * n, "question": ["where is it"] * n}
    return Dataset.from_dict(asked | {"context": contexts, "answers": answers})


def pictures(n: int, start: int) -> Any:
    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image, Value
    from PIL import Image as Pictures

    draw = np.random.default_rng(start)
    made = [Pictures.fromarray(draw.integers(0, 255, (16, 16, 3), dtype="uint8")) for _ in range(n)]
    features = Features(
        {"image_file_path": Value("string"), "image": Image(), "labels": ClassLabel(names=["a", "b", "c"])}
    )
    rows = {"image_file_path": ["x"] * n, "image": made, "labels": [index % 3 for index in range(n)]}
    return Dataset.from_dict(rows, features=features)


def translations(n: int, start: int) -> Any:
    from datasets import Dataset

    pairs = [{"en": text, "fr": " ".join(reversed(text.split()))} for text in texts(n, start)]
    return Dataset.from_dict({"id": list(map(str, range(n))), "translation": pairs})


def instructions(n: int, start: int) -> Any:
    from datasets import Dataset

    given = {
        "instruction": texts(n, start),
        "context": ["", "the account"] * (n // 2),
        "response": texts(n, start + 90),
    }
    return Dataset.from_dict(given | {"category": ["open_qa"] * n})


def conversations(n: int, start: int) -> Any:
    from datasets import Dataset

    pairs = list(zip(texts(n, start), texts(n, start + 90), strict=True))
    turns = [[{"content": a, "role": "user"}, {"content": b, "role": "assistant"}] for a, b in pairs]
    rest = {"prompt": [a for a, _ in pairs], "prompt_id": list(map(str, range(n))), "category": ["Chat"] * n}
    return Dataset.from_dict(rest | {"messages": turns})


def pairs(n: int, start: int) -> Any:
    from datasets import ClassLabel, Dataset, Features, Value

    names = ClassLabel(names=["not_equivalent", "equivalent"])
    features = Features(
        {"sentence1": Value("string"), "sentence2": Value("string"), "label": names, "idx": Value("int32")}
    )
    rows = {"sentence1": texts(n, start), "sentence2": texts(n, start + 90), "label": [0, 1] * (n // 2)}
    return Dataset.from_dict(rows | {"idx": list(range(n))}, features=features)


def named(n: int, start: int) -> Any:
    from datasets import Dataset

    label = [0, 1] * (n // 2)
    return Dataset.from_dict(
        {"text": texts(n, start), "label": label, "label_text": [["negative", "positive"][i] for i in label]}
    )


def lines(n: int, start: int) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"text": texts(n, start)})


def two(n: int, start: int) -> Any:
    return classes(n, ["neg", "pos"], start)


def four(n: int, start: int) -> Any:
    return classes(n, ["World", "Sports", "Business", "Sci/Tech"], start)


LM, MLM, S2S = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"
SHORT = {"options.max_length": 16}
CHAT = {"options.max_length": 32, "options.chat_template": "chatml", "train.use_cpu": True}
# Twin -> family of the tiny model, its head, its rows, the splits that the hub has, and further keys.
TINY: dict[str, tuple[str, str, Callable[[int, int], Any], str, dict[str, Any]]] = {
    "lora_text_classification": ("bert", "AutoModel", two, "train test", SHORT),
    "multi_label": ("bert", "AutoModel", emotions, "train validation test", SHORT),
    "named_entities": ("bert", "AutoModel", tagged, "train validation test", SHORT),
    "question_answering": (
        "bert",
        "AutoModel",
        questions,
        "train validation",
        SHORT | {"options.stride": 4, "test": 0.2},
    ),
    "image_classification": ("vit", "AutoModel", pictures, "train validation test", {}),
    "translation": (
        *("t5", S2S, translations, "train"),
        SHORT | {"options.max_target_length": 16, "options.max_new_tokens": 6, "validation": 0.2, "test": 0.2},
    ),
    "domain_adaptation_corpus": ("roberta", MLM, two, "train test", SHORT),
    "domain_adaptation_probe": ("roberta", "AutoModel", two, "train test", SHORT),
    "instruction_tuning": ("qwen2", LM, instructions, "train", CHAT | {"validation": 0.2, "test": 0.2}),
    "qlora_8b": (
        "qwen3",
        LM,
        conversations,
        "train test",
        CHAT | {"validation": 0.2, "train.eval_steps": 1, "train.optim": "adamw_8bit"},
    ),
    "gpt2_pretraining": ("gpt2", LM, lines, "train validation test", SHORT),
    "dora": ("roberta", "AutoModel", pairs, "train validation test", SHORT),
    "full_8bit_optimizer": ("roberta", "AutoModel", named, "train validation test", SHORT),
    "freeze_gradual_unfreezing": ("bert", "AutoModel", four, "train test", SHORT | {"options.layers": 2, "limit": 20}),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What a twin's keys are set to: a tiny model and tiny rows, made once."""
    root = tmp_path_factory.mktemp("tiny")

    def made(name: str) -> dict[str, Any]:
        kind, auto, rows, splits, others = TINY[name]
        model, data = root / f"{kind}-{auto}", root / rows.__name__ / splits.replace(" ", "-")
        if not model.is_dir():
            tiny.folder(kind, model, auto=auto)
            if auto == LM:  # turns and texts end in an end token
                words = tiny.processor(kind)
                words.eos_token = "[SEP]"
                words.save_pretrained(model)
        if not data.is_dir():
            data.mkdir(parents=True)
            for place, part in enumerate(splits.split()):
                rows(24 if part == "train" else 12, 30 * place).to_parquet(data / f"{part}.parquet")
        return {"model": str(model), "data": str(data)} | QUICK | others

    return made


def words(settings: Mapping[str, Any]) -> list[str]:
    return [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]


def run_script(file: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(file), *arguments])
    runpy.run_path(str(file), run_name="__main__")


def run_yaml(file: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["adapters", "train", str(file), *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(str(ended.value.code or 0))


# ---------------------------------------------------------------------- what is written


def test_every_recipe_has_its_twin_and_its_tiny_rows() -> None:
    assert {file.stem for file in FOLDER.glob("*.yaml")} == set(ALL)
    assert set(TINY) == set(ALL) - {SHARDED}


@pytest.mark.parametrize("name", ALL)
def test_script_and_twin_are_one_recipe(name: str) -> None:
    assert adapters.Recipe.read(FOLDER / f"{name}.yaml").model_dump() == ALL[name].model_dump()


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_a_script_is_short_and_says_what_it_needs_and_reaches(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert "\nNeeds     " in text
    assert "adapters plan" in text
    assert "\nReaches   " in text
    assert f"python recipes/{file.name}" in text or "accelerate launch" in text
    assert "import" not in text.split('"""', 2)[2].replace("import adapters", "", 1)  # public names alone
    assert " for " not in text.split('"""', 2)[2].split("#")[0]


@pytest.mark.parametrize("name", ALL)
def test_every_training_setting_is_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainingArguments

    from adapters.arguments import OWN, check_fields

    train = ALL[name].train
    plain = {key: value for key, value in train.items() if key not in processes.SHARDING and key != "fsdp_config"}
    check_fields(plain | {"use_cpu": True})  # bf16 is refused without a GPU otherwise
    assert set(train) <= set(inspect.signature(TrainingArguments).parameters) | set(OWN)


def test_every_sharding_setting_is_one() -> None:
    """transformers reads `fsdp_config` key by key and passes over what it does not know."""
    from transformers import TrainingArguments

    read = inspect.getsource(TrainingArguments._process_fsdp_args)
    config = ALL[SHARDED].train["fsdp_config"]
    assert [key for key in config if f'"{key}"' not in read] == []
    made = TrainingArguments(output_dir="unused", fsdp=True, fsdp_config=dict(config), use_cpu=True)
    assert made.fsdp_plugin_args["fsdp_version"] == 2
    assert made.fsdp_plugin_args["transformer_cls_names_to_wrap"] == "LlamaDecoderLayer"
    assert ALL[SHARDED].train["activation_checkpointing"]  # not FSDP's own, which gives the blocks other names
    assert processes.wrong(ALL[SHARDED].train) == []
    assert processes.command(ALL[SHARDED].train) == "accelerate launch --num_processes N"


@pytest.mark.parametrize("name", ALL)
def test_every_loading_option_is_one(name: str) -> None:
    """from_pretrained takes **kwargs; these are the ones that the library documents."""
    assert set(ALL[name].load) <= {"dtype", "device_map", "revision", "token", "attn_implementation", "offload_folder"}


# ---------------------------------------------------------------------- what happens


SINGLE = [file for file in SCRIPTS if file.stem in TINY]


@pytest.mark.parametrize("file", SINGLE, ids=lambda file: file.stem)
def test_a_script_runs(
    file: Path, places: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_script(file, words(places(file.stem) | {"output": str(tmp_path / "out")}), monkeypatch)
    said = capsys.readouterr()
    assert f"saved     {tmp_path / 'out'}" in said.out
    assert "\ntest      " in said.out
    manifest = json.loads((tmp_path / "out" / "adapter.json").read_text())
    recipe = ALL[file.stem]
    assert manifest["task"]["name"] == recipe.task
    assert manifest["reproducible"]
    changed = {key.partition(".")[2]: value for key, value in places(file.stem).items() if key.startswith("options.")}
    assert adapters.Recipe.read(tmp_path / "out" / "run.yaml").options == recipe.options | changed


@pytest.mark.parametrize("name", sorted(set(TINY) - {"domain_adaptation_corpus", "domain_adaptation_probe"}))
def test_a_yaml_runs(name: str, places: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = words(places(name) | {"output": str(tmp_path / "out"), "test": 0.0})
    assert run_yaml(FOLDER / f"{name}.yaml", arguments, monkeypatch) == 0
    assert (tmp_path / "out" / "adapter.json").is_file()


def both(places: Any, folder: Path) -> dict[str, Any]:
    """Keys for the two recipes of domain_adaptation: the second starts from what the first merged."""
    corpus, probe = places("domain_adaptation_corpus"), places("domain_adaptation_probe")
    for key in ("train.max_steps", "train.per_device_train_batch_size", "train.gradient_accumulation_steps"):
        probe.pop(key)  # a probe without steps is solved
    corpus |= {"output": str(folder / "corpus"), "merge": str(folder / "merged")}
    probe |= {"output": str(folder / "probe"), "model": str(folder / "merged")}
    return {f"corpus.{key}": value for key, value in corpus.items()} | {
        f"probe.{key}": value for key, value in probe.items()
    }


def test_two_recipes_in_a_row(
    places: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = FOLDER / "domain_adaptation.py"
    run_script(file, words(both(places, tmp_path)), monkeypatch)
    said = capsys.readouterr()
    assert said.out.count("saved     ") == 2
    assert f"merged    {tmp_path / 'merged'}" in said.out
    assert json.loads((tmp_path / "probe" / "adapter.json").read_text())["backbone"]["name"] == str(tmp_path / "merged")
    # An interrupted second run: the first is not done again.
    (tmp_path / "probe" / "run.yaml").unlink()
    before = (tmp_path / "corpus" / "adapter.json").read_bytes()
    run_script(file, [*words(both(places, tmp_path)), "--resume"], monkeypatch)
    said = capsys.readouterr()
    assert "corpus: finished already" in said.err
    assert said.out.count("saved     ") == 1
    assert (tmp_path / "corpus" / "adapter.json").read_bytes() == before


def test_two_twins_in_a_row(places: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = both(places, tmp_path) | {"corpus.merge": None, "probe.model": both(places, tmp_path)["corpus.model"]}
    for name in ("corpus", "probe"):
        own = {key.partition(".")[2]: value for key, value in settings.items() if key.startswith(f"{name}.")}
        assert run_yaml(FOLDER / f"domain_adaptation_{name}.yaml", words(own), monkeypatch) == 0
        assert (tmp_path / name / "adapter.json").is_file()


def test_accelerate_launches_a_script(places: Any, tmp_path: Path) -> None:
    file = FOLDER / "lora_text_classification.py"
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
    ]
    settings = words(places(file.stem) | {"output": str(tmp_path / "out")})
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([*launch, str(file), *settings], capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "saved     " in ran.stdout


# ---------------------------------------------------------------------- what is refused


def refused(file: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    """The one line that a script ends with, after nothing was read or written."""
    with pytest.raises(SystemExit) as ended:
        run_script(file, arguments, monkeypatch)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return str(said.err)


def test_sharding_in_one_process_says_what_it_needs(monkeypatch: Any, capsys: Any) -> None:
    said = refused(FOLDER / f"{SHARDED}.py", [], monkeypatch, capsys)
    assert "train: fsdp" in said
    assert "accelerate launch --num_processes N" in said
    assert "found 1 process" in said
    assert "or leave fsdp out" in said


def test_the_trainer_refuses_sharding_as_well() -> None:
    from adapters.arguments import check_fields

    with pytest.raises(RequestError, match=r"train: fsdp\).*accelerate launch --num_processes N"):
        check_fields({"fsdp": True, "fsdp_config": {"version": 2}})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "optionz.r=4"], "unknown key 'optionz'. Did you mean 'options'?"),
        (["--set", "options.rr=4"], "unknown option 'rr'"),
        (["--set", "r"], "'r' is not key=value"),
        (["other.yaml"], "the script is the recipe"),
        (["--sett", "r=1"], "No such option: --sett"),
        (["--set", "merge=out/mrpc-dora"], "one folder for two things"),
    ],
)
def test_what_a_script_refuses(arguments: list[str], said: str, monkeypatch: Any, capsys: Any) -> None:
    assert said in refused(FOLDER / "dora.py", arguments, monkeypatch, capsys)


def test_of_several_recipes_a_key_says_whose_it_is(monkeypatch: Any, capsys: Any) -> None:
    keys = ["--set", "train.max_steps=2", "--set", "crpus.seed=1"]
    said = refused(FOLDER / "domain_adaptation.py", keys, monkeypatch, capsys)
    assert "Say corpus.train.max_steps or probe.train.max_steps." in said
    assert "no recipe 'crpus' is here" in said
    assert "Did you mean 'corpus'?" in said


def test_run_recipe_takes_one_or_several() -> None:
    with pytest.raises(RequestError, match="one recipe, or several by name"):
        adapters.run_recipe()
    with pytest.raises(RequestError, match="one recipe, or several by name"):
        adapters.run_recipe(ALL["dora"], other=ALL["dora"])


def test_changes_leave_the_rest_as_it_was() -> None:
    made = script.recipes_with(ALL["dora"], {})({"options.r": 8, "seed": 3})
    assert made[0].model_dump() == ALL["dora"].model_dump() | {"options": ALL["dora"].options | {"r": 8}, "seed": 3}
    assert made[0].model_fields_set == ALL["dora"].model_fields_set | {"seed"}


def test_a_merge_into_a_foreign_folder_is_refused_before_training(places: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    at = places("lora_text_classification")
    recipe = adapters.Recipe(
        model=at["model"], data=at["data"], output=str(tmp_path / "out"), merge=str(tmp_path / "mine")
    )
    with pytest.raises(adapters.FolderError, match=r"something else.*thesis.txt"):
        recipe.run()
    assert not (tmp_path / "out").exists()
