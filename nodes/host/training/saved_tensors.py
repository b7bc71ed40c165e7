"""Copies of tensors that autograd has saved for the backward pass, made before something writes over them.

torch's own `allow_mutation_on_saved_tensors` does not see a write through another view of the same memory, such as
`x[:, :16] *= gate` after x was saved, and then the gradient is wrong without an error.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@contextmanager
def saved_tensors_may_change() -> Iterator[None]:
    """Let operations write over saved tensors within the block, in which forward and backward pass must be."""
    copying = _CopyBeforeWrite()
    with saved_tensors_hooks(copying.save, lambda saved: saved.tensor), copying:
        yield


class _Saved:
    """A saved tensor, or its copy once something writes over it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _CopyBeforeWrite(TorchDispatchMode):
    """Looks at each operation within the block before it runs."""

    def __init__(self) -> None:
        super().__init__()
        # Weak, because the graph frees what it has used. A storage with such a tensor is in use, so its key is unique.
        self._by_storage: dict[int, WeakSet[_Saved]] = {}

    def save(self, tensor: Tensor) -> _Saved:
        """Return what the graph keeps in place of a tensor."""
        saved = _Saved(tensor)
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
            view = saved.tensor.dtype, saved.tensor.storage_offset(), saved.tensor.shape, saved.tensor.stride()
            if view not in copies:
                copies[view] = saved.tensor.clone()
            saved.tensor = copies[view]


def _storage(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
