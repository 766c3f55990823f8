"""Text files of a checkpoint that are damaged or of another model: one line says which, what is wrong with it and what
would be right. The workers' half of it is in tests/engine/test_damaged_checkpoints.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from baton.errors import CheckpointError
from router.text import Tokenizer
from tests.text.checkpoints import GIT_LFS_POINTER, write_checkpoint

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
Damage = Callable[[Path], object]


def refused(directory: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.load(str(directory))
    message = caught.value.message
    assert "\n" not in message
    assert str(directory) in message
    for part in words:
        assert part in message


def write(name: str, content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda directory: (directory / name).write_bytes(data)


def fields(name: str, **changed: object) -> Damage:
    return lambda d: (d / name).write_text(json.dumps(json.loads((d / name).read_text()) | changed))


DAMAGED_JSON = [
    ('{"cut off', "cannot be read"),
    (b"\x00\x01", "cannot be read"),
    ("[]", "holds []; expected is a "),
    ("", "is empty"),
    (GIT_LFS_POINTER, "is a git-lfs pointer"),
]


@pytest.mark.parametrize("name", [TOKENIZER, CONFIG, "special_tokens_map.json", "added_tokens.json", "config.json"])
@pytest.mark.parametrize(("content", "words"), DAMAGED_JSON)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    write(name, content)(write_checkpoint(tmp_path))
    refused(tmp_path, f"{tmp_path / name} {words}")


@pytest.mark.parametrize(
    "damage",
    [
        write(TOKENIZER, "{}"),
        fields(TOKENIZER, model={"type": "BPE"}),
        fields(TOKENIZER, version="9.0"),
        fields(TOKENIZER, decoder={"type": "Smoke"}),
        fields(TOKENIZER, added_tokens=7),
        fields(CONFIG, eos_token=7),
    ],
)
def test_what_is_json_but_no_tokenizer_is_named(damage: Damage, tmp_path: Path) -> None:
    damage(write_checkpoint(tmp_path))
    refused(tmp_path, TOKENIZER, CONFIG, "no tokenizer that can be used: ")


def test_a_directory_without_a_tokenizer_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")  # which is not read
    refused(tmp_path, "tokenizer.json is missing", "Hugging Face's fast format", "save_pretrained")
    (tmp_path / TOKENIZER).symlink_to("/blobs/5")
    refused(tmp_path, "tokenizer.json is a link to '/blobs/5', which does not exist")


def test_a_tokenizer_needs_no_config_beside_it(tmp_path: Path) -> None:
    (write_checkpoint(tmp_path) / CONFIG).unlink()
    assert Tokenizer.load(str(tmp_path)).vocab_size > 256


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    backend = Tokenizer.load(str(write_checkpoint(tmp_path)))._backend
    learnt = max(backend.get_vocab(with_added_tokens=False).values())
    added = max(backend.get_added_tokens_decoder())
    assert added > learnt, "the check below means nothing else"
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": learnt + 1}))
    Tokenizer.load(str(tmp_path))  # some checkpoints' padding token has no row in the model's table
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": learnt}))
    refused(tmp_path, f"tokenizer.json has token ids up to {learnt}, and config.json says vocab_size {learnt}")


def test_a_tokenizer_of_no_words_is_refused(tmp_path: Path) -> None:
    fields(TOKENIZER, model={"type": "BPE", "vocab": {}, "merges": []})(write_checkpoint(tmp_path))
    refused(tmp_path, "tokenizer.json has an empty vocabulary")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (fields(CONFIG, chat_template="{% if"), [CONFIG, "does not compile, at its line 1"]),
        (fields(CONFIG, chat_template="\n{{ messages | smoke }}"), [CONFIG, "at its line 2", "smoke"]),
        (fields(CONFIG, chat_template=7), [CONFIG, "chat_template is 7"]),
        (write(TEMPLATE, "{% for m in messages %}"), [TEMPLATE, "does not compile", "endfor"]),
        (write(TEMPLATE, b"\xff\xfe"), [TEMPLATE, "cannot be read"]),
        (write(TEMPLATE, ""), [TEMPLATE, "is empty"]),
        (write(TEMPLATE, GIT_LFS_POINTER), [TEMPLATE, "is a git-lfs pointer"]),
        (lambda d: (d / TEMPLATE).mkdir(), [TEMPLATE, "is a directory"]),
        (lambda d: (d / TEMPLATE).symlink_to("/blobs/5"), [TEMPLATE, "is a link to '/blobs/5'"]),
    ],
)
def test_a_damaged_chat_template_is_named(damage: Damage, words: list[str], tmp_path: Path) -> None:
    damage(write_checkpoint(tmp_path))
    refused(tmp_path, *words)


@pytest.mark.parametrize("template", ["{{ raise_exception('never') }}", "{{ 1 / 0 }}", "{{ messages[7].content }}"])
def test_a_template_that_refuses_a_conversation_is_no_damage(template: str, tmp_path: Path) -> None:
    Tokenizer.load(str(write_checkpoint(tmp_path, chat_template=template)))


@pytest.mark.parametrize("source", ["/no/such/directory", "a/b/c", "", "http://example.org/x", "~nobody-here/x"])
def test_what_is_neither_a_directory_nor_a_hub_id_is_said(source: str) -> None:
    with pytest.raises(CheckpointError, match="there is no such directory, and a hub id looks like"):
        Tokenizer.load(source)


def test_a_file_in_place_of_a_directory_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "is a file; it must be a directory")


def test_a_hub_that_cannot_be_reached_is_a_checkpoint_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(source: str, **options: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match="the Hugging Face hub did not give it: no connection"):
        Tokenizer.load("some/model")
