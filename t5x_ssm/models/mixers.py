"""The mixers that a pattern can name, with the settings their papers use. A network's own `mixers` come first."""

import functools
from collections.abc import Mapping
from types import MappingProxyType

from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.dss import DSS
from t5x_ssm.layers.gated_operator import GatedOperator
from t5x_ssm.layers.gss import GSS
from t5x_ssm.layers.h3 import H3
from t5x_ssm.layers.s4 import S4, S4D
from t5x_ssm.layers.s5 import S5
from t5x_ssm.layers.spade import Spade
from t5x_ssm.models.stack import Factory

DEFAULT_MIXERS: Mapping[str, Factory] = MappingProxyType(
    {
        "gss": GSS,
        "h3": H3,
        "s4": S4,
        "s4d": S4D,
        "dss": DSS,
        "s5": S5,
        "s5op": GatedOperator,
        "attn": functools.partial(Attention, span="full"),
        "spade": functools.partial(Spade, attention=functools.partial(Attention, span="sliding")),
        "swa": functools.partial(Attention, span="sliding"),
        "chunk": functools.partial(Attention, span="chunk"),
    }
)
