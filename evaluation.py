"""Score how well a model calls functions and answers, before and after training (step 3 of 3).

    python evaluation.py --baseline            # google/gemma-3-1b-it before training
    python evaluation.py                       # the same model with the adapter of step 2
    python evaluation.py --show-failures 10    # print ten failures of the last evaluation
    python evaluation.py --server http://127.0.0.1:8000/v1 --server-model fc    # a model on vLLM

Each model turn of a test conversation is one query: the turns before it are the prompt, and the
turn itself is the reference. Results are written to evaluation_results/<model>/<run>/:
predictions.jsonl (one query per line), run.json (how they were made), metrics.json and a chart.
docs/evaluation.md defines the scores.
"""

import argparse
import ast
import asyncio
import contextlib
import difflib
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import random
import re
import shlex
import sys
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self
from urllib.parse import urlsplit

import numpy
from jsonschema import Draft202012Validator, FormatChecker, ValidationError
from jsonschema.validators import extend
from tokenizers import Tokenizer
from tqdm.asyncio import tqdm

if TYPE_CHECKING:  # heavy libraries, which --rescore and --predictions do not need
    import httpx2
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = "google/gemma-3-1b-it"
DEFAULT_TEST_FILE = Path("processed_data/function_calling_test.jsonl")
DEFAULT_MAX_NEW_TOKENS = 256  # as published


def positive_int(text: str) -> int:
    with contextlib.suppress(ValueError):
        if int(text) > 0:
            return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number greater than 0, not {text}")


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="Hub id or local folder of the base model (default: %(default)s).",
    )
    group.add_argument(
        "--revision",
        help="Branch, tag or commit of a base model on the Hub (default: the commit that the "
        "adapter was trained on, or the main branch).",
    )
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--adapter",
        help="Folder or Hub id of a LoRA adapter (default: LoRA_<model name>-function_calling).",
    )
    source.add_argument(
        "--baseline",
        action="store_true",
        help="Evaluate the base model without an adapter, with its own chat template.",
    )
    source.add_argument(
        "--predictions",
        type=Path,
        metavar="FILE",
        help="Score the predictions in a JSON lines file. Each line has a conversation_id, a turn "
        "(the number of messages before it in the test split) and an output.",
    )

    group = parser.add_argument_group("test data")
    group.add_argument(
        "--test-file",
        type=Path,
        default=DEFAULT_TEST_FILE,
        help="Test split written by prepare_function_calling_dataset.py (default: %(default)s).",
    )
    group.add_argument(
        "--limit",
        type=positive_int,
        metavar="N",
        help="Ask for the turns of the first N conversations only. A report covers all stored "
        "answers. The published run used 300.",
    )


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--max-new-tokens",
        type=positive_int,
        metavar="N",
        help="Maximum length of an output in tokens. With --predictions, the limit that was used "
        f"to generate them (default: {DEFAULT_MAX_NEW_TOKENS}).",
    )
    group.add_argument(
        "--batch-size",
        type=positive_int,
        metavar="N",
        help="Number of outputs to generate at once (default: as many as fit a token budget).",
    )
    group.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        help="Data type of the weights (default: bfloat16 where the hardware supports it, else "
        "float32).",
    )

    group = parser.add_argument_group(
        "server",
        "Query an OpenAI-compatible server instead of loading the model. The API key is read from "
        "the environment variable OPENAI_API_KEY.",
    )
    group.add_argument(
        "--server",
        metavar="URL",
        help="Base URL of the server, for example http://127.0.0.1:8000/v1.",
    )
    group.add_argument(
        "--server-model",
        metavar="NAME",
        help="Name under which the server serves the model.",
    )
    group.add_argument(
        "--concurrency",
        type=positive_int,
        metavar="N",
        help=f"Number of requests to send at once (default: {DEFAULT_CONCURRENCY}).",
    )


def add_result_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("results")
    group.add_argument(
        "--output-dir",
        type=Path,
        default=Path("evaluation_results"),
        help="Folder for the results of all models (default: %(default)s).",
    )
    group.add_argument(
        "--name",
        help="Name of the results folder of this run (default: baseline, fine-tuned, "
        "adapter-<adapter>, server-<model> or predictions-<file>).",
    )
    group.add_argument(
        "--compare-with",
        type=Path,
        metavar="FOLDER",
        help="Results folder of the run to compare with. If this run already has predictions, "
        "they are reused (default: the baseline of the model).",
    )
    group.add_argument(
        "--show-failures",
        type=positive_int,
        default=0,
        metavar="N",
        help="Print N failures, grouped by class. If this run already has predictions, they are "
        "reused.",
    )

    group = parser.add_argument_group("existing results (choose one)")
    mode = group.add_mutually_exclusive_group()
    mode.add_argument(
        "--resume",
        action="store_true",
        help="Continue an interrupted evaluation. Queries without an answer are sent again.",
    )
    mode.add_argument(
        "--overwrite",
        action="store_true",
        help="Replace existing results as soon as the new run has its first answer.",
    )
    mode.add_argument(
        "--rescore",
        action="store_true",
        help="Compute the scores of existing predictions again, without the model.",
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the arguments, and refuse flags that are invalid or would have no effect."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add_input_arguments(parser)
    add_generation_arguments(parser)
    add_result_arguments(parser)
    args = parser.parse_args(argv)
    if bool(args.server) != bool(args.server_model):
        parser.error("--server and --server-model must be given together")
    if args.server and not args.server.startswith(("http://", "https://")):
        parser.error(f"--server {args.server} must start with http:// or https://")
    try:
        host = urlsplit(args.server or "").netloc
    except ValueError:
        parser.error(f"--server {args.server} is not a valid URL")
    if "@" in host:
        parser.error("--server must not contain a password. Set OPENAI_API_KEY instead.")
    if args.revision and Path(args.model).expanduser().is_dir():
        parser.error(f"--revision has no effect: --model {args.model} is a local folder")
    without_effect = [
        ("--server", ["adapter", "predictions", "batch_size", "dtype"], args.server),
        ("--predictions", ["batch_size", "dtype"], args.predictions),
        ("--rescore", ["batch_size", "concurrency"], args.rescore),
    ]
    for cause, names, is_given in without_effect:
        for name in names:
            if is_given and getattr(args, name):
                parser.error(f"--{name.replace('_', '-')} has no effect with {cause}")
    if args.concurrency and not args.server:
        parser.error("--concurrency has no effect without --server")
    if args.name is not None and (
        args.name in ("", ".", "..") or Path(args.name).name != args.name
    ):
        parser.error(f"--name {args.name!r} must be the name of a folder, without slashes")
    if args.name == "difference":
        parser.error("--name difference is reserved: it is a column of the table")
    if args.name == BASELINE and not args.baseline:
        parser.error(f"--name {BASELINE} is reserved for runs with --baseline")
    return args


# ---- Files and errors


def fail(message: str) -> NoReturn:
    """End the program with one line on standard error."""
    sys.exit(f"error: {message}")


@contextlib.contextmanager
def exit_on_error(subject: object) -> Iterator[None]:
    """End the program with one line about `subject`, whatever error a library raises."""
    try:
        yield
    except Exception as error:
        fail(f"{subject}: {describe_error(error)}")


def describe_error(error: BaseException) -> str:
    """The text of an error on one line, in words for a user."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"{error} is missing"
    text = re.sub(r"\[Errno -?\d+\] ", "", str(error))
    return " ".join(text.split()) or "unknown error"


def read_jsonl(path: Path, ignore_cut_line: bool = False) -> Iterator[tuple[str, dict]]:
    """Yield ("<path>, line <number>", object) for each line of a file.

    With `ignore_cut_line`, a last line without a newline is skipped: the process that wrote it was
    killed.
    """
    with exit_on_error(path):
        lines = path.read_bytes().splitlines(keepends=True)
    if ignore_cut_line and lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    for number, line in enumerate(lines, start=1):
        place = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            fail(f"{place} is not valid JSON. Each line must be one JSON object.")
        if not isinstance(value, dict):
            fail(f"{place} is not a JSON object. Each line must be one JSON object.")
        yield place, value


def hash_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hash_weights(model_dir: Path) -> str:
    """One sha256 of all weights of a local model: the name of its folder does not identify it."""
    digest = hashlib.sha256()
    for path in sorted(model_dir.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def key_of(query: dict) -> tuple[str, str]:
    """What identifies a query. As text, since many tools write ids as numbers, and turns as 1.0."""
    turn = query["turn"]
    if isinstance(turn, float) and turn.is_integer():
        turn = int(turn)
    return str(query["conversation_id"]), str(turn)


def read_queries(path: Path, limit: int | None = None) -> list[dict]:
    """Return the queries of a split in order; `turn` is the number of messages before the query.

    Turns that are marked "train": false are part of later prompts, but they are not queries.
    """
    if not path.is_file():
        fail(f"{path} not found. Run prepare_function_calling_dataset.py first.")
    queries = []
    for place, row in itertools.islice(read_jsonl(path), limit):
        try:
            queries += list_queries(row)
        except (KeyError, TypeError, AttributeError) as error:
            fail(
                f"{place} does not have the format of a split ({describe_error(error)}). Run "
                "prepare_function_calling_dataset.py again, or pass its test split as --test-file."
            )
    if not queries:
        fail(f"{path} contains no model turn to evaluate.")
    repeated_ids = [key for key, n in Counter(map(key_of, queries)).items() if n > 1]
    if repeated_ids:
        fail(f"{path} contains the conversation id {repeated_ids[0][0]!r} twice.")
    return queries


def list_queries(row: dict) -> list[dict]:
    """The queries of one line of a split."""
    if not isinstance(row["tools"], str | None):
        raise TypeError("its tools are not JSON text")
    messages = []
    queries = []
    model_turns = [
        str(turn) for turn, message in enumerate(row["messages"]) if message["role"] == "assistant"
    ]
    for turn, message in enumerate(row["messages"]):
        content = message["content"]
        if not isinstance(content, str):
            raise TypeError("the content of a message is not text")
        if message["role"] == "assistant" and message.get("train", True):
            query = {
                "conversation_id": row["id"],
                "turn": turn,
                "tools": row["tools"],
                "prompt": list(messages),
                "reference": content.strip(),
                "model_turns": model_turns,
            }
            queries.append(query)
        messages.append({"role": message["role"], "content": content})
    return queries


def read_dataset_info(test_file: Path) -> dict:
    """Return the dataset_info.json next to a split, or {} if there is none."""
    path = test_file.with_name("dataset_info.json")
    if not path.is_file():
        return {}
    with exit_on_error(path):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def name_of(path_or_id: str | Path) -> str:
    """The last part of a path or a Hub id."""
    return Path(path_or_id).expanduser().resolve().name


# ---- Ask: a model in this process


def find_folder(
    name: str, revision: str | None = None, with_weights: bool = True
) -> tuple[Path, str | None]:
    """Return (folder, commit) of a model or an adapter; a local folder has no commit."""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser(), None
    import huggingface_hub
    from huggingface_hub import errors

    files = ["*.json", "*.jinja", "*.safetensors" if with_weights else "tokenizer.json"]
    try:
        folder = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=files)
    except errors.GatedRepoError:
        fail(
            f"{name} is gated. Open https://huggingface.co/{name}, accept the license, run "
            "`hf auth login`, and run this command again."
        )
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        fail(
            f"{name} is neither a local folder nor a repository on the Hub. "
            "Check the spelling. If the repository is private, run `hf auth login` first."
        )
    except errors.RevisionNotFoundError:
        fail(f"{name} has no revision {revision} on the Hub.")
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        is_offline = huggingface_hub.constants.HF_HUB_OFFLINE
        reason = "the Hub cannot be reached. Check the spelling and the network connection"
        if is_offline:
            reason = "HF_HUB_OFFLINE is set. Check the spelling, set HF_HUB_OFFLINE=0"
        fail(
            f"{name} is neither a local folder nor in the download cache, and {reason}, or pass a "
            "local folder."
        )
    except Exception as error:
        fail(f"downloading {name} failed: {describe_error(error)}")
    return Path(folder), Path(folder).name


def find_adapter(args: argparse.Namespace) -> tuple[Path, str | None]:
    """Return (adapter folder, the commit of the base model that it was trained on)."""
    if args.adapter:
        folder, _ = find_folder(args.adapter)
    else:
        folder = default_adapter(args.model)
        if not folder.is_dir():
            if is_merged(args.model):
                fail(
                    f"{folder} not found, but --model {args.model} is a merged model. Add "
                    "--baseline to evaluate it without an adapter."
                )
            fail(
                f"{folder} not found. If --model {args.model} is correct, run "
                f"`{training_command(args)}` first, or pass --adapter for another adapter or "
                "--baseline for the base model."
            )
    path = folder / "training_run.json"
    has_unfinished_run = Path(f"{folder}-checkpoints", "run.json").is_file()
    if has_unfinished_run and path.is_file():
        print(
            f"warning: a new training of {folder} is not finished, so the earlier adapter is "
            "evaluated. To finish it, rerun the same function_calling_train.py command with "
            "--resume.",
            file=sys.stderr,
        )
    elif has_unfinished_run:
        fail(
            f"the training of {folder} is not finished. To continue it, rerun the same "
            "function_calling_train.py command with --resume."
        )
    elif not path.is_file():
        fail(
            f"{folder} is not a finished adapter: it contains no training_run.json. "
            "Pass the folder that function_calling_train.py wrote."
        )
    with exit_on_error(path):
        training_run = json.loads(path.read_text(encoding="utf-8"))
        trained_on = training_run["model"]
        commit = training_run["commit"]
    if name_of(trained_on) != name_of(args.model):
        fail(f"{folder} was trained on {trained_on}. Pass --model {trained_on}.")
    train_file = args.test_file.with_name("function_calling_train.jsonl")
    train_hash = training_run.get("train_split_sha256")
    if train_hash and train_file.is_file() and hash_file(train_file) != train_hash:
        print(
            f"warning: {folder} was not trained on {train_file}, so its training data may include "
            "test conversations. Evaluate it on the test split that was prepared together with its "
            "train split.",
            file=sys.stderr,
        )
    return folder, commit


def default_adapter(model: str) -> Path:
    return Path(f"LoRA_{name_of(model)}-function_calling")


def is_merged(model: str) -> bool:
    """Whether a model is a local folder with an adapter merged into its weights."""
    folder = Path(model).expanduser()
    is_adapter = (folder / "adapter_config.json").is_file()
    return (folder / "training_run.json").is_file() and not is_adapter


def choose_device(dtype: str | None = None) -> tuple[str, "torch.dtype"]:
    """Return (device, torch dtype): the named dtype, or bfloat16 where the hardware supports it.

    torch explains with a warning why it cannot use a GPU, for example an old driver. Such a
    warning is printed: an evaluation on a CPU takes many times longer.
    """
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        has_cuda = torch.cuda.is_available()
    for warning in caught:
        print(f"warning: {' '.join(str(warning.message).split())}", file=sys.stderr)
    if has_cuda:
        device = "cuda"
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif torch.backends.mps.is_available():
        device = "mps"
        has_bf16 = False
    else:
        device = "cpu"
        has_bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return device, getattr(torch, dtype or ("bfloat16" if has_bf16 else "float32"))


def load_model(
    model_dir: Path, adapter_dir: Path | None, device: str, dtype: "torch.dtype"
) -> "PreTrainedModel":
    """Load the base model. An adapter is merged into its weights in float32, before rounding."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.backends.cuda.enable_cudnn_sdp(False)  # its masked bf16 attention can give NaN
    model = AutoModelForCausalLM.from_pretrained(
        model_dir,
        dtype="float32",
        attn_implementation="sdpa",
        use_safetensors=True,
    )
    if adapter_dir:
        model = PeftModel.from_pretrained(model, adapter_dir).merge_and_unload()
    for parameter in model.parameters():  # not the buffers: rotary frequencies need float32
        parameter.data = parameter.data.to(dtype)
    model.generation_config = GenerationConfig()  # greedy, whatever the model's own file says
    return model.to(device).eval()


def write_for_baseline(messages: list[dict], tokenizer: Tokenizer) -> list[dict]:
    """Rewrite a prompt for the base model's own template, which knows only user and assistant.

    Control tokens inside a text are broken up with a space, so that no text can forge a turn.
    """
    added_tokens = tokenizer.get_added_tokens_decoder().values()
    control_tokens = [token.content for token in added_tokens if token.special]
    written = []
    for message in messages:
        text = message["content"]
        for token in control_tokens:
            text = text.replace(token, f"{token[:-1]} {token[-1]}")
        role = "user" if message["role"] == "tool" else message["role"]
        written.append({"role": role, "content": text})
    return written


def generate_batch(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[list[int]],
    stop_ids: list[int],
    max_new_tokens: int,
) -> list[tuple[str, str]]:
    """Generate greedily for prompts of token ids; return [(text, finish reason), ...]."""
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    rows = model.generate(
        **batch.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stop_ids,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = []
    for row in rows[:, batch["input_ids"].shape[1] :].tolist():  # padded after the stop token
        text = tokenizer.decode(row, skip_special_tokens=True)
        is_finished = not set(stop_ids).isdisjoint(row)
        answers.append((text, "end_of_turn" if is_finished else "max_new_tokens"))
    return answers


# Maximum number of tokens per batch, counting prompts, outputs and padding.
TOKENS_AT_ONCE = {"cuda": 65_536, "mps": 16_384, "cpu": 16_384}


def ask_model(
    queries: list[dict],
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    args: argparse.Namespace,
) -> Iterator[tuple[dict, str, str]]:
    """Yield (query, text, finish reason) for all queries, the longest prompt first.

    A batch that does not fit into memory halves the token budget for the rest of the run.
    """
    stop_ids = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    with exit_on_error("the chat template"):
        prompts = tokenizer.apply_chat_template(
            [query["prompt"] for query in queries], add_generation_prompt=True
        )["input_ids"]
    waiting = sorted(range(len(queries)), key=lambda n: len(prompts[n]), reverse=True)
    token_budget = sys.maxsize if args.batch_size else TOKENS_AT_ONCE[model.device.type]
    while waiting:
        longest = len(prompts[waiting[0]]) + args.max_new_tokens
        size = min(args.batch_size or len(waiting), max(1, token_budget // longest))
        batch = waiting[:size]
        answers = None
        try:
            answers = generate_batch(
                model, tokenizer, [prompts[n] for n in batch], stop_ids, args.max_new_tokens
            )
        except RuntimeError as error:  # torch.OutOfMemoryError is a RuntimeError
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
        if answers is None:  # outside of "except": the error keeps the batch's tensors alive
            token_budget = longest * len(batch) // 2
            continue
        for n, (text, finish_reason) in zip(batch, answers, strict=True):
            yield queries[n], text, finish_reason
        waiting = waiting[size:]


MEMORY_ERRORS = "out of memory|can't allocate memory|not enough memory|ALLOC_FAILED"


def is_out_of_memory(error: RuntimeError) -> bool:
    return re.search(MEMORY_ERRORS, str(error)) is not None


# ---- Ask: a server

DEFAULT_CONCURRENCY = 32
REQUEST_TIMEOUT = 600  # seconds, including the time in the server's queue
CONNECT_TIMEOUT = 30  # seconds
RETRY_WAITS = [1, 2, 4, 8, 16]  # seconds before a request is sent again
MAX_FAILURES_IN_A_ROW = 50  # then the server is considered down
MAX_MESSAGE_LENGTH = 300  # characters of a server's error message that are kept

# Servers and libraries have many words for the end of a turn and for the token limit. Any other
# reason is stored unchanged.
END_REASONS = {
    "stop",
    "eos",
    "eos_token",
    "stop_sequence",
    "end",
    "end_turn",
    "end_of_turn",
    "tool_calls",
    "tool_use",
    "function_call",
}
LENGTH_REASONS = {
    "length",
    "limit",
    "max_length",
    "max_new_tokens",
    "max_output_tokens",
    "max_tokens",
    "model_length",
}


class ServerError(Exception):
    """A request without a usable answer. With `can_retry`, sending it again may help."""

    def __init__(self, message: str, can_retry: bool = False):
        super().__init__(message)
        self.can_retry = can_retry


def read_finish_reason(reason: str | None) -> str:
    word = str(reason or "stop").lower()
    if word in END_REASONS:
        return "end_of_turn"
    if word in LENGTH_REASONS:
        return "max_new_tokens"
    return str(reason)


OUTPUT_KEYS = ("content", "output", "tool_calls", "function_call")
WRAPPER_KEYS = ("response", "completion", "output", "choices", "message")
TEXT_PART_TYPES = ("text", "output_text")
THOUGHT_PART_TYPES = ("thinking", "redacted_thinking", "reasoning")


def find_fields(row: dict) -> dict:
    """The fields of an answer: those of a row, or of the completion, choice or message in it."""
    fields = row
    for key in WRAPPER_KEYS:
        if any(isinstance(fields.get(name), str | list) for name in OUTPUT_KEYS):
            break
        inner = fields.get(key)
        if key == "choices" and isinstance(inner, list) and inner:
            inner = inner[0]
        if isinstance(inner, dict) and not inner.keys().isdisjoint(OUTPUT_KEYS + WRAPPER_KEYS):
            fields = {"finish_reason": fields.get("finish_reason"), **inner}
    return fields


def read_text(answer: dict) -> str:
    text = answer.get("output") or answer.get("content")
    if isinstance(text, list):
        parts = [{"text": part} if isinstance(part, str) else part for part in text]
        if not all(isinstance(part, dict) for part in parts):
            raise TypeError("the content is not text")
        kinds = [part.get("type", "text") for part in parts]
        if not {*kinds} <= {*TEXT_PART_TYPES, *THOUGHT_PART_TYPES}:
            raise TypeError(f"the content has parts of the types {', '.join(map(str, kinds))}")
        parts = [part for part in parts if part.get("type", "text") in TEXT_PART_TYPES]
        text = "".join(part["text"] for part in parts)
    if not isinstance(text, str | None):
        raise TypeError("the content is not text")
    return (text or "").strip()


def read_call_fields(answer: dict) -> list[str]:
    """The calls in tool_calls and function_call as <tool_call> blocks."""
    calls = answer.get("tool_calls") or []
    calls = json.loads(calls) if isinstance(calls, str) else calls
    calls = calls if isinstance(calls, list) else [calls]
    if answer.get("function_call"):
        calls = [*calls, answer["function_call"]]
    blocks = []
    for call in calls:
        if not isinstance(call, dict):
            raise TypeError("a tool call is not an object with a name and arguments")
        function = call.get("function") or call
        arguments = function.get("arguments")
        with contextlib.suppress(ValueError, TypeError, RecursionError):  # not JSON: kept as it is
            arguments = json.loads(arguments)
        text = json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)
        blocks.append(f"<tool_call>\n{text}\n</tool_call>")
    return blocks


def read_answer(answer: dict) -> tuple[str, str]:
    """Return (text, finish reason) of an answer in OpenAI's fields.

    Thoughts and calls in fields of their own become part of the text, unless it contains any.
    """
    text = read_text(answer)
    pieces = [text] if text else []
    thought = answer.get("reasoning_content") or answer.get("reasoning") or answer.get("thinking")
    if isinstance(thought, str) and thought.strip() and "<think>" not in text:
        pieces.insert(0, f"<think>{thought.strip()}</think>")
    if not parse_calls(text):
        pieces += read_call_fields(answer)
    return "\n".join(pieces), read_finish_reason(answer.get("finish_reason"))


def find_message(body: Any) -> str:
    """The server's own message in the body of an error, wherever the server puts it."""
    found = body
    while isinstance(found, dict | list) and found:
        if isinstance(found, list):
            found = found[0]
            continue
        values = [found.get(key) for key in ("error", "errors", "message", "detail", "msg")]
        values = [value for value in values if value and isinstance(value, str | dict | list)]
        if not values:
            break
        found = values[0]
    if not isinstance(found, str):
        found = json.dumps(found)
    return " ".join(re.sub("<[^>]*>", " ", found).split())  # without the tags of an HTML page


def shorten_error(message: str, secrets: list[str]) -> str:
    """Remove keys, which some servers repeat in their errors, and then cut a long message."""
    for secret in secrets:
        if secret and secret != "EMPTY":
            message = message.replace(secret, "[key]")
    is_long = len(message) > MAX_MESSAGE_LENGTH
    return message[:MAX_MESSAGE_LENGTH] + "..." if is_long else message


def make_error(code: Any, body: Any) -> ServerError:
    """The error for an HTTP status, or for the code that a server puts into its reply."""
    message = find_message(body)
    if not isinstance(code, int):
        return ServerError(message)
    message = f"HTTP status {code}: {message}"
    if code == 404 and "model" not in message.lower():
        message += " (the URL of a server usually ends in /v1)"
    return ServerError(message, can_retry=code == 429 or code >= 500)


def read_reply(response: "httpx2.Response") -> tuple[str, str]:
    """Return (text, finish reason) of a server's reply, or raise ServerError."""
    try:
        body = response.json()
    except ValueError:
        body = response.text
    if not response.is_success:
        raise make_error(response.status_code, body or response.reason_phrase)
    try:
        choice = body if body.get("error") else body["choices"][0]
        error = choice.get("error")
        if error:  # OpenRouter and others report errors with status 200
            raise make_error(error.get("code") if isinstance(error, dict) else None, error)
        reason = choice.get("finish_reason")
        if reason in ("error", "abort"):
            raise ServerError(f"the server stopped the answer with finish reason {reason!r}")
        return read_answer({**choice["message"], "finish_reason": reason})
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ServerError(f"the reply is not a chat completion: {find_message(body)}") from error


async def send_request(client: "httpx2.AsyncClient", url: str, request: dict) -> tuple[str, str]:
    """Return (text, finish reason) of the answer to one request, or raise ServerError."""
    import httpx2

    try:
        response = await client.post(url, json=request)
    except httpx2.ReadTimeout:
        raise ServerError(
            f"no answer within {REQUEST_TIMEOUT} seconds; a lower --concurrency may help"
        ) from None
    except httpx2.TransportError as error:
        place = url.partition("?")[0]
        raise ServerError(f"no connection to {place}: {describe_error(error)}", True) from None
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
        place = url.partition("?")[0]
        raise ServerError(f"{place} cannot be used: {describe_error(error)}") from None
    return read_reply(response)


async def ask_query(
    client: "httpx2.AsyncClient",
    url: str,
    query: dict,
    options: dict,
    semaphore: asyncio.Semaphore,
) -> tuple[dict, str, str, str | None]:
    """Return (query, text, finish reason, error or None), with retries where they can help."""
    waits = list(RETRY_WAITS)
    async with semaphore:
        while True:
            request = {"messages": query["prompt"], **options}
            try:
                text, finish_reason = await send_request(client, url, request)
                return query, text, finish_reason, None
            except ServerError as error:
                if "max_tokens" in request and "Use 'max_completion_tokens'" in str(error):
                    # OpenAI's newer models insist on this name. All later requests use it, too.
                    options["max_completion_tokens"] = request["max_tokens"]
                    options.pop("max_tokens", None)
                    continue
                if not waits or not error.can_retry:
                    return query, "", "failed", str(error)
            await asyncio.sleep(waits.pop(0) * random.uniform(0.5, 1.5))  # not all at once


def chat_url(base_url: str) -> str:
    """The URL to send chat requests to; the full URL is accepted as well."""
    base, mark, query = base_url.partition("?")
    if not base.endswith("/chat/completions"):
        base = f"{base.rstrip('/')}/chat/completions"
    return base + mark + query


async def check_connection(client: "httpx2.AsyncClient", url: str) -> None:
    """End the program if no server is running: retrying all queries would take a minute."""
    import httpx2

    place = url.partition("?")[0]
    try:
        await client.get(url, timeout=CONNECT_TIMEOUT)
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        fail(
            f"no connection to {place}: {describe_error(error)}. Start the server, or check "
            "--server."
        )
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError):
        pass  # the queries will show whether this matters


async def ask_server(
    queries: list[dict], args: argparse.Namespace, write: Callable[..., None]
) -> None:
    """Ask a server all queries, --concurrency at once, and pass each answer to `write`.

    The key is OPENAI_API_KEY and nothing else: no Hugging Face token may reach the server.
    """
    import httpx2

    key = os.environ.get("OPENAI_API_KEY", "").strip() or "EMPTY"
    if not key.isascii() or not key.isprintable():
        fail(
            "OPENAI_API_KEY contains a line break or a character that is not ASCII. Set it "
            "to the key alone."
        )
    url = chat_url(args.server)
    options = {
        "model": args.server_model,
        "max_tokens": args.max_new_tokens,
        "temperature": 0,
    }
    semaphore = asyncio.Semaphore(args.concurrency or DEFAULT_CONCURRENCY)
    num_failures = 0
    async with httpx2.AsyncClient(
        headers={"Authorization": f"Bearer {key}"},
        timeout=httpx2.Timeout(REQUEST_TIMEOUT, connect=CONNECT_TIMEOUT),
        limits=httpx2.Limits(max_connections=None),
    ) as client:
        await check_connection(client, url)
        tasks = [
            asyncio.create_task(ask_query(client, url, query, options, semaphore))
            for query in queries
        ]
        for answer in tqdm.as_completed(tasks, desc="Answering", unit=" queries", disable=None):
            query, text, finish_reason, error = await answer
            num_failures = num_failures + 1 if error else 0
            if error:
                error = shorten_error(error, [key, urlsplit(args.server).query])
            write(query, text, finish_reason, error)
            if num_failures == MAX_FAILURES_IN_A_ROW:
                for task in tasks:
                    task.cancel()
                break
        await asyncio.gather(*tasks, return_exceptions=True)


# ---- Store: run.json and predictions.jsonl

BASELINE = "baseline"  # names of results folders
FINE_TUNED = "fine-tuned"
REPORT_FILES = ["metrics.json", "scores.png", "comparison*.png"]

# The keys of run.json that identify a run. Each has a name in messages and, if its value is a hash,
# the key whose value is shown instead.
RUN_KEYS = {
    "source": ("source", None),
    "model_path": ("--model", None),
    "commit": ("model commit", None),
    "weights_sha256": ("model", "model_path"),
    "dtype": ("--dtype", None),
    "adapter_sha256": ("adapter", "adapter"),
    "predictions_sha256": ("predictions file", "predictions"),
    "served_model": ("--server-model", None),
    "uses_baseline_template": ("--baseline", None),
    "max_new_tokens": ("--max-new-tokens", None),
    "test_split_sha256": ("test split", "test_file"),
    "prompt_sha256": ("prompt wording", None),
}


def score_output(kind: str, reference: list, output: list) -> float:
    """Published score, in [0, 1], of an output; both are tokens without special tokens.

    A call: the longest contiguous run of tokens that both contain, over the reference's length.
    Any other turn: the tokens that both contain, over the output's length (ROUGE-1 precision).
    """
    if kind == "helpful_exchange":
        num_common = (Counter(reference) & Counter(output)).total()
        return num_common / len(output) if output else 0.0
    matcher = difflib.SequenceMatcher(None, output, reference, autojunk=False)
    return matcher.find_longest_match().size / len(reference) if reference else 0.0


class PredictionWriter:
    """Writes predictions.jsonl and run.json of a run, one prediction at a time.

    Nothing is written, and nothing of an earlier run is replaced, before the first answer. After
    that each prediction is on disk at once, so that a killed run can be resumed.
    """

    def __init__(
        self, results_dir: Path, run: dict, scorer: Tokenizer, num_queries: int, is_resumed: bool
    ):
        self.results_dir = results_dir
        self.run = run
        self.scorer = scorer
        added = scorer.get_added_tokens_decoder()
        self.special_ids = {token for token in added if added[token].special}
        self.is_resumed = is_resumed
        self.path = results_dir / "predictions.jsonl"
        self.file = None
        self.unwritten: list[str] = []
        self.first_error: str | None = None
        self.num_queries = num_queries
        self.num_answered = 0
        self.last_line = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self.file:
            self.file.close()
        elif error is KeyboardInterrupt:
            sys.exit("interrupted before the first answer: run the same command again")

    def write(self, query: dict, output: str, finish_reason: str, error: str | None = None) -> None:
        """Score the answer to a query and append it."""
        if finish_reason == "failed":
            output = ""
        output = output.strip().encode(errors="replace").decode()  # without lone surrogates
        kind = "helpful_exchange" if parse_calls(query["reference"]) == [] else "function_calling"
        prediction = {
            "conversation_id": query["conversation_id"],
            "turn": query["turn"],
            "reference": query["reference"],
            "kind": kind,
            "output": output,
            "score": score_output(kind, self.tokenize(query["reference"]), self.tokenize(output)),
            "finish_reason": finish_reason,
        }
        if finish_reason == "failed":
            prediction["error"] = error or "the prediction is marked as failed"
            self.first_error = self.first_error or prediction["error"]
        self.unwritten.append(json.dumps(prediction, ensure_ascii=False) + "\n")
        if self.file is None and finish_reason != "failed":
            self.open()
        if self.file:
            self.file.writelines(self.unwritten)
            self.file.flush()
            self.unwritten.clear()
        self.num_answered += finish_reason != "failed"
        self.print_progress()

    def tokenize(self, text: str) -> list[int]:
        ids = self.scorer.encode(text, add_special_tokens=False).ids
        return [token for token in ids if token not in self.special_ids]

    def print_progress(self) -> None:
        """Print a line at most once a minute where no terminal shows the progress bar."""
        now = time.monotonic()
        if now - self.last_line >= 60 and not sys.stderr.isatty():
            self.last_line = now
            print(f"Answered    {self.num_answered:,} of {self.num_queries:,} queries", flush=True)

    def open(self) -> None:
        """Start the run on disk: append to an unfinished one, or replace an earlier one."""
        self.results_dir.mkdir(parents=True, exist_ok=True)
        for pattern in REPORT_FILES:  # of the earlier predictions
            for path in self.results_dir.glob(pattern):
                path.unlink()
        run_path = self.results_dir / "run.json"
        new_run = run_path.with_suffix(".json.new")
        new_run.write_text(json.dumps(self.run, indent=2) + "\n", encoding="utf-8")
        if self.is_resumed:
            self.file = open(self.path, "a", encoding="utf-8")
        else:
            new_path = self.path.with_suffix(".jsonl.new")
            self.file = open(new_path, "w", encoding="utf-8")
            new_path.replace(self.path)
        new_run.replace(run_path)


def results_name(args: argparse.Namespace) -> str:
    """The name of the results folder. Prefixes prevent collisions between kinds of runs."""
    if args.name:
        return args.name
    if args.baseline:
        return BASELINE
    if args.predictions:
        return f"predictions-{args.predictions.stem}"
    if args.server:
        return f"server-{name_of(args.server_model)}"
    if args.adapter and Path(args.adapter).resolve() != default_adapter(args.model).resolve():
        return f"adapter-{name_of(args.adapter)}"
    return FINE_TUNED


def describe_run(args: argparse.Namespace) -> dict:
    """What run.json records of a run, as far as the flags and local files tell."""
    source = "local model"
    if args.server:
        source = "server"
    elif args.predictions:
        source = "predictions file"
    elif not args.baseline:
        source = "adapter"
    model_dir = Path(args.model).expanduser()
    info = read_dataset_info(args.test_file)
    test_hash = hash_file(args.test_file)
    is_described = (info.get("test") or {}).get("sha256") == test_hash
    run = {
        "source": source,
        "model": name_of(args.model),
        "model_path": str(model_dir.resolve()) if model_dir.is_dir() else args.model,
        "commit": None,
        "weights_sha256": None,
        "dtype": args.dtype,
        "uses_baseline_template": args.baseline,
        "max_new_tokens": args.max_new_tokens,
        "limit": args.limit,
        "test_file": str(args.test_file),
        "test_split_sha256": test_hash,
        "is_published_split": is_described and info.get("is_published_split") is True,
        "prompt_sha256": None,
    }
    if "prompt" in info:
        wording = json.dumps(info["prompt"], sort_keys=True)
        run["prompt_sha256"] = hashlib.sha256(wording.encode()).hexdigest()
    if args.server:
        run["served_model"] = args.server_model
        run["server"] = args.server.partition("?")[0]
    elif args.predictions:
        run["predictions"] = str(args.predictions)
        if args.predictions.is_file():
            run["predictions_sha256"] = hash_file(args.predictions)
    elif model_dir.is_dir():
        run["weights_sha256"] = hash_weights(model_dir)
    if source == "adapter":
        run["adapter"] = args.adapter or str(default_adapter(args.model))
        weights = Path(run["adapter"]).expanduser() / "adapter_model.safetensors"
        if weights.is_file():
            run["adapter_sha256"] = hash_file(weights)
    return run


def read_run(results_dir: Path) -> dict:
    path = results_dir / "run.json"
    if not path.is_file() or not (results_dir / "predictions.jsonl").is_file():
        fail(f"{results_dir} contains no evaluation: run.json or predictions.jsonl is missing.")
    with exit_on_error(path):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def check_same_run(run: dict, results_dir: Path) -> None:
    """End the program if existing results were made in another way than the flags say.

    Settings that only one of the two runs recorded are not compared.
    """
    earlier = read_run(results_dir)
    changes = []
    for key, (name, shown) in RUN_KEYS.items():
        if None in (run.get(key), earlier.get(key)) or run[key] == earlier[key]:
            continue
        before = earlier.get(shown or key)
        now = run.get(shown or key)
        if isinstance(now, bool):
            changes.append(f"it was made {'with' if before else 'without'} {name}")
        elif before == now or key in ("prompt_sha256", "weights_sha256"):
            changes.append(f"the {name} has changed since")
        else:
            changes.append(f"{name} was {before}, not {now}")
    if changes:
        fail(
            f"{results_dir} contains predictions of a different run: {'; '.join(changes)}. "
            "Use the original flags and files, --overwrite to replace these results, or --name to "
            "write to another folder."
        )


def read_finish_reasons(results_dir: Path, run: dict) -> dict[tuple[str, str], str]:
    """Return {query: finish reason} of the predictions of the unfinished run in a folder."""
    path = results_dir / "predictions.jsonl"
    if not path.exists():
        return {}
    check_same_run(run, results_dir)
    # The last line may be incomplete after a kill.
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return {key_of(prediction): prediction["finish_reason"] for _, prediction in read_jsonl(path)}


def match_answers(path: Path, queries: list[dict]) -> dict[tuple[str, str], tuple[str, str]]:
    """Return {query: (text, finish reason)} of the queries that a file of predictions answers."""
    answers = {}
    model_turns = {str(query["conversation_id"]): query["model_turns"] for query in queries}
    for place, row in read_jsonl(path):
        fields = find_fields(row)
        missing = [key for key in ("conversation_id", "turn") if key not in row]
        missing += [] if set(OUTPUT_KEYS) & set(fields) else ["output"]
        if missing:
            fail(
                f"{place} has no {missing[0]!r}; its keys are {', '.join(row)}. Each line needs "
                "conversation_id, turn and output, or OpenAI's content and tool_calls instead of "
                "output."
            )
        conversation_id, turn = key = key_of(row)
        if key in answers:
            fail(f"{place} repeats an earlier prediction: {conversation_id}, turn {turn}.")
        turns = model_turns.get(conversation_id, [turn])
        if turn not in turns:
            fail(
                f"{place} has turn {turn} of conversation {conversation_id}, whose model turns are "
                f"{', '.join(turns)}. Count the messages of the test split: system text is part of "
                "the first turn, and neighboring results are one message."
            )
        with exit_on_error(place):
            answers[key] = read_answer(fields)
    if not answers:
        fail(f"{path} contains no predictions.")
    ours = [key_of(query) for query in queries]
    matched = {key: answers[key] for key in ours if key in answers}
    if not matched:
        theirs = next(iter(answers))
        fail(
            f"no prediction in {path} matches a query of the test split. For example, {path} has "
            f'conversation_id "{theirs[0]}" with turn {theirs[1]}, but the test split has '
            f'conversation_id "{ours[0][0]}" with turn {ours[0][1]}.'
        )
    if len(matched) < len(answers):
        print(
            f"Unused      {len(answers) - len(matched):,} predictions match none of these queries"
        )
    return matched


def write_predictions(args: argparse.Namespace, results_dir: Path, queries: list[dict]) -> None:
    """Write the answers of a model, a server or a file to run.json and predictions.jsonl."""
    args.max_new_tokens = args.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
    run = describe_run(args)
    check_is_not_adapter(args.model, Path(args.model).expanduser())
    is_local = not (args.server or args.predictions)
    answers_of_file = match_answers(args.predictions, queries) if args.predictions else {}
    adapter_dir = None
    revision = args.revision
    if is_local and not args.baseline:
        adapter_dir, trained_commit = find_adapter(args)
        revision = revision or trained_commit
        run["adapter_sha256"] = hash_file(adapter_dir / "adapter_model.safetensors")
    model_dir, run["commit"] = find_folder(args.model, revision, with_weights=is_local)
    check_is_not_adapter(args.model, model_dir)  # from the Hub
    with exit_on_error(model_dir / "tokenizer.json"):
        scorer = Tokenizer.from_buffer((model_dir / "tokenizer.json").read_bytes())
    if is_local:
        device, dtype = choose_device(args.dtype)
        run["dtype"] = str(dtype).removeprefix("torch.")
        print(f"Model       {describe_model(args, adapter_dir, run['dtype'], device)}", flush=True)
    earlier = read_finish_reasons(results_dir, run) if args.resume else {}
    unanswered = [query for query in queries if earlier.get(key_of(query), "failed") == "failed"]
    # Failed queries come last, because they may fail again, and too many failures end the run.
    unanswered.sort(key=lambda query: key_of(query) in earlier)
    if args.predictions:
        unanswered = [query for query in unanswered if key_of(query) in answers_of_file]
    if args.baseline:
        unanswered = [
            {**query, "prompt": write_for_baseline(query["prompt"], scorer)} for query in unanswered
        ]
    if not unanswered:
        return
    with PredictionWriter(
        results_dir, run, scorer, len(unanswered), is_resumed=bool(earlier)
    ) as writer:
        if args.predictions:
            for query in unanswered:
                writer.write(query, *answers_of_file[key_of(query)])
        elif args.server:
            print(f"Server      {args.server_model} on {run['server']}", flush=True)
            asyncio.run(ask_server(unanswered, args, writer.write))
        else:
            model, tokenizer = load_for_generation(model_dir, adapter_dir, device, dtype)
            answers = ask_model(unanswered, model, tokenizer, args)
            progress = tqdm(answers, "Answering", len(unanswered), unit=" queries", disable=None)
            for query, text, finish_reason in progress:
                writer.write(query, text, finish_reason)
    if writer.unwritten:
        advice = " --rescore reports the earlier answers." if earlier else ""
        fail(
            f"none of the {len(writer.unwritten)} queries was answered, so nothing was saved."
            f"{advice} The first error: {writer.first_error}"
        )


def check_is_not_adapter(model: str, folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        fail(f"--model {model} is an adapter. Pass it as --adapter, and its base model as --model.")


def describe_model(
    args: argparse.Namespace, adapter_dir: Path | None, dtype: str, device: str
) -> str:
    import torch

    adapter = f" with {args.adapter or adapter_dir}" if adapter_dir else ""
    gpu = f" ({torch.cuda.get_device_name()})" if device == "cuda" else ""
    return f"{args.model}{adapter}, {dtype} on {device}{gpu}"


def load_for_generation(
    model_dir: Path, adapter_dir: Path | None, device: str, dtype: "torch.dtype"
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load model and tokenizer. An adapter folder has a tokenizer with its own chat template."""
    import transformers

    transformers.logging.disable_progress_bar()
    with exit_on_error(f"{adapter_dir or model_dir} cannot be loaded"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(adapter_dir or model_dir)
        return load_model(model_dir, adapter_dir, device, dtype), tokenizer


# ---- Judge: calls and tools

# How datasets write the types of JSON Schema. "any" means that any type is right.
TYPE_NAMES = {
    **dict.fromkeys(["dict", "map"], "object"),
    **dict.fromkeys(["list", "tuple", "set"], "array"),
    **dict.fromkeys(["str", "text"], "string"),
    **dict.fromkeys(["int", "int32", "int64", "long"], "integer"),
    **dict.fromkeys(["float", "double", "decimal"], "number"),
    "bool": "boolean",
    **dict.fromkeys(["nonetype", "none"], "null"),
    **dict.fromkeys(["union", "optional", "type_unspecified"], "any"),
}
JSON_TYPES = ["string", "number", "integer", "boolean", "array", "object", "null", "any"]
SCHEMA_KEYS = [  # where a tool's parameters are: OpenAI, Anthropic, MCP, Gemini, smolagents
    "parameters",
    "input_schema",
    "inputSchema",
    "parametersJsonSchema",
    "parameters_json_schema",
    "inputs",
]
# Keywords of JSON Schema whose values are objects. They must not be mistaken for flat parameters.
OBJECT_KEYWORDS = {
    "$defs",
    "additionalProperties",
    "const",
    "default",
    "definitions",
    "dependentRequired",
    "dependentSchemas",
    "else",
    "example",
    "if",
    "not",
    "patternProperties",
    "properties",
    "propertyNames",
    "then",
    "unevaluatedProperties",
}


def read_literal(text: str) -> Any:
    """Read JSON, or else a Python literal: the published dataset has both."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return ast.literal_eval(text)


def read_float(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() else value


def read_call(text: str) -> dict:
    """Return {"name", "arguments", "text"}; equal arguments have equal texts. May raise."""
    call = read_literal(text.strip())
    name = call["name"]
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        arguments = read_literal(arguments) if arguments.strip() else None
    if not name or not isinstance(name, str) or not isinstance(arguments, dict | None):
        raise ValueError("not a call")
    if not arguments and not {"name", "arguments", "id", "type", "index"}.issuperset(call):
        raise ValueError("the arguments may be under another key")
    # Through JSON, so that a Python tuple is a list and 1.0 is 1.
    arguments = json.loads(json.dumps(arguments or {}), parse_float=read_float)
    return {"name": name, "arguments": arguments, "text": json.dumps(arguments, sort_keys=True)}


CALL_OR_THOUGHT = re.compile(
    "(<tool_call>(?:(?!<tool_call>).)*?</tool_call>)|<think>(?:(?!<think>).)*?</think>", re.DOTALL
)


def parse_calls(text: str) -> list[dict] | None:
    """Return the calls of a turn, or None if one of them is malformed.

    A call inside a thought is only a draft.
    """
    text = CALL_OR_THOUGHT.sub(lambda match: match[1] or "", text)
    tags = re.findall("</?tool_call>", text)
    if tags != ["<tool_call>", "</tool_call>"] * (len(tags) // 2):
        return None
    try:
        blocks = re.findall("<tool_call>(.*?)</tool_call>", text, re.DOTALL)
        return [read_call(block) for block in blocks]
    except Exception:  # literal_eval raises errors of many undocumented kinds
        return None


def read_type(name: Any) -> str:
    """The name of a type in JSON Schema; xLAM writes "str, optional" and "List[int]"."""
    text = str(name).lower().removesuffix(", optional")
    text = re.split(r"[\[<]", text)[0].strip()
    return TYPE_NAMES.get(text, text)


def read_schema(part: dict) -> dict:
    """Translate one object of a declared schema, as json.loads reads it, into JSON Schema."""
    types = part.get("type")
    if isinstance(types, str | list):
        types = [types] if isinstance(types, str) else types
        types = {read_type(name) for name in types}
        if part.get("nullable") is True:  # OpenAPI's keyword for a nullable type
            types.add("null")
        part["type"] = None if "any" in types else sorted(types)
    if part.pop("patternProperties", None):  # then any name of an argument may be right
        part["additionalProperties"] = True
    return {key: value for key, value in part.items() if value is not None and key != "$schema"}


def read_parameters(function: dict) -> Any:
    """The schema of a function's parameters; {} if it declares none.

    Flat parameters are {argument: its declaration or the name of its type}, without "properties".
    """
    schema = next((function[key] for key in SCHEMA_KEYS if function.get(key)), {})
    if not isinstance(schema, dict) or "properties" in schema:
        return schema
    known = {"type", "required", "title", "description", "additionalProperties", "nullable"}
    flat = {}
    for name, value in schema.items():
        if isinstance(value, dict):
            flat[name] = value
        elif read_type(value) in JSON_TYPES:
            flat[name] = read_schema({"type": value})
    others = {name: value for name, value in schema.items() if name not in flat}
    if not flat or OBJECT_KEYWORDS & set(flat) or not known.issuperset(others):
        return schema
    required = list(others.pop("required", []))
    for name, declaration in flat.items():
        if isinstance(declaration.get("required"), bool) and declaration.pop("required"):
            required.append(name)
    return {**others, "properties": flat, "required": sorted(set(required))}


@functools.cache  # many conversations declare the same tools
def read_tools(tools_text: str | None) -> dict[str, dict | None] | None:
    """Return {name: schema of its parameters, None if it is unreadable} of a row's tools.

    Returns None if the tools as a whole cannot be read. Their calls are not checked then.
    """
    try:
        declared = json.loads(tools_text, object_hook=read_schema) or []
        declared = [declared] if isinstance(declared, dict) else declared
        functions = []
        for tool in declared:
            nested = tool.get("function_declarations", tool.get("functionDeclarations"))
            functions += nested or [tool.get("function", tool)]
        tools = {}
        for function in functions:
            try:  # formats, and with them patterns, are not checked
                schema = read_parameters(function)
                Draft202012Validator.check_schema(schema, FormatChecker(()))
            except Exception:  # bad schemas make it raise errors of many kinds
                schema = None
            tools.setdefault(str(function.get("name")), schema)
    except (TypeError, ValueError, AttributeError, RecursionError):
        return None
    return tools


# ---- Judge: a call against its declaration

MAX_REFERENCES = 1000  # "$ref"s that are followed while one call is checked
BRANCHES = {"allOf", "anyOf", "oneOf", "if", "dependentSchemas", "$ref"}
PROBLEMS = {
    "required": "required argument missing",
    "additionalProperties": "argument not declared",
}


def check_multiple_of(
    validator: Any, factor: float, instance: Any, schema: dict
) -> Iterator[ValidationError]:
    """The keyword "multipleOf" with a tolerance for rounding: 19.99 is a multiple of 0.01."""
    if not validator.is_type(instance, "number"):
        return
    if isinstance(instance, int) and isinstance(factor, int):
        is_multiple = instance % factor == 0
    else:
        quotient = instance / factor
        is_multiple = math.isclose(quotient, round(quotient), rel_tol=1e-12)
    if not is_multiple:
        yield ValidationError(f"{instance} is not a multiple of {factor}")


# A hostile schema can make these keywords run forever, so they are not checked.
UNCHECKED = ["pattern", "uniqueItems", "$dynamicRef", "unevaluatedProperties", "unevaluatedItems"]
CHECKER = extend(
    Draft202012Validator,
    {**dict.fromkeys(UNCHECKED), "multipleOf": check_multiple_of},
)


def build_checker(schema: dict) -> Any:
    """Return a validator that fetches no other schema and gives up on endless references."""
    num_followed = 0

    def follow_reference(
        validator: Any, reference: str, instance: Any, schema: dict
    ) -> Iterable[ValidationError] | None:
        nonlocal num_followed
        num_followed += 1
        if num_followed > MAX_REFERENCES or not reference.startswith("#"):
            raise ValueError("this reference is not followed")
        return Draft202012Validator.VALIDATORS["$ref"](validator, reference, instance, schema)

    if "$ref" not in json.dumps(schema):
        return CHECKER(schema)
    return extend(CHECKER, {"$ref": follow_reference})(schema)


def list_objects(value: Any) -> Iterator[dict]:
    """Yield all objects inside a JSON value, itself included."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from list_objects(item)


def find_problems(call: dict, tools: dict[str, dict | None] | None) -> list[str] | None:
    """List the problems of a call according to the declared tools; None if it is unchecked."""
    if tools is None:
        return None
    if call["name"] not in tools:
        return ["unknown function"]
    schema = tools[call["name"]]
    arguments = call["arguments"]
    try:
        keywords = {error.validator for error in build_checker(schema).iter_errors(arguments)}
        # An argument must be declared here or, where the schema branches, in any part of it.
        parts = list(list_objects(schema)) if BRANCHES & set(schema) else [schema]
        declared = {name for part in parts for name in part.get("properties", ())}
        is_open = any(part.get("additionalProperties", False) is not False for part in parts)
        if not is_open and not declared.issuperset(arguments):
            keywords.add("additionalProperties")
    except Exception:  # the schema is unreadable, or fails only when it is used
        return None
    return sorted({PROBLEMS.get(keyword, "wrong type or value") for keyword in keywords})


# ---- Judge: a turn against its reference


def find_failure(
    reason: str, expected: list[tuple], calls: list[tuple] | None, is_right: bool
) -> str | None:
    """The class of a failed turn, None if it is right; calls are (name, arguments), sorted."""
    if reason == "failed":
        return "failed"
    if reason == "max_new_tokens" and not (expected and is_right):
        return "truncated"
    if calls is None:
        return "malformed"
    if calls and not expected:
        return "unneeded_call"
    if len(calls) != len(expected):
        return "wrong_count" if calls else "no_call"
    if is_right:
        return None
    has_right_names = [name for name, _ in calls] == [name for name, _ in expected]
    return "wrong_arguments" if has_right_names else "wrong_function"


def judge_turn(
    prediction: dict, tools: dict[str, dict | None] | None, seen_tools: set[str] | None = None
) -> dict:
    """Judge a prediction.

    Returns its "failure" (a class or None), its "problems" (a list for each call, None for an
    unchecked call), "is_faulty" (the reference cannot be parsed, so nothing can be judged against
    it) and "counts": {metric: (numerator, denominator)}.
    """
    expected = parse_calls(prediction["reference"])
    calls = parse_calls(prediction["output"])
    problems = [find_problems(call, tools) for call in calls or []]
    num_checked = len(problems) - problems.count(None)
    counts = {
        prediction["kind"]: (prediction["score"], 1),
        "valid_call": (problems.count([]), num_checked),
    }
    verdict = {"failure": None, "problems": problems, "counts": counts, "is_faulty": False}
    if expected is None:
        verdict["is_faulty"] = True
        if prediction["finish_reason"] == "failed":
            verdict["failure"] = "failed"
        return verdict
    is_needed = bool(expected)
    is_attempted = calls is None or bool(calls)
    is_hit = bool(expected and calls)
    counts["precision"] = (is_hit, is_attempted)
    counts["recall"] = (is_hit, is_needed)
    counts["f1"] = (2 * is_hit, is_attempted + is_needed)
    expected = sorted((call["name"], call["text"]) for call in expected)  # in any order
    if calls is not None:
        calls = sorted((call["name"], call["text"]) for call in calls)
    is_right = expected == calls
    verdict["failure"] = find_failure(
        read_finish_reason(prediction["finish_reason"]), expected, calls, is_right
    )
    if not is_needed:
        return verdict
    names = [[name for name, _ in found] for found in (expected, calls or [])]
    arguments = [sorted(text for _, text in found) for found in (expected, calls or [])]
    counts["name_right"] = (names[0] == names[1], 1)
    counts["arguments_right"] = (arguments[0] == arguments[1], 1)
    counts["turn_right"] = (is_right, 1)
    if seen_tools is not None:
        group = "seen" if seen_tools.issuperset(names[0]) else "unseen"
        counts[f"turn_right_{group}_tools"] = (is_right, 1)
    return verdict


def judge_predictions(
    path: Path, queries: list[dict], seen_tools: set[str] | None
) -> dict[tuple[str, str], dict]:
    """Return {query: its prediction with the verdict} for the queries that a file answers."""
    predictions = {}
    for place, row in read_jsonl(path, ignore_cut_line=True):
        with exit_on_error(place):
            predictions[key_of(row)] = row  # the last one counts
    judged = {}
    for query in queries:
        prediction = predictions.get(key_of(query))
        if prediction and prediction.get("reference") == query["reference"]:
            verdict = judge_turn(prediction, read_tools(query["tools"]), seen_tools)
            is_repeated = query.get("is_repeated", False)
            judged[key_of(query)] = {**prediction, **verdict, "is_repeated": is_repeated}
    return judged


def text_key(query: dict) -> tuple:
    """Prompt and reference of a query, to find the same query elsewhere."""
    messages = [(message["role"], message["content"]) for message in query["prompt"]]
    return (*messages, query["reference"])


def read_train_split(test_file: Path) -> tuple[set[tuple], set[str] | None]:
    """Return (text_key of all queries, names of all tools) of the train split next to a test split.

    Without a train split, the names are None.
    """
    train_file = test_file.with_name("function_calling_train.jsonl")
    if not train_file.is_file():
        return set(), None
    texts = set()
    names = set()
    for query in read_queries(train_file):
        texts.add(text_key(query))
        names.update(read_tools(query["tools"]) or {})
        names.update(call["name"] for call in parse_calls(query["reference"]) or [])
    return texts, names


# ---- Judge: means and intervals

METRICS = {  # keys in metrics.json, and rows of the printed table
    "turn_right": "exact calls",
    "turn_right_seen_tools": "... tools seen in training",
    "turn_right_unseen_tools": "... unseen tools",
    "function_calling": "function calling",
    "helpful_exchange": "helpful exchange",
    "name_right": "function names right",
    "arguments_right": "arguments right",
    "valid_call": "valid calls",
    "precision": "call precision",
    "recall": "call recall",
    "f1": "call F1",
}
NUM_SAMPLES = 2000  # number of bootstrap samples
ENOUGH_CALLS = 50  # for intervals that are narrow enough to compare two runs


def resample(turns: list[dict]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return (values [1 + sample, metric], n [metric]); the first row of values is the mean.

    Samples draw conversations, because the turns of one conversation are not independent.
    """
    columns = {metric: i for i, metric in enumerate(METRICS)}
    sums_of = {}
    for turn in turns:
        sums = sums_of.setdefault(turn["conversation_id"], numpy.zeros((len(METRICS), 2)))
        for metric, pair in turn["counts"].items():
            sums[columns[metric]] += pair
    sums = numpy.array(list(sums_of.values()))
    share = numpy.full(len(sums), 1 / len(sums))
    drawn = numpy.random.default_rng(0).multinomial(len(sums), share, size=NUM_SAMPLES)
    totals = numpy.tensordot(numpy.vstack([numpy.ones(len(sums)), drawn]), sums, 1)
    with numpy.errstate(invalid="ignore", divide="ignore"):
        return totals[..., 0] / totals[..., 1], totals[0, :, 1]


def estimate(turns: list[dict], other: list[dict] | None = None) -> dict[str, dict]:
    """Return {metric: {"value", "n", "interval"}} of some turns.

    With `other`, judged predictions for the same queries, the values are paired differences.
    """
    if not turns:
        return {}
    values, n = resample(turns)
    if other:
        values = values - resample(other)[0]  # the same conversations are drawn
    result = {}
    for i, metric in enumerate(METRICS):
        if not numpy.isnan(values[0, i]):
            interval = numpy.nanpercentile(values[1:, i], [2.5, 97.5]).tolist()
            result[metric] = {"value": float(values[0, i]), "n": int(n[i]), "interval": interval}
    return result


def summarize(turns: list[dict]) -> dict:
    """The scores of judged turns, and how often each thing went wrong."""
    return {"queries": len(turns), "scores": estimate(turns), **count_outcomes(turns)}


def count_outcomes(turns: list[dict]) -> dict:
    """How often each thing went wrong in judged turns."""
    calls = [problems for turn in turns for problems in turn["problems"]]
    return {
        "failures": Counter(turn["failure"] for turn in turns if turn["failure"]),
        "finish_reasons": Counter(read_finish_reason(turn["finish_reason"]) for turn in turns),
        "problems": Counter(word for problems in calls for word in problems or []),
        "left_out": {
            "unchecked calls": calls.count(None),
            "faulty references": sum(turn["is_faulty"] for turn in turns),
        },
    }


# ---- Report

MAIN_METRICS = {  # with their labels in charts
    "turn_right": "Exact calls",
    "function_calling": "Function calling\n(token overlap)",
    "helpful_exchange": "Helpful exchange\n(token overlap)",
}

# Baseline, fine-tuned (README) and fine-tuned (notebook) of the original, on its first 300 test
# conversations.
PUBLISHED = {
    "gemma-3-1b-it": {
        "function_calling": "0.28 / 0.91 / 0.973",
        "helpful_exchange": "0.29 / 0.78 / 0.815",
    },
    "gemma-3-270m-it": {
        "function_calling": "0.13 / 0.90 / 0.955",
        "helpful_exchange": "0.48 / 0.68 / 0.779",
    },
}

# Two runs are compared only if these agree; a difference in the second list is pointed out.
CONDITIONS = ["test_split_sha256", "prompt_sha256", "max_new_tokens"]
REMARKED = ["model_path", "commit", "weights_sha256", "dtype"]


class Comparison(NamedTuple):
    """The run to compare with, and the queries that it shares with the run being reported."""

    folder: Path
    label: str
    conditions: list[str]  # settings that rule out a comparison, in words
    remarks: list[str]  # what else differs, in words
    is_limit_unknown: bool  # predictions made elsewhere do not record --max-new-tokens
    ours: list[dict]  # judged turns of the queries that both runs answered
    theirs: list[dict]


def find_comparison(args: argparse.Namespace, results_dir: Path) -> Path | None:
    """The results folder to compare with, None if there is none."""
    if args.compare_with is None:
        folder = results_dir.with_name(BASELINE)
        if folder == results_dir or not (folder / "predictions.jsonl").is_file():
            return None
    else:
        folder = args.compare_with.resolve()
        if folder == results_dir.resolve():
            fail(f"--compare-with {args.compare_with} is the folder of the run itself.")
    read_run(folder)
    return folder


def describe_value(run: dict, key: str) -> str:
    _, shown = RUN_KEYS[key]
    value = run.get(key)
    if value is None:
        return "not recorded"
    if key.endswith("_sha256"):
        return " ".join([*([run[shown]] if shown else []), f"(sha256 {value[:8]})"])
    return str(value)


def compare_runs(
    run: dict,
    judged: dict[tuple[str, str], dict],
    results_dir: Path,
    folder: Path,
    queries: list[dict],
    seen_tools: set[str] | None,
) -> Comparison:
    """Judge another run's predictions on the same queries, and list how the two runs differ."""
    theirs = read_run(folder)

    def describe_changes(keys: list[str]) -> list[str]:
        return [
            f"{RUN_KEYS[key][0]}: {describe_value(run, key)} here, "
            f"{describe_value(theirs, key)} there"
            for key in keys
            if run.get(key) != theirs.get(key) and (key != "prompt_sha256" or is_recorded(key))
        ]

    def is_recorded(key: str) -> bool:
        return None not in (run.get(key), theirs.get(key))

    recorded = [key for key in REMARKED if is_recorded(key)]
    judged_there = {}
    if run["test_split_sha256"] == theirs.get("test_split_sha256"):
        judged_there = judge_predictions(folder / "predictions.jsonl", queries, seen_tools)
    answered_there = {key for key in judged_there if judged_there[key]["failure"] != "failed"}
    both = [key for key in judged if key in answered_there and judged[key]["failure"] != "failed"]
    is_ambiguous = folder.name in (results_dir.name, "difference")
    return Comparison(
        folder=folder,
        label=f"{folder.parent.name}/{folder.name}" if is_ambiguous else folder.name,
        conditions=describe_changes(CONDITIONS),
        remarks=describe_changes(recorded),
        is_limit_unknown="predictions file" in (run.get("source"), theirs.get("source")),
        ours=[judged[key] for key in both],
        theirs=[judged_there[key] for key in both],
    )


def make_columns(
    label: str, turns: list[dict], comparison: Comparison | None, with_repeated: bool = True
) -> dict[str, dict]:
    """Return {title: scores} for a table: of a run, or of two comparable runs and their difference.

    Two runs are compared on the queries that both have answered.
    """

    def choose(turns: list[dict]) -> list[dict]:
        return [turn for turn in turns if with_repeated or not turn["is_repeated"]]

    if not comparison or not comparison.ours or comparison.conditions:
        return {label: estimate(choose(turns))}
    ours = choose(comparison.ours)
    theirs = choose(comparison.theirs)
    columns = {comparison.label: estimate(theirs), label: estimate(ours)}
    if ours:
        columns["difference"] = estimate(ours, theirs)
    return columns


def format_scores(
    columns: dict[str, dict],
    published: dict[str, str] | None = None,
    metrics: Iterable[str] = METRICS,
) -> str:
    """A table of scores. n is the number of queries, calls or attempts that a score is about."""
    rows = [["", "n", *columns, *(["published"] if published else [])]]
    for metric in metrics:
        counts = []
        cells = []
        for title, scores in columns.items():
            if metric not in scores:
                cells.append("-")
                continue
            low, high = scores[metric]["interval"]
            sign = "+" if title == "difference" else ""
            value = scores[metric]["value"]
            cells.append(f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]")
            if title != "difference" and scores[metric]["n"] not in counts:
                counts.append(scores[metric]["n"])
        if counts:
            figures = [published.get(metric, "")] if published else []
            rows.append([METRICS[metric], "/".join(map(str, counts)), *cells, *figures])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for label, *cells in rows:
        cells = map(str.rjust, cells, widths[1:])
        lines.append("  ".join([label.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def plot_scores(columns: dict[str, dict], title: str, path: Path) -> None:
    """Draw the main scores with their intervals, one bar for each run that measured them."""
    from matplotlib.figure import Figure

    metrics = [metric for metric in MAIN_METRICS if any(metric in c for c in columns.values())]
    height = 0.8 / len(columns)
    figure = Figure(figsize=(8, 1.2 + 0.55 * len(metrics) * len(columns)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    axes = figure.subplots()
    for number, (label, scores) in enumerate(columns.items()):
        measured = [metric for metric in metrics if metric in scores]
        places = [metrics.index(metric) + (number + 0.5) * height - 0.4 for metric in measured]
        values = numpy.array([scores[metric]["value"] for metric in measured])
        bounds = numpy.array([scores[metric]["interval"] for metric in measured]).reshape(-1, 2)
        is_other = number == 0 if len(columns) == 2 else label == BASELINE
        color = "#9aa5b1" if is_other else "#1f6fb4"
        axes.barh(places, values, height * 0.92, color=color, label=label)
        axes.hlines(places, bounds[:, 0], bounds[:, 1], color="#222222", linewidth=1.2)
        for place, value, high in zip(places, values, bounds[:, 1], strict=True):
            axes.text(max(value, high) + 0.012, place, f"{value:.2f}", va="center")
    labels = []
    for metric in metrics:
        counts = {scores[metric]["n"] for scores in columns.values() if metric in scores}
        labels.append(f"{MAIN_METRICS[metric]}\nn = {'/'.join(map(str, sorted(counts)))}")
    axes.set_yticks(range(len(metrics)), labels)
    axes.set_ylim(len(metrics) - 0.5, -0.5)
    axes.set_xlim(0, 1.1)
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.set_xlabel("score from 0 to 1, with 95% confidence interval")
    axes.set_title(textwrap.fill(title, 80))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def draw_report(
    results_dir: Path,
    columns: dict[str, dict],
    metrics: dict,
    comparison: Comparison | None,
    is_default: bool,
) -> Path:
    """Draw the chart of a report into the folder of its run; return its path."""
    label = results_dir.name
    model = metrics["run"]["model"]
    comparison_chart = results_dir / "comparison.png"
    if comparison and not is_default:
        other = comparison.folder
        comparison_chart = results_dir / f"comparison-with-{other.parent.name}-{other.name}.png"
    if "difference" in columns:
        chart = comparison_chart
        title = f"{model}: {comparison.label} and {label}, {len(comparison.ours):,} queries"
    else:
        comparison_chart.unlink(missing_ok=True)  # it is outdated
        chart = results_dir / "scores.png"
        title = f"{model}: {label}, {metrics['queries']:,} queries"
    plot_scores({run: columns[run] for run in columns if run != "difference"}, title, chart)
    return chart


def make_metrics(
    run: dict, turns: list[dict], columns: dict[str, dict], comparison: Comparison | None
) -> dict:
    """The content of metrics.json."""
    metrics = summarize(turns)
    metrics["repeated_queries"] = [key_of(turn) for turn in turns if turn["is_repeated"]]
    metrics["scores_without_repeated"] = estimate([t for t in turns if not t["is_repeated"]])
    if comparison:
        metrics["comparison"] = {
            "folder": str(comparison.folder),
            "queries": len(comparison.ours),
            "not_comparable": comparison.conditions,
            "also_different": comparison.remarks,
            "scores": columns.get(comparison.label, {}),
        }
    if "difference" in columns:
        metrics["difference"] = columns["difference"]
    metrics["labels"] = METRICS
    metrics["run"] = run
    return metrics


def report_results(
    args: argparse.Namespace,
    results_dir: Path,
    queries: list[dict],
    seen_tools: set[str] | None,
    compare_dir: Path | None,
) -> list[dict]:
    """Judge the predictions, print their scores next to another run's, write metrics.json.

    All predictions for `queries` are judged, also those that --limit leaves out. Returns the
    judged turns.
    """
    label = results_dir.name
    run = read_run(results_dir)
    judged = judge_predictions(results_dir / "predictions.jsonl", queries, seen_tools)
    if not judged:
        fail(
            f"{results_dir} contains no prediction for {args.test_file}. Use --overwrite to "
            "evaluate again."
        )
    turns = list(judged.values())
    comparison = None
    if compare_dir:
        comparison = compare_runs(run, judged, results_dir, compare_dir, queries, seen_tools)
    columns = make_columns(label, turns, comparison)
    metrics = make_metrics(run, turns, columns, comparison)
    path = results_dir / "metrics.json"
    new_path = path.with_suffix(".json.new")
    new_path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    new_path.replace(path)
    chart = draw_report(results_dir, columns, metrics, comparison, not args.compare_with)

    num_answered = len(turns) - metrics["failures"]["failed"]
    print(
        f"Results     {results_dir}/, answers to {num_answered:,} of the {len(queries):,} queries"
    )
    print(f"Chart       {chart}")
    print_comparison(comparison)
    published = None
    is_local = run.get("source") in ("adapter", "local model")
    if is_local and run.get("is_published_split"):
        published = PUBLISHED.get(run["model"])
    print(f"\n{format_scores(columns, published)}\n")
    if published:
        print(
            "published: baseline / fine-tuned (original README) / fine-tuned (original notebook)\n"
        )
    in_table = comparison.ours if "difference" in columns else turns
    if num_repeated := sum(turn["is_repeated"] for turn in in_table):
        has_others = num_repeated < len(in_table)
        title = " Without them:" if has_others else ""
        print(f"{num_repeated:,} of these queries are also in the train split.{title}\n")
        if has_others:
            without_repeated = make_columns(label, turns, comparison, with_repeated=False)
            print(f"{format_scores(without_repeated, metrics=MAIN_METRICS)}\n")
    print_counts(count_outcomes(in_table))
    num_calls = columns[label].get("turn_right", {}).get("n", 0)
    if 0 < num_calls < ENOUGH_CALLS:
        print(
            f"warning: only {num_calls} turns contain calls, so the scores of calls are imprecise, "
            f"even if an interval is narrow. Use at least {ENOUGH_CALLS}."
        )
    print_failures(turns, queries, args)
    return turns


def print_comparison(comparison: Comparison | None) -> None:
    """Say which runs the table compares, or why it does not compare them."""
    if not comparison:
        return
    if comparison.conditions:
        print(f"No comparison with {comparison.folder}/, because these differ:")
        print(textwrap.indent("\n".join(comparison.conditions), "            "))
    elif not comparison.ours:
        print(f"No comparison with {comparison.folder}/: no query was answered by both runs")
    else:
        num_shared = len(comparison.ours)
        print(
            f"Compared    with {comparison.folder}/ on the {num_shared:,} queries that both runs "
            "answered"
        )
    if comparison.is_limit_unknown and not comparison.conditions:
        print(
            "Note        predictions made elsewhere do not record their token limit, so "
            "--max-new-tokens is assumed"
        )
    if comparison.remarks:
        print(f"Note        these also differ: {'; '.join(comparison.remarks)}")


def print_counts(metrics: dict) -> None:
    """Print how many queries failed in which way, and how many were left out of the scores."""
    titles = {
        "failures": "Failures",
        "problems": "Call errors",
        "left_out": "Left out",
    }
    words = {
        "unchecked calls": "calls to tools with unreadable declarations (not in valid calls)",
        "faulty references": "queries whose reference call cannot be parsed",
    }
    for key, title in titles.items():
        counts = sorted(metrics[key].items(), key=lambda item: -item[1])
        found = [f"{n:,} {words.get(name, name.replace('_', ' '))}" for name, n in counts if n]
        print(f"{title:<11} {', '.join(found) or 'none'}")


def find_request(prompt: list[dict], wording: dict) -> str:
    """The user's last message, without the tool declarations that step 1 puts in front of it."""
    texts = [message["content"] for message in prompt if message["role"] == "user"]
    texts = [text for text in texts if not text.lstrip().startswith("<tool_response>")]
    text = texts[-1] if texts else ""
    end_of_declarations = wording.get("before_request", "")
    if wording.get("after_tools", "</tools>") in text and end_of_declarations:
        text = text.rpartition(end_of_declarations)[2]
    text = text.strip()
    return text if len(text) <= 1000 else f"... {text[-1000:]}"


def print_failures(turns: list[dict], queries: list[dict], args: argparse.Namespace) -> None:
    """Print a random choice of --show-failures failed queries, grouped by class of failure."""
    failed = [turn for turn in turns if turn["failure"]]
    shown = random.Random(0).sample(failed, min(args.show_failures, len(failed)))
    if not shown:
        return
    totals = Counter(turn["failure"] for turn in failed)
    counts = Counter(turn["failure"] for turn in shown)
    prompts = {key_of(query): query["prompt"] for query in queries}
    wording = read_dataset_info(args.test_file).get("prompt", {})
    for failure, total in totals.most_common():
        name = failure.replace("_", " ")
        if counts[failure]:
            print(f"\n==== {name}: {counts[failure]} of {total} ====")
        for turn in shown:
            if turn["failure"] != failure:
                continue
            mark = " (also in the train split)" if turn["is_repeated"] else ""
            print(f"\n{name}: conversation {turn['conversation_id']}, turn {turn['turn']}{mark}")
            problems = [word for found in turn["problems"] for word in found or []]
            if problems:
                print(f"CALL ERRORS {', '.join(problems)}")
            if turn.get("error"):
                print(f"ERROR {turn['error']}")
            print(f"USER\n{find_request(prompts[key_of(turn)], wording)}")
            print(f"REFERENCE\n{turn['reference']}\nOUTPUT\n{turn['output']}")


# ---- Main


def training_command(args: argparse.Namespace) -> str:
    """The command that trains the adapter for these arguments."""
    command = ["python", "function_calling_train.py"]
    if args.model != DEFAULT_MODEL:
        command += ["--model", args.model]
    if args.test_file != DEFAULT_TEST_FILE:
        train_file = args.test_file.with_name("function_calling_train.jsonl")
        command += ["--train-file", str(train_file)]
    return shlex.join(command)


def next_command(args: argparse.Namespace, argv: list[str]) -> str:
    """The command to run after this one: train, evaluate the other model, or read failures."""
    modes = ("--resume", "--overwrite", "--rescore")
    flags = [flag for flag in argv if flag not in modes]
    is_trained = default_adapter(args.model).is_dir()
    if args.baseline and not is_trained and not is_merged(args.model):
        return training_command(args)
    if args.baseline and is_trained and not args.server and not args.name:
        flags.remove("--baseline")
        results_dir = args.output_dir / name_of(args.model) / FINE_TUNED
        if (results_dir / "predictions.jsonl").exists():
            flags.append("--rescore")
        return shlex.join(["python", "evaluation.py", *flags])
    return shlex.join(["python", "evaluation.py", *flags, "--show-failures", "10"])


def should_generate(args: argparse.Namespace, results_dir: Path) -> bool:
    """Decide whether to ask the model, or to report the results that exist."""
    if args.rescore:
        check_same_run(describe_run(args), results_dir)
        return False
    if args.resume or args.overwrite or not (results_dir / "predictions.jsonl").exists():
        return True
    if args.show_failures or args.compare_with:
        check_same_run(describe_run(args), results_dir)
        return False
    resume = "" if args.predictions else "--resume to finish the run, "
    fail(
        f"{results_dir} already contains predictions. Use {resume}--rescore to compute the "
        "scores again, --overwrite to replace them, or --name to write to another folder."
    )


def run(args: argparse.Namespace, argv: list[str]) -> None:
    results_dir = args.output_dir / name_of(args.model) / results_name(args)
    info = read_dataset_info(args.test_file)
    if (info.get("train") or {}).get("file") == args.test_file.name:
        fail(f"{args.test_file} is the train split. Pass the test split as --test-file.")
    queries = read_queries(args.test_file)
    num_asked = len(read_queries(args.test_file, args.limit))
    # Fail now, not after hours of generation.
    compare_dir = find_comparison(args, results_dir)
    train_texts, seen_tools = read_train_split(args.test_file)
    for query in queries:
        query["is_repeated"] = text_key(query) in train_texts
    if should_generate(args, results_dir):
        write_predictions(args, results_dir, queries[:num_asked])
    turns = report_results(args, results_dir, queries, seen_tools, compare_dir)
    failed = [turn for turn in turns if turn["failure"] == "failed"]
    num_missing = len(set(map(key_of, queries[:num_asked])) - set(map(key_of, turns)))
    if failed:
        missing = f" {num_missing} others are still missing." if num_missing else ""
        advice = " Use --resume to send all of these again." if args.server else ""
        first = failed[0]
        fail(
            f"{len(failed)} queries failed (no answer). They count as wrong, but are left out of "
            f"comparisons.{missing}{advice} The first is conversation {first['conversation_id']}, "
            f"turn {first['turn']}: {first.get('error')}"
        )
    if num_missing and args.predictions:
        print(f"warning: {num_missing:,} queries have no prediction and are not in these scores.")
    if num_missing and not args.predictions:
        print(f"Unfinished  {num_missing:,} queries have no output yet. Use --resume to continue.")
    elif not args.show_failures:
        print(f"Next        {next_command(args, argv)}")


def main(argv: list[str] | None = None) -> None:
    with contextlib.suppress(AttributeError):  # the output of a notebook cannot be reconfigured
        sys.stdout.reconfigure(errors="backslashreplace")  # a file on Windows may not be UTF-8
    args = parse_args(argv)
    logging.disable(logging.WARNING)  # library warnings are hidden; errors end in one line below
    warnings.simplefilter("ignore")
    try:
        run(args, sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        sys.exit(
            "interrupted: to continue, run the same command with --resume (instead of --overwrite)"
        )
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        fail(f"{place}{describe_error(error)}")
    except RuntimeError as error:
        advice = ""
        if is_out_of_memory(error):
            advice = (
                ". Free some memory and run the same command again, with --resume if it finds "
                "predictions. Or use --overwrite with a smaller --max-new-tokens."
            )
        fail(f"{describe_error(error)}{advice}")


if __name__ == "__main__":
    main()
