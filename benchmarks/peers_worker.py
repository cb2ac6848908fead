"""One library's train step in a process of its own, asked for steps over stdin: see peers.py.

    python benchmarks/peers_worker.py LIBRARY SPEC.json      a line `3` on stdin runs three steps

Answers are lines of JSON; whatever a library prints goes to stderr. The interpreter may be one that
does not have jaxmoe (MaxText's), so that outside of its own branch a worker needs numpy alone.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Spec = Mapping[str, Any]


def cpu_seconds() -> tuple[float, float]:
    """User and system time of this process, all of its threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime, used.ru_stime


class Meter:
    """Between a library's loop and the asker: `begin` gives a step its batch, `end` is its end.

    `begin` waits on stdin where all that was asked for is done, so that a library which owns its
    loop (MaxText) is driven as well as one that does not.
    """

    def __init__(self, spec: Spec) -> None:
        self.batches = np.load(spec["batches"], mmap_mode="r")  # int32 [batch, B, L + 1]
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.done = self.left = 0
        self.facts: dict[str, Any] = {}  # of the model, said with every answer
        self.steps: list[dict[str, float]] = []
        self.idle_from: float | None = None
        self.idled = 0.0  # CPU seconds while it last waited: a pool that spins takes from others

    def begin(self) -> np.ndarray:
        while not self.left:
            self._wait()
        tokens = np.asarray(self.batches[self.done % len(self.batches)])
        self.began = time.perf_counter(), *cpu_seconds()
        return tokens

    def end(self) -> None:
        """Call it when the step's parameters are there, not when they are promised."""
        now = time.perf_counter(), *cpu_seconds()
        wall, user, system = (b - a for a, b in zip(self.began, now, strict=True))
        self.steps.append({"wall": wall, "user": user, "system": system})
        self.done += 1
        self.left -= 1

    def _wait(self) -> None:
        """Answers, if something was asked, and waits for the next question."""
        if self.steps or self.idle_from is None:
            answer = {"steps": self.steps, "idle_cpu": self.idled, **self.facts}
            print(json.dumps(answer), file=self.answers, flush=True)
        self.steps, self.idle_from = [], sum(cpu_seconds())
        line = sys.stdin.readline()
        if not line.strip():
            os._exit(0)  # the asker is done, or gone: no library's farewell is worth waiting for
        self.facts.pop("load_max", None)
        self.idled = sum(cpu_seconds()) - self.idle_from
        self.left = int(line)


def jaxmoe(spec: Spec, meter: Meter) -> None:
    import jax
    import step

    from jaxmoe import mesh as mesh_lib
    from jaxmoe.config import apply_sets
    from jaxmoe.run.step import Batch

    config = apply_sets(step.shapes()[spec["shape"]], [f"model.remat={spec['variant']}"])
    mesh = mesh_lib.build(config.mesh)
    with jax.set_mesh(mesh):
        row = step.build(config)
        sharding = mesh_lib.batch_sharding(mesh, 2)
        meter.facts = {
            "version": f"jax {jax.__version__}",
            "params": sum(x.size for x in jax.tree.leaves(row.state.params)),
        }
        while True:
            tokens = meter.begin()
            weights = np.ones((len(tokens), config.train.seq_len), np.float32)
            batch = Batch(*(jax.device_put(a, sharding) for a in (tokens, weights)))
            row.state, row.last = row.compiled(row.state, batch)
            jax.block_until_ready((row.state, row.last))
            meter.end()
            meter.facts["loss"] = float(row.last.sums.nll / row.last.sums.weight)
            load = float(np.asarray(row.last.router.load_E).max())
            meter.facts["load_max"] = max(load, meter.facts.get("load_max", 0.0))


def transformers(spec: Spec, meter: Meter) -> None:
    """OLMoE without its query and key norms, which the shape does not have."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import OlmoeConfig, OlmoeForCausalLM  # pyright: ignore[reportMissingImports]
    from transformers import __version__ as version  # pyright: ignore[reportMissingImports]

    model_of, optim = spec["model"], spec["optim"]
    torch.manual_seed(0)
    torch.set_num_threads(spec["threads"])
    config = OlmoeConfig(
        vocab_size=model_of["vocab_size"],
        hidden_size=model_of["d_model"],
        intermediate_size=model_of["d_ff"],
        num_hidden_layers=model_of["n_layers"],
        num_attention_heads=model_of["n_heads"],
        num_key_value_heads=model_of["n_kv_heads"],
        max_position_embeddings=spec["seq_len"],
        num_experts=model_of["n_experts"],
        num_experts_per_tok=model_of["top_k"],
        norm_topk_prob=True,
        output_router_logits=True,  # the load-balancing loss is on
        router_aux_loss_coef=model_of["load_balance_coef"],
        use_cache=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    experts, _, compiled = spec["variant"].partition("+")
    model: Any = OlmoeForCausalLM._from_config(
        config, experts_implementation=experts, attn_implementation="sdpa"
    )
    for layer in model.model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
    model.train()
    update = torch.optim.AdamW(
        model.parameters(),
        lr=optim["lr"],
        betas=(optim["beta1"], optim["beta2"]),
        eps=optim["eps"],
        weight_decay=optim["weight_decay"],
        fused=True,  # one kernel for all parameters: the fastest there is on CPU
    )
    meter.facts = {
        "version": f"transformers {version}, torch {torch.__version__}",
        "params": sum(p.numel() for p in model.parameters()),
    }
    forward = torch.compile(model) if compiled else model
    while True:
        tokens = torch.from_numpy(meter.begin().astype(np.int64))
        warm = min(1.0, (meter.done + 1) / max(1, optim["warmup_steps"]))
        update.param_groups[0]["lr"] = optim["lr"] * warm
        out = forward(input_ids=tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(
            out.logits.reshape(-1, out.logits.shape[-1]), tokens[:, 1:].reshape(-1)
        )
        (loss + model_of["load_balance_coef"] * out.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim["clip"])
        update.step()
        update.zero_grad(set_to_none=True)
        meter.end()
        meter.facts["loss"] = loss.item()


# MaxText has one option for each of these; the rest is its default. `minimal` keeps what it can, so
# that no layer is computed twice.
MAXTEXT = {
    "capacity": ("sparse_matmul=False", "capacity_factor=1.0"),
    "dense": ("sparse_matmul=False", "capacity_factor=-1"),
    "ragged": ("sparse_matmul=True", "megablox=False"),
}


def maxtext_options(spec: Spec) -> list[str]:
    model, optim = spec["model"], spec["optim"]
    way, _, remat = spec["variant"].partition("+")
    given = {
        "run_name": "peers",
        "base_output_directory": spec["folder"],
        "hardware": "cpu",
        "skip_jax_distributed_system": True,
        "steps": spec["max_steps"],
        "enable_checkpointing": False,
        "enable_tensorboard": False,
        "log_config": False,
        "dataset_type": "synthetic",  # its batches are replaced by ours on their way
        "decoder_block": "mixtral",
        "attention": "dot_product",
        "base_emb_dim": model["d_model"],
        "base_num_query_heads": model["n_heads"],
        "base_num_kv_heads": model["n_kv_heads"],
        "head_dim": model["d_head"],
        "base_mlp_dim": model["d_ff"],
        "base_moe_mlp_dim": model["d_ff"],
        "base_num_decoder_layers": model["n_layers"],
        "vocab_size": model["vocab_size"],
        "num_experts": model["n_experts"],
        "num_experts_per_tok": model["top_k"],
        "load_balance_loss_weight": model["load_balance_coef"],
        "max_target_length": spec["seq_len"],
        "per_device_batch_size": spec["batch_size"],
        "dtype": "float32",
        "weight_dtype": "float32",
        "learning_rate": optim["lr"],
        "learning_rate_schedule_steps": 10_000,
        "warmup_steps_fraction": optim["warmup_steps"] / 10_000,
        "adam_b1": optim["beta1"],
        "adam_b2": optim["beta2"],
        "adam_eps": optim["eps"],
        "adam_weight_decay": optim["weight_decay"],
        "gradient_clipping_threshold": optim["clip"],
        "remat_policy": remat or "full",
    }
    return [*(f"{key}={value}" for key, value in given.items()), *MAXTEXT[way]]


def maxtext(spec: Spec, meter: Meter) -> None:
    """Its own loop, main() and all; a step lasts from one batch's loading to the next one's."""
    import jax
    import maxtext  # pyright: ignore[reportMissingImports]
    from maxtext.common.data_loader import DataLoader  # pyright: ignore[reportMissingImports]
    from maxtext.trainers.pre_train import train  # pyright: ignore[reportMissingImports]

    load, setup = DataLoader.load_next_batch, train.train_utils.setup_train_loop

    def counted(*args: Any, **kwargs: Any) -> Any:
        from flax import nnx

        made = setup(*args, **kwargs)
        params = jax.tree.leaves(nnx.state(made[-1].model, nnx.Param))
        meter.facts = {
            "version": f"maxtext {maxtext.__version__}, jax {jax.__version__}",
            "params": sum(int(np.prod(p.shape)) for p in params),
        }
        return made

    def fed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if meter.left:
            jax.block_until_ready(jax.live_arrays())
            meter.end()
        like = load(self, *args, **kwargs)
        tokens = meter.begin()
        given = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
        return {
            name: jax.device_put(given[name].astype(old.dtype), old.sharding)
            if name in given
            else old
            for name, old in like.items()
        }

    DataLoader.load_next_batch = fed
    train.train_utils.setup_train_loop = counted
    train.main(["", *maxtext_options(spec)])


if __name__ == "__main__":
    libraries = {f.__name__: f for f in (jaxmoe, transformers, maxtext)}
    chosen = json.loads(Path(sys.argv[2]).read_text())
    libraries[sys.argv[1]](chosen, Meter(chosen))
