"""8- and 4-bit weights against the formulas, said with loops; and whole folders of them."""

import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from folders import BF16, SMALL, Tensors, assert_same, draw, quiet, read, write
from published import Json
from safetensors.numpy import save_file

from jaxmoe.convert import quantised, safetensors, transfer
from jaxmoe.errors import UserError

F8 = np.dtype(ml_dtypes.float8_e4m3fn)


def decode_e4m3(byte: int) -> float:
    """1 sign, 4 exponent and 3 mantissa bits, bias 7; no infinity, one NaN."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def decode_e2m1(code: int) -> float:
    """1 sign, 2 exponent and 1 mantissa bit, bias 1."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -size if sign else size


def float8(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """theirs [out, in], a scale for 128 x 128 of them."""
    out = np.empty(values.shape, np.float32)
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            product = decode_e4m3(int(values[i, j])) * float(scales[i // 128, j // 128])
            out[i, j] = np.float32(product)
    return out.astype(BF16)


def mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[E, out, groups, 16] bytes -> [E, in, out]: 32 values share a power of two."""
    e, outs, groups, _ = blocks.shape
    result = np.empty((e, groups * 32, outs), np.float32)
    for index in np.ndindex(e, groups * 32, outs):
        expert, i, o = index
        byte = int(blocks[expert, o, i // 32, i % 32 // 2])
        code = byte >> 4 if i % 2 else byte & 15
        result[index] = decode_e2m1(code) * 2.0 ** (int(scales[expert, o, i // 32]) - 127)
    return result.astype(BF16)


def save(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("shape", [(128, 128), (130, 259), (5, 300), (257, 3), (1, 1)])
def test_float8_blocks(tmp_path: Path, shape: tuple[int, int]) -> None:
    """The last blocks are cut where sizes are no multiples of 128."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, shape).astype(np.uint8)
    values[values & 127 == 127] = 0  # NaN
    scales = np.exp2(rng.uniform(-9, 3, [-(-n // 128) for n in shape])).astype(np.float32)
    save(tmp_path, {"w": values.view(F8), "w_scale_inv": scales})
    found = quantised.unpacked(safetensors.tensors(tmp_path))
    assert found.keys() == {"w"} and found["w"].shape == shape
    assert_same({"w": found["w"].read()}, {"w": float8(values, scales)})


def test_every_float8_code(tmp_path: Path) -> None:
    values = np.arange(256, dtype=np.uint8).reshape(2, 128)
    save(tmp_path, {"w": values.view(F8), "w_scale_inv": np.full((1, 1), 3.0, np.float32)})
    got = quantised.unpacked(safetensors.tensors(tmp_path))["w"].read().astype(np.float32)
    np.testing.assert_array_equal(
        got, float8(values, np.full((1, 1), 3.0, np.float32)).astype(np.float32)
    )
    assert np.isnan(got).sum() == 2


def test_mxfp4_codes_and_scales(tmp_path: Path) -> None:
    """All 16 codes in both halves of a byte; the smallest and largest scales that are finite."""
    codes = np.arange(256, dtype=np.uint8).reshape(1, 4, 4, 16)
    blocks = np.concatenate([codes, codes[:, ::-1], codes[:, :, ::-1]])
    rng = np.random.default_rng(0)
    scales = rng.integers(100, 140, (3, 4, 4)).astype(np.uint8)
    scales[0, 0], scales[1, 2] = (0, 1, 2, 3), (249, 250, 251, 252)
    save(tmp_path, {"x_blocks": blocks, "x_scales": scales})
    source = quantised.unpacked(safetensors.tensors(tmp_path))["x"]
    want = mxfp4(blocks, scales)
    assert source.shape == want.shape == (3, 128, 4)
    assert_same({"x": source.read()}, {"x": want})
    assert_same({"x": source.read(1, 3)}, {"x": want[1:3]})
    assert len(np.unique(np.abs(want.astype(np.float64)))) > 100


@pytest.mark.parametrize(
    ("tensors", "shapes"),
    [
        ({"w": np.zeros((200, 100), F8), "w_scale_inv": np.zeros((4, 2), np.float32)}, "(4, 2)"),
        ({"w": np.zeros((200, 100), F8), "w_scale_inv": np.zeros((1,), np.float32)}, "(1,)"),
        ({"w": np.zeros((200,), F8), "w_scale_inv": np.zeros((2,), np.float32)}, "(200,)"),
        ({"w_blocks": np.zeros((2, 3, 4, 8), "u1"), "w_scales": np.zeros((2, 3, 4), "u1")}, "8)"),
        ({"w_blocks": np.zeros((2, 3, 4, 16), "u1"), "w_scales": np.zeros((2, 3), "u1")}, "(2, 3)"),
    ],
)
def test_other_block_sizes_are_refused(tmp_path: Path, tensors: Tensors, shapes: str) -> None:
    """They would be read as other numbers."""
    save(tmp_path, tensors)
    with pytest.raises(UserError, match="do not fit values of the shape") as error:
        quantised.unpacked(safetensors.tensors(tmp_path))
    assert shapes in str(error.value) and "model.safetensors" in str(error.value)


def test_half_a_pair_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    """So that from-hf names it as unknown."""
    save(tmp_path, {"a_scale_inv": np.zeros((1, 1)), "b_blocks": np.zeros((1, 1, 1, 16), "u1")})
    assert quantised.unpacked(safetensors.tensors(tmp_path)).keys() == {"a_scale_inv", "b_blocks"}


def test_a_folder_in_float8(tmp_path: Path) -> None:
    """As DeepSeek-V3 is published: every matrix but embedding, head, router and norms; and what is
    written again is bfloat16, and does not say otherwise."""
    hf = {**SMALL["deepseek_v3"], "quantization_config": {"quant_method": "fp8"}}
    plain, packed, want = draw(hf), {}, {}
    rng = np.random.default_rng(1)
    for name, value in plain.items():
        if name.endswith("_proj.weight") and "eh_proj" not in name:
            codes = rng.integers(0, 127, value.shape).astype(np.uint8)
            scale = rng.uniform(0.01, 0.1, (1, 1)).astype(np.float32)
            packed |= {name: codes.view(F8), name + "_scale_inv": scale}
            want[name] = float8(codes, scale)
        else:
            exact = np.float32 if name.endswith("correction_bias") else BF16
            packed[name] = want[name] = value.astype(exact)
    assert 0 < sum(n.endswith("_scale_inv") for n in packed) < len(plain)
    about = round_trip(tmp_path, hf, packed, want)
    assert "quantization_config" not in about and about["dtype"] == "bfloat16"


def test_a_folder_in_mxfp4(tmp_path: Path) -> None:
    """As gpt-oss is published: its experts' matrices."""
    hf = {**SMALL["gpt_oss"], "hidden_size": 64, "intermediate_size": 32, "head_dim": 16}
    hf |= {"quantization_config": {"quant_method": "mxfp4"}}
    plain, packed, want = draw(hf), {}, {}
    rng = np.random.default_rng(1)
    for name, value in plain.items():
        if name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj"):
            e, ins, outs = value.shape
            blocks = rng.integers(0, 256, (e, outs, ins // 32, 16)).astype(np.uint8)
            scales = rng.integers(110, 130, (e, outs, ins // 32)).astype(np.uint8)
            packed |= {name + "_blocks": blocks, name + "_scales": scales}
            want[name] = mxfp4(blocks, scales)
        else:
            packed[name] = want[name] = value
    assert sum(n.endswith("_blocks") for n in packed) == 2 * hf["num_hidden_layers"]
    about = round_trip(tmp_path, hf, packed, want)
    assert "quantization_config" not in about


def round_trip(folder: Path, hf: Json, packed: Tensors, want: Tensors) -> Json:
    """In and out; the new config.json."""
    write(folder / "theirs", hf, packed)
    transfer.from_hf(folder / "theirs", folder / "ours", quiet)
    about, _ = transfer.to_hf(folder / "ours", folder / "back", None, quiet)
    assert_same(read(folder / "back"), want)
    return about
