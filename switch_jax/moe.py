"""The expert layer: route, send tokens to slots, compute the experts, bring tokens back.

Only the two permutations, `dispatch` and `combine`, are `shard_map`ped: they sort nothing and
build no one-hot tensors, but gather rows by index and exchange them with an all-to-all over
the mesh's `expert` axis, so that they cost O(S·D). What lies between them is a batched
matmul, which XLA partitions over `expert`, `data` and `model` by itself. Axis letters: see
`routing.py`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from switch_jax import routing
from switch_jax.config import Config
from switch_jax.layers import Keys, activate, fold, kernel, param, weight
from switch_jax.sharding import constrain, spec


class RouterSums(NamedTuple):
    """What one expert layer did, as float32 sums that add up over groups and microbatches."""

    load_E: jax.Array  # assignments per expert before dropping (ntlb: placements)
    dropped: jax.Array  # assignments that found no slot
    assignments: jax.Array
    tokens: jax.Array  # real ones
    entropy: jax.Array  # Σ over tokens of -Σ p log p, nats
    confidence: jax.Array  # Σ over tokens of max p
    z: jax.Array  # Σ over tokens of logsumexp(logits)²
    balance: jax.Array  # Σ over groups of the load-balancing loss, without α


class Plan(NamedTuple):
    """How a batch is routed: rows that make a group, and the capacity factor."""

    rows: int
    factor: float | None  # None: nothing is dropped


class Indices(NamedTuple):
    """The permutation between tokens and slots, both ways; all int32.

    slot_GxSxK: e·C + c, or E·C where the assignment was dropped.
    held_GxExC: the assignment t·K + k that a slot holds, or S·K for an empty slot.
    """

    slot_GxSxK: jax.Array
    held_GxExC: jax.Array


class SwitchMlp(nnx.Module):
    """A feed-forward layer of E experts; each token goes through the ones its router picks."""

    def __init__(self, config: Config, key: jax.Array):
        self.config = config
        model, E = config.model, config.moe.num_experts
        D, F, s = model.d_model, model.d_ff, model.init_scale
        r, i, g, o = jax.random.split(key, 4)
        # normal(0.02) did slightly better in flaxformer's Switch configs than σ = sqrt(0.1 / D).
        self.router = param(0.02 * jax.random.normal(r, (D, E)), "embed", "router")

        def stacked(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
            # One draw an expert, so that fan-in is the expert's own.
            return jax.vmap(lambda k: kernel(k, shape, s))(jax.random.split(key, E))

        self.wi = param(stacked(i, (D, F)), "expert", "embed", "mlp")
        self.gate = (
            param(stacked(g, (D, F)), "expert", "embed", "mlp")
            if model.activation == "geglu"
            else None
        )
        self.wo = param(stacked(o, (F, D)), "expert", "mlp", "embed")

    def __call__(
        self, x_BxLxD: jax.Array, mask_BxL: jax.Array, plan: Plan, keys: Keys
    ) -> tuple[jax.Array, RouterSums]:
        """Sends the real tokens of a batch through their experts.

        Args:
          x_BxLxD: normed activations.
          mask_BxL: bool, false for padding, which is not routed and takes no slot.
          plan: rows per group and capacity factor.
          keys: one per row, for jitter and expert dropout; None: neither.

        Returns [B, L, D], zero where a token was dropped, and the layer's sums.
        """
        moe, E, dtype = self.config.moe, self.config.moe.num_experts, x_BxLxD.dtype
        B, L, D = x_BxLxD.shape
        G, S = B // plan.rows, plan.rows * L
        C = routing.capacity(S, moe, plan.factor)
        x_GxSxD = x_BxLxD.reshape(G, S, D)
        mask_GxS = mask_BxL.reshape(G, S)

        logits_GxSxE = self._logits(x_BxLxD, fold(keys, 0)).reshape(G, S, E)
        probs_GxSxE = jax.nn.softmax(logits_GxSxE)
        router = routing.ROUTERS[moe.router]
        assignment = jax.vmap(lambda probs, mask: router(probs, mask, moe, C))(
            probs_GxSxE, mask_GxS
        )
        slot_GxSxK = jax.vmap(partial(routing.slots_of_tokens, num_experts=E, capacity=C))(
            assignment
        )
        sums = router_sums(logits_GxSxE, probs_GxSxE, mask_GxS, assignment, slot_GxSxK, C)

        if plan.factor is None and keys is None and slot_GxSxK.size <= E:
            y_GxSxKxD = self._lookup(x_GxSxD, assignment.expert_SxK)
        else:
            held_GxExC = jax.vmap(partial(routing.tokens_of_slots, num_experts=E, capacity=C))(
                assignment
            )
            indices = Indices(slot_GxSxK, held_GxExC)
            slots_ExGxCxD = dispatch(x_GxSxD, indices)
            group_keys = None if keys is None else fold(keys[:: plan.rows], 1)
            y_GxSxKxD = combine(self._experts(slots_ExGxCxD, group_keys), indices)
        # The gates are cast first: nothing of a token's size is ever float32 (paper §2.4).
        gate_GxSxK = assignment.gate_SxK.astype(dtype)
        y_GxSxD = jnp.sum(y_GxSxKxD * gate_GxSxK[..., None], axis=2)
        return constrain(y_GxSxD.reshape(B, L, D), "batch", None, "activation"), sums

    def _logits(self, x_BxLxD: jax.Array, keys: Keys) -> jax.Array:
        """[B, L, E] float32 from a float32 copy of the input (trap T5).

        Jitter multiplies that copy (trap T2), so that the experts never see the noise.
        """
        x32, eps = x_BxLxD.astype(jnp.float32), self.config.moe.jitter
        if keys is not None and eps:
            draw = partial(jax.random.uniform, shape=x32.shape[1:], minval=1 - eps, maxval=1 + eps)
            x32 *= jax.vmap(draw)(keys)
        return jnp.dot(x32, weight(self.router, jnp.float32), precision="highest")

    def _experts(self, slots_ExGxCxD: jax.Array, group_keys: Keys) -> jax.Array:
        """[E, G, C, D]: every slot through its expert; dropout on the hidden activations."""
        model, rate = self.config.model, self.config.moe.expert_dropout_rate
        dtype = slots_ExGxCxD.dtype
        along = ("expert", "expert_group", None)

        def matmul(x: jax.Array, stacked: nnx.Param, last: str) -> jax.Array:
            y = jnp.einsum("EGCX,EXY->EGCY", x, weight(stacked, dtype))
            return constrain(y, *along, last)

        x = constrain(slots_ExGxCxD, *along, "activation")
        gate = None if self.gate is None else matmul(x, self.gate, "mlp")
        h_ExGxCxF = activate(model.activation, matmul(x, self.wi, "mlp"), gate)
        if group_keys is not None and rate:
            E, _, C, F = h_ExGxCxF.shape
            draw = partial(jax.random.bernoulli, p=1 - rate, shape=(E, C, F))
            keep = constrain(jax.vmap(draw, out_axes=1)(group_keys), *along, "mlp")
            h_ExGxCxF = jnp.where(keep, h_ExGxCxF / (1 - rate), 0)
        return matmul(h_ExGxCxF, self.wo, "activation_split")

    def _lookup(self, x_GxSxD: jax.Array, expert_GxSxK: jax.Array) -> jax.Array:
        """[G, S, K, D] for fewer assignments than experts, as in decoding: fetches the weights
        of the chosen experts instead of computing slots for all of them.
        """
        dtype = x_GxSxD.dtype

        def matmul(x: jax.Array, stacked: nnx.Param) -> jax.Array:
            chosen = stacked[...].at[expert_GxSxK].get(mode="fill", fill_value=0)
            return jnp.einsum("GSKX,GSKXY->GSKY", x, chosen.astype(dtype))

        x = jnp.broadcast_to(x_GxSxD[:, :, None], (*expert_GxSxK.shape, x_GxSxD.shape[-1]))
        gate = None if self.gate is None else matmul(x, self.gate)
        return matmul(activate(self.config.model.activation, matmul(x, self.wi), gate), self.wo)


def router_sums(
    logits_GxSxE: jax.Array,
    probs_GxSxE: jax.Array,
    mask_GxS: jax.Array,
    assignment: routing.Assignment,
    slot_GxSxK: jax.Array,
    capacity: int,
) -> RouterSums:
    """The statistics of one layer over its real tokens."""
    E = probs_GxSxE.shape[-1]

    def over_tokens(value_GxS: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask_GxS, value_GxS, 0), dtype=jnp.float32)

    expert_GxSxK = assignment.expert_SxK
    dropped_GxSxK = (slot_GxSxK == E * capacity) & mask_GxS[:, :, None]
    tokens = over_tokens(jnp.ones_like(mask_GxS))
    log_probs_GxSxE = jax.nn.log_softmax(logits_GxSxE)
    return RouterSums(
        load_E=jax.vmap(partial(routing.expert_counts, num_experts=E))(expert_GxSxK)
        .sum(0)
        .astype(jnp.float32),
        dropped=jnp.sum(dropped_GxSxK, dtype=jnp.float32),
        assignments=tokens * expert_GxSxK.shape[-1],
        tokens=tokens,
        entropy=over_tokens(-jnp.sum(probs_GxSxE * log_probs_GxSxE, -1)),
        confidence=over_tokens(probs_GxSxE.max(-1)),
        z=over_tokens(jax.nn.logsumexp(logits_GxSxE, -1) ** 2),
        balance=jnp.sum(jax.vmap(routing.load_balancing_loss)(probs_GxSxE, mask_GxS)),
    )


@jax.custom_vjp
def gather_rows(x_NxD: jax.Array, index_M: jax.Array, inverse_NxJ: jax.Array) -> jax.Array:
    """[M, D]: row index_M[m] of x, or zeros where the index is N.

    `inverse_NxJ` lists where in the result each row went (M: nowhere). With it the backward
    pass is a gather too; the scatter-add of a plain `take` is several times slower.
    """
    del inverse_NxJ
    return x_NxD.at[index_M].get(mode="fill", fill_value=0)


def _gather_rows_fwd(x_NxD, index_M, inverse_NxJ):
    return gather_rows(x_NxD, index_M, inverse_NxJ), inverse_NxJ


def _gather_rows_bwd(inverse_NxJ, g_MxD):
    g_NxJxD = g_MxD.at[inverse_NxJ].get(mode="fill", fill_value=0)
    return g_NxJxD[:, 0] if inverse_NxJ.shape[1] == 1 else g_NxJxD.sum(1), None, None


gather_rows.defvjp(_gather_rows_fwd, _gather_rows_bwd)


def _flat(indices: Indices) -> tuple[jax.Array, jax.Array]:
    """Indices over all groups of a device at once, with slots in the order [E, G, C].

    Returns the flat slot of each assignment, [G·S, K] with E·G·C for none, and the flat
    assignment of each slot, [E·G·C] with G·S·K for none.
    """
    slot_GxSxK, held_GxExC = indices
    G, S, K = slot_GxSxK.shape
    _, E, C = held_GxExC.shape
    group_G = jnp.arange(G, dtype=jnp.int32)
    expert, place = jnp.divmod(slot_GxSxK, C)
    slot = jnp.where(
        slot_GxSxK < E * C, (expert * G + group_G[:, None, None]) * C + place, E * G * C
    )
    held = jnp.where(held_GxExC < S * K, group_G[:, None, None] * S * K + held_GxExC, G * S * K)
    return slot.reshape(G * S, K), held.transpose(1, 0, 2).reshape(-1)


def _on_mesh(local, in_axes: tuple, out_axes: tuple):
    """`local` as a `shard_map` over the mesh in context, or as it is where there is none."""
    if jax.sharding.get_abstract_mesh().empty:
        return local
    return jax.shard_map(
        local, in_specs=tuple(spec(axes) for axes in in_axes), out_specs=spec(out_axes)
    )


_GROUPED = ("batch", None, None)
_TOKENS = ("batch", None, "activation_split")
_CHOICES = ("batch", None, None, "activation_split")
_SLOTS = ("expert", "expert_group", None, "activation_split")


def _exchange(x: jax.Array, split_axis: int, concat_axis: int) -> jax.Array:
    """All-to-all over the expert axis, where there is one."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.all_to_all(x, "expert", split_axis, concat_axis, tiled=True)


def dispatch(x_GxSxD: jax.Array, indices: Indices) -> jax.Array:
    """[E, G, C, D]: the tokens in their slots, zeros in empty ones.

    Tokens are split over slice × data × expert, slots over `expert` (experts) and slice × data
    (groups); both are cut along D over `model`, so that no shard sends what another sends.
    """

    def local(x_GxSxD, *indices):
        (G, S, D), (_, E, C) = x_GxSxD.shape, indices[1].shape
        slot_NxK, held_M = _flat(Indices(*indices))
        K = slot_NxK.shape[1]
        token_M = held_M // K  # N for an empty slot, as N·K // K
        slots = gather_rows(x_GxSxD.reshape(G * S, D), token_M, slot_NxK)
        return _exchange(slots.reshape(E, G, C, D), 0, 1)

    return _on_mesh(local, (_TOKENS, _GROUPED, _GROUPED), _SLOTS)(x_GxSxD, *indices)


def combine(slots_ExGxCxD: jax.Array, indices: Indices) -> jax.Array:
    """[G, S, K, D]: what each assignment's slot holds, zeros where it was dropped."""

    def local(slots_ExGxCxD, *indices):
        slots = _exchange(slots_ExGxCxD, 1, 0)
        G, S, K = indices[0].shape
        slot_NxK, held_M = _flat(Indices(*indices))
        rows = gather_rows(
            slots.reshape(-1, slots.shape[-1]), slot_NxK.reshape(-1), held_M[:, None]
        )
        return rows.reshape(G, S, K, -1)

    return _on_mesh(local, (_SLOTS, _GROUPED, _GROUPED), _CHOICES)(slots_ExGxCxD, *indices)
