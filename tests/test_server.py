"""Tests of step 3 with --server: requests, answers, retries, errors and resuming."""

import asyncio
import contextlib
import itertools
import json
from types import SimpleNamespace

import pytest
from conftest import make_tool, write_rows
from servers import ChatServer, completion

import evaluation

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture
def ask(tmp_path, tiny_model, monkeypatch):
    """Evaluate a server on six conversations of a call and an answer each, with short waits.

    Returns predictions and metrics. With `error`, the evaluation must end with a matching error.
    """
    monkeypatch.setattr(evaluation, "RETRY_WAITS", (0.01, 0.02, 0.04))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    tools = json.dumps([make_tool("get_weather", "city")])
    rows = []
    for number in range(6):
        messages = [
            {"role": "user", "content": f"Weather? <end_of_turn> {number}"},
            {"role": "assistant", "content": CALL},
            {"role": "tool", "content": "<tool_response>\n7\n</tool_response>"},
            {"role": "assistant", "content": "It is 7 degrees."},
        ]
        rows.append({"id": str(number), "messages": messages, "tools": tools})
    write_rows(tmp_path / "test.jsonl", rows)

    def ask(url, *flags, error=None, path="/v1"):
        command = ["--model", str(tiny_model), "--test-file", "test.jsonl"]
        command += ["--output-dir", "results", "--server", url + path, "--server-model", "fc"]
        with pytest.raises(SystemExit, match=error) if error else contextlib.nullcontext():
            evaluation.main([*command, *flags])
        label = "baseline" if "--baseline" in flags else "server-fc"
        folder = tmp_path / "results" / tiny_model.name / label
        if not folder.exists():
            assert not (tmp_path / "results").exists()  # not even an empty folder
            return None, None
        lines = (folder / "predictions.jsonl").read_text().splitlines()
        return list(map(json.loads, lines)), json.loads((folder / "metrics.json").read_text())

    return ask


def echo(asked, times):
    """Answer like a perfect model: a question with a call, and a result with an answer."""
    return completion("It is 7 degrees." if len(asked["messages"]) == 3 else CALL)


def roles_in(requests):
    return {tuple(message["role"] for message in asked["messages"]) for asked in requests}


def test_a_fine_tuned_model_gets_unchanged_messages_and_the_baseline_user_turns(ask):
    """Gemma's own template refuses tool turns, and user text must not forge a turn."""
    server = ChatServer(echo, delay=0.2)
    predictions, metrics = ask(server.url, "--concurrency", "3")
    assert server.most_at_once == 3
    assert len(predictions) == 12 and metrics["scores"]["turn_right"]["value"] == 1
    assert roles_in(server.requests) == {("user",), ("user", "assistant", "tool")}
    first = server.requests[0]
    assert (first["model"], first["max_tokens"], first["temperature"]) == ("fc", 256, 0)
    assert "<end_of_turn>" in first["messages"][0]["content"]
    server.requests.clear()
    assert ask(server.url, "--baseline")[1]["queries"] == 12
    assert roles_in(server.requests) == {("user",), ("user", "assistant", "user")}
    assert "<end_of_turn >" in server.requests[0]["messages"][0]["content"]


def test_tool_calls_without_content_are_read_as_calls_in_text(ask):
    """vLLM and llama.cpp move calls from the text to `tool_calls`."""

    def parsed(asked, times):
        if len(asked["messages"]) == 3:
            return completion("It is 7 degrees.")
        request = asked["messages"][0]["content"]
        arguments = '{"city": "Oslo"}'
        function = {"name": "get_weather", "arguments": arguments}
        if "0" in request:
            function["arguments"] = json.loads(arguments)
        calls = [{"id": "1", "type": "function", "function": function}]
        return completion("" if "1" in request else None, "tool_calls", calls)

    predictions, metrics = ask(ChatServer(parsed).url)
    assert {p["output"] for p in predictions if p["turn"] == 1} == {CALL}
    assert metrics["scores"]["turn_right"]["value"] == metrics["scores"]["valid_call"]["value"] == 1
    assert metrics["finish_reasons"] == {"end_of_turn": 12}


def test_temporary_failures_are_retried_after_increasing_waits(ask, monkeypatch):
    """A busy server costs no query, and is not asked again without a pause."""
    waits = []
    sleep = evaluation.asyncio.sleep

    async def record_wait(seconds):
        waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr(evaluation.asyncio, "sleep", record_wait)
    monkeypatch.setattr(evaluation.random, "uniform", lambda low, high: 1)
    failing = [429, 500, None]
    server = ChatServer(lambda asked, times: failing[times] if times < 3 else echo(asked, times))
    _, metrics = ask(server.url)
    assert len(server.requests) == 12 * 4 and metrics["scores"]["turn_right"]["value"] == 1
    assert sorted(waits) == [0.01] * 12 + [0.02] * 12 + [0.04] * 12


def test_nothing_is_stored_if_the_server_stalls_or_is_absent(ask, monkeypatch):
    """The failures must not be stored as scores of zero or replace earlier answers."""
    absent = "http://127.0.0.1:9"
    monkeypatch.setattr(evaluation, "RETRY_WAITS", [600])  # an absent server is not asked again
    ask(absent, error=f"^error: no connection to {absent}/v1.*Start the server, or check --server")
    monkeypatch.setattr(evaluation, "REQUEST_TIMEOUT", 0.3)
    stalling = ChatServer(echo, delay=1)
    ask(stalling.url, error="none of the 12 queries was answered.*no answer within 0.3 seconds")
    monkeypatch.setattr(evaluation, "REQUEST_TIMEOUT", 30)
    predictions, metrics = ask(ChatServer(echo).url)
    ask("http://127.0.0.1:9", error="already contains predictions")
    for url, path, words in (
        (absent, "/v1", "no connection"),
        (ChatServer(lambda *_: 404).url, "/typo", "none of the 12 queries .* nothing was saved"),
    ):
        assert ask(url, "--overwrite", error=words, path=path) == (predictions, metrics)


def test_progress_outside_a_terminal_is_one_line_a_minute(ask, monkeypatch, capsys):
    clock = SimpleNamespace(monotonic=itertools.count(step=25).__next__)  # each answer takes 25 s
    monkeypatch.setattr(evaluation, "time", clock)
    ask(ChatServer(echo).url)
    lines = [line for line in capsys.readouterr().out.splitlines() if "Answered" in line]
    assert lines == [f"Answered    {number} of 12 queries" for number in (3, 6, 9, 12)]


def test_connection_errors_are_retried(ask, monkeypatch):
    """A server refuses connections for a while when it restarts."""
    import httpx2

    post = httpx2.AsyncClient.post
    refused = []

    async def refuse_once(client, url, json):
        if json not in refused:
            refused.append(json)
            raise httpx2.ConnectError("All connection attempts failed")
        return await post(client, url, json=json)

    monkeypatch.setattr(httpx2.AsyncClient, "post", refuse_once)
    _, metrics = ask(ChatServer(echo).url)
    assert len(refused) == 12 and metrics["scores"]["turn_right"]["value"] == 1


def test_the_evaluation_stops_after_several_failures_in_a_row(ask, monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_FAILURES_IN_A_ROW", 4)
    server = ChatServer(lambda asked, times: 400)
    ask(server.url, "--concurrency", "1", error="400")
    assert len(server.requests) < 8


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/chat/completions"])
def test_requests_go_to_the_same_path_for_a_base_url_and_a_full_url(ask, path):
    server = ChatServer(echo)
    ask(server.url, path=path)
    assert server.paths == {"/v1/chat/completions"}


@pytest.mark.parametrize("key", [None, "", "sk-mine"])
def test_no_hugging_face_token_is_sent_to_a_server(ask, tmp_path, monkeypatch, key):
    """Tokens in the environment and in the token files of the Hub are ignored."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text("hf_secret_file")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_secret_old")
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    said = f"Incorrect API key {key}"
    server = ChatServer(lambda asked, times: echo(asked, 0) if key != "sk-mine" else (401, said))
    ask(server.url, error=r"Incorrect API key \[key\]" if key == "sk-mine" else None)
    assert server.keys == {f"Bearer {key or 'EMPTY'}"}
    assert not any("hf_secret" in text for text in server.headers)
    files = [path for path in (tmp_path / "results").rglob("*") if path.is_file()]
    assert not any(b"sk-mine" in path.read_bytes() for path in files)


def test_a_failed_query_is_counted_named_and_retried_on_resume(ask):
    """A request with status 400 is not repeated. --resume sends only the failed queries."""
    broken = True

    def answer(asked, times):
        is_failing = broken and "3" in asked["messages"][0]["content"]
        return (400 if len(asked["messages"]) == 1 else 500) if is_failing else echo(asked, times)

    server = ChatServer(answer)
    _, metrics = ask(server.url, error=r"error: 2 queries failed .*conversation 3, turn [13]: HTTP")
    assert len(server.requests) == 10 + 1 + 4
    assert metrics["queries"] == 12 and metrics["failures"] == {"failed": 2}
    assert metrics["scores"]["turn_right"]["value"] == metrics["scores"]["recall"]["value"] == 5 / 6
    assert metrics["scores"]["helpful_exchange"]["value"] == 5 / 6
    ask(server.url, error="Use --resume to finish the run")
    broken = False
    server.requests.clear()
    _, metrics = ask(server.url, "--resume")
    assert len(server.requests) == 2
    assert metrics["scores"]["turn_right"]["value"] == 1 and metrics["failures"] == {}


def test_a_query_that_one_run_failed_to_answer_is_not_compared(ask):
    """Otherwise an overloaded server would look like a bad model."""

    def refuse(number):
        def answer(asked, times):
            return 400 if number in str(asked["messages"]) else echo(asked, times)

        return ChatServer(answer).url

    ask(refuse("3"), "--baseline", error="2 queries failed")
    _, metrics = ask(ChatServer(echo).url)
    assert metrics["comparison"]["queries"] == 10 and metrics["queries"] == 12
    assert metrics["difference"]["turn_right"] == {"value": 0, "n": 5, "interval": [0, 0]}
    _, metrics = ask(refuse("4"), "--overwrite", error="2 queries failed")
    assert metrics["comparison"]["queries"] == 8
    assert metrics["scores"]["turn_right"]["value"] == 5 / 6  # on its own, a failure is wrong


def test_resuming_asks_new_queries_before_those_that_failed(ask, monkeypatch):
    """Queries that always fail must not prevent the others from being asked."""
    monkeypatch.setattr(evaluation, "MAX_FAILURES_IN_A_ROW", 3)

    def answer(asked, times):
        is_too_long = any(number in asked["messages"][0]["content"] for number in "12")
        return 400 if is_too_long else echo(asked, times)

    server = ChatServer(answer)
    _, metrics = ask(server.url, "--limit", "3", "--concurrency", "1", error="queries failed")
    assert metrics["queries"] < 12
    _, metrics = ask(server.url, "--resume", "--concurrency", "1", error="queries failed")
    assert metrics["queries"] - metrics["failures"]["failed"] == 8


MESSAGES = [  # status and body of an error; the message that is printed
    (400, {"error": {"message": "Too long", "type": "x"}}, "HTTP status 400: Too long"),
    (400, {"object": "error", "message": "Too long", "code": 40303}, "HTTP status 400: Too long"),
    (422, {"error": "Too long", "error_type": "validation"}, "HTTP status 422: Too long"),
    (400, {"error": True, "message": "Too long"}, "HTTP status 400: Too long"),
    (404, {"detail": "Not Found"}, "HTTP status 404: Not Found .*usually ends in /v1"),
    (422, {"detail": [{"loc": ["body"], "msg": "Too long"}]}, "HTTP status 422: Too long"),
    (403, b"<html><h1>Forbidden</h1>\n</html>", "HTTP status 403: Forbidden"),
    (401, b"", "HTTP status 401: Unauthorized"),
    (200, {"error": {"message": "No credits", "code": 402}}, "HTTP status 402: No credits"),
    (200, {"error": "model not loaded"}, "model not loaded"),
    (200, {"choices": [{"error": {"message": "Overloaded", "code": 402}}]}, "402: Overloaded"),
    (200, completion("", "error"), "stopped the answer with finish reason 'error'"),
    (200, b"hello", "not a chat completion: hello"),
    (400, {"error": {"message": "x" * 5000}}, f"HTTP status 400: {'x' * 283}[.]{{3}}$"),
]


@pytest.mark.parametrize("status, body, words", MESSAGES)
def test_the_error_contains_the_message_of_the_server(ask, status, body, words):
    server = ChatServer(lambda asked, times: (status, body))
    ask(server.url, error=f"none of the 12 queries was answered.*{words}")


def test_a_rate_limit_error_with_status_200_is_retried(ask):
    busy = (200, {"error": {"message": "Rate limited", "code": 429}})
    server = ChatServer(lambda asked, times: busy if times == 0 else echo(asked, times))
    _, metrics = ask(server.url)
    assert metrics["scores"]["turn_right"]["value"] == 1 and len(server.requests) == 24


def test_max_completion_tokens_is_used_if_a_server_requires_it(ask):
    said = "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."

    def answer(asked, times):
        return (400, {"error": {"message": said}}) if "max_tokens" in asked else echo(asked, times)

    server = ChatServer(answer)
    _, metrics = ask(server.url, "--concurrency", "2", "--max-new-tokens", "99")
    assert metrics["scores"]["turn_right"]["value"] == 1
    assert len(server.requests) <= 14  # only the first requests are refused
    assert server.requests[-1]["max_completion_tokens"] == 99


FINISH_REASONS = [  # vLLM, SGLang, llama.cpp, Ollama, LM Studio, TGI, Together, OpenRouter, OpenAI
    *[(reason, "end_of_turn") for reason in ("stop", "eos", "eos_token", "stop_sequence")],
    *[(reason, "end_of_turn") for reason in ("tool_calls", "function_call", "end_turn", None)],
    *[(reason, "max_new_tokens") for reason in ("length", "max_tokens", "MAX_TOKENS")],
    ("content_filter", "content_filter"),
]


@pytest.mark.parametrize("given, stored", FINISH_REASONS)
def test_finish_reasons_of_servers_are_converted_to_ours(given, stored):
    assert evaluation.read_answer({"content": "x", "finish_reason": given}) == ("x", stored)


FUNCTION = {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
THINK = "<think>So</think>\n"
FIELDS = [
    ({"content": [{"type": "text", "text": "It "}, {"type": "text", "text": "is."}]}, "It is."),
    ({"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": "x"}]}, "x"),
    ({"content": "", "tool_calls": [{"function": FUNCTION}]}, CALL),
    ({"content": None, "function_call": FUNCTION}, CALL),
    ({"content": "So:", "tool_calls": [{"function": FUNCTION}]}, f"So:\n{CALL}"),
    ({"content": None}, ""),
    ({"content": "x", "reasoning_content": " Look. "}, "<think>Look.</think>\nx"),
    ({"content": None, "reasoning": "So", "tool_calls": [{"function": FUNCTION}]}, THINK + CALL),
    ({"content": CALL, "tool_calls": [{"function": FUNCTION}]}, CALL),
    ({"content": "</tool_call>", "function_call": FUNCTION}, f"</tool_call>\n{CALL}"),
    ({"content": "<think>So</think>\nx", "reasoning": "So"}, f"{THINK}x"),
    ({"output": f"{CALL}\n{CALL}", "content": "So", "tool_calls": [FUNCTION]}, f"{CALL}\n{CALL}"),
    ({"content": None, "tool_calls": json.dumps([{"function": FUNCTION}])}, CALL),
    ({"content": None, "tool_calls": FUNCTION}, CALL),
]


@pytest.mark.parametrize("fields, text", FIELDS)
def test_text_and_calls_are_found_in_the_fields_of_an_answer(fields, text):
    assert evaluation.read_answer(fields)[0] == text


def test_an_unreadable_answer_is_a_failure_and_not_an_exception(ask):
    strange = [{}, {"choices": []}, {"choices": [{"message": {"content": 3}}]}, [1]]
    strange += [completion("x", "content_filter"), completion("\ud800 x")]
    number = {str(n): answer for n, answer in enumerate(strange)}
    server = ChatServer(lambda asked, times: number[asked["messages"][0]["content"][-1]])
    predictions, metrics = ask(server.url, error="8 queries failed")
    answers = {(p["output"], p["finish_reason"]) for p in predictions}
    assert answers == {("", "failed"), ("x", "content_filter"), ("? x", "end_of_turn")}
    assert metrics["failures"] == {"failed": 8, "no_call": 2}


URLS = [
    ("http://h/v1", "http://h/v1/chat/completions"),
    ("http://h/v1/", "http://h/v1/chat/completions"),
    ("http://h/v1/chat/completions", "http://h/v1/chat/completions"),
    ("http://h/v1?key=secret", "http://h/v1/chat/completions?key=secret"),
]


@pytest.mark.parametrize("given, expected", URLS)
def test_a_base_url_and_the_full_url_are_accepted(given, expected):
    assert evaluation.chat_url(given) == expected


def test_an_api_key_is_removed_from_an_error_before_the_error_is_shortened():
    message = "x" * 290 + " sk-verysecretkey " + "x" * 100
    kept = evaluation.shorten_error(message, ["sk-verysecretkey", ""])
    assert len(kept) == evaluation.MAX_MESSAGE_LENGTH + 3 and "sk-" not in kept


@pytest.mark.parametrize("key", ["sk-abc\nsecretdef", "sk-abc\u2026"])
def test_an_api_key_that_is_not_valid_in_a_header_prints_one_line_without_the_key(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    args = evaluation.parse_args(["--server", "http://127.0.0.1:9/v1", "--server-model", "fc"])
    with pytest.raises(SystemExit) as end:
        asyncio.run(evaluation.ask_server([], args, print))
    assert end.value.code.startswith("error: OPENAI_API_KEY") and "sk-" not in end.value.code


def test_a_run_that_is_interrupted_before_the_first_answer_is_not_to_be_resumed(ask, monkeypatch):
    """--resume would report the results that --overwrite was meant to replace."""
    earlier = ask(ChatServer(echo).url)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "ask_server", interrupt)
        words = "^interrupted before the first answer: run the same command again$"
        assert ask("http://127.0.0.1:9", "--overwrite", error=words) == earlier


def test_the_next_command_after_a_named_baseline_shows_its_failures(tmp_path, monkeypatch):
    argv = ["--baseline", "--name", "base2"]
    monkeypatch.setattr(evaluation, "default_adapter", lambda model: tmp_path)
    command = evaluation.next_command(evaluation.parse_args(argv), argv)
    assert command == "python evaluation.py --baseline --name base2 --show-failures 10"
