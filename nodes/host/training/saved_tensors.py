"""Copies of tensors that autograd has saved for the backward pass, made before something writes over them.

torch's own `allow_mutation_on_saved_tensors` does not see a write through another view of the same memory, such as
`x[:, :16] *= gate` after x was saved, and then the gradient is wrong without an error.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar
from weakref import WeakSet, ref

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class SavedTensors:
    """The tensors that a function saves for the backward pass, although it may write over them later.

    The first run looks at each operation, and finds which of them are written over. To look takes as long as to start
    an operation on a GPU, so later runs copy the same ones when they are saved, and only check that no others changed.
    """

    def __init__(self) -> None:
        self.written: frozenset[int] | None = None
        """Which ones are written over, by their order; None before the first run."""

    def run(self, forward: Callable[[], T]) -> T:
        """Return what `forward` returns, with a graph for the backward pass; it may be called a second time."""
        if self.written is not None:
            copying = _CopyWhenSaved(self.written)
            with saved_tensors_hooks(copying.save, _tensor_of):
                result = forward()
            if copying.is_intact():
                return result
        watching = _CopyBeforeWrite()
        with saved_tensors_hooks(watching.save, _tensor_of), watching:
            result = forward()
        self.written = frozenset(watching.written)
        return result


class _Saved:
    """What the graph keeps in place of a saved tensor: the tensor, or its copy."""

    def __init__(self, tensor: Tensor, number: int) -> None:
        self.tensor, self.number, self.version = tensor, number, tensor._version


def _tensor_of(saved: _Saved) -> Tensor:
    return saved.tensor


class _CopyWhenSaved:
    """Copies some of the saved tensors at once."""

    def __init__(self, written: frozenset[int]) -> None:
        self._written = written
        # Weak, because the graph frees what it has used.
        self._saved: list[ref[_Saved]] = []
        self._copies: dict[Any, tuple[Tensor, Tensor]] = {}
        """Tensors and their copies. As the tensors stay alive, the keys of their storages are unique."""

    def save(self, tensor: Tensor) -> _Saved:
        """Return what the graph keeps in place of a tensor."""
        number = len(self._saved)
        saved = _Saved(self._copy(tensor) if number in self._written else tensor, number)
        self._saved.append(ref(saved))
        return saved

    def _copy(self, tensor: Tensor) -> Tensor:
        content = _storage(tensor), tensor._version, _view(tensor)
        if content not in self._copies:
            self._copies[content] = tensor, tensor.clone()
        return self._copies[content][1]

    def is_intact(self) -> bool:
        """Return whether no saved tensor was written over; all views of a tensor count its writes together."""
        kept = (each() for each in self._saved)
        return all(saved is None or saved.tensor._version == saved.version for saved in kept)


class _CopyBeforeWrite(TorchDispatchMode):
    """Looks at each operation within the block before it runs, and copies what it writes over."""

    def __init__(self) -> None:
        super().__init__()
        self.written: set[int] = set()
        self._count = 0
        # Weak, because the graph frees what it has used. A storage with such a tensor is in use, so its key is unique.
        self._by_storage: dict[int, WeakSet[_Saved]] = {}

    def save(self, tensor: Tensor) -> _Saved:
        """Return what the graph keeps in place of a tensor."""
        saved = _Saved(tensor, self._count)
        self._count += 1
        self._by_storage.setdefault(_storage(tensor), WeakSet()).add(saved)
        return saved

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        declared, options = function._schema.arguments, options or {}
        values = {argument.name: value for argument, value in zip(declared, arguments, strict=False)} | dict(options)
        written = (each.name for each in declared if each.alias_info is not None and each.alias_info.is_write)
        for tensor in tree_leaves([values.get(name) for name in written]):
            if isinstance(tensor, Tensor):
                self._copy(_storage(tensor))
        return function(*arguments, **options)

    def _copy(self, storage: int) -> None:
        copies: dict[Any, Tensor] = {}
        for saved in self._by_storage.pop(storage, ()):
            view = _view(saved.tensor)
            if view not in copies:
                copies[view] = saved.tensor.clone()
            saved.tensor = copies[view]
            self.written.add(saved.number)


def _view(tensor: Tensor) -> tuple[object, ...]:
    """Return what distinguishes views of one storage."""
    return tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()


def _storage(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
