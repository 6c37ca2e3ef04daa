"""Fine-tune Gemma 3 to call functions, with LoRA, on the splits of step 1 (step 2 of 3).

    python function_calling_train.py                                # gemma-3-1b-it, as published
    python function_calling_train.py --model google/gemma-3-270m-it
    torchrun --nproc_per_node 2 function_calling_train.py           # two GPUs

Reads the train split and, in dataset_info.json beside it, how its prompt is worded. Writes into
LoRA_<model name>-function_calling/ the adapter, the base model's tokenizer with the chat template
of the training, training_run.json and loss.png. Until then, checkpoints lie in a folder beside it.
"""

import argparse
import hashlib
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

DEFAULT_MODEL = "google/gemma-3-1b-it"
DEFAULT_TRAIN_FILE = Path("processed_data/function_calling_train.jsonl")
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The arguments that a result depends on; a run that is resumed must have the same.
RECIPE = """epochs conversations_per_step learning_rate lora_rank lora_alpha lora_dropout loss_on
max_length validation_size seed load_in_4bit max_steps""".split()

# Gemma's turns. A server sends OpenAI-style messages, and this renders them as step 1 does: tools
# in the first user turn, calls and results as tagged blocks, neighboring messages of a role as one
# turn. JSON has a macro, since the tojson filter differs between template engines. make_templates
# fills in the names in capitals.
CHAT_TEMPLATE = r"""
{%- macro plain(text) -%}
    {%- set written = namespace(text=text | trim) -%}
    {%- for token, broken_up in CONTROL_TOKENS -%}
        {%- set written.text = written.text | replace(token, broken_up) -%}
    {%- endfor -%}
    {{- written.text -}}
{%- endmacro -%}

{%- macro json_of(value) -%}
    {%- if value is string -%}
        {{- '"' + value | replace('\\', '\\\\') | replace('"', '\\"') + '"' -}}
    {%- elif value is iterable -%}
        {{- '{' if value is mapping else '[' -}}
        {%- for item in value if value is not mapping or value[item] is not none -%}
            {{- ('' if loop.first else ', ') + json_of(item) -}}
            {{- ': ' + json_of(value[item]) if value is mapping else '' -}}
        {%- endfor -%}
        {{- '}' if value is mapping else ']' -}}
    {%- else -%}
        {{- 'null' if value is none else value | string | lower -}}
    {%- endif -%}
{%- endmacro -%}

{#- Some engines cannot write a character by its number, and then keep control characters. #}
{%- macro json(value) -%}
    {%- set written = namespace(text=json_of(value) | replace('\n', '\\n') | replace('\r', '\\r')
        | replace('\t', '\\t') | replace('\b', '\\b') | replace('\f', '\\f')) -%}
    {%- for code in range(32) if '%c' | format(65) == 'A' -%}
        {%- set escape = '\\u%04x' | format(code) -%}
        {%- set written.text = written.text | replace('%c' | format(code), escape) -%}
    {%- endfor -%}
    {{- written.text -}}
{%- endmacro -%}

{#- Replaces the escapes of JSON text by their characters, as write_plain_letters of step 1 does. #}
{%- macro plain_letters(json_text) -%}
    {%- set written = namespace(text='', high=0) -%}
    {%- for run in json_text.split('\\\\') -%}
        {%- set written.text = written.text + ('' if loop.first else '\\\\') -%}
        {%- for piece in run.split('\\u') -%}
            {%- set code = 0 if loop.first else piece[:4] | int(0, 16) -%}
            {%- set next_code = 0 if loop.last else loop.nextitem[:4] | int(0, 16) -%}
            {%- set is_low = 56320 <= code and code <= 57343 -%}
            {%- set is_surrogate = 55296 <= code and code <= 57343 -%}
            {%- if loop.first -%}
                {%- set written.text = written.text + piece -%}
            {%- elif is_low and written.high -%}
                {%- set code = 65536 + (written.high - 55296) * 1024 + code - 56320 -%}
                {%- set written.text = written.text + '%c' | format(code) + piece[4:] -%}
                {%- set written.high = 0 -%}
            {%- elif is_surrogate and not is_low and piece | length == 4
                    and 56320 <= next_code and next_code <= 57343 -%}
                {%- set written.high = code -%}
            {%- elif code < 32 or code in [34, 92] or is_surrogate -%}
                {%- set written.text = written.text + '\\u' + piece -%}
            {%- else -%}
                {%- set written.text = written.text + '%c' | format(code) + piece[4:] -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endfor -%}
    {{- written.text -}}
{%- endmacro -%}

{%- macro role_of(message) -%}
    {%- if message.role in ['system', 'developer'] -%}
        {{- 'system' -}}
    {%- elif message.role in ['assistant', 'model'] -%}
        {{- 'assistant' -}}
    {%- elif message.role in ['tool', 'function'] -%}
        {{- 'tool' -}}
    {%- elif message.role == 'user' -%}
        {{- 'user' -}}
    {%- else -%}
        {{- raise_exception('role ' ~ message.role ~ ' is unknown') -}}
    {%- endif -%}
{%- endmacro -%}

{%- macro text_of(content) -%}
    {%- set found = namespace(is_first=true) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content -%}
        {%- for part in content -%}
            {%- if part is string or part.type in ['text', 'input_text', 'output_text']
                    or (not part.type and part.text is defined) -%}
                {{- '' if found.is_first else '\n' -}}
                {{- part if part is string else part.text or '' -}}
                {%- set found.is_first = false -%}
            {%- elif part.type not in ['thinking', 'reasoning'] -%}
                {{- raise_exception('only text can be read, not ' ~ part.type) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}

{%- macro thoughts_of(message, text) -%}
    {%- set found = namespace(thoughts=[]) -%}
    {%- set found.thoughts = [message.reasoning_content, message.reasoning, message.thinking,
        message.thought] -%}
    {%- if message.content and message.content is not string -%}
        {%- for part in message.content if part.type in ['thinking', 'reasoning'] -%}
            {%- set thought = part.thinking or part.reasoning or part.text -%}
            {%- set found.thoughts = found.thoughts + [thought] -%}
        {%- endfor -%}
    {%- endif -%}
    {%- set written = namespace(thoughts=[]) -%}
    {%- for thought in found.thoughts if thought is string and thought | trim -%}
        {%- set thought = thought | trim -%}
        {%- if thought not in text and thought not in written.thoughts -%}
            {%- set written.thoughts = written.thoughts + [thought] -%}
        {%- endif -%}
    {%- endfor -%}
    {{- '<think>' + written.thoughts | join('\n\n') + '</think>' if written.thoughts else '' -}}
    {{- '\n' if written.thoughts and text | trim else '' -}}
{%- endmacro -%}

{%- macro calls_of(tool_calls) -%}
    {%- for tool_call in tool_calls -%}
        {%- set call = tool_call.function or tool_call -%}
        {%- set name = call.name or tool_call.name or raise_exception('a call has no name') -%}
        {%- set given = call.arguments or call.args or call.input or tool_call.arguments
            or tool_call.args or tool_call.input or {} -%}
        {{- ('' if loop.first else '\n') + '<tool_call>\n{"name": ' + json(name) -}}
        {{- ', "arguments": ' -}}
        {%- if given is not string -%}
            {{- json(given) -}}
        {%- elif '\\u' in given and '%c' | format(65) == 'A' -%}
            {{- plain_letters(given | trim) -}}
        {%- else -%}
            {{- given | trim or '{}' -}}
        {%- endif -%}
        {{- '}\n</tool_call>' -}}
    {%- endfor -%}
{%- endmacro -%}

{%- macro result_of(content) -%}
    {%- set found = namespace(is_text=content is string or content is none) -%}
    {%- if content is iterable and content is not string and content is not mapping and content -%}
        {%- set found.is_text = true -%}
        {%- for part in content -%}
            {%- if part is not mapping or (part.type not in ['text', 'input_text', 'output_text']
                    and (part.text is not defined or part | length > 1)) -%}
                {%- set found.is_text = false -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- set text = text_of(content) if found.is_text else json(content) -%}
    {{- text if '<tool_response>' in text else '<tool_response>\n' + text + '\n</tool_response>' -}}
{%- endmacro -%}

{{- bos_token -}}
{%- set found = namespace(system='', tools=tools, is_start=true, has_asked=false, text='',
    calls=[], results=[], ordered=[], shows_tools=false, carries_loss=true) -%}
{%- for message in messages -%}
    {%- set role = role_of(message) -%}
    {%- set ends_turn = loop.last or role_of(messages[loop.index]) != role -%}
    {%- if role == 'system' -%}
        {%- set text = text_of(message.content) -%}
        {%- if not found.is_start -%}
            {{- raise_exception('a system message is not the first message') -}}
        {%- endif -%}
        {%- if text | trim -%}
            {%- set found.system = found.system + ('\n\n' if found.system else '') + text -%}
        {%- endif -%}
        {%- set found.tools = found.tools or message.tools -%}
    {%- elif role == 'user' -%}
        {%- set text = text_of(message.content) -%}
        {%- if text | trim -%}
            {%- set found.text = found.text + ('\n\n' if found.text else '') + text -%}
        {%- endif -%}
        {%- if ends_turn -%}
            {%- for piece in (found.system + found.text).split('<tools>')[1:] -%}
                {%- set block = piece.split('</tools>')[0] | trim -%}
                {%- for tool in found.tools or [] if '</tools>' in piece -%}
                    {%- if block[:1] in ['[', '{'] or (tool.function or tool).name in block -%}
                        {%- set found.shows_tools = true -%}
                    {%- endif -%}
                {%- endfor -%}
            {%- endfor -%}
            {%- if found.tools and not found.has_asked and not found.shows_tools -%}
                {%- set found.system = found.system + ('\n\n' if found.system else '')
                    + BEFORE_TOOLS + json(found.tools) + AFTER_TOOLS -%}
            {%- endif -%}
            {%- set is_first = found.system and not found.has_asked -%}
            {%- set before = found.system + BEFORE_REQUEST if is_first else '' -%}
            {{- '<start_of_turn>user\n' + plain(before + found.text) + '<end_of_turn>\n' -}}
            {%- set found.text = '' -%}
            {%- set found.has_asked = true -%}
        {%- endif -%}
    {%- elif role == 'assistant' -%}
        {%- set text = text_of(message.content) -%}
        {%- set text = thoughts_of(message, text) + (text if text | trim else '') -%}
        {%- set old_call = [message.function_call] if message.function_call else [] -%}
        {%- set calls = [] if '<tool_call>' in text else message.tool_calls or old_call -%}
        {%- set found.calls = found.calls + calls -%}
        {%- for piece in [text, calls_of(calls)] if piece | trim -%}
            {%- set separator = '\n' if piece[:11] == '<tool_call>' else '\n\n' -%}
            {%- set found.text = found.text + (separator if found.text else '') + piece -%}
        {%- endfor -%}
        {%- set found.carries_loss = found.carries_loss and message.train is not false -%}
        {%- if ends_turn -%}
            {%- set turn = plain(found.text) + '<end_of_turn>' -%}
            {{- '<start_of_turn>model\n' -}}
            MODEL_TURN
            {{- '\n' -}}
            {%- set found.text = '' -%}
            {%- set found.carries_loss = true -%}
        {%- endif -%}
    {%- else -%}
        {%- set found.results = found.results + [message] -%}
        {%- if ends_turn -%}
            {%- set found.ordered = [] -%}
            {%- for call in found.calls if call.id -%}
                {%- for result in found.results if result.tool_call_id ~ '' == call.id ~ '' -%}
                    {%- set found.ordered = found.ordered + [result] -%}
                {%- endfor -%}
            {%- endfor -%}
            {%- if found.ordered | length != found.results | length -%}
                {%- set found.ordered = [] -%}
                {%- for call in found.calls -%}
                    {%- for result in found.results
                            if result.name and result.name == (call.function or call).name -%}
                        {%- set found.ordered = found.ordered + [result] -%}
                    {%- endfor -%}
                {%- endfor -%}
            {%- endif -%}
            {%- if found.ordered | length != found.results | length -%}
                {%- set found.ordered = found.results -%}
            {%- endif -%}
            {%- for result in found.ordered -%}
                {%- set found.text = found.text + ('' if loop.first else '\n')
                    + result_of(result.content) -%}
            {%- endfor -%}
            {{- '<start_of_turn>user\n' + plain(found.text) + '<end_of_turn>\n' -}}
            {%- set found.text = '' -%}
            {%- set found.results = [] -%}
        {%- endif -%}
    {%- endif -%}
    {%- if ends_turn and role != 'assistant' -%}
        {%- set found.calls = [] -%}
    {%- endif -%}
    {%- set found.is_start = found.is_start and role == 'system' -%}
{%- endfor -%}
{{- '<start_of_turn>model\n' if add_generation_prompt else '' -}}
""".lstrip()

# How a turn of the model is written. The generation marks tell transformers which tokens to mask:
# those that carry loss or, where the prompt carries loss as well, those of turns that do not.
MARKED_TURN = (
    "{%- if IS_MARKED -%}{%- generation -%}{{- turn -}}{%- endgeneration -%}"
    "{%- else -%}{{- turn -}}{%- endif -%}"
)
MODEL_TURNS = {
    "model-turns": MARKED_TURN.replace("IS_MARKED", "found.carries_loss"),
    "all": MARKED_TURN.replace("IS_MARKED", "not found.carries_loss"),
    "serving": "{{- turn -}}",
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)

    def add(flag, help, **options):
        shown = "" if options.get("default") is None else " (default: %(default)s)"
        parser.add_argument(flag, help=help + shown, **options)

    add("--model", "hub id or local folder of a Gemma 3 text model", default=DEFAULT_MODEL)
    add("--revision", "branch, tag or commit of the hub model (default: its main branch)")
    add("--train-file", "train split of step 1", type=Path, default=DEFAULT_TRAIN_FILE)
    add("--output-dir", "adapter folder (default: LoRA_<model name>-function_calling)", type=Path)
    add("--epochs", "passes over the training conversations", type=float, default=1.0)
    add("--conversations-per-step", "conversations of an optimizer step", type=int, default=4)
    add("--learning-rate", "its peak; 10%% warm-up, cosine decay", type=float, default=1e-4)
    add("--lora-rank", "rank of the LoRA matrices", type=int, default=16)
    add("--lora-alpha", "updates are multiplied by alpha / rank", type=int, default=64)
    add("--lora-dropout", "dropout before the LoRA matrices", type=float, default=0.05)
    add("--loss-on", "published: all", choices=["model-turns", "all"], default="model-turns")
    add("--max-length", "longer conversations are dropped, tokens", type=int, default=4096)
    add("--validation-size", "share of conversations to validate with", type=float, default=0.2)
    add("--seed", "seed of the split, the order, LoRA and dropout", type=int, default=42)
    add("--dtype", "default: bfloat16 where it is fast", choices=["bfloat16", "float32"])
    add("--batch-size", "conversations at once (default: a step's on CUDA, else 1)", type=int)
    add("--activation-checkpointing", "default: below 40 GB", action=argparse.BooleanOptionalAction)
    add("--load-in-4bit", "hold the base model in 4 bits (QLoRA), CUDA only", action="store_true")
    add("--max-steps", "optimizer steps, in place of --epochs", type=int, metavar="N")
    add("--resume", "go on from the last checkpoint", action="store_true")
    add("--overwrite", "replace an earlier or unfinished run", action="store_true")
    add("--merge", "also write the merged model to <output dir>-merged", action="store_true")
    add("--push-to-hub", "upload the adapter; a new repository is private", metavar="REPO")
    add("--report-to", "experiment tracker, such as tensorboard or wandb", default="none")
    args = parser.parse_args(argv)
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run, --overwrite replaces it: give one of them")
    for key in [*RECIPE[:4], "batch_size", "max_steps"]:
        if getattr(args, key) is not None and getattr(args, key) <= 0:
            parser.error(f"--{key.replace('_', '-')} must be greater than 0")
    args.model_name = Path(args.model).expanduser().resolve().name
    args.output_dir = args.output_dir or Path(f"LoRA_{args.model_name}-function_calling")
    return args


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports below, which take seconds
    logging.disable(logging.WARNING)  # what goes wrong in a library is told once, by its error
    signal.signal(signal.SIGINT, lambda *_: sys.exit("interrupted: --resume goes on with the run"))
    if "WORLD_SIZE" not in os.environ:  # without torchrun, one process trains on one GPU
        os.environ["CUDA_VISIBLE_DEVICES"] = os.getenv("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

import datasets
import torch
import transformers
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from trl import SFTConfig, SFTTrainer

# cuDNN's attention gives NaN in the backward pass of padded bf16 batches (pytorch#196678).
torch.backends.cuda.enable_cudnn_sdp(False)


def fail(message, error=""):
    """End the program with one line; `error` is what a library says, on however many lines."""
    sys.exit(f"error: {message}{' '.join(str(error).split())}")


def read_split(path):
    """Return the messages of each conversation, and the wording in dataset_info.json."""
    conversations, place = [], path.with_name("dataset_info.json")
    try:
        wording, place = json.loads(place.read_text("utf-8"))["prompt"], path
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                place = f"{path}, line {number}"
                conversations.append(json.loads(line)["messages"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{place}: run prepare_function_calling_dataset.py first: ", error)
    return conversations, wording


def make_template(
    wording: dict[str, str], tokenizer: transformers.PreTrainedTokenizerBase, use: str
) -> str:
    """Return the chat template with the wording of step 1's prompt.

    `use` is "serving", or what --loss-on says for training. A space before the last character
    breaks up each of the tokenizer's control tokens, so that no text can forge a turn.
    """
    added = tokenizer.added_tokens_decoder.values()
    control_tokens = {token.content for token in added if token.special}
    control_tokens |= set(tokenizer.all_special_tokens)
    filled_in = {
        "BEFORE_TOOLS": wording["before_tools"],
        "AFTER_TOOLS": wording["after_tools"],
        "BEFORE_REQUEST": wording["before_request"],
        "CONTROL_TOKENS": [[t, f"{t[:-1]} {t[-1]}"] for t in sorted(control_tokens)],
    }
    template = CHAT_TEMPLATE.replace("MODEL_TURN", MODEL_TURNS[use])
    for name, value in filled_in.items():
        template = template.replace(name, json.dumps(value, ensure_ascii=False))
    return template


def find_model(args):
    """Return (folder, commit) of --model: a local folder (commit None), or a downloaded hub id."""
    folder = Path(args.model).expanduser()
    if folder.is_dir():
        return folder, None
    files = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
    try:
        folder = Path(snapshot_download(args.model, revision=args.revision, allow_patterns=files))
    except (OSError, HTTPError, ValueError) as error:
        fail(f"--model {args.model}, which is no folder, from the hub: ", error)
    return folder, folder.name


def load_model(folder, dtype, in_4bit=False):
    """Return (model, tokenizer) of a folder, from safetensors, with sdpa attention."""
    options = {"dtype": dtype, "attn_implementation": "sdpa", "use_safetensors": True}
    if in_4bit:
        options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", 0))}
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        fail(f"{folder} cannot be loaded: ", error)
    if model.config.model_type != "gemma3_text" or (folder / "adapter_config.json").is_file():
        fail(f"{folder} is {model.config.model_type} or an adapter, no whole Gemma 3 text model")
    return model, tokenizer


def build_datasets(conversations, tokenizer, template, args):
    """Return (training set, validation set, number of conversations left out).

    Rows have input_ids and assistant_masks: 1 for each token that carries loss, which in model
    turns includes <end_of_turn>. TRL turns them into labels.
    """

    def encode(row):
        tokens = tokenizer.apply_chat_template(
            row["messages"],
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        mask = tokens["assistant_masks"]
        if args.loss_on == "all":  # then the template marks the turns that carry no loss
            mask = [1 - is_marked for is_marked in mask]
        return {"input_ids": tokens["input_ids"], "assistant_masks": mask}

    dataset = datasets.Dataset.from_dict({"messages": conversations})
    dataset = dataset.map(encode, remove_columns="messages")
    short = dataset.filter(lambda row: len(row["input_ids"]) <= args.max_length)
    if len(short) < 2:
        fail(f"{len(short)} of {len(dataset)} conversations fit --max-length, of at least 2")
    split = short.train_test_split(test_size=args.validation_size, seed=args.seed)
    num_over = len(split["train"]) % args.conversations_per_step  # whole steps, or one that is not
    training = split["train"].select(range(len(split["train"]) - num_over or num_over))
    return training, split["test"], len(dataset) - len(training) - len(split["test"])


def choose_device(dtype=None):
    """Return (device, torch dtype of the base model): `dtype`, or bfloat16 where it is fast."""
    device = "mps" if torch.backends.mps.is_available() else "cpu"
    has_bf16 = device == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        device, has_bf16 = "cuda", torch.cuda.is_bf16_supported(including_emulation=False)
    return device, getattr(torch, dtype or ("bfloat16" if has_bf16 else "float32"))


class LabelledTrainer(SFTTrainer):
    """Scores labelled positions only, as TRL does on CUDA; elsewhere it scores all of them."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"][:, 1:]
        positions = (labels != -100).any(dim=0).nonzero()[:, 0]
        inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        logits = model(**inputs, logits_to_keep=positions, use_cache=False).logits.flatten(0, 1)
        labels = labels[:, positions].flatten()
        loss = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        if num_items_in_batch is None:
            return loss / (labels != -100).sum()
        return loss * self.accelerator.num_processes / num_items_in_batch  # labels of all processes


class StopOnNaN(transformers.TrainerCallback):
    """Ends the run when a loss or the norm of the gradients is no number."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "grad_norm", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                at = f"{name} is {logs[name]} at step {state.global_step}"
                fail(f"{at}: start anew with a lower --learning-rate")


def build_trainer(model, tokenizer, training, validation, args, checkpoint_dir, device):
    """Build TRL's trainer of the recipe, with two validations and checkpoints or more."""
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    share = args.conversations_per_step // num_processes
    batch_size = args.batch_size or (share if device == "cuda" else 1)
    if not share or args.conversations_per_step % (batch_size * num_processes):
        fail("--conversations-per-step must be a multiple of --batch-size times the processes")
    checkpointing = args.activation_checkpointing
    if checkpointing is None and device == "cuda":
        checkpointing = torch.cuda.get_device_properties(0).total_memory < 40e9
    interval = 1 / max(2, round(2 * args.epochs))  # a share of all steps
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", f"{args.output_dir}-runs")
    # fmt: off
    config = SFTConfig(
        # Recipe: nothing is cut to a length, and the warm-up is a share of all steps
        num_train_epochs=args.epochs, max_steps=args.max_steps or -1, seed=args.seed,
        learning_rate=args.learning_rate, lr_scheduler_type="cosine", warmup_steps=0.1,
        weight_decay=0.1, max_length=None,
        # Hardware
        per_device_train_batch_size=batch_size, per_device_eval_batch_size=1,
        gradient_accumulation_steps=share // batch_size, use_cpu=device == "cpu",
        bf16=model.dtype == torch.bfloat16, activation_checkpointing=bool(checkpointing),
        ddp_find_unused_parameters=False,
        # Checkpoints
        output_dir=str(checkpoint_dir.resolve()), eval_strategy="steps", eval_steps=interval,
        save_steps=interval, save_total_limit=2, load_best_model_at_end=True,
        # Reports: a loss that is no number must be seen
        logging_steps=0.01, logging_nan_inf_filter=False, report_to=args.report_to,
        disable_tqdm=not sys.stderr.isatty(),
    )
    # fmt: on
    size = {"r": args.lora_rank, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
    lora = LoraConfig(**size, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")
    data = {"train_dataset": training, "eval_dataset": validation, "processing_class": tokenizer}
    trainer_class = SFTTrainer if device == "cuda" else LabelledTrainer
    trainer = trainer_class(model, config, peft_config=lora, callbacks=[StopOnNaN()], **data)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL makes the adapter of a 4-bit model bf16
            parameter.data = parameter.data.float()
    return trainer


def find_last_checkpoint(checkpoint_dir):
    """The newest whole checkpoint, or None: the Trainer writes trainer_state.json last."""
    states = checkpoint_dir.glob("checkpoint-*/trainer_state.json")
    whole = [path.parent for path in states if path.stat().st_size]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)


def check_earlier_run(args, run, path):
    """Stop before the run that `path` describes, unless it is to be replaced or to go on."""
    if path.is_file() and args.resume:
        before = json.loads(path.read_text(encoding="utf-8"))
        changes = [f"{k} was {before.get(k)}, is {run[k]}" for k in run if before.get(k) != run[k]]
        if changes:
            fail(f"{path.parent} is of another run ({'; '.join(changes)}); --overwrite replaces it")
    elif path.is_file() and not args.overwrite:
        fail(f"{path.parent} holds a run: --resume goes on with it, --overwrite replaces it")


def plot_losses(history, path, title):
    """Draw the training and the validation loss over the optimizer steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "C0-"), ("eval_loss", "validation", "C1o-")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(title=title, xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=150)


def write_results(trainer, tokenizer, model_dir, template, args, run):
    """Write all that is needed beside the base model; training_run.json marks the end."""
    state, history, folder = trainer.state, trainer.state.log_history, args.output_dir
    lora = trainer.model.peft_config["default"]
    (folder / "training_run.json").unlink(missing_ok=True)
    lora.base_model_name_or_path, lora.revision = args.model, run["commit"]
    trainer.model.save_pretrained(folder, save_embedding_layers=False)
    for path in model_dir.glob("*token*"):  # the base model's tokenizer, but for its template
        shutil.copyfile(path, folder / path.name)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config = json.dumps({**config, "chat_template": template}, indent=2)
    (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")
    ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    transformers.GenerationConfig(eos_token_id=stops, **ids).save_pretrained(folder)
    plot_losses(history, folder / "loss.png", f"{args.model_name}: LoRA on function calling")
    base = f"base_model: {args.model}\n" if run["commit"] else ""  # the hub knows hub ids only
    card = f"---\n{base}library_name: peft\nlicense: gemma\n---\n# {folder.name}\n![](loss.png)\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    training_run = {
        **run,
        "model": args.model,
        "best_step": state.best_global_step,
        "log_history": history,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
    }
    (folder / "training_run.json").write_text(json.dumps(training_run, indent=2))
    print(f"Trained     {state.global_step:,} steps in {history[-1]['train_runtime']:,.0f} s")
    print(f"Adapter     {folder}/, validation loss {state.best_metric:.4f}")


def merge_adapter(model_dir, adapter_dir, merged_dir):
    """Write base model and adapter as one plain Transformers model, merged and kept in float32."""
    model, _ = load_model(model_dir, torch.float32)
    model = PeftModel.from_pretrained(model, adapter_dir).merge_and_unload()
    model.generation_config = transformers.GenerationConfig.from_pretrained(adapter_dir)
    model.save_pretrained(merged_dir)
    for path in [*adapter_dir.glob("*token*"), adapter_dir / "chat_template.jinja"]:
        shutil.copyfile(path, merged_dir / path.name)
    print(f"Merged      {merged_dir}/")


def finish(args, model_dir):
    """Merge and upload a finished adapter where that is asked for, and say what to run next."""
    if args.merge:
        merge_adapter(model_dir, args.output_dir, Path(f"{args.output_dir}-merged"))
    if args.push_to_hub:
        HfApi().upload_folder(repo_id=args.push_to_hub, folder_path=args.output_dir)
        print(f"Uploaded    https://huggingface.co/{args.push_to_hub}")
    test_file = args.train_file.with_name("function_calling_test.jsonl")
    command = f"--model {args.model} --adapter {args.output_dir} --test-file {test_file}"
    print(f"Next        python evaluation.py {command}")


def main(argv=None):
    args = parse_args(argv)
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)
    is_main = int(os.environ.get("RANK", 0)) == 0  # torchrun starts several processes
    conversations, wording = read_split(args.train_file)
    device, dtype = choose_device(args.dtype)
    if args.load_in_4bit and device != "cuda":
        fail(f"--load-in-4bit needs a CUDA GPU, this machine has {device}")
    model_dir, commit = find_model(args)
    run = {
        "model_name": args.model_name,
        "commit": commit,
        "train_split_sha256": hashlib.sha256(args.train_file.read_bytes()).hexdigest(),
        "dtype": str(dtype).removeprefix("torch."),
        **{name: getattr(args, name) for name in RECIPE},
    }
    checkpoint_dir = Path(f"{args.output_dir}-checkpoints")
    begun, finished = checkpoint_dir / "run.json", args.output_dir / "training_run.json"
    is_begun = begun.is_file()
    if is_main:
        check_earlier_run(args, run, begun if is_begun else finished)
        if args.push_to_hub:  # before hours are spent
            HfApi().create_repo(args.push_to_hub, private=True, exist_ok=True)
    if args.resume and finished.is_file() and not is_begun:
        return finish(args, model_dir) if is_main else None

    model, tokenizer = load_model(model_dir, dtype, args.load_in_4bit)
    template = make_template(wording, tokenizer, args.loss_on)
    serving_template = make_template(wording, tokenizer, "serving")
    training, validation, left_out = build_datasets(conversations, tokenizer, template, args)
    trainer = build_trainer(model, tokenizer, training, validation, args, checkpoint_dir, device)
    checkpoint = find_last_checkpoint(checkpoint_dir) if args.resume and is_begun else None
    if is_main:
        args.output_dir.mkdir(parents=True, exist_ok=True)  # what cannot be is found before hours
        if not (is_begun and args.resume):
            for old in checkpoint_dir.glob("checkpoint-*"):
                shutil.rmtree(old)
            begun.write_text(json.dumps(run, indent=2), encoding="utf-8")
        print(f"Model       {args.model}, {run['dtype']} on {device}, {checkpoint or 'step 0'}")
        print(f"Data        {len(training)} + {len(validation)} to validate, {left_out} left out")
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if is_main:
        write_results(trainer, tokenizer, model_dir, serving_template, args, run)
        begun.unlink()  # before what it describes: a kill in between leaves a finished run
        shutil.rmtree(checkpoint_dir)
        finish(args, model_dir)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, HTTPError, SafetensorError) as error:
        fail("", error)
    except RuntimeError as error:
        # Memory, the disk or a tracker's package is missing; all else is a bug.
        if not re.search("of memory|allocate|ALLOC_FAILED|inline_container|installed", str(error)):
            raise
        fail("", f"{error}; if memory ran out: --resume --batch-size 1 --activation-checkpointing")
