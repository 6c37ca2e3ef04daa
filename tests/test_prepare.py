"""Step 1: what becomes of a row, which rows are dropped, which split is drawn, and what it costs."""

import hashlib
import json
import subprocess
import sys

import pytest
from conftest import ROOT, SYSTEM, assert_fails_in_one_line, make_row, make_tool, run_script, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_function_calling_dataset as prepare

SCRIPT = "prepare_function_calling_dataset.py"


def turns(*pairs):
    return {"id": "x", "conversations": [{"from": role, "value": value} for role, value in pairs], "tools": "null"}


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_system_text_and_instruction_are_merged_into_the_first_user_turn():
    row = turns(("system", "Use tools."), ("human", "Hi"), ("gpt", "Hello"), ("human", "Bye"), ("gpt", "Goodbye"))
    record, _ = prepare.convert_row(row)
    assert record["messages"] == [
        {
            "role": "user",
            "content": "Use tools.Also, before making a call to a function take the time to plan the function to take. "
            "Make that thinking process between <think>{your thoughts}</think>\n\nHi",
        },
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Goodbye"},
    ]
    record, _ = prepare.convert_row(row, think_instruction=False)
    assert record["messages"][0]["content"] == "Use tools.\n\nHi"


def test_a_row_without_system_text_is_left_as_it_is():
    record, _ = prepare.convert_row(turns(("human", "Hi"), ("gpt", "Hello")))
    assert record["messages"][0] == {"role": "user", "content": "Hi"}


@pytest.mark.parametrize("spell", [json.dumps, repr], ids=["JSON", "Python literals"])
def test_both_spellings_of_the_data_give_the_same_tools_and_calls(spell):
    record, readable = prepare.convert_row(make_row(0, spell))
    assert readable and json.loads(record["tools"]) == [make_tool("get_weather_0", "city")]
    assert prepare.called_names(record["messages"][1]["content"]) == ["get_weather_0"]


@pytest.mark.parametrize("column", ["null", "", None, "not { readable"])
def test_tools_are_taken_from_the_prompt_where_the_column_has_none(column):
    row = {**make_row(0), "tools": column}
    record, readable = prepare.convert_row(row)
    assert readable and json.loads(record["tools"]) == [make_tool("get_weather_0", "city")]


def test_a_row_without_tools_has_an_empty_list_and_an_unreadable_declaration_is_told():
    assert prepare.convert_row(make_row(3))[0]["tools"] == "[]"
    assert prepare.convert_row(make_row(3))[1] is True
    record, readable = prepare.convert_row({**make_row(3), "tools": "[{'name': "})
    assert (record["tools"], readable) == ("[]", False)


def test_results_in_consecutive_tool_turns_are_joined_so_that_roles_alternate():
    row = turns(("human", "Go"), ("gpt", "calls"), ("tool", "one"), ("tool", "two"), ("gpt", "Done"))
    messages = prepare.convert_row(row)[0]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[2]["content"] == "one\ntwo"


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"id": "x"}, prepare.MISSING_TURN),
        ({"conversations": []}, prepare.MISSING_TURN),
        ({"conversations": None}, prepare.MISSING_TURN),
        (["not", "a", "row"], prepare.MISSING_TURN),
        (turns(("human", "Hi"), ("gpt", " \n")), prepare.MISSING_TURN),
        (turns(("human", "Hi"), ("gpt", None)), prepare.MISSING_TURN),
        ({"conversations": ["Hi"]}, prepare.MISSING_TURN),
        (turns(("human", "Hi"), ("robot", "Hello")), prepare.UNKNOWN_ROLE),
        (turns(("human", "Hi"), (["gpt"], "Hello")), prepare.UNKNOWN_ROLE),
        (turns(("gpt", "Hello"), ("human", "Hi")), prepare.WRONG_ORDER),
        (turns(("human", "Hi"), ("human", "Hi?"), ("gpt", "Hello")), prepare.WRONG_ORDER),
        (turns(("human", "Hi"), ("gpt", "Hello"), ("gpt", "Hello?")), prepare.WRONG_ORDER),
        (turns(("human", "Hi"), ("tool", "result"), ("gpt", "Hello")), prepare.WRONG_ORDER),
        (turns(("human", "Hi"), ("gpt", "call"), ("tool", "result"), ("human", "And?")), prepare.WRONG_ORDER),
        (turns(("human", "Hi"), ("system", "Late"), ("gpt", "Hello")), prepare.WRONG_ORDER),
        (turns(("system", "Only"), ("human", "Hi")), prepare.NOTHING_TO_SAY),
        (turns(("system", "Only")), prepare.NOTHING_TO_SAY),
    ],
)
def test_unusable_rows_are_told_apart(row, reason):
    with pytest.raises(prepare.UnusableRow, match=reason):
        prepare.convert_row(row)


def test_the_split_is_drawn_over_all_rows_and_only_then_are_rows_dropped(tmp_path):
    import datasets

    rows = [make_row(number) for number in range(50)]
    for number in (3, 17, 20, 41):
        rows[number]["conversations"] = rows[number]["conversations"][:2]  # the model says nothing
    rows[8]["conversations"][2]["from"] = "robot"
    rows[9]["conversations"][1]["value"] = "lone \ud800 surrogate"
    dropped = {3, 17, 20, 41, 8, 9}
    prepare.main(["--dataset", str(write_rows(tmp_path / "rows.jsonl", rows)), "--output-dir", str(tmp_path / "out")])

    published = datasets.Dataset.from_dict({"number": range(50)}).train_test_split(test_size=0.2, seed=42)
    for name, file in (("train", prepare.TRAIN_FILE), ("test", prepare.TEST_FILE)):
        expected = [f"id-{number}" for number in published[name]["number"] if number not in dropped]
        assert [record["id"] for record in read_lines(tmp_path / "out" / file)] == expected
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())
    assert (info["rows_loaded"], info["rows_kept"]) == (50, 44)
    assert info["rows_dropped"] == {
        prepare.MISSING_TURN: 0, prepare.UNKNOWN_ROLE: 1, prepare.WRONG_ORDER: 0, prepare.NOTHING_TO_SAY: 4, prepare.BAD_UNICODE: 1,
    }


def test_the_published_number_of_rows_gives_the_published_split_sizes():
    train, test = prepare.draw_split(5209, test_size=0.2, seed=42)
    assert (len(train), len(test)) == (4167, 1042)
    assert sorted(train + test) == list(range(5209))


def test_dataset_info_describes_the_splits(splits):
    info = json.loads((splits / "dataset_info.json").read_text())
    records = {name: read_lines(splits / info[name]["file"]) for name in ("train", "test")}
    for name in records:
        assert info[name]["sha256"] == hashlib.sha256((splits / info[name]["file"]).read_bytes()).hexdigest()
        said = [m["content"] for record in records[name] for m in record["messages"] if m["role"] == "assistant"]
        assert info[name]["conversations"] == len(records[name])
        assert info[name]["tool_call_turns"] == sum("<tool_call>" in content for content in said)
        assert info[name]["helpful_turns"] == sum("<tool_call>" not in content for content in said)
    # Every made-up city is asked about in train as well.
    assert info["test"]["same_first_user_turn_in_train"] == len(records["test"]) == 8
    prompts = {record["messages"][0]["content"] for record in records["train"]}
    assert info["test"]["same_first_user_turn_and_system_text_in_train"] == sum(
        record["messages"][0]["content"] in prompts for record in records["test"]
    )
    assert info["source"]["resolved_revision"].startswith("sha256:")
    assert info["seed"] == 42 and info["arguments"]["think_instruction"] is True
    assert info["versions"]["datasets"]


def test_calls_to_tools_that_train_never_saw_are_counted(tmp_path):
    rows = []
    for number in range(10):  # each row has a tool, a request and a system text of its own
        tool = make_tool(f"tool_{number}", "x")
        call = json.dumps({"name": f"tool_{number}", "arguments": {"x": "1"}})
        rows.append({"id": str(number), "tools": json.dumps([tool]), "conversations": [
            {"from": "system", "value": SYSTEM.format(tools=json.dumps([tool]))},
            {"from": "human", "value": f"Request {number}"},
            {"from": "gpt", "value": f"<tool_call>\n{call}\n</tool_call>\n<tool_call>\n{call}\n</tool_call>"},
        ]})
    prepare.main(["--dataset", str(write_rows(tmp_path / "rows.jsonl", rows)), "--output-dir", str(tmp_path)])
    test = json.loads((tmp_path / "dataset_info.json").read_text())["test"]
    assert test["conversations"] == 2 and test["tool_calls"] == 4 and test["tool_call_turns"] == 2
    assert test["tool_calls_to_tools_unseen_in_train"] == 4
    assert test["same_first_user_turn_in_train"] == 0


def test_missing_and_repeated_ids_are_made_unique(tmp_path):
    rows = [make_row(number) for number in range(10)]
    for row in rows[:5]:
        row["id"] = "same"
    rows[2]["id"] = "same-row-4"  # what the last of them would be renamed to
    for row in rows[5:]:
        del row["id"]
    prepare.main(["--dataset", str(write_rows(tmp_path / "rows.jsonl", rows)), "--output-dir", str(tmp_path)])
    records = read_lines(tmp_path / prepare.TRAIN_FILE) + read_lines(tmp_path / prepare.TEST_FILE)
    ids = [record["id"] for record in records]
    assert len(set(ids)) == 10 and "same" in ids and {"row-5", "row-9"} <= set(ids)


def test_an_array_and_lines_give_the_same_splits_and_so_does_a_second_run(tmp_path):
    rows = [make_row(number) for number in range(20)]
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.json").write_text("\ufeff" + json.dumps(rows, indent=1).replace("\n", "\r\n"), encoding="utf-8")
    outputs = []
    for source, folder in (("rows.jsonl", "a"), ("rows.json", "b"), ("rows.json", "c")):
        prepare.main(["--dataset", str(tmp_path / source), "--output-dir", str(tmp_path / folder)])
        outputs.append([(tmp_path / folder / name).read_bytes() for name in (prepare.TRAIN_FILE, prepare.TEST_FILE)])
    assert outputs[0] == outputs[1] == outputs[2]


@settings(deadline=None)
@given(
    items=st.lists(st.dictionaries(st.text(max_size=4), st.text(max_size=20) | st.integers(), max_size=3)),
    indent=st.sampled_from([None, 0, 3]), read_size=st.integers(1, 40),
)
def test_a_json_array_is_read_whole_wherever_the_reads_fall(tmp_path_factory, items, indent, read_size):
    path = tmp_path_factory.getbasetemp() / "array.json"
    path.write_text(json.dumps(items, indent=indent), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "READ_SIZE", read_size)
        with open(path, encoding="utf-8") as file:
            assert list(prepare.read_json_array(file, path)) == items


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"id": 1}\n{"id": 2\n', ["line 2", "invalid JSON"]),
        ('[\n{"id": 1},\n{"id": 2,,}\n]', ["line 3", "invalid JSON"]),
        ('[\n{"id": 1},\n{"id": 2}\n', ["line 4", "the file ends inside the array"]),
        ('[\n{"id": 1}\n{"id": 2}\n]', ["line 3", "expected ','"]),
        ('[\n{"id": 1}\n]\nmore', ["line 4", "something follows the end"]),
        ("[" * 100_000, ["nested too deeply"]),
        ('{"a":' * 100_000, ["line 1", "nested too deeply"]),
        ("", ["no usable row", "holds no rows"]),
        ("[]", ["no usable row"]),
        ('{"id": 1}\n', ["no usable row", "1 rows: a turn is missing or empty"]),
    ],
)
def test_unreadable_files_end_in_one_line_and_leave_nothing(tmp_path, content, words):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(SystemExit) as error:
        prepare.main(["--dataset", str(path), "--output-dir", str(tmp_path / "out")])
    for word in words:
        assert word in error.value.code
    assert "\n" not in error.value.code
    assert not (tmp_path / "out").exists()


def test_a_failed_run_leaves_the_earlier_splits(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [make_row(number) for number in range(10)])
    prepare.main(["--dataset", str(tmp_path / "rows.jsonl"), "--output-dir", str(tmp_path / "out")])
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    write_rows(tmp_path / "bad.jsonl", [{"id": "x", "conversations": []}])
    process = run_script(SCRIPT, "--dataset", "bad.jsonl", "--output-dir", "out", cwd=tmp_path)
    assert_fails_in_one_line(process, "no usable row")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_mistakes_in_the_arguments_are_named(tmp_path):
    assert_fails_in_one_line(run_script(SCRIPT, "--dataset", "absent.jsonl", cwd=tmp_path), "absent.jsonl", "not found")
    assert_fails_in_one_line(run_script(SCRIPT, "--dataset", ".", cwd=tmp_path), "a folder")
    assert run_script(SCRIPT, "--test-size", "1.5", cwd=tmp_path).returncode == 2
    write_rows(tmp_path / "rows.jsonl", [make_row(number) for number in range(10)])
    process = run_script(SCRIPT, "--dataset", "rows.jsonl", "--revision", "v1", cwd=tmp_path)
    assert process.returncode == 2 and "is a local file" in process.stderr
    assert_fails_in_one_line(run_script(SCRIPT, "--dataset", "/dev/null", cwd=tmp_path), "/dev/null: a pipe or a device")


def test_the_output_says_what_was_kept_and_what_to_run_next(tmp_path):
    rows = [make_row(number) for number in range(10)] + [turns(("human", "Hi"))]
    write_rows(tmp_path / "rows.jsonl", rows)
    process = run_script(SCRIPT, "--dataset", "rows.jsonl", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "11 loaded, 10 kept" in process.stdout and "1: nothing for the model to say" in process.stdout
    assert process.stdout.splitlines()[-1].endswith("python function_calling_train.py")


@pytest.mark.parametrize("spell", [json.dumps, repr])
def test_every_prefix_of_a_tool_call_is_read_without_an_exception(spell):
    call = f"<tool_call>\n{spell({'name': 'f', 'arguments': {'a': [1, 2.5, True, None], 'b': {'c': 'd'}}})}\n</tool_call>"
    for end in range(len(call) + 1):
        assert prepare.called_names(call[:end]) in ([], [None], ["f"])
    assert prepare.called_names(call) == ["f"]


@given(st.text() | st.text(alphabet="<tool_call>/{}[]'\":, \n\0"))
def test_no_text_whatsoever_raises(text):
    prepare.called_names(text)
    prepare.called_names(f"<tool_call>{text}</tool_call>")
    json.loads(prepare.find_tools({"tools": text}, text)[0])


@pytest.mark.parametrize("declared", ["[{1, 2}]", "[b'x']", "[{(1, 2): 3}]", "[NaN]", "[0x" + "f" * 5000 + "]", [float("nan")]])
def test_a_declaration_that_json_cannot_say_is_told_and_written_as_none(declared):
    assert prepare.convert_row({**make_row(3), "tools": declared})[0]["tools"] == "[]"
    assert prepare.convert_row({**make_row(3), "tools": declared})[1] is False


def peak_memory(*arguments):
    """Peak resident memory of a run of the script, in kB, as the kernel counts it for that process alone."""
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import prepare_function_calling_dataset as p; p.main(sys.argv[1:]); "
            "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))")
    process = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True)
    return int(process.stdout.split("VmHWM:")[1].split()[0])


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("layout", ["lines", "array"])
def test_fifty_times_the_rows_cost_at_most_half_as_much_memory_again(tmp_path, layout):
    peaks = []
    for num_rows in (300, 15_000):
        rows = [make_row(number) for number in range(num_rows)]
        for row in rows:  # to the size of a real row
            row["conversations"][1]["value"] += " please" * 250
        path = tmp_path / f"rows_{num_rows}.json"
        write_rows(path, rows) if layout == "lines" else path.write_text(json.dumps(rows))
        del rows
        peaks.append(peak_memory("--dataset", path, "--output-dir", tmp_path / "out"))
    assert peaks[1] <= 1.5 * peaks[0]


def test_a_file_where_the_folder_should_be_is_named_and_stays(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [make_row(number) for number in range(12)])
    (tmp_path / "out").write_text("mine")
    process = run_script(SCRIPT, "--dataset", "rows.jsonl", "--output-dir", "out", cwd=tmp_path)
    assert_fails_in_one_line(process, "--output-dir out", "File exists")
    assert (tmp_path / "out").read_text() == "mine"
