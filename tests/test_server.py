"""Step 3 with --server: what is asked, read, retried, named and resumed."""

import contextlib
import json

import pytest
from conftest import make_tool, write_rows
from servers import ChatServer, completion

import evaluation

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture
def ask(tmp_path, tiny_model, monkeypatch):
    """Ask a server, with short waits, about six conversations of a call and an answer each.

    Returns predictions and metrics. With `error`, the evaluation must end in one that matches.
    """
    monkeypatch.setattr(evaluation, "RETRY_WAITS", (0.01, 0.02, 0.04))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    tools, rows = json.dumps([make_tool("get_weather", "city")]), []
    for number in range(6):
        messages = [
            {"role": "user", "content": f"Weather? <end_of_turn> {number}"},
            {"role": "assistant", "content": CALL},
            {"role": "tool", "content": "<tool_response>\n7\n</tool_response>"},
            {"role": "assistant", "content": "It is 7 degrees."},
        ]
        rows.append({"id": str(number), "messages": messages, "tools": tools})
    write_rows(tmp_path / "test.jsonl", rows)

    def ask(url, *flags, error=None):
        common = [
            "--model",
            str(tiny_model),
            "--test-file",
            "test.jsonl",
            "--output-dir",
            "results",
        ]
        with pytest.raises(SystemExit, match=error) if error else contextlib.nullcontext():
            evaluation.main([*common, "--server", f"{url}/v1", "--server-model", "fc", *flags])
        label = "base" if "--baseline" in flags else "fc"
        folder = tmp_path / "results" / tiny_model.name / label
        lines = (folder / "predictions.jsonl").read_text().splitlines()
        return list(map(json.loads, lines)), json.loads((folder / "metrics.json").read_text())

    return ask


def echo(asked, times):
    """A perfect model: a call to a question, an answer to a result."""
    return completion("It is 7 degrees." if len(asked["messages"]) == 3 else CALL)


def roles_in(requests):
    return {tuple(message["role"] for message in asked["messages"]) for asked in requests}


def test_the_tuned_model_gets_the_messages_as_they_are_and_the_base_a_user_turn(ask):
    """Catches a tool turn that a stock template refuses, a forged turn, a key sent astray."""
    server = ChatServer(echo, delay=0.02)
    predictions, metrics = ask(server.url, "--concurrency", "3")
    assert server.most_at_once == 3
    assert len(predictions) == 12 and metrics["scores"]["turn_right"]["value"] == 1
    assert roles_in(server.requests) == {("user",), ("user", "assistant", "tool")}
    first = server.requests[0]
    assert (first["model"], first["max_tokens"], first["temperature"]) == ("fc", 256, 0)
    assert "<end_of_turn>" in first["messages"][0]["content"]
    assert server.keys == {"Bearer EMPTY"}
    server.requests.clear()
    assert ask(server.url, "--baseline")[1]["queries"] == 12
    assert roles_in(server.requests) == {("user",), ("user", "assistant", "user")}
    assert "<end_of_turn >" in server.requests[0]["messages"][0]["content"]


def test_tool_calls_beside_no_content_are_read_as_the_text_of_a_call(ask):
    """vLLM's and llama.cpp's parsers take calls out of the text; arguments are text or object."""

    def parsed(asked, times):
        if len(asked["messages"]) == 3:
            return completion("It is 7 degrees.")
        request, arguments = asked["messages"][0]["content"], '{"city": "Oslo"}'
        function = {"name": "get_weather", "arguments": arguments}
        if "0" in request:
            function["arguments"] = json.loads(arguments)
        calls = [{"id": "1", "type": "function", "function": function}]
        return completion("" if "1" in request else None, "tool_calls", calls)

    predictions, metrics = ask(ChatServer(parsed).url)
    assert {p["output"] for p in predictions if p["turn"] == 1} == {CALL}
    assert metrics["scores"]["turn_right"]["value"] == metrics["scores"]["valid_call"]["value"] == 1
    assert metrics["finish_reasons"] == {"end_of_turn": 12}


def test_passing_failures_are_asked_again_after_growing_waits(ask, monkeypatch):
    """Catches a query lost to a busy server, and one asked again without a pause."""
    waits, sleep = [], evaluation.asyncio.sleep

    async def note(seconds):
        waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr(evaluation.asyncio, "sleep", note)
    monkeypatch.setattr(evaluation.random, "uniform", lambda low, high: 1)
    failing = [429, 500, None]
    server = ChatServer(lambda asked, times: failing[times] if times < 3 else echo(asked, times))
    _, metrics = ask(server.url)
    assert len(server.requests) == 12 * 4 and metrics["scores"]["turn_right"]["value"] == 1
    assert sorted(waits) == [0.01] * 12 + [0.02] * 12 + [0.04] * 12


def test_a_server_that_stalls_or_is_not_there_is_given_up_on(ask, monkeypatch):
    ask("http://127.0.0.1:9", error="12 queries failed .*ConnectError")
    monkeypatch.setattr(evaluation, "REQUEST_TIMEOUT", 0.3)
    server = ChatServer(echo, delay=1)
    ask(server.url, "--overwrite", error="12 queries failed.*TimeoutError")


def test_a_failed_query_is_counted_named_and_asked_again(ask):
    """A refusal is not repeated; --resume asks what failed, and only that."""
    broken = True

    def answer(asked, times):
        is_failing = broken and "3" in asked["messages"][0]["content"]
        return (400 if len(asked["messages"]) == 1 else 500) if is_failing else echo(asked, times)

    server = ChatServer(answer)
    _, metrics = ask(server.url, error=r"error: 2 queries failed .*\('3', 1\).*400")
    assert len(server.requests) == 10 + 1 + 4
    assert metrics["queries"] == 12 and metrics["failures"] == {"failed": 2}
    assert metrics["scores"]["turn_right"]["value"] == metrics["scores"]["recall"]["value"] == 5 / 6
    assert metrics["scores"]["helpful_exchange"]["value"] == 5 / 6
    ask(server.url, error="--resume goes on with it")
    broken = False
    server.requests.clear()
    _, metrics = ask(server.url, "--resume")
    assert len(server.requests) == 2
    assert metrics["scores"]["turn_right"]["value"] == 1 and metrics["failures"] == {}


def test_an_answer_that_is_none_is_a_failure_and_no_exception(ask):
    strange = [{}, {"choices": []}, {"choices": [{"message": {"content": 3}}]}, [1]]
    strange += [completion("x", "content_filter"), completion("\ud800 x")]
    number = {str(n): answer for n, answer in enumerate(strange)}
    server = ChatServer(lambda asked, times: number[asked["messages"][0]["content"][-1]])
    predictions, _ = ask(server.url, error="8 queries failed")
    answers = {(p["output"], p["finish_reason"]) for p in predictions}
    assert answers == {("", "failed"), ("x", "content_filter"), ("? x", "end_of_turn")}
