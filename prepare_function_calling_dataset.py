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
import contextlib
import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import sys
import warnings
from collections import defaultdict
from pathlib import Path

DEFAULT_DATASET = "NousResearch/hermes-function-calling-v1"
DEFAULT_CONFIG = "glaive_func_calling"
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

NO_INSTRUCTION = "\n\n"

# The names that data sets give to the three roles of a split and to the system text.
ROLE_NAMES = {
    "system": ["system", "developer"],
    "user": ["human", "user"],
    "assistant": ["gpt", "model", "assistant", "function_call"],
    "tool": ["tool", "observation", "function_response"],
}
ROLES = {name: role for role, names in ROLE_NAMES.items() for name in names}
MAY_FOLLOW = {None: ["user"], "user": ["assistant"], "tool": ["assistant"]}
MAY_FOLLOW["assistant"] = ["user", "tool"]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)

    def add(flag, help, **options):
        shown = "" if options.get("default") is None else " (default: %(default)s)"
        parser.add_argument(flag, help=help + shown, **options)

    add(
        "--dataset",
        "hub id, or a .json, .jsonl (also .gz) or .parquet file",
        default=DEFAULT_DATASET,
    )
    add("--config", f"configuration of the hub dataset (default: {DEFAULT_CONFIG} for the default)")
    add("--split", "split of the hub dataset that is read", default="train")
    add("--revision", "branch, tag or commit of the hub dataset (default: its main branch)")
    add("--output-dir", "folder for the splits", type=Path, default=Path("processed_data"))
    add("--test-size", "share of rows for the test split, in (0, 1)", type=float, default=0.2)
    add("--seed", "seed of the split", type=int, default=42)
    think = {"action": argparse.BooleanOptionalAction, "default": True}
    add("--think-instruction", "ask for a thought before each call, as published", **think)
    args = parser.parse_args(argv)
    if not 0 < args.test_size < 1:
        parser.error(f"--test-size must lie between 0 and 1, not {args.test_size}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must lie in [0, 2**32), not {args.seed}")
    if args.config is None and args.dataset == DEFAULT_DATASET:
        args.config = DEFAULT_CONFIG
    return args


def load_rows(args):
    """Return (rows, the commit of the hub, or the sha256 of the file, that they came from).

    Raises OSError, ValueError or RuntimeError for what cannot be read.
    """
    path = Path(args.dataset).expanduser()
    is_file = path.is_file() or path.suffix in (".json", ".jsonl", ".gz", ".parquet")
    if is_file and path.suffix != ".parquet":
        return read_json_rows(path), "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if is_file:
        source = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
        return datasets.Dataset.from_parquet(str(path)), source
    builder = datasets.load_dataset_builder(args.dataset, args.config, revision=args.revision)
    builder.download_and_prepare()
    return builder.as_dataset(split=args.split), builder.hash


def read_json_rows(path):
    """Read a JSON array, or a file with a row a line. Raises ValueError with the wrong line."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig") as file:
        text = file.read()
    is_array = text.lstrip().startswith("[")
    rows = []
    for number, part in enumerate([text] if is_array else text.split("\n"), start=1):
        try:
            rows += json.loads(part) if is_array else [json.loads(part)] if part.strip() else []
        except (ValueError, RecursionError) as error:
            line = number + getattr(error, "lineno", 1) - 1
            raise ValueError(
                f"line {line}: invalid JSON ({error}); give a JSON array, or one row a line"
            ) from None
    return rows


class UnusableRow(ValueError):
    """A row that cannot be used; its text says why."""


def parse_literal(text):
    """Read JSON, or else a Python literal: the dataset exists in both. Raises ValueError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd escapes in a text
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise ValueError("neither JSON nor a Python literal") from None


def to_json(value):
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def drop_nulls(value):
    """Leave out the keys with null that Arrow adds to an object for what other rows hold."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value


def read_tools(declared, system_text):
    """Return the tools of a row as a list: from its "tools" column, or else from its prompt.

    None if there is a declaration, but none that can be read.
    """
    if isinstance(declared, str) and declared.strip() in ("", "null", "None"):
        declared = None
    shown = re.findall(r"<tools>(.*?)</tools>", system_text, re.DOTALL)
    candidates = [declared] * (declared is not None) + [text for text in shown if text.strip()]
    for candidate in candidates:
        try:
            tools = (
                parse_literal(candidate) if isinstance(candidate, str) else drop_nulls(candidate)
            )
            tools = tools if isinstance(tools, list) else [tools]
            tools = [parse_literal(tool) if isinstance(tool, str) else tool for tool in tools]
            if all(isinstance(tool, dict) for tool in tools) and to_json(tools):
                return tools
        except (TypeError, ValueError):  # no literal, or one that JSON cannot say
            continue
    return None if candidates else []


def read_text(content):
    """The text of a turn, given as such or as OpenAI's list of content parts."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = "\n".join(parts) if all(isinstance(part, str) for part in parts) else parts
    if not isinstance(content, str | None):
        raise UnusableRow("a turn holds something other than text")
    return content or ""


def render_call(call):
    """Write a call as a block; arguments that are JSON text stay as they are."""
    call = call.get("function") or call if isinstance(call, dict) else call
    if not isinstance(call, dict):
        raise UnusableRow("a call is no object")
    arguments = call.get("arguments")
    is_text = isinstance(arguments, str)
    arguments = arguments.strip() or "{}" if is_text else to_json(arguments or {})
    name = to_json(call.get("name"))
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'


def render_turn(turn):
    """Return (role, text) of a turn; calls and results become tagged blocks.

    The chat template of the training script renders OpenAI's messages in the same way.
    """
    name = turn.get("role") or turn.get("from") if isinstance(turn, dict) else None
    if name not in ROLES:
        raise UnusableRow(f"unknown role {name!r}")
    role, content = ROLES[name], turn.get("content")
    text = read_text(turn.get("value") if content is None else content)
    if role == "tool" and "<tool_response>" not in text:
        text = f"<tool_response>\n{text}\n</tool_response>"
    if name == "function_call" and "<tool_call>" not in text:
        try:
            calls = parse_literal(text)
            text = "\n".join(map(render_call, calls if isinstance(calls, list) else [calls]))
        except (TypeError, ValueError):  # kept as it is, and counted as a call that cannot be read
            text = f"<tool_call>\n{text}\n</tool_call>"
    blocks = [render_call(drop_nulls(call)) for call in turn.get("tool_calls") or []]
    return role, "\n".join([text] * bool(text) + blocks)


def convert_row(row, think_instruction=True):
    """Convert a row into {"id", "messages", "tools"}. Raises UnusableRow.

    System text, tools that it does not show, and the instruction to think are merged into the
    first user turn; results that stand in several turns in a row are joined. "tools" is None if
    they are declared in a way that cannot be read.
    """
    turns = (row.get("conversations") or row.get("messages")) if isinstance(row, dict) else None
    with contextlib.suppress(ValueError):
        turns = parse_literal(turns) if isinstance(turns, str) else turns
    if not isinstance(turns, list) or not turns:
        raise UnusableRow('no list of turns in "conversations" or "messages"')
    messages, system_text, previous = [], read_text(row.get("system")), None
    for position, turn in enumerate(turns):
        role, text = render_turn(turn)
        if role == "system" and position == 0:
            system_text = text or system_text
        elif not text.strip():
            raise UnusableRow("a turn is empty")
        elif role == previous == "tool":
            messages[-1]["content"] += "\n" + text
        elif role in MAY_FOLLOW[previous]:
            messages.append({"role": role, "content": text})
            previous = role
        else:
            raise UnusableRow(f"a {role} turn follows {previous or 'the beginning'}")
    if len(messages) < 2:
        raise UnusableRow("no turn of the model")

    tools = read_tools(row.get("tools"), system_text)
    request = messages[0]["content"]
    prompt = [system_text] if system_text.strip() else []
    if tools and "</tools>" not in system_text + request:
        prompt.append(BEFORE_TOOLS + to_json(tools) + AFTER_TOOLS)
    if prompt:
        joint = THINK_INSTRUCTION if think_instruction else NO_INSTRUCTION
        messages[0]["content"] = "\n\n".join(prompt) + joint + request
    tools = None if tools is None else to_json(tools)
    return {"id": row.get("id"), "messages": messages, "tools": tools}


def find_calls(messages):
    """The texts of the calls in the model's turns, a list for each turn."""
    said = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    return [re.findall(r"<tool_call>(.*?)(?:</tool_call>|\Z)", text, re.DOTALL) for text in said]


def can_be_read(call):
    """Whether the text of a call is an object with a name and arguments, as tool parsers want."""
    try:
        call = parse_literal(call)
    except ValueError:
        return False
    arguments = call.get("arguments") if isinstance(call, dict) else None
    has_arguments = isinstance(arguments, dict) or (not arguments and "parameters" not in call)
    return isinstance(call, dict) and isinstance(call.get("name"), str) and has_arguments


def convert_rows(rows, think_instruction):
    """Convert all rows into (records, dropped, noticed), with None for a row that is dropped.

    `dropped` and `noticed` hold, by what was met, the numbers of the rows; the first row is 1.
    """
    records, ids, dropped, noticed = [], set(), defaultdict(list), defaultdict(list)
    for number, row in enumerate(rows, start=1):
        records.append(None)
        try:
            record = convert_row(row, think_instruction)
            to_json(record).encode()
        except UnusableRow as reason:
            dropped[str(reason)].append(number)
            continue
        except UnicodeEncodeError:
            dropped["its text is not valid Unicode"].append(number)
            continue
        if record["tools"] is None:
            noticed["tools that cannot be read"].append(number)
            record["tools"] = "[]"
        calls = sum(find_calls(record["messages"]), [])
        noticed["calls that cannot be read"] += [number for c in calls if not can_be_read(c)]
        # A prediction is traced back by its id, so each row has one and no two share it.
        record["id"] = f"row-{number}" if record["id"] in (None, "") else str(record["id"])
        while record["id"] in ids:
            record["id"] += f"-row-{number}"
        ids.add(record["id"])
        records[-1] = record
    return records, dropped, noticed


def write_splits(records, args):
    """Draw the split over all rows and write both; return their entries for dataset_info.json.

    Raises ValueError if a split would be empty; then nothing is written.
    """
    import datasets

    datasets.disable_progress_bars()
    numbers = datasets.Dataset.from_dict({"row": range(len(records))})
    drawn = numbers.train_test_split(test_size=args.test_size, seed=args.seed)
    splits = {name: [records[i] for i in drawn[name]["row"] if records[i]] for name in SPLIT_FILES}
    if not all(splits.values()):
        raise ValueError(f"one of the splits has no usable row: {len(records)} rows are too few")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name, split in splits.items():
        text = "".join(to_json(record) + "\n" for record in split).encode()
        calls = [found for record in split for found in find_calls(record["messages"])]
        entries[name] = {
            "file": SPLIT_FILES[name],
            "sha256": hashlib.sha256(text).hexdigest(),
            "conversations": len(split),
            "tool_call_turns": sum(bool(found) for found in calls),
            "helpful_turns": sum(not found for found in calls),
            "tool_calls": sum(map(len, calls)),
        }
        (args.output_dir / f"{SPLIT_FILES[name]}.tmp").write_bytes(text)
    for file in SPLIT_FILES.values():
        os.replace(args.output_dir / f"{file}.tmp", args.output_dir / file)
    prompts = {record["messages"][0]["content"] for record in splits["train"]}
    repeated = [record["messages"][0]["content"] in prompts for record in splits["test"]]
    entries["test"]["same_first_user_turn_in_train"] = sum(repeated)
    return entries


def summarize(met):
    return {what: {"count": len(at), "first_row": at[0]} for what, at in met.items() if at}


def main(argv=None):
    args = parse_args(argv)
    try:
        rows, commit = load_rows(args)
        records, dropped, noticed = convert_rows(rows, args.think_instruction)
        if not any(records):
            raise ValueError(f"no usable row ({'; '.join(dropped) or 'it is empty'})")
        entries = write_splits(records, args)
    except (OSError, ValueError, RuntimeError, EOFError) as error:
        sys.exit(f"error: --dataset {args.dataset}: {' '.join(str(error).split())}")
    joint = THINK_INSTRUCTION if args.think_instruction else NO_INSTRUCTION
    info = {
        "source": {
            **{name: getattr(args, name) for name in ("dataset", "config", "split", "revision")},
            "resolved_revision": commit,
        },
        "seed": args.seed,
        "test_size": args.test_size,
        "prompt": {
            "before_tools": BEFORE_TOOLS,
            "after_tools": AFTER_TOOLS,
            "before_request": joint,
        },
        "rows_loaded": len(records),
        "rows_kept": sum(record is not None for record in records),
        "dropped": summarize(dropped),
        "noticed": summarize(noticed),
        **entries,
        "versions": {name: importlib.metadata.version(name) for name in ("datasets", "numpy")},
    }
    text = json.dumps(info, indent=2, ensure_ascii=False) + "\n"
    (args.output_dir / "dataset_info.json").write_text(text, encoding="utf-8")
    print_summary(args, info, any(record and record["tools"] != "[]" for record in records))


def print_summary(args, info, has_tools):
    print(f"Source      {args.dataset}, {info['source']['resolved_revision']}")
    print(f"Rows        {info['rows_loaded']:,} loaded, {info['rows_kept']:,} kept")
    for kind in ("dropped", "noticed"):
        for what, met in info[kind].items():
            print(f"  {kind}   {met['count']:,}: {what} (first in row {met['first_row']:,})")
    for name in SPLIT_FILES:
        split = info[name]
        print(
            f"{name.title():<11} {split['conversations']:,} conversations: "
            f"{split['tool_call_turns']:,} tool-call and {split['helpful_turns']:,} helpful turns"
        )
    same = info["test"]["same_first_user_turn_in_train"]
    print(f"Overlap     {same:,} test conversations begin with a first user turn of train")
    if has_tools and not info["train"]["tool_calls"] + info["test"]["tool_calls"]:
        print(
            "warning: tools are declared, but no turn calls one: the model would learn not to call"
        )
    print(f"Written to  {args.output_dir}/: {', '.join(SPLIT_FILES.values())}, dataset_info.json")
    command = ["python", "function_calling_train.py"]
    if args.output_dir != Path("processed_data"):
        command += ["--train-file", str(args.output_dir / SPLIT_FILES["train"])]
    print(f"Next        {shlex.join(command)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: run the same command again")
