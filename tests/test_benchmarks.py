"""The benchmarks run from start to end, at a size that says nothing of speed."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, run_script
from servers import ChatServer, completion
from transformers import AutoTokenizer

import function_calling_train as train
import prepare_function_calling_dataset as prepare

sys.path.insert(0, str(ROOT / "tests/benchmarks"))
import ask_with_tools

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


def test_what_a_program_sends_with_tools_is_rendered_as_the_text_that_is_trained_on():
    wording = {"before_tools": prepare.BEFORE_TOOLS, "after_tools": prepare.AFTER_TOOLS}
    wording["before_request"] = prepare.THINK_INSTRUCTION
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "sample/tiny-gemma-3")
    _, tokenizer.chat_template = train.make_templates(wording)
    for row in json.loads((ROOT / "sample/hermes_sample.json").read_text(encoding="utf-8"))[:200]:
        row["conversations"] = row["conversations"][1:]  # so that step 1 writes the tools itself
        row["conversations"].insert(0, {"from": "system", "value": "Be kind."})
        split = prepare.convert_row(row)
        messages, tools = ask_with_tools.to_openai(split["messages"], wording), split["tools"]
        assert not [tag for tag in ("</tools>", "<tool_call>") if tag in json.dumps(messages)]
        assert tools == "[]" or messages[0] == {"role": "system", "content": "Be kind."}
        sent = tokenizer.apply_chat_template(messages, json.loads(tools), tokenize=False)
        assert sent == tokenizer.apply_chat_template(split["messages"], tokenize=False)


def test_an_openai_client_counts_parsed_calls_and_its_answers_can_be_scored(tmp_path, splits):
    pytest.importorskip("openai")
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}

    def answer(asked, _):  # calls a tool in each first turn that has one
        is_call = "tools" in asked and len(asked["messages"]) == 1
        return completion(None if is_call else "Hi", tool_calls=[call] if is_call else None)

    test_file = ["--test-file", splits / "function_calling_test.jsonl"]
    command = ["--server", ChatServer(answer).url, "--server-model", "m", *test_file]
    asked = run_script("tests/benchmarks/ask_with_tools.py", *command, cwd=tmp_path)
    assert asked.stdout == "6 of 6 queries that need a call came back parsed\n", asked.stderr
    command = ["--model", ROOT / "sample/tiny-gemma-3", "--predictions", "with_tools.jsonl"]
    scored = run_script("evaluation.py", *command, *test_file, cwd=tmp_path)
    metrics = json.loads((next(tmp_path.rglob("metrics.json"))).read_text())
    assert metrics["scores"]["f1"]["value"] == 1 and not scored.returncode
