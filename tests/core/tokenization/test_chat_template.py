"""Rendering of chats, its errors, and that a caller's text never becomes a control token."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairlead import demo
from fairlead.errors import RequestError
from fairlead.tokenization import chat_template
from fairlead.tokenization.chat_template import encode_chat, render_chat
from fairlead.tokenization.tokenizer import Tokenizer, load_tokenizer

SPM_TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def test_a_chat_renders_by_the_models_template(demo_tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "S"}, *user("U"), {"role": "assistant", "content": "A"}, *user("V")]
    text = "<|user|>S\n\nU<|end|><|assistant|>A<|end|><|user|>V<|end|><|assistant|>"
    assert render_chat(demo_tokenizer, messages) == text
    prompt = encode_chat(demo_tokenizer, messages)
    assert prompt.text == text
    expected = demo_tokenizer.transformers_tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert prompt.token_ids == expected


def test_options_and_variables_reach_the_template(demo_tokenizer: Tokenizer) -> None:
    assert render_chat(demo_tokenizer, user("U"), add_generation_prompt=False) == "<|user|>U<|end|>"
    template = "{{ messages[0].content }}{{ mood }}{{ tools[0].function.name }}"
    tools = [{"type": "function", "function": {"name": "f"}}]
    text = render_chat(demo_tokenizer, user("U"), template=template, tools=tools, template_kwargs={"mood": "!"})
    assert text == "U!f"
    messages = [*user("U"), {"role": "assistant", "content": "So it"}]
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    assert render_chat(demo_tokenizer, messages, **options) == "<|user|>U<|end|><|assistant|>So it"


def test_text_parts_are_joined(demo_tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render_chat(demo_tokenizer, user(parts)) == "<|user|>a\nb<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([], "at least one message"),
        ("hi", "at least one message"),
        (["hi"], "an object with a role"),
        ([{"content": "x"}], "an object with a role"),
        (user(7), "text or a list of parts"),
        (user([{"type": "image_url", "image_url": {"url": "http://x"}}]), "got 'image_url'"),
        (user([{"type": "text"}]), "got 'text'"),
        (user(["x"]), "got 'x'"),
        ([{"role": "stranger", "content": "x"}], "Unknown role: stranger"),
        (user("a\ud800"), "lone surrogate"),
    ],
)
def test_wrong_messages_are_request_errors(demo_tokenizer: Tokenizer, messages: Any, found: str) -> None:
    with pytest.raises(RequestError, match=found) as caught:
        encode_chat(demo_tokenizer, messages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('two\nlines') }}",
        "{{ nothing.at.all }}",
        "{{ messages[0].content + 1 }}",
        "{% if %}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__[1] }}",
        "{% for i in range(1000000000) %}{% endfor %}",
    ],
)
def test_a_failing_template_is_a_request_error(demo_tokenizer: Tokenizer, template: str) -> None:
    with pytest.raises(RequestError, match="the chat template refuses these messages: ") as caught:
        render_chat(demo_tokenizer, user("x"), template=template)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(x='y') %}{% for a in range(99999) %}{% for b in range(99999) %}{% set n.x = a %}"
        "{% endfor %}{% endfor %}",
    ],
)
def test_a_template_without_end_is_ended(
    demo_tokenizer: Tokenizer, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "TEMPLATE_S", 0.1)
    for _ in range(3):  # what was raised once does not come again
        with pytest.raises(RequestError, match=r"the chat template did not end within 0\.1 s on these messages"):
            render_chat(demo_tokenizer, user("x"), template=template)
        assert render_chat(demo_tokenizer, user("x"), template="{{ messages[0].content }}") == "x"


def test_template_variables_cannot_replace_parameters(demo_tokenizer: Tokenizer) -> None:
    for name in ("tokenize", "chat_template", "conversation", "tools", "add_generation_prompt"):
        with pytest.raises(RequestError, match="has its own parameter"):
            render_chat(demo_tokenizer, user("x"), template_kwargs={name: "x"})


def test_a_model_without_template_says_what_to_give(spm_tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="--chat-template"):
        render_chat(spm_tokenizer, user("x"))


def test_named_templates_are_chosen_by_name_and_tools() -> None:
    tokenizer = load_tokenizer(demo.path())
    tokenizer.transformers_tokenizer.chat_template = {"default": "D", "tool_use": "T"}
    assert render_chat(tokenizer, user("x")) == "D"
    assert render_chat(tokenizer, user("x"), tools=[{"type": "function"}]) == "T"
    assert render_chat(tokenizer, user("x"), template="tool_use") == "T"
    tokenizer.transformers_tokenizer.chat_template = {"other": "O"}
    with pytest.raises(RequestError, match="--chat-template"):
        render_chat(tokenizer, user("x"))


CONTENT = st.lists(
    st.sampled_from(
        ["<|end|>", "<|user|>", "<|", "end", "|>", "<", " ", "hi", "\n", "é🙂", "\ufdd0", "<s>", "</s>", "s>"]
    ),
    max_size=8,
).map("".join)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(CONTENT, min_size=1, max_size=3), use_spm=st.booleans())
def test_control_tokens_in_content_stay_text(
    demo_tokenizer: Tokenizer, spm_tokenizer: Tokenizer, contents: list[str], use_spm: bool
) -> None:
    tokenizer, template = (spm_tokenizer, SPM_TEMPLATE) if use_spm else (demo_tokenizer, None)
    messages = [message for content in contents for message in user(content)]
    prompt = encode_chat(tokenizer, messages, template=template)
    assert prompt.text == render_chat(tokenizer, messages, template=template)
    found = [i for i in prompt.token_ids if i in tokenizer.special_token_ids]
    assert found == ([1, 2] * len(contents) if use_spm else [*[1, 3] * len(contents), 2])
    assert tokenizer.decode(prompt.token_ids, skip_special_tokens=False) == prompt.text


def test_control_tokens_in_tools_and_variables_stay_text(demo_tokenizer: Tokenizer) -> None:
    template = "<|user|>{{ tools[0] | tojson }}{{ note }}{{ messages[0].content }}"
    tools = [{"name": "<|end|>", "<|end|>": ["<|end|>"]}]
    prompt = encode_chat(
        demo_tokenizer, user("<|end|>"), template=template, tools=tools, template_kwargs={"note": "<|end|>"}
    )
    assert prompt.text == '<|user|>{"name": "<|end|>", "<|end|>": ["<|end|>"]}<|end|><|end|>'
    assert [i for i in prompt.token_ids if i in demo_tokenizer.special_token_ids] == [1]


def with_tokens(*tokens: str) -> Tokenizer:
    tokenizer = load_tokenizer(demo.path())
    tokenizer.backend.add_special_tokens(list(tokens))
    return Tokenizer(tokenizer.transformers_tokenizer)


def test_templates_still_find_the_token_that_they_search_for() -> None:
    from tokenizers import AddedToken

    loaded = load_tokenizer(demo.path())
    loaded.backend.add_tokens([AddedToken("</think>", special=False, normalized=False)])
    tokenizer = Tokenizer(loaded.transformers_tokenizer)
    template = "{{ messages[0].content.split('</think>')[-1] }}</think>"
    prompt = encode_chat(tokenizer, user("thought</think>said"), template=template)
    think = tokenizer.backend.token_to_id("</think>")
    assert prompt.text == "said</think>"
    assert prompt.token_ids.count(think) == 1
    assert (
        encode_chat(tokenizer, user("a</think>"), template="{{ messages[0].content }}</think>").token_ids.count(think)
        == 1
    )
    # a token that neither is special nor stands in the template is no control token
    assert encode_chat(tokenizer, user("a</think>")).token_ids.count(think) == 1


def test_overlapping_and_nested_control_tokens_stay_text() -> None:
    tokenizer = with_tokens("<a><b>", "<b><c>", "<b>", "<<b>>")
    for content in ("<a><b><c>", "<<b>>", "<a><b><b>", "<b><c><b>"):
        prompt = encode_chat(tokenizer, user(content))
        assert [i for i in prompt.token_ids if i in tokenizer.special_token_ids] == [1, 3, 2], content
        assert tokenizer.decode(prompt.token_ids, skip_special_tokens=False) == prompt.text


def test_halves_that_a_template_joins_stay_text(demo_tokenizer: Tokenizer) -> None:
    template = "{{ messages[0].content.replace('<|user|>', '') }}"
    prompt = encode_chat(demo_tokenizer, user("<|e<|user|>nd|>"), template=template)
    assert prompt.text == "<|end|>"
    assert 3 not in prompt.token_ids


def test_a_control_character_in_content_is_refused() -> None:
    tokenizer = with_tokens("\u241f")
    with pytest.raises(RequestError, match="control character"):
        encode_chat(tokenizer, user("a\u241fb"))


def test_all_noncharacters_and_a_control_token_are_refused(demo_tokenizer: Tokenizer) -> None:
    noncharacters = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    assert encode_chat(demo_tokenizer, user(noncharacters)).text.startswith("<|user|>" + noncharacters)
    with pytest.raises(RequestError, match="noncharacters"):
        encode_chat(demo_tokenizer, user(noncharacters + "<|end|>"))
