"""Estimate the GPU memory of training for both models, and how long a batch each GPU can keep.

    python tests/benchmarks/estimate_memory.py              # the tables, in seconds
    python tests/benchmarks/estimate_memory.py --measure    # the bytes behind them, on a CPU

The estimate is the one that function_calling_train.py uses to decide on activation checkpointing.
--measure counts the bytes that one decoder layer keeps for the backward pass, with
torch.autograd.graph.saved_tensors_hooks: what two layers keep minus what one layer keeps, for each
token, weights left out. Models have random weights, LoRA of rank 16 and dropout, as in training.
"""

from __future__ import annotations

import argparse
import bisect

import workload  # which makes the three scripts importable

import function_calling_train as train

MODELS = ["270m", "1b"]
DTYPES = ["bfloat16", "float32"]
# Bytes that a GPU of each size reports: T4, L4, A100, L40S, A100 or H100
GPUS = {"16 GB": 15.6e9, "24 GB": 23.6e9, "40 GB": 42.3e9, "48 GB": 47.6e9, "80 GB": 85.0e9}
NUM_CONVERSATIONS = 4
MAX_LENGTH = 4096


def make_empty_model(shape: str, dtype: str):
    """A model of a shape of Gemma 3 without memory for its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        config = workload.make_config(shape)
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def longest_kept(model, gpu_bytes: float) -> int:
    """Tokens of each of four conversations in a batch whose activations fit."""

    def memory(length: int) -> float:
        return train.estimate_memory(model, NUM_CONVERSATIONS * length, checkpointing=False)

    usable = train.USABLE_SHARE * gpu_bytes
    return bisect.bisect_right(range(1, MAX_LENGTH + 1), usable, key=memory)


def estimate_rows() -> list[list[str]]:
    """A row for each model and precision, under the titles in print_estimates."""
    rows = []
    for shape in MODELS:
        for dtype in DTYPES:
            model = make_empty_model(shape, dtype)
            row = [shape, dtype, f"{model.get_memory_footprint() / 1e9:.1f}"]
            for checkpointing in (True, False):
                for length in (1000, MAX_LENGTH):
                    num_tokens = NUM_CONVERSATIONS * length
                    memory = train.estimate_memory(model, num_tokens, checkpointing)
                    row.append(f"{memory / 1e9:.1f}")
            row += [f"{longest_kept(model, gpu_bytes):,}" for gpu_bytes in GPUS.values()]
            rows.append(row)
    return rows


def measure_activations(shape: str, dtype: str, num_tokens: int = 256) -> float:
    """Bytes that one decoder layer keeps for the backward pass of a token."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def measure(num_layers: int) -> int:
        config = workload.make_config(shape, vocab_size=512, num_hidden_layers=num_layers)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        lora = LoraConfig(r=16, lora_alpha=64, lora_dropout=0.05, target_modules=train.LORA_TARGETS)
        model = get_peft_model(model, lora).train()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage  # which also keeps the address in use
            return tensor

        tokens = torch.randint(0, 512, (2, num_tokens))
        mask = torch.ones_like(tokens)
        mask[0, :50] = 0
        is_bf16 = dtype == "bfloat16"
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=is_bf16),
        ):
            model.get_base_model().model(input_ids=tokens, attention_mask=mask, use_cache=False)
        return sum(storage.nbytes() for storage in kept.values())

    torch.manual_seed(0)
    return (measure(2) - measure(1)) / (2 * num_tokens)


def print_table(titles: list[str], rows: list[list[str]]) -> None:
    for cells in [titles, ["---"] * len(titles), *rows]:
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--measure", action="store_true", help="Measure the bytes of one layer.")
    args = parser.parse_args()
    if args.measure:
        rows = []
        for shape in MODELS:
            for dtype in DTYPES:
                num_bytes = measure_activations(shape, dtype)
                num_layers = workload.SHAPES[shape]["num_hidden_layers"]
                megabytes = f"{num_bytes * num_layers / 1e6:.2f}"
                rows.append([shape, dtype, f"{num_bytes:,.0f}", megabytes])
        print_table(["model", "dtype", "bytes per token and layer", "MB per token"], rows)
        return
    titles = ["model", "dtype", "weights", "4 x 1,000", "4 x 4,096", "4 x 1,000, kept"]
    titles += ["4 x 4,096, kept", *GPUS]
    print_table(titles, estimate_rows())


if __name__ == "__main__":
    main()
