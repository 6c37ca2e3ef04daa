"""Score how well a model calls functions and answers, before and after training (step 3 of 3).

    python evaluation.py --baseline                                       # gemma-3-1b-it as it is
    python evaluation.py                                                  # with the adapter of step 2
    python evaluation.py --model google/gemma-3-270m-it

Every model turn of every test conversation is one query: the turns before it are the prompt, the turn itself is the
reference. A turn that holds a tool call is scored by the longest common contiguous sequence of tokens, any other (a
helpful reply) by unigram matches. Writes predictions.jsonl (a query a line) and metrics.json under evaluation_results/,
draws comparison.png, and prints base, tuned and published scores side by side.
"""

import argparse
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

DEFAULT_MODEL = "google/gemma-3-1b-it"
DEFAULT_TEST_FILE = Path("processed_data/function_calling_test.jsonl")

# Published scores (function calling, helpful exchange) on about 1,100 queries: the first 300 test conversations.
PUBLISHED = {
    "gemma-3-1b-it": {"base": (0.28, 0.29), "tuned, README": (0.91, 0.78), "tuned, notebook": (0.973, 0.815)},
    "gemma-3-270m-it": {"base": (0.13, 0.48), "tuned, README": (0.90, 0.68), "tuned, notebook": (0.955, 0.779)},
}

KINDS = {"function_calling": "function calling", "helpful_exchange": "helpful exchange"}

# Gemma's turns, for a base model whose tokenizer comes without a chat template.
GEMMA_TURNS = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\\n' }}"
    "{{ message.content | trim }}{{ '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Score how well a model calls functions and answers, before and after training (step 3 of 3)."
    )

    def add(flag, help, **options):
        default = options.get("default")
        shown = "" if default is None or default is False else f" (default: {default})"
        parser.add_argument(flag, help=help + shown, **options)

    add("--model", "hub id or local folder of the base model", default=DEFAULT_MODEL)
    add("--revision", "branch, tag or commit of the hub model (default: the one the adapter was trained on)")
    add("--adapter", "folder of the adapter (default: LoRA_<model name>-function_calling)", type=Path)
    add("--baseline", "score the untuned model, with its own tokenizer and chat template", action="store_true")
    add("--test-file", "test split, as step 1 writes it", type=Path, default=DEFAULT_TEST_FILE)
    add("--output-dir", "folder for the results; each model gets its own within", type=Path, default=Path("evaluation_results"))
    add("--limit", "use only the first N conversations (the published run: 300)", type=int)
    add("--batch-size", "queries generated at once", type=int, default=24)
    add("--max-new-tokens", "longest output, tokens", type=int, default=256)
    add("--resume", "go on with an interrupted evaluation", action="store_true")
    add("--overwrite", "replace an earlier or unfinished evaluation", action="store_true")
    args = parser.parse_args(argv)
    for name in ("limit", "batch_size", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if args.baseline and args.adapter:
        parser.error("--baseline scores the model without an adapter: leave out --adapter")
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
# What is read: the test split, the base model and its adapter


def sha256_of_file(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_queries(path, limit=None):
    """Read the queries of a split: [{"conversation_id", "turn", "kind", "reference", "prompt"}, ...] in its order.

    "turn" is the position of the model turn among the messages, "prompt" the messages before it. A bad line ends the program.
    """
    if not path.is_file():
        sys.exit(f"error: {path} not found: run prepare_function_calling_dataset.py first, or give --test-file")
    queries, ids = [], set()
    with open(path, encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if limit is not None and number > limit:
                break
            try:
                row = json.loads(line)
                conversation_id, messages = row["id"], row["messages"]
                for message in messages:
                    if message["role"] not in ("user", "assistant", "tool") or not isinstance(message["content"], str):
                        raise ValueError("a role or a content is wrong")
                if conversation_id in ids:
                    raise ValueError(f"id {conversation_id} stands twice")
            except json.JSONDecodeError as error:
                sys.exit(f"error: {path}, line {number}: invalid JSON ({error.msg}); make it again with "
                         "prepare_function_calling_dataset.py")
            except (KeyError, TypeError, ValueError) as error:
                sys.exit(f"error: {path}, line {number}: not a conversation ({error}); make it again with "
                         "prepare_function_calling_dataset.py")
            ids.add(conversation_id)
            for turn, message in enumerate(messages):
                if message["role"] == "assistant":
                    queries.append({
                        "conversation_id": conversation_id,
                        "turn": turn,
                        "kind": "function_calling" if "<tool_call>" in message["content"] else "helpful_exchange",
                        "reference": message["content"].strip(),
                        "prompt": messages[:turn],
                    })
    if not queries:
        sys.exit(f"error: {path}: no model turn to score")
    return queries


def find_model(model, revision):
    """Return (folder, commit) of a model given as a local folder (commit None) or as a hub id, which is downloaded."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            sys.exit(f"error: --model {model}: the folder holds no config.json, so it is no Transformers model")
        return folder, None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        sys.exit(f"error: --model {model}: no such folder, and not a hub id such as {DEFAULT_MODEL}")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        folder = snapshot_download(model, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.jinja"])
    except GatedRepoError:  # a subclass of RepositoryNotFoundError
        sys.exit(f"error: {model} is gated: accept its licence at https://huggingface.co/{model}, then run `hf auth login`")
    except RepositoryNotFoundError:
        sys.exit(f"error: {model} was not found on the hub: check --model, or run `hf auth login` if it is private")
    except RevisionNotFoundError:
        sys.exit(f"error: {model} has no revision {revision}: check --revision")
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        sys.exit(f"error: {model} could not be downloaded ({reason}): check the network and HF_ENDPOINT, then run this again")
    return Path(folder), Path(folder).name


def model_name(model):
    return Path(model).expanduser().resolve().name


def check_adapter(adapter_dir, model):
    """Return training_run.json of an adapter; end the program if the adapter is missing, unsafe or not this model's."""
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja", "training_run.json"):
        if not (adapter_dir / name).is_file():
            sys.exit(f"error: {adapter_dir / name} not found: run function_calling_train.py first, give --adapter, or score the "
                     "untuned model with --baseline")
    try:
        run = json.loads((adapter_dir / "training_run.json").read_text(encoding="utf-8"))
        trained_on, template_sha256 = run["model"], run["chat_template_sha256"]
    except (ValueError, KeyError, TypeError):
        sys.exit(f"error: {adapter_dir / 'training_run.json'} cannot be read: run function_calling_train.py again")
    if model_name(trained_on) != model_name(model):
        sys.exit(f"error: the adapter in {adapter_dir} was trained on {trained_on}, not on {model}: give --model {trained_on}")
    if sha256_of_file(adapter_dir / "chat_template.jinja") != template_sha256:
        sys.exit(f"error: {adapter_dir / 'chat_template.jinja'} is not the template the adapter was trained with: restore it, or "
                 "run function_calling_train.py again")
    return run


def choose_device():
    """Return (device name, dtype of the model): bf16 where a GPU computes in it, else fp32, never fp16."""
    import torch

    if torch.cuda.is_available():
        return "cuda", torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if torch.backends.mps.is_available():
        return "mps", torch.float32
    return "cpu", torch.float32


def load_model(model_dir, adapter_dir, device, dtype):
    """Load the base model from `model_dir`, with the adapter (if any) merged into its weights.

    They are merged in fp32 before the model is brought to `dtype`, so that nothing is rounded twice.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32 if adapter_dir else dtype, attn_implementation="sdpa", use_safetensors=True
        )
    except (OSError, ValueError) as error:
        sys.exit(f"error: {model_dir}: the model cannot be loaded: {str(error).splitlines()[0]}")
    if adapter_dir:
        try:
            model = PeftModel.from_pretrained(model, adapter_dir).merge_and_unload()
        except (ValueError, RuntimeError) as error:
            sys.exit(f"error: {adapter_dir}: the adapter does not fit the model: {str(error).splitlines()[0]}")
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


def generate_batch(model, prompts, stop_ids, pad_id, max_new_tokens):
    """Greedy outputs for a batch of prompts (lists of token ids), as lists of token ids without the stop token.

    Returns [(output ids, whether the turn was ended)]. Prompts are padded on the left, so that each output starts at the
    padded width.
    """
    import torch
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt):] = torch.tensor(prompt)
        attention_mask[row, width - len(prompt):] = 1
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop_ids, pad_token_id=pad_id
    )
    with torch.inference_mode():
        sequences = model.generate(input_ids.to(model.device), attention_mask=attention_mask.to(model.device))
    outputs = []
    for tokens in sequences[:, width:].tolist():
        end = next((position for position, token in enumerate(tokens) if token in stop_ids), None)
        outputs.append((tokens[:end], end is not None))
    return outputs


def answer_queries(queries, model, tokenizer, scorer, args, record):
    """Generate and score an output for each query, longest prompts first; `record` takes each batch of predictions."""
    from tqdm import tqdm

    stop_ids = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    longest_prompt = model.config.get_text_config().max_position_embeddings - args.max_new_tokens
    prompts = [encode_prompt(query["prompt"], tokenizer, args.baseline) for query in queries]

    def predict(query, prompt, output, finish_reason, output_tokens):
        prediction = {key: query[key] for key in ("conversation_id", "turn", "kind", "reference")}
        tokens = [scorer.encode(text, add_special_tokens=False) for text in (query["reference"], output)]
        return {**prediction, "output": output, "score": score_output(query["kind"], *tokens), "finish_reason": finish_reason,
                "prompt_tokens": len(prompt), "output_tokens": output_tokens}

    # A prompt that does not fit is a failure to be counted; cutting it would take away what it asks for.
    too_long = [index for index, prompt in enumerate(prompts) if len(prompt) > longest_prompt]
    if too_long:
        record([predict(queries[index], prompts[index], "", "prompt_too_long", 0) for index in too_long])
    order = sorted(set(range(len(queries))) - set(too_long), key=lambda index: (-len(prompts[index]), index))
    with tqdm(total=len(queries), initial=len(too_long), desc="Answering", unit=" queries", disable=None) as progress:
        for start in range(0, len(order), args.batch_size):
            batch = order[start:start + args.batch_size]
            outputs = generate_batch(
                model, [prompts[index] for index in batch], stop_ids, tokenizer.pad_token_id, args.max_new_tokens
            )
            predictions = []
            for index, (tokens, ended) in zip(batch, outputs):
                text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
                predictions.append(predict(queries[index], prompts[index], text, "end_of_turn" if ended else "max_new_tokens", len(tokens)))
            record(predictions)
            progress.update(len(batch))


# ----------------------------------------------------------------------------------------------------------------------
# What is written


def write_json(path, content):
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path, text):
    """Write a file whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def refuse_other_evaluation(path, earlier, identity):
    """End the program if what `path` holds of an `earlier` evaluation does not rest on the same things as this one."""
    changes = [f"{key} was {earlier.get(key)}, is {value}" for key, value in identity.items() if earlier.get(key) != value]
    if changes:
        sys.exit(f"error: {path} belongs to another evaluation ({', '.join(changes)}): repeat its arguments, or --overwrite it")


def open_partial(path, identity, args):
    """Return (the predictions an interrupted evaluation left, the file to append further ones to).

    The file's first line is `identity`, what the predictions depend on: an evaluation goes on only with its own.
    """
    if path.exists() and not (args.resume or args.overwrite):
        sys.exit(f"error: {path} holds an unfinished evaluation: --resume goes on with it, --overwrite starts anew")
    predictions = []
    if args.resume and path.exists():
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line end was torn by the interruption
        try:
            lines = [json.loads(line) for line in lines]
        except ValueError:
            sys.exit(f"error: {path} cannot be read: --overwrite starts anew")
        if lines:
            refuse_other_evaluation(path, lines[0], identity)
            predictions = lines[1:]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in [identity, *predictions]))
    return predictions, open(path, "a", encoding="utf-8")


def summarize(predictions):
    """Mean score and number of queries of each kind: {kind: {"score": ..., "n": ...}}; score None where n is 0."""
    summary = {}
    for kind in KINDS:
        scores = [prediction["score"] for prediction in predictions if prediction["kind"] == kind]
        summary[kind] = {"score": sum(scores) / len(scores) if scores else None, "n": len(scores)}
    return summary


def load_comparison(model_results_dir, name, test_sha256):
    """What there is to compare: [(label, {kind: {"score", "n"}})], measured runs on this very split and published figures."""
    rows = []
    for folder in sorted(model_results_dir.iterdir(), key=lambda folder: (folder.name != "base", folder.name)):
        if (folder / "metrics.json").is_file():
            metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            if metrics["test_split_sha256"] == test_sha256:
                rows.append((f"{folder.name}, measured", metrics["scores"]))
    for label, scores in PUBLISHED.get(name, {}).items():
        rows.append((f"{label}, published", {kind: {"score": score, "n": None} for kind, score in zip(KINDS, scores)}))
    return rows


def format_table(rows):
    """The comparison as text: a row per model, a score and its n per kind."""
    width = max(len(label) for label, _ in rows)
    lines = [" " * width + "".join(f"{title:>25}" for title in KINDS.values())]
    for label, scores in rows:
        cells = []
        for kind in KINDS:
            score, n = scores[kind]["score"], scores[kind]["n"]
            count = "" if n is None else f"  n={n:,}"
            cells.append(("-" if score is None else f"{score:.3f}") + f"{count:<10}")
        lines.append(f"{label:<{width}}" + "".join(f"{cell:>25}" for cell in cells))
    if any(scores[kind]["n"] is None for _, scores in rows for kind in KINDS):
        lines.append("Published figures: about 1,100 queries of the first 300 test conversations.")
    return "\n".join(lines)


def plot_comparison(rows, path, title):
    """Draw the comparison as bars, a group per kind of turn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = ["#999999", "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#CC79A7"]  # Okabe and Ito: safe for colour-blind eyes
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    width = 0.8 / len(rows)
    for position, (label, scores) in enumerate(rows):
        values = [scores[kind]["score"] or 0.0 for kind in KINDS]
        places = [group + (position - (len(rows) - 1) / 2) * width for group in range(len(KINDS))]
        bars = axes.bar(places, values, width * 0.92, label=label, color=colors[position % len(colors)],
                        hatch="//" if label.endswith("published") else None, edgecolor="white")
        axes.bar_label(bars, fmt="%.2f", fontsize=9)
    axes.set(title=title, ylabel="score", ylim=(0, 1.08))
    axes.set_xticks(range(len(KINDS)), KINDS.values())
    axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv=None):
    args = parse_args(argv)
    name = model_name(args.model)
    default_adapter = Path(f"LoRA_{name}-function_calling")
    adapter_dir = None if args.baseline else args.adapter or default_adapter
    run = check_adapter(adapter_dir, args.model) if adapter_dir else {}
    queries = read_queries(args.test_file, args.limit)
    test_sha256 = sha256_of_file(args.test_file)
    label = "base" if args.baseline else "tuned" if args.adapter in (None, default_adapter) else args.adapter.resolve().name
    results_dir = args.output_dir / name / label
    metrics_path, partial_path = results_dir / "metrics.json", results_dir / "predictions.partial.jsonl"
    finished = metrics_path.is_file() and not partial_path.exists()
    if finished and not (args.resume or args.overwrite):
        sys.exit(f"error: {results_dir} holds a finished evaluation: --overwrite replaces it, --output-dir keeps both")
    model_dir, commit = find_model(args.model, args.revision or run.get("commit"))

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import torch
    import transformers
    from transformers import AutoTokenizer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading weights; training and generation show their own
    device, dtype = choose_device()
    scorer = AutoTokenizer.from_pretrained(model_dir)  # the stock tokenizer: base and tuned are scored in the same tokens
    tokenizer = AutoTokenizer.from_pretrained(adapter_dir) if adapter_dir else scorer
    if tokenizer.chat_template is None:
        print(f"note: the tokenizer of {args.model} has no chat template; prompts are written in Gemma's turns")
        tokenizer.chat_template = GEMMA_TURNS
    identity = {
        "model": name,
        "commit": commit,
        "adapter_sha256": sha256_of_file(adapter_dir / "adapter_model.safetensors") if adapter_dir else None,
        "test_split_sha256": test_sha256,
        "chat_template_sha256": hashlib.sha256(tokenizer.chat_template.encode()).hexdigest(),
        "limit": args.limit,
        "max_new_tokens": args.max_new_tokens,
    }
    if finished and args.resume:
        refuse_other_evaluation(results_dir, json.loads(metrics_path.read_text(encoding="utf-8")), identity)
        print(f"Finished    {results_dir} is complete; nothing is left to ask")
        print(f"\n{format_table(load_comparison(results_dir.parent, name, test_sha256))}")
        return
    predictions, partial = open_partial(partial_path, identity, args)
    done = {(prediction["conversation_id"], prediction["turn"]) for prediction in predictions}
    remaining = [query for query in queries if (query["conversation_id"], query["turn"]) not in done]

    def record(batch):
        predictions.extend(batch)
        partial.writelines(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in batch)
        partial.flush()
        os.fsync(partial.fileno())

    print(f"Model       {args.model}" + (f", commit {commit}" if commit else "") + f", {str(dtype).removeprefix('torch.')} on {device}")
    print(f"Adapter     {adapter_dir or 'none: the untuned model with its own tokenizer'}")
    if note := describe_other_split(args.test_file, run):
        print(note)
    print(f"Queries     {len(queries):,}" + (f", {len(done):,} of them already answered" if done else ""))
    start = time.monotonic()
    with partial:
        if remaining:
            model = load_model(model_dir, adapter_dir, device, dtype)
            try:
                answer_queries(remaining, model, tokenizer, scorer, args, record)
            except torch.OutOfMemoryError:
                sys.exit(f"error: out of GPU memory: go on with --resume and a --batch-size below {args.batch_size}")
    seconds = time.monotonic() - start

    place = {(query["conversation_id"], query["turn"]): position for position, query in enumerate(queries)}
    predictions.sort(key=lambda prediction: place[prediction["conversation_id"], prediction["turn"]])
    reasons = Counter(prediction["finish_reason"] for prediction in predictions)
    scores = summarize(predictions)
    metrics = {
        "scores": scores,
        "queries": len(predictions),
        "finish_reasons": {reason: reasons[reason] for reason in ("end_of_turn", "max_new_tokens", "prompt_too_long")},
        **identity,
        "adapter": str(adapter_dir) if adapter_dir else None,
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": round(seconds, 1),
        "queries_in_these_seconds": len(remaining),
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers", "peft", "numpy")},
    }
    write_text(results_dir / "predictions.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in predictions))
    write_json(metrics_path, metrics)
    partial_path.unlink()

    rows = load_comparison(results_dir.parent, name, test_sha256)
    plot_comparison(rows, results_dir.parent / "comparison.png", f"{name} on function calling")
    print(f"Answered    {len(remaining):,} queries in {seconds:,.0f} s; {reasons['end_of_turn']:,} ended their turn, "
          f"{reasons['max_new_tokens']:,} ran into --max-new-tokens, {reasons['prompt_too_long']:,} had a prompt too long")
    print(f"Written to  {results_dir}/: predictions.jsonl, metrics.json; {results_dir.parent / 'comparison.png'}")
    print(f"\n{format_table(rows)}")


def describe_other_split(test_file, run):
    """A note if the adapter was trained on another train split than the one that stands beside the test split, else None."""
    info_path = test_file.parent / "dataset_info.json"
    if not run or not info_path.is_file():
        return None
    trained_on = run.get("train_split_sha256")
    beside = json.loads(info_path.read_text(encoding="utf-8")).get("train", {}).get("sha256")
    if trained_on == beside:
        return None
    return "note: the adapter was trained on another train split than the one beside this test split, and may know its answers"


def run(main):
    """Run `main`; an interruption or a failing disk ends in one line and an exit code instead of a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command with --resume to go on", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run(main)
