"""Report how training and generation work on this machine's GPU, as Markdown.

    python tests/benchmarks/gpu_report.py | tee report.md          # about ten minutes on one GPU
    python tests/benchmarks/gpu_report.py --quick                  # about two
    python tests/benchmarks/gpu_report.py --model-shapes tiny      # a trial run, also on a CPU

Models have random weights and conversations are synthetic, so that nothing is downloaded. Each
part runs in a process of its own: one that fails is reported, and the others go on.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import workload  # which makes the three scripts importable

import function_calling_train as train

HERE = Path(__file__).resolve().parent
TRAIN_SCRIPT = workload.ROOT / "function_calling_train.py"
PACKAGES = ["torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "triton"]


class NotRun(Exception):
    """A part that this machine cannot run; the text says why."""


def print_table(titles: list[str], rows: list[list[str]]) -> None:
    for cells in [titles, ["---"] * len(titles), *rows]:
        print("| " + " | ".join(cells) + " |")


def run_command(command: list, check: bool = True) -> subprocess.CompletedProcess:
    """Run a command and return it with its output; if it fails, raise its last lines."""
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if check and process.returncode:
        lines = process.stderr.strip().splitlines()[-3:]
        raise RuntimeError(" ".join(line.strip() for line in lines))
    return process


def write_inputs(args: argparse.Namespace, shape: str, num_conversations: int) -> Path:
    """Write a model and a split for the parts that need them; return their folder."""
    folder = args.work_dir / f"{shape}-{num_conversations}"
    if not folder.is_dir():
        folder.mkdir()
        inputs = argparse.Namespace(model=None, model_shape=shape)
        workload.write_inputs(inputs, num_conversations, folder)
    return folder


def training_command(folder: Path, output: str, *flags: str) -> list:
    """The command of a training run by the script itself."""
    command = [sys.executable, TRAIN_SCRIPT, "--model", folder / "model"]
    command += ["--train-file", folder / "split.jsonl", "--output-dir", folder / output]
    return [*command, *flags]


def read_run(folder: Path) -> dict:
    return json.loads((folder / "training_run.json").read_text(encoding="utf-8"))


def read_weights(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


# ---- The parts, in the order of the report


def report_machine(args: argparse.Namespace) -> None:
    """The GPU and the versions of the libraries."""
    import torch

    rows = [["system", f"{platform.platform()}, Python {platform.python_version()}"]]
    rows.append(["CUDA of PyTorch", str(torch.version.cuda)])
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        described = f"{gpu.name}, {gpu.total_memory / 1e9:.1f} GB, compute {gpu.major}.{gpu.minor}"
        rows.append([f"GPU {number}", described])
    device, dtype = train.choose_device()
    rows.append(["default device and precision", f"{device}, {dtype}".replace("torch.", "")])
    for package in PACKAGES:
        try:
            rows.append([package, importlib.metadata.version(package)])
        except importlib.metadata.PackageNotFoundError:
            rows.append([package, "not installed"])
    print_table(["", ""], rows)


def compute_gradients(args: argparse.Namespace) -> None:
    """Save the loss and the LoRA gradients of one batch, on args.device and in args.dtype."""
    import torch
    import transformers
    from safetensors.torch import save_file

    transformers.logging.set_verbosity_error()
    folder = args.inputs
    flags = ["--lora-dropout", "0", "--no-activation-checkpointing", "--batch-size", "4"]
    settings = train.parse_args(flags)
    conversations, wording = train.read_split(folder / "split.jsonl")
    model, tokenizer = train.load_model(folder / "model", getattr(torch, args.dtype))
    template = train.make_template(wording, tokenizer, "model-turns")
    training, validation, _ = train.build_datasets(conversations, tokenizer, template, settings)
    trainer = train.build_trainer(
        model, tokenizer, training, validation, settings, folder / "checkpoints", args.device
    )
    rows = [trainer.train_dataset[number] for number in range(4)]
    batches = [[row] for row in rows] if args.one_by_one else [rows]
    num_labels = sum(label != -100 for row in rows for label in row["labels"])
    torch.manual_seed(0)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide the gradients of lora_A
            weight.data = torch.randn(weight.shape).to(weight) * 0.01
    loss = 0.0
    for batch in batches:
        inputs = trainer.data_collator(batch)
        inputs = {key: value.to(trainer.model.device) for key, value in inputs.items()}
        with trainer.compute_loss_context_manager():
            num_items = torch.tensor(num_labels, device=trainer.model.device)
            part = trainer.compute_loss(trainer.model.train(), inputs, num_items_in_batch=num_items)
        part.backward()
        loss += part.item()
    gradients = {
        name: weight.grad.float().cpu().contiguous()
        for name, weight in trainer.model.named_parameters()
        if weight.requires_grad
    }
    save_file(gradients | {"loss": torch.tensor([loss])}, args.result)


def report_agreement(args: argparse.Namespace) -> None:
    """Loss and gradients of one batch against those of the CPU in float32."""
    import torch
    from safetensors.torch import load_file

    folder = write_inputs(args, args.model_shapes[0], 12)
    device, _ = train.choose_device()
    sides = [("cpu", "float32", False), (device, "float32", False), (device, "float32", True)]
    if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        sides += [(device, "bfloat16", False), (device, "bfloat16", True)]
    rows = []
    reference = None
    for number, (place, dtype, one_by_one) in enumerate(sides):
        result = folder / f"gradients-{number}.safetensors"
        command = [sys.executable, __file__, "--part", "gradients", "--inputs", folder]
        command += ["--device", place, "--dtype", dtype, "--result", result]
        run_command([*command, *(["--one-by-one"] if one_by_one else [])])
        gradients = load_file(result)
        loss = gradients.pop("loss").item()
        flat = torch.cat([gradients[name].double().flatten() for name in sorted(gradients)])
        if reference is None:
            reference = (loss, flat)
        label = f"{place}, {dtype}" + (", one conversation at a time" if one_by_one else "")
        error = (flat - reference[1]).norm() / reference[1].norm()
        cosine = torch.nn.functional.cosine_similarity(flat, reference[1], dim=0)
        difference = abs(loss - reference[0]) / reference[0]
        rows.append([label, f"{loss:.5f}", f"{difference:.1e}", f"{error:.1e}", f"{cosine:.6f}"])
    titles = ["side", "loss", "relative difference", "gradient error", "gradient cosine"]
    print_table(titles, rows)


def report_benchmark(args: argparse.Namespace, script: str, *flags: str) -> None:
    """The table of another benchmark, for each shape."""
    for shape in args.model_shapes:
        process = run_command([sys.executable, HERE / script, "--model-shape", shape, *flags])
        lines = process.stdout.splitlines()
        start = next(n for n, line in enumerate(lines) if line.startswith("| "))
        print(f"{lines[start - 2]}\n")  # what was measured, on which machine
        print("\n".join(line for line in lines[start:] if line.startswith("|")) + "\n")


def report_training(args: argparse.Namespace) -> None:
    """Throughput and peak memory of the original recipe, of TRL and of this project."""
    report_benchmark(args, "bench_training.py", "--steps", args.size["steps"])


def report_generation(args: argparse.Namespace) -> None:
    """Queries per second of the original recipe and of evaluation.py."""
    flags = ["--conversations", args.size["conversations"]]
    flags += ["--max-new-tokens", args.size["new_tokens"]]
    report_benchmark(args, "bench_generation.py", *flags)


def train_one_step(args: argparse.Namespace, length: int) -> dict:
    """Train one step on four conversations of `length` tokens; return its peak and estimate."""
    import datasets
    import torch

    checkpointing = "" if args.checkpointing else "no-"
    flags = ["--max-steps", "1", "--batch-size", "4", f"--{checkpointing}activation-checkpointing"]
    settings = train.parse_args(flags)
    device, dtype = train.choose_device()
    model, tokenizer = train.load_model(args.inputs / "model", dtype)
    estimate = train.estimate_memory(model, 4 * length, args.checkpointing)
    tokens = [8 + number % 100 for number in range(length)]
    masks = [number % 2 for number in range(length)]  # half of the tokens carry loss
    data = datasets.Dataset.from_dict({"input_ids": [tokens] * 4, "assistant_masks": [masks] * 4})
    checkpoints = args.inputs / "checkpoints"
    trainer = train.build_trainer(model, tokenizer, data, data, settings, checkpoints, device)
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.args.load_best_model_at_end = False
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    reserved = torch.cuda.max_memory_reserved() / 1e9 if device == "cuda" else None
    peak = workload.peak_memory()
    return {"length": length, "peak": peak, "reserved": reserved, "estimate": estimate / 1e9}


def try_lengths(args: argparse.Namespace) -> None:
    """Print a line of JSON for each length that fits, until one does not."""
    import contextlib

    import transformers

    transformers.logging.set_verbosity_error()
    for length in args.size["lengths"]:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                result = train_one_step(args, length)
        except RuntimeError as error:
            if not re.search(train.MEMORY_ERRORS, str(error)):
                raise
            return
        print(json.dumps(result), flush=True)


def report_longest_batch(args: argparse.Namespace) -> None:
    """The longest four conversations that fit, with and without activation checkpointing."""
    rows = []
    for shape in args.model_shapes:
        folder = write_inputs(args, shape, 12)
        for checkpointing in (False, True):
            command = [sys.executable, __file__, *sys.argv[1:], "--part", "lengths"]
            command += ["--inputs", folder, *(["--checkpointing"] if checkpointing else [])]
            lines = run_command(command).stdout.splitlines()
            row = [shape, "on" if checkpointing else "off"]
            if lines:
                found = json.loads(lines[-1])
                reserved = f"{found['reserved']:.2f}" if found["reserved"] else "not a GPU"
                row += [f"4 x {found['length']:,}", f"{found['peak']:.2f}", reserved]
                row.append(f"{found['estimate']:.2f}")
            else:
                row += ["none", "", "", ""]
            rows.append(row)
    tried = ", ".join(f"{length:,}" for length in args.size["lengths"])
    print(f"Lengths tried, in tokens: {tried}.\n")
    titles = ["model", "checkpointing", "longest that fits", "peak (GB)", "reserved (GB)"]
    print_table([*titles, "estimated (GB)"], rows)


def report_four_bit(args: argparse.Namespace) -> None:
    """Twenty steps with --load-in-4bit: the losses, the time and the memory."""
    device, _ = train.choose_device()
    if device != "cuda":
        raise NotRun(f"--load-in-4bit needs a CUDA GPU, and this machine has {device}")
    rows = []
    for shape in args.model_shapes:
        folder = write_inputs(args, shape, 6 * 20)
        for flags in ([], ["--load-in-4bit"]):
            output = f"run{len(flags)}"
            run_command(training_command(folder, output, "--max-steps", "20", *flags))
            run = read_run(folder / output)
            losses = [entry["loss"] for entry in run["log_history"] if "loss" in entry]
            row = [shape, "4 bits" if flags else run["dtype"], f"{losses[0]:.4f}"]
            row += [f"{losses[-1]:.4f}", f"{run['seconds']:.1f}", f"{run['peak_memory_gb']:.2f}"]
            rows.append(row)
    titles = ["model", "base weights", "first loss", "last loss", "seconds", "peak (GB)"]
    print_table(titles, rows)


def kill_after_checkpoint(command: list, checkpoint_dir: Path) -> None:
    """Start a run and kill it as soon as its first checkpoint is complete."""
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(list(map(str, command)), **options) as process:
        while process.poll() is None:
            if train.find_last_checkpoint(checkpoint_dir):
                process.kill()
                return
            time.sleep(0.01)
        said = process.stderr.read().strip().splitlines()[-1:]
        raise RuntimeError(f"the run ended before it could be killed {' '.join(said)}")


def report_resume(args: argparse.Namespace) -> None:
    """A run that is killed and resumed, against one that is not."""
    shape = args.model_shapes[0]
    num_steps = args.size["resume_steps"]
    folder = write_inputs(args, shape, 6 * num_steps)
    flags = ["--max-steps", str(num_steps), "--epochs", "2"]  # four checkpoints
    flags += ["--validation-size", "0.1"]
    run_command(training_command(folder, "undisturbed", *flags))
    killed = training_command(folder, "killed", *flags)
    kill_after_checkpoint(killed, folder / "killed-checkpoints")
    resumed = run_command([*killed, "--resume"])
    start = re.search(r"continuing from \S*(checkpoint-\d+)", resumed.stdout)
    weights = read_weights(folder / "killed")
    expected = read_weights(folder / "undisturbed")
    largest = max((weights[name] - expected[name]).abs().max().item() for name in expected)
    same = "yes" if largest == 0 else "no"
    print_table(
        ["model", "resumed from", "bit for bit the same", "largest difference of a weight"],
        [[shape, start[1] if start else "the start", same, f"{largest:.1e}"]],
    )


def report_two_processes(args: argparse.Namespace) -> None:
    """The losses of two GPUs with torchrun, against those of one."""
    import torch

    if torch.cuda.device_count() < 2:
        raise NotRun(f"it needs two GPUs, and this machine has {torch.cuda.device_count()}")
    shape = args.model_shapes[0]
    folder = write_inputs(args, shape, 6 * 10)
    flags = ["--max-steps", "10", "--lora-dropout", "0"]
    run_command(training_command(folder, "one", *flags))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run_command(launch + training_command(folder, "two", *flags)[1:])
    rows = []
    for name in ("one", "two"):
        run = read_run(folder / name)
        losses = [entry["loss"] for entry in run["log_history"] if "loss" in entry]
        rows.append([name, f"{losses[0]:.5f}", f"{losses[-1]:.5f}", f"{run['seconds']:.1f}"])
    print_table(["GPUs", "first loss", "last loss", "seconds"], rows)


PARTS = {
    "machine": ("Machine", report_machine),
    "agreement": ("Loss and gradients against the CPU", report_agreement),
    "training": ("Training", report_training),
    "longest-batch": ("Longest batch", report_longest_batch),
    "generation": ("Generation", report_generation),
    "four-bit": ("Four bits", report_four_bit),
    "resume": ("Kill and resume", report_resume),
    "two-processes": ("Two processes", report_two_processes),
}
STEPS = {
    "gradients": compute_gradients,
    "lengths": try_lengths,
}  # of a part, in a process of its own
FULL = {
    "steps": "10",
    "conversations": "100",
    "new_tokens": "256",
    "resume_steps": 40,
    "lengths": [512, 1024, 2048, 3072, 4096, 6144, 8192],
}
QUICK = {
    "steps": "3",
    "conversations": "12",
    "new_tokens": "64",
    "resume_steps": 16,
    "lengths": [512, 1024, 2048, 4096],
}
TRIAL = {
    "steps": "2",
    "conversations": "1",
    "new_tokens": "8",
    "resume_steps": 4,
    "lengths": [16, 32],
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--model-shapes",
        nargs="+",
        choices=workload.SHAPES,
        default=["270m", "1b"],
        help="Shapes of Gemma 3 to measure (default: 270m 1b). With tiny alone, all sizes are "
        "those of a trial run.",
    )
    parser.add_argument("--quick", action="store_true", help="Take two minutes, not ten.")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="Parts to run (default: all).")
    for flag in ("--part", "--device", "--dtype"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    for flag in ("--work-dir", "--inputs", "--result"):
        parser.add_argument(flag, type=Path, help=argparse.SUPPRESS)
    for flag in ("--one-by-one", "--checkpointing"):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.size = QUICK if args.quick else FULL
    if args.model_shapes == ["tiny"]:
        args.size = TRIAL
    return args


def run_part(args: argparse.Namespace) -> None:
    """Run one part, or one step of a part, in this process."""
    if args.part in STEPS:
        STEPS[args.part](args)
        return
    _, report = PARTS[args.part]
    try:
        report(args)
    except NotRun as reason:
        print(f"Not run: {reason}.")


def main() -> None:
    args = parse_args()
    if args.part:
        run_part(args)
        return
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    environment["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    failed = []
    print(f"# Report of {time.strftime('%Y-%m-%d')}\n\n`python {' '.join(sys.argv)}`", flush=True)
    with tempfile.TemporaryDirectory() as work_dir:
        for name in args.only or PARTS:
            title, _ = PARTS[name]
            print(f"running     {name} ...", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, *sys.argv[1:], "--part", name]
            command += ["--work-dir", work_dir]
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            if name not in ("machine", "two-processes"):  # one card, or torch splits each batch
                visible = (visible or "0").split(",")[0]
            part_environment = (
                environment if visible is None else {**environment, "CUDA_VISIBLE_DEVICES": visible}
            )
            start = time.monotonic()
            process = subprocess.run(command, capture_output=True, text=True, env=part_environment)
            seconds = time.monotonic() - start
            text = process.stdout.strip()
            if process.returncode:
                failed.append(name)
                said = process.stderr.strip().splitlines()[-1:] or ["without a message"]
                ended = f"Failed (exit status {process.returncode}): {said[0]}"
                text = f"{text}\n\n{ended}".strip()
            print(f"\n## {title}\n\n{text}\n\n({seconds:.0f} s)", flush=True)
    if failed:
        sys.exit(f"error: {len(failed)} of the parts failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
