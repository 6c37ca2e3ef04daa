"""Turn tool-calling conversations into train and test splits (step 1 of 3).

    python prepare_function_calling_dataset.py                            # the published dataset
    python prepare_function_calling_dataset.py --dataset my_rows.jsonl    # your own rows
    python prepare_function_calling_dataset.py --dataset train.jsonl --test-dataset test.jsonl

One function per data layout turns a row into OpenAI-style messages. They are normalized, and then
rendered as a line of a split, {"id", "messages", "tools"}: the system text and the tools become
part of the first user turn, and calls and results become tagged blocks. dataset_info.json records
the source, the counts, the prompt's wording, and everything in the rows that was not used.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gzip
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from tqdm import tqdm

if TYPE_CHECKING:
    from datasets import DatasetBuilder

DEFAULT_DATASET = "NousResearch/hermes-function-calling-v1"
DEFAULT_CONFIG = "glaive_func_calling"
DEFAULT_OUTPUT_DIR = Path("processed_data")
DEFAULT_TEST_SIZE = 0.2
DEFAULT_SEED = 42
SPLIT_FILES = {"train": "function_calling_train.jsonl", "test": "function_calling_test.jsonl"}

# The published prompt: the text around the tools, and the text before the user's request.
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


def dataset_name(text: str) -> str:
    if text.strip():
        return text
    raise argparse.ArgumentTypeError("must not be empty. Is a shell variable unset?")


def share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be greater than 0 and less than 1, not {text}")


def seed(text: str) -> int:
    with contextlib.suppress(ValueError):
        if 0 <= int(text) < 2**32:
            return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number from 0 to {2**32 - 1}, not {text}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        type=dataset_name,
        default=DEFAULT_DATASET,
        help="Rows to convert: a .json, .jsonl, .jsonl.gz or .parquet file, a folder of such "
        "files, or the id of a dataset on the Hub (default: %(default)s).",
    )
    data.add_argument(
        "--config",
        help=f"Configuration of a dataset on the Hub (default: {DEFAULT_CONFIG} for the default "
        "--dataset).",
    )
    data.add_argument(
        "--split",
        default="train",
        help="Split of a folder or of a dataset on the Hub (default: %(default)s).",
    )
    data.add_argument(
        "--revision",
        help="Branch, tag or commit of a dataset on the Hub (default: the main branch).",
    )
    data.add_argument(
        "--output-dir",
        type=Path,
        default=DEFAULT_OUTPUT_DIR,
        help="Folder for the two splits and dataset_info.json. Existing splits are replaced "
        "(default: %(default)s).",
    )
    split = parser.add_argument_group("train and test split")
    split.add_argument(
        "--test-dataset",
        type=dataset_name,
        help="Your own test set: a file, a folder, a Hub id, or the name of a split of --dataset. "
        "All rows of --dataset are then used for training (default: draw a random test split).",
    )
    split.add_argument(
        "--test-size",
        type=share,
        metavar="SHARE",
        help=f"Fraction of the rows that becomes the test split (default: {DEFAULT_TEST_SIZE}).",
    )
    split.add_argument(
        "--seed",
        type=seed,
        help=f"Seed of the random split (default: {DEFAULT_SEED}).",
    )
    split.add_argument(
        "--drop-duplicates",
        action="store_true",
        help="Drop conversations whose turns repeat an earlier conversation. System text and tools "
        "are not compared (default: repeated conversations are kept and counted).",
    )
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument(
        "--no-think-instruction",
        action="store_true",
        help="Leave out the sentence of the prompt that asks the model to think before a call.",
    )
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the arguments, and refuse those that are invalid or would have no effect."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.test_dataset and (args.test_size is not None or args.seed is not None):
        parser.error("--test-size and --seed have no effect with --test-dataset")
    if is_data_file(args.dataset) and (args.config or args.split != "train"):
        parser.error("--config and --split have no effect on a file")
    if is_local(args.dataset) and args.revision:
        parser.error("--revision has no effect on a local dataset")
    args.test_size = DEFAULT_TEST_SIZE if args.test_size is None else args.test_size
    args.seed = DEFAULT_SEED if args.seed is None else args.seed
    if args.config is None and args.dataset == DEFAULT_DATASET:
        args.config = DEFAULT_CONFIG
    return args


def fail(message: str) -> NoReturn:
    sys.exit(f"error: {message}")


# ---- Loading rows


ROW_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")  # read_file reads them
# A name that ends in one of these is treated as a file, even if the file does not exist.
FILE_SUFFIXES = (*ROW_SUFFIXES, ".gz", ".csv", ".tsv", ".txt")


def ends_in(path: Path | str, suffixes: str | tuple[str, ...]) -> bool:
    return str(path).lower().endswith(suffixes)


# os.path answers False where Path raises an error, for example for a name that is too long.
def is_data_file(name: str) -> bool:
    is_named_like_one = ends_in(name, FILE_SUFFIXES)
    return os.path.isfile(name) or (is_named_like_one and not os.path.isdir(name))


def is_local(name: str) -> bool:
    return is_data_file(name) or os.path.isdir(name)


def read_file(path: Path, data: bytes) -> list:
    """Return the rows of a .json, .jsonl, .jsonl.gz or .parquet file, whose content is `data`."""
    if ends_in(path, ".parquet"):
        import datasets

        return list(datasets.Dataset.from_parquet(str(path)))
    try:
        text = (gzip.decompress(data) if ends_in(path, ".gz") else data).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(
            "the file is not UTF-8 text. Save it as UTF-8. If it is compressed or binary, convert "
            "it to .jsonl, .jsonl.gz or .parquet."
        ) from None
    rows = parse_json_values(text)
    return rows[0] if len(rows) == 1 and isinstance(rows[0], list) else rows


NOT_SPACE = re.compile(r"\S")


def parse_json_values(text: str) -> list:
    """Read JSON values that follow each other, on one line each or over several lines."""
    decoder = json.JSONDecoder()
    values = []
    position = 0
    while match := NOT_SPACE.search(text, position):
        try:
            value, position = decoder.raw_decode(text, match.start())
        except json.JSONDecodeError as error:
            start = text.count("\n", 0, match.start()) + 1
            end = text.count("\n", 0, error.pos) + 1
            where = f", in line {end}" if end > start else ""
            raise ValueError(
                f"line {start} is not valid JSON ({error.msg}{where}). A .jsonl file has one JSON "
                "object per line, and a .json file has an array of objects. Save other formats as "
                "one of these."
            ) from None
        values.append(value)
    return values


def load_rows(
    name: str, config: str | None, split: str | None, revision: str | None
) -> tuple[list, str]:
    """Return the rows of a file, a folder or a dataset on the Hub, and their version.

    The version is the sha256 of a file, or the commit of a dataset on the Hub. If `split` is None,
    use the test split or, if there is none, the first split.
    """
    import datasets

    datasets.disable_progress_bars()
    if is_data_file(name):
        data = Path(name).read_bytes()
        return read_file(Path(name), data), "sha256:" + hashlib.sha256(data).hexdigest()
    builder = datasets.load_dataset_builder(name, config, revision=revision)
    if os.path.isdir(name):
        return load_folder(Path(name), builder, split), builder.hash
    builder.download_and_prepare()
    if split is None:
        split = "test" if "test" in builder.info.splits else next(iter(builder.info.splits))
    return list(builder.as_dataset(split=split)), builder.hash


def load_folder(folder: Path, builder: DatasetBuilder, split: str | None) -> list:
    """Return the rows of one split of a folder. The names of files tell datasets their splits."""
    import datasets

    files = {str(name): list(map(Path, paths)) for name, paths in builder.config.data_files.items()}
    if split is None:
        split = "test" if "test" in files else next(iter(files))
    split = "+".join(files) if split == "all" else split
    pieces = split.split("+")  # as in train[:100]+test
    names = list(dict.fromkeys(piece.split("[")[0].strip() for piece in pieces))
    for name in names:
        if name not in files:
            raise ValueError(
                f'split "{name}" was not found in this folder. Pick one of {", ".join(files)}.'
            )
    paths = [path for name in names for path in files[name]]
    print_files(folder, paths)
    is_nested = getattr(builder.config, "field", None)  # the rows are in a key of the file
    if is_nested or not all(ends_in(path, ROW_SUFFIXES) for path in paths):
        builder.download_and_prepare()
        return list(builder.as_dataset(split=split))
    # Read each file directly: Arrow needs the same columns in all files, and fills in nulls.
    rows = {
        name: [row for path in files[name] for row in read_file_of(folder, path)] for name in names
    }
    lengths = {name: len(rows[name]) for name in names}
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    return [row for part in parts for row in rows[part.splitname][part.from_ : part.to]]


def read_file_of(folder: Path, path: Path) -> list:
    """Return the rows of one file in a folder. Raises a ValueError that names the file."""
    try:
        return read_file(path, path.read_bytes())
    except Exception as error:  # gzip and pyarrow raise errors of many kinds
        raise ValueError(f"{path.relative_to(folder.resolve())}: {error}") from None


def print_files(folder: Path, read: list[Path]) -> None:
    """Print which files of a folder are read, and which are not."""
    folder_path = folder.resolve()
    files = sorted(path for path in folder_path.rglob("*") if ends_in(path, FILE_SUFFIXES))
    not_read = [path for path in files if path not in read]
    for title, paths in {"Read": sorted(read), "Not read": not_read}.items():
        if paths:
            names = ", ".join(str(path.relative_to(folder_path)) for path in paths)
            print(f"{title:<11} {names} of {folder}")


def load_test_rows(args: argparse.Namespace) -> tuple[list, str]:
    """Load the rows of --test-dataset."""
    name = args.test_dataset
    if is_local(name) or "/" in name:
        return load_rows(name, None, None, None)
    if is_data_file(args.dataset):
        raise ValueError(
            f"no file or folder has this name, and {args.dataset} is a file without splits. "
            "Pass the path of the test file."
        )
    return load_rows(args.dataset, args.config, name, args.revision)


def explain_load_error(name: str, error: Exception) -> str:
    """One line for whatever the file system, pyarrow, datasets or the Hub raise."""
    text = re.sub(r"\[Errno -?\d+\] ", "", f"{error} {error.__cause__ or ''}")
    reason = " ".join(text.split()) or type(error).__name__
    if "gated dataset" in reason:
        return (
            f"{name} is a gated dataset. Open https://huggingface.co/datasets/{name}, accept its "
            "terms, run `hf auth login`, and run this command again."
        )
    if match := re.search(r"Config name is missing.* available configs: \[(.*?)\]", reason):
        return (
            f"{name} has several configurations. Pick one of {match[1]} with --config or, for "
            "--test-dataset, pass a file."
        )
    if "Couldn't reach" in reason:
        return (
            f"{name} is not a local file, it is not in the cache, and the Hub cannot be reached. "
            "Check the network connection and HF_HUB_OFFLINE, or pass a file."
        )
    if "doesn't exist on the Hub" in reason:
        return (
            f"{name} is neither a local file nor a dataset on the Hub. Check the spelling. If the "
            "dataset is private, run `hf auth login` first."
        )
    if isinstance(error, FileNotFoundError) and is_data_file(name):
        return f"{name}: no such file. Check the path, or pass the id of a dataset on the Hub."
    return f"{name}: {reason}"


class Source(NamedTuple):
    """The rows of one dataset, and their version."""

    name: str
    rows: list
    revision: str


def load_sources(args: argparse.Namespace) -> list[Source]:
    """Load --dataset and, where it is given, --test-dataset. Ends the program if that fails."""
    name = args.dataset
    try:
        sources = [Source(name, *load_rows(name, args.config, args.split, args.revision))]
        if args.test_dataset:
            name = args.test_dataset
            sources.append(Source(name, *load_test_rows(args)))
    except Exception as error:  # gzip, pyarrow, datasets and the Hub raise errors of many kinds
        fail(explain_load_error(name, error))
    return sources


# ---- Reading values


def to_json(value: Any) -> str:
    """Write JSON without \\u escapes. Dates, which Parquet files can contain, become text."""

    def write_date(value: Any) -> str:
        if hasattr(value, "isoformat"):
            return value.isoformat()
        raise ValueError(f"a value of type {type(value).__name__}, which JSON cannot represent")

    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=write_date)
    except ValueError as error:
        if "Out of range float" in str(error):
            raise ValueError("NaN or infinity, which JSON cannot represent") from None
        raise


def parse_literal(value: Any) -> Any:
    """Read a text as JSON, or else as a Python literal: the published data has both."""
    if not isinstance(value, str):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            return read(value.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    raise ValueError(
        "tools, turns or calls given as text that is neither JSON nor a Python literal"
    )


def parse_nested(value: Any) -> Any:
    """Read JSON text, even if it was encoded several times."""
    while isinstance(value, str):
        value = parse_literal(value)
    return value


def has_content(value: Any) -> bool:
    """Return whether a value contains more than nulls, empty texts and empty containers."""
    if isinstance(value, dict):
        return any(has_content(item) for item in value.values())
    if isinstance(value, list):
        return any(has_content(item) for item in value)
    return value is not None and value != ""


# The start of a JSON object, or of an array of objects.
JSON_START = re.compile(r'{\s*["}]|\[\s*{')


def find_json(text: str) -> Iterator[tuple[int, int, Any]]:
    """Yield (start, end, value) of each JSON object, or array of objects, within a text."""
    decoder = json.JSONDecoder()
    position = 0
    while match := JSON_START.search(text, position):
        try:
            value, position = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            position = match.start() + 1
            continue
        yield match.start(), position, value


def parse_sequence(text: str) -> list:
    """Read several JSON values in a row, such as one tool per line."""
    values = []
    position = 0
    for start, end, value in find_json(text):
        if text[position:start].strip(" \t\r\n,"):
            break
        values.append(value)
        position = end
    if text[position:].strip():
        return parse_nested(text)  # raises unless it is a single value
    return values


def drop_nulls(value: Any) -> Any:
    """Leave out null values: Arrow gives every object the keys of all others, filled with null."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value


def drop_missing(mapping: dict) -> dict:
    """Leave out the keys without a value: null or, in rows that pandas wrote, NaN."""

    def is_missing(value: Any) -> bool:
        return value is None or (isinstance(value, float) and math.isnan(value))

    return {key: value for key, value in mapping.items() if not is_missing(value)}


def take(mapping: dict, *keys: str) -> Any:
    """Remove the first of the keys that has a value, and return its value, or None.

    Readers of rows, messages and calls remove the keys they use. report_unread counts the rest.
    """
    for key in keys:
        if mapping.get(key) is not None:
            return mapping.pop(key)
    return None


def report_unread(mapping: dict, place: str, notices: Counter) -> None:
    for key, value in mapping.items():
        if has_content(value):
            notices["unread", f"key {to_json(key)} of a {place}"] += 1


# ---- Tools

UNREADABLE_TOOLS = "tools that cannot be read"
SCHEMA_KEYS = [  # as in evaluation.py
    "parameters",
    "input_schema",
    "inputSchema",
    "parametersJsonSchema",
    "parameters_json_schema",
    "inputs",
]

# Where datasets keep a row's tools.
TOOL_KEYS = [
    "tools",
    "available_tools",
    "tools_json",
    "tool_defs",
    "tool_definitions",
    "tool_schemas",
    "functions",
    "available_functions",
    "function_definitions",
    "function_declarations",
    "xml_tools",
]


def read_tools(value: Any) -> list[dict]:
    """Return the tools of a list, of a single tool, or of JSON text of either."""
    if isinstance(value, str) and value.strip() in ("", "None"):
        return []
    value = parse_sequence(value) if isinstance(value, str) else drop_nulls(value)
    tools = list(flatten_tools(value))
    to_json(tools).encode()
    return tools


def flatten_tools(value: Any) -> Iterator[dict]:
    value = parse_nested(value)
    if isinstance(value, list):
        for item in value:
            yield from flatten_tools(item)
    elif isinstance(value, dict) and list(value) == ["tools"]:  # the answer of an MCP server
        yield from flatten_tools(value["tools"])
    elif isinstance(value, dict):
        yield from [read_tool(value)] if value else []
    elif value is not None:
        raise ValueError("a tool that is not an object")


def read_tool(tool: dict) -> dict:
    """Return a tool whose function and schema are objects. Some files have them as JSON text."""
    parts = {}
    for key, value in tool.items():
        is_json = isinstance(value, str) and value.lstrip().startswith("{")
        if is_json and key in ("function", *SCHEMA_KEYS):
            with contextlib.suppress(ValueError, RecursionError):
                value = parse_nested(value)
        parts[key] = read_tool(value) if key == "function" and isinstance(value, dict) else value
    return parts


def get_declarations(tool: dict) -> list:
    """Return the functions that a tool declares: one, or a list of them in Gemini's tools."""
    declarations = tool.get("function_declarations") or tool.get("functionDeclarations")
    return declarations if isinstance(declarations, list) else [tool.get("function") or tool]


def get_names(tool: dict) -> list[str | None]:
    """Return the names that a tool declares, None where a name is missing."""
    names = []
    for declaration in get_declarations(tool):
        name = declaration.get("name") if isinstance(declaration, dict) else None
        names.append(name if isinstance(name, str) and name else None)
    return names


def has_schema(tool: dict) -> bool:
    return any(key in item for item in get_declarations(tool) for key in SCHEMA_KEYS)


def find_tool_blocks(prompt: str) -> list[str]:
    """Return the texts between <tools> and </tools> in a prompt."""
    pieces = prompt.split("<tools>")[1:]
    return [piece.split("</tools>")[0].strip() for piece in pieces if "</tools>" in piece]


def shows_tools(prompt: str, names: list[str | None]) -> bool:
    """Return whether the <tools> blocks of the prompt contain the names of all tools.

    A text that only mentions the tags, or that shows other tools, is not enough.
    """
    shown = "\n".join(find_tool_blocks(prompt))
    return bool(names) and all(name and contains_name(shown, name) for name in names)


def contains_name(text: str, name: str) -> bool:
    """Return whether a name occurs in a text on its own, not as a part of a longer name."""
    return re.search(f"(?<![A-Za-z0-9_-]){re.escape(name)}(?![A-Za-z0-9_-])", text) is not None


def read_declarations(sources: list) -> tuple[list[dict], int]:
    """Return (the tools of all sources, each once; how many sources cannot be read)."""
    tools = []
    num_unreadable = 0
    for source in sources:
        try:
            found = read_tools(source)
        except (TypeError, ValueError, RecursionError):
            num_unreadable += 1
            continue
        known = [tool.get("function", tool) for tool in tools]
        tools += [tool for tool in found if tool.get("function", tool) not in known]
    return tools, num_unreadable


def collect_tools(
    sources: list, messages: list[dict], notices: Counter
) -> tuple[list[dict], bool, bool]:
    """Return (a row's tools, whether all of them can be read, whether the prompt shows them).

    The tools are those that `sources` declare, or else those that the prompt shows, in <tools>
    blocks or as in Glaive's system texts.
    """
    first = itertools.takewhile(lambda message: message["role"] in ("system", "user"), messages)
    prompt = "\n\n".join(message["content"] for message in first)
    tools, num_unreadable = read_declarations(sources)
    is_shown = not tools or shows_tools(prompt, [n for tool in tools for n in get_names(tool)])
    if not tools:
        shown = [block for block in find_tool_blocks(prompt) if block.startswith(("[", "{"))]
        tools, num_unreadable_shown = read_declarations(shown)
        num_unreadable += num_unreadable_shown
    if not tools and not num_unreadable:
        _, written = split_glaive_system(get_system_text(messages))
        # A description alone, which is enough in Glaive's own layout, could be anything here.
        tools = written if any(map(has_schema, written)) else []
    num_nameless = sum(None in get_names(tool) for tool in tools)
    if num_unreadable or num_nameless:
        notices["noticed", UNREADABLE_TOOLS] += num_unreadable + num_nameless
    is_readable = bool(tools or not num_unreadable) and not num_nameless
    return tools, is_readable, is_shown


# ---- Calls

ARGUMENT_KEYS = ["arguments", "args", "input"]
CALL_TYPES = ["function", "function_call", "tool_call"]

# A backslash that is escaped itself, or the escape of one character (two for a surrogate pair).
JSON_ESCAPE = re.compile(
    r"\\\\"
    r"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    r"|\\u[0-9a-fA-F]{4}"
)


def write_plain_letters(json_text: str) -> str:
    """Replace the \\u escapes of JSON text with their characters where JSON allows it."""

    def decode(match: re.Match) -> str:
        if match[0] == "\\\\":
            return match[0]
        character = json.loads(f'"{match[0]}"')
        is_lone_surrogate = "\ud800" <= character <= "\udfff"
        if is_lone_surrogate or character < " " or character in ('"', "\\"):
            return match[0]
        return character

    return JSON_ESCAPE.sub(decode, json_text)


def read_arguments(arguments: Any, keep_nulls: bool, notices: Counter) -> str:
    """Return the arguments of a call as JSON text. If they are text, spacing and nulls are kept."""
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return "{}"
    value = parse_nested(arguments)
    if value is None or value == "" or value == []:
        return "{}"
    if not isinstance(value, dict):
        raise ValueError("a call whose arguments are not an object")
    if not isinstance(arguments, str):
        return to_json(value) if keep_nulls else write_value(value, notices)
    text = to_json(value)  # refuses NaN and infinity
    try:
        is_json = isinstance(json.loads(arguments), dict)
    except ValueError:  # a Python literal
        is_json = False
    return write_plain_letters(arguments.strip()) if is_json else text


def write_value(value: Any, notices: Counter) -> str:
    """Write arguments or a result as JSON, without the nulls that Arrow fills in."""
    without_nulls = drop_nulls(value)
    if without_nulls != value:
        notices["unread", "null values in arguments or results"] += 1
    return to_json(without_nulls)


def read_call(call: Any, keep_nulls: bool, notices: Counter) -> dict:
    """Return {"id", "name", "arguments": JSON text} of a call: OpenAI's, LangChain's or bare."""
    keep_nulls = keep_nulls or isinstance(call, str)
    call = parse_nested(call)
    if not isinstance(call, dict):
        raise ValueError("a call that is not an object with a name and arguments")
    call = drop_missing(call)
    kind = call.pop("type", "function")
    if kind not in CALL_TYPES:
        raise ValueError(f"a call of the unsupported type {to_json(kind)}")
    call_id = take(call, "id", "call_id", "tool_call_id")
    function = call.pop("function", {})
    if isinstance(function, str) and not function.lstrip().startswith("{"):
        function = {"name": function}
    function = parse_nested(function)
    if not isinstance(function, dict):
        raise ValueError("a call whose function is not an object")
    function = drop_missing(function)
    name = take(function, "name") or take(call, "name")
    if not isinstance(name, str) or not name.strip():
        raise ValueError("a call without a name")
    arguments = take_arguments(function, call)
    report_unread({**call, **function}, "call", notices)
    arguments = read_arguments(arguments, keep_nulls, notices)
    return {"id": call_id, "name": name, "arguments": arguments}


def take_arguments(function: dict, call: dict) -> Any:
    """Return the arguments of a call, which are in its function object or next to it.

    Raises ValueError if other keys might contain the arguments, so that they are never lost.
    """
    given = [part.pop(key) for part in (function, call) for key in ARGUMENT_KEYS if key in part]
    given = [value for value in given if not isinstance(value, str) or value.strip()]
    with_content = [value for value in given if value != {}]
    try:
        parsed = [parse_nested(value) for value in with_content]
    except ValueError:
        raise ValueError(
            "a call whose arguments are text that is neither JSON nor a Python literal"
        ) from None
    if any(value != parsed[0] for value in parsed):
        raise ValueError("a call with different arguments in two places")
    others = [key for key in (*function, *call) if key != "index"]
    others = [key for key in others if has_content({**call, **function}[key])]
    if "parameters" in (*function, *call) or (others and not given):
        keys = ", ".join(map(to_json, others or ["parameters"]))
        raise ValueError(f"a call whose arguments may be in the unknown key {keys}")
    return with_content[0] if with_content else None


def read_calls(value: Any, notices: Counter) -> list[dict]:
    """Return the calls of a list, of a single call, or of JSON text of either.

    Empty calls are left out: Arrow fills in the keys of a call where there is none.
    """
    calls = parse_sequence(value) if isinstance(value, str) else value
    if isinstance(calls, list) and len(calls) == 1 and isinstance(calls[0], list):
        calls = calls[0]
    calls = calls if isinstance(calls, list) else [calls]
    calls = [call for call in calls if has_content(call)]
    return [read_call(call, isinstance(value, str), notices) for call in calls]


def render_calls(calls: list[dict]) -> str:
    blocks = []
    for call in calls:
        text = f'{{"name": {to_json(call["name"])}, "arguments": {call["arguments"]}}}'
        blocks.append(f"<tool_call>\n{text}\n</tool_call>")
    return "\n".join(blocks)


# ---- Messages

# Role names found in datasets, mapped to OpenAI's roles. A turn of CALL_ROLES contains only calls,
# as JSON.
CALL_ROLES = ["function_call", "tool_call", "tool_calls"]
ROLES = {
    **dict.fromkeys(["system", "developer"], "system"),
    **dict.fromkeys(["user", "human"], "user"),
    **dict.fromkeys(["assistant", "model", "gpt", "ai", "bot", *CALL_ROLES], "assistant"),
    **dict.fromkeys(["tool", "observation", "function", "environment", "ipython"], "tool"),
    **dict.fromkeys(["function_response", "tool_response", "tool_output"], "tool"),
    **dict.fromkeys(["tool_result", "tool_results"], "tool"),
}
SYSTEM_KEYS = ["system", "system_prompt"]
LANGCHAIN_TYPES = ["human", "ai", "system", "tool"]  # in "type" instead of "role"
THOUGHT_KEYS = ["reasoning_content", "thinking", "reasoning", "thought"]
LOSS_KEYS = ["weight", "train", "loss", "trainable", "training", "loss_weight"]
TEXT_PART_TYPES = ["text", "input_text", "output_text", "refusal"]
THOUGHT_PART_TYPES = ["thinking", "reasoning"]
UNREAD_PARTS = {
    "tool_use": "Anthropic's content blocks",
    "tool_result": "Anthropic's content blocks",
    "toolUse": "Bedrock's content blocks",
    "toolResult": "Bedrock's content blocks",
    "functionCall": "Gemini's parts",
    "functionResponse": "Gemini's parts",
}


def read_parts(parts: list, notices: Counter) -> tuple[str, list[str]]:
    """Return (text, thoughts) of a message whose content is a list of parts."""
    texts = []
    thoughts = []
    for part in parts:
        part = {"text": part} if isinstance(part, str) else drop_nulls(part)
        if not isinstance(part, dict):
            raise ValueError("a content part that is not an object")
        kind = part.pop("type", "text")
        for name in (str(kind), *part):
            if name in UNREAD_PARTS:
                raise ValueError(f"{UNREAD_PARTS[name]} ({name}) are not supported")
        if kind in THOUGHT_PART_TYPES:
            thoughts.append(take(part, "thinking", "reasoning", "text") or "")
        elif kind in TEXT_PART_TYPES:
            texts.append(take(part, "text", "refusal") or "")
        else:
            raise ValueError(f"a content part that is not text (type {to_json(kind)})")
        report_unread(part, "content part", notices)
    if not all(isinstance(text, str) for text in texts + thoughts):
        raise ValueError("a content part that is not text")
    return "\n".join(texts), thoughts


def read_text(content: Any, notices: Counter) -> tuple[str, list[str]]:
    """Return (text, thoughts) of the content of a system, user or assistant message."""
    if content is None:
        return "", []
    if isinstance(content, str):
        return content, []
    if isinstance(content, list):
        return read_parts(content, notices)
    raise ValueError("the content of a message is not text or a list of text parts")


def read_result(content: Any, notices: Counter) -> str:
    """Return the text of a tool message: its text, or its JSON value as JSON."""
    if content is None or isinstance(content, str):
        return content or ""
    if content and isinstance(content, list) and all(is_text_part(part) for part in content):
        return read_parts(content, notices)[0]
    return write_value(content, notices)


def is_text_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    part = drop_nulls(part)
    return part.get("type") in TEXT_PART_TYPES or list(part) == ["text"]


def take_loss_mark(message: dict, role: str) -> bool:
    """Return False if the message is marked as not to be trained on (weight 0, train false ...)."""
    may_carry_loss = True
    for key in LOSS_KEYS:
        value = str(message.get(key)).lower()
        if value in ("0", "0.0", "false"):
            may_carry_loss = False
        elif value not in ("1", "1.0", "true") or role != "assistant":
            continue  # reported as unread
        del message[key]
    return may_carry_loss


def take_thoughts(message: dict) -> list[str]:
    return [message.pop(key) for key in THOUGHT_KEYS if isinstance(message.get(key), str)]


def write_thoughts(thoughts: list[str], text: str) -> str:
    """Write the thoughts before a turn's text, unless a <think> block contains them already."""
    written = "\n".join(piece.split("</think>")[0] for piece in text.split("<think>")[1:])
    new = []
    for thought in thoughts:
        thought = thought.replace("<think>", "").replace("</think>", "").strip()
        if thought and thought not in written and thought not in new:
            new.append(thought)
    if not new:
        return text
    block = "<think>" + "\n\n".join(new) + "</think>"
    return f"{block}\n{text}" if text.strip() else block


def split_call_turn(content: Any) -> tuple[str, Any]:
    """Return (text, calls) of a turn of calls as JSON, possibly after a <think> block."""
    if not isinstance(content, str):
        return "", content
    if contains_calls(content):
        return content, None
    thought, calls = re.fullmatch(r"(\s*<think>.*?</think>)?(.*)", content, re.DOTALL).groups()
    return (thought or "").strip(), calls if calls.strip() else None


def read_assistant_message(message: dict, is_call_turn: bool, notices: Counter) -> dict:
    content = take(message, "content", "value")
    if not has_content(content):
        content = take(message, "refusal")
    calls = None
    if is_call_turn:
        content, calls = split_call_turn(content)
    text, thoughts = read_text(content, notices)
    text = write_thoughts(take_thoughts(message) + thoughts, text)
    tool_calls = read_calls(calls, notices)
    for key in ("tool_calls", "function_call"):
        more = read_calls(message.pop(key, None), notices)
        if not more:
            continue
        if not tool_calls:
            tool_calls = more
        elif not are_same_calls(tool_calls, more):
            raise ValueError(f'a turn whose "{key}" differs from its other calls')
    if contains_calls(text) and tool_calls and not has_same_calls(text, tool_calls):
        raise ValueError("a turn whose text and tool_calls contain different calls")
    return {"content": text, "tool_calls": tool_calls}


CALL_OR_THOUGHT = re.compile(
    "(<tool_call>(?:(?!<tool_call>).)*?</tool_call>)|<think>(?:(?!<think>).)*?</think>", re.DOTALL
)


def drop_thoughts(text: str) -> str:
    """Leave out the <think> blocks of a text: a call inside a thought is only a draft."""
    return CALL_OR_THOUGHT.sub(lambda match: match[1] or "", text)


def contains_calls(text: str) -> bool:
    """Return whether a text has a <tool_call> block. The opening tag alone is not enough."""
    text = drop_thoughts(text)
    return "<tool_call>" in text and "</tool_call>" in text


def has_same_calls(text: str, calls: list[dict]) -> bool:
    """Return whether the <tool_call> blocks of a text are these calls."""
    try:
        in_text = [read_call(block, True, Counter()) for block in find_call_blocks(text)]
    except (TypeError, ValueError, RecursionError):
        return False
    return are_same_calls(in_text, calls)


def are_same_calls(calls: list[dict], others: list[dict]) -> bool:
    """Return whether two lists have the same calls, apart from ids, spacing and nulls."""

    def read_number(text: str) -> int | float:
        return int(float(text)) if float(text).is_integer() else float(text)

    def comparable(call: dict) -> tuple[str, str]:  # 1 is 1.0, but it is not true
        arguments = drop_nulls(json.loads(call["arguments"], parse_float=read_number))
        return call["name"], json.dumps(arguments, sort_keys=True)

    return list(map(comparable, calls)) == list(map(comparable, others))


def normalize_message(message: Any, notices: Counter) -> dict:
    """Return an OpenAI-style message of text: {"role", "content", ...}.

    An assistant message also has "tool_calls" and "train", a tool message "tool_call_id" and
    "name", a system message the "tools" that it declares. Raises ValueError if it cannot be read.
    """
    if not isinstance(message, dict):
        raise ValueError("a turn that is not an object with a role")
    message = drop_missing(message)
    if "parts" in message:
        raise ValueError('messages with "parts" (Gemini, Vercel AI) are not supported')
    spelled = take(message, "role", "from")
    if spelled is None and message.get("type") in LANGCHAIN_TYPES:
        spelled = message.pop("type")
    if spelled is None:
        raise ValueError('a message without "role" or "from"')
    name = re.sub("[ -]", "_", str(spelled).strip().lower())
    if name not in ROLES:
        raise ValueError(f"unknown role {spelled!r}")
    role = ROLES[name]
    normalized = {"role": role}
    may_carry_loss = take_loss_mark(message, role)
    if role == "assistant":
        normalized |= read_assistant_message(message, name in CALL_ROLES, notices)
        normalized["train"] = may_carry_loss
    elif role == "tool":
        normalized["tool_call_id"] = take(message, "tool_call_id", "call_id")
        normalized["name"] = take(message, "name") or take(message, "tool_name")
        normalized["content"] = read_result(take(message, "content", "value"), notices)
    else:
        normalized["content"], thoughts = read_text(take(message, "content", "value"), notices)
        if thoughts:
            raise ValueError(f"a thought in a turn with role {role}")
    if role == "system":
        normalized["tools"] = take_tools(message)
    report_unread(message, f"message with role {role}", notices)
    return normalized


# ---- Layouts: each function returns the messages of a row, and removes the keys that it reads


def read_openai(row: dict) -> list:
    """{"messages": [{"role", "content", "tool_calls"}]}, as a list or as JSON text."""
    return parse_nested(row.pop("messages"))


def read_sharegpt(row: dict) -> list:
    """{"conversations": [{"from", "value"}]}, as a list or as JSON text."""
    return parse_nested(row.pop("conversations"))


def read_xlam(row: dict) -> list:
    """{"query", "answers": calls}, one question and the calls that answer it."""
    calls = row.pop("answers")
    if calls in ([], "[]"):
        raise ValueError('no calls in "answers"')
    return [
        {"role": "user", "content": row.pop("query")},
        {"role": "assistant", "tool_calls": calls},
    ]


def read_glaive(row: dict) -> list:
    """{"system", "chat"}, two texts; the tools are JSON objects within the system text."""
    system = str(row.pop("system", "")).strip().removeprefix("SYSTEM:").strip()
    if not has_content(row.get("tools")) or row["tools"] == "[]":
        system, row["tools"] = split_glaive_system(system)
    chat = row.pop("chat")
    if not isinstance(chat, str):
        raise ValueError('a "chat" that is not text')
    pieces = re.split(r"^[ \t]*(USER|ASSISTANT|FUNCTION RESPONSE):", chat, flags=re.MULTILINE)
    if pieces[0].strip():
        raise ValueError('a "chat" that does not begin with USER:')
    messages = [{"role": "system", "content": system}]
    for speaker, text in zip(pieces[1::2], pieces[2::2], strict=True):
        text = text.replace("<|endoftext|>", "").strip()
        if speaker == "USER":
            messages.append({"role": "user", "content": text})
        elif speaker == "FUNCTION RESPONSE":
            messages.append({"role": "tool", "content": text})
        else:
            text, *calls = text.replace("</functioncall>", "").split("<functioncall>")
            calls = [read_glaive_call(call) for call in calls]
            messages.append({"role": "assistant", "content": text.strip(), "tool_calls": calls})
    return messages


def split_glaive_system(text: str) -> tuple[str, list[dict]]:
    """Return (system text without the tools, tools).

    Tools are JSON objects with names, of which at least one has a description or parameters.
    """
    tools = []
    pieces = []
    position = 0
    for start, end, value in find_json(text):
        found = value if isinstance(value, list) else [value]
        if all(isinstance(tool, dict) for tool in found) and are_tools(found):
            tools += found
            pieces.append(text[position:start].rstrip())
            position = end
    pieces.append(text[position:])
    return "".join(pieces).strip(), tools


def are_tools(values: list[dict]) -> bool:
    if any(None in get_names(value) for value in values):
        return False
    return any(has_schema(value) or "description" in value for value in values)


def read_glaive_call(text: str) -> dict:
    """Read {"name": "f", "arguments": '{"a": 1}'}, which is JSON except for the single quotes."""
    quoted = re.search(r'"arguments":\s*\'(.*)\'\s*}\s*$', text, re.DOTALL)
    if not quoted:
        return parse_literal(text)
    return {**parse_literal(text[: quoted.start()] + '"arguments": null}'), "arguments": quoted[1]}


# Each layout with the keys of a row that identify it. A new layout is a line here and a function
# that turns a row into OpenAI-style messages. It pops every key that it reads, because the
# remaining keys are reported as unread. If its messages can contain something new, the chat
# template of function_calling_train.py must render it exactly as the split contains it.
LAYOUTS = {
    '"messages" (OpenAI)': (["messages"], read_openai),
    '"conversations" (from/value)': (["conversations"], read_sharegpt),
    '"query" and "answers" (xLAM, APIGen)': (["query", "answers"], read_xlam),
    '"system" and "chat" (Glaive v2)': (["chat"], read_glaive),
}
LAYOUT_NAMES = ", ".join(LAYOUTS)
UNREAD_LAYOUTS = {
    "contents": 'Gemini\'s "contents"',
    "prompt": 'TRL\'s "prompt" and "completion"',
    "chosen": 'preference pairs, "chosen" and "rejected"',
    "instruction": 'Alpaca\'s "instruction" and "output"',
    "text": 'plain "text"',
}


def read_messages(row: dict) -> list:
    """Return a row's messages as its layout has them. Raises ValueError for an unread layout."""
    for keys, read_layout in LAYOUTS.values():
        if all(key in row for key in keys) and has_content(row[keys[0]]):
            messages = read_layout(row)
            if isinstance(messages, dict):
                raise ValueError(
                    f'an object instead of a list of turns in "{keys[0]}" (from pandas, save the '
                    'rows with df.to_json(path, orient="records", lines=True))'
                )
            if not isinstance(messages, list):
                raise ValueError(f'no list of turns in "{keys[0]}"')
            return messages
    for key, layout in UNREAD_LAYOUTS.items():
        if has_content(row.get(key)):
            raise ValueError(f"this layout is not supported: {layout}")
    for keys, _ in LAYOUTS.values():
        if all(key in row for key in keys):
            raise ValueError(f'an empty "{keys[0]}"')
    keys = ", ".join(map(to_json, row)) or "only an id"
    raise ValueError(f"the keys of the row match no supported layout: {keys}")


# ---- From a row to a record of the split


class Conversation(NamedTuple):
    """A normalized row."""

    id: Any
    messages: list[dict]  # as normalize_message returns them
    tools: list[dict]
    has_readable_tools: bool  # whether all tools can be read
    shows_tools: bool  # whether the messages show the tools already


def normalize_row(row: Any, notices: Counter) -> Conversation:
    """Read a row of any layout. Raises ValueError if it cannot be converted."""
    if not isinstance(row, dict):
        raise ValueError('a row that is not an object such as {"messages": [...]}')
    row = drop_missing(row)
    row_id = take(row, "id")
    messages = [normalize_message(message, notices) for message in read_messages(row)]
    for key in SYSTEM_KEYS:
        system = normalize_message({"role": "system", "content": row.pop(key, None)}, notices)
        if system["content"].strip() and system["content"] != get_system_text(messages):
            messages.insert(0, system)
    sources = take_tools(row)
    template_options = row.get("chat_template_kwargs")
    if isinstance(template_options, dict):
        row["chat_template_kwargs"] = dict(template_options)
        sources += take_tools(row["chat_template_kwargs"])
    for message in messages:
        sources += message.get("tools", [])
    report_unread(row, "row", notices)
    return Conversation(row_id, messages, *collect_tools(sources, messages, notices))


def take_tools(mapping: dict) -> list:
    """Remove and return the values of all TOOL_KEYS."""
    return [mapping.pop(key) for key in TOOL_KEYS if has_content(mapping.get(key))]


def get_system_text(messages: list[dict]) -> str:
    texts = [message["content"] for message in messages if message["role"] == "system"]
    return "\n\n".join(text for text in texts if text.strip())


def order_results(results: list[dict], calls: list[dict], notices: Counter) -> list[dict]:
    """Return tool messages in the order of their calls.

    They are matched by id if every id fits a call, or else by name if every name does. Otherwise
    their order is kept. Results with the same id or name belong to their calls in order, and extra
    ones to the last such call.
    """
    for call_key, result_key in (("id", "tool_call_id"), ("name", "name")):
        places: dict[str, list[int]] = {}
        for place, call in enumerate(calls):
            if call[call_key] not in (None, ""):
                places.setdefault(str(call[call_key]), []).append(place)
        if all(str(result[result_key]) in places for result in results):
            placed = []
            for result in results:
                free = places[str(result[result_key])]
                placed.append((free.pop(0) if len(free) > 1 else free[0], result))
            return [result for _, result in sorted(placed, key=lambda pair: pair[0])]
    ids = {str(call["id"]) for call in calls}
    given = [result["tool_call_id"] for result in results]
    given = [result_id for result_id in given if result_id not in (None, "")]
    if num_lost := sum(str(result_id) not in ids for result_id in given):
        notices["noticed", "results whose tool_call_id matches no call"] += num_lost
    return results


def render_assistant(messages: list[dict]) -> dict:
    """Join the messages of an assistant's turn, texts by a blank line, calls by a line break."""
    joined = ""
    for message in messages:
        pieces = [message["content"]]
        if not contains_calls(message["content"]):
            pieces.append(render_calls(message["tool_calls"]))
        for text in pieces:
            if not text.strip():
                continue
            separator = "\n" if text.startswith("<tool_call>") else "\n\n"
            joined += (separator if joined else "") + text
    turn = {"role": "assistant", "content": joined}
    if not all(message["train"] for message in messages):
        turn["train"] = False
    return turn


def render_results(messages: list[dict]) -> dict:
    blocks = []
    for message in messages:
        text = message["content"]
        if not text.lstrip().startswith("<tool_response>"):
            text = f"<tool_response>\n{text}\n</tool_response>"
        blocks.append(text)
    return {"role": "tool", "content": "\n".join(blocks)}


# The roles that may follow a role.
FOLLOWERS = {
    None: ["user"],
    "user": ["assistant"],
    "assistant": ["user", "tool"],
    "tool": ["assistant"],
}


def render_turns(messages: list[dict], notices: Counter) -> list[dict]:
    """Return the turns of a split, without system text and tools.

    Consecutive messages with the same role are joined.

    The chat template of function_calling_train.py renders OpenAI's messages in the same way.
    """
    turns = []
    calls = []
    previous = None
    for role, group in itertools.groupby(messages, key=lambda message: message["role"]):
        group = list(group)
        if role == "system" and previous is None:
            continue
        if role not in FOLLOWERS[previous]:
            expected = " or ".join(FOLLOWERS[previous])
            where = "" if previous else " in the first turn"
            raise ValueError(f"expected a turn with role {expected}, found role {role}{where}")
        if role == "assistant":
            calls = [call for message in group for call in message["tool_calls"]]
            turn = render_assistant(group)
        elif role == "tool":
            turn = render_results(order_results(group, calls, notices))
        else:
            texts = [message["content"] for message in group if message["content"].strip()]
            turn = {"role": role, "content": "\n\n".join(texts)}
        if not turn["content"].strip():
            raise ValueError(f"an empty turn with role {role}")
        turns.append(turn)
        previous = role
    if not any(turn["role"] == "assistant" and turn.get("train", True) for turn in turns):
        raise ValueError("no assistant turn to train on")
    return turns


def make_record(
    conversation: Conversation, turns: list[dict], before_request: str, notices: Counter
) -> dict:
    """Return {"id", "messages", "tools"}: the turns with system text and tools in the first one."""
    system = get_system_text(conversation.messages)
    tools = to_json(conversation.tools)
    parts = [system] if system else []
    if not conversation.shows_tools:
        parts.append(BEFORE_TOOLS + tools + AFTER_TOOLS)
    if parts:
        request = "\n\n".join(parts) + before_request + turns[0]["content"]
        turns = [{**turns[0], "content": request}, *turns[1:]]
    record = {"id": conversation.id, "messages": turns, "tools": tools}
    if not conversation.has_readable_tools:
        record["tools"] = None
    inspect_record(record, notices)
    return record


class Converted(NamedTuple):
    record: dict
    key: str  # the turns as JSON without the prompt, to find repeated conversations


def convert(row: Any, before_request: str, notices: Counter) -> Converted:
    """Convert a row. Raises ValueError if that is impossible."""
    conversation = normalize_row(row, notices)
    turns = render_turns(conversation.messages, notices)
    record = make_record(conversation, turns, before_request, notices)
    return Converted(record, key=to_json(turns))


def convert_row(
    row: Any, before_request: str = THINK_INSTRUCTION, notices: Counter | None = None
) -> dict:
    """Return the record of a single row. Raises ValueError if it cannot be converted."""
    return convert(row, before_request, Counter() if notices is None else notices).record


# ---- Checks on finished records

# Text that indicates a call in an unsupported format.
FOREIGN_MARKERS = [
    "<functioncall>",
    "<function_call",
    "<function=",
    "<invoke",
    "<tool_use>",
    "<tool_calls>",
    "<TOOLCALL>",
    "<|tool_call",
    "<|python_tag|>",
    "<|channel|>",
    "<\uff5ctool",
    "\u273fFUNCTION\u273f",
    "[TOOL_CALLS]",
    "functools[",
    "<start_function_call>",
    "```tool_code",
    "Action Input:",
]
UNREADABLE_CALLS = "calls that cannot be read"
FOREIGN_CALLS = "turns with calls in an unsupported format, kept as text"
FOREIGN_ARGUMENT_KEYS = ["arguments", "parameters", "args", "input", "action_input"]


def find_foreign_call(text: str, names: set[str]) -> str | None:
    """Name the unsupported format in which the text of a turn seems to make a call, if any."""
    text = drop_thoughts(text)
    text = re.sub("<tool_call>.*?(</tool_call>|\\Z)", "", text, flags=re.DOTALL).strip()
    for marker in FOREIGN_MARKERS:
        if marker in text:
            return marker
    text = text.removeprefix("```json").removesuffix("```").strip()
    if re.match(r"\[\s*[A-Za-z_][\w .-]*\(", text) and text.endswith((")]", ") ]")):
        return "[f(a=1)], as in ToolACE"
    if text.startswith(("{", "[")) and text.endswith(("}", "]")):
        if any(f'"{key}"' in text for key in FOREIGN_ARGUMENT_KEYS):
            return "bare JSON"
    if any(re.search(rf"(?<![\w.]){re.escape(name)}\(", text) for name in names if name):
        return "f(a=1)"
    found = [value if isinstance(value, list) else [value] for _, _, value in find_json(text)]
    objects = [value for values in found for value in values if isinstance(value, dict)]
    calls = [call for call in objects if not call.keys().isdisjoint(FOREIGN_ARGUMENT_KEYS)]
    if any(isinstance(call.get("name"), str) and call["name"] in names for call in calls):
        return "bare JSON"
    return None


def find_call_blocks(text: str) -> list[str]:
    """Return the texts of all <tool_call> blocks; that of a block without a closing tag is ""."""
    return re.findall("<tool_call>(?:(.*?)</tool_call>)?", drop_thoughts(text), re.DOTALL)


def read_call_block(block: str) -> str:
    """Return the name in a <tool_call> block. Raises ValueError if a parser could not read it."""
    call = parse_literal(block)
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ValueError
    others = [key for key in call if key not in ("name", "arguments") and has_content(call[key])]
    arguments = call.get("arguments")
    if "parameters" in call or (others and not has_content(arguments)):
        raise ValueError
    if has_content(arguments) and not isinstance(arguments, dict):
        raise ValueError
    return call["name"]


def inspect_record(record: dict, notices: Counter) -> None:
    """Count calls and turns that a user should look at."""
    declared = json.loads(record["tools"]) if record["tools"] else []
    names = {name for tool in declared for name in get_names(tool)}
    for turn in record["messages"]:
        if turn["role"] != "assistant":
            continue
        if not turn.get("train", True):
            notices["noticed", "turns excluded from training and evaluation"] += 1
        for block in find_call_blocks(turn["content"]):
            try:
                name = read_call_block(block)
            except (TypeError, ValueError):
                notices["noticed", UNREADABLE_CALLS] += 1
                continue
            if name not in names and record["tools"] is not None:
                notices["noticed", "calls to a tool that the row does not declare"] += 1
        if style := find_foreign_call(turn["content"], names):
            notices["noticed", f"{FOREIGN_CALLS}: {style}"] += 1


# ---- From rows to splits


MAX_REASONS = 10  # number of reasons printed for each kind
MAX_REASON_LENGTH = 300  # characters
ENOUGH_TEST_CALLS = 50  # for confidence intervals that are narrow enough to compare two runs


def shorten(reason: str) -> str:
    """Return a reason, which can quote text of a row, as one short line of valid Unicode."""
    line = " ".join(reason.encode(errors="replace").decode().split())
    return line if len(line) <= MAX_REASON_LENGTH else line[:MAX_REASON_LENGTH] + "..."


class Report:
    """What was found in the rows of one dataset: how often, in how many rows, and where first."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.num_kept = 0
        self.found: dict[str, dict[str, dict]] = {
            "dropped": {},  # rows
            "unread": {},  # content of rows that are kept
            "noticed": {},  # content that is used but looks wrong
        }

    def add(
        self, kind: str, reason: str, row_number: int, count: int = 1, unread: list | None = None
    ) -> None:
        reason = shorten(reason)
        start = {"count": 0, "rows": 0, "first_row": row_number}
        if unread:
            start["unread_in_first_row"] = list(map(shorten, unread))
        entry = self.found[kind].setdefault(reason, start)
        entry["count"] += count
        entry["rows"] += 1

    def as_dict(self) -> dict:
        num_rows = len(self.source.rows)
        return {"rows_loaded": num_rows, "rows_kept": self.num_kept, **self.found}

    def print(self) -> None:
        num_rows = len(self.source.rows)
        print(f"Rows        {num_rows:,} loaded from {self.source.name}, {self.num_kept:,} kept")
        for kind, reasons in self.found.items():
            for reason, entry in itertools.islice(reasons.items(), MAX_REASONS):
                where = f"first in row {entry['first_row']:,}"
                if entry["count"] != entry["rows"]:
                    where = f"in {entry['rows']:,} row{'s' * (entry['rows'] > 1)}, {where}"
                if unread := entry.get("unread_in_first_row"):
                    where += f"; not read: {', '.join(unread)}"
                print(f"  {kind:<9} {entry['count']:,}: {reason} ({where})")
            if len(reasons) > MAX_REASONS:
                num_others = len(reasons) - MAX_REASONS
                print(f"  {kind:<9} {num_others:,} other reasons, listed in dataset_info.json")


def convert_rows(rows: list, before_request: str, report: Report) -> list[Converted | None]:
    """Convert all rows. A row that is dropped becomes None."""
    converted = []
    rows = tqdm(rows, "Converting", unit=" rows", leave=False, disable=None)
    for number, row in enumerate(rows, start=1):
        notices = Counter()
        try:
            item = convert(row, before_request, notices)
            to_json(item.record).encode()
        except (TypeError, ValueError, RecursionError) as error:
            reason = str(error)
            if isinstance(error, UnicodeEncodeError):
                reason = "text that is not valid Unicode (half of a surrogate pair)"
            # An unread key is often the cause, for example a misspelled one.
            unread = [content for kind, content in notices if kind == "unread"]
            report.add("dropped", reason, number, unread=unread)
            converted.append(None)
            continue
        for (kind, reason), count in notices.items():
            report.add(kind, reason, number, count)
        converted.append(item)
    return converted


def check_repeated(
    converted: list[Converted | None], seen: set[str], drop_duplicates: bool, report: Report
) -> list[Converted | None]:
    """Count the conversations that repeat one in `seen` or an earlier one; drop them if asked."""
    checked = []
    for number, item in enumerate(converted, start=1):
        if item and item.key in seen:
            report.add(
                "dropped" if drop_duplicates else "noticed", "repeated conversations", number
            )
            item = None if drop_duplicates else item
        if item:
            seen.add(item.key)
        checked.append(item)
    return checked


def make_ids_unique(converted: list[Converted | None]) -> None:
    """Give every record an id that no other one has: predictions are traced back by their id."""
    ids = set()
    for number, item in enumerate(converted, start=1):
        if item is None:
            continue
        given = item.record["id"]
        record_id = f"row-{number}" if given in (None, "") else str(given)
        while record_id in ids:
            record_id += f"-row-{number}"
        ids.add(record_id)
        item.record["id"] = record_id


def draw_split(
    converted: list[Converted | None], test_size: float, seed: int
) -> dict[str, list[Converted | None]]:
    """Draw the split over all rows, so that a dropped row does not move any other row."""
    import datasets

    rows = datasets.Dataset.from_dict({"row": range(len(converted))})
    try:
        drawn = rows.train_test_split(test_size=test_size, seed=seed)
    except ValueError:
        fail(
            f"too few rows ({len(rows)}) to draw a test split with --test-size {test_size}. Use "
            "more rows or another --test-size."
        )
    return {name: [converted[row] for row in drawn[name]["row"]] for name in SPLIT_FILES}


def check_any_kept(converted: list[Converted | None], report: Report) -> None:
    """End the program if no row of a dataset could be converted."""
    num_rows = len(report.source.rows)
    if num_rows == 0:
        fail(f"{report.source.name} contains no rows.")
    if not any(converted):
        reasons = []
        for reason, entry in report.found["dropped"].items():
            unread = ", ".join(entry.get("unread_in_first_row", []))
            reasons.append(f"{reason} (not read: {unread})" if unread else reason)
        if len(reasons) > MAX_REASONS:
            reasons[MAX_REASONS:] = [f"{len(reasons) - MAX_REASONS} other reasons"]
        reasons = "; ".join(reasons)
        is_about_layout = "layout" in reasons or "not supported" in reasons
        advice = f" Supported layouts: {LAYOUT_NAMES}." if is_about_layout else ""
        fail(f"none of the {num_rows} rows of {report.source.name} can be used: {reasons}.{advice}")


def describe_split(records: list[dict]) -> dict[str, int]:
    """Count the turns that carry loss in training and are queries in evaluation."""
    turns = [turn for record in records for turn in record["messages"]]
    said = [t["content"] for t in turns if t["role"] == "assistant" and t.get("train", True)]
    num_calls = sum("<tool_call>" in drop_thoughts(text) for text in said)
    return {
        "conversations": len(records),
        "declare_tools": sum(record["tools"] != "[]" for record in records),
        "tool_call_turns": num_calls,
        "helpful_turns": len(said) - num_calls,
    }


def write_splits(splits: dict[str, list[Converted]], info: dict, folder: Path) -> None:
    """Write the two splits and dataset_info.json.

    Earlier versions are replaced only after all three have been written.
    """
    texts = {}
    for name, items in splits.items():
        records = [item.record for item in items]
        text = "".join(to_json(record) + "\n" for record in records).encode()
        texts[SPLIT_FILES[name]] = text
        digest = hashlib.sha256(text).hexdigest()
        info[name] = {"file": SPLIT_FILES[name], "sha256": digest, **describe_split(records)}
    in_train = {item.key for item in splits["train"]}
    info["test"]["also_in_train"] = sum(item.key in in_train for item in splits["test"])
    texts["dataset_info.json"] = json.dumps(info, indent=2, ensure_ascii=False).encode() + b"\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / f"{name}.tmp").write_bytes(text)
        for name in texts:
            (folder / f"{name}.tmp").replace(folder / name)
    except OSError as error:
        with contextlib.suppress(OSError):
            for name in texts:
                (folder / f"{name}.tmp").unlink(missing_ok=True)
        fail(
            f"cannot write to --output-dir {folder} ({error.strerror}). Choose another "
            "folder, or free some disk space."
        )


def print_summary(info: dict, reports: list[Report], output_dir: Path) -> None:
    for name in SPLIT_FILES:
        split = info[name]
        print(
            f"{name.title():<11} {split['conversations']:,} conversations, "
            f"{split['tool_call_turns']:,} turns with calls, "
            f"{split['helpful_turns']:,} other model turns"
        )
    if num_repeated := info["test"]["also_in_train"]:
        print(
            f"warning: {num_repeated:,} of the test conversations are also in the train split, "
            "which raises the scores. --drop-duplicates drops repeated conversations."
        )
    noticed = [reason for report in reports for reason in report.found["noticed"]]
    if any(reason.startswith((FOREIGN_CALLS, UNREADABLE_CALLS)) for reason in noticed):
        print(
            "warning: some calls cannot be read or have an unsupported format. The model would "
            "learn to write calls that way, and the evaluation would not count them. Put the calls "
            'into the key "tool_calls", or write each into the text as <tool_call>{"name": "f", '
            '"arguments": {}}</tool_call>.'
        )
    has_calls = any(info[name]["tool_call_turns"] for name in SPLIT_FILES)
    num_test_calls = info["test"]["tool_call_turns"]
    if has_calls and num_test_calls < ENOUGH_TEST_CALLS:
        print(
            f"warning: the test split has only {num_test_calls} turns with calls, so the scores of "
            f"calls will be imprecise. Use at least {ENOUGH_TEST_CALLS}."
        )
    declares_tools = any(info[name]["declare_tools"] for name in SPLIT_FILES)
    if not has_calls:
        found = "tools are declared but no turn calls one"
        if not declares_tools:
            found = "no turn calls a tool"
        print(f"warning: {found}. The model would learn never to call a tool.")
    if UNREADABLE_TOOLS in noticed:
        print(
            "warning: some tools cannot be read, and may be missing from the prompts. A tool is an "
            'object such as {"name": "get_weather", "parameters": {"type": "object"}}.'
        )
    if has_calls and not declares_tools:
        print(
            "warning: turns call tools, but no row declares any, so no prompt shows them. Put the "
            'tools of each row into its key "tools".'
        )
    command = ["python", "function_calling_train.py"]
    if output_dir != DEFAULT_OUTPUT_DIR:
        command += ["--train-file", str(output_dir / SPLIT_FILES["train"])]
    print(f"Next        {shlex.join(command)}")


def is_published_split(args: argparse.Namespace) -> bool:
    """Return whether the splits are those of the published figures, row for row."""
    published = (DEFAULT_DATASET, DEFAULT_CONFIG, "train", DEFAULT_TEST_SIZE, DEFAULT_SEED)
    given = (args.dataset, args.config, args.split, args.test_size, args.seed)
    changes = (
        args.revision,
        args.test_dataset,
        args.drop_duplicates,
        args.no_think_instruction,
    )
    return given == published and not any(changes)


def run(args: argparse.Namespace) -> None:
    before_request = "\n\n" if args.no_think_instruction else THINK_INSTRUCTION
    seen: set[str] = set()
    reports = []
    datasets_read = []
    for source in load_sources(args):
        report = Report(source)
        converted = convert_rows(source.rows, before_request, report)
        check_any_kept(converted, report)
        converted = check_repeated(converted, seen, args.drop_duplicates, report)
        make_ids_unique(converted)
        report.num_kept = sum(item is not None for item in converted)
        report.print()
        reports.append(report)
        datasets_read.append(converted)
    if args.test_dataset:
        splits = dict(zip(SPLIT_FILES, datasets_read, strict=True))
    else:
        splits = draw_split(datasets_read[0], args.test_size, args.seed)
    splits = {name: [item for item in items if item] for name, items in splits.items()}
    for name, items in splits.items():
        if not items:
            fail(
                f"no conversation is left for the {name} split. The lines above say why rows were "
                "dropped. Use more rows."
            )
    info = {
        "source": {
            "dataset": args.dataset,
            "config": args.config,
            "split": args.split,
            "revision": args.revision,
            "resolved_revision": reports[0].source.revision,
        },
        "is_hub_dataset": not is_local(args.dataset),
        "is_published_split": is_published_split(args),
        "seed": args.seed,
        "prompt": {
            "before_tools": BEFORE_TOOLS,
            "after_tools": AFTER_TOOLS,
            "before_request": before_request,
        },
        **reports[0].as_dict(),
    }
    if args.test_dataset:
        info["test_source"] = {
            "dataset": args.test_dataset,
            "resolved_revision": reports[1].source.revision,
            **reports[1].as_dict(),
        }
    write_splits(splits, info, args.output_dir)
    print_summary(info, reports, args.output_dir)


def main(argv: list[str] | None = None) -> None:
    with contextlib.suppress(AttributeError):  # the output of a notebook cannot be reconfigured
        sys.stdout.reconfigure(errors="backslashreplace")  # a file on Windows may not be UTF-8
    args = parse_args(argv)
    logging.disable()  # explain_load_error reports the errors of libraries
    warnings.simplefilter("ignore")
    try:
        run(args)
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was written")


if __name__ == "__main__":
    main()
