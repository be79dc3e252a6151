"""What the CUDA, ROCm and XPU platforms share: Triton kernels, and plumbing over torch's device modules."""
