"""Fine-tuning by tunix's `PeftTrainer`: over 8 devices, two batches a step."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput


def named(*axes):
    return nnx.with_partitioning(nnx.initializers.normal(0.1), axes)


class Model(nnx.Module):
    def __init__(self, rngs):
        kind = {"rngs": rngs, "use_bias": False}
        table = nnx.with_partitioning(nnx.initializers.normal(0.1), ("tp", None))
        self.words = nnx.Embed(64, 128, embedding_init=table, rngs=rngs)
        self.up = nnx.Linear(128, 1024, kernel_init=named("fsdp", "tp"), **kind)
        self.down = nnx.Linear(1024, 128, kernel_init=named("tp", "fsdp"), **kind)

    def __call__(self, tokens, positions, cache, attention_mask):
        x = self.words(tokens)
        x += self.down(nnx.gelu(self.up(x)))
        return self.words.attend(x), cache


def with_positions(batch):
    tokens, mask = batch.input_tokens, batch.input_mask
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
    return {
        "input_tokens": tokens,
        "input_mask": mask,
        "positions": positions,
        "attention_mask": jnp.broadcast_to(causal, (tokens.shape[0], *causal.shape)),
    }


starts = np.random.default_rng(0).integers(0, 64, (40, 8, 1))
texts = (starts + 3 * np.arange(16)) % 64
batches = [TrainingInput(input_tokens=x, input_mask=np.ones_like(x)) for x in texts]
auto = (jax.sharding.AxisType.Auto,) * 2
with jax.set_mesh(jax.make_mesh((2, 4), ("fsdp", "tp"), axis_types=auto)):
    model = Model(nnx.Rngs(0))
    config = TrainingConfig(eval_every_n_steps=1000, max_steps=20, gradient_accumulation_steps=2)
    trainer = PeftTrainer(model, optax.adamw(5e-3), config).with_gen_model_input_fn(with_positions)
    trainer.train(batches)
losses = trainer.metrics_logger.get_metric_history("", "loss", "train")
print(json.dumps({"losses": [float(loss) for loss in losses]}))
