"""Score how well a model calls functions and answers, before and after training (step 3 of 3).

    python evaluation.py --baseline                                       # gemma-3-1b-it as it is
    python evaluation.py                                                  # with the adapter of step 2
    python evaluation.py --model google/gemma-3-270m-it
    torchrun --nproc_per_node 2 evaluation.py                             # two GPUs, each its share of the queries

Every model turn of every test conversation is one query: the turns before it are the prompt, the turn itself is the
reference. A turn that holds a tool call is scored by the longest common contiguous sequence of tokens, any other (a
helpful reply) by unigram matches. Writes predictions.jsonl (a query a line) and metrics.json under evaluation_results/,
draws comparison.png, and prints base, tuned and published scores side by side.
"""

import argparse
import ast
import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import sys
import textwrap
import time
import warnings
from collections import Counter
from datetime import timedelta
from pathlib import Path

DEFAULT_MODEL = "google/gemma-3-1b-it"
DEFAULT_TEST_FILE = Path("processed_data/function_calling_test.jsonl")
TRAIN_FILE_NAME = "function_calling_train.jsonl"  # beside the test split; it tells which tools training has seen

# Published scores (function calling, helpful exchange) on about 1,100 queries: the first 300 test conversations.
PUBLISHED = {
    "gemma-3-1b-it": {"base": (0.28, 0.29), "tuned, README": (0.91, 0.78), "tuned, notebook": (0.973, 0.815)},
    "gemma-3-270m-it": {"base": (0.13, 0.48), "tuned, README": (0.90, 0.68), "tuned, notebook": (0.955, 0.779)},
}

KINDS = {"function_calling": "function calling", "helpful_exchange": "helpful exchange"}

# The two published scores, then what a decision rests on. The words stand in the table and the chart.
METRICS = {
    **KINDS,
    "name_right": "function name right",
    "arguments_right": "arguments right",
    "turn_right": "whole turn right",
    "valid_call": "call fits its tool",
    "precision": "decision: precision",
    "recall": "decision: recall",
    "f1": "decision: F1",
}
DECISIONS = ["call", "no_call", "malformed"]
FAILURES = ["no_call", "unneeded_call", "malformed", "wrong_function", "wrong_arguments", "wrong_count", "truncated"]
PROBLEMS = ["unknown function", "required argument missing", "argument not declared", "wrong type"]
ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                 "training_run.json"]  # which holds the hashes of the others
DISK_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
FINISH_REASONS = ["end_of_turn", "max_new_tokens", "prompt_too_long"]
SERVER_REASONS = {"stop": "end_of_turn", "length": "max_new_tokens"}  # as servers of OpenAI's kind name them
STEPS_AT_ONCE = 16  # tokens generated before the rows that have ended leave a batch
MAX_NESTING = 100  # levels of lists and objects in a call's arguments
NUM_RESAMPLES, BOOTSTRAP_SEED = 2000, 0
MAX_LINES_SHOWN = 20  # of the reference and of the output of a failure; predictions.jsonl holds them whole

# Gemma's turns, for a base model whose tokenizer comes without a chat template.
GEMMA_TURNS = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\\n' }}"
    "{{ message.content | trim }}{{ '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Score how well a model calls functions and answers, before and after training (step 3 of 3).",
        allow_abbrev=False,
    )

    def path(text):
        return Path(text).expanduser()

    def add(flag, help, **options):
        default = options.get("default")
        shown = "" if default is None or default is False else f" (default: {default})"
        parser.add_argument(flag, help=help + shown, **options)

    add("--model", "hub id or local folder of the base model", default=DEFAULT_MODEL)
    add("--revision", "branch, tag or commit of the hub model (default: the one the adapter was trained on)")
    add("--adapter", "folder of the adapter (default: LoRA_<model name>-function_calling)", type=path)
    add("--baseline", "score the untuned model, with its own tokenizer and chat template", action="store_true")
    add("--test-file", "test split, as step 1 writes it", type=path, default=DEFAULT_TEST_FILE)
    add("--output-dir", "folder for the results; each model gets its own within", type=path, default=Path("evaluation_results"))
    add("--limit", "use only the first N conversations (the published run: 300)", type=int)
    add("--batch-size", "queries generated at once, at most (default: as many as memory holds, by the length of their prompts)", type=int)
    add("--max-new-tokens", "longest output, tokens", type=int, default=256)
    add("--rescore", "compute everything again from predictions.jsonl: no model, no GPU, seconds", action="store_true")
    add("--predictions", "score these predictions, made by something else (README.md names the fields)", type=path, metavar="FILE")
    add("--show-failures", "print N failures, reference and output side by side", type=int, default=0, metavar="N")
    add("--resume", "go on with an interrupted evaluation", action="store_true")
    add("--overwrite", "replace an earlier or unfinished evaluation", action="store_true")
    args = parser.parse_args(argv)
    for name in ("limit", "batch_size", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if args.baseline and args.adapter:
        parser.error("--baseline scores the model without an adapter: leave out --adapter")
    if args.predictions and (args.baseline or args.adapter or args.rescore):
        parser.error("--predictions scores a file: leave out --baseline, --adapter and --rescore")
    if args.show_failures < 0:
        parser.error(f"--show-failures must not be negative, not {args.show_failures}")
    if (args.rescore or args.predictions) and (args.limit or args.resume):
        parser.error("--rescore and --predictions score what there is: leave out --limit and --resume")
    if args.rescore and args.overwrite:
        parser.error("--rescore replaces the scores in any case: leave out --overwrite")
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Scores: pure functions of tokens


def find_longest_common_sequence_length(a, b):
    """Length of the longest contiguous run of tokens that both sequences hold (longest common substring).

    `a` and `b` are sequences of hashable tokens. With run[i][j] the length of the common run that ends at a[i] and b[j],
    run[i][j] = run[i-1][j-1] + 1 where a[i] == b[j], else 0; the answer is its largest value. One row is kept at a time and
    computed at once, so two 4,096-token sequences take milliseconds.
    """
    import numpy

    numbers = {}
    a = numpy.array([numbers.setdefault(token, len(numbers)) for token in a], dtype=numpy.int64)
    b = numpy.array([numbers.setdefault(token, len(numbers)) for token in b], dtype=numpy.int64)
    runs = numpy.zeros(len(b) + 1, dtype=numpy.int64)
    longest = 0
    for token in a if len(b) else ():
        runs[1:] = numpy.where(b == token, runs[:-1] + 1, 0)
        longest = max(longest, int(runs.max()))
    return longest


def compute_matching_percentage(a, b):
    """Share, in [0, 1], of the tokens of output `b` that reference `a` also holds: ROUGE-1 precision.

    A token counts at most as often as the reference holds it. An empty output scores 0.
    """
    matches = (Counter(a) & Counter(b)).total()
    return matches / len(b) if len(b) else 0.0


def score_output(kind, reference, output):
    """Published score of one output; `reference` and `output` are tokens without special tokens.

    Function calling: longest common contiguous sequence over the reference's length. Helpful exchange: unigram matches
    over the output's length.
    """
    if kind == "function_calling":
        return find_longest_common_sequence_length(reference, output) / len(reference) if len(reference) else 0.0
    return compute_matching_percentage(reference, output)


# ----------------------------------------------------------------------------------------------------------------------
# Calls: what a turn says, and whether that is right


class MalformedCall(ValueError):
    """A turn whose tool calls cannot be read; its text is the reason."""


def read_literal(text):
    """Read JSON, or else a Python literal: the data exists in both spellings. Raises MalformedCall."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in what a model wrote
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise MalformedCall("neither JSON nor a Python literal") from None


def freeze(value, depth=0):
    """A hashable stand-in for a JSON value, equal where the values are: 1 equals 1.0, true is not 1, key order is free.

    Raises MalformedCall for what JSON cannot say and for nesting deeper than MAX_NESTING.
    """
    if depth > MAX_NESTING:
        raise MalformedCall("nested too deeply")
    if value is None or isinstance(value, (bool, str)):
        return type(value).__name__, value
    if isinstance(value, (int, float)):
        return "number", value if value == value else "nan"
    if isinstance(value, (list, tuple)):
        return "list", tuple(freeze(item, depth + 1) for item in value)
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return "dict", frozenset((key, freeze(item, depth + 1)) for key, item in value.items())
    raise MalformedCall("a value that JSON does not know")


def parse_calls(text):
    """The calls of a turn: [{"name", "arguments"}, ...], empty where it makes none. Linear in the length of `text`.

    A call is what stands between <tool_call> and </tool_call>: JSON or a Python literal, an object with a name and arguments,
    which may be JSON text themselves. Raises MalformedCall where any call of the turn is something else.
    """
    before, *parts = text.split("<tool_call>")
    if "</tool_call>" in before:
        raise MalformedCall("</tool_call> without <tool_call>")
    calls = []
    for part in parts:
        body, closed, rest = part.partition("</tool_call>")
        if not closed:
            raise MalformedCall("<tool_call> without </tool_call>")
        if "</tool_call>" in rest:
            raise MalformedCall("</tool_call> without <tool_call>")
        call = read_literal(body.strip())
        if not isinstance(call, dict):
            raise MalformedCall("not an object")
        name, arguments = call.get("name"), call.get("arguments")
        if not isinstance(name, str) or not name:
            raise MalformedCall("no function name")
        if isinstance(arguments, str):
            arguments = read_literal(arguments)
        if not isinstance(arguments, dict):
            raise MalformedCall("arguments are not an object")
        freeze(arguments)
        try:
            arguments = json.loads(json.dumps(arguments))  # a Python tuple is a list in JSON
        except ValueError:  # a number too long to be written out
            raise MalformedCall("a value that JSON does not know") from None
        calls.append({"name": name, "arguments": arguments})
    return calls


def declared_functions(tools_text):
    """What a row declares as JSON text: [(function, name)], each None where it is none."""
    for tool in json.loads(tools_text):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        yield function, name if isinstance(name, str) else None


@functools.cache
def tool_validator():
    """The JSON schema validator, without the keywords a hostile schema can make slow; none of PROBLEMS is about them."""
    import jsonschema

    def ignore(*_):
        return ()

    ignored = dict.fromkeys(("pattern", "patternProperties", "uniqueItems"), ignore)
    return jsonschema.validators.extend(jsonschema.Draft202012Validator, ignored)


@functools.cache  # many conversations declare the same tools
def read_tools(tools_text):
    """Return ({name: schema of its parameters, None where broken}, number of broken declarations) of declared tools."""
    tools, num_broken = {}, 0
    for function, name in declared_functions(tools_text):
        if name is None:
            num_broken += 1
            continue
        schema = function.get("parameters", {})
        try:
            tool_validator().check_schema(schema)
        except Exception:  # jsonschema has no closed list of what it raises on rubbish
            schema = None
        if not isinstance(schema, dict):
            schema = None
        num_broken += schema is None or name in tools
        tools.setdefault(name, schema)
    return tools, num_broken


def holds_odd_number(value):
    """Whether a JSON value holds a number that is not finite as a float, which no declared type means."""
    if isinstance(value, (list, dict)):
        return any(map(holds_odd_number, value.values() if isinstance(value, dict) else value))
    return isinstance(value, (int, float)) and not abs(value) < 1e308


def find_problems(call, tools):
    """What the declared tools have against a call: a list of PROBLEMS, empty where nothing.

    `tools` maps a declared name to the schema of its parameters, or to None where the declaration itself is broken.
    """
    from referencing import Registry

    if call["name"] not in tools:
        return ["unknown function"]
    schema = tools[call["name"]]
    if schema is None:
        return []
    if holds_odd_number(call["arguments"]):
        return ["wrong type"]
    try:
        # With a registry of its own, a "$ref" in the data is never fetched.
        kinds = {error.validator for error in tool_validator()(schema, registry=Registry()).iter_errors(call["arguments"])}
    except Exception:  # a declaration that only breaks when it is used, in whatever way
        return []
    problems = []
    # Arguments are to be declared even where the schema does not say so, unless it says otherwise.
    is_closed = not {"additionalProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf"} & set(schema)
    undeclared = set(call["arguments"]) - set(schema.get("properties", {}))
    if "required" in kinds:
        problems.append("required argument missing")
    if "additionalProperties" in kinds or (is_closed and undeclared):
        problems.append("argument not declared")
    if kinds - {"required", "additionalProperties"}:
        problems.append("wrong type")
    return problems


def judge_turn(reference, output, finish_reason, tools):
    """Judge one output against its reference: a dict of verdicts, None where a question does not arise.

    "decision" is call, no_call or malformed; "name_right", "arguments_right" and "turn_right" compare the calls of the turn
    without regard to their order; "wanted_names" are the functions that the reference calls; "problems" holds what the declared
    `tools` have against each call; "failure" is one of FAILURES or None. A reference whose own calls cannot be read is faulty,
    and the output is not judged by it.
    """
    verdict = {"expects_call": "<tool_call>" in reference, "faulty_reference": None, "malformed_reason": None, "problems": [],
               "name_right": None, "arguments_right": None, "turn_right": None, "failure": None}
    wanted, calls = [], []
    try:
        wanted = parse_calls(reference)
    except MalformedCall as reason:
        verdict["faulty_reference"] = str(reason)
    try:
        calls = parse_calls(output)
        verdict["decision"] = "call" if calls else "no_call"
    except MalformedCall as reason:
        verdict["decision"], verdict["malformed_reason"] = "malformed", str(reason)
    verdict["problems"] = [find_problems(call, tools) for call in calls]
    verdict["wanted_names"] = {call["name"] for call in wanted}

    if wanted:
        names, arguments = (Counter(map(key, calls)) == Counter(map(key, wanted))
                            for key in (lambda call: call["name"], lambda call: freeze(call["arguments"])))
        whole = Counter(map(freeze, calls)) == Counter(map(freeze, wanted))
        verdict.update(name_right=names, arguments_right=arguments, turn_right=whole)
    if verdict["faulty_reference"] or verdict["turn_right"]:
        return verdict
    ended, decision = finish_reason == "end_of_turn", verdict["decision"]
    if not wanted and decision == "no_call" and ended:
        return verdict
    verdict["failure"] = (
        "truncated" if not ended
        else "malformed" if decision == "malformed"
        else "unneeded_call" if not wanted
        else "no_call" if decision == "no_call"
        else "wrong_count" if len(calls) != len(wanted)
        else "wrong_function" if not verdict["name_right"]
        else "wrong_arguments"
    )
    return verdict


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def count_verdict(prediction, verdict):
    """What one query adds to each metric: {metric: (numerator, denominator)}. Every metric is a ratio of two sums.

    Precision, recall and F1 are of the decision to call; a malformed call is an attempt, and never a hit.
    """
    expects, attempts = verdict["expects_call"], verdict["decision"] != "no_call"
    hit = expects and verdict["decision"] == "call"
    counts = {prediction["kind"]: (prediction["score"], 1)}
    counts["valid_call"] = (sum(not problems for problems in verdict["problems"]), len(verdict["problems"]))
    if verdict["faulty_reference"]:
        return counts
    for metric in ("name_right", "arguments_right", "turn_right"):
        if verdict[metric] is not None:
            counts[metric] = (verdict[metric], 1)
    counts["precision"], counts["recall"], counts["f1"] = (hit, attempts), (hit, expects), (2 * hit, attempts + expects)
    return counts


def sum_by_conversation(counts, conversation_ids):
    """Sum (numerator, denominator) pairs per conversation: an array of shape (conversations, metrics, 2).

    `counts` is a list of (conversation id, {metric: (numerator, denominator)}).
    """
    import numpy

    row = {conversation_id: position for position, conversation_id in enumerate(conversation_ids)}
    column = {metric: position for position, metric in enumerate(METRICS)}
    sums = numpy.zeros((len(row), len(column), 2))
    for conversation_id, metrics in counts:
        for metric, pair in metrics.items():
            sums[row[conversation_id], column[metric]] += pair
    return sums


def draw_resamples(num_conversations):
    """How often each conversation is drawn in each bootstrap resample: shape (NUM_RESAMPLES, conversations), seeded."""
    import numpy

    share = numpy.full(num_conversations, 1 / num_conversations)
    return numpy.random.default_rng(BOOTSTRAP_SEED).multinomial(num_conversations, share, size=NUM_RESAMPLES)


def estimate(sums, other=None):
    """Value, n and 95 % bootstrap interval of each metric: {metric: {"value", "n", "interval": [low, high]}}.

    `sums` comes from sum_by_conversation. Conversations are resampled, not queries, because the turns of one are not
    independent. With `other`, the sums of another model on the same conversations, the paired difference `sums` - `other`.
    """
    import numpy

    def ratios(sums):
        with numpy.errstate(invalid="ignore", divide="ignore"):
            return sums[..., 0] / sums[..., 1]

    if not len(sums):
        return {}
    resamples = draw_resamples(len(sums)).astype(float)
    values = ratios(sums.sum(axis=0))
    drawn = ratios(numpy.einsum("rc,cmp->rmp", resamples, sums, optimize=True))
    if other is not None:
        values = values - ratios(other.sum(axis=0))
        drawn = drawn - ratios(numpy.einsum("rc,cmp->rmp", resamples, other, optimize=True))
    result = {}
    for position, metric in enumerate(METRICS):
        defined = drawn[:, position][~numpy.isnan(drawn[:, position])]
        if numpy.isnan(values[position]):
            continue
        low, high = numpy.percentile(defined, [2.5, 97.5])
        n = None if metric == "f1" else int(sums[:, position, 1].sum())  # F1 rests on those of precision and recall
        result[metric] = {"value": float(values[position]), "n": n, "interval": [float(low), float(high)]}
    return result


def summarize(judged):
    """What is reported of judged queries: a list of (prediction, verdict, counts), all of them or a part."""
    conversation_ids = dict.fromkeys(prediction["conversation_id"] for prediction, _, _ in judged)
    counts = [(prediction["conversation_id"], count) for prediction, _, count in judged]
    verdicts = [verdict for _, verdict, _ in judged]
    decisions = Counter((verdict["expects_call"], verdict["decision"]) for verdict in verdicts if not verdict["faulty_reference"])
    failures = Counter(verdict["failure"] for verdict in verdicts)
    problems = Counter(problem for verdict in verdicts for of_call in verdict["problems"] for problem in of_call)
    reasons = Counter(verdict["malformed_reason"] for verdict in verdicts if verdict["malformed_reason"])
    return {
        "queries": len(judged),
        "scores": estimate(sum_by_conversation(counts, conversation_ids)),
        "decisions": {
            needed: {decision: decisions[expects, decision] for decision in DECISIONS}
            for needed, expects in (("call_needed", True), ("no_call_needed", False))
        },
        "failures": {failure: failures[failure] for failure in FAILURES},
        "malformed_reasons": dict(reasons.most_common()),
        "problems": {problem: problems[problem] for problem in PROBLEMS},
        "faulty_references": sum(bool(verdict["faulty_reference"]) for verdict in verdicts),
    }


def judge_predictions(predictions, tools_of, seen_tools):
    """Judge every prediction. Returns (verdicts in their order, the report, {query: what it adds to each metric}).

    `tools_of` maps a conversation id to its declared tools as JSON text. `seen_tools` is the set of tool names of the train split, by which
    queries are also reported apart, or None where that split is not at hand.
    """
    conversation_ids = dict.fromkeys(prediction["conversation_id"] for prediction in predictions)
    read = {conversation_id: read_tools(tools_of[conversation_id]) for conversation_id in conversation_ids}
    judged, groups = [], {"seen_tools": [], "unseen_tools": [], "no_tools": []}
    for prediction in predictions:
        tools, _ = read[prediction["conversation_id"]]
        verdict = judge_turn(prediction["reference"], prediction["output"], prediction["finish_reason"], tools)
        judged.append((prediction, verdict, count_verdict(prediction, verdict)))
        # A query is about the tools it calls, or else about those it might call.
        names = verdict["wanted_names"] or set(tools)
        if seen_tools is not None:
            groups["no_tools" if not names else "seen_tools" if names <= seen_tools else "unseen_tools"].append(judged[-1])
    report = summarize(judged)
    report["broken_declarations"] = sum(num_broken for _, num_broken in read.values())
    if seen_tools is not None:
        report |= {group: summarize(members) for group, members in groups.items()}
    counts = {(prediction["conversation_id"], prediction["turn"]): count for prediction, _, count in judged}
    return [verdict for _, verdict, _ in judged], report, counts


# ----------------------------------------------------------------------------------------------------------------------
# What is read: the test split, the base model and its adapter


def sha256_of_file(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_split(path):
    """Return the sha256 of a split; end the program if it is missing or not the one its dataset_info.json describes."""
    if not path.is_file():
        sys.exit(f"error: {path} not found: run prepare_function_calling_dataset.py first, or give --test-file")
    sha256 = sha256_of_file(path)
    info_path = path.parent / "dataset_info.json"
    if info_path.is_file():
        try:
            info = json.loads(info_path.read_text(encoding="utf-8"))
            described = {split["file"]: split["sha256"] for split in (info["train"], info["test"])}
        except (ValueError, KeyError, TypeError, RecursionError):
            sys.exit(f"error: {info_path} cannot be read: run prepare_function_calling_dataset.py again")
        if described.get(path.name, sha256) != sha256:
            sys.exit(f"error: {path} is not the file that {info_path} describes: run prepare_function_calling_dataset.py "
                     "again, or remove dataset_info.json if you changed the split yourself")
    return sha256


def check_messages(messages):
    """Raise ValueError unless `messages` are turns of a conversation in which the model speaks."""
    previous = None
    for message in messages:
        role = message["role"]
        if role not in ("user", "assistant", "tool") or not isinstance(message["content"], str):
            raise ValueError("a role or a content is wrong")
        message["content"].encode()  # a lone surrogate is no text
        if (role == "assistant") != (previous in ("user", "tool")) or (previous is None and role == "tool"):
            raise ValueError("turns are out of order")
        previous = role
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no turn of the model")


def check_tools(row):
    """The tools that a row of a split declares, a list as JSON text; raises ValueError where it is something else."""
    tools = row.get("tools") or "[]"
    if not isinstance(json.loads(tools), list):
        raise ValueError("tools is not a list")
    return tools


def read_queries(path, limit=None):
    """Read the queries of a split: [{"conversation_id", "turn", "kind", "reference", "prompt", "tools"}, ...] in its order.

    "turn" is the position of the model turn among the messages, "prompt" the messages before it, "tools" the declared tools as
    JSON text. A bad line ends the program.
    """
    queries, ids, num_rows = [], set(), 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            num_rows += 1
            if limit is not None and num_rows > limit:
                break
            try:
                row = json.loads(line)
                conversation_id, messages, tools = row["id"], row["messages"], check_tools(row)
                check_messages(messages)
                conversation_id.encode()
                if not isinstance(conversation_id, str) or conversation_id in ids:
                    raise ValueError("its id is missing or stands twice")
            except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
                kind = "invalid JSON" if isinstance(error, (json.JSONDecodeError, RecursionError)) else "not a conversation"
                sys.exit(f"error: {path}, line {number}: {kind} ({error}); make it again with prepare_function_calling_dataset.py")
            ids.add(conversation_id)
            for turn, message in enumerate(messages):
                if message["role"] == "assistant":
                    queries.append({
                        "conversation_id": conversation_id,
                        "turn": turn,
                        "kind": "function_calling" if "<tool_call>" in message["content"] else "helpful_exchange",
                        "reference": message["content"].strip(),
                        "prompt": messages[:turn],
                        "tools": tools,
                    })
    if not queries:
        sys.exit(f"error: {path}: no model turn to score")
    return queries


def first_line(error):
    """What an exception says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def is_disk_full(error):
    """Whether an exception says that there is no room left: what the hub's library raises is not always an OSError."""
    codes = {getattr(error, "errno", None), getattr(error.__cause__, "errno", None)}
    return bool(codes & DISK_FULL or re.search(rf"os error ({'|'.join(map(str, sorted(DISK_FULL)))})\b", str(error)))


def find_model(model, revision, with_weights=True):
    """Return (folder, commit) of a Gemma 3 text model: a local folder (commit None), or a hub id, which is downloaded."""
    folder, commit = Path(model).expanduser(), None
    if folder.is_dir():
        if revision:
            sys.exit(f"error: --revision {revision}: --model {model} is a local folder, which has no revisions")
    elif not re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        sys.exit(f"error: --model {model}: no such folder, and not a hub id such as {DEFAULT_MODEL}")
    else:
        folder = download_model(model, revision, ["*.json", "*.jinja", *(["*.safetensors"] if with_weights else [])])
        commit = folder.name
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            sys.exit(f"error: --model {model}: {folder} holds no {name}, so it is no whole Transformers model")
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError, RecursionError):
        sys.exit(f"error: --model {model}: {folder / 'config.json'} cannot be read")
    if model_type != "gemma3_text":
        sys.exit(f"error: --model {model}: a {model_type} model; this workflow is for Gemma 3 text models (gemma3_text)")
    return folder, commit


def download_model(model, revision, patterns):
    """Download a model's files from the hub, or find them in the cache; returns their folder, named after the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    be_quiet_about_downloads()
    started = time.time()
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except GatedRepoError:  # a subclass of RepositoryNotFoundError
        sys.exit(f"error: {model} is gated: accept its licence at https://huggingface.co/{model}, then run `hf auth login`")
    except RepositoryNotFoundError:
        sys.exit(f"error: {model} was not found on the hub: check --model, or run `hf auth login` if it is private")
    except RevisionNotFoundError:
        sys.exit(f"error: {model} has no revision {revision}: check --revision")
    except (OSError, HTTPError, ValueError, RuntimeError) as error:  # RuntimeError: of its Xet transfers
        advice = "make room on the disk" if is_disk_full(error) else "check the network and HF_ENDPOINT"
        sys.exit(f"error: {model} could not be downloaded ({first_line(error.__cause__ or error)}): {advice}, then run this again")
    if any(path.stat().st_mtime >= started for path in folder.iterdir() if path.exists()):  # fetched just now
        check_download(model, folder.name)
    return folder


def be_quiet_about_downloads():
    """What fails in the end is told in one line; a progress bar is for a terminal."""
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()


def check_download(model, commit):
    """End the program if a file in the cache is not the one the hub holds; it is taken out of the cache."""
    from huggingface_hub import HfApi

    try:
        checked = HfApi().verify_repo_checksums(model, revision=commit)
    except Exception:  # the hub says no more: what is broken shows when it is read
        return
    damaged = [mismatch["path"] for mismatch in checked.mismatches]
    for name in damaged:
        (checked.verified_path / name).resolve().unlink(missing_ok=True)
    if damaged:
        sys.exit(f"error: {model}: {damaged[0]} is not the file the hub holds; it is removed from the cache: run this again")


def hash_local_weights(folder, commit):
    """sha256 over the weights of a local model, whose name alone says little; None for a hub model, which has its commit."""
    if commit:
        return None
    sha256 = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        sha256.update(bytes.fromhex(sha256_of_file(path)))
    return sha256.hexdigest()


def load_tokenizer(folder):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        sys.exit(f"error: {folder}: the tokenizer cannot be loaded: {first_line(error)}")


def model_name(model):
    return Path(model).expanduser().resolve().name


def check_adapter(adapter_dir, model):
    """Return training_run.json of an adapter; end the program if the adapter is missing, unsafe or not this model's."""
    for name in ADAPTER_FILES:
        if not (adapter_dir / name).is_file():
            if adapter_dir.is_dir():
                sys.exit(f"error: {adapter_dir / name} not found, so this is no whole adapter: train again, or give another --adapter")
            sys.exit(f"error: {adapter_dir} not found, the adapter of --model {model}: run function_calling_train.py first, give "
                     "--adapter, or score the untuned model with --baseline")
    try:
        run = json.loads((adapter_dir / "training_run.json").read_text(encoding="utf-8"))
        trained_on, trained_name = run["model"], model_name(run["model"])
        as_trained = {"chat_template.jinja": run["chat_template_sha256"], **run.get("files_sha256", {})}  # older adapters lack these
    except (ValueError, KeyError, TypeError, RecursionError):
        sys.exit(f"error: {adapter_dir / 'training_run.json'} cannot be read: run function_calling_train.py again")
    if trained_name != model_name(model):
        sys.exit(f"error: the adapter in {adapter_dir} was trained on {trained_on}, not on {model}: give --model {trained_on}")
    for name in ADAPTER_FILES[:-1]:
        if name in as_trained and sha256_of_file(adapter_dir / name) != as_trained[name]:
            sys.exit(f"error: {adapter_dir / name} is not as training left it: restore it, or run function_calling_train.py again")
    return run


def choose_device():
    """Return (device name, dtype of the model): bf16 where a GPU computes in it, else fp32, never fp16."""
    import torch

    if torch.cuda.is_available():
        if int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count():
            sys.exit(f"error: torchrun started more processes than there are GPUs ({torch.cuda.device_count()}): give a smaller "
                     "--nproc_per_node")
        return "cuda", torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if torch.backends.mps.is_available():
        return "mps", torch.float32
    return "cpu", torch.float32


def is_out_of_memory(error):
    """Whether an error of PyTorch says that memory ran out; on a CPU and on Apple's GPUs it is a plain RuntimeError."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or re.search("out of memory|DefaultCPUAllocator", str(error)) is not None


def load_model(model_dir, adapter_dir, device, dtype):
    """Load the base model from `model_dir`, with the adapter (if any) merged into its weights.

    They are merged in fp32 before the model is brought to `dtype`, so that nothing is rounded twice.
    """
    import torch
    from peft import PeftModel
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    reading = model_dir
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32 if adapter_dir else dtype, attn_implementation="sdpa", use_safetensors=True
        )
        if adapter_dir:
            reading = adapter_dir
            model = PeftModel.from_pretrained(model, adapter_dir).merge_and_unload()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        sys.exit(f"error: {reading}: the {'adapter' if reading == adapter_dir else 'model'} cannot be loaded: {first_line(error)}")
    return model.to(device, dtype).eval()


# ----------------------------------------------------------------------------------------------------------------------
# Generation


def encode_prompt(messages, tokenizer, is_base):
    """Token ids of a prompt that ends where the model is to speak.

    The tuned model's template knows every role. A stock template knows only user and assistant, so there a tool's result
    stands in a user turn; and control tokens written out in a message are broken up, as the tuned template does itself.
    """
    if is_base:
        control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        messages = [{"role": "user" if message["role"] == "tool" else message["role"],
                     "content": break_up(message["content"], control)} for message in messages]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]


def break_up(text, control_tokens):
    """Put a space before the last character of each control token in `text`: it then reaches the model as plain text."""
    for token in control_tokens:
        text = text.replace(token, f"{token[:-1]} {token[-1]}")
    return text


def share_beginnings(prompts):
    """Which texts to read so that each prompt, but for its last token, begins one of them.

    Returns (texts, longest first, [the index of its text for each prompt]); all are lists of token ids. A turn's prompt holds
    the earlier ones of its conversation, so that most conversations have one text.
    """
    texts, text_of = [], [0] * len(prompts)
    for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
        beginning = prompts[index][:-1]
        found = next((number for number, text in enumerate(texts) if text[:len(beginning)] == beginning), None)
        if found is None:
            found = len(texts)
            texts.append(beginning)
        text_of[index] = found
    return texts, text_of


def read_prompts(model, prompts, pad_id):
    """Keys and values of each prompt but for its last token, padded on the left: a cache to generate from.

    What the prompts of one conversation have in common is read once. Texts of like length are read together, padded on the
    right, where no token of theirs looks.
    """
    import torch
    from transformers import DynamicCache

    texts, text_of = share_beginnings(prompts)
    groups = []
    for index, text in enumerate(texts):
        if not groups or len(text) < 0.8 * len(texts[groups[-1][0]]):  # more padding would cost more than it gains
            groups.append([])
        groups[-1].append(index)
    width = len(texts[0])
    states = []  # of each layer: keys and values, of shape (prompts, heads, width, numbers of a head)
    for group in groups:
        longest = len(texts[group[0]])
        input_ids = torch.tensor([texts[index] + [pad_id] * (longest - len(texts[index])) for index in group])
        read = DynamicCache()  # without the model's config it keeps what leaves the sliding window, where shorter prompts end
        model.get_decoder()(input_ids=input_ids.to(model.device), past_key_values=read)
        rows = [row for row in range(len(prompts)) if text_of[row] in group]
        source = torch.tensor([[text_of[row] - group[0]] for row in rows], device=model.device)
        padding = torch.tensor([[width + 1 - len(prompts[row])] for row in rows], device=model.device)
        position = (torch.arange(width, device=model.device) - padding).clamp(min=0)  # what stands in the padding is masked
        for number, layer in enumerate(read.layers):
            if number == len(states):  # the first group
                states.append([part.new_empty(len(prompts), part.shape[1], width, part.shape[3]) for part in (layer.keys, layer.values)])
            for whole, part in zip(states[number], (layer.keys, layer.values)):
                whole[rows] = part[source, :, position].transpose(1, 2)
    cache = DynamicCache(config=model.config)
    for number, (keys, values) in enumerate(states):
        cache.update(keys, values, number)
        states[number] = None  # freed as the cache takes it over
    return cache


def generate_batch(model, prompts, stop_ids, pad_id, max_new_tokens):
    """Greedy outputs for a batch of prompts (lists of at least two token ids), as lists of token ids without the stop token.

    Returns [(output ids, whether the turn was ended)]. Prompts are padded on the left, so that each output starts at the
    padded width. Every STEPS_AT_ONCE tokens the rows that have ended leave the batch.
    """
    import torch
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    outputs, rows = [([], False)] * len(prompts), list(range(len(prompts)))
    with torch.inference_mode():
        cache = read_prompts(model, prompts, pad_id)
        while rows and (num_left := width + max_new_tokens - ids.shape[1]):
            model.generation_config = GenerationConfig(
                max_new_tokens=min(STEPS_AT_ONCE, num_left), do_sample=False, eos_token_id=stop_ids, pad_token_id=pad_id
            )
            ids = model.generate(ids, attention_mask=mask, past_key_values=cache)
            mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
            unended = []
            for place, tokens in enumerate(ids[:, width:].tolist()):
                end = next((position for position, token in enumerate(tokens) if token in stop_ids), None)
                outputs[rows[place]] = tokens[:end], end is not None
                if end is None:
                    unended.append(place)
            if len(unended) < len(rows):
                rows = [rows[place] for place in unended]
                kept = torch.tensor(unended, dtype=torch.long, device=model.device)
                ids, mask = ids[kept], mask[kept]
                cache.batch_select_indices(kept)
    return outputs


def count_tokens_that_fit(model):
    """About how many tokens, of prompts, padding and outputs, can be in generation at once.

    A token takes its keys and values, twice while they are put together and while they grow, and its share of the widest layer
    while prompts are read. Half of the free memory is left alone. More than the numbers given here would gain little, and make what a kill costs, and what
    several processes wait for each other, longer.
    """
    import psutil
    import torch

    config = model.config.get_text_config()
    numbers = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim + 6 * config.intermediate_size
    on_gpu = model.device.type == "cuda"
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    num_sharing = 1 if on_gpu else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(free // num_sharing // 2 // (numbers * model.dtype.itemsize), 131_072 if on_gpu else 32_768)


def plan_batches(conversations, args, tokens_at_once):
    """Share out queries, given as {index: tokens of the prompt} for each conversation, to batches: lists of indices, longest first.

    A batch holds at most --batch-size queries, or else as many as make at most `tokens_at_once` tokens, each as long as the longest
    prompt of the batch and an output; at least one. A conversation's turns, which are read together, stay in one batch unless there are
    more of them than a batch holds.
    """
    batches, room = [], 0
    for lengths in sorted(conversations, key=lambda lengths: -max(lengths.values())):
        indices = sorted(lengths, key=lambda index: -lengths[index])
        if len(indices) <= room:
            batches[-1] += indices
            room -= len(indices)
            continue
        size = args.batch_size or max(1, tokens_at_once // (lengths[indices[0]] + args.max_new_tokens))
        batches += [indices[start:start + size] for start in range(0, len(indices), size)]
        room = size - len(batches[-1])
    return batches


def answer_queries(queries, done, model, tokenizer, scorer, args, tokens_at_once, rank=0, num_processes=1):
    """Generate and score an output for each query, longest conversations first; yields the predictions batch by batch.

    `done` holds the (conversation id, turn) of what is answered already. Of several processes each takes its share of the
    batches, which are the same for any number of them and however much is done: so rounding, too, stays the same.
    """
    from accelerate.utils.memory import clear_device_cache
    from tqdm import tqdm

    stop_ids = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    longest_prompt = model.config.get_text_config().max_position_embeddings - args.max_new_tokens
    if longest_prompt < 1:
        sys.exit(f"error: --max-new-tokens {args.max_new_tokens} leaves no room for a prompt in the model's context")
    # A prompt that does not fit is a failure to be counted; cutting it would take away what it asks for. Later prompts of the
    # same conversation hold it and more, so they are not even encoded.
    prompts, outgrown = {}, set()
    for index, query in enumerate(queries):
        if query["conversation_id"] not in outgrown:
            prompt = encode_prompt(query["prompt"], tokenizer, args.baseline)
            if len(prompt) > longest_prompt:
                outgrown.add(query["conversation_id"])
            else:
                prompts[index] = prompt

    def predict(query, output, finish_reason, **num_tokens):
        prediction = {key: query[key] for key in ("conversation_id", "turn", "kind", "reference")}
        tokens = [scorer.encode(text, add_special_tokens=False) for text in (query["reference"], output)]
        return {**prediction, "output": output, "score": score_output(query["kind"], *tokens), "finish_reason": finish_reason, **num_tokens}

    too_many = math.inf  # tokens that were once more than the memory holds

    def generate(batch):
        """Outputs for a batch, in halves where the whole does not fit."""
        nonlocal too_many
        num_tokens = len(batch) * (max(len(prompts[index]) for index in batch) + args.max_new_tokens)
        if num_tokens < too_many or len(batch) == 1:
            try:
                return generate_batch(
                    model, [prompts[index] for index in batch], stop_ids, tokenizer.pad_token_id, args.max_new_tokens
                )
            except RuntimeError as error:
                if len(batch) == 1 or not is_out_of_memory(error):
                    raise
                too_many = num_tokens
            clear_device_cache()
        half = len(batch) // 2
        return generate(batch[:half]) + generate(batch[half:])

    remaining = {index for index, query in enumerate(queries) if (query["conversation_id"], query["turn"]) not in done}
    too_long = [queries[index] for index in sorted(remaining - prompts.keys())] if rank == 0 else []
    if too_long:
        yield [predict(query, "", "prompt_too_long") for query in too_long]
    conversations = {}
    for index, prompt in prompts.items():
        conversations.setdefault(queries[index]["conversation_id"], {})[index] = len(prompt)
    planned = plan_batches(conversations.values(), args, tokens_at_once)
    still_to_answer = [[index for index in batch if index in remaining] for batch in planned]
    batches = [batch for batch in still_to_answer if batch][rank::num_processes]
    last_told, num_answered = time.monotonic(), len(too_long)
    num_queries = num_answered + sum(map(len, batches))
    share = "" if num_processes == 1 else f" (process 1 of {num_processes})"
    with tqdm(total=num_queries, initial=num_answered, desc=f"Answering{share}", unit=" queries", disable=None if rank == 0 else True) as progress:
        for batch in batches:
            predictions = []
            for index, (tokens, ended) in zip(batch, generate(batch)):
                text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
                predictions.append(predict(queries[index], text, "end_of_turn" if ended else "max_new_tokens",
                                           prompt_tokens=len(prompts[index]), output_tokens=len(tokens)))
            yield predictions
            progress.update(len(batch))
            num_answered += len(batch)
            if rank == 0 and progress.disable and time.monotonic() - last_told > 60:  # no terminal is watching: a line a minute
                last_told = time.monotonic()
                print(f"{num_answered:,} of {num_queries:,} queries answered{share}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# What is written


def write_json(path, content):
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path, text):
    """Write a file whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def refuse_other_evaluation(path, earlier, identity):
    """End the program if what `path` holds of an `earlier` evaluation does not rest on the same things as this one."""
    changes = [f"{key} was {earlier.get(key)}, is {value}" for key, value in identity.items() if earlier.get(key) != value]
    if changes:
        sys.exit(f"error: {path} belongs to another evaluation ({', '.join(changes)}): repeat its arguments, on a machine of its kind, or "
                 "--overwrite it")


def check_prediction(line, query_of, found):
    """Return the prediction that a line of JSON holds, joined with its query, or raise what is wrong with it.

    `query_of` maps (conversation id, turn) to the queries of the split, `found` holds the keys of the predictions before.
    """
    prediction = json.loads(line)
    if not isinstance(prediction, dict):
        raise ValueError("a line must be an object")
    if missing := [field for field in ("conversation_id", "turn", "output") if field not in prediction]:
        raise ValueError(f"it has no {missing[0]}")
    key = prediction["conversation_id"], prediction["turn"]
    reason = prediction.get("finish_reason", "end_of_turn")
    if not isinstance(key[0], str) or type(key[1]) is not int or not isinstance(reason, str):
        raise ValueError("conversation_id and finish_reason must be text, turn a whole number")
    reason = SERVER_REASONS.get(reason, reason)
    score = prediction.get("score")
    if key not in query_of:
        raise ValueError("no such conversation_id and turn in the test split")
    if key in found:
        raise ValueError("a conversation_id and turn stand twice")
    if not isinstance(prediction["output"], str):
        raise ValueError("output is no text")
    if reason not in FINISH_REASONS:
        raise ValueError(f"finish_reason is none of {', '.join([*FINISH_REASONS, *SERVER_REASONS])}")
    query = query_of[key]
    return {
        **{field: query[field] for field in ("conversation_id", "turn", "kind", "reference")},
        "output": prediction["output"].encode(errors="replace").decode(),  # without lone surrogates, which no file can hold
        "score": score if isinstance(score, float) and 0 <= score <= 1 else None,
        "finish_reason": reason,
        **{field: prediction[field] for field in ("prompt_tokens", "output_tokens") if isinstance(prediction.get(field), int)},
    }


def read_predictions(path, queries):
    """Read a predictions.jsonl and join it with the queries of the test split: predictions in the order of the split.

    A line needs "conversation_id", "turn" and "output"; without "finish_reason" the output counts as ended, and without "score"
    it is None. A line that is no prediction of this split ends the program.
    """
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or a device, which cannot be read twice" if path.exists() else "not found"
        sys.exit(f"error: {path}: {kind}; give a file with --predictions, or run evaluation.py without --rescore first")
    query_of = {(query["conversation_id"], query["turn"]): query for query in queries}
    found = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                prediction = check_prediction(line, query_of, found)
            except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
                sys.exit(f"error: {path}, line {number}: not a prediction for this test split ({error})")
            found[prediction["conversation_id"], prediction["turn"]] = prediction
    if not found:
        sys.exit(f"error: {path}: no prediction in it")
    return [found[key] for key in query_of if key in found]


def find_partial(results_dir):
    """The files of an unfinished evaluation: each of its processes has one."""
    return sorted(results_dir.glob("predictions.partial*.jsonl"))


def read_partial(paths, identity, queries):
    """Return (predictions, tokens at once or None) of an unfinished evaluation's files; the program ends if they are another's.

    A file's first line holds `identity`, what the predictions depend on: an evaluation goes on only with its own. It also tells
    how large the batches were.
    """
    query_of = {(query["conversation_id"], query["turn"]): query for query in queries}
    found, tokens_at_once = {}, None
    for path in paths:
        found_here = {}
        first, *lines = path.read_bytes().split(b"\n")[:-1] or [json.dumps(identity)]  # without a last line that was torn
        try:
            earlier = dict(json.loads(first))
            for line in lines:
                prediction = check_prediction(line, query_of, found_here)
                found_here[prediction["conversation_id"], prediction["turn"]] = prediction
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            sys.exit(f"error: {path} cannot be gone on with ({error}): --overwrite starts anew")
        refuse_other_evaluation(path, earlier, identity)
        found |= found_here  # in two files stands what a kill kept from being taken out of one
        if type(told := earlier.get("tokens_at_once")) is int and told > 0:
            tokens_at_once = told
    return list(found.values()), tokens_at_once


@contextlib.contextmanager
def sole_process_in(folder):
    """Keep other processes of this script out of `folder`; the program ends if one is at work there.

    No lock is kept on Windows and on file systems that know none, such as some network drives.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"error: {folder}: another process is at work there: let it end, or stop it first")
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def open_partial(path, identity, tokens_at_once, predictions):
    """Open a file of an unfinished evaluation, with what is already answered in it, to append further predictions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first = {**identity, "tokens_at_once": tokens_at_once}
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in [first, *predictions]))
    return open(path, "ab", buffering=0)  # one write a batch: a kill hardly ever falls into it


def score_predictions(predictions, model, revision):
    """Give each prediction its published score, in the tokens of the model's stock tokenizer."""
    from tokenizers import Tokenizer  # not transformers, which takes seconds to import

    path = find_model(model, revision, with_weights=False)[0] / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exceptions
        sys.exit(f"error: {path} cannot be read: {error}")
    for prediction in predictions:
        texts = (prediction["reference"], prediction["output"].strip())
        tokens = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        prediction["score"] = score_output(prediction["kind"], *tokens)


def read_seen_tools(test_file):
    """The tools, declared or called, of the train split beside the test split; None where there is none."""
    path = test_file.with_name(TRAIN_FILE_NAME)
    if not path.is_file():
        return None
    seen = set()
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                check_messages(row["messages"])
                seen |= {name for _, name in declared_functions(check_tools(row)) if name}
                said = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
            except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
                sys.exit(f"error: {path}, line {number}: not a conversation; make it again with "
                         "prepare_function_calling_dataset.py")
            for content in said:
                try:
                    seen |= {call["name"] for call in parse_calls(content)}
                except MalformedCall:
                    pass
    return seen


def load_base(base_dir, facts, queries):
    """The predictions of the base model that those of the run described by `facts` can be compared with, or None.

    They must be finished, and of the same test split, base model and output length; a note says why they are left out.
    """
    if not base_dir.is_dir() or not any(base_dir.iterdir()):
        return None
    try:
        base = dict(json.loads((base_dir / "metrics.json").read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        base = None
    reason = "is not finished, or cannot be read"
    if base is not None and (base_dir / "predictions.jsonl").is_file() and not find_partial(base_dir):
        keys = ("test_split_sha256", "commit", "weights_sha256", "max_new_tokens")
        other = [key for key in keys if base.get(key) and facts.get(key) and base[key] != facts[key]]
        predictions = [] if other else read_predictions(base_dir / "predictions.jsonl", queries)
        if predictions and all(prediction["score"] is not None for prediction in predictions):
            return predictions
        if other:
            reason = f"has another {', '.join(other)}"
    print(f"note: {base_dir} {reason}; it is left out of the comparison")
    return None


def compare_with_base(counts, base_counts):
    """Paired difference to the base model on the queries both answered: {metric: {"value", "n", "interval"}}.

    `counts` and `base_counts` map (conversation id, turn) to what the query adds to each metric.
    """
    common = [key for key in counts if key in base_counts]
    conversation_ids = dict.fromkeys(conversation_id for conversation_id, _ in common)
    ours, base = (sum_by_conversation([(key[0], run[key]) for key in common], conversation_ids) for run in (counts, base_counts))
    return estimate(ours, base)


def format_table(label, report, base_report, published):
    """The scores as text: a row per metric; base, this model, their difference and the published figures beside each other.

    Values stand with their 95 % intervals. `base_report` is None where only the base, or no base, was evaluated.
    """
    def cell(estimates, metric, sign=""):
        entry = estimates.get(metric)
        return "-" if entry is None else f"{entry['value']:{sign}.3f} [{entry['interval'][0]:{sign}.3f}, {entry['interval'][1]:{sign}.3f}]"

    reports = [report] if base_report is None else [base_report, report]
    titles = [label] if base_report is None else ["base", label]
    rows = [["", "n", *titles, *(["difference"] if base_report is not None else []), *(["published"] if published else [])]]
    groups = [(metric, "", reports) for metric in METRICS]
    for group, suffix in (("seen_tools", ", tools seen in training"), ("unseen_tools", ", tools never seen")):
        if group in report:
            groups.append(("turn_right", suffix, [run[group] for run in reports]))
    for metric, suffix, runs in groups:
        numbers = [run["scores"].get(metric, {"n": 0})["n"] for run in runs]
        row = [METRICS[metric] + suffix, "/".join(dict.fromkeys(f"{n:,}" for n in numbers if n is not None)),
               *(cell(run["scores"], metric) for run in runs)]
        if base_report is not None:
            row.append("" if suffix else cell(report["difference_to_base"], metric, "+"))
        if published:
            row.append("" if suffix else published.get(metric, ""))
        rows.append(row)
    lines = format_columns(rows)
    if "no_tools" in report and report["no_tools"]["queries"]:
        lines.append(f"{report['no_tools']['queries']:,} of the queries are of conversations without tools.")
    if published:
        lines.append("Published: base -> tuned, as in its README / its notebook; about 1,100 queries of the first 300 test conversations.")
    for title, part in (("failures", "failures"), ("calls against their tools", "problems")):
        table = [[name.replace("_", " "), *(f"{run[part][name]:,}" for run in reports)] for name in report[part]]
        lines += ["", *format_columns([[title, *titles], *table])]
    table = [[needed.replace("_", " "), *(f"{number:,}" for number in row.values())] for needed, row in report["decisions"].items()]
    lines += ["", *format_columns([[f"decisions of {label}", *(decision.replace("_", " ") for decision in DECISIONS)], *table])]
    if report["faulty_references"]:
        lines.append(f"{report['faulty_references']:,} references hold a call that cannot be read; they are left out of the call scores.")
    if report["broken_declarations"]:
        lines.append(f"{report['broken_declarations']:,} tool declarations are broken or repeated; calls are not held against a broken one.")
    return "\n".join(lines)


def format_columns(rows):
    """Lines of a table: the first column flush left, the others flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(text.rjust(width) if column else text.ljust(width) for column, (text, width) in enumerate(zip(row, widths))).rstrip()
            for row in rows]


def format_failures(predictions, verdicts, number):
    """`number` failures, chosen with a seed, as text: the reference on the left, the output on the right."""
    failed = [(p, v) for p, v in zip(predictions, verdicts) if v["failure"]]
    chosen = random.Random(BOOTSTRAP_SEED).sample(failed, min(number, len(failed)))
    width = max(30, (shutil.get_terminal_size().columns - 3) // 2)
    lines = []
    for prediction, verdict in chosen:
        reason = f" ({verdict['malformed_reason']})" if verdict["malformed_reason"] else ""
        lines += ["", f"{verdict['failure']}{reason}: conversation {prediction['conversation_id']}, turn {prediction['turn']}"]
        sides = [[piece for line in (title, *prediction[key].splitlines()) for piece in textwrap.wrap(line, width) or [""]]
                 for title, key in (("REFERENCE", "reference"), ("OUTPUT", "output"))]
        sides = [side if len(side) <= MAX_LINES_SHOWN else [*side[:MAX_LINES_SHOWN], "..."] for side in sides]
        lines += [f"{left:<{width}} | {right}" for left, right in itertools.zip_longest(*sides, fillvalue="")]
    # A model may say anything, but not what steers a terminal.
    return "\n".join("".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line) for line in lines)


def plot_comparison(runs, name, path):
    """Draw scores with their intervals beside the published ones, and the failure classes. `runs` is [(label, report), ...]."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [*KINDS, "name_right", "arguments_right", "turn_right", "f1"]
    plt.rcParams.update({"font.size": 15, "text.parse_math": False})  # a name may hold a "$"
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 11), height_ratios=[1.15, 1], layout="constrained")
    height = 0.8 / len(runs)
    most = max(1, *(number for _, report in runs for number in report["failures"].values()))
    for position, (label, report) in enumerate(runs):
        color = "#E69F00" if label == "base" else "#0072B2"  # safe for colour-blind eyes
        shift = (position - (len(runs) - 1) / 2) * height
        top.barh(0, 0, color=color, label=label)  # for the legend, whichever scores there are
        for row, metric in enumerate(shown):
            if entry := report["scores"].get(metric):
                top.barh(row + shift, entry["value"], height * 0.9, color=color)
                top.plot(entry["interval"], [row + shift] * 2, color="black", linewidth=2)
                top.text(1.03, row + shift, f"{entry['value']:.3f}", va="center", fontsize=13)
        for row, failure in enumerate(FAILURES):
            number = report["failures"][failure]
            bottom.barh(row + shift, number, height * 0.9, color=color)
            bottom.text(number + 0.01 * most, row + shift, f"{number:,}", va="center", fontsize=13)
        for which, marker in zip(PUBLISHED.get(name, {}), "^Ds"):
            if (which == "base") == (label == "base"):  # each on the bar it is to be compared with
                top.plot(PUBLISHED[name][which], [row + shift for row in range(len(KINDS))], marker=marker, color="#CC79A7",
                         markeredgecolor="black", markersize=12, linestyle="", label=f"published {which}", zorder=3)
    top.set(xlim=(0, 1.14), title=f"{name}: scores with 95 % intervals")
    top.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    top.set_yticks(range(len(shown)), [METRICS[metric] for metric in shown])
    bottom.set(xlim=(0, 1.1 * most), title="failures by class, queries")
    bottom.set_yticks(range(len(FAILURES)), [failure.replace("_", " ") for failure in FAILURES])
    for axes in (top, bottom):
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, dpi=100)
    plt.close(figure)
    os.replace(unfinished, path)


def read_comparison(args, results_dir, label, queries, facts):
    """What a report needs besides the predictions: (tools seen in training or None, predictions of the base model or None)."""
    seen_tools = read_seen_tools(args.test_file)
    return seen_tools, None if label == "base" else load_base(results_dir.parent / "base", facts, queries)


def write_report(args, results_dir, label, name, queries, predictions, comparison, facts):
    """Judge the predictions, write metrics.json (with `facts` of the run) and comparison.png, end what was unfinished, print the table.

    `queries` are all of the test split: those of the base model may be others than those of `predictions`. `comparison` comes
    from read_comparison.
    """
    tools_of = {query["conversation_id"]: query["tools"] for query in queries}
    seen_tools, base = comparison
    verdicts, report, counts = judge_predictions(predictions, tools_of, seen_tools)
    base_report, report["difference_to_base"] = None, {}
    if base:
        _, base_report, base_counts = judge_predictions(base, tools_of, seen_tools)
        report["difference_to_base"] = compare_with_base(counts, base_counts)
    reasons = Counter(prediction["finish_reason"] for prediction in predictions)
    ends = {reason: reasons[reason] for reason in FINISH_REASONS}
    write_json(results_dir / "metrics.json", {**report, "finish_reasons": ends, "run": facts})

    runs = [("base", base_report), (label, report)] if base else [(label, report)]
    chart_dir = results_dir.parent if label in ("base", "tuned") else results_dir
    if label == "base":  # the chart of base and tuned stays one of both
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            tuned = json.loads((results_dir.parent / "tuned" / "metrics.json").read_text(encoding="utf-8"))
            if tuned["run"]["test_split_sha256"] == facts["test_split_sha256"] and {"scores", "failures"} <= tuned.keys():
                runs.append(("tuned", tuned))
    plot_comparison(runs, name, chart_dir / "comparison.png")
    for path in find_partial(results_dir):  # before anything is printed, which may fail where nobody reads it
        path.unlink()
    published = {}
    for position, kind in enumerate(KINDS if name in PUBLISHED else ()):
        base_score, *tuned_scores = (scores[position] for scores in PUBLISHED[name].values())
        published[kind] = f"{base_score} -> " + " / ".join(map(str, tuned_scores))
    print(f"Written to  {results_dir}/: predictions.jsonl, metrics.json; {chart_dir / 'comparison.png'}")
    print(f"\n{format_table(label, report, base_report, published)}")
    if seen_tools is None:
        print(f"{args.test_file.with_name(TRAIN_FILE_NAME)} is not there, so tools cannot be told into seen and never seen.")
    if args.show_failures:
        print(format_failures(predictions, verdicts, args.show_failures))


def is_finished(results_dir):
    """Whether a folder holds the results of a whole evaluation, and no later one that is unfinished."""
    if find_partial(results_dir):
        return False
    return all((results_dir / name).is_file() for name in ("metrics.json", "predictions.jsonl"))


def main(argv=None):
    args = parse_args(argv)
    with contextlib.ExitStack() as held:  # what is locked stays so until the end
        run(args, held)


def run(args, held):
    """Evaluate as `args` say, from the checks to the table; `held` takes the locks."""
    rank = int(os.environ.get("RANK", 0))  # torchrun starts several processes; the first speaks, and writes what is lasting
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    name = model_name(args.model)
    default_adapter = Path(f"LoRA_{name}-function_calling")
    is_default = args.adapter is None or args.adapter.resolve() == default_adapter.resolve()
    if args.predictions:
        label = args.predictions.stem
    else:
        label = "base" if args.baseline else "tuned" if is_default else args.adapter.resolve().name
    if label in ("base", "tuned") and not (args.baseline or (is_default and not args.predictions)):
        sys.exit(f"error: {label} is the name of this model's own results: give the adapter or the predictions another one")
    results_dir = args.output_dir / name / label
    test_sha256 = check_split(args.test_file)
    every_query = read_queries(args.test_file)
    if args.predictions or args.rescore:
        if rank == 0:
            rescore(args, results_dir, label, name, every_query, test_sha256)
        return
    queries = read_queries(args.test_file, args.limit) if args.limit else every_query

    adapter_dir = None if args.baseline else args.adapter or default_adapter
    training_run = check_adapter(adapter_dir, args.model) if adapter_dir else {}
    partial_path = results_dir / f"predictions.partial{f'.{rank}' if rank else ''}.jsonl"
    finished = is_finished(results_dir)
    if rank == 0 and results_dir.is_dir():
        with sole_process_in(results_dir):
            pass
    holds_answers = (results_dir / "predictions.jsonl").exists()
    if rank == 0 and holds_answers and not finished and not find_partial(results_dir) and not args.overwrite:
        sys.exit(f"error: {results_dir} holds predictions, but no metrics.json that says what they are of: score a copy of them with "
                 "--predictions FILE, or --overwrite them")
    if rank == 0 and finished and not (args.resume or args.overwrite):
        sys.exit(f"error: {results_dir} holds a finished evaluation: --overwrite replaces it, --rescore scores it again")
    is_local = Path(args.model).expanduser().is_dir()
    model_dir, commit = find_model(args.model, args.revision or (None if is_local else training_run.get("commit")))
    weights_sha256 = hash_local_weights(model_dir, commit)
    if weights_sha256 and training_run.get("weights_sha256") not in (None, weights_sha256):
        sys.exit(f"error: the adapter in {adapter_dir} was trained on other weights than those in {model_dir}: give its own --model")

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading weights; generation shows its own
    device, dtype = choose_device()
    if num_processes > 1:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Where torchrun lets its processes leave each other notes. One may wait long for another to end its share.
        store, _, _ = next(torch.distributed.rendezvous("env://", timeout=timedelta(days=7)))
    scorer = load_tokenizer(model_dir)  # the stock tokenizer: base and tuned are scored in the same tokens
    tokenizer = load_tokenizer(adapter_dir) if adapter_dir else scorer
    if tokenizer.chat_template is None:
        if rank == 0:
            print(f"note: the tokenizer of {args.model} has no chat template; prompts are written in Gemma's turns")
        tokenizer.chat_template = GEMMA_TURNS
    identity = {
        "model": name,
        "commit": commit,
        "weights_sha256": weights_sha256,
        "adapter_sha256": sha256_of_file(adapter_dir / "adapter_model.safetensors") if adapter_dir else None,
        "test_split_sha256": test_sha256,
        "chat_template_sha256": hashlib.sha256(tokenizer.chat_template.encode()).hexdigest(),
        "dtype": str(dtype).removeprefix("torch."),
        "limit": args.limit,
        "max_new_tokens": args.max_new_tokens,
    }

    def as_first_process_says(key, value):
        if num_processes > 1 and rank == 0:
            store.set(key, json.dumps(value))
        return json.loads(store.get(key)) if rank else value

    finished = as_first_process_says("finished", finished)
    if finished and args.resume:
        refuse_other_evaluation(results_dir, read_metrics(results_dir)["run"], identity)
        if rank == 0:
            print(f"Finished    {results_dir} is complete; nothing is left to ask. --rescore prints its scores")
        return
    predictions, done, tokens_at_once = [], [], None
    if rank == 0:
        held.enter_context(sole_process_in(results_dir))
        if is_finished(results_dir) != finished:
            sys.exit(f"error: {results_dir}: another process was at work there since this one started: run this again")
        if (partial_paths := find_partial(results_dir)) and not args.overwrite:
            if not args.resume:
                sys.exit(f"error: {partial_paths[0]} holds an unfinished evaluation: --resume goes on with it, --overwrite starts anew")
            predictions, tokens_at_once = read_partial(partial_paths, identity, queries)
        comparison = read_comparison(args, results_dir, label, every_query, identity)
        print(f"Model       {args.model}" + (f", commit {commit}" if commit else "") + f", {identity['dtype']} on {device}")
        print(f"Adapter     {adapter_dir or 'none: the untuned model with its own tokenizer'}")
        if note := describe_other_split(args.test_file, training_run):
            print(note)
        print(f"Queries     {len(queries):,}" + (f", {len(predictions):,} of them already answered" if predictions else ""))
        if others := set(partial_paths) - {partial_path}:  # of processes that are no more
            open_partial(partial_path, identity, tokens_at_once, predictions).close()
            for path in others:
                path.unlink()
        done = [(prediction["conversation_id"], prediction["turn"]) for prediction in predictions]

    done = set(map(tuple, as_first_process_says("done", done)))
    num_remaining = len(queries) - len(done)
    start = time.monotonic()
    if num_remaining:
        try:
            model = load_model(model_dir, adapter_dir, device, dtype)
            tokens_that_fit = count_tokens_that_fit(model)
            # Where it can, a resumed evaluation keeps its batches, and with them its rounding: half of the memory was left alone.
            if tokens_at_once is None or tokens_at_once > 2 * tokens_that_fit:
                tokens_at_once = tokens_that_fit
            tokens_at_once = as_first_process_says("tokens_at_once", tokens_at_once)
            with open_partial(partial_path, identity, tokens_at_once, predictions) as partial:
                for batch in answer_queries(queries, done, model, tokenizer, scorer, args, tokens_at_once, rank, num_processes):
                    lines = "".join(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in batch).encode()
                    if partial.write(lines) < len(lines):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(partial_path))
                    os.fsync(partial.fileno())
                    predictions += batch
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            sys.exit("error: out of memory, with the model alone or a single query: make room for it, then go on with --resume")
        if rank:
            store.set(f"process {rank}", "has answered its share")
        elif num_processes > 1:
            store.wait([f"process {other}" for other in range(1, num_processes)])
            predictions, _ = read_partial(find_partial(results_dir), identity, queries)
            if len(predictions) < len(queries):
                sys.exit(f"error: {results_dir} lacks answers of a process: all must write into the same folder; go on with --resume")
    if rank:
        return
    seconds = time.monotonic() - start

    place = {(query["conversation_id"], query["turn"]): position for position, query in enumerate(queries)}
    predictions.sort(key=lambda prediction: place[prediction["conversation_id"], prediction["turn"]])
    reasons = Counter(prediction["finish_reason"] for prediction in predictions)
    print(f"Answered    {num_remaining:,} queries in {seconds:,.0f} s; {reasons['end_of_turn']:,} ended their turn, "
          f"{reasons['max_new_tokens']:,} ran into --max-new-tokens, {reasons['prompt_too_long']:,} had a prompt too long")
    write_text(results_dir / "predictions.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in predictions))
    facts = {
        **identity,
        "adapter": str(adapter_dir) if adapter_dir else None,
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "processes": num_processes,
        "tokens_at_once": tokens_at_once,
        "seconds": round(seconds, 1),
        "queries_in_these_seconds": num_remaining,
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers", "peft", "numpy")},
    }
    write_report(args, results_dir, label, name, every_query, predictions, comparison, facts)


def read_metrics(results_dir):
    """The number of "queries" and the "run" that metrics.json tells of; ends the program if it cannot be read."""
    path = results_dir / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        return {"queries": int(metrics.get("queries", 0)), "run": dict(metrics["run"])}
    except (OSError, AttributeError, ValueError, KeyError, TypeError, RecursionError):
        sys.exit(f"error: {path} is missing or cannot be read: score a copy of predictions.jsonl with --predictions FILE, or make both "
                 "anew with --overwrite")


def rescore(args, results_dir, label, name, queries, test_sha256):
    """Score predictions.jsonl of an earlier evaluation again, or the file given with --predictions. Imports no torch."""
    if find_partial(results_dir):
        sys.exit(f"error: {results_dir} holds an unfinished evaluation: go on with it with --resume before it is scored again")
    if args.predictions:
        predictions = read_predictions(args.predictions, queries)
        facts = {"predictions": str(args.predictions), "predictions_sha256": sha256_of_file(args.predictions),
                 "test_split_sha256": test_sha256}
        if (results_dir / "metrics.json").is_file() and not args.overwrite:
            if read_metrics(results_dir)["run"].get("predictions_sha256") != facts["predictions_sha256"]:
                sys.exit(f"error: {results_dir} holds other predictions: --overwrite replaces them, another file name keeps both")
    else:
        predictions = read_predictions(results_dir / "predictions.jsonl", queries)
        metrics = read_metrics(results_dir)
        facts = metrics["run"]
        if len(predictions) < metrics["queries"]:
            sys.exit(f"error: {results_dir / 'predictions.jsonl'} holds {len(predictions):,} predictions, metrics.json is of "
                     f"{metrics['queries']:,}: restore it, or make both anew with --overwrite")
        if facts.get("test_split_sha256") != test_sha256:
            sys.exit(f"error: {results_dir} was made with another test split than {args.test_file}: give its --test-file")
    # A score of their own would be of other tokens; those in an evaluation's own file are right, unless they are gone.
    if args.predictions or not all(prediction["score"] is not None for prediction in predictions):
        score_predictions(predictions, args.model, args.revision)
    comparison = read_comparison(args, results_dir, label, queries, facts)
    if args.predictions:
        results_dir.mkdir(parents=True, exist_ok=True)
        write_text(results_dir / "predictions.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in predictions))
    write_report(args, results_dir, label, name, queries, predictions, comparison, facts)


def describe_other_split(test_file, training_run):
    """A note if the adapter was trained on another train split than the one that stands beside the test split, else None."""
    info_path = test_file.parent / "dataset_info.json"
    if not training_run or not info_path.is_file():
        return None
    try:
        beside = json.loads(info_path.read_text(encoding="utf-8"))["train"]["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        sys.exit(f"error: {info_path} cannot be read: run prepare_function_calling_dataset.py again")
    if training_run.get("train_split_sha256") == beside:
        return None
    return "note: the adapter was trained on another train split than the one beside this test split, and may know its answers"


def exit_cleanly(main):
    """Run `main`; an interruption or a failing disk ends in one line and an exit code instead of a traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # whatever the terminal cannot show
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command with --resume (in place of --overwrite) to go on", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be flushed has no reader either
        sys.exit("error: standard output was closed; files are complete as far as they were said to be written, and --resume goes on")
    except OSError as error:
        if is_disk_full(error):
            sys.exit(f"error: a file could not be written ({first_line(error)}): make room on the disk, then run the same command; "
                     "what was answered is kept with --resume in place of --overwrite")
        sys.exit(f"error: {first_line(error)}")


if __name__ == "__main__":
    exit_cleanly(main)
