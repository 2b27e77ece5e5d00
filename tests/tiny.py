"""For tests of tiny networks, whose time is compilation: parameters drawn in numpy, and programs compiled in haste.

The parameters are at no special point (ones, zeros, ties) where a dropped term would hide.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

# A third less time than with optimizations.
jit = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
)


def key(seed=0):
    """A key whose generator compiles fast."""
    return jax.random.key(seed, impl="rbg")


# How a leaf is drawn: the first pattern found in its path decides.
DRAWS = (
    (r"(log_dt|log_step)", lambda random, shape: random.uniform(np.log(0.02), np.log(0.5), shape)),
    (r"log_(re|im)$", lambda random, shape: 0.5 * random.normal(size=shape)),
    (r"(lambda|a)_re$", lambda random, shape: -random.uniform(0.1, 1.0, shape)),
    (r"(lambda|a)_im$", lambda random, shape: 3.0 * random.normal(size=shape)),
    (r"ssm/", lambda random, shape: random.normal(size=shape)),
    (r"scale$", lambda random, shape: 1 + 0.3 * random.normal(size=shape)),
    (r"kernel$", lambda random, shape: random.normal(size=shape) / np.sqrt(shape[-2])),
    (r"", lambda random, shape: 0.3 * random.normal(size=shape)),
)


def draw(shapes, seed=0):
    """Arrays for a tree of shapes."""
    random = np.random.default_rng(seed)

    def leaf(path, shape):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        make = next(make for pattern, make in DRAWS if re.search(pattern, name))
        return jnp.asarray(make(random, shape.shape), shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def shapes(module, *args, **call):
    """All variables that `module` creates, as shapes. Arguments may be shapes too."""
    keys = {"params": key(), "dropout": key()}

    def array(leaf):
        return jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf

    return jax.eval_shape(lambda: module.init(keys, *jax.tree.map(array, args), **jax.tree.map(array, call)))


def random_parameters(module, *args, seed=0, **call):
    """Values for the `params` of `module`, called with these arguments."""
    return draw(shapes(module, *args, **call)["params"], seed)
