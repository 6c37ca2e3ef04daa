"""Step 3: what counts as a right call, a decision and a failure; intervals; scoring stored predictions again."""

import json
import subprocess
import sys
import time

import numpy
import pytest
from conftest import ROOT, assert_fails_in_one_line, make_tool, run_script
from hypothesis import assume, given
from hypothesis import strategies as st

import evaluation

SCRIPT = "evaluation.py"


def call(name="f", **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def judge(reference, output, finish_reason="end_of_turn", tools=()):
    return evaluation.judge_turn(reference, output, finish_reason, evaluation.read_tools(json.dumps(list(tools)))[0])


# ----------------------------------------------------------------------------------------------------------------------
# Reading calls


@pytest.mark.parametrize(
    "text, calls",
    [
        ("Hello!", []),
        ("", []),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', [{"name": "f", "arguments": {"a": 1}}]),
        ("<tool_call>\n{'name': 'f', 'arguments': {'a': True, 'b': None}}\n</tool_call>",
         [{"name": "f", "arguments": {"a": True, "b": None}}]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [{"name": "f", "arguments": {"a": 1}}]),
        ('<tool_call>{"name": "f", "arguments": "{\'a\': 1}"}</tool_call>', [{"name": "f", "arguments": {"a": 1}}]),
        (call("f") + "\n" + call("g", x="it's"), [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"x": "it's"}}]),
        ("Sure. " + call("f") + " Done.", [{"name": "f", "arguments": {}}]),
    ],
)
def test_calls_are_read_as_json_or_python_literals(text, calls):
    assert evaluation.parse_calls(text) == calls


@pytest.mark.parametrize(
    "text, reason",
    [
        ("<tool_call>", "<tool_call> without </tool_call>"),
        ('<tool_call>{"name": "f", "arguments": {}}', "<tool_call> without </tool_call>"),
        ('{"name": "f", "arguments": {}}</tool_call>', "</tool_call> without <tool_call>"),
        (call("f") + "</tool_call>", "</tool_call> without <tool_call>"),
        ("<tool_call></tool_call>", "neither JSON nor a Python literal"),
        ("<tool_call>f(a=1)</tool_call>", "neither JSON nor a Python literal"),
        ("<tool_call>{'name': 'f', \"arguments\": {it's}}</tool_call>", "neither JSON nor a Python literal"),
        ("<tool_call>[1]</tool_call>", "not an object"),
        ('<tool_call>{"arguments": {}}</tool_call>', "no function name"),
        ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', "no function name"),
        ('<tool_call>{"name": "f"}</tool_call>', "arguments are not an object"),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "arguments are not an object"),
        ('<tool_call>{"name": "f", "arguments": "Paris"}</tool_call>', "neither JSON nor a Python literal"),
        ("<tool_call>{'name': 'f', 'arguments': {'a': {1, 2}}}</tool_call>", "a value that JSON does not know"),
        ("<tool_call>{'name': 'f', 'arguments': {1: 2}}</tool_call>", "a value that JSON does not know"),
        ('<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 200 + "]" * 200 + "}}</tool_call>", "nested too deeply"),
        (call("f") + "<tool_call>oops</tool_call>", "neither JSON nor a Python literal"),  # one bad call spoils the turn
    ],
)
def test_anything_else_is_malformed_with_a_reason(text, reason):
    with pytest.raises(evaluation.MalformedCall, match=f"^{reason}$"):
        evaluation.parse_calls(text)


@pytest.mark.parametrize("unit", ["<tool_call>", "<tool_call></tool_call>", "<tool_call>{", "[", "{'a':", "</tool_call>", "<"])
def test_a_megabyte_of_rubbish_is_read_in_under_a_second(unit):
    text = unit * (1_000_000 // len(unit))
    start = time.perf_counter()
    for output in (text, f"<tool_call>{text}</tool_call>"):
        judge(call("f"), output)
    assert time.perf_counter() - start < 1


@given(st.text() | st.text(alphabet="<tool_call>/{}[]'\":, \n\0\ud8001"))
def test_no_string_whatsoever_raises(text):
    for output in (text, f"<tool_call>{text}</tool_call>", f'<tool_call>{{"name": "f", "arguments": {text}}}</tool_call>'):
        verdict = judge(call("f", a=1), output, tools=[make_tool("f", "a")])
        assert verdict["decision"] in evaluation.DECISIONS
        judge(output, output)


# ----------------------------------------------------------------------------------------------------------------------
# Right and wrong


@pytest.mark.parametrize(
    "output, name, arguments, whole, failure",
    [
        (call("f", a=1, b="x"), True, True, True, None),
        (call("f", b="x", a=1), True, True, True, None),  # the order of keys is free
        (call("f", a=1.0, b="x"), True, True, True, None),  # 1 equals 1.0
        (call("f", a=True, b="x"), True, False, False, "wrong_arguments"),  # true is not 1
        (call("f", a="1", b="x"), True, False, False, "wrong_arguments"),
        (call("f", a=1), True, False, False, "wrong_arguments"),
        (call("f", a=1, b="x", c=None), True, False, False, "wrong_arguments"),
        (call("g", a=1, b="x"), False, True, False, "wrong_function"),
        (call("g", a=2, b="x"), False, False, False, "wrong_function"),
        (call("f", a=1, b="x") * 2, False, False, False, "wrong_count"),
        ("I cannot do that.", False, False, False, "no_call"),
        ("", False, False, False, "no_call"),
        ("<tool_call>f(1)</tool_call>", False, False, False, "malformed"),
        ("Of course: " + call("f", a=1, b="x"), True, True, True, None),
    ],
)
def test_a_call_against_its_reference(output, name, arguments, whole, failure):
    verdict = judge(call("f", a=1, b="x"), output)
    assert (verdict["name_right"], verdict["arguments_right"], verdict["turn_right"]) == (name, arguments, whole)
    assert verdict["failure"] == failure


def test_nested_arguments_are_compared_in_depth():
    reference = call("f", a={"b": [1, {"c": [True, None]}]})
    assert judge(reference, call("f", a={"b": [1.0, {"c": [True, None]}]}))["turn_right"]
    assert not judge(reference, call("f", a={"b": [1, {"c": [1, None]}]}))["turn_right"]
    assert not judge(reference, call("f", a={"b": [{"c": [True, None]}, 1]}))["turn_right"]  # a list has an order


def test_several_calls_of_a_turn_are_matched_without_regard_to_their_order():
    one, two = call("f", a=1), call("g", b=2)
    assert judge(one + two, two + one)["failure"] is None
    assert judge(one + two, one + one)["failure"] == "wrong_function"
    assert judge(one + one, one + one)["turn_right"]
    assert judge(one + two, one)["failure"] == "wrong_count"
    # Right names and right arguments, but not together: the turn is wrong.
    swapped = judge(one + two, call("f", b=2) + call("g", a=1))
    assert (swapped["name_right"], swapped["arguments_right"], swapped["turn_right"]) == (True, True, False)
    assert swapped["failure"] == "wrong_arguments"


@pytest.mark.parametrize(
    "output, finish_reason, failure",
    [
        ("It is sunny.", "end_of_turn", None),
        ("It is sunny, and", "max_new_tokens", "truncated"),
        ("", "prompt_too_long", "truncated"),
        (call("f"), "end_of_turn", "unneeded_call"),
        ("<tool_call>oops", "end_of_turn", "malformed"),  # never a success where no call is needed
        ("<tool_call>oops", "max_new_tokens", "truncated"),
    ],
)
def test_a_turn_that_needs_no_call(output, finish_reason, failure):
    verdict = judge("It is sunny in Oslo.", output, finish_reason)
    assert verdict["failure"] == failure
    assert verdict["name_right"] is verdict["arguments_right"] is verdict["turn_right"] is None


def test_a_call_cut_off_by_the_token_limit_is_truncated_and_a_whole_one_is_right():
    assert judge(call("f", a=1), call("f", a=1)[:-5], "max_new_tokens")["failure"] == "truncated"
    assert judge(call("f", a=1), call("f", a=1) + " and then", "max_new_tokens")["failure"] is None


@pytest.mark.parametrize("spelling", [call("f", a=float("nan")), "<tool_call>{'name': 'f', 'arguments': {'a': 10}}</tool_call>",
                                      '<tool_call>{"name": "f", "arguments": "{\\"a\\": [1, 2.50]}"}</tool_call>', call("f") * 3])
def test_a_reference_never_fails_itself(spelling):
    verdict = judge(spelling, spelling)
    assert verdict["name_right"] and verdict["arguments_right"] and verdict["turn_right"] and verdict["failure"] is None


def test_a_faulty_reference_is_left_out_and_told():
    verdict = judge("<tool_call>f(1)</tool_call>", call("f"))
    assert verdict["faulty_reference"] == "neither JSON nor a Python literal"
    assert verdict["turn_right"] is None and verdict["failure"] is None
    stray = "Write </tool_call> to end a call."
    assert judge(stray, stray)["faulty_reference"] == "</tool_call> without <tool_call>" and judge(stray, stray)["failure"] is None
    predictions = [prediction("1", 1, text, text) for text in (stray,)] + [prediction("2", 1, call("f"), call("f"))]
    _, report, _ = evaluation.judge_predictions(predictions, {"1": "[]", "2": "[]"}, None)
    assert report["faulty_references"] == 1
    assert all(report["scores"][metric]["value"] == 1 for metric in ("turn_right", "precision", "recall", "f1"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-10**6, 10**6) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6)
arguments = st.dictionaries(st.text(min_size=1, max_size=4), json_values, min_size=1, max_size=4)


def respell(value, draw):
    """The same value otherwise: keys in another order, whole floats as integers and integers as floats."""
    if isinstance(value, dict):
        return {key: respell(value[key], draw) for key in draw(st.permutations(list(value)))}
    if isinstance(value, list):
        return [respell(item, draw) for item in value]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not draw(st.booleans()):
        return value
    return float(value) if isinstance(value, int) else int(value) if value.is_integer() else value


@given(arguments, st.data())
def test_spelling_never_changes_a_verdict(values, data):
    assume("tool_call>" not in json.dumps(values))
    reference = f"<tool_call>{json.dumps({'name': 'f', 'arguments': values})}</tool_call>"
    body = {"name": "f", "arguments": respell(values, data.draw)}
    if data.draw(st.booleans()):
        body = dict(reversed(body.items()))
    text = data.draw(st.sampled_from([
        json.dumps(body), json.dumps(body, indent=3), json.dumps(body, ensure_ascii=False, separators=(",", ":")), repr(body),
        json.dumps({**body, "arguments": json.dumps(body["arguments"])}),
    ]))
    space = data.draw(st.sampled_from(["", " ", "\n", " \n\t"]))
    verdict = judge(reference, f"<tool_call>{space}{text}{space}</tool_call>")
    assert verdict["turn_right"] and verdict["failure"] is None


@given(arguments, st.data())
def test_a_changed_value_name_or_extra_argument_always_changes_the_verdict(values, data):
    assume("tool_call>" not in json.dumps(values))
    reference = f"<tool_call>{json.dumps({'name': 'f', 'arguments': values})}</tool_call>"
    key = data.draw(st.sampled_from(list(values)))
    changed, name = dict(values), "f"
    match data.draw(st.sampled_from(["value", "missing", "extra", "name"])):
        case "value":
            changed[key] = [values[key]]
        case "missing":
            del changed[key]
        case "extra":
            changed["another key"] = None
        case "name":
            name = "f2"
    output = f"<tool_call>{json.dumps({'name': name, 'arguments': changed})}</tool_call>"
    assert judge(reference, output)["failure"] == ("wrong_function" if name == "f2" else "wrong_arguments")


# ----------------------------------------------------------------------------------------------------------------------
# Declared tools


TOOL = {"type": "function", "function": {"name": "book", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "nights": {"type": "integer"}, "class": {"enum": ["a", "b"]}},
    "required": ["city"]}}}


@pytest.mark.parametrize(
    "output, problems",
    [
        (call("book", city="Oslo", nights=2), []),
        (call("fly", city="Oslo"), ["unknown function"]),
        (call("book", nights=2), ["required argument missing"]),
        (call("book", city="Oslo", pets=True), ["argument not declared"]),
        (call("book", city=7), ["wrong type"]),
        (call("book", city="Oslo", **{"class": "c"}), ["wrong type"]),
        (call("book", pets=1, nights="two"), ["required argument missing", "argument not declared", "wrong type"]),
    ],
)
def test_a_call_is_held_against_the_declared_tools(output, problems):
    assert judge("No.", output, tools=[TOOL])["problems"] == [problems]


def test_broken_declarations_are_counted_and_never_fatal():
    declared = [
        TOOL, TOOL,  # declared twice
        "text", {"function": {}}, None,  # no declaration at all
        {"function": {"name": "typo", "parameters": {"type": "strin"}}},
        {"function": {"name": "list", "parameters": [1]}},
        {"name": "flat", "parameters": {"type": "object", "properties": {}}},  # without the "function" around it
        {"function": {"name": "far", "parameters": {"$ref": "http://127.0.0.1:9/never-fetched"}}},
        {"function": {"name": "pattern", "parameters": {"properties": {"a": {"pattern": "("}}}}},
    ]
    tools, num_broken = evaluation.read_tools(json.dumps(declared))
    assert num_broken == 7  # one repeated, three that declare nothing, three whose parameters are no schema
    assert {"book", "typo", "list", "flat", "far"} <= set(tools)
    for name in tools:
        evaluation.find_problems({"name": name, "arguments": {"a": "x"}}, tools)
    assert evaluation.find_problems({"name": "typo", "arguments": {"a": 1}}, tools) == []


@pytest.mark.parametrize("schema", [
    {"type": "object", "$ref": "#/type"}, {"$ref": "#/minProperties", "minProperties": 1}, {"$ref": "#/allOf/x", "allOf": [{}]},
    {"$ref": "#/default", "default": {"type": "strin"}}, {"$ref": "#/default", "default": {"minimum": "z"}}, {"$ref": "#"},
    {"properties": {"a": {"pattern": "a{99999999999}"}}}, {"properties": {"a": {"pattern": r"^(\w+\s?)*$"}}}, True, None, 3])
def test_a_declaration_that_only_breaks_in_use_is_held_against_nobody(schema):
    declared = [{"function": {"name": "f", "parameters": schema}}]
    start = time.perf_counter()
    for value in ("a" * 40 + "!", 1, [1] * 3000, None, {}):
        assert "wrong type" not in judge("No.", call("f", a=value), tools=declared)["problems"][0]
    assert time.perf_counter() - start < 1


def test_a_reference_in_a_declaration_is_never_fetched():
    from hub_server import Hub

    hub = Hub()
    judge("No.", call("f", a=1), tools=[{"function": {"name": "f", "parameters": {"$ref": f"{hub.url}/schema"}}}])
    hub.close()
    assert hub.requests == []


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e400", "9" * 400, "0x" + "f" * 5000])
def test_a_number_that_is_none_never_raises(number):
    tool = {"function": {"name": "f", "parameters": {"properties": {"a": {"type": "number", "multipleOf": 0.01}}}}}
    output = f"<tool_call>{{'name': 'f', 'arguments': {{'a': [{number}]}}}}</tool_call>".replace("'", '"')
    verdict = judge("No.", output, tools=[tool])
    assert verdict["decision"] == "malformed" or verdict["problems"] == [["wrong type"]]


@pytest.mark.parametrize("schema", [{"properties": {}, "additionalProperties": True}, {"patternProperties": {"^a": {}}},
                                    {"$ref": "#/$defs/P", "$defs": {"P": {"properties": {"a": {}}}}}])
def test_arguments_need_no_declaration_where_the_schema_says_so(schema):
    assert judge("No.", call("f", a=["x"]), tools=[{"function": {"name": "f", "parameters": schema}}])["problems"] == [[]]
    closed = {"properties": {}, "additionalProperties": False}
    verdict = judge("No.", call("f", a=1), tools=[{"function": {"name": "f", "parameters": closed}}])
    assert verdict["problems"] == [["argument not declared"]]


def test_a_python_tuple_is_a_list():
    tool = {"function": {"name": "f", "parameters": {"properties": {"a": {"type": "array"}}}}}
    verdict = judge(call("f", a=[1, 2]), "<tool_call>{'name': 'f', 'arguments': {'a': (1, 2)}}</tool_call>", tools=[tool])
    assert verdict["turn_right"] and verdict["problems"] == [[]]


# ----------------------------------------------------------------------------------------------------------------------
# Counts and intervals


def prediction(conversation_id, turn, reference, output, finish_reason="end_of_turn"):
    kind = "function_calling" if "<tool_call>" in reference else "helpful_exchange"
    return {"conversation_id": conversation_id, "turn": turn, "kind": kind, "reference": reference, "output": output, "score": 0.5,
            "finish_reason": finish_reason}


PREDICTIONS = [
    prediction("1", 1, call("book", city="Oslo"), call("book", city="Oslo")),
    prediction("1", 3, "Done.", "Done."),
    prediction("2", 1, call("book", city="Lima"), "<tool_call>book Lima</tool_call>"),
    prediction("2", 3, "Done.", call("book", city="Lima")),
    prediction("3", 1, call("fly", to="Rome"), "I cannot."),
    prediction("3", 3, "Done.", "<tool_call>"),
    prediction("4", 1, call("fly", to="Rome"), call("fly", to="Paris")),
    prediction("5", 1, "<tool_call>faulty</tool_call>", call("fly", to="Rome")),
]
BOOK, FLY = json.dumps([TOOL]), json.dumps([make_tool("fly", "to")])
TOOLS_OF = {"1": BOOK, "2": BOOK, "3": FLY, "4": FLY, "5": "[]"}


def test_the_report_counts_what_was_worked_out_by_hand():
    _, report, _ = evaluation.judge_predictions(PREDICTIONS, TOOLS_OF, seen_tools={"book"})
    assert report["decisions"] == {
        "call_needed": {"call": 2, "no_call": 1, "malformed": 1}, "no_call_needed": {"call": 1, "no_call": 1, "malformed": 1}}
    assert report["failures"] == {"no_call": 1, "unneeded_call": 1, "malformed": 2, "wrong_function": 0, "wrong_arguments": 1,
                                  "wrong_count": 0, "truncated": 0}
    assert report["faulty_references"] == 1 and report["broken_declarations"] == 0
    assert report["problems"]["unknown function"] == 1  # conversation 5 declares no tool
    assert report["malformed_reasons"] == {"neither JSON nor a Python literal": 1, "<tool_call> without </tool_call>": 1}
    values = {metric: (entry["value"], entry["n"]) for metric, entry in report["scores"].items()}
    assert values == {
        "function_calling": (0.5, 5), "helpful_exchange": (0.5, 3),
        "name_right": (2 / 4, 4), "arguments_right": (1 / 4, 4), "turn_right": (1 / 4, 4),
        "valid_call": (3 / 4, 4),
        "precision": (2 / 5, 5),  # of five attempts (three calls, two malformed) two were due
        "recall": (2 / 4, 4), "f1": (4 / 9, None),
    }
    seen, unseen = report["seen_tools"], report["unseen_tools"]  # conversations 1 and 2, 3 and 4; 5 declares none
    assert (seen["queries"], unseen["queries"], report["no_tools"]["queries"]) == (4, 3, 1)
    assert seen["scores"]["turn_right"]["value"] == 1 / 2 and unseen["scores"]["turn_right"]["value"] == 0 / 2
    assert seen["failures"]["unneeded_call"] == 1 and unseen["failures"]["no_call"] == 1
    assert "seen_tools" not in evaluation.judge_predictions(PREDICTIONS, TOOLS_OF, None)[1]


def check_sums(report):
    """Every count of a report against the n it must add up to."""
    n = {metric: entry["n"] for metric, entry in report["scores"].items()}
    decisions = {needed: sum(row.values()) for needed, row in report["decisions"].items()}
    attempts = sum(row["call"] + row["malformed"] for row in report["decisions"].values())
    malformed = sum(row["malformed"] for row in report["decisions"].values())
    assert decisions["call_needed"] + decisions["no_call_needed"] + report["faulty_references"] == report["queries"]
    assert n.get("function_calling", 0) + n.get("helpful_exchange", 0) == report["queries"]
    assert decisions["call_needed"] == n.get("turn_right", 0) == n.get("recall", 0)
    assert n.get("precision", 0) == attempts and sum(report["malformed_reasons"].values()) >= malformed
    right = round(report["scores"]["turn_right"]["value"] * n["turn_right"]) if "turn_right" in n else 0
    at_rest = report["queries"] - report["faulty_references"] - right - sum(report["failures"].values())
    assert 0 <= at_rest <= report["decisions"]["no_call_needed"]["no_call"]


def test_every_count_adds_up_to_its_n():
    verdicts, report, _ = evaluation.judge_predictions(PREDICTIONS, TOOLS_OF, {"book"})
    groups = [report["seen_tools"], report["unseen_tools"], report["no_tools"]]
    for part in (report, *groups):
        check_sums(part)
    assert report["queries"] == len(PREDICTIONS) == sum(group["queries"] for group in groups)
    assert sum(report["failures"].values()) == sum(bool(verdict["failure"]) for verdict in verdicts)


def test_intervals_resample_conversations_not_turns():
    """Against the interval of the mean, worked out by the normal approximation, for turns that are all alike in a conversation."""
    generator = numpy.random.default_rng(5)
    right = generator.random(400) < 0.3  # one coin a conversation, ten turns each
    sums = numpy.zeros((400, len(evaluation.METRICS), 2))
    position = list(evaluation.METRICS).index("turn_right")
    sums[:, position, 0], sums[:, position, 1] = 10 * right, 10
    entry = evaluation.estimate(sums)["turn_right"]
    mean, half = right.mean(), 1.96 * right.std() / 400 ** 0.5  # by turns it would be sqrt(10) times narrower
    assert entry["value"] == pytest.approx(mean) and entry["n"] == 4000
    assert entry["interval"] == pytest.approx([mean - half, mean + half], abs=0.1 * half)
    assert evaluation.estimate(sums) == evaluation.estimate(sums.copy())  # seeded


def test_the_paired_difference_is_narrower_than_what_the_two_intervals_suggest():
    generator = numpy.random.default_rng(6)
    position = list(evaluation.METRICS).index("f1")
    base, tuned = (numpy.zeros((300, len(evaluation.METRICS), 2)) for _ in range(2))
    base[:, position, 0] = generator.random(300) < 0.5
    tuned[:, position, 0] = base[:, position, 0]
    tuned[:30, position, 0] = 1  # better on some, worse on none
    base[:, position, 1] = tuned[:, position, 1] = 1
    entry = evaluation.estimate(tuned, base)["f1"]
    assert entry["value"] == pytest.approx(tuned[:, position, 0].mean() - base[:, position, 0].mean())
    low, high = entry["interval"]
    assert 0 < low < entry["value"] < high
    alone = evaluation.estimate(base)["f1"]["interval"]
    assert high - low < 0.6 * (alone[1] - alone[0])


def test_a_query_of_mixed_tools_is_about_unseen_ones_and_a_called_tool_is_a_seen_one(tmp_path):
    both = prediction("1", 1, call("book", city="Oslo") + call("fly", to="Rome"), "No.")
    _, report, _ = evaluation.judge_predictions([both], {"1": "[]"}, {"book"})
    assert (report["seen_tools"]["queries"], report["unseen_tools"]["queries"]) == (0, 1)
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": call("undeclared")}]
    (tmp_path / "function_calling_train.jsonl").write_text(json.dumps({"id": "1", "tools": BOOK, "messages": messages}))
    assert evaluation.read_seen_tools(tmp_path / "function_calling_test.jsonl") == {"book", "undeclared"}


def test_turns_of_one_conversation_move_together_in_every_interval():
    """All right in one conversation, all wrong in the other: a resample holds 0, half or all of them, nothing between."""
    predictions = [prediction(str(number % 2), number, call("f"), call("f") if number % 2 else "No.") for number in range(40)]
    _, report, counts = evaluation.judge_predictions(predictions, {"0": "[]", "1": "[]"}, None)
    assert report["scores"]["turn_right"]["interval"] == [0, 1]
    nothing = {key: {**count, "turn_right": (0, 1)} for key, count in counts.items()}
    assert evaluation.compare_with_base(counts, nothing)["turn_right"]["interval"] == [0, 1]


def test_the_difference_rests_on_the_queries_both_answered():
    _, _, counts = evaluation.judge_predictions(PREDICTIONS, TOOLS_OF, None)
    base = {key: count for key, count in counts.items() if key[0] in ("1", "2")}
    difference = evaluation.compare_with_base(counts, base)
    assert all(entry["value"] == 0 and entry["interval"] == [0, 0] for entry in difference.values())
    assert difference["function_calling"]["n"] == 2
    assert evaluation.compare_with_base(base, counts) == difference  # whichever of them answered more


# ----------------------------------------------------------------------------------------------------------------------
# Stored predictions


def write_split(folder, num_conversations):
    """A test split of conversations with a call and an answer each, and a train split that knows every other tool."""
    def row(number):
        tool = make_tool(f"tool_{number % 4}", "x")
        return {"id": str(number), "tools": json.dumps([tool]), "messages": [
            {"role": "user", "content": f"Do {number}"},
            {"role": "assistant", "content": call(f"tool_{number % 4}", x=f"{number} " + "word " * 20)},
            {"role": "tool", "content": "done"},
            {"role": "assistant", "content": f"It is done, {number}. " + "Really done. " * 10}]}

    folder.mkdir(exist_ok=True)
    (folder / "function_calling_test.jsonl").write_text("".join(json.dumps(row(n)) + "\n" for n in range(num_conversations)))
    (folder / "function_calling_train.jsonl").write_text("".join(json.dumps(row(2 * n)) + "\n" for n in range(num_conversations)))


def test_foreign_predictions_need_three_fields_and_no_torch(tmp_path, tiny_model):
    write_split(tmp_path / "processed_data", 6)
    queries = evaluation.read_queries(tmp_path / "processed_data" / "function_calling_test.jsonl")
    lines = [{"conversation_id": q["conversation_id"], "turn": q["turn"], "output": q["reference"]} for q in queries]
    lines[0]["output"] = "\ud800 no \x1b[31m"
    lines[1] |= {"finish_reason": "stop", "score": 0.0, "model": "\ud800"}  # more than is needed
    (tmp_path / "server.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import evaluation; "
            f"evaluation.main(['--model', {str(tiny_model)!r}, '--predictions', 'server.jsonl', '--show-failures', '3']); "
            "assert not {'torch', 'transformers'} & set(sys.modules)")
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    results = tmp_path / "evaluation_results" / tiny_model.name / "server"
    metrics = json.loads((results / "metrics.json").read_text())
    assert metrics["scores"]["helpful_exchange"]["value"] == 1.0 and metrics["scores"]["turn_right"]["value"] == 5 / 6
    assert metrics["seen_tools"]["scores"]["turn_right"]["n"] == metrics["unseen_tools"]["scores"]["turn_right"]["n"] == 3
    assert "no_call: conversation 0, turn 1" in process.stdout and "REFERENCE" in process.stdout
    assert "\x1b" not in process.stdout
    arguments = ["--model", tiny_model, "--predictions", "server.jsonl"]
    assert run_script(SCRIPT, *arguments, cwd=tmp_path).returncode == 0  # the same predictions: the same result
    (tmp_path / "server.jsonl").write_text(json.dumps(lines[1]) + "\n\n")
    assert_fails_in_one_line(run_script(SCRIPT, *arguments, cwd=tmp_path), "holds other predictions", "--overwrite")
    assert run_script(SCRIPT, *arguments, "--overwrite", cwd=tmp_path).returncode == 0
    assert json.loads((results / "metrics.json").read_text())["queries"] == 1


def test_rescoring_gives_the_same_numbers_to_the_last_digit_in_seconds(tmp_path):
    write_split(tmp_path / "processed_data", 2000)
    queries = evaluation.read_queries(tmp_path / "processed_data" / "function_calling_test.jsonl")
    generator = numpy.random.default_rng(1)
    for label, quality in (("base", 0.2), ("tuned", 0.9)):
        results = tmp_path / "evaluation_results" / "gemma-3-1b-it" / label
        results.mkdir(parents=True)
        predictions = [{**{key: q[key] for key in ("conversation_id", "turn", "kind", "reference")}, "finish_reason": "end_of_turn",
                        "score": float(generator.random()),
                        "output": q["reference"] if generator.random() < quality else "No. " * 128} for q in queries]
        (results / "predictions.jsonl").write_text("".join(json.dumps(p) + "\n" for p in predictions))
        sha256 = evaluation.sha256_of_file(tmp_path / "processed_data" / "function_calling_test.jsonl")
        (results / "metrics.json").write_text(json.dumps({"run": {"test_split_sha256": sha256, "commit": "abc"}}))
    contents = []
    for _ in range(2):
        start = time.perf_counter()
        process = run_script(SCRIPT, "--rescore", cwd=tmp_path)
        assert process.returncode == 0, process.stderr
        contents.append((results / "metrics.json").read_bytes())
    assert contents[0] == contents[1]
    metrics = json.loads(contents[0])
    assert metrics["queries"] == 4000 and metrics["run"]["commit"] == "abc"
    low, high = metrics["difference_to_base"]["turn_right"]["interval"]
    assert 0.6 < low < 0.7 < high < 0.8
    for words in ("difference", "0.28 -> 0.91 / 0.973", "whole turn right, tools never seen", "failures"):
        assert words in process.stdout
    assert time.perf_counter() - start < 10  # 4,000 of tuned and 4,000 of base, compared and drawn, on a busy machine
    with open(tmp_path / "processed_data" / "function_calling_test.jsonl", "a") as file:
        file.write("\n")
    assert_fails_in_one_line(run_script(SCRIPT, "--rescore", cwd=tmp_path), "another test split")
    (results / "predictions.partial.jsonl").touch()
    assert_fails_in_one_line(run_script(SCRIPT, "--rescore", cwd=tmp_path), "unfinished", "--resume")
    assert run_script(SCRIPT, "--rescore", "--limit", "3", cwd=tmp_path).returncode == 2
    assert run_script(SCRIPT, "--rescore", "--overwrite", cwd=tmp_path).returncode == 2
    assert run_script(SCRIPT, "--show-failures", "-1", cwd=tmp_path).returncode == 2


@pytest.mark.parametrize("damage", ["metrics.json", "predictions.jsonl", "other model", "unfinished"])
def test_a_base_that_cannot_be_compared_is_left_out_with_a_note(tmp_path, capsys, damage):
    write_split(tmp_path, 2)
    queries = evaluation.read_queries(tmp_path / "function_calling_test.jsonl")
    base = tmp_path / "base"
    base.mkdir()
    lines = [{"conversation_id": q["conversation_id"], "turn": q["turn"], "output": "x", "score": 0.5} for q in queries]
    (base / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (base / "metrics.json").write_text(json.dumps({"run": {"test_split_sha256": "s", "commit": "c"}}))
    facts = {"test_split_sha256": "s", "commit": "c"}
    assert len(evaluation.load_base(base, facts, queries)) == 4 and capsys.readouterr().out == ""
    if damage == "other model":
        facts["commit"] = "d"
    elif damage == "unfinished":
        (base / "predictions.partial.jsonl").touch()
    else:
        (base / damage).write_text("{") if damage == "metrics.json" else (base / damage).unlink()
    assert evaluation.load_base(base, facts, queries) is None
    assert "is left out of the comparison" in capsys.readouterr().out


def test_judging_4000_predictions_takes_seconds(tmp_path):
    write_split(tmp_path, 2000)
    queries = evaluation.read_queries(tmp_path / "function_calling_test.jsonl")
    predictions = [{**query, "output": query["reference"] + " word" * 200, "score": 0.5, "finish_reason": "end_of_turn"} for query in queries]
    start = time.perf_counter()
    _, report, _ = evaluation.judge_predictions(predictions, {query["conversation_id"]: query["tools"] for query in queries}, {"tool_0"})
    assert report["queries"] == 4000 and time.perf_counter() - start < 5


def test_predictions_that_do_not_fit_the_split_are_refused(tmp_path, tiny_model):
    write_split(tmp_path / "processed_data", 2)
    arguments = ["--model", tiny_model, "--predictions", "p.jsonl"]
    for line, words in (("{", []), ("[]", ["must be an object"]), ('{"conversation_id": "9", "turn": 1, "output": ""}', ["no such conversation_id"]),
                        ('{"conversation_id": "0", "turn": 1}', ["it has no output"]), ('{"conversation_id": "0", "turn": 1, "output": 3}', []),
                        ('{"conversation_id": "0", "turn": 1, "output": ""}\n' * 2, ["stand twice"]),
                        ('{"conversation_id": ["0"], "turn": 1, "output": ""}', ["conversation_id"]), ("3", []), ("null", []),
                        ('{"conversation_id": "0", "turn": true, "output": ""}', ["turn a whole number"]),
                        ('{"conversation_id": "0", "turn": 1, "output": "", "finish_reason": []}', []),
                        ('{"conversation_id": "0", "turn": 1, "output": "", "finish_reason": "?"}', ["none of end_of_turn"])):
        (tmp_path / "p.jsonl").write_text(line + "\n")
        assert_fails_in_one_line(run_script(SCRIPT, *arguments, cwd=tmp_path), "p.jsonl, line ", *words)
    assert_fails_in_one_line(run_script(SCRIPT, "--model", tiny_model, "--rescore", "--baseline", cwd=tmp_path), "predictions.jsonl: not found")
    assert_fails_in_one_line(run_script(SCRIPT, "--model", tiny_model, "--predictions", "/dev/null", cwd=tmp_path), "/dev/null: a pipe or a device")
    (tmp_path / "base.jsonl").write_text("")
    assert_fails_in_one_line(run_script(SCRIPT, "--model", tiny_model, "--predictions", "base.jsonl", cwd=tmp_path), "another one")
