"""Turn function-calling conversations into the train and test splits of the workflow (step 1 of 3).

    python prepare_function_calling_dataset.py                            # the published dataset
    python prepare_function_calling_dataset.py --dataset my_rows.jsonl    # your own rows

A row holds its turns in "conversations" (from, value) or in OpenAI's "messages" (role, content,
tool_calls), and its tools in "tools". Each usable row becomes one line of a split:

    {"id": ..., "messages": [{"role": "user" | "assistant" | "tool", "content": ...}], "tools": ...}

System text and tools become part of the first user turn, calls <tool_call> blocks, and results
<tool_response> blocks. dataset_info.json says where the splits came from, what is in them, and how
the prompt is worded; the training script reads the wording from there.
"""

import argparse
import ast
import functools
import gzip
import hashlib
import json
import re
import shlex
import sys
import tempfile
from pathlib import Path

DEFAULT_DATASET, DEFAULT_CONFIG = "NousResearch/hermes-function-calling-v1", "glaive_func_calling"
SPLIT_FILES = {"train": "function_calling_train.jsonl", "test": "function_calling_test.jsonl"}

# The published dataset shows a row's tools between these two texts.
BEFORE_TOOLS = (
    "You are a function calling AI model. You are provided with function signatures within "
    "<tools></tools> XML tags.You may call one or more functions to assist with the user query. "
    "Don't make assumptions about what values to plug into functions.Here are the available "
    "tools:<tools>\n"
)
AFTER_TOOLS = (
    "\n</tools>Use the following pydantic model json schema for each tool call you will make: "
    "{'title': 'FunctionCall', 'type': 'object', 'properties': {'arguments': {'title': "
    "'Arguments', 'type': 'object'}, 'name': {'title': 'Name', 'type': 'string'}}, 'required': "
    "['arguments', 'name']}For each function call return a json object with function name and "
    "arguments within <tool_call></tool_call> XML tags as follows:\n<tool_call>\n{tool_call}\n"
    "</tool_call>"
)
# The published instruction, which stands between the system text and the first user turn.
THINK_INSTRUCTION = (
    "Also, before making a call to a function take the time to plan the function to take. "
    "Make that thinking process between <think>{your thoughts}</think>\n\n"
)

# What data sets call the system text and the three roles of a split, and which role follows which.
ROLES = {
    **dict.fromkeys(["system", "developer"], "system"),
    **dict.fromkeys(["human", "user"], "user"),
    **dict.fromkeys(["gpt", "model", "assistant", "function_call"], "assistant"),
    **dict.fromkeys(["tool", "observation", "function_response"], "tool"),
}
NEXT = {None: ["user"], "user": ["assistant"], "assistant": ["user", "tool"], "tool": ["assistant"]}

to_json = functools.partial(json.dumps, ensure_ascii=False, allow_nan=False)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--dataset", default=DEFAULT_DATASET, help="hub id, folder, .json, .jsonl[.gz] or .parquet")
    add("--config", help=f"configuration of a hub dataset (of the default: {DEFAULT_CONFIG})")
    add("--split", default="train", help="split of a hub dataset to read (default: train)")
    add("--revision", help="branch, tag or commit of a hub dataset")
    add("--output-dir", type=Path, default=Path("processed_data"), help="default: processed_data")
    add("--test-size", type=float, default=0.2, help="share of rows to test on (default: 0.2)")
    add("--seed", type=int, default=42, help="seed of the split (default: 42)")
    yes_or_no = {"action": argparse.BooleanOptionalAction, "default": True}
    add("--think-instruction", **yes_or_no, help="ask for a thought before a call, as published")
    args = parser.parse_args(argv)
    if args.config is None and args.dataset == DEFAULT_DATASET:
        args.config = DEFAULT_CONFIG
    return args


def load_rows(args):
    """Return the rows, and the sha256 of their file or the commit of their hub dataset."""
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    for library in (datasets, huggingface_hub):  # what goes wrong is told once, by the error
        library.logging.set_verbosity(library.logging.CRITICAL)
    path = Path(args.dataset)
    if not path.is_file() and path.suffix not in (".json", ".jsonl", ".gz", ".parquet"):
        hub = datasets.load_dataset_builder(args.dataset, args.config, revision=args.revision)
        hub.download_and_prepare()
        return list(hub.as_dataset(split=args.split)), hub.hash
    data = path.read_bytes()
    revision = f"sha256:{hashlib.sha256(data).hexdigest()}"
    if path.suffix == ".parquet":
        return list(datasets.Dataset.from_parquet(str(path))), revision
    return read_json(gzip.decompress(data) if path.suffix == ".gz" else data), revision


def read_json(data):
    """Read an array, or a row a line. Raises ValueError with the number of a wrong line."""
    text = data.decode("utf-8-sig")
    if text.lstrip().startswith("["):
        return json.loads(text)
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is no JSON: {error.msg}") from None
    return rows


def parse_literal(value):
    """Read text as JSON, or else as a Python literal: the dataset exists in both."""
    if not isinstance(value, str):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            return read(value.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    raise ValueError("neither JSON nor a Python literal")


def parse_list(value):
    value = parse_literal(value)
    return value if isinstance(value, list) else [value]


def drop_nulls(value):
    """Leave out the keys with null that Arrow adds to an object for what other rows hold."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value


def read_tools(declared, prompt):
    """Return the tools of a row as a list: from its "tools" column, or else from its prompt.

    None if there is a declaration, but none that can be read.
    """
    shown = re.findall(r"<tools>(.*?)</tools>", prompt, re.DOTALL)
    nothing = ("", "[]", "null", "None")
    declarations = [text for text in (declared, *shown) if str(text).strip() not in nothing]
    for text in declarations:
        try:
            tools = [parse_literal(tool) for tool in parse_list(text)]
            if to_json(tools) and all(isinstance(tool, dict) for tool in tools):
                return tools
        except (TypeError, ValueError, RecursionError):
            continue
    return None if declarations else []


def render_calls(calls):
    """Write calls as blocks; arguments that are text stay as they are."""
    blocks = []
    for call in calls:
        call = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(call, dict) or "parameters" in call:
            raise ValueError("a call is no object of name and arguments")
        name, arguments = to_json(call.get("name")), call.get("arguments") or {}
        arguments = arguments.strip() or "{}" if isinstance(arguments, str) else to_json(arguments)
        blocks.append(f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>')
    return "\n".join(blocks)


def render_turn(turn):
    """Return (role, text) of a turn, with calls and results as blocks.

    The chat template of the training script renders OpenAI's messages in the same way.
    """
    name = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    role = ROLES.get(str(name))
    if role is None:
        raise ValueError(f"unknown role {name!r}")
    text = turn.get("content", turn.get("value", ""))
    if isinstance(text, list) and all("text" in part for part in text):
        text = "\n".join(part["text"] for part in text)
    if not isinstance(text, str):
        raise ValueError("a turn holds something other than text")
    if role == "tool" and "<tool_response>" not in text:
        text = f"<tool_response>\n{text}\n</tool_response>"
    if name == "function_call" and "<tool_call>" not in text:
        try:
            text = render_calls(parse_list(text))
        except (TypeError, ValueError):  # kept, and counted as a call that cannot be read
            text = f"<tool_call>\n{text}\n</tool_call>"
    blocks = render_calls(parse_list(turn.get("tool_calls", [])))
    return role, "\n".join(part for part in (text, blocks) if part)


def convert_row(row, before_request=THINK_INSTRUCTION):
    """Convert a row into {"id", "messages", "tools"}. Raises ValueError if it cannot be used.

    System text, tools that it does not show, and `before_request` are merged into the first user
    turn; results in several turns are joined. "tools" is None if no declaration can be read.
    """
    row = drop_nulls(row) if isinstance(row, dict) else {}
    turns = parse_literal(row.get("conversations") or row.get("messages"))
    if not isinstance(turns, list) or not turns:
        raise ValueError('no list of turns in "conversations" or "messages"')
    turns = [render_turn(turn) for turn in turns]
    system_text = str(row.get("system", ""))
    if turns[0][0] == "system":
        system_text = turns.pop(0)[1] or system_text
    messages, previous = [], None
    for role, text in turns:
        if role == previous == "tool":
            messages[-1]["content"] += "\n" + text
            continue
        if role not in NEXT[previous]:
            raise ValueError(f"a turn of {role} where {' or '.join(NEXT[previous])} is due")
        if not text.strip():
            raise ValueError(f"an empty turn of {role}")
        messages.append({"role": role, "content": text})
        previous = role
    if len(messages) < 2:
        raise ValueError("no turn of the model")

    request = messages[0]["content"]
    tools = read_tools(row.get("tools"), system_text + request)
    parts = [system_text] if system_text.strip() else []
    if tools and "</tools>" not in system_text + request:
        parts.append(BEFORE_TOOLS + to_json(tools) + AFTER_TOOLS)
    if parts:
        messages[0]["content"] = "\n\n".join(parts) + before_request + request
    return {"id": row.get("id"), "messages": messages, "tools": tools}


def find_calls(record):
    """Return the texts of the calls in a record, a list for each turn of the model."""
    said = [turn["content"] for turn in record["messages"] if turn["role"] == "assistant"]
    return [re.findall(r"<tool_call>(.*?)(?:</tool_call>|\Z)", text, re.DOTALL) for text in said]


def can_be_read(call):
    """Whether the text of a call is an object with a name and arguments, as tool parsers want."""
    try:
        call = parse_literal(call)
    except ValueError:
        return False
    if not isinstance(call, dict) or "parameters" in call:
        return False
    return isinstance(call.get("name"), str) and isinstance(call.get("arguments") or {}, dict)


def count(met, what, row_number):
    met.setdefault(what, {"count": 0, "first_row": row_number})["count"] += 1


def convert_rows(rows, before_request):
    """Return (records, dropped, noticed) of all rows, with None for a record that is dropped."""
    records, ids, dropped, noticed = [], set(), {}, {}
    for number, row in enumerate(rows, start=1):
        records.append(None)
        try:
            record = convert_row(row, before_request)
            to_json(record).encode()
        except (TypeError, ValueError, RecursionError) as error:
            count(dropped, str(getattr(error, "reason", error)), number)
            continue
        if record["tools"] is None:
            count(noticed, "tools that cannot be read", number)
        record["tools"] = to_json(record["tools"] or [])
        for call in sum(find_calls(record), []):
            if not can_be_read(call):
                count(noticed, "calls that cannot be read", number)
        # A prediction is traced back by its id, so each row has one and no two share it.
        record["id"] = f"row-{number}" if record["id"] in (None, "") else str(record["id"])
        while record["id"] in ids:
            record["id"] += f"-row-{number}"
        ids.add(record["id"])
        records[-1] = record
    return records, dropped, noticed


def draw_splits(records, test_size, seed):
    """Draw the published split over all rows, then leave out those that are dropped."""
    import datasets

    rows = datasets.Dataset.from_dict({"row": range(len(records))})
    rows = rows.train_test_split(test_size=test_size, seed=seed)
    return {name: [records[i] for i in rows[name]["row"] if records[i]] for name in SPLIT_FILES}


def describe_split(name, records, text):
    calls = [found for record in records for found in find_calls(record)]
    return {
        "file": SPLIT_FILES[name],
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "conversations": len(records),
        "tool_call_turns": sum(bool(found) for found in calls),
        "helpful_turns": sum(not found for found in calls),
    }


def write_files(texts, folder):
    """Write all files before any takes its place, so that an earlier result stays whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        for name, text in texts.items():
            Path(unfinished, name).write_bytes(text.encode())
        for name in texts:
            Path(unfinished, name).replace(folder / name)


def main(argv=None):
    args = parse_args(argv)
    before_request = THINK_INSTRUCTION if args.think_instruction else "\n\n"
    try:
        rows, revision = load_rows(args)
    except Exception as error:  # gzip, pyarrow, datasets and the hub raise errors of many kinds
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())
        sys.exit(f"error: {args.dataset}: {reason}")
    records, dropped, noticed = convert_rows(rows, before_request)
    source = {name: getattr(args, name) for name in ("dataset", "config", "split", "revision")}
    prompt = {"before_tools": BEFORE_TOOLS, "after_tools": AFTER_TOOLS}
    info = {
        "source": {**source, "resolved_revision": revision},
        "seed": args.seed,
        "prompt": {**prompt, "before_request": before_request},
        "rows_loaded": len(records),
        "rows_kept": sum(record is not None for record in records),
        "dropped": dropped,
        "noticed": noticed,
    }
    try:
        splits = draw_splits(records, args.test_size, args.seed)
        if not all(splits.values()):
            raise ValueError(f"a split has no usable row; dropped: {'; '.join(dropped) or 'none'}")
        texts = {}
        for name, split in splits.items():
            text = texts[SPLIT_FILES[name]] = "".join(to_json(record) + "\n" for record in split)
            info[name] = describe_split(name, split, text)
        seen = {record["messages"][0]["content"] for record in splits["train"]}
        overlap = sum(record["messages"][0]["content"] in seen for record in splits["test"])
        info["test"]["same_first_user_turn_in_train"] = overlap
        texts["dataset_info.json"] = json.dumps(info, indent=2, ensure_ascii=False) + "\n"
        write_files(texts, args.output_dir)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print_summary(args, info, any(record and record["tools"] != "[]" for record in records))


def print_summary(args, info, has_tools):
    print(f"Source      {args.dataset}, {info['source']['resolved_revision']}")
    print(f"Rows        {info['rows_loaded']:,} loaded, {info['rows_kept']:,} kept")
    for kind in ("dropped", "noticed"):
        for what, met in info[kind].items():
            print(f"  {kind}   {met['count']:,}: {what} (first in row {met['first_row']:,})")
    for name in SPLIT_FILES:
        turns = "{conversations:,} conversations: {tool_call_turns:,} tool-call and {helpful_turns:,} helpful turns"
        print(f"{name.title():<11} " + turns.format(**info[name]))
    print(
        f"Overlap     {info['test']['same_first_user_turn_in_train']:,} test conversations begin as one of train"
    )
    if has_tools and not info["train"]["tool_call_turns"] + info["test"]["tool_call_turns"]:
        print(
            "warning: tools are declared, but no turn calls one: the model would learn not to call"
        )
    command = "python function_calling_train.py"
    if args.output_dir != Path("processed_data"):
        command += f" --train-file {shlex.quote(str(args.output_dir / SPLIT_FILES['train']))}"
    print(f"Written to  {args.output_dir}\nNext        {command}")


if __name__ == "__main__":
    main()
