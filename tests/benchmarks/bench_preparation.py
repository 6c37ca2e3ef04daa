"""How fast and how lean preparation is, against the same work in plain library options, one after the other on this machine.

    python tests/benchmarks/bench_preparation.py
    python tests/benchmarks/bench_preparation.py --rows 50000

"ours" is prepare_function_calling_dataset.py, which also checks every row and counts what test and train share. "published" loads
the rows with the datasets library, turns them into messages with map, splits them with the same seed and writes both splits as
JSONL. Rows are made up, in the dataset's layout, about 2,700 characters each. Neither side needs a GPU.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import workload


def write_source(path, num_rows):
    tool = json.dumps([{"type": "function", "function": {"name": "get_weather", "description": "weather " * 60, "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}])
    with open(path, "w", encoding="utf-8") as file:
        for number in range(num_rows):
            turns = [("system", f"You may call these functions: <tools>{tool}</tools>"), ("human", f"The weather in city {number}?")]
            turns += [("gpt", f'<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{number}"}}}}\n</tool_call>'),
                      ("tool", '<tool_response>\n{"degrees": 7}\n</tool_response>'), ("gpt", "It is seven degrees there. " * 10)]
            file.write(json.dumps({"id": str(number), "tools": tool,
                                   "conversations": [{"from": role, "value": value} for role, value in turns]}) + "\n")


def prepare_as_published(source, folder):
    import datasets

    datasets.disable_progress_bars()
    roles = {"human": "user", "gpt": "assistant", "tool": "tool"}

    def convert(row):
        system, *turns = row["conversations"]
        messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
        messages[0]["content"] = system["value"] + "\n\n" + messages[0]["content"]
        return {"messages": messages}

    rows = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=str(folder / "cache"))
    rows = rows.map(convert, remove_columns=["conversations"])
    split = rows.train_test_split(test_size=0.2, seed=42)
    split["train"].to_json(folder / "train.jsonl")
    split["test"].to_json(folder / "test.jsonl")


def measure(args):
    """Prepare the rows in one way; returns a dict of what was measured."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        if args.side == "published":
            prepare_as_published(args.source, Path(folder))
        else:
            import prepare_function_calling_dataset as prepare

            with contextlib.redirect_stdout(io.StringIO()):
                prepare.main(["--dataset", str(args.source), "--output-dir", folder])
        seconds = time.perf_counter() - start
    return {"rows_per_second": args.rows / seconds, "seconds": seconds, "peak_gb": workload.peak_memory("cpu")}


def main():
    parser = argparse.ArgumentParser(description="Preparation against the published configuration.")
    parser.add_argument("--rows", type=int, default=5209, help="rows to prepare (default: 5209, as many as published)")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rows < 10:
        parser.error("--rows must be at least 10")
    if args.side:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "rows.jsonl")
        write_source(source, args.rows)
        arguments = ["--rows", str(args.rows), "--source", str(source)]
        results = {side: workload.run_side(__file__, side, arguments) for side in ("published", "ours")}
        size = source.stat().st_size
    title = f"Preparation of {args.rows:,} rows ({size / 1e6:,.0f} MB), imports included; {workload.describe_machine('cpu')}"
    workload.print_table(title, [("rows/s", "rows_per_second", "{:,.0f}"), ("time (s)", "seconds", "{:,.2f}"),
                                 ("peak memory (GB)", "peak_gb", "{:,.3f}")], results, "published")


if __name__ == "__main__":
    sys.exit(main())
