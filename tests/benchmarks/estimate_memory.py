"""Estimate the GPU memory of training for both models, and the longest batch that fits each GPU.

    python tests/benchmarks/estimate_memory.py              # the estimates, in seconds
    python tests/benchmarks/estimate_memory.py --measure    # the measurement behind them, on a CPU

function_calling_train.py uses the same estimate to decide on activation checkpointing. --measure
counts the bytes that one decoder layer keeps for the backward pass of a token, without weights: the
bytes of a model with two layers minus those of a model with one layer. It uses
torch.autograd.graph.saved_tensors_hooks. The models have random weights, and LoRA of rank 16 with
dropout as in training.
"""

from __future__ import annotations

import argparse
import bisect
from typing import TYPE_CHECKING

import workload  # makes the three scripts importable

import function_calling_train as train

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MODELS = ["270m", "1b"]
DTYPES = ["bfloat16", "float32"]
# Bytes that a GPU of each size reports: T4, L4, A100, L40S, and A100 or H100
GPUS = {"16 GB": 15.6e9, "24 GB": 23.6e9, "40 GB": 42.3e9, "48 GB": 47.6e9, "80 GB": 85.0e9}
NUM_CONVERSATIONS = 4
TYPICAL_LENGTH = 1000
MAX_LENGTH = 4096


def make_empty_model(shape: str, dtype: str) -> PreTrainedModel:
    """Make a Gemma 3 model whose weights take no memory."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        config = workload.make_config(shape)
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def find_longest(model: PreTrainedModel, gpu_bytes: float) -> int:
    """Find the longest conversations, in tokens, of which four fit without checkpointing."""

    def memory(length: int) -> float:
        return train.estimate_memory(model, NUM_CONVERSATIONS * length, checkpointing=False)

    usable = train.USABLE_SHARE * gpu_bytes
    return bisect.bisect_right(range(1, MAX_LENGTH + 1), usable, key=memory)


def print_estimates() -> None:
    """Print a row for each model and precision.

    Columns: the weights in GB; the peak memory in GB for two lengths, with and without activation
    checkpointing; the longest conversations that fit each GPU without it, in tokens.
    """
    titles = [
        "model",
        "dtype",
        "weights",
        "4 x 1,000",
        "4 x 4,096",
        "4 x 1,000, kept",
        "4 x 4,096, kept",
        *GPUS,
    ]
    rows = []
    for shape in MODELS:
        for dtype in DTYPES:
            model = make_empty_model(shape, dtype)
            row = [shape, dtype, f"{model.get_memory_footprint() / 1e9:.1f}"]
            for checkpointing in (True, False):
                for length in (TYPICAL_LENGTH, MAX_LENGTH):
                    num_tokens = NUM_CONVERSATIONS * length
                    memory = train.estimate_memory(model, num_tokens, checkpointing)
                    row.append(f"{memory / 1e9:.1f}")
            for gpu_bytes in GPUS.values():
                row.append(f"{find_longest(model, gpu_bytes):,}")
            rows.append(row)
    workload.print_table(titles, rows)


def count_kept_bytes(shape: str, dtype: str, num_layers: int, num_tokens: int) -> int:
    """Count the bytes that the layers keep for the backward pass of two conversations."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = workload.make_config(shape, vocab_size=512, num_hidden_layers=num_layers)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    lora = LoraConfig(r=16, lora_alpha=64, lora_dropout=0.05, target_modules=train.LORA_TARGETS)
    model = get_peft_model(model, lora).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # a reference, so that the address is not reused
        return tensor

    tokens = torch.randint(0, 512, (2, num_tokens))
    mask = torch.ones_like(tokens)
    mask[0, :50] = 0  # with padding, attention keeps its mask
    with (
        torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"),
    ):
        model.get_base_model().model(input_ids=tokens, attention_mask=mask, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def measure_activations(shape: str, dtype: str, num_tokens: int = 256) -> float:
    """Measure the bytes that one decoder layer keeps for the backward pass of a token."""
    import torch

    torch.manual_seed(0)
    two_layers = count_kept_bytes(shape, dtype, 2, num_tokens)
    one_layer = count_kept_bytes(shape, dtype, 1, num_tokens)
    return (two_layers - one_layer) / (2 * num_tokens)


def print_measurements() -> None:
    """Print a row for each model and precision."""
    rows = []
    for shape in MODELS:
        num_layers = workload.SHAPES[shape]["num_hidden_layers"]
        for dtype in DTYPES:
            num_bytes = measure_activations(shape, dtype)
            megabytes = num_bytes * num_layers / 1e6
            rows.append([shape, dtype, f"{num_bytes:,.0f}", f"{megabytes:.2f}"])
    workload.print_table(
        ["model", "dtype", "bytes per token and layer", "MB per token, all layers"], rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--measure",
        action="store_true",
        help="Measure the bytes that one layer keeps, instead of printing the estimates.",
    )
    args = parser.parse_args()
    if args.measure:
        print_measurements()
    else:
        print_estimates()


if __name__ == "__main__":
    main()
