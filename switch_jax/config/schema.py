"""Schema of the configuration: keys with types, defaults and meanings, as frozen dataclasses.

The comment above or behind a key is its description in `switch-jax config` and docs/config.md. A
key says what a change of it affects in a run that has begun (`ChangeEffect`), where that differs
from its group's effect.
"""

import dataclasses
from dataclasses import field
from typing import Any, Literal, NamedTuple

STACKS = ("encoder", "decoder")
"""Names of the two stacks of layers."""

MAX_FUSED_LENGTH = 2048
"""Longest rows, in tokens, for which `model.attention=fused` has kernels."""

# checkpoint: the run's checkpoints no longer fit, so the run cannot be continued.
# results: the run can be continued, but its numbers are those of two configurations.
# none: no number depends on the key.
ChangeEffect = Literal["checkpoint", "results", "none"]

# Role of a key of `model` and `moe`.
# function: the parameters were trained for its value.
# evaluation: chosen by each run; it changes what the model computes in evaluation.
# training: chosen by each run; it changes nothing in evaluation, apart from rounding.
KeyRole = Literal["function", "evaluation", "training"]


def _key(default: Any, change: ChangeEffect | None = None, role: KeyRole | None = None) -> Any:
    """Returns a field with a default, the effect of a change (None: its group's), and a role."""
    metadata = {"change": change, "role": role}
    return field(default=default, metadata={k: v for k, v in metadata.items() if v is not None})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """T5 encoder-decoder; the defaults are T5-Base as the paper counts it."""

    vocab_size: int = 32128  # ids, at least as many as the vocabulary has
    d_model: int = 768  # width of the residual stream
    d_ff: int = 3072  # width of a feed-forward layer, and of an expert
    num_heads: int = 12  # of attention
    head_dim: int = 64  # width of queries, keys and values
    num_encoder_layers: int = 12  # blocks of attention and feed-forward layer
    num_decoder_layers: int = 12  # blocks of self-attention, cross-attention, feed-forward layer
    activation: Literal["relu", "geglu"] = "relu"  # of feed-forward layers; geglu: T5 1.1's
    tied_embeddings: bool = True  # input embeddings are the output matrix, too
    dropout_rate: float = _key(0.0, role="training")  # of all sublayers
    # Of activations; parameters are float32.
    dtype: Literal["float32", "bfloat16"] = _key("bfloat16", role="training")
    # What the backward pass computes again: only what is cheap (casts, norms, activations), all but
    # matmuls, or all.
    remat: Literal["none", "dots", "full"] = _key("none", "none", "training")
    # einsum: scores are arrays in memory. fused: kernels, which are for TPUs
    # (elsewhere they are interpreted, for tests). auto: fused on TPUs, else einsum.
    attention: Literal["auto", "einsum", "fused"] = _key("auto", "none", "training")
    relative_buckets: int = 32  # relative positions that attention tells apart
    relative_max_distance: int = 128  # longer distances share a bucket
    # Scale of the initial weights, s of paper §2.4; 1.0 is the usual one.
    init_scale: float = _key(0.1, role="training")
    # The ids are those of the vocabulary and of the checkpoint; T5's are 0, 1 and 0.
    pad_id: int = 0  # of padding
    eos_id: int = 1  # of the end of a text
    start_id: int = 0  # of the decoder's first input


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Mixture-of-experts layers: number and placement of experts, routing, capacity, losses."""

    num_experts: int = 0  # of a layer; 0: a dense T5
    every: int = 2  # every n-th layer has experts
    first: int | None = None  # experts only in the first n layers of a stack; None: in all
    last: int | None = None  # experts only in the last n layers of a stack; None: in all
    stacks: Literal["both", "encoder", "decoder"] = "both"  # stacks that have experts
    # Sublayer that consists of experts; attention: they project queries, and shared keys and values
    # (paper, Appendix A).
    sublayer: Literal["ff", "attention", "both"] = "ff"
    shared_d_ff: int = 0  # width of a feed-forward expert that receives every token; 0: none
    # Algorithm that assigns tokens to experts; docs/routing.md describes all.
    router: Literal["switch", "top_k", "ntlb", "batch_prioritized", "expert_choice", "hash"] = (
        "switch"
    )
    # Experts per token (ntlb: experts a token may try); None: 4 for ntlb, 2 for top_k, else 1.
    top_k: int | None = None
    renormalize: bool = False  # divide a token's gates by their sum (Mesh TensorFlow)
    # Use of a token's second and later experts: always, never, where their gate is above
    # second_threshold, or with probability gate / second_threshold (Mesh TensorFlow's default).
    second_policy: Literal["all", "none", "threshold", "random"] = "all"
    second_threshold: float = 0.2  # of second_policy=threshold and random
    # Exploration in training: the router's input is multiplied by uniform(1 - jitter, 1 + jitter).
    jitter: float = _key(0.0, role="training")
    input_dropout_rate: float = _key(0.0, role="training")  # exploration: of the router's input
    # Exploration: experts are sampled from softmax(logits / temperature); 0: argmax.
    sampling_temperature: float = _key(0.0, role="training")
    # Of the router's logits and gates.
    router_dtype: Literal["float32", "bfloat16"] = _key("float32", role="training")
    # Standard deviation of the router's initial weights. Its inputs have RMS 1, so that initial
    # logits have router_init_std · sqrt(d_model): far below 1, all gates begin near 1 / E. 0.02 did
    # slightly better than the sqrt(0.1 / d_model) of other weights in flaxformer's Switch configs.
    router_init_std: float = _key(0.02, role="training")
    # Slots of an expert / its equal share of the tokens; None: dropless.
    capacity_factor: float | None = _key(1.25, role="training")
    eval_capacity_factor: float | None = _key(2.0, role="evaluation")  # in evaluation
    # Slots per expert and group, instead of both factors (Hugging Face: 64 per sequence).
    expert_capacity: int | None = _key(None, role="evaluation")
    # Of the number of slots; floor: Mesh TensorFlow's.
    capacity_rounding: Literal["ceil", "floor"] = _key("ceil", role="evaluation")
    min_capacity: int = _key(4, role="evaluation")  # slots per expert and group, at least
    # Maximum number of tokens that share the slots of the experts.
    group_size: int = _key(8192, role="evaluation")
    # Positions of padding; routed: as any token (Hugging Face).
    padding: Literal["skipped", "routed"] = _key("skipped", role="evaluation")
    aux_loss_weight: float = _key(0.01, role="training")  # of the balance loss (paper, §2.2)
    # Tokens over which the balance loss counts the load of the experts: those of each group
    # (paper), or of the whole batch, over devices, processes and microbatches.
    balance_scope: Literal["group", "batch"] = _key("group", role="training")
    # Of the balance loss over layers; mean: T5X.
    aux_loss_reduction: Literal["sum", "mean"] = _key("sum", role="training")
    z_loss_weight: float = _key(0.0, role="training")  # of the router's logits
    # Balance without a loss: update rate of a bias added to the ranking (DeepSeek-V3: 0.001).
    balance_bias_rate: float = 0.0
    expert_dropout_rate: float = _key(0.0, role="training")  # inside experts (paper, §2.4)

    @property
    def num_selected(self) -> int:
        """Number of experts selected per token: `top_k`, or the router's default."""
        if self.top_k is not None:
            return self.top_k
        return min({"top_k": 2, "ntlb": 4}.get(self.router, 1), self.num_experts)

    @property
    def max_experts_per_token(self) -> int:
        """Maximum number of experts that process a token (ntlb tries several and uses one)."""
        return {"ntlb": 1, "expert_choice": self.num_experts}.get(self.router, self.num_selected)

    @property
    def in_token_order(self) -> bool:
        """Whether slots are assigned in token order, so that a group may span devices."""
        return self.router in ("switch", "top_k", "hash")

    @property
    def uses_random_numbers(self) -> bool:
        """Whether the router or the experts use random numbers during training."""
        rates = self.jitter, self.input_dropout_rate, self.sampling_temperature
        return any(rates) or self.expert_dropout_rate > 0 or self.second_policy == "random"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Training data: sources, reader, vocabulary and shape of the batches."""

    # Sources of text or tasks, separated by commas, with or without rates (docs/data.md).
    mixture: str = _key("python_docs", change="checkpoint")
    # store: a token store written by `data pack`, or packed into the cache on first use; seqio:
    # text, tokenised while training; synthetic: random tokens.
    reader: Literal["store", "seqio", "synthetic"] = _key("store", change="checkpoint")
    data_dir: str | None = None  # folder or bucket of sources or of a token store, or hf: for tasks
    text_field: str = "text"  # field or column that has the text of one's own files
    documents: Literal["paragraphs", "lines"] = "paragraphs"  # what a document of a .txt file is
    rate_exponent: float = 1.0  # a source without a rate has rate (documents)^rate_exponent
    counts: str | None = None  # JSON file of documents by source, for sources without counts
    # Action at a record that cannot be read; both report file and line.
    on_bad_record: Literal["skip", "error"] = "skip"
    on_missing_task: Literal["error", "skip"] = "error"  # action where a task has no files
    # SentencePiece model, tokenizer.json, bytes or byt5; None: that of the token store, else of
    # init_from or the teacher, else one that is trained on the mixture.
    vocabulary: str | None = None
    # What the decoder predicts of text without targets (docs/data.md).
    objective: Literal["span_corruption", "iid_denoising", "prefix_lm", "ul2"] = "span_corruption"
    inputs_length: int = 512  # tokens of a row of the encoder
    targets_length: int = 114  # tokens of a row of the decoder
    batch_size: int = 2048  # sequences of the global batch
    pack: bool = False  # several examples per row, as separate segments
    seed: int = 0  # of the order of training rows and of their noise; validation has its own


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule."""

    # Update rule; adafactor is T5X's.
    name: Literal["adafactor", "adamw", "lion", "sgd"] = _key("adafactor", change="checkpoint")
    learning_rate: float = 1.0  # highest value of the schedule; rsqrt divides it by a root
    # After the warm-up; rsqrt: learning_rate / sqrt(max(step, warmup_steps)).
    schedule: Literal["rsqrt", "constant", "linear", "cosine"] = "rsqrt"
    warmup_steps: int = 10_000  # steps of a rising rate; of rsqrt, of a constant one
    # Linear decay to zero at the end of training. Where both do not fit into train.steps, as in a
    # short trial of a preset, the start of training says how high the learning rate gets.
    cooldown_steps: int = 0
    weight_decay: float = 0.0  # of all parameters but norms and biases
    memory: Literal["device", "host"] = "device"  # of the optimizer state between two steps
    # Trained parameters: all, experts, non_experts, attention, or a regular expression that is
    # searched in their paths. The other parameters are constant and have no optimizer state.
    trained: str = _key("all", change="checkpoint")
    max_grad_norm: float | None = None  # gradients with a larger norm are scaled down; None: none


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Training loop; intervals are in steps."""

    steps: int = 550_000  # optimizer steps of the whole run
    seed: int = 0  # of initial parameters, dropout and router noise
    accumulate: int = _key(1, change="none")  # microbatches per step
    z_loss_weight: float = 1e-4  # of the output logits
    label_smoothing: float = 0.0  # share of a target's probability given to all pieces alike
    log_every: int = _key(100, change="none")  # steps between two lines of metrics
    eval_every: int = 1000  # steps between two evaluations
    eval_batches: int = 20  # batches of validation text in each evaluation
    checkpoint_every: int = _key(5000, change="none")  # steps between two checkpoints
    keep_checkpoints: int = _key(3, change="none")  # number of newest checkpoints that are kept
    keep_best: str | None = None  # the best one by this evaluation metric is kept, too
    # A step whose loss, gradients or parameters are not finite ends the run (exit code 3), or its
    # update is skipped; ten such steps in a row end the run, too.
    on_nonfinite: Literal["stop", "skip"] = "stop"
    # FIRST:LAST: steps that are traced, for TensorBoard and Perfetto, in WORKDIR/profile.
    profile_steps: str | None = _key(None, change="none")
    # What receives the metrics besides metrics.jsonl, separated by commas: tensorboard, wandb,
    # mlflow, trackio or FILE.py:CLASS.
    trackers: str = _key("tensorboard", change="none")
    # Steps after which an expert without tokens is reported, or a router that is nearly uniform.
    idle_expert_steps: int = 1000


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation of fine-tuning tasks."""

    # Prediction of an example: the generated text or, for tasks with classes, the class whose
    # text has the highest likelihood.
    method: Literal["generate", "rank"] = "generate"
    beam_size: int = 1  # of generated predictions; 1: greedy
    # Of one's own pairs, separated by commas: accuracy, token_f1, rouge, bleu, classes, correlation
    # or FILE.py:FUNCTION. The first value is the task's score.
    metrics: str = "accuracy"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Device mesh: sizes of its axes; -1: all devices that are left."""

    slice: int = 1  # groups of devices with a slower network between them, as slices of TPUs
    data: int = -1  # batch rows are split over it
    expert: int = 1  # experts are split over it, and batch rows
    model: int = 1  # heads, widths of layers and the vocabulary are split over it
    fsdp: bool = False  # split parameters and optimizer state over `data`, too


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adaptation: only low-rank products added to some matrices are trained."""

    rank: int = 0  # of the products; 0: none
    alpha: float = 16.0  # the product is scaled by alpha / rank
    of: str = "attention/|experts/"  # regular expression, searched in the paths of matrices


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Distillation: the teacher's probabilities are targets in addition to the data's.

    loss = (1 - soft_weight) · cross-entropy + soft_weight · T² · soft cross-entropy + …
    """

    teacher: str | None = None  # WORKDIR, checkpoint, or foreign checkpoint; None: none
    soft_weight: float = 0.25  # of the teacher's probabilities (paper §4.2); 0: no teacher
    temperature: float = 1.0  # T of both models' probabilities; the paper does not give one
    start_step: int = 0  # before this step, soft_weight is 0


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of a run."""

    model: ModelConfig = field(default=ModelConfig(), metadata={"change": "checkpoint"})
    moe: MoEConfig = field(default=MoEConfig(), metadata={"change": "checkpoint"})
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    lora: LoRAConfig = field(default=LoRAConfig(), metadata={"change": "checkpoint"})
    distill: DistillConfig = DistillConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = field(default=MeshConfig(), metadata={"change": "none"})
    init_from: str | None = None  # checkpoint of the initial parameters; None: random ones
    # checkpoint: keys of `model` and `moe` that the parameters were
    # trained for (role `function`) are those of init_from where the config has their defaults.
    init_model: Literal["config", "checkpoint"] = _key("config", change="none")
    # Which parameter is read from which: PATTERN -> NAME; … (docs/finetune.md).
    init_rules: str = ""
    # Optimizer state: fresh, or that of init_from. Steps are counted from 0 in both cases.
    init_optimizer: Literal["fresh", "loaded"] = "fresh"

    @property
    def sparse(self) -> bool:
        """Whether the model has expert layers."""
        return self.moe.num_experts > 0

    @property
    def distilled(self) -> bool:
        """Whether training uses a teacher."""
        return self.distill.teacher is not None and self.distill.soft_weight > 0

    def num_layers(self, stack: str) -> int:
        """Returns the number of layers of the encoder or the decoder."""
        model = self.model
        return {"encoder": model.num_encoder_layers, "decoder": model.num_decoder_layers}[stack]

    def length(self, stack: str) -> int:
        """Returns the tokens per row of the encoder or the decoder."""
        return {"encoder": self.data.inputs_length, "decoder": self.data.targets_length}[stack]

    def block_runs(self, stack: str) -> tuple["BlockRun", ...]:
        """Returns the layers of a stack in order, as runs of equal blocks."""
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
        """Returns the indices of the layers with experts, from 0."""
        numbers: list[int] = []
        start = 0
        for run in self.block_runs(stack):
            end = start + run.blocks * run.layers
            if run.sparse:
                numbers += range(start + run.layers - 1, end, run.layers)
            start = end
        return tuple(numbers)


class BlockRun(NamedTuple):
    """Consecutive equal blocks of layers; the last layer of a sparse block has experts."""

    blocks: int
    layers: int  # per block
    sparse: bool


def change_effect(key: str) -> ChangeEffect:
    """Returns what a change of a dotted key affects in a run that has begun.

    Raises `KeyError` for a key that does not exist.
    """
    effect: ChangeEffect = "results"
    group: Any = Config()
    for name in key.split("."):
        fields = {one.name: one for one in dataclasses.fields(group)}
        effect = fields[name].metadata.get("change", effect)
        group = getattr(group, name)
    return effect


def key_roles(group: str) -> dict[str, KeyRole]:
    """Returns the role of every key of `model` or `moe`, by its name in the group."""
    fields = dataclasses.fields(getattr(Config(), group))
    return {one.name: one.metadata.get("role", "function") for one in fields}
