"""How each engine is driven: a list of requests at once, and one request token by token.

An adapter is made in the engine's own environment, where nothing else of this repository need be installed; imports of
engines are by name, for the type checker knows none of them. Every adapter raises if an output has another length than
was asked for.
"""

import http.client
import importlib
import json
import os
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import Any, Protocol

from comparing.workloads import Request


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of one engine. `server` is the path of a binary, `file` of a model in the engine's own format."""

    directory: str
    dtype: str = "bfloat16"
    quantization: str | None = None
    server: str | None = None
    file: str | None = None
    max_seqs: int = 64


class Adapter(Protocol):
    """One loaded engine."""

    share: float
    """Of a workload's requests, what `generate` is given: less than 1 for those that would take too long."""

    def forget(self) -> None:
        """Empties the prefix cache."""

    def generate(self, asked: list[Request]) -> None:
        """Runs all requests at once."""

    def stream(self, asked: Request) -> list[float]:
        """Seconds from the call until each token came."""


def check(lengths: list[int], asked: list[Request]) -> None:
    """Raises RuntimeError unless each output is as long as it should be."""
    wanted = [num_out for _, num_out in asked]
    if lengths != wanted:
        raise RuntimeError(f"outputs have {lengths[:4]}… tokens, {wanted[:4]}… were asked for")


class Fairlead:
    """Offline, in this process."""

    share = 1.0

    def __init__(self, options: Options) -> None:
        self._fairlead: Any = importlib.import_module("fairlead")
        self._llm = self._fairlead.LLM(
            options.directory,
            dtype=options.dtype,
            quantization=options.quantization,
            skip_tokenizer_init=True,
            max_model_len=4096,
            max_num_seqs=options.max_seqs,
            max_num_batched_tokens=4096,
        )

    def forget(self) -> None:
        self._llm.reset_prefix_cache()

    def _params(self, num_out: int) -> Any:
        make = self._fairlead.SamplingParams
        return make(temperature=0, max_tokens=num_out, ignore_eos=True, detokenize=False)

    def generate(self, asked: list[Request]) -> None:
        params = [self._params(num_out) for _, num_out in asked]
        outputs = self._llm.generate([prompt for prompt, _ in asked], params, use_tqdm=False)
        check([len(output.outputs[0].token_ids) for output in outputs], asked)

    def stream(self, asked: Request) -> list[float]:
        times: list[float] = []
        start = time.perf_counter()
        for output in self._llm.generate_stream(asked[0], self._params(asked[1])):
            num_new = len(output.outputs[0].token_ids) - len(times)
            times += [time.perf_counter() - start] * num_new
        check([len(times)], [asked])
        return times


class Transformers:
    """Its `generate`, one request after the other, on a quarter of the requests."""

    share = 0.25

    def __init__(self, options: Options) -> None:
        self._torch: Any = importlib.import_module("torch")
        self._transformers: Any = importlib.import_module("transformers")
        load = self._transformers.AutoModelForCausalLM.from_pretrained
        self._model = load(options.directory, dtype=getattr(self._torch, options.dtype)).eval()

    def forget(self) -> None:
        """It keeps nothing."""

    def _run(self, asked: Request) -> None:
        prompt, num_out = asked
        how = self._transformers.GenerationConfig(
            max_new_tokens=num_out, min_new_tokens=num_out, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        with self._torch.inference_mode():
            ids = self._torch.tensor([prompt])
            mask = self._torch.ones_like(ids)
            out = self._model.generate(ids, attention_mask=mask, generation_config=how)
        check([out.shape[1] - len(prompt)], [asked])

    def generate(self, asked: list[Request]) -> None:
        for request in asked:
            self._run(request)

    def stream(self, asked: Request) -> list[float]:
        """Of two runs: one token, and all of them; the gaps between tokens are their mean."""
        start = time.perf_counter()
        self._run((asked[0], 1))
        first = time.perf_counter() - start
        start = time.perf_counter()
        self._run(asked)
        last = time.perf_counter() - start
        return [first + (last - first) * i / (asked[1] - 1) for i in range(asked[1])]


class VllmCpu:
    """vLLM in this process, its fastest way on a CPU: with engine and front end in processes of their own they compete
    for the cores."""

    share = 1.0

    def __init__(self, options: Options) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
        self._vllm: Any = importlib.import_module("vllm")
        self._llm = self._vllm.LLM(
            model=options.directory,
            dtype=options.dtype,
            skip_tokenizer_init=True,
            max_model_len=4096,
            max_num_seqs=options.max_seqs,
            max_num_batched_tokens=4096,
            enable_prefix_caching=True,
        )

    def forget(self) -> None:
        self._llm.reset_prefix_cache()

    def _params(self, num_out: int) -> Any:
        make = self._vllm.SamplingParams
        return make(temperature=0, max_tokens=num_out, ignore_eos=True, detokenize=False)

    def generate(self, asked: list[Request]) -> None:
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in asked]
        outputs = self._llm.generate(prompts, [self._params(n) for _, n in asked], use_tqdm=False)
        check([len(output.outputs[0].token_ids) for output in outputs], asked)

    def stream(self, asked: Request) -> list[float]:
        engine, times = self._llm.llm_engine, list[float]()
        start = time.perf_counter()
        engine.add_request("stream", {"prompt_token_ids": asked[0]}, self._params(asked[1]))
        while engine.has_unfinished_requests():
            for output in engine.step():
                num_new = len(output.outputs[0].token_ids) - len(times)
                times += [time.perf_counter() - start] * num_new
        check([len(times)], [asked])
        return times


class LlamaCpp:
    """`llama-server` on a GGUF file, over HTTP with prompts of token ids; W1 and W4 have 32 slots, as suits it best."""

    share = 1.0

    def __init__(self, options: Options) -> None:
        if options.server is None or options.file is None:
            raise RuntimeError("llama.cpp needs the paths of llama-server and of a GGUF file")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        threads = str(len(os.sched_getaffinity(0)))
        sizes = ["-t", threads, "-tb", threads, "-np", "32", "-c", str(32 * 2304), "-fa", "on"]
        command = [options.server, "-m", options.file, "--port", str(self._port), *sizes, "--no-webui"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not self._is_ready():
            if self._process.poll() is not None:
                raise RuntimeError(f"llama-server ended with status {self._process.returncode}")
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False

    def forget(self) -> None:
        """Each slot keeps its last prompt; other prompts share nothing with it."""

    def _ask(self, asked: Request, *, is_streamed: bool) -> http.client.HTTPResponse:
        body = {
            "prompt": asked[0],
            "n_predict": asked[1],
            "ignore_eos": True,
            "temperature": 0.0,
            "samplers": ["temperature"],
            "cache_prompt": True,
            "return_tokens": True,
            "stream": is_streamed,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"llama-server answered {response.status}: {response.read()[:200]!r}")
        return response

    def generate(self, asked: list[Request]) -> None:
        lengths: list[int] = [-1] * len(asked)

        def one(i: int) -> None:
            lengths[i] = json.loads(self._ask(asked[i], is_streamed=False).read())["tokens_predicted"]

        threads = [threading.Thread(target=one, args=(i,)) for i in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        check(lengths, asked)

    def stream(self, asked: Request) -> list[float]:
        times: list[float] = []
        start = time.perf_counter()
        for line in self._ask(asked, is_streamed=True):
            if line.startswith(b"data: "):
                num_new = len(json.loads(line[6:]).get("tokens") or ())
                times += [time.perf_counter() - start] * num_new
        check([len(times)], [asked])
        return times


class OpenVino:
    """GenAI's continuous batching pipeline on a model that its converter has exported."""

    share = 1.0

    def __init__(self, options: Options) -> None:
        if options.file is None:
            raise RuntimeError("OpenVINO needs an exported model")
        self._genai: Any = importlib.import_module("openvino_genai")
        self._openvino: Any = importlib.import_module("openvino")
        sizes = self._genai.SchedulerConfig()
        sizes.max_num_batched_tokens, sizes.max_num_seqs, sizes.cache_size = 4096, options.max_seqs, 4
        sizes.enable_prefix_caching = True
        self._pipeline = self._genai.ContinuousBatchingPipeline(options.file, sizes, "CPU")

    def forget(self) -> None:
        """It has no call for that."""

    def _add(self, number: int, asked: Request) -> Any:
        np: Any = importlib.import_module("numpy")
        how = self._genai.GenerationConfig()
        how.max_new_tokens = how.min_new_tokens = asked[1]
        how.ignore_eos, how.do_sample = True, False
        ids = self._openvino.Tensor(np.array([asked[0]], dtype=np.int64))
        return self._pipeline.add_request(number, ids, how)

    def _step(self, handles: list[Any], counts: list[int]) -> None:
        self._pipeline.step()
        for i, handle in enumerate(handles):
            while handle.can_read():
                counts[i] += sum(len(output.generated_ids) for output in handle.read().values())

    def generate(self, asked: list[Request]) -> None:
        handles, counts = [self._add(i, request) for i, request in enumerate(asked)], [0] * len(asked)
        while self._pipeline.has_non_finished_requests():
            self._step(handles, counts)
        check(counts, asked)

    def stream(self, asked: Request) -> list[float]:
        times: list[float] = []
        counts = [0]
        start = time.perf_counter()
        handles = [self._add(0, asked)]
        while self._pipeline.has_non_finished_requests():
            self._step(handles, counts)
            times += [time.perf_counter() - start] * (counts[0] - len(times))
        check([len(times)], [asked])
        return times


ADAPTERS: dict[str, type[Any]] = {
    "fairlead": Fairlead,
    "transformers": Transformers,
    "vllm": VllmCpu,
    "llamacpp": LlamaCpp,
    "openvino": OpenVino,
}
