"""Score how well a model calls functions and answers, before and after training (step 3 of 3).

    python evaluation.py --baseline                         # gemma-3-1b-it as it is
    python evaluation.py                                    # with the adapter of step 2
    python evaluation.py --server http://127.0.0.1:8000/v1  # asked of vLLM or a server like it

Every model turn of every test conversation is one query: the turns before it are the prompt, the
turn itself is the reference. Writes predictions.jsonl (a query a line), run.json (what they come
from), metrics.json and comparison.png under evaluation_results/, and prints the scores.
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
import operator
import os
import random
import re
import sys
import warnings
from collections import Counter
from pathlib import Path

import httpx2
import huggingface_hub
import numpy
from huggingface_hub.errors import HTTPError
from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.validators import extend
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tqdm.asyncio import tqdm

PUBLISHED = {  # (function calling, helpful exchange) on the first 300 test conversations
    "gemma-3-1b-it": {"base": (0.28, 0.29), "README": (0.91, 0.78), "notebook": (0.973, 0.815)},
    "gemma-3-270m-it": {"base": (0.13, 0.48), "README": (0.90, 0.68), "notebook": (0.955, 0.779)},
}
METRICS = ["function_calling", "helpful_exchange", "name_right", "arguments_right", "turn_right"]
METRICS += ["turn_right_seen_tools", "turn_right_unseen_tools", "valid_call"]  # README defines them
METRICS += ["precision", "recall", "f1"]
FINISH_REASONS = ["end_of_turn", "max_new_tokens", "prompt_too_long", "failed"]
SERVER_REASONS = {"stop": "end_of_turn", "tool_calls": "end_of_turn", "length": "max_new_tokens"}
TYPE_NAMES = {"dict": "object", "list": "array", "tuple": "array", "str": "string"}
TYPE_NAMES |= {"int": "integer", "float": "number", "double": "number", "bool": "boolean"}
UNCHECKED = ["pattern", "uniqueItems", "$dynamicRef", "unevaluatedProperties", "unevaluatedItems"]
CHECKER = extend(Draft202012Validator, dict.fromkeys(UNCHECKED))  # these can take for ever
PROBLEMS = {"required": "required argument missing"}
PROBLEMS["additionalProperties"] = "argument not declared"  # any other keyword: "wrong type"
BRANCHES = {"allOf", "anyOf", "oneOf", "if", "dependentSchemas", "$ref"}
MAX_REFERENCES = 1000  # of a declared schema, followed while one call is checked
RETRY_WAITS = (1, 2, 4, 8, 16)  # seconds before a server is asked again
REQUEST_TIMEOUT = 600  # seconds, the time in the server's queue included
COMPARED_KEYS = ["commit", "test_split_sha256", "max_new_tokens"]  # of run.json, base and tuned
RUN_KEYS = [*COMPARED_KEYS, "model", "adapter_sha256", "served_model", "predictions_sha256"]
RUN_KEYS += ["limit", "dtype"]  # --resume goes on only where they agree
ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError)
ERRORS += (HTTPError, SafetensorError)  # what reading files, models and answers may raise

key_of = operator.itemgetter("conversation_id", "turn")  # of a query, and of its prediction


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add, shown = parser.add_argument, "(default: %(default)s)"
    add_source = parser.add_mutually_exclusive_group().add_argument
    add_mode = parser.add_mutually_exclusive_group().add_argument
    add("--model", default="google/gemma-3-1b-it", help=f"base model: hub id or folder {shown}")
    add("--revision", help="its branch, tag or commit (default: what the adapter was trained on)")
    add_source("--adapter", help="folder or hub id (default: LoRA_<model name>-function_calling)")
    add_source("--baseline", action="store_true", help="score the untuned model, in its own way")
    add_source("--predictions", type=Path, metavar="FILE", help="score outputs made elsewhere")
    split = Path("processed_data/function_calling_test.jsonl")
    add("--test-file", type=Path, default=split, help=f"test split of step 1 {shown}")
    add("--output-dir", type=Path, default="evaluation_results", help=f"for the results {shown}")
    add("--limit", type=int, help="only the first N conversations (published: 300)")
    add("--batch-size", type=int, help="queries generated at once (default: by their length)")
    add("--max-new-tokens", type=int, default=256, help=f"longest output, tokens {shown}")
    add("--dtype", choices=["bfloat16", "float32"], help="(default: bfloat16 where it is fast)")
    add("--server", metavar="URL", help="ask an OpenAI-compatible server, http://host:port/v1")
    add("--server-model", metavar="NAME", help="its model, where it serves several")
    add("--concurrency", type=int, default=32, help=f"requests to it at once {shown}")
    add("--show-failures", type=int, default=0, metavar="N", help="print N failures")
    add_mode("--rescore", action="store_true", help="make the report again, without any model")
    add_mode("--resume", action="store_true", help="go on with an unfinished evaluation")
    add_mode("--overwrite", action="store_true", help="replace an earlier evaluation")
    args = parser.parse_args(argv)
    for flag in ("limit", "batch_size", "max_new_tokens", "concurrency"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} must be at least 1")
    return args


@contextlib.contextmanager
def reading(name):
    """End the program in one line where `name` cannot be read."""
    try:
        yield
    except ERRORS as error:
        sys.exit(f"error: {name}: {type(error).__name__}: {' '.join(str(error).split())}")


def read_json(path):
    with reading(path):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def read_jsonl(path, read):
    """Return what `read` makes of the JSON of each line of a file."""
    results = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        with reading(f"{path}, line {number}"):
            results += [read(json.loads(line))] if line.strip() else []
    return results


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_conversation(row):
    """Return the queries of a row; a turn is known by the number of messages before it."""
    queries, messages, _ = [], row["messages"], read_tools(row["tools"])
    for turn, message in enumerate(messages):
        text = message["content"].strip()
        kind = "function_calling" if "<tool_call>" in text else "helpful_exchange"
        query = {"conversation_id": row["id"], "turn": turn, "kind": kind, "reference": text}
        query |= {"prompt": messages[:turn], "tools": row["tools"]}
        queries += [query] if message["role"] == "assistant" else []
    return queries


def read_queries(path):
    """Return the queries of a split, in its order."""
    if not path.is_file():
        sys.exit(f"error: {path} not found: run prepare_function_calling_dataset.py first")
    queries = list(itertools.chain(*read_jsonl(path, read_conversation)))
    if not queries or len(set(map(key_of, queries))) < len(queries):
        sys.exit(f"error: {path} holds no turn of the model, or an id twice")
    return queries


def model_name(model):
    """The last part of a hub id or of a folder's path."""
    return Path(model).expanduser().resolve().name


def find_folder(name, revision=None, weights=True):
    """Return (folder, commit or None) of a model or adapter: a folder, or a hub id to download."""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser(), None
    huggingface_hub.logging.set_verbosity_error()
    files = ["*.json", "*.jinja", *["*.safetensors"] * weights]
    with reading(f"{name}, which is no folder, from the hub"):
        folder = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=files)
    return Path(folder), Path(folder).name


def choose_device(dtype=None):
    """Return (device name, torch dtype): the dtype of that name, or bf16 where it is computed."""
    import torch

    device = "mps" if torch.backends.mps.is_available() else "cpu"
    has_bf16 = device == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    if torch.cuda.is_available():
        device, has_bf16 = "cuda", torch.cuda.is_bf16_supported(including_emulation=False)
    return device, getattr(torch, dtype or ("bfloat16" if has_bf16 else "float32"))


def load_model(model_dir, adapter_dir, device, dtype):
    """Load the base model, with the adapter (if any) merged into its weights before rounding."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, GenerationConfig

    options = {"dtype": "float32", "attn_implementation": "sdpa", "use_safetensors": True}
    model = AutoModelForCausalLM.from_pretrained(model_dir, **options)
    if adapter_dir:
        model = PeftModel.from_pretrained(model, adapter_dir).merge_and_unload()
    for parameter in model.parameters():  # no buffers: rotary frequencies lose too much in bf16
        parameter.data = parameter.data.to(dtype)
    model.generation_config = GenerationConfig()  # not the sampling that a model comes with
    return model.to(device).eval()


def write_for_base(messages, tokenizer):
    """The messages of a prompt for a stock template, which knows only user and assistant."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    written = []
    for message in messages:
        text = message["content"]
        for token in special:  # broken up, so that no text can forge a turn
            text = text.replace(token, f"{token[:-1]} {token[-1]}")
        written.append({"role": message["role"].replace("tool", "user"), "content": text})
    return written


def encode_prompt(messages, tokenizer, is_base):
    """Token ids of a prompt that ends where the model is to speak."""
    messages = write_for_base(messages, tokenizer) if is_base else messages
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return tokenizer.apply_chat_template(messages, **options)["input_ids"]


def generate_batch(model, tokenizer, prompts, stop_ids, max_new_tokens):
    """Greedy outputs for prompts, which are lists of token ids: [(text, finish reason), ...]."""
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    options = {"eos_token_id": stop_ids, "pad_token_id": tokenizer.pad_token_id}
    options |= {"max_new_tokens": max_new_tokens, "do_sample": False}
    try:
        rows = model.generate(**padded.to(model.device), **options)
    except RuntimeError as error:  # of which torch.OutOfMemoryError is one
        if len(prompts) == 1 or not re.search("out of memory|ALLOC_FAILED", str(error)):
            raise
        rows = None
    if rows is None:  # outside of "except", which would keep the tensors made so far
        halves = prompts[: len(prompts) // 2], prompts[len(prompts) // 2 :]
        parts = (generate_batch(model, tokenizer, h, stop_ids, max_new_tokens) for h in halves)
        return list(itertools.chain(*parts))
    rows = rows[:, padded["input_ids"].shape[1] :].tolist()  # after the stop token comes padding
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    ended = ["end_of_turn" if set(stop_ids) & set(row) else "max_new_tokens" for row in rows]
    return list(zip(texts, ended, strict=True))


def ask_model(queries, done, model, tokenizer, args, keep):
    """Answer the queries that are not in `done`, longest first, and `keep` each batch's answers."""
    stop_ids = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    tokens_at_once = 65_536 if model.device.type == "cuda" else 16_384  # some 7 GB at 1B in bf16
    prompts = [encode_prompt(query["prompt"], tokenizer, args.baseline) for query in queries]
    waiting = sorted(range(len(queries)), key=lambda n: -len(prompts[n]))
    with tqdm(total=len(queries), desc="Answering", unit=" queries", disable=None) as progress:
        while waiting:  # a resumed evaluation plans the batches of an undisturbed one
            fitting = tokens_at_once // (len(prompts[waiting[0]]) + args.max_new_tokens)
            planned = waiting[: args.batch_size or max(1, fitting)]
            waiting = waiting[len(planned) :]
            batch = [n for n in planned if key_of(queries[n]) not in done]
            if batch:
                asked = [prompts[n] for n in batch], stop_ids, args.max_new_tokens
                for n, answer in zip(batch, generate_batch(model, tokenizer, *asked), strict=True):
                    keep(queries[n], *answer)
            progress.update(len(planned))


def read_answer(answer):
    """Return (text, finish reason) of an answer in a server's fields; tool calls become text."""
    text = answer["content"] if "content" in answer else answer["output"]
    reason = answer.get("finish_reason") or "end_of_turn"
    reason = SERVER_REASONS.get(reason, reason)
    if not isinstance(text, str | None) or reason not in FINISH_REASONS:
        raise ValueError(f"its output is no text, or finish_reason none of {FINISH_REASONS}")
    parts = [text.strip()] if text else []
    for call in answer.get("tool_calls") or []:
        name, arguments = call["function"]["name"], call["function"].get("arguments")
        with contextlib.suppress(ValueError, TypeError):  # what is no JSON stays as it is
            arguments = json.loads(arguments)
        call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        parts.append(f"<tool_call>\n{call}\n</tool_call>")
    return "\n".join(parts), reason


def choose_served_model(args, headers):
    """The model to ask a server for: --server-model, else one of like name, else the only one."""
    with reading(f"--server {args.server}"):
        response = httpx2.get(f"{args.server.rstrip('/')}/models", headers=headers, timeout=30)
        served = [model["id"] for model in response.raise_for_status().json()["data"]]
    name = model_name(args.model)
    name = name if args.baseline else model_name(args.adapter or f"LoRA_{name}-function_calling")
    name = args.server_model or name
    alike = [model for model in served if name in (model, Path(model).name)]
    if len(alike or served) != 1 or (args.server_model and not alike):
        sys.exit(f"error: --server-model is to be one of {', '.join(served)}")
    return (alike or served)[0]


async def ask_query(client, semaphore, query, messages, options, keep):
    """Ask a server one query, again after growing waits where that may help; `keep` the answer."""
    async with semaphore:
        for wait in (*RETRY_WAITS, None):
            try:
                response = await client.chat_completion(messages, temperature=0, **options)
                choice = response.choices[0]
                answer = {**choice.message, "finish_reason": choice.finish_reason}
                return keep(query, *read_answer(answer))
            except ERRORS as error:
                status = getattr(getattr(error, "response", None), "status_code", 500)
                if wait is None or (status != 429 and status < 500):  # a refusal stays one
                    return keep(query, "", "failed", error=repr(error))
            await asyncio.sleep(wait * random.uniform(0.5, 1.5))  # not all of them at once


async def ask_server(queries, args, served_model, headers, tokenizer, keep):
    """Ask a server all queries, --concurrency at once, and `keep` the answers."""
    # The hub's own HTTP client refuses to work where HF_HUB_OFFLINE is set.
    limits = httpx2.Limits(max_connections=args.concurrency)
    huggingface_hub.set_async_client_factory(functools.partial(httpx2.AsyncClient, limits=limits))
    access = {"base_url": args.server, "headers": headers, "timeout": REQUEST_TIMEOUT}
    options = {"model": served_model, "max_tokens": args.max_new_tokens}
    semaphore, asking = asyncio.Semaphore(args.concurrency), []
    async with huggingface_hub.AsyncInferenceClient(**access) as client:
        for query in queries:
            messages = query["prompt"]
            messages = write_for_base(messages, tokenizer) if args.baseline else messages
            asking.append(ask_query(client, semaphore, query, messages, options, keep))
        await tqdm.gather(*asking, desc="Answering", unit=" queries", disable=None)


def score_output(kind, reference, output):
    """Published score, in [0, 1], of an output; both are tokens without special tokens.

    A call: the longest contiguous run of tokens that both hold, over the reference's length. Any
    other turn: the tokens that both hold, over the output's length (ROUGE-1 precision).
    """
    if kind == "helpful_exchange":
        return (Counter(reference) & Counter(output)).total() / len(output) if output else 0.0
    matcher = difflib.SequenceMatcher(None, output, reference, autojunk=False)
    return matcher.find_longest_match().size / len(reference) if reference else 0.0


def keep_answer(file, scorer, query, output, finish_reason, **more):
    """Append a query's answer and its published score to a file, where they outlive a kill."""
    prediction = {key: query[key] for key in ("conversation_id", "turn", "kind", "reference")}
    output = output.strip().encode(errors="replace").decode()  # no file holds lone surrogates
    texts = prediction["reference"], output
    tokens = [scorer.encode(text, add_special_tokens=False).ids for text in texts]
    score = score_output(prediction["kind"], *tokens)
    prediction |= {"output": output, "score": score, "finish_reason": finish_reason, **more}
    file.write(json.dumps(prediction, ensure_ascii=False) + "\n")
    file.flush()


def begin_results(results_dir, run, args):
    """Write run.json; return the keys of what is answered already. Ends the program rather than
    replace another evaluation, or go on with it, unasked."""
    path, answered = results_dir / "predictions.jsonl", []
    if path.exists() and args.resume:
        earlier = read_json(results_dir / "run.json")
        changed = [key for key in RUN_KEYS if earlier.get(key) != run.get(key)]
        if changed:
            sys.exit(f"error: {results_dir} holds an evaluation of another {', '.join(changed)}")
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # of a torn last line
        answered = [p for p in read_jsonl(path, dict) if p["finish_reason"] != "failed"]
    elif path.exists() and not args.overwrite:
        words = "--resume goes on with it, --rescore reports it again, --overwrite replaces it"
        sys.exit(f"error: {results_dir} holds an evaluation: {words}")
    results_dir.mkdir(parents=True, exist_ok=True)
    for name in ["metrics.json", *["predictions.jsonl"] * args.overwrite]:
        (results_dir / name).unlink(missing_ok=True)
    (results_dir / "run.json").write_text(json.dumps(run, indent=2))
    return set(map(key_of, answered))


def evaluate(args, results_dir, queries):
    """Write run.json, and to predictions.jsonl what a model, a server or a file answers."""
    name, is_asked_here = model_name(args.model), not (args.server or args.predictions)
    adapter_dir, training_run, foreign = None, {}, []
    if is_asked_here and not args.baseline:
        default = Path(f"LoRA_{name}-function_calling")
        adapter_dir = find_folder(args.adapter)[0] if args.adapter else default
        with reading(f"{adapter_dir}, made by function_calling_train.py (or give --baseline)"):
            training_run = json.loads((adapter_dir / "training_run.json").read_text())
        if model_name(training_run["model"]) != name:
            sys.exit(f"error: {adapter_dir} was trained on --model {training_run['model']}")
    revision = args.revision or training_run.get("commit")
    model_dir, commit = find_folder(args.model, revision, weights=is_asked_here)
    with reading(model_dir / "tokenizer.json"):
        scorer = Tokenizer.from_buffer((model_dir / "tokenizer.json").read_bytes())
    run = {"model": name, "commit": commit, "limit": args.limit}
    run |= {"test_split_sha256": sha256(args.test_file), "max_new_tokens": args.max_new_tokens}
    run["arguments"] = {key: str(value) for key, value in vars(args).items()}
    headers = {"authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'EMPTY')}"}
    if args.predictions:
        query_of = {key_of(query): query for query in queries}
        run["predictions_sha256"] = sha256(args.predictions)
        foreign = read_jsonl(args.predictions, lambda p: (query_of[key_of(p)], *read_answer(p)))
    else:
        import torch
        import transformers

        run["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
        torch.backends.cuda.enable_cudnn_sdp(False)  # its masked bf16 attention is at times wrong
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        with reading(adapter_dir or model_dir):
            tokenizer = transformers.AutoTokenizer.from_pretrained(adapter_dir or model_dir)
    if args.server:
        run["served_model"] = choose_served_model(args, headers)
    elif is_asked_here:
        device, dtype = choose_device(args.dtype)
        run |= {"device": device, "dtype": str(dtype).removeprefix("torch.")}
        run["adapter_sha256"] = adapter_dir and sha256(adapter_dir / "adapter_model.safetensors")
    done = begin_results(results_dir, run, args)
    left = [query for query in queries if key_of(query) not in done]
    with open(results_dir / "predictions.jsonl", "a", encoding="utf-8") as file:
        keep = functools.partial(keep_answer, file, scorer)
        for answer in foreign:
            keep(*answer)
        if args.server:
            asyncio.run(ask_server(left, args, run["served_model"], headers, tokenizer, keep))
        elif is_asked_here and left:
            with reading(adapter_dir or model_dir):
                model = load_model(model_dir, adapter_dir, device, dtype)
                ask_model(queries, done, model, tokenizer, args, keep)


def read_literal(text):
    """Read JSON, or else a Python literal (the data exists in both), or raise ValueError."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    raise ValueError("neither JSON nor a Python literal")


def parse_calls(text):
    """Return (the calls [{"name", "arguments"}, ...] of a turn, None), or ([], why one is none)."""
    _, *pieces = re.split("(</?tool_call>)", text)
    if pieces[::2] != ["<tool_call>", "</tool_call>"] * (len(pieces) // 4):
        return [], "a tag without its partner"
    calls = []
    whole = {"parse_float": lambda text: int(n) if (n := float(text)).is_integer() else n}
    try:
        for call in map(read_literal, map(str.strip, pieces[1::4])):
            name, arguments = call["name"], call.get("arguments")
            if isinstance(arguments, str):
                arguments = read_literal(arguments) if arguments.strip() else None
            if not name or not isinstance(name, str) or not isinstance(arguments, dict | None):
                raise TypeError
            # As JSON: a Python tuple is a list, and 1.0 is 1.
            arguments = json.loads(json.dumps(arguments or {}), **whole)
            calls.append({"name": name, "arguments": arguments})
    except (AttributeError, LookupError, TypeError):
        return [], "no JSON object with a name and arguments"
    except (ValueError, RecursionError) as error:
        return [], str(error)
    return calls, None


def read_schema(part):
    """One object of a declared schema, as json.loads reads it, in JSON Schema's own words."""
    names = part.get("type")
    if isinstance(names, str | list):
        names = [str(name).lower() for name in ([names] if isinstance(names, str) else names)]
        names += ["null"] * (part.get("nullable") is True)  # OpenAPI's word
        names = list(dict.fromkeys(TYPE_NAMES.get(name, name) for name in names))
        part["type"] = None if "any" in names else names
    if part.pop("patternProperties", None):  # any name of an argument may be meant
        part["additionalProperties"] = True
    return {key: value for key, value in part.items() if value is not None and key != "$schema"}


@functools.cache  # many conversations declare the same tools
def read_tools(tools_text):
    """The tools that a row declares: {name: schema of its parameters, None if it is unreadable}."""
    tools = {}
    for tool in list(json.loads(tools_text, object_hook=read_schema)):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and name not in tools:
            schema = tools[name] = function.get("parameters", {})
            try:  # formats, and with them patterns, are not looked at
                Draft202012Validator.check_schema(schema, FormatChecker(()))
            except Exception:  # there is no closed list of what rubbish makes the library raise
                tools[name] = None
    return tools


def find_problems(call, tools):
    """What the declared tools have against a call, as a list of words; None if it is unchecked."""

    def follow(validator, reference, instance, schema):
        """The keyword "$ref", which leaves no schema and gives up where references never end."""
        if not reference.startswith("#") or next(counter) > MAX_REFERENCES:
            raise ValueError
        return Draft202012Validator.VALIDATORS["$ref"](validator, reference, instance, schema)

    if call["name"] not in tools:
        return ["unknown function"]
    schema, arguments = tools[call["name"]], call["arguments"]
    text, parts, counter = json.dumps(schema), [], itertools.count()
    checker = extend(CHECKER, {"$ref": follow}) if "$ref" in text else CHECKER
    try:
        kinds = {error.validator for error in checker(schema).iter_errors(arguments)}
        # An argument is to be declared here or, where the schema branches, in any part of it.
        json.loads(text, object_hook=lambda part: parts.append(part) or part)
        parts = parts if BRANCHES & set(schema) else [schema]
        is_closed = all(part.get("additionalProperties", False) is False for part in parts)
        if is_closed and set(arguments).difference(*(p.get("properties", ()) for p in parts)):
            kinds.add("additionalProperties")
    except Exception:  # a schema that is none, or only breaks when it is used
        return None
    return sorted({PROBLEMS.get(kind, "wrong type") for kind in kinds})


def judge_turn(prediction, tools, seen_tools=None):
    """Judge one prediction: a dict of verdicts, and its "counts" of METRICS, ratios of two sums."""

    def agree(*keys):
        """Whether output and reference hold the same calls, as far as `keys` go, in any order."""
        sides = ([[call[key] for key in keys] for call in side] for side in (wanted, calls))
        return operator.eq(*(Counter(json.dumps(c, sort_keys=True) for c in s) for s in sides))

    wanted, faulty = parse_calls(prediction["reference"])
    calls, malformed = parse_calls(prediction["output"])
    problems, reason = [find_problems(call, tools) for call in calls], prediction["finish_reason"]
    counts = {prediction["kind"]: (prediction["score"], 1)}
    counts["valid_call"] = problems.count([]), len(problems) - problems.count(None)
    verdict = {"faulty_reference": faulty, "malformed_reason": malformed, "failure": None}
    verdict |= {"problems": problems, "counts": counts}
    if faulty:  # by which no output is judged
        return verdict
    needed, hit, attempt = bool(wanted), bool(wanted and calls), bool(calls or malformed)
    counts |= {"precision": (hit, attempt), "recall": (hit, needed)}
    counts["f1"] = 2 * hit, attempt + needed
    is_right = agree("name", "arguments") and not malformed
    if needed:
        counts |= {"name_right": (agree("name"), 1), "arguments_right": (agree("arguments"), 1)}
        counts["turn_right"] = is_right, 1
        if seen_tools is not None:
            group = "seen" if {call["name"] for call in wanted} <= seen_tools else "unseen"
            counts[f"turn_right_{group}_tools"] = is_right, 1
    if reason != "end_of_turn" and not (needed and is_right):
        verdict["failure"] = "failed" if reason == "failed" else "truncated"
    elif malformed:
        verdict["failure"] = "malformed"
    elif len(calls) != len(wanted):
        count = "wrong_count" if calls else "no_call"
        verdict["failure"] = count if needed else "unneeded_call"
    elif not is_right:
        verdict["failure"] = "wrong_arguments" if agree("name") else "wrong_function"
    return verdict


def estimate(counts, base=None):
    """Value, n and 95 % bootstrap interval of each metric: {metric: {"value", "n", "interval"}}.

    `counts` maps (conversation id, turn) to {metric: (numerator, denominator)}. Conversations are
    resampled, whose turns are not independent. With `base` it is the paired difference to that.
    """
    values, resampled = 0, 0
    for sign, side in ((-1, base), (1, counts)) if base else ((1, counts),):
        sums = {conversation_id: numpy.zeros((len(METRICS), 2)) for conversation_id, _ in side}
        for (conversation_id, _), pairs in side.items():
            for metric, pair in pairs.items():
                sums[conversation_id][METRICS.index(metric)] += pair
        sums = numpy.array(list(sums.values()))
        share = numpy.full(len(sums), 1 / len(sums))
        drawn = numpy.random.default_rng(0).multinomial(len(sums), share, size=2000).astype(float)
        total, totals = sums.sum(axis=0), numpy.einsum("rc,cmp->rmp", drawn, sums, optimize=True)
        with numpy.errstate(invalid="ignore", divide="ignore"):
            values = values + sign * total[:, 0] / total[:, 1]
            resampled = resampled + sign * totals[..., 0] / totals[..., 1]
    result = {}
    for place in numpy.flatnonzero(~numpy.isnan(values)):
        low, high = numpy.nanpercentile(resampled[:, place], [2.5, 97.5])
        result[METRICS[place]] = {"value": float(values[place]), "n": int(total[place, 1])}
        result[METRICS[place]]["interval"] = [float(low), float(high)]
    return result


def read_predictions(path, queries):
    """Return the predictions of a file in the order of the split, the last one for each query."""
    found = {key_of(prediction): prediction for prediction in read_jsonl(path, dict)}
    if not found:
        sys.exit(f"error: {path} holds no prediction")
    return [found[key_of(query)] for query in queries if key_of(query) in found]


def judge_predictions(predictions, tools_of, seen_tools):
    """Return (verdicts, their report, {query: its counts}) of predictions. `tools_of` maps ids of
    conversations to their tools, `seen_tools` are the names of the train split's, None without."""
    verdicts, counts = [], {}
    for prediction in predictions:
        tools = read_tools(tools_of[prediction["conversation_id"]])
        verdicts.append(judge_turn(prediction, tools, seen_tools))
        counts[key_of(prediction)] = verdicts[-1]["counts"]
    report = {"queries": len(predictions), "scores": estimate(counts)}
    for key in ("failure", "malformed_reason", "faulty_reference"):
        report[f"{key}s"] = Counter(verdict[key] for verdict in verdicts if verdict[key])
    of_calls = [problems for verdict in verdicts for problems in verdict["problems"]]
    report["problems"] = Counter(itertools.chain(*filter(None, of_calls)))
    report["unchecked_calls"] = of_calls.count(None)
    report["finish_reasons"] = Counter(p["finish_reason"] for p in predictions)
    return verdicts, report, counts


def format_scores(columns, figures):
    """A table of scores; `columns` maps titles to what estimate returns."""
    rows = [["", "n", *columns, "published"]]
    for place, metric in enumerate(METRICS):
        entries = {title: scores[metric] for title, scores in columns.items() if metric in scores}
        n = "/".join(dict.fromkeys(f"{entry['n']:,}" for entry in entries.values()))
        rows.append([metric.replace("_", " "), n])
        for title in columns:
            sign, entry = "+" if title == "difference" else "", entries.get(title)
            numbers = [entry["value"], *entry["interval"]] if entry else []
            cell = "{} [{}, {}]" if entry else "-"
            rows[-1].append(cell.format(*(f"{number:{sign}.3f}" for number in numbers)))
        rows[-1].append(" / ".join(str(pair[place]) for pair in figures if place < 2))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)).rstrip() for row in rows)


def plot_scores(columns, name, path):
    """Draw scores with their intervals; `columns` maps labels to what estimate returns."""
    import matplotlib.pyplot as plt

    plt.rcParams["text.parse_math"] = False  # a name may hold a "$"
    figure, axes = plt.subplots(figsize=(9, 9), layout="constrained")
    for place, (label, scores) in enumerate(columns.items()):
        shift, height = 0.8 * (place + 0.5) / len(columns) - 0.4, 0.8 / len(columns)
        values = numpy.array([entry["value"] for entry in scores.values()])
        reach = numpy.abs(numpy.array([entry["interval"] for entry in scores.values()]).T - values)
        rows = [METRICS.index(metric) + shift for metric in scores]
        bars = axes.barh(rows, values, height, xerr=reach, label=label)
        axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.set_yticks(range(len(METRICS)), [metric.replace("_", " ") for metric in METRICS])
    axes.set(xlim=(0, 1.15), ylim=(len(METRICS) - 0.5, -0.5), title=f"{name}: 95 % intervals")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path)
    plt.close(figure)


def report_results(args, name, results_dir, queries):
    """Judge the predictions, draw and print their scores beside the base's, write metrics.json."""
    run, label = read_json(results_dir / "run.json"), results_dir.name
    if run["test_split_sha256"] != sha256(args.test_file):
        sys.exit(f"error: {results_dir} is of another test split than {args.test_file}")
    tools_of = {query["conversation_id"]: query["tools"] for query in queries}
    train_file, seen_tools = args.test_file.with_name("function_calling_train.jsonl"), None
    if train_file.is_file():
        train = read_queries(train_file)
        calls = itertools.chain(*(parse_calls(query["reference"])[0] for query in train))
        seen_tools = {call["name"] for call in calls}
        seen_tools.update(*(read_tools(query["tools"]) for query in train))
    predictions = read_predictions(results_dir / "predictions.jsonl", queries)
    verdicts, report, counts = judge_predictions(predictions, tools_of, seen_tools)
    reports, columns, base_dir = {label: report}, {}, results_dir.with_name("base")
    if label != "base" and (base_dir / "metrics.json").is_file():
        base_run = read_json(base_dir / "run.json")
        base = read_predictions(base_dir / "predictions.jsonl", queries)
        _, base_report, base_counts = judge_predictions(base, tools_of, seen_tools)
        common = [key for key in counts if key in base_counts]
        if common and all(run[key] == base_run[key] for key in COMPARED_KEYS):
            sides = [{key: side[key] for key in common} for side in (counts, base_counts)]
            report["difference_to_base"] = columns["difference"] = estimate(*sides)
            reports = {"base": base_report, label: report}
        else:
            print(f"note: {base_dir} is of another {', '.join(COMPARED_KEYS)} or of other queries")
    shown = {title: part["scores"] for title, part in reports.items()}
    published = {}
    for which, figures in PUBLISHED.get(name, {}).items():
        scores = {METRICS[n]: {"value": v, "interval": (v, v)} for n, v in enumerate(figures)}
        published[f"published, {which}"] = scores
    plot_scores(shown | published, name, results_dir.parent / "comparison.png")
    (results_dir / "metrics.json").write_text(json.dumps({**report, "run": run}, indent=2))
    table = format_scores(shown | columns, PUBLISHED.get(name, {}).values())
    print(f"Written to  {results_dir}/\n\n{table}")
    for key in ("failures", "problems", "malformed_reasons", "faulty_references"):
        for title, part in reports.items():
            found = ", ".join(f"{n:,} {words}" for words, n in part[key].most_common())
            print(f"{key} of {title}: {found or 'none'}".replace("_", " "))
    if report["unchecked_calls"]:
        print(f"{report['unchecked_calls']:,} calls are of tools whose declaration cannot be read")
    wrong = [(v["failure"], p) for p, v in zip(predictions, verdicts, strict=True) if v["failure"]]
    for failure, p in random.Random(0).sample(wrong, min(args.show_failures, len(wrong))):
        print(f"\n{failure}: conversation {p['conversation_id']}, turn {p['turn']}")
        print(f"REFERENCE\n{p['reference']}\nOUTPUT\n{p['output']}")
    if failed := [p for p in predictions if p["finish_reason"] == "failed"]:
        words = "queries failed and count as wrong, --resume asks them again; the first:"
        sys.exit(f"error: {len(failed)} {words} {key_of(failed[0])}, {failed[0]['error']}")


def main(argv=None):
    args = parse_args(argv)
    warnings.simplefilter("ignore")  # of libraries, and of odd escapes in what a model wrote
    name = model_name(args.model)
    label = "base" if args.baseline else args.predictions.stem if args.predictions else "tuned"
    if args.adapter and model_name(args.adapter) != f"LoRA_{name}-function_calling":
        label = model_name(args.adapter)
    results_dir, queries = args.output_dir / name / label, read_queries(args.test_file)
    if not args.rescore:
        chosen = list(dict.fromkeys(query["conversation_id"] for query in queries))[: args.limit]
        evaluate(args, results_dir, [q for q in queries if q["conversation_id"] in set(chosen)])
    elif not (results_dir / "metrics.json").is_file():
        sys.exit(f"error: {results_dir} holds no finished evaluation: begin one, or --resume it")
    report_results(args, name, results_dir, queries)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, OSError) as error:  # --resume goes on
        sys.exit(f"error: {type(error).__name__} {error}")
