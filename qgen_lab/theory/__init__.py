"""Typical-case theory of quantized linear models: replica equations and what they predict."""
