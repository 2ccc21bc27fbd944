"""BoTorch's qLogNEHVI on the tables of `bench search`, beside the project's own sampler.

No dependency of the project: the bench skips it by name where BoTorch is not installed.
"""

import dataclasses
import importlib.util
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Self

import numpy as np

from db.spec import RunSpec
from sweeper.search.ask import REFERENCE, Search
from sweeper.search.space import Encoder, Observation

if TYPE_CHECKING:
    from torch import Tensor

_MC_SAMPLES: Final = 128


def is_installed() -> bool:
    """Whether BoTorch and GPyTorch can be imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("botorch", "gpytorch"))


@dataclasses.dataclass(frozen=True)
class BotorchSearch:
    """Asks like `Search`: the same first design, then qLogNEHVI over the points not yet run.

    One `SingleTaskGP` with BoTorch's own priors per objective, on log2 sizes within [0, 1]. The
    reference point is that of the bench, in the range that the models predict over the space.

    Attributes
    ----------
    search : Search
        Space, objectives, seed, and the first design.
    """

    search: Search

    def with_seed(self, seed: int) -> Self:
        """The same search with other random choices."""
        return dataclasses.replace(self, search=self.search.with_seed(seed))

    def propose(self, observations: Sequence[Observation], count: int = 1) -> list[RunSpec]:
        """Choose the next runs.

        Parameters
        ----------
        observations : sequence of Observation
            Finished runs that have every objective.
        count : int
            Most points to return.
        """
        points = self.search.space.points
        inputs = Encoder.of(points).encode(points)
        if len(observations) < max(4, inputs.shape[1] + 1):
            return self.search.propose(observations, count)
        known = {observation.spec for observation in observations}
        free = [i for i, point in enumerate(points) if point not in known]
        rows = {point: i for i, point in enumerate(points)}
        seen = [rows[observation.spec] for observation in observations]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [points[i] for i in self._best(inputs, seen, free, observations, count)]

    def _best(
        self,
        inputs: np.ndarray,
        seen: Sequence[int],
        free: Sequence[int],
        observations: Sequence[Observation],
        count: int,
    ) -> list[int]:
        """Rows of the inputs to ask for."""
        import torch
        from botorch import fit_gpytorch_mll
        from botorch.acquisition.multi_objective.logei import (
            qLogNoisyExpectedHypervolumeImprovement,
        )
        from botorch.models import ModelListGP, SingleTaskGP
        from botorch.optim import optimize_acqf_discrete
        from botorch.sampling import SobolQMCNormalSampler
        from gpytorch.mlls import SumMarginalLogLikelihood

        seed = self.search.seed + 7919 * len(observations)
        torch.manual_seed(seed)
        table = torch.tensor(inputs, dtype=torch.double)
        outcomes = torch.tensor(self._turned(observations), dtype=torch.double)
        models = [SingleTaskGP(table[seen], column[:, None]) for column in outcomes.T]
        model = ModelListGP(*models)
        fit_gpytorch_mll(SumMarginalLogLikelihood(model.likelihood, model))
        acquisition = qLogNoisyExpectedHypervolumeImprovement(
            model, ref_point=_reference(model.posterior(table).mean.detach(), outcomes),
            X_baseline=table[seen], prune_baseline=True,
            sampler=SobolQMCNormalSampler(torch.Size([_MC_SAMPLES]), seed=seed),
        )  # fmt: skip
        choices = table[free]
        with torch.no_grad():
            best, _ = optimize_acqf_discrete(acquisition, min(count, len(free)), choices)
        return [free[int((choices - point).abs().sum(dim=1).argmin())] for point in best]

    def _turned(self, observations: Sequence[Observation]) -> np.ndarray:
        """Objectives to maximise, bytes and seconds by their logarithm, shape (n, m)."""
        columns = []
        for objective in self.search.objectives:
            values = np.array([o.values[objective.name] for o in observations], float)
            columns.append(values if objective.maximise else -np.log(values))
        return np.column_stack(columns)


def _reference(predicted: "Tensor", outcomes: "Tensor") -> list[float]:
    """The bench's reference point, as the models see the range of each objective."""
    import torch

    values = torch.cat([predicted, outcomes])
    low, high = values.amin(dim=0), values.amax(dim=0)
    found: list[float] = (high - REFERENCE * (high - low)).tolist()
    return found
