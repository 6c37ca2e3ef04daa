"""Score a served model on the Berkeley Function Calling Leaderboard (BFCL), version 4.

The package bfcl-eval asks the questions and checks the answers. It needs an environment of its own:

    pip install --no-deps bfcl-eval==2026.3.23 qwen-agent==0.0.34
    pip install -r tests/benchmarks/requirements-bfcl.txt
    python tests/benchmarks/run_bfcl.py --server http://127.0.0.1:8000/v1 --server-model fc \\
        --output-dir bfcl/fine-tuned

Every answer is saved at once. After an interruption, run the same command to continue.
"""

import argparse
import json
import os
import sys
from importlib.metadata import version
from math import sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

CATEGORIES = ["simple_python", "multiple", "irrelevance"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--server", metavar="URL", required=True, help="Base URL of an OpenAI-compatible server."
    )
    model.add_argument(
        "--server-model", metavar="NAME", required=True, help="Name of the model on the server."
    )
    model.add_argument(
        "--mode",
        choices=["fc", "prompt"],
        default="fc",
        help="fc: the request contains the tools, and the server parses the calls. prompt: BFCL "
        "describes the functions in the user's message and reads the calls in the text of the "
        "answer (default: %(default)s).",
    )
    model.add_argument(
        "--max-tokens",
        type=int,
        default=256,
        metavar="N",
        help="Maximum length of an answer in tokens (default: %(default)s).",
    )
    questions = parser.add_argument_group("questions")
    questions.add_argument(
        "--categories",
        nargs="+",
        choices=CATEGORIES,
        default=CATEGORIES,
        help="Categories of the benchmark (default: all three).",
    )
    questions.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="Ask the first N questions of each category, at least 2 (default: all questions).",
    )
    questions.add_argument(
        "--num-threads",
        type=int,
        default=1,
        metavar="N",
        help="Number of requests to send at once (default: %(default)s).",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output-dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="Folder for the answers and scores of one model in one mode.",
    )
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 2:
        # bfcl-eval computes the standard deviation of the latency.
        parser.error(f"argument --limit: {args.limit} is less than 2")
    if args.max_tokens < 1 or args.num_threads < 1:
        parser.error("arguments --max-tokens and --num-threads: must be at least 1")
    return args


def fail(message: str) -> NoReturn:
    sys.exit(f"error: {message}")


def api_address(server: str) -> str:
    address = server.rstrip("/")
    return address if address.endswith("/v1") else address + "/v1"


def check_server(server: str, server_model: str) -> None:
    """End the program with one line if the server does not answer or lacks the model."""
    from openai import OpenAI, OpenAIError

    try:
        client = OpenAI(max_retries=0, timeout=30)
        names = [model.id for model in client.models.list()]
    except OpenAIError as error:
        fail(f"the server {server} does not answer ({error}). Start it, or correct --server.")
    if server_model not in names:
        fail(
            f"the server {server} has no model {server_model}. "
            f"Pass one of these as --server-model: {', '.join(names)}"
        )


def check_settings(output_dir: Path, settings: dict[str, Any]) -> None:
    """Save the settings of the answers, or compare them with those of an earlier run."""
    path = output_dir / "settings.json"
    if not path.exists():
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if saved.get(name) != value:
            fail(
                f"the answers in {output_dir} were made with {name} {saved.get(name)}, "
                f"not {value}. Choose another --output-dir."
            )


def register_model(mode: str, server_model: str, max_tokens: int) -> None:
    """Add the served model to bfcl-eval's table of models, under the name of the mode.

    bfcl-eval turns every "_" of that name into "/" and treats a name with "FC" in it as a model
    that calls functions, so the name on the server cannot be used.
    """
    from bfcl_eval.constants.model_config import MODEL_CONFIG_MAPPING, ModelConfig
    from bfcl_eval.model_handler.api_inference.openai_completion import OpenAICompletionsHandler

    class ServedModelHandler(OpenAICompletionsHandler):
        def generate_with_backoff(self, **request: Any) -> tuple[Any, float]:
            return super().generate_with_backoff(max_tokens=max_tokens, **request)

        def _pre_query_processing_prompting(self, test_entry: dict[str, Any]) -> dict[str, Any]:
            # Gemma has no system role: its text goes in front of the user's message, as in
            # Gemma's own chat template and in bfcl-eval's handler for Gemma.
            inference_data = super()._pre_query_processing_prompting(test_entry)
            system, user, *others = test_entry["question"][0]
            content = system["content"].strip() + "\n\n" + user["content"].strip()
            test_entry["question"][0] = [{"role": "user", "content": content}, *others]
            return inference_data

    calls_functions = mode == "fc"
    MODEL_CONFIG_MAPPING[mode] = ModelConfig(
        model_name=server_model,
        display_name=server_model,
        url="",
        org="",
        license="",
        model_handler=ServedModelHandler,
        is_fc_model=calls_functions,
        # In fc mode bfcl-eval replaces "." by "_" in the names of the functions that it sends.
        # This makes the checker do the same to the names in the right answers.
        underscore_to_dot=calls_functions,
    )


def result_path(output_dir: Path, mode: str, category: str) -> Path:
    return output_dir / "result" / mode / "non_live" / f"BFCL_v4_{category}_result.json"


def score_path(output_dir: Path, mode: str, category: str) -> Path:
    return output_dir / "score" / mode / "non_live" / f"BFCL_v4_{category}_score.json"


def remove_failed_answers(path: Path) -> list[str]:
    """Remove questions that the server did not answer, and return their error messages.

    bfcl-eval saves such an error as the answer. It would never ask again, and in the category
    irrelevance it would count the error as correct. An incomplete last line is removed as well.
    """
    if not path.exists():
        return []
    answered = []
    errors = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "traceback" in entry:
            errors.append(f"{entry['id']}: {entry['result']}")
        else:
            answered.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(answered), encoding="utf-8")
    temporary.replace(path)
    return errors


def ask_questions(args: argparse.Namespace) -> None:
    """Ask the questions that have no answer in the output folder yet."""
    from bfcl_eval._llm_response_generation import collect_test_cases, generate_results
    from bfcl_eval.utils import load_dataset_entry

    paths = [result_path(args.output_dir, args.mode, category) for category in args.categories]
    for path in paths:
        remove_failed_answers(path)

    questions = []
    for category in args.categories:
        questions += load_dataset_entry(category)[: args.limit]
    options = SimpleNamespace(
        temperature=0.0,
        num_threads=args.num_threads,
        result_dir=args.output_dir / "result",
        include_input_log=True,
        exclude_state_log=False,
        allow_overwrite=False,
        run_ids=False,
    )
    unanswered = collect_test_cases(options, args.mode, args.categories, questions)
    print(f"{len(questions)} questions, {len(questions) - len(unanswered)} of them answered before")
    if unanswered:
        generate_results(options, args.mode, unanswered)

    errors = [error for path in paths for error in remove_failed_answers(path)]
    if errors:
        fail(
            f"{len(errors)} questions were not answered. Check the server and run the same command "
            f"to ask them again. The first is {errors[0]}"
        )


def has_call(handler: Any, answer: Any) -> bool:
    """Return whether bfcl-eval finds at least one function call in an answer."""
    from bfcl_eval.constants.enums import ReturnFormat
    from bfcl_eval.utils import is_empty_output

    try:
        calls = handler.decode_ast(answer, ReturnFormat.PYTHON, has_tool_call_tag=False)
    except Exception:  # bfcl-eval treats every error in reading an answer as "no call"
        return False
    return not is_empty_output(calls)


def is_malformed(handler: Any, answer: Any) -> bool:
    """Return whether an answer contains a function call that could not be read."""
    if has_call(handler, answer):
        return False
    return isinstance(answer, list) or "<tool_call>" in (answer or "")


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95% confidence interval of a proportion (Wilson, 1927)."""
    z = 1.96
    share = correct / total
    center = (share + z * z / (2 * total)) / (1 + z * z / total)
    spread = sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    half_width = z * spread / (1 + z * z / total)
    return max(0.0, center - half_width), min(1.0, center + half_width)


def summarize(args: argparse.Namespace, category: str) -> dict[str, Any]:
    from bfcl_eval.eval_checker.eval_runner import get_handler

    handler = get_handler(args.mode)
    with open(score_path(args.output_dir, args.mode, category), encoding="utf-8") as file:
        score = json.loads(file.readline())
    with open(result_path(args.output_dir, args.mode, category), encoding="utf-8") as file:
        entries = [json.loads(line) for line in file]
    answers = [entry["result"] for entry in entries]
    return {
        "questions": score["total_count"],
        "correct": score["correct_count"],
        "accuracy": score["accuracy"],
        "confidence_interval": wilson_interval(score["correct_count"], score["total_count"]),
        "with_call": sum(has_call(handler, answer) for answer in answers),
        "malformed": sum(is_malformed(handler, answer) for answer in answers),
        "at_token_limit": sum(entry["output_token_count"] >= args.max_tokens for entry in entries),
        "prompt_tokens": sum(entry["input_token_count"] for entry in entries),
        "mean_latency_s": sum(entry["latency"] for entry in entries) / len(entries),
    }


def print_summary(summary: dict[str, dict[str, Any]]) -> None:
    print()
    print("| category | n | accuracy [95% CI] | with a call | malformed | at token limit | s |")
    print("|---|---|---|---|---|---|---|")
    for category, row in summary.items():
        low, high = row["confidence_interval"]
        print(
            f"| {category} | {row['questions']} | {row['accuracy']:.3f} [{low:.3f}, {high:.3f}] "
            f"| {row['with_call']} | {row['malformed']} | {row['at_token_limit']} "
            f"| {row['mean_latency_s']:.1f} |"
        )


def run(args: argparse.Namespace) -> None:
    check_server(args.server, args.server_model)
    settings = {
        "server_model": args.server_model,
        "mode": args.mode,
        "max_tokens": args.max_tokens,
        "bfcl_eval": version("bfcl-eval"),
    }
    check_settings(args.output_dir, settings)
    register_model(args.mode, args.server_model, args.max_tokens)
    ask_questions(args)

    from bfcl_eval.eval_checker.eval_runner import main as evaluate

    evaluate(
        [args.mode],
        args.categories,
        args.output_dir / "result",
        args.output_dir / "score",
        partial_eval=True,
    )
    summary = {category: summarize(args, category) for category in args.categories}
    text = json.dumps({**settings, "categories": summary}, indent=2)
    (args.output_dir / "summary.json").write_text(text + "\n", encoding="utf-8")
    print_summary(summary)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.output_dir = args.output_dir.resolve()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    # bfcl-eval reads these variables when it is imported and when it connects
    os.environ["BFCL_PROJECT_ROOT"] = str(args.output_dir)
    os.environ["OPENAI_BASE_URL"] = api_address(args.server)
    os.environ.setdefault("OPENAI_API_KEY", "none")
    try:
        run(args)
    except KeyboardInterrupt:
        sys.exit("interrupted: to continue, run the same command")


if __name__ == "__main__":
    main()
