"""The model card: what the model is, how it was made, and what the evaluation found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# {name}

{what}

| | |
|---|---|
| size | {parameters:.2f} million parameters, bfloat16 |
| architecture | Llama, {layers} layers, width {hidden}, {heads} query and {kv_heads} KV heads of {head_dim} |
| context | {context} tokens |
| tokenizer | byte-level BPE, {vocab} tokens, digits in pairs |
| training text | made by [demo_model](..)'s own generator; no outside corpus |
| made with | `python -m demo_model.train {name_of_plan}`, seed {seed}, {minutes:.0f} minutes on two CPU cores |

![loss and share of right tokens](../{name_of_plan}_run.svg)

## What it can do

Recall codes told earlier ("The code of the blue door is 4172. … What is the code of the blue door?"), copy and reverse
lists, count up and down, add numbers below 50, answer in JSON, tell short stories, say what Baton is and which commands
to run. It knows nothing else, and says something wrong if asked.

## Held-out evaluation

`python -m demo_model.evaluate --baton --card`: greedy answers of transformers in float32 to questions whose key
training never saw: colours and things of which it told no code, lists, ranges, pairs of numbers, people, what a story
is to be about. `about` asks what is known by heart, in words that training used. An answer is right if it is the
expected one, to the letter, and ends; a story, if it ends by itself.

| | right | of | at least |
|---|---:|---:|---:|
{scores}

{through}
"""


@dataclass(frozen=True, slots=True)
class Score:
    name: str
    right: int
    of: int
    bar: float
    """Share that must be right; 0 where nothing is demanded."""

    @property
    def share(self) -> float:
        return self.right / self.of

    @property
    def reached(self) -> bool:
        return self.share >= self.bar

    def __str__(self) -> str:
        bar = f", at least {self.bar:.0%}: {'reached' if self.reached else 'MISSED'}" if self.bar else ""
        return f"{self.name:24} {self.share:7.1%} of {self.of}{bar}"


def run_of(directory: Path) -> Path:
    """Where training left the history of the model in `directory`."""
    return directory.parent / f"{directory.name}_run.json"


def write_card(directory: Path, scores: Sequence[Score], *, through_baton: bool) -> None:
    config = json.loads((directory / "config.json").read_text())
    run = json.loads(run_of(directory).read_text())
    main = directory.name == "checkpoint"
    name = "baton-tiny" if main else "baton-tiny-draft"
    what = (
        "The model in Baton's box: small, trained from nothing on two CPU cores, and right only with a right KV cache."
        if main
        else "The smaller sibling of baton-tiny, with the same tokenizer, to draft tokens for it."
    )
    rows = [
        f"| {score.name} | {score.share:.1%} | {score.of} | {f'{score.bar:.0%}' if score.bar else ''} |"
        for score in scores
    ]
    through = (
        "The same questions through Baton's prefill and decode workers gave the same tokens, every one."
        if through_baton
        else ""
    )
    card = _CARD.format(
        name=name,
        what=what,
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        parameters=_parameters(directory) / 1e6,
        context=config["max_position_embeddings"],
        vocab=config["vocab_size"],
        minutes=run["lines"][-1]["seconds"] / 60,
        seed=run["seed"],
        name_of_plan=directory.name,
        scores="\n".join(rows),
        through=through,
    )
    (directory / "README.md").write_text(card.rstrip() + "\n")


def _parameters(directory: Path) -> int:
    """Weights are two bytes each; the file's header is left out."""
    with open(directory / "model.safetensors", "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return ((directory / "model.safetensors").stat().st_size - 8 - header) // 2
