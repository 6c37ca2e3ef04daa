"""What the benchmarks share: Gemma 3 models of real shapes with random weights, conversations of the published lengths, a
process of its own for each side, and the table."""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

SHAPES = {
    "270m": {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18},
    "1b": {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 2048},  # to try the benchmarks themselves
}
TAG_IDS = list(range(6, 14))  # the slots of Gemma's vocabulary that the tags take over
END_OF_TURN = 106
FIRST_WORD = 300  # token ids from here on are plain words


def vocab_size(size):
    return SHAPES[size].get("vocab_size", 262_144)


def write_model(size, folder):
    """A model of the shape of gemma-3-270m or 1b with random weights, stored in bf16 as Gemma's are."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(**{"vocab_size": vocab_size(size), "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
                                 "sliding_window": 512, "query_pre_attn_scalar": 256, "max_position_embeddings": 32_768,
                                 "tie_word_embeddings": True, **SHAPES[size]})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def make_tokenizer():
    """A tokenizer with the few tokens that a trainer asks for; the rows are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
                                   **{f"{word[1:-1]}_token": word for word in words})


def draw_turn(rng):
    """Tokens of a turn: median 50, mean about 100."""
    return min(800, max(3, round(rng.lognormvariate(3.912, 1.18))))


def draw_rows(num_rows, vocab_size, length=None, seed=0):
    """`num_rows` rows {"input_ids", "labels"} of random tokens, spread evenly over the lengths of the published conversations.

    With `length`, all have this one. The published are about a log-normal of median 565 and mean about 650, 95 % under 1,200, and none
    over 4,096. About half of the tokens stand in model turns and carry a label.
    """
    rng = random.Random(seed)
    rows = []
    for number in range(num_rows):
        quantile = statistics.NormalDist().inv_cdf((number + 0.5) / num_rows)
        num_tokens = length or min(4096, round(565 * math.exp(0.5 * quantile)))
        ids, said = [2], [False]
        while len(ids) < num_tokens:
            for is_model in (False, True):
                turn = draw_turn(rng)
                ids += [rng.randrange(FIRST_WORD, vocab_size) for _ in range(turn)]
                said += [is_model] * turn
        labels = [token if is_model else -100 for token, is_model in zip(ids, said)]
        labels[1] = ids[1]  # a row that is cut short of its first model turn has something to learn, too
        rows.append({"input_ids": ids[:num_tokens], "labels": labels[:num_tokens]})
    rng.shuffle(rows)
    return rows


def peak_memory(device):
    """Peak memory of this process in GB: of the host, or allocated on the GPU."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "linux":  # ru_maxrss would be the parent's, had it been larger
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024 / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS: bytes


def make_parser(description):
    """A parser with what training and generation have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--model", choices=list(SHAPES), default="270m", help="shape of the model (default: 270m)")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--model-dir", type=Path, help=argparse.SUPPRESS)
    return parser


def parse_args(parser):
    """What the command line says; asked for a GPU where there is none, the program ends."""
    args = parser.parse_args()
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            sys.exit("error: --device cuda: this machine has no CUDA GPU")
    return args


def run_side(script, side, arguments):
    """Run one side of a benchmark in a process of its own; returns what it measured."""
    print(f"running     {side} ...", flush=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if "cuda" not in arguments:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # the scripts would choose a GPU, and its dtype
    process = subprocess.run([sys.executable, script, "--side", side, *arguments], stdout=subprocess.PIPE, text=True, env=environment)
    if process.returncode:
        sys.exit(f"error: {side} failed, see above")
    return json.loads(process.stdout.splitlines()[-1])


def memory_rows(device):
    """The lines of the table that tell peak memory."""
    if device == "cuda":
        return [("peak memory, GPU (GB)", "peak_gb", "{:,.2f}"), ("peak memory, host (GB)", "host_gb", "{:,.2f}")]
    return [("peak memory (GB)", "peak_gb", "{:,.2f}")]


def print_table(title, rows, sides, reference):
    """A table with a line for each of `rows`, (label, key, format), and the ratio of each side to the side `reference`."""
    names = list(sides)
    print(f"\n{title}\n")
    print("| " + " | ".join(["", *names, *(f"{name} : {reference}" for name in names if name != reference)]) + " |")
    print("|---" * (2 * len(names)) + "|")
    for label, key, form in rows:
        values = [sides[name].get(key) for name in names]
        if all(value is None for value in values):
            continue
        base = sides[reference].get(key)
        ratios = [f"{sides[name][key] / base:.2f}" if base and sides[name].get(key) else "-" for name in names if name != reference]
        print("| " + " | ".join([label, *("-" if value is None else form.format(value) for value in values), *ratios]) + " |")
    print()


def describe_machine(device):
    import importlib.metadata
    import platform

    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("torch", "transformers", "trl", "peft"))
    return f"{name}; {versions}"
