"""`python benchmarks/convert.py`: peak memory and seconds of jaxmoe.convert on generated models.

Each command runs in a process of its own, whose peak resident memory the kernel reports
(ru_maxrss). It includes what Python and the imports hold, which the first row shows. "Above" is the
peak less the largest tensor, and is what the issue limits to 2 GiB; for MXFP4 the largest tensor is
also given as it lies in the file.

A Qwen3-MoE-like model whose stacked leaves are over 2 GiB each, and a gpt-oss-like one whose
experts are one tensor a layer. Everything written is compared with what was drawn, bit by bit.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

MIB = 1 << 20
SHARD = 2 << 30
COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}


def qwen3_moe(layers: int, experts: int) -> dict[str, Any]:
    return {
        **COMMON,
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 32_768,
        "hidden_size": 2048,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "rope_theta": 1e6,
    }


def gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    return {
        **COMMON,
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "vocab_size": 32_768,
        "hidden_size": 2880,
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 2880,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "rope_theta": 150_000.0,
    }


def main() -> int:
    args = _parser().parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="jaxmoe-convert-", dir=args.folder))
    try:
        idle = _measured(["--help"])
        rows = [{"model": "-", "command": "idle (--help)", **idle}]
        print(_table(rows[:1]), flush=True)
        models = [("qwen3_moe", qwen3_moe(args.layers, args.experts), False)]
        models += [("gpt_oss, MXFP4", gpt_oss(args.packed_layers, args.packed_experts), True)]
        for name, hf, packed in models:
            for row in _model(name, hf, packed, scratch):
                rows.append(row)
                print(_table(rows).splitlines()[-1], flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print("\n" + _table(rows) + "\n\n" + json.dumps({"cores": os.cpu_count(), "rows": rows}))
    return 0


def _model(name: str, hf: dict[str, Any], packed: bool, scratch: Path) -> Iterator[dict[str, Any]]:
    """In, out, and where the files are packed in once more from what came out. Needs three times
    the model's size on disk."""
    theirs, ours, back = scratch / "theirs", scratch / "ours", scratch / "back"
    sizes = _apart(_generate, theirs, hf, packed)
    steps = [
        ("from-hf", ["from-hf", str(theirs), "--to", str(ours)]),
        ("to-hf", ["to-hf", str(ours), "--to", str(back), "--shard-bytes", str(SHARD)]),
    ]
    if packed:
        again = ["from-hf", str(back), "--to", str(scratch / "again")]
        steps.append(("from-hf, bfloat16", again))
    for label, command in steps:
        row = {"model": name, "command": label, **sizes, **_measured([*command, "--json"])}
        row["above_mib"] = round(row["peak_mib"] - row["largest_mib"])
        yield row
    different = _apart(_compare, theirs, back)
    if different:
        raise SystemExit(f"{name}: {len(different)} tensors changed, such as {different[0]}")
    for folder in scratch.iterdir():
        shutil.rmtree(folder)


def _measured(arguments: list[str]) -> dict[str, Any]:
    """Runs a command of jaxmoe.convert; this process holds little, which a child starts with."""
    command = [sys.executable, "-m", "jaxmoe.convert", *arguments]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mib": round(usage.ru_maxrss * 1024 / MIB),
    }


def _apart(f: Any, *args: Any) -> Any:
    """In a process of its own, so that its memory does not count as ours."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(f, args)


def _generate(folder: Path, hf: dict[str, Any], packed: bool) -> dict[str, Any]:
    """Random bfloat16 values below 2 (random blocks and scales where packed); sizes in MiB."""
    import numpy as np

    from jaxmoe.convert import families, safetensors
    from jaxmoe.convert.links import links

    family, cfg = families.from_hf(hf)
    bf16, u8 = safetensors.DTYPES["BF16"], safetensors.DTYPES["U8"]
    entries = []
    wanted = links(cfg, family.layout)
    for link in wanted:
        if packed and link.name.endswith("_proj"):  # theirs [E, in, out]
            e, ins, outs = link.shape
            entries.append((link.name + "_blocks", u8, (e, outs, ins // 32, 16)))
            entries.append((link.name + "_scales", u8, (e, outs, ins // 32)))
        else:
            entries.append((link.name, bf16, link.shape))
    plans, index = safetensors.plan_files(entries, SHARD)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf))
    if index is not None:
        (folder / safetensors.INDEX).write_text(json.dumps(index))
    rng = np.random.default_rng(0)
    for plan in plans:
        with safetensors.Writer(folder, plan) as writer:
            for name, dtype, shape in plan.entries:
                bits = rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
                if dtype == bf16:
                    bits[..., 1] &= 0xBF  # exponents of numbers below 2
                elif name.endswith("_scales"):
                    bits = bits % 16 + 116
                writer.write(name, [bits.view(dtype).reshape(shape)])
    size = lambda entry: int(np.prod(entry[2], dtype=np.int64)) * entry[1].itemsize  # noqa: E731
    largest = max(2 * int(np.prod(k.shape, dtype=np.int64)) for k in wanted)
    return {
        "model_mib": round(sum(map(size, entries)) / MIB),
        "files": len(plans),
        "tensors": len(entries),
        "largest_mib": round(largest / MIB),
        "largest_in_file_mib": round(max(map(size, entries)) / MIB),
    }


def _compare(theirs: Path, back: Path) -> list[str]:
    """Names of tensors whose bits differ."""
    import numpy as np

    from jaxmoe.convert import safetensors
    from jaxmoe.convert.quantised import unpacked

    first, second = unpacked(safetensors.tensors(theirs)), safetensors.tensors(back)
    assert first.keys() == second.keys()
    bits = lambda tensor: tensor.read().view(np.uint16)  # noqa: E731
    return [n for n in first if not np.array_equal(bits(first[n]), bits(second[n]))]


def _table(rows: list[dict[str, Any]]) -> str:
    heads = {
        "model": "model",
        "command": "command",
        "model_mib": "files, MiB",
        "largest_mib": "largest tensor",
        "peak_mib": "peak RSS",
        "above_mib": "above",
        "seconds": "s",
        "cpu_seconds": "CPU s",
    }
    lines = [f"| {' | '.join(heads.values())} |", "|---|---" + "|---:" * (len(heads) - 2) + "|"]
    lines += [f"| {' | '.join(str(row.get(k, '')) for k in heads)} |" for row in rows]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="for the files; default: the temporary folder")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=48, help="a layer")
    parser.add_argument("--packed-layers", type=int, default=2)
    parser.add_argument("--packed-experts", type=int, default=40)
    return parser


if __name__ == "__main__":
    sys.exit(main())
