"""Every error that Fairlead raises on purpose.

    FairleadError
    ├── ConfigError (ValueError)          an argument, flag or combination of them is wrong
    ├── ModelError                        a checkpoint cannot be used
    │   ├── ModelNotFoundError            no such directory, no config.json, no weights
    │   ├── CheckpointError               a file of it is broken (names file and tensor)
    │   ├── UnsupportedModelError         no model class for its architecture (lists those there are)
    │   │   └── AwaitedFormatError        its weights are rounded, which nothing reads yet (a ConfigError too)
    │   └── ModelMemoryError              it does not fit into memory (names needed, available, what to do)
    ├── PluginError                       a platform plugin is unusable
    │   ├── PluginContractError           it broke the contract (names plugin, hook, expected, got)
    │   └── PlatformUnavailableError      it was asked for and is not there, or refused (says why)
    ├── RequestError (ValueError)         one request is wrong; the engine goes on
    │   └── ContextLengthError            its prompt (or prompt + max_tokens) exceeds the context
    ├── KVCacheMemoryError                the KV cache does not fit (names needed, available, what fits)
    ├── MissingDependencyError (ImportError)   a feature was used whose package is not installed (names it)
    ├── DeadlineError                     a request waited or ran for too long
    └── EngineDeadError                   the engine has ended; its in-flight requests failed with it

Each message says what was asked, what was found and what to do, in one line.
"""

_DISTRIBUTIONS = {"zmq": "pyzmq", "yaml": "pyyaml", "prometheus_client": "prometheus-client"}


class FairleadError(Exception):
    """Base of all errors that Fairlead raises on purpose."""


class ConfigError(FairleadError, ValueError):
    """An argument, a flag or a combination of them is wrong."""


class ModelError(FairleadError):
    """A checkpoint cannot be used."""


class ModelNotFoundError(ModelError):
    """A model directory, or a file that it must hold, is missing."""


class CheckpointError(ModelError):
    """A checkpoint's file is broken or does not fit its config; the message names file and tensor."""


class UnsupportedModelError(ModelError):
    """No model class serves this architecture or one of its settings; the message lists what is served."""


class AwaitedFormatError(UnsupportedModelError, ConfigError):
    """A checkpoint's weights are rounded in a published format, none of which is read yet."""


class ModelMemoryError(ModelError):
    """A model does not fit into memory; the message names needed, available and what to do."""


class PluginError(FairleadError):
    """A platform plugin is unusable."""


class PluginContractError(PluginError):
    """A plugin broke the platform contract."""

    def __init__(self, *, plugin: str, hook: str, expected: str, got: str) -> None:
        super().__init__(f"plugin {plugin!r} broke the contract in {hook}: expected {expected}, got {got}")
        self.plugin, self.hook, self.expected, self.got = plugin, hook, expected, got


class PlatformUnavailableError(PluginError):
    """The platform that was asked for is missing, was refused or reports no device."""


class RequestError(FairleadError, ValueError):
    """One request is invalid; the engine and its other requests go on.

    `param` names the offending field as the user spelt it, where one field is to blame.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(RequestError):
    """A prompt, or a prompt plus max_tokens, exceeds the model's context."""


class KVCacheMemoryError(FairleadError):
    """The KV cache does not fit into memory; the message names needed, available and what would fit."""


class MissingDependencyError(FairleadError, ImportError):
    """A feature was used whose package is not installed; the message names it."""

    @classmethod
    def of(cls, feature: str, error: ModuleNotFoundError) -> "MissingDependencyError":
        """Says it of a failed import; re-raises one of a module of ours, which no install would mend."""
        package = (error.name or "").split(".")[0]
        if not package or package.startswith("fairlead"):
            raise error
        distribution = _DISTRIBUTIONS.get(package, package)
        return cls(f"{feature} needs the package {package!r}, which is not installed; pip install {distribution}")


class DeadlineError(FairleadError):
    """A request waited or ran longer than it was allowed to and was ended."""

    def __init__(self, message: str, *, queued: bool) -> None:
        super().__init__(message)
        self.queued = queued


class EngineDeadError(FairleadError):
    """The engine has ended; requests in flight failed with it and no new one is accepted."""


def one_line(error: BaseException) -> str:
    """An exception as "Type: text", on one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500]
