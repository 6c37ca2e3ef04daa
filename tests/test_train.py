"""Tests of step 2: loss, weights, files, resuming, user mistakes, messages and hardware."""

import errno
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, assert_fails_in_one_line, run_here
from datasets import Dataset
from huggingface_hub import ModelCard
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    TrainerControl,
    TrainerState,
    training_args,
)
from trl import SFTTrainer

import function_calling_train as train

sys.path.insert(0, str(ROOT / "tests/benchmarks"))
import estimate_memory
import workload

SCRIPT = "function_calling_train.py"
WEIGHTS = "adapter_model.safetensors"
CONVERSATION = [
    {"role": "user", "content": "What is the weather in Paris?"},
    {"role": "assistant", "content": '<tool_call>\n{"name": "get_weather_0"}\n</tool_call>'},
    {"role": "tool", "content": "<tool_response>\n20\n</tool_response>"},
    {"role": "assistant", "content": "It is 20 degrees in Paris."},
]


@pytest.fixture
def build(tiny_model, splits, tmp_path):
    """Build a trainer as the script does; return it with the number of dropped conversations."""

    def build(*flags, conversations=None):
        args = train.parse_args(["--model", str(tiny_model), *flags])
        rows, info = train.read_split(splits / "function_calling_train.jsonl")
        model, tokenizer = train.load_model(tiny_model, torch.float32)
        template = train.make_template(info["prompt"], tokenizer, args.loss_on)
        training, validation, num_dropped = train.build_datasets(
            conversations or rows, tokenizer, template, args
        )
        trainer = train.build_trainer(
            model, tokenizer, training, validation, args, tmp_path / "run", "cpu"
        )
        return trainer, num_dropped

    return build


# ---- Loss


def labels_of(trainer):
    batch = trainer.data_collator([trainer.train_dataset[0]])
    return batch["input_ids"][0].tolist(), batch["labels"][0].tolist()


def test_one_bos_and_only_model_turns_carry_loss_with_their_end_of_turn(build):
    trainer, _ = build(conversations=[CONVERSATION] * 5)
    ids, labels = labels_of(trainer)
    tokenizer = trainer.processing_class
    call, answer = (CONVERSATION[turn]["content"] for turn in (1, 3))
    assert tokenizer.decode(ids) == (
        "<bos><start_of_turn>user\nWhat is the weather in Paris?<end_of_turn>\n"
        f"<start_of_turn>model\n{call}<end_of_turn>\n"
        "<start_of_turn>user\n<tool_response>\n20\n</tool_response><end_of_turn>\n"
        f"<start_of_turn>model\n{answer}<end_of_turn>\n"
    )
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    said = [label for label in labels if label != -100]
    assert tokenizer.decode(said) == f"{call}<end_of_turn>{answer}<end_of_turn>"
    ids, labels = labels_of(build("--loss-on", "all")[0])
    assert ids == labels


def test_a_turn_marked_train_false_carries_no_loss(build):
    first = {**CONVERSATION[1], "train": False}
    marked = [CONVERSATION[0], first, *CONVERSATION[2:]]
    trainer, _ = build(conversations=[marked] * 5)
    ids, labels = labels_of(trainer)
    decode = trainer.processing_class.decode
    answer = f"{CONVERSATION[3]['content']}<end_of_turn>"
    assert decode([label for label in labels if label != -100]) == answer
    all_ids, labels = labels_of(build("--loss-on", "all", conversations=[marked] * 5)[0])
    without_loss = [token for token, label in zip(ids, labels, strict=True) if label == -100]
    assert all_ids == ids and decode(without_loss) == f"{first['content']}<end_of_turn>"


def test_conversations_over_max_length_are_dropped_and_counted_and_never_cut(build):
    length = len(labels_of(build(conversations=[CONVERSATION] * 5)[0])[0])
    longer = [*CONVERSATION[:3], {"role": "assistant", "content": "It is 20 degrees in Paris!!"}]
    rows = [CONVERSATION, longer, CONVERSATION] * 5
    trainer, num_dropped = build("--max-length", str(length), conversations=rows)
    kept = [*trainer.train_dataset["input_ids"], *trainer.eval_dataset["input_ids"]]
    assert num_dropped == 5 and [len(ids) for ids in kept] == [length] * 10


def test_each_step_has_the_full_number_of_conversations(build):
    for num_rows, num_training, num_validation in ((24, 16, 5), (3, 2, 1)):
        trainer, _ = build(conversations=[CONVERSATION] * num_rows)
        assert len(trainer.train_dataset) == num_training
        assert len(trainer.eval_dataset) == num_validation


@pytest.mark.parametrize("num_labels", [None, 500])
def test_loss_and_gradients_equal_those_of_trl(build, num_labels):
    trainer, _ = build("--batch-size", "4", "--lora-dropout", "0")
    rows = [trainer.train_dataset[index] for index in range(4)]
    batch = trainer.data_collator(rows)
    assert len({len(row["input_ids"]) for row in rows}) > 1
    results = []
    for kind in (train.LabelledTrainer, SFTTrainer):
        trainer.model.zero_grad()
        options = {"num_items_in_batch": num_labels and torch.tensor(num_labels)}
        loss = kind.compute_loss(trainer, trainer.model.train(), dict(batch), **options)
        loss.backward()
        weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
        results.append([loss.detach(), *(weight.grad.clone() for weight in weights)])
    assert results[0][0] > 0.1 and any(gradient.any() for gradient in results[0][1:])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


# ---- Weights and files


def test_training_changes_only_the_lora_weights(finished, tiny_model):
    before = load_file(tiny_model / "model.safetensors")
    after = dict(finished.trainer.model.base_model.model.named_parameters())
    after = {name.replace(".base_layer", ""): weight for name, weight in after.items()}
    assert before.keys() == {name for name in after if "lora" not in name}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    lora = [weight for name, weight in after.items() if "lora_B" in name]
    assert len(lora) == 14 and all(weight.any() for weight in lora)  # they start at zero


def test_the_adapter_contains_only_lora_weights_of_the_seven_projections(finished):
    projections = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    weights = load_file(finished.adapter / WEIGHTS)
    parts = [name.split(".")[4:] for name in weights]  # such as 0, mlp, up_proj, lora_A, weight
    found = [(layer, projection, lora) for layer, _, projection, lora, _ in parts]
    assert sorted(found) == sorted(itertools.product("01", projections, ["lora_A", "lora_B"]))
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_an_adapter_for_a_real_model_is_small(finished):
    for layers, hidden, mlp, megabytes in ((18, 640, 2048, 16), (26, 1152, 6912, 53)):
        shape = {"hidden_size": hidden, "intermediate_size": mlp, "head_dim": 256}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "num_hidden_layers": layers}
        with torch.device("meta"):
            model = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=262_144, **shape, **heads))
            model = get_peft_model(model, LoraConfig.from_pretrained(finished.adapter))
        lora = [weight for name, weight in model.named_parameters() if "lora" in name]
        assert 0.9 * megabytes < 4 * sum(map(torch.numel, lora)) / 1e6 < megabytes


def test_the_adapter_folder_is_complete_and_contains_no_pickle(finished, tiny_model):
    tokenizer_files = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"]
    names = {"README.md", "adapter_config.json", WEIGHTS, "chat_template.jinja", *tokenizer_files}
    names |= {"generation_config.json", "loss.png", "training_run.json"}
    assert {path.name for path in finished.adapter.iterdir()} == names
    assert not finished.adapter.with_name(f"{finished.adapter.name}-checkpoints").exists()
    for name in ("tokenizer.json", "tokenizer.model"):  # the files of the base model
        for folder in (finished.adapter, finished.merged):
            assert (folder / name).read_bytes() == (tiny_model / name).read_bytes()
    config = json.loads((finished.adapter / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(tiny_model), None)
    assert tiny_model.is_absolute()
    run = json.loads((finished.adapter / "training_run.json").read_text())
    losses = {e["step"]: e["eval_loss"] for e in run["log_history"] if "eval_loss" in e}
    assert list(losses) == [3, 6, 9, 12]  # two validations per epoch
    assert losses[run["best_step"]] == min(losses.values())


def test_the_reloaded_and_the_merged_model_equal_the_trained_model(finished, tiny_model):
    serving = (finished.adapter / "chat_template.jinja").read_text()
    assert "<tool_call>" in serving and "{%- generation" not in serving
    for folder in (finished.adapter, finished.merged):
        assert AutoTokenizer.from_pretrained(folder).chat_template == serving
        stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        assert stops == [1, 21]  # <eos> and <end_of_turn>
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = torch.tensor([finished.trainer.train_dataset[0]["input_ids"]])
    with torch.no_grad():
        untrained = base(ids).logits
        trained = finished.trainer.model.eval()(ids).logits
        loaded = PeftModel.from_pretrained(base, finished.adapter).eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(finished.merged, use_safetensors=True)
        assert torch.equal(loaded, trained) and not torch.allclose(loaded, untrained, atol=0.1)
        torch.testing.assert_close(merged.eval()(ids).logits, trained, atol=1e-4, rtol=0)
    assert merged.dtype == torch.float32


def test_the_same_seed_gives_the_same_bytes_and_a_different_seed_does_not(
    finished, tiny_model, flags, tmp_path
):
    weights = []
    for options in ([], ["--max-steps", "1"], ["--max-steps", "1", "--seed", "7"]):
        options = ["--model", tiny_model, "--output-dir", "run", "--overwrite", *options]
        assert run_here(SCRIPT, *flags, *options, cwd=tmp_path).returncode == 0
        weights.append((tmp_path / "run" / WEIGHTS).read_bytes())
    assert weights[0] == (finished.adapter / WEIGHTS).read_bytes() and weights[1] != weights[2]


# ---- Killed runs and errors during training

KILLED = """
import os, signal
import function_calling_train as train

def kill(self, args, state, control, **kwargs):
    if state.global_step == 8:
        os.kill(os.getpid(), signal.SIGKILL)

train.StopOnNaN.on_step_end = kill
train.main()
"""


@pytest.mark.slow
def test_a_killed_and_resumed_run_gives_the_same_adapter_bit_for_bit(
    finished, tiny_model, flags, tmp_path
):
    command = [*flags, "--model", str(tiny_model), "--output-dir", "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = [sys.executable, "-c", KILLED, *command]
    process = subprocess.run(killed, cwd=tmp_path, env=environment, capture_output=True)
    checkpoints = tmp_path / "run-checkpoints"
    assert process.returncode == -9 and not list((tmp_path / "run").iterdir())
    # A run that is killed while it writes a checkpoint leaves no trainer_state.json, or part of it.
    cut_short = shutil.copytree(checkpoints / "checkpoint-7", checkpoints / "checkpoint-8")
    (cut_short / "trainer_state.json").unlink()
    cut_short = shutil.copytree(checkpoints / "checkpoint-7", checkpoints / "checkpoint-9")
    (cut_short / "trainer_state.json").write_text('{"best_glo')

    assert_fails_in_one_line(run_here(SCRIPT, *command, cwd=tmp_path), "--resume", "--overwrite")
    other = ["--seed", "3", "--lora-rank", "4"]
    refused = run_here(SCRIPT, *command, "--resume", *other, cwd=tmp_path)
    assert_fails_in_one_line(refused, "--seed 42, not 3", "--lora-rank 16, not 4", "--overwrite")
    namesake = shutil.copytree(tiny_model, tmp_path / "other" / tiny_model.name)
    with (namesake / "model.safetensors").open("ab") as weights:
        weights.write(b"0")
    refused = run_here(SCRIPT, *command, "--model", namesake, "--resume", cwd=tmp_path)
    assert_fails_in_one_line(refused, "started with other weights in --model")

    process = run_here(SCRIPT, *command, "--resume", cwd=tmp_path)
    assert process.returncode == 0 and "checkpoint-7\n" in process.stdout, process.stderr
    assert not process.stderr
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (finished.adapter / WEIGHTS).read_bytes()
    assert not checkpoints.exists()


def test_a_checkpoint_is_saved_after_every_5_percent_of_the_steps():
    for num_steps, interval in ((12, 1), (41, 2), (237, 11)):
        saved = []
        for step in range(1, num_steps + 1):
            control = TrainerControl()
            train.SaveOften().on_step_end(
                None, TrainerState(global_step=step, max_steps=num_steps), control
            )
            saved += [step] * control.should_save
        assert saved == list(range(interval, num_steps + 1, interval))


def test_a_finished_run_is_not_replaced_without_overwrite_and_resume_only_merges(
    tiny_model, flags, tmp_path
):
    command = [*flags, "--model", tiny_model, "--max-steps", "1", "--output-dir", "run"]
    assert run_here(SCRIPT, *command, cwd=tmp_path).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    assert_fails_in_one_line(run_here(SCRIPT, *command, cwd=tmp_path), "--resume", "--overwrite")
    refused = run_here(SCRIPT, *command, "--resume", "--epochs", "3", cwd=tmp_path)
    assert_fails_in_one_line(refused, "--epochs 2.0, not 3.0", "--overwrite")
    # Merging needs the model, but none of the settings of the training.
    command = [*flags, "--model", tiny_model, "--seed", "3", "--output-dir", "run"]
    process = run_here(SCRIPT, *command, "--resume", "--merge", cwd=tmp_path)
    assert process.returncode == 0 and "Trained" not in process.stdout, process.stderr
    assert process.stdout.startswith("Finished    this run is complete")
    assert (tmp_path / "run-merged/model.safetensors").is_file()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before


def test_a_loss_that_is_nan_stops_the_run_and_the_error_names_the_step(
    tiny_model, flags, tmp_path, monkeypatch
):
    command = [*flags, "--model", str(tiny_model), "--output-dir"]
    diverged = run_here(SCRIPT, *command, "run", "--learning-rate", "1e12", cwd=tmp_path)
    assert_fails_in_one_line(diverged, " at step ")
    compute_loss = train.LabelledTrainer.compute_loss

    def break_down(trainer, *inputs, **options):
        loss = compute_loss(trainer, *inputs, **options)
        return loss * float("nan") if trainer.state.global_step >= 4 else loss

    monkeypatch.setattr(train.LabelledTrainer, "compute_loss", break_down)
    with pytest.raises(
        SystemExit, match=r"^error: training diverged \(loss is nan at step 5\)\. Restart"
    ):
        train.main([*command, str(tmp_path / "other")])


FULL = "CUDA out of memory.\nTried to allocate 2 GiB"
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"
MEMORY_ADVICE = ["--resume", "--batch-size 1", "--activation-checkpointing"]
COMPILER = ["C compiler", "apt install gcc python3-dev", "--resume"]
COMPILE = ["/usr/bin/gcc", "/tmp/x/cuda_utils.c", "-O3", "-shared", "-fPIC", "-o", "/tmp/x/cuda.so"]
FAILURES = [
    (torch.OutOfMemoryError(FULL), ["memory ran out", *MEMORY_ADVICE]),
    (RuntimeError(CUBLAS), ["memory ran out", *MEMORY_ADVICE]),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), MEMORY_ADVICE),
    (RuntimeError("CUDA error: no kernel image is available for execution"), ["GPU", "cu126"]),
    # Triton raises these errors without a compiler and without Python.h.
    (RuntimeError("Failed to find C compiler. Please specify via CC environment"), COMPILER),
    (subprocess.CalledProcessError(1, COMPILE), COMPILER),
    (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64"), ["disk space"]),
    (OSError(errno.ENOSPC, "No space left on device", "run/x"), ["run/x: No space left on device"]),
]


def raise_in_training(patch, error):
    def fail(*args, **options):
        raise error

    patch.setattr(SFTTrainer, "train", fail)


@pytest.mark.parametrize("error, words", FAILURES)
def test_a_missing_resource_prints_one_line_of_advice(
    error, words, tiny_model, flags, tmp_path, monkeypatch
):
    raise_in_training(monkeypatch, error)
    process = run_here(SCRIPT, *flags, "--model", tiny_model, "--output-dir", "run", cwd=tmp_path)
    assert_fails_in_one_line(process, *words)
    assert ("memory" in process.stderr) == (MEMORY_ADVICE[1] in words)
    assert "Errno" not in process.stderr and "Error" not in process.stderr.replace(FULL, "")


def test_a_bug_keeps_its_traceback_and_the_advice_about_memory_works(
    tiny_model, flags, tmp_path, monkeypatch
):
    command = [*flags, "--model", tiny_model, "--max-steps", "1"]
    with monkeypatch.context() as patch:
        raise_in_training(patch, RuntimeError("shapes do not match"))
        with pytest.raises(RuntimeError, match="shapes do not match"):
            run_here(SCRIPT, *command, cwd=tmp_path)
    command += " ".join(MEMORY_ADVICE).split()
    assert run_here(SCRIPT, *command, cwd=tmp_path).returncode == 0


def test_ctrl_c_prints_one_line_that_says_how_to_continue(tiny_model, flags, tmp_path, monkeypatch):
    raise_in_training(monkeypatch, KeyboardInterrupt())
    process = run_here(SCRIPT, *flags, "--model", tiny_model, cwd=tmp_path)
    assert process.returncode == 1
    assert process.stderr.startswith("interrupted: ") and "--resume" in process.stderr


def losses_of(folder):
    history = json.loads((folder / "training_run.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.slow
def test_two_processes_give_the_same_losses_as_one(tiny_model, flags, tmp_path):
    command = [*flags, "--model", str(tiny_model), "--lora-dropout", "0", "--output-dir"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch += [ROOT / SCRIPT, *command, "two"]
    two = subprocess.run(launch, cwd=tmp_path, capture_output=True, text=True)
    assert two.returncode == 0 and two.stdout.count("Trained ") == 1, two.stderr
    # PyTorch warns if the process group is not destroyed.
    assert "destroy_process_group" not in two.stderr
    one = run_here(SCRIPT, *command, "one", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    losses = losses_of(tmp_path / "one")
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert losses_of(tmp_path / "two") == pytest.approx(losses, abs=1e-4)


# ---- User mistakes


WRONG_VALUES = [
    ("--epochs", "0"),
    ("--epochs", "nan"),
    ("--max-length", "0"),
    ("--lora-rank", "-1"),
    ("--lora-dropout", "1"),
    ("--validation-size", "0"),
    ("--validation-size", "2"),
    ("--learning-rate", "fast"),
    ("--seed", "-1"),
]


def test_user_mistakes_print_one_line_and_the_corrected_command_works(tiny_model, splits, tmp_path):
    command = ["--model", "tiny-gemma", "--max-steps", "1", "--output-dir", "run"]
    split = tmp_path / "processed_data/function_calling_train.jsonl"

    def assert_refused(*words, flags=()):
        process = run_here(SCRIPT, *command, *flags, cwd=tmp_path)
        assert_fails_in_one_line(process, *words)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith("run")]

    for flag, value in WRONG_VALUES:
        process = run_here(SCRIPT, flag, value, cwd=tmp_path)
        assert process.returncode == 2  # the last line, after the usage, names the flag
        assert f"error: argument {flag}: " in process.stderr.splitlines()[-1]
    assert_refused("Run prepare_function_calling_dataset.py first")  # step 2 was run before step 1
    split.parent.mkdir()
    shutil.copy(splits / split.name, split)
    assert_refused("is not a split of step 1: no dataset_info.json is next to it")
    shutil.copytree(splits, split.parent, dirs_exist_ok=True)
    test_split = split.with_name("function_calling_test.jsonl")
    assert_refused("is the test split", flags=["--train-file", test_split])
    lines = split.read_text()
    openai_row = {"messages": [{"role": "user", "content": "Hi"}], "tools": [{"name": "f"}]}
    for line in ('{"messages": [', "{}", "7", json.dumps(openai_row)):
        split.write_text(f"{lines}{line}\n")
        assert_refused("function_calling_train.jsonl, line 33")
    split.write_text(lines)
    assert_refused("tiny-gemma")  # the model is neither a folder nor in the cache
    shutil.copytree(tiny_model, tmp_path / "tiny-gemma")
    assert_refused("--batch-size", flags=["--batch-size", "3"])
    assert_refused("--load-in-4bit needs a CUDA GPU", flags=["--load-in-4bit"])
    assert_refused("0 of 32 conversations", flags=["--max-length", "5"])
    assert_refused("pip install wandb", flags=["--report-to", "wandb"])
    weights = tmp_path / "tiny-gemma/model.safetensors"
    config = tmp_path / "tiny-gemma/config.json"
    complete_weights = weights.read_bytes()
    gemma_config = config.read_text()
    weights.write_bytes(complete_weights[:1000])
    assert_refused("")
    weights.unlink()
    torch.save({}, tmp_path / "tiny-gemma/pytorch_model.bin")  # pickles are never loaded
    assert_refused("tiny-gemma cannot be loaded", "safetensors")
    weights.write_bytes(complete_weights)
    # The code of a model is never run.
    (tmp_path / "tiny-gemma/code.py").write_text("raise SystemError")
    llama = {"model_type": "llama", "rope_parameters": None}
    llama["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config.write_text(json.dumps(json.loads(gemma_config) | llama))
    assert_refused("model type llama", "Only Gemma 3 text models")
    config.write_text(gemma_config)
    (tmp_path / "tiny-gemma/adapter_config.json").write_text("{}")
    assert_refused("is a LoRA adapter", "Pass its base model as --model")
    (tmp_path / "tiny-gemma/adapter_config.json").unlink()
    assert_refused("--revision", "local folder", flags=["--revision", "main"])
    process = run_here(SCRIPT, *command, cwd=tmp_path)
    assert process.returncode == 0, process.stderr


# ---- Output folders and stopped runs


@pytest.mark.parametrize("folder", [".", "notes"])
def test_a_folder_with_other_files_is_refused_and_not_changed(folder, tiny_model, flags, tmp_path):
    (tmp_path / "notes").mkdir()
    for path in (tmp_path / "README.md", tmp_path / "notes/todo.txt"):
        path.write_text("mine")
    command = [*flags, "--model", tiny_model, "--output-dir", folder, "--overwrite"]
    assert_fails_in_one_line(run_here(SCRIPT, *command, cwd=tmp_path), "--output-dir")
    assert {path.name for path in tmp_path.rglob("*")} == {"README.md", "notes", "todo.txt"}
    assert (tmp_path / "README.md").read_text() == "mine"


def test_an_empty_working_directory_can_be_the_output_folder(tiny_model, flags, tmp_path):
    (tmp_path / "run").mkdir()
    command = [*flags, "--model", tiny_model, "--max-steps", "1", "--output-dir", "."]
    process = run_here(SCRIPT, *command, cwd=tmp_path / "run")
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "run" / WEIGHTS).is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_merged_model_is_replaced_only_with_a_flag_that_says_so(tiny_model, flags, tmp_path):
    command = [*flags, "--model", tiny_model, "--max-steps", "3", "--output-dir", "run"]
    merged = tmp_path / "run-merged/model.safetensors"
    assert run_here(SCRIPT, *command, "--merge", cwd=tmp_path).returncode == 0
    first = merged.read_bytes()
    again = [*command, "--overwrite", "--seed", "7"]
    assert run_here(SCRIPT, *again, "--merge", cwd=tmp_path).returncode == 0
    assert merged.read_bytes() != first
    second = merged.read_bytes()
    process = run_here(SCRIPT, *again, cwd=tmp_path)
    assert "Note        run-merged/ contains an earlier adapter" in process.stdout
    on_merged = ["--model", "run-merged", "--overwrite", "--merge"]  # the last --model counts
    for run, words in (
        ([*again, *on_merged], "run-merged is the base model of this run, and --merge would"),
        ([*again, "--output-dir", "run-merged"], "run-merged is a merged model"),
    ):
        assert_fails_in_one_line(run_here(SCRIPT, *run, cwd=tmp_path), words)
    (tmp_path / "run").rename(tmp_path / "moved")
    for flags in (["--merge"], ["--merge", "--resume"]):
        refused = run_here(SCRIPT, *command, *flags, cwd=tmp_path)
        words = "run-merged already contains a merged model", "--overwrite"
        assert_fails_in_one_line(refused, *words)
    assert merged.read_bytes() == second
    shutil.rmtree(merged.parent)
    merged.parent.mkdir()
    (merged.parent / "mine.txt").write_text("mine")
    assert run_here(SCRIPT, *again, cwd=tmp_path).returncode == 0
    refused = run_here(SCRIPT, *again, "--merge", cwd=tmp_path)
    assert_fails_in_one_line(refused, "run-merged contains files")
    assert [path.name for path in merged.parent.iterdir()] == ["mine.txt"]


STOPPED = """
import os, signal, sys
import function_calling_train as train

write_results = train.write_results
def stop(*args):
    print("all steps are done", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP if sys.argv.pop() == "stop" else signal.SIGKILL)
    write_results(*args)

train.write_results = stop
train.main(sys.argv[1:-1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("length", [["--max-steps", "4"], ["--epochs", "0.7"]])
def test_a_run_resumed_after_its_last_step_trains_no_further_step(
    length, tiny_model, flags, tmp_path
):
    command = [*flags, "--model", str(tiny_model), *length, "--output-dir"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = [sys.executable, "-c", STOPPED, *command, "run", "kill"]
    process = subprocess.run(killed, cwd=tmp_path, env=environment, capture_output=True)
    assert process.returncode == -9, process.stderr
    checkpoints = sorted((tmp_path / "run-checkpoints").glob("checkpoint-*"))
    state = json.loads((checkpoints[-1] / "trainer_state.json").read_text())
    assert state["global_step"] == state["max_steps"]
    process = run_here(SCRIPT, *command, "run", "--resume", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert run_here(SCRIPT, *command, "other", cwd=tmp_path).returncode == 0
    runs = [json.loads((tmp_path / x / "training_run.json").read_text()) for x in ("run", "other")]
    steps = [max(entry["step"] for entry in run["log_history"]) for run in runs]
    assert steps == [state["max_steps"]] * 2
    weights = [(tmp_path / x / WEIGHTS).read_bytes() for x in ("run", "other")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused_while_the_first_is_running(
    tiny_model, flags, tmp_path
):
    command = [*flags, "--model", str(tiny_model), "--max-steps", "2", "--output-dir", "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = [sys.executable, "-c", STOPPED, *command, "stop"]
    streams = {"stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(first, cwd=tmp_path, env=environment, **streams) as process:
        try:
            assert any("all steps are done" in line for line in process.stdout)
            for flag in ("--resume", "--overwrite"):
                second = run_here(SCRIPT, *command, flag, cwd=tmp_path)
                assert_fails_in_one_line(second, "another process is already training in run")
        finally:
            process.kill()  # SIGKILL: the process cannot clean up
    resumed = run_here(SCRIPT, *command, "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert not (tmp_path / "run-checkpoints").exists()


def test_the_time_of_a_resumed_run_includes_the_time_before_the_interruption(build):
    trainer, _ = build()
    progress = next(
        callback
        for callback in trainer.callback_handler.callbacks
        if isinstance(callback, train.ReportProgress)
    )
    trainer.state.log_history = [{"loss": 1.0, "step": 1, "seconds": 100.0}]
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    progress.start -= 50.0  # as if 50 seconds had passed
    trainer.log({"loss": 0.5})
    assert trainer.state.log_history[-1]["seconds"] == pytest.approx(150.0, abs=5.0)


# ---- Messages, plot and model card


def test_the_next_commands_can_be_pasted_and_include_a_missing_baseline(
    tiny_model, splits, tmp_path
):
    data = shutil.copytree(splits, tmp_path / "my data")
    shutil.copytree(tiny_model, tmp_path / "tiny model")
    split = data / "function_calling_train.jsonl"
    command = ["--model", "tiny model", "--train-file", split.relative_to(tmp_path)]
    command += ["--max-steps", "1", "--output-dir", "my run"]
    process = run_here(SCRIPT, *command, cwd=tmp_path)
    common = "python evaluation.py --model 'tiny model'"
    test = "--test-file 'my data/function_calling_test.jsonl'"
    fine_tuned = f"{common} --adapter 'my run' {test}"
    baseline = f"python evaluation.py --baseline --model 'tiny model' {test}"
    assert process.stdout.endswith(f"Next        {baseline}\n            {fine_tuned}\n")
    results = tmp_path / "evaluation_results/tiny model/baseline"
    results.mkdir(parents=True)
    info = json.loads((data / "dataset_info.json").read_text())
    both = f"Next        {baseline}\n            {fine_tuned}\n"
    one = f"Next        {fine_tuned}\n"
    for sha256, commands in (("of another split", both), (info["test"]["sha256"], one)):
        metrics = {"run": {"test_split_sha256": sha256}}
        (results / "metrics.json").write_text(json.dumps(metrics))
        process = run_here(SCRIPT, *command, "--resume", cwd=tmp_path)
        assert process.stdout.endswith(commands)
    assert "baseline" not in process.stdout
    args = train.parse_args([])
    assert train.evaluation_command(args) == "python evaluation.py"
    args = train.parse_args(["--revision", "v1"])
    assert train.evaluation_command(args, "--baseline") == (
        "python evaluation.py --baseline --revision v1"
    )


def test_progress_outside_a_terminal_is_a_few_lines_with_the_remaining_time(
    tiny_model, flags, tmp_path
):
    process = run_here(SCRIPT, *flags, "--model", tiny_model, cwd=tmp_path)
    lines = [line.split()[0] for line in process.stdout.splitlines()]
    assert lines == ["Model", "Data", *["Step"] * 4, "Trained", "Adapter", "Next", "python"]
    number = r"[\d.,]+"
    assert len(re.findall(f"of 12, validation loss {number}, {number} s left", process.stdout)) == 4
    assert re.search(f"12 steps in {number} s, peak memory {number} GB", process.stdout)
    assert "24 conversations for training, 7 for validation, 1 dropped" in process.stdout


def test_a_terminal_shows_a_progress_bar_and_the_same_lines(build, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    trainer, _ = build("--max-steps", "2")
    trainer.train()
    assert "2/2" in terminal.getvalue()
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.strip()]
    assert [line.split(",")[0] for line in steps] == ["Step        1 of 2", "Step        2 of 2"]


@pytest.mark.parametrize(
    "history",
    [
        [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 1.9}],
        [
            {"step": 1, "loss": 2.0},
            {"step": 2, "loss": 1.5},
            {"step": 1, "eval_loss": 1.7},
            {"step": 2, "eval_loss": 1.9},
        ],
    ],
)
def test_the_plot_marks_the_saved_checkpoint_and_shows_a_run_of_one_step(history, tmp_path):
    saved = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
        train.plot_losses(history, 1, tmp_path / "loss.png", "title")
    lines = {line.get_label(): line for line in saved[0].axes[0].get_lines()}
    best = history[-1]["eval_loss"] if len(history) == 2 else 1.7
    star = lines.pop(f"saved: step 1, {best:.4f}")
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([1], [best])
    assert list(lines) == ["training", "validation"]
    assert all(line.get_marker() != "None" for line in lines.values())  # a single point is visible


def test_the_model_card_is_valid_for_the_hub_and_its_snippet_runs(finished, flags, capsys):
    card = (finished.adapter / "README.md").read_text()
    metadata = ModelCard(card).data
    assert metadata.license == "gemma" and metadata.library_name == "peft"
    assert metadata.base_model is None  # a local folder has no Hub id
    assert metadata.datasets is None and "Apache" not in card
    assert "Not evaluated yet." in card and "vllm serve" in card
    assert "local data: 24 conversations for training, 7 for validation" in card
    snippet = re.search("```python\n(.*?)```", card, re.DOTALL)[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished.adapter.parent)
        exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_model_card_contains_the_license_of_the_published_data_and_the_scores(
    finished, tiny_model, splits, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    data = shutil.copytree(splits, tmp_path / "data")
    info = json.loads((data / "dataset_info.json").read_text())
    info["is_published_split"] = True
    (data / "dataset_info.json").write_text(json.dumps(info))
    folder = shutil.copytree(finished.adapter, tmp_path / "run")
    sha256 = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    score = {"value": 0.5, "n": 8, "interval": [0.25, 0.75]}
    unknown = {"value": None, "n": 0, "interval": None}
    runs = [("other", "0" * 64, 9), ("first-2", sha256, 2), ("fine-tuned", sha256, 8)]
    for label, weights, num_queries in runs:
        results = tmp_path / "evaluation_results" / tiny_model.name / label
        results.mkdir(parents=True)
        scores = {"turn_right": score | {"n": len(label)}, "valid_call": unknown}
        labels = {"turn_right": "exact calls", "valid_call": "valid calls"}
        metrics = {"run": {"adapter_sha256": weights}, "scores": scores, "labels": labels}
        metrics["queries"] = num_queries
        (results / "metrics.json").write_text(json.dumps(metrics))
    damaged = tmp_path / "evaluation_results" / tiny_model.name / "damaged"
    damaged.mkdir()
    (damaged / "metrics.json").write_text('{"run": ')
    command = ["--model", str(tiny_model), "--output-dir", "run", "--push-to-hub", "me/adapter"]
    command += ["--train-file", str(data / "function_calling_train.jsonl")]
    args = train.parse_args(command)
    run = json.loads((folder / "training_run.json").read_text())
    train.write_model_card(args, info, run | {"commit": "0" * 40})
    card = (folder / "README.md").read_text()
    metadata = ModelCard(card).data
    assert metadata.base_model == str(tiny_model) and metadata.license == "gemma"
    assert metadata.datasets == ["NousResearch/hermes-function-calling-v1"]
    assert "The training data is licensed under Apache-2.0." in card
    # The run of the same weights on the most queries. The others have n = 5 and n = 7.
    assert "| exact calls | 0.500 | 0.250, 0.750 | 10 |" in card
    assert "valid call" not in card and 'adapter = "me/adapter"' in card


# ---- Hardware

# The number of layers, the bytes that one layer keeps for a token (measured by
# estimate_memory.py --measure) and the bytes of the weights
MEASURED = {
    ("270m", "bfloat16"): (18, 72_036, 0.54e9),
    ("270m", "float32"): (18, 101_900, 1.07e9),
    ("1b", "bfloat16"): (26, 155_108, 2.00e9),
    ("1b", "float32"): (26, 227_868, 4.00e9),
}
GPUS = [15.6e9, 23.6e9, 42.3e9, 47.6e9, 85.0e9]  # T4, L4, A100, L40S, A100 or H100
# The longest conversations, in tokens and up to 4,096, of which four fit without checkpointing
LONGEST = {
    ("270m", "bfloat16"): [2155, 3505, 4096, 4096, 4096],
    ("270m", "float32"): [1449, 2401, 4096, 4096, 4096],
    ("1b", "bfloat16"): [598, 1027, 2029, 2313, 4096],
    ("1b", "float32"): [327, 619, 1304, 1498, 2867],
}
CELLS = [
    (shape, dtype, memory, length)
    for (shape, dtype), lengths in LONGEST.items()
    for memory, length in zip(GPUS, lengths, strict=True)
]


@pytest.fixture
def build_on_cuda(tiny_model, splits, tmp_path, monkeypatch):
    """Build a trainer as on a GPU, for a tiny model whose configuration has a real shape."""

    def build(shape, dtype, memory, lengths, *flags):
        monkeypatch.setattr(train, "local_rank", lambda: 3)
        asked = []

        def get_device_properties(device=None):
            asked.append(device)
            return SimpleNamespace(total_memory=memory)

        monkeypatch.setattr(torch.cuda, "get_device_properties", get_device_properties)
        monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: True)
        model, tokenizer = train.load_model(tiny_model, getattr(torch, dtype))
        for name, value in workload.make_config(shape).to_dict().items():
            if name in ("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"):
                setattr(model.config, name, value)
        model.config.num_attention_heads = 4
        weight_bytes = MEASURED[shape, dtype][2]
        monkeypatch.setattr(model, "get_memory_footprint", lambda: weight_bytes)
        rows = {"input_ids": [[2] * length for length in lengths]}
        rows["assistant_masks"] = [[1] * length for length in lengths]
        data = Dataset.from_dict(rows)
        args = train.parse_args(["--model", str(tiny_model), *flags])
        trainer = train.build_trainer(model, tokenizer, data, data, args, tmp_path / "run", "cuda")
        return trainer, asked

    return build


@pytest.mark.parametrize("shape, dtype, memory, length", CELLS)
def test_activations_are_recomputed_if_the_longest_batch_does_not_fit_the_gpu(
    shape, dtype, memory, length, build_on_cuda
):
    num_layers, layer_bytes, weight_bytes = MEASURED[shape, dtype]

    def needed(tokens):
        """The measured bytes, and 2 GB for the rest."""
        return weight_bytes + 2e9 + num_layers * layer_bytes * 4 * tokens

    lengths = [7, length - 50, 9, 3]
    trainer, asked = build_on_cuda(shape, dtype, memory, lengths)
    assert not trainer.args.activation_checkpointing
    assert needed(length) < 0.9 * memory
    assert set(asked) == {3}  # the GPU of this process, not the first one
    if length < 4096:
        trainer, _ = build_on_cuda(shape, dtype, memory, [7, length + 50, 9, 3])
        assert trainer.args.activation_checkpointing
        assert needed(length * 1.06) > 0.9 * memory  # the estimate is not much too high


def test_on_cuda_a_step_is_one_batch_and_trl_computes_the_loss(build_on_cuda):
    shape = ("270m", "bfloat16", 85e9, [20, 30, 40, 50, 60, 70, 80, 90])
    trainer, _ = build_on_cuda(*shape)
    assert trainer.args.bf16 and not trainer.args.use_cpu
    assert trainer.args.per_device_train_batch_size == 4
    assert trainer.args.gradient_accumulation_steps == 1
    assert trainer.args.per_device_eval_batch_size == 8
    small = train.parse_args(["--batch-size", "1"])  # the advice if memory runs out
    assert train.choose_validation_batch(small, "cuda") == 1
    assert not isinstance(trainer, train.LabelledTrainer)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    lora = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in lora} == {torch.float32}
    trainer, _ = build_on_cuda(*shape, "--batch-size", "2", "--activation-checkpointing")
    assert trainer.args.gradient_accumulation_steps == 2
    assert trainer.args.activation_checkpointing
    trainer, _ = build_on_cuda(*shape, "--no-activation-checkpointing")
    assert not trainer.args.activation_checkpointing


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_memory_estimate_is_slightly_above_the_measured_bytes(dtype):
    measured = estimate_memory.measure_activations("270m", dtype)
    model = estimate_memory.make_empty_model("270m", dtype)
    one, two = (train.estimate_memory(model, tokens, False) for tokens in (1000, 2000))
    estimated = (two - one) / 1000 / model.config.num_hidden_layers
    assert measured < estimated < 1.06 * measured
    assert train.estimate_memory(model, 16_384, True) < train.estimate_memory(model, 16_384, False)


def test_trl_computes_the_loss_on_all_tokens(build):
    trainer, _ = build("--loss-on", "all")
    assert not isinstance(trainer, train.LabelledTrainer)
    assert isinstance(build()[0], train.LabelledTrainer)


def test_help_is_printed_without_importing_the_heavy_libraries():
    code = "import function_calling_train, sys; function_calling_train.parse_args([]);"
    code += "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout == "[]\n", process.stderr
    options = {"capture_output": True, "text": True, "cwd": ROOT}
    shown = subprocess.run([sys.executable, SCRIPT, "--help"], **options).stdout
    for group in ("model and data", "LoRA", "optimization", "hardware", "run"):
        assert f"\n{group}:\n" in shown
