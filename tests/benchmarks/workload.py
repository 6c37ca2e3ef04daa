"""What the benchmarks share: a model, conversations, a process of its own for each side, a table.

Models have random weights, which cost what real ones cost. Conversations are of made-up words, each
one token, and as long as the published ones. --model and --data measure real ones instead.
"""

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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

SHAPES = {
    "270m": {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18},
    "1b": {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},  # for tests
}
VOCABULARY = ["<pad>", "<eos>", "<bos>", "<unk>", "user", "model", "<start_of_turn>"]
VOCABULARY += ["<end_of_turn>", *(f"w{number}" for number in range(2000))]
STOCK_TEMPLATE = """{{ bos_token }}{% for message in messages %}
<start_of_turn> {{ 'model' if message.role == 'assistant' else message.role }}
{{ message.content }} <end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn> model
{% endif %}"""


def parse_args(description, add_arguments):
    """The arguments of a benchmark; `add_arguments` adds its own to those that all have."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--model-shape", choices=SHAPES, default="270m", help="default: 270m")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a real model, with --data")
    parser.add_argument("--data", type=Path, metavar="FILE", help="a split of step 1, for --model")
    parser.add_argument("--threads", type=int, help="threads on a CPU (default: torch's choice)")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--work-dir", type=Path, help=argparse.SUPPRESS)
    add_arguments(parser)
    args = parser.parse_args()
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data belong together: made-up words are no real tokens")
    return args


def make_config(shape: str, **options):
    """The configuration of a shape of Gemma 3; `options` take precedence."""
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


def write_model(shape, folder):
    """Write a model of a shape of Gemma 3 with random weights in bf16, and a tokenizer for it."""
    import tokenizers
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = make_config(shape)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    words = {word: number for number, word in enumerate(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([word for word in VOCABULARY if word.startswith("<")])
    special = {f"{word[1:-1]}_token": word for word in VOCABULARY[:4]}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    tokenizer.chat_template = STOCK_TEMPLATE
    tokenizer.save_pretrained(folder)


def draw_turn(rng):
    """Tokens of a turn: median 50, mean about 100, as in the published data."""
    return min(800, max(5, round(rng.lognormvariate(math.log(50), 1.18))))


def draw_conversations(number, seed=0):
    """Draw rows of a split, spread evenly over the lengths of the published conversations.

    These are about a log-normal of median 565 and mean 650 tokens, 95 % under 1,200, none over
    4,096. About half of the tokens stand in turns of the model.
    """
    rng, rows = random.Random(seed), []
    for n in range(number):
        quantile = statistics.NormalDist().inv_cdf((n + 0.5) / number)
        num_tokens = min(4096, 565 * math.exp(0.5 * quantile))
        turns = []
        while sum(turns) < num_tokens:
            turns += [draw_turn(rng), draw_turn(rng)]
        messages = []
        for place, turn in enumerate(turns):
            role = ("user", "assistant", "tool", "assistant")[place % 4]
            num_words = max(1, round(turn * num_tokens / sum(turns)) - 3)  # three open and close it
            messages.append(
                {"role": role, "content": " ".join(rng.choices(VOCABULARY[8:], k=num_words))}
            )
        rows.append({"id": str(n), "messages": messages, "tools": "[]"})
    rng.shuffle(rows)
    return rows


def read_conversations(path):
    """The rows of a split."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_inputs(args, num_conversations, work_dir):
    """Write what all sides read: model/ and split.jsonl, with dataset_info.json beside it."""
    if args.model:
        (work_dir / "model").symlink_to(args.model.resolve())
        # All sides would drop conversations over 4,096 tokens.
        rows = [row for row in read_conversations(args.data) if len(str(row)) < 12_000]
        rows = random.Random(0).sample(rows, num_conversations)
        info = args.data.with_name("dataset_info.json").read_text(encoding="utf-8")
    else:
        write_model(args.model_shape, work_dir / "model")
        rows = draw_conversations(num_conversations)
        info = {"prompt": {"before_tools": "", "after_tools": "", "before_request": ""}}
        info = json.dumps(info)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (work_dir / "split.jsonl").write_text(lines, encoding="utf-8")
    (work_dir / "dataset_info.json").write_text(info, encoding="utf-8")


def peak_memory():
    """Peak memory of this process in GB: allocated on the GPU, or resident on a CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "linux":  # ru_maxrss would be the parent's, had it been larger
        status = Path("/proc/self/status").read_text().split()
        return int(status[status.index("VmHWM:") + 1]) * 1024 / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS: bytes


def run_sides(script, sides, args, num_conversations):
    """Run the sides one after the other, each in its own process: {side: what it measured}."""
    results, environment = {}, {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    environment["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]  # one card, as in the scripts
    if args.threads:
        environment["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory() as work_dir:
        write_inputs(args, num_conversations, Path(work_dir))
        for side in sides:
            print(f"running     {side} ...", flush=True)
            command = [sys.executable, script, *sys.argv[1:], "--side", side]
            command += ["--work-dir", work_dir]
            process = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
            if process.returncode:
                sys.exit(f"error: {side} failed, see above")
            results[side] = json.loads(process.stdout.splitlines()[-1])
    return results


def print_results(title, args, rows, results, reference):
    """Print a table with a line for each of `rows`, (label, key, format), and all as JSON.

    Its last columns are the ratios of the other sides to the side `reference`.
    """
    import torch

    device = f"CPU ({platform.machine()}), {args.threads or torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    model = args.model or f"shape of Gemma 3 {args.model_shape}, random weights"
    packages = ("torch", "transformers", "trl", "peft")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(f"\n{title}; {model}; {device}; {versions}\n")
    others = [side for side in results if side != reference]
    titles = ["", *results, *(f"{side} : {reference}" for side in others)]
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for label, key, form in rows:
        cells = [form.format(result[key]) for result in results.values()]
        cells += [f"{results[side][key] / results[reference][key]:.2f}" for side in others]
        print("| " + " | ".join([label, *cells]) + " |")
    print(f"\n{json.dumps(results)}")
