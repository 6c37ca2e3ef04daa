"""Turn function-calling conversations into the train and test splits of the workflow (step 1 of 3).

    python prepare_function_calling_dataset.py                            # the published dataset, from the hub
    python prepare_function_calling_dataset.py --dataset my_rows.jsonl    # your own rows, same layout

A source row holds "conversations" (a list of {"from": system | human | gpt | tool, "value": text}) and "tools" (JSON or
Python-literal text). Each usable row becomes one line of a split:

    {"id": ..., "messages": [{"role": "user" | "assistant" | "tool", "content": ...}, ...], "tools": "[...]"}

The split is drawn over all source rows before unusable ones are dropped, so that it is the published split row for row.
Beside the two splits stands dataset_info.json, which says where they came from and what is in them.
"""

import argparse
import ast
import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import warnings
from array import array
from collections import Counter
from pathlib import Path

DEFAULT_DATASET = "NousResearch/hermes-function-calling-v1"
DEFAULT_CONFIG = "glaive_func_calling"
TRAIN_FILE = "function_calling_train.jsonl"
TEST_FILE = "function_calling_test.jsonl"

# The published instruction, which stands between the system text and the first user turn.
THINK_INSTRUCTION = (
    "Also, before making a call to a function take the time to plan the function to take. "
    "Make that thinking process between <think>{your thoughts}</think>\n\n"
)

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "tool": "tool",
}

# Which roles may follow which; None is the beginning.
MAY_FOLLOW = {None: ["user"], "user": ["assistant"], "assistant": ["user", "tool"], "tool": ["assistant"]}

# Why a row cannot be used. dataset_info.json counts each of them.
MISSING_TURN = "a turn is missing or empty"
UNKNOWN_ROLE = "a role is unknown"
WRONG_ORDER = "turns are out of order"
NOTHING_TO_SAY = "nothing for the model to say"
BAD_UNICODE = "text is not valid Unicode"
DROP_REASONS = [MISSING_TURN, UNKNOWN_ROLE, WRONG_ORDER, NOTHING_TO_SAY, BAD_UNICODE]

DISK_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
READ_SIZE = 1 << 20  # characters of a JSON array read at a time


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Turn function-calling conversations into train and test splits (step 1 of 3).", allow_abbrev=False
    )
    parser.add_argument(
        "--dataset", default=DEFAULT_DATASET,
        help="hub id, or a local .json or .jsonl file in the same row layout (default: %(default)s)",
    )
    parser.add_argument(
        "--config", help=f"configuration of the hub dataset (default: {DEFAULT_CONFIG} for the default dataset, else none)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the hub dataset (default: its main branch)")
    parser.add_argument(
        "--output-dir", type=lambda text: Path(text).expanduser(), default=Path("processed_data"), help="folder for the splits (default: %(default)s)"
    )
    parser.add_argument(
        "--test-size", type=float, default=0.2, help="share of the rows drawn for the test split, in (0, 1) (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of the split (default: %(default)s)")
    parser.add_argument(
        "--no-think-instruction", dest="think_instruction", action="store_false",
        help="leave out the published instruction to think between <think> and </think> before a call",
    )
    args = parser.parse_args(argv)
    if not 0 < args.test_size < 1:
        parser.error(f"--test-size must lie between 0 and 1, not {args.test_size}")
    if args.seed < 0:
        parser.error(f"--seed must not be negative, not {args.seed}")
    if is_local(args.dataset) and (args.config or args.revision):
        parser.error(f"--config and --revision are for hub datasets; --dataset {args.dataset} is a local file")
    if args.config is None and args.dataset == DEFAULT_DATASET:
        args.config = DEFAULT_CONFIG
    return args


def is_local(dataset):
    """Whether --dataset names a file on disk rather than a hub id (owner/name)."""
    return (
        Path(dataset).exists()
        or dataset.endswith((".json", ".jsonl"))
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset)
    )


def read_json_array(file, path):
    """Yield the items of a JSON array one by one, holding no more of the file than one item and one read.

    A syntax error ends the program with its line.
    """
    decoder = json.JSONDecoder()
    text, position, line = "", 0, 1  # text[position:] is still to be decoded; `line` is the line text[0] stands on

    def next_character():
        """The next character that is no white space, without consuming it; empty at the end of the file."""
        nonlocal text, position, line
        while True:
            while position < len(text) and text[position] in " \t\r\n":
                position += 1
            if position < len(text):
                return text[position]
            line += text.count("\n")
            text, position = file.read(READ_SIZE), 0
            if not text:
                return ""

    def fail(message):
        sys.exit(f"error: {path}, line {line + text.count(chr(10), 0, position)}: invalid JSON ({message})")

    next_character()
    position += 1  # the opening bracket, which the caller has seen
    separator_due = False
    while True:
        character = next_character()
        if character == "]":
            position += 1
            if next_character():
                fail("something follows the end of the array")
            return
        if separator_due:
            if character != ",":
                fail("the file ends inside the array" if not character else "expected ',' or ']'")
            position += 1
            character = next_character()
        if not character:
            fail("the file ends inside the array")
        while True:
            try:
                item, end = decoder.raw_decode(text, position)
                break
            except json.JSONDecodeError as error:
                # Perhaps the item only continues past what was read. Reading as much again each time keeps this linear.
                more = file.read(max(READ_SIZE, len(text) - position))
                if not more:
                    position = error.pos
                    fail(error.msg)
                line += text.count("\n", 0, position)
                text, position = text[position:] + more, 0
            except (RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
                fail("nested too deeply" if isinstance(error, RecursionError) else error)
        yield item
        position = end
        separator_due = True


def read_local_rows(path):
    """Yield the rows of a .json (an array) or .jsonl (a row a line) file; a syntax error ends the program with its line."""
    # Bytes that are no UTF-8 become lone surrogates, which drop the one row they stand in.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        head = file.read(READ_SIZE)
        is_array = head.lstrip().startswith("[")
        file.seek(0)
        if is_array:
            yield from read_json_array(file, path)
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (RecursionError, ValueError) as error:
                reason = "nested too deeply" if isinstance(error, RecursionError) else error
                sys.exit(f"error: {path}, line {number}: invalid JSON ({reason}); a row stands on one line, or all in one array, in UTF-8")


def load_hub_rows(dataset, config, revision):
    """Load the train split of a hub dataset.

    Returns (rows, the commit they came from). Whatever the hub refuses ends the program with one line.
    """
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    where = f"dataset {dataset}" + (f", config {config}" if config else "") + (f", revision {revision}" if revision else "")
    print(f"Fetching    {where}")
    # They try again by themselves; what is left in the end is told below.
    huggingface_hub.logging.set_verbosity_error()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(dataset, config, revision=revision)
        builder.download_and_prepare()
        check_download(dataset, builder.hash, builder.cache_dir)
        rows = builder.as_dataset(split="train")
    except datasets.exceptions.DatasetNotFoundError as error:
        if "gated" in str(error):
            sys.exit(
                f"error: {where} is gated: accept its terms at https://huggingface.co/datasets/{dataset}, "
                "then run `hf auth login`"
            )
        sys.exit(f"error: {where} was not found on the hub: check its name, or run `hf auth login` if it is private")
    except (ConnectionError, FileNotFoundError, HTTPError) as error:
        offline = "OfflineModeIsEnabled" in str(error)
        reason = "HF_HUB_OFFLINE is set, and it is not in the cache" if offline else "the hub gave no answer"
        sys.exit(f"error: {where} could not be fetched ({reason}): check the network and HF_ENDPOINT, then run this again")
    except (ValueError, KeyError, RuntimeError, OSError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        if getattr(cause, "errno", None) in DISK_FULL:
            raise cause
        check_download(dataset, revision)
        sys.exit(f"error: {where} could not be loaded: {first_line(cause)}")
    return rows, builder.hash


def check_download(dataset, revision, made_from_it=None):
    """End the program if a file in the cache is not the one the hub holds; it, and what was made from it, is removed."""
    from huggingface_hub import HfApi

    try:
        checked = HfApi().verify_repo_checksums(dataset, repo_type="dataset", revision=revision)
    except Exception:  # the hub says no more: what is broken shows when it is read
        return
    damaged = [mismatch["path"] for mismatch in checked.mismatches]
    for name in damaged:
        (checked.verified_path / name).resolve().unlink(missing_ok=True)
    if damaged:
        if made_from_it:
            shutil.rmtree(made_from_it, ignore_errors=True)
        sys.exit(f"error: {dataset}: {damaged[0]} is not the file the hub holds; it is removed from the cache: run this again")


def first_line(error):
    """What an exception says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def parse_literal(text):
    """Read JSON, or else a Python literal: the dataset exists in both spellings. Raises ValueError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd escapes in a text
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise ValueError("neither JSON nor a Python literal") from None


def text_between(text, opening, closing):
    """The non-empty bodies between `opening` and `closing` in `text`, in time linear in its length."""
    bodies = (part.partition(closing)[0].strip() for part in text.split(opening)[1:])
    return [body for body in bodies if body]


def find_tools(row, system_text):
    """The tools a row declares, as JSON text; taken from its "tools" column, or else from its prompt.

    Returns (tools, readable): an unreadable declaration gives ("[]", False).
    """
    declared = row.get("tools")
    if isinstance(declared, (list, dict)):
        candidates = [declared]
    elif isinstance(declared, str) and declared.strip() not in ("", "null", "None"):
        candidates = [declared]
    else:
        candidates = []
    candidates += text_between(system_text, "<tools>", "</tools>")
    for candidate in candidates:
        try:
            tools = parse_literal(candidate) if isinstance(candidate, str) else candidate
            if isinstance(tools, (list, dict)):
                return json.dumps(tools if isinstance(tools, list) else [tools], ensure_ascii=False, allow_nan=False), True
        except (TypeError, ValueError, RecursionError):  # no literal, or one that JSON cannot say
            continue
    return "[]", not candidates


class UnusableRow(ValueError):
    """A row that cannot be used; its text is one of DROP_REASONS."""


def convert_row(row, think_instruction=True):
    """Convert a source row into {"id", "messages", "tools"} and whether its tool declaration could be read.

    The system text (and the published instruction, if asked for) is merged into the first user turn; results of one
    turn's calls that stand in several tool turns are joined into one. Raises UnusableRow.
    """
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not turns:
        raise UnusableRow(MISSING_TURN)
    messages, system_text = [], ""
    for position, turn in enumerate(turns):
        content = turn.get("value") if isinstance(turn, dict) else None
        if not isinstance(content, str) or not content.strip():
            raise UnusableRow(MISSING_TURN)
        role = turn.get("from")
        role = ROLES.get(role) if isinstance(role, str) else None
        if role is None:
            raise UnusableRow(UNKNOWN_ROLE)
        if role == "system":
            if position != 0:
                raise UnusableRow(WRONG_ORDER)
            system_text = content
            continue
        previous = messages[-1]["role"] if messages else None
        if role == "tool" and previous == "tool":
            messages[-1]["content"] += "\n" + content
            continue
        if role not in MAY_FOLLOW[previous]:
            raise UnusableRow(WRONG_ORDER)
        messages.append({"role": role, "content": content})
    if not any(message["role"] == "assistant" for message in messages):
        raise UnusableRow(NOTHING_TO_SAY)

    if system_text:
        joint = THINK_INSTRUCTION if think_instruction else "\n\n"
        messages[0]["content"] = system_text + joint + messages[0]["content"]
    tools, tools_readable = find_tools(row, system_text)
    return {"id": row.get("id"), "messages": messages, "tools": tools}, tools_readable


def tool_names(tools):
    """The function names a list of declarations holds, whether nested under "function" or flat."""
    names = set()
    for tool in tools:
        if isinstance(tool, dict):
            function = tool.get("function") if isinstance(tool.get("function"), dict) else tool
            if isinstance(function.get("name"), str):
                names.add(function["name"])
    return names


def called_names(content):
    """The function name of each call in a model turn; None where a call cannot be read."""
    names = []
    for body in text_between(content, "<tool_call>", "</tool_call>"):
        try:
            call = parse_literal(body)
        except ValueError:
            call = None
        name = call.get("name") if isinstance(call, dict) else None
        names.append(name if isinstance(name, str) else None)
    return names


def draw_split(num_rows, test_size, seed):
    """The seeded split of the datasets library over row numbers: (train rows, test rows), in its order."""
    import datasets

    datasets.disable_progress_bars()
    numbers = datasets.Dataset.from_dict({"row": range(num_rows)})
    split = numbers.train_test_split(test_size=test_size, seed=seed)
    return list(split["train"]["row"]), list(split["test"]["row"])


def digest(text):
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def write_split(path, row_numbers, offsets, scratch, train_seen=None):
    """Copy the usable rows of one split from `scratch` to `path`, in the order of the split.

    `train_seen` is what the train split holds, given when the test split is written and compared with it. Returns the
    split's entry for dataset_info.json and what it holds itself: digests of its first user turns ("requests": the user's own
    words, "prompts": with the system text) and the names of its tools, declared or called.
    """
    counts, sha256 = Counter(), hashlib.sha256()
    seen = {"requests": set(), "prompts": set(), "tools": set()}
    with open(path, "wb") as file:
        for number in row_numbers:
            if offsets[number] < 0:
                continue
            scratch.seek(offsets[number])
            line, request = scratch.readline(), scratch.readline()
            file.write(line)
            sha256.update(line)
            record = json.loads(line)
            prompt = digest(record["messages"][0]["content"])
            counts["conversations"] += 1
            if train_seen:
                counts["same_first_user_turn_in_train"] += request in train_seen["requests"]
                counts["same_first_user_turn_and_system_text_in_train"] += prompt in train_seen["prompts"]
            seen["requests"].add(request)
            seen["prompts"].add(prompt)
            seen["tools"] |= tool_names(json.loads(record["tools"]))
            for message in record["messages"]:
                if message["role"] != "assistant":
                    continue
                if "<tool_call>" not in message["content"]:
                    counts["helpful_turns"] += 1
                    continue
                counts["tool_call_turns"] += 1
                for name in called_names(message["content"]):
                    counts["tool_calls"] += 1
                    if name is None:
                        counts["unreadable_tool_calls"] += 1
                        continue
                    seen["tools"].add(name)
                    if train_seen:
                        counts["tool_calls_to_tools_unseen_in_train"] += name not in train_seen["tools"]
        file.flush()
        os.fsync(file.fileno())
    keys = ["conversations", "tool_call_turns", "helpful_turns", "tool_calls", "unreadable_tool_calls"]
    if train_seen:
        keys += ["same_first_user_turn_in_train", "same_first_user_turn_and_system_text_in_train",
                 "tool_calls_to_tools_unseen_in_train"]
    entry = {"file": path.name, "sha256": sha256.hexdigest(), "rows_drawn": len(row_numbers)}
    return entry | {key: counts[key] for key in keys}, seen


def sha256_of_file(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_splits(rows, resolved_revision, args):
    """Convert the rows and write both splits and dataset_info.json, whose content is returned.

    One pass in source order into an unnamed scratch file, then one in the order of the split. Only a row's offset (8 bytes),
    its id and digests are held in memory, so that it hardly grows with the data.
    """
    from tqdm import tqdm

    offsets = array("q")  # where a row's record starts in the scratch file; -1 for a dropped row
    dropped, ids, tools_unreadable = Counter(), set(), 0
    with tempfile.TemporaryFile(dir=args.output_dir) as scratch:
        for number, row in enumerate(tqdm(rows, desc="Converting", unit=" rows", disable=None)):
            try:
                record, tools_readable = convert_row(row, args.think_instruction)
                # An id is what a prediction is later traced back by: it must be there, and be the only one.
                record["id"] = f"row-{number}" if record["id"] in (None, "") else str(record["id"])
                while record["id"] in ids:
                    record["id"] += f"-row-{number}"
                try:
                    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
                except UnicodeEncodeError:
                    raise UnusableRow(BAD_UNICODE) from None
            except UnusableRow as reason:
                dropped[str(reason)] += 1
                offsets.append(-1)
                continue
            ids.add(record["id"])
            tools_unreadable += not tools_readable
            offsets.append(scratch.tell())
            user_turn = next(turn["value"] for turn in row["conversations"] if ROLES[turn["from"]] == "user")
            scratch.write(line + digest(user_turn).hex().encode() + b"\n")

        if not ids:
            reasons = "; ".join(f"{dropped[reason]:,} rows: {reason}" for reason in DROP_REASONS if dropped[reason])
            hint = '; a row needs "conversations", a list of {"from", "value"}' if dropped[MISSING_TURN] else ""
            sys.exit(f"error: {args.dataset}: no usable row ({reasons or 'it holds no rows'}{hint})")
        try:
            train_rows, test_rows = draw_split(len(offsets), args.test_size, args.seed)
        except ValueError:
            sys.exit(f"error: {args.dataset}: {len(offsets)} row(s) cannot be split with --test-size {args.test_size}: each split needs "
                     "at least one")
        with tempfile.TemporaryDirectory(dir=args.output_dir, prefix=".unfinished-") as staging:
            staging = Path(staging)
            train, train_seen = write_split(staging / TRAIN_FILE, train_rows, offsets, scratch)
            test, _ = write_split(staging / TEST_FILE, test_rows, offsets, scratch, train_seen)
            for name, split in (("train", train), ("test", test)):
                if not split["conversations"]:
                    sys.exit(f"error: {args.dataset}: no usable row fell into the {name} split; more rows are needed")
            info = {
                "source": {
                    "dataset": args.dataset,
                    "config": args.config,
                    "revision": args.revision,
                    "resolved_revision": resolved_revision,
                },
                "seed": args.seed,
                "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
                "rows_loaded": len(offsets),
                "rows_kept": len(ids),
                "rows_dropped": {reason: dropped[reason] for reason in DROP_REASONS},
                "rows_with_unreadable_tools": tools_unreadable,
                "train": train,
                "test": test,
                "versions": {name: importlib.metadata.version(name) for name in ("datasets", "numpy", "huggingface_hub")},
            }
            text = json.dumps(info, indent=2, ensure_ascii=False) + "\n"
            (staging / "dataset_info.json").write_text(text, encoding="utf-8", errors="surrogateescape")
            for name in (TRAIN_FILE, TEST_FILE, "dataset_info.json"):  # before the first is replaced
                if (args.output_dir / name).is_dir():
                    sys.exit(f"error: {args.output_dir / name} is a folder: move it, or choose another --output-dir")
            for name in (TRAIN_FILE, TEST_FILE, "dataset_info.json"):
                os.replace(staging / name, args.output_dir / name)
    return info


def main(argv=None):
    args = parse_args(argv)
    if is_local(args.dataset):
        path = Path(args.dataset).expanduser()
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "a pipe or a device, which cannot be read twice" if path.exists() else "not found"
            sys.exit(f"error: --dataset {args.dataset}: {kind}; give a local file or a hub id such as {DEFAULT_DATASET}")
        rows, resolved_revision = read_local_rows(path), f"sha256:{sha256_of_file(path)}"
    else:
        rows, resolved_revision = load_hub_rows(args.dataset, args.config, args.revision)
    is_new = not args.output_dir.exists()
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        sys.exit(f"error: --output-dir {args.output_dir}: no folder can be made there ({error.strerror}); give another")
    try:
        info = write_splits(rows, resolved_revision, args)
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it holds the splits
                args.output_dir.rmdir()
    print_summary(args, info)


def print_summary(args, info):
    train, test = info["train"], info["test"]
    print(f"Source      {args.dataset}, revision {info['source']['resolved_revision']}")
    print(f"Rows        {info['rows_loaded']:,} loaded, {info['rows_kept']:,} kept")
    for reason, count in info["rows_dropped"].items():
        print(f"  dropped   {count:,}: {reason}")
    if info["rows_with_unreadable_tools"]:
        print(f"  kept, but with unreadable tool declarations: {info['rows_with_unreadable_tools']:,}")
    for name, split in (("Train", train), ("Test", test)):
        print(
            f"{name:<11} {split['conversations']:,} conversations of {split['rows_drawn']:,} drawn: "
            f"{split['tool_call_turns']:,} tool-call turns, {split['helpful_turns']:,} helpful turns"
        )
    print(
        f"Overlap     {test['same_first_user_turn_in_train']:,} test conversations have a first user turn that also stands "
        f"in train ({test['same_first_user_turn_and_system_text_in_train']:,} with the same tools)"
    )
    print(
        f"            {test['tool_calls_to_tools_unseen_in_train']:,} of {test['tool_calls']:,} test tool calls "
        "name a tool never seen in train"
    )
    print(f"Written to  {args.output_dir}/: {TRAIN_FILE}, {TEST_FILE}, dataset_info.json")
    command = ["python", "function_calling_train.py"]
    if args.output_dir != Path("processed_data"):
        command += ["--train-file", str(args.output_dir / TRAIN_FILE)]
    print(f"Next        {shlex.join(command)}")


def exit_cleanly(main):
    """Run `main`; an interruption or a failing disk ends in one line and an exit code instead of a traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # whatever the terminal cannot show
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno in DISK_FULL:
            sys.exit(f"error: a file could not be written ({first_line(error)}): make room on the disk, then run the same command again")
        sys.exit(f"error: {first_line(error)}")


if __name__ == "__main__":
    exit_cleanly(main)
