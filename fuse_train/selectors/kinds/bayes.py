"""Selector bayes: one weight per source by Bayesian optimisation of the pool's NLL.

The NLL of fixed weights is convex in them, so gradient descent (selector `constant`) finds the optimum
too; this baseline is here because reviewers of fusion papers ask for it.

Shape suffixes: R rows, M sources.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fuse_train.selectors.kind import SearchedKind
from store_schema.config import StrictModel
from store_schema.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fuse_train.selectors.selectors import Selector

    Floats = npt.NDArray[np.float64]

LEAST_WEIGHT = 1e-3
"""Least weight that is tried, before weights are scaled to sum 1."""


class BayesSection(StrictModel):
    """Selector bayes: one weight per source, found by Bayesian optimisation on valid text."""

    trials: int = Field(default=60, gt=0)
    """Number of weights that are tried."""


class Bayes(SearchedKind):
    """One weight per source, by Bayesian optimisation (optuna, `bayes.trials`) of the pool's NLL on the
    valid split."""

    section = BayesSection
    always_in_fingerprint = True

    def trials(self, options: BayesSection) -> int:
        """See `BayesSection.trials`."""
        return options.trials

    def search(
        self,
        options: BayesSection,
        logprobs_RM: Floats,
        seed: int,
        on_trial: Callable[[int, float], None] | None,
    ) -> Selector:
        """See `SearchedKind.search`."""
        from fuse_train.selectors.selectors import StaticSelector

        best = search_weights(logprobs_RM, trials=options.trials, seed=seed, on_trial=on_trial)
        return StaticSelector(best)


def mixture_nats(weights_M: Floats, logprobs_RM: Floats) -> float:
    """Mean NLL of the labels under fixed weights that sum to 1."""
    import numpy as np

    top_R1 = logprobs_RM.max(1, keepdims=True)
    mass_R = np.exp(logprobs_RM - top_R1) @ weights_M
    return float(-(np.log(mass_R) + top_R1[:, 0]).mean())


def search_weights(
    logprobs_RM: Floats,
    *,
    trials: int,
    seed: int,
    on_trial: Callable[[int, float], None] | None = None,
) -> tuple[float, ...]:
    """The best weights of `trials` that a tree-structured Parzen estimator proposes.

    Uniform weights and each source nearly alone are tried first, so the result is never worse.

    Args:
        logprobs_RM: Nats of labels that every source knows.
        trials: How many weights are tried.
        seed: Of the proposals; the same seed finds the same weights.
        on_trial: Called with the number of trials done and the lowest NLL so far, nats per row.

    Returns:
        [M] weights, sum 1.

    Raises:
        ConfigError: optuna is not installed.

    Source: Bergstra et al. 2011 (TPE), optuna's implementation.
    """
    import numpy as np

    optuna = _optuna()
    num_sources = logprobs_RM.shape[1]
    names = [f"source_{m}" for m in range(num_sources)]

    def scaled(parameters: dict[str, float]) -> Floats:
        weights_M = np.array([parameters[name] for name in names])
        total: Floats = weights_M / weights_M.sum()
        return total

    def objective(trial: Any) -> float:
        for name in names:
            trial.suggest_float(name, LEAST_WEIGHT, 1.0, log=True)
        return mixture_nats(scaled(trial.params), logprobs_RM)

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.enqueue_trial(dict.fromkeys(names, 1.0))
    for name in names:
        study.enqueue_trial(dict.fromkeys(names, LEAST_WEIGHT) | {name: 1.0})

    def report(study: Any, trial: Any) -> None:
        if on_trial is not None:
            on_trial(trial.number + 1, study.best_value)

    study.optimize(objective, n_trials=max(trials, num_sources + 1), callbacks=[report])
    return tuple(scaled(study.best_params).tolist())


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "selector bayes needs optuna, which is not installed",
            where="train.selector",
            hint="pip install optuna, or take selector constant",
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
