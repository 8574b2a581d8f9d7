"""Files that are written whole or not at all, and a lock against a second process that writes the same."""

import contextlib
import os
from pathlib import Path

from minidpo.settings import UserError, at_end

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def atomic(path):
    """`with atomic(path) as file:` gives a binary file that becomes `path` only if the block ends without an error.

    After a crash, a power cut, a full disk or Ctrl-C, the old file at `path` is as it was. If several processes write
    the same file, the last one wins. Missing folders are made. A write that fails raises OSError with the name of the
    file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
        with open(part, "r+b") as file:  # opened again: a library may have put a new file in its place
            os.fsync(file.fileno())  # the bytes reach the disk before the name
        os.replace(part, path)
        with contextlib.suppress(OSError):  # some systems cannot open a folder
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides the file's error
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def atomic_write(path, data):
    """Writes bytes, or a str as UTF-8, through `atomic`."""
    with atomic(path) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)


_claimed = {}  # lock file -> the open file


def claim(path):
    """Until this command ends or its process dies, no other process can claim `path`, a file or a folder to write.

    The lock is the file `path`.lock, which says which process holds it. Raises UserError if another process does.
    Windows and some network file systems have no such locks; there, the call does nothing.
    """
    lock = Path(f"{Path(path).resolve()}.lock")
    if fcntl is None or lock in _claimed or not path:  # "": there is no such file to write
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = open(lock, "a+", encoding="utf-8")  # the lock ends when this file is closed
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        how = "Wait until it ends, or give another name."
        raise UserError(f"{path} is in use by process {file.read()}. {how}") from error
    except OSError:
        return
    if not lock.exists() or not os.path.samestat(os.stat(lock), os.fstat(file.fileno())):
        file.close()  # its owner has just ended and removed it
        return claim(path)
    file.truncate(0)
    file.write(f"{os.getpid()} on {os.uname().nodename}")
    file.flush()
    _claimed[lock] = file
    at_end.callback(_release, lock)


def _release(lock):
    lock.unlink(missing_ok=True)
    _claimed.pop(lock).close()


def new_file(path, overwrite):
    """Path of a file that a command will write, claimed. UserError if it exists, so that no work is lost later."""
    claim(path)
    if Path(path).exists() and not overwrite:
        raise UserError(f"{path} is there already. Add --overwrite to replace it, or give another name.")
    return Path(path)
