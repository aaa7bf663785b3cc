"""Sequential Fine-tuning with Averaging in any PyTorch training loop, and what it is compared with."""

from mergekit_cl.adapters.torch.ewc import EWC
from mergekit_cl.adapters.torch.l2_anchor import L2Anchor
from mergekit_cl.adapters.torch.rehearsal import Rehearsal
from mergekit_cl.adapters.torch.running_average import RunningAverage
from mergekit_cl.adapters.torch.sfa import SFA

__all__ = ["EWC", "SFA", "L2Anchor", "Rehearsal", "RunningAverage"]
