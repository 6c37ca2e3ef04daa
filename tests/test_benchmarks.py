"""The benchmarks run from start to end, at a size that says nothing of speed, and their workload is as they say."""

import random
import re
import statistics
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import workload  # noqa: E402

import function_calling_train as train  # noqa: E402


def test_the_conversations_are_as_long_as_the_published_ones():
    rows = workload.draw_rows(400, 1000)
    lengths = sorted(len(row["input_ids"]) for row in rows)
    assert 550 < statistics.median(lengths) < 580 and 630 < statistics.mean(lengths) < 690
    assert 1150 < lengths[379] < 1400 and lengths[-1] <= 4096  # 95 % are shorter than about 1,200
    labelled = sum(label != -100 for row in rows for label in row["labels"])
    assert 0.4 < labelled / sum(lengths) < 0.6
    assert all(label in (-100, token) for row in rows[:20] for token, label in zip(row["input_ids"], row["labels"], strict=True))


def test_parts_of_a_step_have_less_padding_and_a_bound():
    """833 steps of four conversations of the published lengths, padded as a whole and in parts of at most 4,096 tokens."""
    lengths = [len(row["input_ids"]) for row in workload.draw_rows(4167, 400)]
    random.Random(0).shuffle(lengths)
    steps = [lengths[start:start + 4] for start in range(0, 3332, 4)]
    whole = [4 * max(step) for step in steps]
    parts = [[step[row] for row in rows] for step in steps for rows in train.cut_into_parts(step, 4, 4096)]
    padded = [len(part) * max(part) for part in parts]
    num_tokens = sum(map(sum, steps))
    assert sum(map(sum, parts)) == num_tokens
    assert (round(sum(whole) / num_tokens, 2), max(whole)) == (1.57, 14_180)
    assert (round(sum(padded) / num_tokens, 2), max(padded), round(len(parts) / 833, 2)) == (1.36, 4092, 1.39)


@pytest.mark.slow
@pytest.mark.parametrize("arguments, measures", [
    (["bench_training.py", "--model", "tiny", "--conversations", "8", "--length", "40"], ["tokens/s", "peak memory (GB)", "adapter file (MB)"]),
    (["bench_generation.py", "--model", "tiny", "--queries", "6", "--max-new-tokens", "8"], ["queries/s", "peak memory (GB)"]),
    (["bench_preparation.py", "--rows", "50"], ["rows/s", "peak memory (GB)"])])
def test_a_benchmark_compares_both_sides(arguments, measures, tmp_path):
    process = subprocess.run([sys.executable, ROOT / "tests" / "benchmarks" / arguments[0], *arguments[1:]], cwd=tmp_path,
                             capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    for measure in measures:
        line = next(line for line in process.stdout.splitlines() if line.startswith(f"| {measure} |"))
        published, ours, *_, ratio = map(float, re.findall(r"[\d.]+", line.replace(measure, "").replace(",", "")))
        assert published > 0 and ours > 0 and ratio > 0
    assert not list(tmp_path.iterdir())
