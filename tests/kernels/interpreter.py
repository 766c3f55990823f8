"""Makes Triton's interpreter quicker, where kernels call many functions of their own.

At each call of a function within a kernel the interpreter looks through all of triton.language for what it has to
replace, though it has replaced it when the kernel began; for our samplers that is three quarters of the time. Once a
launch is enough. This reaches into Triton: where it finds something else than it knows, it changes nothing.
"""

from __future__ import annotations

import inspect
from typing import Any

from triton.runtime import interpreter


class _Once:
    """In place of the interpreter's `_patch_lang`."""

    def __init__(self, patch: Any) -> None:
        self._patch = patch
        self._done: set[tuple[str, ...]] = set()

    def __call__(self, function: Any) -> _Scope:
        languages = {module.__name__ for module in function.__globals__.values() if inspect.ismodule(module)}
        key = tuple(sorted(name for name in languages if name.startswith("triton.language")))
        if key in self._done:
            return _Scope(self._done, None)
        self._done.add(key)
        return _Scope(self._done, self._patch(function))


class _Scope:
    def __init__(self, done: set[tuple[str, ...]], scope: Any) -> None:
        self._done, self._scope = done, scope

    def restore(self) -> None:
        """Called where a launch ends."""
        self._done.clear()
        if self._scope is not None:
            self._scope.restore()


def patch_once_a_launch() -> None:
    patch = getattr(interpreter, "_patch_lang", None)
    if inspect.isfunction(patch) and list(inspect.signature(patch).parameters) == ["fn"]:
        interpreter._patch_lang = _Once(patch)
