"""Tests of the benchmarks: each runs from start to end, with as little work as possible."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_script
from servers import ChatServer, completion
from transformers import AutoTokenizer

import function_calling_train as train
import prepare_function_calling_dataset as prepare

sys.path.insert(0, str(ROOT / "tests/benchmarks"))
import ask_with_tools
import gpu_report
import run_bfcl
import train_on_cpu

TRAINING = ("bench_training.py", ["--steps", "2"], ["published", "trl", "ours"])
GENERATION = (
    "bench_generation.py",
    ["--conversations", "1", "--max-new-tokens", "8"],
    ["published", "ours"],
)


@pytest.mark.slow
@pytest.mark.parametrize("script, arguments, variants", [TRAINING, GENERATION])
def test_a_benchmark_measures_every_variant(script, arguments, variants, tmp_path):
    command = [sys.executable, ROOT / "tests/benchmarks" / script, "--model-shape", "tiny"]
    command += ["--threads", "1", *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout.splitlines()[-1])
    assert list(results) == variants
    assert all(value > 0 for result in results.values() for value in result.values())
    assert "| peak memory (GB) |" in process.stdout
    assert not list(tmp_path.iterdir())  # no files are left


def test_the_chat_template_renders_openai_messages_and_tools_as_training_does():
    wording = {
        "before_tools": prepare.BEFORE_TOOLS,
        "after_tools": prepare.AFTER_TOOLS,
        "before_request": prepare.THINK_INSTRUCTION,
    }
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "sample/tiny-gemma-3")
    tokenizer.chat_template = train.make_template(wording, tokenizer, "serving")
    for row in json.loads((ROOT / "sample/hermes_sample.json").read_text(encoding="utf-8"))[:200]:
        row["conversations"] = row["conversations"][1:]  # without its tools
        row["conversations"].insert(0, {"from": "system", "value": "Be kind."})
        split = prepare.convert_row(row)
        messages = ask_with_tools.to_openai(split["messages"], wording)
        tools = split["tools"]
        assert not [tag for tag in ("</tools>", "<tool_call>") if tag in json.dumps(messages)]
        assert tools == "[]" or messages[0] == {"role": "system", "content": "Be kind."}
        sent = tokenizer.apply_chat_template(messages, json.loads(tools), tokenize=False)
        assert sent == tokenizer.apply_chat_template(split["messages"], tokenize=False)


def test_the_openai_client_counts_parsed_calls_and_its_answers_can_be_scored(tmp_path, splits):
    pytest.importorskip("openai")
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}

    def answer(asked, times):
        """Call a tool in the first turn of each conversation that has tools."""
        if "tools" in asked and len(asked["messages"]) == 1:
            return completion(None, tool_calls=[call])
        return completion("Hi")

    test_file = ["--test-file", splits / "function_calling_test.jsonl"]
    command = ["--server", ChatServer(answer).url, "--server-model", "m", *test_file]
    asked = run_script("tests/benchmarks/ask_with_tools.py", *command, cwd=tmp_path)
    assert asked.stdout == "6 of 6 queries that need a call came back parsed\n", asked.stderr
    command = ["--model", ROOT / "sample/tiny-gemma-3", "--predictions", "with_tools.jsonl"]
    scored = run_script("evaluation.py", *command, *test_file, cwd=tmp_path)
    metrics = json.loads((next(tmp_path.rglob("metrics.json"))).read_text())
    assert metrics["scores"]["f1"]["value"] == 1 and not scored.returncode


def test_bfcl_asks_failed_and_incomplete_answers_again(tmp_path):
    path = tmp_path / "result.json"
    answer = json.dumps({"id": "a", "result": "[]"}) + "\n"
    failed = {"id": "b", "result": "Error during inference: 500", "traceback": "..."}
    path.write_text(answer + json.dumps(failed) + '\n{"id": "c", "resu')
    assert run_bfcl.remove_failed_answers(path) == ["b: Error during inference: 500"]
    assert path.read_text() == answer


def test_bfcl_does_not_mix_the_answers_of_two_model_names(tmp_path):
    run_bfcl.check_settings(tmp_path, {"server_model": "a", "max_tokens": 256})
    run_bfcl.check_settings(tmp_path, {"server_model": "a", "max_tokens": 256})
    with pytest.raises(SystemExit, match="server_model a, not b. Choose another --output-dir"):
        run_bfcl.check_settings(tmp_path, {"server_model": "b", "max_tokens": 256})


def test_a_bfcl_score_has_a_wilson_interval():
    # If no answer is correct, it is [0, z² / (n + z²)]. If half are, it is 1/2 ± z / (2 √(n + z²)).
    assert run_bfcl.wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    assert run_bfcl.wilson_interval(10, 20) == pytest.approx((0.2993, 0.7007), abs=1e-4)


REPORT = ROOT / "tests/benchmarks/gpu_report.py"


def run_report(*flags):
    command = [sys.executable, REPORT, "--model-shapes", "tiny", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200)


@pytest.mark.slow
def test_the_gpu_report_runs_on_a_cpu():
    parts = ["machine", "agreement", "longest-batch", "four-bit", "resume", "two-processes"]
    process = run_report("--only", *parts)
    assert process.returncode == 0, process.stdout
    sections = dict(part.split("\n\n", 1) for part in process.stdout.split("\n## ")[1:])
    rows = {
        title: [line.strip("| ").split(" | ") for line in text.splitlines() if "| " in line][2:]
        for title, text in sections.items()
    }
    agreement = rows["Loss and gradients against the CPU"]
    # The reference, the same batch again, and one conversation at a time
    assert len(agreement) == 3
    for _, loss, difference, error, cosine in agreement:
        assert float(loss) > 1 and float(difference) < 1e-5 and float(error) < 1e-4
        assert float(cosine) == pytest.approx(1, abs=1e-5)
    assert [row[:3] for row in rows["Longest batch"]] == [
        ["tiny", "off", "4 x 32"],
        ["tiny", "on", "4 x 32"],
    ]
    ((_, start, is_identical, difference),) = rows["Kill and resume"]
    assert start.startswith("checkpoint-") and is_identical == "yes" and float(difference) == 0
    assert sections["Four bits"].startswith("Not run: --load-in-4bit needs a CUDA GPU")
    assert sections["Two processes"].startswith("Not run: it needs two GPUs")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_the_gpu_report_without_a_gpu_prints_one_line():
    process = subprocess.run([sys.executable, REPORT], capture_output=True, text=True)
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr.startswith("error: PyTorch finds no CUDA GPU. Use --model-shapes tiny")


@pytest.mark.slow
def test_the_gpu_report_continues_after_a_part_that_fails(monkeypatch, capsys):
    flags = ["--model-shapes", "tiny", "--only", "machine", "two-processes"]
    monkeypatch.setattr(sys, "argv", [str(REPORT), *flags])
    monkeypatch.setitem(gpu_report.PARTS, "machine", ("Machine", None))
    run = subprocess.run

    def run_or_fail(command, **options):
        if command[command.index("--part") + 1] == "machine":
            command = [sys.executable, "-c", "print('half a table'); raise MemoryError('no room')"]
        return run(command, **options)

    monkeypatch.setattr(gpu_report.subprocess, "run", run_or_fail)
    with pytest.raises(SystemExit, match="1 of the parts failed: machine"):
        gpu_report.main()
    report = capsys.readouterr().out
    assert "half a table\n\nFailed (exit status 1): MemoryError: no room" in report
    assert "Not run: it needs two GPUs" in report


def test_the_memory_estimate_prints_a_row_per_model_and_precision():
    script = ROOT / "tests/benchmarks/estimate_memory.py"
    process = subprocess.run([sys.executable, script], capture_output=True, text=True)
    rows = [line.strip("| ").split(" | ") for line in process.stdout.splitlines()]
    assert [row[:2] for row in rows[2:]] == [
        ["270m", "bfloat16"],
        ["270m", "float32"],
        ["1b", "bfloat16"],
        ["1b", "float32"],
    ]
    assert rows[4][2] == "2.0"  # GB: one billion weights of two bytes each


@pytest.mark.parametrize("window", [None, 5, 40])
def test_attention_in_blocks_equals_that_of_pytorch(window, monkeypatch):
    monkeypatch.setattr(train_on_cpu, "BLOCK", 8)
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, 23, 4, requires_grad=True) for heads in (2, 1, 1)]
    distances = torch.arange(23)[:, None] - torch.arange(23)
    mask = (distances >= 0) & (distances < (window or 23))
    module = SimpleNamespace(sliding_window=window, num_key_value_groups=2, is_causal=True)
    results = []
    for attend in (train_on_cpu.attend, train_on_cpu.sdpa_attention_forward):
        output, _ = attend(module, *inputs, mask[None, None], scaling=0.3)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    torch.testing.assert_close(*results)
