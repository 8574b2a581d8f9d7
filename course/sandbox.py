"""What the process of a student's file may do: read Python and the project, and write in its own folder.

Two walls. The kernel's (Landlock, Linux 5.13 and later) also stops code written in C. The audit hook of Python works
everywhere and names what was tried, but Python code that knows it can go round it. Neither limits what the process can
find in its own memory. Grade files from strangers in a container without a network.
"""

import contextlib
import ctypes
import linecache
import os
import re
import site
import sys
import tempfile
from pathlib import Path

COURSE = Path(__file__).resolve().parent
ROOT = COURSE.parent
PROJECT = ("data", "experiments", "minidpo", "train_dpo", "train_sft")  # what a file can import, and the grader reports
MEMORY = 2 * 1024**3  # bytes that a file may use in addition to torch
LARGEST_FILE = 20 * 1024**2  # bytes that it may write to one file in its own folder
SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc", "/proc", "/sys", "/dev/urandom", "/dev/random", "/dev/zero")
NO_PROCESSES = {"os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen"}
NO_PROCESSES |= {"pty.spawn", "os.startfile"}
NO_SIGNALS = {"os.kill", "os.killpg", "resource.prlimit"}
NO_NETWORK = {"socket.__new__", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}
CHANGES = {"os.remove", "os.rmdir", "os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod"}
CHANGES |= {"os.chown", "os.utime", "os.setxattr", "os.removexattr", "os.chflags", "sqlite3.connect"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def close_walls(folder, reply):
    """Confines this process to `folder`; returns two lists that grow: what was refused, and the project's files read.

    `folder` becomes the current folder, the home folder and the folder for temporary files. `reply` is the descriptor
    by which the process answers. Every other one becomes os.devnull: some are pipes of multiprocessing's own processes,
    which no wall confines.
    """
    if hasattr(os, "setsid"):
        os.setsid()  # away from the terminal, and from the grader's process group
    folder = os.path.realpath(folder)
    os.chdir(folder)
    os.environ.update(HOME=folder, TMPDIR=folder)
    tempfile.tempdir = folder
    sys.dont_write_bytecode = True
    sys.path[:] = [folder, str(ROOT), *(entry for entry in sys.path if entry not in ("", str(ROOT)))]
    # some libraries read the source of the functions on the stack; with these entries they do not open the files
    for file in COURSE.rglob("*.py"):
        linecache.cache[str(file)] = (0, None, [], str(file))
    silence(reply)
    limit_resources()
    readable = [*SYSTEM, sys.prefix, sys.base_prefix, *site.getsitepackages(), site.getusersitepackages()]
    readable += [ROOT / name if (ROOT / name).is_dir() else ROOT / f"{name}.py" for name in PROJECT]
    readable = [os.path.realpath(path) for path in readable]
    landlock(readable, folder)
    return watch(readable, folder)


def silence(reply):
    """Discards stdout, stderr (what C code writes, too) and all that goes to a descriptor other than `reply`."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(1, 1024):
        with contextlib.suppress(OSError):  # nothing is open there
            if descriptor != reply and os.fstat(descriptor):
                os.dup2(nowhere, descriptor, inheritable=descriptor < 3)
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")


def limit_resources():
    """Limits memory and the size of a file, on Linux, where the system can enforce it."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        import resource

        used = int(statm.read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))


# ---- the kernel's wall ----


def landlock_version():
    """The version of the kernel's Landlock, 0 where there is none."""
    if sys.platform != "linux":
        return 0
    return max(0, ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1))


def landlock(readable, folder):
    """Asks the kernel to refuse files outside `readable` and `folder`, TCP, and signals to other processes.

    Returns whether it does. An older kernel refuses less, another system nothing. The numbers are those of
    linux/landlock.h; the three system calls have the same numbers on every processor.
    """
    system, version = ctypes.CDLL(None), landlock_version()
    if not version:
        return False
    actions = (1 << (13 if version == 1 else 14 if version == 2 else 15)) - 1  # on files and folders
    of_files = 0b111 | actions & 1 << 14  # execute, write, read and truncate
    read = 0b1101  # execute, read a file, list a folder
    handled = (ctypes.c_uint64 * 3)(actions, 0b11, 0b11)  # files; TCP (version 4); signals, abstract sockets (6)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = system.syscall(444, handled, ctypes.c_size_t(size), 0)
    for path, allowed in [(folder, actions), (os.devnull, of_files), *((path, read) for path in readable)]:
        if os.path.exists(path):
            place = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            allowed &= actions if os.path.isdir(path) else of_files
            rule = allowed.to_bytes(8, sys.byteorder) + place.to_bytes(4, sys.byteorder)
            system.syscall(445, rules, 1, rule, 0)
            os.close(place)
    system.prctl(38, 1, 0, 0, 0)  # no new privileges, which Landlock asks for
    closed = system.syscall(446, rules, 0) == 0
    os.close(rules)
    return closed


# ---- Python's wall ----


def watch(readable, folder):
    """Installs the audit hook; returns the lists to which it appends what it refuses and what is read of the project.

    Only what no honest file does is in the first list, and costs the points even if the file catches the error. A
    refused write, for instance to a library's cache, is an error like any other.
    """
    refused, of_project = [], []

    def refuse(what, remember=True):
        if remember:
            refused.append(what)
        raise PermissionError(f"not allowed in an exercise: your code {what}")

    def below(path, places):
        return any(path == place or path.startswith(place.rstrip(os.sep) + os.sep) for place in places)

    def look_at(path, flags):
        """Decides on opening `path`."""
        path = os.path.realpath(os.fsdecode(path))
        other = re.match(r"/proc/(\d+)/", path)
        if below(path, [str(COURSE)]):
            refuse(f"opens the grader's files ({Path(path).name})")
        if other and int(other[1]) != os.getpid():
            refuse("reads another process")
        if below(path, [folder]) or path == os.devnull:
            return
        if flags & WRITES:
            refuse(f"writes outside its own folder ({Path(path).name})", remember=False)
        if not below(path, readable):
            refuse(f"opens files outside its own folder ({Path(path).name})", remember=False)
        if os.path.isdir(path):  # so that no path can be relative to it
            refuse(f"opens a folder ({Path(path).name})", remember=False)
        if below(path, [str(ROOT)]):
            name = Path(path).relative_to(ROOT).parts[0].removesuffix(".py")
            of_project.extend({name} & {*PROJECT} - {*of_project})

    def hook(event, arguments):
        if event == "open":
            if isinstance(arguments[0], (str, bytes, os.PathLike)):
                look_at(arguments[0], arguments[2] or 0)
        elif event in CHANGES:
            paths = [a for a in arguments[:2] if isinstance(a, (str, bytes, os.PathLike))]
            if event in ("os.link", "os.symlink"):
                refuse("makes a link", remember=False)
            if not paths or not all(below(os.path.realpath(os.fsdecode(path)), [folder]) for path in paths):
                refuse(f"changes files outside its own folder ({event})", remember=False)
        elif event == "import" and arguments[0].partition(".")[0] == "course":
            refuse(f"imports the grader ({arguments[0]})")
        elif event in NO_SIGNALS and arguments[0] != os.getpid():
            refuse("sends signals to other processes")
        elif event in NO_PROCESSES:
            refuse(f"starts or calls other programs ({event})")
        elif event in ("ctypes.dlopen", "ctypes.dlsym"):
            refuse("calls a library of the system by ctypes", remember=False)
        elif event in NO_NETWORK:
            refuse(f"uses the network ({event})")

    sys.addaudithook(hook)
    return refused, of_project
