"""Every setting, once: the command line, YAML keys, FAIRLEAD_* variables and the docs are generated from these classes.

Nothing here imports torch. Configs are frozen; a changed one is derived with `dataclasses.replace`.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from fairlead.awaited import ACCEPTED as ACCEPTED
from fairlead.awaited import AWAITED as AWAITED
from fairlead.awaited import TRUST_REMOTE_CODE as TRUST_REMOTE_CODE
from fairlead.awaited import Awaited as Awaited
from fairlead.awaited import absorbed as absorbed
from fairlead.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_DTYPES = ("auto", "float32", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2")
METRICS_COMPAT = ("none", "vllm", "vllm-legacy")
QUANTIZATIONS = ("int8", "int4", "fp8")
AWAITED_QUANTIZATIONS = (  # of checkpoints that others have rounded; they wait for their readers
    *("awq", "awq_marlin", "gptq", "gptq_marlin", "gptq_bitblas", "auto-round", "auto_round", "compressed-tensors"),
    *("squeezellm", "fbgemm_fp8", "modelopt", "modelopt_fp4", "mxfp4", "bitsandbytes", "gguf", "quark", "torchao"),
)
LOAD_FORMATS = ("auto", "safetensors", "dummy")
_NO_CHOICE = ("auto",)  # how others spell that the device is left to the platform
_DTYPE_ALIASES = {"half": "float16", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def setting(
    default: Any, help: str, *, aliases: tuple[str, ...] = (), positional: bool = False, secret: bool = False
) -> Any:
    """A dataclass field with its one-sentence help and its other accepted spellings (without dashes).

    No repr shows a secret one.
    """
    metadata = {"help": help, "aliases": aliases, "positional": positional}
    return field(default=default, repr=not secret, metadata=metadata)


def _at_least(config: object, name: str, low: float, *, optional: bool = False) -> None:
    value = getattr(config, name)
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < low:
        raise ConfigError(f"{name} must be at least {low}, got {value!r}")


def _one_of(config: object, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which checkpoint, and how it is read."""

    model: str = setting("demo", "Directory, Hugging Face id, or 'demo' for the embedded model.", positional=True)
    tokenizer: str | None = setting(None, "Directory or id of the tokenizer, if not the model's own.")
    skip_tokenizer_init: bool = setting(False, "Load no tokenizer: prompts are token ids, and no text comes back.")
    revision: str | None = setting(None, "Branch, tag or commit of a Hugging Face id.")
    download_dir: str | None = setting(None, "Where downloads are cached, if not the Hugging Face cache.")
    dtype: str = setting("auto", f"Data type of weights and activations: {', '.join(DTYPES)}.")
    quantization: str | None = setting(
        None, f"Rounds linear weights while they are loaded: {', '.join(QUANTIZATIONS)}; none if not given."
    )
    load_format: str = setting("auto", "'safetensors', 'dummy' (random weights, for benchmarks) or 'auto'.")
    max_model_len: int | None = setting(None, "Longest sequence in tokens; the model's own limit if not given.")
    seed: int = setting(0, "Seed of requests that bring none.")
    generation_config: str = setting("auto", "'auto' takes sampling defaults from the model, 'fairlead' ignores them.")
    structured_outputs_backend: str = setting(
        "auto",
        "Grammar library: 'xgrammar', 'llguidance', or 'auto' for the best one that is installed.",
        aliases=("guided_decoding_backend",),
    )
    chat_template: str | None = setting(None, "File with a Jinja chat template, if not the tokenizer's own.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", _DTYPE_ALIASES.get(self.dtype, self.dtype))
        if self.generation_config == "vllm":
            object.__setattr__(self, "generation_config", "fairlead")
        if not self.model:
            raise ConfigError("model must name a directory, a Hugging Face id, or 'demo'")
        _one_of(self, "dtype", DTYPES)
        _one_of(self, "load_format", LOAD_FORMATS)
        _one_of(self, "generation_config", ("auto", "fairlead"))
        _one_of(self, "structured_outputs_backend", ("auto", "llguidance", "xgrammar"))
        _at_least(self, "max_model_len", 2, optional=True)
        if self.quantization is not None:
            if self.quantization.lower() in AWAITED_QUANTIZATIONS:
                raise ConfigError(
                    f"quantization={self.quantization!r}: published quantisation formats are not there yet; "
                    f"there are {', '.join(QUANTIZATIONS)}, made while the weights are loaded"
                )
            _one_of(self, "quantization", QUANTIZATIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """The paged KV cache."""

    block_size: int | None = setting(None, "Tokens per KV block; the platform's choice if not given.")
    device_memory_utilization: float | None = setting(
        None,
        "Share of the device's memory for weights and KV cache; the platform's choice if not given.",
        aliases=("gpu_memory_utilization",),
    )
    kv_cache_memory: int | None = setting(
        None, "Bytes for the KV cache, in place of a share of the memory.", aliases=("kv_cache_memory_bytes",)
    )
    num_blocks: int | None = setting(
        None, "Number of KV blocks, in place of a size.", aliases=("num_gpu_blocks_override",)
    )
    kv_cache_dtype: str = setting(
        "auto",
        f"Data type of the KV cache, where the platform has it: {', '.join(KV_DTYPES)}; 'auto' is the model's.",
    )
    enable_prefix_caching: bool = setting(True, "Reuse the KV blocks of equal prompt prefixes.")
    swap_space: float = setting(
        0.0, "GiB of host memory for KV blocks that the device has no room for; they come back if that saves time."
    )

    def __post_init__(self) -> None:
        for name in ("block_size", "num_blocks", "kv_cache_memory"):
            _at_least(self, name, 1, optional=True)
        _at_least(self, "swap_space", 0)
        _one_of(self, "kv_cache_dtype", KV_DTYPES)
        share = self.device_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise ConfigError(f"device_memory_utilization must be in (0, 1], got {share!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What one step may hold."""

    max_num_seqs: int = setting(
        256, "Sequences that run at the same time, at most; the platform may have a lower limit."
    )
    max_num_batched_tokens: int | None = setting(
        None, "Tokens of one step, at most; longer prompts are computed in chunks. The platform's choice if not given."
    )
    long_prefill_token_threshold: int | None = setting(
        None, "Tokens of one prompt in one step, at most, so that others start beside it; no limit if not given."
    )
    scheduling_policy: str = setting(
        "fcfs", "'fcfs' (order of arrival), 'priority' (lower numbers first), or the name of an installed policy."
    )
    priority_aging_s: float = setting(
        60.0, "Seconds of waiting that outweigh one level of priority, so that nobody starves."
    )
    async_scheduling: bool | None = setting(
        None, "Prepare a step while the one before it runs; the platform's choice if not given."
    )

    def __post_init__(self) -> None:
        _at_least(self, "max_num_seqs", 1)
        _at_least(self, "max_num_batched_tokens", 1, optional=True)
        _at_least(self, "long_prefill_token_threshold", 1, optional=True)
        _at_least(self, "priority_aging_s", 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformConfig:
    """Where it runs."""

    platform: str | None = setting(
        None, "Platform plugin, as `fairlead platforms` lists it; the best one if not given."
    )
    device: str | None = setting(
        None, "Device of that platform, such as 'cpu:0'; its first one if not given, or if it is the platform's name."
    )
    attention_backend: str | None = setting(None, "Attention backend of the platform, by name.")
    enforce_eager: bool = setting(False, "Run every step as it comes, and capture none as a graph.")
    op_providers: tuple[str, ...] = setting((), "Providers of single ops as OP=PROVIDER, such as rms_norm=reference.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "op_providers", tuple(self.op_providers))
        object.__setattr__(self, "device", self.device if self.device not in _NO_CHOICE else None)
        for item in self.op_providers:
            if item.count("=") != 1:
                raise ConfigError(f"op_providers takes OP=PROVIDER, got {item!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """All settings of an engine. `EngineConfig.of(model="demo", block_size=16)` sorts flat names into sections."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    platform: PlatformConfig = field(default_factory=PlatformConfig)

    @classmethod
    def of(cls, **settings: Any) -> "EngineConfig":
        """Builds a config from flat setting names or their aliases; raises ConfigError on an unknown name.

        Names of vLLM's that change nothing here are taken; those that wait for a feature are refused by name.
        """
        sections: dict[str, dict[str, Any]] = {f.name: {} for f in dataclasses.fields(cls)}
        homes = {name: s for s in engine_settings() for name in (s.name, *s.aliases)}
        for name, value in settings.items():
            if name not in homes and absorbed(name, value):
                continue
            if name not in homes:
                close = difflib.get_close_matches(name, homes, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ConfigError(f"there is no setting {name!r}{hint}")
            sections[homes[name].section][homes[name].name] = value
        hints = get_type_hints(cls)
        return cls(**{name: hints[name](**values) for name, values in sections.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The HTTP server."""

    host: str = setting("127.0.0.1", "Address to listen on.")
    port: int = setting(8000, "Port to listen on.")
    uds: str | None = setting(None, "Path of a Unix socket to listen on, in place of host and port.")
    served_model_name: tuple[str, ...] = setting(
        (), "Names of the model in the API, if not the one it was loaded by; answers bear the one that was asked for."
    )
    api_key: tuple[str, ...] = setting(
        (), "Keys, one of which every request must then bring; /health needs none.", secret=True
    )
    api_key_file: str | None = setting(None, "File with one such key per line.")
    metrics_without_key: bool = setting(False, "Show /metrics to requests that bring no key.")
    ssl_certfile: str | None = setting(None, "PEM file of the server's certificate; HTTPS then replaces HTTP.")
    ssl_keyfile: str | None = setting(None, "PEM file of the certificate's key, if it is not in the same file.")
    ssl_keyfile_password: str | None = setting(None, "Password of the key file.", secret=True)
    ssl_ca_certs: str | None = setting(None, "PEM file of the authorities that sign the certificates of clients.")
    ssl_cert_reqs: int = setting(0, "Certificates of clients: 0 asks for none, 1 takes one, 2 needs one.")
    cors_origins: tuple[str, ...] = setting(
        (), "Origins whose pages may call the server, or '*'; none if not given.", aliases=("allowed_origins",)
    )
    cors_methods: tuple[str, ...] = setting(
        ("GET", "POST"), "Methods that those pages may use.", aliases=("allowed_methods",)
    )
    cors_headers: tuple[str, ...] = setting(
        ("authorization", "content-type", "x-api-key", "x-request-id"),
        "Headers that those pages may send.",
        aliases=("allowed_headers",),
    )
    cors_credentials: bool = setting(False, "Let those pages send cookies.", aliases=("allow_credentials",))
    trust_chat_template: bool = setting(
        False,
        "Render a chat with the template that its request brings: a sandboxed program that may run for long.",
        aliases=("trust_request_chat_template",),
    )
    max_queued_requests: int = setting(1024, "Requests that may wait for their first step; more are refused with 429.")
    max_queue_time: float | None = setting(None, "Seconds that a request may wait for its first step.")
    max_request_time: float | None = setting(None, "Seconds that a request may take from its arrival to its end.")
    shutdown_timeout: float = setting(30.0, "Seconds that requests in flight have to end after SIGTERM or SIGINT.")
    metrics_compat: str = setting(
        "vllm", f"Names of the metrics beside fairlead's own: {', '.join(METRICS_COMPAT)} (with those of old releases)."
    )
    otlp_traces_endpoint: str | None = setting(
        None, "Where OpenTelemetry traces go, such as http://localhost:4318/v1/traces; needs fairlead[otel]."
    )
    log_format: str = setting("text", "text or json, a line each, on standard error.")
    log_level: str = setting("info", "debug, info, warning or error.", aliases=("uvicorn_log_level",))
    access_log: bool = setting(True, "Log a line for every request, but for probes, from level info on.")

    def __post_init__(self) -> None:
        for name in ("served_model_name", "api_key", "cors_origins", "cors_methods", "cors_headers"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be from 0 to 65535, got {self.port}")
        _one_of(self, "log_level", ("debug", "info", "warning", "error"))
        _one_of(self, "log_format", ("text", "json"))
        _one_of(self, "metrics_compat", METRICS_COMPAT)
        _at_least(self, "max_queued_requests", 1)
        for name in ("max_queue_time", "max_request_time"):
            _at_least(self, name, 0.001, optional=True)
        _at_least(self, "shutdown_timeout", 0)
        if self.ssl_cert_reqs not in (0, 1, 2):
            raise ConfigError(f"ssl_cert_reqs must be 0, 1 or 2, got {self.ssl_cert_reqs}")
        if self.ssl_certfile is None and (self.ssl_keyfile is not None or self.ssl_ca_certs is not None):
            raise ConfigError("ssl_keyfile and ssl_ca_certs need ssl_certfile, the server's own certificate")
        if "" in self.api_key:
            raise ConfigError("api_key is empty; give a key, or leave it out")
        if self.cors_credentials and "*" in self.cors_origins:
            raise ConfigError("cors_credentials needs cors_origins by name, not '*'")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting as the command line and the docs see it."""

    name: str
    section: str
    type: Any
    default: Any
    help: str
    aliases: tuple[str, ...]
    positional: bool


def settings_of(section: str, cls: type) -> Iterator[Setting]:
    """The settings of one config class, in order of declaration."""
    hints = get_type_hints(cls)
    for f in dataclasses.fields(cls):
        meta: Mapping[str, Any] = f.metadata
        yield Setting(
            name=f.name,
            section=section,
            type=hints[f.name],
            default=f.default,
            help=meta["help"],
            aliases=meta["aliases"],
            positional=meta["positional"],
        )


def engine_settings() -> Iterator[Setting]:
    """All settings of EngineConfig, section by section."""
    for section, cls in get_type_hints(EngineConfig).items():
        yield from settings_of(section, cls)
