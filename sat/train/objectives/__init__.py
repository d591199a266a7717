"""Training objectives: modules that turn a batch into a loss."""

from sat.train.objectives.base import Objective

__all__ = ["Objective"]
