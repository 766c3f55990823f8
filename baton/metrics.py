"""Every metric of every part: names, meaning, buckets. Nobody else makes one.

Engine figures carry the `vllm:` names that dashboards and gateways already read; what is Baton's alone is
`baton_`. A process makes one `Metrics` of its own and serves its registry on /metrics.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.5,
            5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)  # fmt: skip
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)

BLOCK_STATES = ("free", "cached", "active", "offered", "landing", "quarantined")


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    def render(self) -> bytes:
        """The registry in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(name, what, labels, registry=self.registry)

    def _gauge(self, name: str, what: str, *labels: str) -> Gauge:
        return Gauge(name, what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, what, labels, registry=self.registry, buckets=buckets)


class RequestMetrics:
    """What a request feels. Observed by the router, as its clients feel it, and by each worker for its share."""

    def __init__(self, metrics: Metrics, model_name: str) -> None:
        label = {"model_name": model_name}
        histogram = metrics._histogram
        self.time_to_first_token = histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", _SECONDS, "model_name"
        ).labels(**label)
        self.inter_token_latency = histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens of one stream.", _SECONDS, "model_name"
        ).labels(**label)
        self.e2e_request_latency = histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the end.", _SECONDS, "model_name"
        ).labels(**label)
        self.request_prompt_tokens = histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS, "model_name"
        ).labels(**label)
        self.request_generation_tokens = histogram(
            "vllm:request_generation_tokens", "Generated tokens of a request.", _TOKENS, "model_name"
        ).labels(**label)
        self._success = metrics._counter(
            "vllm:request_success", "Requests ended, by reason.", "model_name", "finished_reason"
        )
        self._model_name = model_name
        self.prompt_tokens = metrics._counter("vllm:prompt_tokens", "Prompt tokens taken.", "model_name").labels(
            **label
        )
        self.generation_tokens = metrics._counter("vllm:generation_tokens", "Tokens generated.", "model_name").labels(
            **label
        )

    def ended(self, reason: str) -> None:
        self._success.labels(model_name=self._model_name, finished_reason=reason).inc()


class EngineMetrics:
    """One engine's figures, brought up to date once a step."""

    def __init__(self, metrics: Metrics, model_name: str) -> None:
        label = {"model_name": model_name}
        self.num_requests_running = metrics._gauge(
            "vllm:num_requests_running", "Requests in the batch.", "model_name"
        ).labels(**label)
        self.num_requests_waiting = metrics._gauge(
            "vllm:num_requests_waiting", "Requests that wait to be computed.", "model_name"
        ).labels(**label)
        self.num_requests_swapped = metrics._gauge(
            "vllm:num_requests_swapped", "Of those that wait: preempted, with their KV in host memory.", "model_name"
        ).labels(**label)
        self.kv_cache_usage_perc = metrics._gauge(
            "vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", "model_name"
        ).labels(**label)
        self.prefix_cache_queries = metrics._counter(
            "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", "model_name"
        ).labels(**label)
        self.prefix_cache_hits = metrics._counter(
            "vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", "model_name"
        ).labels(**label)
        self.num_preemptions = metrics._counter(
            "vllm:num_preemptions", "Requests preempted for want of blocks.", "model_name"
        ).labels(**label)
        self.iteration_tokens = metrics._histogram(
            "vllm:iteration_tokens_total", "Tokens computed in one step.", _TOKENS, "model_name"
        ).labels(**label)
        self.step_seconds = metrics._histogram("baton_step_seconds", "One engine step.", _SECONDS)
        self.prefill_budget = metrics._gauge(
            "baton_prefill_budget_tokens", "Prompt tokens that the last step had room for beside its streams."
        )
        self.step_prediction_error = metrics._gauge(
            "baton_step_prediction_error",
            "How far steps with streams and chunks came out from their predicted time, as a share, on average.",
        )
        blocks = metrics._gauge("baton_kv_blocks", "KV blocks by state; they add up to the pool.", "state")
        self.kv_blocks = {state: blocks.labels(state=state) for state in BLOCK_STATES}


class TransferMetrics:
    """One worker's transfers, as source and as destination."""

    def __init__(self, metrics: Metrics) -> None:
        self.transfers = metrics._gauge(
            "baton_kv_transfers", "Live block sets by state; terminal states are counted in *_ended.", "state"
        )
        self.ended = metrics._counter("baton_kv_transfers_ended", "Block sets by terminal state.", "state")
        self.bytes = metrics._counter("baton_kv_transfer_bytes", "Bytes of KV blocks pulled.", "transport")
        self.hidden_bytes = metrics._counter(
            "baton_kv_transfer_hidden_bytes",
            "Of the bytes pulled, those that had landed when their source had computed the whole prompt.",
            "transport",
        )
        self.relaid_bytes = metrics._counter(
            "baton_kv_relaid_bytes", "Of those pulled: bytes that came in another layout and were re-laid."
        )
        self.seconds = metrics._histogram(
            "baton_kv_transfer_seconds", "From claim to commit of a block set.", _SECONDS, "transport"
        )
        self.verify_failures = metrics._counter(
            "baton_kv_verify_failures", "Blocks that arrived other than they were sent.", "reason"
        )
        self.refused = metrics._counter("baton_kv_refused", "Claims and messages refused.", "reason")


class WorkerMetrics:
    def __init__(self, metrics: Metrics) -> None:
        self.prefix_fetches = metrics._counter(
            "baton_prefix_fetches", "Beginnings of prompts asked for at another worker.", "outcome"
        )
        self.stale_messages = metrics._counter(
            "baton_stale_messages", "Messages of an attempt or incarnation that is over.", "kind"
        )


class RouterMetrics:
    def __init__(self, metrics: Metrics) -> None:
        self.requests_open = metrics._gauge("baton_requests_open", "Requests that have had no terminal reply yet.")
        self.requests_resumed = metrics._counter(
            "baton_requests_resumed", "Times a stream went on after its worker or its handoff was lost."
        )
        self.requests_moved = metrics._counter(
            "baton_requests_moved", "Times a stream went on elsewhere because its worker was draining."
        )
        self.placements = metrics._counter("baton_placements", "Requests placed, by way.", "way")
        self.predicted_cached_tokens = metrics._counter(
            "baton_predicted_cached_tokens", "Prompt tokens that the directory said are cached."
        )
        self.actual_cached_tokens = metrics._counter(
            "baton_actual_cached_tokens", "Prompt tokens that then were found cached."
        )
        self.stale_messages = metrics._counter(
            "baton_stale_messages", "Messages of an attempt or incarnation that is over.", "kind"
        )
        self.redis_up = metrics._gauge("baton_redis_up", "1 while Redis answers.")
        self.workers = metrics._gauge("baton_workers", "Workers by role and state.", "role", "state")
