"""How many bytes of new tensors a function holds at its peak: what a GPU's allocator would count, on any device."""

import weakref

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While entered, counts the storage that operators make: `now` is alive, `peak` was at most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {storage for tensor in _tensors((args, kwargs)) if (storage := _storage_of(tensor)) is not None}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            number = _storage_of(tensor)
            if number not in known and number not in self._alive:
                self._count(number, tensor.untyped_storage())
        return result

    def _count(self, number, storage):
        size = storage.nbytes()
        self._alive[number] = weakref.finalize(storage, self._free, number, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _free(self, number, size):
        self._alive.pop(number, None)
        self.now -= size


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if hasattr(leaf, "untyped_storage")]


def _storage_of(tensor):
    return tensor.untyped_storage()._cdata
