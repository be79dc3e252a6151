"""Models, health and version."""

import httpx

import fairlead


def test_the_list_of_models(client: httpx.Client) -> None:
    body = client.get("/v1/models").json()
    assert body["object"] == "list"
    [model] = body["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("demo", "model", 256)
    assert set(model) >= {"created", "owned_by", "root", "parent", "permission"}
    assert client.get("/v1/models/demo").json() == model


def test_health_and_ping_are_empty(client: httpx.Client) -> None:
    for response in (client.get("/health"), client.get("/ping"), client.post("/ping")):
        assert (response.status_code, response.content) == (200, b"")


def test_version(client: httpx.Client) -> None:
    assert client.get("/version").json() == {"version": fairlead.__version__}


def test_nothing_redirects(client: httpx.Client) -> None:
    for path in ("/metrics", "/v1/models", "/health"):
        assert client.get(path).status_code == 200
        assert client.get(path + "/").status_code == 404


def test_the_schema_lists_the_routes(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models"} <= set(paths)
