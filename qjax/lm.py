"""LanguageModel: a model, its config and its tokenizer; and `load`."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import checkpoint
from qjax.arriving import Arriving
from qjax.blockwise.report import QuantReport
from qjax.checkpoint import huggingface
from qjax.checkpoint.format import FILE, Manifest
from qjax.checkpoint.orbax import OrbaxReader, fill
from qjax.config import QuantConfig
from qjax.data import check_ids
from qjax.errors import CheckpointError, DataError
from qjax.generate import generate, stream
from qjax.models.registry import abstract_model, get_family
from qjax.presets import preset
from qjax.quantize import Stats
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
      quantization_report: what `quantize_model` did to each weight; None for models that it did
        not make.
    """

    canonical = True
    quantization_report: QuantReport | None = None

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
        return jnp.asarray(check_ids(input_ids, self.config))

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
        min_tokens: int | Sequence[int] = 0,
        seed: int | Sequence[int] = 0,
        logprobs: int | None = None,
        stop: str | int | Iterable[str | int] = (),
        ignore_eos: bool = False,
        speculate: PromptLookup | None = None,
    ) -> Generation:
        """Continue prompts. One jitted prefill, then one jitted `lax.while_loop`.

        Args:
          prompts: a string, a list of strings, or token ids [batch, seq] (rows may differ in
            length). Strings need the tokenizer.
          max_new_tokens: at most this many new tokens for each prompt.
          temperature: 0 is greedy. This and the next six are one number for all prompts, or a
            list with one for each.
          top_k, top_p, min_p, repetition_penalty: see `qjax.sampling.Sampling`.
          min_tokens: no sequence ends before it has so many new tokens: what would end it is not
            chosen.
          seed: of the random draws. One number: prompt i is drawn with seed + i. The tokens of a
            prompt depend on its own seed, whatever else is in the batch.
          logprobs: 0 reports the log-probability of each new token, n > 0 also the n most likely
            tokens at each place; None neither.
          stop: what ends a sequence besides the model's own end token: token ids, or strings
            (the text is cut before the string).
          ignore_eos: the model's own end token ends nothing.
          speculate: a `PromptLookup`: tokens are guessed from the text so far and verified several
            at a time. The tokens are those of greedy decoding without it, wherever a pass over
            several tokens computes the logits of single steps: to the bit on CPUs, within the
            rounding of its kernels on GPUs. Needs temperature 0.

        Other numbers compile nothing again; turning a feature on does (draws, min_p, penalty,
        min_tokens, logprobs, speculation).

        Returns:
          a `Generation`: token_ids [batch, new], text, stats, and logprobs if asked for.

        Raises:
          DataError: an empty prompt, one that does not fit the context, a bad setting; or the
            model's logits are not finite, after the prompt or at a new token, which is named.
        """
        request = Request.make(
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            min_tokens=min_tokens,
            seed=seed,
            logprobs=logprobs,
            stop=stop,
            ignore_eos=ignore_eos,
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
        min_tokens: int = 0,
        seed: int = 0,
        stop: str | int | Iterable[str | int] = (),
        ignore_eos: bool = False,
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
            min_tokens=min_tokens,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
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
    quantization: QuantConfig | str | None = None,
    stats: Stats | None = None,
    device: jax.Device | None = None,
    hf_overrides: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LanguageModel:
    """Load a checkpoint: qjax's own (Orbax + qjax.json) or a Hugging Face directory.

    Args:
      path: the directory.
      dtype: 'float32', 'bfloat16', ...: of the plain weights and of the activations; None: as
        stored. Quantized values are never changed by it.
      quantization: a recipe or the name of a preset: each weight is quantized as it arrives, so
        that of the originals one at a time is on the device.
      stats: what `qjax.calibrate` returned for this model, if the recipe has static scales.
      device: where the weights go; None: JAX's default.
      hf_overrides: entries that replace those of a Hugging Face config.json.
      progress: called as progress(done, total) after each file of weights.

    Raises:
      CheckpointError: missing, truncated, foreign, newer, or of an unknown architecture.
      ConfigError, DataError: as `quantize`; a checkpoint that is quantized already.
    """
    path = Path(path)
    dtype = None if dtype is None else as_dtype(dtype)
    recipe = as_recipe(quantization)
    arriving = Arriving(device=device, dtype=dtype)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint directory {path}; check the path")
    if (path / "config.json").is_file() and not (path / FILE).is_file():
        return _load_huggingface(path, arriving, recipe, stats, hf_overrides or {}, progress)
    if hf_overrides:
        raise CheckpointError(f"hf_overrides need a Hugging Face directory; {path} is qjax's own")
    return _load_own(path, arriving, recipe, stats)


def as_recipe(cfg: QuantConfig | str | None) -> QuantConfig | None:
    """A recipe, or that of the preset with this name."""
    cfg = preset(cfg) if isinstance(cfg, str) else cfg
    if cfg is not None and not isinstance(cfg, QuantConfig):
        raise DataError(f"cfg is {cfg!r}; give a qjax.QuantConfig or the name of a preset")
    return cfg


def _load_huggingface(
    path: Path,
    arriving: Arriving,
    recipe: QuantConfig | None,
    stats: Stats | None,
    overrides: dict[str, Any],
    progress: Callable[[int, int], None] | None,
) -> LanguageModel:
    raw = huggingface.read_config(path) | overrides
    model_type = raw["model_type"]
    family = get_family(model_type)
    config = family.from_hf(raw)
    dtype = arriving.dtype or jnp.dtype(jnp.bfloat16)
    graphdef, abstract = abstract_model(model_type, config, dtype)
    if recipe is not None:
        arriving = arriving.quantizing(abstract, recipe, stats)
    state = huggingface.load_state(path, family, config, abstract, arriving.leaf, progress)
    return LanguageModel(
        nnx.merge(graphdef, state),
        config,
        model_type=model_type,
        tokenizer=load_tokenizer(path),
        quantization=recipe,
    )


def _load_own(
    path: Path, arriving: Arriving, recipe: QuantConfig | None, stats: Stats | None
) -> LanguageModel:
    manifest = Manifest.read(path)
    if manifest.model is None:
        raise CheckpointError(
            f"{path} is a bare tree of arrays, not a language model; read it with qjax.restore"
        )
    try:
        model_type = manifest.model["model_type"]
        config = get_family(model_type).from_dict(manifest.model["config"])
        stored = manifest.quantization
        quantization = None if stored is None else QuantConfig.from_dict(stored)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / FILE} is damaged: {error!r}") from error
    if recipe is not None and quantization is not None:
        raise DataError(f"{path} is quantized already, by {quantization.name!r}; load the original")
    dtype = arriving.dtype or jnp.dtype(jnp.bfloat16)
    graphdef, abstract = abstract_model(model_type, config, dtype, quantization)
    if recipe is not None:
        arriving = arriving.quantizing(abstract, recipe, stats)
    state = fill(abstract, _arrived(OrbaxReader(path), arriving), str(path))
    return LanguageModel(
        nnx.merge(graphdef, state),
        config,
        model_type=model_type,
        tokenizer=load_tokenizer(path),
        quantization=quantization or recipe,
    )


def _arrived(reader: OrbaxReader, arriving: Arriving) -> dict[str, Any]:
    """All leaves: one after the other if they are quantized on the way, else at once."""
    sharding = jax.sharding.SingleDeviceSharding(arriving.on)
    names = list(reader.manifest.leaves)
    groups = [[name] for name in names] if arriving.assigned else [names]
    leaves: dict[str, Any] = {}
    for group in groups:
        for name, leaf in reader.leaves(group, lambda name, spec: sharding).items():
            leaves[name] = arriving.leaf(name, leaf)
    return leaves


def as_dtype(dtype: Any) -> jnp.dtype:
    """A dtype of activations, or DataError."""
    try:
        result = jnp.dtype(dtype)
    except TypeError as error:
        raise DataError(f"dtype {dtype!r} is no dtype; choose 'float32' or 'bfloat16'") from error
    if result not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise DataError(f"dtype {result} is not for activations; choose 'float32' or 'bfloat16'")
    return result


def load_tokenizer(path: Path) -> Any:
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
