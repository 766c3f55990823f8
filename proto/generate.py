"""Generates baton/v1/ from proto/baton/v1/: `make proto`. With --check, only says whether baton/v1/ is fresh.

The generated files are committed, so that installing Baton needs no protoc; a test runs --check.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = sorted((ROOT / "proto" / "baton" / "v1").glob("*.proto"))
INIT = '"""Generated from proto/baton/v1/ by `make proto`; never edited."""\n'


def generate(out: Path) -> None:
    plugins = Path(sys.executable).parent  # the stubs of mypy-protobuf, not protoc's own, pass mypy --strict
    command = [
        sys.executable, "-m", "grpc_tools.protoc",
        f"-I{ROOT / 'proto'}", f"-I{files('grpc_tools') / '_proto'}",
        f"--python_out={out}", f"--grpc_python_out={out}",
        f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}", f"--mypy_out=quiet:{out}",
        f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}", f"--mypy_grpc_out=quiet:{out}",
        *(str(p) for p in PROTOS),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    (out / "baton" / "v1" / "__init__.py").write_text(INIT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        (ROOT / "baton" / "v1").mkdir(parents=True, exist_ok=True)
        generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as tmp:
        generate(Path(tmp))
        fresh = {p.name: p.read_text() for p in (Path(tmp) / "baton" / "v1").glob("*.py*")}
    kept = {p.name: p.read_text() for p in (ROOT / "baton" / "v1").glob("*.py*")}
    stale = sorted(name for name in fresh.keys() | kept.keys() if fresh.get(name) != kept.get(name))
    if stale:
        print(f"baton/v1/ is stale ({', '.join(stale)}): run `make proto` and commit", file=sys.stderr)
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
