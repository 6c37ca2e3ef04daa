"""How fast and how lean training is, against the published configuration, one after the other on this machine.

    python tests/benchmarks/bench_training.py                                # CPU: the shape of 270M, 16 conversations
    python tests/benchmarks/bench_training.py --model 1b --conversations 8
    python tests/benchmarks/bench_training.py --device cuda                  # 400 conversations
    python tests/benchmarks/bench_training.py --device cuda --model 1b

"ours" is what function_calling_train.py does without flags: its own dtype, loading, LoRA and trainer. "published" is the published
recipe in plain library options: eager attention, micro-batches of one accumulated to four, activation checkpointing, full logits, loss
on all tokens, LoRA on embeddings and head too, bf16 where a GPU has it; "published-bf16" has it on a CPU, too, and "ours-fp32" nowhere.
Weights and tokens are random; they cost what real ones cost. Steps are timed one by one, without the first; validation and checkpoints
are left out everywhere.
"""

import json
import math
import sys
import tempfile
import time
from pathlib import Path

import workload

SIDES = ["published", "published-bf16", "ours", "ours-recomputing", "ours-fp32"]
PUBLISHED_CONVERSATIONS = 3332  # the published epoch: 833 steps of four
DENSE_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # a second, by NVIDIA's data sheets


def build_published(model_dir, rows, device, dtype, folder):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
    import torch

    import function_calling_train as train

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="eager")
    targets = [*train.LORA_TARGETS, "embed_tokens", "lm_head"]
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=64, lora_dropout=0.05, target_modules=targets, task_type="CAUSAL_LM"))
    model.enable_input_require_grads()

    def collate(batch):
        ids = torch.tensor([row["input_ids"] for row in batch])
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    return Trainer(model=model, train_dataset=rows, data_collator=collate, args=TrainingArguments(
        output_dir=str(folder), num_train_epochs=1, per_device_train_batch_size=1, gradient_accumulation_steps=4,
        activation_checkpointing=True, learning_rate=1e-4, lr_scheduler_type="cosine", warmup_steps=0.1, weight_decay=0.1,
        bf16=dtype == torch.bfloat16, use_cpu=device == "cpu", include_num_input_tokens_seen="non_padding", save_strategy="no",
        report_to="none", disable_tqdm=True, remove_unused_columns=False, logging_strategy="no"))


def build_ours(model_dir, rows, device, dtype, folder, flags):
    from datasets import Dataset

    import function_calling_train as train

    args = train.parse_args(flags)
    model = train.load_base_model(model_dir, dtype=dtype)
    shortest = min(rows, key=lambda row: len(row["input_ids"]))
    return train.build_trainer(model, workload.make_tokenizer(), workload.TAG_IDS, Dataset.from_list(rows), Dataset.from_list([shortest]),
                               args, device, dtype, Path(folder))


def measure(args):
    """Train one side; returns a dict of what was measured."""
    import torch
    from transformers import TrainerCallback
    from transformers.utils import logging

    import function_calling_train as train

    logging.set_verbosity_error()
    asked_for = {"published": "float32"} if args.device == "cpu" else {}
    asked_for |= {"published-bf16": "bfloat16", "ours-fp32": "float32"}
    _, dtype = train.choose_device(asked_for.get(args.side))  # else what suits the hardware
    config = json.loads((args.model_dir / "config.json").read_text())
    rows = workload.draw_rows(args.conversations, config["vocab_size"], args.length)
    steps = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **options):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **options):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            steps.append((time.perf_counter() - self.start, state.num_input_tokens_seen))

    with tempfile.TemporaryDirectory() as folder:
        if args.side.startswith("published"):
            trainer = build_published(args.model_dir, rows, args.device, dtype, folder)
        else:
            flags = ["--activation-checkpointing"] if "recomputing" in args.side else []
            trainer = build_ours(args.model_dir, rows, args.device, dtype, folder, flags)
        trainer.add_callback(Clock())
        trainer.train()
        if args.side.startswith("published"):
            trainer.model.save_pretrained(Path(folder, "adapter"))
        else:
            weights = train.gather_adapter(trainer.model, dtype)
            train.save_adapter(trainer, weights, trainer.processing_class, Path(folder, "adapter"), train.parse_args([]), None)
        adapter_bytes = Path(folder, "adapter", "adapter_model.safetensors").stat().st_size
    tokens_per_second = (steps[-1][1] - steps[0][1]) / sum(seconds for seconds, _ in steps[1:])
    seconds = sum(len(row["input_ids"]) for row in rows) / tokens_per_second
    result = {
        "tokens_per_second": tokens_per_second,
        "samples_per_second": len(rows) / seconds,
        "epoch_seconds": PUBLISHED_CONVERSATIONS / len(rows) * seconds,
        "peak_gb": workload.peak_memory(args.device),
        "host_gb": workload.peak_memory("cpu"),
        "adapter_mb": adapter_bytes / 1e6,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if args.device == "cuda":
        peak = next((flops for name, flops in DENSE_BF16_FLOPS.items() if name in torch.cuda.get_device_name()), None)
        if peak and steps[1:]:
            result["mfu"] = count_flops(config, rows, scores_all=args.side.startswith("published")) / seconds / peak
    return result


def count_flops(config, rows, scores_all):
    """FLOP of one pass over `rows` with LoRA: 4 a parameter and token (2 forward, 2 backward to the inputs; the frozen weights
    take no gradient), the head's for the positions that are scored, and causal attention forward and backward. Recomputed
    activations and LoRA itself do not count."""
    hidden, layers, width = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"] * config["head_dim"]
    per_layer = hidden * (2 * width + 2 * config["num_key_value_heads"] * config["head_dim"] + 3 * config["intermediate_size"])
    flops = 0
    for row in rows:
        length = len(row["input_ids"])
        seen = [min(length, config["sliding_window"] if kind == "sliding_attention" else length) for kind in config["layer_types"]]
        num_scored = length if scores_all else sum(label != -100 for label in row["labels"])
        flops += 4 * (layers * per_layer * length + config["vocab_size"] * hidden * num_scored)
        flops += sum(3 * 4 * window * (length - window / 2) * width for window in seen)
    return flops


def main():
    parser = workload.make_parser("Training against the published configuration.")
    parser.add_argument("--conversations", type=int, help="conversations to train on, a multiple of 4, at least 8 (default: 16 on CPU, 400 on CUDA)")
    parser.add_argument("--length", type=int, help="tokens of every conversation (default: spread as the published ones)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["published", "ours", "ours-recomputing"],
                        help="what to run (default: the first, third and fourth)")
    args = workload.parse_args(parser)
    if args.conversations is None:
        args.conversations = 400 if args.device == "cuda" else 16
    if args.conversations % 4 or args.conversations < 8:
        parser.error("--conversations must be a multiple of 4, and at least 8")
    if args.length is not None and args.length < 2:
        parser.error("--length must be at least 2")
    if len(set(args.sides)) < len(args.sides):
        parser.error("--sides must name a side once")
    if args.side:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as model_dir:
        workload.write_model(args.model, model_dir)
        arguments = ["--device", args.device, "--conversations", str(args.conversations), "--model-dir", model_dir]
        arguments += ["--length", str(args.length)] if args.length else []
        results = {side: workload.run_side(__file__, side, arguments) for side in args.sides}
        results = {f"{side} ({result['dtype']})": result for side, result in results.items()}
        rows = workload.draw_rows(args.conversations, workload.FIRST_WORD + 1, args.length)
    lengths = [len(row["input_ids"]) for row in rows]
    title = (f"Training, shape of {args.model}, {args.conversations} conversations of {min(lengths)} to {max(lengths):,} tokens "
             f"(mean {math.fsum(lengths) / len(lengths):,.0f}); {workload.describe_machine(args.device)}")
    workload.print_table(title, [
        ("tokens/s", "tokens_per_second", "{:,.1f}"),
        ("conversations/s", "samples_per_second", "{:,.3f}"),
        *workload.memory_rows(args.device),
        ("3,332 conversations at this pace (s)", "epoch_seconds", "{:,.0f}"),
        ("adapter file (MB)", "adapter_mb", "{:,.1f}"),
        ("model FLOP utilisation", "mfu", "{:.1%}"),
    ], results, next(iter(results)))


if __name__ == "__main__":
    sys.exit(main())
