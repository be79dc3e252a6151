"""What a server says about itself when it starts."""

import ipaddress
from typing import Any

from fairlead import __version__
from fairlead.config import PlatformConfig, ServerConfig
from fairlead.plugins import discover
from fairlead.request import EngineInfo


def banner(info: EngineInfo, asked: PlatformConfig, config: ServerConfig, address: Any) -> str:
    """What was loaded, what fits, and how to ask for the first answer. `address` is that of the listening socket."""
    curl = "curl"
    if config.uds is not None:
        url, curl = "http://localhost", f"curl --unix-socket {config.uds}"
    else:
        host, port = address[:2]
        scheme = "http" if config.ssl_certfile is None else "https"
        url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    name = (*config.served_model_name, info.model)[0]
    has_keys = bool(config.api_key or config.api_key_file)
    key = " -H 'Authorization: Bearer KEY'" if has_keys else ""
    lines = engine_lines(info, asked) | {
        "listening": f"{url}/v1" if config.uds is None else f"{url}/v1, at {config.uds}",
        "try": f"{curl} {url}/v1/completions{key} -H 'Content-Type: application/json' "
        f"""-d '{{"model": "{name}", "prompt": "Once", "max_tokens": 32}}'""",
    }
    if config.uds is None and not has_keys and not _is_loopback(address[0]):
        lines["warning"] = f"anyone who reaches {address[0]} can use this server: it asks for no key; see --api-key"
    return layout(lines)


def engine_lines(info: EngineInfo, asked: PlatformConfig) -> dict[str, str]:
    """The banner's lines on the engine, by name."""
    num_tokens = info.num_blocks * info.block_size
    lines = {
        "model": f"{info.model}, {info.dtype}, weights {info.weights_bytes / 2**30:.2f} GiB",
        "platform": f"{info.platform}, {info.device}; {_why(info.platform, asked)}",
        "attention": info.attention_backend,
        "KV cache": f"{info.num_blocks} blocks = {num_tokens} tokens = {num_tokens / info.max_model_len:.1f} concurrent"
        f" requests × {info.max_model_len} tokens ({info.kv_cache_bytes / 2**30:.2f} GiB)",
        "step": f"at most {info.activation_bytes / 2**30:.2f} GiB more, measured"
        if info.activations_measured
        else f"at least {info.activation_bytes / 2**30:.2f} GiB more, estimated from the model's shapes",
    }
    return lines | ({"swap": f"{info.swap_bytes / 2**30:.2f} GiB; {info.swap_costs}"} if info.swap_costs else {})


def layout(lines: dict[str, str]) -> str:
    """A title, then each line under its name."""
    return "\n".join([f"Fairlead {__version__}", *(f"  {name:<10} {text}" for name, text in lines.items())])


def _why(platform: str, asked: PlatformConfig) -> str:
    if asked.platform is not None:
        return "asked for"
    others = [record.name for record in discover() if record.status == "available" and record.name != platform]
    return f"highest priority, before {', '.join(others)}" if others else "the only one available"


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host.split("%")[0]).is_loopback
