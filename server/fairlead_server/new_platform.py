"""`fairlead new-platform`: writes a package that is a platform from the first minute, to be made another one's."""

import keyword
import re
from importlib import resources
from pathlib import Path
from string import Template

from fairlead.errors import ConfigError
from fairlead.interface import PLATFORM_API
from fairlead.plugins import discover

GUIDE = "https://github.com/fairlead/fairlead/blob/main/docs/writing_a_platform.md"
PRIORITY = -1  # below the CPU, so that nobody gets it by accident while it is only a copy of it
FILES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "package/__init__.py": "fairlead_{name}/__init__.py",
    "package/plugin.py": "fairlead_{name}/plugin.py",
    "package/platform.py": "fairlead_{name}/platform.py",
    "tests/test_platform.py": "tests/test_platform.py",
    "ci/conformance.yml": ".github/workflows/conformance.yml",
}


def write(name: str, directory: Path | None) -> Path:
    """Writes the package into `directory` (fairlead-NAME if not given), which must be missing or empty; returns it.

    Raises ConfigError on a name that is none, or that an installed platform has.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ConfigError(f"{name!r} is no name for a platform: use small letters, digits and _, such as 'acme_one'")
    taken = [record for record in discover() if record.name == name]
    if taken:
        owner = f"{taken[0].distribution} {taken[0].version}"
        raise ConfigError(f"there is a platform {name!r} already, of {owner}; choose another name")
    folder = directory or Path(f"fairlead-{name.replace('_', '-')}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already; name an empty directory with --directory")
    title = "".join(part.capitalize() for part in name.split("_"))
    values = {"name": name, "dashed": name.replace("_", "-"), "title": title, "api": PLATFORM_API, "guide": GUIDE}
    templates = resources.files("fairlead_server") / "templates" / "platform"
    for source, target in FILES.items():
        text = (templates / f"{source}.tmpl").read_text(encoding="utf-8")
        file = folder / target.format(name=name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(Template(text).substitute(values, priority=PRIORITY), encoding="utf-8")
    return folder
