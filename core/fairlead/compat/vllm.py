"""Lets `import vllm` mean Fairlead, where a program asks for it: `import fairlead.compat.vllm` before it.

LangChain's class then runs as it is: `langchain_community.llms.VLLM(model="demo")`.
"""

import sys

import fairlead
import fairlead.sampling_params as sampling_params
from fairlead import LLM as LLM
from fairlead import CompletionOutput as CompletionOutput
from fairlead import RequestOutput as RequestOutput
from fairlead import SamplingParams as SamplingParams
from fairlead.errors import ConfigError

__version__ = fairlead.__version__

if "vllm" in sys.modules and sys.modules["vllm"] is not sys.modules[__name__]:
    raise ConfigError("vllm itself has been imported; import fairlead.compat.vllm before it, or leave one of them out")
sys.modules["vllm"] = sys.modules[__name__]
sys.modules["vllm.sampling_params"] = sampling_params
