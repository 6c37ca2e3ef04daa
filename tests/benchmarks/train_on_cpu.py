"""Train long conversations on a CPU: function_calling_train.py with a faster attention.

    python tests/benchmarks/train_on_cpu.py --model MODEL

The flags are those of function_calling_train.py.

Most layers of Gemma 3 attend to a window of 512 tokens. On a CPU, PyTorch's attention nevertheless
multiplies all pairs of tokens. The attention here goes through the queries in blocks, and leaves
out the keys that no query of a block sees. The results are the same, apart from rounding.
"""

import sys

import torch
import workload  # noqa: F401  # makes the three scripts importable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import function_calling_train as train

BLOCK = 256  # queries


def attend(module, query, key, value, attention_mask, scaling=None, **options):
    """Causal attention of one conversation: a function for transformers' AttentionInterface.

    `query` has shape (1, heads, tokens, width), `key` and `value` have (1, 1, tokens, width). All
    heads have the same keys, so a block is one matrix product. Batches with padding and models
    with several key heads are left to PyTorch.
    """
    batch, heads, num_tokens, width = query.shape
    if batch > 1 or key.shape != (1, 1, num_tokens, width):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    window = module.sliding_window or num_tokens
    outputs = []
    for begin in range(0, num_tokens, BLOCK):
        end = min(begin + BLOCK, num_tokens)
        first = max(0, begin - window + 1)
        positions = torch.arange(begin, end)[:, None]
        positions_of_keys = torch.arange(first, end)[None]
        distances = positions - positions_of_keys
        bias = torch.zeros(distances.shape)
        bias.masked_fill_((distances < 0) | (distances >= window), float("-inf"))
        queries = query[0, :, begin:end].reshape(-1, width) * scaling
        scores = (queries @ key[0, 0, first:end].T).view(heads, end - begin, -1) + bias
        weights = torch.softmax(scores, dim=-1).view(-1, end - first)
        block = weights @ value[0, 0, first:end]
        outputs.append(block.view(heads, end - begin, width).transpose(0, 1))
    return torch.cat(outputs)[None], None


if __name__ == "__main__":
    AttentionInterface.register("sdpa", attend)
    train.main(sys.argv[1:])
