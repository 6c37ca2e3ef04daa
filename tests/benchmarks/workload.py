"""Shared code of the benchmarks: inputs, one process per variant, and the table of results.

A synthetic model has random weights, which take as much time and memory as trained ones. Synthetic
conversations are as long as the published ones and consist of random words of one token each.
--model and --data replace both with a real model and a real split.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import Gemma3TextConfig, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # makes the three scripts importable

SHAPES = {
    "270m": {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18},
    "1b": {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},  # for tests
}

# The vocabulary and the chat template of a synthetic model. Its tokenizer splits at white space, so
# the template puts spaces where Gemma's template has none.
SPECIAL_TOKENS = {
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "unk_token": "<unk>",
}
TURN_TOKENS = ["<start_of_turn>", "<end_of_turn>"]
ROLES = ["user", "model"]
WORDS = [f"w{number}" for number in range(2000)]
STOCK_TEMPLATE = """{{ bos_token }}{% for message in messages %}
<start_of_turn> {{ 'model' if message.role == 'assistant' else message.role }}
{{ message.content }} <end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn> model
{% endif %}"""
TOKENS_AROUND_TURN = 3  # <start_of_turn>, the role and <end_of_turn>

MAX_CHARACTERS = 12_000  # of a real conversation, since training drops those over 4,096 tokens


class Metric(NamedTuple):
    """A row of the table of results."""

    label: str
    key: str  # of the value in the results of a variant
    format: str


def build_parser(description: str) -> argparse.ArgumentParser:
    """Build a parser with the arguments that both benchmarks have."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument(
        "--model-shape",
        choices=SHAPES,
        default="270m",
        help="Size of the synthetic model (default: %(default)s).",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="Folder of a real model to use instead. Needs --data.",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="Split written by step 1, from which conversations are drawn. Needs --model.",
    )
    parser.add_argument(
        "--threads",
        type=int,
        help="Number of CPU threads (default: the choice of PyTorch).",
    )
    # The benchmark starts itself once per variant, with these two arguments.
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--work-dir", type=Path, help=argparse.SUPPRESS)
    return parser


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the arguments and check those that build_parser adds."""
    args = parser.parse_args()
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data must be used together")
    if args.model and not args.model.is_dir():
        parser.error(f"--model {args.model} is not a folder")
    if args.data and not args.data.is_file():
        parser.error(f"--data {args.data} is not a file. Run step 1 first.")
    return args


def make_config(shape: str, **options: Any) -> Gemma3TextConfig:
    """Make the configuration of a Gemma 3 model; `options` take precedence over the shape."""
    import transformers

    values = {
        "vocab_size": 4096 if shape == "tiny" else 262_144,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
    }
    return transformers.Gemma3TextConfig(**values | SHAPES[shape] | options)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer for which each word is one token."""
    import tokenizers
    import transformers

    control_tokens = [*SPECIAL_TOKENS.values(), *TURN_TOKENS]
    vocabulary = {word: number for number, word in enumerate(control_tokens + ROLES + WORDS)}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(control_tokens)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)
    tokenizer.chat_template = STOCK_TEMPLATE
    return tokenizer


def write_model(shape: str, folder: Path) -> None:
    """Write a Gemma 3 model with random bfloat16 weights, and a tokenizer for it."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make_config(shape), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def draw_turn_length(rng: random.Random) -> int:
    """Draw the number of tokens of a turn: median 50 and mean about 100, as in the published data.

    The log-normal distribution is cut at 5 and 800 tokens.
    """
    length = round(rng.lognormvariate(math.log(50), 1.18))
    return min(800, max(5, length))


def draw_conversations(number: int, seed: int = 0) -> list[dict]:
    """Draw rows of a split whose lengths are spread evenly over those of the published data.

    The lengths of the published conversations are close to a log-normal distribution with a median
    of 565 and a mean of 650 tokens. 95% have less than 1,200 tokens, and none more than 4,096.
    About half of the tokens are in model turns.
    """
    rng = random.Random(seed)
    rows = []
    for n in range(number):
        quantile = statistics.NormalDist().inv_cdf((n + 0.5) / number)
        num_tokens = min(4096, 565 * math.exp(0.5 * quantile))
        lengths = []
        while sum(lengths) < num_tokens:
            lengths.append(draw_turn_length(rng))  # of a user or tool turn
            lengths.append(draw_turn_length(rng))  # of a model turn
        scale = num_tokens / sum(lengths)
        messages = []
        for turn, length in enumerate(lengths):
            role = ("user", "assistant", "tool", "assistant")[turn % 4]
            num_words = max(1, round(length * scale) - TOKENS_AROUND_TURN)
            words = rng.choices(WORDS, k=num_words)
            messages.append({"role": role, "content": " ".join(words)})
        rows.append({"id": str(n), "messages": messages, "tools": "[]"})
    rng.shuffle(rows)
    return rows


def read_conversations(path: Path) -> list[dict]:
    """Read the rows of a split."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_split(rows: list[dict], dataset_info: str, work_dir: Path) -> None:
    lines = [json.dumps(row) + "\n" for row in rows]
    (work_dir / "split.jsonl").write_text("".join(lines), encoding="utf-8")
    (work_dir / "dataset_info.json").write_text(dataset_info, encoding="utf-8")


def write_synthetic_inputs(shape: str, num_conversations: int, work_dir: Path) -> None:
    """Write model/, split.jsonl and dataset_info.json to a folder."""
    write_model(shape, work_dir / "model")
    wording = {"before_tools": "", "after_tools": "", "before_request": ""}
    dataset_info = json.dumps({"prompt": wording, "test": {"file": "not written"}})
    write_split(draw_conversations(num_conversations), dataset_info, work_dir)


def write_real_inputs(model: Path, data: Path, num_conversations: int, work_dir: Path) -> None:
    """Write what write_synthetic_inputs writes, from a real model and a sample of a real split."""
    rows = [row for row in read_conversations(data) if len(str(row)) < MAX_CHARACTERS]
    if len(rows) < num_conversations:
        sys.exit(
            f"error: {num_conversations} conversations of less than {MAX_CHARACTERS:,} characters "
            f"are needed, but {data} has only {len(rows)}"
        )
    (work_dir / "model").symlink_to(model.resolve())
    dataset_info = data.with_name("dataset_info.json").read_text(encoding="utf-8")
    write_split(random.Random(0).sample(rows, num_conversations), dataset_info, work_dir)


def peak_memory() -> float:
    """Peak memory of this process in GB: allocated on the GPU, or resident on a CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "linux":
        # On Linux, ru_maxrss includes the peak of the parent process before it started this one.
        status = Path("/proc/self/status").read_text().split()
        kibibytes = int(status[status.index("VmHWM:") + 1])
        return kibibytes * 1024 / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # in bytes on macOS


def make_environment(num_threads: int | None = None, one_gpu: bool = True) -> dict[str, str]:
    """Make the environment of a measured process: no network, no warnings, no progress bars.

    With several GPUs, the Trainer would split each batch, so a process sees one GPU by default.
    """
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    if one_gpu:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
    if num_threads:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    return environment


def run_variants(
    script: str, variants: list[str], args: argparse.Namespace, num_conversations: int
) -> dict[str, dict[str, float]]:
    """Run the variants one after the other, each in its own process, on the same inputs.

    Returns what each of them measured: the JSON object in the last line that it prints.
    """
    environment = make_environment(args.threads)
    results = {}
    with tempfile.TemporaryDirectory() as work_dir:
        if args.model:
            write_real_inputs(args.model, args.data, num_conversations, Path(work_dir))
        else:
            write_synthetic_inputs(args.model_shape, num_conversations, Path(work_dir))
        for variant in variants:
            print(f"Running     {variant}", flush=True)
            command = [sys.executable, script, *sys.argv[1:]]
            command += ["--variant", variant, "--work-dir", work_dir]
            process = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
            if process.returncode:
                sys.exit(f"error: {variant} failed. Its messages are above.")
            results[variant] = json.loads(process.stdout.splitlines()[-1])
    return results


def print_table(titles: Sequence[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    for cells in [titles, ["---"] * len(titles), *rows]:
        print("| " + " | ".join(cells) + " |")


def describe_conditions(args: argparse.Namespace) -> str:
    """Describe the model, the device and the versions of the libraries."""
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        num_threads = args.threads or torch.get_num_threads()
        device = f"CPU ({platform.machine()}), threads: {num_threads}"
    model = args.model or f"Gemma 3 {args.model_shape} with random weights"
    packages = ["torch", "transformers", "trl", "peft"]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"{model}; {device}; {versions}"


def print_results(
    title: str,
    args: argparse.Namespace,
    metrics: list[Metric],
    results: dict[str, dict[str, float]],
    reference: str,
) -> None:
    """Print a table with a row per metric, and the results as JSON in the last line.

    The last columns are the ratios of the other variants to the variant `reference`.
    """
    others = [variant for variant in results if variant != reference]
    ratio_titles = [f"{variant} / {reference}" for variant in others]
    rows = []
    for metric in metrics:
        row = [metric.label]
        for result in results.values():
            row.append(metric.format.format(result[metric.key]))
        for variant in others:
            ratio = results[variant][metric.key] / results[reference][metric.key]
            row.append(f"{ratio:.2f}")
        rows.append(row)
    print(f"\n{title}; {describe_conditions(args)}\n")
    print_table(["", *results, *ratio_titles], rows)
    print(f"\n{json.dumps(results)}")
