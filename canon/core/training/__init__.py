"""How systems learn: one loop, optimisers and schedules, checkpoints, distribution."""

from canon.core.training.fit import Diverged, Interrupted, TrainingConfig, fit

__all__ = ["Diverged", "Interrupted", "TrainingConfig", "fit"]
