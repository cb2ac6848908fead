"""The shape of the code: who may import whom, how long things are, and what the CLI offers."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jaxmoe"
FILES = sorted(p for p in PACKAGE.rglob("*.py"))
OURS = FILES + sorted((ROOT / "configs").glob("*.py"))
ALL = OURS + sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "benchmarks").rglob("*.py"))

# A file imports only from its own floor or those below (docs: README.md, "Layout").
FLOORS = {
    0: (
        *(
            "",
            "attention_paths",
            "config",
            "config_check",
            "config_file",
            "config_run",
            "config_types",
            "curriculum",
            "jax_versions",
            "tree",
            "spec",
            "stores",
            "transfer",
            "errors",
            "exits",
            "outside",
        ),
        "forecast",
    ),
    1: ("context", "mesh"),
    2: ("kernels", "model"),
    3: ("optim", "adafactor", "moments", "data"),
    4: ("run",),
    5: ("plan", "ladder", "evaluate", "convert", "generate", "report"),
    6: ("train", "supervise", "restarts", "replay", "coordinates"),
}
UNPICKLES = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"),
    *("jsonpickle", "yaml", "torch", "copyreg", "codeop", "runpy"),
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}


def module_name(path: Path) -> str:
    """`jaxmoe/model/moe.py` -> `jaxmoe.model.moe`; a package's `__init__` is the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def floor(module: str) -> int:
    parts = module.split(".")[1:]
    if parts and parts[-1] == "__main__":
        return 6
    return FLOOR_OF[parts[0] if parts else ""]


def imports(path: Path) -> Iterator[str]:
    """Every jaxmoe module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if name.split(".")[0] == "jaxmoe":
                yield name


def test_every_module_has_a_floor() -> None:
    assert len(MODULES) > 30
    for module in MODULES:
        floor(module)


def test_imports_point_down() -> None:
    wrong = [
        f"{module} (floor {floor(module)}) imports {other} (floor {floor(other)})"
        for module, path in MODULES.items()
        for other in imports(path)
        if floor(other) > floor(module)
    ]
    assert not wrong, "\n".join(wrong)
    assert "jaxmoe.mesh" in set(imports(PACKAGE / "model" / "moe.py"))  # they are found at all


def test_imports_make_no_circle() -> None:
    left = {m: set(imports(path)) - {m} for m, path in MODULES.items()}
    while left:
        done = {m for m, others in left.items() if not others & set(left)}
        assert done, f"a circle among {sorted(left)}"
        left = {m: others for m, others in left.items() if m not in done}


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_forecast_needs_no_jax() -> None:
    """It is numpy and scipy alone, so that a register can be verified anywhere."""
    modules = [m for m in MODULES if m.startswith("jaxmoe.forecast")]
    assert len(modules) > 4
    code = f"import sys, {', '.join(modules)}; print([m for m in sys.modules if m[:3] == 'jax'])"
    loaded = ast.literal_eval(run_python(code))
    assert "jaxmoe.forecast" in loaded
    assert all(m == "jaxmoe" or m.startswith("jaxmoe.") for m in loaded), loaded


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", ALL, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_ascii_and_annotated(path: Path) -> None:
    """At most 500 lines a file and 80 a function; outside tests every function says its types."""
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    odd = [
        f"line {i}: {line!r}" for i, line in enumerate(text.splitlines(), 1) if not line.isascii()
    ]
    assert not odd, odd
    for node in functions(path):
        lines = (node.end_lineno or 0) - node.lineno + 1
        assert lines <= 80, f"{node.name}: {lines} lines"
        if ROOT / "tests" in path.parents:
            continue
        assert node.returns is not None, f"{node.name}, line {node.lineno}: no return type"
        args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare = [a.arg for a in args if a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare, f"{node.name}, line {node.lineno}: no type for {bare}"


@pytest.mark.parametrize("path", OURS, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    """A checkpoint, cache or record from elsewhere must not be able to run code."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            names = {(module or alias.name).split(".")[0] for alias in node.names}
            assert not names & UNPICKLES
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", None))
            if isinstance(node.func, ast.Name):
                assert name not in ("eval", "exec", "compile", "__import__"), node.lineno
            assert name not in ("system", "popen", "extractall", "unpack_archive"), node.lineno
            given = {k.arg: k.value for k in node.keywords}
            for flag in ("allow_pickle", "shell"):
                allow = given.get(flag)
                assert allow is None or getattr(allow, "value", True) is False, node.lineno


def test_code_is_loaded_from_config_files_alone() -> None:
    """And those are named *.py by whoever starts the command: no other file becomes a module.
    viewers.py imports parts of tensorboardX, an installed package, by names that it writes out."""
    loads = (
        r"spec_from_file_location|exec_module|import_module|SourceFileLoader|run_path|run_module"
    )
    found = [path.name for path in FILES if re.search(loads, path.read_text())]
    assert found == ["config_file.py", "viewers.py"]


def test_the_options_of_train_are_closed() -> None:
    """A new knob is a config field, never a flag."""
    from jaxmoe.train import _parser

    options = {o for action in _parser()._actions for o in action.option_strings}
    assert options == {"-h", "--help", "--config", "--set", "--run-dir", "--resume"}
    assert not [a for a in _parser()._actions if not a.option_strings]  # nothing positional


def test_test_files_have_names_of_their_own_and_none_is_skipped() -> None:
    names = [p.name for p in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), "pytest imports test files by name"
    for path in (ROOT / "tests").rglob("*.py"):
        assert not re.search(r"^\s*@pytest\.mark\.skip\b", path.read_text(), re.M), path
