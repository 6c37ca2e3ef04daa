"""Train with TRL alone, as its documentation would have one do it, to compare scores with ours.

    python tests/benchmarks/train_with_trl.py --model MODEL --learning-rate 1e-4 --steps 47
    python evaluation.py --model MODEL-trl --baseline

SFTTrainer on `messages` with LoraConfig() and SFTConfig() as they are, but for the learning rate,
the number of steps, four conversations in each, and use_cpu where there is no GPU. So it cuts
conversations to 1,024 tokens, and all tokens carry loss. Gemma's own chat template raises an error
at a tool turn, so tool results stand in user turns, as such a user would put them, and as the
evaluation of a base model does.
The merged model is written to <--model>-trl, or to --output-dir.
"""

import argparse
import json
import time
from pathlib import Path

import workload  # which makes the three scripts importable

import evaluation


def build_trainer(model_dir, train_file, output_dir, **settings):
    """TRL's trainer on four fifths of a train split, drawn with the seed of ours."""
    import datasets
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    conversations = [row["messages"] for row in workload.read_conversations(train_file)]
    for message in (message for messages in conversations for message in messages):
        message["role"] = "user" if message["role"] == "tool" else message["role"]
    dataset = datasets.Dataset.from_dict({"messages": conversations})
    dataset = dataset.train_test_split(test_size=0.2, seed=42)["train"]
    device, _ = evaluation.choose_device()
    settings |= {"per_device_train_batch_size": 4, "use_cpu": device == "cpu"}
    config = SFTConfig(output_dir=output_dir, **settings)
    return SFTTrainer(str(model_dir), config, train_dataset=dataset, peft_config=LoraConfig())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add, split = parser.add_argument, Path("processed_data/function_calling_train.jsonl")
    add("--model", type=Path, required=True, help="folder of the base model")
    add("--train-file", type=Path, default=split, help="train split (default: %(default)s)")
    add("--output-dir", type=Path, help="folder of the merged model (default: <--model>-trl)")
    add("--learning-rate", type=float, default=2e-5, help="(default: TRL's, %(default)s)")
    add("--steps", type=int, required=True, help="optimizer steps of four conversations")
    args = parser.parse_args()

    from transformers import AutoTokenizer

    folder = args.output_dir or args.model.with_name(f"{args.model.name}-trl")
    settings = {"learning_rate": args.learning_rate, "max_steps": args.steps}
    trainer = build_trainer(args.model, args.train_file, folder, save_strategy="no", **settings)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.model.merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(folder)
    print(json.dumps({"seconds": seconds, "peak_gb": workload.peak_memory()}))


if __name__ == "__main__":
    main()
