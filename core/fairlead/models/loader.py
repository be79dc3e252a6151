"""Fills a model from safetensors: plan on the headers, then stream each tensor into its place.

A tensor is read by mmap and copied straight into its slice of the (possibly merged) weight. A layer that is complete
is packed as its method likes, so the peak is the model plus one layer. Whatever does not fit is found before anything
is allocated.
"""

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open

from fairlead.checkpoint import Checkpoint, StoredTensor
from fairlead.errors import CheckpointError
from fairlead.interface import MemoryAllocator
from fairlead.models.progress import loading_bar

_FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")
# Stored by old versions of the reference codes: tables and masks, which are computed here.
_IGNORED_SUFFIXES = (
    "rotary_emb.inv_freq",
    "rotary_pos_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)


Index = tuple[int | slice, ...]


@runtime_checkable
class Merged(Protocol):
    """A layer whose parameters a checkpoint may store in pieces."""

    def pieces(self, path: str, name: str) -> Iterator[tuple[str, Index]]:
        """(stored name, where it goes in parameter `name`), if the layer stands at `path`."""
        ...


@runtime_checkable
class Packs(Protocol):
    """A layer that lays its weights out anew once they are loaded. Its one-dimensional parameters stay."""

    def pack_weights(self) -> None:
        """Called once, when all its parameters are filled."""
        ...

    def packed_bytes(self) -> int:
        """Device memory of what pack_weights makes; known before anything is loaded."""
        ...

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        """As of any torch.nn.Module."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """Where one stored tensor goes: the part `index` of a parameter."""

    parameter: torch.nn.Parameter
    index: Index = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter[self.index].shape)


@runtime_checkable
class LoadsItself(Protocol):
    """A model whose checkpoint only its own code can read; it does what the two functions below do."""

    def load_weights(self, checkpoint: Checkpoint, allocator: MemoryAllocator) -> int:
        """Loads all weights; returns their bytes."""
        ...

    def dummy_weights(self, allocator: MemoryAllocator, *, seed: int) -> int:
        """Fills the model with random weights; returns their bytes."""
        ...


def load_weights(model: torch.nn.Module, checkpoint: Checkpoint, allocator: MemoryAllocator) -> int:
    """Loads all weights; returns their bytes. Raises CheckpointError or ModelNotFoundError naming file and tensor."""
    if isinstance(model, LoadsItself):
        return model.load_weights(checkpoint, allocator)
    unused: tuple[str, ...] = getattr(model, "unused_weights", ())
    stored = {name: tensor for name, tensor in checkpoint.tensors().items() if not name.startswith(unused)}
    targets = _targets(model, stored)
    _check(targets, stored, checkpoint)
    filler = _Filler(model, (target.parameter for target in targets.values()), allocator)
    files: dict[str, list[str]] = {}
    for name in targets:
        files.setdefault(str(stored[name].file), []).append(name)
    with loading_bar(sum(stored[name].num_bytes for name in targets)) as advance:
        for file, names in files.items():
            try:
                with safe_open(file, framework="pt") as reader:
                    for name in names:
                        target = targets[name]
                        filler.memory(target.parameter)[target.index].copy_(reader.get_tensor(name))
                        filler.note_filled(target.parameter)
                        advance(stored[name].num_bytes)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} cannot be read: {error}") from error
    return filler.num_bytes


def dummy_weights(model: torch.nn.Module, allocator: MemoryAllocator, *, seed: int) -> int:
    """Fills the model with small random weights (norms with ones), for benchmarks; returns their bytes.

    They are drawn where the tensors are: eight billion of them take a minute on a host, and a second on a device.
    """
    if isinstance(model, LoadsItself):
        return model.dummy_weights(allocator, seed=seed)
    parameters = list(dict.fromkeys(model.parameters()))
    filler = _Filler(model, parameters, allocator)
    generators: dict[torch.device, torch.Generator] = {}
    for parameter in parameters:
        tensor = filler.memory(parameter)
        if tensor.device not in generators:
            generators[tensor.device] = torch.Generator(tensor.device).manual_seed(seed)
        if tensor.dim() == 1:
            tensor.fill_(1.0)
        else:
            drawn = torch.empty(tensor.shape, device=tensor.device)
            tensor.copy_(drawn.normal_(0, 0.02, generator=generators[tensor.device]))
        filler.note_filled(parameter)
    return filler.num_bytes


def weights_bytes(model: torch.nn.Module) -> int:
    """Device memory that the weights of a model will take once they are loaded and packed."""
    packs = [module for module in model.modules() if isinstance(module, Packs)]
    weights = {p for module in packs for p in module.parameters(recurse=False) if p.dim() > 1}
    plain = {p for module in model.modules() if module not in packs for p in module.parameters(recurse=False)}
    rest = plain | {p for p in model.parameters() if p not in weights}
    return sum(p.nbytes for p in rest) + sum(module.packed_bytes() for module in packs)


def _targets(model: torch.nn.Module, stored: Container[str]) -> dict[str, _Target]:
    """Checkpoint name to place. A weight shared by two layers (tied embeddings) is read under its first name.

    What a merged layer computes as one is read whole where the checkpoint has it so, else piece by piece. A model's
    `optional_prefix` is left out where the checkpoint was saved without its head, as GPT-2's was.
    """
    names: Mapping[str, str] = getattr(model, "checkpoint_names", {})
    targets: dict[str, _Target] = {}
    seen: set[torch.nn.Parameter] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen:
                continue
            seen.add(parameter)
            whole = _stored_name(f"{path}.{name}", names, stored)
            if isinstance(module, Merged) and whole not in stored:
                for piece, index in module.pieces(path, name):
                    found = _stored_name(piece, names, stored)
                    targets[found] = _Target(parameter=parameter, index=index)
            else:
                targets[whole] = _Target(parameter=parameter)
    prefix: str = getattr(model, "optional_prefix", "")
    if next(iter(targets)) not in stored:
        return {name.removeprefix(prefix): target for name, target in targets.items()}
    return targets


def _stored_name(name: str, names: Mapping[str, str], stored: Container[str]) -> str:
    """The checkpoint's own spelling of a parameter's name; the plain one where that is what it stores."""
    if name in stored:
        return name
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


def _check(targets: dict[str, _Target], stored: dict[str, StoredTensor], checkpoint: Checkpoint) -> None:
    where = checkpoint.directory
    missing = [name for name in targets if name not in stored]
    if missing:
        raise CheckpointError(f"{where}: tensor {missing[0]!r} is missing ({len(missing)} in all)")
    for name, target in targets.items():
        tensor = stored[name]
        if tensor.shape != target.shape:
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} has shape {tensor.shape}, but config.json asks for {target.shape}"
            )
        if tensor.dtype not in _FLOAT_DTYPES:
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} has dtype {tensor.dtype}; supported: {', '.join(_FLOAT_DTYPES)}"
            )
    tied = "lm_head.weight" if "lm_head.weight" not in targets else None
    extra = [n for n in stored if n not in targets and n != tied and not n.endswith(_IGNORED_SUFFIXES)]
    if extra:
        name = extra[0]
        raise CheckpointError(
            f"{stored[name].file}: tensor {name!r} has no place in this architecture ({len(extra)} such tensors)"
        )


class _Filler:
    """Gives each parameter memory when its first tensor comes, and packs each layer once its last one has come.

    `filled` names a parameter once for every tensor that it waits for. `num_bytes` counts what was loaded.
    """

    def __init__(
        self, model: torch.nn.Module, filled: Iterable[torch.nn.Parameter], allocator: MemoryAllocator
    ) -> None:
        self._allocator, self.num_bytes = allocator, 0
        self._memory: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._missing = Counter(filled)
        self._owners: dict[torch.nn.Parameter, list[torch.nn.Module]] = {}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                self._owners.setdefault(parameter, []).append(module)

    def memory(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Where the parameter's values go."""
        if parameter not in self._memory:
            tensor = self._allocator.empty(tuple(parameter.shape), parameter.dtype, tag="weights")
            self._memory[parameter] = tensor
            self.num_bytes += tensor.nbytes
        return self._memory[parameter]

    def note_filled(self, parameter: torch.nn.Parameter) -> None:
        """Counts one tensor; with its last one the parameter is placed, and layers that are complete are packed."""
        self._missing[parameter] -= 1
        if self._missing[parameter]:
            return
        placed = torch.nn.Parameter(self._memory.pop(parameter), requires_grad=False)
        for module in self._owners.pop(parameter):
            for name, value in list(module.named_parameters(recurse=False)):
                if value is parameter:
                    setattr(module, name, placed)
            if isinstance(module, Packs) and not any(p in self._owners for p in module.parameters(recurse=False)):
                module.pack_weights()
