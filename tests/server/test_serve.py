"""The part of `fairlead serve` that needs no engine: the socket."""

import socket

import pytest
from fastapi import FastAPI

from fairlead.config import EngineConfig, ServerConfig
from fairlead.errors import FairleadError
from fairlead_server.serve import bind, serve


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
            patch.setattr("fairlead_server.serve.create_app", lambda *_: (other.listen(), FastAPI())[1])
            with pytest.raises(FairleadError, match=f"cannot listen on 127.0.0.1 port {port}"):
                serve(engine_config, server_config)
