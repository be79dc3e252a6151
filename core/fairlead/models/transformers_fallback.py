"""Decoders without a file of their own here: transformers' modelling code, with our paged cache.

transformers looks its attention function up by name (`AttentionInterface`). Ours hands queries, keys and values to one
of our Attention layers, so a step runs as one row of T packed tokens with their positions and without a cache of
transformers'. What each layer needs is recorded by a dry run on the meta device, masks included; a model that needs
more than an AttentionSpec can say, or keeps any other state between tokens, is refused.

Shapes: T packed tokens, S sequences, H query heads, K kv-heads, D head size, E model width, V vocabulary; 1 is
transformers' batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, Protocol

import torch
from torch.nn import functional
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fairlead.checkpoint import Checkpoint
from fairlead.errors import CheckpointError, UnsupportedModelError
from fairlead.interface import AttentionSpec, MemoryAllocator
from fairlead.layers.attention import Attention
from fairlead.layers.context import BuildContext, Step
from fairlead.models.config import ModelShape, refuse_rounded_weights
from fairlead.models.progress import transformers_bar

ATTENTION = "fairlead"
DRY_RUN = "fairlead_dry_run"  # the same attention, but masks are made too, so that the dry run sees what they are
_KEYWORD = "fairlead_attend"
_DRY_TOKENS = 3
_SEQUENCE_DEPENDENT_ROPE = ("dynamic", "longrope")  # choose frequencies by the longest sequence of the batch
_LIKENESS = 0.99  # cosine; rounding in bfloat16 stays above 0.999
_HARMLESS = ("position_ids", "position_embeddings", "output_attentions", "output_hidden_states", "use_cache")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mask:
    """What a mask that transformers would have made says: causal, or causal within a window. No tensor."""

    window: int | None

    def __getattr__(self, name: str) -> object:
        raise UnsupportedModelError("alters its attention masks")

    def __getitem__(self, key: object) -> object:
        raise UnsupportedModelError("alters its attention masks")


class _Attend(Protocol):
    """What the attention function does with one layer's call: (1, H, T, D), … to (1, T, H, D)."""

    def __call__(
        self,
        module: torch.nn.Module,
        q_1HTD: torch.Tensor,
        k_1KTD: torch.Tensor,
        v_1KTD: torch.Tensor,
        mask: object,
        options: Mapping[str, Any],
    ) -> torch.Tensor: ...


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls for each layer; `options` hold the step, under `fairlead_attend`."""
    attend: _Attend | None = options.pop(_KEYWORD, None)
    if attend is None:
        raise UnsupportedModelError("does not pass keyword arguments on to its attention layers")
    return attend(module, query, key, value, attention_mask, options), None


def _dry_mask(*, mask_function: Callable[..., Any], local_size: int | None = None, **_: Any) -> _Mask:
    """Compares the mask that the model asks for with a causal one, and one of a window, at telling positions."""
    near = local_size or 64
    spots = [*range(70), *(n * near + d for n in (1, 2, 3, 7) for d in range(-3, 4)), 9000, 10**6]
    positions = torch.tensor(sorted({s for s in spots if s >= 0}), device="cpu")
    query, key = positions[:, None], positions[None, :]
    zero = torch.zeros((), dtype=torch.int64, device="cpu")
    try:
        asked: torch.Tensor = mask_function(zero, zero, query, key).expand(len(positions), len(positions))
        expected = key <= query
        if local_size is not None:
            expected &= key > query - local_size
        matches = torch.equal(asked, expected)
    except (RuntimeError, TypeError, IndexError, AttributeError):  # the mask depends on the tokens
        matches = False
    if not matches:
        raise UnsupportedModelError("masks its attention neither causally nor by a sliding window")
    return _Mask(window=local_size)


AttentionInterface.register(ATTENTION, _attention)
AttentionInterface.register(DRY_RUN, _attention)
AttentionMaskInterface.register(DRY_RUN, _dry_mask)


class _Recorder:
    """Notes the AttentionSpec of each layer that is called; its results have the right shape and no values."""

    def __init__(self) -> None:
        self.specs: dict[torch.nn.Module, AttentionSpec] = {}

    def __call__(
        self,
        module: torch.nn.Module,
        q_1HTD: torch.Tensor,
        k_1KTD: torch.Tensor,
        v_1KTD: torch.Tensor,
        mask: object,
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        if module in self.specs:
            raise UnsupportedModelError("calls one attention layer several times in a step")
        if k_1KTD.shape[2] != q_1HTD.shape[2]:
            raise UnsupportedModelError("attends to more than its own tokens")
        self.specs[module] = _spec(module, q_1HTD, k_1KTD, v_1KTD, mask, dict(options))
        return q_1HTD.new_empty((1, q_1HTD.shape[2], q_1HTD.shape[1], v_1KTD.shape[3]))


def _spec(
    module: torch.nn.Module,
    q_1HTD: torch.Tensor,
    k_1KTD: torch.Tensor,
    v_1KTD: torch.Tensor,
    mask: object,
    options: dict[str, Any],
) -> AttentionSpec:
    """The call as an AttentionSpec; raises UnsupportedModelError where it asks for more than one can say."""
    if options.pop("is_causal", None) not in (None, True) or getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError("has attention that is not causal")
    if not isinstance(mask, _Mask) and mask is not None:
        raise UnsupportedModelError("alters its attention masks")
    window = mask.window if isinstance(mask, _Mask) else None
    hinted = options.pop("sliding_window", None)
    if hinted is not None and window is None and isinstance(mask, _Mask):
        hinted = None  # a hint for kernels without masks; the mask says what is meant
    if hinted != window and hinted is not None:
        raise UnsupportedModelError(f"asks for a sliding window of {hinted} and for a mask of another")
    if options.pop("dropout", 0.0) not in (0.0, None):
        raise UnsupportedModelError("drops attention weights at random")
    scale, soft_cap = options.pop("scaling", None), options.pop("softcap", None)
    if options.pop("s_aux", None) is not None:
        raise UnsupportedModelError("has attention sinks (s_aux)")
    extra = [n for n, value in options.items() if value is not None and value is not False and n not in _HARMLESS]
    if extra:
        raise UnsupportedModelError(f"asks its attention function for {', '.join(extra)}")
    head_size = max(q_1HTD.shape[3], v_1KTD.shape[3])
    return AttentionSpec(
        num_heads=q_1HTD.shape[1],
        num_kv_heads=k_1KTD.shape[1],
        head_size=head_size,
        scale=float(q_1HTD.shape[3] ** -0.5 if scale is None else scale),
        sliding_window=window,
        soft_cap=soft_cap,
    )


class _Router:
    """One step's attention: each call goes to the Attention layer that stands for the calling module."""

    def __init__(self, attentions: Mapping[torch.nn.Module, Attention], step: Step) -> None:
        self._attentions, self._step = attentions, step

    def __call__(
        self,
        module: torch.nn.Module,
        q_1HTD: torch.Tensor,
        k_1KTD: torch.Tensor,
        v_1KTD: torch.Tensor,
        mask: object,
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        attention = self._attentions[module]
        value_size, size = v_1KTD.shape[3], attention.spec.head_size
        q_THD, k_TKD, v_TKD = (_packed(x, size) for x in (q_1HTD, k_1KTD, v_1KTD))
        out_THD: torch.Tensor = attention(q_THD, k_TKD, v_TKD, self._step)
        return out_THD[None, ..., :value_size].contiguous()


def _attend_within(lengths: tuple[int, ...]) -> _Attend:
    """Plain causal attention within each of several sequences in one row; too short for windows to matter."""

    def attend(
        module: torch.nn.Module,
        q_1HTD: torch.Tensor,
        k_1KTD: torch.Tensor,
        v_1KTD: torch.Tensor,
        mask: object,
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        repeat = q_1HTD.shape[1] // k_1KTD.shape[1]
        k_1HTD, v_1HTD = k_1KTD.repeat_interleave(repeat, dim=1), v_1KTD.repeat_interleave(repeat, dim=1)
        parts = zip(*(torch.split_with_sizes(x, lengths, dim=2) for x in (q_1HTD, k_1HTD, v_1HTD)), strict=True)
        outs = [functional.scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in parts]
        return torch.cat(outs, dim=2).transpose(1, 2).contiguous()

    return attend


def _packed(x_1HTD: torch.Tensor, size: int) -> torch.Tensor:
    """(T, H, size), zeros behind heads that are smaller (keys and values may differ; zeros change neither)."""
    x_THD = x_1HTD[0].transpose(0, 1)
    return functional.pad(x_THD, (0, size - x_THD.shape[2])) if x_THD.shape[2] < size else x_THD.contiguous()


@dataclass
class _DecoderOutput(BaseModelOutputWithPastAndCrossAttentions):
    """Hidden states, and None for everything else that a head might look at."""

    router_logits: None = None


class _WithHidden:
    """A causal LM as its own `forward` sees it, except that its decoder returns hidden states that are there already.

    What a class does behind its decoder (scalings, caps, the head) thus stays its own code, on chosen rows only.
    """

    def __init__(self, model: torch.nn.Module, decoder_name: str, hidden_1SE: torch.Tensor) -> None:
        self._model, self._decoder_name, self._hidden_1SE = model, decoder_name, hidden_1SE

    def __getattr__(self, name: str) -> object:
        return self._decoder if name == self._decoder_name else getattr(self._model, name)

    def _decoder(self, *args: object, **kwargs: object) -> _DecoderOutput:
        return _DecoderOutput(last_hidden_state=self._hidden_1SE)


class TransformersForCausalLM(torch.nn.Module):
    """Any causal LM of transformers that honours its attention interface; it loads its own weights."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> None:
        super().__init__()
        self._config, self._dtype = _config(config["transformers"]), ctx.dtype
        self._device, self._vocab_size = ctx.device, shape.vocab_size
        self._name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(self._config.model_type, "")
        asked = config["transformers"].get("architectures") or [self._name]
        if asked[0] != self._name:
            raise UnsupportedModelError(
                f"config.json asks for {asked[0]}, but the class for its model_type {self._config.model_type!r} is "
                f"{self._name or 'none'}"
            )
        try:
            with torch.device("meta"):
                self.model = _make(self._config, ctx.dtype)
                specs = self._dry_run(shape)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{self._name} of transformers cannot run here: it {error}") from error
        except Exception as error:  # foreign code that was never meant to run so; whatever it raises refuses the model
            if isinstance(error, KeyError) and error.args == (ATTENTION,):
                raise UnsupportedModelError(
                    f"{self._name} of transformers cannot run here: it has attention classes of its own"
                ) from error
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UnsupportedModelError(
                f"{self._name} of transformers cannot run here: its dry run failed with {reason}"
            ) from error
        self.attentions = torch.nn.ModuleList(Attention(spec) for spec in specs.values())
        self._paths = list(specs)
        self._attention_of: dict[torch.nn.Module, Attention] = {}

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
        """The sizes under their usual names, and the config itself as "transformers"."""
        own = _config(config)
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        sizes = {name: value for name in names if isinstance(value := getattr(own, name, None), int)}
        return {"num_attention_heads": 1, **sizes, "transformers": config}

    def forward(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        """Hidden states (T, E) of the step's tokens; writes their keys and values to the cache."""
        return self._hidden(token_ids_T, positions_T, None, _Router(self._attention_of, step))

    def logits(self, hidden_SE: torch.Tensor) -> torch.Tensor:
        """Logits (S, V) in float32 of chosen hidden states."""
        view = _WithHidden(self.model, self.model.base_model_prefix, hidden_SE[None])
        logits_SV: torch.Tensor = type(self.model).forward(view, inputs_embeds=hidden_SE[None]).logits[0]
        return logits_SV.float()

    def load_weights(self, checkpoint: Checkpoint, allocator: MemoryAllocator) -> int:
        """Loads as transformers does (renamed, merged and tied weights included), tensor by tensor into our memory."""
        checkpoint.tensors()  # finds every fault of the files before anything is allocated
        load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
        try:
            with transformers_bar():
                model, info = load(
                    checkpoint.directory,
                    config=self._config,
                    dtype=self._dtype,
                    attn_implementation=ATTENTION,
                    trust_remote_code=False,
                    local_files_only=True,
                    use_safetensors=True,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
        except (KeyError, ValueError, OSError) as error:  # such as an index without "metadata"
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise CheckpointError(f"{checkpoint.directory}: transformers cannot load it: {why}") from error
        for fault, keys in (
            ("is missing", info["missing_keys"]),
            ("has no place in this architecture", info["unexpected_keys"]),
            ("has another shape than config.json asks for", [key for key, *_ in info["mismatched_keys"]]),
        ):
            if keys:
                name = min(keys)
                raise CheckpointError(f"{checkpoint.directory}: tensor {name!r} {fault} ({len(keys)} in all)")
        return self._adopt(model, allocator)

    def dummy_weights(self, allocator: MemoryAllocator, *, seed: int) -> int:
        """Fills the model with the weights that its class starts a training with; returns their bytes."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._adopt(_make(self._config, self._dtype), allocator)

    def _dry_run(self, shape: ModelShape) -> dict[str, AttentionSpec]:
        """Runs on tensors without values; returns the spec of each attention module by its path, in order of use."""
        _check_class(self.model)
        ids_T, positions_T = torch.zeros(_DRY_TOKENS, dtype=torch.int64), torch.arange(_DRY_TOKENS)
        recorder = _Recorder()
        self.model.set_attn_implementation(DRY_RUN)
        self.model.set_experts_implementation("batched_mm")  # the one whose shapes do not depend on the tokens
        hidden_TE = self._hidden(ids_T, positions_T, torch.ones(1, _DRY_TOKENS, dtype=torch.int64), recorder)
        if not recorder.specs:
            raise UnsupportedModelError("does not use transformers' attention interface")
        num_layers = shape.num_layers
        if len(recorder.specs) != num_layers:
            raise UnsupportedModelError(
                f"attends through transformers' attention interface in {len(recorder.specs)} of {num_layers} layers"
            )
        if hidden_TE.dim() != 2 or self.logits(hidden_TE).shape != (_DRY_TOKENS, shape.vocab_size):
            raise UnsupportedModelError("has an output head that is not applied to its decoder's hidden states alone")
        paths = {module: path for path, module in self.model.named_modules()}
        return {paths[module]: spec for module, spec in recorder.specs.items()}

    def _hidden(
        self,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor | None,
        mask_1T: torch.Tensor | None,
        attend: _Attend,
    ) -> torch.Tensor:
        decoder = getattr(self.model, self.model.base_model_prefix)
        output = decoder(
            input_ids=token_ids_T[None],
            position_ids=None if positions_T is None else positions_T[None],
            attention_mask=mask_1T,
            use_cache=False,
            **{_KEYWORD: attend},
        )
        hidden_TE: torch.Tensor = output.last_hidden_state[0]
        return hidden_TE

    def _adopt(self, model: Any, allocator: MemoryAllocator) -> int:
        """Takes a loaded model in place of the one without memory, its tensors moved into the platform's memory."""
        num_bytes = 0
        swap: Callable[[torch.Tensor, torch.Tensor], None] = torch.utils.swap_tensors
        tensors = dict.fromkeys([*model.parameters(), *model.buffers()])
        for tensor in tensors:
            memory = allocator.empty(tuple(tensor.shape), tensor.dtype, tag="weights")
            memory.copy_(tensor.detach())
            num_bytes += memory.nbytes
            if isinstance(tensor, torch.nn.Parameter):
                memory = torch.nn.Parameter(memory, requires_grad=False)
            swap(tensor, memory)
        self.model = model.eval()
        modules = [model.get_submodule(path) for path in self._paths]
        self._attention_of = dict(zip(modules, (m for m in self.attentions if isinstance(m, Attention)), strict=True))
        self._check_packing()
        return num_bytes

    @torch.inference_mode()
    def _check_packing(self) -> None:
        """Refuses a model whose tokens see more of each other than through attention, or whose positions do not count
        from 0: two short sequences in one row must give what each gives alone with the positions that it defaults to.
        """
        lengths = (5, 3)
        ids = [torch.arange(2, 2 + n, device=self._device) * 7 % self._vocab_size for n in lengths]
        alone = [self._hidden(row, None, None, _attend_within((len(row),))) for row in ids]
        positions_T = torch.cat([torch.arange(n, device=self._device) for n in lengths])
        packed_TE = self._hidden(torch.cat(ids), positions_T, None, _attend_within(lengths))
        likeness_T = functional.cosine_similarity(packed_TE.float(), torch.cat(alone).float(), dim=-1)
        if not bool((likeness_T > _LIKENESS).all()):
            raise UnsupportedModelError(
                f"{self._name} of transformers cannot run here: tokens of one sequence change those of another, or its "
                "positions do not count from 0"
            )


def check_supported(architecture: str) -> bool:
    """Whether transformers has a causal LM of this name; the dry run decides whether it can run."""
    return architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """transformers' config object; raises UnsupportedModelError for what must not be passed over."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(f"config.json: model_type {model_type!r} is unknown to transformers")
    refuse_rounded_weights(config)
    try:
        own: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict({k: _plain(v) for k, v in config.items()})
        is_one_model = own.get_text_config() is own
    except Exception as error:  # each config class checks itself in its own way
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CheckpointError(f"config.json: transformers cannot read it: {reason}") from error
    if not is_one_model:
        raise UnsupportedModelError(
            f"config.json: model_type {model_type!r} is made of several models; only decoders run"
        )
    return own


def _plain(value: Any) -> Any:
    """A value of config.json, with infinities as numbers: JSON has none, so transformers writes {"__float__": …}."""
    if isinstance(value, dict):
        return float(value["__float__"]) if "__float__" in value else {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _make(config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """The model of a config; its attention is ours."""
    make: Callable[..., Any] = AutoModelForCausalLM.from_config
    return make(config, dtype=dtype, attn_implementation=ATTENTION, trust_remote_code=False).eval()


def _check_class(model: Any) -> None:
    """Refuses, by what class and config say, models that the dry run alone would let through."""
    if model._is_stateful:
        raise UnsupportedModelError("keeps recurrent state between tokens")
    if model.config.is_encoder_decoder or getattr(model.config, "add_cross_attention", False):
        raise UnsupportedModelError("attends to an encoder")
    for module in model.modules():
        if isinstance(module, torch.nn.Conv1d):
            raise UnsupportedModelError("convolves over tokens")
    kinds = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise UnsupportedModelError(f"has layers of the kind {min(kinds)!r}")
    names = _rope_types(getattr(model.config, "rope_parameters", None))
    if names & set(_SEQUENCE_DEPENDENT_ROPE):
        raise UnsupportedModelError(f"has rope_type {min(names)!r}, which depends on what shares the batch")
    if not hasattr(model, model.base_model_prefix):
        raise UnsupportedModelError("has no decoder of its own that could be called without the head")
    parameters = signature(getattr(model, model.base_model_prefix).forward).parameters
    if "position_ids" not in parameters:
        raise UnsupportedModelError("takes no position_ids")
    if all(p.kind is not Parameter.VAR_KEYWORD for p in parameters.values()):
        raise UnsupportedModelError("does not pass keyword arguments on to its attention layers")


def _rope_types(parameters: object) -> set[str]:
    """Every rope_type in a config's rope_parameters, which may be given by layer type."""
    if not isinstance(parameters, dict):
        return set()
    inner = {name for value in parameters.values() for name in _rope_types(value)}
    return inner | ({str(parameters["rope_type"])} if "rope_type" in parameters else set())
