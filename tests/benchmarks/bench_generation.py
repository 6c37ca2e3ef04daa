"""How fast and how lean generation is, beside the published way, one after the other.

    python tests/benchmarks/bench_generation.py --threads 1
    python tests/benchmarks/bench_generation.py --conversations 300 --max-new-tokens 256    # CUDA
    python tests/benchmarks/bench_generation.py --model FOLDER --data processed_data/...test.jsonl

*ours* is what evaluation.py does without flags: its own loading, batches and generation. Its
adapter is merged, and a merged model costs what its base costs.

*published* is the published recipe in the options of today's libraries: eager attention, batches of
24 in the order of the data, padded on the left, an adapter on embeddings and head too that is not
merged, and no stop at the end of a turn.

Each turn of the model is a query, as in evaluation.py. So that speed does not hang on what a model
happens to say, it is made to end its turn after a drawn number of tokens: median 50, mean about
100, or fewer where --max-new-tokens is below 256.
"""

import json
import random
import time

import workload

SIDES = ["published", "ours"]
FIRST_WORD = 1000  # the id of a token that is no control token, nor are the next 800


def end_turns_as_drawn(model, end_of_turn, max_new_tokens):
    """Make the model count down from a drawn number, which hangs on the prompt's length alone.

    It says FIRST_WORD + n for n more tokens to come, at the end its <end_of_turn>, and after that,
    where nothing stops it, any words.
    """
    import torch

    lengths = [workload.draw_turn(random.Random(n)) * max_new_tokens // 256 for n in range(8192)]
    lengths = torch.tensor(lengths, device=model.device).clamp(2, max_new_tokens - 1)

    def count_down(module, arguments, options, outputs):
        tokens = options["input_ids"]
        if tokens.shape[1] > 1:  # a prompt
            following = FIRST_WORD + lengths[options["attention_mask"].sum(dim=1)]
        else:
            following = tokens[:, -1] - 1
        following = following.masked_fill(following == FIRST_WORD, end_of_turn)
        following = following.masked_fill(following == end_of_turn - 1, FIRST_WORD - 1)
        outputs.logits[torch.arange(len(following)), -1, following] = torch.inf

    model.register_forward_hook(count_down, with_kwargs=True)


def load_published(model_dir, device, dtype):
    """The published model: eager attention, and an adapter that is not merged."""
    import transformers
    from peft import LoraConfig, get_peft_model

    import function_calling_train as train

    options = {"dtype": dtype, "attn_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, **options).to(device)
    targets = [*train.LORA_TARGETS, "embed_tokens", "lm_head"]
    lora = LoraConfig(r=16, lora_alpha=64, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, lora).eval()


def measure(args):
    """Answer the queries in one way; returns a dict of what was measured."""
    import transformers

    import evaluation
    import function_calling_train as train

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model_dir, split = args.work_dir / "model", args.work_dir / "split.jsonl"
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    wording = train.read_split(split)[1]
    tokenizer.chat_template = train.make_template(wording, tokenizer, "serving")
    end_of_turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    device, dtype = evaluation.choose_device()
    queries, answers = evaluation.read_queries(split), []
    flags = evaluation.parse_args(["--max-new-tokens", str(args.max_new_tokens)])
    if args.side == "published":
        model = load_published(model_dir, device, dtype)
        end_turns_as_drawn(model.get_base_model(), end_of_turn, args.max_new_tokens)
    else:
        model = evaluation.load_model(model_dir, None, device, dtype)
        end_turns_as_drawn(model, end_of_turn, args.max_new_tokens)

    start = time.perf_counter()
    if args.side == "published":
        prompts = [query["prompt"] for query in queries]
        prompts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True)["input_ids"]
        stop_ids = [tokenizer.eos_token_id]
        for n in range(0, len(prompts), 24):
            batch = prompts[n : n + 24], stop_ids, args.max_new_tokens
            answers += evaluation.generate_batch(model, tokenizer, *batch)
    else:
        for _, *answer in evaluation.ask_model(queries, model, tokenizer, flags):
            answers.append(answer)
        assert {reason for _, reason in answers} == {"end_of_turn"}, "turns did not end as drawn"
    seconds = time.perf_counter() - start
    assert len(answers) == len(queries)
    return {
        "queries_per_second": len(queries) / seconds,
        "seconds": seconds,
        "queries": len(queries),
        "peak_gb": workload.peak_memory(),
    }


def main():
    def add_arguments(parser):
        add = parser.add_argument
        add("--conversations", type=int, default=12, help="whose turns are asked (default: 12)")
        add("--max-new-tokens", type=int, default=64, help="longest answer, tokens (default: 64)")

    args = workload.parse_args(__doc__.splitlines()[0], add_arguments)
    if args.side:
        print("\n" + json.dumps(measure(args)))
        return
    results = workload.run_sides(__file__, SIDES, args, args.conversations)
    rows = [
        ("queries/s", "queries_per_second", "{:,.3f}"),
        ("time (s)", "seconds", "{:,.1f}"),
        ("queries", "queries", "{:,}"),
        ("peak memory (GB)", "peak_gb", "{:,.2f}"),
    ]
    title = f"Generation, {args.conversations} conversations, {args.max_new_tokens} tokens at most"
    workload.print_results(title, args, rows, results, "published")


if __name__ == "__main__":
    main()
