"""Outputs of a random model keep to their grammars: schemas by the thousand, in mixed batches, through preemption."""

import json
import random
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from fairlead import LLM, SamplingParams, StructuredOutputParams
from fairlead.request import RequestOutput
from fairlead.sampling.structured.llguidance_backend import LLGuidanceMatcher
from fairlead.tokenization.tokenizer import Tokenizer

MAX_TOKENS = 400
WORDS = ("alpha", "beta", "é", "two words", 'a "quote"', "漢字", "line\nbreak")


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema whose values are small, so that a model that says anything soon has said one."""
    scalars: list[Callable[[], dict[str, Any]]] = [
        lambda: {"type": "string", "maxLength": rng.randint(1, 8)},
        lambda: {"type": "string", "minLength": 1, "maxLength": rng.randint(1, 6)},
        lambda: {"type": "string", "pattern": rng.choice(["^[a-f]{1,4}$", "^(yes|no)$", "^\\d{2}-\\d{2}$"])},
        lambda: {"type": "integer", "minimum": (low := rng.randint(-50, 50)), "maximum": low + rng.randint(0, 300)},
        lambda: {"type": "number", "minimum": (low := rng.randint(-9, 9)), "maximum": low + rng.randint(1, 9)},
        lambda: {"type": "boolean"},
        lambda: {"type": "null"},
        lambda: {"enum": rng.sample([*WORDS, 1, 2.5, None, True], 3)},
        lambda: {"const": rng.choice(WORDS)},
    ]
    if depth == 0 or rng.random() < 0.4:
        return rng.choice(scalars)()
    kind = rng.choice(["object", "object", "array", "anyOf"])
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(2)]}
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth - 1), "maxItems": rng.randint(0, 3)}
    return random_object(rng, depth)


def random_object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(["a", "name", "größe", "x y", "id", "list"], rng.randint(1, 3))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def ask(llm: LLM, spec: StructuredOutputParams, **params: Any) -> RequestOutput:
    given = {"temperature": 1.0, "max_tokens": MAX_TOKENS, "seed": 1, **params}
    return llm.generate("Hi", SamplingParams(structured_outputs=spec, **given), use_tqdm=False)[0]


def texts(output: RequestOutput) -> list[str]:
    assert all(sequence.finish_reason == "stop" for sequence in output.outputs)
    return [sequence.text for sequence in output.outputs]


def test_n15_random_schemas_are_kept(llm: LLM, count: Callable[..., int]) -> None:
    rng = random.Random(11)
    num_schemas = count(60, full=10_000)
    num_stopped = 0
    while num_schemas > 0:
        schemas = [random_object(rng, 3) for _ in range(min(num_schemas, 200))]
        params = [
            SamplingParams(seed=i, max_tokens=MAX_TOKENS, structured_outputs=StructuredOutputParams(json=schema))
            for i, schema in enumerate(schemas)
        ]
        outputs = llm.generate(["Hi"] * len(schemas), params, use_tqdm=False)
        stopped = 0
        for schema, output in zip(schemas, outputs, strict=True):
            [sequence] = output.outputs
            assert sequence.finish_reason in ("stop", "length"), output.error
            if sequence.finish_reason == "stop":
                stopped += 1
                jsonschema.validate(json.loads(sequence.text), schema)
        assert stopped >= 0.9 * len(schemas)
        num_schemas -= len(schemas)
        num_stopped += stopped
    assert num_stopped >= 0.95 * count(60, full=10_000)


@pytest.mark.parametrize(
    "regex", ["[a-z]{3,8}( [a-z]{2,5}){2}", "^(cat|dog)s?$", r"\d{4}-\d{2}", "é{2}|漢{3}", "a(b|c)*d"]
)
def test_a_regex_matches_the_whole_output(llm: LLM, regex: str) -> None:
    found = texts(ask(llm, StructuredOutputParams(regex=regex), n=4))
    assert all(re.fullmatch(regex, text) for text in found), found


def test_a_choice_is_one_of_them(llm: LLM) -> None:
    choices = ("yes", "yes, sir", "no", 'may"be\nso', "a|b.*", "héllo 🎉", "\\d", " [x]{2}-/#~&")
    found = texts(ask(llm, StructuredOutputParams(choice=choices), n=32))
    assert set(found) <= set(choices)
    assert len(set(found)) >= 3


@pytest.mark.parametrize("choice", ["yes", 'may"be\nso', "a|b.*", "héllo 🎉", "\\d", " [x]{2}-/#~&", "<|end|>", "漢字"])
def test_every_choice_can_be_said(llm: LLM, choice: str) -> None:
    assert texts(ask(llm, StructuredOutputParams(choice=(choice,)))) == [choice]


@pytest.mark.parametrize(
    ("grammar", "regex"),
    [
        ('start: WORD ("," WORD)~2\nWORD: /[a-c]{1,3}/', "[a-c]{1,3}(,[a-c]{1,3}){2}"),
        ('start: "(" start ")" | "x"', r"\(*x\)*"),
        ('root ::= item{3} "."\nitem ::= "a" | [0-9]', r"[a0-9]{3}\."),
        ('root ::= "<" root ">" | "y"', "<*y>*"),
    ],
)
def test_grammars_in_both_syntaxes(llm: LLM, grammar: str, regex: str) -> None:
    if llm.config.model.structured_outputs_backend == "xgrammar":
        grammar = grammar.replace('("," WORD)~2', '"," WORD "," WORD')
    for output in ask(llm, StructuredOutputParams(grammar=grammar), n=4).outputs:
        assert output.finish_reason == "length" or re.fullmatch(regex, output.text), output.text
        if output.text.startswith(("(", "<")) and output.finish_reason == "stop":
            assert output.text.count(output.text[0]) == output.text.count({"(": ")", "<": ">"}[output.text[0]])


def test_a_json_object_is_one(llm: LLM) -> None:
    output = ask(llm, StructuredOutputParams(json_object=True), temperature=0).outputs[0]
    assert output.text.startswith("{")
    if output.finish_reason == "stop":
        assert isinstance(json.loads(output.text), dict)


def test_the_end_is_allowed_exactly_where_the_grammar_is_complete(llm: LLM) -> None:
    spec = StructuredOutputParams(regex="(ab)*")
    lengths = set()
    for seed in range(40):
        output = ask(llm, spec, seed=seed, max_tokens=60).outputs[0]
        assert re.fullmatch("(ab)*a?" if output.finish_reason == "length" else "(ab)*", output.text)
        lengths.add(len(output.text))
    assert len(lengths) > 1, "it never ended, or always at once"


def test_ignore_eos_goes_on_until_nothing_can_follow(llm: LLM) -> None:
    spec = StructuredOutputParams(regex="(ab){0,3}")
    assert texts(ask(llm, spec, ignore_eos=True, n=3)) == ["ababab"] * 3


def test_logprobs_are_those_of_the_model(llm: LLM) -> None:
    params = {"temperature": 0, "max_tokens": 1, "logprobs": 5}
    free = llm.generate("Hi", SamplingParams(**params), use_tqdm=False)[0].outputs[0]  # type: ignore[arg-type]
    held = ask(llm, StructuredOutputParams(choice=("zebra",)), **params).outputs[0]
    assert free.logprobs is not None
    assert held.logprobs is not None
    best = next(iter(free.logprobs[0]))
    assert held.token_ids != free.token_ids
    assert held.logprobs[0][best].logprob == free.logprobs[0][best].logprob


def free_params(seed: int) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=24, logprobs=3, ignore_eos=True, temperature=0.5 * (seed % 3))


def test_rows_without_a_grammar_are_bit_identical_to_those_of_a_batch_without(llm: LLM) -> None:
    prompts = [f"{i} free" for i in range(6)]
    alone = llm.generate(prompts, [free_params(i) for i in range(6)], use_tqdm=False)
    spec = StructuredOutputParams(regex="[a-z]{30}")
    mixed_params = [
        free_params(i // 2) if i % 2 else SamplingParams(seed=i, max_tokens=9, structured_outputs=spec)
        for i in range(12)
    ]
    mixed_prompts = [prompts[i // 2] if i % 2 else f"held {i}" for i in range(12)]
    mixed = llm.generate(mixed_prompts, mixed_params, use_tqdm=False)
    for one, other in zip(alone, mixed[1::2], strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert one.outputs[0].logprobs == other.outputs[0].logprobs


def test_a_seed_gives_the_same_output_whatever_shares_the_batch(llm: LLM) -> None:
    spec = StructuredOutputParams(regex="[a-z ]{20,40}")
    alone = texts(ask(llm, spec, seed=5))
    crowd = [SamplingParams(seed=i, max_tokens=MAX_TOKENS, structured_outputs=spec) for i in range(12)]
    together = llm.generate(["Hi"] * 12, crowd, use_tqdm=False)
    assert texts(together[5]) == alone


def test_preemption_keeps_the_place_in_the_grammar(backend_name: str, make_llm: Callable[..., LLM]) -> None:
    params = [
        SamplingParams(seed=i, n=2, max_tokens=90, structured_outputs=StructuredOutputParams(regex="([0-9][a-f]){40}"))
        for i in range(6)
    ]
    roomy = make_llm(backend_name, max_model_len=128)
    tight = make_llm(backend_name, max_model_len=128, num_blocks=14)
    expected, found = (llm.generate(["Hi"] * 6, params, use_tqdm=False) for llm in (roomy, tight))
    assert tight.engine.stats().num_preemptions > 0
    for one, other in zip(expected, found, strict=True):
        assert texts(one) == texts(other)
        assert all(re.fullmatch("([0-9][a-f]){40}", text) for text in texts(other))
    for llm in (roomy, tight):
        llm.close()


def test_forks_go_their_own_ways(llm: LLM) -> None:
    found = texts(ask(llm, StructuredOutputParams(regex="[a-z]{12}"), n=8))
    assert len(set(found)) == 8


def test_a_library_that_gives_up_ends_only_its_sequence(
    make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    llm = make_llm("llguidance")
    accept = LLGuidanceMatcher.accept
    refused = tokenizer.encode("x")[0]
    monkeypatch.setattr(LLGuidanceMatcher, "accept", lambda self, i: i != refused and accept(self, i))
    params = [
        SamplingParams(max_tokens=9, structured_outputs=StructuredOutputParams(choice=("x",))),
        SamplingParams(max_tokens=9, structured_outputs=StructuredOutputParams(choice=("b",))),
    ]
    bad, good = llm.generate(["Hi", "Hi"], params, use_tqdm=False)
    assert bad.outputs[0].finish_reason == "error"
    assert "refused" in str(bad.error)
    assert good.outputs[0].text == "b"
    llm.close()
