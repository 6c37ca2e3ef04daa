"""How fast and how lean generation is, against the published configuration, one after the other on this machine.

    python tests/benchmarks/bench_generation.py                              # CPU: the shape of 270M, 48 queries, at most 64 new tokens
    python tests/benchmarks/bench_generation.py --device cuda                # 1,100 queries, at most 256 new tokens
    python tests/benchmarks/bench_generation.py --device cuda --queries 3800

"ours" is what evaluation.py does without flags: its own loading, batches and generation, with the adapter's weights in the model's
own (merged, a model costs what its base costs). "published" is its recipe in plain library options: eager attention, batches of 24
in the order of the data, an unmerged adapter on embeddings and head too, and no stop at the end of a turn. Weights and conversations
are random; each model turn is a query, with a drawn length at which the model is made to end it (median 50 tokens, mean about 100).
"""

import itertools
import json
import random
import sys
import tempfile
import time

import workload


def draw_conversations(num_queries, max_new_tokens, vocab_size):
    """Conversations, each a list of prompts as token ids: one for each turn of the model, `num_queries` in all.

    A prompt is what comes before the turn, and a last token which says how long the answer is to be. One to five turns stand
    anywhere but in the first quarter of a conversation, which holds the tools and the question: so the prompts hold about 2.4 times the
    tokens of each conversation's longest, as those of real conversations of this data do.
    """
    rng, conversations = random.Random(1), []
    # In thirds of the number of queries, each spread evenly over the lengths, until there are enough.
    rows = itertools.chain.from_iterable(workload.draw_rows(num_queries // 3 + 1, vocab_size, seed=seed) for seed in itertools.count())
    while num_queries:
        ids = next(rows)["input_ids"]
        starts = sorted(rng.sample(range(len(ids) // 4, len(ids)), min(rng.randint(1, 5), num_queries)))
        answers = [max(2, min(max_new_tokens, workload.draw_turn(rng) * max_new_tokens // 256)) for _ in starts]
        conversations.append([[*ids[:start], workload.FIRST_WORD + answer] for start, answer in zip(starts, answers)])
        num_queries -= len(starts)
    return conversations


def end_turns_as_drawn(model):
    """Make the model count down: after a token that stands for n come those for n - 1 to 1, then the end of the turn."""
    import torch

    def count_down(module, arguments, options, outputs):
        next_token = options["input_ids"][:, -1] - 1
        next_token[next_token == workload.FIRST_WORD] = workload.END_OF_TURN
        next_token[next_token < workload.END_OF_TURN] = workload.FIRST_WORD - 1  # past its end, of which the published recipe knows nothing
        outputs.logits[torch.arange(len(next_token)), -1, next_token] = torch.inf

    model.register_forward_hook(count_down, with_kwargs=True)


def generate_in_plain_way(model, prompts, max_new_tokens):
    """The library's generation for a batch of prompts padded on the left."""
    import torch
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    model.generation_config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=[1], pad_token_id=0)
    with torch.inference_mode():
        model.generate(input_ids=ids, attention_mask=mask)


def measure(args):
    """Answer the queries in one way; returns a dict of what was measured."""
    import torch
    from transformers.utils import logging

    import evaluation

    logging.set_verbosity_error()
    dtype = evaluation.choose_device()[1]
    config = json.loads((args.model_dir / "config.json").read_text())
    conversations = draw_conversations(args.queries, args.max_new_tokens, config["vocab_size"])
    prompts = [prompt for conversation in conversations for prompt in conversation]
    answer_lengths = [prompt[-1] - workload.FIRST_WORD for prompt in prompts]
    if args.side == "published":
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        import function_calling_train as train

        model = AutoModelForCausalLM.from_pretrained(args.model_dir, dtype=dtype, attn_implementation="eager").to(args.device).eval()
        end_turns_as_drawn(model)
        targets = [*train.LORA_TARGETS, "embed_tokens", "lm_head"]
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=64, target_modules=targets, task_type="CAUSAL_LM")).eval()
        batches = [list(range(start, min(start + 24, len(prompts)))) for start in range(0, len(prompts), 24)]
    else:
        model = evaluation.load_model(args.model_dir, None, args.device, dtype)
        end_turns_as_drawn(model)
        flags = evaluation.parse_args(["--max-new-tokens", str(args.max_new_tokens)])
        number = itertools.count()
        lengths = [{next(number): len(prompt) for prompt in conversation} for conversation in conversations]
        batches = evaluation.plan_batches(lengths, flags, evaluation.count_tokens_that_fit(model))
    start = time.perf_counter()
    for batch in batches:
        batch_prompts = [prompts[index] for index in batch]
        if args.side == "published":
            generate_in_plain_way(model, batch_prompts, args.max_new_tokens)
            continue
        outputs = evaluation.generate_batch(model, batch_prompts, [1, workload.END_OF_TURN], 0, args.max_new_tokens)
        for index, (tokens, ended) in zip(batch, outputs, strict=True):
            assert len(tokens) + ended == answer_lengths[index], "the model did not end its turns as drawn"
    if args.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"queries_per_second": len(prompts) / seconds, "tokens_per_second": sum(answer_lengths) / seconds, "seconds": seconds,
            "peak_gb": workload.peak_memory(args.device), "host_gb": workload.peak_memory("cpu"), "batches": len(batches)}


def main():
    parser = workload.make_parser("Generation against the published configuration.")
    parser.add_argument("--queries", type=int, help="prompts to answer (default: 48 on CPU, 1,100 on CUDA)")
    parser.add_argument("--max-new-tokens", type=int, help="longest output, tokens; outputs shrink with it (default: 64 on CPU, 256 on CUDA)")
    args = workload.parse_args(parser)
    if args.queries is None:
        args.queries = 1100 if args.device == "cuda" else 48
    if args.max_new_tokens is None:
        args.max_new_tokens = 256 if args.device == "cuda" else 64
    if args.queries < 1 or args.max_new_tokens < 2:
        parser.error("--queries must be at least 1, --max-new-tokens at least 2")
    if args.side:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as model_dir:
        workload.write_model(args.model, model_dir)
        arguments = ["--device", args.device, "--queries", str(args.queries), "--max-new-tokens", str(args.max_new_tokens),
                     "--model-dir", model_dir]
        results = {side: workload.run_side(__file__, side, arguments) for side in ("published", "ours")}
    conversations = draw_conversations(args.queries, args.max_new_tokens, workload.vocab_size(args.model))
    lengths = [len(prompt) for conversation in conversations for prompt in conversation]
    title = (f"Generation, shape of {args.model}, {args.queries:,} prompts of {len(conversations):,} conversations, {min(lengths)} to "
             f"{max(lengths):,} tokens (mean {sum(lengths) / len(lengths):,.0f}), at most {args.max_new_tokens} new ones; {workload.describe_machine(args.device)}")
    workload.print_table(title, [
        ("queries/s", "queries_per_second", "{:,.3f}"),
        ("tokens/s of answers", "tokens_per_second", "{:,.1f}"),
        ("time (s)", "seconds", "{:,.1f}"),
        ("batches", "batches", "{:,}"),
        *workload.memory_rows(args.device),
    ], results, "published")


if __name__ == "__main__":
    sys.exit(main())
