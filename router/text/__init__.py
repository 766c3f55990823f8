"""Text on one side, token ids on the other: tokenizer, incremental detokenizer, stop strings. Imports no torch."""

from router.text.detokenizer import Detokenizer
from router.text.stop import StopResult, StopStrings
from router.text.tokenizer import ChatMessage, Tokenizer

__all__ = ["ChatMessage", "Detokenizer", "StopResult", "StopStrings", "Tokenizer"]
