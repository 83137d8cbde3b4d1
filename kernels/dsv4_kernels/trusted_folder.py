"""A folder of native code: what lies in it is run, so nobody else may be able to write there.

The folder and each object belong to this user or to root and are writable by nobody else. The
folder is opened once, its files relative to it, and no symbolic link is followed: what was checked
is what is loaded, whatever the folders above allow. The SHA-256 of an object's content is part of
its name, KEY.SHA256.o, because a loader crashes on an object that was cut short.
"""

import contextlib
import fcntl
import hashlib
import os
import secrets
import stat
import weakref
from pathlib import Path

_READ = os.O_RDONLY | os.O_NOFOLLOW
_SUFFIX = ".o"


class TrustedFolder:
    """Objects by key. Every method may raise OSError: a full disk, a file that has gone."""

    def __init__(self, path: Path) -> None:
        """OSError where there is no such folder; PermissionError if others may write to it."""
        self.path = path
        self.fd = os.open(path, _READ | os.O_DIRECTORY)
        self._close = weakref.finalize(self, os.close, self.fd)
        _check_owner(os.fstat(self.fd), path)

    @classmethod
    def make(cls, path: Path, mode: int) -> "TrustedFolder":
        """The folder, made with this mode, whatever the umask, unless it is there already."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir(0o700)
        except FileExistsError:
            return cls(path)
        folder = cls(path)
        os.fchmod(folder.fd, mode)
        return folder

    def open_object(self, key: str) -> int | None:
        """A descriptor of the key's object, to be closed by the caller; None if there is none.

        PermissionError if others may write to it; ValueError if its content is not what its name
        says. Such an object is removed, where that is allowed, so that it can be made again.
        """
        for name in os.listdir(self.fd):
            if name.startswith(f"{key}.") and name.endswith(_SUFFIX):
                return self._open_checked(name)
        return None

    def _open_checked(self, name: str) -> int:
        fd = os.open(name, _READ, dir_fd=self.fd)
        try:
            _check_owner(os.fstat(fd), self.path / name)
            with open(fd, "rb", closefd=False) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != name.split(".")[1]:
                raise ValueError(f"{self.path / name} was cut short or changed")
        except (OSError, ValueError):
            os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=self.fd)
            raise
        return fd

    def store(self, key: str, content: bytes) -> None:
        """Written aside, then renamed: whoever looks finds all of it or nothing."""
        name = f"{key}.{hashlib.sha256(content).hexdigest()}{_SUFFIX}"
        aside = f"{name}.{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        fd = os.open(aside, flags, 0o600, dir_fd=self.fd)
        try:
            with open(fd, "wb") as file:
                file.write(content)
                os.fchmod(fd, 0o644)
            os.replace(aside, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(aside, dir_fd=self.fd)
            raise

    def lock(self, key: str) -> int:
        """A descriptor that holds the key's lock until it is closed.

        BlockingIOError while another process holds it; another OSError where locks do not work.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        fd = os.open(f"{key}.lock", flags, 0o600, dir_fd=self.fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise
        return fd


def _check_owner(found: os.stat_result, path: Path) -> None:
    """PermissionError unless it is this user's or root's, and writable by nobody else."""
    if found.st_uid not in (0, os.geteuid()):
        raise PermissionError(
            f"{path} belongs to user {found.st_uid}, and code is loaded only from what is root's "
            f"or user {os.geteuid()}'s own"
        )
    if found.st_mode & 0o022:
        raise PermissionError(
            f"{path} has mode {stat.S_IMODE(found.st_mode):o}, so that others could put code there:"
            " delete it, and it is made again"
        )
