"""Tests of step 3: reading and judging calls, counts, confidence intervals and comparisons."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy
import pytest
from conftest import ROOT, SAMPLE_MODEL, make_row, make_tool, write_rows
from hypothesis import given
from hypothesis import strategies as st
from servers import Hub

import evaluation


def call(name="f", /, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def tagged(text):
    return f"<tool_call>{text}</tool_call>"


def predict(reference, output, finish_reason="end_of_turn", conversation_id="1", turn=1):
    kind = "function_calling" if "<tool_call>" in reference else "helpful_exchange"
    prediction = {"conversation_id": conversation_id, "turn": turn, "kind": kind, "score": 0.5}
    texts = {"reference": reference, "output": output, "finish_reason": finish_reason}
    return prediction | texts


def judge(reference, output, finish_reason="end_of_turn", tools=()):
    declared = evaluation.read_tools(json.dumps(list(tools)))
    return evaluation.judge_turn(predict(reference, output, finish_reason), declared)


def problems_of(schema, **arguments):
    """The problems of a call of f, whose parameters have this schema."""
    tools = [{"name": "f", "parameters": schema}]
    return judge("No.", call("f", **arguments), tools=tools)["problems"][0]


# ---- Reading calls


READABLE = [
    ("Hello!", []),
    (tagged('{"name": "f", "arguments": {"a": 1}}'), [("f", {"a": 1})]),
    (tagged("{'name': 'f', 'arguments': {'a': True, 'b': None}}"), [("f", {"a": True, "b": None})]),
    (tagged('{"name": "f", "arguments": "{\\"a\\": 1}"}'), [("f", {"a": 1})]),
    (tagged("{'name': 'f', 'arguments': {'a': (1, 2)}}"), [("f", {"a": [1, 2]})]),
    (f"<think>{call('g')}\n<tool_call></think>\n" + call("f"), [("f", {})]),
    (f"<think>I need {call('f')}</think>", []),
    (call("f", a="<think>b</think>"), [("f", {"a": "<think>b</think>"})]),
    ("Sure. " + call("f") + "\n" + call("g", x="it's"), [("f", {}), ("g", {"x": "it's"})]),
    (tagged('{"name": "f"}'), [("f", {})]),
    (tagged('{"name": "f", "arguments": null}'), [("f", {})]),
    (tagged('{"name": "f", "arguments": ""}'), [("f", {})]),
]


@pytest.mark.parametrize("text, calls", READABLE)
def test_calls_are_read_as_json_or_python_literals(text, calls):
    found = [(call["name"], call["arguments"]) for call in evaluation.parse_calls(text)]
    assert found == calls


FAULTY_TAGS = ["<tool_call>", call("f") + "</tool_call>", tagged(call("f"))]
FAULTY_CALLS = ["", "f(a=1)", "[1]", '{"arguments": {}}', '{"name": 3}']
# The arguments may be under another key.
FAULTY_CALLS += [
    '{"name": "f", "parameters": {"city": "Oslo"}}',
    '{"name": "f", "arguments": {}, "args": {"city": "Oslo"}}',
]
FAULTY_CALLS += [f'{{"name": "f", "arguments": {given}}}' for given in ("[1]", '"Paris"', "{1, 2}")]


@pytest.mark.parametrize("text", FAULTY_TAGS + [tagged(faulty) for faulty in FAULTY_CALLS])
def test_any_other_call_is_malformed(text):
    for output in (text, call("f") + text):
        assert evaluation.parse_calls(output) is None
        assert judge(call("f"), output)["failure"] == "malformed"
    assert judge(text, text)["is_faulty"] and judge(text, text)["failure"] is None


@pytest.mark.parametrize("depth", [50, *range(970, 1000), 100_000])
def test_arguments_nested_to_any_depth_are_judged(depth):
    """A RecursionError would end an evaluation of thousands of queries."""
    for value in ("[" * depth + "]" * depth, '{"a": ' * depth + "1" + "}" * depth):
        text = tagged(f'{{"name": "f", "arguments": {{"a": {value}}}}}')
        verdict = judge(text, text, tools=[make_tool("f", "a")])
        assert verdict["is_faulty"] or verdict["counts"]["turn_right"] == (True, 1)
        verdict = judge(call("f"), text, tools=[make_tool("f", "a")])
        assert verdict["failure"] in ("wrong_arguments", "malformed")
        assert verdict["failure"] == "wrong_arguments" or depth > 50


PIECES = "<think>|<think></think>|<tool_call>|<tool_call></tool_call>|<tool_call>{|[|{'a':|<|-|1+"
PIECES += "|not |x.|f(|lambda:|9|\\"


@pytest.mark.parametrize("piece", PIECES.split("|"))
def test_a_megabyte_of_malformed_output_is_read_in_seconds(piece):
    text = piece * (1_000_000 // len(piece))
    for output in (text, tagged(text)):
        start = time.process_time()
        judge(call("f"), output)
        assert time.process_time() - start < 3  # takes about one second on an idle machine


@given(st.text() | st.text(alphabet="<tool_call>/{}[]'\":, \n\0\ud8001eE.-"))
def test_no_output_raises_an_exception(text):
    for output in (text, tagged(text), tagged(f'{{"name": "f", "arguments": {text}}}')):
        judge(call("f", a=1), output, tools=[make_tool("f", "a")])
        judge(output, output)


# ---- Comparing calls with references


AGAINST_ONE_CALL = [  # output; whether name, arguments and whole turn are right; failure
    (call("f", b="x", a=1.0), True, True, True, None),  # keys in any order; 1 equals 1.0
    ("Of course: " + call("f", a=1, b="x"), True, True, True, None),
    (call("f", a=True, b="x"), True, False, False, "wrong_arguments"),  # true is not 1
    (call("f", a="1", b="x"), True, False, False, "wrong_arguments"),
    (call("f", a=1, b="X"), True, False, False, "wrong_arguments"),  # strings must match exactly
    (call("f", a=1), True, False, False, "wrong_arguments"),
    (
        call("f", a=1, b="x", c=None),
        True,
        False,
        False,
        "wrong_arguments",
    ),  # optional arguments too
    (call("g", a=1, b="x"), False, True, False, "wrong_function"),
    (call("f", a=1, b="x") * 2, False, False, False, "wrong_count"),
    ("", False, False, False, "no_call"),
    ("<tool_call>f(1)</tool_call>", False, False, False, "malformed"),
]


@pytest.mark.parametrize("output, name, arguments, whole, failure", AGAINST_ONE_CALL)
def test_a_call_is_compared_with_its_reference(output, name, arguments, whole, failure):
    verdict = judge(call("f", a=1, b="x"), output)
    keys = ("name_right", "arguments_right", "turn_right")
    assert [verdict["counts"][key][0] for key in keys] == [name, arguments, whole]
    assert verdict["failure"] == failure


FINISHED = ["stop", "eos", "eos_token", "end", "end_turn", "function_call", "content_filter", None]
END = "end_of_turn"
CUT = "max_new_tokens"
FAILURES = [
    (call(a=2**53 + 1), call(a=2**53), END, "wrong_arguments"),  # these are equal as floats
    (call(a={"b": [1, {"c": [True]}]}), call(a={"b": [1.0, {"c": [True]}]}), END, None),
    (call(a=[1, 2]), call(a=[2, 1]), END, "wrong_arguments"),
    (call("f") + call("g", b=2), call("g", b=2) + call("f"), END, None),
    (call("f") + call("g"), call("f") * 2, END, "wrong_function"),
    (call("f", a=1) + call("g", b=2), call("f", b=2) + call("g", a=1), END, "wrong_arguments"),
    (call("f"), call("f")[:-5], CUT, "truncated"),
    (call("f"), call("f") + " and then", CUT, None),
    ("It is sunny.", "It is sunny, too.", END, None),
    ("It is sunny.", "It is sunny, and", CUT, "truncated"),
    ("It is sunny.", "<tool_call>oops", CUT, "truncated"),
    ("It is sunny.", "", "failed", "failed"),
    ("It is sunny.", "It is", "length", "truncated"),
    ("It is sunny.", "It is", "MAX_TOKENS", "truncated"),
    *[("It is sunny.", "It is.", reason, None) for reason in FINISHED],
    (call("f"), call("g"), "eos", "wrong_function"),
    ("It is sunny.", call("f"), END, "unneeded_call"),
]


@pytest.mark.parametrize("reference, output, finish_reason, failure", FAILURES)
def test_each_failure_is_assigned_to_one_class(reference, output, finish_reason, failure):
    verdict = judge(reference, output, finish_reason)
    assert verdict["failure"] == failure
    assert ("turn_right" in verdict["counts"]) == ("tool_call" in reference)


# ---- Declared tools


PROPERTIES = {"city": {"type": "string"}, "nights": {"type": "integer"}, "class": {"enum": ["a"]}}
PARAMETERS = {"type": "object", "required": ["city"], "properties": PROPERTIES}
BOOK = {"type": "function", "function": {"name": "book", "parameters": PARAMETERS}}
AGAINST_TOOLS = [
    (call("book", city="Oslo", nights=2), []),
    (call("fly", city="Oslo"), ["unknown function"]),
    (call("book", nights=2), ["required argument missing"]),
    (call("book", city="Oslo", **{"class": "c"}), ["wrong type or value"]),
    (call("book", pets=1, city=2), ["argument not declared", "wrong type or value"]),
]


@pytest.mark.parametrize("output, problems", AGAINST_TOOLS)
def test_a_call_is_checked_against_the_declared_tools(output, problems):
    assert judge("No.", output, tools=[BOOK])["problems"] == [problems]


def test_a_function_with_null_or_absent_parameters_takes_no_arguments():
    for tool in ({"name": "f"}, {"name": "f", "parameters": None}, {"name": "f", "parameters": {}}):
        assert judge("No.", call("f"), tools=[tool])["problems"] == [[]]
        assert judge("No.", call("f", a=1), tools=[tool])["problems"] == [["argument not declared"]]


DIALECTS = [  # declared schema, right value, wrong value
    ({"type": "dict"}, {"undeclared": 2}, [1]),
    ({"type": "float"}, 1.5, "1.5"),
    ({"type": "STRING"}, "x", 1),
    ({"type": "OBJECT"}, {}, "x"),
    ({"type": "tuple", "items": {"type": "str"}}, ["x"], [1]),
    ({"type": "any", "enum": [1, "x"]}, "x", 2),
    ({"type": ["float", "NULL"]}, None, "x"),
    ({"type": "string", "nullable": True}, None, 1),
    ({"type": "string", "enum": None, "format": "date"}, "x", None),
    ({"type": "string", "pattern": "(", "maxLength": 2}, "x", "xyz"),
    ({"type": "object", "properties": {"type": {"type": "int"}}}, {"type": 1}, {"type": "x"}),
    ({"type": "str, optional"}, "x", 1),
    ({"type": "List[int]"}, [1], {"x": 1}),
    ({"type": "Dict[str, Any]"}, {"x": 1}, [1]),
    ({"type": "Union[str, int]", "enum": [1, "x"]}, "x", 2),
    ({"type": "number", "multipleOf": 0.01}, 19.99, 19.995),
    ({"type": "number", "multipleOf": 0.1}, 0.1 + 0.2, 0.35),
    ({"type": "integer", "multipleOf": 2}, 2**53 + 2, 2**53 + 1),
]


@pytest.mark.parametrize("declared, right, wrong", DIALECTS)
def test_dialects_of_json_schema_are_converted_to_the_standard(declared, right, wrong):
    """The wrong values show that the schema is still checked. Nested objects accept any key."""
    schema = {"type": "dict", "properties": {"a": declared}, "required": None}
    assert problems_of(schema, a=right) == []
    assert problems_of(schema, a=wrong) == ["wrong type or value"]


CITY = {"city": {"type": "str"}, "nights": {"type": "integer"}}
AS_SCHEMA = {"type": "object", "properties": CITY, "required": ["city"]}
FLAT = {"city": {"type": "str", "required": True}, "nights": {"type": "int, optional"}}
DECLARATIONS = [
    *[{"name": "f", key: AS_SCHEMA} for key in ("parameters", "input_schema", "inputSchema")],
    {"name": "f", "parameters": None, "input_schema": AS_SCHEMA},
    {"name": "f", "parametersJsonSchema": AS_SCHEMA},
    {"type": "function", "function": {"name": "f", "inputSchema": AS_SCHEMA}},
    {"function_declarations": [{"name": "g"}, {"name": "f", "parameters": AS_SCHEMA}]},
    {"functionDeclarations": [{"name": "f", "parameters": AS_SCHEMA}]},
    {"name": "f", "parameters": FLAT},
    {"name": "f", "inputs": FLAT},
    {"name": "f", "parameters": {"city": {**CITY["city"], "required": True}, "nights": "int"}},
    {"name": "f", "parameters": {"city": "str", "nights": "int", "required": ["city"]}},
    {"name": "f", "parameters": {**CITY, "required": ["city"]}},
    {"name": "f", "parameters": {**CITY, "type": "object", "required": ["city"]}},
]


@pytest.mark.parametrize("declaration", DECLARATIONS)
def test_a_schema_is_found_under_the_keys_of_anthropic_mcp_gemini_and_xlam(declaration):
    for arguments, problems in [
        ({"city": "Oslo", "nights": 2}, []),
        ({"city": 1}, ["wrong type or value"]),
        ({"nights": 2}, ["required argument missing"]),
        ({"city": "Oslo", "town": "Oslo"}, ["argument not declared"]),
    ]:
        verdict = judge("No.", call("f", **arguments), tools=[declaration])
        assert verdict["problems"] == [problems]


def test_flat_parameters_may_be_named_like_keywords_of_json_schema():
    """An argument named type, title or items must not be read as a keyword."""
    flat = {name: {"type": "str"} for name in ("type", "title", "items", "format", "required")}
    tools = [{"name": "f", "parameters": flat}]
    assert judge("No.", call("f", type="a", items="b"), tools=tools)["problems"] == [[]]
    assert judge("No.", call("f", type=1), tools=tools)["problems"] == [["wrong type or value"]]
    tools = [{"name": "f", "parameters": {"title": "str", "description": "str"}}]
    assert judge("No.", call("f", title="a", description="b"), tools=tools)["problems"] == [[]]


def judge_file(tmp_path, predictions, tools_of, seen_tools):
    """The report on predictions. `tools_of` maps conversation ids to declared tools."""
    path = write_rows(tmp_path / "predictions.jsonl", predictions)
    queries = [{**p, "tools": json.dumps(tools_of[p["conversation_id"]])} for p in predictions]
    judged = evaluation.judge_predictions(path, queries, seen_tools)
    return evaluation.summarize(list(judged.values()))


UNREADABLE = [[1], "x", {"type": "strin"}, {"required": True}, {"$ref": "#"}]
UNREADABLE += [{"$ref": "#/nowhere"}, {"properties": {"a": {"$ref": "#/properties/a"}}}]


@pytest.mark.parametrize("schema", UNREADABLE)
def test_a_call_with_an_unreadable_schema_is_left_out_and_counted(schema, tmp_path):
    tools = [{"name": "f", "parameters": schema}, BOOK]
    predictions = [predict("No.", call("f", a=1)), predict("No.", call("book", city=1), turn=3)]
    report = judge_file(tmp_path, predictions, {"1": tools}, None)
    assert report["left_out"] == {"unchecked calls": 1, "faulty references": 0}
    assert report["scores"]["valid_call"] == {"value": 0, "n": 1, "interval": [0, 0]}


@pytest.mark.parametrize("text", [None, '"[]"', "3", "[3]", "[{", '[{"function": "f"}]'])
def test_calls_in_a_row_with_unreadable_tools_are_left_out_and_counted(text, tmp_path):
    """Otherwise right calls would count as calls of unknown functions."""
    right = call("book", city="Oslo")
    unknown = call("fly")
    predictions = [predict(right, right), predict(right, unknown, conversation_id="2")]
    path = write_rows(tmp_path / "predictions.jsonl", predictions)
    tools_of = {"1": text, "2": json.dumps([BOOK])}
    queries = [{**p, "tools": tools_of[p["conversation_id"]]} for p in predictions]
    judged = evaluation.judge_predictions(path, queries, set())
    report = evaluation.summarize(list(judged.values()))
    assert report["left_out"] == {"unchecked calls": 1, "faulty references": 0}
    assert report["problems"] == {"unknown function": 1}
    assert report["scores"]["valid_call"]["n"] == 1
    assert report["scores"]["turn_right"]["value"] == 1 / 2


A = {"properties": {"a": {}}}
B = {"properties": {"b": {}}}
BRANCHED = [{key: [A, B]} for key in ("allOf", "anyOf", "oneOf")] + [
    {"if": {"properties": {"a": {"const": 1}}}, "then": B},
    {**A, "dependentSchemas": {"a": B}},
    {"$ref": "#/$defs/P", "$defs": {"P": {"properties": {"a": {}, "b": {}}}}},
]


def test_an_argument_is_declared_if_any_branch_declares_it():
    for schema in BRANCHED:
        assert "argument not declared" not in problems_of(schema, a=1, b=2)
        assert "argument not declared" in problems_of(schema, a=1, b=2, c=3)
    for extra in ({"additionalProperties": True}, {"patternProperties": {"^x": {}}}):
        assert problems_of({"properties": {}, **extra}, c=3) == []


def test_a_hostile_schema_is_checked_or_abandoned_within_a_second():
    """Otherwise a dataset could stop the evaluation forever."""
    bomb = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 10} for n in range(30)}
    draft7 = {"$schema": "http://json-schema.org/draft-07/schema#"}
    regex = {"type": "string", "pattern": r"^(\w+\s?)*$"}
    hostile = [
        {"$ref": "#/$defs/d0", "$defs": {**bomb, "d30": {}}},
        {"patternProperties": {r"^(a+)+$": {}}, "additionalProperties": False},
        {"properties": {"a": {**regex, **draft7}}},
        {"const": {**regex, **draft7}, "properties": {"a": {"$ref": "#/const"}}},
        {"properties": {"a": {"uniqueItems": True}}},
        {"properties": {"a": {"allOf": [{"$ref": "#"}] * 2}}},
    ]
    nested = json.loads('{"a": ' * 60 + "1" + "}" * 60)
    for schema in hostile:
        for value in ("a" * 40 + "!", [{"x": n} for n in range(3000)], nested):
            start = time.process_time()
            problems_of(schema, a=value, **{"a" * 40 + "!": 1})
            assert time.process_time() - start < 1, schema


def test_a_remote_reference_in_a_schema_is_never_fetched():
    hub = Hub()
    assert problems_of({"$ref": f"{hub.url}/schema"}, a=1) is None
    problems_of({"$id": f"{hub.url}/", "$ref": "#x"}, a=1)
    assert hub.requests == []


# ---- Counts and intervals


LIMA = call("book", city="Lima")
ROME = call("fly", to="Rome")
PREDICTIONS = [
    predict(LIMA, LIMA, conversation_id="1", turn=1),
    predict("Done.", "Done.", conversation_id="1", turn=3),
    predict(LIMA, "<tool_call>book Lima</tool_call>", conversation_id="2", turn=1),
    predict("Done.", LIMA, conversation_id="2", turn=3),
    predict(ROME, "I cannot.", conversation_id="3", turn=1),
    predict("Done.", "<tool_call>", conversation_id="3", turn=3),
    predict(ROME, call("fly", to="Paris"), conversation_id="4", turn=1),
    predict("<tool_call>faulty</tool_call>", ROME, conversation_id="5", turn=1),
]
FLY = [make_tool("fly", "to")]
TOOLS_OF = {"1": [BOOK], "2": [BOOK], "3": FLY, "4": FLY, "5": []}


def test_the_counts_in_the_report_equal_values_worked_out_by_hand(tmp_path):
    report = judge_file(tmp_path, PREDICTIONS, TOOLS_OF, seen_tools={"book"})
    failures = {"no_call": 1, "unneeded_call": 1, "malformed": 2, "wrong_arguments": 1}
    assert report["queries"] == 8 and report["failures"] == failures
    assert report["left_out"] == {"unchecked calls": 0, "faulty references": 1}
    assert report["problems"] == {"unknown function": 1}  # conversation 5 declares no tool
    values = {metric: (entry["value"], entry["n"]) for metric, entry in report["scores"].items()}
    assert values == {
        "function_calling": (0.5, 5),
        "helpful_exchange": (0.5, 3),
        "name_right": (2 / 4, 4),
        "arguments_right": (1 / 4, 4),
        "turn_right": (1 / 4, 4),
        "valid_call": (3 / 4, 4),
        "precision": (2 / 5, 5),  # two of five attempts (three calls, two malformed) were needed
        "recall": (2 / 4, 4),
        "f1": (4 / 9, 9),
        "turn_right_seen_tools": (1 / 2, 2),
        "turn_right_unseen_tools": (0, 2),
    }
    published = evaluation.PUBLISHED["gemma-3-1b-it"]
    table = evaluation.format_scores({"fine-tuned": report["scores"]}, published).splitlines()
    rows = [line.split() for line in table]
    assert rows[0] == ["n", "fine-tuned", "published"]
    assert ["exact", "calls", "4", "0.250", "[0.000,", "0.750]"] in rows
    published = "0.28 / 0.91 / 0.973"
    expected = f"function calling 5 0.500 [0.500, 0.500] {published}"
    assert expected.split() in rows


def make_turns(metric, outcomes, turns_each=1):
    """Turns of conversations. All turns of a conversation have the same outcome."""
    turns = []
    for number, outcome in enumerate(outcomes):
        turns += [{"conversation_id": number, "counts": {metric: (outcome, 1)}}] * turns_each
    return turns


def test_confidence_intervals_resample_conversations_instead_of_turns():
    """All ten turns of a conversation are alike, so the normal approximation has n = 400."""
    coins = numpy.random.default_rng(5).random(400) < 0.3
    turns = make_turns("turn_right", coins, 10)
    entry = evaluation.estimate(turns)["turn_right"]
    mean = coins.mean()
    half = 1.96 * coins.std() / 400**0.5  # resampled turns would give half / sqrt(10)
    assert entry["value"] == pytest.approx(mean) and entry["n"] == 4000
    assert entry["interval"] == pytest.approx([mean - half, mean + half], abs=0.1 * half)


def test_the_confidence_interval_of_the_difference_is_paired():
    """The models agree on most conversations, so the interval of their difference is narrow."""
    coins = numpy.random.default_rng(6).random(300) < 0.5
    baseline = make_turns("recall", coins)
    fine_tuned = make_turns("recall", [*[True] * 30, *coins[30:]])  # better on some of 30
    entry = evaluation.estimate(fine_tuned, baseline)["recall"]
    assert entry["value"] == pytest.approx((~coins[:30]).sum() / 300)
    low, high = entry["interval"]
    alone = evaluation.estimate(baseline)["recall"]["interval"]
    assert 0 < low < entry["value"] < high and high - low < 0.6 * (alone[1] - alone[0])


# ---- Predictions files and reports


def run_without_torch(*arguments, cwd):
    """Run the evaluation in a process that fails if it imports torch; return its output."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import evaluation;"
        f"evaluation.main({arguments!r});"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    ascii_output = {**os.environ, "PYTHONIOENCODING": "ascii"}  # lacks most characters
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=ascii_output)
    assert process.returncode == 0, process.stderr
    return process.stdout


def make_record(number):
    """The line of a split that step 1 writes for make_row(number)."""
    row = make_row(number)
    roles = {"human": "user", "gpt": "assistant", "tool": "tool"}
    system, *turns = [turn["value"] for turn in row["conversations"]]
    turns[0] = f"{system}\n\nThink first.\n\n{turns[0]}"
    names = [roles[turn["from"]] for turn in row["conversations"][1:]]
    pairs = zip(names, turns, strict=True)
    messages = [{"role": role, "content": text} for role, text in pairs]
    return {"id": row["id"], "messages": messages, "tools": row["tools"]}


def score_rows(tmp_path, rows, *flags, splits=("test",), name="p.jsonl", model=SAMPLE_MODEL):
    """Evaluate predictions for two conversations; return the results folder of the model."""
    (tmp_path / "processed_data").mkdir(exist_ok=True)
    records = [make_record(number) for number in range(2)]
    for split in splits:
        write_rows(tmp_path / f"processed_data/function_calling_{split}.jsonl", records)
    write_rows(tmp_path / name, rows)
    test_file = tmp_path / "processed_data/function_calling_test.jsonl"
    command = ["--model", str(model), "--predictions", str(tmp_path / name)]
    command += ["--test-file", str(test_file), "--output-dir", str(tmp_path / "results")]
    evaluation.main([*command, *flags])
    return tmp_path / "results" / model.name


ANSWERS = [
    {"conversation_id": "id-0", "turn": 1, "output": call("get_weather_0", city="Paris")},
    {"conversation_id": "id-0", "turn": 3, "output": "It is 0 degrees in Paris."},
    {"conversation_id": "id-1", "turn": 1, "output": call("get_weather_1", city="Rome")},
    {"conversation_id": "id-1", "turn": 3, "output": "It is cold."},
]


def read_metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_predictions_from_a_server_are_scored_without_importing_torch(tmp_path, tiny_model):
    """One of two calls is right, and its tool is in the train split. One other turn is right."""
    records = [make_record(number) for number in range(2)]
    (tmp_path / "processed_data").mkdir()
    write_rows(tmp_path / "processed_data/function_calling_train.jsonl", records[:1])
    write_rows(tmp_path / "processed_data/function_calling_test.jsonl", records)
    function = {"name": "get_weather_0", "arguments": '{"city": "Paris"}'}
    right_call = {"output": None, "tool_calls": [{"function": function}]}
    rows = [
        {"conversation_id": "id-1", "turn": 1, "output": "<tool_call>é", "finish_reason": "length"},
        {"conversation_id": "id-1", "turn": 3, "output": "\ud800", "score": 0.9},
        {"conversation_id": "id-0", "turn": 1, **right_call, "finish_reason": "tool_calls"},
        {"conversation_id": "id-0", "turn": 3, "output": "It is 0 degrees in Paris."},
    ]
    write_rows(tmp_path / "server.jsonl", rows)
    arguments = "--model", str(tiny_model), "--predictions", "server.jsonl"
    printed = run_without_torch(*arguments, cwd=tmp_path)
    results = tmp_path / "evaluation_results" / tiny_model.name / "predictions-server"
    metrics = read_metrics(results)
    scores = {metric: (e["value"], e["n"]) for metric, e in metrics["scores"].items()}
    assert 1 / 2 < scores["function_calling"][0] < 1 and scores["helpful_exchange"] == (1 / 2, 2)
    assert (scores["turn_right"], scores["turn_right_seen_tools"]) == ((1 / 2, 2), (1, 1))
    assert metrics["failures"] == {"truncated": 1}
    assert run_without_torch(*arguments, "--rescore", cwd=tmp_path) == printed
    printed = run_without_torch(*arguments, "--show-failures", "3", cwd=tmp_path)
    assert (
        "truncated: conversation id-1, turn 1" in printed and "OUTPUT\n<tool_call>\\xe9" in printed
    )


def test_failures_are_grouped_by_class_and_show_the_last_user_message(tmp_path, capsys):
    wording = {"before_tools": "", "after_tools": "</tools>", "before_request": "Think first.\n\n"}
    (tmp_path / "processed_data").mkdir()
    (tmp_path / "processed_data/dataset_info.json").write_text(json.dumps({"prompt": wording}))
    malformed = [{**answer, "output": "<tool_call>"} for answer in (ANSWERS[1], ANSWERS[3])]
    score_rows(tmp_path, [ANSWERS[2], *malformed], "--show-failures", "9")
    printed = capsys.readouterr().out
    headers = [line for line in printed.splitlines() if line.startswith("====")]
    assert headers == ["==== malformed: 2 of 2 ====", "==== wrong arguments: 1 of 1 ===="]
    conversation = "conversation id-1, turn 1\nUSER\nWhat is the weather in Oslo?\nREFERENCE\n"
    assert f"wrong arguments: {conversation}<tool_call>" in printed
    assert printed.count("USER\nWhat is the weather in Paris?\n") == 1
    assert "<tools>" not in printed and "Think first" not in printed


def test_queries_that_are_also_in_the_train_split_are_marked_and_scored_separately(
    tmp_path, capsys
):
    """Only conversation 0 is in both splits, and only its answers are right."""
    score_rows(tmp_path, ANSWERS)
    assert "train split" not in capsys.readouterr().out
    train = tmp_path / "processed_data/function_calling_train.jsonl"
    record = make_record(0)
    other = {**record, "id": "other", "messages": record["messages"][:2]}
    write_rows(train, [{**other, "id": "x"}, {**record, "id": "y"}])
    results = score_rows(tmp_path, ANSWERS, "--overwrite")
    printed = capsys.readouterr().out
    metrics = read_metrics(results / "predictions-p")
    assert metrics["repeated_queries"] == [["id-0", "1"], ["id-0", "3"]]
    assert metrics["scores"]["turn_right"] == {"value": 1 / 2, "n": 2, "interval": [0, 1]}
    assert metrics["scores_without_repeated"]["turn_right"]["value"] == 0
    assert metrics["scores_without_repeated"]["helpful_exchange"]["n"] == 1
    assert "2 of these queries are also in the train split" in printed
    small = printed.partition("Without them:")[2].partition("Failures")[0]
    rows = [line.split() for line in small.splitlines() if line.strip()]
    assert rows[1] == ["exact", "calls", "1", "0.000", "[0.000,", "0.000]"] and len(rows) == 4
    write_rows(train, [make_record(0), make_record(1)])
    score_rows(tmp_path, ANSWERS, "--rescore")
    printed = capsys.readouterr().out
    assert "4 of these queries are also in the train split.\n\nFailures" in printed
    record["messages"][0]["content"] += " "  # a different prompt makes it a different query
    write_rows(train, [record])
    score_rows(tmp_path, ANSWERS, "--rescore")
    assert read_metrics(results / "predictions-p")["repeated_queries"] == []


def test_turns_without_loss_are_not_queries(tmp_path):
    """They are part of the prompts of later turns."""
    record = make_record(0)
    record["messages"][1]["train"] = False
    path = write_rows(tmp_path / "split.jsonl", [record])
    (query,) = evaluation.read_queries(path)
    assert query["turn"] == 3 and len(query["prompt"]) == 3
    assert "tool_call" in query["prompt"][1]["content"]
    assert {*query["prompt"][1]} == {"role", "content"}


# ---- Matching predictions with queries


def test_conversation_ids_and_turns_are_compared_as_text(tmp_path):
    records = [{**make_record(n), "id": str(n)} for n in range(2)]
    path = write_rows(tmp_path / "split.jsonl", records)
    rows = [{"conversation_id": 0, "turn": "1", "output": ""}]
    write_rows(tmp_path / "p.jsonl", rows)
    matched = evaluation.match_answers(tmp_path / "p.jsonl", evaluation.read_queries(path))
    assert matched == {("0", "1"): ("", "end_of_turn")}


def test_an_output_next_to_an_empty_content_is_read(tmp_path):
    """Client libraries write every field of a message, those without a value as null."""
    rows = [{**answer, "content": None, "tool_calls": None} for answer in ANSWERS]
    results = score_rows(tmp_path, rows)
    assert read_metrics(results / "predictions-p")["scores"]["turn_right"]["value"] == 1 / 2
    assert evaluation.read_answer({"content": ["It ", {"text": "is 7."}]})[0] == "It is 7."


@pytest.mark.parametrize(
    "wrap",
    [
        lambda message: {"message": message},
        lambda message: {"output": message},
        lambda message: {"choices": [{"message": message, "finish_reason": "stop"}]},
        lambda message: {"response": {"choices": [{"message": message}], "usage": {}}},
    ],
)
def test_a_prediction_may_be_a_whole_completion(wrap, tmp_path):
    rows = []
    for row in ANSWERS:
        place = {"conversation_id": row["conversation_id"], "turn": float(row["turn"])}
        rows.append({**place, **wrap({"role": "assistant", "content": row["output"]})})
    results = score_rows(tmp_path, rows)
    assert read_metrics(results / "predictions-p")["scores"]["turn_right"]["value"] == 1 / 2


UNREADABLE_PREDICTIONS = [
    ({"output": {"text": "x"}}, "the content is not text"),
    ({"output": [{"type": "message", "content": []}]}, "has parts of the types message"),
    ({"output": [5]}, "the content is not text"),
    ({"tool_calls": ["f"]}, "a tool call is not an object with a name and arguments"),
    ({"text": "x"}, "has no 'output'.*output, or OpenAI's content and tool_calls instead"),
]


@pytest.mark.parametrize("fields, words", UNREADABLE_PREDICTIONS)
def test_an_unreadable_prediction_of_a_file_prints_one_line(fields, words, tmp_path):
    place = {"conversation_id": "id-0", "turn": 1}
    with pytest.raises(SystemExit, match=f"^error: [^\n]*line 1[^\n]*{words}[^\n]*$"):
        score_rows(tmp_path, [{**place, **fields}])


def test_turns_that_are_counted_in_other_messages_are_refused(tmp_path):
    """System text and parallel results shift the turns of a user's own rows."""
    rows = [{**answer, "turn": int(answer["turn"]) + 1} for answer in ANSWERS]
    words = "line 1 has turn 2 of conversation id-0, whose model turns are 1, 3"
    with pytest.raises(SystemExit, match=words):
        score_rows(tmp_path, rows)


def test_missing_predictions_of_a_file_cause_a_warning(tmp_path, capsys):
    score_rows(tmp_path, ANSWERS[:1])
    printed = capsys.readouterr().out
    assert f"warning: {len(ANSWERS) - 1} queries have no prediction" in printed
    assert "warning: only 1 turns contain calls" in printed


def test_a_second_prediction_for_a_query_is_refused(tmp_path):
    repeated = f"p.jsonl, line {len(ANSWERS) + 1} repeats an earlier prediction"
    with pytest.raises(SystemExit, match=repeated):
        score_rows(tmp_path, [*ANSWERS, ANSWERS[0]])


def test_failed_predictions_of_a_file_are_wrong_and_not_to_be_sent_again(tmp_path):
    """Part of an answer may have arrived."""
    rows = [{**ANSWERS[0], "finish_reason": "failed"}, *ANSWERS[1:]]
    with pytest.raises(SystemExit, match="1 queries failed .no answer.. They count as wrong.* The"):
        score_rows(tmp_path, rows)
    metrics = read_metrics(tmp_path / "results" / SAMPLE_MODEL.name / "predictions-p")
    assert metrics["scores"]["turn_right"]["value"] == 0  # without the failure, 1 / 2


def test_special_tokens_in_the_text_of_an_output_do_not_count(tmp_path):
    """Some programs decode them."""
    metrics = read_metrics(score_rows(tmp_path, ANSWERS) / "predictions-p")
    rows = [{**row, "output": f"<bos>{row['output']}<end_of_turn>\n"} for row in ANSWERS]
    results = score_rows(tmp_path, rows, name="q.jsonl")
    assert read_metrics(results / "predictions-q")["scores"] == metrics["scores"]


@pytest.mark.parametrize(
    "row, words",
    [
        (
            {"conversation_id": 7, "turn": 1, "output": ""},
            'conversation_id "7" with turn 1.*"id-0"',
        ),
        (
            {"id": "id-0", "turn": 1, "output": ""},
            "line 1 has no 'conversation_id'; its keys are id",
        ),
        ({"conversation_id": "id-0", "output": ""}, "line 1 has no 'turn'"),
        ({"conversation_id": "id-0", "turn": 1, "text": ""}, "line 1 has no 'output'"),
        ({"conversation_id": "id-0", "turn": 1, "output": 3}, "line 1: the content is not text"),
    ],
)
def test_predictions_that_match_no_query_print_the_reason_and_write_no_files(tmp_path, row, words):
    with pytest.raises(SystemExit, match=words):
        score_rows(tmp_path, [row])
    assert not (tmp_path / "results").exists()
    folder = score_rows(tmp_path, ANSWERS) / "predictions-p"
    before = (folder / "predictions.jsonl").read_bytes()
    with pytest.raises(SystemExit, match=words):
        score_rows(tmp_path, [row], "--overwrite")
    assert (folder / "predictions.jsonl").read_bytes() == before


# ---- Comparing runs


def test_any_two_runs_can_be_compared_and_only_the_reported_run_is_written(tmp_path, capsys):
    """One run has 1 of 2 exact calls, and the other has 0 of 2."""
    worse = [{**answer, "output": "No."} for answer in ANSWERS]
    results = score_rows(tmp_path, worse, name="a.jsonl")
    score_rows(tmp_path, ANSWERS, name="b.jsonl")
    other = {path.name: path.read_bytes() for path in (results / "predictions-a").iterdir()}
    flags = ["--compare-with", str(results / "predictions-a")]
    score_rows(tmp_path, ANSWERS, *flags, name="b.jsonl")  # existing predictions are reused
    metrics = read_metrics(results / "predictions-b")
    assert metrics["difference"]["turn_right"]["value"] == 1 / 2
    assert metrics["comparison"]["scores"]["turn_right"]["value"] == 0
    (header,) = [line for line in capsys.readouterr().out.splitlines() if "difference" in line]
    assert header.split() == ["n", "predictions-a", "predictions-b", "difference"]
    pictures = {path.name for path in (results / "predictions-b").glob("*.png")}
    assert pictures == {"scores.png", "comparison-with-tiny-gemma-3-predictions-a.png"}
    assert other == {p.name: p.read_bytes() for p in (results / "predictions-a").iterdir()}
    with pytest.raises(SystemExit, match="is the folder of the run itself"):
        score_rows(tmp_path, worse, "--rescore", *flags, name="a.jsonl")


def change_split(folder):
    path = folder / "function_calling_test.jsonl"
    path.write_text(path.read_text().replace("Hello", "Hi") + "\n")


def change_wording(folder):
    info = {"prompt": {"before_tools": "Tools: ", "after_tools": "", "before_request": ""}}
    (folder / "dataset_info.json").write_text(json.dumps(info))


DIFFERENCES = [
    (["--max-new-tokens", "40"], None, "--max-new-tokens: 40 here, 256 there"),
    ([], change_split, "test split: .*test.jsonl .sha256 .* here, .* there"),
    ([], change_wording, "prompt wording: .sha256 .* here, .sha256 .* there"),
]


@pytest.mark.parametrize("flags, change, words", DIFFERENCES)
def test_runs_with_different_settings_are_not_compared_and_the_report_says_why(
    tmp_path, capsys, flags, change, words
):
    """A difference must not come from other data, other prompts or shorter answers."""
    (tmp_path / "processed_data").mkdir()
    (tmp_path / "processed_data/dataset_info.json").write_text('{"prompt": {"before_tools": ""}}')
    results = score_rows(tmp_path, ANSWERS, name="a.jsonl")
    if change:
        change(tmp_path / "processed_data")
    capsys.readouterr()
    compare = ["--compare-with", str(results / "predictions-a"), *flags]
    score_rows(tmp_path, ANSWERS, *compare, name="b.jsonl", splits=() if change else ("test",))
    printed = capsys.readouterr().out
    assert "No comparison with" in printed and re.search(words, printed)
    assert "difference" not in printed
    metrics = read_metrics(results / "predictions-b")
    assert "difference" not in metrics and len(metrics["comparison"]["not_comparable"]) == 1
    (header,) = [line.split() for line in printed.splitlines() if line.endswith("predictions-b")]
    assert header == ["n", "predictions-b"]
    assert {path.name for path in (results / "predictions-b").glob("*.png")} == {"scores.png"}


def test_published_scores_are_shown_only_for_the_published_split_and_model(
    tmp_path, capsys, monkeypatch
):
    """They are not shown for a predictions file, whose answers may be from any model."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "gemma-3-1b-it"
    shutil.copytree(SAMPLE_MODEL, model)
    for folder, is_published, sha_of_split in [
        (model, True, True),
        (model, False, True),
        (model, True, False),  # dataset_info.json describes a different file
        (SAMPLE_MODEL, True, True),
    ]:
        score_rows(tmp_path, ANSWERS, "--overwrite", model=folder)
        path = tmp_path / "processed_data/function_calling_test.jsonl"
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest() if sha_of_split else "0"
        info = {"is_published_split": is_published, "test": {"sha256": sha256}}
        (tmp_path / "processed_data/dataset_info.json").write_text(json.dumps(info))
        capsys.readouterr()
        score_rows(tmp_path, ANSWERS, "--overwrite", model=folder)
        assert "0.28 / 0.91 / 0.973" not in capsys.readouterr().out
        command = ["--model", str(folder), "--baseline", "--overwrite"]
        evaluation.main([*command, "--limit", "1", "--max-new-tokens", "1"])
        is_shown = "0.28 / 0.91 / 0.973" in capsys.readouterr().out
        assert is_shown == (folder is model and is_published and sha_of_split)


def test_each_run_has_its_own_results_folder(tmp_path):
    """A file named baseline, a second file of the same name or a changed split replaces no run."""
    results = score_rows(tmp_path, ANSWERS, name="baseline.jsonl")
    assert [path.name for path in results.iterdir()] == ["predictions-baseline"]
    (tmp_path / "other").mkdir()
    for flags, words in [
        ([], "already contains predictions.*--overwrite.*--name"),
        (["--rescore"], "predictions file was .*, not .*--name"),
        (["--resume"], "predictions file was .*, not .*--name"),
        (["--show-failures", "1"], "predictions file was .*, not"),
    ]:
        with pytest.raises(SystemExit, match=words):
            score_rows(tmp_path, ANSWERS[:3], *flags, name="other/baseline.jsonl")
    score_rows(tmp_path, ANSWERS[:3], "--name", "mine", name="other/baseline.jsonl")
    assert {path.name for path in results.iterdir()} == {"predictions-baseline", "mine"}
    before = (results / "predictions-baseline/metrics.json").read_bytes()
    change_split(tmp_path / "processed_data")
    with pytest.raises(SystemExit, match="the test split has changed since"):
        score_rows(tmp_path, ANSWERS, "--rescore", name="baseline.jsonl", splits=())
    assert (results / "predictions-baseline/metrics.json").read_bytes() == before


NAMES = [
    (["--baseline"], "baseline"),
    ([], "fine-tuned"),
    (["--adapter", "./LoRA_gemma-3-1b-it-function_calling/"], "fine-tuned"),
    (
        ["--adapter", "a/LoRA_gemma-3-1b-it-function_calling"],
        "adapter-LoRA_gemma-3-1b-it-function_calling",
    ),
    (["--adapter", "runs/epochs4/"], "adapter-epochs4"),
    (["--predictions", "a/baseline.jsonl"], "predictions-baseline"),
    (["--server", "http://x/v1", "--server-model", "google/baseline"], "server-baseline"),
    (["--server", "http://x/v1", "--server-model", "fc", "--baseline"], "baseline"),
    (["--name", "mine"], "mine"),
]


@pytest.mark.parametrize("flags, name", NAMES)
def test_the_name_of_a_results_folder_can_be_predicted(flags, name):
    assert evaluation.results_name(evaluation.parse_args(flags)) == name


def test_the_plot_has_one_bar_for_each_run_that_measured_a_score(tmp_path, monkeypatch):
    """The plot also has n for each score, an axis label and a title."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: figures.append(f) or save(f, *a, **k))
    entry = {"value": 0.5, "n": 8, "interval": [0.25, 0.75]}
    columns = {
        "baseline": {"helpful_exchange": entry},
        "fine-tuned": {"helpful_exchange": entry, "turn_right": {**entry, "n": 4}, "f1": entry},
    }
    evaluation.plot_scores(columns, "m: baseline and fine-tuned", tmp_path / "x.png")
    (axes,) = figures[0].axes
    colors = {bars.get_label(): bars[0].get_facecolor() for bars in axes.containers}
    for order in (["fine-tuned", "baseline"], ["baseline"]):
        chosen = {label: columns[label] for label in order}
        evaluation.plot_scores(chosen, "m", tmp_path / "x.png")
        reported = figures[-1].axes[0].containers[-1][0].get_facecolor()
        # The reported run is the last one, and its color differs from that of the run it is
        # compared with. A baseline alone has the color that it has in a comparison.
        expected = "fine-tuned" if len(order) == 2 else "baseline"
        assert reported == colors[expected]
    assert colors["baseline"] != colors["fine-tuned"]
    assert [len(bars) for bars in axes.containers] == [1, 2]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert [label.splitlines()[0] for label in labels] == ["Exact calls", "Helpful exchange"]
    assert labels[0].endswith("n = 4") and labels[1].endswith("n = 8")
    assert axes.get_title() == "m: baseline and fine-tuned" and "score" in axes.get_xlabel()
    low, high = axes.get_ylim()[::-1]
    assert all(low < bar.get_y() < high for bars in axes.containers for bar in bars)
