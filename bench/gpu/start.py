"""Seconds from a process's start to an engine that is ready, weights aside: `python -m bench.gpu.start SHAPE` is one
such start, and `figures` has some with a compile cache of their own, empty at first."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from bench.figures import Figure


def figures(shape: str) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as cache:
        for case in ("first, nothing compiled", "second"):
            started = time.time()
            command = ["env", f"TRITON_CACHE_DIR={cache}", sys.executable, "-m", "bench.gpu.start", shape]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            told = json.loads(run.stdout.splitlines()[-1])
            yield Figure(
                "start to ready, weights aside", case, "baton", "s", (told["ready"] - started - told["weights"],)
            )


def main() -> None:
    import torch

    from bench.gpu.engines import engine
    from bench.gpu.shapes import random_model

    device = torch.device("cuda")
    torch.zeros(1, device=device)
    before = time.time()
    model = random_model(sys.argv[1], device)
    torch.cuda.synchronize()
    weights = time.time() - before
    engine(model, device)
    print(json.dumps({"ready": time.time(), "weights": weights}))


if __name__ == "__main__":
    main()
