"""A run of ours becomes a folder of the hub: its newest whole checkpoint, bit by bit."""

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from folders import BF16, assert_same, quiet, read
from tokenizers import Tokenizer

from jaxmoe import tree
from jaxmoe.convert import transfer
from jaxmoe.data import ranks
from jaxmoe.data.tokenizer import EOT, train_bpe
from jaxmoe.errors import UserError
from jaxmoe.model.lm import lm_specs
from jaxmoe.run import record
from jaxmoe.run.params import open_params
from jaxmoe.spec import is_spec


@pytest.fixture(scope="module")
def checkpoint(straight: Path) -> dict[str, np.ndarray]:
    """By leaf, as orbax restores it."""
    newest = max((straight / "checkpoints").iterdir(), key=lambda f: int(f.name))
    assert newest.name == "24"
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(newest / "state")
    leaves = tree.named_leaves(restored["params"])
    return {name: np.asarray(value) for name, value in leaves}


def damage(folder: Path) -> Path:
    """Changes a byte of the largest file."""
    file = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file


def test_values_are_the_checkpoints(exported: Path, checkpoint: dict[str, np.ndarray]) -> None:
    """Said once without links.py, for the run's qwen3_moe; every leaf is covered."""
    theirs, seen = read(exported), set()

    def take(leaf: str) -> np.ndarray:
        seen.add(leaf)
        return checkpoint[leaf]

    layers, experts = 2, 8
    want = {
        "model.embed_tokens.weight": take("embed_VD"),
        "model.norm.weight": take("final_norm_D"),
        "lm_head.weight": take("head_DV").T,
    }
    for i in range(layers):
        ours, name = "layers/0/0", f"model.layers.{i}"
        plain = {"input_layernorm": "attention_norm_D", "post_attention_layernorm": "ffn_norm_D"}
        plain |= {"self_attn.q_norm": "attention/q_norm", "self_attn.k_norm": "attention/k_norm"}
        for key, leaf in plain.items():
            want[f"{name}.{key}.weight"] = take(f"{ours}/{leaf}")[i]
        for x, dims in (("q", "NH"), ("k", "KH"), ("v", "KH")):
            value = take(f"{ours}/attention/w{x}_D{dims}")[i]
            want[f"{name}.self_attn.{x}_proj.weight"] = value.reshape(len(value), -1).T
        value = take(f"{ours}/attention/wo_NHD")[i]
        want[f"{name}.self_attn.o_proj.weight"] = value.reshape(-1, value.shape[-1]).T
        want[f"{name}.mlp.gate.weight"] = take(f"{ours}/ffn/router/w_DE")[i].T
        for key, leaf in (("gate", "wgate_EDF"), ("up", "wup_EDF"), ("down", "wdown_EFD")):
            for e in range(experts):
                value = take(f"{ours}/ffn/experts/{leaf}")[i, e]
                want[f"{name}.mlp.experts.{e}.{key}_proj.weight"] = value.T
    assert_same(theirs, want)
    assert seen == checkpoint.keys()


def test_back_again_equals_the_run(returned: Path, checkpoint: dict[str, np.ndarray]) -> None:
    stored = open_params(returned)
    stored.check(lm_specs(stored.model))
    names = [name for name, _ in tree.named_leaves(lm_specs(stored.model), is_leaf=is_spec)]
    assert_same({name: stored.read(name) for name in names}, checkpoint)
    with ocp.PyTreeCheckpointer() as checkpointer:
        found = tree.named_leaves(checkpointer.restore(returned / "params"))
    assert_same({name: np.asarray(value) for name, value in found}, checkpoint)


def test_config_json(exported: Path, straight: Path) -> None:
    hf = json.loads((exported / "config.json").read_text())
    run = record.read_config(straight)
    assert hf["architectures"] == ["Qwen3MoeForCausalLM"]
    assert hf["dtype"] == "float32"
    assert hf["max_position_embeddings"] == run.train.seq_len
    assert (hf["hidden_size"], hf["num_experts"]) == (run.model.d_model, run.model.n_experts)
    # transformers has no tokenizer of bytes.
    assert not (exported / "tokenizer.json").exists()


def test_bfloat16_is_the_rounded_one(straight: Path, exported: Path, tmp_path: Path) -> None:
    transfer.to_hf(straight, tmp_path / "hf", "bfloat16", quiet)
    want = {name: value.astype(BF16) for name, value in read(exported).items()}
    assert_same(read(tmp_path / "hf"), want)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_files_respect_the_limit(straight: Path, exported: Path, tmp_path: Path) -> None:
    limit = 20_000
    transfer.to_hf(straight, tmp_path / "hf", None, quiet, shard=limit)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 4
    for file in files:
        assert file.name.endswith(f"-of-{len(files):05}.safetensors")
        tensors = file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
        assert tensors <= limit
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == read(exported).keys()
    assert_same(read(tmp_path / "hf"), read(exported))


def test_a_damaged_checkpoint(straight: Path, tmp_path: Path) -> None:
    """Of a run the one before is taken, and named; asked for itself it is refused."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    damage(run / "checkpoints" / "24")
    _, where = transfer.to_hf(run, tmp_path / "fallback", None, quiet)
    assert where == run / "checkpoints" / "18"
    transfer.to_hf(straight / "checkpoints" / "18", tmp_path / "whole", None, quiet)
    assert_same(read(tmp_path / "fallback"), read(tmp_path / "whole"))
    with pytest.raises(UserError, match="not a whole checkpoint.*SHA-256") as error:
        transfer.to_hf(run / "checkpoints" / "24", tmp_path / "no", None, quiet)
    assert "checkpoints/24" in str(error.value)
    damage(run / "checkpoints" / "18")
    with pytest.raises(UserError, match="no whole checkpoint .24: .*18: "):
        transfer.to_hf(run, tmp_path / "no", None, quiet)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["fallback", "run", "whole"]


@pytest.mark.parametrize("kind", ["nothing", "empty", "other", "hf"])
def test_what_has_no_parameters(tmp_path: Path, exported: Path, kind: str) -> None:
    where = exported if kind == "hf" else tmp_path / "there"
    if kind in ("empty", "other"):
        where.mkdir()
    if kind == "other":
        (where / "config.json").write_text('["no"]')
    with pytest.raises(UserError, match="no parameters here") as error:
        transfer.to_hf(where, tmp_path / "hf", None, quiet)
    assert str(where) in str(error.value) and "\n" not in str(error.value)


def test_a_leaf_that_is_gone_or_misshapen_is_named(returned: Path, tmp_path: Path) -> None:
    shutil.copytree(returned, tmp_path / "ours")
    leaf = tmp_path / "ours" / "params" / "layers.0.0.attention.wq_DNH"
    shutil.rmtree(leaf)
    with pytest.raises(UserError, match="layers/0/0/attention/wq_DNH is missing"):
        transfer.to_hf(tmp_path / "ours", tmp_path / "hf", None, quiet)
    shutil.copytree(tmp_path / "ours" / "params" / "layers.0.0.attention.wk_DKH", leaf)
    with pytest.raises(UserError, match="wq_DNH has the shape .2, 16, 2, 6., .*.2, 16, 4, 6."):
        transfer.to_hf(tmp_path / "ours", tmp_path / "hf", None, quiet)
    assert not (tmp_path / "hf").exists()


def test_a_model_that_no_architecture_has_writes_nothing(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    config = json.loads((run / "config.json").read_text())
    config["config"]["model"]["logit_soft_cap"] = 30.0
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="model.logit_soft_cap=30.0"):
        transfer.to_hf(run, tmp_path / "hf", None, quiet)
    assert not (tmp_path / "hf").exists()


def test_a_bpe_goes_along(straight: Path, tmp_path: Path) -> None:
    """As files that transformers reads, with the end of text where the run has it."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    texts = [Path(__file__).read_text(), "return return x x x + + 1 1"]
    (run / "tokenizer.json").write_text(train_bpe(texts, vocab_size=264).json)
    hf, _ = transfer.to_hf(run, tmp_path / "hf", None, quiet)
    ours, theirs = run / "tokenizer.json", tmp_path / "hf" / "tokenizer.json"
    text = "def f(x):\n    return x + 1\n"
    want = Tokenizer.from_file(str(ours)).encode(text).ids
    tokenizer = Tokenizer.from_file(str(theirs))
    assert tokenizer.encode(text).ids == want
    about = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert about["eos_token"] == EOT and len(want) < len(text)
    assert tokenizer.token_to_id(EOT) == hf["eos_token_id"] is not None
    assert about["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert about["model_max_length"] == 24

    # A folder of the hub has it too, and so has what comes of that.
    transfer.from_hf(tmp_path / "hf", tmp_path / "back", quiet)
    transfer.to_hf(tmp_path / "back", tmp_path / "again", None, quiet)
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == theirs.read_bytes()
    assert_same(read(tmp_path / "again"), read(tmp_path / "hf"))


def test_other_tokenizers_go_along(straight: Path, tmp_path: Path) -> None:
    """The end of text is not always the first special token; sentencepiece has its own file."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    alphabet = {bytes([b]): b for b in range(256)}
    specials = {"<|pad|>": 256, "<|endoftext|>": 257}
    (run / "tokenizer.json").write_text(ranks.to_json(alphabet, ranks.PATTERNS["gpt2"], specials))
    hf, _ = transfer.to_hf(run, tmp_path / "hf", None, quiet)
    assert hf["eos_token_id"] == 257
    model = base64.b64encode(b"a model").decode()
    (run / "tokenizer.json").write_text(json.dumps({"kind": "sentencepiece", "model": model}))
    transfer.to_hf(run, tmp_path / "pieces", None, quiet)
    assert (tmp_path / "pieces" / "tokenizer.model").read_bytes() == b"a model"
    assert not (tmp_path / "pieces" / "tokenizer.json").exists()
