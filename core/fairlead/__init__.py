"""Fairlead: a plugin-based, hardware-neutral engine for serving large language models.

The public names below are imported on first use, so `import fairlead` costs milliseconds and imports no torch.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fairlead.config import EngineConfig as EngineConfig
    from fairlead.engine.async_engine import AsyncEngine as AsyncEngine
    from fairlead.engine.llm import LLM as LLM
    from fairlead.engine.planner import plan_engine as plan_engine
    from fairlead.engine.step_profile import StepProfile as StepProfile
    from fairlead.errors import FairleadError as FairleadError
    from fairlead.request import CompletionOutput as CompletionOutput
    from fairlead.request import FinishReason as FinishReason
    from fairlead.request import RequestOutput as RequestOutput
    from fairlead.request import SamplingParams as SamplingParams
    from fairlead.request import StructuredOutputParams as StructuredOutputParams

_HOMES = {
    "LLM": "fairlead.engine.llm",
    "AsyncEngine": "fairlead.engine.async_engine",
    "CompletionOutput": "fairlead.request",
    "EngineConfig": "fairlead.config",
    "FairleadError": "fairlead.errors",
    "FinishReason": "fairlead.request",
    "RequestOutput": "fairlead.request",
    "SamplingParams": "fairlead.request",
    "StepProfile": "fairlead.engine.step_profile",
    "StructuredOutputParams": "fairlead.request",
    "plan_engine": "fairlead.engine.planner",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "EngineConfig",
    "FairleadError",
    "FinishReason",
    "RequestOutput",
    "SamplingParams",
    "StepProfile",
    "StructuredOutputParams",
    "plan_engine",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fairlead' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        from fairlead.errors import MissingDependencyError

        raise MissingDependencyError.of(name, error) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
