"""The model in the box through real prefill and decode workers: token for token what transformers says, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from baton import model_in_the_box
from demo_model.asking import ask
from demo_model.evaluate import KINDS, MAX_TOKENS, Transformers, prompt_ids, questions
from tests.system.harness import system

pytestmark = pytest.mark.slow

PER_KIND = 4


async def test_answers_of_every_kind_are_those_of_transformers(tmp_path: Path) -> None:
    directory = model_in_the_box.DIRECTORY
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    asked = [
        question
        for kind in KINDS
        for number in range(PER_KIND)
        for question in questions(kind, 1, number, distance=500 * number, tokenizer=tokenizer)
    ]
    prompts = [prompt_ids(question, tokenizer) for question in asked]
    flags = ["--dtype=float32", "--local-prefill-tokens=0", "--max-num-batched-tokens=256"]  # chunks, and no short cut
    async with system(directory, tmp_path / "log", *flags) as running:
        async with running.client() as client:
            answers = await ask(client, prompts, max_tokens=MAX_TOKENS)
        await running.assert_idle()
    oracle = Transformers(directory)
    for question, prompt, answer in zip(asked, prompts, answers, strict=True):
        assert answer.token_ids == oracle.say(prompt), question.prompt
        assert answer.timings["transfer_blocks"] > 0, f"not handed over: {question.prompt}"
