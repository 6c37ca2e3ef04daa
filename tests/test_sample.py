"""Tests of the sample: the builder reproduces the dataset, and a model learns from it."""

import json
import re
import shutil
import subprocess
import sys
from itertools import islice

import pytest
from conftest import ROOT

import prepare_function_calling_dataset as prepare

SAMPLE = ROOT / "sample"
DATASET = SAMPLE / "hermes_sample.json"
sys.path.insert(0, str(SAMPLE))

import build_sample  # noqa: E402


def test_the_builder_reproduces_the_dataset_in_the_repository(tmp_path):
    built = tmp_path / "built.json"
    build_sample.build_dataset(built, seed=1)
    assert built.read_bytes() == DATASET.read_bytes()


def test_some_tools_appear_only_in_the_test_split(tmp_path):
    prepare.main(["--dataset", str(DATASET), "--output-dir", str(tmp_path)])
    train_text = (tmp_path / prepare.SPLIT_FILES["train"]).read_text(encoding="utf-8")
    test_text = (tmp_path / prepare.SPLIT_FILES["test"]).read_text(encoding="utf-8")
    assert not [name for name in build_sample.TEST_ONLY if name in train_text]
    answers = []
    for line in test_text.splitlines():
        messages = json.loads(line)["messages"]
        answers += [turn["content"] for turn in messages if turn["role"] == "assistant"]
    calls = re.findall(r'<tool_call>\n{"name": "(\w+)"', "\n".join(answers))
    num_test_only = sum(name in build_sample.TEST_ONLY for name in calls)
    assert num_test_only > 50
    assert len(calls) - num_test_only > 50


def test_the_general_text_contains_no_tag_of_the_dataset_and_no_tool_of_the_test_split_only():
    """The sample's model must not know before fine-tuning what the fine-tuned model is scored on.

    Of these conversations, one would contain get_sunrise if build_sample did not leave it out.
    """
    tags = ["<tools>", "<tool_call>", "<tool_response>", "<think>"]
    for stage in build_sample.STAGES:
        for conversation in islice(build_sample.general_text("1-0", stage.texts), 600):
            text = "\n".join(turn for exchange in conversation for turn in exchange)
            assert not [tag for tag in tags if tag in text]
            assert not build_sample.TEST_ONLY & set(re.findall(r"\w+", text))


@pytest.mark.slow
def test_the_sample_run_lifts_the_scores_on_a_slice_of_the_sample(tmp_path):
    """Run sample/run.sh in a copy of the project, with fewer rows and fewer training steps."""
    for path in (*ROOT.glob("*.py"), ROOT / "requirements.txt"):
        shutil.copy(path, tmp_path)
    shutil.copytree(SAMPLE, tmp_path / "sample", ignore=shutil.ignore_patterns("run"))
    rows = json.loads(DATASET.read_text(encoding="utf-8"))[:160]
    (tmp_path / "sample" / DATASET.name).write_text(json.dumps(rows))
    # The script finds an environment in which everything is already installed.
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n[ "$2" = pip ] && exit 0\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    command = ["bash", tmp_path / "sample/run.sh", "--max-steps", "120"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    results = tmp_path / "sample/run/evaluation_results/tiny-gemma-3"
    scores = {}
    for run in ("baseline", "fine-tuned"):
        scores[run] = json.loads((results / run / "metrics.json").read_text())["scores"]
    baseline = scores["baseline"]
    fine_tuned = scores["fine-tuned"]
    assert baseline["function_calling"]["value"] <= 0.35
    assert fine_tuned["function_calling"]["value"] >= baseline["function_calling"]["value"] + 0.3
    assert fine_tuned["helpful_exchange"]["value"] > baseline["helpful_exchange"]["value"]
    plots = re.findall(r"sample/run/\S+\.png", process.stdout)
    assert len(plots) == 2
    assert all((tmp_path / plot).is_file() for plot in plots)
