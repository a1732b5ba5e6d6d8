"""Llama (model_type 'llama'): RMSNorm, rotary positions, grouped-query attention, SwiGLU.

arXiv:2302.13971, 2307.09288, 2407.21783. The modules and weights keep Hugging Face's names.
"""

import dataclasses
from typing import Any, ClassVar, Self

import jax.numpy as jnp
from flax import nnx

from qjax.errors import CheckpointError
from qjax.models.decoder import Decoder, DecoderConfig, check_end_tokens
from qjax.models.fields import reading
from qjax.models.rope import RopeConfig
from qjax.models.tensors import LLAMA_NAMES, Rename
from qjax.nn.attention import Attention as Attention
from qjax.nn.attention import AttentionConfig
from qjax.nn.layer import DecoderLayer as DecoderLayer
from qjax.nn.layer import LayerConfig
from qjax.nn.mlp import MLPConfig
from qjax.nn.norm import NormConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The sizes of a Llama model; field names are Hugging Face's."""

    model_type: ClassVar[str] = "llama"

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    eos_token_id: tuple[int, ...] = ()
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and not (type(value) is int and value > 0):
                raise CheckpointError(f"{field.name} is {value!r}; it must be a positive integer")
            if field.type is bool and type(value) is not bool:
                raise CheckpointError(f"{field.name} is {value!r}; it must be true or false")
        if not (isinstance(self.rms_norm_eps, float) and 0 < self.rms_norm_eps < 1):
            raise CheckpointError(f"rms_norm_eps is {self.rms_norm_eps!r}; it must be in (0, 1)")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise CheckpointError(
                f"{self.num_attention_heads} heads of {self.head_dim} with "
                f"{self.num_key_value_heads} key-value heads: the last must divide the first, and "
                "the size of a head must be even"
            )
        check_end_tokens(self.eos_token_id, self.vocab_size)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        """From the contents of a config.json.

        Raises:
          CheckpointError: a key is missing, or asks for what this model does not compute.
        """
        with reading(config, "llama") as fields:
            fields.only("hidden_act", "silu", "swish")
            fields.ignore("pretraining_tp")  # another order of the same sums
            heads = fields.heads(same=True)
            rope, _ = fields.rope(heads["head_dim"])
            return cls(
                vocab_size=fields.size("vocab_size"),
                hidden_size=fields.size("hidden_size"),
                intermediate_size=fields.size("intermediate_size"),
                num_hidden_layers=fields.size("num_hidden_layers"),
                num_attention_heads=heads["heads"],
                num_key_value_heads=heads["kv_heads"],
                head_dim=heads["head_dim"],
                max_position_embeddings=fields.size("max_position_embeddings"),
                rms_norm_eps=fields.epsilon("rms_norm_eps", 1e-6),
                tie_word_embeddings=fields.flag("tie_word_embeddings", False),
                attention_bias=fields.flag("attention_bias", False),
                mlp_bias=fields.flag("mlp_bias", False),
                eos_token_id=fields.end_tokens(),
                rope=rope,
            )

    def decoder(self) -> DecoderConfig:
        """What all families are described by."""
        norm = NormConfig(eps=self.rms_norm_eps)
        layer = LayerConfig(
            attention=AttentionConfig(
                heads=self.num_attention_heads,
                kv_heads=self.num_key_value_heads,
                head_dim=self.head_dim,
                qkv_bias=self.attention_bias,
                o_bias=self.attention_bias,
                rope=0,
                rotary_dim=self.head_dim,
            ),
            mlp=MLPConfig(features=self.intermediate_size, bias=self.mlp_bias),
            norm=norm,
        )
        return DecoderConfig(
            model_type=self.model_type,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            max_position_embeddings=self.max_position_embeddings,
            layers=(layer,) * self.num_hidden_layers,
            norm=norm,
            ropes=(self.rope,),
            tie_word_embeddings=self.tie_word_embeddings,
            embedding_size=self.hidden_size,
            eos_token_id=self.eos_token_id,
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Inverse of `to_dict` (qjax's own checkpoints)."""
        rope = RopeConfig(**data["rope"])
        return cls(**data | {"rope": rope, "eos_token_id": tuple(data["eos_token_id"])})


class Llama(Decoder):
    """A Llama decoder. Activations have the (logical) dtype of the embedding table."""

    def __init__(
        self, cfg: LlamaConfig, *, param_dtype: jnp.dtype = jnp.bfloat16, rngs: nnx.Rngs
    ) -> None:
        super().__init__(cfg.decoder(), param_dtype=param_dtype, rngs=rngs)
        self.config = cfg


HF_NAMES: tuple[Rename, ...] = LLAMA_NAMES
