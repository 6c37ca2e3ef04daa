"""The sample: what its files promise, how it is built, and that a model learns from it."""

import json
import re
import shutil
import subprocess
import sys
from itertools import islice

import jsonschema
import peft
import pytest
import torch
import trl.trainer.sft_trainer
from conftest import ROOT
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

import evaluation
import function_calling_train as train
import prepare_function_calling_dataset as prepare

SAMPLE = ROOT / "sample"
DATASET, MODEL = SAMPLE / "hermes_sample.json", SAMPLE / "tiny-gemma-3"
sys.path.insert(0, str(SAMPLE))

import ablation  # noqa: E402
import build_sample  # noqa: E402


@pytest.fixture(scope="module")
def rows():
    return json.loads(DATASET.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sample_splits(tmp_path_factory):
    """The two splits as step 1 makes them with no flags: lists of {"id", "messages", "tools"}."""
    folder = tmp_path_factory.mktemp("sample")
    prepare.main(["--dataset", str(DATASET), "--output-dir", str(folder)])
    return [
        [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        for name in (prepare.TRAIN_FILE, prepare.TEST_FILE)
    ]


def calls_in(text):
    return [json.loads(body) for body in re.findall(r"<tool_call>\n(.*)\n</tool_call>", text)]


def test_the_dataset_has_the_layout_of_the_hub_dataset(rows):
    assert len(rows) == 1000 and DATASET.stat().st_size <= 3_000_000
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert list(row) == ["id", "conversations", "tools", "category", "subcategory", "task"]
        assert row["conversations"][0]["from"] == "system"
        roles = [turn["from"] for turn in row["conversations"][1:]]
        assert re.fullmatch("((human gpt )(tool gpt )?)+", " ".join(roles) + " ")
        tools = json.loads(row["tools"])
        if tools is None:
            assert (
                row["conversations"][0]["value"]
                == "You are a helpful assistant, with no access to external functions."
            )
            continue
        assert f"<tools>\n{row['tools']}\n</tools>" in row["conversations"][0]["value"]
        for tool in tools:
            assert tool["type"] == "function"
            jsonschema.Draft202012Validator.check_schema(tool["function"]["parameters"])


def test_each_call_fits_its_tool_and_copies_its_values_from_what_was_said(rows):
    num_calls = 0
    for row in rows:
        tools = {
            tool["function"]["name"]: tool["function"]["parameters"]
            for tool in json.loads(row["tools"]) or []
        }
        said = ""
        for turn in row["conversations"][1:]:
            for call in calls_in(turn["value"]) if turn["from"] == "gpt" else []:
                num_calls += 1
                jsonschema.validate(call["arguments"], tools[call["name"]])
                assert not set(call["arguments"]) - set(tools[call["name"]]["properties"])
                for value in call["arguments"].values():
                    for item in value if isinstance(value, list) else [value]:
                        assert re.search(rf"(?<!\w){re.escape(str(item))}(?!\w)", said)
            said += turn["value"] + "\n"
    assert num_calls > 800


def test_every_kind_of_turn_is_there(rows):
    turns = [
        [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"] for row in rows
    ]
    texts = [text for conversation in turns for text in conversation]
    assert sum(text.count("<tool_call>") == 1 for text in texts) > 500
    assert sum(text.count("<tool_call>") > 1 for text in texts) > 50
    assert sum(text.startswith("Gladly. ") for text in texts) > 50
    assert sum("I have no function for that" in text for text in texts) > 50
    assert sum(row["tools"] == "null" for row in rows) > 100
    requests = [
        turn["value"] for row in rows for turn in row["conversations"] if turn["from"] == "human"
    ]
    assert len(set(requests)) > 0.85 * len(requests)


def test_some_tools_stand_in_the_test_split_only(sample_splits):
    train_split, test_split = sample_splits
    train_tools, test_tools = (
        set().union(*(prepare.tool_names(json.loads(row["tools"])) for row in split))
        for split in sample_splits
    )
    assert test_tools - train_tools == build_sample.TEST_ONLY
    train_text = json.dumps(train_split)
    assert not [name for name in build_sample.TEST_ONLY if name in train_text]
    calls = [
        call["name"]
        for row in test_split
        for message in row["messages"]
        if message["role"] == "assistant"
        for call in calls_in(message["content"])
    ]
    assert sum(name in build_sample.TEST_ONLY for name in calls) > 50
    assert sum(name not in build_sample.TEST_ONLY for name in calls) > 50


def test_the_model_is_a_small_gemma_3_that_knows_no_tags():
    config = AutoConfig.from_pretrained(MODEL)
    assert (
        config.model_type == "gemma3_text"
        and config.architectures == ["Gemma3ForCausalLM"]
        and config.tie_word_embeddings
    )
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    weights = [path for path in MODEL.iterdir() if path.suffix in (".safetensors", ".bin", ".pt")]
    assert [path.name for path in weights] == ["model.safetensors"] and weights[
        0
    ].stat().st_size <= 10_000_000
    assert (
        1_000_000 <= sum(weight.numel() for weight in load_file(weights[0]).values()) <= 4_000_000
    )
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert all(len(tokenizer.encode(tag, add_special_tokens=False)) > 1 for tag in train.TAGS)
    tagged, pieces = train.claim_unused_slots(tokenizer)
    assert len(pieces) == len(train.TAGS)
    text = 'Say "Zoë owes 3.5 €"\n<tool_call>\n{"a": [1, {"b": null}]}\n</tool_call>'
    assert (
        tagged.decode(tagged.encode(text, add_special_tokens=False), skip_special_tokens=True)
        == text
    )


def test_the_general_text_holds_no_tag_no_call_and_no_tool_of_the_test_split():
    call, other_call = '{"name": "f", "arguments": {}}', '{"arguments": {"a": {}}, "name": "f"}'
    held_back = [
        *sorted(build_sample.TEST_ONLY),
        *train.TAGS,
        "tool_call",
        "tool_response",
        call,
        other_call,
    ]
    texts = [*held_back, "get_grades"]
    drawn = build_sample.general_text(
        0, [(lambda rng: [("Yes.", f"<a>{rng.choice(texts)}</a>")], 1)]
    )
    assert all(
        next(drawn) == [("Yes.", "<a>get_grades</a>")] for _ in range(100)
    )  # the others are passed over
    for course in build_sample.COURSES:
        conversations = islice(build_sample.general_text(7, course.texts), 3000)
        text = "\n".join(
            part for exchanges in conversations for turns in exchanges for part in turns
        )
        assert len(text) > 500_000
        assert not [tag for tag in [*train.TAGS, "tool_call", "tool_response"] if tag in text]
        assert not re.search(r'"name": "[^"]*", "arguments"', text)
        assert not [name for name in build_sample.TEST_ONLY if re.search(rf"\b{name}\b", text)]
    written = re.findall(r"<(\w+)>\n\{.*\}\n</\1>", text)
    assert len(set(written)) > 500  # the last course has markup, with many tags


def test_the_builder_makes_the_dataset_that_is_shipped(tmp_path):
    command = [
        sys.executable,
        SAMPLE / "build_sample.py",
        "--only",
        "dataset",
        "--output-dir",
        tmp_path,
    ]
    subprocess.run(command, check=True, timeout=120)
    assert (tmp_path / DATASET.name).read_bytes() == DATASET.read_bytes()


@pytest.mark.slow
def test_a_stopped_build_of_the_model_goes_on_where_it_stood(tmp_path, monkeypatch):
    tokenizer, make_batch = build_sample.build_tokenizer(3), build_sample.make_batch
    monkeypatch.setattr(build_sample, "build_tokenizer", lambda seed: tokenizer)
    monkeypatch.setattr(build_sample, "LONG_ROWS", (2, 128))
    monkeypatch.setattr(build_sample, "CHECKPOINT_STEPS", 2)
    monkeypatch.setattr(
        build_sample,
        "COURSES",
        [
            build_sample.Course(3, 1e-3, 0.0, build_sample.TEXTS),
            build_sample.Course(3, 1e-3, 0.0, build_sample.MORE_TEXTS),
        ],
    )
    monkeypatch.setattr(
        build_sample.shutil, "which", lambda name: None
    )  # compiling takes longer than these steps
    build_sample.train_model(tmp_path / "undisturbed", seed=3, resume=False)

    steps_left = 5

    def stop(*arguments):
        nonlocal steps_left
        steps_left -= 1
        if steps_left < 0:
            raise KeyboardInterrupt
        return make_batch(*arguments)

    monkeypatch.setattr(build_sample, "make_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        build_sample.train_model(tmp_path / "stopped", seed=3, resume=False)
    assert not (tmp_path / "stopped").exists()
    with pytest.raises(SystemExit, match="--resume goes on with it"):
        build_sample.train_model(tmp_path / "stopped", seed=3, resume=False)
    with pytest.raises(SystemExit, match="belongs to --seed 3"):
        build_sample.train_model(tmp_path / "stopped", seed=4, resume=True)
    steps_left = 2  # the checkpoint is of the fourth step
    build_sample.train_model(tmp_path / "stopped", seed=3, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped", "undisturbed"]
    for path in (tmp_path / "undisturbed").iterdir():
        assert (tmp_path / "stopped" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_the_sample_run_lifts_the_score_well_above_base(tmp_path):
    """sample/run.sh as a newcomer runs it, in a copy of the project, with fewer steps."""
    for name in (
        "prepare_function_calling_dataset.py",
        "function_calling_train.py",
        "evaluation.py",
        "requirements.txt",
    ):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(
        SAMPLE, tmp_path / "sample", ignore=shutil.ignore_patterns("run", "__pycache__")
    )
    python = (
        tmp_path / ".venv" / "bin" / "python"
    )  # this one, where everything is installed already
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n[ "$2" = pip ] && exit 0\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    process = subprocess.run(
        ["bash", tmp_path / "sample" / "run.sh", "--max-steps", "150"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    results = tmp_path / "sample" / "run" / "evaluation_results" / "tiny-gemma-3"
    base, tuned = (
        json.loads((results / run / "metrics.json").read_text())["scores"]
        for run in ("base", "tuned")
    )
    assert base["function_calling"]["value"] <= 0.35
    assert tuned["function_calling"]["value"] >= base["function_calling"]["value"] + 0.3
    assert tuned["helpful_exchange"]["value"] > base["helpful_exchange"]["value"]
    assert tuned["turn_right"]["value"] > 0.2 > base["turn_right"]["value"]
    pictures = re.findall(r"sample/run/\S+\.png", process.stdout)
    assert len(pictures) == 2 and all((tmp_path / picture).is_file() for picture in pictures)


@pytest.mark.parametrize("variant", ablation.VARIANTS)
def test_a_variant_of_the_ablation_trains_what_it_names_and_serves_what_it_trained(
    variant, tiny_model, splits, tmp_path, monkeypatch
):
    tuner = peft.tuners.tuners_utils.BaseTunerLayer
    patched = [
        *((train, name) for name in vars(train)),
        *((evaluation, name) for name in vars(evaluation)),
        (trl.trainer.sft_trainer, "BaseTunerLayer"),
    ]
    for owner, name in patched:
        monkeypatch.setattr(
            owner, name, getattr(owner, name)
        )  # put back afterwards, whatever the variant does
    monkeypatch.setattr(tuner, "bias", tuner.__dict__["bias"])
    trainers, build_trainer = [], train.build_trainer
    monkeypatch.setattr(
        train,
        "build_trainer",
        lambda *arguments: trainers.append(build_trainer(*arguments)) or trainers[0],
    )
    monkeypatch.chdir(tmp_path)

    arguments = ablation.VARIANTS[variant](train, evaluation)
    train.main(
        [
            "--model",
            str(tiny_model),
            "--train-file",
            str(splits / "function_calling_train.jsonl"),
            "--max-steps",
            "2",
            "--dtype",
            "float32",
            "--learning-rate",
            "0.01",
            *arguments,
        ]
    )

    adapter = tmp_path / train.default_output_dir(tiny_model)
    weights = load_file(adapter / "adapter_model.safetensors")
    trained_parts = {
        part
        for part in (
            "q_proj",
            "lm_head.lora",
            "embed_tokens.lora",
            "token_adapter.trainable_tokens",
        )
        if any(
            part in key and weight.abs().max() > 0
            for key, weight in weights.items()
            if "lora_A" not in key
        )
    }
    assert trained_parts == {
        "published LoRA placement": {"q_proj", "lm_head.lora", "embed_tokens.lora"},
    }.get(variant, {"q_proj", "token_adapter.trainable_tokens"})
    tokens = AutoTokenizer.from_pretrained(adapter).encode("<tool_call>")
    assert (len(tokens) > 2) == (variant == "tags as plain text")
    labelled = sum(label != -100 for row in trainers[0].train_dataset["labels"] for label in row)
    total = sum(map(len, trainers[0].train_dataset["labels"]))
    assert (labelled == total) == (variant == "loss on all tokens")

    ids = torch.tensor([tokens + tokens[1:]])
    with torch.no_grad():
        served = evaluation.load_model(tiny_model, adapter, "cpu", torch.float32)(ids).logits
        trained = trainers[0].model.eval()(ids).logits
    torch.testing.assert_close(served, trained, atol=1e-4, rtol=1e-4)
