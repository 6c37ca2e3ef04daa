"""Tests of step 1: converting rows, dropping rows, drawing the split and writing the files."""

import gzip
import hashlib
import io
import json
import sys
from collections import Counter

import datasets
import pytest
from conftest import SHARED, make_row, make_tool, write_rows
from hypothesis import given
from hypothesis import strategies as st

import prepare_function_calling_dataset as prepare

REAL_ROWS = SHARED / "data/glaive_function_calling_300.json"
THINK = prepare.THINK_INSTRUCTION  # its wording is part of the hashed splits
HI = ("human", "Hi")
HELLO = ("gpt", "Hello")
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TOOL = make_tool("get_weather", "city")


def turns(*pairs, **columns):
    return {"conversations": [{"from": role, "value": text} for role, text in pairs], **columns}


def openai(*messages, **columns):
    names = ("role", "content", "tool_calls")
    return {"messages": [dict(zip(names, m, strict=False)) for m in messages], **columns}


def texts(row, before_request="\n\n"):
    return [turn["content"] for turn in prepare.convert_row(row, before_request)["messages"]]


def sha256_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(source, folder, *options):
    """Run step 1 in this process; return its records by split, and dataset_info.json."""
    prepare.main(["--dataset", str(source), "--output-dir", str(folder), *options])
    lines = {n: (folder / f).read_text("utf-8").split("\n") for n, f in prepare.SPLIT_FILES.items()}
    records = {name: [json.loads(line) for line in lines[name][:-1]] for name in lines}
    return records, json.loads((folder / "dataset_info.json").read_text("utf-8"))


def test_system_text_and_instruction_come_only_before_the_first_request():
    row = turns(("system", "Use tools."), HI, HELLO, ("human", "Bye"), ("gpt", "So"))
    assert texts(row, THINK) == ["Use tools." + THINK + "Hi", "Hello", "Bye", "So"]
    for nothing in ((), [("system", " ")]):
        assert texts(turns(*nothing, HI, HELLO), THINK) == ["Hi", "Hello"]


def test_tools_are_added_to_the_prompt_unless_the_row_shows_them():
    shown = prepare.BEFORE_TOOLS + json.dumps([TOOL]) + prepare.AFTER_TOOLS
    kind = turns(HI, HELLO, tools=[TOOL], system="Be kind.")
    assert texts(kind, THINK)[0] == "Be kind.\n\n" + shown + THINK + "Hi"
    own = f"<tools>{json.dumps([TOOL])}</tools>"
    assert texts(turns(HI, HELLO, tools=[TOOL], system=own))[0] == own + "\n\nHi"
    assert texts(turns(("human", own + "Hi"), HELLO, tools=[TOOL]))[0] == own + "Hi"
    assert texts(turns(HI, HELLO, tools="[]"))[0] == "Hi"


def test_every_way_to_declare_tools_gives_the_same_json():
    in_text = [json.dumps([TOOL]), json.dumps(TOOL), repr([TOOL])]
    for declared in ([TOOL], [json.dumps(TOOL)], *in_text, [{**TOOL, "filled_by_arrow": None}]):
        tools = prepare.convert_row(turns(HI, HELLO, tools=declared))["tools"]
        assert tools == json.dumps([TOOL])
    for column in ("null", "", None, [], "not { readable"):  # the prompt shows the tools
        tools = prepare.convert_row({**make_row(0), "tools": column})["tools"]
        assert json.loads(tools) == [make_tool("get_weather_0", "city")]


def test_a_conversation_gives_the_same_text_in_sharegpt_and_openai_layout():
    call = {"name": "get_weather", "arguments": {"city": "Oslo"}}
    results = [f"<tool_response>\n{said}\n</tool_response>" for said in ('{"degrees": 0}', "windy")]
    row = openai(
        ("developer", "Be kind."),
        ("user", [{"type": "text", "text": text} for text in ("Weather", "in Oslo?")]),
        ("assistant", None, [{"function": {**call, "arguments": '{"city": "Oslo"}'}}]),
        ("tool", '{"degrees": 0}'),
        ("tool", results[1]),
        ("assistant", "Cold.", None),
    )
    expected = ["Be kind.\n\nWeather\nin Oslo?", CALL, "\n".join(results), "Cold."]
    said = ("human", "Weather\nin Oslo?"), ("function_call", json.dumps(call))
    said += ("observation", '{"degrees": 0}'), ("function_response", "windy")
    assert texts(row) == texts({"messages": json.dumps(row["messages"])}) == expected
    assert texts(turns(*said, ("gpt", "Cold."), system="Be kind.")) == expected


DROPPED = [
    (["not", "a", "row"], "a row that is not an object"),
    ({"conversations": ["Hi"]}, "a turn that is not an object"),
    ({"conversations": [{"value": "Hi"}]}, 'a message without "role" or "from"'),
    ({"id": 1}, "the keys of the row match no supported layout"),
    ({"conversations": 7}, 'no list of turns in "conversations"'),
    (turns(("human", [{"type": "image", "url": "x"}]), HELLO), "a content part that is not text"),
    (turns(("human", 7), HELLO), "not text or a list of text parts"),
    (turns(HI, ("gpt", " \n")), "an empty turn with role assistant"),
    (turns(HELLO, HI), "expected a turn with role user, found role assistant"),
    (turns(HI, ("tool", "1"), HELLO), "with role assistant, found role tool"),
    (turns(("system", "Only"), HI), "no assistant turn to train on"),
    (turns(HI, ("function_call", "get_weather(Oslo)")), "neither JSON nor a Python literal"),
    (
        turns(HI, ("function_call", '{"name": "f", "parameters": {}}')),
        'the unknown key "parameters"',
    ),
    (turns(HI, ("function_call", '{"name": "f", "arguments": {"a": NaN}}')), "NaN or infinity"),
    (turns(HI, ("function_call", '{"name": "f", "arguments": "{\\"a\\": NaN}"}')), "NaN or inf"),
]


@pytest.mark.parametrize("row, reason", DROPPED)
def test_an_unusable_row_is_dropped_with_its_reason(row, reason):
    with pytest.raises(ValueError, match=reason):
        prepare.convert_row(row)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED}/cases is not there")
@pytest.mark.parametrize(
    "name", ["c13_call_spellings.jsonl", "c15_rows.parquet", "c19b_nullable.jsonl"]
)
def test_every_row_of_a_file_from_a_common_tool_is_kept(name, tmp_path):
    records, info = run(SHARED / "cases" / name, tmp_path)
    assert (info["rows_loaded"], info["rows_kept"], info["dropped"]) == (15, 15, {})
    bad_calls = ["calls that cannot be read"] if name.startswith("c13") else []
    assert list(info["noticed"]) == bad_calls
    for record in records["train"] + records["test"]:
        prompt, call, result, _ = [turn["content"] for turn in record["messages"]]
        assert call.startswith("<tool_call>\n{") or bad_calls
        assert result.startswith("<tool_response>\n") and result.endswith("\n</tool_response>")
        assert prompt.count("<tools>") == 1 and len(json.loads(record["tools"])) == 1


@pytest.mark.skipif(not REAL_ROWS.is_file(), reason=f"{REAL_ROWS} is not there")
def test_real_rows_give_the_expected_splits_byte_for_byte(tmp_path):
    info = run(REAL_ROWS, tmp_path)[1]
    assert [sha256_of(tmp_path / file) for file in prepare.SPLIT_FILES.values()] == [
        "b57154af2ec31b976d26bcc434b90b9cdf537518f815f011fe622eb2bc64e42f",
        "b238c2a1b985efc4a92822166b27ad1ef05bd270b801efe437d1f4b8d47f84c6",
    ]
    assert (info["rows_kept"], info["dropped"]) == (300, {})
    assert info["unread"] == {
        'key "category" of a row': {"count": 300, "rows": 300, "first_row": 1}
    }
    assert info["noticed"] == {"repeated conversations": {"count": 38, "rows": 38, "first_row": 7}}
    assert info["test"]["also_in_train"] == 11


def test_the_split_is_drawn_before_unusable_rows_are_dropped(tmp_path, capsys):
    rows = [make_row(number) for number in range(50)]
    rows[8]["conversations"][2]["from"] = "robot"
    rows[20]["conversations"][2]["from"] = "robot"
    rows[9]["conversations"][1]["value"] = "half a \ud800 character"
    rows[30]["tools"] = [{"name": float("nan")}]
    rows[30]["conversations"][0]["value"] = "No tools here."
    rows[32]["conversations"][2]["value"] = "<tool_call>{broken</tool_call><tool_call>cut"
    records, info = run(write_rows(tmp_path / "rows.jsonl", rows), tmp_path)
    drawn = datasets.Dataset.from_dict({"n": range(50)}).train_test_split(test_size=0.2, seed=42)
    for name in ("train", "test"):
        expected = [f"id-{number}" for number in drawn[name]["n"] if number not in (8, 9, 20)]
        assert [record["id"] for record in records[name]] == expected
        assert info[name]["conversations"] == len(expected)
        assert info[name]["sha256"] == sha256_of(tmp_path / info[name]["file"])
    assert (info["rows_loaded"], info["rows_kept"]) == (50, 47)
    # Of 50 rows, 38 have a call and an answer, and 12 are small talk. Three of the 38 are dropped.
    assert info["train"]["tool_call_turns"] + info["test"]["tool_call_turns"] == 35
    assert info["train"]["helpful_turns"] + info["test"]["helpful_turns"] == 35 + 12
    robots = info["dropped"].pop("unknown role 'robot'")
    assert robots == {"count": 2, "rows": 2, "first_row": 9}
    assert list(info["dropped"]) == ["text that is not valid Unicode (half of a surrogate pair)"]
    found = ["tools that cannot be read", "calls that cannot be read", "repeated conversations"]
    assert list(info["noticed"]) == found
    assert info["noticed"]["calls that cannot be read"] == {"count": 2, "rows": 1, "first_row": 33}
    assert "2: unknown role 'robot' (first in row 9)" in capsys.readouterr().out


def test_missing_and_repeated_ids_are_made_unique(tmp_path):
    rows = [{**make_row(number), "id": "same"} for number in range(5)]
    rows += [{**make_row(5), "id": "same-row-8"}, turns(HI, HELLO), turns(HI, HELLO, id="same")]
    records, _ = run(write_rows(tmp_path / "rows.jsonl", rows), tmp_path, "--test-size=0.5")
    ids = {record["id"] for record in records["train"] + records["test"]}
    assert len(ids) == 8 and {"same", "same-row-2", "row-7", "same-row-8-row-8"} <= ids


def test_all_file_formats_and_a_folder_give_the_same_splits(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = []
    # Arrow adds the keys of all objects to each object, with null as their value.
    for name in "abcdefghijklmnopqrst":
        call = {"function": {"name": name, "arguments": {f"of_{name}": "x"}}}
        said = ("user", "Go", None), ("assistant", None, [call])
        rows.append(openai(*said, tools=[make_tool(name, f"of_{name}")]))
    data = write_rows(tmp_path / "rows.jsonl", rows).read_bytes()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1), "utf-8-sig", newline="\r\n")
    pretty = "\n".join(json.dumps(row, indent=2) for row in rows)
    (tmp_path / "pretty.jsonl").write_text(pretty)
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "ROWS.JSONL.GZ").write_bytes(gzip.compress(data))
    parquet = (tmp_path / "rows.parquet", tmp_path / "ROWS.PARQUET", folder / "validation.parquet")
    for path in parquet:
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    files = [tmp_path / f"rows.{kind}" for kind in ("jsonl", "jsonl.gz", "json", "parquet")]
    files += [tmp_path / name for name in ("pretty.jsonl", "ROWS.JSONL.GZ", "ROWS.PARQUET")]
    runs = [run(file, tmp_path / "out")[0] for file in files]
    options = ["--config", "default", "--split", "validation"]
    runs.append(run(folder, tmp_path / "out", *options)[0])
    assert len(runs[0]["train"]) == 16 and "null" not in str(runs[0]["train"])
    assert all(splits == runs[0] for splits in runs)


def test_the_reason_for_a_dropped_row_names_its_unread_keys(tmp_path):
    misspelled = {"role": "assistant", "tool_call": [{"name": "get_weather", "arguments": {}}]}
    bad = {"messages": [{"role": "user", "content": "Hi"}, misspelled]}
    rows = write_rows(tmp_path / "rows.jsonl", [*[turns(HI, HELLO)] * 5, bad])
    _, info = run(rows, tmp_path / "out")
    entry = info["dropped"]["an empty turn with role assistant"]
    assert (entry["count"], entry["first_row"]) == (1, 6)
    assert entry["unread_in_first_row"] == ['key "tool_call" of a message with role assistant']
    empty = turns(HI, ("gpt", ""))  # the first row with this reason, and nothing in it is unread
    rows = write_rows(tmp_path / "rows.jsonl", [*[turns(HI, HELLO)] * 5, empty, bad])
    _, info = run(rows, tmp_path / "out")
    assert info["dropped"] == {
        "an empty turn with role assistant": {"count": 2, "rows": 2, "first_row": 6}
    }


def test_many_reasons_are_cut_short_and_all_of_them_are_in_the_file(tmp_path, capsys):
    rows = [turns(HI, HELLO)] * 5 + [{f"column_{number}": 1} for number in range(40)]
    _, info = run(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    printed = capsys.readouterr().out
    assert len(info["dropped"]) == 40 and printed.count("  dropped   1: ") == 10
    assert "  dropped   30 other reasons, listed in dataset_info.json" in printed
    with pytest.raises(SystemExit, match="; 30 other reasons. Supported layouts"):
        run(write_rows(tmp_path / "none.jsonl", rows[5:]), tmp_path / "none")


@pytest.mark.parametrize(
    "flags", [[], ["--no-think-instruction"], ["--revision", "v1"], ["--drop-duplicates"]]
)
def test_only_the_unchanged_dataset_and_prompt_count_as_published(flags):
    assert prepare.is_published_split(prepare.parse_args(flags)) == (not flags)


UNREADABLE = [
    ("rows.jsonl", '{"id": 1}\n\n{"id": 2\n{"id": 3}', "line 3 is not valid JSON .*, in line 4"),
    ("rows.json", '[\n{"id": 1},\n{"id": 2,,}\n]', ", in line 3"),
    ("rows.csv", "messages,tools\n", "line 1 is not valid JSON .Expecting value.*as one of these"),
    ("rows.json", "[" * 100_000, "recursion"),
    ("rows.json", "[]", "contains no rows"),
    ("rows.jsonl.gz", "no gzip", "Not a gzipped file"),
    ("rows.parquet", "no parquet", "Parquet"),
    ("rows.jsonl", '{"id": 1}\n' * 9, "none of the 9 rows .* match no supported layout"),
    ("rows.jsonl", '{"messages": []}', 'an empty "messages"'),
    (
        "rows.jsonl",
        json.dumps({"messages": [{"role": "user", "contents": "Hi"}]}),
        'an empty turn with role user .not read: key "contents" of a message with role user',
    ),
    ("rows.jsonl", json.dumps(turns(HI, HELLO)), "too few rows .1.*more rows"),
    (
        "rows.jsonl",
        json.dumps({"key\n" * 9999: 1}),
        'no supported layout: "key.{,300}[.]{3}[.] Supp',
    ),
    ("rows.jsonl.zst", b"\x28\xb5\x2f\xfd", "not UTF-8 text.* compressed or binary"),
    (
        "rows.json",
        json.dumps({"messages": {"0": [{"role": "user"}]}}),
        "an object .*from pandas, save the rows",
    ),
    ("absent.jsonl", None, "no such file"),
    ("", None, "any data file"),  # a folder without data files
]


@pytest.mark.parametrize("name, content, words", UNREADABLE)
def test_unreadable_input_prints_one_line_and_changes_no_files(tmp_path, name, content, words):
    source = tmp_path / "in" / name
    out = tmp_path / "out"
    (tmp_path / "in").mkdir()
    run(write_rows(tmp_path / "rows.jsonl", [turns(HI, HELLO)] * 5), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    if content:
        source.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit, match=f"^error: [^\n]*{words}[^\n]*$"):
        prepare.main(["--dataset", str(source), "--output-dir", str(out)])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_tools_that_cannot_be_read_cause_a_warning(tmp_path, capsys):
    rows = [turns(HI, HELLO, tools=["get_weather"])] * 5
    run(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    printed = capsys.readouterr().out
    assert "warning: some tools cannot be read, and may be missing from the prompts" in printed
    assert "warning: tools are declared but no turn calls one" in printed


def test_a_conversation_without_tools_and_calls_causes_a_warning(tmp_path, capsys):
    run(write_rows(tmp_path / "rows.jsonl", [turns(HI, HELLO)] * 5), tmp_path / "out")
    assert "warning: no turn calls a tool. The model" in capsys.readouterr().out


def test_an_error_is_explained_without_the_number_of_the_operating_system():
    error = PermissionError(13, "Permission denied")
    assert prepare.explain_load_error("rows.jsonl", error) == "rows.jsonl: Permission denied"


def test_a_call_without_a_closing_tag_is_noticed(tmp_path):
    """The evaluation could not parse such a reference."""
    row = turns(HI, ("gpt", '<tool_call>\n{"name": "get_weather", "arguments": {}}'), tools=[TOOL])
    _, info = run(write_rows(tmp_path / "rows.jsonl", [row] * 5), tmp_path / "out")
    assert info["noticed"]["calls that cannot be read"]["rows"] == 5


def test_a_key_that_is_not_valid_unicode_is_reported(tmp_path, capsys):
    rows = [turns(HI, HELLO) | {"\ud800": 1}] * 5
    run(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    assert 'unread    5: key "?" of a row' in capsys.readouterr().out


def test_text_that_the_output_cannot_encode_is_escaped(tmp_path, monkeypatch):
    """On Windows, Python writes to files and pipes in the code page of the system."""
    rows = write_rows(tmp_path / "rows.jsonl", [turns(HI, HELLO) | {"工具": 1}] * 5)
    output = io.TextIOWrapper(io.BytesIO(), "cp1252", write_through=True)
    monkeypatch.setattr(sys, "stdout", output)
    run(rows, tmp_path / "out")
    assert rb'unread    5: key "\u5de5\u5177" of a row' in output.buffer.getvalue()


def test_an_empty_test_split_prints_one_line_after_the_dropped_rows(tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [turns(HI, HELLO)])
    with pytest.raises(SystemExit, match="^error: no conversation is left for the test split"):
        run(rows, tmp_path / "out", "--test-dataset", str(rows), "--drop-duplicates")
    assert "dropped   1: repeated conversations" in capsys.readouterr().out


def test_unwritable_output_prints_one_line_and_leaves_no_split(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [turns(HI, HELLO)] * 5)
    (tmp_path / "out/function_calling_test.jsonl.tmp").mkdir(parents=True)
    with pytest.raises(SystemExit, match="^error: .*Is a directory"):
        run(rows, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_file()]


def test_the_summary_warns_if_tools_are_declared_but_never_called(tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [turns(HI, HELLO, tools=[TOOL])] * 10)
    _, info = run(rows, tmp_path / "out", "--no-think-instruction")
    *_, warning, last = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: tools are declared but no turn calls one")
    assert last.endswith(f"train.py --train-file {tmp_path}/out/function_calling_train.jsonl")
    assert info["prompt"]["before_request"] == "\n\n"
    assert info["test"]["also_in_train"] == 2  # all ten rows are equal


@given(st.text() | st.text(alphabet="<tool_call>/{}[]'\":, \n\0"))
def test_reading_calls_from_any_text_raises_no_exception(text):
    messages = [{"role": "assistant", "content": f"{text}<tool_call>{text}</tool_call>"}]
    prepare.inspect_record({"messages": messages, "tools": "[]"}, Counter())
    message = {"role": "system", "content": f"<tools>{text}</tools>"}
    prepare.collect_tools([text], [message], Counter())


def test_the_summary_warns_if_turns_call_tools_and_no_row_declares_any(tmp_path, capsys):
    call = ("function_call", '{"name": "get_weather", "arguments": {}}')
    rows = [turns(HI, call) | {"tool": [TOOL]}] * 10  # a misspelled key
    run(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    printed = capsys.readouterr().out
    assert "warning: turns call tools, but no row declares any" in printed
    assert "warning: the test split has only 2 turns with calls" in printed
    assert 'key "tool" of a row' in printed
