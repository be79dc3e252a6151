"""`Record`: the base of small frozen records that are made once per sequence and step.

msgspec makes one at a fifth of a dataclass's cost. Where it is not installed (an offline install without dependencies),
the same classes are frozen dataclasses: slower, and equal in all else.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import msgspec

    class Record(msgspec.Struct, frozen=True, kw_only=True, gc=False):
        """Frozen; fields are given by name."""

else:
    try:
        import msgspec
    except ModuleNotFoundError as error:
        if error.name != "msgspec":
            raise

        class Record:
            """Makes every subclass a frozen dataclass whose fields are given by name."""

            def __init_subclass__(cls, **options: object) -> None:
                dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    else:

        class Record(msgspec.Struct, frozen=True, kw_only=True, gc=False):
            """Frozen; fields are given by name."""


T = TypeVar("T", bound=Record)


def replaced(record: T, **changes: Any) -> T:
    """The record with some of its fields changed."""
    replace: Any = dataclasses.replace if dataclasses.is_dataclass(record) else msgspec.structs.replace
    replaced: T = replace(record, **changes)
    return replaced
