"""`baton generate PROMPT`: text as it comes, or one JSON object."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from collections.abc import Sequence

from baton.cli import interrupt
from baton.client import Answer, Client
from baton.config import GenerateConfig, parse
from baton.errors import InvalidRequest
from baton.sampling import SamplingParams


def main(argv: Sequence[str]) -> int:
    config = parse(GenerateConfig, argv, prog="baton generate")
    prompt = _prompt(config)
    with asyncio.Runner() as runner:
        interrupt.run(runner, _generate(config, prompt))
    return 0


async def _generate(config: GenerateConfig, prompt: str | list[int]) -> None:
    sampling = SamplingParams(
        max_tokens=config.max_tokens,
        min_tokens=config.min_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        seed=config.seed,
        ignore_eos=config.ignore_eos,
    )
    stop = (config.stop,) if config.stop else ()
    async with Client(config.target) as client:
        hear = None if config.json else _show
        answer = await client.answer(prompt, sampling, hear=hear, model=config.model, stop=stop, timeout=config.timeout)
    print(json.dumps(dataclasses.asdict(answer)) if config.json else "")
    if not config.json and sys.stderr.isatty():
        print(summary(answer), file=sys.stderr)


def _show(text: str) -> None:
    print(text, end="", flush=True)


def summary(answer: Answer) -> str:
    """Who did what, and how long it took; one line each."""
    usage, timings = answer.usage, answer.timings
    lines = [
        f"prefill  {answer.prefill_worker}: {usage['prompt_tokens']} prompt tokens "
        f"({usage['cached_tokens']} cached), first token after {timings['first_token_seconds'] * 1e3:.0f} ms"
    ]
    if timings["transfer_blocks"]:
        lines.append(
            f"handoff  {timings['transfer_blocks']} blocks, {timings['transfer_bytes'] / 1024:.0f} KiB over "
            f"{timings['transport']}, {timings['transfer_seconds'] * 1e3:.1f} ms"
        )
    decoding = timings["total_seconds"] - timings["first_token_seconds"]
    lines.append(
        f"decode   {answer.decode_worker}: {usage['completion_tokens']} tokens, {answer.finish_reason}, "
        f"{decoding * 1e3:.0f} ms after the first"
    )
    if timings["resumes"]:
        lines.append(f"resumed  {timings['resumes']} times")
    return "\n".join(lines)


def _prompt(config: GenerateConfig) -> str | list[int]:
    if bool(config.prompt) == bool(config.token_ids):
        raise InvalidRequest("give a prompt, as text or as --token-ids 1,2,3, and not both; it must not be empty")
    if config.prompt:
        try:
            config.prompt.encode()
        except UnicodeEncodeError:
            raise InvalidRequest("the prompt is not UTF-8") from None
        return config.prompt
    try:
        return [int(part) for part in config.token_ids.split(",")]
    except ValueError:
        raise InvalidRequest(f"--token-ids is {config.token_ids!r}; it must be numbers with commas between") from None
