"""RunSpec: every knob of one training run, and the key that identifies the run everywhere.

Standard library only, so that workers, drivers and analyses share it at no cost.
"""

import ast
import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, Self

from db.errors import SpecError

Model = Literal["sasrec", "bert4rec"]
Loss = Literal["bce", "bce_plus", "gbce", "ce", "ce_minus", "cce", "cce_minus", "sce"]
NegativeSampler = Literal["uniform", "popularity", "log_uniform", "in_batch"]
Hits = Literal["exclude", "mask", "keep"]
FilterMode = Literal["drop", "unbiased"]
Optimizer = Literal["adam", "rowwise_adam"]
Precision = Literal["fp32", "bf16", "fp16"]
MetricFrame = Literal["train", "test_history"]

FULL_LOSSES: frozenset[str] = frozenset({"ce", "cce"})
"""Losses over the whole catalog: `num_negatives` is null."""
SAMPLED_LOSSES: frozenset[str] = frozenset({"bce", "bce_plus", "gbce", "ce_minus", "cce_minus"})
"""Losses over the positive and `num_negatives` sampled items."""
KERNEL_LOSSES: frozenset[str] = frozenset({"bce_plus", "gbce", "cce", "cce_minus", "sce"})
"""Losses computed by `kernels`, without materialised logits."""


class RunStatus(enum.StrEnum):
    """What became of a run; the first two are not final."""

    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    DIVERGED = "diverged"
    FAILED = "failed"
    OUT_OF_MEMORY = "out_of_memory"
    SKIPPED = "skipped"

    @property
    def is_final(self) -> bool:
        """Whether nothing more will be tried for the run."""
        return self not in (RunStatus.PENDING, RunStatus.RUNNING)


class AttemptStatus(enum.StrEnum):
    """What became of one try at a run; all but the first are final and immutable."""

    RUNNING = "running"
    DONE = "done"
    DIVERGED = "diverged"
    OUT_OF_MEMORY = "out_of_memory"
    ERROR = "error"
    LOST = "lost"
    CANCELLED = "cancelled"


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Complete specification of one training run.

    Every field is read by training or refused for the loss or model at hand: a knob that does
    nothing would corrupt the run database. The paper is "Faster and Memory-Efficient Training of
    Sequential Recommendation Models for Large Catalogs".

    Raises
    ------
    SpecError
        A value outside its range, or a field that the chosen loss or model does not use.
    """

    dataset: str
    """Name of a prepared dataset."""
    model: Model = "sasrec"
    """Network: `sasrec` or `bert4rec`."""
    loss: Loss = "ce"
    """Training objective: bce, bce_plus, gbce, ce, ce_minus, cce, cce_minus or sce."""
    batch_size: int = 128
    """Users per optimizer step (bs)."""
    micro_batch_size: int | None = None
    """Users per forward and backward pass; gradients of a batch add up; null is the whole batch."""
    max_seq_len: int = 200
    """Most recent items kept per user (sl)."""
    num_negatives: int | None = None
    """Negatives per target (ns); null is the whole catalog (ce, cce)."""
    negative_sampler: NegativeSampler = "uniform"
    """Distribution of the negatives: uniform, popularity, log_uniform or in_batch."""
    negatives_share: int | Literal["batch"] = 1
    """Tokens that share one set of negatives: 1, a block length, or `batch`."""
    logq_correction: bool = True
    """Subtract the log of the expected count of each negative from its logit."""
    hits: Hits = "exclude"
    """A negative equal to the target is never drawn (`exclude`), masked, or kept."""
    filter_eps: float | None = None
    """Softmax probability below which the gradient of a logit is filtered; null filters nothing."""
    filter_mode: FilterMode = "drop"
    """Filtered gradients are dropped, or kept with probability p/eps and scaled up (`unbiased`)."""
    gbce_t: float = 0.75
    """Calibration of gBCE between 0 (BCE) and 1 (fully calibrated); only with loss gbce."""
    sce_alpha: float = 2.0
    """SCE: alpha * sqrt(beta * N) buckets of alpha * sqrt(N / beta) of N targets; loss sce only."""
    sce_beta: float = 1.0
    """SCE: number of buckets over targets per bucket; only with loss sce."""
    sce_bucket_size_x: int | None = None
    """SCE: targets per bucket; null takes it from alpha and beta; only with loss sce."""
    sce_bucket_size_y: int = 256
    """SCE: items per bucket, those of largest inner product with its center; only with loss sce."""
    sce_mix: bool = True
    """SCE: bucket centers are random mixtures of the hidden states; only with loss sce."""
    embedding_dim: int = 256
    """Width of item embeddings and hidden states (d)."""
    num_blocks: int = 2
    """Transformer blocks."""
    num_heads: int = 2
    """Attention heads; divides `embedding_dim`."""
    dropout_rate: float = 0.1
    """Dropout probability in embeddings, attention and feed-forward."""
    mask_probability: float = 0.15
    """Probability that a token is masked; only with model bert4rec."""
    learning_rate: float = 1e-3
    """Step size of the optimizer, constant over training."""
    optimizer: Optimizer = "adam"
    """`adam` (betas 0.9, 0.98), or `rowwise_adam` (touched item rows only: another algorithm)."""
    precision: Precision | None = None
    """fp32, bf16 or fp16 with a loss scaler; null is resolved by device before storing."""
    max_epochs: int = 20
    """Most passes over the training users."""
    patience: int = 4
    """Validations without a better NDCG@10 after which training stops."""
    evaluate_every_steps: int | None = None
    """Optimizer steps between validations; null validates once per epoch."""
    max_validation_users: int | None = None
    """Users of a fixed validation sample; null validates on all of them."""
    mask_seen: bool = True
    """Mask the user's history when ranking; items bought again can then never be hit."""
    attend_padding: bool = False
    """Oddity of the paper: padded keys take part in attention (sasrec only)."""
    predict_first_item: bool = False
    """Oddity of the paper: the first item is a target, predicted from padding (sasrec only)."""
    count_padding: bool = False
    """Oddity of the paper: padded positions are targets labelled item 0 (sasrec with cce or ce)."""
    metric_frame: MetricFrame = "train"
    """Reference of Coverage and Surprisal: training events, or the paper's test histories."""
    paper_negatives: bool = False
    """Oddity of the paper: its biased CCE- (ns+1 correction, hits keep logit 0); only cce_minus."""
    seed: int = 42
    """Seed of initial weights, data order, dropout and negatives."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_ranges(self)
        _check_combinations(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Make a spec from names and values, refusing unknown names.

        Raises
        ------
        SpecError
            An unknown name (the nearest known one is suggested), or a value out of range.
        """
        known = field_types()
        for name in values:
            if name not in known:
                raise SpecError(f"unknown field {name!r}{suggestion(name, known)}")
        if "dataset" not in values:
            raise SpecError("dataset is missing; give the name of a prepared dataset")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, in the order of the class."""
        return dataclasses.asdict(self)

    def non_default(self) -> dict[str, Any]:
        """The dataset and the fields that differ from their default."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.default is dataclasses.MISSING or getattr(self, field.name) != field.default
        }

    def resolved(self, device_type: str) -> Self:
        """Replace a null precision by what the device trains best in.

        Parameters
        ----------
        device_type : str
            `cuda` (bf16) or anything else (fp32).
        """
        if self.precision is not None:
            return self
        precision: Precision = "bf16" if device_type == "cuda" else "fp32"
        return dataclasses.replace(self, precision=precision)

    def command(self) -> str:
        """The `srsweep train` line that repeats this run."""
        words = ["srsweep train"]
        for name, value in self.non_default().items():
            option = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                words.append(option if value else "--no-" + name.replace("_", "-"))
            elif value is not None:
                words.append(f"{option} {value}")
        return " ".join(words)


PAPER_PROFILE: dict[str, Any] = {
    "attend_padding": True,
    "predict_first_item": True,
    "metric_frame": "test_history",
}
"""Oddities of the paper that apply to any loss (see `paper_profile`)."""


def paper_profile(model: str, loss: str) -> dict[str, Any]:
    """Field values that repeat the paper's released code for a model and loss.

    Padding is attended to and predicted from by its SASRec; its CCE counts padded positions and
    its CCE- is biased.
    """
    if model != "sasrec":
        values: dict[str, Any] = {"metric_frame": PAPER_PROFILE["metric_frame"]}
    else:
        values = dict(PAPER_PROFILE)
    if loss == "cce" and model == "sasrec":
        values["count_padding"] = True
    if loss == "cce_minus":
        values["paper_negatives"] = True
    return values


def run_key(spec: RunSpec, dataset_fingerprint: str, replicate: int = 0) -> str:
    """Identity of a run: equal specs on equal data share it, on any machine and Python.

    Parameters
    ----------
    spec : RunSpec
        Complete specification with a resolved precision; the seed takes part. The dataset's
        name does not: its fingerprint stands for it.
    dataset_fingerprint : str
        SHA-256 of the prepared dataset.
    replicate : int
        0 for our own runs; repeats of imported results count up.

    Returns
    -------
    str
        64 lowercase hex digits: SHA-256 of the sorted JSON of the fields that differ from their
        defaults (a new field therefore never changes an old key), the fingerprint and replicate.

    Raises
    ------
    SpecError
        The precision is still null.
    """
    if spec.precision is None:
        raise SpecError("precision is null; resolve it for the device before asking for the key")
    fields = {
        name: float(value) if field_types()[name] is float else value
        for name, value in spec.non_default().items()
        if name != "dataset"
    }
    content = {"dataset": dataset_fingerprint, "replicate": replicate, "spec": fields}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def field_types() -> dict[str, Any]:
    """Name of each field and its resolved type annotation."""
    return typing.get_type_hints(RunSpec)


@functools.cache
def field_docs() -> dict[str, str]:
    """Name of each field and the doc string written under it."""
    body = ast.parse(inspect.getsource(RunSpec)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for node, following in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[node.target.id] = str(following.value.value)
    return docs


def suggestion(name: str, known: typing.Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known name, else the list of what is allowed."""
    names = list(known)
    near = get_close_matches(name, names, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; allowed are {', '.join(names)}"


def _check_types(spec: RunSpec) -> None:
    for name, kind in field_types().items():
        value = getattr(spec, name)
        options = typing.get_args(kind) if typing.get_origin(kind) is not Literal else (kind,)
        allowed: list[Any] = []
        accepted: bool = False
        for option in options or (kind,):
            if typing.get_origin(option) is Literal:
                allowed += typing.get_args(option)
                accepted |= isinstance(value, str) and value in typing.get_args(option)
            elif option is type(None):
                allowed.append("null")
                accepted |= value is None
            elif option is float:
                allowed.append("a number")
                accepted |= type(value) in (int, float)
            else:
                allowed.append({int: "an integer", bool: "true or false", str: "text"}[option])
                accepted |= type(value) is option
        if not accepted:
            choices = [str(choice) for choice in allowed]
            if isinstance(value, str) and typing.get_origin(kind) is Literal:
                raise SpecError(f"{name}={value!r} is unknown{suggestion(value, choices)}")
            raise SpecError(f"{name}={value!r} must be {' or '.join(choices)}")
        if type(value) is int and kind is float:
            object.__setattr__(spec, name, float(value))


_POSITIVE = (
    "batch_size",
    "micro_batch_size",
    "max_seq_len",
    "num_negatives",
    "sce_bucket_size_x",
    "sce_bucket_size_y",
    "embedding_dim",
    "num_blocks",
    "num_heads",
    "max_epochs",
    "patience",
    "evaluate_every_steps",
    "max_validation_users",
    "negatives_share",
)


def _check_ranges(spec: RunSpec) -> None:
    for name in _POSITIVE:
        value = getattr(spec, name)
        if isinstance(value, int) and value < 1:
            raise SpecError(f"{name}={value} must be 1 or more")
    for name in ("learning_rate", "sce_alpha", "sce_beta", "filter_eps"):
        value = getattr(spec, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise SpecError(f"{name}={value} must be a finite number above 0")
    if not 0.0 <= spec.dropout_rate < 1.0:
        raise SpecError(f"dropout_rate={spec.dropout_rate} must be at least 0 and below 1")
    if not 0.0 < spec.mask_probability < 1.0:
        raise SpecError(f"mask_probability={spec.mask_probability} must lie between 0 and 1")
    if not 0.0 <= spec.gbce_t <= 1.0:
        raise SpecError(f"gbce_t={spec.gbce_t} must lie between 0 and 1")
    if spec.filter_eps is not None and spec.filter_eps >= 1:
        raise SpecError(f"filter_eps={spec.filter_eps} is a probability and must be below 1")
    if not 0 <= spec.seed < 2**63:
        raise SpecError(f"seed={spec.seed} must be at least 0 and below 2**63")
    if spec.embedding_dim % spec.num_heads:
        raise SpecError(
            f"embedding_dim={spec.embedding_dim} is not a multiple of num_heads={spec.num_heads}; "
            "change one of them"
        )


def _check_combinations(spec: RunSpec) -> None:
    if spec.loss in SAMPLED_LOSSES and spec.num_negatives is None:
        raise SpecError(f"loss={spec.loss!r} samples its negatives; give num_negatives >= 1")
    if spec.loss not in SAMPLED_LOSSES and spec.num_negatives is not None:
        raise SpecError(
            f"num_negatives={spec.num_negatives} has no meaning with loss={spec.loss!r}; use null, "
            f"or a sampled loss ({', '.join(sorted(SAMPLED_LOSSES))})"
        )
    if spec.loss == "bce" and spec.num_negatives != 1:
        raise SpecError(
            f"num_negatives={spec.num_negatives} with loss='bce': it takes one; use 'bce_plus' "
            "for more"
        )
    _check_micro_batches(spec)
    for name, applies, where in _conditions(spec):
        default = RunSpec.__dataclass_fields__[name].default
        if getattr(spec, name) != default and not applies:
            raise SpecError(
                f"{name}={getattr(spec, name)!r} has no effect with loss={spec.loss!r} and "
                f"model={spec.model!r}; it needs {where}"
            )


def _check_micro_batches(spec: RunSpec) -> None:
    """Refuse pieces of a batch that would be the batch, or another gradient than the batch's."""
    size = spec.micro_batch_size
    if size is None:
        return
    if size >= spec.batch_size:
        raise SpecError(
            f"micro_batch_size={size} leaves batch_size={spec.batch_size} whole; use null, or less"
        )
    shared = {
        "loss": spec.loss == "sce",
        "negative_sampler": spec.negative_sampler == "in_batch",
        "negatives_share": spec.negatives_share == "batch",
    }
    for name, compares in shared.items():
        if compares:
            raise SpecError(
                f"micro_batch_size={size} would change what {name}={getattr(spec, name)!r} takes "
                "from a batch; use null and lower batch_size instead"
            )


def _conditions(spec: RunSpec) -> list[tuple[str, bool, str]]:
    """Fields that only some losses or models read: name, whether this spec does, what it takes."""
    kernel_sampled = spec.loss in SAMPLED_LOSSES & KERNEL_LOSSES
    conditions = [("negatives_share", kernel_sampled, "loss bce_plus, gbce or cce_minus")]
    conditions += [
        (
            name,
            kernel_sampled and not spec.paper_negatives,
            "loss bce_plus, gbce or cce_minus without paper_negatives",
        )
        for name in ("negative_sampler", "hits")
    ]
    # without a correction, dropping a hit and never drawing it differ for own uniform draws only
    own_uniform = spec.negative_sampler == "uniform" and spec.negatives_share == 1
    corrected = spec.loss == "cce_minus" and spec.logq_correction
    conditions += [
        (
            "hits",
            spec.hits != "mask" or own_uniform or corrected,
            "logq_correction, or uniform negatives with negatives_share=1",
        )
    ]
    softmax = spec.loss in {"cce", "cce_minus"}
    conditions += [
        (
            "logq_correction",
            spec.loss in {"ce_minus", "cce_minus"} and not spec.paper_negatives,
            "loss ce_minus or cce_minus without paper_negatives",
        ),
        ("filter_eps", softmax, "loss cce or cce_minus"),
        (
            "filter_mode",
            softmax and spec.filter_eps is not None,
            "filter_eps with cce or cce_minus",
        ),
        ("gbce_t", spec.loss == "gbce", "loss gbce"),
        ("mask_probability", spec.model == "bert4rec", "model bert4rec"),
        ("attend_padding", spec.model == "sasrec", "model sasrec"),
        ("predict_first_item", spec.model == "sasrec", "model sasrec"),
        (
            "count_padding",
            spec.model == "sasrec" and spec.loss in {"ce", "cce"},
            "model sasrec with loss ce or cce",
        ),
        ("paper_negatives", spec.loss == "cce_minus", "loss cce_minus"),
        ("optimizer", spec.loss in SAMPLED_LOSSES, "a sampled loss"),
    ]
    conditions += [
        (name, spec.loss == "sce", "loss sce")
        for name in ("sce_alpha", "sce_beta", "sce_bucket_size_x", "sce_bucket_size_y", "sce_mix")
    ]
    return conditions
