"""The commands of all documents: real parsers take them, and they are run, or it is said why not.

A new command is looked at and run by itself. One that cannot be run belongs into NOT_RUN below,
with its reason and the test that runs the same thing; what a command names belongs into
tests/workspace.py, which prepares the folder where they are run.
"""

import collections
import dataclasses
import re
import shutil
from pathlib import Path

import documents
import pytest
import workspace
from documents import Command
from processes import ROOT
from workspace import Ended

from jaxmoe import config as config_lib
from jaxmoe.config import Config

ALL = documents.found()
COMMANDS = [one for one in ALL if one.kind == "command"]

# Not run: a pattern of whole commands, why, and the test that runs the same thing ("": none does).
NOT_RUN = {
    r"make( .+)?": ("makes an environment, or is all of the tests", ""),
    r"\.venv/bin/pre-commit install": ("changes the hooks of this clone", ""),
    r"(.+ )?(python -m )?pytest\b.*": ("is these tests", ""),
    r"pip .+": ("changes the environment; its extras are compared with pyproject.toml", ""),
    r"(tensorboard|wandb) .+": ("a viewer of others", "tests/run/test_viewers.py"),
    r"WANDB_MODE=online .+": ("a network and a key", "tests/run/test_viewers.py"),
    r"(docker|kubectl) .+": ("a cluster", "tests/launch/test_k8s.py"),
    r"(.+ )?launch/tpu\.sh .+|export TPU=.+": ("TPU VMs", "tests/launch/test_tpu.py"),
    r"(sbatch|srun|scancel) .+": ("a Slurm", "tests/launch/test_slurm.py"),
    r"python -m jaxmoe\.ladder run .+(--slurm|--submit .+)": (
        "a Slurm",
        "tests/launch/test_slurm.py",
    ),
    r"python -m jaxmoe\.(ladder run|ladder gate .+ --rungs) .+": (
        "trains twelve rungs and more",
        "tests/ladder/test_ladder_runs.py",
    ),
    r"python -m jaxmoe\.(ladder|forecast) register .+": (
        "its text and its records must be of one machine",
        "tests/run/test_planned.py",
    ),
    r"python -m jaxmoe\.forecast score .+--picture .+": (
        "a Chrome or Chromium",
        "tests/forecast/test_picture.py",
    ),
    r"python -m jaxmoe\.forecast score --benchmark .+": (
        "public data that is not in the repository; two minutes",
        "tests/forecast/test_benchmark.py",
    ),
    r"python -m jaxmoe\.plan .*--compile .+": (
        "a compiler for chips that are not here",
        "tests/aot/test_compile_report.py",
    ),
    r"python -m jaxmoe\.data .+--tier .+": (
        "172 MB of packages, or all Python that is installed",
        "tests/data/test_recipes.py",
    ),
    r"python -m jaxmoe\.data holdout .+--strict": (
        "reads this clone's history",
        "tests/data/test_heldout_sets.py",
    ),
    r".+(gs|s3|https)://.+": ("a bucket or server", "tests/data/test_remote.py"),
    r"python -m jaxmoe\.train .+(olmoe|gpt4)\.py.+": (
        "billions of parameters",
        "tests/model/test_configs.py",
    ),
    r"python -m jaxmoe\.data build .+ --tokenizer qwen3/tokenizer .+": (
        "the tokenizer of a published model",
        "tests/data/test_tokenizer_files.py",
    ),
    r"python -m jaxmoe\.data (holdout data/mine kept|overlap data/mine) .+": (
        "the data set of that tokenizer",
        "tests/test_tutorial.py",
    ),
    r"python -m jaxmoe\.train .+qwen3_moe\.py .+ --set data\.path=data/mine": (
        "the data set of that tokenizer",
        "tests/convert/test_init_from.py",
    ),
    r"python benchmarks/(?!transfer\.py show).+": ("measures, for minutes", ""),
    # Words that stand for what a sentence is about.
    r"python -m jaxmoe\.supervise -- COMMAND": ("no command", "tests/test_supervise.py"),
}

# In a process of its own each, since it trains, or sets up its devices: run by -m slow.
TRAINS = (
    r"(?:LOGS=\S+ )?(?:launch/local\.sh"
    r"|python -m jaxmoe\.(?:train|supervise|replay|coordinates))\b.*"
    r"|python -m jaxmoe\.plan .+ --search"  # a minute: every mesh is traced
)
NEEDED = r"python -m jaxmoe\.convert from-hf .+"  # run again before those
FINISHED = ("runs/mine", "runs/qwen3_moe")  # of what is prepared: begun anew by those

# Exit codes that are an answer and no failure.
CODES = {
    r"python -m jaxmoe\.plan .+": {0, 1},  # 1: it does not fit
    r"python -m jaxmoe\.ladder gate .+": {0, 1, 3},  # drop, undecided
    r"python -m jaxmoe\.train --run-dir runs/drill .+": {137, -9},  # the rehearsed kill
}


def not_run(text: str) -> tuple[str, str] | None:
    """The reason and the other test, of the first pattern that is the whole command."""
    return next((why for pattern, why in NOT_RUN.items() if re.fullmatch(pattern, text)), None)


RUN = [one for one in COMMANDS if not_run(one.text) is None]
SLOW = [one for one in RUN if re.fullmatch(TRAINS, one.text)]
QUICK = [one for one in RUN if one not in SLOW]


def of_documents(some: list[Command]) -> dict[str, list[str]]:
    """By the first document that has them, in its order."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for one in some:
        found[one.documents[0]].append(one.text)
    return found


def codes(text: str) -> set[int]:
    return next((found for one, found in CODES.items() if re.fullmatch(one, text)), {0})


def failed(document: str, ended: Ended) -> str:
    line = f'r"{re.escape(ended.text)}": (REASON, TEST),'
    return (
        f"{document}: `{ended.text}` ended with {ended.code}.\nMend the document, or prepare what"
        " it names in tests/workspace.py, or (where it cannot be run) add to NOT_RUN in"
        f" tests/test_commands.py:\n    {line}\n{ended.said[-3000:]}"
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the configs as they stand, and of those that documents call the user's."""
    folder = tmp_path_factory.mktemp("configs")
    workspace.configs(folder, steps=None)
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, text_cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    workspace.prepare(folder, text_cache)
    return folder


def folder_of(document: str, prepared: Path) -> Path:
    """A document's own copy of the workspace."""
    folder = prepared.with_name(f"{prepared.name}-{document.replace('/', '-')}")
    left_out = shutil.ignore_patterns("jaxmoe", "__pycache__")
    shutil.copytree(prepared, folder, ignore=left_out, symlinks=True)
    return folder


@pytest.fixture(scope="module")
def ended(prepared: Path, text_cache: Path) -> dict[tuple[str, str], Ended]:
    """All quick commands, in the order of each document, by one interpreter."""
    jobs = [
        (document, text, folder)
        for document, texts in of_documents(QUICK).items()
        for folder in [folder_of(document, prepared)]
        for text in texts
    ]
    inside = [job for job in jobs if job[1].startswith("python ")]
    done = workspace.in_one_process(
        [(text, folder) for _, text, folder in inside], prepared, text_cache
    )
    found = {(doc, text): one for (doc, text, _), one in zip(inside, done, strict=True)}
    for document, text, folder in jobs:
        if (document, text) not in found:
            found[document, text] = workspace.in_shell(text, folder, prepared, text_cache)
    return found


@pytest.mark.parametrize("document", sorted({name for one in ALL for name in one.documents}))
def test_real_parsers_take_every_command_of(
    document: str, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(written)
    wrong = []
    for one in (one for one in ALL if document in one.documents):
        try:
            documents.look(one)
        except (documents.Wrong, config_lib.UserError) as error:
            wrong.append(f"{document}: `{one.text}`: {error}")
    assert not wrong, "\n".join(wrong)


def test_real_parsers_take_the_examples_of_programs(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of --help and of the first lines of a file."""
    monkeypatch.chdir(written)
    wrong, count = [], 0
    for path in [*(ROOT / "jaxmoe").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        if path.stem == "peers_worker":
            continue  # started by peers.py; no parser
        text = re.sub(r"^  (?=\S)", "    ", path.read_text(), flags=re.M)
        for one in documents.in_blocks(text.replace("\\\\\n", "\\\n").replace("{{n}}", "{n}")):
            count += 1
            try:
                documents.look(Command(one, (), "command"))
            except (documents.Wrong, config_lib.UserError) as error:
                wrong.append(f"{path.name}: `{one}`: {error}")
    assert not wrong, "\n".join(wrong)
    assert count > 60


@pytest.mark.parametrize("document", of_documents(QUICK))
def test_commands_that_are_quick_run_in_order(
    document: str, ended: dict[tuple[str, str], Ended]
) -> None:
    for text in of_documents(QUICK)[document]:
        one = ended[document, text]
        assert one.code in codes(text), failed(document, one)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("document", of_documents(SLOW))
def test_commands_that_train_run_in_order(document: str, prepared: Path, text_cache: Path) -> None:
    folder = folder_of(f"slow-{document}", prepared)
    for name in FINISHED:
        shutil.rmtree(folder / name, ignore_errors=True)
    some = [one for one in RUN if one in SLOW or re.fullmatch(NEEDED, one.text)]
    for text in of_documents(some)[document]:
        if "jaxmoe.train " in text and "--run-dir" not in text:
            shutil.rmtree(folder / "runs" / "quickstart", ignore_errors=True)
        one = workspace.in_shell(text, folder, prepared, text_cache)
        assert one.code in codes(text), failed(document, one)


SENTENCES = {path: path.read_text() for path in documents.DOCUMENTS}
NO_FIELDS = {"mesh.over_replicas", "data.mix"}  # a function, a key of environment.json
OTHERS = {"--label"}  # of srun
ENDINGS = {"py", "md", "sh", "json", "jsonl", "html", "yaml", "txt", "svg", "bin", "toml", "index"}


def test_every_change_and_every_config_field_that_is_named_exists() -> None:
    known = {key for key, _ in config_lib.leaves(dataclasses.asdict(Config()))}
    groups = {key.rpartition(".")[0] for key in known} | {key.split(".")[0] for key in known}
    wrong, count = [], 0
    for path, text in SENTENCES.items():
        for change in re.findall(r"--set (\w+\.\w[\w.]*=[^\s`'\"]+)`", text):
            count += 1
            try:
                config_lib.apply_sets(Config(), [change])
            except config_lib.UserError as error:
                wrong.append(f"{path.name}: --set {change}: {error}")
        for name in re.findall(r"`(\w+(?:\.\w+)+)[`=]", text):
            if name.split(".")[0] not in groups or name.split(".")[-1] in ENDINGS:
                continue
            count += 1
            if name not in known | groups | NO_FIELDS:
                wrong.append(f"{path.name}: `{name}`: no such config field")
    assert not wrong, "\n".join(wrong)
    assert count > 100


def test_every_option_that_is_named_exists() -> None:
    folders = (("jaxmoe", "*.py"), ("benchmarks", "*.py"), ("launch", "*"))
    files = [one for name, kind in folders for one in (ROOT / name).rglob(kind) if one.is_file()]
    ours = "\n".join(one.read_text() for one in files if "__pycache__" not in one.parts)
    wrong, count = [], 0
    for path, text in SENTENCES.items():
        for code in documents.inline(text):
            if not documents.START.match(code) or " jaxmoe" in code:
                for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", code):
                    count += 1
                    if option not in OTHERS and not re.search(rf"{option}(?![a-z-])", ours):
                        wrong.append(f"{path.name}: `{code}`: {option} is nobody's")
    assert not wrong, "\n".join(wrong)
    assert count > 80


def test_what_is_not_run_has_a_reason_and_is_there() -> None:
    """Every command is run or in NOT_RUN, which has nothing that no document has."""
    for pattern, (reason, test) in NOT_RUN.items():
        assert any(not_run(one.text) == (reason, test) for one in COMMANDS), (
            f"no document has a command {pattern} (beyond those above it): take it out of NOT_RUN"
        )
        assert reason
        assert not test or (ROOT / test).is_file(), f"{pattern}: there is no {test}"
    for path, text in SENTENCES.items():
        strange = documents.unknown(text)
        assert not strange, f"{path.name}: commands? add the program to PROGRAM: {strange}"
    for pattern in (TRAINS, *CODES):
        assert any(re.fullmatch(pattern, one.text) for one in RUN), f"no command is {pattern}"
    print(f"{len(RUN)} of {len(COMMANDS)} commands are run, {len(SLOW)} of them by -m slow")
    assert len(COMMANDS) > 140 and len(QUICK) > 40 and len(SLOW) > 10
