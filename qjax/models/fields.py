"""Reading a config.json field by field: each one is read, ignored by name, or refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qjax.errors import CheckpointError
from qjax.models.rope import RopeConfig, rotary_dim
from qjax.nn.mlp import HF_ACTIVATIONS

_REQUIRED = object()

# Of any model: what does not change the logits of a forward pass.
_COMMON = {
    *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "auto_map"),
    *("use_cache", "initializer_range", "init_std", "attention_dropout", "gradient_checkpointing"),
    *("bos_token_id", "pad_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id"),
    "rope_dtype",  # ours, of models without a rotation
    *("tokenizer_class", "prefix", "task_specific_params", "problem_type", "finetuning_task"),
    *("id2label", "label2id", "num_labels", "return_dict", "output_attentions", "torchscript"),
    *("output_hidden_states", "use_bfloat16", "use_return_dict", "is_encoder_decoder"),
    *("chunk_size_feed_forward", "pruned_heads", "unsloth_version", "unsloth_fixed"),
    *("is_decoder", "add_cross_attention", "tie_encoder_decoder", "cross_attention_hidden_size"),
    # Defaults of generation, which older versions of transformers wrote here as well.
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
    *("diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty"),
    *("length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
    *("num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id"),
    *("forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty"),
    *("suppress_tokens", "begin_suppress_tokens", "tf_legacy_loss"),
}
# Those of them that do, if they are true.
_MUST_BE_FALSE = ("is_encoder_decoder", "add_cross_attention", "pruned_heads")


class Fields:
    """The fields of a config.json, and which have been read.

    Args:
      data: the contents of config.json.
      family: its model_type, for messages.
    """

    def __init__(self, data: dict[str, Any], family: str) -> None:
        self.data = data
        self.family = family
        self._read = set(_COMMON)

    def raw(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value as it is, null too; the default only where there is no such field."""
        self._read.add(name)
        if name in self.data:
            return self.data[name]
        if default is _REQUIRED:
            raise CheckpointError(f"config.json of a {self.family} model lacks the key {name!r}")
        return default

    def value(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value; the default where there is none, or null."""
        value = self.raw(name, default)
        return default if value is None and default is not _REQUIRED else value

    def size(self, name: str, default: Any = _REQUIRED) -> int:
        """A positive integer."""
        value = self.value(name, default)
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{name} is {value!r}; it must be a positive integer")
        return value

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        """True or false."""
        value = self.value(name, default)
        if type(value) is not bool:
            raise CheckpointError(f"{name} is {value!r}; it must be true or false")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """A positive, finite number."""
        value = self.value(name, default)
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        if not plain or not 0 < value < float("inf"):
            raise CheckpointError(f"{name} is {value!r}; it must be a positive number")
        return float(value)

    def maybe_number(self, name: str, default: float | None = None) -> float | None:
        """A positive number, or None for null."""
        return None if self.raw(name, default) is None else self.number(name, default)

    def epsilon(self, name: str, default: float) -> float:
        """A number in (0, 1)."""
        value = float(self.value(name, default))
        if not 0 < value < 1:
            raise CheckpointError(f"{name} is {value!r}; it must be in (0, 1)")
        return value

    def window(self, name: str, default: int | None = None) -> int | None:
        """A size in tokens, or None for null, which is no limit."""
        return None if self.raw(name, default) is None else self.size(name, default)

    def activation(self, name: str, default: str) -> str:
        """A name of nn.mlp.ACTIVATIONS, from Hugging Face's."""
        value = self.value(name, default)
        if value not in HF_ACTIVATIONS:
            raise CheckpointError(
                f"{name} is {value!r}; {self.family} models here use one of: "
                f"{', '.join(HF_ACTIVATIONS)}"
            )
        return HF_ACTIVATIONS[value]

    def only(self, name: str, *allowed: Any) -> None:
        """A field that must have one of these values, or be absent or null."""
        value = self.value(name, allowed[0])
        # 1 == True in Python, and not here.
        if not any(value == one and type(value) is type(one) for one in allowed):
            raise CheckpointError(
                f"{name} is {value!r}; {self.family} models here have "
                f"{' or '.join(map(repr, allowed))}"
            )

    def ignore(self, *names: str) -> None:
        """Fields that do not change the logits of a forward pass."""
        self._read.update(names)

    def rope(
        self,
        head_dim: int,
        *,
        theta: float = 10000.0,
        partial: bool = False,
        parameters: dict[str, Any] | None = None,
    ) -> tuple[RopeConfig, int]:
        """The rotary embedding, and how many dims of a head it rotates.

        Args:
          theta: where the config has none.
          partial: whether models of the family may rotate some of the dims.
          parameters: in the place of the config's rope_parameters; None: those.
        """
        self.ignore("rope_parameters", "rope_scaling", "rope_theta", "rope_dtype")
        self.ignore("partial_rotary_factor", "original_max_position_embeddings")
        dims = rotary_dim(self.data, head_dim)
        if dims != head_dim and not partial:
            raise CheckpointError(
                f"partial_rotary_factor rotates {dims} of {head_dim} dims; {self.family} models "
                "here rotate all"
            )
        return RopeConfig.from_hf(self.data, parameters=parameters, theta=theta), dims

    def sizes(self) -> dict[str, Any]:
        """What a DecoderConfig says of the whole model, as most families name it."""
        return {
            "vocab_size": self.size("vocab_size"),
            "hidden_size": self.size("hidden_size"),
            "embedding_size": self.size("hidden_size"),
            "max_position_embeddings": self.size("max_position_embeddings"),
            "eos_token_id": self.end_tokens(),
        }

    def heads(self, default_head_dim: int | None = None, *, same: bool = False) -> dict[str, Any]:
        """heads, kv_heads and head_dim, as most families name them.

        Args:
          default_head_dim: None: hidden_size / heads.
          same: whether there are as many key-value heads as heads where the config has no such
            field (as where it is null).
        """
        heads = self.size("num_attention_heads")
        if not same:
            self.raw("num_key_value_heads")
        own = self.size("hidden_size") // heads if default_head_dim is None else default_head_dim
        return {
            "heads": heads,
            "kv_heads": self.size("num_key_value_heads", heads),
            "head_dim": self.size("head_dim", own),
        }

    def layer_windows(self, layers: int, default: list[str] | None = None) -> list[bool]:
        """Which layers see a sliding window only, from layer_types."""
        types = self.value("layer_types", default or ["full_attention"] * layers)
        if len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
            raise CheckpointError(
                f"layer_types is {types!r}; it must say 'full_attention' or 'sliding_attention' "
                f"for each of {layers} layers"
            )
        return [kind == "sliding_attention" for kind in types]

    def end_tokens(self) -> tuple[int, ...]:
        """eos_token_id, a number, a list or null, as a tuple."""
        ids = self.data.get("eos_token_id")
        if ids is None:
            return ()
        return (ids,) if isinstance(ids, int) else tuple(ids)

    def finish(self) -> None:
        """Refuse what was not read, unless it says nothing: null, false or an empty list."""
        for name in _MUST_BE_FALSE:
            if self.data.get(name):
                raise CheckpointError(f"{name} is {self.data[name]!r}, which qjax does not compute")
        left = {
            name: value
            for name, value in self.data.items()
            if name not in self._read and value is not None and value is not False and value != []
        }
        # Private fields are notes that transformers makes for itself.
        unknown = [name for name in left if not name.startswith("_")]
        if unknown:
            raise CheckpointError(
                f"config.json of a {self.family} model has {', '.join(sorted(unknown))}, which "
                "qjax does not know. If the logits do not depend on it, load with hf_overrides="
                f"{{{', '.join(f'{name!r}: None' for name in sorted(unknown))}}}"
            )


@contextmanager
def reading(data: dict[str, Any], family: str) -> Iterator[Fields]:
    """Fields of a config.json; at the end, those that were not read are refused.

    Raises:
      CheckpointError: a field is missing, unknown, or has a value that this family cannot have.
    """
    fields = Fields(data, family)
    try:
        yield fields
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"config.json of a {family} model is malformed: {error}") from error
    fields.finish()
