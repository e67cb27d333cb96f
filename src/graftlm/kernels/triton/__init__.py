"""Operators written in Triton for CUDA: one file for each family, checked on a CPU by its interpreter."""
