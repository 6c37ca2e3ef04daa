"""Step 1: what becomes of a row, which rows are dropped, which split is drawn, what is written."""

import gzip
import hashlib
import json

import pytest
from conftest import SHARED, assert_fails_in_one_line, make_row, make_tool, run_script, write_rows
from hypothesis import given
from hypothesis import strategies as st

import prepare_function_calling_dataset as prepare

SCRIPT = "prepare_function_calling_dataset.py"
REAL_ROWS = SHARED / "data" / "glaive_function_calling_300.json"
THINK = (
    "Also, before making a call to a function take the time to plan the function to take. "
    "Make that thinking process between <think>{your thoughts}</think>\n\n"
)
HI, HELLO = ("human", "Hi"), ("gpt", "Hello")
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
RESULT = '<tool_response>\n{"degrees": 0}\n</tool_response>'
TOOL = make_tool("get_weather", "city")


def turns(*pairs, **columns):
    return {"conversations": [{"from": role, "value": text} for role, text in pairs], **columns}


def openai(*messages, **columns):
    names = ("role", "content", "tool_calls")
    return {"messages": [dict(zip(names, m, strict=False)) for m in messages], **columns}


def texts(row, before_request="\n\n"):
    return [turn["content"] for turn in prepare.convert_row(row, before_request)["messages"]]


def read_tools(**columns):
    return json.loads(prepare.convert_row(turns(HI, HELLO, **columns))["tools"])


def met(count, first_row):
    return {"count": count, "first_row": first_row}


def sha256_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(source, folder, *options):
    """Run step 1 in this process; return all records by split, and dataset_info.json."""
    prepare.main(["--dataset", str(source), "--output-dir", str(folder), *options])
    info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    lines = {
        n: (folder / info[n]["file"]).read_text("utf-8").splitlines() for n in ("train", "test")
    }
    return {name: [json.loads(line) for line in lines[name]] for name in lines}, info


def test_system_text_and_instruction_stand_before_the_first_request_alone():
    row = turns(("system", "Use tools."), HI, HELLO, ("human", "Bye"), ("gpt", "So"))
    assert texts(row, THINK) == ["Use tools." + THINK + "Hi", "Hello", "Bye", "So"]
    assert texts(row)[0] == "Use tools.\n\nHi"
    assert texts(turns(HI, HELLO), THINK) == ["Hi", "Hello"]
    assert texts(turns(("system", " "), HI, HELLO), THINK)[0] == "Hi"


def test_tools_are_shown_once_where_the_row_does_not_show_them():
    shown = prepare.BEFORE_TOOLS + json.dumps([TOOL]) + prepare.AFTER_TOOLS
    assert texts(turns(HI, HELLO, tools=[TOOL]))[0] == shown + "\n\nHi"
    kind = turns(HI, HELLO, tools=[TOOL], system="Be kind.")
    assert texts(kind, THINK)[0] == "Be kind.\n\n" + shown + THINK + "Hi"
    own = f"<tools>{json.dumps([TOOL])}</tools>"
    assert texts(turns(HI, HELLO, tools=[TOOL], system=own))[0] == own + "\n\nHi"
    assert texts(turns(("human", own + "Hi"), HELLO, tools=[TOOL]))[0] == own + "Hi"
    assert texts(turns(HI, HELLO, tools="[]"))[0] == "Hi"


def test_every_way_to_declare_tools_gives_the_same_json():
    in_text = [json.dumps([TOOL]), json.dumps(TOOL), repr([TOOL])]
    filled_by_arrow = [{**TOOL, "strict": None}]
    for declared in ([TOOL], [json.dumps(TOOL)], *in_text, filled_by_arrow):
        assert read_tools(tools=declared) == [TOOL]
    assert read_tools(tools='[{"name": "f", "default": null}]') == [{"name": "f", "default": None}]


def test_tools_are_taken_from_the_prompt_where_the_column_has_none():
    for column in ("null", "", None, [], "not { readable"):
        tools = prepare.convert_row({**make_row(0), "tools": column})["tools"]
        assert json.loads(tools) == [make_tool("get_weather_0", "city")]


def test_arguments_of_a_call_given_as_text_or_object():
    as_text = {'{"city":"Oslo"}': '{"city":"Oslo"}', ' {"a": null}\n': '{"a": null}', "": "{}"}
    as_object = [({"city": "Zürich", "unit": None}, '{"city": "Zürich"}'), (None, "{}")]
    for arguments, written in [*as_text.items(), *as_object]:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        said = ("assistant", "I look.", [call, call])
        block = f'<tool_call>\n{{"name": "f", "arguments": {written}}}\n</tool_call>'
        assert texts(openai(("user", "Hi", None), said))[1] == f"I look.\n{block}\n{block}"


def test_openai_messages_parts_developer_and_tool_turns_in_a_row():
    call = {"function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    row = openai(
        ("developer", "Be kind."),
        ("user", [{"type": "text", "text": text} for text in ("Weather", "in Oslo?")]),
        ("assistant", None, [call]),
        ("tool", '{"degrees": 0}'),
        ("tool", "<tool_response>\nwindy\n</tool_response>"),
        ("assistant", "Cold.", None),
    )
    results = RESULT + "\n<tool_response>\nwindy\n</tool_response>"
    assert texts(row) == ["Be kind.\n\nWeather\nin Oslo?", CALL, results, "Cold."]
    assert texts({"messages": json.dumps(row["messages"])}) == texts(row)


def test_function_call_and_observation_turns_with_a_system_column():
    call = '{"name": "get_weather", "arguments": {"city": "Oslo"}}'
    steps = ("function_call", call), ("observation", '{"degrees": 0}')
    row = turns(HI, *steps, HELLO, system="Be kind.")
    assert texts(row) == ["Be kind.\n\nHi", CALL, RESULT, "Hello"]


DROPPED = [
    (["not", "a", "row"], "no list of turns"),
    ({"id": "x", "query": "Hi", "answers": "[]"}, "no list of turns"),
    ({"conversations": ["Hi"]}, "unknown role None"),
    (turns(HI, ("robot", "Hello")), "unknown role 'robot'"),
    (turns(HI, (["gpt"], "Hello")), r"unknown role \['gpt'\]"),
    (turns(HI, ("gpt", {"a": 1})), "something other than text"),
    (turns(("human", [{"type": "image", "url": "x"}]), HELLO), "something other than text"),
    (turns(HI, ("gpt", " \n")), "an empty turn of assistant"),
    (turns(HELLO, HI), "a turn of assistant where user is due"),
    (turns(HI, HI, HELLO), "a turn of user where assistant is due"),
    (turns(HI, HELLO, HELLO), "a turn of assistant where user or tool is due"),
    (turns(HI, ("tool", "1"), HELLO), "a turn of tool where assistant is due"),
    (turns(("system", "A"), ("developer", "B"), HI, HELLO), "of system where user is due"),
    (turns(("system", "Only"), HI), "no turn of the model"),
    (turns(HI, ("function_call", "get_weather(Oslo)")), "neither JSON nor a Python literal"),
    (turns(HI, ("function_call", '{"name": "f", "parameters": {}}')), "a call is no object"),
    (openai(("user", "Hi", 5)), "a call is no object"),
]


@pytest.mark.parametrize("row, reason", DROPPED)
def test_a_row_of_no_use_is_dropped_with_its_reason(row, reason):
    with pytest.raises(ValueError, match=reason):
        prepare.convert_row(row)


CASES = """good c01_sharegpt_function_call c02_openai_messages c04_system_column c06_arrow_nulls
    c05_tools_column_only c07_tools_list_of_strings c08_type_dict c10_empty_system c15_rows
    c13_call_spellings c18_no_arguments c19b_nullable"""


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED}/cases is not there")
@pytest.mark.parametrize("name", CASES.split())
def test_every_row_of_a_public_layout_is_kept(name, tmp_path):
    (path,) = (SHARED / "cases").glob(f"{name}.*")
    records, info = run(path, tmp_path)
    assert (info["rows_loaded"], info["rows_kept"], info["dropped"]) == (15, 15, {})
    bad_calls = {"calls that cannot be read": met(15, 1)} if name == "c13_call_spellings" else {}
    assert info["noticed"] == bad_calls
    for record in records["train"] + records["test"]:
        prompt, call, result, _ = [turn["content"] for turn in record["messages"]]
        assert call.startswith("<tool_call>\n{") or bad_calls
        assert result.startswith("<tool_response>\n") and result.endswith("\n</tool_response>")
        assert prompt.replace("<tools></tools>", "").count("<tools>") == 1
        assert len(json.loads(record["tools"])) == 1 and ": null" not in record["tools"]


@pytest.mark.skipif(not REAL_ROWS.is_file(), reason=f"{REAL_ROWS} is not there")
def test_the_real_rows_come_out_byte_for_byte(tmp_path):
    info = run(REAL_ROWS, tmp_path)[1]
    expected = {
        "train": "b57154af2ec31b976d26bcc434b90b9cdf537518f815f011fe622eb2bc64e42f",
        "test": "b238c2a1b985efc4a92822166b27ad1ef05bd270b801efe437d1f4b8d47f84c6",
    }
    assert {name: sha256_of(tmp_path / info[name]["file"]) for name in expected} == expected
    assert {name: info[name]["sha256"] for name in expected} == expected
    assert (info["rows_kept"], info["dropped"], info["noticed"]) == (300, {}, {})


def test_the_split_is_drawn_over_all_rows_and_only_then_are_rows_dropped(tmp_path, capsys):
    import datasets

    rows = [make_row(number) for number in range(50)]
    rows[8]["conversations"][2]["from"] = rows[20]["conversations"][2]["from"] = "robot"
    rows[9]["conversations"][1]["value"] = "half a \ud800 character"
    rows[30]["tools"] = [{"name": float("nan")}]
    rows[30]["conversations"][0]["value"] = "No tools here."
    rows[32]["conversations"][2]["value"] = "<tool_call>{broken</tool_call><tool_call>cut"
    records, info = run(write_rows(tmp_path / "rows.jsonl", rows), tmp_path)
    drawn = datasets.Dataset.from_dict({"n": range(50)}).train_test_split(test_size=0.2, seed=42)
    for name in ("train", "test"):
        expected = [f"id-{number}" for number in drawn[name]["n"] if number not in (8, 9, 20)]
        assert [record["id"] for record in records[name]] == expected
    assert (info["rows_loaded"], info["rows_kept"]) == (50, 47)
    dropped = {"unknown role 'robot'": met(2, 9), "surrogates not allowed": met(1, 10)}
    noticed = {"tools that cannot be read": met(1, 31), "calls that cannot be read": met(2, 33)}
    assert (info["dropped"], info["noticed"]) == (dropped, noticed)
    out = capsys.readouterr().out
    assert "dropped   2: unknown role 'robot' (first in row 9)" in out
    assert "noticed   2: calls that cannot be read (first in row 33)" in out


def test_dataset_info_describes_source_wording_and_splits(splits):
    info = json.loads((splits / "dataset_info.json").read_text())
    rows = splits.parent / "rows.jsonl"
    source = {"dataset": str(rows), "config": None, "split": "train", "revision": None}
    assert info["source"] == {**source, "resolved_revision": "sha256:" + sha256_of(rows)}
    tools = {"before_tools": prepare.BEFORE_TOOLS, "after_tools": prepare.AFTER_TOOLS}
    assert info["prompt"] == {**tools, "before_request": THINK} and info["seed"] == 42
    # Of 40 rows a quarter is small talk; every other one has a call and an answer.
    assert info["train"]["tool_call_turns"] + info["test"]["tool_call_turns"] == 30
    assert info["train"]["helpful_turns"] + info["test"]["helpful_turns"] == 40
    assert (info["train"]["conversations"], info["test"]["conversations"]) == (32, 8)
    for name in ("train", "test"):
        assert info[name]["sha256"] == sha256_of(splits / info[name]["file"])


def test_missing_and_repeated_ids_are_made_unique(tmp_path):
    rows = [{**make_row(number), "id": "same"} for number in range(5)]
    rows += [{**make_row(5), "id": "same-row-2"}, *[turns(HI, HELLO, id=None)] * 2]
    records, info = run(write_rows(tmp_path / "rows.jsonl", rows), tmp_path, "--test-size", "0.5")
    ids = {record["id"] for record in records["train"] + records["test"]}
    assert len(ids) == 8 and {"same", "same-row-2", "same-row-5", "row-7", "row-8"} <= ids


def test_all_kinds_of_files_and_a_folder_give_the_same_splits(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [make_row(number) for number in range(20)]
    data = write_rows(tmp_path / "rows.jsonl", rows).read_bytes()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(data))
    array = "\ufeff" + json.dumps(rows, indent=1).replace("\n", "\r\n")
    (tmp_path / "rows.json").write_text(array, encoding="utf-8")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "rows.parquet", tmp_path / "folder" / "validation.parquet"):
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    files = ["rows.jsonl.gz", "rows.json", "rows.parquet"]
    runs = [run(tmp_path / file, tmp_path / "out")[0] for file in ["rows.jsonl", *files]]
    options = ["--config", "default", "--split", "validation"]
    runs.append(run(tmp_path / "folder", tmp_path / "out", *options)[0])
    assert len(runs[0]["train"]) == 16 and all(splits == runs[0] for splits in runs)


def test_structs_that_arrow_has_filled_with_null(tmp_path):
    import datasets

    rows = []
    for name, argument in (("f", "a"), ("g", "b")):
        call = {"function": {"name": name, "arguments": {argument: "x"}}}
        said = ("user", "Go", None), ("assistant", None, [call])
        rows.append(openai(*said, tools=[make_tool(name, argument)]))
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    records, _ = run(tmp_path / "rows.parquet", tmp_path / "out", "--test-size", "0.5")
    for record in records["train"] + records["test"]:
        name, argument = {"row-1": "fa", "row-2": "gb"}[record["id"]]
        assert json.loads(record["tools"]) == [make_tool(name, argument)]
        call = f'{{"name": "{name}", "arguments": {{"{argument}": "x"}}}}'
        assert record["messages"][1]["content"] == f"<tool_call>\n{call}\n</tool_call>"


UNREADABLE = [
    ("rows.jsonl", '{"id": 1}\n\n{"id": 2\n{"id": 3}', "line 3 is no JSON"),
    ("rows.json", '[\n{"id": 1},\n{"id": 2,,}\n]', "line 3"),
    ("rows.json", "[" * 100_000, "recursion"),
    ("rows.json", "[]", "no row of 0"),
    ("rows.csv", "a,b\n1,2\n", "line 1 is no JSON"),
    ("rows.jsonl.gz", "no gzip", "Not a gzipped file"),
    ("rows.jsonl", '{"id": 1}\n' * 9, "no list of turns"),
    ("absent.jsonl", None, "No such file"),
    ("", None, "any data file"),  # a folder with none
]


@pytest.mark.parametrize("name, content, words", UNREADABLE)
def test_what_cannot_be_read_is_one_line_and_changes_nothing(tmp_path, name, content, words):
    (tmp_path / "in").mkdir()
    source, out = tmp_path / "in" / name, tmp_path / "out"
    run(write_rows(tmp_path / "rows.jsonl", [turns(HI, HELLO)] * 5), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    if content:
        source.write_text(content)
    with pytest.raises(SystemExit, match=f"^error: [^\n]*{words}[^\n]*$"):
        prepare.main(["--dataset", str(source), "--output-dir", str(out)])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_mistakes_on_the_command_line_end_in_one_line(tmp_path):
    (tmp_path / "broken.parquet").write_text("no parquet")
    process = run_script(SCRIPT, "--dataset", "broken.parquet", cwd=tmp_path)
    assert_fails_in_one_line(process, "broken.parquet", "Parquet")
    write_rows(tmp_path / "rows.jsonl", [make_row(number) for number in range(9)])
    process = run_script(
        SCRIPT, "--dataset", "rows.jsonl", "--output-dir", "rows.jsonl", cwd=tmp_path
    )
    assert_fails_in_one_line(process, "File exists: 'rows.jsonl'")
    process = run_script(SCRIPT, "--dataset", "rows.jsonl", cwd=tmp_path)
    assert process.returncode == 0 and not process.stderr and "warning" not in process.stdout
    assert process.stdout.endswith("python function_calling_train.py\n")


def test_the_summary_warns_where_tools_are_declared_and_no_turn_calls(tmp_path, capsys):
    source = write_rows(tmp_path / "rows.jsonl", [turns(HI, HELLO, tools=[TOOL])] * 10)
    _, info = run(source, tmp_path / "out", "--no-think-instruction")
    *_, warning, last = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: tools are declared but no turn calls one")
    train_file = tmp_path / "out" / "function_calling_train.jsonl"
    assert last.endswith(f'python function_calling_train.py --train-file "{train_file}"')
    assert info["prompt"]["before_request"] == "\n\n"
    assert info["test"]["same_first_user_turn_in_train"] == 2  # all ten rows are one


@given(st.text() | st.text(alphabet="<tool_call>/{}[]'\":, \n\0"))
def test_no_text_whatsoever_raises_in_reading_calls(text):
    for said in (text, f"<tool_call>{text}</tool_call>"):
        messages = [{"role": "assistant", "content": said}]
        prepare.find_faults({"messages": messages, "tools": "[]"})
    prepare.read_tools(text, f"<tools>{text}</tools>")
