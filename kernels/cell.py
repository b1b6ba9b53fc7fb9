"""The LSTM cell, element by element: gates forward, and their pre-activation gradients backward.

c[t] = f * c[t-1] + i * g        h[t] = o * tanh(c[t])
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x, EXACT: tl.constexpr):
    if EXACT:
        e = tl.exp(-tl.abs(x))
        return tl.where(x >= 0, 1.0, e) / (1.0 + e)
    else:  # exp2 and rsqrt are an instruction each, exp and a division look at their arguments' ranges first
        r = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
        return r * r


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    if EXACT:
        e = tl.exp(-2.0 * tl.abs(x))
        t = (1.0 - e) / (1.0 + e)
        t = tl.where(x < 0, -t, t)
        if x.dtype == tl.float32:
            # 1 - e cancels near 0; the Taylor series is exact to half an ulp up to 1/4
            x2 = x * x
            series = x * (1.0 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835)))))
            t = tl.where(tl.abs(x) < 0.25, series, t)
        return t
    else:  # off by an ulp of 1, which 16 bits do not show; 0 at 0
        e = tl.exp2(tl.abs(x) * -2.8853900817779268)
        r = tl.rsqrt(1.0 + e)
        t = (1.0 - e) * r * r
        return tl.where(x < 0, -t, t)


@triton.jit
def cell_forward(a_i, a_f, a_g, a_o, c_prev, EXACT: tl.constexpr):
    """Pre-activations and c[t-1] -> i, f, g, o, c[t], h[t]; all of one shape."""
    i = sigmoid(a_i, EXACT)
    f = sigmoid(a_f, EXACT)
    g = tanh(a_g, EXACT)
    o = sigmoid(a_o, EXACT)
    c = f * c_prev + i * g
    return i, f, g, o, c, o * tanh(c, EXACT)


@triton.jit
def cell_backward(i, f, g, o, c, c_prev, dh, dc, EXACT: tl.constexpr):
    """Gates, states and the gradients of h[t] and c[t], c[t]'s without what h[t] adds -> gradients of the
    pre-activations, of c[t] with it, and of c[t-1]."""
    tanh_c = tanh(c, EXACT)
    dc = dc + dh * o * (1.0 - tanh_c * tanh_c)
    da_i = dc * g * i * (1.0 - i)
    da_f = dc * c_prev * f * (1.0 - f)
    da_g = dc * i * (1.0 - g * g)
    da_o = dh * tanh_c * o * (1.0 - o)
    return da_i, da_f, da_g, da_o, dc, dc * f


@triton.jit
def gates_backward(i, f, g, o, dact_ptr, H: tl.constexpr, mask):
    """The gates, and at dact_ptr their own gradients, H apart -> what these add to those of the pre-activations."""
    d_i = tl.load(dact_ptr, mask=mask, other=0.0).to(i.dtype)
    d_f = tl.load(dact_ptr + H, mask=mask, other=0.0).to(i.dtype)
    d_g = tl.load(dact_ptr + 2 * H, mask=mask, other=0.0).to(i.dtype)
    d_o = tl.load(dact_ptr + 3 * H, mask=mask, other=0.0).to(i.dtype)
    return d_i * i * (1.0 - i), d_f * f * (1.0 - f), d_g * (1.0 - g * g), d_o * o * (1.0 - o)
