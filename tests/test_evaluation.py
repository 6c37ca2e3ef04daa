"""Step 3: the scores, what becomes of a query, and what an evaluation writes, resumes and refuses."""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_fails_in_one_line, make_model, make_row, run_script, write_rows
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import evaluation
import function_calling_train as train
import prepare_function_calling_dataset as prepare

SCRIPT = "evaluation.py"


@pytest.fixture(scope="module")
def tuned(tiny_model, splits, tmp_path_factory):
    """A folder with an adapter that has learnt the made-up data, as step 2 leaves it."""
    folder = tmp_path_factory.mktemp("tuned")
    process = run_script(
        "function_calling_train.py", "--model", tiny_model, "--train-file", splits / "function_calling_train.jsonl",
        "--learning-rate", "0.005", "--epochs", "16", "--lora-dropout", "0", cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder


def evaluate(folder, tiny_model, splits, *arguments):
    """Run the evaluation in this process, in `folder`; returns the folder of its results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        evaluation.main(["--model", str(tiny_model), "--test-file", str(splits / "function_calling_test.jsonl"),
                         "--max-new-tokens", "60", *arguments])
    return folder


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ----------------------------------------------------------------------------------------------------------------------
# Scores


@pytest.mark.parametrize(
    "a, b, length",
    [
        ("abcde", "abcde", 5),
        ("abcde", "xxabcdexx", 5),
        ("abcdef", "abcxdef", 3),
        ("abcdef", "defabc", 3),
        ("aab", "aaab", 3),
        ("abc", "xyz", 0),
        ("abc", "", 0),
        ("", "abc", 0),
        ("", "", 0),
        (["<tool_call>", 1, None], [1, None], 2),
    ],
)
def test_longest_common_sequence_worked_out_by_hand(a, b, length):
    assert evaluation.find_longest_common_sequence_length(list(a), list(b)) == length


tokens = st.lists(st.integers(0, 3), max_size=12)


@given(tokens, tokens)
def test_longest_common_sequence_is_the_longest_slice_both_hold(a, b):
    slices = {tuple(b[i:j]) for i in range(len(b) + 1) for j in range(i, len(b) + 1)}
    longest = max(j - i for i in range(len(a) + 1) for j in range(i, len(a) + 1) if tuple(a[i:j]) in slices)
    assert evaluation.find_longest_common_sequence_length(a, b) == longest
    assert evaluation.find_longest_common_sequence_length(b, a) == longest


def test_longest_common_sequence_of_4096_tokens_takes_no_time_even_where_all_are_equal():
    same, other = [7] * 4096, list(range(4096))
    start = time.perf_counter()
    assert evaluation.find_longest_common_sequence_length(same, same) == 4096
    assert evaluation.find_longest_common_sequence_length(other, other[2000:] + other[:2000]) == 2096
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    "reference, output, share",
    [
        ("the cat sat", "the cat sat", 1.0),
        ("the cat sat", "sat the cat", 1.0),  # order does not count
        ("the cat sat", "the dog sat down", 2 / 4),
        ("the cat sat", "the the the", 1 / 3),  # a word counts as often as the reference holds it
        ("the cat sat", "the", 1.0),
        ("the cat sat", "", 0.0),
        ("", "the", 0.0),
    ],
)
def test_unigram_matches_worked_out_by_hand(reference, output, share):
    assert evaluation.compute_matching_percentage(reference.split(), output.split()) == pytest.approx(share)


def test_the_score_of_a_call_forgives_and_punishes_what_the_reference_says_it_does():
    reference = ["{", "name", "f", "a", "1", "}"]
    assert evaluation.score_output("function_calling", reference, reference + ["junk"]) == 1.0
    assert evaluation.score_output("function_calling", reference, ["{", "name", "g", "a", "1", "}"]) == 3 / 6
    assert evaluation.score_output("function_calling", reference, []) == 0.0
    assert evaluation.score_output("helpful_exchange", reference, []) == 0.0
    assert evaluation.score_output("function_calling", [], ["x"]) == 0.0


def test_every_prefix_of_a_tool_call_is_scored_and_a_longer_one_never_lower():
    call = list('<tool_call>\n{"name": "f", "arguments": {"a": "b"}}\n</tool_call>')
    scores = [evaluation.score_output("function_calling", call, call[:end]) for end in range(len(call) + 1)]
    assert scores == [end / len(call) for end in range(len(call) + 1)]


# ----------------------------------------------------------------------------------------------------------------------
# Queries and generation


def test_every_model_turn_is_a_query_with_the_turns_before_it_as_prompt(tmp_path):
    rows = [make_row(0), make_row(3)]
    messages = [prepare.convert_row(row)[0]["messages"] for row in rows]
    path = tmp_path / "test.jsonl"
    path.write_text("\n".join(json.dumps({"id": str(n), "messages": m}) for n, m in enumerate(messages)) + "\n\n")
    queries = evaluation.read_queries(path)
    assert [(q["conversation_id"], q["turn"], q["kind"]) for q in queries] == [
        ("0", 1, "function_calling"), ("0", 3, "helpful_exchange"), ("1", 1, "helpful_exchange")]
    assert [q["prompt"] for q in queries] == [messages[0][:1], messages[0][:3], messages[1][:1]]
    assert queries[1]["reference"] == "It is 0 degrees in Paris."
    assert len(evaluation.read_queries(path, limit=1)) == 2


def test_the_base_models_own_template_gets_tool_results_in_user_turns_and_no_forged_turn(tiny_model):
    stock = AutoTokenizer.from_pretrained(tiny_model)
    messages = [{"role": "user", "content": "Go <end_of_turn>"}, {"role": "assistant", "content": "<tool_call>"},
                {"role": "tool", "content": "result"}]
    text = stock.decode(evaluation.encode_prompt(messages, stock, is_base=True))
    assert text == ("<bos><start_of_turn>user\nGo <end_of_turn ><end_of_turn>\n<start_of_turn>model\n<tool_call><end_of_turn>\n"
                    "<start_of_turn>user\nresult<end_of_turn>\n<start_of_turn>model\n")
    assert evaluation.encode_prompt(messages, stock, is_base=True).count(2) == 1  # one <bos>


def test_base_and_tuned_are_asked_in_the_same_words(tiny_model):
    """Gemma's own turns and the trained template render a prepared conversation alike."""
    stock = AutoTokenizer.from_pretrained(tiny_model)
    tagged, _ = train.claim_unused_slots(stock)
    tagged.chat_template = train.CHAT_TEMPLATE
    messages = prepare.convert_row(make_row(0))[0]["messages"][:3]
    base, tuned = (tok.decode(evaluation.encode_prompt(messages, tok, tok is stock)) for tok in (stock, tagged))
    stock.chat_template = evaluation.GEMMA_TURNS
    assert base == tuned == stock.decode(evaluation.encode_prompt(messages, stock, True))


def test_a_batch_generates_what_each_prompt_does_alone(tiny_model):
    model = evaluation.load_model(tiny_model, None, "cpu", torch.float32)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(110, 700, (length,), generator=generator).tolist() for length in (3, 90, 17, 41, 66)]
    together = evaluation.generate_batch(model, prompts, [1, 106], 0, 20)
    assert together == [evaluation.generate_batch(model, [prompt], [1, 106], 0, 20)[0] for prompt in prompts]
    assert all(len(output) == 20 and not ended for output, ended in together)
    # With one of the tokens it says as a stop token, an output ends before it, and is known to have ended.
    output, _ = together[0]
    stop = output[5]
    assert evaluation.generate_batch(model, prompts[:1], [stop], 0, 20) == [(output[:output.index(stop)], True)]


def generate_in_plain_way(model, prompt, stop_ids, max_new_tokens):
    """What the library generates for one prompt without any of evaluation.py's own code."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop_ids, pad_token_id=0)
    with torch.inference_mode():
        return model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long))[0, len(prompt):].tolist()


def test_turns_read_together_are_answered_as_each_is_alone(tiny_model):
    """Prompts of conversations longer than the sliding window, which begin alike, and one that begins like another and goes on otherwise."""
    model = evaluation.load_model(tiny_model, None, "cpu", torch.float32)
    window = model.config.sliding_window
    assert window < 90
    generator = torch.Generator().manual_seed(2)
    first, second = (torch.randint(110, 700, (200,), generator=generator).tolist() for _ in range(2))
    prompts = [first[:40], first[:90] + [7], first[:199], first[:120] + second[:30], second[:140], second[:25], second[:3], first[:199]]
    alone = [generate_in_plain_way(model, prompt, [106], 40) for prompt in prompts]
    # Stop tokens that the outputs hold at different places, so that rows leave the batch while others go on.
    stop_ids = [alone[0][3], alone[1][20], alone[4][35]]
    expected = []
    for prompt in prompts:
        tokens = generate_in_plain_way(model, prompt, stop_ids, 40)
        ended = tokens[-1] in stop_ids
        expected.append((tokens[:-1] if ended else tokens, ended))
    assert len({len(tokens) // evaluation.STEPS_AT_ONCE for tokens, _ in expected}) > 1
    assert evaluation.generate_batch(model, prompts, stop_ids, 0, 40) == expected


def test_what_is_read_together_is_what_the_library_reads_of_each_prompt(tiny_model):
    """Texts of 149, 139 and 129 tokens go together, padded, past the sliding window of 64; the short prompt begins one of them."""
    from transformers import DynamicCache

    model = evaluation.load_model(tiny_model, None, "cpu", torch.float32)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(110, 700, (length,), generator=generator).tolist() for length in (140, 150, 130)]
    prompts.append(prompts[0][:100])
    with torch.inference_mode():
        together = evaluation.read_prompts(model, prompts, 0)
        for row, prompt in enumerate(prompts):
            alone = DynamicCache(config=model.config)
            model(torch.tensor([prompt[:-1]]), past_key_values=alone)
            for ours, theirs in zip(together.layers, alone.layers, strict=True):
                for kind in ("keys", "values"):
                    read = getattr(theirs, kind)[0]
                    torch.testing.assert_close(getattr(ours, kind)[row, :, -read.shape[1]:], read, atol=1e-4, rtol=1e-4)


def test_each_text_is_read_once():
    assert evaluation.share_beginnings([[1, 2, 9], [1, 2, 3, 4, 9], [1, 5, 9], [1, 9]]) == ([[1, 2, 3, 4], [1, 5]], [0, 0, 1, 0])


def test_the_adapter_is_merged_without_changing_what_the_model_says(tiny_model, tuned):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = tuned / f"LoRA_{tiny_model.name}-function_calling"
    merged = evaluation.load_model(tiny_model, adapter, "cpu", torch.float32)
    unmerged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), adapter).eval()
    input_ids = torch.randint(110, 700, (1, 50))
    with torch.no_grad():
        assert (merged(input_ids).logits - unmerged(input_ids).logits).abs().max() < 1e-4
    assert not any("lora" in name for name, _ in merged.named_parameters())


# ----------------------------------------------------------------------------------------------------------------------
# A whole evaluation


def test_base_and_tuned_are_scored_and_compared(tiny_model, splits, tuned, capsys):
    evaluate(tuned, tiny_model, splits, "--baseline")
    evaluate(tuned, tiny_model, splits)
    results = tuned / "evaluation_results" / tiny_model.name
    assert {path.name for path in results.iterdir()} == {"base", "tuned", "comparison.png"}
    queries = evaluation.read_queries(splits / "function_calling_test.jsonl")
    stock = AutoTokenizer.from_pretrained(tiny_model)
    scores = {}
    for name in ("base", "tuned"):
        assert {path.name for path in (results / name).iterdir()} == {"predictions.jsonl", "metrics.json"}
        predictions = read_lines(results / name / "predictions.jsonl")
        metrics = json.loads((results / name / "metrics.json").read_text())
        assert [(p["conversation_id"], p["turn"]) for p in predictions] == [(q["conversation_id"], q["turn"]) for q in queries]
        for kind in ("function_calling", "helpful_exchange"):
            of_kind = [p for p in predictions if p["kind"] == kind]
            assert metrics["scores"][kind]["n"] == len(of_kind) > 0
            assert metrics["scores"][kind]["value"] == pytest.approx(sum(p["score"] for p in of_kind) / len(of_kind))
        for p in predictions:  # each score again, from the texts on disk, in the stock tokenizer's tokens
            reference, output = (stock.encode(p[key], add_special_tokens=False) for key in ("reference", "output"))
            assert p["score"] == evaluation.score_output(p["kind"], reference, output)
        assert metrics["run"]["test_split_sha256"] == hashlib.sha256((splits / "function_calling_test.jsonl").read_bytes()).hexdigest()
        assert metrics["queries"] == sum(metrics["finish_reasons"].values()) == len(queries)
        scores[name] = metrics["scores"]["function_calling"]["value"]
    assert scores["base"] < 0.2 and scores["tuned"] > 0.4  # the form of a call is learnt at once, its values are not
    base_ends, tuned_ends = (json.loads((results / name / "metrics.json").read_text())["finish_reasons"]["end_of_turn"]
                             for name in ("base", "tuned"))
    assert base_ends == 0 and tuned_ends >= 6  # it learnt to end its turn
    for name, flags in (("base", ["--baseline"]), ("tuned", [])):  # scored again, to the last digit
        before = (results / name / "metrics.json").read_bytes()
        evaluate(tuned, tiny_model, splits, *flags, "--rescore")
        assert (results / name / "metrics.json").read_bytes() == before
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("function calling") and "+" in line)
    assert line.split()[2] == "6" and f" {scores['base']:.3f} [" in line and f" {scores['tuned']:.3f} [" in line


def test_the_batch_size_changes_no_output(tiny_model, splits, tuned, tmp_path):
    evaluate(tuned, tiny_model, splits, "--batch-size", "1", "--output-dir", str(tmp_path / "one"))
    evaluate(tuned, tiny_model, splits, "--batch-size", "5", "--output-dir", str(tmp_path / "five"))
    one, five = (tmp_path / name / tiny_model.name / "tuned" / "predictions.jsonl" for name in ("one", "five"))
    assert one.read_bytes() == five.read_bytes()


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tiny_model, splits, tuned, tmp_path):
    evaluate(tuned, tiny_model, splits, "--batch-size", "4", "--output-dir", str(tmp_path / "whole"))
    cut = tmp_path / "cut" / tiny_model.name / "tuned"
    real, calls = evaluation.generate_batch, []

    def stop_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "generate_batch", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            evaluate(tuned, tiny_model, splits, "--batch-size", "4", "--output-dir", str(tmp_path / "cut"))
    assert {path.name for path in cut.iterdir()} == {"predictions.partial.jsonl"}
    with open(cut / "predictions.partial.jsonl", "a") as file:
        file.write('{"conversation_id": "torn')  # as if it had been killed while writing
    with pytest.raises(SystemExit, match="unfinished evaluation: --resume"):
        evaluate(tuned, tiny_model, splits, "--output-dir", str(tmp_path / "cut"))
    with pytest.raises(SystemExit, match="max_new_tokens was 60, is 9"):
        evaluate(tuned, tiny_model, splits, "--output-dir", str(tmp_path / "cut"), "--resume", "--max-new-tokens", "9")
    calls.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "generate_batch", lambda *arguments: calls.append(len(arguments[1])) or real(*arguments))
        evaluate(tuned, tiny_model, splits, "--batch-size", "4", "--output-dir", str(tmp_path / "cut"), "--resume")
    assert sum(calls) == 14 - 8  # of 14 queries, two batches of four were not asked again
    assert {path.name for path in cut.iterdir()} == {"predictions.jsonl", "metrics.json"}
    whole = tmp_path / "whole" / tiny_model.name / "tuned"
    assert (whole / "predictions.jsonl").read_bytes() == (cut / "predictions.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="holds a finished evaluation: --overwrite"):
        evaluate(tuned, tiny_model, splits, "--output-dir", str(tmp_path / "cut"))
    with pytest.raises(SystemExit, match="limit was None, is 3"):
        evaluate(tuned, tiny_model, splits, "--output-dir", str(tmp_path / "cut"), "--resume", "--limit", "3")
    calls.clear()
    evaluate(tuned, tiny_model, splits, "--output-dir", str(tmp_path / "cut"), "--resume")  # nothing is left to do, nor done
    assert not calls and (whole / "predictions.jsonl").read_bytes() == (cut / "predictions.jsonl").read_bytes()


@pytest.mark.parametrize("fit_later, stays", [(800, True), (700, False)])
def test_a_resumed_evaluation_keeps_its_batches_while_they_can_fit(tiny_model, splits, tuned, tmp_path, monkeypatch, fit_later, stays):
    """A batch takes half of the free memory: what was chosen at first still fits while that half has not halved."""
    real, batches = evaluation.generate_batch, []

    def answer(model, prompts, *arguments):
        if len(batches) == 1 and not resumed:
            raise KeyboardInterrupt
        batches.append(len(prompts))
        return real(model, prompts, *arguments)

    resumed = True
    monkeypatch.setattr(evaluation, "generate_batch", answer)
    monkeypatch.setattr(evaluation, "count_tokens_that_fit", lambda model: 1500)
    evaluate(tuned, tiny_model, splits, "--output-dir", str(tmp_path / "whole"))
    undisturbed = batches[:]
    batches.clear()
    resumed = False
    with pytest.raises(KeyboardInterrupt):
        evaluate(tuned, tiny_model, splits, "--output-dir", str(tmp_path / "cut"))
    resumed = True
    monkeypatch.setattr(evaluation, "count_tokens_that_fit", lambda model: fit_later)
    evaluate(tuned, tiny_model, splits, "--output-dir", str(tmp_path / "cut"), "--resume")
    assert len(undisturbed) > 2 and sum(batches) == sum(undisturbed) == 14
    assert (batches == undisturbed) == stays
    metrics = json.loads((tmp_path / "cut" / tiny_model.name / "tuned" / "metrics.json").read_text())
    assert metrics["run"]["tokens_at_once"] == (1500 if stays else 700)


@pytest.mark.parametrize("batch_size", ["1", "5"])
def test_whatever_is_answered_the_rest_stays_in_its_batches(tiny_model, splits, monkeypatch, batch_size):
    """Also where a conversation is divided, and where one process was ahead of another."""
    queries = evaluation.read_queries(splits / "function_calling_test.jsonl")
    model = evaluation.load_model(tiny_model, None, "cpu", torch.float32)
    tokenizer = evaluation.load_tokenizer(tiny_model)
    args = evaluation.parse_args(["--baseline", "--batch-size", batch_size])
    monkeypatch.setattr(evaluation, "generate_batch", lambda model, prompts, *arguments: [([], True)] * len(prompts))

    def batches(done):
        answered = evaluation.answer_queries(queries, done, model, tokenizer, tokenizer, args, 10_000)
        return [[(prediction["conversation_id"], prediction["turn"]) for prediction in batch] for batch in answered]

    undisturbed = batches(set())
    assert len(undisturbed) > 2 and sum(map(len, undisturbed)) == len(queries)
    for batch in undisturbed:
        assert batches(set(batch)) == [other for other in undisturbed if other != batch]
    for number in range(len(undisturbed)):
        assert batches({query for batch in undisturbed[:number] for query in batch}) == undisturbed[number:]


def test_batches_hold_the_tokens_that_fit_longest_conversations_first():
    conversations = [{0: 30, 1: 50}, {2: 10}, {3: 20, 4: 60, 5: 90}, {6: 300}]
    args = evaluation.parse_args(["--max-new-tokens", "10"])
    # 310 tokens with its output are more than 300, yet answered; then three of at most 100, and three of at most 60
    assert evaluation.plan_batches(conversations, args, 300) == [[6], [5, 4, 3], [1, 0, 2]]
    assert evaluation.plan_batches(conversations, args, 0) == [[6], [5], [4], [3], [1], [0], [2]]
    # Four of 100 would fit, but then a conversation's two turns would be apart.
    assert evaluation.plan_batches(conversations, args, 400) == [[6], [5, 4, 3], [1, 0, 2]]
    # A conversation larger than a batch is divided; what is left of it goes with the next where that fits.
    args = evaluation.parse_args(["--batch-size", "2"])
    assert evaluation.plan_batches(conversations, args, 300) == [[6], [5, 4], [3], [1, 0], [2]]
    assert evaluation.plan_batches([{0: 30, 1: 60, 2: 90}, {3: 10}], args, 300) == [[2, 1], [0, 3]]
    args = evaluation.parse_args(["--batch-size", "4"])
    assert evaluation.plan_batches(conversations, args, 300) == [[6, 5, 4, 3], [1, 0, 2]]


# The second is PyTorch's own words for an Apple GPU, shortened; it has no type of its own there.
@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("MPS backend out of memory (MPS allocated: 8.9 GiB)")])
def test_out_of_memory_a_batch_of_queries_is_halved(tiny_model, splits, tuned, tmp_path, monkeypatch, error):
    evaluate(tuned, tiny_model, splits, "--output-dir", str(tmp_path / "whole"))
    real, sizes = evaluation.generate_batch, []

    def generate_on_a_small_gpu(model, prompts, *arguments):
        sizes.append(len(prompts))
        if len(prompts) > 3:
            raise error
        return real(model, prompts, *arguments)

    monkeypatch.setattr(evaluation, "generate_batch", generate_on_a_small_gpu)
    evaluate(tuned, tiny_model, splits, "--output-dir", str(tmp_path / "small"), "--batch-size", "7")
    # Of 14 queries: after the six, seven are not tried whole, though four of them are, which are shorter.
    assert sizes == [6, 3, 3, 3, 4, 2, 2, 1]
    whole, small = (tmp_path / name / tiny_model.name / "tuned" / "predictions.jsonl" for name in ("whole", "small"))
    assert whole.read_bytes() == small.read_bytes()
    monkeypatch.setattr(evaluation, "generate_batch", lambda *arguments: (_ for _ in ()).throw(error))
    with pytest.raises(SystemExit, match="out of memory, with the model alone or a single query"):
        evaluate(tuned, tiny_model, splits, "--output-dir", str(tmp_path / "none"))
    monkeypatch.setattr(evaluation, "generate_batch", lambda *arguments: (_ for _ in ()).throw(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes"):  # other errors are not taken for it
        evaluate(tuned, tiny_model, splits, "--output-dir", str(tmp_path / "other"))


@pytest.mark.slow
def test_two_processes_answer_as_one_also_after_a_kill(tiny_model, splits, tuned, tmp_path):
    arguments = ["--model", tiny_model, "--test-file", splits / "function_calling_test.jsonl", "--max-new-tokens", "60", "--batch-size", "2",
                 "--adapter", tuned / f"LoRA_{tiny_model.name}-function_calling"]
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / SCRIPT, *arguments,
                "--output-dir", tmp_path / "two"]
    one = run_script(SCRIPT, *arguments, "--output-dir", tmp_path / "one", cwd=tuned)
    assert one.returncode == 0, one.stderr
    two = subprocess.run(list(map(str, together)), cwd=tuned, capture_output=True, text=True, timeout=300)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("Answered ") == 1  # one process speaks
    whole, shared = (tmp_path / name / tiny_model.name / "tuned" for name in ("one", "two"))
    assert (whole / "predictions.jsonl").read_bytes() == (shared / "predictions.jsonl").read_bytes()
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (whole, shared)]
    assert metrics[0]["scores"] == metrics[1]["scores"] and [m["run"]["processes"] for m in metrics] == [1, 2]
    assert {path.name for path in shared.iterdir()} == {"predictions.jsonl", "metrics.json"}

    # What two processes had answered when they were killed: the first five queries of one, the next four of the other.
    identity = {key: metrics[0]["run"][key] for key in (
        "model", "commit", "weights_sha256", "adapter_sha256", "test_split_sha256", "chat_template_sha256", "dtype", "limit",
        "max_new_tokens")}
    lines = (shared / "predictions.jsonl").read_text().splitlines()
    for name, answered in (("predictions.partial.jsonl", lines[:5]), ("predictions.partial.1.jsonl", lines[4:9])):
        (shared / name).write_text("\n".join([json.dumps(identity), *answered, '{"torn']))
    resumed = run_script(SCRIPT, *arguments, "--output-dir", tmp_path / "two", "--resume", cwd=tuned)
    assert resumed.returncode == 0 and "14, 9 of them already answered" in resumed.stdout, resumed.stderr
    assert (whole / "predictions.jsonl").read_bytes() == (shared / "predictions.jsonl").read_bytes()
    assert {path.name for path in shared.iterdir()} == {"predictions.jsonl", "metrics.json"}


def test_a_prompt_too_long_for_the_model_is_a_counted_failure(tmp_path, splits):
    short = make_model(tmp_path / "short-gemma", max_position_embeddings=220)
    evaluate(tmp_path, short, splits, "--baseline")
    results = tmp_path / "evaluation_results" / "short-gemma" / "base"
    predictions = read_lines(results / "predictions.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(short)
    lengths = {(query["conversation_id"], query["turn"]): len(evaluation.encode_prompt(query["prompt"], tokenizer, True))
               for query in evaluation.read_queries(splits / "function_calling_test.jsonl")}
    too_long = [p for p in predictions if lengths[p["conversation_id"], p["turn"]] > 220 - 60]
    assert 0 < len(too_long) < len(predictions)
    assert all(p["finish_reason"] == "prompt_too_long" and p["output"] == "" and p["score"] == 0 for p in too_long)
    metrics = json.loads((results / "metrics.json").read_text())
    assert metrics["finish_reasons"]["prompt_too_long"] == len(too_long) and metrics["queries"] == len(predictions)


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


def test_mistakes_end_in_one_line(tiny_model, splits, tuned, tmp_path):
    test_file = splits / "function_calling_test.jsonl"
    missing = run_script(SCRIPT, "--model", tiny_model, "--test-file", test_file, cwd=tmp_path)
    assert_fails_in_one_line(missing, f"LoRA_{tiny_model.name}-function_calling", "function_calling_train.py first", "--baseline")
    assert_fails_in_one_line(run_script(SCRIPT, "--model", tiny_model, "--baseline", cwd=tmp_path),
                             "prepare_function_calling_dataset.py first")
    adapter = tuned / f"LoRA_{tiny_model.name}-function_calling"
    other = run_script(SCRIPT, "--model", "google/gemma-3-270m-it", "--adapter", adapter, "--test-file", test_file, cwd=tmp_path)
    assert_fails_in_one_line(other, "was trained on", f"give --model {tiny_model}")
    assert run_script(SCRIPT, "--baseline", "--adapter", adapter, cwd=tmp_path).returncode == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "chat_template.jinja"])
def test_an_adapter_that_is_not_whole_or_not_as_trained_is_refused(tiny_model, tuned, tmp_path, name):
    import shutil

    adapter = Path(shutil.copytree(tuned / f"LoRA_{tiny_model.name}-function_calling", tmp_path / "adapter"))
    assert evaluation.check_adapter(adapter, str(tiny_model))["model"] == str(tiny_model)
    if name == "chat_template.jinja":
        (adapter / name).write_text((adapter / name).read_text() + " ")
        message = "is not as training left it"
    else:  # a pickle is never read in its place
        (adapter / name).rename(adapter / "adapter_model.bin")
        message = "not found"
    with pytest.raises(SystemExit, match=message):
        evaluation.check_adapter(adapter, str(tiny_model))


@pytest.mark.parametrize("line", ["{", "[]", "null", '{"id": 1}', '{"id": "0", "messages": []}', '{"id": "1", "messages": [1]}'])
def test_a_bad_line_of_the_split_is_named(tmp_path, line):
    path = tmp_path / "test.jsonl"
    good = {"id": "0", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    path.write_text(json.dumps(good) + "\n" + line + "\n")
    with pytest.raises(SystemExit, match="line 2"):
        evaluation.read_queries(path)


def test_an_adapter_trained_from_the_hub_serves_on_a_local_copy_of_its_model(tiny_model, splits, tuned, tmp_path):
    import shutil

    adapter = tmp_path / "from-hub"
    shutil.copytree(tuned / f"LoRA_{tiny_model.name}-function_calling", adapter)
    run = json.loads((adapter / "training_run.json").read_text())
    (adapter / "training_run.json").write_text(json.dumps({**run, "commit": "0" * 40, "weights_sha256": None}))
    evaluate(tuned, tiny_model, splits, "--adapter", str(adapter), "--limit", "1", "--output-dir", str(tmp_path / "out"))
    assert (tmp_path / "out" / tiny_model.name / "from-hub" / "metrics.json").is_file()


def test_another_model_of_the_same_name_is_refused(tiny_model, splits, tuned, tmp_path):
    namesake = make_model(tmp_path / tiny_model.name, intermediate_size=96)
    with pytest.raises(SystemExit, match="trained on other weights"):
        evaluate(tuned, namesake, splits, "--output-dir", str(tmp_path / "out"))


def test_a_test_split_that_changed_since_it_was_prepared_is_refused(tiny_model, tmp_path, monkeypatch):
    source = write_rows(tmp_path / "rows.jsonl", [make_row(number) for number in range(20)])
    prepare.main(["--dataset", str(source), "--output-dir", str(tmp_path / "processed_data")])
    path = tmp_path / "processed_data" / prepare.TEST_FILE
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="is not the file that"):
        evaluation.main(["--model", str(tiny_model), "--baseline"])


def test_base_and_tuned_of_different_queries_are_compared_on_those_both_answered(tiny_model, splits, tuned, tmp_path, capsys):
    output = ["--output-dir", str(tmp_path)]
    evaluate(tuned, tiny_model, splits, "--baseline", *output)
    evaluate(tuned, tiny_model, splits, "--limit", "3", *output)
    metrics = json.loads((tmp_path / tiny_model.name / "tuned" / "metrics.json").read_text())
    assert metrics["queries"] < 14
    n = metrics["difference_to_base"]["function_calling"]["n"]
    assert n == metrics["scores"]["function_calling"]["n"] < 6 and f"6/{n}" in capsys.readouterr().out
    evaluate(tuned, tiny_model, splits, "--max-new-tokens", "5", "--overwrite", *output)
    assert "is left out" in capsys.readouterr().out  # outputs of another length are no comparison
    with pytest.raises(SystemExit, match="leaves no room for a prompt"):
        evaluate(tuned, tiny_model, splits, "--max-new-tokens", "100000", "--overwrite", *output)


def test_another_train_split_beside_the_test_split_is_told(tiny_model, splits, tuned, tmp_path):
    run = json.loads((tuned / f"LoRA_{tiny_model.name}-function_calling" / "training_run.json").read_text())
    assert evaluation.describe_other_split(splits / "function_calling_test.jsonl", run) is None
    source = write_rows(tmp_path / "rows.jsonl", [make_row(number) for number in range(20)])
    prepare.main(["--dataset", str(source), "--output-dir", str(tmp_path)])
    assert "another train split" in evaluation.describe_other_split(tmp_path / prepare.TEST_FILE, run)


@pytest.mark.parametrize("script", ["prepare_function_calling_dataset.py", "function_calling_train.py", "evaluation.py"])
def test_help_answers_at_once(script, tmp_path):
    start = time.perf_counter()
    process = run_script(script, "--help", cwd=tmp_path, timeout=10)
    assert process.returncode == 0 and "default: " in process.stdout
    assert time.perf_counter() - start < 2  # importing torch alone takes longer
