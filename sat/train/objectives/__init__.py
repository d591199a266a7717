"""What is minimised: each objective is a module that turns a batch into a loss."""

from sat.train.objectives.base import Objective

__all__ = ["Objective"]
