"""Download one file. A download that broke off continues at the next call; the result is checked."""

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from minidpo.settings import UserError


def download(url, target, digest="", otherwise=""):
    """Downloads `url` to the file `target` and returns its path.

    The bytes are collected in `target`.part. That file is renamed to `target` once it is complete and correct.

    Args:
        target: nothing is downloaded if this file exists and its digest is right.
        digest: "md5:..." or "sha256:...". Without it, only the length stated by the server is checked.
        otherwise: what else the user can do, for the error messages: "pass --archive FILE".

    Raises:
        UserError: the download failed or stopped early, or the digest is wrong. The same call tries again.
    """
    target = Path(target)
    if target.exists() and (not digest or _digest(target, digest) == digest):
        return target
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    otherwise = f", or {otherwise}" if otherwise else ""
    if not digest or _digest(part, digest) != digest:  # equal if the last call stopped just before the renaming
        try:
            expected = _fetch(url, part)
            why = "the connection closed early"
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            if getattr(error, "code", None) == 416:  # the .part file is longer than the server's file
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
    """Appends the missing bytes to the file `part`; starts over if the server cannot continue in the middle.

    Returns the size in bytes that the file should have, 0 if the server does not state it.
    """
    have = part.stat().st_size
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as response:
        if response.status != 206:  # 206 Partial Content: the server continues where we stopped
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
    """The digest of a file, of the same kind as `like` ("md5:..." or "sha256:...")."""
    kind = like.partition(":")[0]
    return f"{kind}:{hashlib.new(kind, Path(path).read_bytes()).hexdigest()}"
