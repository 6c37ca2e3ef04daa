"""Fine-tune Gemma 3 to call functions, with LoRA, on the splits of step 1 (step 2 of 3).

    python function_calling_train.py                                      # gemma-3-1b-it, the published recipe
    python function_calling_train.py --model google/gemma-3-270m-it
    torchrun --nproc_per_node 2 function_calling_train.py                 # two GPUs, the same losses

Reads processed_data/function_calling_train.jsonl and writes the folder LoRA_<model name>-function_calling/, which holds
all that is needed beside the base model: the adapter, the tokenizer with its chat template, a generation_config.json
that knows where a turn ends, training_run.json and loss.png. Checkpoints lie in a folder of their own beside it; --resume
goes on from the last of them.
"""

import argparse
import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import pickle
import re
import shlex
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

DEFAULT_MODEL = "google/gemma-3-1b-it"
DEFAULT_TRAIN_FILE = Path("processed_data/function_calling_train.jsonl")

# The tags of the data. Each takes over one of the unused slots of Gemma's vocabulary and so becomes a single token.
TAGS = [
    "<tools>",
    "</tools>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
]
DTYPES = ["bfloat16", "float32"]  # float16 is not among them: its range is too small for Gemma's activations
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DISK_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
NUMBERS_AT_ONCE = 2**20  # of a projection's input, on a CPU: 2 MB in bf16, about its cache
VALIDATIONS_PER_RUN = 4  # each costs one pass over the validation split and leaves a checkpoint

# Gemma's turns; a tool's result stands in a user turn. Control tokens written out in a message get a space before their
# ">", so that no text can forge a turn. The "generation" block marks what the model says: the only part that is trained.
CHAT_TEMPLATE = """\
{%- macro plain(text) -%}
    {%- set result = namespace(text=text | trim) -%}
    {%- for mark in ['<bos>', '<eos>', '<pad>', '<unk>', '<mask>', '<start_of_turn>', '<end_of_turn>',
                     '<start_of_image>', '<end_of_image>', '<image_soft_token>'] -%}
        {%- set result.text = result.text | replace(mark, mark[:-1] + ' >') -%}
    {%- endfor -%}
    {{- result.text -}}
{%- endmacro -%}
{{- bos_token -}}
{%- set system = namespace(text='') -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- set system.text = plain(message.content) + '\\n\\n' -%}
    {%- elif message.role in ['assistant', 'model'] -%}
        {{- '<start_of_turn>model\\n' -}}
        {%- generation -%}{{- plain(message.content) + '<end_of_turn>' -}}{%- endgeneration -%}
        {{- '\\n' -}}
    {%- elif message.role in ['user', 'tool'] -%}
        {{- '<start_of_turn>user\\n' + system.text + plain(message.content) + '<end_of_turn>\\n' -}}
        {%- set system.text = '' -%}
    {%- else -%}
        {{- raise_exception('unknown role ' + message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""

# Arguments that may differ between a run and its continuation: what is trained does not depend on them, or is described otherwise.
FREE_ARGUMENTS = {"resume", "overwrite", "merge", "push_to_hub", "report_to", "output_dir", "model", "train_file", "revision",
                  "dtype", "batch_size", "activation_checkpointing"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Fine-tune Gemma 3 to call functions, with LoRA (step 2 of 3). The defaults are the published recipe.",
        allow_abbrev=False,
    )

    def path(text):
        return Path(text).expanduser()

    def add(flag, help, **options):
        default = options.get("default")
        shown = "" if default is None or default is False else f" (default: {default})"
        parser.add_argument(flag, help=help + shown, **options)

    # Model and data
    add("--model", "hub id or local folder of a Gemma 3 text model", default=DEFAULT_MODEL)
    add("--revision", "branch, tag or commit of the hub model (default: its main branch)")
    add("--train-file", "train split, as step 1 writes it", type=path, default=DEFAULT_TRAIN_FILE)
    add("--output-dir", "folder for the adapter (default: LoRA_<model name>-function_calling)", type=path)
    # Recipe
    add("--epochs", "passes over the training conversations", type=float, default=1.0)
    add("--conversations-per-step", "conversations per optimizer step, over all processes", type=int, default=4)
    add("--learning-rate", "peak learning rate of AdamW; cosine decay to zero", type=float, default=1e-4)
    add("--warmup", "share of the steps over which the learning rate rises", type=float, default=0.1)
    add("--weight-decay", "weight decay of AdamW", type=float, default=0.1)
    add("--max-grad-norm", "gradients are clipped to this norm", type=float, default=1.0)
    add("--lora-rank", "rank of the LoRA matrices", type=int, default=16)
    add("--lora-alpha", "LoRA scale: updates are multiplied by alpha / rank", type=int, default=64)
    add("--lora-dropout", "dropout before the LoRA matrices", type=float, default=0.05)
    add("--loss-on", "which tokens carry loss; the published run used all", choices=["model-turns", "all"], default="model-turns")
    add("--max-length", "longer conversations are dropped, tokens", type=int, default=4096)
    add("--validation-size", "share of the conversations held out for validation", type=float, default=0.2)
    add("--seed", "seed of the validation split, the LoRA matrices, the order and the dropout", type=int, default=42)
    # Hardware
    add("--dtype", "what the base model is held and multiplied in (default: bfloat16 on CUDA GPUs that multiply in it and CPUs with "
        "AVX512-BF16, else float32)", choices=DTYPES)
    add("--batch-size", "conversations a device holds at once; must divide those of a step (default: on one CUDA GPU, as many as make at most "
        "--max-length tokens and fit into memory; on several, its share of a step; 1 elsewhere)", type=int)
    add("--activation-checkpointing", "recompute activations: slower, less memory (default: only where memory is short)",
        action="store_true")
    add("--load-in-4bit", "QLoRA: hold the base model in 4 bits (nf4); needs CUDA", action="store_true")
    # Short runs, going on, and what to do with the result
    add("--limit", "use only the first N conversations", type=int)
    add("--max-steps", "train N optimizer steps, in place of --epochs", type=int)
    add("--resume", "go on from the last checkpoint of the same run", action="store_true")
    add("--overwrite", "replace an earlier result or unfinished run", action="store_true")
    add("--merge", "also write the merged model to <output dir>-merged, in fp32", action="store_true")
    add("--push-to-hub", "upload the adapter to this hub repository, made private if it is new", metavar="REPO")
    add("--report-to", "experiment tracker to log to", choices=["none", "tensorboard", "trackio", "wandb"], default="none")
    args = parser.parse_args(argv)

    positive = ["epochs", "conversations_per_step", "learning_rate", "max_grad_norm", "lora_rank", "lora_alpha", "max_length",
                "batch_size", "limit", "max_steps"]
    for name in positive:
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be greater than 0 and finite, not {getattr(args, name)}")
    for name in ["warmup", "lora_dropout"]:
        if not 0 <= getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must lie in [0, 1), not {getattr(args, name)}")
    if not 0 < args.validation_size < 1:
        parser.error(f"--validation-size must lie in (0, 1), not {args.validation_size}")
    if not 0 <= args.weight_decay < math.inf:
        parser.error(f"--weight-decay must not be negative, and finite, not {args.weight_decay}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must lie in [0, 2**32), not {args.seed}")
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# What is read: the base model and the train split


def model_name(model):
    """The last part of a hub id or of a local folder's path, by which results are named."""
    return Path(model).expanduser().resolve().name


def first_line(error):
    """What an exception says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def is_disk_full(error):
    """Whether an exception says that there is no room left: what safetensors and torch.save raise is no OSError."""
    codes = {getattr(error, "errno", None), getattr(error.__cause__, "errno", None)}
    numbers = "|".join(map(str, sorted(DISK_FULL)))
    return bool(codes & DISK_FULL or re.search(rf"os error ({numbers})\b|unexpected pos|PytorchStreamWriter", str(error)))


def find_model(model, revision):
    """Return (folder, commit) of a Gemma 3 text model: a local folder (commit None), or a hub id, which is downloaded."""
    folder, commit = Path(model).expanduser(), None
    if folder.is_dir():
        if revision:
            sys.exit(f"error: --revision {revision}: --model {model} is a local folder, which has no revisions")
    elif not re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        sys.exit(f"error: --model {model}: no such folder, and not a hub id such as {DEFAULT_MODEL}")
    else:
        folder = download_model(model, revision)
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


def download_model(model, revision):
    """Download a model from the hub, or find it in the cache; returns its folder, which is named after the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    be_quiet_about_downloads()
    started = time.time()
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
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


def is_out_of_memory(error):
    """Whether an error of PyTorch says that memory ran out; on a CPU and on Apple's GPUs it is a plain RuntimeError."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or re.search("out of memory|DefaultCPUAllocator", str(error)) is not None


def load_base_model(folder, **options):
    """Load a model from safetensors, with sdpa attention; files that cannot be read end the program with one line."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", use_safetensors=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        sys.exit(f"error: {folder}: the model cannot be loaded: {first_line(error)}")


def sha256_of_file(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def read_conversations(path, limit=None):
    """Yield the messages of each conversation of a split: [{"role", "content"}, ...]; a bad line ends the program."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if limit is not None and number > limit:
                return
            if not line.strip():
                continue
            try:
                messages = json.loads(line)["messages"]
                check_messages(messages)
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                kind = "invalid JSON" if isinstance(error, (json.JSONDecodeError, RecursionError)) else "not a conversation"
                sys.exit(f"error: {path}, line {number}: {kind} ({error}); make it again with prepare_function_calling_dataset.py")
            yield messages


def check_split(path):
    """Return the sha256 of a split; end the program if it is missing or not the one its dataset_info.json describes."""
    if not path.is_file():
        sys.exit(f"error: {path} not found: run prepare_function_calling_dataset.py first, or give --train-file")
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


# ----------------------------------------------------------------------------------------------------------------------
# Tags, tokens and labels


def claim_unused_slots(tokenizer):
    """Return (a tokenizer in which every tag is one token, {tag token id: ids of the pieces its text had before}).

    A tag takes over the name of an <unusedN> slot, so the vocabulary keeps its size and no embedding is resized.
    """
    pieces = {tag: tokenizer.encode(tag, add_special_tokens=False) for tag in TAGS}
    vocabulary = tokenizer.get_vocab()
    slots = sorted((token for token in vocabulary if re.fullmatch(r"<unused\d+>", token)), key=vocabulary.get)
    tokens = tokenizer.get_added_vocab()
    new_tags = [tag for tag in TAGS if tag not in tokens]  # none when an already tuned model is trained further
    if len(slots) < len(new_tags):
        sys.exit(f"error: the tokenizer has {len(slots)} unused slots, {len(new_tags)} are needed: is this a Gemma 3 model?")
    new_name = dict(zip(slots, new_tags))

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path = Path(folder, "tokenizer.json")
        definition = json.loads(path.read_text(encoding="utf-8"))
        for token in definition["added_tokens"]:
            token["content"] = new_name.get(token["content"], token["content"])
        vocab = definition["model"]["vocab"]
        definition["model"]["vocab"] = {new_name.get(token, token): index for token, index in vocab.items()}
        path.write_text(json.dumps(definition, ensure_ascii=False), encoding="utf-8")
        tagged = load_tokenizer(folder)

    tag_ids = {tag: tagged.encode(tag, add_special_tokens=False) for tag in TAGS}
    if len(tagged) != len(tokenizer) or any(len(ids) != 1 for ids in tag_ids.values()):
        sys.exit("error: the tags did not become single tokens of this tokenizer: is this a Gemma 3 model?")
    return tagged, {tag_ids[tag][0]: pieces[tag] for tag in TAGS}


def start_tag_rows(model, tag_pieces):
    """Set each tag's row of the (tied) embedding to the mean of the rows of the pieces its text had before."""
    import torch

    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        means = [embedding[pieces].float().mean(dim=0) for pieces in tag_pieces.values()]
        embedding[list(tag_pieces)] = torch.stack(means).to(embedding.dtype)


def encode_conversation(messages, tokenizer, loss_on="model-turns"):
    """Return (input_ids, labels) of a conversation: one <bos>, Gemma's turns, -100 where no loss is taken.

    With loss_on="model-turns" only what the model says carries a label, each turn's <end_of_turn> included.
    """
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    input_ids = encoded["input_ids"]
    if loss_on == "all":
        return input_ids, list(input_ids)
    return input_ids, [token if said else -100 for token, said in zip(input_ids, encoded["assistant_masks"])]


def build_dataset(train_file, tokenizer, args, show_progress):
    """Tokenize the split into a dataset of input_ids and labels; conversations over --max-length are dropped.

    Returns (dataset, number of conversations dropped for their length).
    """
    import numpy
    from datasets import Dataset
    from tqdm import tqdm

    rows, num_too_long = {"input_ids": [], "labels": []}, 0
    conversations = read_conversations(train_file, args.limit)
    for messages in tqdm(conversations, desc="Tokenizing", unit=" conversations", disable=None if show_progress else True):
        input_ids, labels = encode_conversation(messages, tokenizer, args.loss_on)
        if len(input_ids) > args.max_length:
            num_too_long += 1
            continue
        rows["input_ids"].append(numpy.array(input_ids, dtype=numpy.int32))
        rows["labels"].append(numpy.array(labels, dtype=numpy.int32))
    if len(rows["input_ids"]) < 2:
        sys.exit(f"error: {train_file}: {len(rows['input_ids'])} conversations of at most --max-length {args.max_length} tokens "
                 f"({num_too_long} are longer); at least one to train on and one to validate with are needed")
    return Dataset.from_dict(rows), num_too_long


def hold_out_validation(dataset, args):
    """Split off the seeded validation share; returns (training split, validation split).

    What the training split holds over whole steps goes to validation too: every step then has its full number of
    conversations, and several processes see in each step what one would.
    """
    from datasets import concatenate_datasets

    try:
        split = dataset.train_test_split(test_size=args.validation_size, seed=args.seed)
    except ValueError:
        sys.exit(f"error: {len(dataset)} conversations cannot be split with --validation-size {args.validation_size}: at least one to "
                 "train on and one to validate with are needed")
    training, validation = split["train"], split["test"]
    num_rest = len(training) % args.conversations_per_step
    num_whole = len(training) - num_rest
    if not num_rest or not num_whole:
        return training, validation
    rest = training.select(range(num_whole, len(training)))
    return training.select(range(num_whole)), concatenate_datasets([validation, rest])


# ----------------------------------------------------------------------------------------------------------------------
# Training


def choose_device(dtype=None):
    """Return (device name, torch dtype of the base model): `dtype` if it is one of DTYPES, or what suits the hardware."""
    import torch

    if torch.cuda.is_available():
        if int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count():
            sys.exit(f"error: torchrun started more processes than there are GPUs ({torch.cuda.device_count()}): give a smaller "
                     "--nproc_per_node")
        device, has_bf16 = "cuda", torch.cuda.is_bf16_supported(including_emulation=False)
    elif torch.backends.mps.is_available():
        device, has_bf16 = "mps", False
    else:
        device, has_bf16 = "cpu", torch.cpu.get_capabilities().get("avx512_bf16", False)
    return device, getattr(torch, dtype if dtype in DTYPES else "bfloat16" if has_bf16 else "float32")


def replace_embedding_and_head(model):
    """Give the model an embedding and a scoring head that make no other tensor of the size of Gemma's vocabulary.

    `model` is the base model inside the adapter, as SFTTrainer has patched it. PEFT copies all 262,144 rows in each pass to change
    eight of them, autograd makes a gradient for every one, and off CUDA TRL scores all positions. Here the tags' rows are put in
    beside the frozen embedding, and the head works through the labelled positions in chunks: with softmax p over the rows w of
    the head, the slope of log p(target) is the sum over v of ([v = target] - p(v)) w(v), so the backward pass needs no logits.
    The call still passes through the model's forward, so data-parallel training sees it; loss and gradients are those of TRL.
    """
    import torch
    from trl.trainer.utils import FusedCausalLMOutput

    chunk_size = 128  # positions; their fp32 logits over Gemma's vocabulary are 134 MB, and in bf16 half as much again
    token_adapter = model.get_input_embeddings().token_adapter
    embedding = token_adapter.base_layer  # tied: its weight is the head's
    tag_ids = torch.tensor(token_adapter.token_indices["default"])
    logits_buffer = narrow_buffer = torch.empty(0)

    class LabelLogProbs(torch.autograd.Function):
        """log p(target), and whether target is the likeliest token, for hidden states of shape [positions, hidden size]."""

        @staticmethod
        def forward(ctx, hidden, tag_rows, weight, tags, targets):
            nonlocal logits_buffer, narrow_buffer
            if narrow_buffer.device != hidden.device or not len(narrow_buffer):  # made once: fresh memory is slow
                logits_buffer = torch.empty(chunk_size, len(weight), device=hidden.device)
                narrow_buffer = logits_buffer if weight.dtype == torch.float32 else torch.empty_like(logits_buffer, dtype=weight.dtype)
            tag_changes = tag_rows - weight[tags]
            log_probs, is_top1, slopes, tag_slopes = [], [], [], []
            for states, target in zip(hidden.split(chunk_size), targets.split(chunk_size)):
                logits, narrow = logits_buffer[:len(states)], narrow_buffer[:len(states)]
                torch.mm(states, weight.T, out=narrow)
                logits.copy_(narrow)  # in fp32 both are one
                logits[:, tags] = (states @ tag_rows.T).float()
                target_logit, highest = logits.gather(1, target[:, None]), logits.amax(1, keepdim=True)
                probs = logits.sub_(highest).exp_()
                normalizer = probs.sum(1, keepdim=True)
                log_probs.append((target_logit - highest - normalizer.log())[:, 0])
                is_top1.append((target_logit == highest)[:, 0])
                if ctx.needs_input_grad[0]:
                    logit_slopes = probs.div_(normalizer).neg_()
                    # Before any rounding: bf16 cannot tell 1 - p of a likely token from 0.
                    logit_slopes[torch.arange(len(target), device=target.device), target] += 1
                    logit_slopes = narrow.copy_(logit_slopes)
                    tag_slopes.append(logit_slopes[:, tags])
                    slopes.append(logit_slopes @ weight + tag_slopes[-1] @ tag_changes)
            if ctx.needs_input_grad[0]:
                ctx.save_for_backward(hidden, torch.cat(slopes), torch.cat(tag_slopes))
            is_top1 = torch.cat(is_top1)
            ctx.mark_non_differentiable(is_top1)
            return torch.cat(log_probs), is_top1

        @staticmethod
        def backward(ctx, gradient, _):
            hidden, slopes, tag_slopes = ctx.saved_tensors
            gradient = gradient[:, None].to(hidden.dtype)
            return gradient * slopes, (gradient * tag_slopes).T @ hidden, None, None, None

    def tag_rows():
        return token_adapter.trainable_tokens_delta["default"].to(embedding.weight.dtype)

    def embed(input_ids):
        is_tag = input_ids[..., None] == tag_ids.to(input_ids.device)
        rows = is_tag.to(embedding.weight.dtype) @ tag_rows() * embedding.embed_scale.to(embedding.weight.dtype)
        return torch.where(is_tag.any(-1, keepdim=True), rows, embedding(input_ids))

    trl_forward = model.forward

    def forward(*inputs, fused_lm_head=False, labels=None, **options):
        if not fused_lm_head:
            return trl_forward(*inputs, labels=labels, **options)
        hidden = model.model(*inputs, **{**options, "use_cache": False}).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        mask = targets != -100
        scored = LabelLogProbs.apply(
            hidden[mask].to(embedding.weight.dtype), tag_rows(), embedding.weight, tag_ids.to(hidden.device), targets[mask]
        )
        log_probs, is_top1 = (values.new_zeros(mask.shape).masked_scatter(mask, values) for values in scored)
        return FusedCausalLMOutput(log_probs=log_probs, entropy=torch.zeros_like(log_probs), is_top1=is_top1, label_mask=mask)

    token_adapter.forward = embed
    model.forward = forward


def replace_projections_and_norms(model):
    """Give LoRA's projections, the MLPs and the norms of a model forward passes that keep less for the backward pass.

    PEFT brings the input of each projection to LoRA's fp32, drops some of it there and brings it back; autograd keeps every step of
    that, and of the norms. Here a projection W x + scaling B A (x * kept) keeps its input, which its neighbours share, and the seed of
    what dropout keeps; the one that leaves an MLP keeps the outputs of the two before it in place of its own input; a norm keeps its
    input. Beside these, what is as small as LoRA's rank is kept, and all else is computed again. Losses and gradients are the
    libraries', but for rounding and for which numbers are dropped.
    """
    import torch
    from peft.tuners.lora import Linear as LoraLinear
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm

    def in_parts(states):
        """Slices of the rows of `states`. A CPU works through few at a time: what it needs for a moment only stays in its cache, and
        tears no holes of the size of activations into the heap. A GPU takes all at once."""
        size = max(1, NUMBERS_AT_ONCE // states.shape[1] if states.device.type == "cpu" else len(states))
        return [slice(start, start + size) for start in range(0, len(states), size)]

    def draw_kept(states, dropout, generator):
        """1 where dropout keeps a number of `states`, else 0, as int8, which multiplies faster than bool."""
        if states.device.type != "cpu":
            return (torch.rand(states.shape, device=states.device, generator=generator) >= dropout).to(torch.int8)
        # A CPU draws one number after the other, which took a seventh of a step: one of 64 bits is drawn for four. Gemma's widths
        # are multiples of four.
        drawn = torch.empty(states.numel() // 4, dtype=torch.int64).random_(-2**63, None, generator=generator).view(torch.int16)
        kept = torch.empty(states.shape, dtype=torch.int8)
        return torch.ge(drawn.view(states.shape), round(dropout * 2**16) - 2**15, out=kept)

    class Projection(torch.autograd.Function):
        """W x + scaling B A (x * kept) for x of shape [tokens, inputs]; x is `up`, or act_fn(gate) * up where a gate is given.

        What is kept is drawn from `seed`, forward and backward alike.
        """

        @staticmethod
        def forward(ctx, up, gate, act_fn, weight, lora_a, lora_b, scaling, dropout, seed):
            generator = torch.Generator(up.device).manual_seed(seed)
            low_rank, projected = up.new_empty(len(up), len(lora_a)), up.new_empty(len(up), len(weight))
            for part in in_parts(up):
                states = up[part] if gate is None else act_fn(gate[part]) * up[part]
                kept_states = states * draw_kept(states, dropout, generator) if dropout else states
                torch.mm(kept_states, lora_a.T, out=low_rank[part])
                torch.mm(states, weight.T, out=projected[part]).addmm_(low_rank[part], lora_b.T, alpha=scaling)
            ctx.save_for_backward(up, gate, weight, lora_a, lora_b, low_rank)
            ctx.act_fn, ctx.scaling, ctx.dropout, ctx.seed = act_fn, scaling, dropout, seed
            return projected

        @staticmethod
        def backward(ctx, gradient):
            up, gate, weight, lora_a, lora_b, low_rank = ctx.saved_tensors
            generator = torch.Generator(up.device).manual_seed(ctx.seed)
            slope, gate_slope = torch.empty_like(up), None if gate is None else torch.empty_like(gate)
            low_rank_slope = gradient @ lora_b * ctx.scaling
            lora_b_slope = gradient.T @ low_rank * ctx.scaling
            lora_a_slope = torch.zeros(lora_a.shape, device=up.device)  # fp32, whatever the parts are in
            for part in in_parts(up):
                states = up[part]
                if gate is not None:
                    with torch.enable_grad():
                        gate_part = gate[part].detach().requires_grad_()
                        activated = ctx.act_fn(gate_part)
                    states = activated.detach() * up[part]
                through_lora = low_rank_slope[part] @ lora_a
                if ctx.dropout:
                    kept = draw_kept(states, ctx.dropout, generator)
                    states = states * kept
                    through_lora *= kept
                lora_a_slope += low_rank_slope[part].T @ states
                part_slope = torch.mm(gradient[part], weight, out=slope[part]).add_(through_lora)
                if gate is not None:
                    gate_slope[part], = torch.autograd.grad(activated, gate_part, part_slope * up[part])
                    part_slope *= activated.detach()
            return slope, gate_slope, None, None, lora_a_slope.to(lora_a.dtype), lora_b_slope, None, None, None

    class Norm(torch.autograd.Function):
        """Gemma's RMS norm: x / sqrt(mean(x^2) + eps) * scale in fp32, for x of any shape and scale of its last dimension."""

        @staticmethod
        def forward(ctx, states, scale, eps):
            inverse = states.float().square().mean(-1, keepdim=True).add_(eps).rsqrt_()
            ctx.save_for_backward(states, scale, inverse)
            return (states.float() * inverse).mul_(scale).to(states.dtype)

        @staticmethod
        def backward(ctx, gradient):
            states, scale, inverse = ctx.saved_tensors
            normed, normed_slope = states.float() * inverse, gradient.float() * scale
            slope = normed_slope - normed * (normed_slope * normed).mean(-1, keepdim=True)
            return slope.mul_(inverse).to(states.dtype), None, None

    def project(module, states, gate=None, act_fn=None):
        weight = module.base_layer.weight
        num_outputs, num_inputs = weight.shape
        lora_a, lora_b = (adapter["default"].weight.to(weight.dtype) for adapter in (module.lora_A, module.lora_B))
        dropout = getattr(module.lora_dropout["default"], "p", 0.0) if module.training else 0.0
        up = states.to(weight.dtype).reshape(-1, num_inputs)
        if gate is not None:
            gate = gate.reshape(-1, num_inputs)
        # Processes draw alike, so each adds its rank; recomputing activations draws the same again.
        seed = torch.randint(2**32, ()).item() + int(os.environ.get("RANK", 0)) if dropout else 0
        with torch.autocast(states.device.type, enabled=False):  # all has the dtype of the weight already
            projected = Projection.apply(
                up, gate, act_fn, weight, lora_a, lora_b, module.scaling["default"] / (1 - dropout), dropout, seed
            )
        return projected.view(*states.shape[:-1], num_outputs)

    def is_plain(module):  # PEFT's for weights in 4 bits is another class, and stays
        return type(module) is LoraLinear and module.base_layer.bias is None

    for module in model.modules():
        if isinstance(module, Gemma3RMSNorm):
            module.forward = lambda states, norm=module: Norm.apply(states, 1.0 + norm.weight.float(), norm.eps)
        elif is_plain(module):
            module.forward = functools.partial(project, module)
        elif isinstance(module, Gemma3MLP) and is_plain(module.down_proj):
            module.forward = lambda states, mlp=module: mlp.down_proj(mlp.up_proj(states), mlp.gate_proj(states), mlp.act_fn)


def lora_config(args, tag_ids):
    """LoRA on the seven projections and the trainable rows of the tags; none on embeddings or head."""
    from peft import LoraConfig

    return LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=LORA_TARGETS,
        trainable_token_indices=tag_ids,
        task_type="CAUSAL_LM",
    )


def activation_bytes_per_token(model):
    """About what a token's activations take in training, in bytes.

    Fitted to runs on a CPU over conversations of mixed lengths, in bf16 and fp32, at the shapes of 270M and 1B, with what its
    heap loses to gaps; not measured on a GPU. A model in 4 bits takes more.
    """
    config = model.config
    numbers = 2 * config.intermediate_size + 2 * config.hidden_size + 12 * config.num_attention_heads * config.head_dim
    return config.num_hidden_layers * (model.dtype.itemsize + 1) * numbers


def memory_use(trainer):
    """What a run tells of how it uses memory, in training_run.json and, once several processes ran out of it, in memory.json."""
    return {"conversations_at_once": trainer.conversations_at_once,
            "activations": "recomputed" if trainer.recomputes_activations else "kept"}


def describe_memory_use(trainer):
    number, activations = memory_use(trainer).values()
    conversations = "1 conversation" if number == 1 else f"up to {number} conversations"
    return f"{conversations} at once, their activations {activations}"


def cut_into_parts(lengths, most_rows, most_tokens):
    """Share out rows of the given `lengths`, in tokens, to parts: lists of row numbers, the longest rows first.

    A part holds at most `most_rows` rows, which make at most `most_tokens` tokens when they are padded to the longest of them; at
    least one row.
    """
    parts = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if parts and len(parts[-1]) < most_rows and (len(parts[-1]) + 1) * lengths[parts[-1][0]] <= most_tokens:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def build_trainer(model, tokenizer, tag_ids, training, validation, args, device, dtype, checkpoint_dir, num_processes=1):
    """Put LoRA and the trainable tag rows on the model and build the SFTTrainer of the recipe."""
    import psutil
    import torch
    from accelerate.utils.memory import clear_device_cache
    from tqdm import tqdm
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback, ProgressCallback
    from trl import SFTConfig, SFTTrainer

    # On a CPU more than one conversation at once would only add padding. A GPU takes those of a step as far as they make no more tokens
    # than one conversation may have, which bounds the memory they take. Whether it is there is reckoned beforehand, since a process
    # on a CPU that runs out is killed; a GPU takes less once it runs out. Several GPUs must cut their batches alike, whatever the
    # lengths and the memory of each: they begin with whole ones.
    share_of_step = args.conversations_per_step // num_processes
    noted = recorded(checkpoint_dir / "memory.json", "conversations_at_once") if args.resume else None
    if type(noted) is int and noted > 0:  # what several processes ran out of memory with is not tried again
        most = min(noted, args.batch_size or noted)
        batch_size = max(number for number in range(1, most + 1) if share_of_step % number == 0)
        recomputes = recorded(checkpoint_dir / "memory.json", "activations") == "recomputed"
    else:
        batch_size, recomputes = args.batch_size or (share_of_step if device == "cuda" else 1), False
    longest = max(map(len, training["input_ids"]))
    if device != "cuda":
        tokens_that_fit = psutil.virtual_memory().available / num_processes // activation_bytes_per_token(model)
    elif num_processes == 1:
        to_come = model.get_memory_footprint() if model.device.type == "cpu" else 0  # the trainer brings the model there
        tokens_that_fit = (torch.cuda.mem_get_info()[0] - to_come) // activation_bytes_per_token(model)
    else:
        tokens_that_fit = math.inf
    if args.batch_size or num_processes > 1:
        most_tokens = batch_size * longest
    else:
        most_tokens = max(longest, min(args.max_length, tokens_that_fit))
    activation_checkpointing = args.activation_checkpointing or recomputes or most_tokens > tokens_that_fit
    labels_per_row = sum(label != -100 for row in validation["labels"] for label in row[1:]) / len(validation)

    class Trainer(SFTTrainer):
        """SFTTrainer that makes do with the memory there is, and whose validation loss is the mean over labelled tokens.

        Neither depends on how the conversations are batched and shared out to processes.
        """

        conversations_at_once, tokens_at_once = batch_size, most_tokens
        recomputes_activations = activation_checkpointing

        def training_step(self, model, inputs, num_items_in_batch=None):
            step = super().training_step
            return self.sum_over_parts(inputs, lambda part: step(model, part, num_items_in_batch))

        def prediction_step(self, model, inputs, *arguments, **options):
            step, num_rows = super().prediction_step, len(inputs["labels"])

            def share_of_the_mean(part):  # the library averages over rows what is here a row's share in the mean over tokens
                num_labels = (part["labels"][:, 1:] != -100).sum().item()
                return step(model, part, *arguments, **options)[0] * num_labels / (num_rows * labels_per_row)

            return self.sum_over_parts(inputs, share_of_the_mean), None, None

        def sum_over_parts(self, inputs, compute):
            """The sum of compute(part) over the parts that `inputs` must be cut into; smaller ones after running out of memory.

            Rows of like length stand in one part. What was too much once is not tried again in this run.
            """
            lengths = inputs["attention_mask"].sum(1).tolist()
            may_try_again = num_processes == 1  # of several, the others would wait for this one: they go on together with --resume
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad] if may_try_again else []
            before = [None if parameter.grad is None else parameter.grad.clone() for parameter in trained]
            while True:
                try:
                    total = 0.0
                    for rows in cut_into_parts(lengths, self.conversations_at_once, self.tokens_at_once):
                        num_tried = len(rows)
                        total += compute({name: values[rows, :lengths[rows[0]]] for name, values in inputs.items()})
                    return total
                except RuntimeError as error:
                    if not (is_out_of_memory(error) and may_try_again and self.needs_less_memory(num_tried)):
                        raise
                    tqdm.write(f"note: out of memory; going on with {describe_memory_use(self)}")
                for parameter, gradient in zip(trained, before):  # what a part left behind is not counted twice
                    parameter.grad = None if gradient is None else gradient.clone()
                clear_device_cache()

        def needs_less_memory(self, num_tried):
            """Take the next measure after `num_tried` conversations were too much at once; returns whether there was one."""
            if num_tried > 1:
                self.conversations_at_once = num_tried // 2
            elif not self.recomputes_activations:
                self.recomputes_activations = True
                self.model.get_base_model().activation_checkpointing_enable()
            else:
                return False
            return True

        def compute_loss(self, *inputs, **options):
            loss = super().compute_loss(*inputs, **options)
            self._metrics["train" if self.model.training else "eval"].pop("entropy", None)  # not computed here
            return loss

    class RunProgress(TrainerCallback):
        """A progress bar (lines, where no terminal is watching); notes the time spent, and stops a run whose loss is no number."""

        def __init__(self):
            self.bar, self.losses, self.start, self.seconds_before, self.num_validated = None, {}, time.monotonic(), 0.0, 0

        def on_train_begin(self, args, state, control, **kwargs):
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="Training", unit=" steps", dynamic_ncols=True,
                            disable=None if state.is_world_process_zero else True)
            self.start = time.monotonic()
            # A resumed run goes on counting from where its checkpoint stood.
            self.seconds_before = state.log_history[-1]["elapsed_seconds"] if state.log_history else 0.0

        def on_step_end(self, args, state, control, **kwargs):
            self.bar.update()

        def on_prediction_step(self, args, state, control, **kwargs):
            self.num_validated += 1
            if self.bar is not None:
                self.bar.set_postfix({**self.losses, "validating": self.num_validated})

        def on_save(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                sync_files(Path(args.output_dir) / f"checkpoint-{state.global_step}")

        def on_log(self, args, state, control, logs=None, **kwargs):
            entry = state.log_history[-1]
            entry["elapsed_seconds"] = self.seconds_before + time.monotonic() - self.start
            self.num_validated = 0
            for key, label in (("loss", "loss"), ("eval_loss", "validation loss")):
                if key not in entry:
                    continue
                if not math.isfinite(entry[key]):
                    good = find_checkpoints(Path(args.output_dir))
                    sys.exit(f"error: the {label} became {entry[key]} by step {state.global_step}; the last good checkpoint is "
                             f"{good[-1] if good else 'none'}; start anew with --overwrite and a lower --learning-rate")
                self.losses[label] = f"{entry[key]:.4f}"
                if self.bar is not None:
                    self.bar.set_postfix(self.losses)
                    if self.bar.disable and state.is_world_process_zero:
                        print(f"step {state.global_step:,} of {state.max_steps:,}: {label} {entry[key]:.4f}, "
                              f"{entry['elapsed_seconds']:,.0f} s", flush=True)

        def close(self):
            if self.bar is not None:
                self.bar.close()

    steps_per_epoch = math.ceil(len(training) / args.conversations_per_step)
    num_steps = args.max_steps or math.ceil(steps_per_epoch * args.epochs)
    validation_steps = max(1, math.ceil(num_steps / VALIDATIONS_PER_RUN))

    config = SFTConfig(
        output_dir=str(checkpoint_dir),
        # Recipe
        num_train_epochs=args.epochs,
        max_steps=args.max_steps or -1,
        per_device_train_batch_size=batch_size,
        # Several processes pad the last batch with rows of the first, which the library then tells apart in batches of one only.
        per_device_eval_batch_size=batch_size if num_processes == 1 else 1,
        gradient_accumulation_steps=args.conversations_per_step // (batch_size * num_processes),
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.warmup,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        optim="adamw_torch_fused",
        max_length=None,  # longer rows are already dropped; nothing is ever cut
        seed=args.seed,
        # Hardware
        use_cpu=device == "cpu",
        bf16=dtype == torch.bfloat16,
        fp16=False,
        activation_checkpointing=activation_checkpointing,
        dataloader_pin_memory=device == "cuda",
        ddp_find_unused_parameters=False,  # every trained parameter has a part in every loss
        # Validation and checkpoints
        eval_strategy="steps",
        eval_steps=validation_steps,
        save_strategy="steps",
        save_steps=validation_steps,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        # Reporting
        logging_steps=max(1, num_steps // 100),
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        include_num_input_tokens_seen="non_padding",
        report_to=args.report_to,
    )
    trainer = Trainer(
        model=model,
        args=config,
        train_dataset=training,
        eval_dataset=validation,
        processing_class=tokenizer,
        peft_config=lora_config(args, tag_ids),
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            # TRL makes the adapter of a 4-bit model bf16, in which the recipe's small updates would be rounded away.
            parameter.data = parameter.data.float()
    # TRL reads lm_head.bias, which PEFT's wrapper around the tied head does not pass on.
    trainer.model.get_output_embeddings().bias = None
    replace_embedding_and_head(trainer.model.get_base_model())
    replace_projections_and_norms(trainer.model)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.progress = RunProgress()
    trainer.add_callback(trainer.progress)
    return trainer


def all_checkpoints(checkpoint_dir):
    return [folder for folder in checkpoint_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]


def find_checkpoints(checkpoint_dir):
    """The whole checkpoints in a folder, oldest first; one that a kill, a power cut or a full disk cut short is not among them."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers.trainer_pt_utils import safe_globals

    found = []
    for folder in all_checkpoints(checkpoint_dir):
        try:
            state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            load_file(folder / "adapter_model.safetensors")
            random_states = list(folder.glob("rng_state*.pth"))
            optimizer = "optimizer.bin" if (folder / "optimizer.bin").exists() else "optimizer.pt"  # .bin where the model is sharded
            with safe_globals():
                for path in (folder / optimizer, folder / "scheduler.pt", *(random_states or [folder / "rng_state.pth"])):
                    torch.load(path, map_location="cpu", weights_only=True)
            found.append((int(state["global_step"]), folder))
        except (FileNotFoundError, ValueError, KeyError, TypeError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError):
            continue
        except OSError as error:
            if error.errno != errno.EINVAL:  # which torch makes of some torn files; a disk that fails is another matter
                raise
    return [folder for _, folder in sorted(found)]


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


def describe_run(args, commit, weights_sha256, split_sha256, dtype):
    """All that the result of a run depends on, as it stands in run.json and, with more, in training_run.json."""
    return {
        "model_name": model_name(args.model),
        "commit": commit,
        "weights_sha256": weights_sha256,
        "train_split_sha256": split_sha256,
        "dtype": str(dtype).removeprefix("torch."),
        "chat_template_sha256": hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest(),
        "arguments": {key: value for key, value in vars(args).items() if key not in FREE_ARGUMENTS},
    }


def refuse_other_run(path, description):
    """End the program if the run described in the JSON file `path` is not the one of `description`."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        before = {**earlier["arguments"], **earlier}  # dtype stands in both: what was asked for, and what was used
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        sys.exit(f"error: {path} cannot be read: --overwrite starts anew")
    now = {**description, **description["arguments"]}
    changes = [f"{key} was {before.get(key)}, is {value}" for key, value in now.items()
               if key != "arguments" and before.get(key) != value]
    if changes:
        sys.exit(f"error: {path.parent} belongs to another run ({', '.join(changes)}): repeat its arguments, or --overwrite it")


def check_files(output_dir):
    """End the program if a file of a finished adapter is not as the training left it."""
    sha256_of = recorded(output_dir / "training_run.json", "files_sha256")
    if not isinstance(sha256_of, dict):
        sys.exit(f"error: {output_dir / 'training_run.json'} is not as training left it: restore it, or train again with --overwrite")
    for name, sha256 in sha256_of.items():
        if not (output_dir / name).is_file() or sha256_of_file(output_dir / name) != sha256:
            sys.exit(f"error: {output_dir / name} is not as training left it: restore it, or train again with --overwrite")


def open_checkpoint_dir(checkpoint_dir, description, resume):
    """Make the checkpoint folder ready for this run; return the checkpoint to go on from, or None.

    While a run is unfinished, its folder holds its description as run.json.
    """
    if resume and (checkpoint_dir / "run.json").is_file():
        refuse_other_run(checkpoint_dir / "run.json", description)
        whole = find_checkpoints(checkpoint_dir)
        for folder in set(all_checkpoints(checkpoint_dir)) - set(whole):
            print(f"note: {folder} is not whole and is passed over; it is kept as damaged-{folder.name}")
            shutil.rmtree(folder.with_name(f"damaged-{folder.name}"), ignore_errors=True)
            folder.rename(folder.with_name(f"damaged-{folder.name}"))
        if not whole:
            return None
        # The library notes the best checkpoint by its path, which may have been given from another working directory. If it is
        # no more, the best of those that are takes its place.
        state_path = whole[-1] / "trainer_state.json"
        state = json.loads(state_path.read_text(encoding="utf-8"))
        losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
        step_of = {folder: int(folder.name.removeprefix("checkpoint-")) for folder in whole}
        best = checkpoint_dir / Path(state.get("best_model_checkpoint") or "").name
        if best not in whole:
            best = min((folder for folder in whole if step_of[folder] in losses), key=lambda folder: losses[step_of[folder]])
        write_json(state_path, {**state, "best_model_checkpoint": str(best), "best_global_step": step_of[best],
                                "best_metric": losses[step_of[best]]})
        return whole[-1]
    for path in checkpoint_dir.iterdir():  # the folder itself stays, and with it the lock on it
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    write_json(checkpoint_dir / "run.json", description)
    return None


# ----------------------------------------------------------------------------------------------------------------------
# What is written


def write_json(path, content):
    """Write a JSON file whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def sync_files(folder):
    """Bring the files of a folder onto the disk, where a power cut cannot take them back."""
    for path in folder.iterdir():
        with open(path, "r+b") as file:
            os.fsync(file.fileno())


@contextlib.contextmanager
def new_folder(path):
    """A folder to fill, which takes the place of `path` once it is complete."""
    unfinished, old = (path.with_name(f".{path.name}.{state}") for state in ("unfinished", "old"))
    for leftover in (unfinished, old):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        sync_files(unfinished)
        if path.exists():
            os.replace(path, old)
        os.replace(unfinished, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def plot_losses(log_history, path, title):
    """Draw the training and the validation loss over the optimizer steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    training = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    validation = [(entry["step"], entry["eval_loss"]) for entry in log_history if "eval_loss" in entry]
    best = min(validation, key=lambda point: point[1])
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*training), color="#0072B2", marker="." if len(training) < 30 else None, label="training")
    axes.plot(*zip(*validation), color="#D55E00", marker="o", label="validation")
    axes.plot(*best, color="#D55E00", marker="*", markersize=16, linestyle="", label=f"kept: {best[1]:.3f} at step {best[0]}")
    axes.set(title=title, xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def peak_memory(device):
    """Peak memory of this process in bytes: {"host": ..., "device": ... (GPU only)}."""
    import psutil
    import torch

    if sys.platform == "win32":
        memory = {"host": psutil.Process().memory_info().peak_wset}
    else:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
        memory = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device == "cuda":
        memory["device"] = torch.cuda.max_memory_allocated()
    elif device == "mps":
        memory["device"] = torch.mps.driver_allocated_memory()
    return memory


def model_card(args, commit, training_run):
    """The README.md of the adapter folder, with the metadata the hub reads."""
    revision = f" (revision {commit})" if commit else ""
    base_model = f"base_model: {args.model}\n" if commit else ""  # the hub knows no local folders
    return f"""\
---
{base_model}library_name: peft
license: gemma
pipeline_tag: text-generation
tags: [function-calling, lora, sft, trl]
---

# {default_output_dir(args.model).name}

A LoRA adapter that teaches {model_name(args.model)}{revision} to call functions: `<tool_call>` and the seven other tags are single
tokens of the tokenizer in this folder, and the chat template here is the one it was trained with.

Trained for {training_run["steps"]} steps on {training_run["conversations"]["train"]:,} conversations; validation loss
{training_run["best_validation_loss"]:.4f} at step {training_run["best_step"]}. training_run.json holds the arguments, versions and losses.
"""


def merge_adapter(model_dir, adapter_dir, output_dir):
    """Write base model and adapter as one plain Transformers model, merged and kept in fp32."""
    import torch
    from peft import PeftModel
    from transformers import GenerationConfig

    base = load_base_model(model_dir, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, adapter_dir).merge_and_unload()
    merged.generation_config = GenerationConfig.from_pretrained(adapter_dir)
    with new_folder(output_dir) as folder:
        merged.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(adapter_dir / name, folder)


def gather_adapter(model, dtype):
    """The adapter's weights, {name: tensor in `dtype`}; of a model that is sharded, all processes must ask for them.

    They are trained in fp32, but multiplied in `dtype`: in that, they give what they gave in training.
    """
    return {name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().to(dtype)
            for name, value in model.named_parameters() if value.requires_grad}


def save_adapter(trainer, weights, tokenizer, folder, args, commit):
    """Write the adapter, whose weights gather_adapter gave, the tokenizer with its chat template and the generation config."""
    from transformers import GenerationConfig

    peft_config = trainer.model.peft_config["default"]
    peft_config.base_model_name_or_path, peft_config.revision = args.model, commit
    trainer.model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    end_of_turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, end_of_turn],
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)


def default_output_dir(model):
    """The adapter's folder for a base model; evaluation.py finds it by the same rule."""
    return Path(f"LoRA_{model_name(model)}-function_calling")


def finish(args, output_dir, merged_dir, model_dir):
    """Merge and upload a finished adapter where that was asked for, and say what to run next."""
    if args.merge:
        try:
            merge_adapter(model_dir, output_dir, merged_dir)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            sys.exit(f"error: {output_dir} is complete, but there is not enough memory to merge it: make room, then run the same command "
                     "with --resume (in place of --overwrite)")
        print(f"Merged      {merged_dir}/")
    if args.push_to_hub:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError

        try:
            HfApi().upload_folder(repo_id=args.push_to_hub, folder_path=output_dir, commit_message="Add adapter")
        except (OSError, HTTPError, ValueError) as error:
            sys.exit(f"error: {output_dir} is complete, but was not uploaded ({first_line(error)}): run the same command "
                     "with --resume to try again")
        print(f"Uploaded    https://huggingface.co/{args.push_to_hub}")
    command = ["python", "evaluation.py"]
    if args.model != DEFAULT_MODEL:
        command += ["--model", args.model]
    if output_dir != default_output_dir(args.model):
        command += ["--adapter", str(output_dir)]
    if args.train_file != DEFAULT_TRAIN_FILE:
        command += ["--test-file", str(args.train_file.with_name("function_calling_test.jsonl"))]
    print(f"Next        {shlex.join(command)}")


def recorded(path, key):
    """What a run.json or training_run.json says of a run, or None."""
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        return json.loads(path.read_text(encoding="utf-8")).get(key)


def look_for_runs(output_dir, checkpoint_dir):
    """Whether there is an unfinished run, and whether there is a finished one that no unfinished run is to replace."""
    unfinished = (checkpoint_dir / "run.json").is_file()
    return unfinished, (output_dir / "training_run.json").is_file() and not unfinished


def main(argv=None):
    args = parse_args(argv)
    with contextlib.ExitStack() as held:  # what is locked stays so until the end
        run(args, held)


def run(args, held):
    """Train as `args` say, from the checks to the summary; `held` takes the locks."""
    is_main = int(os.environ.get("RANK", 0)) == 0  # torchrun starts several processes; one of them speaks and writes
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    if num_processes == 1:  # one process trains on one GPU; torchrun gives each of several its own
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    output_dir = args.output_dir or default_output_dir(args.model)
    if output_dir.name in ("", "..") or output_dir.is_symlink():  # such as "."
        output_dir = output_dir.resolve()
    if not output_dir.name:
        sys.exit(f"error: --output-dir {output_dir} cannot be a folder of results")
    checkpoint_dir, merged_dir = (output_dir.with_name(f"{output_dir.name}-{kind}") for kind in ("checkpoints", "merged"))

    # Whatever can be refused is refused before anything heavy is loaded, and before anything is written.
    split_sha256 = check_split(args.train_file)
    if args.conversations_per_step % ((args.batch_size or 1) * num_processes):
        batches, flags = (f" in batches of {args.batch_size}", "--batch-size or ") if args.batch_size else ("", "")
        sys.exit(f"error: {args.conversations_per_step} conversations per step cannot be shared out to {num_processes} process(es)"
                 f"{batches}: change {flags}--conversations-per-step")
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        sys.exit(f"error: --report-to {args.report_to} needs a package that is not installed: pip install {args.report_to}")
    unfinished, finished = look_for_runs(output_dir, checkpoint_dir)
    if is_main and checkpoint_dir.is_dir():
        with sole_process_in(checkpoint_dir):
            pass
    if is_main and not (args.resume or args.overwrite):
        if unfinished:
            sys.exit(f"error: {checkpoint_dir} holds an unfinished run: --resume goes on with it, --overwrite starts anew")
        if finished:
            sys.exit(f"error: {output_dir} holds a finished run: --overwrite replaces it, --resume keeps it, to --merge or upload it")
    for folder, marks in ((output_dir, ["training_run.json"]), (checkpoint_dir, ["*run.json*", "checkpoint-*"]),
                          (merged_dir, ["model*.safetensors"])):
        ours = folder.is_dir() and (not any(folder.iterdir()) or any(any(folder.glob(mark)) for mark in marks))
        if folder.exists() and not ours:
            sys.exit(f"error: {folder} is in the way, and not the work of this script: move it, or choose another --output-dir")
    # A run goes on with what it began with, even if the hub's main branch has moved on and another machine would choose otherwise.
    begun_path = (checkpoint_dir / "run.json" if unfinished else output_dir / "training_run.json") if args.resume else None
    device, dtype = choose_device(args.dtype or (begun_path and recorded(begun_path, "dtype")))
    if args.load_in_4bit and device != "cuda":
        sys.exit(f"error: --load-in-4bit needs a CUDA GPU, this machine has {device}: nf4 training is not reliable elsewhere")
    revision = args.revision
    is_local = Path(args.model).expanduser().is_dir()
    if begun_path and not revision and not is_local:
        revision = recorded(begun_path, "commit")
    model_dir, commit = find_model(args.model, revision)

    # The libraries' advice to their own developers is no news to who runs this.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading weights; training shows its own
    description = describe_run(args, commit, hash_local_weights(model_dir, commit), split_sha256, dtype)
    if finished and args.resume:
        refuse_other_run(output_dir / "training_run.json", description)
        check_files(output_dir)
        if is_main:
            print(f"Finished    {output_dir} is complete; nothing is left to train")
            if args.push_to_hub:
                create_hub_repository(args.push_to_hub)
            finish(args, output_dir, merged_dir, model_dir)
        return

    tokenizer, tag_pieces = claim_unused_slots(load_tokenizer(model_dir))
    tokenizer.chat_template = CHAT_TEMPLATE
    dataset, num_too_long = build_dataset(args.train_file, tokenizer, args, show_progress=is_main)
    training, validation = hold_out_validation(dataset, args)
    if args.push_to_hub and is_main:
        create_hub_repository(args.push_to_hub)
    options = {"dtype": dtype}
    if args.load_in_4bit:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", 0))}
    trainer = None
    try:
        model = load_base_model(model_dir, **options)
        start_tag_rows(model, tag_pieces)
        trainer = build_trainer(
            model, tokenizer, list(tag_pieces), training, validation, args, device, dtype, checkpoint_dir, num_processes
        )
        if is_main:
            held.enter_context(sole_process_in(checkpoint_dir))
            if look_for_runs(output_dir, checkpoint_dir) != (unfinished, finished):
                sys.exit(f"error: {checkpoint_dir}: another process was at work there since this one started: run this again")
            checkpoint = open_checkpoint_dir(checkpoint_dir, description, args.resume)
            print(f"Model       {args.model}" + (f", commit {commit}" if commit else "")
                  + f", {description['dtype']} on {device}")
            print(f"Data        {len(training):,} conversations to train on, {len(validation):,} to validate with; "
                  f"{num_too_long:,} dropped, longer than {args.max_length:,} tokens")
            print(f"Memory      {describe_memory_use(trainer)}")
            if args.resume:
                print(f"Resuming    from {checkpoint.name}" if checkpoint else "Resuming    no checkpoint yet, starting from the beginning")
        trainer.accelerator.wait_for_everyone()
        if not is_main:
            checkpoint = find_checkpoints(checkpoint_dir)[-1:] if args.resume else []
            checkpoint = checkpoint[0] if checkpoint else None
        with contextlib.closing(trainer.progress):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if num_processes > 1 and trainer and trainer.needs_less_memory(trainer.conversations_at_once):
            with contextlib.suppress(FileNotFoundError):  # another process was quicker to write the same
                write_json(checkpoint_dir / "memory.json", memory_use(trainer))
            sys.exit(f"error: out of memory: the same command with --resume (in place of --overwrite) goes on with "
                     f"{describe_memory_use(trainer)}")
        sys.exit("error: out of memory: go on with --resume, --activation-checkpointing and a smaller --batch-size, or start anew "
                 f"with --overwrite and a smaller --max-length{' or --load-in-4bit' if device == 'cuda' else ''}")
    weights = gather_adapter(trainer.model, dtype)
    if not is_main:
        return

    history = trainer.state.log_history
    validations = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    seconds = history[-1]["elapsed_seconds"]
    training_seconds = seconds - sum(entry.get("eval_runtime", 0.0) for entry in history)
    best_step = trainer.state.best_global_step
    training_run = {
        **description,
        "model": args.model,
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "conversations": {
            "train": len(training),
            "validation": len(validation),
            "dropped_over_max_length": num_too_long,
        },
        "steps": trainer.state.global_step,
        "tokens_seen": trainer.state.num_input_tokens_seen,
        "tokens_per_second": round(trainer.state.num_input_tokens_seen / training_seconds, 1),
        "wall_time_seconds": round(seconds, 1),
        "peak_memory_bytes": peak_memory(device),
        "training_losses": {entry["step"]: entry["loss"] for entry in history if "loss" in entry},
        "validation_losses": validations,
        "best_step": best_step,
        "best_validation_loss": validations[best_step],
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        **memory_use(trainer),
        "processes": num_processes,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
        },
    }
    with new_folder(output_dir) as folder:
        save_adapter(trainer, weights, tokenizer, folder, args, commit)
        (folder / "README.md").unlink()  # PEFT's own
        training_run["files_sha256"] = {path.name: sha256_of_file(path) for path in sorted(folder.iterdir())}
        plot_losses(history, folder / "loss.png", f"{model_name(args.model)}: LoRA on function calling")
        (folder / "README.md").write_text(model_card(args, commit, training_run), encoding="utf-8")
        write_json(folder / "training_run.json", training_run)
    os.replace(checkpoint_dir / "run.json", checkpoint_dir / "finished_run.json")

    print(f"Trained     {training_run['steps']:,} steps, {training_run['tokens_seen']:,} tokens in {seconds:,.0f} s "
          f"({training_run['tokens_per_second']:,.0f} tokens/s besides validation)")
    print(f"Loss        validation {training_run['best_validation_loss']:.4f} at step {best_step}, the checkpoint kept")
    size = (output_dir / "adapter_model.safetensors").stat().st_size
    print(f"Adapter     {output_dir}/ ({size / 1e6:.1f} MB of weights; loss.png shows the losses)")
    finish(args, output_dir, merged_dir, model_dir)


def create_hub_repository(repo):
    """Make sure that the adapter can be uploaded, before hours are spent on training it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        HfApi().create_repo(repo, private=True, exist_ok=True)
    except (OSError, HTTPError, ValueError) as error:
        sys.exit(f"error: --push-to-hub {repo}: {first_line(error)}: run `hf auth login` with a token that may write")


def exit_cleanly(main):
    """Run `main`; an interruption or a failing disk ends in one line and an exit code instead of a traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # whatever the terminal cannot show
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command with --resume (in place of --overwrite) to go on from the last checkpoint",
              file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be flushed has no reader either
        sys.exit("error: standard output was closed: run the same command with --resume (in place of --overwrite) to go on from the "
                 "last checkpoint")
    except Exception as error:
        if is_disk_full(error):
            sys.exit(f"error: a file could not be written ({first_line(error)}): make room on the disk, then run the same "
                     "command with --resume (in place of --overwrite)")
        if not isinstance(error, OSError):
            raise
        sys.exit(f"error: {first_line(error)}")


if __name__ == "__main__":
    exit_cleanly(main)
