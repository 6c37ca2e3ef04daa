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
import importlib.metadata
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
import jsonschema
import numpy
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tqdm.asyncio import tqdm

PUBLISHED = {  # (function calling, helpful exchange) on the first 300 test conversations
    "gemma-3-1b-it": {"base": (0.28, 0.29), "README": (0.91, 0.78), "notebook": (0.973, 0.815)},
    "gemma-3-270m-it": {"base": (0.13, 0.48), "README": (0.90, 0.68), "notebook": (0.955, 0.779)},
}
METRICS = ["function_calling", "helpful_exchange"]  # the published ones, then what decides
METRICS += ["name_right", "arguments_right", "turn_right", "valid_call"]
METRICS += ["precision", "recall", "f1", "turn_right_seen_tools", "turn_right_unseen_tools"]
FAILURES = ["no_call", "unneeded_call", "malformed", "wrong_function", "wrong_arguments"]
FAILURES += ["wrong_count", "truncated", "failed"]
FINISH_REASONS = ["end_of_turn", "max_new_tokens", "prompt_too_long", "failed"]
SERVER_REASONS = {"stop": "end_of_turn", "tool_calls": "end_of_turn", "length": "max_new_tokens"}
TYPE_NAMES = {"dict": "object", "list": "array", "tuple": "array", "str": "string"}
TYPE_NAMES |= {"int": "integer", "float": "number", "double": "number", "bool": "boolean"}
UNCHECKED = ["pattern", "uniqueItems", "$dynamicRef", "unevaluatedProperties", "unevaluatedItems"]
BRANCHES = {"allOf", "anyOf", "oneOf", "if", "dependentSchemas", "$ref"}
MAX_REFERENCES = 1000  # of a declared schema, followed while one call is checked
RETRY_WAITS = (1, 2, 4, 8, 16)  # seconds before a server is asked again
REQUEST_TIMEOUT = 600  # seconds, the time in the server's queue included
RUN_KEYS = ["model", "commit", "adapter_sha256", "served_model", "predictions_sha256", "dtype"]
RUN_KEYS += ["test_split_sha256", "limit", "max_new_tokens"]  # what predictions rest on
COMPARED_KEYS = ["commit", "test_split_sha256", "max_new_tokens"]  # of a base's run and another
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


def one_line(error):
    """What an exception says, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


@contextlib.contextmanager
def reading(name):
    """End the program in one line where `name` cannot be read."""
    try:
        yield
    except ERRORS as error:
        sys.exit(f"error: {name}: {one_line(error)}")


def read_json(path):
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


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
    read_tools(row["tools"])  # raises an error where that is none
    queries = []
    for turn, message in enumerate(row["messages"]):
        kind = METRICS["<tool_call>" not in message["content"]]
        query = {"conversation_id": row["id"], "turn": turn, "kind": kind, "tools": row["tools"]}
        query |= {"prompt": row["messages"][:turn], "reference": message["content"].strip()}
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


def find_adapter(args):
    """Return (folder, training_run.json) of the adapter; end the program if it is not --model's."""
    default = f"LoRA_{model_name(args.model)}-function_calling"
    if not args.adapter and not Path(default).is_dir():
        sys.exit(f"error: {default} not found: run function_calling_train.py, or give --baseline")
    folder, _ = find_folder(args.adapter or default)
    run = read_json(folder / "training_run.json")
    if model_name(run["model"]) != model_name(args.model):
        sys.exit(f"error: the adapter in {folder} was trained on {run['model']}: give that --model")
    return folder, run


def choose_device(dtype=None):
    """Return (device name, torch dtype): the dtype of that name, or bf16 where it is computed."""
    import torch

    if torch.cuda.is_available():
        device, has_bf16 = "cuda", torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        device = "mps" if torch.backends.mps.is_available() else "cpu"
        has_bf16 = device == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return device, getattr(torch, dtype or ("bfloat16" if has_bf16 else "float32"))


def load_model(model_dir, adapter_dir, device, dtype):
    """Load the base model, with the adapter (if any) merged into its weights before any rounding.

    Buffers keep their precision: the frequencies of the rotary embedding lose too much in bf16.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, GenerationConfig

    options = {"dtype": "float32", "attn_implementation": "sdpa", "use_safetensors": True}
    model = AutoModelForCausalLM.from_pretrained(model_dir, **options)
    if adapter_dir:
        model = PeftModel.from_pretrained(model, adapter_dir).merge_and_unload()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.generation_config = GenerationConfig()  # not the sampling that a model comes with
    return model.to(device).eval()


def write_for_base(messages, tokenizer):
    """The messages of a prompt for a stock template, which knows only user and assistant.

    Control tokens in a text are broken up, so that none can forge a turn, as the adapter's does.
    """
    written = []
    for message in messages:
        role, text = message["role"], message["content"]
        for token in tokenizer.added_tokens_decoder.values():
            if token.special:
                text = text.replace(token.content, f"{token.content[:-1]} {token.content[-1]}")
        written.append({"role": "user" if role == "tool" else role, "content": text})
    return written


def encode_prompt(messages, tokenizer, is_base):
    """Token ids of a prompt that ends where the model is to speak."""
    messages = write_for_base(messages, tokenizer) if is_base else messages
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return tokenizer.apply_chat_template(messages, **options)["input_ids"]


def generate_batch(model, tokenizer, prompts, stop_ids, max_new_tokens):
    """Greedy outputs for prompts, which are lists of token ids: [(text, finish reason), ...].

    After its stop token an output holds only padding, which is not decoded. A batch that does not
    fit the memory is halved.
    """
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
    rows = rows[:, padded["input_ids"].shape[1] :].tolist()
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    ended = ["end_of_turn" if set(stop_ids) & set(row) else "max_new_tokens" for row in rows]
    return list(zip(texts, ended, strict=True))


def ask_model(queries, done, model, tokenizer, args, keep):
    """Answer the queries that are not in `done`, and `keep` the answers of each batch.

    Batches are planned over all queries: a resumed evaluation has those of an undisturbed one.
    """
    stop_ids = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    tokens_at_once = 65_536 if model.device.type == "cuda" else 16_384  # some 7 GB at 1B in bf16
    prompts = [encode_prompt(query["prompt"], tokenizer, args.baseline) for query in queries]
    waiting = sorted(range(len(queries)), key=lambda n: -len(prompts[n]))
    with tqdm(total=len(queries), desc="Answering", unit=" queries", disable=None) as progress:
        while waiting:
            size = tokens_at_once // (len(prompts[waiting[0]]) + args.max_new_tokens)
            planned = waiting[: args.batch_size or max(1, size)]
            waiting = waiting[len(planned) :]
            batch = [n for n in planned if key_of(queries[n]) not in done]
            if batch:
                asked = [prompts[n] for n in batch], stop_ids, args.max_new_tokens
                for n, answer in zip(batch, generate_batch(model, tokenizer, *asked), strict=True):
                    keep(queries[n], *answer)
            progress.update(len(planned))


def read_answer(answer):
    """Return (text, finish reason) of an answer in a server's fields: "content" (or "output"),
    "tool_calls", "finish_reason". Tool calls become the text that the trained model writes."""
    text = answer["content"] if "content" in answer else answer["output"]
    reason = answer.get("finish_reason") or "end_of_turn"
    reason = SERVER_REASONS.get(reason, reason)
    if not isinstance(text or "", str) or reason not in FINISH_REASONS:
        raise ValueError(f"its output is no text, or finish_reason none of {FINISH_REASONS}")
    parts = [text.strip()] if text else []
    for call in answer.get("tool_calls") or []:
        name, arguments = call["function"]["name"], call["function"].get("arguments")
        with contextlib.suppress(ValueError):  # text that cannot be read stays as it is
            arguments = read_literal(arguments) if isinstance(arguments, str) else arguments
        call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        parts.append(f"<tool_call>\n{call}\n</tool_call>")
    return "\n".join(parts), reason


def choose_served_model(args, headers):
    """The model to ask a server for: --server-model, else one of like name, else the only one."""
    with reading(f"--server {args.server}"):
        response = httpx2.get(f"{args.server.rstrip('/')}/models", headers=headers, timeout=30)
        served = [model["id"] for model in response.raise_for_status().json()["data"]]
    name = model_name(args.model)
    adapter = model_name(args.adapter or f"LoRA_{name}-function_calling")
    wanted = args.server_model or (name if args.baseline else adapter)
    alike = [model for model in served if wanted in (model, Path(model).name)]
    if len(alike or served) != 1 or (args.server_model and not alike):
        sys.exit(f"error: --server-model is to be one of {', '.join(served)}")
    return (alike or served)[0]


async def ask_query(client, semaphore, query, messages, options, keep):
    """Ask a server one query, again after growing waits where that may help; `keep` the answer.

    What stays unanswered is kept as an empty answer with the finish reason "failed".
    """
    async with semaphore:
        for wait in (*RETRY_WAITS, None):
            try:
                response = await client.chat_completion(messages, temperature=0, **options)
                choice = response.choices[0]
                answer = read_answer({**choice.message, "finish_reason": choice.finish_reason})
                return keep(query, *answer)
            except ERRORS as error:
                status = getattr(getattr(error, "response", None), "status_code", 500)
                if wait is None or (status != 429 and status < 500):  # a refusal stays one
                    return keep(query, "", "failed", error=one_line(error))
            await asyncio.sleep(wait * random.uniform(0.5, 1.5))  # not all of them at once


async def ask_server(queries, args, served_model, headers, tokenizer, keep):
    """Ask a server all queries, --concurrency at once."""
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
    """Published score of one output, in [0, 1]; both are tokens without special tokens.

    Function calling: the longest contiguous run of tokens that both hold, over the reference's
    length. Helpful exchange: the output's tokens that the reference holds, each at most as often
    as there, over the output's length (ROUGE-1 precision). An empty output scores 0.
    """
    if kind == "helpful_exchange":
        return (Counter(reference) & Counter(output)).total() / len(output) if output else 0.0
    matcher = difflib.SequenceMatcher(None, output, reference, autojunk=False)
    return matcher.find_longest_match().size / len(reference) if reference else 0.0


def keep_answer(file, scorer, query, output, finish_reason, **more):
    """Append a query's answer to an open file, where it outlives a kill, with its published score
    in the tokens of `scorer`."""
    prediction = {key: query[key] for key in ("conversation_id", "turn", "kind", "reference")}
    output = output.strip().encode(errors="replace").decode()  # no file holds lone surrogates
    texts = prediction["reference"], output
    tokens = [scorer.encode(text, add_special_tokens=False).ids for text in texts]
    score = score_output(prediction["kind"], *tokens)
    prediction |= {"output": output, "score": score, "finish_reason": finish_reason, **more}
    file.write(json.dumps(prediction, ensure_ascii=False) + "\n")
    file.flush()


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def begin_results(results_dir, run, args):
    """Write run.json, and return the keys of what an interrupted evaluation has answered already.

    Ends the program rather than replace another evaluation, or go on with it, unasked.
    """
    path, answered = results_dir / "predictions.jsonl", []
    if path.exists() and not args.overwrite:
        if not args.resume:
            words = "--resume goes on with it, --rescore reports it again, --overwrite replaces it"
            sys.exit(f"error: {results_dir} holds an evaluation: {words}")
        earlier = read_json(results_dir / "run.json")
        changed = [key for key in RUN_KEYS if earlier.get(key) != run.get(key)]
        if changed:
            sys.exit(f"error: {results_dir} holds an evaluation of another {', '.join(changed)}")
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # of a torn last line
        answered = [p for p in read_jsonl(path, dict) if p["finish_reason"] != "failed"]
    results_dir.mkdir(parents=True, exist_ok=True)
    for name in ["metrics.json"] + ["predictions.jsonl"] * args.overwrite:
        (results_dir / name).unlink(missing_ok=True)
    write_json(results_dir / "run.json", run)
    return set(map(key_of, answered))


def evaluate(args, results_dir, queries):
    """Write run.json, and an answer to each query to predictions.jsonl: from a model, a server, or
    a file of predictions."""
    is_asked_here = not (args.server or args.predictions)
    adapter_dir, training_run = None, {}
    if is_asked_here and not args.baseline:
        adapter_dir, training_run = find_adapter(args)
    revision = args.revision or training_run.get("commit")
    model_dir, commit = find_folder(args.model, revision, weights=is_asked_here)
    with reading(model_dir / "tokenizer.json"):
        scorer = Tokenizer.from_buffer((model_dir / "tokenizer.json").read_bytes())
    run = {"model": model_name(args.model), "commit": commit, "limit": args.limit}
    run |= {"test_split_sha256": sha256(args.test_file), "max_new_tokens": args.max_new_tokens}
    run["arguments"] = {key: str(value) for key, value in vars(args).items()}
    packages = ("torch", "transformers", "peft", "huggingface_hub")
    run["versions"] = {name: importlib.metadata.version(name) for name in packages}
    headers = {"authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'EMPTY')}"}
    if args.predictions:
        run["predictions_sha256"] = sha256(args.predictions)
        query_of = {key_of(query): query for query in queries}
        read = lambda p: (query_of[key_of(p)], *read_answer(p))
        foreign = read_jsonl(args.predictions, read)
    else:
        import torch
        from transformers import AutoTokenizer, logging

        torch.backends.cuda.enable_cudnn_sdp(False)  # its masked bf16 attention is at times wrong
        logging.set_verbosity_error()
        with reading(adapter_dir or model_dir):
            tokenizer = AutoTokenizer.from_pretrained(adapter_dir or model_dir)
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
        if args.predictions:
            for answer in foreign:
                keep(*answer)
        elif args.server:
            asking = left, args, run["served_model"], headers, tokenizer, keep
            asyncio.run(ask_server(*asking))
        elif left:
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
    """The calls of a turn, [{"name", "arguments"}, ...], as they stand between the tags.

    No arguments, null and "" are {}. Raises ValueError, which says why, where any call of the turn
    cannot be read: then the turn is malformed. Linear in the length of `text`.
    """
    _, *pieces = re.split("(</?tool_call>)", text)
    if pieces[::2] != ["<tool_call>", "</tool_call>"] * (len(pieces) // 4):
        raise ValueError("a tag without its partner")
    calls = []
    for body in pieces[1::4]:
        call = read_literal(body.strip())
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(name, str) or not name:
            raise ValueError("no object with a function name")
        arguments = call.get("arguments")
        if isinstance(arguments, str):
            arguments = read_literal(arguments) if arguments.strip() else None
        if not isinstance(arguments, dict | None):
            raise ValueError("arguments are not an object")
        try:  # in JSON a Python tuple is a list, and 1.0 may be written 1
            text = json.dumps(arguments or {})
            arguments = json.loads(
                text, parse_float=lambda n: int(float(n)) if float(n).is_integer() else float(n)
            )
        except (TypeError, ValueError, RecursionError):
            raise ValueError("a value that JSON does not know, or nested too deeply") from None
        calls.append({"name": name, "arguments": arguments})
    return calls


def read_schema(part):
    """One object of a declared schema in JSON Schema's own words, for json.loads to call.

    Types are read in other spellings, and OpenAPI's "nullable"; null-valued keywords are left out.
    Where names of arguments are patterns, any may be given.
    """
    names = part.get("type")
    if isinstance(names, str | list):
        names = [str(name).lower() for name in ([names] if isinstance(names, str) else names)]
        names += ["null"] * (part.get("nullable") is True)
        names = list(dict.fromkeys(TYPE_NAMES.get(name, name) for name in names))
        part["type"] = None if "any" in names else names
    if part.pop("patternProperties", None):
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
                jsonschema.Draft202012Validator.check_schema(schema, jsonschema.FormatChecker(()))
            except Exception:  # there is no closed list of what rubbish makes the library raise
                tools[name] = None
    return tools


def follow_reference(counter, validator, reference, instance, schema):
    """The keyword "$ref", which leaves no schema and gives up where references never end."""
    if not reference.startswith("#") or next(counter) > MAX_REFERENCES:
        raise ValueError(f"{reference} leads too far")
    return jsonschema.Draft202012Validator.VALIDATORS["$ref"](
        validator, reference, instance, schema
    )


def find_problems(call, tools):
    """What the declared tools have against a call, as a list of words; None if it is unchecked."""
    if call["name"] not in tools:
        return ["unknown function"]
    schema, arguments = tools[call["name"]], call["arguments"]
    follow = functools.partial(follow_reference, itertools.count())
    keywords = {**dict.fromkeys(UNCHECKED), "$ref": follow}
    validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, keywords)
    try:
        kinds = {error.validator for error in validator(schema).iter_errors(arguments)}
        # An argument is to be declared here or, where the schema branches, in any part of it.
        parts = [schema]
        if BRANCHES & set(schema):
            json.loads(json.dumps(schema), object_hook=lambda part: parts.append(part) or part)
        is_open = any(part.get("additionalProperties", False) is not False for part in parts)
        if not is_open and set(arguments).difference(
            *(part.get("properties", ()) for part in parts)
        ):
            kinds.add("additionalProperties")
    except Exception:  # a schema that is none, or only breaks when it is used
        return None
    words = {
        "required": "required argument missing",
        "additionalProperties": "argument not declared",
    }
    return sorted({words.get(kind, "wrong type") for kind in kinds})


def judge_turn(prediction, tools, seen_tools=None):
    """Judge one prediction by the tools of its conversation: a dict of verdicts.

    "problems" holds what find_problems says of each call, "failure" is one of FAILURES or None, and
    "counts" is what the query adds to METRICS, all of them ratios of two sums. A reference whose own
    calls cannot be read judges no output.
    """
    sides, faults = [[], []], [None, None]
    for side, key in enumerate(("reference", "output")):
        try:
            sides[side] = parse_calls(prediction[key])
        except ValueError as reason:
            faults[side] = str(reason)
    wanted, calls = sides
    problems = [find_problems(call, tools) for call in calls]
    checked = [found for found in problems if found is not None]
    counts = {prediction["kind"]: (prediction["score"], 1)}
    counts["valid_call"] = checked.count([]), len(checked)
    verdict = {"faulty_reference": faults[0], "malformed_reason": faults[1], "failure": None}
    verdict |= {"problems": problems, "counts": counts}
    needed = "call needed" if wanted else "reference unreadable" if faults[0] else "no call needed"
    said = "malformed" if faults[1] else "call" if calls else "no call"
    verdict["decision"] = f"{needed}: {said}"
    if faults[0]:
        return verdict
    hit, attempt = bool(wanted and calls), said != "no call"  # a malformed call is no hit
    counts |= {"precision": (hit, attempt), "recall": (hit, bool(wanted))}
    counts["f1"] = 2 * hit, attempt + bool(wanted)
    texts = [[(c["name"], json.dumps(c["arguments"], sort_keys=True)) for c in s] for s in sides]
    names, arguments = (
        [sorted(text[place] for text in side) for side in texts] for place in (0, 1)
    )
    is_right = bool(wanted) and sorted(texts[0]) == sorted(texts[1])  # in whatever order
    if wanted:
        counts |= {"name_right": (names[0] == names[1], 1), "turn_right": (is_right, 1)}
        counts["arguments_right"] = arguments[0] == arguments[1], 1
        group = "seen" if set(names[0]) <= (seen_tools or set()) else "unseen"
        counts |= {} if seen_tools is None else {f"turn_right_{group}_tools": (is_right, 1)}
    if prediction["finish_reason"] != "end_of_turn" and not is_right:
        is_failed = prediction["finish_reason"] == "failed"
        verdict["failure"] = "failed" if is_failed else "truncated"
    elif said == "malformed":
        verdict["failure"] = "malformed"
    elif len(calls) != len(wanted):
        verdict["failure"] = (
            "unneeded_call" if not wanted else "wrong_count" if calls else "no_call"
        )
    elif wanted and not is_right:
        verdict["failure"] = "wrong_arguments" if names[0] == names[1] else "wrong_function"
    return verdict


def estimate(counts, base=None):
    """Value, n and 95 % bootstrap interval of each metric: {metric: {"value", "n", "interval"}}.

    `counts` maps (conversation id, turn) to {metric: (numerator, denominator)}. Conversations are
    resampled, 2,000 times: the turns of one are not independent. With `base`, the counts of another
    model on the same queries, it is the paired difference to that model.
    """
    values, resampled = [], []
    for side in [counts, base] if base else [counts]:
        sums = {conversation_id: numpy.zeros((len(METRICS), 2)) for conversation_id, _ in side}
        for (conversation_id, _), pairs in side.items():
            for metric, pair in pairs.items():
                sums[conversation_id][METRICS.index(metric)] += pair
        sums = numpy.array(list(sums.values()))
        share = numpy.full(len(sums), 1 / len(sums))
        drawn = numpy.random.default_rng(0).multinomial(len(sums), share, size=2000).astype(float)
        total, totals = sums.sum(axis=0), numpy.einsum("rc,cmp->rmp", drawn, sums, optimize=True)
        with numpy.errstate(invalid="ignore", divide="ignore"):
            values.append(total[:, 0] / total[:, 1])
            resampled.append(totals[..., 0] / totals[..., 1])
    if base:
        values, resampled = [values[0] - values[1]], [resampled[0] - resampled[1]]
    result = {}
    for place, metric in enumerate(METRICS):
        if not numpy.isnan(values[0][place]):
            interval = numpy.nanpercentile(resampled[0][:, place], [2.5, 97.5]).tolist()
            result[metric] = {"value": float(values[0][place]), "n": int(total[place, 1])}
            result[metric]["interval"] = interval
    return result


def read_predictions(path, queries):
    """Return the predictions of a file in the order of the split, the last one for each query."""
    with reading(path):
        found = {key_of(prediction): prediction for prediction in read_jsonl(path, dict)}
    return [found[key_of(query)] for query in queries if key_of(query) in found]


def read_seen_tools(test_file):
    """The tools that the train split beside the test split declares or calls; None without it."""
    path, seen = test_file.with_name("function_calling_train.jsonl"), set()
    for query in read_queries(path) if path.is_file() else ():
        seen.update(read_tools(query["tools"]))
        with contextlib.suppress(ValueError):
            seen.update(call["name"] for call in parse_calls(query["reference"]))
    return seen if path.is_file() else None


def judge_predictions(predictions, tools_of, seen_tools):
    """Judge predictions: (verdicts in their order, the report, {query: its counts}).

    `tools_of` maps a conversation id to its declared tools as JSON text. `seen_tools` is the set of
    tool names of the train split, or None without one.
    """
    tools = [read_tools(tools_of[prediction["conversation_id"]]) for prediction in predictions]
    verdicts = [judge_turn(p, t, seen_tools) for p, t in zip(predictions, tools, strict=True)]
    counts = {key_of(p): v["counts"] for p, v in zip(predictions, verdicts, strict=True)}
    failures = Counter(verdict["failure"] for verdict in verdicts)
    of_calls = [problems for verdict in verdicts for problems in verdict["problems"]]
    report = {
        "queries": len(predictions),
        "scores": estimate(counts),
        "decisions": Counter(verdict["decision"] for verdict in verdicts),
        "failures": {failure: failures[failure] for failure in FAILURES},
        "malformed_reasons": Counter(
            v["malformed_reason"] for v in verdicts if v["malformed_reason"]
        ),
        "problems": Counter(itertools.chain(*filter(None, of_calls))),
        "unchecked_calls": of_calls.count(None),
        "faulty_references": sum(verdict["faulty_reference"] is not None for verdict in verdicts),
        "finish_reasons": Counter(prediction["finish_reason"] for prediction in predictions),
    }
    return verdicts, report, counts


def format_report(name, runs, difference):
    """The report as text. `runs` maps "base", if there is one, and the label to their reports."""

    def cell(entry, sign=""):
        low, high = entry["interval"] if entry else (0, 0)
        value = f"{entry['value']:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]" if entry else "-"
        return f"{value:>25}"

    titles = "".join(f"{title[-24:]:>25}" for title in [*runs, "difference"])
    lines = [f"{'':35}{'n':>10}{titles} published"]
    for place, metric in enumerate(METRICS):
        entries = [report["scores"].get(metric) for report in runs.values()]
        n = "/".join(dict.fromkeys(f"{entry['n']:,}" for entry in entries if entry))
        cells = "".join([*map(cell, entries), cell(difference.get(metric), "+")])
        figures = [str(pair[place]) for pair in PUBLISHED.get(name, {}).values() if place < 2]
        lines.append(f"{metric.replace('_', ' '):35}{n:>10}{cells} {' / '.join(figures)}")
    for label, report in runs.items():
        for part in ("failures", "problems", "decisions", "malformed_reasons", "finish_reasons"):
            counts = ", ".join(f"{n:,} {key}" for key, n in report[part].items() if n)
            lines.append(f"{label}, {part}: {counts or 'none'}".replace("_", " "))
        counts = report["unchecked_calls"], report["faulty_references"]
        lines.append(
            "{}, left out: {:,} calls of unreadable tools, {:,} unreadable references".format(
                label, *counts
            )
        )
    return "\n".join(lines)


def plot_comparison(runs, name, path):
    """Draw the scores of `runs` with their intervals, and the published ones."""
    import matplotlib.pyplot as plt

    series = {label: report["scores"] for label, report in runs.items()}
    for which, figures in PUBLISHED.get(name, {}).items():
        scores = {METRICS[n]: {"value": v, "interval": (v, v)} for n, v in enumerate(figures)}
        series[f"published, {which}"] = scores
    figure, axes = plt.subplots(figsize=(9, 9), layout="constrained")
    for place, (label, scores) in enumerate(series.items()):
        height = 0.8 / len(series)
        rows = [METRICS.index(metric) + height * (place + 0.5) - 0.4 for metric in scores]
        values = numpy.array([entry["value"] for entry in scores.values()])
        reach = numpy.abs(numpy.array([entry["interval"] for entry in scores.values()]).T - values)
        bars = axes.barh(rows, values, height, xerr=reach, label=label.replace("$", r"\$"))
        axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.set_yticks(range(len(METRICS)), [metric.replace("_", " ") for metric in METRICS])
    axes.set(xlim=(0, 1.15), ylim=(len(METRICS) - 0.5, -0.5))
    axes.set_title(f"{name}: scores with 95 % intervals".replace("$", r"\$"))
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path)
    plt.close(figure)


def main(argv=None):
    args = parse_args(argv)
    warnings.simplefilter("ignore")  # of libraries, and of odd escapes in what a model wrote
    name = model_name(args.model)
    label = "base" if args.baseline else args.predictions.stem if args.predictions else "tuned"
    if args.adapter and model_name(args.adapter) != f"LoRA_{name}-function_calling":
        label = model_name(args.adapter)
    results_dir, queries = args.output_dir / name / label, read_queries(args.test_file)
    tools_of = {query["conversation_id"]: query["tools"] for query in queries}
    if not args.rescore:
        chosen = set(list(tools_of)[: args.limit])
        evaluate(args, results_dir, [q for q in queries if q["conversation_id"] in chosen])

    seen_tools, base_dir = read_seen_tools(args.test_file), results_dir.with_name("base")
    run = read_json(results_dir / "run.json")
    if run["test_split_sha256"] != sha256(args.test_file):
        sys.exit(f"error: {results_dir} is of another test split than {args.test_file}")
    predictions = read_predictions(results_dir / "predictions.jsonl", queries)
    verdicts, report, counts = judge_predictions(predictions, tools_of, seen_tools)
    runs, difference = {label: report}, {}
    if label != "base" and (base_dir / "metrics.json").is_file():
        base_run = read_json(base_dir / "run.json")
        differing = [key for key in COMPARED_KEYS if run[key] != base_run[key]]
        if differing:
            print(f"note: {base_dir} is of another {', '.join(differing)}, and is not compared")
        else:
            base = read_predictions(base_dir / "predictions.jsonl", queries)
            _, base_report, base_counts = judge_predictions(base, tools_of, seen_tools)
            common = [key for key in counts if key in base_counts]
            sides = [{key: side[key] for key in common} for side in (counts, base_counts)]
            runs, difference = {"base": base_report, label: report}, estimate(*sides)
    plot_comparison(runs, name, results_dir.parent / "comparison.png")
    report |= {"difference_to_base": difference, "run": run}
    write_json(results_dir / "metrics.json", report)
    print(f"Written to  {results_dir}/\n\n{format_report(name, runs, difference)}")
    wrong = [(v["failure"], p) for p, v in zip(predictions, verdicts, strict=True) if v["failure"]]
    for failure, p in random.Random(0).sample(wrong, min(args.show_failures, len(wrong))):
        print(f"\n{failure}: conversation {p['conversation_id']}, turn {p['turn']}")
        print(f"REFERENCE\n{p['reference']}\nOUTPUT\n{p['output']}")
    if failed := [p for p in predictions if p["finish_reason"] == "failed"]:
        words = "queries failed and count as wrong, --resume asks them again; the first:"
        sys.exit(f"error: {len(failed)} {words} {key_of(failed[0])}, {failed[0]['error']}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command with --resume goes on")
    except OSError as error:
        sys.exit(f"error: {one_line(error)}")
