"""Score how well a model calls functions and answers, before and after training (step 3 of 3).

    python evaluation.py --baseline                         # gemma-3-1b-it as it is
    python evaluation.py                                    # with the adapter of step 2
    python evaluation.py --server http://127.0.0.1:8000/v1 --server-model fc  # of vLLM or the like

Every model turn of a test conversation is one query: the turns before it are the prompt, the turn
itself is the reference. Writes predictions.jsonl (a query a line), run.json (what they come from),
metrics.json and comparison.png under evaluation_results/, and prints the scores.
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
import os
import random
import re
import sys
import warnings
from collections import Counter
from pathlib import Path

import httpx2  # which huggingface_hub is built on
import huggingface_hub
import numpy
from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.validators import extend
from tokenizers import Tokenizer
from tqdm.asyncio import tqdm

PUBLISHED = {  # function calling, helpful exchange: base, tuned by its README, by its notebook
    "gemma-3-1b-it": ["0.28, 0.91, 0.973", "0.29, 0.78, 0.815"],
    "gemma-3-270m-it": ["0.13, 0.90, 0.955", "0.48, 0.68, 0.779"],
}
METRICS = """function_calling helpful_exchange name_right arguments_right turn_right
turn_right_seen_tools turn_right_unseen_tools valid_call precision recall f1""".split()
FINISH_REASONS = {"stop": "end_of_turn", "tool_calls": "end_of_turn", "length": "max_new_tokens"}
REQUEST_TIMEOUT = 600  # seconds, the time in the server's queue included
RETRY_WAITS = [1, 2, 4, 8, 16]  # seconds before a server is asked again
TYPE_NAMES = {"dict": "object", "list": "array", "tuple": "array", "str": "string"}
TYPE_NAMES |= {"int": "integer", "float": "number", "double": "number", "bool": "boolean"}
UNCHECKED = ["pattern", "uniqueItems", "$dynamicRef", "unevaluatedProperties", "unevaluatedItems"]
CHECKER = extend(Draft202012Validator, dict.fromkeys(UNCHECKED))  # these can take for ever
MAX_REFERENCES = 1000  # of a declared schema, followed while one call is checked
BRANCHES = {"allOf", "anyOf", "oneOf", "if", "dependentSchemas", "$ref"}
FAULTS = {"required": "required argument missing", "additionalProperties": "argument not declared"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    source = parser.add_mutually_exclusive_group()
    mode = parser.add_mutually_exclusive_group()
    add, shown = parser.add_argument, "(default: %(default)s)"
    add("--model", default="google/gemma-3-1b-it", help=f"base model: hub id or folder {shown}")
    add("--revision", help="its branch, tag or commit (default: what the adapter was trained on)")
    source.add_argument("--adapter", help="folder or hub id (default: as training names it)")
    source.add_argument("--baseline", action="store_true", help="the untuned model, in its own way")
    source.add_argument("--predictions", type=Path, metavar="FILE", help="outputs made elsewhere")
    split = Path("processed_data/function_calling_test.jsonl")
    add("--test-file", type=Path, default=split, help=f"test split of step 1 {shown}")
    add("--output-dir", type=Path, default="evaluation_results", help=f"for the results {shown}")
    add("--limit", type=int, help="only the first N conversations (published: 300)")
    add("--batch-size", type=int, help="queries generated at once (default: by their length)")
    add("--max-new-tokens", type=int, default=256, help=f"longest output, tokens {shown}")
    add("--dtype", choices=["bfloat16", "float32"], help="(default: bfloat16 where it is fast)")
    add("--server", metavar="URL", help="ask an OpenAI-compatible server, http://host:port/v1")
    add("--server-model", metavar="NAME", help="the name under which it serves the model")
    add("--concurrency", type=int, default=32, help=f"requests to it at once, up to 100 {shown}")
    add("--show-failures", type=int, default=0, metavar="N", help="print N failures")
    mode.add_argument("--rescore", action="store_true", help="only make the report again")
    mode.add_argument("--resume", action="store_true", help="go on with an unfinished evaluation")
    mode.add_argument("--overwrite", action="store_true", help="replace an earlier evaluation")
    args = parser.parse_args(argv)
    if bool(args.server) != bool(args.server_model) or (args.server and args.predictions):
        parser.error("--server and --server-model go together, and without --predictions")
    for flag in ("limit", "batch_size", "max_new_tokens", "concurrency"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} must be at least 1")
    return args


@contextlib.contextmanager
def reading(name):
    """End the program in one line where `name` cannot be read, whatever its library raises."""
    try:
        yield
    except Exception as error:
        sys.exit(f"error: {name}: {type(error).__name__}: {' '.join(str(error).split())}")


def read_jsonl(path):
    """Yield ("<path>, line <number>", its value) of each line of a file."""
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        place = f"{path}, line {number}"
        with reading(place):
            yield place, json.loads(line)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def key_of(query):
    return query["conversation_id"], query["turn"]


def read_queries(path, limit=None):
    """Return the queries of a split, in its order; `turn` is the number of messages before it."""
    if not path.is_file():
        sys.exit(f"error: {path} not found: run prepare_function_calling_dataset.py first")
    queries = []
    for place, row in itertools.islice(read_jsonl(path), limit):
        with reading(place):
            read_tools(row["tools"])
            for turn, message in enumerate(row["messages"]):
                query = {"conversation_id": row["id"], "turn": turn, "tools": row["tools"]}
                texts = {"prompt": row["messages"][:turn], "reference": message["content"].strip()}
                if message["role"] == "assistant":
                    queries.append(query | texts)
    if not queries or len({key_of(query) for query in queries}) < len(queries):
        sys.exit(f"error: {path} holds no turn of the model, or an id twice")
    return queries


def model_name(model):
    return Path(model).expanduser().resolve().name


def find_folder(name, revision=None, with_weights=True):
    """Return (folder, commit or None) of a model or adapter: a folder, or a hub id to download."""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser(), None
    files = ["*.json", "*.jinja", "*.safetensors" if with_weights else "tokenizer.json"]
    with reading(f"{name}, which is no folder, from the hub"):
        folder = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=files)
    return Path(folder), Path(folder).name


def choose_device(dtype=None):
    """Return (device, torch dtype): the dtype of that name, or bfloat16 where it is fast."""
    import torch

    device = "mps" if torch.backends.mps.is_available() else "cpu"
    has_bf16 = device == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    if torch.cuda.is_available():
        device, has_bf16 = "cuda", torch.cuda.is_bf16_supported(including_emulation=False)
    return device, getattr(torch, dtype or ("bfloat16" if has_bf16 else "float32"))


def load_model(model_dir, adapter_dir, device, dtype):
    """Load the base model, with the adapter (if any) merged into its weights before rounding."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.backends.cuda.enable_cudnn_sdp(False)  # its masked bf16 attention is at times wrong
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
    special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
    written = []
    for message in messages:
        role, text = message["role"], message["content"]
        for token in special:  # broken up, so that no text can forge a turn
            text = text.replace(token, f"{token[:-1]} {token[-1]}")
        written.append({"role": "user" if role == "tool" else role, "content": text})
    return written


def generate_batch(model, tokenizer, prompts, stop_ids, max_new_tokens):
    """Greedy outputs for prompts, which are lists of token ids: [(text, finish reason), ...]."""
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": stop_ids}
    options["pad_token_id"] = tokenizer.pad_token_id
    try:
        rows = model.generate(**batch.to(model.device), **options)
    except RuntimeError as error:  # of which torch.OutOfMemoryError is one
        if len(prompts) == 1 or not re.search("out of memory|ALLOC_FAILED", str(error)):
            raise
        rows = None  # halved below, since the error keeps the tensors made so far
    if rows is None:
        half = len(prompts) // 2
        first = generate_batch(model, tokenizer, prompts[:half], stop_ids, max_new_tokens)
        return first + generate_batch(model, tokenizer, prompts[half:], stop_ids, max_new_tokens)
    answers = []
    for row in rows[:, batch["input_ids"].shape[1] :].tolist():  # padded after the stop token
        text = tokenizer.decode(row, skip_special_tokens=True)
        answers.append((text, "end_of_turn" if set(stop_ids) & set(row) else "max_new_tokens"))
    return answers


def ask_model(queries, model, tokenizer, args):
    """Yield (query, text, finish reason) for all queries, longest prompt first."""
    stop_ids = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    tokens_at_once = 65_536 if model.device.type == "cuda" else 16_384  # too many are halved
    chats = [query["prompt"] for query in queries]
    with reading("the chat template"):
        prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True)["input_ids"]
    waiting = sorted(range(len(queries)), key=lambda n: len(prompts[n]), reverse=True)
    while waiting:
        longest = len(prompts[waiting[0]]) + args.max_new_tokens
        size = args.batch_size or max(1, tokens_at_once // longest)
        batch, waiting = waiting[:size], waiting[size:]
        asked = [prompts[n] for n in batch]
        answers = generate_batch(model, tokenizer, asked, stop_ids, args.max_new_tokens)
        for n, answer in zip(batch, answers, strict=True):
            yield queries[n], *answer


def read_answer(answer):
    """Return (text, finish reason) of an answer in a server's fields; tool calls become text."""
    text = answer["content"] if "content" in answer else answer["output"]
    parts = [text.strip()] if text else []
    for tool_call in answer.get("tool_calls") or []:
        name, arguments = tool_call["function"]["name"], tool_call["function"].get("arguments")
        with contextlib.suppress(ValueError, TypeError, RecursionError):  # what is no JSON stays
            arguments = json.loads(arguments)
        call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        parts.append(f"<tool_call>\n{call}\n</tool_call>")
    reason = answer.get("finish_reason") or "end_of_turn"
    return "\n".join(parts), FINISH_REASONS.get(reason, reason)


async def ask_query(client, semaphore, query, options):
    """Return (query, text, finish reason, error or None), after growing waits where they help."""
    async with semaphore:
        for wait in [*RETRY_WAITS, None]:
            try:
                response = await client.chat_completion(query["prompt"], **options)
                choice = response.choices[0]
                answer = {**choice.message, "finish_reason": choice.finish_reason}
                return query, *read_answer(answer), None
            except Exception as error:
                code = getattr(getattr(error, "response", None), "status_code", 0)
                is_lost = isinstance(error, httpx2.ReadError | httpx2.ProtocolError)
                if wait is None or not (is_lost or code == 429 or code >= 500):
                    return query, "", "failed", repr(error)
            await asyncio.sleep(wait * random.uniform(0.5, 1.5))  # not all of them at once


async def ask_server(queries, args, file, scorer):
    """Ask a server all queries, --concurrency at once, and write their answers to a file."""
    # The hub's own HTTP client refuses to work where HF_HUB_OFFLINE is set.
    huggingface_hub.set_async_client_factory(httpx2.AsyncClient)
    access = {"base_url": args.server, "api_key": os.environ.get("OPENAI_API_KEY", "EMPTY")}
    access["timeout"] = REQUEST_TIMEOUT
    options = {"model": args.server_model, "max_tokens": args.max_new_tokens, "temperature": 0}
    semaphore = asyncio.Semaphore(args.concurrency)
    async with huggingface_hub.AsyncInferenceClient(**access) as client:
        asked = [ask_query(client, semaphore, query, options) for query in queries]
        for answer in tqdm.as_completed(asked, desc="Answering", unit=" queries", disable=None):
            write_answer(file, scorer, *await answer)


def score_output(kind, reference, output):
    """Published score, in [0, 1], of an output; both are tokens without special tokens.

    A call: the longest contiguous run of tokens that both hold, over the reference's length. Any
    other turn: the tokens that both hold, over the output's length (ROUGE-1 precision).
    """
    if kind == "helpful_exchange":
        return (Counter(reference) & Counter(output)).total() / len(output) if output else 0.0
    matcher = difflib.SequenceMatcher(None, output, reference, autojunk=False)
    return matcher.find_longest_match().size / len(reference) if reference else 0.0


def write_answer(file, scorer, query, output, finish_reason, error=None):
    """Append the answer to a query, with its published score, to a file, to outlive a kill."""
    output = output.strip().encode(errors="replace").decode()  # without lone surrogates
    kind = "function_calling" if "<tool_call>" in query["reference"] else "helpful_exchange"
    wanted = scorer.encode(query["reference"], add_special_tokens=False).ids
    score = score_output(kind, wanted, scorer.encode(output, add_special_tokens=False).ids)
    prediction = {key: query[key] for key in ("conversation_id", "turn", "reference")}
    prediction |= {"kind": kind, "output": output, "score": score, "finish_reason": finish_reason}
    prediction |= {"error": error} if error else {}
    file.write(json.dumps(prediction, ensure_ascii=False) + "\n")
    file.flush()


def begin_results(args, results_dir, run):
    """Write run.json, unless an evaluation is in the way; return the keys of what is answered."""
    path, answered = results_dir / "predictions.jsonl", []
    if path.exists() and args.resume:
        earlier = json.loads((results_dir / "run.json").read_text())
        changed = [key for key in run if run[key] != earlier.get(key)]
        if changed:
            sys.exit(f"error: {results_dir} holds an evaluation of another {', '.join(changed)}")
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # of a torn last line
        answered = [p for _, p in read_jsonl(path) if p["finish_reason"] != "failed"]
    elif path.exists() and not args.overwrite:
        words = "--resume goes on with it, --rescore reports it again, --overwrite replaces it"
        sys.exit(f"error: {results_dir} holds an evaluation: {words}")
    else:
        path.unlink(missing_ok=True)
    results_dir.mkdir(parents=True, exist_ok=True)
    (results_dir / "metrics.json").unlink(missing_ok=True)
    (results_dir / "run.json").write_text(json.dumps(run, indent=2))
    return {key_of(prediction) for prediction in answered}


def evaluate(args, results_dir, queries):
    """Write run.json, and to predictions.jsonl what a model, a server or a file answers."""
    name, adapter_dir, revision = model_name(args.model), None, args.revision
    is_local = not (args.server or args.predictions)
    if is_local and not args.baseline:
        adapter_dir = Path(f"LoRA_{name}-function_calling")
        if args.adapter:
            adapter_dir, _ = find_folder(args.adapter)
        with reading(f"{adapter_dir}, made by function_calling_train.py (or give --baseline)"):
            training_run = json.loads((adapter_dir / "training_run.json").read_text())
            revision = revision or training_run["commit"]
            if model_name(training_run["model"]) != name:
                raise ValueError(f"it was trained on --model {training_run['model']}")
    model_dir, commit = find_folder(args.model, revision, with_weights=is_local)
    if (model_dir / "adapter_config.json").is_file():
        sys.exit(f"error: {model_dir} is an adapter: give it as --adapter, its base as --model")
    with reading(model_dir / "tokenizer.json"):
        scorer = Tokenizer.from_buffer((model_dir / "tokenizer.json").read_bytes())
    run = {"model": name, "commit": commit, "served_model": args.server_model}
    run |= {"max_new_tokens": args.max_new_tokens, "test_split_sha256": sha256(args.test_file)}
    if is_local:
        device, dtype = choose_device(args.dtype)
        run["dtype"] = str(dtype).removeprefix("torch.")
        if adapter_dir:
            run["adapter_sha256"] = sha256(adapter_dir / "adapter_model.safetensors")
    given = {}
    for place, row in read_jsonl(args.predictions) if args.predictions else ():
        with reading(place):
            given[key_of(row)] = read_answer(row)
    done = begin_results(args, results_dir, run)
    left = [query for query in queries if key_of(query) not in done]
    if args.baseline:
        left = [{**q, "prompt": write_for_base(q["prompt"], scorer)} for q in left]
    if is_local and left:
        import transformers

        transformers.logging.disable_progress_bar()
        with reading(adapter_dir or model_dir):
            tokenizer = transformers.AutoTokenizer.from_pretrained(adapter_dir or model_dir)
            model = load_model(model_dir, adapter_dir, device, dtype)
        answers = ask_model(left, model, tokenizer, args)
    else:
        answers = [(q, *given[key_of(q)]) for q in left if key_of(q) in given]
    with open(results_dir / "predictions.jsonl", "a", encoding="utf-8") as file:
        if args.server:
            asyncio.run(ask_server(left, args, file, scorer))
            return
        for answer in tqdm(answers, "Answering", len(left), unit=" queries", disable=None):
            write_answer(file, scorer, *answer)


def read_literal(text):
    """Read JSON, or else a Python literal: the data exists in both."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return ast.literal_eval(text)


def read_float(text):
    return int(float(text)) if float(text).is_integer() else float(text)


def parse_calls(text):
    """Return the calls of a turn, None if malformed; arguments are the same if their "text" is."""
    pieces, calls = re.split("(</?tool_call>)", text), []  # text, tag, text, tag, text ...
    tags = pieces[1::2]
    if tags != ["<tool_call>", "</tool_call>"] * (len(tags) // 2):
        return None
    try:
        for piece in pieces[2::4]:
            call = read_literal(piece.strip())
            name, arguments = call["name"], call.get("arguments")
            if isinstance(arguments, str):
                arguments = read_literal(arguments) if arguments.strip() else None
            if not name or not isinstance(name, str) or not isinstance(arguments, dict | None):
                return None
            # As JSON: a Python tuple is a list, and 1.0 is 1.
            arguments = json.loads(json.dumps(arguments or {}), parse_float=read_float)
            text = json.dumps(arguments, sort_keys=True)
            calls.append({"name": name, "arguments": arguments, "text": text})
    except Exception:  # there is no closed list of what literal_eval raises
        return None
    return calls


def read_schema(part):
    """One object of a declared schema, as json.loads reads it, in JSON Schema's own words."""
    types = part.get("type")
    if isinstance(types, str | list):
        types = [types] if isinstance(types, str) else types
        types = {TYPE_NAMES.get(str(name).lower(), str(name).lower()) for name in types}
        if part.get("nullable") is True:  # OpenAPI's word
            types.add("null")
        part["type"] = None if "any" in types else sorted(types)
    if part.pop("patternProperties", None):  # any name of an argument may be meant
        part["additionalProperties"] = True
    return {key: value for key, value in part.items() if value is not None and key != "$schema"}


@functools.cache  # many conversations declare the same tools
def read_tools(tools_text):
    """The tools that a row declares: {name: schema of its parameters, None if it is unreadable}."""
    tools = {}
    for tool in json.loads(tools_text, object_hook=read_schema) or []:
        function = tool.get("function", tool)
        if isinstance(function, dict):
            schema = function.get("parameters", {})
            try:  # formats, and with them patterns, are not looked at
                Draft202012Validator.check_schema(schema, FormatChecker(()))
            except Exception:  # there is no closed list of what rubbish makes the library raise
                schema = None
            tools.setdefault(str(function.get("name")), schema)
    return tools


def follow_reference(counter, validator, reference, instance, schema):
    """The keyword "$ref", which leaves no schema and gives up where references never end."""
    if next(counter) > MAX_REFERENCES or not reference.startswith("#"):
        raise ValueError
    return Draft202012Validator.VALIDATORS["$ref"](validator, reference, instance, schema)


def find_problems(call, tools):
    """What the declared tools have against a call, as a list of words; None if it is unchecked."""
    if call["name"] not in tools:
        return ["unknown function"]
    schema, arguments, parts = tools[call["name"]], call["arguments"], []
    try:
        followed = {"$ref": functools.partial(follow_reference, itertools.count())}
        checker = extend(CHECKER, followed) if "$ref" in json.dumps(schema) else CHECKER
        keywords = {error.validator for error in checker(schema).iter_errors(arguments)}
        # An argument is to be declared here or, where the schema branches, in any part of it.
        json.loads(json.dumps(schema), object_hook=lambda part: parts.append(part) or part)
        parts = parts if BRANCHES & set(schema) else [schema]
        declared = {name for part in parts for name in part.get("properties", ())}
        is_open = any(part.get("additionalProperties", False) is not False for part in parts)
        if not is_open and not declared.issuperset(arguments):
            keywords.add("additionalProperties")
    except Exception:  # a schema that is none, or only breaks when it is used
        return None
    return sorted({FAULTS.get(keyword, "wrong type") for keyword in keywords})


def judge_turn(prediction, tools, seen_tools=None):
    """Judge a prediction: its failure and problems, and {metric: (numerator, denominator)}."""
    wanted, calls = parse_calls(prediction["reference"]), parse_calls(prediction["output"])
    is_malformed, calls, reason = calls is None, calls or [], prediction["finish_reason"]
    problems = [find_problems(call, tools) for call in calls]
    counts = {prediction["kind"]: (prediction["score"], 1)}
    counts["valid_call"] = (problems.count([]), len(problems) - problems.count(None))
    verdict = {"failure": None, "problems": problems, "counts": counts, "is_faulty": wanted is None}
    if wanted is None:  # by it no output is judged
        return verdict
    needed, hit, attempted = bool(wanted), bool(wanted and calls), bool(calls or is_malformed)
    counts["precision"] = (hit, attempted)
    counts["recall"] = (hit, needed)
    counts["f1"] = (2 * hit, attempted + needed)
    wanted = sorted((call["name"], call["text"]) for call in wanted)  # in any order
    calls = sorted((call["name"], call["text"]) for call in calls)
    is_right = wanted == calls and not is_malformed
    names_right = [name for name, _ in wanted] == [name for name, _ in calls]
    if needed:
        counts["name_right"] = (names_right, 1)
        counts["arguments_right"] = (sorted(t for _, t in wanted) == sorted(t for _, t in calls), 1)
        counts["turn_right"] = (is_right, 1)
    if needed and seen_tools is not None:
        group = "seen" if {name for name, _ in wanted} <= seen_tools else "unseen"
        counts[f"turn_right_{group}_tools"] = (is_right, 1)
    if reason != "end_of_turn" and not (needed and is_right):
        verdict["failure"] = "failed" if reason == "failed" else "truncated"
    elif is_malformed:
        verdict["failure"] = "malformed"
    elif calls and not wanted:
        verdict["failure"] = "unneeded_call"
    elif len(calls) != len(wanted):
        verdict["failure"] = "wrong_count" if calls else "no_call"
    elif not is_right:
        verdict["failure"] = "wrong_arguments" if names_right else "wrong_function"
    return verdict


def resample(turns):
    """Each metric of all turns, then in 2,000 samples: [1 + sample, metric]; and its n [metric]."""
    sums_of = {}  # conversations are drawn, for their turns hang together
    for turn in turns:
        sums = sums_of.setdefault(turn["conversation_id"], numpy.zeros((len(METRICS), 2)))
        for metric, pair in turn["counts"].items():
            sums[METRICS.index(metric)] += pair
    sums = numpy.array(list(sums_of.values()))
    share = numpy.full(len(sums), 1 / len(sums))
    drawn = numpy.random.default_rng(0).multinomial(len(sums), share, size=2000)
    totals = numpy.tensordot(numpy.vstack([numpy.ones(len(sums)), drawn]), sums, 1)
    with numpy.errstate(invalid="ignore", divide="ignore"):
        return totals[..., 0] / totals[..., 1], totals[0, :, 1]


def estimate(turns, base=None):
    """{metric: {"value", "n", "interval"}}, or the paired difference to `base`'s same turns."""
    values, n = resample(turns)
    if base:
        values = values - resample(base)[0]  # the same conversations are drawn
    result = {}
    for i, metric in enumerate(METRICS):
        if not numpy.isnan(values[0, i]):
            interval = numpy.nanpercentile(values[1:, i], [2.5, 97.5]).tolist()
            result[metric] = {"value": float(values[0, i]), "n": int(n[i]), "interval": interval}
    return result


def judge_predictions(path, queries, seen_tools):
    """Return {query: its prediction with the verdict} for the queries that a file answers."""
    found = {key_of(row): row for _, row in read_jsonl(path)}  # the last one for a query counts
    judged = {}
    for query in queries:
        prediction = found.get(key_of(query))
        if prediction and prediction["reference"] == query["reference"]:
            verdict = judge_turn(prediction, read_tools(query["tools"]), seen_tools)
            judged[key_of(query)] = prediction | verdict
    return judged


def summarize(turns):
    """The scores of judged turns, and how often each thing went wrong."""
    of_calls = [problems for turn in turns for problems in turn["problems"]]
    num_faulty = sum(turn["is_faulty"] for turn in turns)
    return {
        "queries": len(turns),
        "scores": estimate(turns),
        "failures": Counter(turn["failure"] for turn in turns if turn["failure"]),
        "finish_reasons": Counter(turn["finish_reason"] for turn in turns),
        "problems": Counter(word for problems in of_calls for word in problems or []),
        "left_out": {"unchecked calls": of_calls.count(None), "faulty references": num_faulty},
    }


def read_seen_tools(test_file):
    """The names of all tools in the train split beside the test split, None without one."""
    train_file, names = test_file.with_name("function_calling_train.jsonl"), set()
    if not train_file.is_file():
        return None
    for query in read_queries(train_file):
        names.update(read_tools(query["tools"]))
        names.update(call["name"] for call in parse_calls(query["reference"]) or [])
    return names


def format_scores(columns, model):
    """A table of scores; `columns` maps titles to what estimate returns."""
    rows, published = [["", "n", *columns, "published: base, tuned"]], PUBLISHED.get(model, [])
    for metric, figures in itertools.zip_longest(METRICS, published, fillvalue=""):
        row = [metric.replace("_", " "), ""]  # n is that of the last column
        for title, scores in columns.items():
            cell, sign = "-", "+" if title == "difference" else ""
            if metric in scores:
                value, n, (low, high) = scores[metric].values()
                cell, row[1] = f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]", str(n)
            row.append(cell)
        rows.append([*row, figures])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)).rstrip() for row in rows)


def plot_scores(columns, name, path):
    """Draw scores with their intervals; `columns` maps labels to what estimate returns."""
    from matplotlib.figure import Figure

    figure, height = Figure(figsize=(9, 9), layout="constrained"), 0.8 / len(columns)
    axes = figure.subplots()
    for place, (label, scores) in enumerate(columns.items()):
        rows = [METRICS.index(metric) + (place + 0.5) * height - 0.4 for metric in scores]
        values = numpy.array([entry["value"] for entry in scores.values()])
        reach = numpy.abs(numpy.array([entry["interval"] for entry in scores.values()]).T - values)
        bars = axes.barh(rows, values, height, xerr=reach, label=label)
        axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.set_yticks(range(len(METRICS)), [metric.replace("_", " ") for metric in METRICS])
    axes.set(xlim=(0, 1.15), ylim=(len(METRICS) - 0.5, -0.5), title=f"{name}: 95 % intervals")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path)


def report_results(args, results_dir, queries):
    """Judge the predictions, draw and print their scores beside the base's, write metrics.json."""
    label, base_dir, base = results_dir.name, results_dir.with_name("base"), {}
    seen_tools = read_seen_tools(args.test_file)
    turns = judge_predictions(results_dir / "predictions.jsonl", queries, seen_tools)
    if not turns:
        sys.exit(f"error: {results_dir} answers no query of {args.test_file}: --overwrite it")
    metrics = summarize(list(turns.values()))
    metrics["run"] = json.loads((results_dir / "run.json").read_text())
    name, columns, difference = metrics["run"]["model"], {label: metrics["scores"]}, {}
    if label != "base" and (base_dir / "metrics.json").is_file():
        base = judge_predictions(base_dir / "predictions.jsonl", queries, seen_tools)
    if both := [key for key in turns if key in base]:
        ours, theirs = [turns[key] for key in both], [base[key] for key in both]
        columns = {"base": estimate(theirs), label: estimate(ours)}
        difference = {"difference": estimate(ours, theirs)}
    plot_scores(columns, name, results_dir.with_name("comparison.png"))
    (results_dir / "metrics.json").write_text(json.dumps(metrics | difference, indent=2))
    print(f"Written to  {results_dir}/, {len(turns):,} of {len(queries):,} queries\n")
    print(format_scores(columns | difference, name))
    for key in ("failures", "problems", "left_out"):
        found = ", ".join(f"{n:,} {words}" for words, n in metrics[key].items() if n)
        print(f"{key}: {found or 'none'}".replace("_", " "))
    wrong = [turn for turn in turns.values() if turn["failure"]]
    for turn in random.Random(0).sample(wrong, len(wrong))[: args.show_failures]:
        print(f"\n{turn['failure']}: conversation {turn['conversation_id']}, turn {turn['turn']}")
        print(f"REFERENCE\n{turn['reference']}\nOUTPUT\n{turn['output']}")
    if failed := [turn for turn in wrong if turn["failure"] == "failed"]:
        words = "queries failed and count as wrong, --resume asks them again; the first:"
        sys.exit(f"error: {len(failed)} {words} {key_of(failed[0])}, {failed[0].get('error')}")


def main(argv=None):
    args = parse_args(argv)
    warnings.simplefilter("ignore")  # of libraries, and of odd escapes in what a model wrote
    name, label = model_name(args.model), "base" if args.baseline else "tuned"
    source = args.predictions or args.server_model or args.adapter
    if source and not args.baseline and model_name(source) != f"LoRA_{name}-function_calling":
        label = model_name(source).removesuffix(".jsonl")
    results_dir, queries = args.output_dir / name / label, read_queries(args.test_file, args.limit)
    if not args.rescore:
        evaluate(args, results_dir, queries)
    report_results(args, results_dir, queries)


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # what goes wrong in a library is told once, by its error
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: --resume goes on with the evaluation")
    except (OSError, RuntimeError) as error:
        sys.exit(f"error: {type(error).__name__} {' '.join(str(error).split())}")
