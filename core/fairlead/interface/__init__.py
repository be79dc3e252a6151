"""What a platform or another plugin implements, and nothing else.

Importing this package needs only the standard library and pluggy: the types that mention torch do so for the type
checker alone. Start with PlatformSpec, which the hook `fairlead_platforms` returns, then Platform.
"""

import pluggy

from fairlead.interface.attention import (
    AttentionBackend,
    AttentionMetadata,
    AttentionShape,
    AttentionSpec,
    HostCache,
    KVCache,
)
from fairlead.interface.memory import MemoryAllocator, MemoryInfo, MemoryProfile
from fairlead.interface.moe import MoeSpec
from fairlead.interface.platform import Platform
from fairlead.interface.sampling import LogitsProcessor
from fairlead.interface.scheduling import QueuedRequest, SchedulingPolicy
from fairlead.interface.spec import PLATFORM_API, Capabilities, Defaults, Device, OpProvider, PlatformSpec

hookimpl = pluggy.HookimplMarker("fairlead")

__all__ = [
    "PLATFORM_API",
    "AttentionBackend",
    "AttentionMetadata",
    "AttentionShape",
    "AttentionSpec",
    "Capabilities",
    "Defaults",
    "Device",
    "HostCache",
    "KVCache",
    "LogitsProcessor",
    "MemoryAllocator",
    "MemoryInfo",
    "MemoryProfile",
    "MoeSpec",
    "OpProvider",
    "Platform",
    "PlatformSpec",
    "QueuedRequest",
    "SchedulingPolicy",
    "hookimpl",
]
