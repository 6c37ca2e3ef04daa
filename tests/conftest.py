"""What the tests share: made-up conversations, a tiny Gemma 3, and ways to run the scripts."""

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
os.environ.setdefault("OMP_NUM_THREADS", "1")  # fastest for tiny models, and bit for bit the same
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same bytes twice are a promise on CPUs only
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # tests of the hub path have a hub of their own

CITIES = ["Paris", "Oslo", "Lima", "Cairo", "Quito", "Hanoi", "Turin", "Perth", "Sofia", "Accra"]
SYSTEM = "You call functions. Here are the available tools:<tools>\n{tools}\n</tools>"
NO_TOOLS = "You are a helpful assistant, with no access to external functions."


def make_tool(name, argument):
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}}
    parameters["required"] = [argument]
    function = {"name": name, "description": f"Runs {name}", "parameters": parameters}
    return {"type": "function", "function": function}


def make_row(number):
    """A row in the dataset's layout; every fourth one is small talk, the others call a tool."""
    city, degrees, tools = CITIES[number % len(CITIES)], number % 30, "null"
    turns = [("human", f"Say hello to {city}."), ("gpt", f"Hello, {city}!")]
    if number % 4 != 3:
        tool = make_tool(f"get_weather_{number % 3}", "city")
        call = {"name": tool["function"]["name"], "arguments": {"city": city}}
        result = {"name": call["name"], "content": {"degrees": degrees}}
        tools = json.dumps([tool])
        turns = [
            ("human", f"What is the weather in {city}?"),
            ("gpt", f"<tool_call>\n{json.dumps(call)}\n</tool_call>"),
            ("tool", f"<tool_response>\n{json.dumps(result)}\n</tool_response>"),
            ("gpt", f"It is {degrees} degrees in {city}."),
        ]
    turns.insert(0, ("system", NO_TOOLS if tools == "null" else SYSTEM.format(tools=tools)))
    conversations = [{"from": role, "value": value} for role, value in turns]
    return {"id": f"id-{number}", "conversations": conversations, "tools": tools}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_model(folder):
    """Save a random Gemma 3 text model of few weights, with the tokenizer of the sample's model."""
    import torch
    from tokenizers import Tokenizer, processors
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig

    tokenizer = Tokenizer.from_file(str(SAMPLE_MODEL / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )  # as Gemma's own
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((SAMPLE_MODEL / "tokenizer_config.json").read_text())
    config["chat_template"] = (SAMPLE_MODEL / "chat_template.jinja").read_text()
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(b"pieces")  # llama.cpp reads it, transformers does not
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    size = {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.2}
    torch.manual_seed(0)
    shape = Gemma3TextConfig.from_pretrained(SAMPLE_MODEL, **layers, **heads, **size)
    model = Gemma3ForCausalLM(shape)
    model.generation_config = GenerationConfig.from_pretrained(SAMPLE_MODEL)
    model.save_pretrained(folder)
    return folder


def run_script(name, *arguments, cwd, env=None, timeout=300):
    """Run one of the three scripts as a user does; return the completed process, with its text."""
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    streams = {"capture_output": True, "text": True, "timeout": timeout}
    return subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})}, **streams)


def run_here(name, *arguments, cwd):
    """What run_script does, in this process, where the libraries are imported already."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        stack.enter_context(contextlib.redirect_stdout(stdout))
        stack.enter_context(contextlib.redirect_stderr(stderr))
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            stderr.write(f"{end.code}\n" if isinstance(end.code, str) else "")
    return subprocess.CompletedProcess(sys.argv, code, stdout.getvalue(), stderr.getvalue())


def assert_fails_in_one_line(process, *words):
    """A user's mistake ends in one line on standard error that holds `words`, no traceback."""
    assert process.returncode == 1, process.stderr
    assert "Traceback" not in process.stderr
    lines = [line for line in process.stderr.strip().splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), process.stderr
    for word in words:
        assert word in lines[0]


def pytest_configure(config):  # a busy machine is no failure
    checks = [HealthCheck.too_slow]
    settings.register_profile("any machine", deadline=None, suppress_health_check=checks)
    settings.load_profile("any machine")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
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
    """The flags of a training of 12 steps."""
    flags = ["--train-file", str(splits / "function_calling_train.jsonl"), "--dtype", "float32"]
    return [*flags, "--learning-rate", "0.01", "--epochs", "2"]


@pytest.fixture(scope="session")
def finished(tiny_model, flags, tmp_path_factory):
    """A whole training with --merge: its folders and its trainer."""
    import function_calling_train as train

    folder, trainers = tmp_path_factory.mktemp("finished"), []
    with pytest.MonkeyPatch.context() as patch:
        build = train.build_trainer
        patch.setattr(train, "build_trainer", lambda *a: trainers.append(build(*a)) or trainers[0])
        patch.chdir(folder)
        train.main(["--model", str(tiny_model), "--merge", *flags])
    adapter = folder / f"LoRA_{tiny_model.name}-function_calling"
    merged = folder / f"{adapter.name}-merged"
    return SimpleNamespace(adapter=adapter, merged=merged, trainer=trainers[0])


def pytest_collection_modifyitems(items):  # by far the longest: last, it would keep a core idle
    items.sort(key=lambda item: "sample_run" not in item.name)
