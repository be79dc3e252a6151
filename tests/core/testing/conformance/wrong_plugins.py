"""Platforms with one fault each, derived from one that has none: what the conformance kit must convict.

Each stands in WRONG under its name, with the tier that convicts it, the hook that the message names, and what was got.
"""

from functools import partial

from wrong_parts import (
    DEVICE,
    Right,
    Tensor,
    Wrong,
    WrongRank,
    WrongRunner,
    WrongStream,
    allocating,
    attending,
    attending_from_step,
    capable,
    changed_spec,
    copy_at_once,
    default,
    die_in_step,
    fail_in_step,
    fusing,
    hang,
    in_place_rms_norm,
    interleaved_heads,
    kept_caches,
    late_write,
    linear,
    made,
    memory,
    mixing,
    nan_in_step,
    norm_by_batch_size,
    norm_of_dense_rows,
    norm_of_some,
    norm_over_the_batch,
    op,
    plain_cache,
    raise_bad,
    refusing,
    restless_probe,
    scribbling_plan,
    shared_caches,
    spoiling,
    whole_blocks,
    wrapped_forward,
)

from fairlead.interface import (
    PLATFORM_API,
    OpProvider,
    PlatformSpec,
    hookimpl,
)
from fairlead.ops import reference

WRONG: dict[str, Wrong] = {
    # create, probe and data
    "creates_none": Wrong(tier="contract", hook="create", got="NoneType", create=lambda device: None),
    "raises_in_create": Wrong(tier="contract", hook="create", got="OSError: the device is on fire", create=raise_bad),
    "other_name": Wrong(tier="contract", hook="create", got="'left'", changes={"name": "left"}),
    "restless_probe": Wrong(tier="contract", hook="probe", got="right:", probe=restless_probe),
    "no_dtypes": Wrong(
        tier="contract", hook="create", got="Capabilities.dtypes must not be empty", changes=capable(dtypes=())
    ),
    "unknown_dtype": Wrong(
        tier="contract", hook="capabilities.dtypes", got="'float33'", changes=capable(dtypes=("float32", "float33"))
    ),
    "capabilities_as_dict": Wrong(
        tier="contract", hook="capabilities", got="{'a': 1}", changes={"capabilities": {"a": 1}}
    ),
    "zero_block_size": Wrong(
        tier="contract", hook="create", got="must be above 0", changes=capable(block_sizes=(16, 0))
    ),
    "default_it_cannot": Wrong(tier="contract", hook="defaults", got="17", changes=default(block_size=17)),
    "more_than_all": Wrong(
        tier="contract",
        hook="defaults.device_memory_utilization",
        got="1.5",
        changes=default(device_memory_utilization=1.5),
    ),
    # memory
    "negative_memory": Wrong(tier="contract", hook="memory_info", got="free_bytes=-1", changes=memory(2**30, -1)),
    "free_above_total": Wrong(
        tier="contract", hook="memory_info", got="free_bytes=2147483648", changes=memory(2**30, 2**31)
    ),
    "huge_memory": Wrong(tier="contract", hook="memory_info", got=f"{2**60}", changes=memory(2**60, 2**30)),
    "memory_of_none": Wrong(tier="contract", hook="memory_info", got="None", changes={"memory_info": lambda: None}),
    "allocates_none": Wrong(tier="contract", hook="allocator.empty", got="None", changes=allocating("none")),
    "allocates_float64": Wrong(tier="contract", hook="allocator.empty", got="float64", changes=allocating("dtype")),
    "allocates_another_shape": Wrong(
        tier="contract", hook="allocator.empty", got="(5, 3, 64, 1)", changes=allocating("shape")
    ),
    "another_error_than_memory": Wrong(
        tier="contract", hook="allocator.empty", got="RuntimeError", changes=allocating("error")
    ),
    "keeps_memory": Wrong(
        tier="contract", hook="allocator.allocated_bytes", got="3840 more", changes=allocating("leak")
    ),
    "one_account_for_all": Wrong(
        tier="contract", hook="allocator.allocated_bytes", got="a change", changes=allocating("tag")
    ),
    "synchronize_raises": Wrong(
        tier="contract", hook="synchronize", got="the device is on fire", changes={"synchronize": raise_bad}
    ),
    "keeps_nothing_while_away": Wrong(
        tier="contract", hook="allocator.restore", got="others", changes=allocating("forgets")
    ),
    "is_never_away": Wrong(tier="contract", hook="allocator.offload", got="1028", changes=allocating("stays")),
    # graph runner, streams, ranks
    "graph_runner_of_none": Wrong(
        tier="contract", hook="graph_runner", got="None", changes={"graph_runner": lambda: None}
    ),
    "bucket_too_small": Wrong(
        tier="contract", hook="graph_runner.bucket", got="8", changes={"graph_runner": lambda: WrongRunner("small")}
    ),
    "replays_stale_input": Wrong(
        tier="contract",
        hook="graph_runner.run",
        got="an error of",
        changes={"graph_runner": lambda: WrongRunner("stale")},
    ),
    "lies_about_graphs": Wrong(tier="contract", hook="graph_runner.buckets", got="()", changes=capable(graphs=True)),
    "lies_about_schemes": Wrong(
        tier="contract", hook="capabilities.quantization", got="['int4']", changes=capable(quantization=("int4",))
    ),
    "sums_nothing": Wrong(
        tier="contract",
        hook="communicator.all_reduce",
        got="[[0.0",
        changes={"communicator": lambda *ranks: WrongRank()},
    ),
    "event_never_done": Wrong(
        tier="contract", hook="stream.record", got="False", changes={"stream": lambda: WrongStream()}
    ),
    "seed_raises": Wrong(tier="contract", hook="seed", got="the device is on fire", changes={"seed": raise_bad}),
    "profiles_twice": Wrong(
        tier="contract", hook="memory_profile", got="2", changes={"memory_profile": lambda work: work() or work()}
    ),
    # hooks that list things
    "ops_of_none": Wrong(tier="contract", hook="ops", got="None", changes={"ops": lambda: None}),
    "unknown_op": Wrong(tier="contract", hook="ops", got="'rms_nrom'", changes=op("rms_nrom", reference.rms_norm)),
    "refuses_without_reason": Wrong(
        tier="contract",
        hook="ops['linear'] 'own'.refuses",
        got="False",
        changes={"ops": lambda: {"linear": (OpProvider(name="own", fn=reference.linear, refuses=lambda d: False),)}},
    ),
    "no_attention": Wrong(tier="contract", hook="attention_backends", got="()", changes={"attention_backends": tuple}),
    "attention_of_none": Wrong(
        tier="contract", hook="attention('reference')", got="None", changes={"attention": lambda name, shape: None}
    ),
    "block_bytes_too_small": Wrong(
        tier="contract",
        hook="attention('reference').allocate",
        got="bytes",
        changes=attending(block_bytes=lambda s: 64),
    ),
    "block_bytes_of_none": Wrong(
        tier="contract",
        hook="attention('reference').block_bytes",
        got="None",
        changes=attending(block_bytes=lambda s: None),
    ),
    # ops
    "op_of_another_shape": Wrong(
        tier="ops",
        hook="ops['linear'] 'own'",
        got="float32 of shape (0, 1, 48)",
        changes=op("linear", spoiling(reference.linear, lambda t: t.unsqueeze(1))),
    ),
    "op_of_another_dtype": Wrong(
        tier="ops",
        hook="ops['rms_norm'] 'own'",
        got="float64",
        changes=op("rms_norm", spoiling(reference.rms_norm, Tensor.double)),
    ),
    "op_of_none": Wrong(
        tier="ops", hook="ops['embedding'] 'own'", got="None", changes=op("embedding", lambda *args: None)
    ),
    "op_raises": Wrong(
        tier="ops", hook="ops['layer_norm'] 'own'", got="the device is on fire", changes=op("layer_norm", raise_bad)
    ),
    "op_of_nan": Wrong(
        tier="ops",
        hook="ops['silu_and_mul'] 'own'",
        got="NaN in",
        changes=op("silu_and_mul", spoiling(reference.silu_and_mul, lambda t: t.clamp(min=0).log() * 0 + t)),
    ),
    "op_writes_to_input": Wrong(
        tier="ops", hook="ops['rms_norm'] 'own'", got="x_NE was changed", changes=op("rms_norm", in_place_rms_norm)
    ),
    "op_returns_its_input": Wrong(
        tier="ops",
        hook="ops['rotary_embedding'] 'own'",
        got="q_THD shares memory",
        changes=op("rotary_embedding", lambda q, k, *rest: (q, k)),
    ),
    "op_too_inexact": Wrong(
        tier="ops",
        hook="ops['gelu_and_mul'] 'own'",
        got="an error of",
        changes=op("gelu_and_mul", spoiling(reference.gelu_and_mul, lambda t: t * (1 + 1e-4))),
    ),
    "op_forgets_bias": Wrong(
        tier="ops",
        hook="ops['linear'] 'own'",
        got="an error of",
        changes=op("linear", lambda x, w, bias: reference.linear(x, w, None)),
    ),
    "op_of_one_tensor": Wrong(
        tier="ops",
        hook="ops['fused_add_rms_norm'] 'own'",
        got="1",
        changes=op("fused_add_rms_norm", lambda *args: reference.fused_add_rms_norm(*args)[0]),
    ),
    "op_wants_dense_rows": Wrong(
        tier="ops", hook="ops['rms_norm'] 'own'", got="an error of", changes=op("rms_norm", norm_of_dense_rows)
    ),
    "op_wants_rows": Wrong(
        tier="ops", hook="ops['rms_norm'] 'own'", got="ValueError: no rows", changes=op("rms_norm", norm_of_some)
    ),
    "op_mixes_rows": Wrong(
        tier="ops", hook="ops['rms_norm'] 'own'", got="NaN in", changes=op("rms_norm", norm_over_the_batch)
    ),
    "lies_about_batch_invariance": Wrong(
        tier="ops",
        hook="ops['rms_norm'] 'own'",
        got="others",
        changes=op("rms_norm", norm_by_batch_size, **capable(batch_invariant=True)),
    ),
    "bitmask_reversed": Wrong(
        tier="ops",
        hook="ops['apply_token_bitmask'] 'own'",
        got="an error of inf",
        changes=op("apply_token_bitmask", lambda logits, mask: reference.apply_token_bitmask(logits, ~mask)),
    ),
    "penalties_as_a_result": Wrong(
        tier="ops",
        hook="ops['apply_penalties'] 'own'",
        got="Tensor",
        changes=op("apply_penalties", lambda logits, *rest: logits),
    ),
    "draws_the_likeliest": Wrong(
        tier="ops",
        hook="ops['draw'] 'own'",
        got="an error of",
        changes=op("draw", lambda probs, uniform: probs.argmax(-1)),
    ),
    # attention
    "loses_swapped_blocks": Wrong(
        tier="attention",
        hook="attention('reference').forward",
        got="NaN in",
        changes=attending(copy_from_host=lambda *args: None),
    ),
    "lies_about_head_size": Wrong(
        tier="attention",
        hook="attention('reference')",
        got="ValueError: head_size 256 is not implemented",
        changes=attending(__init__=lambda *args: refusing(*args, head_size=256)),
    ),
    "lies_about_block_size": Wrong(
        tier="attention",
        hook="attention('reference')",
        got="ValueError: block_size 8 is not implemented",
        changes=attending(__init__=lambda *args: refusing(*args, block_size=8)),
    ),
    "ignores_the_window": Wrong(
        tier="attention",
        hook="attention('reference').forward",
        got="an error of",
        changes=attending(__init__=lambda *args: changed_spec(*args, sliding_window=None)),
    ),
    "ignores_the_cap": Wrong(
        tier="attention",
        hook="attention('reference').forward",
        got="an error of",
        changes=attending(__init__=lambda *args: changed_spec(*args, soft_cap=None)),
    ),
    "ignores_alibi": Wrong(
        tier="attention",
        hook="attention('reference').forward",
        got="an error of",
        changes=attending(__init__=lambda *args: changed_spec(*args, alibi_slopes=None)),
    ),
    "ignores_the_caches_dtype": Wrong(
        tier="attention",
        hook="attention('reference').forward",
        got="an error of",
        changes={**attending(__init__=plain_cache), **capable(kv_dtypes=("auto", "float8_e4m3fn"))},
    ),
    "interleaves_heads": Wrong(
        tier="attention",
        hook="attention('reference').forward",
        got="an error of",
        changes=attending(forward=interleaved_heads),
    ),
    "attention_of_another_shape": Wrong(
        tier="attention",
        hook="attention('reference').forward",
        got="of shape",
        changes=attending(forward=wrapped_forward(after=lambda out: out.flatten(1))),
    ),
    "attention_returns_none": Wrong(
        tier="attention",
        hook="attention('reference').forward",
        got="None",
        changes=attending(forward=wrapped_forward(after=lambda out: None)),
    ),
    "attention_scales_q_in_place": Wrong(
        tier="attention",
        hook="attention('reference').forward",
        got="q was changed",
        changes=attending(forward=wrapped_forward(before=lambda q, *rest: q.mul_(2))),
    ),
    "plan_scribbles": Wrong(
        tier="attention",
        hook="attention('reference').plan",
        got="block_tables_SB was changed",
        changes=attending(plan=scribbling_plan),
    ),
    "reads_before_it_writes": Wrong(
        tier="attention",
        hook="attention('reference').forward",
        got="an error of",
        changes=attending(forward=late_write),
    ),
    "reads_stale_memory": Wrong(
        tier="attention", hook="attention('reference').forward", got="NaN in", changes=attending(forward=whole_blocks)
    ),
    "copies_nothing": Wrong(
        tier="attention",
        hook="attention('reference').forward",
        got="NaN in",
        changes=attending(copy_blocks=lambda *args: None),
    ),
    "copies_in_another_order": Wrong(
        tier="attention",
        hook="attention('reference').forward",
        got="NaN in",
        changes=attending(copy_blocks=copy_at_once),
    ),
    # quantisation
    "linear_forgets_bias": Wrong(
        tier="quantisation", hook="linear_methods['int8'] 'own'.apply", got="e-", changes=linear("bias")
    ),
    "linear_of_another_dtype": Wrong(
        tier="quantisation", hook="linear_methods['int8'] 'own'.apply", got="float64", changes=linear("dtype")
    ),
    "linear_of_none": Wrong(
        tier="quantisation", hook="linear_methods['int8'] 'own'.apply", got="None", changes=linear("none")
    ),
    "linear_of_other_weights": Wrong(
        tier="quantisation", hook="linear_methods['int8'] 'own'.dequantise", got="off by", changes=linear("weight")
    ),
    "linear_of_no_bytes": Wrong(
        tier="quantisation", hook="linear_methods['int8'] 'own'.packed_bytes", got="0", changes=linear("bytes")
    ),
    "fusion_forgets_activation": Wrong(
        tier="quantisation", hook="'own'.apply_fused", got="of shape", changes=fusing("activation")
    ),
    "fusion_takes_up_for_gate": Wrong(
        tier="quantisation", hook="'own'.apply_fused", got="e+00", changes=fusing("order")
    ),
    "fusion_forgets_residual": Wrong(
        tier="quantisation", hook="'own'.apply_fused", got="e-", changes=fusing("residual")
    ),
    "fusion_adds_in_place": Wrong(
        tier="quantisation", hook="'own'.apply_fused", got="changed", changes=fusing("in place")
    ),
    "fusion_of_other_weights": Wrong(
        tier="quantisation", hook="'own'.dequantise", got="an error of", changes=fusing("weight")
    ),
    "fusion_depends_on_the_batch": Wrong(
        tier="quantisation",
        hook="'own'.apply_fused",
        got="others",
        changes=fusing("batch", **capable(batch_invariant=True)),
    ),
    "fusion_refuses_without_reason": Wrong(
        tier="quantisation", hook="'own'.refuses_fused", got="''", changes=fusing("reason")
    ),
    "experts_of_other_weights": Wrong(
        tier="quantisation", hook="'own'.apply_experts", got="e-", changes=mixing("weights")
    ),
    "experts_forget_the_correction": Wrong(
        tier="quantisation", hook="'own'.apply_experts", got="e+00", changes=mixing("correction")
    ),
    "experts_depend_on_the_batch": Wrong(
        tier="quantisation",
        hook="'own'.apply_experts",
        got="others",
        changes=mixing("batch", **capable(batch_invariant=True)),
    ),
    "experts_refused_without_reason": Wrong(
        tier="quantisation", hook="'own'.refuses_experts", got="''", changes=mixing("reason")
    ),
    # models
    "model_without_biases": Wrong(
        tier="model",
        check="gpt_neox (layer norm, partial rotary), float32",
        hook="ops and attention, through LLM.generate",
        got="off by",
        changes=op("linear", lambda x, w, bias: reference.linear(x, w, None)),
    ),
    # server
    "raises_while_it_serves": Wrong(
        tier="server",
        hook="fairlead serve demo, POST /v1/completions",
        got="error",
        changes=attending_from_step(fail_in_step),
    ),
    # engine
    "raises_in_a_step": Wrong(
        tier="engine",
        hook="in attending_from_step.<locals>.forward",
        got="RuntimeError: the device fell off the bus",
        changes=attending_from_step(fail_in_step),
    ),
    "nan_in_a_step": Wrong(
        tier="engine", hook="LLM.generate", got="not a number", changes=attending_from_step(nan_in_step)
    ),
    "keeps_caches": Wrong(
        tier="contract",
        hook="attention('reference').allocate",
        got="still held",
        changes=attending(allocate=kept_caches),
    ),
    "shares_caches": Wrong(
        tier="engine",
        check="two engines in one process",
        hook="LLM.generate",
        got="equal ones",
        changes=attending(allocate=shared_caches),
    ),
}

DEADLY: dict[str, Wrong] = {
    "hangs": Wrong(tier="contract", hook="synchronize, in hang", got="none: it hangs", changes={"synchronize": hang}),
    "dies_in_a_step": Wrong(
        tier="engine",
        hook="100 steps",
        got="the end of the process (status 3)",
        changes=attending_from_step(die_in_step),
    ),
}


def _spec(name: str, wrong: Wrong) -> PlatformSpec:
    return PlatformSpec(
        name=name,
        api_version=PLATFORM_API,
        priority=-50,
        probe=wrong.probe,
        create=wrong.create or partial(made, name, wrong.changes),
    )


@hookimpl
def fairlead_platforms() -> list[PlatformSpec]:
    right = PlatformSpec(name="right", api_version=PLATFORM_API, priority=-40, probe=lambda: (DEVICE,), create=Right)
    return [right, *(_spec(name, wrong) for name, wrong in (WRONG | DEADLY).items())]
