"""The benchmarks run from start to end, at a size that says nothing of speed."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

TRAINING = ("bench_training.py", ["--steps", "2"], ["published", "trl", "ours"])
LITTLE = ["--conversations", "1", "--max-new-tokens", "8"]
GENERATION = ("bench_generation.py", LITTLE, ["published", "ours"])


@pytest.mark.slow
@pytest.mark.parametrize("script, arguments, sides", [TRAINING, GENERATION])
def test_a_benchmark_measures_every_side(script, arguments, sides, tmp_path):
    command = [sys.executable, ROOT / "tests/benchmarks" / script, "--model-shape", "tiny"]
    command += ["--threads", "1", *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout.splitlines()[-1])
    assert list(results) == sides
    assert all(value > 0 for result in results.values() for value in result.values())
    assert "| peak memory (GB) |" in process.stdout
    assert not list(tmp_path.iterdir())  # nothing is left behind
