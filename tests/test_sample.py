"""The sample: that its builder makes it, and that a model learns from it."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import prepare_function_calling_dataset as prepare

SAMPLE = ROOT / "sample"
DATASET = SAMPLE / "hermes_sample.json"
sys.path.insert(0, str(SAMPLE))

import build_sample  # noqa: E402


def test_the_builder_makes_the_dataset_that_is_shipped(tmp_path):
    build_sample.build_dataset(tmp_path / "built.json", 1)
    assert (tmp_path / "built.json").read_bytes() == DATASET.read_bytes()


def test_some_tools_are_called_in_the_test_split_and_never_stand_in_a_training_row(tmp_path):
    prepare.main(["--dataset", str(DATASET), "--output-dir", str(tmp_path)])
    training, test = ((tmp_path / name).read_text() for name in prepare.SPLIT_FILES.values())
    assert not [name for name in build_sample.TEST_ONLY if name in training]
    rows = map(json.loads, test.splitlines())
    said = [turn["content"] for row in rows for turn in row["messages"][1::2]]
    calls = re.findall(r'<tool_call>\n{"name": "(\w+)"', "\n".join(said))
    unseen = [name for name in calls if name in build_sample.TEST_ONLY]
    assert len(unseen) > 50 and len(calls) - len(unseen) > 50


@pytest.mark.slow
def test_the_sample_run_lifts_the_scores_on_a_slice_of_the_sample(tmp_path):
    """sample/run.sh as a newcomer runs it, in a copy of the project, with fewer rows and steps."""
    for path in (*ROOT.glob("*.py"), ROOT / "requirements.txt"):
        shutil.copy(path, tmp_path)
    shutil.copytree(SAMPLE, tmp_path / "sample", ignore=shutil.ignore_patterns("run"))
    rows = json.loads(DATASET.read_text(encoding="utf-8"))[:160]
    (tmp_path / "sample" / DATASET.name).write_text(json.dumps(rows))
    python = tmp_path / ".venv/bin/python"  # this one, where everything is installed already
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
    baseline, fine_tuned = scores["baseline"], scores["fine-tuned"]
    assert baseline["function_calling"]["value"] <= 0.35
    assert fine_tuned["function_calling"]["value"] >= baseline["function_calling"]["value"] + 0.3
    assert fine_tuned["helpful_exchange"]["value"] > baseline["helpful_exchange"]["value"]
    pictures = re.findall(r"sample/run/\S+\.png", process.stdout)
    assert len(pictures) == 2 and all((tmp_path / picture).is_file() for picture in pictures)
