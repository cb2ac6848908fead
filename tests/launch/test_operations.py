"""docs/operations.md leaves out nothing that can happen (its commands: tests/test_commands.py)."""

import ast
import re

import yaml
from processes import ROOT

from jaxmoe import exits, supervise
from jaxmoe.forecast import alarms
from jaxmoe.run import parts

TEXT = (ROOT / "docs" / "operations.md").read_text()


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
    named = re.findall(r"(?:jobset |jobset-name=|service )(\w+)", TEXT)
    assert len(named) >= 5
    assert set(named) == {"quickstart"}


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
