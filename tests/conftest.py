"""What the tests share: made-up conversations, a tiny Gemma 3, and ways to run the scripts."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # fastest for tiny models, and bit for bit the same
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same bytes twice are a promise on CPUs only
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # tests of the hub path have a hub of their own

CITIES = ["Paris", "Oslo", "Lima", "Cairo", "Quito", "Hanoi", "Turin", "Perth", "Sofia", "Accra"]
SYSTEM = (
    "You are a function calling AI model. You are provided with function signatures within "
    "<tools></tools> XML tags.Here are the available tools:<tools>\n{tools}\n</tools>For each "
    "function call return a json object within <tool_call></tool_call> XML tags as follows:\n"
    "<tool_call>\n{{tool_call}}\n</tool_call>"
)
NO_TOOLS = "You are a helpful assistant, with no access to external functions."


def make_tool(name, argument):
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}}
    parameters["required"] = [argument]
    function = {"name": name, "description": f"Runs {name}", "parameters": parameters}
    return {"type": "function", "function": function}


def make_row(number, spell=json.dumps):
    """A row in the dataset's layout; `spell` (or repr, as of old) writes tools, calls, results."""
    city, degrees, tools = CITIES[number % len(CITIES)], number % 30, "null"
    turns = [("human", f"Say hello to {city}."), ("gpt", f"Hello, {city}!")]
    if number % 4 != 3:
        tool = make_tool(f"get_weather_{number % 3}", "city")
        call = {"name": tool["function"]["name"], "arguments": {"city": city}}
        result = {"name": call["name"], "content": {"degrees": degrees}}
        tools = spell([tool])
        turns = [
            ("human", f"What is the weather in {city}?"),
            ("gpt", f"<tool_call>\n{spell(call)}\n</tool_call>"),
            ("tool", f"<tool_response>\n{spell(result)}\n</tool_response>"),
            ("gpt", f"It is {degrees} degrees in {city}."),
        ]
    turns.insert(0, ("system", NO_TOOLS if tools == "null" else SYSTEM.format(tools=tools)))
    conversations = [{"from": role, "value": value} for role, value in turns]
    row = {"id": f"id-{number}", "conversations": conversations, "tools": tools}
    return row | dict.fromkeys(["category", "subcategory", "task"], "")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Like Gemma's own where it matters: <bos>, Gemma's turns, no roles but these two, in turns.
STOCK_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) "
    "or message.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else 'user' }}\n"
    "{{ message.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def make_tokenizer(folder, texts):
    """Save a small tokenizer of Gemma's make: its control tokens at their ids, unused slots."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "[multimodal]"]
    unused = [f"<unused{i}>" for i in range(99)]
    turns = ["<start_of_turn>", "<end_of_turn>"]
    spaces = decoders.Replace("▁", " ")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    first = control + unused + turns + ["\n"] + [f"<0x{byte:02X}>" for byte in range(256)]
    size = len(first) + 400
    trainer = BpeTrainer(vocab_size=size, special_tokens=first, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer made each of `first` an added token: keep those that are so in Gemma.
    definition = json.loads(tokenizer.to_str())
    added = [t for t in definition["added_tokens"] if t["content"] in control + unused + turns]
    special = control[:4] + turns
    definition["added_tokens"] = [{**t, "special": t["content"] in special} for t in added]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(definition, ensure_ascii=False), "utf-8")
    config = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True}
    config |= {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    config |= {"model_max_length": 1000000, "chat_template": STOCK_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_model(folder, **options):
    """Save a random Gemma 3 text model: tied, sliding and full layers, some ten thousand weights"""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig

    # Without "<": a tag falls into several pieces, as with Gemma's own tokenizer.
    rows = [make_row(number) for number in range(40)]
    said = [turn["value"].replace("<", " ") for row in rows for turn in row["conversations"]]
    make_tokenizer(folder, said)
    definition = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    # fmt: off
    shape = dict(
        vocab_size=len(definition["model"]["vocab"]), hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        sliding_window=64, layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=2048, bos_token_id=2, eos_token_id=1, pad_token_id=0,
        tie_word_embeddings=True, initializer_range=0.2,
    )
    # fmt: on
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**{**shape, **options}))
    model.generation_config = GenerationConfig(
        bos_token_id=2, eos_token_id=[1, 106], pad_token_id=0
    )
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


def assert_fails_in_one_line(process, *words, code=1):
    """A user's mistake ends in one line on standard error that holds `words`, no traceback."""
    assert process.returncode == code, process.stderr
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


def pytest_collection_modifyitems(items):  # by far the longest: last, it would keep a core idle
    items.sort(key=lambda item: "sample_run" not in item.name)
