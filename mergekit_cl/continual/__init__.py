"""The framework-free parts of continual learning: how well a sequence of tasks was learned and kept."""

from mergekit_cl.continual.metrics import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
)

__all__ = ["average_accuracy", "backward_transfer", "forgetting", "forward_transfer", "learning_accuracy"]
