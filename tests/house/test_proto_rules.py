"""proto/ keeps the rules of proto_rules.py, and those rules can be broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.house.proto_rules import broken_rules, compile_protos

ROOT = Path(__file__).resolve().parents[2]

GOOD = """
syntax = "proto3";
package baton.v1;
// Says.
service Echo {
  // Says it again.
  rpc Say(SayRequest) returns (SayResponse);
}
message SayRequest { string text = 1; }
message SayResponse {
  // Probability.
  double chance = 1;
  double total_seconds = 2;
  optional Tone tone = 3;
  map<string, uint32> counts = 4;
}
enum Tone { TONE_UNSPECIFIED = 0; TONE_LOUD = 1; }
"""


def test_protos_keep_the_rules() -> None:
    found = broken_rules(ROOT / "proto")
    assert not found, "\n".join(found)


def test_all_protos_are_read() -> None:
    services = {s.name for f in compile_protos(ROOT / "proto").file for s in f.service}
    assert services == {"Inference", "Transfer", "Worker"}


def test_a_proto_that_keeps_the_rules_is_let_be(tmp_path: Path) -> None:
    assert _check(tmp_path, GOOD) == []


@pytest.mark.parametrize(
    ("good", "bad", "rule"),
    [
        ("package baton.v1", "package baton.v2", "PACKAGE_DIRECTORY_MATCH"),
        ("SayRequest", "sayRequest", "MESSAGE_PASCAL_CASE"),
        ("string text", "string Text", "FIELD_LOWER_SNAKE_CASE"),
        ("  // Probability.\n", "", "FIELD_UNIT"),
        ("text = 1", "text = 2", "FIELD_NUMBER_GAP"),
        ("Tone", "tone", "ENUM_PASCAL_CASE"),
        ("TONE_UNSPECIFIED", "TONE_NONE", "ENUM_ZERO_VALUE_SUFFIX"),
        ("TONE_LOUD", "LOUD", "ENUM_VALUE_PREFIX"),
        ("TONE_LOUD", "TONE_loud", "ENUM_VALUE_UPPER_SNAKE_CASE"),
        ("enum Tone {", "enum Tone { option allow_alias = true; TONE_A = 0;", "ENUM_NO_ALLOW_ALIAS"),
        ("service Echo", "service echo", "SERVICE_PASCAL_CASE"),
        ("// Says.\n", "", "COMMENT_SERVICE"),
        ("  // Says it again.\n", "", "COMMENT_RPC"),
        ("rpc Say(", "rpc say(", "RPC_PASCAL_CASE"),
        ("Say(SayRequest)", "Say(Tell)", "RPC_REQUEST_STANDARD_NAME"),
        ("returns (SayResponse)", "returns (stream Tell)", "RPC_RESPONSE_STANDARD_NAME"),
        ("returns (SayResponse)", "returns (SayRequest)", "RPC_RESPONSE_STANDARD_NAME"),
        (
            "  // Says it again.",
            "  // Again.\n  rpc Tell(SayRequest) returns (TellResponse);\n  // Says.",
            "RPC_REQUEST_RESPONSE_UNIQUE",
        ),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, good: str, bad: str, rule: str) -> None:
    assert good in GOOD
    spare = "message Tell {}\nmessage TellResponse {}\n"
    found = _check(tmp_path, GOOD.replace(good, bad) + spare)
    assert [f for f in found if f" {rule}: " in f], found


def test_a_broken_rule_names_its_line(tmp_path: Path) -> None:
    (found,) = _check(tmp_path, GOOD.replace("string text", "string Text"))
    line = 1 + GOOD.splitlines().index("message SayRequest { string text = 1; }")
    assert found.startswith(f"baton/v1/echo.proto:{line}: ")


@pytest.mark.parametrize(
    "field", ["string text = 1; string again = 1;", "reserved 1; string text = 1;", "reserved 'text'; string text = 1;"]
)
def test_a_number_or_name_used_twice_or_reserved_is_refused(tmp_path: Path, field: str) -> None:
    with pytest.raises(ValueError, match=r"echo\.proto"):
        _check(tmp_path, GOOD.replace("string text = 1;", field))


def test_an_import_that_is_not_used_is_refused(tmp_path: Path) -> None:
    unused = 'import "google/protobuf/empty.proto";'
    with pytest.raises(ValueError, match="unused"):
        _check(tmp_path, GOOD.replace("package baton.v1;", f"package baton.v1;\n{unused}"))


def _check(root: Path, source: str) -> list[str]:
    folder = root / "baton" / "v1"
    folder.mkdir(parents=True)
    (folder / "echo.proto").write_text(source)
    return broken_rules(root)
