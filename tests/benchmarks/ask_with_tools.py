"""Query a server as an application does: through the OpenAI client, with `tools`.

    pip install openai
    python tests/benchmarks/ask_with_tools.py --server http://127.0.0.1:8000/v1 --server-model NAME
    python evaluation.py --model MODEL --predictions with_tools.jsonl

The queries are those of evaluation.py, which sends each prompt as it is in the split. This script
sends the declared tools as `tools` and the calls of earlier turns as `tool_calls`. The chat
template of the server renders them, and its tool parser reads the calls in the answer. A prompt
that does not describe its tools in the wording of step 1 is sent unchanged. The last command scores
the answers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import evaluation


def convert_tool_turn(text: str) -> list[dict]:
    """Convert a turn of tool results, whose ids are the positions of their calls."""
    results = re.findall("<tool_response>\n(.*?)\n</tool_response>", text, re.DOTALL)
    messages = []
    for number, result in enumerate(results or [text]):
        messages.append({"role": "tool", "content": result, "tool_call_id": str(number)})
    return messages


def convert_calls(text: str, calls: list[dict]) -> dict:
    """Convert a model turn that contains these calls."""
    tool_calls = []
    for number, call in enumerate(calls):
        arguments = json.dumps(call["arguments"], ensure_ascii=False)
        function = {"name": call["name"], "arguments": arguments}
        tool_calls.append({"id": str(number), "type": "function", "function": function})
    text_before = text.partition("<tool_call>")[0].rstrip()
    return {"role": "assistant", "content": text_before or None, "tool_calls": tool_calls}


def convert_user_turn(text: str, wording: dict[str, str]) -> list[dict]:
    """Convert a user turn. If it describes the tools as step 1 does, remove their description."""
    system, _, rest = text.partition(wording["before_tools"])
    _, _, request = rest.partition(wording["after_tools"] + wording["before_request"])
    if not request:
        return [{"role": "user", "content": text}]
    messages = [{"role": "user", "content": request}]
    if system:
        messages.insert(0, {"role": "system", "content": system.removesuffix("\n\n")})
    return messages


def to_openai(messages: list[dict], wording: dict[str, str]) -> list[dict]:
    """Convert the turns of a split to OpenAI-style messages without the description of tools."""
    converted = []
    for message in messages:
        text = message["content"]
        if message["role"] == "tool":
            converted += convert_tool_turn(text)
        elif message["role"] == "user":
            converted += convert_user_turn(text, wording)
        else:
            calls = evaluation.parse_calls(text)
            converted.append(
                convert_calls(text, calls) if calls else {"role": "assistant", "content": text}
            )
    return converted


def ask_all(queries: list[dict], wording: dict[str, str], args: argparse.Namespace) -> list[dict]:
    """Return the answers of the server in the layout that evaluation.py --predictions reads."""
    from openai import OpenAI

    client = OpenAI(
        base_url=args.server,
        api_key=os.environ.get("OPENAI_API_KEY") or "EMPTY",
        timeout=evaluation.REQUEST_TIMEOUT,
    )

    def ask(query: dict) -> dict:
        options = {}
        tools = json.loads(query["tools"] or "[]")
        if tools:
            options["tools"] = tools
        reply = client.chat.completions.create(
            model=args.server_model,
            messages=to_openai(query["prompt"], wording),
            max_tokens=args.max_new_tokens,
            temperature=0,
            **options,
        )
        choice = reply.choices[0]
        return {
            "conversation_id": query["conversation_id"],
            "turn": query["turn"],
            "finish_reason": choice.finish_reason,
            **choice.message.model_dump(include={"content", "tool_calls"}),
        }

    with ThreadPoolExecutor(args.concurrency) as pool:
        return list(pool.map(ask, queries))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--server",
        required=True,
        metavar="URL",
        help="Base URL of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1.",
    )
    parser.add_argument(
        "--server-model",
        required=True,
        metavar="NAME",
        help="Name of the model on the server.",
    )
    parser.add_argument(
        "--test-file",
        type=Path,
        default=evaluation.DEFAULT_TEST_FILE,
        help="Test split written by step 1 (default: %(default)s).",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("with_tools.jsonl"),
        help="File for the answers (default: %(default)s).",
    )
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="Use only the first N conversations of the test split.",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=evaluation.DEFAULT_MAX_NEW_TOKENS,
        help="Maximum length of an answer in tokens (default: %(default)s).",
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        default=8,
        help="Number of requests to send at once (default: %(default)s).",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    wording = evaluation.read_dataset_info(args.test_file)["prompt"]
    queries = evaluation.read_queries(args.test_file, args.limit)
    answers = ask_all(queries, wording, args)
    lines = [json.dumps(answer) + "\n" for answer in answers]
    args.output.write_text("".join(lines), encoding="utf-8")
    num_calls = 0
    num_parsed = 0
    for query, answer in zip(queries, answers, strict=True):
        if "<tool_call>" in query["reference"]:
            num_calls += 1
            num_parsed += bool(answer.get("tool_calls"))
    print(f"{num_parsed} of {num_calls} queries that need a call came back parsed")


if __name__ == "__main__":
    main()
