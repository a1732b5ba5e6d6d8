"""Train the reference model: a 10 M parameter Llama that writes Python.

    python examples/train_reference.py --state build/reference --out build/reference_hf

trains on the Python source of this installation (reference_corpus.py) and leaves a directory in
Hugging Face's format, with `training.json` and `loss.png` beside the weights. It takes two calls,
17 minutes in all, on an H200: each stops after `--minutes`, the next continues where it stopped.
The learning rate is constant until the last 40 % of the steps, so `--steps` may be changed
between calls until then.

The optimizer and the corpus stay in `--state`. From an exported directory alone, `--init` starts
a new run with its weights and tokenizer, and warms the optimizer up again.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from reference_corpus import HeldOut, prepare_corpus, tokenize, write_json
from reference_export import export, load_exported, write_report

from qjax import text
from qjax.errors import ConfigError
from qjax.models.llama import Llama, LlamaConfig
from qjax.tree import map_named

Params = Any  # an nnx.State of the model's weights, float32 while training

MODEL = LlamaConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=7,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
    eos_token_id=(0,),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Sizes and schedule of the training run.

    Attributes:
      steps: optimizer steps of the whole run, a multiple of steps_per_dispatch.
      batch: sequences a step.
      length: tokens a sequence.
      learning_rate: the constant rate, after `warmup` steps and before the last `decay` (a
        fraction of `steps`), in which it falls linearly to 0.
      steps_per_dispatch: steps in one call to the device.
      eval_every: steps between evaluations of the held-out text, each of which saves the state.
      seed: of the weights and of the choice of sequences.
    """

    steps: int
    batch: int = 256
    length: int = 512
    learning_rate: float = 3e-3
    warmup: int = 300
    decay: float = 0.4
    weight_decay: float = 0.1
    steps_per_dispatch: int = 20
    eval_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "eval_every"):
            if getattr(self, name) % self.steps_per_dispatch:
                raise ConfigError(
                    f"{name}={getattr(self, name)} is not a multiple of the "
                    f"{self.steps_per_dispatch} steps that one dispatch makes; round it"
                )

    def rate(self, step: jax.Array) -> jax.Array:
        """Learning rate of a step (counted from 0)."""
        left = (self.steps - step) / (self.decay * self.steps)
        return self.learning_rate * jnp.clip(jnp.minimum((step + 1) / self.warmup, left), 0, 1)

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW; only matrices decay, not norm scales."""
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(
                self.rate,
                b2=0.95,
                weight_decay=self.weight_decay,
                mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
            ),
        )


@dataclasses.dataclass
class Run:
    """What a call continues: weights, optimizer, and the curves so far.

    Attributes:
      step: steps made.
      params, opt_state: float32 weights and the state of TrainConfig.optimizer.
      train: [[step, mean loss of the last dispatch in nats a token]].
      held_out: [[step, nats a token, bits a byte]].
    """

    step: int
    params: Params
    opt_state: Any
    train: list[list[float]] = dataclasses.field(default_factory=list)
    held_out: list[list[float]] = dataclasses.field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write folder/run.npz; the old file stays whole until the new one is."""
        leaves = jax.tree.leaves((self.params, self.opt_state))
        arrays: dict[str, Any] = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
        arrays["curves"] = json.dumps([self.step, self.train, self.held_out])
        with open(folder / "run.npz.partial", "wb") as file:
            np.savez(file, **arrays)
        os.replace(folder / "run.npz.partial", folder / "run.npz")

    def restore(self, folder: Path) -> None:
        """Read what `save` wrote."""
        with np.load(folder / "run.npz") as data:
            self.step, self.train, self.held_out = json.loads(str(data["curves"]))
            old, tree = jax.tree.flatten((self.params, self.opt_state))
            leaves = [jnp.asarray(data[f"leaf{i}"]) for i in range(len(old))]
        self.params, self.opt_state = jax.tree.unflatten(tree, leaves)


class Trainer:
    """The jitted functions of a run. The model computes in bfloat16, its weights are float32."""

    def __init__(self, model_cfg: LlamaConfig, cfg: TrainConfig) -> None:
        self.model_cfg = model_cfg
        self.cfg = cfg
        self.optimizer = cfg.optimizer()
        self.graph = nnx.graphdef(self._model())
        self.step_many = jax.jit(self._step_many, donate_argnums=(0, 1))
        self.evaluate = jax.jit(self._evaluate)

    def _model(self) -> Llama:
        rngs = nnx.Rngs(self.cfg.seed)
        model = Llama(self.model_cfg, param_dtype=jnp.dtype(jnp.float32), rngs=rngs)
        model.embed_tokens.dtype = jnp.dtype(jnp.bfloat16)  # see _losses
        return model

    def start(self) -> Run:
        """A run at step 0."""
        params = nnx.state(self._model())
        return Run(step=0, params=params, opt_state=self.optimizer.init(params))

    def _losses(self, params: Params, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        """Nats, float32 [batch, length], of int32 targets [batch, length]."""

        def cast(name: str, leaf: jax.Array) -> jax.Array:
            # Rows of the embedding are cast after the lookup, so that the gradients of a frequent
            # token add up in float32.
            return leaf if name == "embed_tokens.embedding" else leaf.astype(jnp.bfloat16)

        logits = nnx.merge(self.graph, map_named(cast, params))(inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    def _step_many(
        self, params: Params, opt_state: Any, tokens: jax.Array, first: jax.Array
    ) -> tuple[Params, Any, jax.Array]:
        """cfg.steps_per_dispatch steps, from step `first`; tokens: uint16 [corpus tokens].

        Each step sees random crops of the corpus, chosen by its number alone.
        """
        batch, length = self.cfg.batch, self.cfg.length

        def body(carry: tuple[Params, Any], step: jax.Array) -> tuple[Any, jax.Array]:
            params, opt_state = carry
            key = jax.random.fold_in(jax.random.key(self.cfg.seed), step)
            crops = jax.random.randint(key, (batch, 1), 0, tokens.size - length)
            ids = tokens[crops + jnp.arange(length + 1)].astype(jnp.int32)
            loss, grads = jax.value_and_grad(
                lambda p: self._losses(p, ids[:, :-1], ids[:, 1:]).mean()
            )(params)
            updates, opt_state = self.optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        steps = first + jnp.arange(self.cfg.steps_per_dispatch)
        (params, opt_state), losses = jax.lax.scan(body, (params, opt_state), steps)
        return params, opt_state, losses

    def _evaluate(self, params: Params, batches: jax.Array) -> jax.Array:
        """Nats of the whole held-out text; batches: HeldOut.batches."""

        def one(batch: jax.Array) -> jax.Array:
            inputs, targets, real = batch.swapaxes(0, 1)
            return jnp.sum(self._losses(params, inputs, targets), where=real == 1)

        return jnp.sum(jax.lax.map(one, batches))


def train(
    trainer: Trainer, run: Run, tokens: np.ndarray, held_out: HeldOut, folder: Path, until: float
) -> None:
    """Continue `run` to cfg.steps, or until time.monotonic() passes `until`; saves it in `folder`.

    Args:
      tokens: uint16 [corpus tokens], the documents one after the other.
    """
    cfg = trainer.cfg
    on_device = jnp.asarray(tokens)
    late = False
    while run.step < cfg.steps and not late:
        run.params, run.opt_state, losses = trainer.step_many(
            run.params, run.opt_state, on_device, jnp.int32(run.step)
        )
        run.step += cfg.steps_per_dispatch
        loss = float(losses.mean())
        run.train.append([run.step, round(loss, 4)])
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {run.step}; the state of the last evaluation is kept: "
                "lower TrainConfig.learning_rate and call again"
            )
        late = time.monotonic() > until
        if late or run.step == cfg.steps or run.step % cfg.eval_every == 0:
            nats, bits = held_out.scores(float(trainer.evaluate(run.params, held_out.batches)))
            run.held_out.append([run.step, round(nats, 5), round(bits, 5)])
            run.save(folder)
            print(
                f"step {run.step}/{cfg.steps}  train {loss:.3f}  held-out {nats:.4f} nats/token"
                f"  {bits:.4f} bits/byte  {max(0.0, until - time.monotonic()):.0f} s left"
            )


def make_report(
    model_cfg: LlamaConfig,
    cfg: TrainConfig,
    run: Run,
    held_out: HeldOut,
    calls: list[dict[str, Any]],
) -> dict[str, Any]:
    """What training.json says of the run; `calls` has one entry a call of this program."""
    _, nats, bits = run.held_out[-1]
    tokens = run.step * cfg.batch * cfg.length
    return {
        "result": {
            "perplexity": round(math.exp(nats), 4),
            "bits_per_byte": bits,
            "nats_per_token": nats,
            "steps": run.step,
            "tokens": tokens,
            "tokens_per_second": round(tokens / sum(call["training_seconds"] for call in calls)),
            "device_seconds": round(sum(call["seconds"] for call in calls), 1),
        },
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(run.params)),
        "model": model_cfg.to_dict(),
        "training": dataclasses.asdict(cfg),
        "calls": calls,
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "held_out": held_out.provenance | {"tokens": held_out.tokens},
        "curves": {"train": run.train, "held_out": run.held_out},
    }


def main(argv: Sequence[str] | None = None) -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--state", type=Path, required=True, help="folder that a run continues in")
    parser.add_argument("--out", type=Path, required=True, help="folder to export to")
    parser.add_argument("--minutes", type=float, default=9, help="stop after; call again to go on")
    parser.add_argument("--steps", type=int, default=8500, help="of the whole run")
    parser.add_argument("--batch", type=int, default=TrainConfig.batch, help="sequences a step")
    parser.add_argument("--init", type=Path, help="exported folder to start from")
    args = parser.parse_args(argv)
    cfg = TrainConfig(steps=args.steps, batch=args.batch)
    args.state.mkdir(parents=True, exist_ok=True)

    unseen = text.held_out()
    tokenizer, tokens, corpus = prepare_corpus(args.state, unseen, MODEL.vocab_size, args.init)
    held_out = HeldOut(unseen, tokenize(tokenizer, unseen.documents), cfg.length)
    trainer = Trainer(MODEL, cfg)
    run = trainer.start()
    if (args.state / "run.npz").exists():
        run.restore(args.state)
    elif args.init:
        run.params = load_exported(args.init, run.params)
    first, training_began = run.step, time.monotonic()
    print(
        f"{tokens.size / 1e6:.1f} M tokens of corpus, {held_out.tokens} held out; "
        f"at step {first} after {training_began - began:.0f} s"
    )
    train(trainer, run, tokens, held_out, args.state, began + 60 * args.minutes)
    export(args.out, MODEL, run.params, tokenizer)

    now = time.monotonic()
    calls_file = args.state / "calls.json"
    calls = json.loads(calls_file.read_text()) if calls_file.exists() else []
    calls.append(
        {
            "command": " ".join(["python", *sys.argv]),
            "steps": [first, run.step],
            "seconds": round(now - began, 1),
            "training_seconds": round(now - training_began, 1),
        }
    )
    write_json(calls_file, calls)
    report = make_report(MODEL, cfg, run, held_out, calls) | {"corpus": corpus}
    write_report(args.out, report)
    print(json.dumps(report["result"]))


if __name__ == "__main__":
    main()
