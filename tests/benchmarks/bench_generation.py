"""Compare the speed and memory of generation with those of the published code.

    python tests/benchmarks/bench_generation.py --threads 1
    python tests/benchmarks/bench_generation.py --conversations 300 --max-new-tokens 256    # CUDA
    python tests/benchmarks/bench_generation.py --model FOLDER --data processed_data/...test.jsonl

Two variants answer the same queries one after the other, each in a process of its own:

- ours: evaluation.py without flags. There is no adapter, because evaluation.py merges it, and a
  merged model costs as much as its base model.
- published: the published code with current libraries. Attention is eager, and an adapter that also
  covers the embeddings and the head is not merged. Batches have 24 queries in the order of the
  data, padded on the left. Generation does not stop at the end of a turn.

Each model turn is a query, as in evaluation.py. Speed should not depend on the text of the answers,
so the length of each answer is drawn at random: median 50 tokens, mean about 100. If
--max-new-tokens is below 256, answers are shorter in proportion.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

import workload  # makes the three scripts importable

import evaluation
import function_calling_train as train

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VARIANTS = ["published", "ours"]
PUBLISHED_BATCH_SIZE = 24
PUBLISHED_MAX_NEW_TOKENS = 256

# The answers count down with the tokens of these ids and above. Neither they nor the tokens just
# below are control tokens, in Gemma's vocabulary and in that of a synthetic model.
COUNTDOWN_END = 1000
MAX_PROMPT_LENGTH = 8192


def force_answer_lengths(model: PreTrainedModel, end_of_turn_id: int, max_new_tokens: int) -> None:
    """Make the model end its turn after a random number of tokens.

    The number depends only on the length of the prompt, so that all variants give the same answers.
    An answer of n tokens starts with the id COUNTDOWN_END + n. Each later token has the next lower
    id, and after COUNTDOWN_END + 1 the turn ends. If generation does not stop there, it continues
    with the ids below COUNTDOWN_END.
    """
    import torch

    lengths = []
    for prompt_length in range(MAX_PROMPT_LENGTH):
        length = workload.draw_turn_length(random.Random(prompt_length))
        lengths.append(length * max_new_tokens // PUBLISHED_MAX_NEW_TOKENS)
    lengths = torch.tensor(lengths, device=model.device).clamp(2, max_new_tokens - 1)

    def choose_next_tokens(module, args, kwargs, outputs) -> None:
        input_ids = kwargs["input_ids"]
        is_prompt = input_ids.shape[1] > 1
        if is_prompt:
            prompt_lengths = kwargs["attention_mask"].sum(dim=1)
            next_ids = COUNTDOWN_END + lengths[prompt_lengths]
        else:
            last_ids = input_ids[:, -1]
            next_ids = last_ids - 1
            next_ids[next_ids == COUNTDOWN_END] = end_of_turn_id
            next_ids[last_ids == end_of_turn_id] = COUNTDOWN_END - 1
        rows = torch.arange(len(next_ids))
        outputs.logits[rows, -1, next_ids] = torch.inf

    model.register_forward_hook(choose_next_tokens, with_kwargs=True)


def load_published(model_dir: Path, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model as the published code does: eager attention, and an adapter that is not merged.

    The adapter is new. Its weights do not change how long generation takes.
    """
    import transformers
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=dtype, attn_implementation="eager"
    )
    lora = LoraConfig(
        r=16,
        lora_alpha=64,
        target_modules=[*train.LORA_TARGETS, "embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model.to(device), lora).eval()


def answer_as_published(
    queries: list[dict],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
) -> int:
    """Answer the queries and return the number of answers."""
    prompts = tokenizer.apply_chat_template(
        [query["prompt"] for query in queries], add_generation_prompt=True
    )["input_ids"]
    num_answers = 0
    for start in range(0, len(prompts), PUBLISHED_BATCH_SIZE):
        batch = prompts[start : start + PUBLISHED_BATCH_SIZE]
        answers = evaluation.generate_batch(
            model, tokenizer, batch, [tokenizer.eos_token_id], max_new_tokens
        )
        num_answers += len(answers)
    return num_answers


def answer_as_ours(
    queries: list[dict],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
) -> int:
    """Answer the queries and return the number of answers."""
    args = evaluation.parse_args(["--max-new-tokens", str(max_new_tokens)])
    num_answers = 0
    for _, _, finish_reason in evaluation.ask_model(queries, model, tokenizer, args):
        assert finish_reason == "end_of_turn", "an answer did not end after the drawn length"
        num_answers += 1
    return num_answers


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Answer the queries with one variant and return its measurements."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model_dir = args.work_dir / "model"
    split = args.work_dir / "split.jsonl"
    queries = evaluation.read_queries(split)
    _, info = train.read_split(split)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = train.make_template(info["prompt"], tokenizer, "serving")
    end_of_turn_id = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    device, dtype = evaluation.choose_device()
    if args.variant == "published":
        model = load_published(model_dir, device, dtype)
        base_model = model.get_base_model()
        answer = answer_as_published
    else:
        model = evaluation.load_model(model_dir, None, device, dtype)
        base_model = model
        answer = answer_as_ours
    force_answer_lengths(base_model, end_of_turn_id, args.max_new_tokens)

    start = time.perf_counter()
    num_answers = answer(queries, model, tokenizer, args.max_new_tokens)
    seconds = time.perf_counter() - start
    assert num_answers == len(queries)
    return {
        "queries_per_second": len(queries) / seconds,
        "seconds": seconds,
        "queries": len(queries),
        "peak_gb": workload.peak_memory(),
    }


def parse_args() -> argparse.Namespace:
    parser = workload.build_parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--conversations",
        type=int,
        default=12,
        help="Number of conversations whose model turns are queries (default: %(default)s).",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=64,
        help="Maximum length of an answer in tokens (default: %(default)s).",
    )
    return workload.parse_args(parser)


def main() -> None:
    args = parse_args()
    if args.variant:
        print("\n" + json.dumps(measure(args)))
        return
    results = workload.run_variants(__file__, VARIANTS, args, args.conversations)
    metrics = [
        workload.Metric("queries per second", "queries_per_second", "{:,.3f}"),
        workload.Metric("time (s)", "seconds", "{:,.1f}"),
        workload.Metric("queries", "queries", "{:,}"),
        workload.Metric("peak memory (GB)", "peak_gb", "{:,.2f}"),
    ]
    title = (
        f"Generation, {args.conversations} conversations, "
        f"at most {args.max_new_tokens} tokens per answer"
    )
    workload.print_results(title, args, metrics, results, reference="published")


if __name__ == "__main__":
    main()
