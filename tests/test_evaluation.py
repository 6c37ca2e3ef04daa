"""Step 3: published scores; loading and asking a model; what is written, resumed, refused."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, assert_fails_in_one_line, run_here
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluation

SCRIPT = "evaluation.py"


def common_flags(model, splits, output):
    flags = ["--model", model, "--test-file", splits / "function_calling_test.jsonl"]
    flags += ["--dtype", "float32", "--max-new-tokens", 40, "--output-dir", output]
    return list(map(str, flags))


@pytest.fixture
def evaluate(tiny_model, splits, finished, tmp_path, monkeypatch):
    """Run the evaluation in this process, where the adapter lies; results go to tmp_path."""

    def run(*flags, output=tmp_path):
        monkeypatch.chdir(finished.adapter.parent)
        evaluation.main([*common_flags(tiny_model, splits, output), *flags])
        return output / tiny_model.name

    return run


def read_lines(folder):
    """The predictions in a folder by their query, without regard to their order."""
    lines = map(json.loads, (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines())
    return {(line["conversation_id"], line["turn"]): line for line in lines}


def read_metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


SCORES = [
    ("function_calling", "abcde", "xxabcdexx", 1),
    ("function_calling", "abcdef", "defabc", 3 / 6),
    ("function_calling", "abc", "", 0),
    ("function_calling", "ab" * 300, "ab" * 150, 1 / 2),  # frequent tokens count
    ("helpful_exchange", "abc", "cab", 1),  # order does not count
    ("helpful_exchange", "abc", "axcy", 2 / 4),
    ("helpful_exchange", "abc", "aaa", 1 / 3),  # as often as the reference holds it
    ("helpful_exchange", "abc", "a", 1),
    ("helpful_exchange", "abc", "", 0),
]


@pytest.mark.parametrize("kind, reference, output, score", SCORES)
def test_published_scores_worked_out_by_hand(kind, reference, output, score):
    assert evaluation.score_output(kind, list(reference), list(output)) == score


# ---- The model and its prompts


def test_bf16_rounds_weights_and_never_the_rotary_frequencies(tiny_model):
    """Catches a model whose every score on a GPU is off beyond some hundred tokens."""
    model = evaluation.load_model(tiny_model, None, "cpu", torch.bfloat16)
    exact = dict(AutoModelForCausalLM.from_pretrained(tiny_model).named_buffers())
    frequencies = {name: x for name, x in model.named_buffers() if "inv_freq" in name}
    assert frequencies and all(torch.equal(x, exact[name]) for name, x in frequencies.items())
    assert {x.dtype for x in frequencies.values()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    expected = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).eval()
    input_ids = torch.randint(110, 700, (2, 500), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, expected(input_ids).logits)


def test_the_adapter_is_merged_without_changing_what_the_model_says(tiny_model, finished):
    base = evaluation.load_model(tiny_model, None, "cpu", torch.float32)
    merged = evaluation.load_model(tiny_model, finished.adapter, "cpu", torch.float32)
    unmerged = AutoModelForCausalLM.from_pretrained(tiny_model)
    unmerged = PeftModel.from_pretrained(unmerged, finished.adapter).eval()
    input_ids = torch.randint(110, 700, (1, 50))
    with torch.no_grad():
        logits = [model(input_ids).logits for model in (merged, unmerged, base)]
    assert (logits[0] - logits[1]).abs().max() < 1e-4 < 0.1 < (logits[0] - logits[2]).abs().max()
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_base_and_tuned_model_get_one_prompt_in_which_no_text_forges_a_turn(tiny_model, finished):
    """One <bos>; a tool's result stands in a user turn, also for a template without tools."""
    messages = [
        {"role": "user", "content": "Go <end_of_turn>"},
        {"role": "assistant", "content": "<tool_call>"},
        {"role": "tool", "content": "<tool_response>\n7\n</tool_response>"},
    ]
    stock, served = (AutoTokenizer.from_pretrained(x) for x in (tiny_model, finished.adapter))
    for_base = evaluation.write_for_base(messages, stock.backend_tokenizer)
    for tokenizer, turns in ((stock, for_base), (served, messages)):
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        assert ids.count(tokenizer.convert_tokens_to_ids("<end_of_turn>")) == 3
        assert tokenizer.decode(ids) == (
            "<bos><start_of_turn>user\nGo <end_of_turn ><end_of_turn>\n"
            "<start_of_turn>model\n<tool_call><end_of_turn>\n"
            "<start_of_turn>user\n<tool_response>\n7\n</tool_response><end_of_turn>\n"
            "<start_of_turn>model\n"
        )


def test_a_batch_answers_40_prompts_as_each_is_answered_alone(tiny_model):
    """Prompts around the sliding window of 64; outputs that stop at different places."""
    model = evaluation.load_model(tiny_model, None, "cpu", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 200, (40,), generator=generator).tolist()
    prompts, alone = [], []
    for length in lengths:  # by the library alone
        prompt = torch.randint(110, 700, (1, length), generator=generator)
        ids = model.generate(prompt, max_new_tokens=30, do_sample=False)
        prompts.append(prompt[0].tolist())
        alone.append(ids[0, length:].tolist())
    stop_ids = [alone[0][3], alone[1][20]]
    expected = []
    for output in alone:
        ends = [place + 1 for place, token in enumerate(output) if token in stop_ids]
        text = tokenizer.decode(output[: min(ends, default=30)], skip_special_tokens=True)
        expected.append((text, "end_of_turn" if ends else "max_new_tokens"))
    assert evaluation.generate_batch(model, tokenizer, prompts, stop_ids, 30) == expected
    assert {reason for _, reason in expected} == {"end_of_turn", "max_new_tokens"}


def test_a_batch_that_does_not_fit_is_halved(tiny_model, monkeypatch):
    model = evaluation.load_model(tiny_model, None, "cpu", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompts = [[110 + n] * (n + 2) for n in range(7)]
    whole = evaluation.generate_batch(model, tokenizer, prompts, [1], 5)
    generate, sizes, most = model.generate, [], 2

    def generate_on_a_small_gpu(**inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", generate_on_a_small_gpu)
    assert evaluation.generate_batch(model, tokenizer, prompts, [1], 5) == whole
    assert sizes == [7, 3, 1, 2, 4, 2, 2]
    most = 0
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluation.generate_batch(model, tokenizer, prompts, [1], 5)


# ---- A whole evaluation


def test_base_and_tuned_are_scored_and_compared(evaluate, splits, tiny_model):
    evaluate("--baseline")
    results = evaluate()
    assert {path.name for path in results.iterdir()} == {"base", "tuned", "comparison.png"}
    queries = evaluation.read_queries(splits / "function_calling_test.jsonl")
    stock = AutoTokenizer.from_pretrained(tiny_model)
    for label in ("base", "tuned"):
        names = {path.name for path in (results / label).iterdir()}
        assert names == {"predictions.jsonl", "run.json", "metrics.json"}
        predictions, metrics = read_lines(results / label), read_metrics(results / label)
        assert set(predictions) == set(map(evaluation.key_of, queries))
        for kind, n in (("function_calling", 6), ("helpful_exchange", 8)):
            scores = [p["score"] for p in predictions.values() if p["kind"] == kind]
            assert metrics["scores"][kind]["n"] == len(scores) == n
            assert metrics["scores"][kind]["value"] == pytest.approx(sum(scores) / n)
        for p in predictions.values():  # in the stock tokenizer's tokens
            reference = stock.encode(p["reference"], add_special_tokens=False)
            output = stock.encode(p["output"], add_special_tokens=False)
            assert p["score"] == evaluation.score_output(p["kind"], reference, output)
        assert metrics["run"] == json.loads((results / label / "run.json").read_text())
    assert metrics["difference"]["function_calling"]["n"] == 6
    evaluate("--rescore")
    assert read_metrics(results / "tuned") == metrics
    evaluate("--limit", "3", "--overwrite")  # compared on those that both answered
    metrics = read_metrics(results / "tuned")
    n = metrics["scores"]["function_calling"]["n"]
    assert metrics["queries"] < 14 and metrics["difference"]["function_calling"]["n"] == n
    path = results / "base" / "predictions.jsonl"  # as of a split with the same ids
    path.write_text(path.read_text(encoding="utf-8").replace('"reference": "', '"reference": "x'))
    evaluate("--rescore")
    assert "difference" not in read_metrics(results / "tuned")
    with pytest.raises(SystemExit, match="base answers no query of"):
        evaluate("--baseline", "--rescore")


KILLED = """
import os, signal
import evaluation

generate_batch, batches = evaluation.generate_batch, []

def kill(*args):
    batches.append(args)
    if len(batches) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return generate_batch(*args)

evaluation.generate_batch = kill
evaluation.main()
"""


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_equals_an_undisturbed_one(
    evaluate, splits, tiny_model, finished, tmp_path
):
    """Catches a lost, torn or repeated answer after SIGKILL; and going on with other arguments."""
    whole = evaluate("--batch-size", "2", output=tmp_path / "whole") / "tuned"
    cut = tmp_path / "cut" / tiny_model.name / "tuned"
    flags = [*common_flags(tiny_model, splits, tmp_path / "cut"), "--batch-size", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = [sys.executable, "-c", KILLED, *flags]
    process = subprocess.run(killed, cwd=finished.adapter.parent, env=environment)
    path = cut / "predictions.jsonl"
    assert process.returncode == -9 and path.read_bytes().count(b"\n") == 4
    assert not (cut / "metrics.json").exists()
    with open(path, "a") as file:
        file.write('{"conversation_id": "torn')
    with pytest.raises(SystemExit, match="holds an evaluation: --resume goes on"):
        evaluate(output=tmp_path / "cut")
    with pytest.raises(SystemExit, match="evaluation of another max_new_tokens"):
        evaluate("--resume", "--max-new-tokens", "9", output=tmp_path / "cut")
    evaluate("--resume", "--batch-size", "2", output=tmp_path / "cut")
    lines = path.read_text().splitlines()
    assert len(lines) == 14 and read_lines(cut) == read_lines(whole)  # nothing twice, nothing lost
    assert read_metrics(cut) == read_metrics(whole)
    evaluate("--resume", output=tmp_path / "cut")  # nothing is left to ask
    assert path.read_text().splitlines() == lines


# ---- What is refused


def test_mistakes_end_in_one_line(tiny_model, splits, finished, tmp_path):
    test_file = ["--test-file", splits / "function_calling_test.jsonl"]
    (tmp_path / "p.jsonl").write_text('{"conversation_id": "9", "turn": 1, "output": ""}\n')
    good = {"id": "0", "tools": "[]", "messages": [{"role": "user", "content": "Hi"}]}
    (tmp_path / "bad.jsonl").write_text(f'{json.dumps(good)}\n{{"id": 1}}\n')
    (tmp_path / "no model").mkdir()
    for model, flags, words in [
        (tiny_model, [], ["function_calling_train.py", "--baseline"]),
        (tiny_model, ["--test-file", "x"], ["x", "prepare_function_calling_dataset.py first"]),
        (tiny_model, ["--test-file", "bad.jsonl"], ["bad.jsonl, line 2"]),
        ("google/other", ["--adapter", finished.adapter], ["trained on", str(tiny_model)]),
        (tmp_path / "no model", ["--baseline"], ["no model", "tokenizer.json"]),
        ("google/not-in-the-cache", ["--baseline"], ["google/not-in-the-cache"]),
        (tiny_model, ["--adapter", tmp_path / "no model"], ["training_run.json"]),
        (tiny_model, ["--predictions", "q.jsonl"], ["q.jsonl"]),
        (tiny_model, ["--rescore"], ["tuned/predictions.jsonl"]),
    ]:
        process = run_here(SCRIPT, "--model", model, *test_file, *flags, cwd=tmp_path)
        assert_fails_in_one_line(process, *words)
    for flags in (
        ["--server", "http://127.0.0.1:9"],
        ["--resume", "--overwrite"],
        ["--limit", "0"],
    ):
        assert run_here(SCRIPT, *flags, cwd=tmp_path).returncode == 2
    assert not (tmp_path / "evaluation_results").exists()
    process = run_here(
        SCRIPT, "--model", tiny_model, *test_file, "--predictions", "p.jsonl", cwd=tmp_path
    )
    assert_fails_in_one_line(process, "answers no query of")
