"""What the parts of the recipe of size=mini do: dense and 16 experts with one part changed.

    switch-jax sweep --config configs/sweeps/recipe_mini.py --workdir runs/recipe_mini

One seed, and half the steps of the other sweeps. The recipe is that of `configs/switch_tiny.py`.
"""

from switch_jax.config import parse_arg
from switch_jax.sweeps import Sweep, Table

from _sizes import find_size

# Parts of the recipe that only experts have: the dense model stays the same.
OF_EXPERTS = {
    "router_init_0.02": ("initial router weights of 0.02", {"moe.router_init_std": 0.02}),
    "groups_of_256": (
        "balance in groups of 256 tokens",
        {"moe.group_size": 256, "moe.balance_scope": "group"},
    ),
    "loss_0.001": ("balance loss × 0.001", {"moe.aux_loss_weight": 0.001}),
    "bias": ("balance by a bias", {"moe.aux_loss_weight": 0.0, "moe.balance_bias_rate": 0.001}),
    "no_z_loss": ("no z-loss", {"moe.z_loss_weight": 0.0}),
    "capacity_1.25": ("capacity factor 1.25", {"moe.capacity_factor": 1.25}),
    "dropless": ("no capacity", {"moe.capacity_factor": None, "moe.eval_capacity_factor": None}),
}
# Parts that both have.
OF_BOTH = {
    "two_spans": (
        "rows of two spans, 32 and 9 tokens",
        {"data.inputs_length": 32, "data.targets_length": 9, "data.batch_size": 128},
    ),
    "two_layers": (
        "two layers in each stack, experts in every second",
        {"model.num_encoder_layers": 2, "model.num_decoder_layers": 2, "moe.every": 2},
    ),
    "code": ("source code of the standard library", {"data.mixture": "python_docs"}),
    "vocabulary": ("vocabulary of 4096", {"model.vocab_size": 4096}),
    "small_batch": ("batch of 64 rows", {"data.batch_size": 64}),
    "rate_0.5": ("learning rate 0.5", {"optimizer.learning_rate": 0.5}),
    "rate_2": ("learning rate 2.0", {"optimizer.learning_rate": 2.0}),
    "cooldown": ("cool-down of 1,000 steps", {"optimizer.cooldown_steps": 1000}),
    "adamw": (
        "AdamW, 0.003, cosine",
        {
            "optimizer.name": "adamw",
            "optimizer.learning_rate": 3e-3,
            "optimizer.schedule": "cosine",
        },
    ),
}
CLAIM = "Adafactor, 1 / sqrt(step), balance loss × 0.01 in each group, capacity factor 1.25."


def get_sweep(arg: str = "") -> Sweep:
    """Returns the sweep; takes no arguments."""
    parse_arg(arg)
    size = find_size("mini")
    runs = {"dense": size.dense, "experts": size.switch()}
    rows = {"dense": "dense", "16 experts": "experts"}
    for name, (label, overrides) in OF_EXPERTS.items():
        runs[name] = size.switch().but(overrides)
        rows[label] = name
    tables = {"experts": Table("Parts of the recipe that experts have", CLAIM, rows)}
    for name, (label, overrides) in OF_BOTH.items():
        runs[f"{name}_dense"] = size.dense.but(overrides)
        runs[f"{name}_experts"] = size.switch().but(overrides)
        pair = {"dense": f"{name}_dense", "16 experts": f"{name}_experts"}
        tables[name] = Table(label[0].upper() + label[1:], CLAIM, pair)
    sweep = Sweep("Parts of the recipe of size=mini", runs, size.seeds[:1], tables)
    return sweep.but({"train.steps": 2000})
