"""Ask a server as a program does, through OpenAI's client with `tools=`, and count parsed calls.

    pip install openai
    python tests/benchmarks/ask_with_tools.py --server http://127.0.0.1:8000/v1 --server-model fc
    python evaluation.py --model MODEL --predictions with_tools.jsonl

It asks the queries of evaluation.py. That script sends their prompts as they stand in the split;
here the tools go into `tools`, the calls of earlier turns into `tool_calls`, and the server's chat
template and tool parser do the rest. The second command scores the answers.
"""

import argparse
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import evaluation


def to_openai(messages, wording):
    """The turns of a split as OpenAI's messages, without what step 1 wrote around the tools."""
    after_tools = wording["after_tools"] + wording["before_request"]
    written = []
    for message in messages:
        role, text = message["role"], message["content"]
        calls = evaluation.parse_calls(text) if role == "assistant" else None
        if role == "tool":
            results = re.findall("<tool_response>\n(.*?)\n</tool_response>", text, re.DOTALL)
            for number, result in enumerate(results):
                written.append({"role": role, "content": result, "tool_call_id": str(number)})
        elif calls:
            text = text.partition("<tool_call>")[0].rstrip() or None
            tool_calls = [to_tool_call(number, call) for number, call in enumerate(calls)]
            written.append({"role": role, "content": text, "tool_calls": tool_calls})
        else:
            if role == "user" and text.startswith(wording["before_tools"]):
                text = text.partition(after_tools)[2]
            written.append({"role": role, "content": text})
    return written


def to_tool_call(number, call):
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    function = {"name": call["name"], "arguments": arguments}
    return {"id": str(number), "type": "function", "function": function}


def ask_all(queries, wording, args):
    """Lines of --predictions, with the answers of the server."""
    from openai import OpenAI

    client = OpenAI(base_url=args.server, api_key="EMPTY", timeout=evaluation.REQUEST_TIMEOUT)
    options = {"model": args.server_model, "max_tokens": args.max_new_tokens, "temperature": 0}

    def ask(query):
        messages, tools = to_openai(query["prompt"], wording), json.loads(query["tools"])
        given = {"tools": tools} if tools else {}
        choice = client.chat.completions.create(messages=messages, **given, **options).choices[0]
        answer = choice.message.model_dump(include={"content", "tool_calls"})
        return {
            "conversation_id": query["conversation_id"],
            "turn": query["turn"],
            "output": answer["content"] or "",
            "tool_calls": answer.get("tool_calls"),
            "finish_reason": choice.finish_reason,
        }

    with ThreadPoolExecutor(args.concurrency) as pool:
        return list(pool.map(ask, queries))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add, shown = parser.add_argument, "(default: %(default)s)"
    split = Path("processed_data/function_calling_test.jsonl")
    add("--server", required=True, metavar="URL", help="http://host:port/v1")
    add("--server-model", required=True, metavar="NAME", help="the name of the served model")
    add("--test-file", type=Path, default=split, help=f"test split of step 1 {shown}")
    add("--output", type=Path, default="with_tools.jsonl", help=f"for the answers {shown}")
    add("--max-new-tokens", type=int, default=256, help=f"longest output, tokens {shown}")
    add("--concurrency", type=int, default=8, help=f"requests at once {shown}")
    args = parser.parse_args(argv)
    info = json.loads(args.test_file.with_name("dataset_info.json").read_text(encoding="utf-8"))
    queries = evaluation.read_queries(args.test_file)
    answers = ask_all(queries, info["prompt"], args)
    args.output.write_text("".join(f"{json.dumps(a)}\n" for a in answers), encoding="utf-8")
    pairs = zip(queries, answers, strict=True)
    calls = [answer["tool_calls"] for q, answer in pairs if "<tool_call>" in q["reference"]]
    print(f"{sum(map(bool, calls))} of {len(calls)} queries that need a call came back parsed")


if __name__ == "__main__":
    main()
