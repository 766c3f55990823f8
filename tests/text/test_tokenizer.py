"""Loading, tokenising and chat templates, with `transformers` as the oracle."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from baton.errors import InvalidRequest
from router.text import Tokenizer
from tests.text.checkpoints import CORPUS, REFUSING_TEMPLATE, write_checkpoint

TEXTS = ["", "a", *CORPUS, " ".join(CORPUS) * 20]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
async def test_ids_are_those_of_transformers(
    tokenizers: dict[str, Tokenizer], kind: str, add_special_tokens: bool, text: str
) -> None:
    tokenizer = tokenizers[kind]
    oracle = PreTrainedTokenizerFast.from_pretrained(tokenizer.source)
    expected = oracle(text, add_special_tokens=add_special_tokens).input_ids
    assert await tokenizer.encode(text, add_special_tokens) == tuple(expected)


async def test_a_long_text_is_tokenised_in_another_thread(
    tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizers["byte_level"]
    threads: list[threading.Thread] = []

    class Noting:
        def encode(self, text: str, add_special_tokens: bool) -> Any:
            threads.append(threading.current_thread())
            return backend.encode(text, add_special_tokens=add_special_tokens)

    backend = tokenizer._backend
    monkeypatch.setattr(tokenizer, "_backend", Noting())
    await tokenizer.encode("word " * 1000)
    assert threads[0] is not threading.main_thread()


async def test_a_text_that_must_be_too_many_tokens_is_refused_before_it_is_tokenised(
    tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizers["byte_level"]
    monkeypatch.setattr(tokenizer, "_backend", None)
    with pytest.raises(InvalidRequest, match="1000000 characters, which is more than 100 tokens"):
        await tokenizer.encode("x" * 1_000_000, max_tokens=100)


@given(text=st.text(max_size=60) | st.sampled_from(CORPUS) | st.text(alphabet="aé e\u0301", max_size=60))
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_no_text_is_refused_early_that_would_fit(tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = tokenizers[kind]
    count = len(asyncio.run(tokenizer.encode(text, False)))
    assert len(asyncio.run(tokenizer.encode(text, False, max_tokens=count))) == count


async def test_without_a_known_bound_nothing_is_refused_early(tokenizers: dict[str, Tokenizer]) -> None:
    assert len(await tokenizers["word_piece"].encode("x" * 10_000, max_tokens=1)) == 1  # one unknown word


async def test_half_a_surrogate_pair_is_refused(tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(InvalidRequest, match="lone surrogate at character 1"):
        await tokenizers["byte_level"].encode("a\ud83d")


def test_what_the_checkpoint_says_of_truncation_is_not_followed(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    backend = PreTrainedTokenizerFast.from_pretrained(str(directory)).backend_tokenizer
    backend.enable_truncation(2)
    backend.enable_padding(length=64)
    backend.save(str(directory / "tokenizer.json"))
    tokenizer = Tokenizer.load(str(directory))
    assert tokenizer.decode(asyncio.run(tokenizer.encode("the quick brown fox"))) == "the quick brown fox"


def test_special_ids_and_vocab_size_are_the_tokenizers(tokenizers: dict[str, Tokenizer]) -> None:
    assert tokenizers["byte_level"].special_ids == {0, 1, 2}
    assert tokenizers["byte_level"].vocab_size == len(tokenizers["byte_level"]._backend.get_vocab())


# --- chat


async def test_a_chat_is_rendered_as_transformers_renders_it(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    rendered = await tokenizer.render_chat(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好?"}]
    )
    assert rendered == ("<|turn|>system\nBe brief.<|eos|>\n<|turn|>user\n你好?<|eos|>\n<|turn|>assistant\n")
    ids = await tokenizer.encode(rendered, add_special_tokens=False)
    assert ids[0] == 2
    assert ids.count(1) == 2


async def test_a_checkpoint_without_a_template_says_so(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(str(write_checkpoint(tmp_path, chat_template=None)))
    with pytest.raises(InvalidRequest, match="no chat template; use /v1/completions"):
        await tokenizer.render_chat([{"role": "user", "content": "hi"}])


async def test_a_template_in_a_file_of_its_own_is_found(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, chat_template=None)
    (directory / "chat_template.jinja").write_text("from a file: {{ messages[0].content }}")
    rendered = await Tokenizer.load(str(directory)).render_chat([{"role": "user", "content": "hi"}])
    assert rendered == "from a file: hi"


async def test_what_a_template_refuses_is_the_requests_fault(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(str(write_checkpoint(tmp_path, chat_template=REFUSING_TEMPLATE)))
    assert await tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "hi"
    with pytest.raises(InvalidRequest, match="the first turn must be the user's"):
        await tokenizer.render_chat([{"role": "assistant", "content": "hi"}])


@pytest.mark.parametrize(
    "template",
    ["{{ messages.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{{ 1 / 0 }}"],
)
async def test_a_template_cannot_leave_its_sandbox(tmp_path: Path, template: str) -> None:
    tokenizer = Tokenizer.load(str(write_checkpoint(tmp_path, chat_template=template)))
    with pytest.raises(InvalidRequest, match="chat template does not take these messages"):
        await tokenizer.render_chat([{"role": "user", "content": "hi"}])


NO_TORCH = """
import asyncio, sys
import router.text, router.http
tokenizer = router.text.Tokenizer.load(sys.argv[1])
ids = asyncio.run(tokenizer.encode("long enough for a thread " * 50))
asyncio.run(tokenizer.render_chat([{"role": "user", "content": "hi"}]))
router.text.Detokenizer(tokenizer).push(ids)
print("torch" in sys.modules)
"""


def test_the_text_side_never_imports_torch(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    ran = subprocess.run([sys.executable, "-c", NO_TORCH, str(directory)], capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "False", ran.stderr
