"""Flax NNX modules whose weights are arrays or QArrays."""

from qjax.nn.convert import convert as convert
from qjax.nn.embed import Embed as Embed
from qjax.nn.general import General as General
from qjax.nn.linear import Linear as Linear
from qjax.nn.norm import RMSNorm as RMSNorm
