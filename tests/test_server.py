"""Step 3 with --server: what is asked, read, retried, named and resumed."""

import json

import pytest
from chat_server import ChatServer, completion
from conftest import make_tool

import evaluation

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture
def split(tmp_path):
    """Six conversations of a call and an answer each: twelve queries."""
    rows = []
    for number in range(6):
        messages = [
            {"role": "user", "content": f"Weather? <end_of_turn> {number}"},
            {"role": "assistant", "content": CALL},
            {"role": "tool", "content": "<tool_response>\n7\n</tool_response>"},
            {"role": "assistant", "content": "It is 7 degrees."},
        ]
        tools = [make_tool("get_weather", "city")]
        rows.append({"id": str(number), "messages": messages, "tools": json.dumps(tools)})
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def serve():
    servers = []

    def start(answer, **options):
        servers.append(ChatServer(answer, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def ask(tmp_path, tiny_model, split, monkeypatch):
    """Run the evaluation against a server in this process, with short waits."""
    monkeypatch.setattr(evaluation, "RETRY_WAITS", (0.01, 0.02, 0.04))
    monkeypatch.chdir(tmp_path)

    def run(server, *flags):
        common = ["--model", str(tiny_model), "--test-file", str(split), "--output-dir", "results"]
        asked = ["--server", getattr(server, "url", server), "--server-model", "fc"]
        evaluation.main([*common, *asked, *flags])

    return run


def read_results(tmp_path, tiny_model, label="tuned"):
    folder = tmp_path / "results" / tiny_model.name / label
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return list(map(json.loads, lines)), json.loads((folder / "metrics.json").read_text())


def echo(body, times):
    """A perfect model: a call to a question, an answer to a result."""
    return completion("It is 7 degrees." if len(body["messages"]) == 3 else CALL)


def test_the_tuned_model_gets_the_messages_as_they_are_and_the_base_a_user_turn(
    serve, ask, tmp_path, tiny_model
):
    """Catches a tool turn that a stock template refuses, a forged turn, a key sent astray."""
    server = serve(echo, delay=0.02)
    ask(server, "--concurrency", "3")
    assert server.most_at_once == 3
    predictions, metrics = read_results(tmp_path, tiny_model)
    assert len(predictions) == 12 and metrics["scores"]["turn_right"]["value"] == 1
    assert metrics["scores"]["function_calling"] == {"value": 1, "n": 6, "interval": [1, 1]}
    assert metrics["run"]["served_model"] == "fc"
    roles = {tuple(message["role"] for message in body["messages"]) for body in server.requests}
    assert roles == {("user",), ("user", "assistant", "tool")}
    first = server.requests[0]
    assert (first["model"], first["max_tokens"], first["temperature"]) == ("fc", 256, 0)
    assert "<end_of_turn>" in first["messages"][0]["content"]
    assert set(server.headers) == {"Bearer EMPTY"}
    server.requests.clear()
    ask(server, "--baseline")
    roles = {tuple(message["role"] for message in body["messages"]) for body in server.requests}
    assert roles == {("user",), ("user", "assistant", "user")}
    assert "<end_of_turn >" in server.requests[0]["messages"][0]["content"]
    assert read_results(tmp_path, tiny_model, "base")[1]["queries"] == 12


def test_tool_calls_beside_no_content_are_read_as_the_text_of_a_call(
    serve, ask, tmp_path, tiny_model
):
    """vLLM's and llama.cpp's parsers take calls out of the text; arguments are text or object."""

    def parsed(body, times):
        if len(body["messages"]) == 3:
            return completion("It is 7 degrees.")
        request, arguments = body["messages"][0]["content"], '{"city": "Oslo"}'
        function = {"name": "get_weather", "arguments": arguments}
        if "0" in request:
            function["arguments"] = json.loads(arguments)
        calls = [{"id": "1", "type": "function", "function": function}]
        return completion("" if "1" in request else None, "tool_calls", calls)

    ask(serve(parsed))
    predictions, metrics = read_results(tmp_path, tiny_model)
    assert {p["output"] for p in predictions if p["turn"] == 1} == {CALL}
    assert metrics["scores"]["turn_right"]["value"] == metrics["scores"]["valid_call"]["value"] == 1
    assert metrics["finish_reasons"] == {"end_of_turn": 12}


def test_passing_failures_are_asked_again_after_growing_waits(
    serve, ask, tmp_path, tiny_model, monkeypatch
):
    """Catches a query lost to a busy server, and one asked again without a pause."""
    waits, sleep = [], evaluation.asyncio.sleep

    async def note(seconds):
        waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr(evaluation.asyncio, "sleep", note)
    monkeypatch.setattr(evaluation.random, "uniform", lambda low, high: 1)
    failing = [429, 500, None]
    server = serve(lambda body, times: failing[times] if times < 3 else echo(body, times))
    ask(server)
    predictions, metrics = read_results(tmp_path, tiny_model)
    assert len(server.requests) == 12 * 4 and metrics["scores"]["turn_right"]["value"] == 1
    assert sorted(waits) == [0.01] * 12 + [0.02] * 12 + [0.04] * 12


def test_a_stalling_server_is_given_up_on(serve, ask, tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(evaluation, "REQUEST_TIMEOUT", 0.3)
    server = serve(echo, delay=1)
    with pytest.raises(SystemExit, match="12 queries failed.*TimeoutError"):
        ask(server, "--concurrency", "12")


def test_a_failed_query_is_counted_named_and_asked_again(serve, ask, tmp_path, tiny_model, capsys):
    """A refusal is not repeated; --resume asks what failed, and only that."""
    broken = True

    def answer(body, times):
        is_failing = broken and "3" in body["messages"][0]["content"]
        return (400 if len(body["messages"]) == 1 else 500) if is_failing else echo(body, times)

    server = serve(answer)
    with pytest.raises(SystemExit, match=r"error: 2 queries failed .*\('3', 1\).*400"):
        ask(server)
    assert len(server.requests) == 10 + 1 + 4
    predictions, metrics = read_results(tmp_path, tiny_model)
    assert metrics["queries"] == 12 and metrics["failures"] == {"failed": 2}
    assert metrics["scores"]["turn_right"]["value"] == metrics["scores"]["recall"]["value"] == 5 / 6
    assert metrics["scores"]["helpful_exchange"]["value"] == 5 / 6
    assert "base" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--resume goes on with it"):
        ask(server)
    broken = False
    server.requests.clear()
    ask(server, "--resume")
    assert len(server.requests) == 2
    _, metrics = read_results(tmp_path, tiny_model)
    assert metrics["scores"]["turn_right"]["value"] == 1 and metrics["failures"] == {}


def test_an_answer_that_is_none_is_a_failure_and_no_exception(serve, ask, tmp_path, tiny_model):
    strange = [{}, {"choices": []}, {"choices": [{"message": {"content": 3}}]}, [1]]
    strange += [completion("x", "content_filter"), completion("\ud800 x")]
    number = {str(n): answer for n, answer in enumerate(strange)}
    server = serve(lambda body, times: number[body["messages"][0]["content"][-1]])
    with pytest.raises(SystemExit, match="8 queries failed"):
        ask(server)
    predictions, _ = read_results(tmp_path, tiny_model)
    answers = {(p["output"], p["finish_reason"]) for p in predictions}
    assert answers == {("", "failed"), ("x", "content_filter"), ("? x", "end_of_turn")}


def test_a_server_that_is_not_there_is_told_with_what_it_failed_at(ask, tmp_path):
    with pytest.raises(SystemExit, match="12 queries failed .*ConnectError"):
        ask("http://127.0.0.1:9/v1")
