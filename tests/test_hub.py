"""Tests of the scripts with a local server that implements the API of the Hub."""

import json
from pathlib import Path
from unittest.mock import create_autospec

import huggingface_hub
import pytest
from conftest import assert_fails_in_one_line, make_row, run_here, run_script
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from servers import COMMIT, Hub

DATASET = ("datasets", "NousResearch/hermes-function-calling-v1")
MODEL = ("models", "google/gemma-3-1b-it")
ADAPTER = "LoRA_gemma-3-1b-it-function_calling"
PREPARE = "prepare_function_calling_dataset.py"
TRAIN = "function_calling_train.py"


@pytest.fixture
def hub(tmp_path, tiny_model):
    """A Hub with the default dataset and the default model."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "glaive.json").write_text(json.dumps([make_row(number) for number in range(40)]))
    data = "data_files:\n  - {split: train, path: glaive.json}"
    card = f"---\nconfigs:\n- config_name: glaive_func_calling\n  {data}\n---\n"
    (folder / "README.md").write_text(card)
    hub = Hub()
    hub.repos = {DATASET: folder, MODEL: tiny_model}
    return hub


@pytest.fixture
def run(hub, tmp_path, monkeypatch):
    """Run a script with this Hub in the empty folder run.work. Step 2 runs in this process."""
    work = tmp_path / "work"
    cache = tmp_path / "cache"
    work.mkdir()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))

    def run(script, *arguments, offline="0"):
        if script == TRAIN:
            files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(constants, "ENDPOINT", hub.url)
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline == "1")
            return run_here(script, *arguments, cwd=work)
        return run_script(script, *arguments, cwd=work, env=hub.environment(cache, offline))

    run.work = work
    return run


@pytest.mark.slow
def test_the_scripts_run_without_flags_and_then_without_a_network(hub, run):
    for script in (PREPARE, TRAIN):
        process = run(script)
        assert process.returncode == 0 and not process.stderr, process.stderr
    assert {path.name for path in run.work.iterdir()} == {"processed_data", ADAPTER}
    info = json.loads((run.work / "processed_data/dataset_info.json").read_text())
    source = {"dataset": DATASET[1], "config": "glaive_func_calling", "split": "train"}
    assert info["source"] == {**source, "revision": None, "resolved_revision": COMMIT}
    config = json.loads((run.work / ADAPTER / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (MODEL[1], COMMIT)
    num_requests = len(hub.requests)
    for script, *flags in ((PREPARE,), (TRAIN, "--overwrite"), ("evaluation.py", "--limit", "1")):
        process = run(script, *flags, offline="1")
        assert process.returncode == 0, process.stderr
    assert len(hub.requests) == num_requests


def test_nothing_is_uploaded_without_push_to_hub_and_no_token_is_written_to_a_file(
    hub, run, splits, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    api = create_autospec(huggingface_hub.HfApi)
    api().create_repo.return_value.repo_id = "me/adapter"  # the Hub adds the user's name
    api.reset_mock()
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    command = [TRAIN, "--train-file", splits / "function_calling_train.jsonl", "--max-steps", "2"]
    assert run(*command).returncode == 0
    assert not api.called and {method for method, _ in hub.requests} == {"HEAD", "GET"}
    (run.work / ADAPTER / "my_token.txt").write_text("a user's own file")
    process = run(*command, "--resume", "--push-to-hub", "adapter")
    assert process.returncode == 0, process.stderr
    api().create_repo.assert_called_once_with("adapter", private=True, exist_ok=True)
    (upload,) = api().upload_folder.call_args_list
    assert (upload.kwargs["repo_id"], upload.kwargs["folder_path"]) == ("me/adapter", Path(ADAPTER))
    names = [path.name for path in (run.work / ADAPTER).iterdir()]
    uploaded = filter_repo_objects(names, allow_patterns=upload.kwargs["allow_patterns"])
    assert set(names) - set(uploaded) == {"my_token.txt"}
    assert 'adapter = "me/adapter"' in (run.work / ADAPTER / "README.md").read_text()
    files = [path for path in run.work.rglob("*") if path.is_file()]
    assert files and not any(b"hf_secret" in path.read_bytes() for path in files)
    assert "hf_secret" not in process.stdout + process.stderr


SCRIPTS = [
    pytest.param(
        PREPARE, DATASET, "--dataset", "the Hub cannot be reached", marks=pytest.mark.slow
    ),
    (TRAIN, MODEL, "--model", "set HF_HUB_OFFLINE=0"),
]


@pytest.mark.parametrize("script, repo, what, no_network", SCRIPTS)
def test_gated_absent_and_unreachable_repositories_print_one_line_of_advice(
    hub, run, splits, tiny_model, script, repo, what, no_network
):
    split = splits / "function_calling_train.jsonl"
    command = [script, "--train-file", split] if script == TRAIN else [script]
    absent = run(*command, what, "nobody/nothing")
    assert_fails_in_one_line(absent, "nobody/nothing", "neither a local f")
    if script == TRAIN:
        assert_fails_in_one_line(absent, "neither a local folder nor a model on the Hub")
        missing = run(*command, what, "./no/such/folder")
        assert_fails_in_one_line(missing, "neither a local folder nor a valid Hub id")
    assert_fails_in_one_line(run(*command, "--revision", "v9"), "v9")
    assert_fails_in_one_line(run(*command, offline="1"), no_network)
    hub.gated.add(repo)
    gated = run(*command)
    page = f"https://huggingface.co/{'' if script == TRAIN else 'datasets/'}{repo[1]}"
    assert_fails_in_one_line(gated, page, "run `hf auth login`", "run this command again")
    if script == TRAIN:
        assert_fails_in_one_line(gated, f"is gated. Open {page}, accept the license")
    hub.url = "http://127.0.0.1:9"  # where no server listens
    assert_fails_in_one_line(run(*command), "network connection" if script == TRAIN else no_network)
    if script == TRAIN:
        upload = run(*command, what, tiny_model, "--push-to-hub", "me/adapter")
        assert_fails_in_one_line(upload, "cannot connect to the Hub", "--push-to-hub me/adapter")
    assert not list(run.work.iterdir())


# ---- Models and adapters that step 3 downloads

EVALUATE = "evaluation.py"
ADAPTER_REPO = ("models", "me/adapter")


@pytest.fixture
def evaluate(hub, run, splits, monkeypatch):
    """Run step 3 with this Hub in this process, on one test conversation."""

    def evaluate(*flags, offline=False, cache="cache"):
        files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(run.work.parent / cache))
        command = ["--test-file", splits / "function_calling_test.jsonl", "--limit", "1"]
        return run_here(EVALUATE, *command, *flags, cwd=run.work)

    return evaluate


@pytest.mark.parametrize("repo, flags", [(MODEL, ["--baseline"]), (ADAPTER_REPO, ["--adapter"])])
def test_step_3_prints_one_line_of_advice_about_a_repository_it_cannot_read(
    hub, run, evaluate, tiny_model, repo, flags
):
    """A gated model is the first error of most users. Models and adapters are treated alike."""
    if repo == ADAPTER_REPO:
        hub.repos[repo] = tiny_model
        flags = ["--model", tiny_model, "--adapter"]
    name = [repo[1]] if repo == ADAPTER_REPO else []
    hub.gated.add(repo)
    page = f"Open https://huggingface.co/{repo[1]}, accept the license, run `hf auth login`"
    gated = f"{repo[1]} is gated. {page}, and run this command again"
    assert_fails_in_one_line(evaluate(*flags, *name), gated)
    hub.gated.clear()
    absent = ["nobody/nothing"] if name else ["--model", "nobody/nothing"]
    words = ["nobody/nothing is neither a local folder nor", "Check the spelling", "hf auth login"]
    assert_fails_in_one_line(evaluate(*flags, *absent), *words)
    words = [f"{repo[1]} is neither a local folder", "HF_HUB_OFFLINE is set", "HF_HUB_OFFLINE=0"]
    assert_fails_in_one_line(evaluate(*flags, *name, offline=True), *words)
    if not name:
        process = evaluate(*flags, "--revision", "v9")
        assert_fails_in_one_line(process, f"{repo[1]} has no revision v9")
    hub.url = "http://127.0.0.1:9"  # where no server listens
    words = [f"{repo[1]} is neither a local folder", "cannot be reached", "network connection"]
    assert_fails_in_one_line(evaluate(*flags, *name, cache="empty"), *words)
    assert not list(run.work.iterdir())


def test_a_typo_in_the_path_of_an_adapter_prints_one_line(evaluate, run, tiny_model):
    for typo in ("LoRA_typo", "runs/a/LoRA_typo", "./LoRA_typo"):
        process = evaluate("--model", tiny_model, "--adapter", typo)
        assert_fails_in_one_line(process, f"{typo} is neither a local folder nor")
    assert not list(run.work.iterdir())
