"""Tiers: data sets by recipe. A recipe is a TOML file of pinned packages and what is text in them.

    include = ["small"]               # other recipes whose packages come first
    [sources]
    python = "code"                   # name = domain
    [[package]]
    pip = "ansible==12.3.0"           # or apt = "package=version"
    sha256 = "..."                    # of the wheel or of the .deb
    licence = "GPL-3.0-or-later"
    parts = [{ glob = "*.py", source = "python", split = "docstrings" }]

A part's `glob` is matched against whole names (* takes slashes too); `extract` is one of
`extract.EXTRACT`, and `latest` keeps the last of a/1/x, a/2/x.
"""

import fnmatch
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import pydantic

from jaxmoe.data import fetch, sources
from jaxmoe.data.dataset import check_name
from jaxmoe.data.extract import EXTRACT
from jaxmoe.data.pieces import Listed, Piece, order
from jaxmoe.errors import UserError

__all__ = ["TIERS", "Package", "Recipe", "list_recipe", "load_recipe"]

TIERS = ("installed", "small", "base")
_FOLDER = Path(__file__).parent / "tiers"
_STRICT = pydantic.ConfigDict(extra="forbid", frozen=True)
_SKIPPED = sources.VENDORED  # folders in whose place another package's code stands
_PIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*==?[A-Za-z0-9][A-Za-z0-9.+~:!_-]*")
_Sha256 = Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]


class Part(pydantic.BaseModel):
    model_config = _STRICT
    glob: str
    source: str
    split: str = ""
    extract: str = "text"
    latest: bool = False

    @pydantic.field_validator("extract")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in EXTRACT:
            raise ValueError(f"{value!r} is none of {', '.join(EXTRACT)}")
        return value


class Package(pydantic.BaseModel):
    model_config = _STRICT
    pip: str = ""
    apt: str = ""
    sha256: _Sha256
    licence: str
    parts: tuple[Part, ...]

    @property
    def pin(self) -> fetch.Pin:
        client: Literal["pip", "apt"] = "pip" if self.pip else "apt"
        name, version = re.split("==?", self.pip or self.apt, maxsplit=1)
        return fetch.Pin(client=client, package=name, version=version, sha256=self.sha256)

    @pydantic.model_validator(mode="after")
    def _one_pin(self) -> "Package":
        if bool(self.pip) == bool(self.apt) or "=" not in self.pip + self.apt:
            raise ValueError('give one of pip = "name==version" and apt = "name=version"')
        if not _PIN.fullmatch(self.pip or self.apt):  # they are words of a command line
            raise ValueError(f"{self.pip or self.apt!r} is no name and version of a package")
        return self


class Recipe(pydantic.BaseModel):
    model_config = _STRICT
    include: tuple[str, ...] = ()
    sources: dict[str, str]
    package: tuple[Package, ...]


def load_recipe(name: str) -> Recipe:
    """A tier by name, or a file; with what it includes.

    Raises:
        UserError: there is none, or it says something that no recipe says.
    """
    path = _FOLDER / f"{name}.toml" if name in TIERS else Path(name).expanduser()
    try:
        recipe = Recipe.model_validate(tomllib.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"--tier {name}: no such file; tiers are {', '.join(TIERS)}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: {error}") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {where}: {first['msg']}") from None
    for included in recipe.include:
        if included not in TIERS[1:] or included == name:
            raise UserError(f"{path}: include {included!r} is no other tier")
        other = load_recipe(included)
        recipe = Recipe(
            sources=other.sources | recipe.sources, package=other.package + recipe.package
        )
    for package in recipe.package:
        for source in (s for p in package.parts for s in (p.source, p.split) if s):
            check_name(source)
            if source not in recipe.sources:
                raise UserError(f"{path}: source {source!r} is not under [sources]")
    return recipe


def list_recipe(name: str, cache: Path, scratch: Path) -> Listed:
    """The pieces of a tier, whose packages are fetched into `cache` where they are not yet there.

    Raises:
        UserError: a package cannot be had, or is another than pinned.
    """
    if name == "installed":
        return _installed()
    recipe = load_recipe(name)
    archives = fetch.fetch([p.pin for p in recipe.package], cache, scratch)
    listed = Listed(
        sources={n: {"domain": d, "packages": {}} for n, d in recipe.sources.items()},
        dropped={n: Counter() for n in recipe.sources},
    )
    for package in recipe.package:
        _list_package(package, archives[package.pin], listed)
    listed.pieces.sort(key=lambda p: order(f"{p.package}:{p.name}"))
    return listed


def _list_package(package: Package, archive: Path, listed: Listed) -> None:
    pin = package.pin
    found, hostile = fetch.members(archive)
    about = {
        "pin": package.pip or package.apt,
        "sha256": package.sha256,
        "licence": package.licence,
    }
    for part in package.parts:
        names = fnmatch.filter([m.name for m in found], part.glob)
        chosen = set(_latest(names) if part.latest else names)
        for source in (s for s in (part.source, part.split) if s):
            listed.sources[source]["packages"][pin.package] = about
        if hostile:
            listed.dropped[part.source]["a name that leads out"] += hostile
        for member in found:
            if member.name not in chosen:
                continue
            if _SKIPPED.intersection(member.name.split("/")):
                listed.dropped[part.source]["vendored copy"] += 1
                continue
            listed.pieces.append(
                Piece(
                    source=part.source,
                    kind="member",
                    path=str(archive),
                    name=member.name,
                    package=pin.package,
                    size=member.size,
                    stamp=package.sha256,
                    start=max(member.start, 0),
                    stop=member.start + member.size,
                    extract="python" if part.split else part.extract,
                    split=part.split,
                    screen=bool(part.split) or part.extract == "text",
                )
            )


def _latest(names: list[str]) -> list[str]:
    """Of a/1/x and a/2/x, the last."""
    last: dict[tuple[str, str], str] = {}
    for name in sorted(names):
        folder, _, rest = name.rpartition("/")
        last[folder.rpartition("/")[0], rest] = name
    return list(last.values())


def _installed() -> Listed:
    found = sources.installed()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    about: Mapping[str, str] = {
        "where": f"Python {version} and its packages",
        "licence": "each package's own",
    }
    return Listed(
        pieces=[
            Piece(
                source="docstrings" if file.kind == "topics" else "python",
                kind="text",
                path=str(file.path),
                name=file.name,
                package=file.package,
                size=file.size,
                stamp=str(file.mtime_ns),
                extract=file.kind,
                split="docstrings",
                screen=file.kind == "python",
            )
            for file in sorted(found.files, key=lambda f: order(f.name))
        ],
        sources={"python": {**about, "domain": "code"}, "docstrings": {**about, "domain": "prose"}},
        dropped={"python": Counter(found.skipped), "docstrings": Counter()},
    )
