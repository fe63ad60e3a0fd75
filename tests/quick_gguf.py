"""gguf's reader in a quarter of the time: the same numbers, but not each as a map of the file of its own, which is most
of what reading a vocabulary of 49152 words takes; and the sample model's file is read once in a process."""

import functools


def install() -> None:
    try:
        import numpy as np
        from gguf import GGUFReader
    except ImportError:
        return
    read, known = GGUFReader.__init__, {}
    size = functools.cache(lambda dtype: np.dtype(dtype).itemsize)

    def get(self, offset, dtype, count=1, override_order=None):
        plain = self.__dict__.get("plain")
        if plain is None:
            plain = self.plain = self.data.view(np.ndarray)
        found = plain[offset : offset + size(dtype) * int(count)].view(dtype)
        order = self.byte_order if override_order is None else override_order
        return found if order == "I" else found.view(found.dtype.newbyteorder(order))

    @functools.wraps(read)
    def once(self, path, mode="r"):
        if mode != "r" or str(path) != _sample():
            return read(self, path, mode)
        if not known:
            read(self, path, mode)
            known.update(self.__dict__)
        self.__dict__.update(known)

    GGUFReader._get, GGUFReader.__init__ = get, once


@functools.cache
def _sample():
    from mistral.samples import smollm2_path

    try:
        return str(smollm2_path())
    except FileNotFoundError:
        return None
