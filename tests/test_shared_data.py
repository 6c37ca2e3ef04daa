"""Real conversations and the real Gemma 3 tokenizer, where they lie beside the project; skipped by name where not."""

import json

import pytest
from conftest import SHARED

import evaluation
import function_calling_train as train
import prepare_function_calling_dataset as prepare

ROWS = SHARED / "data" / "glaive_function_calling_300.json"
TOKENIZER = SHARED / "gemma3-tokenizer"
needs_rows = pytest.mark.skipif(not ROWS.is_file(), reason=f"real conversations: {ROWS} is not there")
needs_tokenizer = pytest.mark.skipif(not TOKENIZER.is_dir(), reason=f"real tokenizer: {TOKENIZER} is not there")


@pytest.fixture(scope="module")
def real_splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    prepare.main(["--dataset", str(ROWS), "--output-dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def real_tokenizers():
    from transformers import AutoTokenizer

    stock = AutoTokenizer.from_pretrained(TOKENIZER)
    tagged, pieces = train.claim_unused_slots(stock)
    tagged.chat_template = train.CHAT_TEMPLATE
    return stock, tagged, pieces


@needs_rows
def test_every_real_row_is_used_and_every_turn_counted(real_splits):
    info = json.loads((real_splits / "dataset_info.json").read_text())
    assert (info["rows_loaded"], info["rows_kept"], info["dropped"], info["noticed"]) == (300, 300, {}, {})
    assert (info["train"]["conversations"], info["test"]["conversations"]) == (240, 60)
    # The data's own notice: 957 model turns, 211 of them tool calls.
    calls = info["train"]["tool_call_turns"] + info["test"]["tool_call_turns"]
    helpful = info["train"]["helpful_turns"] + info["test"]["helpful_turns"]
    assert (calls, calls + helpful) == (211, 957)
    declared = [json.loads(line)["tools"] for name in prepare.SPLIT_FILES.values()
                for line in (real_splits / name).read_text().splitlines()]
    assert sum(tools != "[]" for tools in declared) == 191


@needs_tokenizer
def test_the_tags_take_over_slots_6_to_13_of_the_real_tokenizer(real_tokenizers):
    stock, tagged, pieces = real_tokenizers
    assert len(tagged) == len(stock) == 262_145
    assert list(pieces) == list(range(6, 14)) and pieces[10] == [236820, 13205, 236779, 6639, 236813]
    assert tagged.encode("<tool_call>\n", add_special_tokens=False) == [10, 107]
    assert tagged.encode("x<unused8>", add_special_tokens=False)[-1] == 14  # the other slots are untouched


@needs_rows
@needs_tokenizer
def test_labels_of_real_conversations_are_what_the_model_says(real_splits, real_tokenizers):
    tagged = real_tokenizers[1]
    for messages in train.read_conversations(real_splits / prepare.TEST_FILE):
        input_ids, labels = train.encode_conversation(messages, tagged)
        said = "".join(message["content"].strip() + "<end_of_turn>" for message in messages if message["role"] == "assistant")
        assert tagged.decode([label for label in labels if label != -100]) == said
        assert input_ids.count(2) == 1 and input_ids.count(105) == len(messages) == input_ids.count(106)


@needs_rows
@needs_tokenizer
def test_the_prompt_of_a_query_is_what_was_trained_before_its_turn(real_splits, real_tokenizers):
    tagged = real_tokenizers[1]
    for query in evaluation.read_queries(real_splits / prepare.TEST_FILE, limit=10):
        prompt = evaluation.encode_prompt(query["prompt"], tagged, is_base=False)
        messages = [*query["prompt"], {"role": "assistant", "content": query["reference"]}]
        trained, labels = train.encode_conversation(messages, tagged)
        assert trained[:len(prompt)] == prompt
        assert labels[len(prompt)] == trained[len(prompt)]  # the answer, and so the loss, begins right there


@needs_rows
def test_every_real_reference_agrees_with_itself_and_every_count_adds_up(real_splits):
    from test_judgement import check_sums

    queries = [query for name in (prepare.TRAIN_FILE, prepare.TEST_FILE) for query in evaluation.read_queries(real_splits / name)]
    assert sum(query["kind"] == "function_calling" for query in queries) == 211
    assert all(evaluation.parse_calls(query["reference"]) for query in queries if query["kind"] == "function_calling")
    predictions = [{**query, "output": query["reference"], "score": 1.0, "finish_reason": "end_of_turn"} for query in queries]
    tools_of = {query["conversation_id"]: query["tools"] for query in queries}
    _, report, _ = evaluation.judge_predictions(predictions, tools_of, evaluation.read_seen_tools(real_splits / prepare.TEST_FILE))
    for part in (report, report["seen_tools"], report["unseen_tools"], report["no_tools"]):
        check_sums(part)
    assert report["faulty_references"] == 0 and not any(report["failures"].values())
    for metric in ("name_right", "arguments_right", "turn_right", "precision", "recall", "f1"):
        assert report["scores"][metric]["value"] == 1.0
    assert report["decisions"] == {"call_needed": {"call": 211, "no_call": 0, "malformed": 0},
                                   "no_call_needed": {"call": 0, "no_call": 746, "malformed": 0}}
