"""Tests of step 1: rows in the layouts of common tools. No content of a row is lost silently."""

import json
import time
from collections import Counter
from pathlib import Path

import datasets
import pytest
from conftest import SAMPLE_MODEL, SHARED, make_tool, run_here, write_rows
from hypothesis import given
from hypothesis import strategies as st

import evaluation
import prepare_function_calling_dataset as prepare

TOOL = make_tool("depth", "port")
SHOWN = prepare.BEFORE_TOOLS + json.dumps([TOOL]) + prepare.AFTER_TOOLS + "\n\n"
ASK = {"role": "user", "content": "How deep is Ulm?"}
ANSWER = {"role": "assistant", "content": "9 metres."}


def call(port="Ulm", name="depth", spelled=None):
    """The text of a call in a split. `spelled` is the JSON text of its arguments."""
    spelled = json.dumps({"port": port}, ensure_ascii=False) if spelled is None else spelled
    return f'<tool_call>\n{{"name": "{name}", "arguments": {spelled}}}\n</tool_call>'


def result(text):
    return f"<tool_response>\n{text}\n</tool_response>"


def tool_call(port="Ulm", call_id="1"):
    function = {"name": "depth", "arguments": json.dumps({"port": port})}
    return {"id": call_id, "type": "function", "function": function}


def calls(*tool_calls, **message):
    return {"role": "assistant", "content": None, "tool_calls": list(tool_calls), **message}


def tool(content, call_id="1", **message):
    return {"role": "tool", "tool_call_id": call_id, "content": content, **message}


def row_of(*messages, **columns):
    return {"messages": list(messages), **columns}


def convert(row):
    """Return the texts of the turns of a row, and the counted notices."""
    notices = Counter()
    record = prepare.convert_row(row, "\n\n", notices)
    return [turn["content"] for turn in record["messages"]], dict(notices)


def texts(*messages, **columns):
    """Return the texts of the turns of a row, and assert that all its keys were read."""
    said, notices = convert(row_of(*messages, **columns))
    assert not [reason for kind, reason in notices if kind == "unread"]
    return said


# ---- Thoughts

THOUGHTS = [
    {"reasoning_content": " Look. "},
    {"reasoning": "Look."},
    {"thinking": "Look."},
    {"reasoning_content": "Look.", "reasoning": "Look."},
    {"content": [{"type": "thinking", "thinking": "Look."}]},
    {"content": [{"type": "reasoning", "text": "Look."}, {"type": "text", "text": ""}]},
]


@pytest.mark.parametrize("thought", THOUGHTS)
def test_thoughts_are_written_before_the_call_of_their_turn(thought):
    expected = ["How deep is Ulm?", "<think>Look.</think>\n" + call()]
    assert texts(ASK, {**calls(tool_call()), **thought}) == expected


def test_a_thought_is_written_even_if_the_text_contains_it_and_loses_its_own_tags():
    said = {"role": "assistant", "content": "The answer is 42.", "reasoning_content": "42"}
    assert texts(ASK, said)[1] == "<think>42</think>\nThe answer is 42."
    said["reasoning_content"] = "<think>\nLook.\n</think>"
    assert texts(ASK, said)[1] == "<think>Look.</think>\nThe answer is 42."


def test_a_thought_is_written_once_before_the_text():
    thought = {"reasoning_content": "Result: 9."}
    assert texts(ASK, {**ANSWER, **thought})[1] == "<think>Result: 9.</think>\n9 metres."
    written = {"role": "assistant", "content": "<think>Result: 9.</think>9 metres."}
    assert texts(ASK, {**written, **thought})[1] == written["content"]
    thought = {"reasoning_content": "9 metres."}  # in the answer, but in no <think> block
    assert (
        texts(ASK, {**written, **thought})[1] == "<think>9 metres.</think>\n" + written["content"]
    )
    turn = {"from": "function_call", "value": '<think>\nLook.\n</think>\n{"name": "f"}'}
    said, _ = convert({"conversations": [{"from": "human", "value": "Hi"}, turn]})
    assert said[1] == "<think>\nLook.\n</think>\n" + call(name="f", spelled="{}")


DRAFTS = [
    f"So: {call()} is right.",
    "The call goes within <tool_call></tool_call> tags.",
    "A <tool_call> is needed.",
]


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_call_in_a_thought_is_only_a_draft(draft):
    """The real call must stay, and be judged."""
    expected = f"<think>{draft}</think>\n{call()}"
    messages = [
        {**calls(tool_call()), "reasoning_content": draft},
        calls(tool_call(), content=f"<think>{draft}</think>"),
        {"role": "assistant", "content": expected},
    ]
    row = row_of(ASK, tools=[TOOL])
    turn = {"from": "function_call", "value": f'<think>{draft}</think>\n{{"name": "depth"}}'}
    for message in messages:
        said, notices = convert({**row, "messages": [ASK, message]})
        assert said[1] == expected and not notices
        assert len(evaluation.parse_calls(said[1])) == 1
    said, notices = convert({"conversations": [{"from": "human", "value": "Hi"}, turn]})
    assert said[1] == f"<think>{draft}</think>\n" + call(spelled="{}")
    assert texts(ASK, {**ANSWER, "reasoning_content": draft})[1].endswith("\n9 metres.")


# ---- Tools

DEPTH = TOOL["function"]
TOOLS_ELSEWHERE = [
    row_of(ASK, ANSWER, available_tools=[TOOL]),
    row_of(ASK, ANSWER, functions=json.dumps([TOOL])),
    row_of(ASK, ANSWER, tools_json=json.dumps([TOOL])),
    row_of(ASK, ANSWER, tool_defs=[json.dumps(TOOL)]),
    row_of(ASK, ANSWER, chat_template_kwargs={"tools": [TOOL]}),
    row_of(ASK, ANSWER, chat_template_kwargs={"xml_tools": [json.dumps(TOOL)]}),
    row_of(ASK, ANSWER, tools=[{**TOOL, "function": json.dumps(DEPTH)}]),
    row_of(
        ASK,
        ANSWER,
        tools=[{**TOOL, "function": {**DEPTH, "parameters": json.dumps(DEPTH["parameters"])}}],
    ),
    row_of({"role": "system", "content": "", "tools": [TOOL]}, ASK, ANSWER),
    row_of(ASK, ANSWER, tools=json.dumps(json.dumps([TOOL]))),
    row_of(ASK, ANSWER, tools={"tools": [TOOL]}),
    row_of(ASK, ANSWER, tools=json.dumps({"tools": [json.dumps(TOOL)]})),
    row_of(ASK, ANSWER, tools=[], functions=[TOOL]),
    row_of(ASK, ANSWER, tools=[TOOL], functions=[TOOL]),
]


@pytest.mark.parametrize("row", TOOLS_ELSEWHERE)
def test_tools_are_found_in_all_places_that_datasets_use(row):
    notices = Counter()
    record = prepare.convert_row(row, "\n\n", notices)
    assert json.loads(record["tools"]) == [TOOL] and not notices
    assert record["messages"][0]["content"] == SHOWN + "How deep is Ulm?"


@pytest.mark.parametrize("written", [json.dumps(TOOL), json.dumps([TOOL, TOOL], indent=1)])
def test_tools_written_as_json_in_the_system_text_are_found_and_stay_there(written):
    """As in copies of Glaive's data in other layouts."""
    system = f"You have access to the following functions. Use them if required -\n{written}"
    user = {**ASK, "content": f"{ASK['content']} {json.dumps(make_tool('other', 'x'))}"}
    row = row_of({"role": "system", "content": system}, user, calls(tool_call()))
    notices = Counter()
    record = prepare.convert_row(row, "\n\n", notices)
    assert {tool["function"]["name"] for tool in json.loads(record["tools"])} == {"depth"}
    assert record["messages"][0]["content"] == f"{system}\n\n{user['content']}"
    assert not notices


def test_a_json_example_in_the_system_text_is_not_a_tool():
    example = 'Answer in JSON such as {"name": "Ulm", "description": "A city"}.'
    record = prepare.convert_row(row_of({"role": "system", "content": example}, ASK, ANSWER))
    assert record["tools"] == "[]"


def test_parameters_as_text_that_cannot_be_read_hide_no_tool():
    odd = {"name": "f", "parameters": "{port: string}"}
    record = prepare.convert_row(row_of(ASK, ANSWER, tools=[odd, TOOL]))
    assert json.loads(record["tools"]) == [odd, TOOL]


MENTIONS = [
    "Signatures stand within <tools></tools> tags.",
    "They are between <tools> and </tools>.",
    "A line without an opening: </tools>",
    "They look like this: <tools>[...]</tools>",
    '<tools>[{"name": "another"}]</tools>',
    '<tools>[{"name": "depth_chart", "in-depth": "depths"}]</tools>',
]


@pytest.mark.parametrize("mention", MENTIONS)
def test_tools_are_written_even_if_the_prompt_mentions_the_tags(mention):
    system = {"role": "system", "content": mention}
    assert texts(system, ASK, ANSWER, tools=[TOOL])[0] == f"{mention}\n\n{SHOWN}How deep is Ulm?"
    asked = {"role": "user", "content": mention}
    assert texts(asked, ANSWER, tools=[TOOL])[0] == SHOWN + mention


@pytest.mark.parametrize("block", [json.dumps([TOOL]), "\ndepth(port: str)\n", json.dumps(TOOL)])
def test_tools_that_the_prompt_already_shows_are_not_written_again(block):
    system = {"role": "system", "content": f"<tools>{block}</tools>"}
    said = texts(system, ASK, ANSWER, tools=[TOOL])[0]
    assert said == f"<tools>{block}</tools>\n\nHow deep is Ulm?"


def test_tools_that_are_read_from_the_prompt_are_not_written_again():
    block = json.dumps([make_tool("straße", "x"), {"type": "web_search"}])  # with \\u00df
    system = {"role": "system", "content": f"<tools>{block}</tools>"}
    assert texts(system, ASK, ANSWER)[0] == f"<tools>{block}</tools>\n\nHow deep is Ulm?"


def test_tools_are_written_again_if_the_prompt_shows_only_some_of_them():
    tools = [TOOL, make_tool("tide", "port")]
    system = {"role": "system", "content": f"<tools>{json.dumps([TOOL])}</tools>"}
    assert json.dumps(tools) in texts(system, ASK, ANSWER, tools=tools)[0]


def test_tools_that_the_prompt_lists_one_per_line_are_read():
    """The prompts of Qwen and Hermes list them so."""
    other = make_tool("f", "x")
    system = f"<tools>\n{json.dumps(TOOL)}\n{json.dumps(other)}\n</tools>"
    record = prepare.convert_row(row_of({"role": "system", "content": system}, ASK, ANSWER))
    assert json.loads(record["tools"]) == [TOOL, other]


def test_tools_in_json_text_keep_their_nulls():
    declared = [{**TOOL, "default": None}]
    for tools in (json.dumps(declared), [json.dumps(declared[0])]):
        record = prepare.convert_row(row_of(ASK, ANSWER, tools=tools))
        assert json.loads(record["tools"]) == declared
    assert json.loads(prepare.convert_row(row_of(ASK, ANSWER, tools=declared))["tools"]) == [TOOL]


def test_a_tool_that_is_declared_in_two_forms_is_written_once():
    record = prepare.convert_row(row_of(ASK, ANSWER, tools=[TOOL], functions=[TOOL["function"]]))
    assert json.loads(record["tools"]) == [TOOL]


UNREADABLE_TOOLS = ["depth(port)", [TOOL, "depth"], [{"depth": {"port": "string"}}], [7]]


@pytest.mark.parametrize("tools", UNREADABLE_TOOLS)
def test_tools_that_cannot_be_read_are_null_and_counted(tools):
    """Null tells evaluation.py not to check calls against the tools of this row."""
    notices = Counter()
    record = prepare.convert_row(row_of(ASK, calls(tool_call()), tools=tools), "\n\n", notices)
    assert record["tools"] is None
    (reason,) = notices
    assert reason[0] == "noticed" and reason[1].startswith("tools that cannot be read")


def test_an_empty_list_of_tools_means_no_tools():
    for tools in ({}, [], [{}], "", "null", "[]", None):
        assert prepare.convert_row(row_of(ASK, ANSWER, tools=tools))["tools"] == "[]"


def test_calls_to_undeclared_tools_are_counted():
    undeclared = ("noticed", "calls to a tool that the row does not declare")
    for tools, expected in (([TOOL], {}), ([make_tool("f", "x")], {undeclared: 1})):
        assert convert(row_of(ASK, calls(tool_call()), tools=tools))[1] == expected
    gemini = [{"function_declarations": [{"name": "f"}, {"name": "depth"}]}]
    assert convert(row_of(ASK, calls(tool_call()), tools=gemini))[1] == {}


# ---- Calls

PORT = {"port": "Ulm"}
CALLS = [
    {"name": "depth", "args": PORT, "id": "c0", "type": "tool_call"},
    {"name": "depth", "input": PORT},
    {"type": "function", "function": {"name": "depth"}, "arguments": PORT},
    {"type": "function", "function": {"name": "depth", "arguments": "{}"}, "args": None},
    {"function": "depth", "arguments": '{"port": "Ulm"}'},
    {"function": {"name": "depth", "arguments": json.dumps(json.dumps(PORT))}},
    {"function": {"name": "depth", "arguments": "{'port': 'Ulm'}"}},
    {"name": "depth", "arguments": PORT, "index": None},
]


@pytest.mark.parametrize("given", CALLS)
def test_arguments_are_found_under_other_names_and_next_to_the_function(given):
    expected = call(spelled="{}") if "'{}'" in str(given) else call()
    assert texts(ASK, calls(given))[1] == expected
    assert texts(ASK, {**calls(), "tool_calls": json.dumps([given])})[1] == expected


def test_a_call_has_no_arguments_only_if_no_key_could_contain_them():
    for function in ({"name": "f"}, {"name": "f", "arguments": ""}, {"name": "f", "args": {}}):
        assert texts(ASK, calls({"function": function}))[1] == call(name="f", spelled="{}")


BAD_CALLS = [
    ({"function": {"arguments": PORT}}, "without a name"),
    ({"type": "custom", "custom": {"name": "depth", "input": "Ulm"}}, 'type "custom"'),
    ({"name": "depth", "port": "Ulm"}, 'may be in the unknown key "port"'),
    (
        {"function": {"name": "depth", "kwargs": PORT}},
        'may be in the unknown key "kwargs"',
    ),
    (
        {"name": "depth", "parameters": PORT},
        'may be in the unknown key "parameters"',
    ),
    ({"name": "depth", "arguments": ["Ulm"]}, "arguments are not an object"),
    ({"name": "depth", "arguments": "Ulm"}, "neither JSON nor a Python literal"),
    ({"function": {"name": "f", "arguments": {"a": 1}}, "args": {"a": 2}}, "in two places"),
    ("depth", "neither JSON nor a Python literal"),
    (7, "not an object with a name"),
]


@pytest.mark.parametrize("given, reason", BAD_CALLS)
def test_a_row_with_an_unreadable_call_is_dropped(given, reason):
    with pytest.raises(ValueError, match=reason):
        convert(row_of(ASK, calls(given)))


ESCAPES = [
    (r'{"port": "Gr\u00f6\u00dfe \u6e2f"}', '{"port": "Größe 港"}'),
    (r'{"port":"\uD83D\uDE00","n":null}', '{"port":"😀","n":null}'),  # spacing and null are kept
    (r'{"port": "C:\\users \u0041\u002f"}', r'{"port": "C:\\users A/"}'),
    (r'{"port": "\\\u00e9\\\\u00e9"}', r'{"port": "\\é\\\\u00e9"}'),
    (r'{"port": "\u0022\u005c\u000a\ud800"}', r'{"port": "\u0022\u005c\u000a\ud800"}'),
]


@pytest.mark.parametrize("spelled, expected", ESCAPES)
def test_arguments_in_json_text_are_written_without_unicode_escapes(spelled, expected):
    assert json.loads(spelled) == json.loads(expected)
    function = {"name": "depth", "arguments": spelled}
    assert texts(ASK, calls({"function": function}))[1] == call(spelled=expected)


def test_the_same_call_in_two_fields_may_be_spelled_differently():
    old = {"name": "depth", "arguments": '{"port":"Ulm"}'}
    assert texts(ASK, calls(tool_call(), function_call=old))[1] == call()
    one, true, float_one = ({"name": "f", "arguments": {"x": x}} for x in (1, True, 1.0))
    assert texts(ASK, calls(one, function_call=float_one))[1] == call(name="f", spelled='{"x": 1}')
    with pytest.raises(ValueError, match="differs from its other calls"):
        texts(ASK, calls(one, function_call=true))


def test_a_call_in_both_the_text_and_the_fields_is_written_once():
    text = {"content": "I look.\n" + call()}
    assert texts(ASK, calls(tool_call(), **text))[1] == "I look.\n" + call()
    function = tool_call()["function"]
    assert texts(ASK, calls(tool_call(), function_call=function))[1] == call()
    for other, words in (
        (calls(tool_call("Kiel"), **text), "text and tool_calls contain different calls"),
        (
            calls(tool_call(), function_call={"name": "f"}),
            '"function_call" differs from its other calls',
        ),
    ):
        with pytest.raises(ValueError, match=words):
            convert(row_of(ASK, other))


def test_the_function_call_field_and_the_function_role_are_read():
    turn = {"role": "assistant", "content": "I look.", "function_call": tool_call()["function"]}
    done = {"role": "function", "name": "depth", "content": '{"metres": 9}'}
    expected = ["How deep is Ulm?", "I look.\n" + call(), result('{"metres": 9}'), "9 metres."]
    assert texts(ASK, turn, done, ANSWER) == expected


FOREIGN = [
    ("Sure: depth(port='Ulm')", "f(a=1)"),
    ('```json\n{"action": "depth", "action_input": {}}\n```', "bare JSON"),
    ("<think>Hm.</think>\n[depth(port='Ulm')]", "ToolACE"),
    ("[depth(port='Ulm'), depth(port='Kiel')]", "ToolACE"),
    ('{"name": "depth", "arguments": {"port": "Ulm"}}', "bare JSON"),
    ('I look.\n```json\n{"name": "depth", "arguments": {"port": "Ulm"}}\n```', "bare JSON"),
    ('<functioncall> {"name": "depth"}', "<functioncall>"),
    ('[TOOL_CALLS] [{"name": "depth"}]', "[TOOL_CALLS]"),
    ("<start_function_call>call:depth{}<end_function_call>", "<start_function_call>"),
]


@pytest.mark.parametrize("text, name", FOREIGN)
def test_text_that_resembles_a_call_in_another_format_is_kept_and_counted(text, name):
    said, notices = convert(row_of(ASK, {"role": "assistant", "content": text}, tools=[TOOL]))
    ((kind, reason),) = notices
    assert said[1] == text and kind == "noticed"
    assert reason.startswith("turns with calls in an unsupported format") and name in reason


ORDINARY = [
    '{"name": "Ulm", "depth": [9]} (see [1](x))',
    'It is {"name": "depth", "value": 9}.',
    "Use sea.depth(port), or in_depth(port).",
    'It is {"name": {"first": "Ulm"}, "input": 1}.',
]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_not_read_as_a_call(text):
    said = {"role": "assistant", "content": text}
    assert convert(row_of(ASK, said, tools=[TOOL]))[1] == {}


def test_calls_and_keys_that_are_null_are_ignored():
    empty = {"id": None, "type": None, "function": {"name": None, "arguments": None}}
    filled = {"function_call": {"name": None, "arguments": None}, "tool_calls": [empty]}
    assert texts(ASK, {**ANSWER, **filled})[1] == "9 metres."
    for nothing in ("null", "None", "[]", "[null]", [None]):
        for key in ("tool_calls", "function_call"):
            assert texts(ASK, {**ANSWER, key: nothing})[1] == "9 metres."
    assert texts(ASK, calls(tool_call(), None))[1] == call()
    custom = {**tool_call(), "custom": {"name": None, "input": None}}
    assert texts(ASK, calls(custom))[1] == call()


def test_a_missing_value_may_be_nan():
    """Python's json writes NaN for the missing values of a pandas table."""
    nan = float("nan")
    asked = {**calls({**tool_call(), "function_call": nan}), "name": nan, "thinking": nan}
    row = row_of(ASK, asked, {**tool("9"), "name": nan}, ANSWER, id=nan, tools=nan, system=nan)
    assert convert(row) == convert(row_of(ASK, calls(tool_call()), tool("9"), ANSWER))
    with pytest.raises(ValueError, match="NaN or infinity"):
        texts(ASK, calls({"name": "f", "arguments": {"x": nan}}))


def test_nulls_in_json_text_are_kept():
    answers = '[{"name": "depth", "arguments": {"port": null}}]'
    said, notices = convert({"query": "Ulm?", "answers": answers})
    assert said[1] == call(spelled='{"port": null}')
    assert ("unread", "null values in arguments or results") not in notices


def test_a_mention_of_a_tag_is_not_read_as_a_block():
    text = "I use the <tool_call> tag."
    assert texts(ASK, calls(tool_call(), content=text))[1] == f"{text}\n{call()}"
    said = texts(ASK, calls(tool_call()), tool("see <tool_response>"), ANSWER)
    assert said[2] == result("see <tool_response>")


def test_a_refusal_becomes_the_text_of_its_turn():
    refusal = {"role": "assistant", "content": None, "refusal": "I can't."}
    assert texts(ASK, refusal)[1] == "I can't."


ANYTHING = [None, 7, [], {}, "x", [[]], [7], True, {"a": None}, [{"name": "f"}]]


@pytest.mark.parametrize("value", ANYTHING, ids=str)
def test_no_value_in_any_field_raises_an_unexpected_exception(value):
    """Otherwise one unusual row would end the preparation of thousands."""
    function = {"name": "depth", "arguments": PORT}
    parts = [{"type": "text", "text": "Hi"}]
    fields = [
        *[{**ASK, key: value} for key in ("role", "content", "weight", "name")],
        *[{**ASK, "content": [{**parts[0], key: value}]} for key in ("type", "text")],
        {**ASK, "content": [value]},
        *[{**ANSWER, key: value} for key in ("tool_calls", "function_call", "reasoning")],
        {**ANSWER, "tool_calls": [value]},
        *[calls({**tool_call(), key: value}) for key in ("id", "type", "function", "args")],
        *[calls({"function": {**function, key: value}}) for key in ("name", "arguments", "x")],
        *[{**tool("9"), key: value} for key in ("tool_call_id", "content", "name")],
    ]
    columns = [
        {key: value}
        for key in ("id", "tools", "system", "functions", "chat_template_kwargs", "chat")
    ]
    columns += [{"tools": [value]}, {"tools": [{"function": value}]}, {"messages": value}]
    rows = [row_of(ASK, calls(tool_call()), field, ANSWER) for field in fields]
    rows += [row_of(ASK, field, ANSWER) for field in fields]
    rows += [{**row_of(ASK, ANSWER), **column} for column in columns]
    rows += [{"query": value, "answers": value}, {"system": value, "chat": value}, value]
    for row in rows:
        try:
            json.dumps(prepare.convert_row(row))
        except ValueError as error:
            assert str(error) and "\n" not in str(error)


# ---- Results

RESULTS = [
    (0, "0"),
    (False, "false"),
    ([], "[]"),
    ({}, "{}"),
    ({"metres": 9, "at": "Köln"}, '{"metres": 9, "at": "Köln"}'),
    ([{"metres": 9}, 1.5], '[{"metres": 9}, 1.5]'),
    ([{"type": "text", "text": "9"}, {"text": "deep"}], "9\ndeep"),
    ([{"text": "9", "id": 1}], '[{"text": "9", "id": 1}]'),
    ("9", "9"),
    (None, ""),
]


@pytest.mark.parametrize("content, expected", RESULTS)
def test_a_result_may_be_any_json_value(content, expected):
    said = texts(ASK, calls(tool_call()), tool(content), ANSWER)
    assert said[2] == result(expected)


def test_results_follow_the_order_of_their_calls():
    asked = calls(tool_call("Ulm", "a"), tool_call("Kiel", 7))
    in_order = result("9") + "\n" + result("2")
    for results in (
        [tool("2", "7"), tool("9", "a")],
        [tool("9", None), tool("2", None)],
        [tool("9", "x"), tool("2", "x")],  # ids that match no call
    ):
        assert texts(ASK, asked, *results, ANSWER)[2] == in_order
    named = [{"function": {"name": "f"}}, {"function": {"name": "g"}}]
    results = [{"role": "tool", "name": "g", "content": "2"}, {"role": "tool", "name": "f"}]
    results[1]["content"] = "9"
    assert texts(ASK, calls(*named), *results, ANSWER)[2] == in_order
    results[0]["tool_name"] = results[0].pop("name")  # Ollama
    assert texts(ASK, calls(*named), *results, ANSWER)[2] == in_order
    _, notices = convert(row_of(ASK, calls(tool_call("Ulm", "a")), tool("9", "b"), ANSWER))
    assert notices["noticed", "results whose tool_call_id matches no call"] == 1


@pytest.mark.parametrize("given", ["fgf", "gff", "ffg"])
def test_results_with_the_same_name_or_id_are_in_the_order_of_their_calls(given):
    for key, result_key in (("name", "name"), ("id", "tool_call_id")):
        asked = [{"name": "f", key: value} for value in "fgf"]
        numbers = {"f": iter("13"), "g": iter("2")}
        results = [
            {"role": "tool", result_key: value, "content": next(numbers[value])} for value in given
        ]
        said = texts(ASK, calls(*asked), *results, ANSWER)
        assert said[2] == "\n".join(map(result, "123"))


def test_two_results_for_one_call_stay_together():
    asked = calls(tool_call("Ulm", "a"), tool_call("Kiel", "b"))
    said = texts(ASK, asked, tool("3", "b"), tool("1", "a"), tool("2", "a"), ANSWER)
    assert said[2] == "\n".join(map(result, "123"))


def test_results_follow_the_ids_of_calls_that_are_also_in_the_text():
    in_text = call("Ulm") + "\n" + call("Kiel")
    asked = calls(tool_call("Ulm", "a"), tool_call("Kiel", "b"), content=in_text)
    said, notices = convert(row_of(ASK, asked, tool("2", "b"), tool("9", "a"), ANSWER))
    assert said[1:3] == [in_text, result("9") + "\n" + result("2")]
    assert not any("tool_call_id" in reason for _, reason in notices)


@given(st.data())
def test_every_result_is_written_exactly_once(data):
    ids = st.sampled_from(["a", "b", "", None])
    asked = data.draw(st.lists(ids, min_size=1, max_size=3))
    names = st.sampled_from([{}, {"name": "depth"}, {"name": "f"}])
    given = data.draw(st.lists(st.tuples(ids, names), min_size=1, max_size=3))
    messages = [calls(*[tool_call(call_id=call_id) for call_id in asked])]
    messages += [tool(str(n), call_id, **name) for n, (call_id, name) in enumerate(given)]
    said, _ = convert(row_of(ASK, *messages, ANSWER))
    numbers = said[2].replace("<tool_response>", "").replace("</tool_response>", "").split()
    assert sorted(numbers) == [str(number) for number in range(len(given))]


def test_null_values_are_left_out_and_counted():
    row = row_of(ASK, calls(tool_call()), tool({"metres": 9, "note": None}), ANSWER)
    said, notices = convert(row)
    assert said[2] == result('{"metres": 9}')
    assert list(notices.values()) == [1, 1] and "null" in str(list(notices))


# ---- Turns


def test_neighboring_messages_with_the_same_role_become_one_turn():
    system = [{"role": "system", "content": text} for text in ("Be brief.", "", "It is Monday.")]
    asked = [{"role": "user", "content": "Hello."}, ASK]
    said = [{"role": "assistant", "content": text} for text in ("One", "moment.")]
    expected = ["Be brief.\n\nIt is Monday.\n\nHello.\n\nHow deep is Ulm?"]
    expected += [f"One\n\nmoment.\n{call()}\n{call('Kiel')}", result("9")]
    more = [calls(tool_call()), calls(tool_call("Kiel")), tool("9")]
    assert texts(*system, *asked, *said, *more, ANSWER) == [*expected, "9 metres."]


@pytest.mark.parametrize(
    "roles", [("tool_call", "tool_response"), ("Function-Call", "environment")]
)
def test_neighboring_calls_become_one_turn_and_so_do_neighboring_results(roles):
    turns = [("user", "Ulm and Kiel?")]
    turns += [(roles[0], {"name": "depth", "arguments": {"port": p}}) for p in ("Ulm", "Kiel")]
    turns += [(roles[1], "9"), (roles[1], "2"), ("assistant", "9 and 2.")]
    as_text = [(role, x if isinstance(x, str) else json.dumps(x)) for role, x in turns]
    expected = ["Ulm and Kiel?", call() + "\n" + call("Kiel"), result("9") + "\n" + result("2")]
    for spelled in (turns, as_text):
        said, _ = convert({"messages": [{"role": r, "content": x} for r, x in spelled]})
        assert said == [*expected, "9 and 2."]


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"train": False}, {"loss": False}, {"weight": 0.0}]
)
def test_a_turn_with_a_loss_mark_carries_no_loss(mark):
    row = row_of(
        ASK, {**ANSWER, **mark}, ASK, {**ANSWER, "weight": 1}, {**ASK, "weight": 0}, ANSWER
    )
    notices = Counter()
    messages = prepare.convert_row(row, notices=notices)["messages"]
    assert [turn.get("train") for turn in messages] == [None, False, None, None, None, None]
    assert notices == {("noticed", "turns excluded from training and evaluation"): 1}
    joined = prepare.convert_row(row_of(ASK, {**ANSWER, **mark}, ANSWER, ASK, ANSWER))["messages"]
    assert joined[1] == {"role": "assistant", "content": "9 metres.\n\n9 metres.", "train": False}
    with pytest.raises(ValueError, match="no assistant turn to train on"):
        convert(row_of(ASK, {**ANSWER, **mark}))


def test_a_weight_other_than_0_or_1_is_reported():
    unread = ("unread", 'key "weight" of a message with role assistant')
    assert convert(row_of(ASK, {**ANSWER, "weight": 0.5}))[1] == {unread: 1}


def test_the_system_text_may_be_in_a_column_a_message_and_parts():
    parts = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]
    assert texts(ASK, ANSWER, system=parts)[0] == "Be\nbrief.\n\nHow deep is Ulm?"
    message = {"role": "system", "content": "Be kind."}
    assert texts(message, ASK, ANSWER, system="Be kind.")[0] == "Be kind.\n\nHow deep is Ulm?"
    both = texts(message, ASK, ANSWER, system=parts)[0]
    assert both == "Be\nbrief.\n\nBe kind.\n\nHow deep is Ulm?"


# ---- Raw data sets

GLAIVE_SYSTEM = "SYSTEM: You are helpful. Use the functions if required -\n{}\n\n{}\n"
GLAIVE_CHAT = (
    "USER: How deep is Ulm?\n\n\nASSISTANT: I look. <functioncall> "
    '{"name": "depth", "arguments": \'{"port": "Ulm", "why": "it\'s deep"}\'} <|endoftext|>\n\n\n'
    'FUNCTION RESPONSE: {"metres": 9}\n\n\nASSISTANT: 9 metres.\nUSER: is a role. <|endoftext|>'
)


def test_a_raw_glaive_row_is_converted():
    system = GLAIVE_SYSTEM.format(json.dumps(TOOL, indent=4), json.dumps(make_tool("f", "x")))
    row = {"system": system, "chat": GLAIVE_CHAT.replace("\nUSER: is", " USER: is")}
    notices = Counter()
    record = prepare.convert_row(row, "\n\n", notices)
    assert json.loads(record["tools"]) == [TOOL, make_tool("f", "x")] and not notices
    first, *said = [turn["content"] for turn in record["messages"]]
    assert first.startswith("You are helpful. Use the functions if required -\n\n")
    assert first.endswith("\n\nHow deep is Ulm?") and record["tools"] in first
    arguments = json.dumps({"port": "Ulm", "why": "it's deep"})
    expected = ["I look.\n" + call(spelled=arguments), result('{"metres": 9}')]
    assert said == [*expected, "9 metres. USER: is a role."]


def test_only_the_tools_are_removed_from_the_system_text_of_a_raw_glaive_row():
    chat = "USER: Hi\n\n\nASSISTANT: Hello <|endoftext|>"
    system = 'SYSTEM: Answer as {"answer": 1}. {brace}\n' + json.dumps([TOOL, make_tool("f", "x")])
    record = prepare.convert_row({"system": system, "chat": chat, "tools": "[]"})
    assert record["messages"][0]["content"].startswith('Answer as {"answer": 1}. {brace}\n\n')
    assert json.loads(record["tools"]) == [TOOL, make_tool("f", "x")]


def test_an_object_without_description_and_parameters_is_not_a_tool_of_a_raw_glaive_row():
    chat = "USER: Hi\n\n\nASSISTANT: Hello <|endoftext|>"
    tools = [TOOL, {"name": "get_time"}, {"name": "f", "inputSchema": {}, "function": None}]
    start = 'The user is {"name": "Ada", "age": 36}. {"function": 1}'
    record = prepare.convert_row({"system": f"{start}\n{json.dumps(tools)}", "chat": chat})
    assert record["messages"][0]["content"].startswith(start)
    assert len(json.loads(record["tools"])) == 3


HUGE = [
    row_of(ASK, {"role": "assistant", "content": " " * 500_000 + "x"}),
    row_of(ASK, {"role": "assistant", "content": "[f(" * 200_000}),
    {"system": "{" * 300_000, "chat": "USER: Hi\n" + "\n" * 200_000 + "ASSISTANT: Hello"},
    row_of(ASK, ANSWER, tools="[" * 200_000),
    row_of({"role": "system", "content": "<tools>" * 100_000}, ASK, ANSWER, tools=[TOOL]),
    row_of(ASK, calls({"name": "f", "arguments": r'{"a": "' + r"\u00e9" * 100_000 + '"}'})),
]


@pytest.mark.parametrize("number", range(len(HUGE)))
def test_a_row_of_one_megabyte_is_read_in_seconds(number):
    start = time.process_time()
    try:
        prepare.convert_row(HUGE[number])
    except ValueError:
        pass
    assert time.process_time() - start < 3


def test_a_raw_xlam_row_is_converted():
    answers = [{"name": "depth", "arguments": {"port": port}} for port in ("Ulm", "Kiel")]
    tools = [{"name": "depth", "parameters": {"port": {"type": "str"}}}]
    for spell in (json.dumps, lambda value: value):
        row = {"id": 7, "query": "Ulm?", "answers": spell(answers), "tools": spell(tools)}
        record = prepare.convert_row(row, "\n\n")
        said = [turn["content"] for turn in record["messages"]]
        assert said[0].endswith("\n\nUlm?") and said[1] == call() + "\n" + call("Kiel")
        assert json.loads(record["tools"]) == tools and record["id"] == 7


NOT_READ = [
    ({"contents": [{"role": "user", "parts": [{"text": "Hi"}]}]}, 'Gemini\'s "contents"'),
    (row_of({"role": "user", "parts": [{"text": "Hi"}]}), '"parts" (Gemini, Vercel AI)'),
    (row_of(ASK, {**ANSWER, "content": [{"type": "tool_use", "name": "f"}]}), "Anthropic's"),
    (row_of({**ASK, "content": [{"type": "tool_result", "content": "9"}]}), "Anthropic's"),
    (row_of(ASK, {**ANSWER, "content": [{"toolUse": {"name": "f"}}]}), "Bedrock's"),
    ({"prompt": [ASK], "completion": [ANSWER]}, "TRL's"),
    ({"chosen": [ASK, ANSWER], "rejected": [ASK, ANSWER]}, "preference pairs"),
    ({"instruction": "Hi", "output": "Hello"}, "Alpaca's"),
]


@pytest.mark.parametrize("row, name", NOT_READ)
def test_an_unsupported_layout_prints_one_line_with_its_name_and_the_supported_ones(
    row, name, tmp_path
):
    source = write_rows(tmp_path / "rows.jsonl", [row] * 5)
    with pytest.raises(SystemExit) as end:
        prepare.main(["--dataset", str(source), "--output-dir", str(tmp_path / "out")])
    message = end.value.code
    assert message.startswith("error: none of the 5 rows of ") and "\n" not in message
    assert name in message and "not supported" in message
    assert '"messages" (OpenAI)' in message and "Glaive v2" in message
    assert not (tmp_path / "out").exists()


# ---- The same conversation in every layout

words = st.text("abcXYZ .,-é漢😀\"\\'", min_size=1, max_size=12).map(lambda text: f"w{text}w")
values = st.recursive(
    st.booleans() | st.integers() | words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)
drawn_calls = st.fixed_dictionaries(
    {"name": st.sampled_from(["f", "g"]), "arguments": st.dictionaries(words, values, max_size=2)}
)
drawn_exchanges = st.fixed_dictionaries(
    {
        "user": words,
        "calls": st.lists(st.tuples(drawn_calls, words), max_size=2),
        "before": words | st.just(""),
        "assistant": words,
    }
)
conversations = st.fixed_dictionaries(
    {"system": words | st.just(""), "exchanges": st.lists(drawn_exchanges, min_size=1, max_size=2)}
)
TOOLS = [make_tool("f", "x"), make_tool("g", "y")]


def write_openai(conversation, as_text, is_reversed):
    messages = [{"role": "system", "content": conversation["system"]}]
    for exchange in conversation["exchanges"]:
        messages.append({"role": "user", "content": exchange["user"]})
        made = []
        results = []
        for number, (drawn, said) in enumerate(exchange["calls"]):
            arguments = json.dumps(drawn["arguments"]) if as_text else drawn["arguments"]
            function = {"name": drawn["name"], "arguments": arguments}
            made.append({"id": f"c{number}", "type": "function", "function": function})
            results.append(tool(said, f"c{number}"))
        if made:
            messages.append(calls(*made, content=exchange["before"]))
            messages += reversed(results) if is_reversed else results
        messages.append({"role": "assistant", "content": exchange["assistant"]})
    return row_of(*messages, tools=TOOLS)


def write_sharegpt(conversation):
    turns = []
    for exchange in conversation["exchanges"]:
        turns.append(("human", exchange["user"]))
        if exchange["calls"]:
            turns.append(("gpt", exchange["before"]))
        turns += [("function_call", json.dumps(drawn)) for drawn, _ in exchange["calls"]]
        turns += [("observation", said) for _, said in exchange["calls"]]
        turns.append(("gpt", exchange["assistant"]))
    turns = [{"from": role, "value": value} for role, value in turns]
    return {"conversations": turns, "system": conversation["system"], "tools": json.dumps(TOOLS)}


def write_glaive(conversation):
    system = f"SYSTEM: {conversation['system']}\n" + "\n".join(json.dumps(t) for t in TOOLS)
    chat = ""
    for exchange in conversation["exchanges"]:
        chat += f"USER: {exchange['user']}\n\n\n"
        for number, (drawn, _) in enumerate(exchange["calls"]):
            before = exchange["before"] if number == 0 else ""
            arguments = json.dumps(drawn["arguments"])
            made = f'{{"name": "{drawn["name"]}", "arguments": \'{arguments}\'}}'
            chat += f"ASSISTANT: {before} <functioncall> {made} <|endoftext|>\n\n\n"
        for _, said in exchange["calls"]:
            chat += f"FUNCTION RESPONSE: {said}\n\n\n"
        chat += f"ASSISTANT: {exchange['assistant']} <|endoftext|>\n\n\n"
    return {"system": system, "chat": chat}


@given(conversations)
def test_a_conversation_gives_the_same_text_in_every_layout(conversation):
    expected = prepare.convert_row(write_openai(conversation, as_text=True, is_reversed=False))
    others = [write_openai(conversation, as_text, is_reversed=True) for as_text in (True, False)]
    others += [write_sharegpt(conversation), write_glaive(conversation)]
    for row in others:
        notices = Counter()
        assert prepare.convert_row(row, notices=notices) == expected
        assert not notices


@given(words, st.lists(drawn_calls, min_size=1, max_size=3))
def test_a_question_and_its_calls_give_the_same_text_in_xlam_and_openai(query, made):
    row = {"query": query, "answers": json.dumps(made), "tools": json.dumps(TOOLS)}
    as_openai = row_of({"role": "user", "content": query}, calls(*made), tools=TOOLS)
    assert prepare.convert_row(row) == prepare.convert_row(as_openai)


# ---- Unread keys

keys = st.text(min_size=1, max_size=8).map(lambda text: f"x_{text}")
contents = st.booleans() | st.integers() | st.text(min_size=1) | st.just([{"a": 0, "b": None}])
extras = st.dictionaries(keys, contents, max_size=3)


@given(st.lists(extras, min_size=5, max_size=5))
def test_every_unread_key_is_reported(drawn):
    in_row, in_message, in_call, in_function, in_part = drawn
    part = {"type": "text", "text": "How deep?", **in_part}
    function = {**tool_call()["function"], **in_function}
    row = row_of(
        {"role": "user", "content": [part]},
        calls({**tool_call(), "function": function, **in_call}),
        tool("9"),
        {**ANSWER, **in_message},
        **in_row,
    )
    _, notices = convert(row)
    unread = {reason for kind, reason in notices if kind == "unread"}
    expected = set()
    for place, extra in (
        ("row", in_row),
        ("message with role assistant", in_message),
        ("call", {**in_call, **in_function}),
        ("content part", in_part),
    ):
        expected |= {f"key {json.dumps(k, ensure_ascii=False)} of a {place}" for k in extra}
    assert unread == expected


# ---- Whole files


def run(source, folder, *options):
    """Run step 1 in this process; return its records by split, and dataset_info.json."""
    prepare.main(["--dataset", str(source), "--output-dir", str(folder), *map(str, options)])
    records = {}
    for name, file in prepare.SPLIT_FILES.items():
        lines = (folder / file).read_text("utf-8").splitlines()
        records[name] = [json.loads(line) for line in lines]
    return records, json.loads((folder / "dataset_info.json").read_text("utf-8"))


def numbered(*numbers):
    return [row_of({"role": "user", "content": f"Hello {n}"}, dict(ANSWER), id=n) for n in numbers]


def test_the_summary_counts_rows_and_names_the_first_one(tmp_path, capsys):
    rows = numbered(*range(8))
    rows[3]["mood"] = "good"
    rows[5]["mood"] = "bad"
    rows[5]["messages"][1]["mood"] = "bad"
    rows[6]["messages"][1]["content"] = call() + call()
    _, info = run(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    printed = capsys.readouterr().out
    assert '  unread    2: key "mood" of a row (first in row 4)\n' in printed
    assert (
        '  unread    1: key "mood" of a message with role assistant (first in row 6)\n' in printed
    )
    undeclared = "calls to a tool that the row does not declare"
    assert f"  noticed   2: {undeclared} (in 1 row, first in row 7)\n" in printed
    assert info["noticed"][undeclared] == {"count": 2, "rows": 1, "first_row": 7}
    assert info["is_published_split"] is False


def test_repeated_conversations_are_counted_or_dropped(tmp_path, capsys):
    rows = numbered(*range(10), 0, 1)
    rows[10]["system"] = "The system text does not count."
    source = write_rows(tmp_path / "rows.jsonl", rows)
    records, info = run(source, tmp_path / "out")
    assert info["noticed"] == {"repeated conversations": {"count": 2, "rows": 2, "first_row": 11}}
    asked = {name: [r["messages"][0]["content"] for r in records[name]] for name in records}
    said = {name: {text.split("Hello ")[1] for text in asked[name]} for name in asked}
    num_shared = sum(text.split("Hello ")[1] in said["train"] for text in asked["test"])
    assert info["test"]["also_in_train"] == num_shared
    records, info = run(source, tmp_path / "out", "--drop-duplicates")
    assert info["dropped"] == {"repeated conversations": {"count": 2, "rows": 2, "first_row": 11}}
    ids = sorted(int(record["id"]) for name in records for record in records[name])
    assert ids == list(range(10)) and info["test"]["also_in_train"] == 0
    assert "also in train" not in capsys.readouterr().out.split("Rows")[-1]


def test_the_user_can_pass_a_test_set(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    train = write_rows(tmp_path / "rows.jsonl", numbered(1, 2, 3))
    test = write_rows(tmp_path / "held_out.jsonl", numbered(3, 4))
    records, info = run(train, tmp_path / "out", "--test-dataset", test)
    assert [record["id"] for record in records["train"]] == ["1", "2", "3"]
    assert [record["id"] for record in records["test"]] == ["3", "4"]
    assert info["test"]["also_in_train"] == 1
    assert info["test_source"]["dataset"] == str(test) and info["test_source"]["rows_kept"] == 2
    printed = capsys.readouterr().out
    assert f"Rows        2 loaded from {test}, 2 kept" in printed
    assert "1 of the test conv" in printed
    records, _ = run(train, tmp_path / "out", "--test-dataset", test, "--drop-duplicates")
    assert [record["id"] for record in records["test"]] == ["4"]
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    train.rename(folder / "train.jsonl")
    test.rename(folder / "validation.jsonl")
    (folder / "MORE.JSONL").touch()
    capsys.readouterr()
    for options in (["--test-dataset", "validation"], ["--test-dataset", folder]):
        records, _ = run(folder, tmp_path / "out", *options)
        assert len(records["train"]) == 3
    not_read = "MORE.JSONL, validation.jsonl"
    names = f"train.jsonl of {folder}\nNot read    {not_read} of {folder}\n"
    assert capsys.readouterr().out.startswith(f"Read        {names}")
    assert [record["id"] for record in records["test"]] == ["1", "2", "3"]


def test_the_files_of_a_folder_may_have_different_layouts_and_keep_null_arguments(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_rows(folder / "a.jsonl", numbered(1, 2))
    call = '{"name": "get_weather", "arguments": {"city": "Oslo", "unit": null}}'
    turns = [("human", "Weather?"), ("function_call", call)]
    sharegpt = [{"from": role, "value": text} for role, text in turns]
    write_rows(tmp_path / "b.jsonl", [{"id": "b", "conversations": sharegpt, "tools": "[]"}])
    (folder / "b.jsonl").symlink_to(tmp_path / "b.jsonl")  # as in the cache of the Hub
    records, info = run(folder, tmp_path / "out", "--test-dataset", folder)
    assert [record["id"] for record in records["train"]] == ["1", "2", "b"]
    assert '"unit": null' in records["train"][2]["messages"][1]["content"]
    assert info["unread"] == {}


BAD_FOLDERS = [
    ("b.jsonl", '{"messages": [', [], "b.jsonl: line 1 is not valid JSON"),
    ("b.jsonl.gz", "no gzip", [], "b.jsonl.gz: Not a gzipped file"),
    ("b.parquet", "no parquet", [], "b.parquet: Parquet"),
    (
        "b.jsonl",
        "",
        ["--split", "dev"],
        'split "dev" was not found in this folder. Pick one of train',
    ),
]


@pytest.mark.parametrize("name, content, options, words", BAD_FOLDERS)
def test_an_error_in_a_folder_names_the_file(name, content, options, words, tmp_path):
    (tmp_path / "folder" / "train").mkdir(parents=True)
    suffix = "parquet" if name.endswith("parquet") else "jsonl"
    rows = write_rows(tmp_path / "folder" / "train" / f"a.{suffix}", numbered(1, 2))
    if suffix == "parquet":
        datasets.Dataset.from_list(numbered(1, 2)).to_parquet(str(rows))
    (tmp_path / "folder" / "train" / name).write_text(content)
    with pytest.raises(SystemExit, match=f"^error: [^\n]*{words}[^\n]*$"):
        run(tmp_path / "folder", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "split, ids",
    [("train+validation", "12345"), ("all", "12345"), ("train[1:]+validation[:50%]", "234")],
)
def test_splits_of_a_folder_can_be_joined_and_cut(split, ids, tmp_path):
    (tmp_path / "in").mkdir()
    write_rows(tmp_path / "in" / "train.jsonl", numbered(1, 2, 3))
    write_rows(tmp_path / "in" / "validation.jsonl", numbered(4, 5))
    test = write_rows(tmp_path / "test.jsonl", numbered(9))
    options = ["--split", split, "--test-dataset", test]
    records, _ = run(tmp_path / "in", tmp_path / "out", *options)
    assert "".join(record["id"] for record in records["train"]) == ids


def test_a_dataset_with_several_configurations_asks_for_one(tmp_path):
    configs = [f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in "ab"]
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    for name in "ab":
        write_rows(tmp_path / f"{name}.jsonl", numbered(1, 2, 3))
    with pytest.raises(
        SystemExit, match="several configurations. Pick one of 'a', 'b' with --config"
    ):
        run(tmp_path, tmp_path / "out")
    assert run(tmp_path, tmp_path / "out", "--config", "b")[1]["rows_kept"] == 3


BAD_TESTS = [
    (["--test-dataset", "validation"], "is a file without splits"),
    (["--test-dataset", "absent.jsonl"], "absent.jsonl: no such file"),
    (["--test-dataset", "a" * 300 + ".jsonl"], "aaa.jsonl: File name too long"),
    (["--test-size", "0.999"], "too few rows .3. to draw a test split"),
]


@pytest.mark.parametrize("options, words", BAD_TESTS)
def test_a_test_set_that_cannot_be_loaded_prints_one_line(options, words, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", numbered(1, 2, 3))
    with pytest.raises(SystemExit, match=f"^error: [^\n]*{words}[^\n]*$"):
        run(source, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--dataset", "--test-dataset"])
def test_an_empty_name_of_a_dataset_is_refused(flag, capsys):
    """A shell variable may be unset. Without a test set, one would be drawn silently."""
    with pytest.raises(SystemExit):
        prepare.parse_args([flag, ""])
    assert f"{flag}: must not be empty" in capsys.readouterr().err


def test_options_without_effect_are_refused(capsys):
    with pytest.raises(SystemExit):
        prepare.parse_args(["--test-dataset", "x.jsonl", "--seed", "1"])
    assert "no effect with --test-dataset" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        prepare.parse_args(["--dataset", "x.jsonl", "--split", "test"])
    assert "no effect on a file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        prepare.parse_args(["--dataset", str(Path(__file__).parent), "--revision", "v1"])
    assert "--revision has no effect on a local dataset" in capsys.readouterr().err


# ---- Small files from common tools

QUITO = call("Quito", "harbour_depth")
ULM = call("Ulm", "harbour_depth")
SAID = "The harbour of Quito is 9 metres deep."
NINE = result('{"metres": 9}')
OSLO = call(name="get_weather", spelled='{"city": "Oslo"}')
DEGREES = result('{"degrees": 0}')
IT_IS = "It is 0 degrees in Oslo."
CASES = {  # all turns of the first row but the first user turn
    "good": [OSLO, DEGREES, IT_IS],
    "c01_sharegpt_function_call": [OSLO, DEGREES, IT_IS],
    "c02_openai_messages": [OSLO, DEGREES, IT_IS],
    "c04_system_column": [OSLO, DEGREES, IT_IS],
    "c05_tools_column_only": [OSLO, DEGREES, IT_IS],
    "c06_arrow_nulls": [OSLO, DEGREES, IT_IS],
    "c07_tools_list_of_strings": [OSLO, DEGREES, IT_IS],
    "c08_type_dict": [OSLO, DEGREES, IT_IS],
    "c10_empty_system": [OSLO, DEGREES, IT_IS],
    "c18_no_arguments": ['<tool_call>\n{"name": "now"}\n</tool_call>', result("12:00"), "Noon."],
    "r01_reasoning_content": [
        "<think>The depth of Quito is not known to me, the tool knows it.</think>\n" + QUITO,
        NINE,
        "<think>The result says 9.</think>\n" + SAID,
    ],
    "r02_available_tools": [QUITO, NINE, SAID],
    "r02_functions": [QUITO, NINE, SAID],
    "r03_weight": ["WRONG no idea about Quito.", "Use the tool.", QUITO, NINE, SAID],
    "r05_langchain_args": [QUITO, NINE, SAID],
    "r06_tool_content_object": [QUITO, NINE, SAID],
    "r06_tool_content_zero": [QUITO, result("0"), SAID],
    "r07b_input_schema_only": [QUITO, NINE, SAID],
    "r08_swift_roles": [QUITO + "\n" + ULM, NINE + "\n" + result('{"metres": 2}'), SAID],
    "r10_text_then_call": ["One moment.\n" + QUITO, NINE, "9 metres."],
    "r12_tools_mentioned": ["<think>\nLook.\n</think>\n" + QUITO, NINE, "9 metres."],
    "r13_results_out_of_order": [
        QUITO + "\n" + ULM,
        NINE + "\n" + result('{"metres": 2}'),
        "Quito: 9 metres, Ulm: 2 metres.",
    ],
    "r14_xlam_raw": [QUITO],
    "r16_unicode_escapes": [call("Größe-Quito 港口", "harbour_depth"), NINE, SAID],
    "r17_two_systems": [QUITO, NINE, SAID],
    "r21_int_ids": [QUITO, NINE, SAID],
    "r23_flat_parameters": [QUITO, NINE, SAID],
    "r34_glaive_raw": [
        QUITO,
        result('{"metres": 3}'),
        "The harbour of Quito is 3 metres deep.",
        "Thank you.",
        "You're welcome.",
    ],
    "r35_system_parts": [QUITO, NINE, SAID],
}
CASE_SYSTEMS = {
    "c02_openai_messages": "You can call tools.\n\nYou are a function calling AI model.",
    "r12_tools_mentioned": "You are a function calling model.",
    "r17_two_systems": "Be brief.\n\nToday is Monday.\n\nYou are a function calling AI model.",
    "r34_glaive_raw": "You are a helpful assistant with access to",
    "r35_system_parts": "Be brief.\n\nYou are a function calling AI model.",
}
CASE_NOTICES = {
    "r02_available_tools": ['key "uuid" of a row'],
    "r02_functions": ['key "uuid" of a row'],
    "r03_weight": [
        'key "parallel_tool_calls" of a row',
        "turns excluded from training and evaluation",
    ],
    "r05_langchain_args": ["results whose tool_call_id matches no call"],
    "r16_unicode_escapes": ["results whose tool_call_id matches no call"],
}


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED}/cases is not there")
@pytest.mark.parametrize("name", CASES)
def test_a_file_from_a_common_tool_is_converted(name, tmp_path):
    source = SHARED / "cases" / f"{name}.jsonl"
    records, info = run(source, tmp_path)
    num_rows = len(source.read_text().splitlines())
    assert (info["rows_loaded"], info["rows_kept"], info["dropped"]) == (num_rows, num_rows, {})
    assert [*info["unread"], *info["noticed"]] == CASE_NOTICES.get(name, [])
    row = json.loads(source.read_text().splitlines()[0])
    record = prepare.convert_row(row, "\n\n")
    first, *said = [turn["content"] for turn in record["messages"]]
    assert said == CASES[name]
    assert len(json.loads(record["tools"])) == 1 and record["tools"].count("null") <= 1
    assert first.count(f"<tools>\n{record['tools']}\n</tools>") + first.count("<tools>[") == 1
    assert first.startswith(CASE_SYSTEMS.get(name, ("You are a function", "You may call")))
    marks = [turn.get("train", True) for turn in record["messages"]]
    assert marks.count(False) == (name == "r03_weight")


# ---- Each layout goes through all three steps

LAYOUT_WRITERS = {
    "openai": lambda conversation: write_openai(conversation, as_text=True, is_reversed=True),
    "sharegpt": write_sharegpt,
    "glaive": write_glaive,
    "xlam": lambda conversation: {
        "query": conversation["exchanges"][0]["user"],
        "answers": json.dumps([drawn for drawn, _ in conversation["exchanges"][0]["calls"]]),
        "tools": json.dumps(TOOLS),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUT_WRITERS)
def test_each_layout_goes_through_training_and_evaluation(layout, tmp_path, tiny_model):
    """Training takes one step, and the adapter is evaluated on all test queries."""
    rows = []
    for number in range(20):
        made = [({"name": "f", "arguments": {"x": f"{number}"}}, f"{number} metres")]
        exchange = {"user": f"How deep is {number}?", "calls": made, "before": ""}
        exchange["assistant"] = f"It is {number} metres deep."
        rows.append(LAYOUT_WRITERS[layout]({"system": "Be brief.", "exchanges": [exchange]}))
    source = write_rows(tmp_path / "rows.jsonl", rows)
    options = ["--model", tiny_model, "--max-steps", "1", "--dtype", "float32"]
    commands = [
        ["prepare_function_calling_dataset.py", "--dataset", source],
        ["function_calling_train.py", *options],
        ["evaluation.py", "--model", tiny_model, "--max-new-tokens", "8", "--dtype", "float32"],
    ]
    for command in commands:
        process = run_here(*command, cwd=tmp_path)
        assert process.returncode == 0, process.stderr
    test_file = tmp_path / "processed_data" / prepare.SPLIT_FILES["test"]
    records = [json.loads(line) for line in test_file.read_text().splitlines()]
    said = [t for r in records for t in r["messages"] if t["role"] == "assistant"]
    assert len(records) == 4 and len(said) == (4 if layout == "xlam" else 8)
    (path,) = (tmp_path / "evaluation_results").glob("*/*/metrics.json")
    metrics = json.loads(path.read_text())
    assert metrics["queries"] == len(said)
    assert metrics["scores"]["function_calling"]["n"] == 4


SHARED_CASES = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED}/cases is not there")


@SHARED_CASES
def test_parallel_calls_in_text_keep_both_results():
    row = json.loads((SHARED / "cases/c20_parallel.jsonl").read_text())
    said = [turn["content"] for turn in prepare.convert_row(row, "\n\n")["messages"]]
    spelled = [
        f'{{"name":"get_weather","arguments":{{"city":"{city}"}}}}' for city in ("Oslo", "Rome")
    ]
    blocks = [f"<tool_call>\n{text}\n</tool_call>" for text in spelled]
    expected = ["Weather in Oslo and Rome?", "I look both up.\n" + "\n".join(blocks)]
    assert said == [*expected, result("7") + "\n" + result("19"), "7 and 19."]


# Arguments that fit the tools of a file, and arguments that do not
VERDICTS = {
    "c06_arrow_nulls": ({"city": "Oslo"}, {"path": "x"}),
    "c08_type_dict": ({"city": "Oslo", "days": 2}, {"city": "Oslo", "days": "two"}),
    "c19b_nullable": ({"city": "Oslo", "day": None}, {"city": "Oslo", "day": 1}),
    "r07b_input_schema_only": ({"port": "Ulm"}, {"harbour": "Ulm"}),
    "r14_xlam_raw": ({"port": "Ulm"}, {"harbour": "Ulm"}),
    "r23_flat_parameters": ({"port": "Ulm"}, {"port": 7}),
}


@SHARED_CASES
@pytest.mark.parametrize("name", VERDICTS)
def test_a_call_is_checked_against_the_tools_of_a_file(name):
    row = json.loads((SHARED / "cases" / f"{name}.jsonl").read_text().splitlines()[0])
    record = prepare.convert_row(row)
    declared = evaluation.read_tools(record["tools"])
    (echo,) = evaluation.parse_calls(record["messages"][1]["content"])
    assert evaluation.find_problems(echo, declared) == []
    fits, does_not_fit = VERDICTS[name]
    assert evaluation.find_problems({**echo, "arguments": fits}, declared) == []
    assert evaluation.find_problems({**echo, "arguments": does_not_fit}, declared) != []


@SHARED_CASES
@pytest.mark.parametrize(
    "split, predictions, num_right",
    [
        ("good", "c17_pred_toolcalls_null.jsonl", 3),
        ("r21_int_ids", "r21_int_ids.predictions.jsonl", 3),
    ],
)
def test_predictions_are_matched_with_the_queries_of_a_file(
    split, predictions, num_right, tmp_path, monkeypatch
):
    """In one file, the server has parsed the calls. In the other one, ids are numbers."""
    monkeypatch.chdir(tmp_path)
    run(SHARED / "cases" / f"{split}.jsonl", tmp_path / "processed_data")
    file = SHARED / "cases" / predictions
    evaluation.main(["--model", str(SAMPLE_MODEL), "--predictions", str(file)])
    (path,) = tmp_path.glob("evaluation_results/*/*/metrics.json")
    exact = json.loads(path.read_text())["scores"]["turn_right"]
    assert (exact["value"], exact["n"]) == (1, num_right)
