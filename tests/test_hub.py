"""The hub path for real: the three scripts, with no flags, against a hub on the loopback interface."""

import json
import shutil
import socket

import pytest
from conftest import assert_fails_in_one_line, make_row, run_script
from hub_server import COMMIT, Hub

DATASET = ("datasets", "NousResearch/hermes-function-calling-v1")
MODEL = ("models", "google/gemma-3-1b-it")
pytestmark = pytest.mark.slow

PREPARE, TRAIN, EVALUATE = "prepare_function_calling_dataset.py", "function_calling_train.py", "evaluation.py"


@pytest.fixture
def hub(tmp_path, tiny_model):
    """A hub with the two default repositories."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "glaive-function-calling-5k.json").write_text(json.dumps([make_row(number) for number in range(40)]))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: glaive_func_calling\n  data_files:\n  - split: train\n"
        "    path: glaive-function-calling-5k.json\n---\n")
    hub = Hub()
    hub.repos = {DATASET: folder, MODEL: tiny_model}
    yield hub
    hub.close()


@pytest.fixture
def work(tmp_path):
    """An empty folder to work in."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_the_three_scripts_with_no_flags(hub, work, tmp_path):
    env = hub.environment(tmp_path / "cache")
    for script, arguments in ((PREPARE, []), (TRAIN, []), (EVALUATE, ["--baseline"]), (EVALUATE, [])):
        process = run_script(script, *arguments, cwd=work, env=env)
        assert process.returncode == 0, process.stderr
    assert {path.name for path in work.iterdir()} == {
        "processed_data", "LoRA_gemma-3-1b-it-function_calling", "LoRA_gemma-3-1b-it-function_calling-checkpoints",
        "evaluation_results"}
    info = json.loads((work / "processed_data" / "dataset_info.json").read_text())
    assert info["source"] == {"dataset": DATASET[1], "config": "glaive_func_calling", "revision": None, "resolved_revision": COMMIT}
    assert (info["rows_loaded"], info["train"]["rows_drawn"], info["test"]["rows_drawn"]) == (40, 32, 8)
    adapter = work / "LoRA_gemma-3-1b-it-function_calling"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (MODEL[1], COMMIT)
    assert json.loads((adapter / "training_run.json").read_text())["commit"] == COMMIT
    for name in ("base", "tuned"):
        metrics = json.loads((work / "evaluation_results" / "gemma-3-1b-it" / name / "metrics.json").read_text())
        assert metrics["run"]["commit"] == COMMIT and metrics["queries"] == 14
    assert "0.28 -> 0.91 / 0.973" in process.stdout  # the published figures of this model

    # What was fetched once serves without a network, and gives the very same splits.
    before = (work / "processed_data" / "function_calling_test.jsonl").read_bytes()
    num_requests = len(hub.requests)
    offline = {**env, "HF_HUB_OFFLINE": "1"}
    assert run_script(PREPARE, cwd=work, env=offline).returncode == 0
    assert (work / "processed_data" / "function_calling_test.jsonl").read_bytes() == before
    info = json.loads((work / "processed_data" / "dataset_info.json").read_text())
    assert info["source"]["resolved_revision"] == COMMIT
    process = run_script(EVALUATE, "--limit", "1", "--overwrite", cwd=work, env=offline)
    assert process.returncode == 0, process.stderr
    assert len(hub.requests) == num_requests


def test_nothing_is_uploaded_unless_asked_and_then_the_whole_adapter(hub, work, tmp_path, splits):
    env = {**hub.environment(tmp_path / "cache"), "HF_TOKEN": "hf_secret"}
    arguments = ["--train-file", splits / "function_calling_train.jsonl", "--max-steps", "1"]
    assert run_script(TRAIN, *arguments, cwd=work, env=env).returncode == 0
    assert hub.uploads == {} and not any(method == "POST" for method, _ in hub.requests)
    process = run_script(TRAIN, *arguments, "--resume", "--push-to-hub", "me/adapter", cwd=work, env=env)
    assert process.returncode == 0, process.stderr
    adapter = work / "LoRA_gemma-3-1b-it-function_calling"
    assert hub.uploads == {"me/adapter": {path.name: path.read_bytes() for path in adapter.iterdir()}}
    assert not any(b"hf_secret" in path.read_bytes() for path in adapter.iterdir())
    assert "hf_secret" not in process.stdout + process.stderr


@pytest.mark.parametrize("script", [PREPARE, TRAIN, EVALUATE])
@pytest.mark.parametrize(
    "state, words",
    [("gated", ["is gated", "accept its", "https://huggingface.co/", "hf auth login"]), ("absent", ["was not found on the hub"])],
)
def test_gated_and_absent_repositories_are_told_apart(hub, work, tmp_path, splits, script, state, words):
    repo = DATASET if script == PREPARE else MODEL
    if state == "gated":
        hub.states[repo] = "gated"
    else:
        del hub.repos[repo]
    arguments = {PREPARE: [], TRAIN: ["--train-file", splits / "function_calling_train.jsonl"],
                 EVALUATE: ["--baseline", "--test-file", splits / "function_calling_test.jsonl"]}[script]
    process = run_script(script, *arguments, cwd=work, env=hub.environment(tmp_path / "cache"))
    assert_fails_in_one_line(process, repo[1], *words)
    assert not list(work.rglob("*"))


@pytest.mark.parametrize("script", [PREPARE, TRAIN, EVALUATE])
def test_a_revision_that_is_not_there(hub, work, tmp_path, splits, script):
    arguments = {PREPARE: [], TRAIN: ["--train-file", splits / "function_calling_train.jsonl"],
                 EVALUATE: ["--baseline", "--test-file", splits / "function_calling_test.jsonl"]}[script]
    process = run_script(script, *arguments, "--revision", "v9", cwd=work, env=hub.environment(tmp_path / "cache"))
    assert_fails_in_one_line(process, "v9")


@pytest.mark.parametrize("script", [PREPARE, TRAIN])
@pytest.mark.parametrize("state", ["closed", "offline"])
def test_no_network_and_nothing_in_the_cache(hub, work, tmp_path, splits, script, state):
    env = hub.environment(tmp_path / "cache")
    if state == "offline":
        env["HF_HUB_OFFLINE"] = "1"
    else:
        with socket.socket() as free:  # a port on which nobody listens
            free.bind(("127.0.0.1", 0))
            env["HF_ENDPOINT"] = f"http://127.0.0.1:{free.getsockname()[1]}"
    arguments = [] if script == PREPARE else ["--train-file", splits / "function_calling_train.jsonl"]
    process = run_script(script, *arguments, cwd=work, env=env)
    assert_fails_in_one_line(process, "could not be", "check the network")
    assert not list(work.rglob("*"))


def test_a_local_folder_serves_as_a_hub_id_does(hub, work, tmp_path, splits, tiny_model):
    """The same model from the hub and from a folder of the same name gives the same adapter."""
    shutil.copytree(tiny_model, work / "gemma-3-1b-it")
    arguments = ["--train-file", splits / "function_calling_train.jsonl", "--max-steps", "2"]
    env = hub.environment(tmp_path / "cache")
    assert run_script(TRAIN, *arguments, "--output-dir", "hub", cwd=work, env=env).returncode == 0
    process = run_script(TRAIN, *arguments, "--model", "gemma-3-1b-it", cwd=work, env={"HF_HUB_OFFLINE": "1"})
    assert process.returncode == 0, process.stderr
    local = work / "LoRA_gemma-3-1b-it-function_calling"  # the same name as from the hub
    assert (local / "adapter_model.safetensors").read_bytes() == (work / "hub" / "adapter_model.safetensors").read_bytes()
