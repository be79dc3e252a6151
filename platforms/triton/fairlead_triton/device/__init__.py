"""Plumbing that accelerators share, over the part of torch.cuda and torch.xpu that is alike in both."""
