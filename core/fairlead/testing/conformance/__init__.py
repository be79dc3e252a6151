"""The conformance kit: what a platform must do, checked on the platform itself, with or without its hardware.

`fairlead conform --platform NAME` and `pytest --fairlead-platform NAME` run the same checks, tier after tier. They run
in a process of their own (`worker`), so that a plugin that hangs or dies is convicted like any other.
Importing this package imports no torch.
"""

from fairlead.testing.conformance.check import TIERS, Check, Outcome, Result
from fairlead.testing.conformance.client import Kit, conform
from fairlead.testing.conformance.report import as_json, as_markdown, as_text

__all__ = ["TIERS", "Check", "Kit", "Outcome", "Result", "as_json", "as_markdown", "as_text", "conform"]
