"""The shape that GPT-4 is reported to have; OpenAI gives none (arXiv:2303.08774, section 2).

The report is SemiAnalysis's, "GPT-4 Architecture, Infrastructure, Training Dataset, Costs, Vision,
MoE" (Patel and Wong, 10 July 2023). It gives 120 layers, 16 experts of about 111 billion parameters
each over all layers, two of them a token, about 55 billion shared parameters of attention, which is
multi-query, 8k tokens of context, 1.8 trillion parameters in all and 280 billion active, and
training on 13 trillion tokens, epochs counted, in batches that grew to 60 million, with 8-way
tensor parallelism on about 25,000 A100.

What it does not give is ours: width, heads and rates (GPT-3's width and rate, arXiv:2005.14165,
table 2.1), a gated feed-forward, RoPE, and a vocabulary of cl100k's 100,277 rounded up to 1024s.
"""

from jaxmoe.config import (
    CheckpointConfig,
    Config,
    EvalConfig,
    ForecastConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RopeConfig,
    RouterConfig,
    TrainConfig,
    replace,
)


def gpt4() -> Config:
    """1,833 billion parameters, 278 active: 16 experts of 111.0 each, attention 54.7, embedding and
    head 1.2 each. 6 x active x tokens is 2.17e25 FLOPs, where the report has 2.15e25."""
    return Config(
        name="gpt4",
        model=ModelConfig(
            vocab_size=100_352,
            d_model=12_288,
            n_layers=120,
            norm_eps=1e-5,
            n_heads=144,
            n_kv_heads=1,
            d_head=128,
            qk_norm="none",
            d_ff=25_088,
            n_experts=16,
            top_k=2,
            router=RouterConfig(load_balance_coef=0.01, z_coef=0.001),
            loss_chunk=256,
            dtype="bfloat16",
        ),
        optim=OptimConfig(lr=6e-5, warmup_steps=2000, schedule="cosine", final_lr=0.1),
        # 50.3 million tokens a step: two sequences for each of 3,072 times 8 devices.
        train=TrainConfig(steps=258_300, batch_size=6144, seq_len=8192),
        eval=EvalConfig(every=500, batch_size=3072),
        # Without a pipeline, whatever the cluster: `data` gets 12 of 24,576 devices. The reported
        # one, with 15 stages, is gpt4_a100.
        mesh=MeshConfig(replica=16, data=-1, expert=16, model=8),
        checkpoint=CheckpointConfig(every=500),
        forecast=ForecastConfig(first=20_000, every=2000),
    )


def gpt4_32k() -> Config:
    """Fine-tuning for 32k tokens after the 8k run, as reported; how is ours (YaRN, 21 billion
    tokens). Give it the run to go on from: --set checkpoint.init_from=DIR."""
    base = gpt4()
    rope = RopeConfig(scaling="yarn", factor=4.0, original_length=8192)
    return replace(
        base,
        name="gpt4_32k",
        model=replace(base.model, rope=rope),
        optim=OptimConfig(lr=6e-6, warmup_steps=50, schedule="cosine", final_lr=0.1),
        # 16.8 million tokens a step.
        train=TrainConfig(steps=1250, batch_size=512, seq_len=32_768),
        eval=EvalConfig(every=50, batch_size=512),
        mesh=replace(base.mesh, replica=1),
        checkpoint=CheckpointConfig(every=50),
        forecast=ForecastConfig(first=200, every=50),
    )


def gpt4_a100() -> Config:
    """The reported cluster on paper: 24,960 A100 (about 25,000) as 8 tensor x 15 stages x 208.

    13 does not divide the width, so those 208 are 13 replicas of 16 shards. 51.1 million tokens a
    step, 30 microbatches of one sequence in each of the 208 pipelines;
    13 trillion tokens. `python -m jaxmoe.plan` says what comes out (docs/plan.md).
    """
    base = gpt4()
    return replace(
        base,
        name="gpt4_a100",
        train=replace(base.train, steps=254_315, batch_size=6240),
        eval=replace(base.eval, batch_size=3120),
        mesh=MeshConfig(
            replica=13, stage=15, data=1, expert=16, model=8, rounds=4, microbatches=30
        ),
    )


def gpt4_h100() -> Config:
    """The same on 8,192 H100: 8 tensor x 8 stages x 128, 48 microbatches of one sequence."""
    base = gpt4()
    return replace(
        base,
        name="gpt4_h100",
        train=replace(base.train, steps=258_300, batch_size=6144),
        eval=replace(base.eval, batch_size=1024),
        mesh=MeshConfig(stage=8, data=8, expert=16, model=8, rounds=5, microbatches=48),
    )
