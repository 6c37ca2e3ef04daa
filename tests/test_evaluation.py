"""Tests of step 3: the published scores, generation, resuming, comparisons and user mistakes."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT, assert_fails_in_one_line, run_here
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluation

SCRIPT = "evaluation.py"


def common_flags(model, splits, output):
    flags = ["--model", model, "--test-file", splits / "function_calling_test.jsonl"]
    flags += ["--dtype", "float32", "--max-new-tokens", 40, "--output-dir", output]
    return list(map(str, flags))


@pytest.fixture
def evaluate(tiny_model, splits, finished, tmp_path, monkeypatch):
    """Run the evaluation in this process, in the folder of the adapter; return its results."""

    def run(*flags, output=tmp_path):
        monkeypatch.chdir(finished.adapter.parent)
        evaluation.main([*common_flags(tiny_model, splits, output), *flags])
        return output / tiny_model.name

    return run


def read_lines(folder):
    """The predictions in a folder by query, so that their order does not matter."""
    lines = map(json.loads, (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines())
    return {(line["conversation_id"], line["turn"]): line for line in lines}


def read_metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def read_files(folder):
    """The names and the contents of all files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


SCORES = [
    ("function_calling", "abcde", "xxabcdexx", 1),
    ("function_calling", "abcdef", "defabc", 3 / 6),
    ("function_calling", "abc", "", 0),
    ("function_calling", "ab" * 300, "ab" * 150, 1 / 2),  # frequent tokens count too
    ("helpful_exchange", "abc", "cab", 1),  # order does not count
    ("helpful_exchange", "abc", "axcy", 2 / 4),
    ("helpful_exchange", "abc", "aaa", 1 / 3),  # at most as often as in the reference
    ("helpful_exchange", "abc", "a", 1),
    ("helpful_exchange", "abc", "", 0),
]


@pytest.mark.parametrize("kind, reference, output, score", SCORES)
def test_the_published_scores_equal_values_worked_out_by_hand(kind, reference, output, score):
    assert evaluation.score_output(kind, list(reference), list(output)) == score


# ---- The model and its prompts


def test_bfloat16_rounds_the_weights_but_not_the_rotary_frequencies(tiny_model):
    """Rounded frequencies would make all scores of prompts over some hundred tokens wrong."""
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


def test_merging_the_adapter_does_not_change_the_logits(tiny_model, finished):
    baseline = evaluation.load_model(tiny_model, None, "cpu", torch.float32)
    merged = evaluation.load_model(tiny_model, finished.adapter, "cpu", torch.float32)
    unmerged = AutoModelForCausalLM.from_pretrained(tiny_model)
    unmerged = PeftModel.from_pretrained(unmerged, finished.adapter).eval()
    input_ids = torch.randint(110, 700, (1, 50))
    with torch.no_grad():
        logits = [model(input_ids).logits for model in (merged, unmerged, baseline)]
    assert (logits[0] - logits[1]).abs().max() < 1e-4 < 0.1 < (logits[0] - logits[2]).abs().max()
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_baseline_and_fine_tuned_model_get_the_same_prompt_without_forged_turns(
    tiny_model, finished
):
    """There is one <bos>, and tool results are user turns, even for a template without tools."""
    messages = [
        {"role": "user", "content": "Go <end_of_turn>"},
        {"role": "assistant", "content": "<tool_call>"},
        {"role": "tool", "content": "<tool_response>\n7\n</tool_response>"},
    ]
    stock, served = (AutoTokenizer.from_pretrained(x) for x in (tiny_model, finished.adapter))
    for_baseline = evaluation.write_for_baseline(messages, stock.backend_tokenizer)
    for tokenizer, turns in ((stock, for_baseline), (served, messages)):
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        assert ids.count(tokenizer.convert_tokens_to_ids("<end_of_turn>")) == 3
        assert tokenizer.decode(ids) == (
            "<bos><start_of_turn>user\nGo <end_of_turn ><end_of_turn>\n"
            "<start_of_turn>model\n<tool_call><end_of_turn>\n"
            "<start_of_turn>user\n<tool_response>\n7\n</tool_response><end_of_turn>\n"
            "<start_of_turn>model\n"
        )


def test_a_batch_of_40_prompts_gets_the_same_answers_as_single_prompts(tiny_model):
    """Prompts are shorter and longer than the sliding window of 64, and outputs stop anywhere."""
    model = evaluation.load_model(tiny_model, None, "cpu", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 200, (40,), generator=generator).tolist()
    prompts = []
    alone = []  # the outputs of the library for single prompts
    for length in lengths:
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


@pytest.mark.parametrize("flags", [[], ["--batch-size", "7"]])
def test_a_batch_that_does_not_fit_halves_the_token_budget_for_the_rest_of_the_run(
    tiny_model, monkeypatch, flags
):
    """Otherwise every batch would run out of memory again, perhaps in an endless loop."""
    model = evaluation.load_model(tiny_model, None, "cpu", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    args = evaluation.parse_args(["--max-new-tokens", "5", *flags])
    prompts = [[{"role": "user", "content": "a"}] for _ in range(21)]
    queries = [{"conversation_id": n, "prompt": prompt} for n, prompt in enumerate(prompts)]
    length = len(tokenizer.apply_chat_template(prompts, add_generation_prompt=True)["input_ids"][0])
    monkeypatch.setitem(evaluation.TOKENS_AT_ONCE, "cpu", 7 * (length + 5))
    whole = list(evaluation.ask_model(queries, model, tokenizer, args))
    generate = model.generate
    sizes = []
    max_size = 3

    def generate_on_a_small_gpu(**inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > max_size:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", generate_on_a_small_gpu)
    assert list(evaluation.ask_model(queries, model, tokenizer, args)) == whole
    assert sizes == [7, *[3] * 7]
    sizes.clear()
    max_size = 1
    assert list(evaluation.ask_model(queries, model, tokenizer, args)) == whole
    assert sizes == [7, 3, *[1] * 21]
    max_size = 0
    with pytest.raises(RuntimeError, match="out of memory"):
        list(evaluation.ask_model(queries, model, tokenizer, args))


def test_a_warning_says_why_torch_cannot_use_a_gpu(monkeypatch, capsys):
    def is_available():
        warnings.warn("The NVIDIA driver on your system\nis too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    warnings.simplefilter("ignore")
    assert evaluation.choose_device("float32") == ("cpu", torch.float32)
    assert capsys.readouterr().err == "warning: The NVIDIA driver on your system is too old\n"


# ---- A whole evaluation


def test_baseline_and_fine_tuned_are_scored_and_compared(evaluate, splits, tiny_model, capsys):
    evaluate("--baseline")
    printed = capsys.readouterr().out
    assert printed.startswith(f"Model       {tiny_model}, float32 on cpu\n")
    assert re.search(r"\nNext        python evaluation.py --model .*\n$", printed)
    results = evaluate()
    printed = capsys.readouterr().out
    assert f"with LoRA_{tiny_model.name}-function_calling, float32 on cpu\n" in printed
    assert "on the 14 queries that both runs answered" in printed and "difference" in printed
    assert {path.name for path in results.iterdir()} == {"baseline", "fine-tuned"}
    queries = evaluation.read_queries(splits / "function_calling_test.jsonl")
    stock = AutoTokenizer.from_pretrained(tiny_model)
    for label, picture in (("baseline", "scores.png"), ("fine-tuned", "comparison.png")):
        names = {path.name for path in (results / label).iterdir()}
        assert names == {"predictions.jsonl", "run.json", "metrics.json", picture}
        predictions = read_lines(results / label)
        metrics = read_metrics(results / label)
        assert set(predictions) == {(q["conversation_id"], q["turn"]) for q in queries}
        for kind, n in (("function_calling", 6), ("helpful_exchange", 8)):
            scores = [p["score"] for p in predictions.values() if p["kind"] == kind]
            assert metrics["scores"][kind]["n"] == len(scores) == n
            assert metrics["scores"][kind]["value"] == pytest.approx(sum(scores) / n)
        for p in predictions.values():  # scores count tokens of the base model's tokenizer
            reference = stock.encode(p["reference"], add_special_tokens=False)
            output = stock.encode(p["output"], add_special_tokens=False)
            assert p["score"] == evaluation.score_output(p["kind"], reference, output)
        assert metrics["run"] == json.loads((results / label / "run.json").read_text())
    assert metrics["difference"]["function_calling"]["n"] == 6
    baseline = read_files(results / "baseline")
    evaluate("--rescore")
    assert read_metrics(results / "fine-tuned") == metrics
    assert read_files(results / "baseline") == baseline  # a report writes only its own run


def test_a_comparison_uses_only_the_queries_that_both_runs_answered(evaluate, capsys):
    results = evaluate("--baseline", "--limit", "3")
    evaluate()
    printed = capsys.readouterr().out
    metrics = read_metrics(results / "fine-tuned")
    limited = read_metrics(results / "baseline")
    num_shared = limited["queries"]
    assert num_shared < metrics["queries"] == 14
    assert "fine-tuned/, answers to 14 of the 14 queries\n" in printed
    *_, failures = re.findall(r"^Failures    (.*)", printed, re.MULTILINE)
    assert sum(map(int, re.findall(r"\d+", failures))) <= num_shared  # not those of all 14
    assert f"on the {num_shared} queries that both runs answered\n" in printed
    assert metrics["comparison"]["queries"] == num_shared
    n = limited["scores"]["function_calling"]["n"]
    assert metrics["difference"]["function_calling"]["n"] == n
    evaluate("--show-failures", "1", "--limit", "1")  # a report is always about the whole run
    assert read_metrics(results / "fine-tuned") == metrics
    # Predictions for a split that has the same ids but other conversations
    path = results / "baseline" / "predictions.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"reference": "', '"reference": "x'))
    evaluate("--rescore")
    assert "no query was answered by both runs" in capsys.readouterr().out
    assert "difference" not in read_metrics(results / "fine-tuned")
    assert not (results / "fine-tuned" / "comparison.png").exists()  # it showed the old predictions
    with pytest.raises(SystemExit, match="baseline contains no prediction for"):
        evaluate("--baseline", "--rescore")


def test_an_evaluation_is_not_replaced_until_the_new_one_has_an_answer(
    evaluate, tiny_model, finished, tmp_path, monkeypatch, capsys
):
    """Hours of work must not be lost to a typo, a damaged model or a lack of memory."""
    results = evaluate("--limit", "2")
    before = read_files(results / "fine-tuned")
    damaged = tmp_path / "damaged" / tiny_model.name
    damaged.mkdir(parents=True)
    for path in tiny_model.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    (damaged / "model.safetensors").write_bytes(b"damaged")
    adapter = str(finished.adapter)
    for flags in (
        ["--model", str(damaged)],
        ["--model", str(tmp_path / tiny_model.name)],
        ["--adapter", adapter + "x"],
        ["--compare-with", "nowhere"],
        ["--name", "new", "--model", str(damaged)],
    ):
        with pytest.raises(SystemExit, match="error: "):
            evaluate("--limit", "2", "--overwrite", *flags)
    for error in (RuntimeError("CUDA out of memory"), KeyboardInterrupt()):
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "generate_batch", lambda *args, e=error: _raise(e))
            with pytest.raises(SystemExit, match="out of memory|interrupted"):
                evaluate("--limit", "2", "--overwrite")
    assert read_files(results / "fine-tuned") == before
    assert [path.name for path in results.iterdir()] == ["fine-tuned"]
    evaluate("--limit", "1", "--overwrite")
    assert len(read_lines(results / "fine-tuned")) < len(before["predictions.jsonl"].splitlines())
    assert not [name for name in read_files(results / "fine-tuned") if "new" in name]


def _raise(error):
    raise error


def test_two_adapters_with_the_same_name_do_not_share_results(evaluate, finished, tmp_path, capsys):
    other = tmp_path / "a" / "mine"
    shutil.copytree(finished.adapter, other)
    results = evaluate("--adapter", str(other), "--limit", "1")
    before = read_files(results / "adapter-mine")
    same_name = tmp_path / "b" / "mine"
    shutil.copytree(finished.adapter, same_name)
    path = same_name / "adapter_model.safetensors"
    save_file({name: x * 2 for name, x in load_file(path).items()}, path)
    for flags, words in [
        ([], "already contains predictions"),
        (["--resume"], "adapter was .*a/mine, not .*b/mine"),
        (["--rescore"], "adapter was .*a/mine, not .*b/mine"),
        (["--show-failures", "1"], "adapter was .*a/mine, not .*b/mine"),
    ]:
        with pytest.raises(SystemExit, match=words):
            evaluate("--adapter", str(same_name), "--limit", "1", *flags)
    # The adapter is retrained in place: other weights under the same name.
    path.unlink()
    shutil.copy(finished.adapter / path.name, other)
    save_file({name: x * 2 for name, x in load_file(other / path.name).items()}, other / path.name)
    with pytest.raises(SystemExit, match="the adapter has changed since"):
        evaluate("--adapter", str(other), "--limit", "1", "--resume")
    assert read_files(results / "adapter-mine") == before
    compare = ["--compare-with", str(results / "adapter-mine")]
    evaluate("--limit", "1", *compare, "--name", "mine")
    difference = read_metrics(results / "mine")["difference"]
    assert difference["f1"]["value"] == 0  # both adapters have the same weights


def test_other_weights_in_the_folder_of_the_model_are_noticed(evaluate, tiny_model, tmp_path):
    """A merged model is replaced by the next one under the same name."""
    model = tmp_path / "merged"
    shutil.copytree(tiny_model, model)
    flags = ["--model", str(model), "--baseline", "--limit", "1"]
    evaluate(*flags)
    weights = load_file(model / "model.safetensors")
    save_file({name: x * 2 for name, x in weights.items()}, model / "model.safetensors")
    for mode in ("--resume", "--rescore"):
        with pytest.raises(SystemExit, match="the model has changed since"):
            evaluate(*flags, mode)


KILLED = """
import os, signal
import evaluation

generate_batch = evaluation.generate_batch
batches = []

def kill(*args):
    batches.append(args)
    if len(batches) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return generate_batch(*args)

evaluation.generate_batch = kill
evaluation.main()
"""


@pytest.mark.slow
def test_a_killed_and_resumed_evaluation_equals_an_uninterrupted_one(
    evaluate, splits, tiny_model, finished, tmp_path
):
    """No answer is lost, cut or repeated, and resuming with other arguments is refused."""
    whole = evaluate("--batch-size", "2", output=tmp_path / "whole") / "fine-tuned"
    cut = tmp_path / "cut" / tiny_model.name / "fine-tuned"
    flags = [*common_flags(tiny_model, splits, tmp_path / "cut"), "--batch-size", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = [sys.executable, "-c", KILLED, *flags]
    process = subprocess.run(killed, cwd=finished.adapter.parent, env=environment)
    path = cut / "predictions.jsonl"
    assert process.returncode == -9 and path.read_bytes().count(b"\n") == 4
    assert not (cut / "metrics.json").exists()
    with open(path, "a") as file:
        file.write('{"conversation_id": "cut')
    evaluate("--show-failures", "1", output=tmp_path / "cut")  # reports the answers so far
    assert read_metrics(cut)["queries"] == 4
    with pytest.raises(SystemExit, match="already contains predictions. Use --resume"):
        evaluate(output=tmp_path / "cut")
    with pytest.raises(SystemExit, match="--max-new-tokens was 40, not 9"):
        evaluate("--resume", "--max-new-tokens", "9", output=tmp_path / "cut")
    evaluate("--resume", "--batch-size", "2", output=tmp_path / "cut")
    lines = path.read_text().splitlines()
    assert len(lines) == 14 and read_lines(cut) == read_lines(whole)  # every answer exactly once
    assert read_metrics(cut) == read_metrics(whole)
    evaluate("--resume", output=tmp_path / "cut")  # no queries are left
    assert path.read_text().splitlines() == lines


# ---- User mistakes


def test_user_mistakes_print_one_line(tiny_model, splits, finished, tmp_path):
    test_file = ["--test-file", splits / "function_calling_test.jsonl"]
    good = {"id": "0", "tools": "[]", "messages": [{"role": "user", "content": "Hi"}]}
    (tmp_path / "bad.jsonl").write_text(f'{json.dumps(good)}\n{{"id": 1}}\n')
    (tmp_path / "rows.json").write_text(json.dumps([good], indent=1))
    (tmp_path / "rows.jsonl").write_text('{"conversations": [], "tools": []}\n')
    train_file = splits / "function_calling_train.jsonl"
    for merged in ("merged", "continued"):
        (tmp_path / merged).mkdir()
        (tmp_path / merged / "training_run.json").write_text("{}")
    (tmp_path / "LoRA_continued-function_calling").mkdir()
    (tmp_path / "no model").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished-checkpoints").mkdir()
    (tmp_path / "unfinished-checkpoints/run.json").write_text("{}")
    not_a_split = "does not have the format of a split"
    for model, flags, words in [
        (tiny_model, [], ["not found", f"function_calling_train.py --model {tiny_model}"]),
        (tiny_model, ["--test-file", train_file], ["is the train split", "--test-file"]),
        ("merged", [], ["--model merged is a merged model", "--baseline"]),
        # A merged model that was trained further: its adapter is looked for as usual.
        ("continued", [], ["LoRA_continued-function_calling is not a finished adapter"]),
        (tiny_model, ["--test-file", "x"], ["x not found", "prepare_function_calling_dataset.py"]),
        (tiny_model, ["--test-file", "bad.jsonl"], ["bad.jsonl, line 2", not_a_split, "'tools'"]),
        (tiny_model, ["--test-file", "rows.jsonl"], ["rows.jsonl, line 1", not_a_split]),
        (tiny_model, ["--test-file", "rows.json"], ["rows.json, line 1 is not valid JSON"]),
        ("google/other", ["--adapter", finished.adapter], ["trained on", f"--model {tiny_model}"]),
        (tmp_path / "no model", ["--baseline"], ["no model", "tokenizer.json"]),
        ("google/not-in-the-cache", ["--baseline"], ["google/not-in-the-cache", "HF_HUB_OFFLINE"]),
        (tiny_model, ["--adapter", tmp_path / "no model"], ["training_run.json"]),
        (tiny_model, ["--adapter", "unfinished"], ["is not finished", "command with --resume"]),
        (finished.adapter, ["--baseline"], ["is an adapter"]),
        (finished.adapter, [], ["is an adapter"]),
        (tiny_model, ["--predictions", "q.jsonl"], ["q.jsonl: No such file"]),
        (tiny_model, ["--rescore"], ["fine-tuned contains no evaluation"]),
        (tiny_model, ["--compare-with", "nowhere"], ["nowhere contains no evaluation"]),
    ]:
        process = run_here(SCRIPT, "--model", model, *test_file, *flags, cwd=tmp_path)
        assert_fails_in_one_line(process, *words)
        assert "Error" not in process.stderr and "Errno" not in process.stderr
    assert not (tmp_path / "evaluation_results").exists()


SCORED = "evaluation_results/gemma-3-1b-it/fine-tuned/predictions.jsonl"
ADAPTER_RUN = "LoRA_gemma-3-1b-it-function_calling/training_run.json"
NEXT_COMMANDS = [  # files that exist, flags, the proposed command
    ([], ["--baseline"], "function_calling_train.py"),
    ([ADAPTER_RUN], ["--baseline"], "evaluation.py"),
    ([ADAPTER_RUN, SCORED], ["--baseline"], "evaluation.py --rescore"),
    ([ADAPTER_RUN], [], "evaluation.py --show-failures 10"),
    (
        ["merged/training_run.json"],
        ["--baseline", "--model", "merged"],
        "evaluation.py --baseline --model merged --show-failures 10",
    ),
]


@pytest.mark.parametrize("files, flags, command", NEXT_COMMANDS)
def test_the_next_command_fits_the_kind_of_model(files, flags, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("{}")
    args = evaluation.parse_args(flags)
    assert evaluation.next_command(args, flags) == f"python {command}"


SERVER = ["--server", "http://127.0.0.1:9/v1", "--server-model", "m"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--server", "http://127.0.0.1:9"], "--server-model"),
        (["--server", "127.0.0.1:8000/v1", "--server-model", "m"], "must start with http://"),
        (["--server", "http://me:pw@h/v1", "--server-model", "m"], "must not contain a password"),
        ([*SERVER, "--adapter", "x"], "--adapter has no effect with --server"),
        ([*SERVER, "--predictions", "x"], "--predictions has no effect with --server"),
        ([*SERVER, "--batch-size", "4"], "--batch-size has no effect with --server"),
        ([*SERVER, "--dtype", "float32"], "--dtype has no effect with --server"),
        (["--concurrency", "4"], "--concurrency has no effect without --server"),
        (["--predictions", "x", "--batch-size", "4"], "--batch-size has no effect"),
        (["--rescore", "--batch-size", "4"], "--batch-size has no effect with --rescore"),
        (["--baseline", "--adapter", "x"], "--adapter: not allowed with argument --baseline"),
        (["--model", ".", "--revision", "x"], "--revision has no effect"),
        (["--resume", "--overwrite"], "not allowed with"),
        (["--limit", "0"], "--limit: must be a whole number greater than 0"),
        (["--name", "a/b"], "--name"),
        (["--name", "baseline"], "reserved"),
    ],
)
def test_invalid_flags_and_flags_without_effect_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit) as end:
        evaluation.parse_args(flags)
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_an_adapter_trained_on_a_different_train_split_causes_a_warning(
    finished, splits, tmp_path, capsys
):
    """The training data of the adapter may contain conversations of this test split."""
    data = tmp_path / "processed_data"
    data.mkdir()
    for path in splits.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    trained_on = json.loads((finished.adapter / "training_run.json").read_text())["model"]
    test_file = str(data / "function_calling_test.jsonl")
    args = evaluation.parse_args(
        ["--model", trained_on, "--adapter", str(finished.adapter), "--test-file", test_file]
    )
    evaluation.find_adapter(args)
    assert capsys.readouterr().err == ""
    with open(data / "function_calling_train.jsonl", "a") as file:
        file.write("\n")
    evaluation.find_adapter(args)
    assert "its training data may include test conversations" in capsys.readouterr().err


def test_a_report_on_an_incomplete_run_says_that_queries_are_missing(tiny_model, splits, tmp_path):
    test_file = ["--test-file", splits / "function_calling_test.jsonl", "--max-new-tokens", "2"]
    command = ["--model", tiny_model, *test_file, "--baseline"]
    process = run_here(SCRIPT, *command, "--limit", "1", cwd=tmp_path)
    assert process.returncode == 0 and "Next " in process.stdout
    process = run_here(SCRIPT, *command, "--show-failures", "1", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert re.search(r"Unfinished  \d+ queries have no output yet. Use --resume", process.stdout)
