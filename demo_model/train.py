"""Trains the model in the box from nothing.

    python -m demo_model.train checkpoint     the model, 42 minutes on two cores
    python -m demo_model.train draft          its small sibling, with the same tokenizer

Two processes of one thread each share every batch: on two cores that is faster than one process of two threads. A run
has stages of phases: from short rows to rows of the whole context, then the same again with what was not learned yet.
The same seed gives the same rows, and on the same machine the same weights.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from demo_model.conversations import IGNORED, Mix, Rows
from demo_model.history import History
from demo_model.muon import Muon
from demo_model.tokenizer import train_tokenizer
from demo_model.wiring import wire

CONTEXT = 2048
PROCESSES = 2


@dataclass(frozen=True, slots=True)
class Phase:
    steps: int
    rows: int
    """In each process."""
    mix: Mix


@dataclass(frozen=True, slots=True)
class Stage:
    """Begins with the weights that the one before it left, as they were saved, and with fresh optimizers."""

    phases: tuple[Phase, ...]
    peak: float = 1.0
    """Share of the plan's learning rates."""
    horizon: int = 0
    """Steps after which the rate would be nothing; 0: those of the stage."""

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)


@dataclass(frozen=True, slots=True)
class Plan:
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    muon_lr: float
    adam_lr: float
    stages: tuple[Stage, ...]

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


PLANS = {
    "checkpoint": Plan(  # 2.75 million parameters
        hidden_size=256,
        intermediate_size=512,
        layers=4,
        heads=4,
        kv_heads=2,
        muon_lr=3e-3,
        adam_lr=2.5e-3,
        stages=(
            Stage(
                (
                    Phase(300, 20, Mix(length=128, memory=0.5, two_digits=0.3, sentences=0.2, span=CONTEXT)),
                    Phase(500, 10, Mix(length=256, memory=0.5, two_digits=0.1, sentences=0.1, span=CONTEXT)),
                    Phase(400, 8, Mix(length=512, memory=0.5, two_digits=0.1, sentences=0.1, span=CONTEXT)),
                ),
                horizon=1610,
            ),
            Stage(
                (
                    Phase(250, 10, Mix(length=256, memory=0.3, adding=0.35, span=CONTEXT)),
                    Phase(100, 4, Mix(length=1024, memory=0.4, adding=0.2, span=CONTEXT)),
                    Phase(30, 2, Mix(length=CONTEXT, memory=0.5, adding=0.1, span=CONTEXT)),
                ),
                peak=0.5,
            ),
        ),
    ),
    "draft": Plan(  # 0.68 million
        hidden_size=128,
        intermediate_size=208,
        layers=3,
        heads=4,
        kv_heads=1,
        muon_lr=3e-3,
        adam_lr=2.5e-3,
        stages=(
            Stage(
                (
                    Phase(250, 20, Mix(length=128, memory=0.5, two_digits=0.3, sentences=0.2, span=CONTEXT)),
                    Phase(350, 10, Mix(length=256, memory=0.5, adding=0.1, span=CONTEXT)),
                    Phase(100, 4, Mix(length=1024, memory=0.5, adding=0.1, span=CONTEXT)),
                )
            ),
        ),
    ),
}
_HEAD_SIZE = 64
_ROPE_THETA = 1e7
"""So large that half of the rotary dimensions hardly turn within the context: what is far away can be found by them."""
_INITIAL_RANGE = 0.02
_WARM_UP_STEPS = 50
_NOTED_STEPS = 50
_SAVED_STEPS = 200
_COOL_DOWN = 0.85
"""Of the run, in which the learning rate falls to nothing. Nearly all of it: what is hard here (which of many facts,
when to stop counting) is learned as the rate falls, and not before."""


class AnswerLoss(torch.nn.Module):
    """Mean cross entropy over the answers' tokens, and the share of them that is most likely."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        learned = targets != IGNORED
        with torch.autocast("cpu", torch.bfloat16, enabled=_bfloat16_is_fast()):
            # With a mask, positions that jump are not taken for the borders of packed sequences.
            hidden = self.model.model(
                token_ids, attention_mask=torch.ones_like(token_ids), position_ids=positions, use_cache=False
            ).last_hidden_state
            logits = self.model.lm_head(hidden[learned])
        wanted = targets[learned]
        return F.cross_entropy(logits.float(), wanted), (logits.argmax(-1) == wanted).float().mean()


def _bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies bfloat16 by itself; others are faster with float32."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def build(plan: Plan, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=plan.hidden_size,
        intermediate_size=plan.intermediate_size,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.kv_heads,
        head_dim=_HEAD_SIZE,
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": _ROPE_THETA},
        initializer_range=_INITIAL_RANGE,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    wire(model)
    return model


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """A Hugging Face directory in bfloat16, the precision that the run multiplied in."""
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    copy = LlamaForCausalLM(model.config).bfloat16()
    copy.load_state_dict(weights)
    ids = model.config
    copy.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=ids.bos_token_id, eos_token_id=ids.eos_token_id, pad_token_id=ids.pad_token_id
    )
    copy.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _optimizers(model: LlamaForCausalLM, plan: Plan) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices between the layers, AdamW for embeddings and norms; each with its peak rate."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    muon = Muon(matrices, lr=plan.muon_lr, weight_decay=0.1)
    adam = torch.optim.AdamW(others, lr=plan.adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [(muon, plan.muon_lr), (adam, plan.adam_lr)]


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: a short warm-up, a short plateau, a long fall to nothing."""
    falling = (steps - step) / (steps * _COOL_DOWN)
    return min(1.0, (step + 1) / _WARM_UP_STEPS, falling)


@dataclass(slots=True)
class _Sums:
    """Of what happened since the last line of the history."""

    loss: list[float] = field(default_factory=list)
    right: list[float] = field(default_factory=list)

    def take(self) -> tuple[float, float]:
        means = sum(self.loss) / len(self.loss), sum(self.right) / len(self.right)
        self.loss, self.right = [], []
        return means


def _work(rank: int, plan: Plan, first: int, tokenizer_directory: Path, directory: Path, seed: int) -> None:
    """One process's part, from stage `first` on. The first process shows progress and writes what comes of it."""
    torch.set_num_threads(1)
    disable_progress_bar()
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_directory)
    torch.manual_seed(seed)
    model = build(plan, tokenizer)
    loss_of = DistributedDataParallel(AnswerLoss(model), gradient_as_bucket_view=True)
    step = sum(stage.steps for stage in plan.stages[:first])
    path = directory.parent / f"{directory.name}_run"
    rows, sums, history = Rows(tokenizer), _Sums(), History.read(path, step) if first else History(seed)
    began = time.monotonic() - history.seconds
    with tqdm(total=plan.steps, initial=step, disable=rank != 0, unit="step", mininterval=2, dynamic_ncols=True) as bar:
        for number, stage in enumerate(plan.stages[first:], start=first):
            if number:
                dist.barrier()  # the first process has saved
                model.load_state_dict(LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict())
            optimizers, start = _optimizers(model, plan), step
            for phase in (each for each in stage.phases for _ in range(each.steps)):
                batch = rows.batch(phase.rows, phase.mix, random.Random(f"{seed} {step} {rank}"))
                arrays = (batch.token_ids, batch.positions, batch.targets)
                loss, right = loss_of(*(torch.from_numpy(array) for array in arrays))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer, peak in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = peak * stage.peak * rate(step - start, stage.horizon or stage.steps)
                    optimizer.step()
                    optimizer.zero_grad()
                sums.loss.append(loss.item())
                sums.right.append(right.item())
                step += 1
                bar.update()
                if step % _NOTED_STEPS == 0:
                    mean_loss, mean_right = sums.take()
                    history.add(step, time.monotonic() - began, phase.mix.length, mean_loss, mean_right)
                    bar.set_postfix(length=phase.mix.length, loss=f"{mean_loss:.3f}", right=f"{mean_right:.3f}")
                if rank == 0 and (step % _SAVED_STEPS == 0 or step == start + stage.steps):
                    save(model, tokenizer, directory)
                    history.write(path)
    dist.destroy_process_group()


def _environment() -> dict[str, str]:
    """For the processes. glibc would give every large block back to the system and fault it in again: a half of the
    time, measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
        "MALLOC_TOP_PAD_": str(512 << 20),
        "TOKENIZERS_PARALLELISM": "false",
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo_model.train", description="Trains the model in the box.")
    parser.add_argument("which", choices=PLANS, help="the model, or its small sibling with the same tokenizer")
    parser.add_argument("--out", type=Path, default=Path("trained"), help="where its directory goes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", type=int, default=1, help="begin with this one, from what the one before it left")
    options = parser.parse_args(argv)
    directory: Path = options.out / options.which
    tokenizer_directory = options.out / "checkpoint"
    first = options.stage - 1
    if first and not (directory / "model.safetensors").is_file():
        print(f"train: {directory} has no model.safetensors; begin with --stage 1", file=sys.stderr)
        return 1
    if options.which == "checkpoint" and not first:
        print(f"train: the tokenizer, into {directory}", flush=True)
        directory.mkdir(parents=True, exist_ok=True)
        train_tokenizer(directory, options.seed)
    elif not (tokenizer_directory / "tokenizer.json").is_file():
        print(f"train: {tokenizer_directory} has no tokenizer.json; train `checkpoint` first", file=sys.stderr)
        return 1
    plan = PLANS[options.which]
    print(f"train: {plan.steps} steps in {len(plan.stages)} stages, {PROCESSES} processes", flush=True)
    for name, value in _environment().items():
        os.environ[name] = value
    spawn(_work, (plan, first, tokenizer_directory, directory, options.seed), nprocs=PROCESSES)
    print(f"train: done; now `python -m demo_model.evaluate --model {directory}`")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
