"""deploy/ names what exists: flags and variables of the settings, routes, metrics, files."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from fairlead.config import ServerConfig, engine_settings, settings_of
from fairlead_server.app import create_app
from fairlead_server.metrics import SERIES

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SETTINGS = [*engine_settings(), *settings_of("server", ServerConfig)]
FLAGS = {f"--{name.replace('_', '-')}" for s in SETTINGS for name in (s.name, *s.aliases)}
VARIABLES = {f"FAIRLEAD_{setting.name.upper()}" for setting in SETTINGS}
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def routes() -> set[str]:
    engine = type("Engine", (), {"info": type("Info", (), {"model": "demo", "max_model_len": 9})(), "observer": None})()
    return set(create_app(engine, ServerConfig()).openapi()["paths"])


def unknown_flags(arguments: list[str]) -> list[str]:
    return [a for a in arguments if a.startswith("--") and a.partition("=")[0] not in FLAGS]


def unknown_series(text: str) -> list[str]:
    """Names with our prefixes, in a query, that no series bears."""
    known = set()
    for series in SERIES:
        ends = ("_bucket", "_sum", "_count") if series.kind == "histogram" else ("",)
        known |= {series.full_name + end for end in ends}
    return [name for name in re.findall(r"(?:fairlead|vllm):(\w+)", text) if name not in known]


def test_the_manifests_name_real_flags() -> None:
    [compose] = documents("compose.yaml")
    deployment = documents("kubernetes/fairlead.yaml")[0]
    commands = [
        compose["services"]["fairlead"]["command"],
        deployment["spec"]["template"]["spec"]["containers"][0]["args"],
    ]
    assert all(len(command) > 3 for command in commands)
    assert [flag for command in commands for flag in unknown_flags(command)] == []
    assert unknown_flags(["demo", "--shutdown-timout=5"]) == ["--shutdown-timout=5"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_file_names_real_variables_and_series_and_no_path_of_a_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found = set(re.findall(r"\bFAIRLEAD_[A-Z_]+\b", text))
    assert found <= VARIABLES, found - VARIABLES
    assert unknown_series(text) == [] or path.parent.name not in ("prometheus", "grafana")
    assert "/work/" not in text


def test_an_unknown_series_is_found() -> None:
    assert unknown_series("rate(fairlead:prompt_tokens[5m]) + vllm:prompt_tokens_total") == ["prompt_tokens"]


def test_probes_ask_real_routes() -> None:
    container = documents("kubernetes/fairlead.yaml")[0]["spec"]["template"]["spec"]["containers"][0]
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/health/startup", "readiness": "/health/ready", "liveness": "/health/live"}
    texts = [(DEPLOY / name).read_text(encoding="utf-8") for name in ("Dockerfile", "compose.yaml")]
    asked = {path for text in texts for path in re.findall(r"127\.0\.0\.1:8000(/[\w/]+)", text)}
    [scrape] = documents("prometheus/prometheus.yaml")[0]["scrape_configs"]
    assert asked == {"/health", "/health/ready"}
    assert {*probes.values(), *asked, scrape["metrics_path"]} <= routes()


def test_there_is_time_to_drain() -> None:
    [compose] = documents("compose.yaml")
    service = compose["services"]["fairlead"]
    timeout = int(service["command"][service["command"].index("--shutdown-timeout") + 1])
    assert int(service["stop_grace_period"].removesuffix("s")) > timeout
    pod = documents("kubernetes/fairlead.yaml")[0]["spec"]["template"]["spec"]
    arguments = dict(a.partition("=")[::2] for a in pod["containers"][0]["args"])
    pause = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > int(arguments["--shutdown-timeout"]) + pause


def test_the_kubernetes_objects_fit_each_other() -> None:
    deployment, service, budget = documents("kubernetes/fairlead.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        budget["spec"]["selector"]["matchLabels"],
    ):
        assert selector == labels
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert service["spec"]["ports"][0]["targetPort"] in {port["name"] for port in container["ports"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("file", sorted(DEPLOY.glob("Dockerfile*")), ids=lambda file: file.name)
def test_an_image_copies_what_is_there_and_listens_where_it_says(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    copied = [line.split()[1:-1] for line in text.splitlines() if re.match(r"COPY (?!--)", line)]
    assert [name for names in copied for name in names if not (ROOT / name).exists()] == []
    assert "FAIRLEAD_HOST=0.0.0.0" in text
    assert f"EXPOSE {ServerConfig().port}" in text
    assert text.count("FROM ") == 2
    assert re.search(r"^USER fairlead$", text, re.MULTILINE)
    for line in re.findall(r"^(?:CMD|ENTRYPOINT) (.*)$", text, re.MULTILINE):
        assert isinstance(json.loads(line), list)  # the exec form: signals reach the server itself


def test_compose_mounts_what_is_there() -> None:
    [compose] = documents("compose.yaml")
    mounts = [volume for s in compose["services"].values() for volume in s.get("volumes", ())]
    sources = [mount.split(":")[0] for mount in mounts]
    assert [s for s in sources if s.startswith(".") and not (DEPLOY / s).is_file()] == []
    assert {s for s in sources if not s.startswith(".")} == set(compose["volumes"])


def test_nginx_balances_and_streams() -> None:
    text = (DEPLOY / "nginx" / "nginx.conf").read_text(encoding="utf-8")
    plain = re.sub(r"#.*", "", text)
    assert plain.count("{") == plain.count("}")
    statements = [s.strip() for s in re.split(r"[;{}]", plain) if s.strip()]
    for wanted in ("least_conn", "proxy_buffering off", "proxy_http_version 1.1", "client_max_body_size 32m"):
        assert wanted in statements
    [upstream] = [s for s in statements if s.startswith("server fairlead")]
    assert upstream.split()[1] == "fairlead:8000"


def test_the_alerts_and_the_dashboard_have_what_they_need() -> None:
    [group] = documents("prometheus/alerts.yaml")[0]["groups"]
    assert len(group["rules"]) >= 5
    for rule in group["rules"]:
        assert {"alert", "expr", "labels", "annotations"} <= set(rule)
        assert rule["expr"].count("(") == rule["expr"].count(")")
    dashboard = json.loads((DEPLOY / "grafana" / "fairlead.json").read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(queries) >= 15
    assert all("fairlead:" in query and query.count("(") == query.count(")") for query in queries)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_lints_of_the_tools_that_are_there() -> None:
    """Where docker is there, its own parser reads the compose file."""
    compose = ["docker", "compose", "-f", str(DEPLOY / "compose.yaml"), "config", "--quiet"]
    try:
        if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode != 0:
            pytest.skip("docker compose is not there")
    except FileNotFoundError:
        pytest.skip("docker is not there")
    done = subprocess.run(compose, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
