"""Parts of `fairlead serve` that need no engine: the socket and the banner."""

import socket

import pytest

from fairlead.config import EngineConfig, PlatformConfig, ServerConfig
from fairlead.errors import FairleadError
from fairlead.request import EngineInfo
from fairlead_server.serve import banner, bind, serve

INFO = EngineInfo(
    model="org/name",
    platform="cpu",
    device="cpu:0",
    attention_backend="paged",
    dtype="bfloat16",
    vocab_size=1000,
    max_model_len=2048,
    max_num_seqs=256,
    block_size=16,
    num_blocks=1024,
    weights_bytes=3 * 2**30,
    kv_cache_bytes=2**29,
)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_a_port_can_be_had_once(host: str) -> None:
    if host == "::1" and not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    first = bind(host, 0)
    first.listen()
    try:
        port = first.getsockname()[1]
        with pytest.raises(FairleadError, match=f"cannot listen on {host} port {port}: Address already in use"):
            bind(host, port)
    finally:
        first.close()
    bind(host, port).close()


@pytest.mark.usefixtures("fake_engine_process")
def test_a_port_that_is_taken_while_the_engine_loads_is_told_too() -> None:
    """Two sockets may be bound to one port until one of them listens."""
    with bind("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        bind("127.0.0.1", port).close()
        engine_config = EngineConfig.of(model="demo")
        server_config = ServerConfig(port=port)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fairlead_server.serve.create_app", lambda engine: other.listen())
            with pytest.raises(FairleadError, match=f"cannot listen on 127.0.0.1 port {port}"):
                serve(engine_config, server_config)


def test_the_banner_says_what_fits_and_how_to_ask() -> None:
    lines = banner(INFO, PlatformConfig(), "127.0.0.1", 8000).splitlines()
    assert 6 <= len(lines) <= 9
    text = "\n".join(lines)
    for part in (
        "org/name, bfloat16, weights 3.00 GiB",
        "1024 blocks = 16384 tokens = 8.0 concurrent requests × 2048 tokens (0.50 GiB)",
        "paged",
        "http://127.0.0.1:8000/v1",
        "curl http://127.0.0.1:8000/v1/completions",
        "the only one available",
    ):
        assert part in text
    assert "warning" not in text


def test_the_banner_says_why_the_platform_was_chosen() -> None:
    assert "cpu:0; asked for" in banner(INFO, PlatformConfig(platform="cpu"), "127.0.0.1", 1)


@pytest.mark.parametrize(("host", "warns"), [("::1", False), ("0.0.0.0", True), ("::", True), ("10.0.0.1", True)])
def test_an_address_that_others_reach_is_warned_about(host: str, warns: bool) -> None:
    text = banner(INFO, PlatformConfig(), host, 1)
    assert ("warning" in text) == warns
    assert f"http://{f'[{host}]' if ':' in host else host}:1/v1" in text
