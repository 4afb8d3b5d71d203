"""A file system of a few megabytes, in memory, that can be made full: a real one, with the errors of a real one."""

import os
import subprocess
from pathlib import Path


class SmallDisk:
    """A context manager: `folder` is a disk of `size` bytes where this user may mount one, else any folder.

    `can_fill` says which. To fill it, something else writes there: a file of ballast.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.can_fill = False
        self._ballast = folder / "ballast"

    def __enter__(self) -> "SmallDisk":
        self.folder.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={self.size}", "tmpfs", str(self.folder)]
        self.can_fill = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
        return self

    def __exit__(self, *_: object) -> None:
        if self.can_fill:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    @property
    def free(self) -> int:
        """Bytes that are left."""
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize

    def fill(self, room: int) -> None:
        """Leaves `room` bytes at most: what has become free in the meantime is taken too."""
        excess = self.free - room
        block = os.statvfs(self.folder).f_frsize
        if excess >= block:
            with self._ballast.open("ab") as file:
                # Nobody else may take what is asked for between the question and this.
                try:
                    os.posix_fallocate(file.fileno(), file.tell(), excess // block * block)
                except OSError:
                    return

    def clear(self) -> None:
        """Takes the ballast away."""
        self._ballast.unlink(missing_ok=True)
