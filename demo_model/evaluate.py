"""The held-out evaluation: questions that training never saw, and how many are answered right.

    python -m demo_model.evaluate             with transformers, in float32
    python -m demo_model.evaluate --baton     and the same questions through a prefill and a decode worker: every token
                                              must be the same
    python -m demo_model.evaluate --card      and the result into the model card

Imports nothing of the training.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from baton import model_in_the_box
from baton.errors import BatonError
from demo_model.asking import ask
from demo_model.card import Score, run_of, write_card
from demo_model.system import system
from demo_model.tasks import KINDS, draw, facts, filler, held_out_fact

DISTANCES = (50, 200, 500, 1000, 1500)
"""Tokens between the end of the fact and the question."""
MAX_TOKENS = 256
BARS = {"recall": 0.98, "copy": 0.98, "count": 0.95, "add": 0.95, "json": 0.98, "story": 0.95}
"""The share that must be right. A story is right if it ends by itself; all else must be the expected answer."""
_SEED = 2026


@dataclass(frozen=True, slots=True)
class Question:
    kind: str
    prompt: str
    """The user's one message."""
    answer: str
    distance: int = 0
    """Of recall: tokens from the fact to the question."""

    def correct(self, said: str, *, ended: bool = True) -> bool:
        """`ended`: by the end token, and not because there was no more room."""
        if self.kind == "story":
            return ended
        return ended and said == self.answer


def questions(
    kind: str, count: int, seed: int, *, distance: int = 0, tokenizer: PreTrainedTokenizerFast | None = None
) -> list[Question]:
    """The same for the same arguments. Recall needs the tokenizer, to know distances."""
    rng = random.Random(f"evaluate {kind} {seed} {distance}")
    if kind == "recall":
        assert tokenizer is not None, "distances are in tokens"
        return [_recall(rng, distance, tokenizer) for _ in range(count)]
    return [_question(kind, rng) for _ in range(count)]


def _question(kind: str, rng: random.Random) -> Question:
    while True:
        turn = draw(kind, rng, hold_out=True)
        if kind != "story" or "about" in turn.prompt:  # "Tell me a story." is the same in training
            return Question(kind, turn.prompt, turn.answer)


def _recall(rng: random.Random, distance: int, tokenizer: PreTrainedTokenizerFast) -> Question:
    """The asked fact, then `distance` tokens of other facts and other text, then the question; some text before it."""
    asked = held_out_fact(rng)
    others = facts(rng, min(24, 3 + distance // 60), two_digits=0.0)
    between = [fact.tell() for fact in others]
    text, length = "", 0
    while True:
        sentence = between.pop() if between and rng.random() < 0.4 else filler(rng)
        length += len(tokenizer(" " + sentence, add_special_tokens=False).input_ids)
        if length > distance:
            break
        text += f" {sentence}"
    before = "".join(f"{filler(rng)} " for _ in range(rng.randrange(4)))
    question = f"What is the code of the {asked.key}?"
    return Question("recall", f"{before}{asked.tell()}{text} {question}", asked.code, distance)


def prompt_ids(question: Question, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The question as a chat of one message, up to where the answer begins."""
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": question.prompt}], add_generation_prompt=True, tokenize=False
    )
    ids: list[int] = tokenizer(chat, add_special_tokens=False).input_ids
    return ids


@dataclass(frozen=True, slots=True)
class Said:
    """An answer as tokens, without what ended it."""

    token_ids: list[int]
    ended: bool
    """By the end token."""


class Transformers:
    """Greedy answers of transformers, one at a time, in float32."""

    def __init__(self, directory: Path) -> None:
        disable_progress_bar()
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    @torch.inference_mode()
    def say(self, prompt: Sequence[int]) -> list[int]:
        """Token ids behind `prompt`, the end token included if it came."""
        ids = torch.tensor([prompt])
        output = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False
        )
        said: list[int] = output[0, len(prompt) :].tolist()
        return said


def all_questions(count: int, tokenizer: PreTrainedTokenizerFast) -> list[Question]:
    """`count` of every kind; of recall, `count` at every distance."""
    asked = [
        question
        for distance in DISTANCES
        for question in questions("recall", count, _SEED, distance=distance, tokenizer=tokenizer)
    ]
    return asked + [question for kind in KINDS if kind != "recall" for question in questions(kind, count, _SEED)]


def scores(asked: Sequence[Question], said: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerFast) -> list[Score]:
    """By kind, and recall by distance too."""
    right: defaultdict[str, list[bool]] = defaultdict(list)
    for question, token_ids in zip(asked, said, strict=True):
        ended = bool(token_ids) and token_ids[-1] == tokenizer.eos_token_id
        text = str(tokenizer.decode(list(token_ids[:-1] if ended else token_ids)))
        verdict = question.correct(text, ended=ended)
        right[question.kind].append(verdict)
        if question.kind == "recall":
            right[f"recall at {question.distance} tokens"].append(verdict)
        if question.kind == "json":
            right["json that parses"].append(_parses(text))
    return [
        Score(name, sum(verdicts), len(verdicts), BARS.get(name.split(" ")[0], 0.0)) for name, verdicts in right.items()
    ]


def _parses(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


async def _through_baton(directory: Path, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    flags = ["--model", str(directory), "--dtype=float32", "--local-prefill-tokens=0"]
    async with system(flags) as client:
        answers = await ask(client, prompts, max_tokens=MAX_TOKENS)
    moved = sum(answer.timings["transfer_blocks"] for answer in answers)
    print(f"evaluate: {moved} blocks were handed over, {sum(a.timings['resumes'] for a in answers)} streams resumed")
    return [answer.token_ids for answer in answers]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo_model.evaluate", description="The held-out evaluation.")
    parser.add_argument("--model", type=Path, default=model_in_the_box.DIRECTORY, help="(%(default)s)")
    parser.add_argument("--count", type=int, default=200, help="questions of every kind, and distance (%(default)s)")
    parser.add_argument("--baton", action="store_true", help="ask a running Baton too, and compare every token")
    parser.add_argument("--card", action="store_true", help="write the result into the model's README.md")
    options = parser.parse_args(argv)
    if options.card and not run_of(options.model).is_file():
        print(f"evaluate: the card needs {run_of(options.model)}, which training writes", file=sys.stderr)
        return 1
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.model)
    asked = all_questions(options.count, tokenizer)
    prompts = [prompt_ids(question, tokenizer) for question in asked]
    oracle = Transformers(options.model)
    said = [oracle.say(prompt) for prompt in tqdm(prompts, unit="question", desc="transformers", mininterval=2)]
    result = scores(asked, said, tokenizer)
    for score in result:
        print(score)
    same = True
    if options.baton:
        try:
            through = asyncio.run(_through_baton(options.model, prompts))
        except BatonError as error:
            print(f"evaluate: {error.message}", file=sys.stderr)
            return 1
        differ = [question for question, one, other in zip(asked, said, through, strict=True) if one != other]
        same = not differ
        print(f"through Baton: {len(asked) - len(differ)} of {len(asked)} answers are those of transformers")
        for question in differ[:5]:
            print(f"  differs: {question.prompt[-80:]}")
    if options.card:
        write_card(options.model, result, through_baton=options.baton and same)
    return 0 if same and all(score.reached for score in result) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
