"""How fast and how lean generation is, against the published configuration, one after the other on this machine.

    python tests/benchmarks/bench_generation.py                              # CPU: the shape of 270M, 48 queries, at most 64 new tokens
    python tests/benchmarks/bench_generation.py --device cuda                # 1,100 queries, at most 256 new tokens
    python tests/benchmarks/bench_generation.py --device cuda --queries 3800

"ours" is what evaluation.py does without flags: its own loading, batches and generation, with the adapter's weights in the model's
own (merged, a model costs what its base costs). "published" is its recipe in plain library options: eager attention, batches of 24
in the order of the data, an unmerged adapter on embeddings and head too, and no stop at the end of a turn. Weights and prompts are
random; each query has a drawn length at which the model is made to end its turn (median 50 tokens, mean about 100).
"""

import json
import random
import sys
import tempfile
import time

import workload


def draw_queries(num_queries, max_new_tokens, vocab_size):
    """Prompts as lists of token ids, the last of which says how many tokens the model is to answer."""
    prompts, rng = [], random.Random(1)
    for row in workload.draw_rows(num_queries, vocab_size):
        starts = [place for place in range(1, len(row["labels"])) if row["labels"][place] != -100 and row["labels"][place - 1] == -100]
        for start in starts:
            answer = max(2, min(max_new_tokens, workload.draw_turn(rng) * max_new_tokens // 256))
            prompts.append([*row["input_ids"][:start], workload.FIRST_WORD + answer])
    rng.shuffle(prompts)
    return prompts[:num_queries]


def end_turns_as_drawn(model):
    """Make the model end each turn after as many tokens as its prompt says, and not earlier."""
    import torch

    def remember(module, arguments, options):
        if options["input_ids"].shape[1] > 1:
            module.step, module.answer_lengths = 0, options["input_ids"][:, -1] - workload.FIRST_WORD
        module.step += 1

    def end(module, arguments, options, outputs):
        is_due = module.step >= module.answer_lengths
        outputs.logits[:, -1, workload.END_OF_TURN] = torch.where(is_due, torch.inf, -torch.inf).to(outputs.logits.dtype)
        outputs.logits[:, -1, 1] = -torch.inf

    model.register_forward_pre_hook(remember, with_kwargs=True)
    model.register_forward_hook(end, with_kwargs=True)


def measure(args):
    """Answer the queries in one way; returns a dict of what was measured."""
    import torch
    from transformers.utils import logging

    import evaluation

    logging.set_verbosity_error()
    dtype = evaluation.choose_device()[1]
    config = json.loads((args.model_dir / "config.json").read_text())
    prompts = draw_queries(args.queries, args.max_new_tokens, config["vocab_size"])
    if args.side == "published":
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        import function_calling_train as train

        model = AutoModelForCausalLM.from_pretrained(args.model_dir, dtype=dtype, attn_implementation="eager").to(args.device).eval()
        end_turns_as_drawn(model)
        targets = [*train.LORA_TARGETS, "embed_tokens", "lm_head"]
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=64, target_modules=targets, task_type="CAUSAL_LM")).eval()
        batches = [list(range(start, min(start + 24, len(prompts)))) for start in range(0, len(prompts), 24)]
        stop_ids = [1]
    else:
        model = evaluation.load_model(args.model_dir, None, args.device, dtype)
        end_turns_as_drawn(model)
        flags = evaluation.parse_args(["--max-new-tokens", str(args.max_new_tokens)])
        lengths = {index: len(prompt) for index, prompt in enumerate(prompts)}
        batches = evaluation.plan_batches(lengths, flags, evaluation.count_tokens_that_fit(model))
        stop_ids = [1, workload.END_OF_TURN]
    start, num_tokens = time.perf_counter(), 0
    for batch in batches:
        outputs = evaluation.generate_batch(model, [prompts[index] for index in batch], stop_ids, 0, args.max_new_tokens)
        num_tokens += sum(prompts[index][-1] - workload.FIRST_WORD for index in batch)
        if args.side != "published":
            expected = [prompts[index][-1] - workload.FIRST_WORD for index in batch]
            assert [len(tokens) + ended for tokens, ended in outputs] == expected, "the model did not end its turns as drawn"
    if args.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"queries_per_second": len(prompts) / seconds, "tokens_per_second": num_tokens / seconds, "seconds": seconds,
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
    lengths = [len(prompt) for prompt in draw_queries(args.queries, args.max_new_tokens, workload.vocab_size(args.model))]
    title = (f"Generation, shape of {args.model}, {args.queries:,} prompts of {min(lengths)} to {max(lengths):,} tokens (mean "
             f"{sum(lengths) / len(lengths):,.0f}), at most {args.max_new_tokens} new ones; {workload.describe_machine(args.device)}")
    workload.print_table(title, [
        ("queries/s", "queries_per_second", "{:,.3f}"),
        ("tokens/s of answers", "tokens_per_second", "{:,.1f}"),
        ("time (s)", "seconds", "{:,.1f}"),
        ("batches", "batches", "{:,}"),
        *workload.memory_rows(args.device),
    ], results, "published")


if __name__ == "__main__":
    sys.exit(main())
