"""Everything there is to set, as frozen dataclasses, and the arithmetic that follows from it."""

import dataclasses
import math
from typing import Literal, NamedTuple

STACKS = ("encoder", "decoder")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The T5 encoder-decoder backbone; the defaults are T5-Base as the paper counts it."""

    vocab_size: int = 32128
    d_model: int = 768
    d_ff: int = 3072
    num_heads: int = 12
    head_dim: int = 64
    num_encoder_layers: int = 12
    num_decoder_layers: int = 12
    activation: Literal["relu", "geglu"] = "relu"
    tied_embeddings: bool = True
    dropout_rate: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of activations; parameters are float32
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass recomputes
    relative_buckets: int = 32
    relative_max_distance: int = 128
    init_scale: float = 0.1  # s of the paper's §2.4; 1.0 is the usual Transformer


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The expert layers: how many experts, where, and how tokens find them."""

    num_experts: int = 0  # 0: a dense T5
    every: int = 2  # the last of every so many layers is sparse
    first: int | None = None  # only among the first so many layers of a stack
    last: int | None = None  # only among the last so many
    stacks: Literal["both", "encoder", "decoder"] = "both"
    # attention: one set of experts for queries, one for shared keys and values (Appendix A)
    sublayer: Literal["ff", "attention", "both"] = "ff"
    shared_d_ff: int = 0  # width of a feed-forward expert that takes every token; 0: none
    router: Literal["switch", "top_k", "ntlb", "batch_prioritized", "expert_choice", "hash"] = (
        "switch"
    )
    # Experts a token goes to, for ntlb those it may try; None: 4 for ntlb, 2 for top_k, else 1.
    top_k: int | None = None
    renormalize: bool = False  # divide a token's gates by their sum (Mesh TensorFlow)
    # Whether experts after a token's first take it: always, never, if their gate is above
    # second_threshold, or with probability gate / second_threshold (Mesh TensorFlow's default).
    second_policy: Literal["all", "none", "threshold", "random"] = "all"
    second_threshold: float = 0.2
    # Exploration, in training: noise on the router's input, or experts drawn at random.
    jitter: float = 0.0  # the input is multiplied by uniform(1 - jitter, 1 + jitter)
    input_dropout_rate: float = 0.0
    sampling_temperature: float = 0.0  # draw from softmax(logits / temperature); 0: the best
    router_dtype: Literal["float32", "bfloat16"] = "float32"
    capacity_factor: float | None = 1.25  # None: dropless
    eval_capacity_factor: float | None = 2.0
    # Slots of an expert in a group, in place of both factors (Hugging Face: 64 for each sequence).
    expert_capacity: int | None = None
    capacity_rounding: Literal["ceil", "floor"] = "ceil"  # floor: Mesh TensorFlow
    min_capacity: int = 4
    group_size: int = 8192  # tokens that compete for the same slots, at the most
    # routed: padding goes to experts and counts as any token (Hugging Face)
    padding: Literal["skipped", "routed"] = "skipped"
    aux_loss_weight: float = 0.01
    aux_loss_reduction: Literal["sum", "mean"] = "sum"  # over layers; mean: T5X
    z_loss_weight: float = 0.0  # of the router's logits
    # Balance without a loss: step of a bias that ranks idle experts up (DeepSeek-V3: 0.001).
    balance_bias_rate: float = 0.0
    expert_dropout_rate: float = 0.0

    @property
    def num_selected(self) -> int:
        """`top_k`, or where it is None what is usual for the router."""
        if self.top_k is not None:
            return self.top_k
        return min({"top_k": 2, "ntlb": 4}.get(self.router, 1), self.num_experts)

    @property
    def max_experts_per_token(self) -> int:
        """Experts a token is in at the most: ntlb tries several and takes one."""
        return {"ntlb": 1, "expert_choice": self.num_experts}.get(self.router, self.num_selected)

    @property
    def in_token_order(self) -> bool:
        """Whether experts take tokens in order, so that a group need not be seen as a whole."""
        return self.router in ("switch", "top_k", "hash")

    @property
    def uses_random_numbers(self) -> bool:
        """Whether training draws random numbers for the router or the experts."""
        rates = self.jitter, self.input_dropout_rate, self.sampling_temperature
        return any(rates) or self.expert_dropout_rate > 0 or self.second_policy == "random"

    def capacity(self, tokens: int, factor: float | None) -> int:
        """Slots of one expert in a group of `tokens` (paper, eq. 3, without a factor k).

        `factor` None is dropless: a slot for every token. Otherwise `expert_capacity`, or where
        that is None what the factor gives, and at least `min_capacity`; never more than `tokens`.
        """
        if factor is None:
            return tokens
        if self.expert_capacity is not None:
            return min(self.expert_capacity, tokens)
        rounded = {"ceil": math.ceil, "floor": math.floor}[self.capacity_rounding]
        # Rounded first: 1.1 × 320 / 32 must be 11 slots, not 12 for an error in the last bit.
        share = rounded(round(factor * tokens / self.num_experts, 9))
        return min(max(share, self.min_capacity), tokens)

    def group_rows(self, batch_size: int, length: int) -> int:
        """Rows of a group: the largest divisor of the global batch that keeps it small enough.

        A group is a whole number of rows with at most max(group_size, length) tokens. It
        depends on the config alone, so that the loss is the same on every mesh.
        """
        most = max(self.group_size, length) // length
        return max(r for r in range(1, min(most, batch_size) + 1) if batch_size % r == 0)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, and how it becomes batches."""

    mixture: str = "python_docs"  # sources: data/catalog.py; with or without rates: data/mixture.py
    # store: tokens that `data pack` wrote, or that are packed into the cache on first use;
    # seqio: text as it streams
    reader: Literal["store", "seqio", "synthetic"] = "store"
    data_dir: str | None = None  # folder or bucket of the sources, or of what `data pack` wrote
    rate_exponent: float = 1.0  # sources without a rate are drawn as (documents)^rate_exponent
    counts: str | None = None  # a JSON file of documents by source, where these do not tell
    on_bad_record: Literal["skip", "error"] = "skip"  # both say what and where
    vocabulary: str | None = None  # a SentencePiece model, or bytes; None: trained on the mixture
    inputs_length: int = 512
    targets_length: int = 114
    batch_size: int = 2048  # sequences, over all devices
    pack: bool = False  # keep documents apart, as segments of one row
    seed: int = 0  # of the rows to train on; those of validation do not depend on it


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning rate schedule."""

    name: Literal["adafactor", "adamw", "lion", "sgd"] = "adafactor"
    learning_rate: float = 1.0
    schedule: Literal["rsqrt", "constant", "linear", "cosine"] = "rsqrt"
    warmup_steps: int = 10_000
    cooldown_steps: int = 0  # linear descent to zero at the end of training
    weight_decay: float = 0.0  # not of norms and relative biases
    memory: Literal["device", "host"] = "device"  # where its state lies between two steps
    # Which parameters are trained: all, experts, non_experts, attention, or those whose path a
    # regular expression is found in. The others stay as they are, and have no state.
    trained: str = "all"
    max_grad_norm: float | None = None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, and what happens how often (in steps)."""

    steps: int = 550_000
    seed: int = 0
    accumulate: int = 1  # microbatches a step
    z_loss_weight: float = 1e-4  # of the output logits
    log_every: int = 100
    eval_every: int = 1000
    eval_batches: int = 20
    checkpoint_every: int = 5000
    keep_checkpoints: int = 3
    keep_best: str | None = None  # and the one that is best by this metric of evaluations
    idle_expert_steps: int = 1000  # without a token, after which an expert is reported


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How fine-tuning tasks are evaluated, beside their loss."""

    # What is compared with the answers: the text that the model writes or, where there are
    # classes, the one whose text is the most likely.
    method: Literal["generate", "rank"] = "generate"
    beam_size: int = 1


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Device mesh: sizes of its axes; -1 stands for whatever devices are left."""

    slice: int = 1
    data: int = -1
    expert: int = 1
    model: int = 1
    fsdp: bool = False  # parameters and optimizer state are split over `data` too


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adaptation: of some matrices, a thin product is trained and nothing else."""

    rank: int = 0  # 0: none
    alpha: float = 16.0  # the product counts alpha / rank
    of: str = "attention/|experts/"  # a regular expression found in the paths of the matrices


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Distillation: a trained model's probabilities are targets beside the data's own.

    loss = (1 - soft_weight) · cross-entropy + soft_weight · T² · soft cross-entropy + …
    """

    teacher: str | None = None  # a WORKDIR, a checkpoint, or a foreign one's folder; None: none
    soft_weight: float = 0.25  # the paper's §4.2; 0: no teacher
    temperature: float = 1.0  # T, of both models' probabilities; the paper tells none
    start_step: int = 0  # after how many steps; until then the data's targets count alone


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    lora: LoRAConfig = LoRAConfig()
    distill: DistillConfig = DistillConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()
    init_from: str | None = None  # checkpoint whose parameters training starts from
    init_rules: str = ""  # which is taken from where, PATTERN -> NAME; …: see transfer.py
    # The optimizer's statistics: fresh, or those of init_from. Steps are counted from 0 either way.
    init_optimizer: Literal["fresh", "loaded"] = "fresh"

    @property
    def sparse(self) -> bool:
        """Whether the model has expert layers at all."""
        return self.moe.num_experts > 0

    @property
    def distilled(self) -> bool:
        """Whether a teacher takes part in training."""
        return self.distill.teacher is not None and self.distill.soft_weight > 0

    def num_layers(self, stack: str) -> int:
        """Layers of the encoder or the decoder."""
        model = self.model
        return {"encoder": model.num_encoder_layers, "decoder": model.num_decoder_layers}[stack]

    def length(self, stack: str) -> int:
        """Tokens of a row of the encoder or the decoder."""
        return {"encoder": self.data.inputs_length, "decoder": self.data.targets_length}[stack]

    def block_runs(self, stack: str) -> tuple["BlockRun", ...]:
        """The layers of a stack in order, as runs of blocks that are alike."""
        moe, layers = self.moe, self.num_layers(stack)
        if not self.sparse or moe.stacks not in ("both", stack):
            return (BlockRun(layers, 1, False),)
        count = min(n for n in (layers, moe.first, moe.last) if n is not None)
        sparse, dense = (
            BlockRun(count // moe.every, moe.every, True),
            BlockRun(layers - count, 1, False),
        )
        runs = (dense, sparse) if moe.last is not None else (sparse, dense)
        return tuple(run for run in runs if run.blocks)

    def sparse_layers(self, stack: str) -> tuple[int, ...]:
        """Numbers of the layers with experts, from 0."""
        numbers: list[int] = []
        start = 0
        for run in self.block_runs(stack):
            end = start + run.blocks * run.layers
            if run.sparse:
                numbers += range(start + run.layers - 1, end, run.layers)
            start = end
        return tuple(numbers)


class BlockRun(NamedTuple):
    """Equal blocks of layers, one after the other; of a sparse block the last layer is sparse."""

    blocks: int
    layers: int  # of a block
    sparse: bool
