"""The comparison of the SFA paper (https://arxiv.org/abs/2501.05559), on data that come inside packages."""
