"""Not a test: a folder in which the commands of the documents can be run as they stand.

It has what their words name: texts, runs, ladders and records, configs. Nothing of a command is
changed; only what stands in configs/ there is smaller, so that a run takes seconds.
"""

import contextlib
import gzip
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from documents import filled, words_of
from processes import PATIENCE, ROOT, environment

# The package too: commands without --config take the quickstart that stands beside it.
COPIED = ("benchmarks", "configs", "docs", "jaxmoe", "launch")
LONG, SHORT = 1250, 150  # documents look at step 1204; what they start themselves is shorter
SMALL = """

_full = quickstart


def quickstart() -> Config:
    full = _full()
    model = ModelConfig(
        vocab_size=264, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_head=6, d_ff=20,
        n_experts=8, top_k=2, loss_chunk=8,
    )
    data = DataConfig(
        holdout=("json", "http"), tokenizer="bytes", max_bytes=400_000, holdout_bytes=3_000
    )
    return replace(
        full, model=model, data=data, train=replace(full.train, steps=STEPS, seq_len=24),
        eval=EvalConfig(every=50, batch_size=64), forecast=ForecastConfig(first=800, every=400),
        checkpoint=CheckpointConfig(every=100, keep=2, at=(500,)),
    )
"""
QWEN = """
from quickstart import quickstart

from jaxmoe.config import replace


def qwen3_moe() -> Config:
    return replace(quickstart(), name="qwen3_moe")
"""
# What documents write as the user's own.
CONFIGS = {
    "my_config.py": """from pathlib import Path

from jaxmoe.config import load, replace


def my_config():
    base = load(str(Path(__file__).parent / "configs" / "quickstart.py"))
    train = replace(base.train, steps=60)
    return replace(base, name="mine", model=replace(base.model, n_layers=4), train=train)
""",
    **{
        f"configs/{name}.py": f"""from ladder import target_moe

from jaxmoe.config import replace


def {name}():
    return replace(target_moe(), name="{name}")
"""
        for name in ("target", "big")
    },
}
RUNS = (  # copies of the prepared run, by the names that documents give it
    *("RUN", "A", "B", "OTHER", "RUN_DIR", "runs/first", "runs/second", "runs/again"),
    *("runs/tiny", "runs/small", "runs/mine", "runs/qwen3_moe"),
)
RECORDS = {
    **{f"ladders/{name}": f"ladder_{name}" for name in ("dense", "moe")},
    "ladders/shared": "gate_shared",
    "runs/target": "target_moe",
}
BUILD = (
    "python -m jaxmoe.data build --source python=src --source docstrings=docs"
    " --tokenizer bytes --out data/small"
)


@dataclass(frozen=True)
class Ended:
    text: str
    code: int
    said: str
    seconds: float


def configs(folder: Path, *, steps: int | None) -> None:
    """configs/ as it stands, or with runs of so many small steps; and those of a reader's own."""
    shutil.copytree(ROOT / "configs", folder / "configs", dirs_exist_ok=True)
    for name, text in CONFIGS.items():
        (folder / name).write_text(text)
    block = re.search(
        r"^    # my_config.py\n((?:    .*\n|\n)+)", (ROOT / "README.md").read_text(), re.M
    )
    assert block is not None, "README.md shows my_config.py"
    own = re.split(r"^    python ", block[1], flags=re.M)[0]
    (folder / "configs" / "my_config.py").write_text(re.sub(r"^    ", "", own, flags=re.M))
    if steps is not None:
        for name, text in (("quickstart", SMALL), ("qwen3_moe", QWEN)):
            with open(folder / "configs" / f"{name}.py", "a") as out:
                out.write(text.replace("STEPS", str(steps)))


def prepare(folder: Path, text_cache: Path) -> None:
    """Everything that the documents' commands name; one training run of some seconds."""
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    configs(folder, steps=LONG)
    texts(folder)
    first = in_shell("python -m jaxmoe.train --run-dir runs/quickstart", folder, folder, text_cache)
    assert first.code == 0, first.said
    configs(folder, steps=SHORT)
    for name in RUNS:
        shutil.copytree(folder / "runs" / "quickstart", folder / name)
    for name, record in RECORDS.items():
        shutil.copytree(ROOT / "benchmarks" / "records" / record, folder / name)
    export = "python -m jaxmoe.convert to-hf runs/quickstart --to Qwen3-30B-A3B"
    for done in in_one_process([(BUILD, folder), (export, folder)], folder, text_cache):
        assert done.code == 0, f"{done.text}\n{done.said}"
    for name in ("data/installed", "DATASET", "DIR"):
        shutil.copytree(folder / "data" / "small", folder / name)
    held = "python -m jaxmoe.data holdout DATASET wikitext2 --from wikitext-2/test.txt"
    (done,) = in_one_process([(held, folder)], folder, text_cache)
    assert done.code == 0, done.said


def texts(folder: Path) -> None:
    """Texts, records and counts."""
    shutil.copytree(ROOT / "docs", folder / "my_texts" / "diary")
    (folder / "my_texts" / "letters").mkdir()
    paragraphs = (ROOT / "LICENSE").read_text().split("\n\n")
    for i, text in enumerate(paragraphs[:20]):
        (folder / "my_texts" / "letters" / f"{i}.txt").write_text(text)
    for package, source in (("sqlalchemy", "run"), ("flax", "plan"), ("optax", "report")):
        shutil.copytree(
            ROOT / "jaxmoe" / source,
            folder / "src" / package,
            ignore=lambda _, names: [name for name in names if not name.endswith(".py")],
        )
    shutil.copytree(ROOT / "docs", folder / "notes")
    shutil.copytree(ROOT / "configs", folder / "src" / "other")
    shutil.copytree(folder / "src", folder / "FOLDER")
    (folder / "wikitext-2").mkdir()
    (folder / "wikitext-2" / "test.txt").write_text(" = Title = \n \n Text of it . \n" * 20)
    task = {
        "task_id": "HumanEval/0",
        "prompt": "def one():\n",
        "canonical_solution": "  return 1\n",
    }
    with gzip.open(folder / "HumanEval.jsonl.gz", "wt") as out:
        out.write(json.dumps(task) + "\n")
    records = ROOT / "benchmarks" / "records"
    shutil.copy(records / "transfer.jsonl", folder / "sweep.jsonl")
    shutil.copy(records / "ladder_dense" / "records.jsonl", folder / "ladder.jsonl")
    rows = [json.loads(line) for line in (folder / "ladder.jsonl").read_text().splitlines()]
    keys = ("params_active", "tokens", "flops", "loss")
    table = [",".join(keys), *(",".join(str(row[key]) for key in keys) for row in rows)]
    (folder / "ladder.csv").write_text("\n".join(table) + "\n")
    counts(folder / "counts.jsonl", (1e18, 4e18, 1.6e19, 6.4e19, 2.56e20))
    counts(folder / "target.jsonl", (1e21,))


def counts(path: Path, budgets: Sequence[float]) -> None:
    """Passes of 30 tasks in 100 tries each, whose -log p falls as C^-0.25."""
    rows = []
    for flops in budgets:
        rng = np.random.default_rng(int(np.log(flops) * 100))
        p = np.exp(-((flops / 1e19) ** -0.25) * rng.gamma(8.0, 1 / 8.0, 30))
        rows += [
            {"compute": flops, "bucket": "one", "task": f"t{i}", "passes": int(n), "tries": 100}
            for i, n in enumerate(rng.binomial(100, p))
        ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def around(package: Path, text_cache: Path) -> dict[str, str]:
    """The environment of a command: `python` is this one, the package that of the folder."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**environment(text_cache), "PYTHONPATH": str(package), "PATH": path}


def in_shell(text: str, folder: Path, package: Path, text_cache: Path) -> Ended:
    """A command line as a shell takes it."""
    began = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", filled(text)],
        cwd=folder,
        env=around(package, text_cache),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=4 * PATIENCE,
    )
    return Ended(text, done.returncode, done.stdout, time.monotonic() - began)


def in_one_process(
    jobs: Sequence[tuple[str, Path]], package: Path, text_cache: Path
) -> list[Ended]:
    """Commands without a shell, one after another in one interpreter: imports cost once."""
    asked = json.dumps([[text, str(folder)] for text, folder in jobs])
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), asked],
        cwd=package,
        env={**around(package, text_cache), "PYTHONPATH": f"{package}:{Path(__file__).parent}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=5 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [Ended(**json.loads(line)) for line in done.stdout.splitlines() if line[:1] == "{"]


def main() -> None:
    for text, folder in json.loads(sys.argv[1]):
        words, said, began, code = words_of(text), io.StringIO(), time.monotonic(), 0
        os.chdir(folder)
        is_module = words[1] == "-m"
        sys.argv = words[2:] if is_module else words[1:]
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                if is_module:
                    runpy.run_module(words[2], run_name="__main__", alter_sys=True)
                else:
                    sys.path.insert(0, str(Path(words[1]).parent.resolve()))
                    runpy.run_path(words[1], run_name="__main__")
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else int(done.code is not None)
        except BaseException:
            code = 1
            said.write(traceback.format_exc())
        ended = Ended(text, code, said.getvalue(), time.monotonic() - began)
        print(json.dumps(asdict(ended)), flush=True)


if __name__ == "__main__":
    main()
