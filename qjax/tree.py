"""Names of the leaves of a pytree, and maps over them. All rules match these names."""

from collections.abc import Callable
from typing import Any

import jax

from qjax.errors import ConfigError
from qjax.qarray import is_qarray


def path_name(path: tuple[Any, ...]) -> str:
    """Dotted name of a key path: 'layers.0.mlp.up_proj.weight'.

    Flax NNX wraps each leaf in a Variable, whose own key, '.value', is dropped: a module, its
    state and its pure dict give the same names (but
    a module lists a layer that it holds twice at both places).
    """
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return name.removesuffix(".value")


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """[(name, leaf)] in tree order; a QArray is one leaf."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_qarray)
    return [(path_name(path), leaf) for path, leaf in flat]


def leaves_by_name(tree: Any) -> dict[str, Any]:
    """{name: leaf} in tree order.

    Raises:
      ConfigError: two leaves have one name, as in {"a.b": x, "a": {"b": y}}.
    """
    leaves: dict[str, Any] = {}
    for name, leaf in named_leaves(tree):
        if name in leaves:
            raise ConfigError(f"two leaves of the tree are called {name}; rename one of them")
        leaves[name] = leaf
    return leaves


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, concrete or abstract, or a QArray; trees may hold numbers too."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def map_named(f: Callable[[str, Any], Any], tree: Any) -> Any:
    """The same tree with each leaf replaced by f(name, leaf); a QArray is one leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: f(path_name(path), leaf), tree, is_leaf=is_qarray
    )


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key of a dotted name that puts layers.2 before layers.10.

    >>> sorted(["layers.10.w", "layers.2.w", "embed.w"], key=natural_order)
    ['embed.w', 'layers.2.w', 'layers.10.w']
    """
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
