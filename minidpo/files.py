"""Files that are written whole or not at all: written under another name first, then renamed."""

import contextlib
import os
from pathlib import Path

from minidpo.settings import UserError


def new_file(path, overwrite):
    """Path of a file that a command will write. UserError if it exists, so that no work is lost later."""
    if Path(path).exists() and not overwrite:
        raise UserError(f"{path} is there already. Add --overwrite to replace it, or give another name.")
    return Path(path)


@contextlib.contextmanager
def atomic(path, keep=None):
    """`with atomic(path) as file:` gives a binary file that becomes `path` only if the block ends without an error.

    After a crash, a power cut, a full disk or Ctrl-C, the old file at `path` is as it was. The file that is replaced
    moves to `keep`, if given; between the two renames only `keep` exists. Missing folders are made. A write that fails
    raises OSError with the name of the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the bytes reach the disk before the name
        if keep and path.exists():
            os.replace(path, keep)
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
