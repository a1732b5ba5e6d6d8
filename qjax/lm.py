"""LanguageModel: a model, its config and its tokenizer; and `load`."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qjax import checkpoint
from qjax.calibrate import calibrate
from qjax.checkpoint import huggingface
from qjax.checkpoint.format import FILE, Manifest
from qjax.config import QuantConfig
from qjax.errors import CheckpointError, DataError
from qjax.generate import generate, stream
from qjax.models.registry import abstract_model, get_family
from qjax.presets import preset
from qjax.qarray import is_qarray
from qjax.quantize import check_finite, quantize
from qjax.request import Prompts, Request
from qjax.result import Generation
from qjax.speculate import PromptLookup

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


class LanguageModel:
    """A model ready to run.

    Attributes:
      model: the Flax NNX module; its weights are arrays or QArrays.
      config: sizes of the model.
      tokenizer: a transformers tokenizer, or None if the checkpoint has none.
      model_type: Hugging Face's name of the architecture.
      quantization: the recipe the weights were quantized by, or None.
      canonical: False where the weights lie as kernels want them; see `qjax.prepare`.
    """

    canonical = True

    def __init__(
        self,
        model: nnx.Module,
        config: Any,
        *,
        model_type: str,
        tokenizer: Any = None,
        quantization: QuantConfig | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.tokenizer = tokenizer
        self.model_type = model_type
        self.quantization = quantization

    def split(self) -> tuple[nnx.GraphDef, Any]:
        """(graph definition, state): what jitted functions take."""
        return nnx.split(self.model)

    def with_state(self, state: Any, quantization: QuantConfig | None) -> "LanguageModel":
        """A copy with other weights: `state` as `quantize` returns it for `split()[1]`."""
        graphdef, _ = self.split()
        return LanguageModel(
            nnx.merge(graphdef, state),
            self.config,
            model_type=self.model_type,
            tokenizer=self.tokenizer,
            quantization=quantization,
        )

    def __call__(self, input_ids: Any) -> jax.Array:
        """Token ids [batch, seq] -> float32 logits [batch, seq, vocab].

        Raises:
          DataError: empty, not 2-D, out of the vocabulary, or longer than the context.
        """
        ids = self.check_ids(input_ids)
        return _forward(*self.split(), ids)

    def require_tokenizer(self, purpose: str) -> Any:
        """The tokenizer, or DataError saying what needs it."""
        if self.tokenizer is None:
            raise DataError(f"this checkpoint has no tokenizer, needed for {purpose}")
        return self.tokenizer

    def check_ids(self, input_ids: Any) -> jax.Array:
        """input_ids as int32 [batch, seq], or DataError saying what is wrong with them."""
        try:
            ids = np.asarray(input_ids)
        except ValueError as error:
            raise DataError(f"input_ids must be [batch, seq]: {error}") from error
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or ids.size == 0:
            raise DataError(
                f"input_ids must be non-empty integers [batch, seq], not {ids.dtype} {ids.shape}"
            )
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise DataError(
                f"token ids {ids.min()}..{ids.max()} are outside the vocabulary, "
                f"0..{self.config.vocab_size - 1}"
            )
        context = self.config.max_position_embeddings
        if ids.shape[1] > context:
            raise DataError(f"{ids.shape[1]} tokens do not fit the model's context of {context}")
        return jnp.asarray(ids, jnp.int32)

    def generate(
        self,
        prompts: Prompts,
        max_new_tokens: int = 64,
        *,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int | None] | None = None,
        top_p: float | Sequence[float | None] | None = None,
        min_p: float | Sequence[float | None] | None = None,
        repetition_penalty: float | Sequence[float] = 1.0,
        seed: int | Sequence[int] = 0,
        logprobs: int | None = None,
        stop: str | int | Iterable[str | int] = (),
        speculate: PromptLookup | None = None,
    ) -> Generation:
        """Continue prompts. One jitted prefill, then one jitted `lax.while_loop`.

        Args:
          prompts: a string, a list of strings, or token ids [batch, seq] (rows may differ in
            length). Strings need the tokenizer.
          max_new_tokens: at most this many new tokens for each prompt.
          temperature: 0 is greedy. This and the next five are one number for all prompts, or a
            list with one for each.
          top_k, top_p, min_p, repetition_penalty: see `qjax.sampling.Sampling`.
          seed: of the random draws. One number: prompt i is drawn with seed + i. The tokens of a
            prompt depend on its own seed, whatever else is in the batch.
          logprobs: 0 reports the log-probability of each new token, n > 0 also the n most likely
            tokens at each place; None neither.
          stop: what ends a sequence besides the model's own end token: token ids, or strings
            (the text is cut before the string).
          speculate: a `PromptLookup`: tokens are guessed from the text so far and verified several
            at a time. The tokens are those of greedy decoding without it, wherever a pass over
            several tokens computes the logits of single steps: to the bit on CPUs, within the
            rounding of its kernels on GPUs. Needs temperature 0.

        Other numbers compile nothing again; turning a feature on does (draws, min_p, penalty,
        logprobs, speculation).

        Returns:
          a `Generation`: token_ids [batch, new], text, stats, and logprobs if asked for.

        Raises:
          DataError: an empty prompt, one that does not fit the context, a bad setting; or the
            model's logits are not finite.
        """
        request = Request.make(
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            logprobs=logprobs,
            stop=stop,
            speculate=speculate,
        )
        return generate(self, request)

    def stream(
        self,
        prompt: str | list[int],
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: str | int | Iterable[str | int] = (),
        speculate: PromptLookup | None = None,
    ) -> Iterator[str]:
        """Continue one prompt, yielding text as it comes, after each jitted decode step.

        Arguments and errors are those of `generate`; the pieces join to the same text.
        """
        request = Request.make(
            prompt if isinstance(prompt, str) else [prompt],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            speculate=speculate,
        )
        return stream(self, request)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write an Orbax checkpoint that `load` reads; see `qjax.save`."""
        _, state = self.split()

        def add_tokenizer(directory: Path) -> None:
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(directory)

        checkpoint.save(
            path,
            state,
            config=self.quantization,
            model={"model_type": self.model_type, "config": self.config.to_dict()},
            overwrite=overwrite,
            extra=add_tokenizer,
        )


@jax.jit(static_argnums=0)
def _forward(graphdef: nnx.GraphDef, state: Any, input_ids: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state)(input_ids)


def load(
    path: str | os.PathLike[str],
    dtype: Any = None,
    *,
    hf_overrides: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LanguageModel:
    """Load a checkpoint: qjax's own (Orbax + qjax.json) or a Hugging Face directory.

    Args:
      path: the directory.
      dtype: 'float32', 'bfloat16', ...: of the plain weights and of the activations; None: as
        stored. Quantized values are never changed by it.
      hf_overrides: entries that replace those of a Hugging Face config.json.
      progress: called as progress(done, total) after each file of weights.

    Raises:
      CheckpointError: missing, truncated, foreign, newer, or of an unknown architecture.
    """
    path = Path(path)
    dtype = None if dtype is None else _floating(dtype)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint directory {path}; check the path")
    if (path / "config.json").is_file() and not (path / FILE).is_file():
        return _load_huggingface(path, dtype, hf_overrides or {}, progress)
    if hf_overrides:
        raise CheckpointError(f"hf_overrides need a Hugging Face directory; {path} is qjax's own")
    return _load_own(path, dtype)


def _load_huggingface(
    path: Path,
    dtype: jnp.dtype | None,
    overrides: dict[str, Any],
    progress: Callable[[int, int], None] | None,
) -> LanguageModel:
    raw = huggingface.read_config(path) | overrides
    model_type = raw["model_type"]
    family = get_family(model_type)
    config = family.config.from_hf(raw)
    graphdef, abstract = abstract_model(model_type, config, dtype or jnp.dtype(jnp.bfloat16))
    state = huggingface.load_state(path, family, abstract, dtype, progress)
    return LanguageModel(
        nnx.merge(graphdef, state), config, model_type=model_type, tokenizer=_tokenizer(path)
    )


def _load_own(path: Path, dtype: jnp.dtype | None) -> LanguageModel:
    manifest = Manifest.read(path)
    if manifest.model is None:
        raise CheckpointError(
            f"{path} is a bare tree of arrays, not a language model; read it with qjax.restore"
        )
    try:
        model_type = manifest.model["model_type"]
        config = get_family(model_type).config.from_dict(manifest.model["config"])
        recipe = manifest.quantization
        quantization = None if recipe is None else QuantConfig.from_dict(recipe)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / FILE} is damaged: {error!r}") from error
    graphdef, abstract = abstract_model(model_type, config, dtype or jnp.dtype(jnp.bfloat16))
    state = checkpoint.restore(path, abstract)
    if dtype is not None:
        state = jax.tree.map(lambda leaf: _cast(leaf, dtype), state, is_leaf=is_qarray)
    return LanguageModel(
        nnx.merge(graphdef, state),
        config,
        model_type=model_type,
        tokenizer=_tokenizer(path),
        quantization=quantization,
    )


def _floating(dtype: Any) -> jnp.dtype:
    try:
        result = jnp.dtype(dtype)
    except TypeError as error:
        raise DataError(f"dtype {dtype!r} is no dtype; choose 'float32' or 'bfloat16'") from error
    if result not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise DataError(f"dtype {result} is not for activations; choose 'float32' or 'bfloat16'")
    return result


def _cast(leaf: Any, dtype: jnp.dtype) -> Any:
    if is_qarray(leaf):
        return dataclasses.replace(leaf, dtype=dtype.name)
    return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _tokenizer(path: Path) -> Any:
    """The tokenizer stored beside the weights; None if there is none."""
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer  # a second to import, and only needed here

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many types for damaged files
        first_line = str(error).partition("\n")[0]
        raise CheckpointError(
            f"the tokenizer in {path} cannot be read ({type(error).__name__}: {first_line})"
        ) from error


def quantize_model(
    lm: LanguageModel,
    cfg: QuantConfig | str,
    batches: Iterable[Any] | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> LanguageModel:
    """A quantized copy of a language model, calibrated on the way if the recipe needs it.

    Args:
      cfg: a recipe or the name of a preset.
      batches: token ids [batch, seq], for recipes with static activation scales.
      progress: called as progress(done, total) after each weight.

    Raises:
      ConfigError, DataError: as `quantize` and `calibrate`.
    """
    cfg = preset(cfg) if isinstance(cfg, str) else cfg
    if not isinstance(cfg, QuantConfig):
        raise DataError(f"cfg is {cfg!r}; give a qjax.QuantConfig or the name of a preset")
    if not lm.canonical:
        raise DataError("the model is prepared for its kernels; quantize the one it came from")
    if lm.quantization is not None:
        raise DataError(
            f"the model is quantized already, by {lm.quantization.name!r}; start from the original"
        )
    _, state = lm.split()
    check_finite(state)
    stats = None
    if cfg.needs_stats and batches is not None:
        stats = calibrate(lm.model, [lm.check_ids(batch) for batch in batches])
    return lm.with_state(quantize(state, cfg, stats, progress=progress), cfg)
