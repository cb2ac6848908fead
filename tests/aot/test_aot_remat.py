"""What `model.remat` keeps on the device, as the real compilers lay the step out.

Run with an environment that has them: python -m pytest -m aot tests/aot
"""

import pytest
from test_aot_step import MODEL, compiled

from jaxmoe.config import replace

pytestmark = pytest.mark.aot

LAYERS = 6
DEEP = replace(MODEL, n_layers=LAYERS, n_experts=8, top_k=2, n_shared_experts=1)
POLICIES = ("none", "matmuls", "attention", "full", "offload")


@pytest.mark.parametrize("kind", ["h100", "v5p:2x2x1"])
def test_each_policy_keeps_less_than_the_one_before(kind: str) -> None:
    """Under offload what full keeps is in the host's memory (space 5 of the program)."""
    sizes = {}
    for policy in POLICIES:
        program = compiled(kind, 4, replace(DEEP, remat=policy))
        sizes[policy] = program.memory_analysis().temp_size_in_bytes
        print(kind, policy, f"temporaries {sizes[policy] / 2**30:.2f} GiB on the device")
        assert ("S(5)" in program.as_text()) == (policy == "offload")
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True), sizes
