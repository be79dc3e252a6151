"""The documentation keeps up: every hook, setting and platform stands in it, and its links lead somewhere."""

import ast
import dataclasses
import importlib.util
import re
import types
from pathlib import Path

from fairlead.config import ServerConfig, engine_settings, settings_of
from fairlead.request import SamplingParams

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def hooks(source: str) -> dict[str, str]:
    """Hook name to its docstring, of every function that is decorated as a specification."""
    return {
        node.name: ast.get_docstring(node) or ""
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and any("hookspec" in ast.unparse(d) for d in node.decorator_list)
    }


def hook_violations(source: str, page: str) -> list[str]:
    """Hooks without one sentence of docstring, or whose heading and sentence the page lacks."""
    found = []
    for name, sentence in hooks(source).items():
        if not sentence or "\n\n" in sentence or not sentence.endswith("."):
            found.append(f"{name} needs a docstring of one sentence")
        elif f"## `{name}" not in page or " ".join(sentence.split()) not in " ".join(page.split()):
            found.append(f"docs/hooks.md lacks {name} or its sentence: {sentence}")
    return found


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links whose file is missing."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    return [t for t in targets if "://" not in t and not (page.parent / t).exists()]


def generator() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_hook_is_documented() -> None:
    source = (ROOT / "core" / "fairlead" / "hookspecs.py").read_text(encoding="utf-8")
    assert "fairlead_platforms" in hooks(source)
    assert hook_violations(source, (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")) == []


def test_an_undocumented_hook_is_found() -> None:
    source = '@hookspec\ndef one():\n    """Gives one."""\n@hookspec(firstresult=True)\ndef two():\n    ...'
    assert hook_violations(source, "## `one()`\n\nGives\none.") == ["two needs a docstring of one sentence"]
    assert len(hook_violations(source, "## `one()`\n\nGives two.")) == 2


def test_the_generated_pages_are_up_to_date() -> None:
    pages = generator().pages()
    assert {page.name for page in pages} == {"settings.md", "flags.md", "metrics.md", "migration.md"}
    stale = [page.name for page, text in pages.items() if page.read_text(encoding="utf-8") != text]
    assert stale == [], "run: python docs/generate.py"


def test_every_setting_is_documented() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    settings = [*engine_settings(), *settings_of("server", ServerConfig)]
    assert len(settings) > 20
    assert [s.name for s in settings if f"| `{s.name}`" not in page or s.help not in page] == []


def test_every_sampling_parameter_is_documented() -> None:
    page = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    assert len(names) > 25
    assert [name for name in names if f"`{name}`" not in page] == []


def test_every_platform_stands_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    folders = [path.parent.name for path in (ROOT / "platforms").glob("*/pyproject.toml")]
    assert folders
    assert [name for name in folders if f"`platforms/{name}`" not in readme] == []


def test_links_lead_somewhere() -> None:
    found = {page.name: broken_links(page, page.read_text(encoding="utf-8")) for page in PAGES}
    assert {name: links for name, links in found.items() if links} == {}


def test_a_broken_link_is_found() -> None:
    text = "[a](LICENSE) [b](https://example.org/x) [c](nowhere.md#part) [d](#here)"
    assert broken_links(ROOT / "README.md", text) == ["nowhere.md"]
