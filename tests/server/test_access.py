"""API keys on every route of the table, and other pages' origins."""

import http.client
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from fairlead.config import ServerConfig
from fairlead.errors import ConfigError
from fairlead_server.access import OPEN_PATHS, Keys, read_keys
from fairlead_server.serve import bind_uds

Serving = Callable[..., AbstractContextManager[Any]]
KEY, ORIGIN = "k-öne", "https://page.example"


@pytest.fixture(scope="module")
def keyed(serving: Serving, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server with keys from both places, over the fake engine."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("# ours\nfrom-file\n\n  spaced  \n")
    with serving(ServerConfig(api_key=(KEY, "two"), api_key_file=str(file), cors_origins=(ORIGIN,))) as server:
        yield server


def status(server: Any, method: str, target: str, headers: dict[str, str] | None = None) -> int:
    """The status of a request whose target goes out as it stands."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    try:
        connection.putrequest(method, target, skip_host=headers is not None and "Host" in headers)
        for name, value in (headers or {}).items():
            connection.putheader(name, value.encode())
        connection.endheaders()
        return connection.getresponse().status
    finally:
        connection.close()


def spellings(path: str) -> Iterator[str]:
    """A path of the table, and what a careless comparison may take for an open one, or route to it."""
    path = path.replace("{model_id}", "demo")
    yield path
    yield f"/{path}"
    yield "/" + path[1:].replace("/", "%2F")
    yield f"/health/..{path}"
    yield f"/health%2f..{path}"
    yield f"/health;{path}"
    yield f"{path}?x=/health"
    yield f"{path}/"
    yield f"http://x/health/../{path}"


def test_every_route_but_the_open_ones_asks_for_a_key(keyed: Any) -> None:
    paths = {*keyed.app.openapi()["paths"], "/openapi.json", "/nowhere", "/"}
    guarded = sorted(path for path in paths if path.encode() not in OPEN_PATHS)
    assert len(guarded) > 8
    found = {
        (method, target, host): status(keyed, method, target, {"Host": host})
        for path in guarded
        for target in spellings(path)
        for method, host in (("GET", "x"), ("POST", "x"), ("HEAD", "x"), ("PUT", "x/health"), ("GET", "x@/health?"))
    }
    assert {key: value for key, value in found.items() if value != 401} == {}


def test_the_open_routes_need_none(keyed: Any) -> None:
    assert {path: status(keyed, "GET", path.decode()) for path in OPEN_PATHS} == dict.fromkeys(OPEN_PATHS, 200)


@pytest.mark.parametrize("key", [KEY, "two", "from-file", "spaced"])
def test_every_key_opens_in_both_headers(keyed: Any, key: str) -> None:
    assert status(keyed, "GET", "/v1/models", {"Authorization": f"Bearer {key}"}) == 200
    assert status(keyed, "GET", "/v1/models", {"authorization": f"bearer {key}"}) == 200
    assert status(keyed, "GET", "/v1/models", {"x-api-key": key}) == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"Authorization": "Bearer "},
        {"x-api-key": ""},
        {"x-api-key": KEY[:-1]},
        {"x-api-key": KEY + "x"},
        {"x-api-key": "# ours"},
        {"api-key": KEY},
    ],
)
def test_a_wrong_key_does_not(keyed: Any, headers: dict[str, str]) -> None:
    assert status(keyed, "GET", "/v1/models", headers) == 401


def test_the_refusal_is_the_envelope_and_names_no_key(keyed: Any) -> None:
    response = httpx.post(f"{keyed.url}/v1/completions", json={"prompt": "x"})
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"]
    assert KEY not in response.text


def test_all_keys_are_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append(b) or a == b)
    keys = Keys(lambda scope, receive, send: None, ["a", "b", "c"], frozenset())  # type: ignore[arg-type,return-value]
    assert keys._may_pass({"headers": [(b"x-api-key", b"a")]})
    assert len(compared) == 3
    assert not keys._may_pass({"headers": [(b"x-api-key", b"d")]})


def test_tenants_share_no_cached_prefix(keyed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal prompts of different keys, or of different salts, have different roots; equal ones share theirs."""
    salts: list[str] = []
    submit = keyed.engine.submit
    monkeypatch.setattr(
        keyed.engine, "submit", lambda request, **rest: salts.append(request.cache_salt) or submit(request, **rest)
    )
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": [300], "max_tokens": 1},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    }
    with httpx.Client(base_url=keyed.url) as client:
        for path, body in bodies.items():
            for header in ({"authorization": "Bearer two"}, {"x-api-key": "two"}, {"x-api-key": "from-file"}):
                for salt in ({}, {"cache_salt": "mine"}):
                    assert client.post(path, json=body | salt, headers=header).status_code == 200
    first, salted, *_ = salts
    assert salts == [first, salted, first, salted, *salts[4:6]] * 2
    assert len(set(salts)) == 4
    assert not [salt for salt in salts if "two" in salt or "from-file" in salt]


def test_metrics_are_open_by_choice_only(keyed: Any, serving: Serving) -> None:
    assert status(keyed, "GET", "/metrics") == 401
    with serving(ServerConfig(api_key=("k",), metrics_without_key=True)) as server:
        assert status(server, "GET", "/metrics") == 200
        assert status(server, "GET", "/v1/models") == 401


def test_a_file_without_keys_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# none\n\n")
    with pytest.raises(ConfigError, match="holds no key"):
        read_keys(ServerConfig(api_key_file=str(tmp_path / "empty")))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(ServerConfig(api_key_file=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match="api_key is empty"):
        ServerConfig(api_key=("",))


def test_a_named_origin_is_let_in_and_no_other(keyed: Any, client: httpx.Client) -> None:
    asked = {"origin": ORIGIN, "access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
    with httpx.Client(base_url=keyed.url) as own:
        allowed = own.options("/v1/completions", headers=asked)
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, ORIGIN)
        refused = own.options("/v1/completions", headers={**asked, "origin": "https://evil.example"})
        assert (refused.status_code, refused.headers.get("access-control-allow-origin")) == (400, None)
        answer = own.get("/v1/models", headers={"origin": ORIGIN, "x-api-key": KEY.encode()})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, ORIGIN)
    without = client.options("/v1/completions", headers=asked)
    assert without.status_code == 405
    assert not [name for name in without.headers if name.startswith("access-control")]


def test_a_unix_socket_serves_and_only_a_dead_ones_place_is_taken(short_path: Path) -> None:
    path = short_path / "s"
    with bind_uds(str(path)) as listener:
        listener.listen()
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(Exception, match="cannot listen on --uds"):
            bind_uds(str(path))
    bind_uds(str(path)).close()
    path.unlink()
    path.write_text("a file of somebody's")
    with pytest.raises(Exception, match="cannot listen on --uds"):
        bind_uds(str(path))
    assert path.read_text() == "a file of somebody's"


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="ssl_certfile"):
        ServerConfig(ssl_keyfile="key.pem")
    with pytest.raises(ConfigError, match="cors_credentials"):
        ServerConfig(cors_origins=("*",), cors_credentials=True)
