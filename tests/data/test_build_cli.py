import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from jaxmoe.config import DataConfig
from jaxmoe.data.__main__ import main
from jaxmoe.data.cache import prepare
from jaxmoe.data.dataset import open_data_set
from jaxmoe.data.tokenizer_files import load_tokenizer
from jaxmoe.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXMOE_CACHE", str(tmp_path / "cache"))


def test_build_from_the_command_line(texts: Path, tmp_path: Path, capsys: Any):
    (tmp_path / "r.jsonl").write_text('{"body": "a row"}\n{"body": "another row"}\n{oh no\n')
    sources = [f"--source=words={texts}", f"--source=rows={tmp_path}/r.jsonl,text=body,domain=qa"]
    out = tmp_path / "deep" / "out"
    arguments = ["build", *sources, "--out", str(out), "--workers=1", "--max-malformed=0.4"]
    assert main([*arguments, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    data = open_data_set(out, verify=True)
    assert summary["fingerprint"] == data.fingerprint
    assert summary["sources"]["words"]["documents"] == 72
    assert summary["sources"]["rows"] == {
        "domain": "qa",
        "documents": 2,
        "bytes": 16,
        "tokens": data.sources["rows"].tokens,
        "bytes_per_token": round(16 / data.sources["rows"].tokens, 3),
        "dropped": {},
        "malformed": {"not JSON": {"n": 1, "example": "r.jsonl:42"}},
    }
    assert data.tokenizer.fingerprint == load_tokenizer("default").fingerprint
    assert main([*arguments, "--verify"]) == 0  # it is there
    shown = capsys.readouterr().out
    assert data.fingerprint in shown
    assert "not JSON" in shown
    tokens = out / "rows-00000.bin"
    tokens.write_bytes(tokens.read_bytes()[::-1])
    assert main([*arguments, "--verify"]) == 2
    assert "rows-00000.bin has changed" in capsys.readouterr().err
    assert main([*arguments, "--tokenizer=bytes"]) == 2
    assert "another tokenizer; another folder, or --force" in capsys.readouterr().err
    assert main([*arguments, "--tokenizer=bytes", "--force"]) == 0
    assert open_data_set(out).tokenizer.kind == "bytes"


def test_train_tokenizer_then_build_with_it(texts: Path, tmp_path: Path, capsys: Any):
    words, file = f"--source=words={texts}", tmp_path / "mine.tiktoken"
    arguments = ["train-tokenizer", words, "--vocab-size=400", "--bytes=50000", f"--out={file}"]
    assert main([*arguments, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert 50_000 <= summary["bytes"]["prose"] < 53_000
    assert summary["specials"]["fim_suffix"] == 399
    tokenizer = load_tokenizer(str(file))
    assert tokenizer.fingerprint == summary["fingerprint"]
    assert main([*arguments[:-1], f"--out={tmp_path / 'mine.json'}"]) == 0
    assert load_tokenizer(str(tmp_path / "mine.json")).fingerprint == tokenizer.fingerprint
    out = tmp_path / "out"
    assert main(["build", words, f"--out={out}", f"--tokenizer={file}", "--workers=1"]) == 0
    data = open_data_set(out)
    assert data.tokenizer.fingerprint == tokenizer.fingerprint
    entry = data.manifest["sources"]["words"]
    assert entry["tokens"] < 0.6 * entry["bytes"]
    assert data.manifest["tokenizer"]["specials"] == summary["specials"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "--source=a=x"], "--out DIR"),
        (["build", "--tokenizer=bytes"], "go with --source or --tier"),
        (["build", "--tier=nosuch", "--out=o"], "--tier nosuch: no such file"),
        (["build", "--out=o"], "nothing to build from"),
        (["build", "--source=a=x", "--out=o", "--set=seed=1"], "has no config"),
        (["build", "--source=a=x", "--out=o", "--tokenizer=none.json"], "tokenizer none.json"),
        (["train-tokenizer", "--source=a=x", "--out=no/such/t.json"], "there is no folder"),
    ],
)
def test_a_wrong_build_is_one_line(
    arguments: list[str], message: str, capsys: Any, tmp_path: Path, monkeypatch: Any
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.glob("o/*"))


def test_a_run_takes_the_default_or_a_file(config: DataConfig, tmp_path: Path):
    named = dataclasses.replace(config, tokenizer="default")
    corpus = prepare(named, 40_000)
    assert corpus.tokenizer.fingerprint == load_tokenizer("default").fingerprint
    assert corpus.manifest["tokenizer"]["vocab_size"] == 32_768
    with pytest.raises(UserError, match="model.vocab_size=4096: tokenizer default has 32768 ids"):
        prepare(named, 4096)
    file = tmp_path / "mine.json"
    file.write_text(corpus.tokenizer.json)
    assert prepare(dataclasses.replace(config, tokenizer=str(file)), 40_000).folder == corpus.folder
    file.write_text(corpus.tokenizer.json + "\n")  # another file under the name: built again
    other = prepare(dataclasses.replace(config, tokenizer=str(file)), 40_000)
    assert other.folder != corpus.folder
