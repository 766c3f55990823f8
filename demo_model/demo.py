"""`make demo`: a router, a prefill and a decode worker on this machine, two answers, and who did what.

The checkpoint is built on the spot and its weights are random, so the words are noise. What is real: every process,
every block that moves, every token that is streamed, every figure that is shown.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from urllib.request import urlopen

from baton.cli.generate import summary
from baton.cli.status import table
from baton.client import Answer, Client
from baton.errors import BatonError, ConfigError
from baton.sampling import SamplingParams

_ROOT = Path(__file__).resolve().parent.parent
_CHECKPOINT = _ROOT / ".demo" / "checkpoint"
_ANSWER_TOKENS = 64
_PROMPT = (
    "Baton serves large language models with the two halves of inference on separate workers. A prefill worker reads "
    "the whole prompt; a decode worker writes one token at a time. Tell me what passes from one to the other, and why."
)


def main() -> int:
    try:
        asyncio.run(_demo())
    except BatonError as error:
        print(f"demo: {error.message}", file=sys.stderr)
        return 1
    return 0


async def _demo() -> None:
    if not (_CHECKPOINT / "tokenizer.json").exists():
        print("demo: building a tiny checkpoint with random weights", flush=True)
        await asyncio.to_thread(_build_checkpoint)
    print("demo: starting Redis, a router, one prefill and one decode worker", flush=True)
    command = [sys.executable, "-m", "baton.cli.main", "up", "--model", str(_CHECKPOINT), "--served-model-name", "demo"]
    system = await asyncio.create_subprocess_exec(
        *command, "--grpc-port", "0", "--http-port", "0", "--log-level", "warning", stdout=asyncio.subprocess.PIPE
    )
    try:
        assert system.stdout is not None, "stdout is a pipe"
        line = (await system.stdout.readline()).decode()
        if not line.startswith("baton ready "):
            raise ConfigError("the system did not start; what it said is above")
        doors = dict(pair.split("=", 1) for pair in line.split()[2:])
        async with Client(doors["grpc"]) as client:
            await _show(client)
    finally:
        if system.returncode is None:
            system.send_signal(signal.SIGTERM)
        await system.wait()
    print("\nNext: `.venv/bin/baton up --model DIR_OR_HUB_ID`, and ask with `.venv/bin/baton generate PROMPT`.")


def _build_checkpoint() -> None:
    from demo_model.random_checkpoint import build  # torch and transformers take seconds to import

    build(_CHECKPOINT, (_ROOT / "README.md").read_text())


async def _show(client: Client) -> None:
    status = await client.status()
    print(f"\n{table(status)}\n\nprompt   {_PROMPT}")
    print("\nThe weights are random, so the words are noise; all else is real.")
    print("answer   ", end="", flush=True)
    answer = await _stream(client)
    print(f"\n\n{summary(answer)}")
    again = await _stream(client, show=False)
    same = "the same tokens" if again.token_ids == answer.token_ids else "OTHER TOKENS"
    print(f"\nThe same prompt again: {again.usage['cached_tokens']} of its tokens were cached, and it gave {same}.")
    print(summary(again))
    for worker in sorted(status.workers, key=lambda w: w.id):
        blocks = await asyncio.to_thread(_blocks, worker.metrics)
        print(f"blocks   {worker.id}: {', '.join(f'{count} {state}' for state, count in blocks.items())}")


async def _stream(client: Client, *, show: bool = True) -> Answer:
    text: list[str] = []
    token_ids: list[int] = []
    sampling = SamplingParams(max_tokens=_ANSWER_TOKENS, ignore_eos=True)
    async for part in client.generate(_PROMPT, sampling):
        text.append(part.text)
        token_ids += part.token_ids
        if show:
            print(part.text.replace("\n", " "), end="", flush=True)
        if part.HasField("finished"):
            return Answer.of("".join(text), token_ids, part.finished)
    raise ConfigError("the stream ended without its last message")


def _blocks(metrics: str) -> dict[str, int]:
    """KV blocks by state, from a worker's metrics; states without blocks left out."""
    with urlopen(f"http://{metrics}/metrics", timeout=5) as response:
        lines = response.read().decode().splitlines()
    found = {}
    for line in lines:
        if line.startswith("baton_kv_blocks{"):
            state, count = line.split('"')[1], int(float(line.rsplit(" ", 1)[1]))
            if count:
                found[state] = count
    return found


if __name__ == "__main__":
    sys.exit(main())
