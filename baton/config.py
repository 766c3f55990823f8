"""Every setting of every part: its name, its default, its meaning and its bounds.

A setting is a field of a frozen dataclass; dataclasses are composed. `parse` (baton/flags.py) makes the command line
from them. Where vLLM has a flag for the same thing, ours has its name.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from baton.flags import at_least, parse, setting, to_argv

__all__ = ["parse", "to_argv"]

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
TRANSPORTS = ("auto", "shm", "tcp", "cuda_ipc", "nixl")
GPU_MEMORY_UTILIZATION = 0.9

_PORT: dict[str, Any] = {"check": lambda value: 0 <= value <= 65535, "right": "between 0 (pick a free one) and 65535"}
_POSITIVE_OR_AUTO: dict[str, Any] = {
    "check": lambda value: value >= 0,
    "right": "a positive number, or 0 to choose by itself",
}


@dataclass(frozen=True)
class ModelConfig:
    model: str = setting("", "Hugging Face directory or hub id; without it, the model in the box")
    served_model_name: str = setting("", "name that requests ask for; without it, the model's own")
    dtype: str = setting("auto", "dtype of weights and KV; auto: the checkpoint's", choices=DTYPES)
    max_model_len: int = setting(
        0, "longest prompt and answer together, in tokens; 0: the model's own limit", **_POSITIVE_OR_AUTO
    )
    device: str = setting("auto", "auto: cuda where there is one", choices=DEVICES)
    threads: int = setting(0, "CPU threads for torch; 0: all cores, which `baton up` shares out", **_POSITIVE_OR_AUTO)


@dataclass(frozen=True)
class CacheConfig:
    block_size: int = setting(16, "tokens of one KV block", **at_least(1))
    kv_blocks: int = setting(0, "blocks of the KV pool; 0: as many as memory sensibly allows", **_POSITIVE_OR_AUTO)
    gpu_memory_utilization: float = setting(
        0.0,
        f"part of a GPU's memory that a worker may take, for weights, KV and steps; 0: {GPU_MEMORY_UTILIZATION}, which "
        "`baton up` shares out",
        check=lambda value: 0 <= value <= 1,
        right="from 0 to 1",
    )
    swap_space: float = setting(
        1.0, "GiB of host memory for the KV of preempted requests; 0: it is computed again", **at_least(0)
    )
    enable_prefix_caching: bool = setting(True, "keep the blocks of finished requests for others to hit")


@dataclass(frozen=True)
class SchedulerConfig:
    max_num_seqs: int = setting(0, "most requests in one step; 0: 64, on a GPU 256", **_POSITIVE_OR_AUTO)
    max_num_batched_tokens: int = setting(0, "most tokens in one step; 0: 2048, on a GPU 8192", **_POSITIVE_OR_AUTO)
    itl_objective_ms: float = setting(
        200.0,
        "longest that prompts may make an open stream wait for its next token: sets the chunk size; 0: no limit",
        **at_least(0),
    )

    def on(self, device_type: str) -> SchedulerConfig:
        """With the sizes that are left to the device chosen for it: "cpu" or "cuda"."""
        seqs, tokens = (256, 8192) if device_type == "cuda" else (64, 2048)
        seqs = self.max_num_seqs or min(seqs, self.max_num_batched_tokens or seqs)  # a step computes a token of each
        return replace(self, max_num_seqs=seqs, max_num_batched_tokens=self.max_num_batched_tokens or max(tokens, seqs))


@dataclass(frozen=True)
class TransferConfig:
    transport: str = setting(
        "auto",
        "how blocks move; auto: cuda_ipc on one GPU, shm on one host, tcp else; nixl only where asked for",
        choices=TRANSPORTS,
    )
    lease_seconds: float = setting(10.0, "how long offered blocks wait for a claim or its renewal", **at_least(0.1))


@dataclass(frozen=True)
class DiscoveryConfig:
    redis_url: str = setting("", "redis://HOST:PORT/DB of a running server")
    namespace: str = setting("baton", "keeps systems that share one Redis apart")
    heartbeat_seconds: float = setting(
        1.0, "how often a worker renews its record; it is gone after three missed", **at_least(0.05)
    )


@dataclass(frozen=True)
class LogConfig:
    log_level: str = setting("info", "least severity that is logged", choices=("debug", "info", "warning", "error"))


@dataclass(frozen=True)
class WorkerConfig:
    """`baton prefill` and `baton decode`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    discovery: DiscoveryConfig = field(default_factory=DiscoveryConfig)
    log: LogConfig = field(default_factory=LogConfig)
    worker_id: str = setting("", "unique name; without it, role, host and process id")
    host: str = setting("127.0.0.1", "address to listen on")
    advertise_host: str = setting("", "host that others reach this worker by; without it, --host")
    grpc_port: int = setting(0, "port of the gRPC server; 0: any free one", **_PORT)
    metrics_port: int = setting(0, "port of /metrics; 0: any free one", **_PORT)
    drain_seconds: float = setting(30.0, "how long open requests may take to end after SIGTERM", **at_least(0))


@dataclass(frozen=True)
class WarmupConfig:
    """`baton warmup`: with the flags of the workers whose start it spares compiling."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    log: LogConfig = field(default_factory=LogConfig)
    gpu: str = setting("", "as CUDA calls it, such as 'NVIDIA H200'; without it, this machine's")
    compute_capability: int = setting(0, "of the GPU, such as 90; 0: what is known of --gpu", **_POSITIVE_OR_AUTO)


@dataclass(frozen=True)
class DecodeConfig(WorkerConfig):
    unified: bool = setting(False, "be offered whole prompts, too")


@dataclass(frozen=True)
class RoutingConfig:
    local_prefill_tokens: int = setting(
        64,
        "an uncached prompt suffix of at most so many tokens is prefilled on the decode worker",
        **at_least(0),
    )
    fetch_prefix_tokens: int = setting(
        256,
        "least tokens of a prompt's beginning that are fetched from a worker which holds them; 0: never",
        **at_least(0),
    )
    request_timeout_seconds: float = setting(600.0, "deadline of requests that bring none", **at_least(0.001))
    resume_timeout_seconds: float = setting(
        30.0, "how long a stream that lost its worker waits for another", **at_least(0)
    )
    max_waiting_requests: int = setting(4096, "requests open at once; more are refused", **at_least(1))


@dataclass(frozen=True)
class RouterConfig:
    """`baton router`."""

    model: str = setting("", "directory or hub id of the tokenizer; without it, what the workers serve")
    discovery: DiscoveryConfig = field(default_factory=DiscoveryConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    log: LogConfig = field(default_factory=LogConfig)
    host: str = setting("127.0.0.1", "address to listen on")
    grpc_port: int = setting(50051, "port of the gRPC door; 0: any free one", **_PORT)
    http_port: int = setting(8000, "port of the HTTP door; 0: any free one", **_PORT)
    max_message_bytes: int = setting(4 * 1024 * 1024, "largest request that is read", **at_least(1024))
    drain_seconds: float = setting(30.0, "how long open requests may take to end after SIGTERM", **at_least(0))


@dataclass(frozen=True)
class UpConfig:
    """`baton up`: a whole system on one machine."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    discovery: DiscoveryConfig = field(default_factory=DiscoveryConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    log: LogConfig = field(default_factory=LogConfig)
    prefill: int | None = setting(None, "prefill workers; 1 unless --unified is given", **at_least(0))
    decode: int | None = setting(None, "decode workers; 1 unless --unified is given", **at_least(0))
    unified: int | None = setting(None, "workers that do both", **at_least(0))
    host: str = setting("127.0.0.1", "address to listen on")
    grpc_port: int = setting(50051, "port of the gRPC door; 0: any free one", **_PORT)
    http_port: int = setting(8000, "port of the HTTP door; 0: any free one", **_PORT)
    drain_seconds: float = setting(30.0, "how long open requests may take to end after SIGTERM", **at_least(0))


@dataclass(frozen=True)
class ClientConfig:
    target: str = setting("127.0.0.1:50051", "HOST:PORT of the router's gRPC door")


@dataclass(frozen=True)
class AskConfig(ClientConfig):
    model: str = setting("", "served model name; without it, the one that is served")
    temperature: float = setting(0.0, "0 is greedy")
    top_p: float = setting(1.0, "smallest set of likely tokens with this much probability")
    seed: int | None = setting(None, "same seed, same answer; without it, a new one each time")
    timeout: float = setting(600.0, "seconds until the deadline of an answer", **at_least(0.001))


@dataclass(frozen=True)
class GenerateConfig(AskConfig):
    """`baton generate`: streams one answer to the terminal."""

    prompt: str = setting("", "the prompt's text", positional=True)
    token_ids: str = setting("", "the prompt as comma-separated token ids, in place of text")
    max_tokens: int = setting(128, "tokens to generate at most")
    min_tokens: int = setting(0, "tokens to generate at least")
    top_k: int = setting(0, "the most likely tokens only; 0: all")
    stop: str = setting("", "the answer ends before this string")
    ignore_eos: bool = setting(False, "go on past the model's end-of-sequence tokens")
    json: bool = setting(False, "print one JSON object")


@dataclass(frozen=True)
class ChatConfig(AskConfig):
    """`baton chat`: talks. Each line is a turn; /help there lists what else it takes."""

    system: str = setting("", "what the model is told before the conversation")
    max_tokens: int = setting(512, "tokens of an answer at most", **at_least(1))


@dataclass(frozen=True)
class StatusConfig(ClientConfig):
    """`baton status`: shows the system as the router sees it."""

    json: bool = setting(False, "print one JSON object")
