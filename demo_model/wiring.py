"""How attention starts: near what recall needs, which from noise takes many millions of tokens to find.

Recall is two steps: gather the words before a number, then find the place where the same words stand.

    … The code of the blue door is 41 72 …      What is the code of the blue door?<|end|><|assistant|>
                         ▲────┴──┘ 4 and 3 back                          ▲────┴────────────┘ 4 and 3 back

Half of the residual stream holds the token's own word; the other half, in code, the words 1, 2, 3 and 4 places back,
which layer 0 puts there, a head each. Layer 1 finds where the words 3 and 4 back are the same, for the first half of a
number, and where the word 1 back is the token itself and the word 4 back is the same, for its second half; it adds the
word that stands there. Positions must not blur what is far away, so only the slow half of the rotary dimensions take
part. All else starts as noise. The idea of starting attention as it looks after training is "mimetic initialization"
(Trockman and Kolter, 2023).
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

_HEAD_SIZE = 64
_FAST_PAIRS = 6
"""Rotary dimensions by which a head looks a number of places back: those that turn fastest."""
_SLOW_FROM = 16
"""Of 32 pairs: from here on they hardly turn within the context."""
_LOOK_BACK_GAIN = 5.5
_NOT_ITSELF_GAIN = 4.0
_MATCH_GAIN = 2.2
_COPY_GAIN = 3.0
_WORD, _SHARED = 0.08, 0.16
"""Standard deviation of an embedding's dimensions, and what is the same in all."""
_SHARED_DIMS = 16
_MLP_SHARE = 0.3


@torch.no_grad()
def wire(model: LlamaForCausalLM) -> None:
    """Sets embeddings and the attention of the first two layers of a freshly made model with at least four heads of 64,
    from torch's global generator. What the MLPs add to the stream starts smaller, to leave that alone at first."""
    width: int = model.config.hidden_size
    words = slice(_SHARED_DIMS, width // 2)
    code_size = width // 8
    codes = [slice(width // 2 + i * code_size, width // 2 + (i + 1) * code_size) for i in range(4)]
    for layer in model.model.layers:
        layer.mlp.down_proj.weight *= _MLP_SHARE

    embedding = model.model.embed_tokens.weight
    num_words = width // 2 - _SHARED_DIMS
    shared = torch.randn(_SHARED_DIMS).sign()
    embedding.zero_()
    embedding[:, words] = _WORD * torch.randn(len(embedding), num_words)
    embedding[:, :_SHARED_DIMS] = _SHARED * shared
    norm = math.sqrt((num_words * _WORD**2 + _SHARED_DIMS * _SHARED**2) / width)
    one = torch.zeros(width)
    one[:_SHARED_DIMS] = shared * norm / (_SHARED * _SHARED_DIMS)  # times a normed embedding: 1
    code = torch.randn(code_size, num_words) / math.sqrt(num_words)

    first = _Heads(model, 0)
    for key, value in zip(first.keys, first.values, strict=True):
        first.look(key, one, 0, _LOOK_BACK_GAIN)
        value.zero_()
        value[:code_size, words] = code
    for back, (query, output, place) in enumerate(zip(first.queries, first.outputs, codes, strict=True), start=1):
        first.look(query, one, back, _LOOK_BACK_GAIN)
        output.zero_()
        output[place, :code_size] = norm * torch.eye(code_size)  # as strong in the stream as a word

    second = _Heads(model, 1)
    one = one * math.sqrt(1 + 4 * code_size * _WORD**2 / (width * norm**2))  # the codes are in the stream now
    slow = torch.tensor([i for i in range(_HEAD_SIZE) if i % (_HEAD_SIZE // 2) >= _SLOW_FROM])
    for kv_head, (key, value) in enumerate(zip(second.keys, second.values, strict=True)):
        query, output = second.queries[kv_head * second.group], second.outputs[kv_head * second.group]
        mix = _MATCH_GAIN * torch.randn(len(slow), 2 * code_size) / math.sqrt(2 * code_size)
        near, far = mix.split(code_size, dim=1)
        for weight in (key, query):
            weight.zero_()
            weight[slow, codes[3]] = far
        if kv_head == 0:
            for weight, sign in ((key, 1), (query, -1)):  # every token has the same words behind it as itself
                weight[slow, codes[2]] = near
                second.look(weight, sign * one, 0, _NOT_ITSELF_GAIN)
        else:
            key[slow, codes[0]] = near
            query[slow, words] = near @ code
        copied = torch.linalg.qr(torch.randn(num_words, min(num_words, _HEAD_SIZE)))[0]
        value.zero_()
        value[: copied.shape[1], words] = copied.mT
        output.zero_()
        output[words, : copied.shape[1]] = _COPY_GAIN * norm * copied


class _Heads:
    """Views of one layer's weights, head by head."""

    def __init__(self, model: LlamaForCausalLM, layer: int) -> None:
        attention, config = model.model.layers[layer].self_attn, cast(Any, model.config)
        self.queries = attention.q_proj.weight.split(_HEAD_SIZE)
        self.keys = attention.k_proj.weight.split(_HEAD_SIZE)
        self.values = attention.v_proj.weight.split(_HEAD_SIZE)
        self.outputs = attention.o_proj.weight.split(_HEAD_SIZE, dim=1)
        self.group = config.num_attention_heads // config.num_key_value_heads
        pairs = torch.arange(_FAST_PAIRS)
        self._pairs = pairs
        self._turns = config.rope_parameters["rope_theta"] ** (-2 * pairs / _HEAD_SIZE)

    def look(self, rows: Tensor, one: Tensor, back: int, gain: float) -> None:
        """Sets the fast rows of a head's query, or of its key with `back` 0, so that it sees so many places back."""
        angles = -back * self._turns[:, None]
        rows[self._pairs] = gain * angles.cos() * one
        rows[self._pairs + _HEAD_SIZE // 2] = gain * angles.sin() * one
