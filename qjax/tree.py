"""Names of the leaves of a pytree, and maps over them. All rules match these names."""

from collections.abc import Callable
from typing import Any

import jax

from qjax.qarray import is_qarray


def path_name(path: tuple[Any, ...]) -> str:
    """Dotted name of a key path: 'layers.0.mlp.up_proj.weight'.

    Flax NNX wraps each leaf in a Variable, whose own key, '.value', is dropped: a module, its
    state and its pure dict give the same names.
    """
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return name.removesuffix(".value")


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """[(name, leaf)] in tree order; a QArray is one leaf."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_qarray)
    return [(path_name(path), leaf) for path, leaf in flat]


def map_named(f: Callable[[str, Any], Any], tree: Any) -> Any:
    """The same tree with each leaf replaced by f(name, leaf); a QArray is one leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: f(path_name(path), leaf), tree, is_leaf=is_qarray
    )
