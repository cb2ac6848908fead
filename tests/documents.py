"""Not a test: the commands that the documents have, and what their real parsers say of them.

A command is a line of a block, or code inside of a sentence, that begins with a program (PROGRAM).
Code that names a program and nothing else is a mention, and one without `python -m jaxmoe.` is in
short (`holdout DATASET NAME --strict`): both are looked at, and are no commands to be run.
"""

import argparse
import contextlib
import importlib
import io
import itertools
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from processes import ROOT

from jaxmoe import config as config_lib
from jaxmoe import coordinates
from jaxmoe.config import Config
from jaxmoe.config_check import check
from jaxmoe.config_file import import_file
from jaxmoe.data.pieces import parse_source
from jaxmoe.errors import UserError
from jaxmoe.plan import hardware, topologies

# docs/tutorial.md has a test of its own that runs all of it: tests/test_tutorial.py.
DOCUMENTS = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
        *(ROOT / name / "README.md" for name in ("benchmarks", "tests")),
        *(path for path in (ROOT / "docs").glob("*.md") if path.name != "tutorial.md"),
        *(ROOT / "launch").rglob("*.md"),
    ]
)
PROGRAM = (
    r"(?:(?:time )?python3? (?:-m |\w+/)|(?:make|sbatch|srun|scancel|pytest|kubectl|pip|tail"
    r"|tensorboard|wandb|docker|export|git|xprof|mpirun)(?=$| )|launch/\w+\.sh|\.venv/bin/)"
)
START = re.compile(rf"(?:[A-Z_]+=\S+ )*{PROGRAM}")
SUBCOMMANDS = {
    "convert": ("from-hf", "to-hf"),
    "data": ("build", "holdout", "inspect", "overlap", "train-tokenizer", "verify"),
    "forecast": ("fit", "passes", "register", "score", "verify"),
    "ladder": ("add", "fit", "gate", "register", "run"),
    "report": ("diff",),
}
# What stands for a value that a parser takes as a number, and in templates.
NUMBERS = {"N": "1204", "K": "1", "D": "7", "X": "0.1"}
BRACES = {"{n}": "4", "{run}": "runs/one", "{command}": "true", "{name}": "one"}


class Wrong(Exception):
    """What no command can be."""


@dataclass(frozen=True)
class Command:
    text: str
    documents: tuple[str, ...]  # where it is, relative to the repository
    kind: str  # command, mention, short


class Parsed(BaseException):
    """A real parser took its words; BaseException, so that no command catches it."""

    def __init__(self, namespace: argparse.Namespace) -> None:
        self.namespace = namespace  # `args` is an exception's own


def in_blocks(text: str) -> Iterator[str]:
    """Lines of indented and fenced blocks; explanations stand behind #, `;` or three spaces."""
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```", joined, re.M | re.S))
    for line in [*re.findall(r"^ {4,}(\S.*)$", joined, re.M), *fenced.splitlines()]:
        if START.match(line.strip()):
            command = re.split(r"\s+#\s|\s{3,}(?![\s-])|;\s", line.strip())[0]
            yield re.sub(r" +", " ", command).strip()


def unknown(text: str) -> list[str]:
    """Lines of blocks that look like commands, of programs that PROGRAM does not have."""
    lines = [line.strip() for line in re.findall(r"^ {4,}(\S.*)$", text, re.M)]
    likely = re.compile(r"(?:[A-Z_]+=\S+ )*[a-z][\w./-]* (?!=).*(?<= )--?[a-z]")
    return [line for line in lines if likely.match(line) and not START.match(line)]


def inline(text: str) -> Iterator[str]:
    """Code inside of sentences, each on one line."""
    prose = re.sub(r"^```[\s\S]*?^```|^ {4,}\S.*$", "", text, flags=re.M)
    for code in re.findall(r"`([^`]+)`", prose):
        yield " ".join(code.split())


def found() -> list[Command]:
    """All of every document, each text once."""
    where: dict[str, dict[str, None]] = {}
    lines = set()
    for path in DOCUMENTS:
        text = path.read_text()
        lines |= set(in_blocks(text))
        sentences = [code for code in inline(text) if START.match(code) or owners(code)]
        for one in itertools.chain(in_blocks(text), sentences):
            one = one.removeprefix("time ")
            where.setdefault(one, {})[str(path.relative_to(ROOT))] = None
    kinds = {text: "command" if text in lines else kind(text) for text in where}
    return [Command(text, tuple(places), kinds[text]) for text, places in where.items()]


def kind(text: str) -> str:
    """Of code in a sentence."""
    if not START.match(text):
        return "short"
    ours = r"python (?:-m jaxmoe\.\w+|benchmarks/\w+\.py)(?: [a-z][a-z-]+)?"
    return "mention" if " " not in text or re.fullmatch(ours, text) else "command"


def owners(code: str) -> list[str]:
    """Whose subcommand a short form may be."""
    first, _, rest = code.partition(" ")
    if rest and rest.split()[0] in SUBCOMMANDS.get(first, ()):
        return [f"python -m jaxmoe.{code}"]
    known = [name for name, subs in SUBCOMMANDS.items() if first in subs and rest]
    return [f"python -m jaxmoe.{name} {code}" for name in known]


def look(command: Command) -> None:
    """All that can be said of a command without running it; in a folder of `configs`.

    Raises:
        Wrong, UserError: it would be refused, or names what is not there.
    """
    if command.kind != "short":
        for part in re.split(r" && | \| ", command.text):
            look_at(words_of(part), mention=command.kind == "mention")
        return
    said = []
    for full in owners(command.text):
        try:
            return look_at(words_of(full), mention=len(full.split()) < 5)
        except (Wrong, UserError) as error:
            said.append(str(error))
    raise Wrong("; ".join(said))


def filled(text: str) -> str:
    """With numbers for N and the like, without `...`, and of what is either or the first."""
    plain = re.sub(r" \[([^\]]*)\]", r" \1", text).replace(" ... ", " ")
    plain = re.sub(r"(?<= )[NKDX](?= |$)", lambda letter: NUMBERS[letter[0]], plain)
    return re.sub(r"(?<= )(\w+)\|[\w|]+", r"\1", plain)


def words_of(text: str) -> list[str]:
    """As a shell cuts them."""
    plain = filled(text)
    for name, value in BRACES.items():
        plain = plain.replace(name, value)
    words = [word.removesuffix("...") for word in shlex.split(plain)]
    return [word for word in words if word]


def look_at(words: Sequence[str], *, mention: bool = False) -> None:
    """One program and its words."""
    here = list(words)
    while here and re.match(r"[A-Z_]+=", here[0]):
        environment(here.pop(0), here)
    program, rest = here[0], here[1:]
    for word in here:
        for path in re.findall(r"(?:^|=)((?:launch|docs|tests|benchmarks)/[^\s,:]*)", word):
            if not (ROOT / path).exists() and not (ROOT / "tests" / path).exists():
                raise Wrong(f"{path}: no such file in the repository")
    if program in ("python", "python3", ".venv/bin/python"):
        python(rest, mention=mention)
    elif program in LOOKS:
        LOOKS[program](rest)
    elif program.startswith("launch/"):
        launched(program, rest)
    elif program not in ("git", "true"):
        raise Wrong(f"{program}: tests/documents.py does not know how to look at it")


def environment(word: str, behind: Sequence[str]) -> None:
    """A variable that is ours is read by what it stands before."""
    name = word.partition("=")[0]
    script = next((w for w in behind if w.startswith("launch/")), None)
    files = [ROOT / script] if script else [*(ROOT / "tests").rglob("*.py")]
    if not name.startswith("WANDB_") and not any(name in f.read_text() for f in files):
        raise Wrong(f"{name}: nothing in {script or 'tests/'} reads it")


def python(words: Sequence[str], *, mention: bool) -> None:
    if not words:
        return
    if words[0] != "-m":
        return script(ROOT / words[0], words[1:], mention=mention)
    module, rest = words[1], words[2:]
    if module in ("pytest", "pip"):
        return LOOKS[module](rest)
    is_package = (ROOT / module.replace(".", "/")).is_dir()
    name = f"{module}.__main__" if is_package else module
    if not (ROOT / f"{name.replace('.', '/')}.py").is_file():
        raise Wrong(f"{module}: no such module")
    main = importlib.import_module(name).main
    if mention:
        return helped(main, module, rest)
    values(module, parsed(main, module, rest))


def script(file: Path, words: Sequence[str], *, mention: bool) -> None:
    """A file of benchmarks/ or configs/."""
    if not file.is_file():
        raise Wrong(f"{file.relative_to(ROOT)}: no such file")
    sys.path.insert(0, str(file.parent))  # as Python has it
    try:
        if file.parent.name == "configs":
            assert not words and callable(import_file(file).main)
            return
        main = importlib.import_module(file.stem).main
    finally:
        sys.path.remove(str(file.parent))
    if mention:
        return helped(main, file.name, words)
    parsed(main, file.name, words)


def parsed(main: Callable[[], Any], name: str, words: Sequence[str]) -> argparse.Namespace:
    """What the real parser of a command makes of its words; nothing is run.

    Raises:
        Wrong: it refuses them.
    """
    real, heard = argparse.ArgumentParser.parse_args, io.StringIO()

    def stop(self: Any, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        raise Parsed(real(self, args, namespace))

    try:
        with (
            mock.patch.object(argparse.ArgumentParser, "parse_args", stop),
            mock.patch.object(sys, "argv", [name, *words]),
            contextlib.redirect_stderr(heard),
            contextlib.redirect_stdout(heard),
        ):
            main()
    except Parsed as done:
        return done.namespace
    except SystemExit:
        raise Wrong(heard.getvalue().strip().rpartition("\n")[2]) from None
    raise Wrong(f"{name}: it has no argument parser, and takes no words")


def helped(main: Callable[[], Any], name: str, words: Sequence[str]) -> None:
    """A program that is named has a --help; so has its subcommand."""
    argv, heard = sys.argv, io.StringIO()
    sys.argv = [name, *words, "--help"]
    try:
        with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(heard):
            main()
    except SystemExit as done:
        if done.code == 0:
            return
    finally:
        sys.argv = argv
    raise Wrong(heard.getvalue().strip().rpartition("\n")[2] or f"{name}: no --help")


def values(module: str, args: argparse.Namespace) -> None:
    """What the words mean: configs load, their changes apply, and what is named exists."""
    given = vars(args)
    spec = given.get("target") or given.get("config")
    if module == "jaxmoe.coordinates":
        config_lib.apply_sets(coordinates.base(), args.set)
    elif spec is not None and not str(spec).isupper():
        check(config_lib.apply_sets(config_lib.load(str(spec)), args.set))
    for key in ("family", "baseline", "candidate"):
        if (named := given.get(key)) and ".py" in named:
            file, _, function = named.partition(":")
            if not callable(getattr(import_file(Path(file)), function or "rung", None)):
                raise Wrong(f"--{key} {named}: no such function")
    config_lib.apply_sets(Config(), given.get("change") or ())
    if "hardware" in given:
        hardware.find(args.hardware)
    if (target := given.get("compile")) and target != "TARGET":
        topologies.parse(target)
    for tier in given.get("tier") or ():
        file = ROOT / "jaxmoe" / "data" / "tiers" / f"{tier}.toml"
        if tier not in ("installed", "NAME") and not file.is_file():
            raise Wrong(f"--tier {tier}: jaxmoe/data/tiers has none of this name")
    if "tier" in given:
        list(map(parse_source, args.source))
    if given.get("submit"):
        look_at(words_of(args.submit))
    behind = given.get("command")
    if isinstance(behind, list) and behind[1:] not in ([], ["COMMAND"]):
        look_at(behind[1:] if behind[0] == "--" else behind)


def trained(words: Sequence[str]) -> None:
    """The arguments of `python -m jaxmoe.train`."""
    python(["-m", "jaxmoe.train", *words], mention=False)


def launched(file: str, words: Sequence[str]) -> None:
    """launch/*.sh: its own words, then those of train."""
    here = ROOT / file if (ROOT / file).exists() else ROOT / "tests" / file
    if not here.stat().st_mode & 0o111:
        raise Wrong(f"{file}: not executable")
    rest = list(words)
    if file == "launch/local.sh" and rest:
        if not rest[0].isdigit():
            raise Wrong(f"{file}: the first word is the number of processes, not {rest[0]}")
        rest = rest[1:]
    if rest[:1] == ["--"] and file == "launch/tpu.sh":
        return look_at(rest[1:])
    if rest == ["--end"] and file == "launch/tpu.sh":
        return
    if file == "launch/slurm.sh":
        if rest[:1] == ["--tasks"]:
            if rest[1] not in ("node", "gpu"):
                raise Wrong(f"{file}: --tasks {rest[1]} is neither node nor gpu")
            rest = rest[2:]
        if "--command" in rest:
            if rest.index("--command") != len(rest) - 2:
                raise Wrong(f"{file}: --command takes one word, and is the last")
            rest = rest[:-2]
    trained(rest)


def made(words: Sequence[str]) -> None:
    """Targets and variables of the Makefile."""
    text = (ROOT / "Makefile").read_text()
    for word in words:
        name, is_variable, value = word.partition("=")
        rule = rf"^{name} \?=" if is_variable else rf"^{re.escape(name)}(?: .*)?:"
        if not re.search(rule, text.replace("$(VENV)", ".venv"), re.M):
            raise Wrong(
                f"make {word}: the Makefile has no such {'variable' if is_variable else 'target'}"
            )
        if name == "ARGS":
            trained(shlex.split(value))


def tested(words: Sequence[str]) -> None:
    """pytest: markers that are declared, tests that are there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    markers = {m.partition(":")[0] for m in project["tool"]["pytest"]["ini_options"]["markers"]}
    pairs = dict(itertools.pairwise(words))
    if pairs.get("-m", "slow") not in markers:
        raise Wrong(f"pytest -m {pairs['-m']}: the markers are {', '.join(sorted(markers))}")
    paths = [word for word in words if word.startswith("tests")]
    if (wanted := pairs.get("-k")) and wanted not in (ROOT / paths[0]).read_text():
        raise Wrong(f"pytest -k {wanted}: {paths[0]} has no such test")


def installed(words: Sequence[str]) -> None:
    """pip install: extras of ours that there are."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.findall(r"jaxmoe\[(\w[\w-]*)\]", " ".join(words)):
        if extra not in project["optional-dependencies"]:
            raise Wrong(f"pip install 'jaxmoe[{extra}]': pyproject.toml has no such extra")


def controlled(words: Sequence[str]) -> None:
    if words[0] not in ("apply", "delete", "describe", "get", "logs", "patch"):
        raise Wrong(f"kubectl {words[0]}: not one that launch/k8s is tested for")


def submitted(words: Sequence[str]) -> None:
    """sbatch, srun: their options, then a script or program of ours."""
    rest = list(itertools.dropwhile(lambda word: word.startswith("-"), words))
    if rest and not rest[0].isdigit():
        look_at(rest)


def unseen(words: Sequence[str]) -> None:
    """A program of others, whose words are not looked at."""


LOOKS: dict[str, Callable[[Sequence[str]], None]] = {
    "make": made,
    "pytest": tested,
    "pip": installed,
    "kubectl": controlled,
    "sbatch": submitted,
    "srun": submitted,
    **dict.fromkeys(("scancel", "tail", "tensorboard", "wandb", "docker", "export"), unseen),
    **dict.fromkeys(("xprof", "mpirun", "jq", ".venv/bin/pre-commit"), unseen),
}
