"""Muon: orthogonal directions, and the same step whoever computes which part of it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from demo_model.muon import Muon, orthogonal
from demo_model.train import _environment

SHAPES = ((32, 32), (16, 48), (48, 16))


@pytest.mark.parametrize("shape", SHAPES)
def test_directions_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape) * 1e-3))
    assert values.min() > 0.6
    assert values.max() < 1.25


def test_a_direction_keeps_the_singular_vectors() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(16, 48)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.mT @ orthogonal(matrix) @ right.mT
    assert (inner - inner.diag().diag()).abs().max() < 1e-4


def _steps(rank: int, processes: int, path: str) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    generator = torch.Generator().manual_seed(1)
    matrices = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = Muon(matrices, lr=0.01, weight_decay=0.1)
    for _ in range(3):
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape, generator=generator)
        optimizer.step()
    torch.save([matrix.detach() for matrix in matrices], f"{path}.{rank}")
    dist.destroy_process_group()


def test_processes_that_share_the_work_take_the_step_of_one(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for processes in (1, 2):
        for name, value in _environment().items():
            monkeypatch.setenv(name, value)
        path = str(tmp_path_factory.mktemp("muon") / "matrices")
        spawn(_steps, (processes, path), nprocs=processes)
        results += [torch.load(f"{path}.{rank}") for rank in range(processes)]
    for other in results[1:]:
        for one, another in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, another)
