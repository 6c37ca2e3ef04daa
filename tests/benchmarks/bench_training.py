"""How fast and how lean training is, beside two other ways to do it, one after the other.

    python tests/benchmarks/bench_training.py --threads 1
    python tests/benchmarks/bench_training.py --model-shape 1b
    python tests/benchmarks/bench_training.py --model FOLDER --data processed_data/...train.jsonl

*ours* is function_calling_train.py without flags: its own loading, LoRA and trainer.

*trl* is TRL's own SFTTrainer as train_with_trl.py has it, in bf16 where ours is (its own
default is bf16 everywhere, which most CPUs only imitate).

*published* is the published recipe in the options of today's libraries: LoRA on embeddings and head
too (so it is a plain Trainer: TRL refuses LoRA on the head), loss on all tokens, eager attention,
one conversation at a time, four accumulated to a step, activation checkpointing, and bf16 where a
GPU has it.

All train on the same conversations in the same order and with the same seed. The first step is not
timed; validation and checkpoints are left out. Tokens are without padding. On a machine that does
other work too, processor seconds are the fairer measure. On one core the defaults take some seven
minutes.
"""

import json
import time

import train_with_trl
import workload

SIDES = ["published", "trl", "ours"]


def read_own_inputs(work_dir, flags):
    """What function_calling_train.py makes of the split: (its arguments, tokenizer, its data)."""
    import transformers

    import function_calling_train as train

    args = train.parse_args(flags)
    conversations, wording = train.read_split(work_dir / "split.jsonl")
    tokenizer = transformers.AutoTokenizer.from_pretrained(work_dir / "model")
    template = train.make_template(wording, tokenizer, "model-turns")
    training, validation, _ = train.build_datasets(conversations, tokenizer, template, args)
    return args, tokenizer, training, validation


def build_published(work_dir, num_steps):
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    import function_calling_train as train

    *_, training, _ = read_own_inputs(work_dir, ["--loss-on", "all"])
    device, dtype = train.choose_device()
    options = {"dtype": dtype if device == "cuda" else torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        work_dir / "model", attn_implementation="eager", **options
    )
    targets = [*train.LORA_TARGETS, "embed_tokens", "lm_head"]
    lora = {"r": 16, "lora_alpha": 64, "lora_dropout": 0.05, "target_modules": targets}
    model = get_peft_model(model, LoraConfig(**lora, task_type="CAUSAL_LM"))
    model.enable_input_require_grads()

    def collate(rows):
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    config = transformers.TrainingArguments(
        output_dir=work_dir / "published",
        max_steps=num_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        activation_checkpointing=True,
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.1,
        bf16=options["dtype"] == torch.bfloat16,
    )
    return transformers.Trainer(model, config, train_dataset=training, data_collator=collate)


def build_trl(work_dir, num_steps):
    import torch

    import function_calling_train as train

    _, dtype = train.choose_device()
    settings = {"max_steps": num_steps, "bf16": dtype == torch.bfloat16}
    files = work_dir / "model", work_dir / "split.jsonl"
    return train_with_trl.build_trainer(*files, work_dir / "trl", **settings)


def build_ours(work_dir, num_steps):
    import function_calling_train as train

    args, *data = read_own_inputs(work_dir, ["--max-steps", str(num_steps)])
    device, dtype = train.choose_device()
    model, _ = train.load_model(work_dir / "model", dtype)
    return train.build_trainer(model, *data, args, work_dir / "ours", device)


def measure(args):
    """Train one side; returns a dict of what was measured."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    build = {"published": build_published, "trl": build_trl, "ours": build_ours}[args.side]
    trainer = build(args.work_dir, args.steps)
    trainer.args.train_sampling_strategy = "sequential"  # the same conversations in each step
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.args.include_num_input_tokens_seen = "non_padding"
    readings = []  # at the end of each step: seconds, processor seconds, tokens so far

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, _, state, *__, **___):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            clocks = time.perf_counter(), time.process_time()
            readings.append((*clocks, state.num_input_tokens_seen))

    trainer.add_callback(Clock())
    trainer.train()
    first, *_, last = readings
    seconds, cpu_seconds, num_tokens = (b - a for a, b in zip(first, last, strict=True))
    num_steps = len(readings) - 1
    return {
        "tokens_per_second": num_tokens / seconds,
        "seconds_per_step": seconds / num_steps,
        "cpu_seconds_per_step": cpu_seconds / num_steps,
        "tokens_per_step": num_tokens / num_steps,
        "peak_gb": workload.peak_memory(),
    }


def main():
    def add_arguments(parser):
        text = "steps of four conversations, the first is not timed (default: 2)"
        parser.add_argument("--steps", type=int, default=2, help=text)

    args = workload.parse_args(__doc__.splitlines()[0], add_arguments)
    if args.steps < 2:
        raise SystemExit("error: --steps must be at least 2")
    if args.side:
        print("\n" + json.dumps(measure(args)))
        return
    # A fifth is left out to validate with, and ours drops what fills no step.
    results = workload.run_sides(__file__, SIDES, args, 6 * args.steps)
    rows = [
        ("tokens/s", "tokens_per_second", "{:,.1f}"),
        ("seconds a step", "seconds_per_step", "{:,.2f}"),
        ("processor seconds a step", "cpu_seconds_per_step", "{:,.2f}"),
        ("tokens a step", "tokens_per_step", "{:,.0f}"),
        ("peak memory (GB)", "peak_gb", "{:,.2f}"),
    ]
    title = f"Training, {args.steps} steps of 4 conversations"
    workload.print_results(title, args, rows, results, "trl")


if __name__ == "__main__":
    main()
