"""Fine-tune Gemma 3 for function calling with LoRA (step 2 of 3).

    python function_calling_train.py                                # gemma-3-1b-it, as published
    python function_calling_train.py --model google/gemma-3-270m-it
    torchrun --nproc_per_node 2 function_calling_train.py           # two GPUs

Reads the train split and, from dataset_info.json in the same folder, the wording of its prompts.
Writes the adapter, the base model's tokenizer with the chat template, training_run.json, loss.png
and a model card to LoRA_<model name>-function_calling/. Checkpoints are kept in
LoRA_<model name>-function_calling-checkpoints/ until the run is finished.

Heavy libraries are imported inside the functions that use them, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTConfig, SFTTrainer

DEFAULT_MODEL = "google/gemma-3-1b-it"
DEFAULT_TRAIN_FILE = Path("processed_data/function_calling_train.jsonl")
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# The chat template. It renders OpenAI-style messages exactly as step 1 renders a row: tools in the
# first user turn, calls and results as tagged blocks, consecutive messages of a role as one turn.
# It has its own JSON macro, because the tojson filter differs between template engines. Besides
# Jinja2, llama.cpp and LiteRT-LM (MiniJinja) must be able to render it. In MiniJinja, null is
# iterable and not none, and the result of split cannot be indexed. make_template replaces the names
# in capitals.
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
    {%- elif value is iterable and value | string != 'none' -%}
        {{- '{' if value is mapping else '[' -}}
        {%- for item in value if value is not mapping
                or value[item] is string or value[item] | string | lower != 'none' -%}
            {{- ('' if loop.first else ', ') + json_of(item) -}}
            {{- ': ' + json_of(value[item]) if value is mapping else '' -}}
        {%- endfor -%}
        {{- '}' if value is mapping else ']' -}}
    {%- else -%}
        {%- set word = value | string | lower -%}
        {{- 'null' if word == 'none' else word -}}
    {%- endif -%}
{%- endmacro -%}

{#- Some engines cannot turn a code point into a character. There, control characters stay
    unescaped. One engine even raises an error. It lacks lipsum, a function that Jinja2 defines. #}
{%- macro json(value) -%}
    {%- set written = namespace(text=json_of(value) | replace('\n', '\\n') | replace('\r', '\\r')
        | replace('\t', '\\t') | replace('\b', '\\b') | replace('\f', '\\f')) -%}
    {%- for code in range(32) if lipsum is defined and '%c' | format(65) == 'A' -%}
        {%- set escape = '\\u%04x' | format(code) -%}
        {%- set written.text = written.text | replace('%c' | format(code), escape) -%}
    {%- endfor -%}
    {{- written.text -}}
{%- endmacro -%}

{#- Replaces the escapes of JSON text with their characters, like write_plain_letters of step 1. #}
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
    {%- set role = message.role | lower -%}
    {%- if role in ['system', 'developer'] -%}
        {{- 'system' -}}
    {%- elif role in ['assistant', 'model'] -%}
        {{- 'assistant' -}}
    {%- elif role in ['tool', 'function'] -%}
        {{- 'tool' -}}
    {%- elif role == 'user' -%}
        {{- 'user' -}}
    {%- else -%}
        {{- raise_exception('role ' ~ message.role ~ ' is unknown') -}}
    {%- endif -%}
{%- endmacro -%}

{%- macro text_of(content) -%}
    {%- set found = namespace(is_first=true) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is mapping -%}
        {{- raise_exception('only text can be read, not an object') -}}
    {%- elif content -%}
        {%- for part in content -%}
            {%- if part is string or part.type in ['text', 'input_text', 'output_text', 'refusal']
                    or (not part.type and part.text is defined) -%}
                {{- '' if found.is_first else '\n' -}}
                {{- part if part is string else part.text or part.refusal or '' -}}
                {%- set found.is_first = false -%}
            {%- elif part.type not in ['thinking', 'reasoning'] -%}
                {{- raise_exception('only text can be read, not ' ~ part.type) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}

{%- macro thoughts_of(message, text) -%}
    {%- set found = namespace(thoughts=[]) -%}
    {%- set found.thoughts = [message.reasoning_content, message.thinking, message.reasoning,
        message.thought] -%}
    {%- if message.content and message.content is not string -%}
        {%- for part in message.content if part.type in ['thinking', 'reasoning'] -%}
            {%- set thought = part.thinking or part.reasoning or part.text -%}
            {%- set found.thoughts = found.thoughts + [thought] -%}
        {%- endfor -%}
    {%- endif -%}
    {%- set written = namespace(thoughts=[], before='') -%}
    {%- for piece in (text.split('<think>') | list)[1:] -%}
        {%- set written.before = written.before + '\n' + (piece.split('</think>') | list)[0] -%}
    {%- endfor -%}
    {%- for thought in found.thoughts if thought is string and thought | trim -%}
        {%- set thought = thought | replace('<think>', '') | replace('</think>', '') | trim -%}
        {%- if thought and thought not in written.before and thought not in written.thoughts -%}
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
        {%- elif '\\u' in given and lipsum is defined and '%c' | format(65) == 'A' -%}
            {{- plain_letters(given | trim) -}}
        {%- else -%}
            {{- given | trim or '{}' -}}
        {%- endif -%}
        {{- '}\n</tool_call>' -}}
    {%- endfor -%}
{%- endmacro -%}

{%- macro result_of(content) -%}
    {%- set found = namespace(
        is_text=content is string or content is none or content is not defined) -%}
    {%- if content is iterable and content is not string and content is not mapping and content -%}
        {%- set found.is_text = true -%}
        {%- for part in content -%}
            {%- if part is not mapping
                    or (part.type not in ['text', 'input_text', 'output_text', 'refusal']
                        and (part.text is not defined or part | length > 1)) -%}
                {%- set found.is_text = false -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- set text = text_of(content) if found.is_text else json(content) -%}
    {%- set is_wrapped = (text | trim)[:15] == '<tool_response>' -%}
    {{- text if is_wrapped else '<tool_response>\n' + text + '\n</tool_response>' -}}
{%- endmacro -%}

{#- Writes "yes" if a name occurs in a text on its own, not as a part of a longer name. #}
{%- macro has_name(text, name) -%}
    {#- The texts before the first and after the last name are not empty: an empty piece means two
        names without anything in between. #}
    {%- set name_letters = 'abcdefghijklmnopqrstuvwxyz0123456789_-' -%}
    {%- set found = namespace(before='', answer='') -%}
    {%- for piece in text.split(name) -%}
        {%- if not loop.first and (found.before[-1:] | lower) not in name_letters
                and (piece[:1] | lower) not in name_letters -%}
            {%- set found.answer = 'yes' -%}
        {%- endif -%}
        {%- set found.before = piece -%}
    {%- endfor -%}
    {{- found.answer -}}
{%- endmacro -%}

{{- bos_token -}}
{%- set found = namespace(system='', tools=tools, is_start=true, has_asked=false, text='',
    calls=[], results=[], ordered=[], matched=[], used=[], call_keys=[], is_answered=false,
    shown='\n', shows_tools=true, spoken='', carries_loss=true) -%}
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
            {%- for piece in ((found.system + found.text).split('<tools>') | list)[1:] -%}
                {%- if '</tools>' in piece -%}
                    {%- set block = (piece.split('</tools>') | list)[0] -%}
                    {%- set found.shown = found.shown + block + '\n' -%}
                {%- endif -%}
            {%- endfor -%}
            {%- for tool in found.tools or [] -%}
                {%- set name = (tool.function or tool).name -%}
                {%- set is_shown = name and has_name(found.shown, name) -%}
                {%- set found.shows_tools = found.shows_tools and is_shown -%}
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
        {%- set text = text_of(message.content or message.refusal) -%}
        {%- set text = thoughts_of(message, text) + (text if text | trim else '') -%}
        {%- set old_call = [message.function_call] if message.function_call else [] -%}
        {#- A call inside a thought is only a draft. #}
        {%- set found.spoken = '' -%}
        {%- for piece in text.split('<think>') -%}
            {%- set parts = piece.split('</think>') | list -%}
            {%- set is_thought = not loop.first and parts | length > 1 -%}
            {%- set found.spoken = found.spoken + (parts[1:] | join if is_thought else piece) -%}
        {%- endfor -%}
        {%- set has_calls = '<tool_call>' in found.spoken and '</tool_call>' in found.spoken -%}
        {%- set calls = message.tool_calls or old_call -%}
        {%- set found.calls = found.calls + calls -%}
        {%- for piece in [text, '' if has_calls else calls_of(calls)] if piece | trim -%}
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
            {#- in the order of their calls, by id if all ids fit, or else by name if all fit #}
            {%- set found.ordered = found.results -%}
            {%- for use_id in [false, true] -%}
                {%- set found.matched = [] -%}
                {%- set found.used = [] -%}
                {%- set found.call_keys = [] -%}
                {%- for call in found.calls -%}
                    {%- set key = call.id if use_id
                        else (call.function or call).name or call.name -%}
                    {%- set has_key = key is defined and key is not none and key ~ '' -%}
                    {%- set found.call_keys = found.call_keys + [key ~ '' if has_key else none] -%}
                {%- endfor -%}
                {%- for key in found.call_keys -%}
                    {%- set is_last = key not in found.call_keys[loop.index:] -%}
                    {%- set found.is_answered = false -%}
                    {%- for result in found.results -%}
                        {%- set named = result.tool_call_id if use_id
                            else result.name or result.tool_name -%}
                        {%- if (is_last or not found.is_answered) and loop.index0 not in found.used
                                and named is defined and named is not none and named ~ '' == key -%}
                            {%- set found.matched = found.matched + [result] -%}
                            {%- set found.used = found.used + [loop.index0] -%}
                            {%- set found.is_answered = true -%}
                        {%- endif -%}
                    {%- endfor -%}
                {%- endfor -%}
                {%- if found.matched | length == found.results | length -%}
                    {%- set found.ordered = found.matched -%}
                {%- endif -%}
            {%- endfor -%}
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

# How a turn of the model is written. The generation tags mark tokens for transformers. With
# --loss-on model-turns, they mark the tokens to train on. With --loss-on all, they mark the turns
# not to train on.
MARKED_TURN = (
    "{%- if IS_MARKED -%}{%- generation -%}{{- turn -}}{%- endgeneration -%}"
    "{%- else -%}{{- turn -}}{%- endif -%}"
)
MODEL_TURNS = {
    "model-turns": MARKED_TURN.replace("IS_MARKED", "found.carries_loss"),
    "all": MARKED_TURN.replace("IS_MARKED", "not found.carries_loss"),
    "serving": "{{- turn -}}",
}


def positive_int(text: str) -> int:
    with contextlib.suppress(ValueError):
        if int(text) > 0:
            return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number greater than 0, not {text}")


def positive_float(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a finite number greater than 0, not {text}")


def share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be greater than 0 and less than 1, not {text}")


def probability(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be at least 0 and less than 1, not {text}")


def seed(text: str) -> int:
    with contextlib.suppress(ValueError):
        if 0 <= int(text) < 2**32:
            return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number from 0 to {2**32 - 1}, not {text}")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="Hub id or local folder of a Gemma 3 text model (default: %(default)s).",
    )
    group.add_argument(
        "--revision",
        help="Branch, tag or commit of a model on the Hub (default: the main branch).",
    )
    group.add_argument(
        "--train-file",
        type=Path,
        default=DEFAULT_TRAIN_FILE,
        help="Train split written by prepare_function_calling_dataset.py (default: %(default)s).",
    )
    group.add_argument(
        "--max-length",
        type=positive_int,
        default=4096,
        metavar="N",
        help="Maximum length of a conversation in tokens. Longer conversations are dropped and "
        "counted, never truncated (default: %(default)s).",
    )
    group.add_argument(
        "--validation-size",
        type=share,
        default=0.2,
        help="Fraction of the train split that is held out for validation (default: %(default)s).",
    )
    group.add_argument(
        "--loss-on",
        choices=["model-turns", "all"],
        default="model-turns",
        help="Tokens to train on: those of the model's turns, or all of them as in the original "
        "code (default: %(default)s).",
    )


def add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("LoRA")
    group.add_argument(
        "--lora-rank",
        type=positive_int,
        default=16,
        help="Rank of the LoRA matrices (default: %(default)s).",
    )
    group.add_argument(
        "--lora-alpha",
        type=positive_int,
        default=64,
        help="LoRA updates are scaled by alpha / rank (default: %(default)s).",
    )
    group.add_argument(
        "--lora-dropout",
        type=probability,
        default=0.05,
        help="Dropout probability before the LoRA matrices (default: %(default)s).",
    )


def add_optimization_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimization")
    group.add_argument(
        "--epochs",
        type=positive_float,
        default=1.0,
        help="Number of passes over the training conversations (default: %(default)s).",
    )
    group.add_argument(
        "--max-steps",
        type=positive_int,
        metavar="N",
        help="Number of optimizer steps. Overrides --epochs.",
    )
    group.add_argument(
        "--conversations-per-step",
        type=positive_int,
        default=4,
        metavar="N",
        help="Effective batch size: number of conversations per optimizer step "
        "(default: %(default)s).",
    )
    group.add_argument(
        "--learning-rate",
        type=positive_float,
        default=1e-4,
        help="Peak learning rate: 10%% linear warm-up, then cosine decay (default: %(default)s).",
    )
    group.add_argument(
        "--seed",
        type=seed,
        default=42,
        help="Seed of the validation split, the order of the data, LoRA's initial weights and "
        "dropout (default: %(default)s).",
    )


def add_hardware_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("hardware")
    group.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        help="Data type of the base model (default: bfloat16 where the hardware supports it, else "
        "float32). The LoRA weights are always float32.",
    )
    group.add_argument(
        "--batch-size",
        type=positive_int,
        metavar="N",
        help="Number of conversations per forward pass on one device. Gradients are accumulated "
        "until the step is complete (default: all conversations of a step on CUDA, else 1).",
    )
    group.add_argument(
        "--activation-checkpointing",
        action=argparse.BooleanOptionalAction,
        help="Recompute activations in the backward pass to save memory (default: only when a CUDA "
        "GPU is too small to keep them for the longest batch).",
    )
    group.add_argument(
        "--load-in-4bit",
        action="store_true",
        help="Quantize the base model to 4 bits while training (QLoRA). Needs a CUDA GPU.",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output-dir",
        type=Path,
        help="Folder of the adapter (default: LoRA_<model name>-function_calling).",
    )
    existing_run = group.add_mutually_exclusive_group()
    existing_run.add_argument(
        "--resume",
        action="store_true",
        help="Continue an interrupted run from its last checkpoint (one is saved after every 5%% "
        "of the steps). On a finished run, only --merge and --push-to-hub have an effect.",
    )
    existing_run.add_argument(
        "--overwrite",
        action="store_true",
        help="Start over and replace the run in the output folder and, with --merge, the merged "
        "model.",
    )
    group.add_argument(
        "--merge",
        action="store_true",
        help="Also write the base model with the adapter merged into it, to <output dir>-merged. "
        "That folder can be the --model of another training run.",
    )
    group.add_argument(
        "--push-to-hub",
        metavar="REPO",
        help="Upload the adapter to this repository on the Hub. A new repository is private.",
    )
    group.add_argument(
        "--report-to",
        metavar="TRACKER",
        default="none",
        help="Experiment tracker, such as tensorboard, trackio or wandb (default: %(default)s).",
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the arguments, and add the model's name and the folders of the run to them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add_data_arguments(parser)
    add_lora_arguments(parser)
    add_optimization_arguments(parser)
    add_hardware_arguments(parser)
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    args.model_name = Path(args.model).expanduser().resolve().name
    args.default_output_dir = Path(f"LoRA_{args.model_name}-function_calling")
    args.output_dir = args.output_dir or args.default_output_dir
    if args.output_dir.name in ("", ".."):  # such as "."; folders next to it need its real name
        args.output_dir = args.output_dir.resolve()
    args.checkpoint_dir = Path(f"{args.output_dir}-checkpoints")
    args.merged_dir = Path(f"{args.output_dir}-merged")
    args.tracker_dir = Path(f"{args.output_dir}-runs")
    return args


def fail(message: str) -> NoReturn:
    """End the program with one line on standard error."""
    sys.exit(f"error: {message}")


def describe(error: Exception) -> str:
    """The text of an error on one line, without the error number of the operating system."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(re.sub(r"\[Errno -?\d+\] ", "", str(error)).split())


def local_rank() -> int:
    """The number of this process, and of its GPU, on this machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def read_split(path: Path) -> tuple[list[list[dict]], dict]:
    """Return (the messages of each conversation, dataset_info.json, which is next to the split)."""
    advice = (
        "Run prepare_function_calling_dataset.py first, or pass its train split as --train-file."
    )
    info_path = path.with_name("dataset_info.json")
    if not path.is_file():
        fail(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}. {advice}")
    if not info_path.is_file():
        fail(f"{path} is not a split of step 1: no dataset_info.json is next to it. {advice}")
    try:
        info = json.loads(info_path.read_text("utf-8"))
        if "prompt" not in info:
            raise ValueError("no wording of the prompts")
        is_test_split = info["test"]["file"] == path.name
    except (ValueError, KeyError, TypeError):
        fail(f"{info_path} was not written by step 1. {advice}")
    if is_test_split:
        fail(f"{path} is the test split. Pass the train split as --train-file.")
    conversations = []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                conversations.append(read_messages(line))
            except (ValueError, KeyError, TypeError, RecursionError):
                fail(f"{path}, line {number} does not have the format of a split. {advice}")
    return conversations, info


def read_messages(line: bytes) -> list[dict]:
    """Return the messages of a line of a split.

    Raises ValueError, KeyError or TypeError for a row that step 1 has not converted.
    """
    row = json.loads(line)
    messages = row["messages"]
    if not messages or not isinstance(row["tools"], str | None):
        raise ValueError("a row that step 1 has not converted")
    for message in messages:
        is_known = message["role"] in ("user", "assistant", "tool")
        if not is_known or not isinstance(message["content"], str):
            raise ValueError("a message that step 1 has not converted")
    return messages


def make_template(wording: dict[str, str], tokenizer: PreTrainedTokenizerBase, use: str) -> str:
    """Return the chat template with the wording of step 1's prompt.

    `use` is "serving" or the value of --loss-on. In the text of messages, the template breaks up
    control tokens with a space before their last character, so that no text can start a turn.
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


def find_model(args: argparse.Namespace) -> tuple[Path, str | None]:
    """Return (folder, commit) of --model: a local folder (commit None), or a downloaded Hub id."""
    from huggingface_hub import constants, errors, snapshot_download

    folder = Path(args.model).expanduser()
    if folder.is_dir():
        if args.revision:
            fail(f"--revision is for models on the Hub, but --model {folder} is a local folder.")
        return folder, None
    page = f"https://huggingface.co/{args.model}"
    files = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
    try:
        folder = Path(snapshot_download(args.model, revision=args.revision, allow_patterns=files))
    except errors.GatedRepoError as error:
        said = f" (The Hub says: {describe(error.server_message)})" if error.server_message else ""
        fail(
            f"--model {args.model} is gated. Open {page}, accept the license, run `hf auth login`, "
            f"and run this command again.{said}"
        )
    except errors.RepositoryNotFoundError:
        fail(
            f"--model {args.model} is neither a local folder nor a model on the Hub. Check the "
            "spelling. If the model is private, run `hf auth login` first."
        )
    except errors.RevisionNotFoundError:
        fail(f"--revision {args.revision} does not exist. See {page}/tree/main for those that do.")
    except errors.LocalEntryNotFoundError:
        reason = "the Hub cannot be reached. Check the spelling and the network connection"
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set. Check the spelling, set HF_HUB_OFFLINE=0"
        fail(
            f"--model {args.model} is neither a local folder nor in the download cache, and "
            f"{reason}, or pass a local folder."
        )
    except errors.HFValidationError:
        fail(f"--model {args.model} is neither a local folder nor a valid Hub id.")
    except (OSError, errors.HTTPError) as error:
        fail(f"--model {args.model} cannot be downloaded from the Hub: {describe(error)}")
    return folder, folder.name


def load_model(
    folder: Path, dtype: torch.dtype, in_4bit: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return (model, tokenizer) of a folder, from safetensors, with sdpa attention."""
    import transformers

    if (folder / "adapter_config.json").is_file():
        fail(f"{folder} is a LoRA adapter. Pass its base model as --model.")
    options = {"dtype": dtype, "attn_implementation": "sdpa", "use_safetensors": True}
    if in_4bit:
        options["device_map"] = {"": local_rank()}
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    try:
        model_type = transformers.AutoConfig.from_pretrained(folder).model_type
        if model_type != "gemma3_text":
            fail(
                f"{folder} has model type {model_type}. Only Gemma 3 text models (1B, 270M) are "
                "supported."
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        fail(f"{folder} cannot be loaded: {describe(error)}")
    return model, tokenizer


def build_datasets(
    conversations: list[list[dict]],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    args: argparse.Namespace,
) -> tuple[Dataset, Dataset, int]:
    """Return (training set, validation set, number of dropped conversations).

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

    import datasets

    dataset = datasets.Dataset.from_dict({"messages": conversations})
    dataset = dataset.map(encode, remove_columns="messages")
    short = dataset.filter(lambda row: len(row["input_ids"]) <= args.max_length)
    if len(short) < 2:
        fail(
            f"{len(short)} of {len(dataset)} conversations fit --max-length {args.max_length}, and "
            "at least 2 are needed. Raise --max-length, or prepare more data."
        )
    try:
        split = short.train_test_split(test_size=args.validation_size, seed=args.seed)
    except ValueError:
        fail(
            f"--validation-size {args.validation_size} of {len(short)} conversations leaves none "
            "for training or for validation. Use another value, or prepare more data."
        )
    num_training = len(split["train"])
    num_extra = num_training % args.conversations_per_step
    if num_extra < num_training:  # else the set is smaller than one step, and all of it is kept
        num_training -= num_extra
    num_dropped = len(dataset) - num_training - len(split["test"])
    return split["train"].select(range(num_training)), split["test"], num_dropped


def choose_device(dtype: str | None = None) -> tuple[str, torch.dtype]:
    """Return (device, torch dtype of the base model): `dtype`, or bfloat16 where it is fast."""
    import torch

    if torch.cuda.is_available():
        num_gpus = torch.cuda.device_count()
        if local_rank() >= num_gpus:
            fail(
                f"torchrun started more processes than there are GPUs ({num_gpus}). Use "
                f"--nproc_per_node {num_gpus}."
            )
        torch.cuda.set_device(local_rank())
        device = "cuda"
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif torch.backends.mps.is_available():
        device = "mps"
        has_bf16 = False
    else:
        device = "cpu"
        has_bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return device, getattr(torch, dtype or ("bfloat16" if has_bf16 else "float32"))


# Bytes that the forward pass keeps for the backward pass, for each token, layer and unit of (hidden
# size, MLP size, attention width). tests/benchmarks/estimate_memory.py measures them.
ACTIVATION_BYTES = {"bfloat16": (47, 13, 17), "float32": (57, 21, 25)}
OTHER_BYTES = 2e9  # CUDA itself, the loss, the LoRA weights and their optimizer
USABLE_SHARE = 0.9  # share of the GPU's memory; batches of varying length fragment the rest


def estimate_memory(model: PreTrainedModel, num_tokens: int, checkpointing: bool) -> float:
    """Estimate the peak memory of training on batches of `num_tokens`, padding included, in bytes.

    With activation checkpointing, only the input of each layer is kept, and one layer at a time
    is computed again.
    """
    config = model.config
    dtype = str(model.dtype).removeprefix("torch.")
    per_hidden, per_mlp, per_attention = ACTIVATION_BYTES[dtype]
    layer = num_tokens * (
        per_hidden * config.hidden_size
        + per_mlp * config.intermediate_size
        + per_attention * config.num_attention_heads * config.head_dim
    )
    activations = config.num_hidden_layers * layer
    if checkpointing:
        inputs = num_tokens * config.hidden_size * model.dtype.itemsize
        activations = config.num_hidden_layers * inputs + layer
    return model.get_memory_footprint() + activations + OTHER_BYTES


def needs_checkpointing(model: PreTrainedModel, num_tokens: int) -> bool:
    """Whether the GPU of this process is too small to keep the activations of `num_tokens`."""
    import torch

    memory = torch.cuda.get_device_properties(local_rank()).total_memory
    return estimate_memory(model, num_tokens, checkpointing=False) > USABLE_SHARE * memory


class LabelledTrainer:
    """Computes logits at labeled positions only. Without CUDA, TRL computes them at all positions.

    This class and the callbacks below get their base classes in build_trainer, because importing
    those takes seconds.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        from torch.nn.functional import cross_entropy

        labels = inputs["labels"][:, 1:]
        positions = (labels != -100).any(dim=0).nonzero()[:, 0]
        inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        logits = model(**inputs, logits_to_keep=positions, use_cache=False).logits.flatten(0, 1)
        labels = labels[:, positions].flatten()
        loss = cross_entropy(logits.float(), labels, reduction="sum")
        if num_items_in_batch is None:
            return loss / (labels != -100).sum()
        return loss * self.accelerator.num_processes / num_items_in_batch  # labels of all processes


class StopOnNaN:
    """Ends the run when a loss or the norm of the gradients is not finite."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        names = {"loss": "loss", "grad_norm": "gradient norm", "eval_loss": "validation loss"}
        for key, name in names.items():
            if not math.isfinite(logs.get(key, 0.0)):
                fail(
                    f"training diverged ({name} is {logs[key]} at step {state.global_step}). "
                    "Restart with --overwrite and a lower --learning-rate."
                )


class SaveOften:
    """Saves a checkpoint after every 5% of the steps, so that an interruption loses little.

    The Trainer itself saves only where it validates, because it has to keep the best checkpoint.
    """

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % max(1, state.max_steps // 20) == 0:
            control.should_save = True


class ReportProgress:
    """Prints a line at each validation and otherwise at most once a minute.

    It also adds the seconds so far to the log, including the earlier parts of a resumed run.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)  # the progress bar
        earlier = [entry["seconds"] for entry in state.log_history if "seconds" in entry]
        self.seconds_before = earlier[-1] if earlier else 0.0
        self.first_step = state.global_step
        self.start = time.monotonic()
        self.last_line = self.start

    def close_bars(self):
        """Close the bars of ProgressCallback, which does so only if the training completes."""
        for name in ("prediction_bar", "training_bar"):
            if bar := getattr(self, name, None):
                bar.close()

    def on_log(self, args, state, control, logs=None, **kwargs):
        from tqdm import tqdm

        now = time.monotonic()
        seconds = now - self.start
        state.log_history[-1]["seconds"] = round(self.seconds_before + seconds, 2)
        name = "validation loss" if "eval_loss" in logs else "loss"
        loss = logs.get("eval_loss", logs.get("loss"))
        is_due = "eval_loss" in logs or now - self.last_line >= 60
        if not state.is_world_process_zero or loss is None or not is_due:
            return
        self.last_line = now
        seconds_per_step = seconds / max(1, state.global_step - self.first_step)
        seconds_left = seconds_per_step * (state.max_steps - state.global_step)
        steps = f"{state.global_step:,} of {state.max_steps:,}"
        tqdm.write(f"Step        {steps}, {name} {loss:.4f}, {seconds_left:,.0f} s left")
        sys.stdout.flush()


def with_base(mixin: type, base: type) -> type:
    return type(mixin.__name__, (mixin, base), {})


def make_config(
    args: argparse.Namespace,
    device: str,
    is_bf16: bool,
    batch_size: int,
    num_accumulated: int,
    checkpointing: bool,
    checkpoint_dir: Path,
) -> SFTConfig:
    """The recipe as TRL's configuration, with at least two validations."""
    from trl import SFTConfig

    interval = 1 / max(2, round(2 * args.epochs))  # a share of all steps
    return SFTConfig(
        # Recipe: conversations are not cut (max_length), and the warm-up is a share of all steps
        num_train_epochs=args.epochs,
        max_steps=args.max_steps or -1,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.1,
        max_length=None,
        seed=args.seed,
        # Hardware
        use_cpu=device == "cpu",
        bf16=is_bf16,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=num_accumulated,
        per_device_eval_batch_size=choose_validation_batch(args, device),
        activation_checkpointing=checkpointing,
        ddp_find_unused_parameters=False,
        # Checkpoints
        output_dir=str(checkpoint_dir.resolve()),
        eval_strategy="steps",
        eval_steps=interval,
        save_steps=interval,
        save_total_limit=2,
        load_best_model_at_end=True,
        # Reports: StopOnNaN has to see a loss that is not a number
        logging_steps=0.01,
        logging_nan_inf_filter=False,
        report_to=args.report_to,
        disable_tqdm=True,  # the Trainer would print every log; see ReportProgress
    )


def choose_validation_batch(args: argparse.Namespace, device: str) -> int:
    """The conversations to validate at once: on CUDA, one at a time would leave the GPU idle."""
    return min(8, args.batch_size or 8) if device == "cuda" else 1


def make_callbacks() -> list:
    """Our callbacks, with a progress bar on a terminal."""
    from transformers import ProgressCallback, TrainerCallback

    progress_base = ProgressCallback if sys.stderr.isatty() else TrainerCallback
    return [
        with_base(StopOnNaN, TrainerCallback)(),
        with_base(SaveOften, TrainerCallback)(),
        with_base(ReportProgress, progress_base)(),
    ]


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training: Dataset,
    validation: Dataset,
    args: argparse.Namespace,
    checkpoint_dir: Path,
    device: str,
) -> SFTTrainer:
    """Build TRL's trainer for the recipe and the hardware."""
    import torch
    import transformers
    from peft import LoraConfig
    from trl import SFTTrainer

    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    num_per_process = args.conversations_per_step // num_processes
    batch_size = args.batch_size or (max(1, num_per_process) if device == "cuda" else 1)
    if args.conversations_per_step % (batch_size * num_processes):
        fail(
            f"--conversations-per-step {args.conversations_per_step} is not divisible by "
            f"{batch_size * num_processes} (--batch-size {batch_size} × "
            f"{num_processes} processes). Change one of these numbers."
        )
    checkpointing = bool(args.activation_checkpointing)
    if args.activation_checkpointing is None and device == "cuda":
        longest = max(len(ids) for ids in training["input_ids"])
        checkpointing = needs_checkpointing(model, batch_size * longest)
    # The backward pass of cuDNN's attention gives NaN in padded bf16 batches (pytorch#196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(args.tracker_dir))
    is_bf16 = model.dtype == torch.bfloat16
    num_accumulated = num_per_process // batch_size
    lora = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=LORA_TARGETS,
        task_type="CAUSAL_LM",
    )
    is_labelled = device != "cuda" and args.loss_on == "model-turns"
    trainer_class = with_base(LabelledTrainer, SFTTrainer) if is_labelled else SFTTrainer
    trainer = trainer_class(
        model,
        make_config(
            args, device, is_bf16, batch_size, num_accumulated, checkpointing, checkpoint_dir
        ),
        train_dataset=training,
        eval_dataset=validation,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=make_callbacks(),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL makes the adapter of a 4-bit model bf16
            parameter.data = parameter.data.float()
    return trainer


def find_last_checkpoint(checkpoint_dir: Path) -> Path | None:
    """The newest complete checkpoint: the Trainer writes trainer_state.json last."""
    complete = []
    for path in checkpoint_dir.glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(ValueError):  # cut off by a kill or a full disk
            json.loads(path.read_text(encoding="utf-8"))
            complete.append(path.parent)
    return max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)


def train(trainer: SFTTrainer, checkpoint: Path | None) -> None:
    """Train from a checkpoint or from the start; keep the weights of the lowest validation loss."""
    from transformers import TrainerState

    if checkpoint:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step >= state.max_steps:  # trainer.train() would do one more step
            best = checkpoint.with_name(f"checkpoint-{state.best_global_step}")
            trainer.state = state
            trainer.model.load_adapter(str(best), trainer.model.active_adapter)
            return
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ReportProgress):
                callback.close_bars()  # so that an error starts on a line of its own


# The arguments that a result depends on. A run can be resumed with the same values only.
RECIPE = [
    "epochs",
    "conversations_per_step",
    "learning_rate",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "loss_on",
    "max_length",
    "validation_size",
    "seed",
    "load_in_4bit",
    "max_steps",
]


def hash_weights(model_dir: Path) -> str:
    """One sha256 of all weights of a local model: the name of its folder does not identify it."""
    digest = hashlib.sha256()
    for path in sorted(model_dir.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def describe_run(
    args: argparse.Namespace, model_dir: Path, commit: str | None, dtype: torch.dtype
) -> dict:
    """Everything that the adapter depends on."""
    return {
        "model_name": args.model_name,
        "commit": commit,
        "weights_sha256": None if commit else hash_weights(model_dir),
        "train_split_sha256": hashlib.sha256(args.train_file.read_bytes()).hexdigest(),
        "dtype": str(dtype).removeprefix("torch."),
        **{name: getattr(args, name) for name in RECIPE},
    }


def describe_change(name: str, before: object, now: object) -> str:
    """How a setting of an earlier run differs from that of this one, in words."""
    if name == "train_split_sha256":
        return "another train split"
    if name == "weights_sha256":
        return "other weights in --model"
    if name == "commit":
        if before and now:
            return f"--revision {before}, not {now}"
        return "a model from the Hub" if before else "a local folder as --model"
    flag = "--model" if name == "model_name" else f"--{name.replace('_', '-')}"
    if before is None or before is False:  # but not 0
        return f"no {flag}"
    if before is True:
        return flag
    return f"{flag} {before}" if now is None else f"{flag} {before}, not {now}"


def check_earlier_run(args: argparse.Namespace, run: dict) -> None:
    """Stop unless the folders are empty, or contain a run that may be replaced or continued."""
    begun = args.checkpoint_dir / "run.json"
    finished = args.output_dir / "training_run.json"
    earlier = begun if begun.is_file() else finished
    if is_merged_model(args.output_dir):
        fail(f"--output-dir {args.output_dir} is a merged model. Choose a new folder.")
    if not earlier.is_file():
        if args.output_dir.is_dir() and any(args.output_dir.iterdir()):
            fail(
                f"--output-dir {args.output_dir} contains files that are not from a training run. "
                "Choose a new folder."
            )
    elif args.resume:
        try:
            before = json.loads(earlier.read_text(encoding="utf-8"))
        except ValueError:
            fail(f"cannot resume: {earlier} is damaged. Use --overwrite to start over.")
        names = list(run)
        if earlier == finished and (args.merge or args.push_to_hub):
            names = ["model_name", "commit", "weights_sha256"]  # the rest was for training
        if before.get("commit") != run["commit"]:
            names.remove("weights_sha256")  # only local models have it
        changes = [
            describe_change(name, before[name], run[name])
            for name in names
            if name in before and before[name] != run[name]
        ]
        if changes:
            fail(
                f"cannot resume: the run in {args.output_dir} was started with "
                f"{' and '.join(changes)}. Use the original flags and files, or --overwrite to "
                "start over."
            )
    elif not args.overwrite:
        found = "a finished run. Use --resume with --merge or --push-to-hub to merge or upload it"
        if earlier == begun:
            found = "an unfinished run. Use --resume to continue it"
        fail(
            f"{args.output_dir} already contains {found}, --overwrite to start over, or another "
            "--output-dir."
        )
    if args.merge and args.merged_dir.is_dir():
        check_merged_model(args, may_replace=args.overwrite or earlier.is_file())


def check_merged_model(args: argparse.Namespace, may_replace: bool) -> None:
    """Stop unless the existing folder for the merged model may be replaced."""
    if not is_merged_model(args.merged_dir):
        fail(
            f"{args.merged_dir} contains files that are not from --merge. Move that folder, or "
            "choose another --output-dir."
        )
    if Path(args.model).expanduser().resolve() == args.merged_dir.resolve():
        fail(
            f"{args.merged_dir} is the base model of this run, and --merge would replace it. "
            "Choose another --output-dir."
        )
    if not may_replace:
        fail(
            f"{args.merged_dir} already contains a merged model. Use --overwrite to replace it, or "
            "choose another --output-dir."
        )


def is_merged_model(folder: Path) -> bool:
    """Whether --merge wrote a folder. An adapter's folder has training_run.json, too."""
    is_adapter = (folder / "adapter_config.json").is_file()
    return (folder / "training_run.json").is_file() and not is_adapter


@contextlib.contextmanager
def lock_run(args: argparse.Namespace) -> Iterator[None]:
    """Refuse a second process that trains into the same folder.

    The operating system releases the lock of a process that is killed.
    """
    import filelock

    args.checkpoint_dir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(args.checkpoint_dir / "lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        fail(
            f"another process is already training in {args.output_dir}. Wait until it has "
            "finished, or choose another --output-dir."
        )
    try:
        yield
    finally:
        (args.checkpoint_dir / "lock").unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):  # not empty: a run can be resumed from it
            args.checkpoint_dir.rmdir()


def remove_checkpoints(checkpoint_dir: Path) -> None:
    """Remove run.json first: without it, nothing is resumed from the checkpoints."""
    (checkpoint_dir / "run.json").unlink(missing_ok=True)
    (checkpoint_dir / "README.md").unlink(missing_ok=True)  # TRL's model card
    for checkpoint in checkpoint_dir.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def peak_memory() -> float:
    """Peak memory of this process in GB: reserved on the GPU, or resident on a CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def plot_losses(history: list[dict], best_step: int, path: Path, title: str) -> None:
    """Draw both losses over the optimizer steps, and mark the checkpoint that was kept."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "C0."), ("eval_loss", "validation", "C1o")):
        steps = [entry["step"] for entry in history if key in entry]
        losses = [entry[key] for entry in history if key in entry]
        axes.plot(steps, losses, f"{style}-", label=label)
        if key == "eval_loss" and best_step in steps:
            best = losses[steps.index(best_step)]
            label = f"saved: step {best_step:,}, {best:.4f}"
            axes.plot(best_step, best, "C3*", markersize=14, label=label)
    axes.set(title=title, xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(left=0)
    axes.legend()
    figure.savefig(path, dpi=150)


TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
]


def copy_files(names: list[str], source: Path, target: Path) -> None:
    """Copy those of the named files that exist."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_results(
    trainer: SFTTrainer, model_dir: Path, template: str, args: argparse.Namespace, run: dict
) -> None:
    """Write everything that the adapter folder contains. training_run.json is written last."""
    from transformers import GenerationConfig

    state = trainer.state
    tokenizer = trainer.processing_class
    folder = args.output_dir
    (folder / "training_run.json").unlink(missing_ok=True)
    is_hub_model = run["commit"] is not None
    lora = trainer.model.peft_config["default"]
    lora.base_model_name_or_path = args.model if is_hub_model else str(model_dir.resolve())
    lora.revision = run["commit"]
    trainer.model.save_pretrained(folder, save_embedding_layers=False)
    # Remove the model card of PEFT: write_model_card writes our own.
    (folder / "README.md").unlink(missing_ok=True)

    # The tokenizer of the base model; only the chat template differs.
    copy_files(TOKENIZER_FILES, model_dir, folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8")) | {"chat_template": template}
    config_path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")],
    ).save_pretrained(folder)

    title = f"{args.model_name}: LoRA on function calling"
    plot_losses(state.log_history, state.best_global_step, folder / "loss.png", title)
    training_run = {
        **run,
        "model": args.model,
        "conversations": {
            "training": len(trainer.train_dataset),
            "validation": len(trainer.eval_dataset),
        },
        "seconds": max(entry.get("seconds", 0.0) for entry in state.log_history),
        "peak_memory_gb": round(peak_memory(), 2),
        "best_step": state.best_global_step,
        "log_history": state.log_history,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
    }
    (folder / "training_run.json").write_text(json.dumps(training_run, indent=2), encoding="utf-8")


def merge_adapter(model_dir: Path, args: argparse.Namespace) -> None:
    """Write base model and adapter as one plain Transformers model, merged and kept in float32."""
    import torch
    from peft import PeftModel
    from transformers import GenerationConfig

    partial = Path(f"{args.merged_dir}-partial")
    if partial.exists():
        shutil.rmtree(partial)
    model, _ = load_model(model_dir, torch.float32)
    model = PeftModel.from_pretrained(model, args.output_dir).merge_and_unload()
    model.generation_config = GenerationConfig.from_pretrained(args.output_dir)
    model.save_pretrained(partial)
    others = [*TOKENIZER_FILES, "chat_template.jinja", "training_run.json"]
    copy_files(others, args.output_dir, partial)
    if args.merged_dir.exists():
        shutil.rmtree(args.merged_dir)
    partial.rename(args.merged_dir)
    print(f"Merged      {args.merged_dir}/")


MODEL_CARD = """\
---
{front_matter}
---
# {name}

A LoRA adapter that teaches {base} to call functions.

| | |
|---|---|
| Base model | {base} |
| Training data | {data} |
| Recipe | {recipe} |
| Validation loss | {loss:.4f} nats per token, at step {best_step} of {steps} |

![Training and validation loss](loss.png)

## Scores

{scores}

## Use it in Python

```python
import json
import re

from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

adapter = "{address}"
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = AutoModelForCausalLM.from_pretrained(adapter, dtype="auto")
stops = GenerationConfig.from_pretrained(adapter)

parameters = {{"type": "object", "properties": {{"city": {{"type": "string"}}}}}}
function = {{"name": "get_weather", "description": "Get the weather", "parameters": parameters}}
tools = [{{"type": "function", "function": function}}]
messages = [{{"role": "user", "content": "What is the weather in Oslo?"}}]

options = {{"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}}
inputs = tokenizer.apply_chat_template(messages, tools=tools, **options)
tokens = model.generate(**inputs, generation_config=stops, max_new_tokens=256, do_sample=False)
answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
spoken = answer.split("</think>")[-1]  # without thoughts, which may contain drafts of calls
calls = [json.loads(c) for c in re.findall("<tool_call>(.*?)</tool_call>", spoken, re.DOTALL)]
print(calls or answer)
```

To continue, append the answer and `{{"role": "tool", "content": "<the result>"}}` to `messages`,
and generate again.

## Serve it with vLLM

```bash
{download}vllm serve {base} --enable-lora --max-lora-rank {vllm_rank} \\
    --lora-modules function-calling={address} \\
    --chat-template {template} \\
    --enable-auto-tool-choice --tool-call-parser hermes --max-model-len 4096
```

## License

Gemma is provided under and subject to the [Gemma Terms of Use](https://ai.google.dev/gemma/terms),
which also apply to this adapter.{data_license}
"""
RECIPE_IN_WORDS = (
    "LoRA of rank {lora_rank}, alpha {lora_alpha}, dropout {lora_dropout} on all linear "
    "layers; {steps} steps of {conversations_per_step} conversations; AdamW, peak learning "
    "rate {learning_rate}, 10% warm-up, cosine decay; loss on {loss_on}; {precision}; seed {seed}"
)
ADAPTER_FILES = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "generation_config.json",
    "loss.png",
    "training_run.json",
    *TOKENIZER_FILES,
]
PUBLISHED_DATA = "NousResearch/hermes-function-calling-v1"


def describe_scores(args: argparse.Namespace) -> str:
    """The scores of exactly these weights on the most queries, if evaluation.py wrote any."""
    weights = (args.output_dir / "adapter_model.safetensors").read_bytes()
    adapter_sha256 = hashlib.sha256(weights).hexdigest()
    paths = sorted(Path("evaluation_results", args.model_name).glob("*/metrics.json"))
    evaluations = []
    for path in paths:
        # Skip files that are damaged, and runs without an adapter.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            metrics = json.loads(path.read_text(encoding="utf-8"))
            if metrics["run"]["adapter_sha256"] == adapter_sha256:
                evaluations.append(metrics)
    if not evaluations:
        return "Not evaluated yet."
    metrics = max(evaluations, key=lambda metrics: metrics["queries"])
    rows = ["| score | value | 95% CI | n |", "|---|---|---|---|"]
    labels = metrics.get("labels", {})
    for name, score in metrics["scores"].items():
        if score.get("value") is not None:
            low, high = score["interval"]
            label = labels.get(name, name.replace("_", " "))
            rows.append(
                f"| {label} | {score['value']:.3f} | {low:.3f}, {high:.3f} | {score['n']} |"
            )
    return "\n".join(rows)


def describe_data(dataset: str | None, counts: dict[str, int] | None) -> str:
    """The source and size of the training data; adapters of earlier versions lack the counts."""
    source = f"[{dataset}](https://huggingface.co/datasets/{dataset})" if dataset else "local data"
    if counts is None:
        return source
    return (
        f"{source}: {counts['training']:,} conversations for training, "
        f"{counts['validation']:,} for validation"
    )


def best_loss(training_run: dict) -> float:
    """The validation loss of the weights that were kept."""
    history = training_run["log_history"]
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    return losses[training_run["best_step"]]


def write_model_card(args: argparse.Namespace, info: dict, training_run: dict) -> None:
    """Write the model card, unless the folder already has the same text."""
    from huggingface_hub import ModelCardData

    if info.get("train", {}).get("sha256") != training_run["train_split_sha256"]:
        info = {}  # other data has been prepared since
    dataset = None
    if info.get("is_published_split"):
        dataset = PUBLISHED_DATA
    elif info.get("is_hub_dataset"):
        dataset = info["source"]["dataset"]
    is_hub_model = training_run["commit"] is not None
    front_matter = ModelCardData(
        base_model=args.model if is_hub_model else None,  # the Hub accepts only its own ids
        datasets=[dataset] if dataset else None,
        library_name="peft",
        license="gemma",
        pipeline_tag="text-generation",
        tags=["lora", "function-calling", "gemma-3"],
    )
    address = args.push_to_hub or str(args.output_dir)
    template = f"{address}/chat_template.jinja"
    download = ""
    if args.push_to_hub:
        template = "chat_template.jinja"
        download = f"hf download {address} {template} --local-dir .\n"
    steps = training_run["log_history"][-1]["step"]
    in_4bit = ", base model in 4 bits" if training_run["load_in_4bit"] else ""
    precision = training_run["dtype"] + in_4bit
    card = MODEL_CARD.format(
        front_matter=front_matter.to_yaml(),
        name=args.output_dir.name,
        base=args.model,
        data=describe_data(dataset, training_run.get("conversations")),
        recipe=RECIPE_IN_WORDS.format(**training_run, steps=steps, precision=precision),
        loss=best_loss(training_run),
        best_step=training_run["best_step"],
        steps=steps,
        scores=describe_scores(args),
        address=address,
        download=download,
        template=template,
        vllm_rank=max(16, 2 ** math.ceil(math.log2(training_run["lora_rank"]))),
        data_license=(
            " The training data is licensed under Apache-2.0." if dataset == PUBLISHED_DATA else ""
        ),
    )
    path = args.output_dir / "README.md"
    if not path.is_file() or path.read_text(encoding="utf-8") != card:
        path.write_text(card, encoding="utf-8")


def push_adapter(args: argparse.Namespace) -> None:
    """Upload the files of the adapter by name, so that nothing else in the folder is published."""
    from huggingface_hub import HfApi

    HfApi().upload_folder(
        repo_id=args.push_to_hub,
        folder_path=args.output_dir,
        allow_patterns=ADAPTER_FILES,
    )
    print(f"Uploaded    https://huggingface.co/{args.push_to_hub}")


def create_repository(repository: str) -> str:
    """Create the repository of --push-to-hub now, so that a typo does not waste a training run.

    Returns its full name: the Hub puts the user's name before a name without a slash.
    """
    from huggingface_hub import HfApi, errors

    advice = "Check the name, and run `hf auth login` with a token that has write access."
    try:
        return HfApi().create_repo(repository, private=True, exist_ok=True).repo_id
    except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError, ValueError) as error:
        fail(f"repository {repository} cannot be created ({describe(error)}). {advice}")
    except (OSError, errors.HTTPError):
        fail(
            f"--push-to-hub {repository}: cannot connect to the Hub. Check the network connection, "
            "or train without --push-to-hub and upload later with --resume --push-to-hub."
        )


def evaluation_command(args: argparse.Namespace, *flags: str) -> str:
    """The command of step 3, ready to paste, without flags that have their default values."""
    command = ["python", "evaluation.py", *flags]
    if args.model != DEFAULT_MODEL:
        command += ["--model", args.model]
    is_baseline = "--baseline" in flags
    if is_baseline and args.revision:
        command += ["--revision", args.revision]
    if not is_baseline and args.output_dir != args.default_output_dir:
        command += ["--adapter", str(args.output_dir)]
    if args.train_file.parent != DEFAULT_TRAIN_FILE.parent:
        command += ["--test-file", str(args.train_file.with_name("function_calling_test.jsonl"))]
    return shlex.join(command)


def has_baseline(args: argparse.Namespace, info: dict) -> bool:
    """Whether evaluation.py has scored the baseline on the test split of this run."""
    metrics = Path("evaluation_results", args.model_name, "baseline", "metrics.json")
    try:
        run = json.loads(metrics.read_text("utf-8"))["run"]
        return run["test_split_sha256"] == info["test"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def finish(args: argparse.Namespace, info: dict, model_dir: Path, is_new: bool) -> None:
    """Describe, merge and upload a finished adapter as asked, and print the next commands."""
    training_run = json.loads((args.output_dir / "training_run.json").read_text(encoding="utf-8"))
    if is_new:
        steps = training_run["log_history"][-1]["step"]
        seconds = training_run["seconds"]
        memory = training_run["peak_memory_gb"]
        print(f"Trained     {steps:,} steps in {seconds:,.0f} s, peak memory {memory:.1f} GB")
    else:
        print("Finished    this run is complete; nothing is left to train")
    print(f"Adapter     {args.output_dir}/, validation loss {best_loss(training_run):.4f}")
    if args.merge:
        merge_adapter(model_dir, args)
    elif is_new and is_merged_model(args.merged_dir):
        print(
            f"Note        {args.merged_dir}/ contains an earlier adapter. --resume --merge "
            "replaces it"
        )
    write_model_card(args, info, training_run)
    if args.push_to_hub:
        push_adapter(args)
    label = "Next        "
    if not has_baseline(args, info):
        print(f"{label}{evaluation_command(args, '--baseline')}")
        label = " " * len(label)
    print(f"{label}{evaluation_command(args)}")


def configure_process() -> None:
    """Hide what libraries print, and let one process without torchrun use one GPU only."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", FutureWarning)
    if "WORLD_SIZE" not in os.environ:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]

    import datasets
    import transformers

    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


MEMORY_ERRORS = "out of memory|can't allocate memory|not enough memory|ALLOC_FAILED"


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """End the program with one line on Ctrl-C and on errors that a user can do something about."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(
            "interrupted: to continue, run the same command with --resume (instead of --overwrite)"
        )
    except subprocess.CalledProcessError as error:
        if "-shared" not in error.cmd:  # else Triton called the C compiler
            raise
        fail_without_compiler()
    except RuntimeError as error:
        text = describe(error)
        if "Failed to find C compiler" in text:
            fail_without_compiler()
        if re.search(MEMORY_ERRORS, text):
            fail(
                f"memory ran out ({textwrap.shorten(text, 150)}). Run the same command with "
                "--resume (instead of --overwrite) --batch-size 1 --activation-checkpointing. If "
                "that is not enough, start over with --overwrite and a smaller --max-length."
            )
        if "no kernel image" in text:
            fail(
                "the installed PyTorch does not support this GPU. The build for CUDA 12.6 supports "
                "older ones: `pip install torch==2.13.0 --index-url "
                "https://download.pytorch.org/whl/cu126`."
            )
        if "inline_container" in text:  # torch.save
            fail("a checkpoint cannot be written. Free some disk space and continue with --resume.")
        if "installed" in text:  # the package of a tracker or of --load-in-4bit
            fail(text)
        raise
    except Exception as error:
        from huggingface_hub.errors import HTTPError
        from safetensors import SafetensorError

        if not isinstance(error, (OSError, ValueError, HTTPError, SafetensorError)):
            raise
        fail(describe(error))


def fail_without_compiler() -> NoReturn:
    fail(
        "Triton, which computes the loss on CUDA, cannot compile. It needs a C compiler and the "
        "headers of Python: on Debian or Ubuntu, run `apt install gcc python3-dev`, then the same "
        "command with --resume."
    )


def print_start(
    trainer: SFTTrainer,
    dtype: str,
    checkpoint: Path | None,
    num_dropped: int,
    args: argparse.Namespace,
) -> None:
    start = "new run, because there is nothing to resume" if args.resume else "new run"
    if checkpoint:
        start = f"continuing from {checkpoint}"
    print(f"Model       {args.model}, {dtype} on {trainer.args.device.type}, {start}")
    print(
        f"Data        {len(trainer.train_dataset):,} conversations for training, "
        f"{len(trainer.eval_dataset):,} for validation, {num_dropped:,} dropped "
        f"(over {args.max_length:,} tokens, or left over after the last full step)",
        flush=True,
    )
    if args.report_to == "tensorboard":
        folder = os.environ["TENSORBOARD_LOGGING_DIR"]
        print(f"Tracker     tensorboard --logdir {shlex.quote(folder)}")


def run(args: argparse.Namespace) -> None:
    """Train the adapter, or continue, or only finish it."""
    is_main = int(os.environ.get("RANK", 0)) == 0  # torchrun starts several processes
    conversations, info = read_split(args.train_file)
    device, dtype = choose_device(args.dtype)
    if args.load_in_4bit and device != "cuda":
        fail(f"--load-in-4bit needs a CUDA GPU, and this machine has none (device: {device}).")
    model_dir, commit = find_model(args)
    settings = describe_run(args, model_dir, commit, dtype)
    begun = args.checkpoint_dir / "run.json"
    is_continued = args.resume and begun.is_file()
    with lock_run(args) if is_main else contextlib.nullcontext():
        if is_main:
            check_earlier_run(args, settings)
            if args.push_to_hub:
                args.push_to_hub = create_repository(args.push_to_hub)
        if args.resume and not is_continued and (args.output_dir / "training_run.json").is_file():
            if is_main:
                finish(args, info, model_dir, is_new=False)
            return

        model, tokenizer = load_model(model_dir, dtype, args.load_in_4bit)
        template = make_template(info["prompt"], tokenizer, args.loss_on)
        serving_template = make_template(info["prompt"], tokenizer, "serving")
        training, validation, num_dropped = build_datasets(conversations, tokenizer, template, args)
        trainer = build_trainer(
            model, tokenizer, training, validation, args, args.checkpoint_dir, device
        )
        checkpoint = find_last_checkpoint(args.checkpoint_dir) if is_continued else None
        if is_main:
            args.output_dir.mkdir(parents=True, exist_ok=True)  # fails now rather than at the end
            if not is_continued:
                remove_checkpoints(args.checkpoint_dir)
                begun.write_text(json.dumps(settings, indent=2), encoding="utf-8")
            print_start(trainer, settings["dtype"], checkpoint, num_dropped, args)
        train(trainer, checkpoint)
        trainer.accelerator.wait_for_everyone()  # every process has read the best checkpoint
        trainer.accelerator.end_training()
        if is_main:
            write_results(trainer, model_dir, serving_template, args, settings)
            remove_checkpoints(args.checkpoint_dir)
            finish(args, info, model_dir, is_new=True)


def main(argv: list[str] | None = None) -> None:
    with contextlib.suppress(AttributeError):  # the output of a notebook cannot be reconfigured
        sys.stdout.reconfigure(errors="backslashreplace")  # a file on Windows may not be UTF-8
    args = parse_args(argv)
    with exit_on_error():
        configure_process()
        run(args)


if __name__ == "__main__":
    main()
