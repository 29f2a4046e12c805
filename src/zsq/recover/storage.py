"""Where the tensors between units are kept while they are needed: in memory, or in files mapped into it."""

import mmap
import os
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from zsq.errors import JobError


class Storage:
    """Makes room for tensors of many images.

    Without a folder, room is on the device of what is put there. With one, it is in files without names that
    vanish with their tensors or with the process; what is read or written moves between device and CPU.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    def room(self, piece: Tensor, rows: int) -> Tensor:
        """Uninitialised: shape of `piece` but for `rows` along axis 0; channels-last in memory if `piece` is.

        Raises:
            JobError: the disk is full, or the folder cannot be written.
        """
        last = piece.ndim == 4 and not piece.is_contiguous()
        last = last and piece.is_contiguous(memory_format=torch.channels_last)
        shape = (rows, *piece.shape[1:])
        if self.folder is None:
            layout = torch.channels_last if last else torch.contiguous_format
            return torch.empty(shape, dtype=piece.dtype, device=piece.device, memory_format=layout)
        flat = torch.frombuffer(self._map(rows * piece[:1].numel() * piece.element_size()), dtype=piece.dtype)
        if last:
            _, channels, height, width = shape
            return flat.view(rows, height, width, channels).permute(0, 3, 1, 2)
        return flat.view(shape)

    def release(self) -> None:
        """Let go of what is in memory of the files; it is read again when it is needed."""
        if hasattr(mmap, "MADV_DONTNEED"):  # elsewhere the system decides
            for mapped in list(self._maps):
                mapped.madvise(mmap.MADV_DONTNEED)

    def _map(self, size: int) -> mmap.mmap:
        assert self.folder is not None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as file:
                if hasattr(os, "posix_fallocate"):  # else a full disk would end the process without a word
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise JobError(
                f"{size / 2**30:.1f} GiB for tensors between units cannot be kept in {self.folder}: "
                f"{error.strerror or error}. Free some space, or allow more --memory."
            ) from error
        self._maps.add(mapped)
        return mapped


MEMORY = Storage()
