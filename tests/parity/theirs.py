"""Tiny random models of transformers, with awkward sizes, one of each architecture."""

# torch and transformers are an extra, and lint runs without it.
# pyright: reportMissingImports=false

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import transformers
from transformers.modeling_layers import MtpModel

# Every size is its own, so that swapped dims cannot pass.
COMMON = {
    "vocab_size": 67,
    "hidden_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "intermediate_size": 26,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "attn_implementation": "eager",
    "dtype": "float32",
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MLA = {
    "num_key_value_heads": 6,
    "head_dim": 4,  # of the rotary part
    "q_lora_rank": 14,
    "kv_lora_rank": 18,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "moe_intermediate_size": 20,
    "intermediate_size": 30,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "rope_parameters": {**YARN, "rope_theta": 100.0, "mscale": 0.7, "mscale_all_dim": 1.3},
}
SQUARE = {"hidden_size": 60, "head_dim": 10}  # they take it for granted
SPARSE = {"num_experts": 5, "num_experts_per_tok": 3}


@dataclass(frozen=True)
class Case:
    """Which class of transformers, and its config beyond COMMON."""

    name: str
    config: Callable[..., Any]
    values: dict[str, Any]

    def build(self) -> Any:
        return self.config(**{**COMMON, **self.values})


def rope(theta: float, **scaling: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", **scaling, "rope_theta": theta}}


# fmt: off
CASES = [
    Case("mixtral", transformers.MixtralConfig, {
        "num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 5, **rope(50.0)}),
    Case("olmoe", transformers.OlmoeConfig, {**SPARSE, **SQUARE, **rope(100.0)}),
    Case("olmoe_biased", transformers.OlmoeConfig, {
        **SPARSE, **SQUARE, "norm_topk_prob": True, "attention_bias": True,
        "tie_word_embeddings": True, **rope(100.0, rope_type="linear", factor=2.0)}),
    Case("qwen3_moe", transformers.Qwen3MoeConfig, {
        **SPARSE, "moe_intermediate_size": 18, "norm_topk_prob": True, **rope(1e4, **YARN)}),
    Case("qwen3_moe_interleaved", transformers.Qwen3MoeConfig, {
        **SPARSE, "moe_intermediate_size": 18, "decoder_sparse_step": 2, "num_hidden_layers": 5,
        "use_sliding_window": True, "sliding_window": 6, **rope(1e4)}),
    Case("deepseek_v3", transformers.DeepseekV3Config, {
        **MLA, "num_nextn_predict_layers": 2}),
    Case("deepseek_v3_plain", transformers.DeepseekV3Config, {
        **MLA, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False,
        "first_k_dense_replace": 2, "num_nextn_predict_layers": 0, **rope(100.0)}),
    Case("gpt_oss", transformers.GptOssConfig, {
        "num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 5, "swiglu_limit": 1.5,
        "num_hidden_layers": 4, **rope(150.0, **{**YARN, "truncate": False})}),
    Case("llama", transformers.LlamaConfig, {
        "hidden_size": 60, "head_dim": 8, "tie_word_embeddings": True, **rope(100.0, **LLAMA3)}),
    Case("qwen3", transformers.Qwen3Config, {"num_key_value_heads": 1, **rope(100.0)}),
]
# fmt: on
BY_NAME = {case.name: case for case in CASES}


@dataclass
class Theirs:
    """A model, its MTP modules if it has any, and the folder both were saved to."""

    model: Any
    folder: Path
    mtp: Any = None


def build(case: Case, folder: Path) -> Theirs:
    """A model with every parameter drawn at random, norms, biases and sinks too."""
    torch.manual_seed(0)
    config = case.build()
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    randomise(model)
    model.save_pretrained(folder)
    theirs = Theirs(model=model.eval(), folder=folder)
    if getattr(config, "num_nextn_predict_layers", 0):
        theirs.mtp = MtpModel(model, config.num_nextn_predict_layers).eval()
        randomise(theirs.mtp.layers)
        tensors = mtp_tensors(theirs, lambda p: p.detach().numpy())
        safetensors.numpy.save_file(tensors, folder / "mtp.safetensors")
    return theirs


def randomise(model: Any) -> None:
    scale = 1.4  # large enough that routing, softmaxes and clamps matter
    buffers = [(n, b) for n, b in model.named_buffers() if n.endswith("correction_bias")]
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *buffers]:
            if "norm" in name:
                p.uniform_(0.5, 1.5)
            elif p.ndim == 1 or name.endswith("bias"):
                p.normal_(0, 0.3)
            elif "embed_tokens" in name:
                p.normal_(0, 0.5)
            else:
                p.normal_(0, scale / p.shape[-1] ** 0.5)


def load(folder: Path, mtp: bool = False) -> Theirs:
    """As a user would, with the MTP modules where asked."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
    if not mtp:
        return Theirs(model=model, folder=folder)
    # They find the modules by the layer number of the published model, 61.
    n = model.config.num_hidden_layers
    numbers = range(n, n + model.config.num_mtp_layers)
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{i}\..*" for i in numbers]
    modules = MtpModel.from_pretrained(model).eval()
    return Theirs(model=model, folder=folder, mtp=modules)


def logits(model: Any, tokens: Any, **options: Any) -> Any:
    with torch.no_grad():
        out = model(input_ids=torch.tensor(tokens), use_cache=False, **options)
    return out.logits.numpy()


def mtp_logits(theirs: Theirs, tokens: Any, keep_graph: bool = False) -> list[Any]:
    """Of module k: [B, L - k, V], as training has it: all positions at once, no cache."""
    with torch.set_grad_enabled(keep_graph):
        return _mtp_logits(theirs, torch.tensor(tokens))


def _mtp_logits(theirs: Theirs, ids: Any) -> list[Any]:
    out = theirs.model(input_ids=ids, use_cache=False, output_hidden_states=True)
    x, found = out.hidden_states[-1], []
    for k in range(theirs.mtp.num_mtp_layers):
        x, ids = x[:, :-1], ids[:, 1:]
        positions = torch.arange(ids.shape[1])[None]
        x = theirs.mtp.forward_layer(k, x, positions, None, input_ids=ids)
        found.append(theirs.mtp._project_to_logits(x))
    return found


def cross_entropy(logits: Any, targets: Any) -> Any:
    """Mean over targets that are not -100."""
    flat = logits.reshape(-1, logits.shape[-1])
    return torch.nn.functional.cross_entropy(flat, torch.as_tensor(targets).reshape(-1).long())


def save_gradients(theirs: Theirs, folder: Path) -> None:
    """Every parameter's gradient as if it were the parameter, in the names that files have."""
    if theirs.mtp is not None:
        folder.mkdir()
        tensors = mtp_tensors(theirs, lambda p: p.grad.numpy())
        safetensors.numpy.save_file(tensors, folder / "mtp.safetensors")
    with torch.no_grad():
        for buffer in theirs.model.buffers():  # the balance bias has none
            buffer.zero_()
        for p in theirs.model.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    theirs.model.save_pretrained(folder)


def mtp_tensors(theirs: Theirs, pick: Callable[[Any], np.ndarray]) -> dict[str, np.ndarray]:
    """By the names that a checkpoint has; the experts lie fused in memory."""
    found, n = {}, theirs.model.config.num_hidden_layers
    for k, layer in enumerate(theirs.mtp.layers):
        buffers = [(n, b) for n, b in layer.named_buffers() if n.endswith("correction_bias")]
        named = [(n, pick(p)) for n, p in layer.named_parameters()]
        named += [(n, b.numpy() if b.grad is None else b.grad) for n, b in buffers]
        for name, value in named:
            name = name.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
            base = f"model.layers.{n + k}"
            if name.endswith("experts.gate_up_proj"):
                for e, both in enumerate(value):
                    gate, up = np.split(both, 2)
                    found[f"{base}.mlp.experts.{e}.gate_proj.weight"] = gate.copy()
                    found[f"{base}.mlp.experts.{e}.up_proj.weight"] = up.copy()
            elif name.endswith("experts.down_proj"):
                for e, down in enumerate(value):
                    found[f"{base}.mlp.experts.{e}.down_proj.weight"] = down.copy()
            else:
                found[f"{base}.{name}"] = value
    return found


@functools.cache
def greedy(model: Any, prompt: tuple[int, ...], n: int) -> list[int]:
    """Prompt and continuation."""
    out = model.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False)
    return out[0].tolist()
