"""Step 3: which calls can be read, which are right, which fit their tools; counts and intervals."""

import json
import resource
import subprocess
import sys
import time

import numpy
import pytest
from conftest import ROOT, SHARED, make_tool
from hypothesis import assume, given
from hypothesis import strategies as st

import evaluation


def call(name="f", /, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def predict(reference, output, finish_reason="end_of_turn", conversation_id="1", turn=1, score=0.5):
    kind = "function_calling" if "<tool_call>" in reference else "helpful_exchange"
    return {
        "conversation_id": conversation_id,
        "turn": turn,
        "kind": kind,
        "reference": reference,
        "output": output,
        "score": score,
        "finish_reason": finish_reason,
    }


def judge(reference, output, finish_reason="end_of_turn", tools=()):
    declared = evaluation.read_tools(json.dumps(list(tools)))
    return evaluation.judge_turn(predict(reference, output, finish_reason), declared)


def rights(verdict):
    """(name right, arguments right, turn right), each None where it is not asked."""
    keys = ("name_right", "arguments_right", "turn_right")
    return tuple(verdict["counts"].get(key, (None,))[0] for key in keys)


def problems_of(parameters, name="f", **arguments):
    """What is found against a call of f, declared with these parameters."""
    return judge("No.", call(name, **arguments), tools=[{"name": "f", **parameters}])["problems"][0]


# ---- Reading calls


@pytest.mark.parametrize(
    "text, calls",
    [
        ("Hello!", []),
        ("", []),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', [("f", {"a": 1})]),
        (
            "<tool_call>\n{'name': 'f', 'arguments': {'a': True, 'b': None}}\n</tool_call>",
            [("f", {"a": True, "b": None})],
        ),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [("f", {"a": 1})]),
        (
            "<tool_call>{'name': 'f', 'arguments': {'a': (1, 2)}}</tool_call>",
            [("f", {"a": [1, 2]})],
        ),
        (call("f") + "\n" + call("g", x="it's"), [("f", {}), ("g", {"x": "it's"})]),
        ("Sure. " + call("f") + " Done.", [("f", {})]),
        ('<tool_call>{"name": "f"}</tool_call>', [("f", {})]),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', [("f", {})]),
        ('<tool_call>{"name": "f", "arguments": ""}</tool_call>', [("f", {})]),
    ],
)
def test_calls_are_read_as_json_or_python_literals(text, calls):
    assert evaluation.parse_calls(text) == ([{"name": n, "arguments": a} for n, a in calls], None)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("<tool_call>", "a tag without its partner"),
        ('{"name": "f", "arguments": {}}</tool_call>', "a tag without its partner"),
        (call("f") + "</tool_call>", "a tag without its partner"),
        (f"<tool_call>{call('f')}</tool_call>", "a tag without its partner"),
        ("</tool_call><tool_call>", "a tag without its partner"),
        ("<tool_call></tool_call>", "neither JSON nor a Python literal"),
        ("<tool_call>f(a=1)</tool_call>", "neither JSON nor a Python literal"),
        ("<tool_call>[1]</tool_call>", "no JSON object with a name and arguments"),
        ('<tool_call>{"arguments": {}}</tool_call>', "no JSON object with a name and arguments"),
        ('<tool_call>{"name": 3}</tool_call>', "no JSON object with a name and arguments"),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "no JSON object with a name"),
        ('<tool_call>{"name": "f", "arguments": 0}</tool_call>', "no JSON object with a name"),
        ('<tool_call>{"name": "f", "arguments": "Paris"}</tool_call>', "neither JSON"),
        ("<tool_call>{'name': 'f', 'arguments': {'a': {1, 2}}}</tool_call>", "no JSON object"),
        (call("f") + "<tool_call>oops</tool_call>", "neither JSON"),  # it spoils the turn
    ],
)
def test_anything_else_is_malformed_with_a_reason(text, reason):
    calls, why = evaluation.parse_calls(text)
    assert calls == [] and reason in why
    assert judge(call("f"), text)["failure"] == "malformed"
    assert judge(text, text)["faulty_reference"] == why and judge(text, text)["failure"] is None


@pytest.mark.parametrize("depth", [50, 200, 900, 5_000, 100_000])
def test_nesting_of_any_depth_is_judged_in_output_and_reference(depth):
    """Catches a RecursionError that ends an evaluation of thousands of queries."""
    for value in ("[" * depth + "]" * depth, '{"a": ' * depth + "1" + "}" * depth):
        text = f'<tool_call>{{"name": "f", "arguments": {{"a": {value}}}}}</tool_call>'
        verdict = judge(text, text, tools=[make_tool("f", "a")])
        assert verdict["faulty_reference"] or verdict["counts"]["turn_right"] == (True, 1)
        verdict = judge(call("f"), text, tools=[make_tool("f", "a")])
        assert verdict["failure"] == ("wrong_arguments" if depth <= 50 else verdict["failure"])
        assert verdict["failure"] in ("wrong_arguments", "malformed")


PIECES = [
    "<tool_call>",
    "<tool_call></tool_call>",
    "</tool_call>",
    "</tool_call><tool_call>",
    "[",
    "{'a':",
    "<tool_call>{",
    "<",
    "-",
    "1+",
    "not ",
    "'a' ",
    "x.",
    "f(",
    "lambda:",
    "9",
    "\\",
]


@pytest.mark.parametrize("piece", PIECES)
def test_a_megabyte_of_rubbish_is_read_in_a_second(piece):
    text = piece * (1_000_000 // len(piece))
    for output in (text, f"<tool_call>{text}</tool_call>"):
        start = time.process_time()
        judge(call("f"), output)
        assert time.process_time() - start < 1


rubbish = st.text() | st.text(alphabet="<tool_call>/{}[]'\":, \n\0\ud8001eE.-")


@given(rubbish)
def test_no_string_whatsoever_raises(text):
    inside = f'<tool_call>{{"name": "f", "arguments": {text}}}</tool_call>'
    for output in (text, f"<tool_call>{text}</tool_call>", inside):
        judge(call("f", a=1), output, tools=[make_tool("f", "a")])
        judge(output, output)


# ---- Right and wrong


@pytest.mark.parametrize(
    "output, name, arguments, whole, failure",
    [
        (call("f", a=1, b="x"), True, True, True, None),
        (call("f", b="x", a=1.0), True, True, True, None),  # free order of keys; 1 equals 1.0
        ("Of course: " + call("f", a=1, b="x"), True, True, True, None),
        (call("f", a=True, b="x"), True, False, False, "wrong_arguments"),  # true is not 1
        (call("f", a="1", b="x"), True, False, False, "wrong_arguments"),
        (call("f", a=1, b="X"), True, False, False, "wrong_arguments"),  # strings to the letter
        (call("f", a=1), True, False, False, "wrong_arguments"),
        (
            call("f", a=1, b="x", c=None),
            True,
            False,
            False,
            "wrong_arguments",
        ),  # also optional ones
        (call("g", a=1, b="x"), False, True, False, "wrong_function"),
        (call("g", a=2, b="x"), False, False, False, "wrong_function"),
        (call("f", a=1, b="x") * 2, False, False, False, "wrong_count"),
        ("I cannot do that.", False, False, False, "no_call"),
        ("", False, False, False, "no_call"),
        ("<tool_call>f(1)</tool_call>", False, False, False, "malformed"),
    ],
)
def test_a_call_against_its_reference(output, name, arguments, whole, failure):
    verdict = judge(call("f", a=1, b="x"), output)
    assert rights(verdict) == (name, arguments, whole) and verdict["failure"] == failure


def test_numbers_are_compared_exactly_and_lists_in_order():
    """Catches ids beyond 2**53 taken for each other."""
    big = 2**53
    assert judge(call(a=big + 1), call(a=big + 1))["failure"] is None
    assert judge(call(a=big + 1), call(a=big))["failure"] == "wrong_arguments"
    assert (
        judge(call(a={"b": [1, {"c": [True]}]}), call(a={"b": [1.0, {"c": [True]}]}))["failure"]
        is None
    )
    assert judge(call(a=[1, 2]), call(a=[2, 1]))["failure"] == "wrong_arguments"


def test_several_calls_of_a_turn_are_matched_without_regard_to_their_order():
    one, two = call("f", a=1), call("g", b=2)
    assert judge(one + two, two + one)["failure"] is None
    assert judge(one + two, one + one)["failure"] == "wrong_function"
    assert judge(one + two, one)["failure"] == "wrong_count"
    swapped = judge(one + two, call("f", b=2) + call("g", a=1))  # each right, but not together
    assert rights(swapped) == (True, True, False) and swapped["failure"] == "wrong_arguments"


@pytest.mark.parametrize(
    "output, finish_reason, failure",
    [
        ("It is sunny.", "end_of_turn", None),
        ("It is sunny, and", "max_new_tokens", "truncated"),
        ("", "prompt_too_long", "truncated"),
        ("", "failed", "failed"),
        (call("f"), "end_of_turn", "unneeded_call"),
        ("<tool_call>oops", "end_of_turn", "malformed"),
        ("<tool_call>oops", "max_new_tokens", "truncated"),
    ],
)
def test_a_turn_that_needs_no_call(output, finish_reason, failure):
    verdict = judge("It is sunny in Oslo.", output, finish_reason)
    assert verdict["failure"] == failure and rights(verdict) == (None, None, None)


def test_a_call_cut_off_is_truncated_and_a_whole_one_is_right():
    whole = call("f", a=1)
    assert judge(whole, whole[:-5], "max_new_tokens")["failure"] == "truncated"
    assert judge(whole, whole + " and then", "max_new_tokens")["failure"] is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    st.dictionaries(st.text(min_size=1, max_size=4), json_values, min_size=1, max_size=4), st.data()
)
def test_spelling_never_changes_a_verdict_and_a_changed_argument_always_does(values, data):
    assume("tool_call>" not in json.dumps(values))
    body = {
        "arguments": {key: values[key] for key in data.draw(st.permutations(list(values)))},
        "name": "f",
    }
    spelled = [
        json.dumps(body),
        json.dumps(body, indent=3),
        json.dumps(body, ensure_ascii=False),
        repr(body).replace("inf", "1e999"),
        json.dumps({**body, "arguments": json.dumps(values)}),
    ]
    text = data.draw(st.sampled_from(spelled))
    assert judge(call("f", **values), f"<tool_call> {text}\n</tool_call>")["failure"] is None
    key = data.draw(st.sampled_from(list(values)))
    others = [
        {**values, key: [values[key]]},
        {**values, "another": None},
        {**values, key: {"x": 1, "y": 2}},
    ]
    changed = data.draw(st.sampled_from(others))
    assume(values.get(key) != {"x": 1, "y": 2})
    assert judge(call("f", **values), call("f", **changed))["failure"] == "wrong_arguments"


# ---- Declared tools


BOOK = {
    "type": "function",
    "function": {
        "name": "book",
        "parameters": {
            "type": "object",
            "required": ["city"],
            "properties": {
                "city": {"type": "string"},
                "nights": {"type": "integer"},
                "class": {"enum": ["a", "b"]},
            },
        },
    },
}


@pytest.mark.parametrize(
    "output, problems",
    [
        (call("book", city="Oslo", nights=2), []),
        (call("fly", city="Oslo"), ["unknown function"]),
        (call("book", nights=2), ["required argument missing"]),
        (call("book", city="Oslo", pets=True), ["argument not declared"]),
        (call("book", city=7), ["wrong type"]),
        (call("book", city="Oslo", **{"class": "c"}), ["wrong type"]),
        (
            call("book", pets=1, nights="two"),
            ["argument not declared", "required argument missing", "wrong type"],
        ),
    ],
)
def test_a_call_is_held_against_the_declared_tools(output, problems):
    assert judge("No.", output, tools=[BOOK])["problems"] == [problems]


@pytest.mark.parametrize("parameters", [{}, {"parameters": None}, {"parameters": {}}])
def test_parameters_null_or_absent_mean_a_function_without_arguments(parameters):
    assert problems_of(parameters) == []
    assert problems_of(parameters, a=1) == ["argument not declared"]


@pytest.mark.parametrize(
    "declared, right, wrong",
    [
        ({"type": "dict"}, {"x": 1}, [1]),
        ({"type": "float"}, 1.5, "1.5"),
        ({"type": "int"}, 2, 2.5),
        ({"type": "STRING"}, "x", 1),
        ({"type": "OBJECT"}, {}, "x"),
        ({"type": "Boolean"}, True, 1),
        ({"type": "list"}, [1], {}),
        ({"type": "tuple", "items": {"type": "str"}}, ["x"], [1]),
        ({"type": "any", "enum": [1, "x"]}, "x", 2),
        ({"type": ["float", "NULL"]}, None, "x"),
        ({"type": "string", "nullable": True}, None, 1),
        ({"type": "string"}, "x", None),
        ({"type": "string", "pattern": "(", "maxLength": 2}, "x", "xyz"),
        ({"type": "string", "format": "date", "enum": None, "items": None}, "no date", 1),
        (
            {"type": "object", "properties": {"type": {"type": "int"}}},
            {"type": 1, "y": 2},
            {"type": "x"},
        ),
    ],
)
def test_dialects_are_read_as_the_json_schema_they_mean(declared, right, wrong):
    """`wrong` shows that the rest of the schema is still checked; nested objects are open."""
    parameters = {"parameters": {"type": "dict", "properties": {"a": declared}, "required": None}}
    assert problems_of(parameters, a=right) == [] and problems_of(parameters, a=wrong) == [
        "wrong type"
    ]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "strin"},
        [1],
        True,
        3,
        "x",
        {"$ref": "http://127.0.0.1:9/x"},
        {"$ref": "#/nowhere"},
        {"required": True},
        {"properties": {"a": {"minimum": "x"}}},
        {"$ref": "#"},
        {"$ref": 3},
        {"properties": {"a": {"$ref": "#/properties/a"}}},
    ],
)
def test_a_schema_that_cannot_be_read_leaves_the_call_out_and_is_counted(schema):
    tools = json.dumps([{"name": "f", "parameters": schema}, BOOK])
    predictions = [predict("No.", call("f", a=1)), predict("No.", call("book", city=1), turn=3)]
    _, report, _ = evaluation.judge_predictions(predictions, {"1": tools}, None)
    assert report["unchecked_calls"] == 1
    assert report["scores"]["valid_call"] == {"value": 0, "n": 1, "interval": [0, 0]}


@pytest.mark.parametrize(
    "schema",
    [
        {key: [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}
        for key in ("allOf", "anyOf", "oneOf")
    ]
    + [
        {"if": {"properties": {"a": {"const": 1}}}, "then": {"properties": {"b": {}}}},
        {"properties": {"a": {}}, "dependentSchemas": {"a": {"properties": {"b": {}}}}},
        {"$ref": "#/$defs/P", "$defs": {"P": {"properties": {"a": {}, "b": {}}}}},
    ],
)
def test_an_argument_is_declared_if_any_branch_declares_it(schema):
    found = problems_of({"parameters": schema}, a=1, b=2)
    assert "argument not declared" not in found
    assert "argument not declared" in problems_of({"parameters": schema}, a=1, b=2, c=3)
    for extra in ({"additionalProperties": True}, {"patternProperties": {"^x": {}}}):
        assert problems_of({"parameters": {"properties": {}, **extra}}, c=3) == []
    closed = {"properties": {}, "additionalProperties": False}
    assert problems_of({"parameters": closed}, c=3) == ["argument not declared"]


def test_a_hostile_schema_is_judged_or_given_up_within_a_second():
    """Catches a data set that stops the evaluation for ever."""
    bomb = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 10} for n in range(30)}
    regex = {"type": "string", "pattern": r"^(\w+\s?)*$"}
    draft7 = "http://json-schema.org/draft-07/schema#"
    tree = {"properties": {"a": {"allOf": [{"$ref": "#"}] * 2}}}
    deep = {}
    for _ in range(6):
        deep = {"unevaluatedProperties": deep, "allOf": [deep], "properties": {"a": deep}}
    hostile = [
        {"$ref": "#/$defs/d0", "$defs": {**bomb, "d30": {}}},
        {"anyOf": [{"$ref": "#/$defs/d0"}], "$defs": bomb},
        {"patternProperties": {r"^(a+)+$": {}}, "additionalProperties": False},
        {"properties": {"a": regex}},
        {"properties": {"a": {**regex, "$schema": draft7}}},
        {"$schema": draft7, "properties": {"a": regex}},
        {"const": {"$schema": draft7, **regex}, "properties": {"a": {"$ref": "#/const"}}},
        {"properties": {"a": {"uniqueItems": True}}},
        tree,
        deep,
    ]
    nested = 1
    for _ in range(60):
        nested = {"a": nested}
    for schema in hostile:
        for value in ("a" * 40 + "!", [{"x": n} for n in range(3000)], nested):
            start = time.process_time()
            problems_of({"parameters": schema}, a=value, **{"a" * 40 + "!": 1})
            assert time.process_time() - start < 1, schema


def test_a_reference_in_a_declaration_is_never_fetched():
    from hub_server import Hub

    hub = Hub()
    problems_of({"parameters": {"$ref": f"{hub.url}/schema"}}, a=1)
    problems_of({"parameters": {"$id": f"{hub.url}/", "$ref": "#x"}}, a=1)
    hub.close()
    assert hub.requests == []


# ---- Counts and intervals


PREDICTIONS = [
    predict(call("book", city="Oslo"), call("book", city="Oslo"), conversation_id="1", turn=1),
    predict("Done.", "Done.", conversation_id="1", turn=3),
    predict(
        call("book", city="Lima"), "<tool_call>book Lima</tool_call>", conversation_id="2", turn=1
    ),
    predict("Done.", call("book", city="Lima"), conversation_id="2", turn=3),
    predict(call("fly", to="Rome"), "I cannot.", conversation_id="3", turn=1),
    predict("Done.", "<tool_call>", conversation_id="3", turn=3),
    predict(call("fly", to="Rome"), call("fly", to="Paris"), conversation_id="4", turn=1),
    predict("<tool_call>faulty</tool_call>", call("fly", to="Rome"), conversation_id="5", turn=1),
]
FLY = json.dumps([make_tool("fly", "to")])
TOOLS_OF = {"1": json.dumps([BOOK]), "2": json.dumps([BOOK]), "3": FLY, "4": FLY, "5": "[]"}


def test_the_report_counts_what_was_worked_out_by_hand():
    verdicts, report, _ = evaluation.judge_predictions(PREDICTIONS, TOOLS_OF, seen_tools={"book"})
    failures = {"no_call": 1, "unneeded_call": 1, "malformed": 2, "wrong_arguments": 1}
    assert report["queries"] == 8 and report["failures"] == failures
    assert report["faulty_references"] == {"neither JSON nor a Python literal": 1}
    assert report["finish_reasons"] == {"end_of_turn": 8}
    assert report["problems"] == {"unknown function": 1}  # conversation 5 declares no tool
    values = {metric: (entry["value"], entry["n"]) for metric, entry in report["scores"].items()}
    assert values == {
        "function_calling": (0.5, 5),
        "helpful_exchange": (0.5, 3),
        "name_right": (2 / 4, 4),
        "arguments_right": (1 / 4, 4),
        "turn_right": (1 / 4, 4),
        "valid_call": (3 / 4, 4),
        "precision": (2 / 5, 5),  # of five attempts (three calls, two malformed) two were due
        "recall": (2 / 4, 4),
        "f1": (4 / 9, 9),
        "turn_right_seen_tools": (1 / 2, 2),
        "turn_right_unseen_tools": (0, 2),
    }
    assert (
        "turn_right_seen_tools"
        not in evaluation.judge_predictions(PREDICTIONS, TOOLS_OF, None)[1]["scores"]
    )


def test_a_turn_of_mixed_tools_is_about_unseen_ones():
    both = predict(call("book", city="Oslo") + call("fly", to="Rome"), "No.")
    _, report, _ = evaluation.judge_predictions([both], {"1": "[]"}, {"book"})
    assert report["scores"]["turn_right_unseen_tools"]["n"] == 1


def test_intervals_resample_conversations_not_turns():
    """Against the normal approximation, where the ten turns of a conversation are all alike."""
    coins = numpy.random.default_rng(5).random(400) < 0.3
    counts = {
        (str(n), turn): {"turn_right": (coin, 1)}
        for n, coin in enumerate(coins)
        for turn in range(10)
    }
    entry = evaluation.estimate(counts)["turn_right"]
    mean, half = coins.mean(), 1.96 * coins.std() / 400**0.5  # by turns sqrt(10) times narrower
    assert entry["value"] == pytest.approx(mean) and entry["n"] == 4000
    assert entry["interval"] == pytest.approx([mean - half, mean + half], abs=0.1 * half)
    assert evaluation.estimate(counts)["turn_right"] == entry  # seeded


def test_the_difference_is_paired():
    """It is narrower than what the two intervals suggest, for the two models agree on most."""
    coins = numpy.random.default_rng(6).random(300) < 0.5
    base = {(str(n), 1): {"recall": (coin, 1)} for n, coin in enumerate(coins)}
    tuned = {**base, **{(str(n), 1): {"recall": (1, 1)} for n in range(30)}}  # better on some of 30
    entry = evaluation.estimate(tuned, base)["recall"]
    assert entry["value"] == pytest.approx((~coins[:30]).sum() / 300)
    low, high = entry["interval"]
    alone = evaluation.estimate(base)["recall"]["interval"]
    assert 0 < low < entry["value"] < high and high - low < 0.6 * (alone[1] - alone[0])
    same = evaluation.estimate(base, base)["recall"]
    assert (same["value"], same["interval"]) == (0, [0, 0])


# ---- Predictions from elsewhere, and the report again


def write_split(folder, num_conversations, train=True):
    """A test split of a call and an answer each, and a train split that knows every other tool."""

    def row(number):
        name = f"tool_{number % 4}"
        return {
            "id": str(number),
            "tools": json.dumps([make_tool(name, "x")]),
            "messages": [
                {"role": "user", "content": f"Do {number}"},
                {"role": "assistant", "content": call(name, x=f"{number} " + "word " * 20)},
                {"role": "tool", "content": "done"},
                {"role": "assistant", "content": f"It is done, {number}. " + "Really done. " * 10},
            ],
        }

    folder.mkdir(exist_ok=True)
    for name, numbers in (
        ("test", range(num_conversations)),
        ("train", range(0, num_conversations, 2)),
    ):
        text = "".join(json.dumps(row(number)) + "\n" for number in numbers)
        (folder / f"function_calling_{name}.jsonl").write_text(text)
    return evaluation.read_queries(folder / "function_calling_test.jsonl")


def run_without_torch(*arguments, cwd):
    """Run the evaluation in a process that fails if it imports torch; returns what it printed."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import evaluation;"
        f"evaluation.main({arguments!r});"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_predictions_of_a_server_are_scored_as_text_without_torch(tmp_path, tiny_model):
    queries = write_split(tmp_path / "processed_data", 6)
    lines = [
        {"conversation_id": q["conversation_id"], "turn": q["turn"], "output": q["reference"]}
        for q in queries
    ]
    function = {"name": "tool_0", "arguments": json.dumps({"x": "0 " + "word " * 20})}
    lines[0] |= {
        "output": None,
        "finish_reason": "tool_calls",
        "tool_calls": [{"function": function}],
    }
    lines[1] |= {"output": "\ud800 no", "finish_reason": "stop", "score": 0.9, "model": "\ud800"}
    lines[2] |= {"output": "<tool_call>", "finish_reason": "length"}
    (tmp_path / "server.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in reversed(lines))
    )
    arguments = "--model", str(tiny_model), "--predictions", "server.jsonl", "--show-failures", "3"
    printed = run_without_torch(*arguments, cwd=tmp_path)
    results = tmp_path / "evaluation_results" / tiny_model.name / "server"
    metrics = json.loads((results / "metrics.json").read_text())
    assert metrics["scores"]["turn_right"]["value"] == 5 / 6
    assert metrics["failures"] == {"truncated": 1}
    assert metrics["scores"]["function_calling"]["value"] > 5 / 6
    assert metrics["scores"]["helpful_exchange"]["value"] == pytest.approx(5 / 6, abs=0.1)
    assert metrics["scores"]["turn_right_seen_tools"]["n"] == 3
    assert "truncated: conversation 1, turn 1" in printed and "OUTPUT\n<tool_call>" in printed
    again = run_without_torch(*arguments, "--overwrite", cwd=tmp_path)
    assert again == printed


@pytest.mark.skipif(not SHARED.joinpath("cases").is_dir(), reason="the shared cases are not there")
def test_the_shared_case_of_a_server_with_a_tool_parser(tmp_path, tiny_model):
    import prepare_function_calling_dataset as prepare

    cases = SHARED / "cases"
    prepare.main(
        ["--dataset", str(cases / "good.jsonl"), "--output-dir", str(tmp_path / "processed_data")]
    )
    predictions = cases / "c17_pred_toolcalls_null.jsonl"
    run_without_torch("--model", str(tiny_model), "--predictions", str(predictions), cwd=tmp_path)
    metrics = next(tmp_path.glob("evaluation_results/*/*/metrics.json")).read_text()
    assert {entry["value"] for entry in json.loads(metrics)["scores"].values()} == {1}


def test_4000_predictions_are_scored_again_in_seconds_to_the_last_digit(tmp_path):
    queries = write_split(tmp_path / "processed_data", 2000)
    test_file = tmp_path / "processed_data" / "function_calling_test.jsonl"
    generator = numpy.random.default_rng(1)
    for label, quality in (("base", 0.2), ("tuned", 0.9)):
        results = tmp_path / "evaluation_results" / "gemma-3-1b-it" / label
        results.mkdir(parents=True)
        outputs = [
            q["reference"] if generator.random() < quality else "No. " * 128 for q in queries
        ]
        lines = [
            {
                **predict(q["reference"], o),
                "conversation_id": q["conversation_id"],
                "turn": q["turn"],
            }
            for q, o in zip(queries, outputs, strict=True)
        ]
        (results / "predictions.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
        run = {
            "test_split_sha256": evaluation.sha256(test_file),
            "commit": "abc",
            "max_new_tokens": 256,
        }
        (results / "run.json").write_text(json.dumps(run))
        (results / "metrics.json").touch()
    run_without_torch("--rescore", "--baseline", cwd=tmp_path)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    printed = run_without_torch("--rescore", cwd=tmp_path)
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    before = (results / "metrics.json").read_bytes()
    run_without_torch("--rescore", cwd=tmp_path)
    assert (results / "metrics.json").read_bytes() == before
    metrics = json.loads(before)
    assert metrics["queries"] == 4000 and metrics["run"]["commit"] == "abc"
    low, high = metrics["difference_to_base"]["turn_right"]["interval"]
    assert 0.6 < low < 0.7 < high < 0.8
    for words in (
        "difference",
        "0.28 / 0.91 / 0.973",
        "turn right unseen tools",
        "no call",
    ):
        assert words in printed
    assert seconds < 10  # of a processor: 4,000 of tuned and of base, compared and drawn
