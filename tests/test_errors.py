"""Messages: one line, however much is wrong."""

import pytest

from longlive_jax import checkpoint
from longlive_jax.config import TransformerConfig
from longlive_jax.errors import listed


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], ""),
        (["head.bias", "blocks.3.norm.weight"], "head.bias, blocks.3.norm.weight"),
        ([f"blocks.{i}.ffn.0.bias" for i in (0, 1, 2, 5, 7, 8, 10)], "blocks.0-2,5,7-8,10.ffn.0.bias"),
        ([f"blocks.{i}.{p}" for i in range(3) for p in "qk"], "blocks.0-2.q, blocks.0-2.k"),
        ([f"lora_unet_blocks_{i}_q.alpha" for i in (1, 0)], "lora_unet_blocks_0-1_q.alpha"),
        (["a.00.b", "a.0.b", "a.1.b"], "a.00.b, a.0-1.b"),
        (list("abcdefgh"), "a, b, c, d, e, f and 2 more"),
        ([*"abcdef", *(f"g.{i}.x" for i in range(40))], "a, b, c, d, e, f and 40 more"),
        (["y" * 5000], "y" * 120 + "..."),
    ],
)
def test_names_in_a_message(names, expected):
    assert listed(names) == expected


def test_a_wrong_file_is_told_in_few_words():
    """The 14B's tensors where the 1.3B's were expected, and names of another model: each kind of fault once."""
    small, large = (
        checkpoint.tensor_shapes("transformer", cfg)
        for cfg in (TransformerConfig.t2v_1_3b(), TransformerConfig.t2v_14b())
    )
    found = {f"other.{name}" if ".ffn." in name else name: shape for name, shape in large.items()}
    text = "; ".join(checkpoint.compare_shapes("x", small, found))
    assert len(small) > 800
    assert len(text) < 3000
    for part in ("lacks blocks.0-29.ffn.", "unexpected blocks.30-39.", " more", "[5120, 5120], expected [1536, 1536]"):
        assert part in text
