"""The state from which a killed run goes on: finished pieces, each a file."""

import hashlib
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from zsq.errors import JobError
from zsq.files import write_atomic

State = MutableMapping[str, dict[str, Tensor]]


class Prefixed(MutableMapping[str, dict[str, Tensor]]):
    """Those pieces of a state whose names begin with a prefix, by the rest of their names."""

    def __init__(self, state: State, prefix: str) -> None:
        self._state, self._prefix = state, prefix

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        return self._state[self._prefix + key]

    def __setitem__(self, key: str, tensors: dict[str, Tensor]) -> None:
        self._state[self._prefix + key] = tensors

    def __delitem__(self, key: str) -> None:
        del self._state[self._prefix + key]

    def __iter__(self) -> Iterator[str]:
        return (k.removeprefix(self._prefix) for k in self._state if k.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class StateFolder(MutableMapping[str, dict[str, Tensor]]):
    """Finished pieces of a run on disk, one file each; a damaged piece counts as not finished.

    A file is a safetensors file followed by the SHA-256 of it (32 bytes).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._written: set[str] = set()  # by this process, which counts on them

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        try:
            content = self._file(key).read_bytes()
        except OSError:
            content = b""
        if hashlib.sha256(content[:-32]).digest() == content[-32:]:
            return load_safetensors(content[:-32])
        if key in self._written:
            raise JobError(
                f"{self._file(key)}, which this run wrote, was removed or damaged while it was at work. The "
                "same command goes on from what is left."
            )
        raise KeyError(key)

    def __setitem__(self, key: str, tensors: dict[str, Tensor]) -> None:
        plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        content = save_safetensors(plain)
        write_atomic(self._file(key), content + hashlib.sha256(content).digest())
        self._written.add(key)

    def __delitem__(self, key: str) -> None:
        self._file(key).unlink()
        self._written.discard(key)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(p.stem for p in self.path.glob("*.piece") if not p.name.startswith(".")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _file(self, key: str) -> Path:
        return self.path / f"{key}.piece"
