"""A folder of the hub becomes parameters bit by bit, or an error in one line and no folder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from folders import BF16, SMALL, Tensors, assert_same, draw, quiet, read, write
from processes import environment, kill_group, started, wait_until
from safetensors.numpy import save_file

from jaxmoe.convert import transfer
from jaxmoe.convert.store import copy_to
from jaxmoe.errors import UserError
from jaxmoe.run.params import Params, open_params

MATRIX = "model.layers.1.self_attn.q_proj.weight"


def convert(folder: Path, hf: dict, tensors: Tensors) -> Params:
    write(folder / "theirs", hf, tensors)
    transfer.from_hf(folder / "theirs", folder / "ours", quiet)
    return open_params(folder / "ours")


@pytest.mark.parametrize("dtype", [BF16, np.dtype("f4")], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_round_trip_is_bitwise(tmp_path: Path, name: str, dtype: np.dtype) -> None:
    tensors = draw(SMALL[name], dtype)
    convert(tmp_path, SMALL[name], tensors)
    transfer.to_hf(tmp_path / "ours", tmp_path / "back", None, quiet, shard=3000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    assert_same(read(tmp_path / "back"), tensors)


def test_where_values_lie(tmp_path: Path) -> None:
    """Said once without links.py: theirs [out, in] with heads merged, ours (in, heads, head)."""
    theirs = draw(SMALL["qwen3_moe"], np.dtype("f4"))
    ours = convert(tmp_path, SMALL["qwen3_moe"], theirs)
    layer, expert = 2, 3
    base = f"model.layers.{layer}"
    wk = theirs[f"{base}.self_attn.k_proj.weight"]  # 2 heads of 6, from 16
    wo = theirs[f"{base}.self_attn.o_proj.weight"]  # to 16, from 4 heads of 6
    pairs = {
        "embed_VD": theirs["model.embed_tokens.weight"],
        "head_DV": theirs["lm_head.weight"].T,
        "layers/0/0/attention/wk_DKH": np.stack([wk[:6].T, wk[6:].T], axis=1),
        "layers/0/0/attention/wo_NHD": np.stack([wo[:, 6 * n : 6 * n + 6].T for n in range(4)]),
        "layers/0/0/ffn/router/w_DE": theirs[f"{base}.mlp.gate.weight"].T,
        "layers/0/0/attention_norm_D": theirs[f"{base}.input_layernorm.weight"],
    }
    for leaf, want in pairs.items():
        at = () if "layers" not in leaf else (layer,)
        np.testing.assert_array_equal(ours.read(leaf, at), want, err_msg=leaf)
    for leaf, name in (("wgate_EDF", "gate"), ("wup_EDF", "up"), ("wdown_EFD", "down")):
        want = theirs[f"{base}.mlp.experts.{expert}.{name}_proj.weight"].T
        got = ours.read(f"layers/0/0/ffn/experts/{leaf}", (layer, expert))
        np.testing.assert_array_equal(got, want, err_msg=leaf)


def test_interleaved_values_lie_apart(tmp_path: Path) -> None:
    """gpt-oss: gate and up by turns. DeepSeek-V3: the two of a rotary pair side by side."""
    theirs = draw(SMALL["gpt_oss"], np.dtype("f4"))
    ours = convert(tmp_path, SMALL["gpt_oss"], theirs)
    both = theirs["model.layers.1.mlp.experts.gate_up_proj"]
    for leaf, start in (("wgate_EDF", 0), ("wup_EDF", 1)):
        got = ours.read(f"layers/0/1/ffn/experts/{leaf}", (0,))
        np.testing.assert_array_equal(got, both[:, :, start::2])

    (tmp_path / "second").mkdir()
    theirs = draw(SMALL["deepseek_v3"], np.dtype("f4"))
    ours = convert(tmp_path / "second", SMALL["deepseek_v3"], theirs)
    key = theirs["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]  # 6 latent, 4 rotary
    np.testing.assert_array_equal(
        ours.read("layers/0/0/attention/wkr_DW", (0,)), key[[6, 8, 7, 9]].T
    )


def test_mixed_and_other_dtypes_rest_in_float32(tmp_path: Path) -> None:
    """Of a leaf: one dtype for all layers; float16 is not kept, its values are."""
    tensors = draw(SMALL["llama"])
    tensors[MATRIX] = tensors[MATRIX].astype(np.float32) + 1e-6
    norm = "model.norm.weight"
    tensors[norm] = tensors[norm].astype(np.float16)
    ours = convert(tmp_path, SMALL["llama"], tensors)
    dtype = lambda leaf: ours.array(leaf).dtype.numpy_dtype  # noqa: E731
    assert dtype("layers/0/0/attention/wq_DNH") == dtype("final_norm_D") == np.float32
    assert dtype("layers/0/0/attention/wk_DKH") == BF16
    got = ours.read("layers/0/0/attention/wq_DNH", (1,)).reshape(16, -1).T
    np.testing.assert_array_equal(got, tensors[MATRIX])
    np.testing.assert_array_equal(ours.read("final_norm_D"), tensors[norm].astype(np.float32))


def test_large_matrices_pass_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs, chunks and what is in flight far smaller than a tensor, both ways."""
    for module in ("transfer.SLAB", "store.CHUNK", "store.IN_FLIGHT"):
        monkeypatch.setattr(f"jaxmoe.convert.{module}", 70)
    monkeypatch.setattr("jaxmoe.convert.store.ROWS", 3)
    for name in ("gpt_oss", "deepseek_v3"):
        (tmp_path / name).mkdir()
        tensors = draw(SMALL[name])
        convert(tmp_path / name, SMALL[name], tensors)
        transfer.to_hf(tmp_path / name / "ours", tmp_path / name / "back", None, quiet)
        assert_same(read(tmp_path / name / "back"), tensors)


@pytest.mark.parametrize("shape", [(5,), (7, 3), (600, 5), (3, 5, 4), (2, 300, 5), (0, 4)])
def test_copies_of_transposed_views(shape: tuple[int, ...]) -> None:
    values = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    for shift in range(len(shape)):
        order = [*range(shift, len(shape)), *range(shift)]
        view = values.transpose(order)
        out = np.empty(view.shape, np.int32)
        copy_to(out, view)
        np.testing.assert_array_equal(out, view)
        back = np.empty(shape, np.int32)
        copy_to(back.transpose(order), out)
        np.testing.assert_array_equal(back, values)


# What does not fit


def refused(folder: Path, hf: dict, tensors: Tensors) -> str:
    """The one line; nothing but the source is left."""
    write(folder / "theirs", hf, tensors)
    with pytest.raises(UserError) as error:
        transfer.from_hf(folder / "theirs", folder / "ours", quiet)
    assert [f.name for f in folder.iterdir()] == ["theirs"]
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_unknown_and_misshapen_tensors_are_named_at_once(tmp_path: Path) -> None:
    tensors = draw(SMALL["mixtral"])
    gone = "model.layers.2.block_sparse_moe.experts.4.w2.weight"
    del tensors[gone]
    tensors["model.layers.3.input_layernorm.weight"] = np.zeros(16, BF16)
    tensors[MATRIX] = tensors[MATRIX].T.copy()
    text = refused(tmp_path, SMALL["mixtral"], tensors)
    assert f"1 missing: {gone}" in text
    assert "1 unknown: model.layers.3.input_layernorm.weight" in text
    assert f"1 misshapen: {MATRIX} is 16 x 24, not 24 x 16" in text


def test_many_are_counted(tmp_path: Path) -> None:
    tensors = {n: t for n, t in draw(SMALL["mixtral"]).items() if ".w3." not in n}
    text = refused(tmp_path, SMALL["mixtral"], tensors)
    assert "15 missing: model.layers.0.block_sparse_moe.experts.0.w3.weight" in text
    assert "and 12 more" in text


def test_a_tied_head_is_unknown_and_old_rope_buffers_are_not(tmp_path: Path) -> None:
    hf = SMALL["llama"]
    tensors = draw(hf)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
    (tmp_path / "fine").mkdir()
    convert(tmp_path / "fine", hf, tensors)
    (tmp_path / "head").mkdir()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    assert "1 unknown: lm_head.weight" in refused(tmp_path / "head", hf, tensors)


def test_mtp_copies_must_be_copies(tmp_path: Path) -> None:
    """Published beside the module; they are the main model's embedding and head."""
    hf = SMALL["deepseek_v3"]
    tensors = draw(hf)
    embed, head = "model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"
    tensors[embed] = tensors["model.embed_tokens.weight"].copy()
    tensors[head] = tensors["lm_head.weight"].copy()
    for folder in ("equal", embed, head):
        (tmp_path / folder).mkdir()
    convert(tmp_path / "equal", hf, tensors)
    for name in (embed, head):
        spoiled = tensors[name].copy()
        spoiled[-1, -1] += 1
        text = refused(tmp_path / name, hf, {**tensors, name: spoiled})
        assert name in text and "differs" in text


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "theirs", SMALL["llama"], draw(SMALL["llama"]))
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine").write_text("x")
    with pytest.raises(UserError, match="exists already"):
        transfer.from_hf(tmp_path / "theirs", tmp_path / "ours", quiet)
    assert (tmp_path / "ours" / "mine").read_text() == "x"
    with pytest.raises(UserError, match="there is no folder"):
        transfer.from_hf(tmp_path / "theirs", tmp_path / "no" / "ours", quiet)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["ours", "theirs"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ("{", "config.json"), ("[1]", "no JSON object")],
)
def test_no_config(tmp_path: Path, content: str | None, message: str) -> None:
    (tmp_path / "theirs").mkdir()
    if content is not None:
        (tmp_path / "theirs" / "config.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        transfer.from_hf(tmp_path / "theirs", tmp_path / "ours", quiet)
    assert str(tmp_path / "theirs" / "config.json") in str(error.value)


def test_an_error_or_an_interrupt_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "theirs", SMALL["llama"], draw(SMALL["llama"]))
    for kind in (OSError, KeyboardInterrupt):
        seen = 0

        def fail(*_: object, kind: type[BaseException] = kind) -> None:
            nonlocal seen
            seen += 1
            if seen == 5:
                assert len(list(tmp_path.iterdir())) == 2  # it is being written
                raise kind

        with pytest.raises(kind):
            transfer.from_hf(tmp_path / "theirs", tmp_path / "ours", fail)
        assert [f.name for f in tmp_path.iterdir()] == ["theirs"]


def test_a_kill_in_the_middle_leaves_no_target(tmp_path: Path, text_cache: Path) -> None:
    """And the same command then succeeds."""
    hf = {**SMALL["llama"], "num_hidden_layers": 300}
    write(tmp_path / "theirs", hf, draw(hf))
    command = [sys.executable, "-m", "jaxmoe.convert", "from-hf", str(tmp_path / "theirs")]
    command += ["--to", str(tmp_path / "ours"), "--json"]
    log = tmp_path / "log"
    begun = "ours.part-*/params/layers.0.0.ffn.wdown_FD/5.0.0"
    with started(command, text_cache, log) as process:
        wait_until(process, lambda: bool(list(tmp_path.glob(begun))), log)
        kill_group(process)
    assert not (tmp_path / "ours").exists()
    assert len(list(tmp_path.glob("ours.part-*"))) == 1
    done = subprocess.run(command, env=environment(text_cache), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ours" / "config.json").is_file()


def test_tokenizer_files_go_along_both_ways(tmp_path: Path) -> None:
    source = write(tmp_path / "theirs", SMALL["llama"], draw(SMALL["llama"]))
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja")
    files += ("special_tokens_map.json", "generation_config.json", "vocab.json", "merges.txt")
    for name in files:
        (source / name).write_bytes(name.encode() + b"\0\xff")
    (source / "README.md").write_text("not of the model")
    transfer.from_hf(source, tmp_path / "ours", quiet)
    assert open_params(tmp_path / "ours").tokenizer == tmp_path / "ours" / "tokenizer"
    shutil.rmtree(source)
    transfer.to_hf(tmp_path / "ours", tmp_path / "back", None, quiet)
    for name in files:
        assert (tmp_path / "back" / name).read_bytes() == name.encode() + b"\0\xff"
    assert not (tmp_path / "back" / "README.md").exists()


def test_entries_that_are_not_ours_are_kept(tmp_path: Path) -> None:
    """Token ids and such; but not what is said of other files."""
    hf = {**SMALL["deepseek_v3"], "torch_dtype": "float16", "eos_token_id": [5, 7]}
    convert(tmp_path, hf, draw(hf))
    transfer.to_hf(tmp_path / "ours", tmp_path / "back", "float32", quiet)
    about = json.loads((tmp_path / "back" / "config.json").read_text())
    assert about["eos_token_id"] == [5, 7] and about["initializer_range"] == 0.02
    assert about["dtype"] == "float32"
    assert not {"torch_dtype", "auto_map", "quantization_config"} & about.keys()


def test_orbax_reads_the_folder(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    tensors = draw(SMALL["deepseek_v3"], np.dtype("f4"))
    convert(tmp_path, SMALL["deepseek_v3"], tensors)
    with ocp.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "ours" / "params")
    np.testing.assert_array_equal(found["embed_VD"], tensors["model.embed_tokens.weight"])
    bias = found["layers"][1][0]["ffn"]["router"]["balance_bias_E"]
    want = tensors["model.layers.2.mlp.gate.e_score_correction_bias"]
    np.testing.assert_array_equal(bias[1], want)
    np.testing.assert_array_equal(
        found["mtp"][0]["embed_norm_D"], tensors["model.layers.3.enorm.weight"]
    )


def test_files_of_one_dtype_each_are_one_model(tmp_path: Path) -> None:
    """Files without an index, as some fine-tunes have them: all of them are read."""
    tensors = draw(SMALL["qwen3"])
    folder = write(tmp_path / "theirs", SMALL["qwen3"], {"x": np.zeros(1)})
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for i in range(3):
        save_file({n: tensors[n] for n in names[i::3]}, folder / f"{i}.safetensors")
    transfer.from_hf(folder, tmp_path / "ours", quiet)
    transfer.to_hf(tmp_path / "ours", tmp_path / "back", None, quiet)
    assert_same(read(tmp_path / "back"), tensors)
