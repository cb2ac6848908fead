import hashlib
import zipfile
from pathlib import Path

import pytest
from built_sets import build_from, texts_of

from jaxmoe.data import builder, fetch, readers
from jaxmoe.data.builder import Plan
from jaxmoe.data.recipes import load_recipe
from jaxmoe.errors import UserError


def _wheel(path: Path, members: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_recipe_reads_members_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said = "It says something of the module, and again. " * 10
    code = "def f(x):\n    return x + 1\n\n\n" * 12
    (tmp_path / "packages").mkdir()
    sha256 = _wheel(
        tmp_path / "packages" / "tiny_pack-1.0-py3-none-any.whl",
        {
            "tiny/a.py": f'"""{said}"""\n{code}'.encode(),
            "tiny/_vendor/b.py": code.encode(),
            "tiny/small.py": b"x = 1\n",
            "../../escaped.py": b"evil = 1\n" * 50,
            "/absolute.py": b"evil = 2\n" * 50,
            "C:\\evil.py": b"evil = 3\n" * 50,
            "tiny/docs/1/x.json": b'{"k": {"title": "Old", "extract": "is old"}}',
            "tiny/docs/2/x.json": b'{"k": {"title": "New", "extract": "is new"}}',
        },
    )
    recipe = tmp_path / "mine.toml"
    text = f"""
        [sources]
        python = "code"
        said = "prose"
        [[package]]
        pip = "tiny-pack==1.0"
        sha256 = "{sha256}"
        licence = "MIT"
        parts = [
            {{ glob = "*.py", source = "python", split = "said" }},
            {{ glob = "tiny/docs/*", source = "said", extract = "leads", latest = true }},
        ]
    """
    recipe.write_text(text)
    monkeypatch.setattr(fetch, "_client", lambda *_: pytest.fail("it is there already"))
    data = build_from(tmp_path, tiers=(str(recipe),))
    assert texts_of(data, "python") == {"tiny/a.py": code}
    assert texts_of(data, "said") == {
        "tiny/a.py": said.strip() + "\n",
        "tiny/docs/2/x.json:k": "New\n\nis new\n",
    }
    dropped = data.manifest["sources"]["python"]["dropped"]
    assert dropped == {"a name that leads out": 3, "under 200 bytes": 1, "vendored copy": 1}
    about = data.manifest["sources"]["said"]["packages"]["tiny-pack"]
    assert about == {"pin": "tiny-pack==1.0", "sha256": sha256, "licence": "MIT"}
    assert not list(tmp_path.rglob("*evil*")) and not list(tmp_path.parent.glob("escaped.py"))
    for wrong, message in (
        (text.replace("MIT", "MIT\nx"), "mine.toml: "),
        (text.replace('licence = "MIT"', ""), "package.0.licence: Field required"),
        (text.replace('"said" }', '"sayd" }'), "'sayd' is not under"),
        (text.replace("leads", "led"), "'led' is none of"),
        (text.replace("==1.0", ""), "give one of pip"),
    ):
        recipe.write_text(wrong)
        with pytest.raises(UserError, match=message):
            load_recipe(str(recipe))


def test_a_package_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "packages").mkdir()
    _wheel(tmp_path / "packages" / "tiny_pack-1.0-py3-none-any.whl", {"a.py": b"x"})
    pin = fetch.Pin(client="pip", package="tiny-pack", version="1.0", sha256="0" * 64)
    called: list[list[str]] = []
    monkeypatch.setattr(fetch, "_client", lambda command, *_: called.append(command))
    with pytest.raises(UserError, match="tiny-pack==1.0: pip gave no file with hash 0000"):
        fetch.fetch([pin], tmp_path / "packages", tmp_path / "scratch")
    assert {"--require-hashes", "--only-binary", "--no-deps"} <= set(called[0])


def test_a_client_that_fails_is_one_line(tmp_path: Path):
    pin = fetch.Pin(client="apt", package="p", version="1", sha256="0" * 64)
    with pytest.raises(UserError, match="could not fetch p: E: no such thing"):
        fetch._client(
            ["sh", "-c", "echo warning >&2; echo E: no such thing >&2; exit 100"], tmp_path, [pin]
        )


def test_the_installed_tier_is_this_python(tmp_path: Path):
    listed = builder.listing(Plan(tiers=("installed",)), tmp_path, tmp_path)
    assert {n: s["domain"] for n, s in listed.sources.items()} == {
        "python": "code",
        "docstrings": "prose",
    }
    assert len(listed.pieces) > 1000
    found = {p.name: p for p in listed.pieces}
    texts = [t for t in readers.read_piece(found["textwrap.py"]) if isinstance(t, readers.Text)]
    assert [t.source for t in texts] == ["python", "docstrings"]
    assert b"def dedent(text)" in texts[0].data
    assert b"Text wrapping and filling." in texts[1].data
    topics = list(readers.read_piece(found["pydoc_data/topics.py"]))
    assert len(topics) > 50
    assert {t.source for t in topics} == {"docstrings"}


@pytest.mark.parametrize("tier", ["small", "base"])
def test_the_tiers_are_recipes(tier: str):
    recipe = load_recipe(tier)
    assert len(recipe.package) == {"small": 14, "base": 22}[tier]
    assert all(p.licence and p.pin.version for p in recipe.package)
    assert set(recipe.sources.values()) == {"code", "prose"}
