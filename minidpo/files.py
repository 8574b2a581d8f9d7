"""Files that are either whole or not there: written beside their place, then moved into it."""

import contextlib
import os
from pathlib import Path


@contextlib.contextmanager
def atomic(path, keep=None):
    """`with atomic(path) as file:` gives a binary file that becomes `path` only if the block ends well.

    A crash, a power cut, a full disk or Ctrl-C leaves what was at `path` before as it was. What the new file replaces
    moves to `keep`, if given; between the two moves there is only `keep`. Missing folders are made. A write that fails
    raises OSError with the name of the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the bytes reach the disk before the name does
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
        _sync_names(path.parent)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides what its file raised
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def _sync_names(folder):
    """Waits until the disk holds the names of the files in `folder`, on systems that can be asked to."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def atomic_write(path, data):
    """Writes bytes, or a str as UTF-8 with its line ends untouched, through `atomic`."""
    with atomic(path) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)
