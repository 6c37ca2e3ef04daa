"""What the choices of this project are worth: the sample run as it is, and with one changed.

    python sample/ablation.py                 # each variant with three seeds
    python sample/ablation.py --seeds 42 --variants "as it is" "rank 4"

Runs the three scripts with the arguments of sample/run.sh and those of a variant, in a folder of
sample/ablation/ for each variant and seed (of the training, and of the split to validate with).
Prints the scores of all that are finished. What is finished is not done again: delete its folder.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODEL, DATASET = HERE / "tiny-gemma-3", HERE / "hermes_sample.json"
METRICS = Path("evaluation_results/tiny-gemma-3/tuned/metrics.json")
TRAINING = "--learning-rate 6e-3 --epochs 5 --batch-size 4 --dtype float32".split()
EVALUATION = "--batch-size 96 --max-new-tokens 160".split()
VARIANTS = {  # what step 1 is given, and step 2
    "as it is": ([], []),
    "loss on all tokens": ([], ["--loss-on", "all"]),
    "no think instruction": (["--no-think-instruction"], []),
    "rank 4": ([], ["--lora-rank", "4", "--lora-alpha", "16"]),
    "rank 64": ([], ["--lora-rank", "64", "--lora-alpha", "256"]),
    "alpha 16": ([], ["--lora-alpha", "16"]),
}
COLUMNS = ["function_calling", "helpful_exchange", "turn_right", "turn_right_unseen_tools"]


def run_variant(variant, seed, folder):
    """Prepare, train and score one variant with one seed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    preparation, training = VARIANTS[variant]
    model = ["--model", MODEL]
    for script, *arguments in [
        ("prepare_function_calling_dataset.py", "--dataset", DATASET, *preparation),
        ("function_calling_train.py", *model, "--seed", str(seed), *TRAINING, *training),
        ("evaluation.py", *model, *EVALUATION),
    ]:
        print(f"\n== {variant}, seed {seed}: {script}", flush=True)
        subprocess.run([sys.executable, HERE.parent / script, *arguments], cwd=folder, check=True)


def read_scores(path):
    """The scores of COLUMNS in a metrics.json."""
    scores = json.loads(path.read_text(encoding="utf-8"))["scores"]
    return [scores[name]["value"] for name in COLUMNS]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[42, 43, 44], help="default: 42 43 44")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    args = parser.parse_args()
    lines = ["| variant | " + " | ".join(name.replace("_", " ") for name in COLUMNS) + " |"]
    lines += ["|---" * (len(COLUMNS) + 1) + "|"]
    for variant in args.variants:
        runs = []
        for seed in args.seeds:
            folder = HERE / "ablation" / f"{variant.replace(' ', '-')}-{seed}"
            if not (folder / METRICS).is_file():
                run_variant(variant, seed, folder)
            runs.append(read_scores(folder / METRICS))
        cells = [
            f"{sum(column) / len(column):.3f} ({min(column):.3f} to {max(column):.3f})"
            for column in zip(*runs, strict=True)
        ]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    print("\n" + "\n".join(lines))
    print(f"\nMean (lowest to highest) over the seeds {', '.join(map(str, args.seeds))}")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
