"""`make demo`: a whole system on this machine with the model in the box, what it says, and who did what.

Everything is real: every process, every block that moves, every token that is streamed, every figure that is shown.
What `make demo ARGS=…` gives is handed on to `baton up`.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Sequence
from http.client import HTTPException
from urllib.request import urlopen

from baton.cli.conversation import figures
from baton.cli.generate import summary
from baton.cli.main import print_any_text
from baton.cli.status import table
from baton.client import Answer, Client, Message
from baton.errors import BatonError, Unavailable
from baton.sampling import SamplingParams
from demo_model.system import system
from demo_model.tasks import Fact, filler

_FACTS = (
    Fact("blue", "door", "4172"),  # the one that is asked for; training never told a code of a blue door
    Fact("red", "lamp", "9031"),
    Fact("green", "boat", "2750"),
    Fact("silver", "bell", "6648"),
)
_SENTENCES_BETWEEN = 10
_QUESTION = f"What is the code of the {_FACTS[0].key}?"
_OTHERS = (
    "What is prefill?",
    "Tell me a story about a fox and a bear.",
    "Anna is 34 years old and likes cherries. Answer in JSON with name, age and likes.",
)
_GREEDY = SamplingParams(max_tokens=256)


def main(argv: Sequence[str]) -> int:
    """0 if the answers were what they must be, else 1."""
    print_any_text()
    try:
        right = asyncio.run(_demo(argv))
    except BatonError as error:
        print(f"demo: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if not right:
        print("demo: not every answer was what it must be; see above", file=sys.stderr)
        return 1
    print("\nNext: `.venv/bin/baton up` in one terminal, `.venv/bin/baton chat` in another.")
    return 0


async def _demo(argv: Sequence[str]) -> bool:
    print(f"demo: {' '.join(('baton up', *argv))}", flush=True)
    async with system(["--log-level=warning", *argv]) as client:
        return await _show(client)


async def _show(client: Client) -> bool:
    """Whether the code was right, and the second answer the first."""
    status = await client.status()
    print(f"\n{table(status)}\n")
    print("Four codes among other text, and one that is asked for. A damaged KV cache would show as a wrong code.\n")
    prompt, shown = recall_prompt(random.Random(0))
    first = await _ask(client, prompt, shown)
    right = first.text == _FACTS[0].code
    if not right:
        print(f"That is wrong: it is {_FACTS[0].code}.")
    print(f"\n{summary(first)}\n")
    for question in _OTHERS:
        print(f"{figures(await _ask(client, question))}\n")
    print("The first question again, whose blocks are in the prefix cache by now.\n")
    again = await _ask(client, prompt, shown)
    same = again.token_ids == first.token_ids
    tokens = "the same tokens" if same else "OTHER TOKENS"
    cached, length = again.usage["cached_tokens"], again.usage["prompt_tokens"]
    print(f"\n{summary(again)}\n\n{cached} of {length} prompt tokens were cached, and the answer has {tokens}.")
    for worker in sorted(status.workers, key=lambda w: w.id):
        blocks = await asyncio.to_thread(_blocks, worker.metrics)
        print(f"blocks   {worker.id}: {', '.join(f'{count} {state}' for state, count in blocks.items())}")
    return right and same


def recall_prompt(rng: random.Random) -> tuple[str, str]:
    """All of it, and what is worth showing of it."""
    sentences: list[str] = []
    for fact in _FACTS:
        sentences += [fact.tell(), *(filler(rng) for _ in range(_SENTENCES_BETWEEN))]
    shown = [*(fact.tell() for fact in _FACTS), _QUESTION]
    return " ".join([*sentences, _QUESTION]), " … ".join(shown)


async def _ask(client: Client, prompt: str, shown: str = "") -> Answer:
    """The answer to one message of a chat, which is printed as it comes."""
    print(f"> {shown or prompt}")
    answer = await client.answer([Message("user", prompt)], _GREEDY, hear=lambda text: print(text, end="", flush=True))
    print()
    return answer


def _blocks(metrics: str) -> dict[str, int]:
    """KV blocks by state, from a worker's metrics; states without blocks left out. Raises Unavailable."""
    url = f"http://{metrics}/metrics"
    try:
        with urlopen(url, timeout=5) as response:
            lines = response.read().decode().splitlines()
    except (OSError, HTTPException) as error:
        raise Unavailable(f"{url} gave no metrics: {error}") from None
    found = {}
    for line in lines:
        if line.startswith("baton_kv_blocks{"):
            state, count = line.split('"')[1], int(float(line.rsplit(" ", 1)[1]))
            if count:
                found[state] = count
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
