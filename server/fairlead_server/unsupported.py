"""Fields that OpenAI or vLLM define and this engine cannot honour yet: anything but their neutral value is refused.

Fields that nobody defines are ignored, as OpenAI does; these are not, since ignoring them would change the answer
without a word. `user`, `store`, `metadata` and the like change no answer and pass.
"""

from collections.abc import Mapping

from fairlead.errors import RequestError

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "suffix": ("",),
    "guided_whitespace_pattern": (),
    "tools": (),
    "tool_choice": ("none",),
    "functions": (),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "verbosity": ("medium",),
    "chat_template": (),
    "prompt_embeds": (),
}


def refuse_unsupported(fields: Mapping[str, object]) -> None:
    """Raises RequestError naming the first field that has more than its neutral value (null is always neutral)."""
    for name, neutral in NEUTRAL.items():
        value = fields.get(name)
        if value is not None and not any(_same(value, allowed) for allowed in neutral):
            wanted = " or ".join(f"{allowed!r}" for allowed in neutral)
            hint = f"; leave it out or give {wanted}" if wanted else "; leave it out"
            raise RequestError(f"{name} is not supported by this server{hint}", param=name)


def _same(value: object, allowed: object) -> bool:
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)
