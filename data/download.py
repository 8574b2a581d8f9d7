"""A file from the network: fetched once, in as many goes as it takes, and checked before it gets its name."""

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from minidpo.settings import UserError


def download(url, target, digest="", otherwise=""):
    """Fetches `url` into the file `target` and returns its path. A transfer that broke is continued by the next call.

    The bytes collect in a `.part` file, which gets its name when all are there and the digest ("md5:..." or
    "sha256:...") is right; without a digest, what the server says of the length has to do. UserError otherwise.
    `otherwise` is what the user can do instead, as the end of a sentence: "pass --archive FILE".
    """
    target = Path(target)
    if target.exists() and (not digest or _digest(target, digest) == digest):
        return target
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    otherwise = f", or {otherwise}" if otherwise else ""
    if not digest or _digest(part, digest) != digest:  # else all came last time, and only the new name was missing
        try:
            expected = _fetch(url, part)
            why = "the connection closed early"
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            if getattr(error, "code", None) == 416:  # the server has not that many bytes: what is here is no part of it
                part.write_bytes(b"")
            expected, why = None, error
        have = part.stat().st_size
        if expected is None or have < expected:
            of = f" of {expected:,}" if expected else ""
            raise UserError(
                f"{url}: {why}. {have:,}{of} bytes are here. Run the same command again to continue{otherwise}."
            )
    if digest and _digest(part, digest) != digest:
        found = f"{part.stat().st_size:,} bytes, {_digest(part, digest)}"
        part.unlink()
        raise UserError(
            f"{url}: got {found} instead of {digest}; the file was deleted. Run the same command again{otherwise}."
        )
    part.replace(target)
    return target


def _fetch(url, part):
    """Appends to the file `part` what is missing, and returns the size it should have, 0 if the server does not say.

    Starts over if the server cannot continue in the middle.
    """
    have = part.stat().st_size
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as response:
        if response.status != 206:  # 206 Partial Content: the server does continue
            have = 0
        length = response.headers.get("Content-Length")
        expected = have + int(length) if length else 0
        bar = tqdm(total=expected or None, initial=have, unit="B", unit_scale=True, desc=part.stem)
        with open(part, "ab" if have else "wb") as file, bar:
            while block := response.read(1 << 16):
                file.write(block)
                bar.update(len(block))
    return expected


def _digest(path, like):
    """The file's digest, of the kind and in the form of `like`: "md5:..." or "sha256:..."."""
    kind = like.partition(":")[0]
    return f"{kind}:{hashlib.new(kind, Path(path).read_bytes()).hexdigest()}"
