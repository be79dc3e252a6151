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
    RotaryAttention,
)
from fairlead.interface.collectives import Communicator
from fairlead.interface.graph import GraphRunner
from fairlead.interface.linear import (
    ACTIVATIONS,
    GATED_ACTIVATIONS,
    UNQUANTIZED,
    FusedLinearMethod,
    LinearMethod,
    LinearShape,
)
from fairlead.interface.memory import TAGS, MemoryAllocator, MemoryInfo, MemoryProfile
from fairlead.interface.moe import ExpertsMethod, MoeSpec
from fairlead.interface.platform import Platform
from fairlead.interface.sampling import LogitsProcessor
from fairlead.interface.scheduling import QueuedRequest, SchedulingPolicy
from fairlead.interface.spec import PLATFORM_API, Capabilities, Defaults, Device, OpProvider, PlatformSpec
from fairlead.interface.streams import Event, Stream

hookimpl = pluggy.HookimplMarker("fairlead")

__all__ = [
    "ACTIVATIONS",
    "GATED_ACTIVATIONS",
    "PLATFORM_API",
    "TAGS",
    "UNQUANTIZED",
    "AttentionBackend",
    "AttentionMetadata",
    "AttentionShape",
    "AttentionSpec",
    "Capabilities",
    "Communicator",
    "Defaults",
    "Device",
    "Event",
    "ExpertsMethod",
    "FusedLinearMethod",
    "GraphRunner",
    "HostCache",
    "KVCache",
    "LinearMethod",
    "LinearShape",
    "LogitsProcessor",
    "MemoryAllocator",
    "MemoryInfo",
    "MemoryProfile",
    "MoeSpec",
    "OpProvider",
    "Platform",
    "PlatformSpec",
    "QueuedRequest",
    "RotaryAttention",
    "SchedulingPolicy",
    "Stream",
    "hookimpl",
]
