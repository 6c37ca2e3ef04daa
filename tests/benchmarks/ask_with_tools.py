"""Ask a server as a program does, through OpenAI's client with `tools=`, and count parsed calls.

    pip install openai
    python tests/benchmarks/ask_with_tools.py --server http://127.0.0.1:8000/v1 --server-model fc
    python evaluation.py --model MODEL --predictions with_tools.jsonl

It asks the queries of evaluation.py. That script sends their prompts as they stand in the split;
here the tools, in OpenAI's form, go into `tools`, the calls of earlier turns into `tool_calls`, as
JSON, and the server's chat template and tool parser do the rest. Prompts that show tools in words
of their own are sent as they are. The last command scores the answers.
"""

import argparse
import itertools
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
        system, _, rest = text.partition(wording["before_tools"])
        request = rest.partition(after_tools)[2]
        if role == "tool":
            results = re.findall("<tool_response>\n(.*?)\n</tool_response>", text, re.DOTALL)
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
        declared = {"tools": tools} if tools else {}
        reply = client.chat.completions.create(messages=messages, **declared, **options)
        choice = reply.choices[0]
        return {
            "conversation_id": query["conversation_id"],
            "turn": query["turn"],
            "finish_reason": choice.finish_reason,
            **choice.message.model_dump(include={"content", "tool_calls"}),
        }

    with ThreadPoolExecutor(args.concurrency) as pool:
        return list(pool.map(ask, queries))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add, shown = parser.add_argument, "(default: %(default)s)"
    split = Path("processed_data/function_calling_test.jsonl")
    add("--server", required=True, metavar="URL", help="http://host:port/v1")
    add("--server-model", required=True, metavar="NAME", help="the name of the served model")
    add("--test-file", type=Path, default=split, help=f"test split of step 1 {shown}")
    add("--output", type=Path, default="with_tools.jsonl", help=f"for the answers {shown}")
    add("--max-new-tokens", type=int, default=256, help=f"longest output, tokens {shown}")
    add("--concurrency", type=int, default=8, help=f"requests at once {shown}")
    args = parser.parse_args()
    info = json.loads(args.test_file.with_name("dataset_info.json").read_text(encoding="utf-8"))
    queries = evaluation.read_queries(args.test_file)
    answers = ask_all(queries, info["prompt"], args)
    args.output.write_text("".join(f"{json.dumps(a)}\n" for a in answers), encoding="utf-8")
    calling = ["<tool_call>" in query["reference"] for query in queries]
    parsed = [bool(answer.get("tool_calls")) for answer in itertools.compress(answers, calling)]
    print(f"{sum(parsed)} of {len(parsed)} queries that need a call came back parsed")


if __name__ == "__main__":
    main()
