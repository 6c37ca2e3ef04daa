"""What this project's choices are worth: the sample trained as it is, and with one choice undone at a time.

    bash sample/run.sh
    python sample/ablation.py                    # 4 variants with 3 seeds each, about an hour on two CPU cores

Takes the splits and the training arguments of the sample run, and its evaluation's. Each variant with each seed (of
training and of its validation split) gets a folder in sample/ablation/; what is finished there is not done again, unless it
came from another model, other data or other arguments. Runs on the CPU only, where every variant trains alike.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
MODEL = HERE / "tiny-gemma-3"
RUN = HERE / "run"
ADAPTER = Path("LoRA_tiny-gemma-3-function_calling")
METRICS = Path("evaluation_results/tiny-gemma-3/tuned/metrics.json")


def as_it_is(train, evaluation):
    """This project's choices. A variant changes the two scripts where it must, and returns more training arguments."""
    return []


def with_published_lora_placement(train, evaluation):
    """LoRA on embeddings and head too, in place of trained rows for the tags. Served unmerged: the merge is wrong."""
    import peft
    import torch
    import trl.trainer.sft_trainer
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import FusedCausalLMOutput

    lora_config = train.lora_config

    def lora_everywhere(args, tag_ids):
        config = lora_config(args, None)
        config.target_modules = {*train.LORA_TARGETS, "embed_tokens", "lm_head"}
        return config

    def load_unmerged(model_dir, adapter_dir, device, dtype):
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        _, tag_pieces = train.claim_unused_slots(train.load_tokenizer(model_dir))
        train.start_tag_rows(model, tag_pieces)  # as in training; the adapter's files hold no rows
        return peft.PeftModel.from_pretrained(model, adapter_dir).eval()

    def score_through_the_adapted_head(model):
        forward = model.forward

        def score(*inputs, fused_lm_head=False, labels=None, **options):
            if not fused_lm_head:
                return forward(*inputs, labels=labels, **options)
            targets, mask = labels[:, 1:], labels[:, 1:] != -100
            hidden = model.model(*inputs, **options).last_hidden_state[:, :-1]
            logits = model.lm_head(hidden[mask])
            values = -torch.nn.functional.cross_entropy(logits, targets[mask], reduction="none")
            log_probs = values.new_zeros(mask.shape).masked_scatter(mask, values)
            return FusedCausalLMOutput(log_probs=log_probs, entropy=torch.zeros_like(log_probs),
                                       is_top1=torch.zeros_like(mask), label_mask=mask)

        model.forward = score

    train.lora_config = lora_everywhere
    train.replace_embedding_and_head = score_through_the_adapted_head
    evaluation.load_model = load_unmerged
    # TRL refuses LoRA on the head, since its own scoring passes it by; the one above does not.
    trl.trainer.sft_trainer.BaseTunerLayer = type("NoLayer", (), {})
    peft.tuners.tuners_utils.BaseTunerLayer.bias = None  # a property there; Gemma's head has none
    return []


def with_loss_on_all_tokens(train, evaluation):
    """Prompts carry loss too, as in the published run."""
    return ["--loss-on", "all"]


def with_tags_as_plain_text(train, evaluation):
    """The tags stay the several tokens that the stock tokenizer makes of them.

    The rows of these are trained as the tags' own rows are otherwise: the sample's model has never seen a "<", so that with
    frozen rows it could not write one, which Gemma can.
    """
    lora_config, pieces = train.lora_config, set()

    def keep_the_stock_tokenizer(tokenizer):
        for tag in train.TAGS:
            pieces.update(tokenizer.encode(tag, add_special_tokens=False))
        return tokenizer, {}

    train.claim_unused_slots = keep_the_stock_tokenizer
    train.start_tag_rows = lambda model, tag_pieces: None
    train.lora_config = lambda args, tag_ids: lora_config(args, sorted(pieces))
    return []


VARIANTS = {
    "as it is": as_it_is,
    "published LoRA placement": with_published_lora_placement,
    "loss on all tokens": with_loss_on_all_tokens,
    "tags as plain text": with_tags_as_plain_text,
}
COLUMNS = ["function calling", "helpful exchange", "whole turn right", "whole turn right, tools never seen"]


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def recipe_of(folder):
    """The arguments a training was run with, besides the seed and what a variant changes."""
    from function_calling_train import FREE_ARGUMENTS

    arguments = read_json(folder / ADAPTER / "training_run.json")["arguments"]
    return {name: value for name, value in arguments.items()
            if name not in FREE_ARGUMENTS - {"dtype", "batch_size"} and name not in ("seed", "loss_on")}


def folder_of(variant, seed):
    return HERE / "ablation" / f"{variant.replace(' ', '-')}-{seed}"


def run_one(variant, seed):
    """Train and score one variant with one seed, in the folder of its own."""
    import torch

    import evaluation
    import function_calling_train as train

    train.choose_device = evaluation.choose_device = lambda dtype=None: ("cpu", getattr(torch, dtype or "float32"))
    recipe = []
    for name, value in recipe_of(RUN).items():
        flag = f"--{name.replace('_', '-')}"
        recipe += [flag] if value is True else [] if value in (None, False) else [flag, str(value)]
    recipe += VARIANTS[variant](train, evaluation)
    splits = RUN / "processed_data"
    of_evaluation = read_json(RUN / METRICS)["run"]["arguments"]
    folder_of(variant, seed).mkdir(parents=True, exist_ok=True)
    os.chdir(folder_of(variant, seed))
    METRICS.unlink(missing_ok=True)
    train.main(["--model", str(MODEL), "--train-file", str(splits / "function_calling_train.jsonl"), "--seed", str(seed), *recipe,
                "--overwrite"])
    evaluation.main(["--model", str(MODEL), "--test-file", str(splits / "function_calling_test.jsonl"), "--overwrite",
                     "--batch-size", str(of_evaluation["batch_size"]), "--max-new-tokens", str(of_evaluation["max_new_tokens"])])


def read_scores(variant, seed):
    """The scores of COLUMNS of a finished variant; None if it is not finished, or not of the present sample run."""
    folder = folder_of(variant, seed)
    if not (folder / METRICS).is_file():
        return None
    training, of_run = (read_json(base / ADAPTER / "training_run.json") for base in (folder, RUN))
    same_inputs = all(training[key] == of_run[key] for key in ("weights_sha256", "train_split_sha256"))
    if not same_inputs or recipe_of(folder) != recipe_of(RUN):
        return None
    metrics = read_json(folder / METRICS)
    every, unseen = metrics["scores"], metrics["unseen_tools"]["scores"]
    return [every["function_calling"]["value"], every["helpful_exchange"]["value"], every["turn_right"]["value"],
            unseen["turn_right"]["value"]]


def print_table(seeds):
    print(f"\n| variant | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for variant in VARIANTS:
        runs = [scores for scores in (read_scores(variant, seed) for seed in seeds) if scores]
        cells = [f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})" for values in zip(*runs)]
        print(f"| {variant} | {' | '.join(cells or ['not measured'] * len(COLUMNS))} |")
        if 0 < len(runs) < len(seeds):
            print(f"({variant}: {len(runs)} of {len(seeds)} seeds)")
    print(f"\nMean (lowest to highest) over the seeds {', '.join(map(str, seeds))}")


def main():
    parser = argparse.ArgumentParser(description="What the choices of the training script are worth, on the sample.", allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44], help="training seeds (default: 42 43 44)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="those to run (default: all)")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (RUN / METRICS).is_file():
        sys.exit(f"error: {RUN / METRICS} not found: run bash sample/run.sh first")
    if args.one:
        run_one(args.one[0], int(args.one[1]))
        return
    for seed in args.seeds:
        for variant in args.variants:
            if not read_scores(variant, seed):
                print(f"\n== {variant}, seed {seed}", flush=True)
                if code := subprocess.run([sys.executable, __file__, "--one", variant, str(seed)]).returncode:
                    sys.exit(code)
    print_table(args.seeds)


if __name__ == "__main__":
    main()
