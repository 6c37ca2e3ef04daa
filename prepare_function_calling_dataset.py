"""Turn function-calling conversations into train and test splits (step 1 of 3).

    python prepare_function_calling_dataset.py                            # the published dataset
    python prepare_function_calling_dataset.py --dataset my_rows.jsonl    # your own rows

A row's turns stand in "conversations" (from, value) or OpenAI's "messages", its tools in "tools".
It becomes a line {"id", "messages", "tools"}: system text and tools go into the first user turn,
calls and results into tagged blocks. dataset_info.json holds counts and the prompt's wording.
"""

import argparse
import ast
import functools
import gzip
import hashlib
import json
import logging
import re
import signal
import sys
from pathlib import Path

DEFAULT_DATASET, DEFAULT_CONFIG = "NousResearch/hermes-function-calling-v1", "glaive_func_calling"
SPLIT_FILES = {"train": "function_calling_train.jsonl", "test": "function_calling_test.jsonl"}

# The published wording: around the tools, and between the system text and the user's request.
BEFORE_TOOLS, AFTER_TOOLS = (
    "You are a function calling AI model. You are provided with function signatures within "
    "<tools></tools> XML tags.You may call one or more functions to assist with the user query. "
    "Don't make assumptions about what values to plug into functions.Here are the available "
    "tools:<tools>\n{tools}\n</tools>Use the following pydantic model json schema for each tool "
    "call you will make: {'title': 'FunctionCall', 'type': 'object', 'properties': {'arguments': "
    "{'title': 'Arguments', 'type': 'object'}, 'name': {'title': 'Name', 'type': 'string'}}, "
    "'required': ['arguments', 'name']}For each function call return a json object with function "
    "name and arguments within <tool_call></tool_call> XML tags as follows:\n<tool_call>\n"
    "{tool_call}\n</tool_call>"
).split("{tools}")
THINK_INSTRUCTION = (
    "Also, before making a call to a function take the time to plan the function to take. "
    "Make that thinking process between <think>{your thoughts}</think>\n\n"
)

# What data sets call the system text and the three roles of a split, and what follows which role.
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
    add("--no-think-instruction", action="store_true", help="ask for no thought before a call")
    args = parser.parse_args(argv)
    args.config = args.config or {DEFAULT_DATASET: DEFAULT_CONFIG}.get(args.dataset)
    return args


def load_rows(args):
    """Return the rows, and the sha256 of their file or the commit of their hub dataset."""
    import datasets

    datasets.disable_progress_bars()
    path = Path(args.dataset)
    if not path.is_file() and path.suffix not in (".json", ".jsonl", ".gz", ".parquet"):
        hub = datasets.load_dataset_builder(args.dataset, args.config, revision=args.revision)
        hub.download_and_prepare()
        return list(hub.as_dataset(split=args.split)), hub.hash
    data = path.read_bytes()
    revision = "sha256:" + hashlib.sha256(data).hexdigest()
    if path.suffix == ".parquet":
        return list(datasets.Dataset.from_parquet(str(path))), revision
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    if text.lstrip().startswith("["):
        return json.loads(text), revision
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError:
            raise ValueError(f"line {number} is no JSON, which .json and .jsonl hold") from None
    return rows, revision


def parse_literal(value):
    """Read a text as JSON, or else as a Python literal: the dataset exists in both."""
    if not isinstance(value, str):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            return read(value.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    raise ValueError("what should be a list or a call is neither JSON nor a Python literal")


def drop_nulls(value):
    """Leave out the keys with null that Arrow adds to an object for what other rows hold."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value


def read_tools(column, prompt):
    """Return the tools as JSON text: the column's, or else the prompt's; None if unreadable."""
    shown = re.findall(r"<tools>(.*?)</tools>", prompt, re.DOTALL)
    declared = [x for x in (column, *shown) if str(x).strip() not in ("", "[]", "null", "None")]
    for tools in declared:
        try:
            tools = parse_literal(tools)
            tools = [parse_literal(x) for x in (tools if isinstance(tools, list) else [tools])]
            if all(isinstance(tool, dict) for tool in tools):
                return to_json(tools)
        except (TypeError, ValueError):
            continue
    return None if declared else "[]"


def render_calls(calls):
    """Write calls as blocks; arguments that are text stay as they are."""
    calls, blocks = parse_literal(calls), []
    for call in calls if isinstance(calls, list) else [calls]:
        call = call.get("function") or call if isinstance(call, dict) else call
        if not isinstance(call, dict) or "parameters" in call:
            raise ValueError("a call is no object of name and arguments")
        name, arguments = to_json(call.get("name")), call.get("arguments") or {}
        arguments = arguments.strip() or "{}" if isinstance(arguments, str) else to_json(arguments)
        blocks.append(f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>')
    return "\n".join(blocks)


def render_turn(turn):
    """Return (role, text) of a turn; the chat template of the training script does the same."""
    name = turn.get("role") or turn.get("from") if isinstance(turn, dict) else None
    role = ROLES.get(str(name))
    if role is None:
        raise ValueError(f"unknown role {name!r}")
    text, calls = turn.get("content") or turn.get("value") or "", turn.get("tool_calls") or []
    if isinstance(text, list) and all(isinstance(p, dict) and "text" in p for p in text):  # parts
        text = "\n".join(part["text"] for part in text)
    if not isinstance(text, str):
        raise ValueError("a turn holds something other than text")
    if name == "function_call" and "<tool_call>" not in text:
        text, calls = "", text
    if role == "tool" and "<tool_response>" not in text:
        text = f"<tool_response>\n{text}\n</tool_response>"
    return role, "\n".join(part for part in (text, render_calls(calls)) if part)


def convert_row(row, before_request=THINK_INSTRUCTION):
    """Return the {"id", "messages", "tools"} of a row. Raises ValueError if it is of no use."""
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
    prompt = system_text + messages[0]["content"]
    tools = read_tools(row.get("tools"), prompt)
    parts = [system_text] if system_text.strip() else []
    if tools not in (None, "[]") and "</tools>" not in prompt:
        parts.append(BEFORE_TOOLS + tools + AFTER_TOOLS)
    if parts:
        messages[0]["content"] = "\n\n".join(parts) + before_request + messages[0]["content"]
    return {"id": row.get("id"), "messages": messages, "tools": tools}


def find_faults(record):
    """Name what tool parsers cannot read in a record: its tools, and each call that is no call."""
    faults = ["tools that cannot be read"] if record["tools"] is None else []
    said = "\n".join(m["content"] for m in record["messages"] if m["role"] == "assistant")
    for call in re.findall(r"<tool_call>(.*?)(?:</tool_call>|\Z)", said, re.DOTALL):
        try:
            call = parse_literal(call)
            is_call = isinstance(call["name"], str) and "parameters" not in call
            if not is_call or not isinstance(call.get("arguments") or {}, dict):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            faults.append("calls that cannot be read")
    return faults


def convert_rows(rows, before_request):
    """Return the records of all rows, None for one that is dropped, and what was met where."""
    records, met, ids = [], {"dropped": {}, "noticed": {}}, set()
    for number, row in enumerate(rows, start=1):
        try:
            record, kind = convert_row(row, before_request), "noticed"
            to_json(record).encode()
            reasons = find_faults(record)
        except (TypeError, ValueError, RecursionError) as error:
            record, kind, reasons = None, "dropped", [str(getattr(error, "reason", error))]
        for reason in reasons:
            met[kind].setdefault(reason, {"count": 0, "first_row": number})["count"] += 1
        records.append(record)
        if record:  # a prediction is traced back by its id, so no two rows share one
            record["tools"] = record["tools"] or "[]"
            record["id"] = f"row-{number}" if record["id"] in (None, "") else str(record["id"])
            while record["id"] in ids:
                record["id"] += f"-row-{number}"
            ids.add(record["id"])
    return records, met


def write_splits(records, info, args):
    """Draw the split over all rows, leave out the dropped ones, and write the three files."""
    import datasets

    drawn = datasets.Dataset.from_dict({"row": range(len(records))})
    drawn = drawn.train_test_split(test_size=args.test_size, seed=args.seed)
    texts, first_turns = {}, {}
    for name, file in SPLIT_FILES.items():
        split = [records[row] for row in drawn[name]["row"] if records[row]]
        if not split:
            raise ValueError(f"no row of {len(records)} is left for {name}: {[*info['dropped']]}")
        said = [t["content"] for r in split for t in r["messages"] if t["role"] == "assistant"]
        num_calls = sum("<tool_call>" in text for text in said)
        texts[file] = "".join(to_json(record) + "\n" for record in split).encode()
        info[name] = {
            "file": file,
            "sha256": hashlib.sha256(texts[file]).hexdigest(),
            "conversations": len(split),
            "tool_call_turns": num_calls,
            "helpful_turns": len(said) - num_calls,
        }
        first_turns[name] = [record["messages"][0]["content"] for record in split]
    seen = set(first_turns["train"])
    info["test"]["same_first_user_turn_in_train"] = sum(t in seen for t in first_turns["test"])
    texts["dataset_info.json"] = json.dumps(info, indent=2, ensure_ascii=False).encode() + b"\n"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        (args.output_dir / f"{file}.tmp").write_bytes(text)
    for file in texts:
        (args.output_dir / f"{file}.tmp").replace(args.output_dir / file)


def main(argv=None):
    args = parse_args(argv)
    source = {name: getattr(args, name) for name in ("dataset", "config", "split", "revision")}
    prompt = {"before_tools": BEFORE_TOOLS, "after_tools": AFTER_TOOLS}
    prompt["before_request"] = "\n\n" if args.no_think_instruction else THINK_INSTRUCTION
    try:
        rows, source["resolved_revision"] = load_rows(args)
    except Exception as error:  # gzip, pyarrow, datasets and the hub raise errors of many kinds
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())
        sys.exit(f"error: {args.dataset}: {reason or type(error).__name__}")
    records, met = convert_rows(rows, prompt["before_request"])
    kept = [record for record in records if record]
    info = {"source": source, "seed": args.seed, "prompt": prompt}
    info |= {"rows_loaded": len(records), "rows_kept": len(kept), **met}
    try:
        write_splits(records, info, args)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"Rows        {len(records):,} loaded from {args.dataset}, {len(kept):,} kept")
    for kind in met:
        for what, at in met[kind].items():
            print(f"  {kind}   {at['count']:,}: {what} (first in row {at['first_row']:,})")
    for name in SPLIT_FILES:
        counts = [f"{info[name][key]:,} {key.replace('_', ' ')}" for key in list(info[name])[2:]]
        print(f"{name.title():<11} {', '.join(counts)}")
    num_calls = info["train"]["tool_call_turns"] + info["test"]["tool_call_turns"]
    if not num_calls and any(record["tools"] != "[]" for record in kept):
        print("warning: tools are declared but no turn calls one: the model would learn not to")
    train_file = args.output_dir / SPLIT_FILES["train"]
    option = "" if args.output_dir == Path("processed_data") else f' --train-file "{train_file}"'
    print(f"Next        python function_calling_train.py{option}")


if __name__ == "__main__":
    logging.captureWarnings(True)
    logging.disable()  # what goes wrong in a library is told once, by its error
    signal.signal(signal.SIGINT, lambda *_: sys.exit("interrupted: nothing is written"))
    main()
