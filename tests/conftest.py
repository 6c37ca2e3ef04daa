"""What the tests share: made-up conversations, a tiny Gemma 3 with a tokenizer of Gemma's make, and ways to run scripts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: one thread is fastest, and bit for bit the same
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same bytes twice are a promise on CPUs only
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing in a test reaches out; tests of the hub path set HF_ENDPOINT to a loopback server

CITIES = ["Paris", "Oslo", "Lima", "Cairo", "Quito", "Hanoi", "Turin", "Perth", "Sofia", "Accra"]
SYSTEM = (
    "You are a function calling AI model. You are provided with function signatures within <tools></tools> XML tags."
    "Here are the available tools:<tools>\n{tools}\n</tools>For each function call return a json object within "
    "<tool_call></tool_call> XML tags as follows:\n<tool_call>\n{{tool_call}}\n</tool_call>"
)
NO_TOOLS = "You are a helpful assistant, with no access to external functions."


def make_tool(name, argument):
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": f"Runs {name}", "parameters": parameters}}


def make_row(number, spell=json.dumps):
    """A source row in the dataset's layout; `spell` writes tools, calls and results (json.dumps, or repr as of old)."""
    city = CITIES[number % len(CITIES)]
    if number % 4 == 3:
        turns = [("system", NO_TOOLS), ("human", f"Say hello to {city}."), ("gpt", f"Hello, {city}!")]
        tools = "null"
    else:
        tool = make_tool(f"get_weather_{number % 3}", "city")
        call = {"name": tool["function"]["name"], "arguments": {"city": city}}
        tools = spell([tool])
        turns = [
            ("system", SYSTEM.format(tools=tools)),
            ("human", f"What is the weather in {city}?"),
            ("gpt", f"<tool_call>\n{spell(call)}\n</tool_call>"),
            ("tool", f"<tool_response>\n{spell({'name': call['name'], 'content': {'degrees': number % 30}})}\n</tool_response>"),
            ("gpt", f"It is {number % 30} degrees in {city}."),
        ]
    conversations = [{"from": role, "value": value} for role, value in turns]
    return {"id": f"id-{number}", "conversations": conversations, "tools": tools, "category": "", "subcategory": "", "task": ""}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_tokenizer(folder, texts):
    """Save a small tokenizer of Gemma's make: its control tokens at their real ids, unused slots, no chat template."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "[multimodal]"]
    unused = [f"<unused{i}>" for i in range(99)]
    turns = ["<start_of_turn>", "<end_of_turn>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    first = control + unused + turns + ["\n"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=len(first) + 400, special_tokens=first, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)

    # The trainer made every one of them an added token: keep those that are so in Gemma, special or plain as there.
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] = [
        {**token, "special": token["content"] in control + turns}
        for token in definition["added_tokens"]
        if token["content"] in control + unused + turns
    ]
    definition["post_processor"] = json.loads(
        processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)]).__getstate__()
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(definition, ensure_ascii=False), encoding="utf-8")
    config = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
              "unk_token": "<unk>", "add_bos_token": True, "model_max_length": 1000000}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


# Like the stock Gemma 3 template where it matters here: <bos>, Gemma's turns, and a refusal of roles that do not alternate.
STOCK_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) or message.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else 'user' }}\n{{ message.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def make_model(folder, tokenizer_folder=None, **options):
    """Save a random Gemma 3 text model of Gemma's structure (tied, sliding and full layers), a few thousand parameters."""
    import shutil

    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer_folder is None:
        # Without "<", so that it has never seen a tag: each falls into several pieces, as with Gemma's own tokenizer.
        turns = [turn["value"].replace("<", " ") for number in range(40) for turn in make_row(number)["conversations"]]
        make_tokenizer(folder, turns)
        config_path = folder / "tokenizer_config.json"
        config_path.write_text(json.dumps({**json.loads(config_path.read_text()), "chat_template": STOCK_TEMPLATE}))
    else:
        for path in tokenizer_folder.iterdir():
            shutil.copyfile(path, folder / path.name)
    definition = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    shape = dict(
        vocab_size=len(definition["model"]["vocab"]), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, sliding_window=64,
        layer_types=["sliding_attention", "full_attention"], max_position_embeddings=2048,
        bos_token_id=2, eos_token_id=1, pad_token_id=0, tie_word_embeddings=True, initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**{**shape, **options}))
    model.generation_config = GenerationConfig(bos_token_id=2, eos_token_id=[1, 106], pad_token_id=0)
    model.save_pretrained(folder)
    return folder


def run_script(name, *arguments, cwd, env=None, timeout=300):
    """Run one of the three scripts as a user does; returns the completed process with its text output."""
    return subprocess.run(
        [sys.executable, str(ROOT / name), *map(str, arguments)],
        cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout,
    )


def assert_fails_in_one_line(process, *words, code=1):
    """A user's mistake ends in one line on standard error that holds `words`, with no traceback."""
    assert process.returncode == code, process.stderr
    assert "Traceback" not in process.stderr
    lines = [line for line in process.stderr.strip().splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), process.stderr
    for word in words:
        assert word in lines[0]


def pytest_configure(config):
    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # busy is no failure
    settings.load_profile("any machine")
    config.addinivalue_line("markers", "slow: takes long; -m 'not slow' leaves it out")


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


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "sample_run" not in item.name)  # by far the longest: last, it would keep a core idle
