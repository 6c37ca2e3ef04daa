"""The benchmarks run from start to end, at a size that says nothing of speed, and their workload is as they say."""

import re
import statistics
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import workload  # noqa: E402


def test_the_conversations_are_as_long_as_the_published_ones():
    rows = workload.draw_rows(400, 1000)
    lengths = sorted(len(row["input_ids"]) for row in rows)
    assert 550 < statistics.median(lengths) < 580 and 630 < statistics.mean(lengths) < 690
    assert 1150 < lengths[379] < 1400 and lengths[-1] <= 4096  # 95 % are shorter than about 1,200
    labelled = sum(label != -100 for row in rows for label in row["labels"])
    assert 0.4 < labelled / sum(lengths) < 0.6
    assert all(label in (-100, token) for row in rows[:20] for token, label in zip(row["input_ids"], row["labels"], strict=True))


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
