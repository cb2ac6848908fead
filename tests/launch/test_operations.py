"""docs/operations.md: its commands are ones that exist, and nothing that can happen is left out."""

import ast
import dataclasses
import importlib
import re
import shlex

import pytest
import yaml
from processes import ROOT

from jaxmoe import config as config_lib
from jaxmoe import exits, supervise
from jaxmoe.config import Config
from jaxmoe.forecast import alarms
from jaxmoe.run import parts

TEXT = (ROOT / "docs" / "operations.md").read_text()
COMMANDS = [
    *re.findall(r"^    (.+?)(?:   +#.*)?$", TEXT, re.M),
    *re.findall(r"`((?:python -m|launch/|kubectl) ?[^`]+)`", TEXT),
]

FILES = {"jsonl", "html", "yaml", "sh"}  # endings: no config fields
LAUNCHERS = {"launch/local.sh", "launch/tpu.sh"}  # whose arguments are those of train


def words_of(module: str) -> list[list[str]]:
    """The arguments of every command of a module, up to what it runs itself."""
    found = []
    for command in COMMANDS:
        words = shlex.split(command)
        for at, word in enumerate(words):
            launched = module == "jaxmoe.train" and word in LAUNCHERS
            if launched or (word == module and words[at - 1] == "-m"):
                rest = words[at + 1 :]
                found.append(rest[: rest.index("--")] if "--" in rest else rest)
    return found


MODULES = sorted(set(re.findall(r"python -m (jaxmoe\.\w+)", TEXT)))


def test_the_page_has_the_commands_that_are_tested() -> None:
    assert len(MODULES) >= 6
    assert len(COMMANDS) > 25


@pytest.mark.parametrize("module", MODULES)
def test_every_option_is_one_that_the_command_has(
    module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        main = importlib.import_module(f"{module}.__main__").main
    except ModuleNotFoundError:
        main = importlib.import_module(module).main
    calls = words_of(module)
    assert calls
    for words in calls:
        sub = words[:1] if module == "jaxmoe.data" else []
        with pytest.raises(SystemExit) as done:
            main([*sub, "--help"])
        assert done.value.code == 0  # a subcommand that does not exist ends with 2
        told = capsys.readouterr().out
        for option in (word for word in words if word.startswith("--") and word != "--end"):
            assert re.search(rf"{option}\b", told), f"{module} {words}"


def test_every_file_that_is_named_exists() -> None:
    named = set(re.findall(r"(?:launch|configs|docs)/[\w./]+\w", TEXT))
    assert {"launch/tpu.sh", "launch/k8s/gpu.yaml", "docs/reliability.md"} <= named
    for one in named:
        assert (ROOT / one).exists(), one
    for one in re.findall(r"^\| `(\w+(?:\.yaml)?)` \|", TEXT, re.M):
        if one.endswith(".yaml") or one == "Dockerfile":
            assert (ROOT / "launch" / "k8s" / one).exists(), one


def test_objects_of_the_cluster_are_those_of_the_documents() -> None:
    for name in ("gpu", "tpu"):
        text = (ROOT / "launch" / "k8s" / f"{name}.yaml").read_text()
        assert yaml.safe_load(text)["metadata"]["name"] == "quickstart"
    named = re.findall(r"(?:jobset |jobset-name=|service )(\w+)", " ".join(COMMANDS))
    assert len(named) >= 5
    assert set(named) == {"quickstart"}


def test_every_config_field_that_is_named_exists() -> None:
    sets = re.findall(r"--set (\w+\.\w+=[^\s`]+)", TEXT)
    assert len(sets) > 4
    config_lib.apply_sets(Config(), sets)
    known = {key for key, _ in config_lib.leaves(dataclasses.asdict(Config()))}
    sections = {key.split(".")[0] for key in known}
    named = re.findall(r"`(\w+)\.(\w+)[`=]", TEXT)
    fields = {f"{a}.{b}" for a, b in named if a in sections and b not in FILES}
    assert {"health.step_deadline", "checkpoint.keep", "guard.bad_step"} <= fields
    assert fields <= known


def rows(title: str) -> dict[str, list[str]]:
    """First cells of a section's table, one by one, to the rest of their row."""
    section = TEXT.split(f"## {title}\n")[1].split("\n## ")[0]
    table = [row.strip("| ").split(" | ") for row in section.splitlines() if row.startswith("| ")]
    return {name.strip("` "): row[1:] for row in table[1:] for name in row[0].split(",")}


def test_every_exit_code_has_a_row_that_says_whether_it_is_restarted() -> None:
    table = rows("Exit codes")
    for name in set(exits.__all__) - {"REQUESTS", "DONE", "REQUEUE"}:
        code = getattr(exits, name)
        final = code in supervise.FINAL or code == exits.NO_PROGRESS
        assert table[str(code)][1].startswith("never" if final else "yes"), name
    assert table[str(exits.DONE)][1] == "no"
    assert "does not count" in table[str(exits.REQUEUE)][1]
    assert {str(one) for one in supervise.BY_REQUEST} <= table.keys()


def test_every_alarm_and_every_event_that_is_told_has_a_row() -> None:
    assert rows("Alarms").keys() == alarms._LOOK.keys()
    # What happens by itself, or by the user's own doing, asks for nothing.
    quiet = {"init", "resume", "register", "overlap", "alarm", "fault"}
    listed = rows("Other events that ask for something").keys()
    assert set(parts.TOLD) - quiet <= listed
    sources = sorted((ROOT / "jaxmoe" / "run").glob("*.py"))
    texts = {
        node.value
        for file in sources
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert listed <= texts
