"""Write a Markdown report on training and generation with the GPU of this machine.

    python tests/benchmarks/gpu_report.py | tee report.md          # about ten minutes on one GPU
    python tests/benchmarks/gpu_report.py --quick                  # about two minutes
    python tests/benchmarks/gpu_report.py --model-shapes tiny      # a trial run, also on a CPU

Nothing is downloaded: models have random weights, and conversations are synthetic. Each part of the
report runs in a process of its own. If one part fails, the report says so, and the next part runs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import workload  # makes the three scripts importable

import function_calling_train as train

if TYPE_CHECKING:
    import torch
    from trl import SFTTrainer

HERE = Path(__file__).resolve().parent
TRAIN_SCRIPT = workload.ROOT / "function_calling_train.py"
PACKAGES = ["torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "triton"]


class NotRun(Exception):
    """A part cannot run on this machine. The text of the exception is the reason."""


def run_command(command: list[str | Path]) -> str:
    """Return the output of a command. If it fails, raise an error with its last lines."""
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if process.returncode:
        last_lines = process.stderr.strip().splitlines()[-3:]
        raise RuntimeError(" ".join(line.strip() for line in last_lines))
    return process.stdout


def write_inputs(args: argparse.Namespace, shape: str, num_conversations: int) -> Path:
    """Write a model and a split, unless an earlier part has written them; return their folder."""
    folder = args.work_dir / f"{shape}-{num_conversations}"
    if not folder.is_dir():
        folder.mkdir()
        workload.write_synthetic_inputs(shape, num_conversations, folder)
    return folder


def training_flags(folder: Path, output: str) -> list[str | Path]:
    """Flags of function_calling_train.py for the inputs in a folder."""
    return [
        "--model",
        folder / "model",
        "--train-file",
        folder / "split.jsonl",
        "--output-dir",
        folder / output,
    ]


def training_command(folder: Path, output: str, *flags: str) -> list[str | Path]:
    return [sys.executable, TRAIN_SCRIPT, *training_flags(folder, output), *flags]


def read_run(folder: Path) -> dict:
    return json.loads((folder / "training_run.json").read_text(encoding="utf-8"))


def read_losses(run: dict) -> list[float]:
    """The training losses that a run has logged."""
    return [entry["loss"] for entry in run["log_history"] if "loss" in entry]


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


# The parts of the report, in order


def report_machine(args: argparse.Namespace) -> None:
    """Print the GPUs and the versions of the libraries."""
    import torch

    rows = [
        ["system", f"{platform.platform()}, Python {platform.python_version()}"],
        ["CUDA of PyTorch", str(torch.version.cuda)],
    ]
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        gigabytes = f"{gpu.total_memory / 1e9:.1f} GB"
        rows.append([f"GPU {number}", f"{gpu.name}, {gigabytes}, compute {gpu.major}.{gpu.minor}"])
    device, dtype = train.choose_device()
    rows.append(["default device and precision", f"{device}, {dtype}".replace("torch.", "")])
    for package in PACKAGES:
        try:
            rows.append([package, importlib.metadata.version(package)])
        except importlib.metadata.PackageNotFoundError:
            rows.append([package, "not installed"])
    workload.print_table(["", ""], rows)


def build_gradient_trainer(args: argparse.Namespace) -> SFTTrainer:
    """Build a trainer on args.device and in args.dtype, with LoRA weights that are not zero."""
    import torch

    folder = args.inputs
    settings = train.parse_args(
        ["--lora-dropout", "0", "--no-activation-checkpointing", "--batch-size", "4"]
    )
    conversations, info = train.read_split(folder / "split.jsonl")
    model, tokenizer = train.load_model(folder / "model", getattr(torch, args.dtype))
    template = train.make_template(info["prompt"], tokenizer, settings.loss_on)
    training, validation, _ = train.build_datasets(conversations, tokenizer, template, settings)
    trainer = train.build_trainer(
        model, tokenizer, training, validation, settings, folder / "checkpoints", args.device
    )
    torch.manual_seed(0)
    for name, weight in trainer.model.named_parameters():
        # lora_B starts at zero, and then all gradients of lora_A are zero too.
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape).to(weight) * 0.01
    return trainer


def compute_gradients(args: argparse.Namespace) -> None:
    """Save the loss and the LoRA gradients of four conversations to args.result."""
    import torch
    import transformers
    from safetensors.torch import save_file

    transformers.logging.set_verbosity_error()
    trainer = build_gradient_trainer(args)
    trainer.model.train()
    device = trainer.model.device
    rows = [trainer.train_dataset[number] for number in range(4)]
    batches = [[row] for row in rows] if args.one_by_one else [rows]
    num_labels = sum(label != -100 for row in rows for label in row["labels"])
    total_loss = 0.0
    for batch in batches:
        inputs = trainer.data_collator(batch)
        inputs = {key: value.to(device) for key, value in inputs.items()}
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(
                trainer.model, inputs, num_items_in_batch=torch.tensor(num_labels, device=device)
            )
        loss.backward()
        total_loss += loss.item()
    tensors = {"loss": torch.tensor([total_loss])}
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad:
            tensors[name] = weight.grad.float().cpu().contiguous()
    save_file(tensors, args.result)


class GradientCase(NamedTuple):
    """How the gradients of the same four conversations are computed."""

    device: str
    dtype: str
    one_by_one: bool

    def __str__(self) -> str:
        text = f"{self.device}, {self.dtype}"
        return f"{text}, one conversation at a time" if self.one_by_one else text


def list_gradient_cases() -> list[GradientCase]:
    """The reference first, then all precisions of this machine."""
    import torch

    device, _ = train.choose_device()
    dtypes = ["float32"]
    if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        dtypes.append("bfloat16")
    cases = [GradientCase("cpu", "float32", one_by_one=False)]
    for dtype in dtypes:
        cases.append(GradientCase(device, dtype, one_by_one=False))
        cases.append(GradientCase(device, dtype, one_by_one=True))
    return cases


def report_agreement(args: argparse.Namespace) -> None:
    """Compare the loss and the gradients of one step with those of the CPU in float32."""
    import torch
    from safetensors.torch import load_file

    folder = write_inputs(args, args.model_shapes[0], 12)
    results = []
    for number, case in enumerate(list_gradient_cases()):
        path = folder / f"gradients-{number}.safetensors"
        command = [sys.executable, __file__, "--part", "gradients", "--inputs", folder]
        command += ["--device", case.device, "--dtype", case.dtype, "--result", path]
        if case.one_by_one:
            command.append("--one-by-one")
        run_command(command)
        gradients = load_file(path)
        loss = gradients.pop("loss").item()
        flat = torch.cat([gradients[name].double().flatten() for name in sorted(gradients)])
        results.append((case, loss, flat))
    _, expected_loss, expected = results[0]
    rows = []
    for case, loss, flat in results:
        difference = abs(loss - expected_loss) / expected_loss
        error = (flat - expected).norm() / expected.norm()
        cosine = torch.nn.functional.cosine_similarity(flat, expected, dim=0)
        rows.append(
            [str(case), f"{loss:.5f}", f"{difference:.1e}", f"{error:.1e}", f"{cosine:.6f}"]
        )
    workload.print_table(
        ["computed on", "loss", "relative difference", "gradient error", "gradient cosine"], rows
    )


def report_benchmark(args: argparse.Namespace, script: str, *flags: str) -> None:
    """Print the table of another benchmark for each model shape."""
    for shape in args.model_shapes:
        output = run_command([sys.executable, HERE / script, "--model-shape", shape, *flags])
        lines = output.splitlines()
        table = [line for line in lines if line.startswith("|")]
        title = lines[lines.index(table[0]) - 2]  # the measurement and the machine
        print(f"{title}\n")
        print("\n".join(table) + "\n")


def report_training(args: argparse.Namespace) -> None:
    """Compare throughput and peak memory with those of the published recipe and of TRL alone."""
    report_benchmark(args, "bench_training.py", "--steps", str(args.size.steps))


def report_generation(args: argparse.Namespace) -> None:
    """Compare queries per second with those of the published code."""
    report_benchmark(
        args,
        "bench_generation.py",
        "--conversations",
        str(args.size.conversations),
        "--max-new-tokens",
        str(args.size.max_new_tokens),
    )


def train_one_step(args: argparse.Namespace, length: int) -> dict[str, float | None]:
    """Train one step on four conversations of `length` tokens; return its memory in GB."""
    import datasets
    import torch

    checkpointing = "--activation-checkpointing"
    if not args.checkpointing:
        checkpointing = "--no-activation-checkpointing"
    settings = train.parse_args(["--max-steps", "1", "--batch-size", "4", checkpointing])
    device, dtype = train.choose_device()
    model, tokenizer = train.load_model(args.inputs / "model", dtype)
    estimate = train.estimate_memory(model, 4 * length, args.checkpointing)
    tokens = [8 + number % 100 for number in range(length)]
    mask = [number % 2 for number in range(length)]  # half of the tokens carry loss
    data = datasets.Dataset.from_dict({"input_ids": [tokens] * 4, "assistant_masks": [mask] * 4})
    trainer = train.build_trainer(
        model, tokenizer, data, data, settings, args.inputs / "checkpoints", device
    )
    trainer.args.eval_strategy = "no"
    trainer.args.save_strategy = "no"
    trainer.args.load_best_model_at_end = False
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    reserved = None
    if device == "cuda":
        reserved = torch.cuda.max_memory_reserved() / 1e9
    return {
        "length": length,
        "peak": workload.peak_memory(),
        "reserved": reserved,
        "estimate": estimate / 1e9,
    }


def try_lengths(args: argparse.Namespace) -> None:
    """Print a line of JSON for each length, until memory runs out."""
    import contextlib

    import transformers

    transformers.logging.set_verbosity_error()
    for length in args.size.lengths:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                result = train_one_step(args, length)
        except RuntimeError as error:
            if not re.search(train.MEMORY_ERRORS, str(error)):
                raise
            return
        print(json.dumps(result), flush=True)


def describe_longest(lines: list[str]) -> list[str]:
    """The cells for the longest length that fits, from the lines that try_lengths has printed."""
    if not lines:
        return ["none", "", "", ""]
    longest = json.loads(lines[-1])
    reserved = "not a GPU"
    if longest["reserved"] is not None:
        reserved = f"{longest['reserved']:.2f}"
    return [
        f"4 x {longest['length']:,}",
        f"{longest['peak']:.2f}",
        reserved,
        f"{longest['estimate']:.2f}",
    ]


def report_longest_batch(args: argparse.Namespace) -> None:
    """Find the longest four conversations that fit, with and without checkpointing."""
    rows = []
    for shape in args.model_shapes:
        folder = write_inputs(args, shape, 12)
        command = [sys.executable, __file__, *sys.argv[1:], "--part", "lengths"]
        command += ["--inputs", folder]
        for label, flags in [("off", []), ("on", ["--checkpointing"])]:
            output = run_command([*command, *flags])
            rows.append([shape, label, *describe_longest(output.splitlines())])
    tried = ", ".join(f"{length:,}" for length in args.size.lengths)
    print(f"Lengths tried, in tokens: {tried}.\n")
    workload.print_table(
        [
            "model",
            "checkpointing",
            "longest that fits",
            "peak (GB)",
            "reserved (GB)",
            "estimated (GB)",
        ],
        rows,
    )


def report_four_bit(args: argparse.Namespace) -> None:
    """Compare the losses, time and memory of 20 steps with and without --load-in-4bit."""
    device, _ = train.choose_device()
    if device != "cuda":
        raise NotRun(f"--load-in-4bit needs a CUDA GPU, and this machine has {device}")
    rows = []
    for shape in args.model_shapes:
        folder = write_inputs(args, shape, 6 * 20)
        for output, flags in [("full", []), ("4bit", ["--load-in-4bit"])]:
            run_command(training_command(folder, output, "--max-steps", "20", *flags))
            run = read_run(folder / output)
            losses = read_losses(run)
            rows.append(
                [
                    shape,
                    "4 bits" if run["load_in_4bit"] else run["dtype"],
                    f"{losses[0]:.4f}",
                    f"{losses[-1]:.4f}",
                    f"{run['seconds']:.1f}",
                    f"{run['peak_memory_gb']:.2f}",
                ]
            )
    workload.print_table(
        ["model", "base weights", "first loss", "last loss", "seconds", "peak (GB)"], rows
    )


def kill_after_checkpoint(command: list[str | Path], checkpoint_dir: Path) -> None:
    """Start a run, and kill it as soon as its first checkpoint is complete."""
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None:
            if train.find_last_checkpoint(checkpoint_dir):
                process.kill()
                return
            time.sleep(0.01)
        last_lines = process.stderr.read().strip().splitlines()[-1:]
        raise RuntimeError(f"the run ended before it could be killed {' '.join(last_lines)}")


def report_resume(args: argparse.Namespace) -> None:
    """Compare a run that is killed and resumed with an uninterrupted run."""
    shape = args.model_shapes[0]
    num_steps = args.size.resume_steps
    folder = write_inputs(args, shape, 6 * num_steps)
    flags = ["--max-steps", str(num_steps), "--validation-size", "0.1"]
    run_command(training_command(folder, "uninterrupted", *flags))
    command = training_command(folder, "killed", *flags)
    kill_after_checkpoint(command, folder / "killed-checkpoints")
    output = run_command([*command, "--resume"])
    start = re.search(r"continuing from \S*(checkpoint-\d+)", output)
    weights = read_weights(folder / "killed")
    expected = read_weights(folder / "uninterrupted")
    largest = max((weights[name] - expected[name]).abs().max().item() for name in expected)
    workload.print_table(
        ["model", "resumed from", "identical weights", "largest difference of a weight"],
        [
            [
                shape,
                start[1] if start else "the start",
                "yes" if largest == 0 else "no",
                f"{largest:.1e}",
            ]
        ],
    )


def report_two_processes(args: argparse.Namespace) -> None:
    """Compare the losses of training on two GPUs with torchrun with those of one GPU."""
    import torch

    if torch.cuda.device_count() < 2:
        raise NotRun(f"it needs two GPUs, and this machine has {torch.cuda.device_count()}")
    folder = write_inputs(args, args.model_shapes[0], 6 * 10)
    flags = ["--max-steps", "10", "--lora-dropout", "0"]
    run_command(training_command(folder, "one", *flags))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc_per_node", "2", TRAIN_SCRIPT]
    run_command([*torchrun, *training_flags(folder, "two"), *flags])
    rows = []
    for name in ("one", "two"):
        run = read_run(folder / name)
        losses = read_losses(run)
        rows.append([name, f"{losses[0]:.5f}", f"{losses[-1]:.5f}", f"{run['seconds']:.1f}"])
    workload.print_table(["GPUs", "first loss", "last loss", "seconds"], rows)


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
MULTI_GPU_PARTS = ["machine", "two-processes"]

# Work that a part starts in a process of its own, with the same arguments
STEPS: dict[str, Callable[[argparse.Namespace], None]] = {
    "gradients": compute_gradients,
    "lengths": try_lengths,
}


class Size(NamedTuple):
    """How much each part measures."""

    steps: int
    conversations: int
    max_new_tokens: int
    resume_steps: int
    lengths: list[int]


FULL = Size(
    steps=10,
    conversations=100,
    max_new_tokens=256,
    resume_steps=40,
    lengths=[512, 1024, 2048, 3072, 4096, 6144, 8192],
)
QUICK = Size(
    steps=3,
    conversations=12,
    max_new_tokens=64,
    resume_steps=16,
    lengths=[512, 1024, 2048, 4096],
)
TRIAL = Size(
    steps=2,
    conversations=1,
    max_new_tokens=8,
    resume_steps=4,
    lengths=[16, 32],
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--model-shapes",
        nargs="+",
        choices=workload.SHAPES,
        default=["270m", "1b"],
        help="Sizes of the synthetic Gemma 3 models (default: 270m 1b). With tiny alone, each part "
        "measures as little as possible.",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="Measure less, in about two minutes instead of ten.",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        metavar="PART",
        help=f"Parts of the report: {', '.join(PARTS)} (default: all).",
    )
    # The report starts itself once per part, with these arguments.
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


def run_here(args: argparse.Namespace) -> None:
    """Run one part, or one step of a part, in this process."""
    if args.part in STEPS:
        STEPS[args.part](args)
        return
    _, report = PARTS[args.part]
    try:
        report(args)
    except NotRun as reason:
        print(f"Not run: {reason}.")


def run_part(name: str, work_dir: str) -> bool:
    """Run a part in a process of its own and print its section; return whether it succeeded."""
    title, _ = PARTS[name]
    print(f"Running     {name}", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, *sys.argv[1:], "--part", name, "--work-dir", work_dir]
    environment = workload.make_environment(one_gpu=name not in MULTI_GPU_PARTS)
    start = time.monotonic()
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds = time.monotonic() - start
    text = process.stdout.strip()
    if process.returncode:
        last_lines = process.stderr.strip().splitlines()[-1:] or ["without a message"]
        text += f"\n\nFailed (exit status {process.returncode}): {last_lines[0]}"
    print(f"\n## {title}\n\n{text.strip()}\n\n({seconds:.0f} s)", flush=True)
    return process.returncode == 0


def main() -> None:
    args = parse_args()
    if args.part:
        run_here(args)
        return
    import torch

    if args.model_shapes != ["tiny"] and not torch.cuda.is_available():
        sys.exit(
            "error: PyTorch finds no CUDA GPU. Use --model-shapes tiny for a trial run on a CPU."
        )
    command = " ".join(["python", *sys.argv])
    print(f"# Report of {time.strftime('%Y-%m-%d')}\n\n`{command}`", flush=True)
    failed = []
    with tempfile.TemporaryDirectory() as work_dir:
        for name in args.only or PARTS:
            if not run_part(name, work_dir):
                failed.append(name)
    if failed:
        sys.exit(f"error: {len(failed)} of the parts failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
