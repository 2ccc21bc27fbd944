"""Valid tokens per second of one training step: packed, padded, and of other libraries.

`python -m bench trainer --peer-python /path/to/venv/bin/python` compares with what an environment
of its own has of replay-rec, RecTools and RecBole, made by
`pip install torch==2.13.0 "replay-rec[torch]==0.22.0"` and, as their pins exclude each other,
`pip install --no-deps rectools==0.19.0 recbole==1.2.1` with the modules that these then miss. All
variants get the same batches, one after the other in every round; a ratio is taken within a round.
No figure is printed before losses and gradients have been found equal.
"""

import argparse
import contextlib
import copy
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import _padded
from bench._peer import Peer, Seconds, has_our_loss, peer_names
from bench.measure import save, spread, table
from db.spec import RunSpec
from trainer.data.batches import PackedBatch, PackedSequences, Spans, item_tensor
from trainer.losses import make_loss
from trainer.models.build import build_model
from trainer.models.network import Predictions

_USERS = 20_000
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Shape:
    """A dataset's catalog and lengths, and the model trained on it.

    Input tokens per user are `shortest + exp(N(log_mean, log_deviation))`, fitted to the share of
    padded positions in the real data at three window lengths.
    """

    num_items: int
    shortest: int
    log_mean: float
    log_deviation: float
    max_seq_len: int
    embedding_dim: int
    batch_size: int = 128


_ML = Shape(3_416, 17, 4.226, 1.505, 200, 64)  # 11, 47, 70 % padded at 50, 200, 512
_BEAUTY = Shape(12_101, 2, 0.712, 1.191, 50, 64)  # 83, 89, 97 % padded at 32, 50, 200
SHAPES = {
    "ml1m_sl200_d64": _ML,
    "beauty_sl50_d64": _BEAUTY,
    "ml1m_sl50_d64": dataclasses.replace(_ML, max_seq_len=50),
    "ml1m_sl50_d256": dataclasses.replace(_ML, max_seq_len=50, embedding_dim=256),
    "ml1m_sl200_d256": dataclasses.replace(_ML, embedding_dim=256),
    "tiny": Shape(100, 1, 1.0, 1.0, 12, 16, batch_size=8),
}
_NUM_NEGATIVES = {
    "ce": None, "cce": None, "bce": 1, "ce_minus": 64, "bce_plus": 64, "gbce": 64,
    "cce_minus": 64, "sce": None,
}  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and print its table."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    rows = []
    for shape in options.shapes:
        for loss in options.losses:
            rows += measure(shape, loss, options)
            print(table(rows[-len(options.variants) :]), flush=True)
    if options.save:
        print(f"appended to {save('trainer', rows)}")
    return 0


def measure(name: str, loss: str, options: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of one shape and loss, a variant each.

    Raises
    ------
    SystemExit
        A variant's loss or gradients are not those of the packed model.
    """
    spec = make_spec(SHAPES[name], loss, options)
    batches = make_batches(SHAPES[name], options)
    model = new_model(spec, SHAPES[name].num_items, options.device)
    check_padded(model, spec, batches[0])
    with _variants(model, spec, batches, SHAPES[name], options) as variants:
        options.variants = list(variants)
        seconds: dict[str, list[Seconds]] = {variant: [] for variant in variants}
        warmup = max(options.warmup, len(batches)) if options.compile else options.warmup
        options.warm_seconds = dict.fromkeys(variants, 0.0)
        for number in range(warmup + options.rounds):
            for variant, found in variants.items():
                taken = found.step(number % len(batches))
                if number >= warmup:
                    seconds[variant].append(taken)
                else:
                    options.warm_seconds[variant] += taken[0]
    used = [n % len(batches) for n in range(warmup, number + 1)]
    tokens = [batches[n].num_tokens for n in used]
    targets = {v: [found.targets[n] for n in used] for v, found in variants.items()}
    return [_row(name, spec, variant, seconds, tokens, targets, options) for variant in variants]


def make_spec(shape: Shape, loss: str, options: argparse.Namespace) -> RunSpec:
    """Spec of the packed model."""
    return RunSpec(
        dataset="generated",
        model=options.model,
        loss=loss,  # type: ignore[arg-type]
        batch_size=shape.batch_size,
        max_seq_len=shape.max_seq_len,
        embedding_dim=shape.embedding_dim,
        num_negatives=_NUM_NEGATIVES[loss],
        precision="fp32",
    )


def make_batches(shape: Shape, options: argparse.Namespace) -> list[PackedBatch]:
    """Batches of random users with Zipf items."""
    generator = np.random.default_rng(7)
    sequences, _, _ = make_sequences(shape, options.model, options.device, generator)
    return [
        sequences.batch(generator.choice(_USERS, shape.batch_size, replace=False))
        for _ in range(options.batches)
    ]


def make_sequences(
    shape: Shape, model: str, device: str, generator: np.random.Generator | None = None
) -> tuple[PackedSequences, Spans, Tensor]:
    """Sequences of generated users, where each lies, and the items that they are slices of."""
    generator = generator or np.random.default_rng(7)
    drawn = generator.lognormal(shape.log_mean, shape.log_deviation, _USERS)
    lengths = shape.shortest + drawn.astype(np.int64) + 1
    ends = np.cumsum(lengths)
    weight = 1.0 / (np.arange(shape.num_items) + 10.0)
    items = generator.choice(shape.num_items, ends[-1], p=weight / weight.sum()).astype(np.int32)
    flat, spans = item_tensor(items, torch.device(device)), _Spans(ends - lengths, ends)
    sequences = PackedSequences(
        flat, spans, max_seq_len=shape.max_seq_len, next_items=model == "sasrec"
    )
    return sequences, spans, flat


@dataclass(frozen=True)
class _Spans:
    starts: np.ndarray
    ends: np.ndarray


def new_model(spec: RunSpec, num_items: int, device: str) -> Any:
    """Model with drawn weights."""
    model = build_model(spec, num_items).to(device)
    model.reset_parameters(torch.Generator(device).manual_seed(3))  # type: ignore[operator]
    return model


def check_padded(model: Any, spec: RunSpec, batch: PackedBatch) -> None:
    """Loss and gradients of the packed model against the padded one, without dropout."""
    plain = _without_dropout(model, spec)
    loss = make_loss(spec, model.output_weight.shape[0])
    padded = _padded.PaddedBatch(batch, spec, seed=0)
    found = _loss_and_gradients(plain, loss, lambda: plain.predictions(batch, 0))
    wanted = _loss_and_gradients(plain, loss, lambda: padded.predictions(plain, 0.0))
    for name, value in found.items():
        error = (value - wanted[name]).norm() / wanted[name].norm().clamp_min(1e-12)
        if not error < _TOLERANCE:
            raise SystemExit(f"{name} differs from the padded model's by {error:.1e}: no figures")


def _without_dropout(model: Any, spec: RunSpec, **changes: Any) -> Any:
    plain = build_model(
        dataclasses.replace(spec, dropout_rate=0.0, **changes), model.output_weight.shape[0]
    )
    plain.load_state_dict(model.state_dict())
    return plain.to(model.output_weight.device)


def _loss_and_gradients(
    model: Any, loss: Callable[..., Tensor], predict: Callable[[], Predictions]
) -> dict[str, Tensor]:
    model.zero_grad()
    value = loss(predict(), model.output_weight, model.output_bias, 0)
    value.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": value.detach(), **found}


@dataclass(frozen=True)
class Variant:
    """Something that takes training steps.

    Attributes
    ----------
    step : callable
        Takes a step on the batch of a number and returns its seconds.
    targets : list of int
        Targets that it learns from in each batch.
    """

    step: Callable[[int], Seconds]
    targets: list[int]


@contextlib.contextmanager
def _variants(
    model: Any, spec: RunSpec, batches: list[PackedBatch], shape: Shape, options: Any
) -> Iterator[Mapping[str, Variant]]:
    """What is compared, by name."""
    loss = make_loss(spec, shape.num_items)
    layouts = [_padded.PaddedBatch(batch, spec, seed=n) for n, batch in enumerate(batches)]

    def packed(trained: Any, number: int) -> Predictions:
        return trained.predictions(batches[number], number)  # type: ignore[no-any-return]

    def padded(trained: Any, number: int, *, all_positions: bool = False) -> Predictions:
        return layouts[number].predictions(trained, spec.dropout_rate, all_positions=all_positions)

    steps = {
        "packed": _Step(model, loss, packed),
        "padded, valid logits": _Step(model, loss, padded),
    }
    if spec.loss in ("ce", "cce"):
        steps["padded, all logits"] = _Step(
            model, _naive_cross_entropy, lambda m, n: padded(m, n, all_positions=True)
        )
    if options.compile:
        steps["packed, compiled blocks"] = _Step(model, loss, packed, compiled="blocks")
        steps["packed, compiled network"] = _Step(model, loss, packed, compiled="network")
    variants = {
        name: Variant(step, [len(layout.valid) for layout in layouts])
        for name, step in steps.items()
    }
    with contextlib.ExitStack() as stack:
        for name, peer in peer_names(spec).items() if options.peer_python else ():
            process = Peer(peer, model, spec, batches, layouts, shape.num_items, options)
            stack.enter_context(contextlib.closing(process))
            if process.missing:
                print(f"{name} is left out: {process.missing}", file=sys.stderr)
                continue
            if has_our_loss(peer, spec):
                _check_peer(name, process, model, spec, batches[0])
            variants[name] = Variant(process.step, process.targets)
        yield variants


def _check_peer(name: str, peer: Peer, model: Any, spec: RunSpec, batch: PackedBatch) -> None:
    """The peer's loss from our weights against that of our model with the peer's attention."""
    changes = {"attend_padding": True} if spec.model == "sasrec" else {}
    plain = _without_dropout(model, spec, **changes).eval()
    weight, bias = plain.output_weight, plain.output_bias
    with torch.no_grad():
        made = plain.predictions(batch, 0)
        if name == "rectools":  # its padding is a class of score zero
            weight = torch.cat([weight, torch.zeros_like(weight[:1])])
        ours = _naive_cross_entropy(made, weight, bias, 0).item()
    theirs = peer.ask("loss")["loss"]
    if not abs(ours - theirs) < _TOLERANCE * abs(theirs):
        raise SystemExit(f"our loss is {ours:.6f}, that of {name} {theirs:.6f}: no figures")


def _naive_cross_entropy(
    made: Predictions, weight: Tensor, bias: Tensor | None, number: int
) -> Tensor:
    return F.cross_entropy(F.linear(made.hidden, weight, bias), made.targets)


class _Step:
    """Forward, backward and fused Adam on a copy of the model."""

    def __init__(self, model: Any, loss: Any, predict: Any, compiled: str | None = None) -> None:
        self._model = copy.deepcopy(model).train()
        for part in {"blocks": self._model.blocks, "network": [self._model]}.get(compiled, ()):
            part.compile(dynamic=True)
        self._loss, self._predict = loss, predict
        self._optimizer = torch.optim.Adam(
            self._model.parameters(), lr=1e-3, betas=(0.9, 0.98), fused=True
        )
        self._device = model.output_weight.device

    def __call__(self, number: int) -> Seconds:
        self._synchronise()
        wall, cpu = time.perf_counter(), time.process_time()
        made = self._predict(self._model, number)
        self._loss(made, self._model.output_weight, self._model.output_bias, number).backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._synchronise()
        return time.perf_counter() - wall, time.process_time() - cpu

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def _row(
    name: str,
    spec: RunSpec,
    variant: str,
    seconds: Mapping[str, list[Seconds]],
    tokens: list[int],
    targets: Mapping[str, list[int]],
    options: argparse.Namespace,
) -> dict[str, object]:
    clock = options.clock == "cpu"
    taken = [pair[clock] for pair in seconds[variant]]
    ours = [pair[clock] for pair in seconds["packed"]]
    low, middle, high = spread([a / b for a, b in zip(taken, ours, strict=True)])
    fewer = [a / b for a, b in zip(targets["packed"], targets[variant], strict=True)]
    return {
        "model": spec.model,
        "shape": name,
        "loss": spec.loss,
        "variant": variant,
        "clock": options.clock,
        "rounds": len(taken),
        "step_seconds": median(taken),
        "tokens_per_second": median(n / s for n, s in zip(tokens, taken, strict=True)),
        "times_packed": middle,
        "times_packed_20": low,
        "times_packed_80": high,
        "targets": median(targets[variant]),
        "times_packed_per_target": middle * median(fewer),
        "warmup_wall_seconds": options.warm_seconds[variant],
    }


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench trainer", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES][:-1])
    parser.add_argument("--losses", nargs="+", choices=_NUM_NEGATIVES, default=["ce"])
    parser.add_argument("--model", choices=("sasrec", "bert4rec"), default="sasrec")
    parser.add_argument("--peer-python", help="interpreter that has the other libraries")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--batches", type=int, default=4, help="distinct batches, in turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--compile", action="store_true", help="beside torch.compile, warmed up on every batch"
    )
    parser.add_argument("--clock", choices=("cpu", "wall"), help="cpu where one thread computes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", action="store_true", help="append to bench/results/trainer.csv")
    options = parser.parse_args(arguments)
    if options.clock is None:
        single = options.threads == 1 and options.device == "cpu"
        options.clock = "cpu" if single else "wall"
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
