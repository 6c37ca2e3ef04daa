"""The sample: what its files promise, that its builder makes them, that a model learns from it."""

import json
import re
import shutil
import subprocess
import sys
from itertools import islice

import pytest
from conftest import ROOT
from safetensors.torch import load_file
from transformers import AutoConfig

import prepare_function_calling_dataset as prepare

SAMPLE = ROOT / "sample"
DATASET, MODEL = SAMPLE / "hermes_sample.json", SAMPLE / "tiny-gemma-3"
TAGS = [f"<{slash}{name}>" for name in ("tools", "think", "tool_call", "tool_response")
        for slash in ("", "/")]  # fmt: skip
sys.path.insert(0, str(SAMPLE))

import build_sample  # noqa: E402


@pytest.fixture(scope="module")
def rows():
    return json.loads(DATASET.read_text(encoding="utf-8"))


def calls_in(text):
    return [json.loads(call) for call in re.findall(r"<tool_call>\n(.*)\n</tool_call>", text)]


def test_the_builder_makes_the_dataset_that_is_shipped(tmp_path):
    build_sample.build_dataset(tmp_path / "built.json", 1)
    assert (tmp_path / "built.json").read_bytes() == DATASET.read_bytes()


def test_some_tools_are_called_in_the_test_split_and_never_stand_in_a_training_row(tmp_path):
    prepare.main(["--dataset", str(DATASET), "--output-dir", str(tmp_path)])
    training, test = ((tmp_path / name).read_text() for name in prepare.SPLIT_FILES.values())
    assert not [name for name in build_sample.TEST_ONLY if name in training]
    rows = map(json.loads, test.splitlines())
    said = [turn for row in rows for turn in row["messages"] if turn["role"] == "assistant"]
    called = [call["name"] for turn in said for call in calls_in(turn["content"])]
    unseen = [name for name in called if name in build_sample.TEST_ONLY]
    assert len(unseen) > 50 and len(called) - len(unseen) > 50


def test_the_general_texts_hold_no_tag_no_call_and_no_tool_of_the_test_split():
    names = [*sorted(build_sample.TEST_ONLY), "tool_call", "tool_response"]
    calls = ['{"name": "f", "arguments": {}}', '{"arguments": {"a": {}}, "name": "f"}']
    texts = [*names, *TAGS, *calls, "get_grades"]
    kind = (lambda rng: [("Yes.", f"<a>{rng.choice(texts)}</a>")], 1)
    drawn = list(islice(build_sample.general_text(0, [kind]), 100))
    assert drawn == [[("Yes.", "<a>get_grades</a>")]] * 100  # the others are passed over
    for course in build_sample.COURSES:
        talks = islice(build_sample.general_text(7, course.texts), 1500)
        text = "\n".join(text for talk in talks for exchange in talk for text in exchange)
        assert len(text) > 250_000
        assert not re.search(rf"\b({'|'.join(names)})\b|{'|'.join(TAGS)}", text)
        assert not re.search(r'"name": "[^"]*", "arguments"', text)


def test_the_model_is_a_small_gemma_3_without_a_pickle():
    assert AutoConfig.from_pretrained(MODEL).model_type == "gemma3_text"
    assert not [path for path in MODEL.iterdir() if path.suffix in (".bin", ".pt", ".py")]
    weights = load_file(MODEL / "model.safetensors")
    assert sum(weight.numel() for weight in weights.values()) < 2_000_000


@pytest.mark.slow
def test_the_sample_run_lifts_the_scores_on_a_slice_of_the_sample(rows, tmp_path):
    """sample/run.sh as a newcomer runs it, in a copy of the project, with fewer rows and steps."""
    for path in (*ROOT.glob("*.py"), ROOT / "requirements.txt"):
        shutil.copy(path, tmp_path)
    shutil.copytree(SAMPLE, tmp_path / "sample", ignore=shutil.ignore_patterns("run"))
    (tmp_path / "sample" / DATASET.name).write_text(json.dumps(rows[:160]))
    python = tmp_path / ".venv/bin/python"  # this one, where everything is installed already
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n[ "$2" = pip ] && exit 0\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    command = ["bash", tmp_path / "sample/run.sh", "--max-steps", "120"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    results = tmp_path / "sample/run/evaluation_results/tiny-gemma-3"
    base, tuned = (json.loads((results / run / "metrics.json").read_text())["scores"]
                   for run in ("base", "tuned"))  # fmt: skip
    assert base["function_calling"]["value"] <= 0.35
    assert tuned["function_calling"]["value"] >= base["function_calling"]["value"] + 0.3
    assert tuned["helpful_exchange"]["value"] > base["helpful_exchange"]["value"]
    pictures = re.findall(r"sample/run/\S+\.png", process.stdout)
    assert len(pictures) == 2 and all((tmp_path / picture).is_file() for picture in pictures)
