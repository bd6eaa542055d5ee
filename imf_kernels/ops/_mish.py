"""Mish in kernels, `mish(z) = z tanh(softplus z)`."""

from __future__ import annotations

from imf_kernels.ops._triton import jit, tl


@jit
def mish(b_z):
    """Mish and its derivative, from `tanh(softplus z) = n / (n + 2)` with `n = e^z (e^z + 2)`."""
    b_e = tl.exp(tl.minimum(b_z, 20.0))  # from there on the tanh is 1, to float64's last digit
    b_n = b_e * (b_e + 2)
    b_tanh = b_n / (b_n + 2)
    b_slope = b_tanh + 4 * b_z * (b_e / (b_n + 2)) * ((b_e + 1) / (b_n + 2))
    return b_z * b_tanh, b_slope
