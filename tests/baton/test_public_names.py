"""What users, dashboards and gateways hold on to: flags, metric names and gRPC names stay as they are."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from baton.config import (
    ChatConfig,
    DecodeConfig,
    GenerateConfig,
    RouterConfig,
    StatusConfig,
    UpConfig,
    WorkerConfig,
    parse,
)
from baton.metrics import (
    BLOCK_STATES,
    EngineMetrics,
    Metrics,
    RequestMetrics,
    RouterMetrics,
    TransferMetrics,
    WorkerMetrics,
)
from baton.v1 import inference_pb2, transfer_pb2, worker_pb2

ENGINE_NAMES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "baton_kv_blocks",
    "baton_prefill_budget_tokens",
    "baton_step_prediction_error",
}
REQUEST_NAMES = {
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
}
TRANSFER_NAMES = {
    "baton_kv_transfers",
    "baton_kv_transfer_bytes_total",
    "baton_kv_transfer_seconds_bucket",
    "baton_kv_verify_failures_total",
}


def _names(metrics: Metrics) -> set[str]:
    """Of all samples, and of those whose labels nobody has used yet."""
    families = list(text_string_to_metric_families(metrics.render().decode()))
    unused = {f.name + ("_total" if f.type == "counter" else "") for f in families if not f.samples}
    unused |= {f"{f.name}_bucket" for f in families if not f.samples and f.type == "histogram"}
    return {sample.name for f in families for sample in f.samples} | unused


def test_a_worker_has_the_public_metrics() -> None:
    metrics = Metrics()
    EngineMetrics(metrics, "m")
    RequestMetrics(metrics, "m")
    TransferMetrics(metrics)
    WorkerMetrics(metrics)
    wanted = ENGINE_NAMES | REQUEST_NAMES | TRANSFER_NAMES | {"baton_stale_messages_total"}
    assert wanted - _names(metrics) == set()


def test_the_router_has_the_public_metrics() -> None:
    metrics = Metrics()
    RequestMetrics(metrics, "m")
    RouterMetrics(metrics)
    wanted = REQUEST_NAMES | {"baton_requests_resumed_total", "baton_stale_messages_total"}
    assert wanted - _names(metrics) == set()


def test_blocks_are_counted_in_every_state_from_the_start() -> None:
    metrics = Metrics()
    EngineMetrics(metrics, "m")
    (family,) = (f for f in text_string_to_metric_families(metrics.render().decode()) if f.name == "baton_kv_blocks")
    assert {s.labels["state"] for s in family.samples} == set(BLOCK_STATES)
    assert set(BLOCK_STATES) == {"free", "cached", "active", "offered", "landing", "quarantined"}


def test_every_metric_has_a_meaning_and_a_known_prefix() -> None:
    metrics = Metrics()
    EngineMetrics(metrics, "m")
    RequestMetrics(metrics, "m")
    TransferMetrics(metrics)
    RouterMetrics(metrics)
    for family in metrics.registry.collect():
        assert family.name.startswith(("vllm:", "baton_")), family.name
        assert family.documentation.endswith("."), f"{family.name}: {family.documentation}"


UP = (
    "--model=DIR --served-model-name=NAME --dtype=auto --prefill=2 --decode=3 --unified=1 --block-size=16 "
    "--kv-blocks=100 --max-model-len=512 --grpc-port=0 --http-port=0 --redis-url=redis://127.0.0.1:6379/0 "
    "--max-num-seqs=8 --max-num-batched-tokens=512 --itl-objective-ms=50"
)
GENERATE = (
    "PROMPT --token-ids=1,2,3 --max-tokens=5 --temperature=0.5 --top-p=0.9 --top-k=4 --seed=1 --ignore-eos "
    "--target=127.0.0.1:50051 --json"
)
CHAT = "--model=tiny --system=Brief. --temperature=0.5 --top-p=0.9 --seed=1 --max-tokens=5 --timeout=9 --target=h:1"


@pytest.mark.parametrize(
    ("cls", "line"),
    [
        (UpConfig, UP),
        (GenerateConfig, GENERATE),
        (ChatConfig, CHAT),
        (StatusConfig, "--target=127.0.0.1:1 --json"),
        (RouterConfig, "--redis-url=redis://r --grpc-port=1 --http-port=2"),
        (WorkerConfig, "--metrics-port=0 --redis-url=redis://r --model=DIR"),
        (DecodeConfig, "--unified --metrics-port=0"),
    ],
    ids=["up", "generate", "chat", "status", "router", "prefill", "decode"],
)
def test_public_flags_are_understood(cls: type[object], line: str) -> None:
    parse(cls, line.split(), prog="baton", environ={})


def test_default_ports_are_the_public_ones() -> None:
    assert (UpConfig().grpc_port, UpConfig().http_port) == (50051, 8000)
    assert UpConfig().cache.block_size == 16


def test_grpc_names() -> None:
    services = {
        name: [m.name for m in service.methods]
        for module in (inference_pb2, transfer_pb2, worker_pb2)
        for name, service in module.DESCRIPTOR.services_by_name.items()
    }
    assert services == {
        "Inference": ["Generate", "ListModels", "GetStatus"],
        "Transfer": ["Pull", "Keep", "Lend"],
        "Worker": ["Session"],
    }
    generate = inference_pb2.DESCRIPTOR.services_by_name["Inference"].methods_by_name["Generate"]
    assert generate.full_name == "baton.v1.Inference.Generate"
    assert generate.server_streaming
    assert not generate.client_streaming
