"""What is said on the wire, as words of a story. Load is left out, and how a stream goes on once it has begun."""

from __future__ import annotations

from typing import Any


def words(message: Any) -> str:
    """Empty for what no reader wants to know."""
    match message.DESCRIPTOR.name:
        case "KeepRequest":
            return "keep"
        case "LendRequest":
            return f"lend {len(message.hashes)} blocks to {_id(message)}"
        case "GenerateRequest" | "GenerateResponse":
            return ""  # the client tells it
    kind = message.WhichOneof("message")
    if kind is None:
        return "nothing"
    body = getattr(message, kind)
    match kind:
        case "step":
            return ", ".join(filter(None, map(_event_words, body.events)))
        case "submit":
            task = {1: "PREFILL", 2: "RECEIVE", 3: "LOCAL"}.get(body.task, str(body.task))
            prefix = f", some of them from {body.prefix.worker_id or body.prefix.ticket.worker_id}"
            more = prefix if body.HasField("prefix") else ""
            return f"submit {_id(body.id)} {task}, {len(body.token_ids)} tokens{more}"
        case "handoff" | "cancel" | "move":
            return f"{kind} {_id(body.id)}"
        case "claim":
            return f"claim {body.request_id.partition('~')[0]}#{body.attempt} from block {body.first_block}"
        case "sealed":
            return f"sealed {', '.join(str(b.position) for b in body.blocks)}"
        case "refused":
            return f"refused: {body.message}"
        case _:
            return str(kind)


def _event_words(event: Any) -> str:
    kind = event.WhichOneof("event")
    if kind == "tokens":
        return "" if event.tokens.index else f"{_id(event.id)} first token"
    if kind == "ended":
        return f"{_id(event.id)} ended, reason {event.ended.reason} {event.ended.message}".rstrip()
    return f"{_id(event.id)} {kind}"


def _id(id: Any) -> str:
    return f"{id.request_id.partition('~')[0]}#{id.attempt}"
