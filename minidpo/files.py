"""Files that are either whole or not there: written beside their place, then moved into it."""

import contextlib
import os
from pathlib import Path


@contextlib.contextmanager
def atomic(path):
    """`with atomic(path) as file:` gives a binary file that becomes `path` only if the block ends well.

    A crash, a full disk or Ctrl-C leaves what was at `path` before as it was. Missing folders are made. A write that
    fails raises OSError with the name of the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the bytes reach the disk before the name does
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides what its file raised
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def atomic_write(path, data):
    """Writes bytes, or a str as UTF-8 with its line ends untouched, through `atomic`."""
    with atomic(path) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)
