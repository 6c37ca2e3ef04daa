"""The benchmarks run from start to end, at a size that says nothing of speed."""

import json
import statistics
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import workload  # noqa: E402


def test_the_conversations_are_as_long_as_the_published_ones():
    turns = [
        [(message["role"], len(message["content"].split()) + 3) for message in row["messages"]]
        for row in workload.draw_conversations(400)
    ]
    lengths = sorted(sum(length for _, length in conversation) for conversation in turns)
    assert 550 < statistics.median(lengths) < 590 and 630 < statistics.mean(lengths) < 690
    assert 1150 < lengths[379] < 1400 and lengths[-1] < 4200  # 95 % are shorter than about 1,200
    said = sum(length for row in turns for role, length in row if role == "assistant")
    assert 0.4 < said / sum(lengths) < 0.6


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, arguments, sides",
    [
        ("bench_training.py", ["--steps", "2"], ["published", "trl", "ours"]),
        (
            "bench_generation.py",
            ["--conversations", "1", "--max-new-tokens", "8"],
            ["published", "ours"],
        ),
    ],
)
def test_a_benchmark_measures_every_side(script, arguments, sides, tmp_path):
    command = [sys.executable, ROOT / "tests" / "benchmarks" / script, "--model-shape", "tiny"]
    process = subprocess.run(
        [*command, "--threads", "1", *arguments],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout.splitlines()[-1])
    assert list(results) == sides
    assert all(value > 0 for result in results.values() for value in result.values())
    assert "| peak memory (GB) |" in process.stdout
    assert not list(tmp_path.iterdir())  # nothing is left behind
