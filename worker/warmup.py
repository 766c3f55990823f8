"""`baton warmup`: compiles a model's GPU kernels into Triton's cache ($TRITON_CACHE_DIR, or ~/.triton/cache), so that
workers that find it there start without compiling. Needs neither the GPU nor the weights."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence

import torch

from baton import logs, model_in_the_box
from baton.config import WarmupConfig, parse
from baton.errors import BatonError, ConfigError
from baton.layout import KVLayout
from engine.loader import read_spec
from engine.progress import CountProgress
from engine.runners import RunnerLimits

log = logging.getLogger(__name__)

_CAPABILITIES = {"A100": 80, "A10": 86, "L4": 89, "L40S": 89, "H100": 90, "H200": 90, "GH200": 90, "B200": 100}
"""By the word in a GPU's name."""


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(WarmupConfig, sys.argv[1:] if argv is None else argv, prog="baton warmup")
    logs.configure(config.log.log_level, "warmup")
    try:
        gpu, capability = _target(config)
        count, seconds = _compile(config, gpu, capability)
    except BatonError as error:
        print(f"baton warmup: {error.message}", file=sys.stderr)
        return 1
    print(f"baton warmup: {count} kernels for {gpu} ({capability}), {seconds:.0f} s")
    return 0


def _compile(config: WarmupConfig, gpu: str, capability: int) -> tuple[int, float]:
    try:
        from engine.precompile import precompile
    except ImportError as error:
        raise ConfigError(f"kernels are compiled by Triton, which is not here ({error}); install triton") from None
    model = model_in_the_box.resolve(config.model)
    spec, dtype, eos_token_ids = read_spec(model.model, model.dtype)
    layout = KVLayout(spec.num_layers, spec.num_kv_heads, config.cache.block_size, spec.head_dim, dtype, bytes(16))
    sizes = config.scheduler.on("cuda")
    limits = RunnerLimits(
        sizes.max_num_seqs,
        sizes.max_num_batched_tokens,
        min(model.max_model_len or spec.max_model_len, spec.max_model_len),
        eos_token_ids,
    )
    started = time.monotonic()
    count = precompile(spec, layout, limits, gpu, capability, CountProgress("compiling decode steps"))
    return count, time.monotonic() - started


def _target(config: WarmupConfig) -> tuple[str, int]:
    """Raises ConfigError."""
    if not config.gpu:
        if not torch.cuda.is_available():
            raise ConfigError("this machine has no CUDA device; name the one that is meant, as in --gpu='NVIDIA H200'")
        major, minor = torch.cuda.get_device_capability()
        return torch.cuda.get_device_name(), config.compute_capability or 10 * major + minor
    known = next((c for name, c in _CAPABILITIES.items() if name in config.gpu.upper().split()), 0)
    if not (config.compute_capability or known):
        raise ConfigError(
            f"of --gpu={config.gpu!r} the compute capability is not known, as it is of {', '.join(_CAPABILITIES)}; "
            "give --compute-capability, such as 90"
        )
    return config.gpu, config.compute_capability or known


if __name__ == "__main__":
    sys.exit(main())
