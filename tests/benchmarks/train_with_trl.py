"""Train with TRL alone, as its documentation shows, to compare the scores with ours.

    python tests/benchmarks/train_with_trl.py --model MODEL --steps 41
    python evaluation.py --model MODEL-trl --baseline

SFTTrainer gets the `messages` of the train split, LoraConfig() and SFTConfig(). Only four settings
differ from the defaults: the learning rate if you choose one, the number of steps, four
conversations per step, and the precision on CPUs that do not multiply in bfloat16. So all tokens
carry loss, and conversations are cut to 1,024 tokens. --our-lora replaces LoraConfig() with the
LoRA settings of function_calling_train.py.

Gemma's own chat template raises an error at a tool turn. Tool results therefore become user turns,
as in the evaluation of a baseline. The merged model is written to MODEL-trl or --output-dir.
"""

import argparse
import json
import time
from pathlib import Path

import workload  # makes the three scripts importable

import function_calling_train as train

CONVERSATIONS_PER_STEP = 4


def read_dataset(train_file: Path):
    """Four fifths of a train split, as ours holds out a fifth, in the layout that TRL expects."""
    import datasets

    conversations = [row["messages"] for row in workload.read_conversations(train_file)]
    for messages in conversations:
        for message in messages:
            if message["role"] == "tool":
                message["role"] = "user"
    dataset = datasets.Dataset.from_dict({"messages": conversations})
    return dataset.train_test_split(test_size=0.2, seed=42)["train"]


def build_trainer(model_dir: Path, train_file: Path, output_dir: Path, our_lora=False, **settings):
    """TRL's trainer. `settings` are options of SFTConfig and take precedence."""
    import torch
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    lora = LoraConfig()
    if our_lora:
        args = train.parse_args([])
        lora = LoraConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=train.LORA_TARGETS,
        )
    device, dtype = train.choose_device()
    # Accumulated gradients are those of one batch, and need less memory on a CPU.
    batch_size = CONVERSATIONS_PER_STEP if device == "cuda" else 1
    options = {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": CONVERSATIONS_PER_STEP // batch_size,
        "use_cpu": device == "cpu",
        "bf16": dtype == torch.bfloat16,
    }
    return SFTTrainer(
        model=str(model_dir),
        args=SFTConfig(output_dir=output_dir, **options | settings),
        train_dataset=read_dataset(train_file),
        peft_config=lora,
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True, help="Folder of the base model.")
    parser.add_argument(
        "--train-file",
        type=Path,
        default=train.DEFAULT_TRAIN_FILE,
        help="Train split written by step 1 (default: %(default)s).",
    )
    parser.add_argument(
        "--output-dir", type=Path, help="Folder of the merged model (default: MODEL-trl)."
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=2e-5,
        help="Peak learning rate (default: %(default)s, the default of TRL).",
    )
    parser.add_argument(
        "--our-lora",
        action="store_true",
        help="Use the LoRA settings of function_calling_train.py instead of LoraConfig().",
    )
    parser.add_argument(
        "--steps", type=int, required=True, help="Optimizer steps of four conversations."
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from transformers import AutoTokenizer

    output_dir = args.output_dir or args.model.with_name(f"{args.model.name}-trl")
    trainer = build_trainer(
        args.model,
        args.train_file,
        output_dir,
        our_lora=args.our_lora,
        learning_rate=args.learning_rate,
        max_steps=args.steps,
        save_strategy="no",
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.model.merge_and_unload().save_pretrained(output_dir)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(output_dir)
    print(json.dumps({"seconds": seconds, "peak_gb": workload.peak_memory()}))


if __name__ == "__main__":
    main()
