"""What a server says about itself."""

from dataclasses import replace

import pytest

from fairlead.config import PlatformConfig, ServerConfig
from fairlead.request import EngineInfo
from fairlead_server.banner import banner

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


def test_the_banner_says_what_fits_and_how_to_ask() -> None:
    lines = banner(INFO, PlatformConfig(), ServerConfig(), ("127.0.0.1", 8000)).splitlines()
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


def test_the_banner_names_swap_space_where_it_was_asked_for() -> None:
    assert "swap" not in banner(INFO, PlatformConfig(), ServerConfig(), ("127.0.0.1", 1))
    info = replace(INFO, swap_bytes=2**30, swap_costs="1 ms to copy")
    assert "swap       1.00 GiB; 1 ms to copy" in banner(info, PlatformConfig(), ServerConfig(), ("127.0.0.1", 1))


def test_the_banner_says_why_the_platform_was_chosen() -> None:
    assert "cpu:0; asked for" in banner(INFO, PlatformConfig(platform="cpu"), ServerConfig(), ("127.0.0.1", 1))


@pytest.mark.parametrize(("host", "warns"), [("::1", False), ("0.0.0.0", True), ("::", True), ("10.0.0.1", True)])
def test_an_address_that_others_reach_is_warned_about(host: str, warns: bool) -> None:
    text = banner(INFO, PlatformConfig(), ServerConfig(), (host, 1))
    assert ("warning" in text) == warns
    assert f"http://{f'[{host}]' if ':' in host else host}:1/v1" in text


def test_keys_names_and_certificates_show_in_the_line_to_try_but_no_key_does() -> None:
    config = ServerConfig(api_key=("s3cret",), served_model_name=("short", "long"), ssl_certfile="cert.pem")
    text = banner(INFO, PlatformConfig(), config, ("0.0.0.0", 1))
    assert "curl https://0.0.0.0:1/v1/completions -H 'Authorization: Bearer KEY'" in text
    assert '"model": "short"' in text
    assert "s3cret" not in text
    assert "s3cret" not in repr(config)
    assert "warning" not in text


def test_a_unix_socket_has_a_line_to_try_too() -> None:
    text = banner(INFO, PlatformConfig(), ServerConfig(uds="/run/f.sock"), "/run/f.sock")
    assert "curl --unix-socket /run/f.sock http://localhost/v1/completions" in text
