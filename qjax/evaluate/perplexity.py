"""Perplexity of a language model on windows of tokens."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qjax.errors import DataError
from qjax.evaluate.bootstrap import mean_interval
from qjax.lm import LanguageModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Losses of each window, and the figures that follow from them.

    Attributes:
      nll: float64 [windows], mean negative log-likelihood of a window's tokens, nats a token. The
        first token of a window is context only.
      tokens: predicted tokens, over all windows.
      bytes: of UTF-8 text that these tokens stand for; 0 if there is no tokenizer.
    """

    nll: np.ndarray
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp of the mean loss a token."""
        return float(np.exp(self.nll.mean()))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of the perplexity, over sequences."""
        low, high = mean_interval(self.nll)
        return float(np.exp(low)), float(np.exp(high))

    @property
    def bits_per_byte(self) -> float | None:
        """Loss in bits for each byte of text; comparable between tokenizers."""
        if not self.bytes:
            return None
        return float(self.nll.mean() * self.tokens / np.log(2) / self.bytes)

    def change_from(self, base: "Perplexity") -> tuple[float, tuple[float, float]]:
        """Relative change of perplexity against `base` on the same windows, and its 95 % paired
        bootstrap interval: exp(mean of per-sequence differences) - 1."""
        if len(self.nll) != len(base.nll) or self.tokens != base.tokens:
            raise DataError("a paired comparison needs both models on the same windows")
        difference = self.nll - base.nll
        low, high = mean_interval(difference)
        change = float(np.expm1(difference.mean()))
        return change, (float(np.expm1(low)), float(np.expm1(high)))


def evaluate_perplexity(
    lm: LanguageModel,
    windows: np.ndarray,
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of `lm` on windows of tokens.

    Args:
      windows: int [windows, seq_len], seq_len 2 or more, see `qjax.text.token_windows`.
      batch_size: windows in one forward pass.
      progress: called as progress(done, total) in windows.

    Raises:
      DataError: windows that do not fit the model; losses that are not finite.
    """
    ids = lm.check_ids(windows)
    if ids.shape[1] < 2:
        raise DataError("a window needs two tokens: one of context, one to predict")
    graphdef, state = lm.split()
    count = len(ids)
    losses = []
    for start in range(0, count, batch_size):
        # The last batch is filled up with its first row, so that one shape is compiled.
        at = np.arange(start, start + batch_size)
        batch = ids[np.where(at < count, at, start)]
        losses.append(np.asarray(_window_nll(graphdef, state, batch)))
        if progress is not None:
            progress(min(start + batch_size, count), count)
    nll = np.concatenate(losses)[:count].astype(np.float64)
    if not np.isfinite(nll).all():
        bad = int(np.flatnonzero(~np.isfinite(nll))[0])
        raise DataError(f"the loss of window {bad} is {nll[bad]}: the model's weights are broken")
    return Perplexity(
        nll=nll, tokens=count * (ids.shape[1] - 1), bytes=_text_bytes(lm.tokenizer, windows)
    )


@jax.jit(static_argnums=0)
def _window_nll(graphdef: nnx.GraphDef, state: Any, ids: jax.Array) -> jax.Array:
    """int32 [batch, seq] -> float32 [batch], mean loss of tokens 1..seq-1."""
    logits = nnx.merge(graphdef, state)(ids)[:, :-1]
    chosen = jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen, axis=-1)


def _text_bytes(tokenizer: Any, windows: np.ndarray) -> int:
    if tokenizer is None:
        return 0
    return sum(len(tokenizer.decode(row[1:]).encode()) for row in np.asarray(windows))
