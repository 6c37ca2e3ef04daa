"""Query a server as an application does, through OpenAI's client with `tools=`.

    pip install openai
    python tests/benchmarks/ask_with_tools.py --server http://127.0.0.1:8000/v1 --server-model fc
    python evaluation.py --model MODEL --predictions with_tools.jsonl

The queries are those of evaluation.py. That script sends their prompts as they are in the split.
This one sends the declared tools in `tools` and the calls of earlier turns in `tool_calls`, and
leaves the rest to the server's chat template and tool parser. Prompts that describe their tools in
other words than step 1 does are sent as they are. The last command scores the answers.
"""

import argparse
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import evaluation


def to_openai(messages: list[dict], wording: dict) -> list[dict]:
    """The turns of a split as OpenAI's messages, without the wording of step 1 and its tools."""
    written = []
    for message in messages:
        role = message["role"]
        text = message["content"]
        calls = evaluation.parse_calls(text) if role == "assistant" else None
        results = re.findall("<tool_response>\n(.*?)\n</tool_response>", text, re.DOTALL)
        system, _, rest = text.partition(wording["before_tools"])
        request = rest.partition(wording["after_tools"] + wording["before_request"])[2]
        if role == "tool":
            for number, result in enumerate(results or [text]):
                written.append({"role": role, "content": result, "tool_call_id": str(number)})
        elif calls:
            text = text.partition("<tool_call>")[0].rstrip() or None
            tool_calls = [to_tool_call(number, call) for number, call in enumerate(calls)]
            written.append({"role": role, "content": text, "tool_calls": tool_calls})
        elif request:
            if system:
                written.append({"role": "system", "content": system.removesuffix("\n\n")})
            written.append({"role": role, "content": request})
        else:
            written.append({"role": role, "content": text})
    return written


def to_tool_call(number: int, call: dict) -> dict:
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    function = {"name": call["name"], "arguments": arguments}
    return {"id": str(number), "type": "function", "function": function}


def ask_all(queries: list[dict], wording: dict, args: argparse.Namespace) -> list[dict]:
    """Return the server's answers as lines for --predictions."""
    from openai import OpenAI

    client = OpenAI(
        base_url=args.server,
        api_key=os.environ.get("OPENAI_API_KEY") or "EMPTY",
        timeout=evaluation.REQUEST_TIMEOUT,
    )

    def ask(query: dict) -> dict:
        tools = json.loads(query["tools"] or "[]")
        reply = client.chat.completions.create(
            model=args.server_model,
            messages=to_openai(query["prompt"], wording),
            max_tokens=args.max_new_tokens,
            temperature=0,
            **({"tools": tools} if tools else {}),
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
        "--server", required=True, metavar="URL", help="Base URL, for example http://host:8000/v1."
    )
    parser.add_argument(
        "--server-model", required=True, metavar="NAME", help="Name of the served model."
    )
    parser.add_argument(
        "--test-file",
        type=Path,
        default=evaluation.DEFAULT_TEST_FILE,
        help="Test split written by step 1. (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("with_tools.jsonl"),
        help="File for the answers. (default: %(default)s)",
    )
    parser.add_argument("--limit", type=int, help="Ask only the first N conversations.")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=evaluation.DEFAULT_MAX_NEW_TOKENS,
        help="Maximum length of an output in tokens. (default: %(default)s)",
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        default=8,
        help="Number of requests to send at once. (default: %(default)s)",
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
