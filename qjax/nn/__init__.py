"""Flax NNX modules whose weights are arrays or QArrays."""

from qjax.nn.attention import Attention as Attention
from qjax.nn.convert import convert as convert
from qjax.nn.embed import Embed as Embed
from qjax.nn.general import General as General
from qjax.nn.layer import DecoderLayer as DecoderLayer
from qjax.nn.linear import GroupedLinear as GroupedLinear
from qjax.nn.linear import Linear as Linear
from qjax.nn.mlp import MLP as MLP
from qjax.nn.moe import MoE as MoE
from qjax.nn.norm import LayerNorm as LayerNorm
from qjax.nn.norm import RMSNorm as RMSNorm
