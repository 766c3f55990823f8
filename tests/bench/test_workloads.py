"""The workloads are what figures have been quoted for: their sizes and their very token ids are fixed."""

from __future__ import annotations

import hashlib
import json

from bench.workloads import FIRST_TOKEN_ID, Job, fixed, totals, w1, w2, w3

VOCAB_SIZE = 32000


def digest(jobs: list[Job]) -> str:
    return hashlib.sha256(json.dumps([(job.prompt, job.max_tokens) for job in jobs]).encode()).hexdigest()[:16]


def test_w1_is_the_one_that_figures_are_quoted_for() -> None:
    jobs = w1(VOCAB_SIZE)
    assert len(jobs) == 32
    assert totals(jobs) == (8264, 2584)
    assert digest(jobs) == "c9759ea2be32bf70"


def test_w3_is_the_one_that_figures_are_quoted_for() -> None:
    jobs = w3(VOCAB_SIZE)
    assert len(jobs) == 16
    assert totals(jobs) == (16896, 256)
    assert len({tuple(job.prompt[:1024]) for job in jobs}) == 1
    assert len({tuple(job.prompt[1024:]) for job in jobs}) == 16
    assert digest(jobs) == "477c7e622e6109a2"


def test_decode_steps_are_measured_with_the_prompts_that_figures_are_quoted_for() -> None:
    jobs = fixed(VOCAB_SIZE, num_requests=8)
    assert totals(jobs) == (8 * 128, 8 * 16)
    assert digest(jobs) == "52c694ee132a5f16"


def test_w2_lies_around_its_means() -> None:
    jobs = w2(VOCAB_SIZE, salt=0, num_requests=2000)
    assert {len(job.prompt) for job in jobs} == set(range(128, 385))
    assert {job.max_tokens for job in jobs} == set(range(32, 97))
    assert w2(VOCAB_SIZE, salt=0, num_requests=2000) == jobs
    assert [len(job.prompt) for job in w2(VOCAB_SIZE, salt=1, num_requests=2000)] != [len(job.prompt) for job in jobs]


def test_a_salt_changes_the_token_ids_and_no_size() -> None:
    for make in (w1, w3):
        plain, salted = make(VOCAB_SIZE, 0), make(VOCAB_SIZE, 1)
        assert [(len(j.prompt), j.max_tokens) for j in plain] == [(len(j.prompt), j.max_tokens) for j in salted]
        assert all(a.prompt[:16] != b.prompt[:16] for a, b in zip(plain, salted, strict=True))


def test_token_ids_are_of_the_vocabulary_and_no_special_ones() -> None:
    ids = {token for job in w1(400) for token in job.prompt}
    assert ids == set(range(FIRST_TOKEN_ID, 400))
