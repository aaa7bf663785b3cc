"""Merging inside any PyTorch training loop."""

from mergekit_cl.adapters.torch.sfa import SFA

__all__ = ["SFA"]
