"""What is chosen of measured launch parameters, and how files have it. No GPU is asked."""

from __future__ import annotations

import pytest

from bench.gpu import tune
from engine.kernels.gpu import tuning
from engine.kernels.gpu.tuning import LaunchConfig

_NARROW, _WIDE = LaunchConfig(2, 3, block_n=32), LaunchConfig(4, 3, block_n=64)


def test_no_case_outweighs_the_others_for_being_longer() -> None:
    assert tune.best({_NARROW: (1.0, 0.010), _WIDE: (1.1, 0.008)}) is _WIDE
    assert tune.best({_NARROW: (1.0, 0.010), _WIDE: (1.1, 0.0095)}) is _NARROW


@pytest.mark.parametrize("kernel", [tune.DECODE, tune.PREFILL])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_what_a_file_has_is_what_was_chosen(kernel: str, head_dim: int) -> None:
    default = tuning.config(kernel, "another GPU", head_dim)
    found = list(tune.candidates(kernel, default))
    assert len(set(found)) == len(found) > 20
    for config in [default, *found]:
        assert LaunchConfig(**tune.changed(config)) == config
        assert config.programs == default.programs


def test_without_a_gpu_there_is_nothing_to_tune_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tune"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert tune.main() == 1
    assert "no CUDA device" in capsys.readouterr().err
