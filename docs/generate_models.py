"""Writes docs/models.md by trying every causal LM of transformers: `python docs/generate_models.py` (minutes).

A tiny random checkpoint of each class is generated from, and its output compared with transformers' own.
"""

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fairlead.errors import ModelError
from fairlead.layers.context import BuildContext
from fairlead.models.config import ModelShape
from fairlead.models.registry import ARCHITECTURES, build_model, read_config
from fairlead.testing.reference import Reference, check_greedy, prompts_for
from fairlead.testing.tiny_checkpoint import write_tiny_checkpoint

MODELS_PAGE = Path(__file__).parent / "models.md"
MODEL_TESTS = Path(__file__).parents[1] / "tests" / "core" / "models"
NUM_PROMPTS, LONGEST, NUM_NEW = 4, 70, 12

SETTINGS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 24},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "num_layers": 2, "moe_topk": 2},
    "nemotron": {"num_key_value_heads": 2},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a type's tiny config needs beyond tiny_config's sizes."""


ORDER = ("native", "fallback", "refused", "untried")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table; `how` is "native", "fallback", "refused" or "untried"."""

    model_type: str
    architecture: str
    how: str
    finding: str

    def __str__(self) -> str:
        return f"| `{self.architecture}` | {self.model_type} | {self.how} | {self.finding} |"


@cache
def architectures() -> dict[str, str]:
    """Model type to class, of every causal LM of transformers."""
    names: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return names


@cache
def tested_cases() -> dict[str, list[str]]:
    """Class to the names of its cases in the tests of models, which check it at length."""
    found: dict[str, list[str]] = {}

    def cases_of(module: str, table: str, architecture: Callable[[Any], str]) -> None:
        spec = importlib.util.spec_from_file_location(f"docs_{module}", MODEL_TESTS / f"{module}.py")
        assert spec is not None
        assert spec.loader is not None
        loaded = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        for name, case in getattr(loaded, table).items():
            found.setdefault(architecture(case if table == "CASES" else name), []).append(name)

    classes = architectures()
    cases_of("test_llama_equality", "CHECKPOINTS", lambda name: "LlamaForCausalLM")
    cases_of("test_families", "CASES", lambda case: classes[getattr(transformers, case.config).model_type])
    cases_of("test_older_families", "CASES", lambda case: classes[case.model_type])
    cases_of("test_baichuan_chatglm", "CASES", lambda case: case["architectures"][0])
    cases_of("test_fallback", "TYPES", lambda name: classes[name])
    return found


def tested(architecture: str) -> str:
    """The end of a finding: which tests there are."""
    names = tested_cases().get(architecture, ())
    return f"; tested as {', '.join(names)}" if names else ""


def try_type(model_type: str, architecture: str) -> Row:
    """Makes a tiny checkpoint of the type, runs it, compares."""
    how = "native" if architecture in ARCHITECTURES else "fallback"

    def row(how: str, finding: str) -> Row:
        one_line = " ".join(finding.split()).replace("|", "\\|")
        return Row(model_type=model_type, architecture=architecture, how=how, finding=one_line)

    with tempfile.TemporaryDirectory() as folder:
        try:
            directory = write_tiny_checkpoint(Path(folder), model_type, settings=SETTINGS.get(model_type))
            reference = Reference.of_transformers(directory)
        except Exception as error:  # transformers refuses the tiny sizes, or they are not small: try the default ones
            return row(*_by_default_config(model_type, architecture, f"{type(error).__name__}: {error}"[:160]))
        try:
            check_greedy(reference, prompts_for(512, NUM_PROMPTS, LONGEST), NUM_NEW, least_distinct=0.0)
        except ModelError as error:
            return row("refused", str(error).partition("cannot run here: ")[2] or str(error))
        except AssertionError as error:
            return row("WRONG", str(error))
    return row(how, f"{NUM_PROMPTS} prompts of 1 to {LONGEST} tokens, {NUM_NEW} new: equal{tested(architecture)}")


def _by_default_config(model_type: str, architecture: str, fault: str) -> tuple[str, str]:
    """Builds the model of the type's default config, without memory: that is enough to be refused."""
    context = BuildContext.reference(device="meta", max_model_len=64)
    try:
        config = json.loads(transformers.CONFIG_MAPPING[model_type]().to_json_string(use_diff=False))
        read = read_config(architecture, config)
        build_model(architecture, read, ModelShape.of(read), context)
    except ModelError as error:
        return "refused", str(error).partition("cannot run here: ")[2] or str(error)
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"[:160]
    return "untried", fault


INTRODUCTION = """\
# Models

Generated by `python docs/generate_models.py`: every causal LM class of transformers {version} was tried. A tiny random
checkpoint was written, {prompts} prompts of 1 to {longest} tokens were submitted at once, and each of the {new} tokens
generated had to be the argmax of transformers' own float32 model, with its log-probability to within 1e-4.

* **native**: a file of ours.
* **fallback**: transformers' modelling code with our paged cache. What a config asks for decides, so one with
  other settings than those tried may still be refused.
* **refused**: with this line, before memory is allocated where the config alone shows it.
* **untried**: no small config could be made.
* **tested as** these cases of `tests/core/models`, each with its own tiny checkpoint: the logits of a prompt of up to
  300 tokens equal the reference's to within 1e-4 at every position; so do the log-probabilities of greedy output, whose
  tokens are the reference's argmax, for 8 (`make test`) or 32 (`make test-full`; 64 for Llama, Qwen and Gemma) prompts
  submitted at once, computed whole and in chunks; and a wrong position, head or window, planted into the engine, shows.

A plugin may bring more classes ([hooks](hooks.md)).
"""


def page(rows: list[Row]) -> str:
    """The whole page; native, fallback, refused, untried."""
    counts = ", ".join(f"{sum(row.how == how for row in rows)} {how}" for how in ORDER)
    head = INTRODUCTION.format(version=transformers.__version__, prompts=NUM_PROMPTS, longest=LONGEST, new=NUM_NEW)
    table = ["| Class | Model type | How | What was found |", "|---|---|---|---|"]
    table += [str(row) for row in sorted(rows, key=lambda r: (ORDER.index(r.how), r.architecture, r.model_type))]
    return "\n".join([head, f"{len(rows)} in all: {counts}.\n", *table, ""])


def other_natives() -> list[Row]:
    """The classes with a file of ours whose code transformers does not ship, or ships under another name."""
    known = set(architectures().values())
    rows = []
    for name in ARCHITECTURES:
        if name not in known:
            others = [other for other in known & set(ARCHITECTURES) if ARCHITECTURES[other] == ARCHITECTURES[name]]
            finding = f"an older name of {others[0]}" if others else "transformers has no class of this name"
            rows.append(Row(model_type="", architecture=name, how="native", finding=finding + tested(name)))
    return rows


def main() -> None:
    """Tries every class and writes the page; fails if one ran and gave something else."""
    rows = []
    for model_type, architecture in architectures().items():
        rows.append(try_type(model_type, architecture))
        print(rows[-1], file=sys.stderr)
    wrong = [row for row in rows if row.how not in ORDER]
    if wrong:
        raise SystemExit("\n".join(map(str, wrong)))
    MODELS_PAGE.write_text(page([*other_natives(), *rows]), encoding="utf-8")


if __name__ == "__main__":
    main()
