"""The opt-in alias: `import vllm` gives Fairlead's classes, in a process that asked for it."""

import subprocess
import sys


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_alias_is_there_once_it_is_asked_for() -> None:
    code = """
import fairlead.compat.vllm
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams
assert SamplingParams(structured_outputs=StructuredOutputsParams(choice=["a"])).structured_outputs is not None
llm = LLM(model="demo", tensor_parallel_size=1, trust_remote_code=False, dtype="auto", download_dir=None)
print(llm.generate(["ROMEO:"], SamplingParams(temperature=0, max_tokens=3))[0].outputs[0].finish_reason)
llm.close()
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "length\n"


def test_it_takes_no_other_modules_place() -> None:
    done = python("import sys, types; sys.modules['vllm'] = types.ModuleType('vllm'); import fairlead.compat.vllm")
    assert "vllm itself has been imported" in done.stderr
    assert python("import fairlead, sys; assert 'vllm' not in sys.modules").returncode == 0
