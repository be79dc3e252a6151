"""Arguments of vLLM that are no settings here: those that change nothing, and those that wait for their feature.

Each is known by its Python name; a flag has dashes for underscores. The command line, files of settings, FAIRLEAD_*
variables, `LLM` and docs/migration.md all go by these tables.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fairlead.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Awaited:
    """An argument that waits for its feature: it may be given at one of its neutral values alone.

    Its first neutral value tells its kind: one that is False by default is a switch, on the command line without a
    value. `short` is the flag with one dash.
    """

    name: str
    feature: str
    neutral: tuple[object, ...] = ()
    short: str | None = None

    @property
    def is_switch(self) -> bool:
        return self.neutral == (False,)

    def check(self, value: object) -> None:
        """Raises ConfigError on any other value than a neutral one; text, as a flag has it, is compared as text."""
        if value is not None and str(value).lower() not in {str(neutral).lower() for neutral in self.neutral}:
            values = "" if self.is_switch else " or ".join(str(neutral) for neutral in self.neutral)
            hint = f"leave it out or give {values}" if values else "leave it out"
            raise ConfigError(f"{self.name}={value!r:.60}: {self.feature} is not there yet; {hint}")


# They ask for what Fairlead does anyway, or for what it has no need of.
ACCEPTED = (
    *("disable_log_requests", "disable_log_stats", "enable_chunked_prefill", "no_ui", "disable_fastapi_docs"),
    *("disable_frontend_multiprocessing", "disable_custom_all_reduce", "use_v2_block_manager", "use_tqdm_on_load"),
    *("enable_request_id_headers", "enable_tokenizer_info_endpoint", "enable_server_load_tracking"),
    *("enable_prompt_tokens_details", "disable_async_output_proc", "disable_cascade_attn"),
    *("disable_hybrid_kv_cache_manager", "disable_mm_preprocessor_cache", "disable_chunked_mm_input"),
)
TRUST_REMOTE_CODE = "trust_remote_code"  # accepted, and answered with a word: no code of a checkpoint is ever run

_FEATURES: Mapping[str, tuple[str, ...]] = {  # name, or name:short; a switch ends in !
    "parallelism above 1": (
        *("data_parallel_size_local:dpl", "data_parallel_address:dpa", "data_parallel_rpc_port:dpp"),
        *("data_parallel_rank:dpn", "data_parallel_start_rank:dpr", "data_parallel_backend:dpb"),
        *("data_parallel_hybrid_lb!:dph", "data_parallel_external_lb!:dpe", "enable_expert_parallel!:ep"),
        *("enable_eplb!", "eplb_config", "num_redundant_experts", "all2all_backend", "expert_placement_strategy"),
        *("enable_dbo!", "master_addr", "master_port", "headless!", "max_parallel_loading_workers"),
        *("worker_use_ray!", "engine_use_ray!", "ray_workers_use_nsight!", "worker_extension_cls"),
        *("enable_multimodal_encoder_data_parallel!", "mm_encoder_tp_mode"),
    ),
    "speculative decoding": (
        *("speculative_config:sc", "speculative_model", "num_speculative_tokens", "speculative_model_quantization"),
        *("ngram_prompt_lookup_max", "ngram_prompt_lookup_min", "speculative_max_model_len"),
        *("speculative_draft_tensor_parallel_size:spec-draft-tp", "speculative_disable_by_batch_size"),
        *("speculative_disable_mqa_scorer!", "spec_decoding_acceptance_method"),
        *("typical_acceptance_sampler_posterior_threshold", "typical_acceptance_sampler_posterior_alpha"),
        *("disable_logprobs_during_spec_decoding!",),
    ),
    "serving of LoRA adapters": (
        *("enable_lora!", "lora_modules", "max_loras", "max_lora_rank", "max_cpu_loras", "lora_dtype"),
        *("lora_extra_vocab_size", "long_lora_scaling_factors", "fully_sharded_loras!", "enable_lora_bias!"),
        *("default_mm_loras", "enable_prompt_adapter!", "prompt_adapters", "max_prompt_adapters"),
        *("max_prompt_adapter_token", "qlora_adapter_name_or_path"),
    ),
    "tool calling": (
        *("enable_auto_tool_choice!", "tool_call_parser", "tool_parser_plugin", "tool_server"),
        *("exclude_tools_when_tool_choice_none!",),
    ),
    "parsing of reasoning": ("enable_reasoning!", "reasoning_parser", "reasoning_parser_plugin"),
    "sleep mode": ("enable_sleep_mode!",),
    "offloading of weights": ("cpu_offload_params", "offload_backend"),
    "prompts as embeddings": ("enable_prompt_embeds!", "enable_mm_embeds!"),
    "pooling and embedding": ("override_pooler_config", "pooler_config", "io_processor_plugin"),
    "input of images, audio and video": (
        *("limit_mm_per_prompt", "mm_processor_kwargs", "media_io_kwargs", "allowed_local_media_path"),
        *("allowed_media_domains", "mm_processor_cache_gb", "interleave_mm_strings!", "skip_mm_profiling!"),
        *("language_model_only!", "image_input_type", "image_token_id", "image_input_shape", "image_feature_size"),
    ),
    "transfer of KV blocks": ("kv_transfer_config", "kv_events_config", "kv_offloading_size", "ec_transfer_config"),
    "a change to a checkpoint's own config": (
        *("hf_overrides", "rope_scaling", "rope_theta", "hf_config_path", "override_generation_config"),
        *("disable_sliding_window!", "override_attention_dtype", "override_neuron_config"),
    ),
    "a revision of one part of a checkpoint": ("tokenizer_revision", "code_revision"),
    "tuning of compilation and graphs": (
        *("compilation_config:cc", "optimization_level:O", "max_seq_len_to_capture"),
        *("attention_config:ac", "additional_config"),
    ),
    "a logits processor of one's own": ("logits_processors", "logits_processor_pattern"),
    "a middleware of one's own": ("middleware",),
    "a path before the routes": ("root_path",),
    "a scheduler of one's own": ("scheduler_cls",),
    "logging of prompts and answers": (
        *("enable_log_requests!", "enable_log_outputs!", "max_log_len", "log_config_file"),
    ),
    "a change to what every answer holds": ("return_tokens_as_token_ids!", "enable_force_include_usage!"),
    "reloading of certificates": ("enable_ssl_refresh!",),
    "tuning of how weights are read": (
        *("model_loader_extra_config", "ignore_patterns", "pt_load_map_location", "quantization_param_path"),
    ),
    "scaling of an FP8 KV cache": ("calculate_kv_scales!", "kv_sharing_fast_prefill!"),
    "tuning of state-space models": ("mamba_cache_dtype", "mamba_ssm_cache_dtype", "mamba_block_size"),
    "tracing inside the engine": ("collect_detailed_traces", "show_hidden_metrics_for_version"),
    "a choice of block hashes": ("prefix_caching_hash_algo",),
    "a config of structured outputs (their backend is structured_outputs_backend)": ("structured_outputs_config",),
}
_WITH_NEUTRAL = (
    Awaited(name="tensor_parallel_size", neutral=(1,), feature="parallelism above 1", short="tp"),
    Awaited(name="pipeline_parallel_size", neutral=(1,), feature="parallelism above 1", short="pp"),
    Awaited(name="data_parallel_size", neutral=(1,), feature="parallelism above 1", short="dp"),
    Awaited(name="decode_context_parallel_size", neutral=(1,), feature="parallelism above 1", short="dcp"),
    Awaited(name="prefill_context_parallel_size", neutral=(1,), feature="parallelism above 1", short="pcp"),
    Awaited(name="nnodes", neutral=(1,), feature="parallelism above 1", short="n"),
    Awaited(name="node_rank", neutral=(0,), feature="parallelism above 1", short="r"),
    Awaited(name="api_server_count", neutral=(1,), feature="parallelism above 1", short="asc"),
    Awaited(name="distributed_executor_backend", neutral=("mp", "uni"), feature="parallelism above 1"),
    Awaited(name="worker_cls", neutral=("auto",), feature="a worker of one's own"),
    Awaited(name="tokenizer_mode", neutral=("auto", "hf"), feature="another tokenizer mode"),
    Awaited(name="tokenizer_pool_size", neutral=(0,), feature="a pool of tokenizers"),
    Awaited(name="cpu_offload_gb", neutral=(0, 0.0), feature="offloading of weights"),
    Awaited(name="task", neutral=("auto", "generate"), feature="pooling and embedding"),
    Awaited(name="runner", neutral=("auto", "generate"), feature="pooling and embedding"),
    Awaited(name="convert", neutral=("auto", "none"), feature="pooling and embedding"),
    Awaited(name="model_impl", neutral=("auto",), feature="a choice of the model's code"),
    Awaited(name="config_format", neutral=("auto", "hf"), feature="another format of configs"),
    Awaited(name="max_logprobs", neutral=(20,), feature="another limit on logprobs"),
    Awaited(name="logprobs_mode", neutral=("raw_logprobs",), feature="another kind of logprobs"),
    Awaited(name="response_role", neutral=("assistant",), feature="another role of answers"),
    Awaited(name="chat_template_content_format", neutral=("auto",), feature="a choice of the content's format"),
    Awaited(name="num_scheduler_steps", neutral=(1,), feature="scheduling of several steps at once"),
    Awaited(name="multi_step_stream_outputs", neutral=("true",), feature="scheduling of several steps at once"),
    Awaited(name="num_lookahead_slots", neutral=(0,), feature="scheduling of several steps at once"),
    Awaited(name="max_num_partial_prefills", neutral=(1,), feature="a limit on partial prefills"),
    Awaited(name="max_long_partial_prefills", neutral=(1,), feature="a limit on partial prefills"),
    Awaited(name="scheduler_delay_factor", neutral=(0, 0.0), feature="waiting for fuller batches"),
    Awaited(name="stream_interval", neutral=(1,), feature="streaming of several tokens at once"),
    Awaited(name="preemption_mode", neutral=("recompute",), feature="a choice of preemption"),
    Awaited(name="safetensors_load_strategy", neutral=("lazy",), feature="tuning of how weights are read"),
)


def _read_features() -> Iterator[Awaited]:
    for feature, names in _FEATURES.items():
        for entry in names:
            name, _, short = entry.partition(":")
            neutral = (False,) if name.endswith("!") else ()
            yield Awaited(name=name.rstrip("!"), feature=feature, neutral=neutral, short=short or None)


AWAITED = (*_WITH_NEUTRAL, *_read_features())


_BY_NAME = {awaited.name: awaited for awaited in AWAITED}


def absorbed(name: str, value: object) -> bool:
    """Whether an argument asks for nothing: one that changes nothing, or that waits and is at its neutral value.

    Raises ConfigError on any other value of one that waits.
    """
    if name in ACCEPTED or name == TRUST_REMOTE_CODE:
        return True
    awaited = _BY_NAME.get(name)
    if awaited is not None:
        awaited.check(value)
    return awaited is not None
