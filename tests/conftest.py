"""Shared code of the tests: synthetic rows, a tiny Gemma 3, and functions that run the scripts."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
SAMPLE_MODEL = ROOT / "sample/tiny-gemma-3"
sys.path.insert(0, str(ROOT))
# One thread is the fastest for tiny models, and makes results reproducible bit for bit.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # results are reproducible on CPUs only
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # tests that need a Hub start their own

CITIES = ["Paris", "Oslo", "Lima", "Cairo", "Quito", "Hanoi", "Turin", "Perth", "Sofia", "Accra"]
SYSTEM = "You call functions. Here are the available tools:<tools>\n{tools}\n</tools>"
NO_TOOLS = "You are a helpful assistant, with no access to external functions."


def make_tool(name: str, argument: str) -> dict:
    """A tool with one required argument, which is a string."""
    function = {
        "name": name,
        "description": f"Runs {name}",
        "parameters": {
            "type": "object",
            "properties": {argument: {"type": "string"}},
            "required": [argument],
        },
    }
    return {"type": "function", "function": function}


def make_row(number: int) -> dict:
    """A row in the published layout. Every fourth row is small talk, and the others call a tool."""
    city = CITIES[number % len(CITIES)]
    if number % 4 == 3:
        tools = "null"
        turns = [
            ("system", NO_TOOLS),
            ("human", f"Say hello to {city}."),
            ("gpt", f"Hello, {city}!"),
        ]
    else:
        degrees = number % 30
        tool = make_tool(f"get_weather_{number % 3}", "city")
        tools = json.dumps([tool])
        call = {"name": tool["function"]["name"], "arguments": {"city": city}}
        result = {"name": call["name"], "content": {"degrees": degrees}}
        turns = [
            ("system", SYSTEM.format(tools=tools)),
            ("human", f"What is the weather in {city}?"),
            ("gpt", f"<tool_call>\n{json.dumps(call)}\n</tool_call>"),
            ("tool", f"<tool_response>\n{json.dumps(result)}\n</tool_response>"),
            ("gpt", f"It is {degrees} degrees in {city}."),
        ]
    conversations = [{"from": role, "value": value} for role, value in turns]
    return {"id": f"id-{number}", "conversations": conversations, "tools": tools}


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_model(folder: Path) -> Path:
    """Save a small Gemma 3 text model with random weights, and the tokenizer of the sample."""
    import torch
    from tokenizers import Tokenizer, processors
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig

    folder.mkdir()
    tokenizer = Tokenizer.from_file(str(SAMPLE_MODEL / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(  # as in the tokenizer of Gemma
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((SAMPLE_MODEL / "tokenizer_config.json").read_text())
    config["chat_template"] = (SAMPLE_MODEL / "chat_template.jinja").read_text()
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(b"pieces")  # llama.cpp reads it, transformers does not
    shape = Gemma3TextConfig.from_pretrained(
        SAMPLE_MODEL,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        hidden_size=32,
        intermediate_size=64,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(shape)
    model.generation_config = GenerationConfig.from_pretrained(SAMPLE_MODEL)
    model.save_pretrained(folder)
    return folder


def run_script(
    name: str,
    *arguments: object,
    cwd: Path,
    env: dict[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess:
    """Run a script of the project in a process of its own, as a user does."""
    return subprocess.run(
        [sys.executable, str(ROOT / name), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_here(name: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """Do the same as run_script in this process, which has already imported the libraries."""
    stdout = io.StringIO()
    stderr = io.StringIO()
    status = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as end:
            # As Python does: a message is printed, and the status is 1.
            if isinstance(end.code, str):
                stderr.write(f"{end.code}\n")
                status = 1
            else:
                status = end.code or 0
    return subprocess.CompletedProcess(sys.argv, status, stdout.getvalue(), stderr.getvalue())


def assert_fails_in_one_line(process: subprocess.CompletedProcess, *words: str) -> None:
    """Assert that a user's mistake ended in one line on standard error that contains `words`."""
    assert process.returncode == 1, process.stderr
    assert "Traceback" not in process.stderr
    lines = [line for line in process.stderr.strip().splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), process.stderr
    for word in words:
        assert word in lines[0]


def pytest_configure(config):
    # The tests should pass on a busy machine too, so Hypothesis gets no time limits.
    settings.register_profile(
        "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("any machine")


def pytest_collection_modifyitems(items):
    # The sample run takes by far the longest. If it started last, all other cores would wait.
    items.sort(key=lambda item: "sample_run" not in item.name)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a model that trains in seconds."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny-gemma")


@pytest.fixture(scope="session")
def splits(tmp_path_factory):
    """A processed_data folder made by step 1 from 40 rows: 32 train and 8 test conversations."""
    import prepare_function_calling_dataset as prepare

    folder = tmp_path_factory.mktemp("splits")
    source = write_rows(folder / "rows.jsonl", [make_row(number) for number in range(40)])
    prepare.main(["--dataset", str(source), "--output-dir", str(folder / "processed_data")])
    return folder / "processed_data"


@pytest.fixture(scope="session")
def flags(splits):
    """The flags of a run of 12 steps."""
    return [
        "--train-file",
        str(splits / "function_calling_train.jsonl"),
        "--dtype",
        "float32",
        "--learning-rate",
        "0.01",
        "--epochs",
        "2",
    ]


@pytest.fixture(scope="session")
def finished(tiny_model, flags, tmp_path_factory):
    """A finished run with --merge: the adapter folder, the merged folder and the trainer."""
    import function_calling_train as train

    folder = tmp_path_factory.mktemp("finished")
    build_trainer = train.build_trainer
    trainers = []

    def build_and_keep(*args):
        trainers.append(build_trainer(*args))
        return trainers[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_trainer", build_and_keep)
        patch.chdir(folder)
        train.main(["--model", str(tiny_model), "--merge", *flags])
    adapter = folder / f"LoRA_{tiny_model.name}-function_calling"
    merged = folder / f"{adapter.name}-merged"
    return SimpleNamespace(adapter=adapter, merged=merged, trainer=trainers[0])
