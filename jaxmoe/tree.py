"""Pytrees with names: every leaf has a path such as `layers/moe/wi_EDF`."""

import zlib
from collections.abc import Callable
from typing import Any

import jax

Path = tuple[Any, ...]


def name(path: Path) -> str:
    """`(GetAttrKey('layers'), GetAttrKey('wq'))` -> `layers/wq`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def map_named(f: Callable[..., Any], tree: Any, *rest: Any, is_leaf: Any = None) -> Any:
    """`tree.map` whose function also gets the leaf's name, first."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: f(name(path), *leaves), tree, *rest, is_leaf=is_leaf
    )


def named_leaves(tree: Any, is_leaf: Any = None) -> list[tuple[str, Any]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(name(path), leaf) for path, leaf in flat]


def fold_name(key: jax.Array, leaf_name: str) -> jax.Array:
    """A key of its own for each name: adding a parameter leaves the others' draws alone."""
    return jax.random.fold_in(key, zlib.crc32(leaf_name.encode()))
