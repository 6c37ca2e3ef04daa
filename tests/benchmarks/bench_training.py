"""Compare the speed and memory of training with those of TRL alone and the published recipe.

    python tests/benchmarks/bench_training.py --threads 1
    python tests/benchmarks/bench_training.py --model-shape 1b
    python tests/benchmarks/bench_training.py --model FOLDER --data processed_data/...train.jsonl

Three variants train one after the other, each in a process of its own:

- ours: function_calling_train.py without flags.
- trl: TRL's SFTTrainer with its defaults, as in train_with_trl.py.
- published: the published recipe with current libraries. LoRA also covers the embeddings and the
  head, all tokens carry loss, attention is eager, and activation checkpointing is on. Conversations
  are processed one at a time, and the gradients of four are accumulated. The base model is bfloat16
  on a GPU that supports it.

All variants train on the same conversations in the same order. The first step is not timed, and
there are no validations or checkpoints. Token counts exclude padding. If other programs use the
machine, compare CPU seconds. The defaults take about seven minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import train_with_trl
import workload  # makes the three scripts importable

import function_calling_train as train

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, Trainer

VARIANTS = ["published", "trl", "ours"]
CONVERSATIONS_PER_STEP = 4
# More than four per step are written, because training holds out a fifth of the split for
# validation and drops an incomplete last step.
WRITTEN_PER_STEP = 6


class PreparedData(NamedTuple):
    """A split as function_calling_train.py prepares it for training."""

    args: argparse.Namespace
    tokenizer: PreTrainedTokenizerBase
    training: Dataset
    validation: Dataset


def prepare_data(work_dir: Path, flags: list[str]) -> PreparedData:
    """Read and tokenize the split as function_calling_train.py does with these flags."""
    import transformers

    args = train.parse_args(flags)
    conversations, info = train.read_split(work_dir / "split.jsonl")
    tokenizer = transformers.AutoTokenizer.from_pretrained(work_dir / "model")
    template = train.make_template(info["prompt"], tokenizer, args.loss_on)
    training, validation, _ = train.build_datasets(conversations, tokenizer, template, args)
    return PreparedData(args, tokenizer, training, validation)


def build_published(work_dir: Path, num_steps: int) -> Trainer:
    """Build a trainer for the published recipe.

    It is a Trainer and not an SFTTrainer, because TRL refuses LoRA on the head.
    """
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    data = prepare_data(work_dir, ["--loss-on", "all"])
    device, dtype = train.choose_device()
    if device != "cuda":
        dtype = torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(
        work_dir / "model", attn_implementation="eager", dtype=dtype
    )
    lora = LoraConfig(
        r=16,
        lora_alpha=64,
        lora_dropout=0.05,
        target_modules=[*train.LORA_TARGETS, "embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    model.enable_input_require_grads()  # activation checkpointing with frozen weights needs it

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    config = transformers.TrainingArguments(
        output_dir=work_dir / "published",
        max_steps=num_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=CONVERSATIONS_PER_STEP,
        activation_checkpointing=True,
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.1,
        bf16=dtype == torch.bfloat16,
    )
    return transformers.Trainer(model, config, train_dataset=data.training, data_collator=collate)


def build_trl(work_dir: Path, num_steps: int) -> Trainer:
    """Build the trainer of train_with_trl.py."""
    return train_with_trl.build_trainer(
        work_dir / "model", work_dir / "split.jsonl", work_dir / "trl", max_steps=num_steps
    )


def build_ours(work_dir: Path, num_steps: int) -> Trainer:
    """Build the trainer of function_calling_train.py."""
    data = prepare_data(work_dir, ["--max-steps", str(num_steps)])
    device, dtype = train.choose_device()
    model, _ = train.load_model(work_dir / "model", dtype)
    return train.build_trainer(
        model,
        data.tokenizer,
        data.training,
        data.validation,
        data.args,
        work_dir / "ours",
        device,
    )


class Reading(NamedTuple):
    """What the clocks and counters say at the end of a step."""

    seconds: float
    cpu_seconds: float
    num_tokens: int


def time_steps(trainer: Trainer) -> list[Reading]:
    """Train, and take a reading at the end of each step."""
    import torch
    import transformers

    readings = []

    class TakeReadings(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            readings.append(
                Reading(time.perf_counter(), time.process_time(), state.num_input_tokens_seen)
            )

    trainer.add_callback(TakeReadings())
    trainer.train()
    return readings


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Train one variant and return its measurements."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    builders = {"published": build_published, "trl": build_trl, "ours": build_ours}
    trainer = builders[args.variant](args.work_dir, args.steps)
    trainer.args.train_sampling_strategy = "sequential"  # the same conversations in each step
    trainer.args.eval_strategy = "no"
    trainer.args.save_strategy = "no"
    trainer.args.include_num_input_tokens_seen = "non_padding"
    readings = time_steps(trainer)
    first = readings[0]
    last = readings[-1]
    seconds = last.seconds - first.seconds
    num_tokens = last.num_tokens - first.num_tokens
    num_steps = len(readings) - 1
    return {
        "tokens_per_second": num_tokens / seconds,
        "seconds_per_step": seconds / num_steps,
        "cpu_seconds_per_step": (last.cpu_seconds - first.cpu_seconds) / num_steps,
        "tokens_per_step": num_tokens / num_steps,
        "peak_gb": workload.peak_memory(),
    }


def parse_args() -> argparse.Namespace:
    parser = workload.build_parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--steps",
        type=int,
        default=2,
        help="Optimizer steps of four conversations. The first one is not timed "
        "(default: %(default)s).",
    )
    args = workload.parse_args(parser)
    if args.steps < 2:
        parser.error(f"--steps {args.steps} must be at least 2")
    return args


def main() -> None:
    args = parse_args()
    if args.variant:
        print("\n" + json.dumps(measure(args)))
        return
    results = workload.run_variants(__file__, VARIANTS, args, WRITTEN_PER_STEP * args.steps)
    metrics = [
        workload.Metric("tokens per second", "tokens_per_second", "{:,.1f}"),
        workload.Metric("seconds per step", "seconds_per_step", "{:,.2f}"),
        workload.Metric("CPU seconds per step", "cpu_seconds_per_step", "{:,.2f}"),
        workload.Metric("tokens per step", "tokens_per_step", "{:,.0f}"),
        workload.Metric("peak memory (GB)", "peak_gb", "{:,.2f}"),
    ]
    title = f"Training, {args.steps} steps of {CONVERSATIONS_PER_STEP} conversations"
    workload.print_results(title, args, metrics, results, reference="trl")


if __name__ == "__main__":
    main()
