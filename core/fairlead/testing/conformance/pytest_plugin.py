"""`pytest --fairlead-platform NAME` runs the conformance kit: one test per check, beside whatever else is collected."""

import os
from collections.abc import Iterator

import pytest

from fairlead.testing.conformance.check import FAILED, TIERS, UNSUPPORTED, Result
from fairlead.testing.conformance.client import CHECK_S, Kit, Listed

_KIT = pytest.StashKey[Kit]()


class ConvictedError(Exception):
    """A check failed; the message is all there is to say."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of the kit."""
    group = parser.getgroup("fairlead", "conformance of a Fairlead platform")
    group.addoption("--fairlead-platform", metavar="NAME", help="run the conformance checks of this platform")
    group.addoption(
        "--fairlead-tier", action="append", choices=TIERS, help="run this tier only; repeat it for more (default: all)"
    )
    group.addoption(
        "--fairlead-timeout", type=float, default=CHECK_S, metavar="S", help="seconds that one check may take"
    )


class ConformanceItem(pytest.Item):
    """One check, or the conviction of a platform that has none."""

    def __init__(self, *, check: Listed, convicted: Result | None = None, **more: object) -> None:
        super().__init__(**more)  # type: ignore[arg-type]
        self._check, self._convicted = check, convicted

    def runtest(self) -> None:
        """Fails with the kit's message; skips what the platform does not support."""
        result = self._convicted or self.config.stash[_KIT].run(self._check.id)
        if result.status == FAILED:
            raise ConvictedError(result.message)
        if result.status == UNSUPPORTED:
            pytest.skip(f"unsupported: {result.message}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: object = None) -> str:
        """The message alone."""
        return str(excinfo.value)

    def reportinfo(self) -> tuple["os.PathLike[str] | str", int | None, str]:
        """Where: no file, but a platform."""
        return self.path, None, self.name


@pytest.hookimpl(tryfirst=True)  # -k and the like choose among these too
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Adds the checks of the platform."""
    platform: str | None = config.getoption("--fairlead-platform")
    if platform is not None:
        items.extend(_items(session, config, platform))


def _items(session: pytest.Session, config: pytest.Config, platform: str) -> Iterator[pytest.Item]:
    tiers: list[str] = config.getoption("--fairlead-tier") or list(TIERS)
    config.stash[_KIT] = kit = Kit(platform, tiers=tiers, check_s=config.getoption("--fairlead-timeout"))
    checks, convicted = kit.list()
    if convicted is not None:
        checks = [Listed(tier=convicted.tier, name=convicted.name)]
    for check in checks:
        name = f"{platform}[{check.id}]"
        yield ConformanceItem.from_parent(session, name=name, check=check, convicted=convicted)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends the process of the checks."""
    if _KIT in config.stash:
        config.stash[_KIT].close()
