"""The evidential bottleneck: logits -> z_q, KL, code indices, entropy, uncertainty, and the way back.

    python kernels.py            # checks against references, then prints the benchmark table

Shapes: logits z_e (..., K) and codebook M (K, D) go in; z_q (..., D) and one number a position come out.
With c = max_logit, e_k = exp(min(z_k, c)), alpha_k = e_k + 1 (Eq. 2), E = sum_k e_k, S = sum_k alpha_k = K + E:

    pi    = alpha / S                                       mean of Dir(alpha), the code probabilities (App. B)
    y     = softmax((ln alpha + gumbel) / tau)              relaxed one-hot sample of Cat(pi) (Alg. 1); ln S drops out
    z_q   = y M                                             (D)
    KL    = KL[Dir(alpha) || Dir(1, ..., 1)]                nats (App. A)
    H     = -sum_k pi_k ln pi_k                             entropy of pi, nats (Fig. 2)
    u     = K / S                                           uncertainty, in (0, 1] (Fig. 3)

The textbook KL subtracts log-gammas of size S ln S and loses every digit in float32 once the evidence is large. Here
Stirling's series is written out and the large terms are cancelled on paper. With t_k = 1 / alpha_k in (0, 1]:

    KL       = (K - 1/2) ln(S/K) + (E/S)(1/2 + S s(S)) + r(S) - r(K) + sum_k [(1 - t_k) Q(t_k) + 1/2 ln t_k]
    dKL/dz_k = (e_k/S)(K - (E/S) g(S)) - (1 - t_k) w(t_k)                                     0 where z_k > c

r, s, g are short series in 1/S (`stirling`), Q and w are smooth on [0, 1] and given by polynomials. Nothing of size S
is formed, everything is taken from z in log space, so any finite logit is legal and max_logit may be inf.

dVAE's bottleneck is the same computation with z in place of ln alpha and KL[Cat(pi) || uniform] = ln K - H.

Noise: gumbel = -ln(-ln U), U from the counter-based generator Philox4x32-10 keyed by (seed, step, global element
index): the same on any device, for any block size and number of processes. The Triton kernels recompute it in the
backward and store nothing K wide; the PyTorch path keeps y. One call yields the uniforms of four neighbouring codes.
"""
import functools
import math
import os
import shutil
import sys
from typing import NamedTuple, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:                                                                # the PyTorch path does without
    triton, jit = None, lambda f: f

    class tl:
        constexpr = None

# Q(t) = q(t) / (1 - t) with q(t) = (a - 1) psi(a) - lnG(a) - a + ln(a)/2 + 1, a = 1/t;
# w(t) = (1 - e psi'(1 + e)) / t, e = (1 - t)/t; ln(1 + p) = p L(p), for both compilers, whose own log1p is slower.
# Least-squares Chebyshev fits on [0, 1]: error at most 1.3e-8, 3e-9 and 6e-9.
Q_POLY = (-0.4189385436, -0.08560396567, -0.002294685722, 0.008979944843, 0.0002471219712, -0.004895921131,
          0.003266177207, -0.0007601397698)
W_POLY = (0.5000000029, 0.3333326163, 0.1666959413, 0.03286202824, -0.02941518933, -0.04274620046, 0.0791081593,
          -0.05878635332, 0.02267036001, -0.003721365682)
L_POLY = (0.9999999954, -0.4999990399, 0.3333000404, -0.2495455887, 0.1967811726, -0.1531186311, 0.1061426469,
          -0.05706420081, 0.01990716095, -0.00325637848)
PHILOX_MUL, PHILOX_ADD, LOW32 = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 0xFFFFFFFF
LARGEST = 1e30  # max_logit = inf acts as this, so that (K - 1) z, the KL of one huge logit, still fits in float32


class Quantized(NamedTuple):
    """What a bottleneck returns for logits (..., K) and a codebook (K, D); gradients flow through z_q and kl."""
    z_q: Tensor          # (..., D)
    kl: Tensor           # (...)  nats
    indices: Tensor      # (...)  int64, argmax of the logits
    entropy: Tensor      # (...)  nats, of pi
    uncertainty: Tensor  # (...)  K / S in (0, 1]; nan for the softmax, which has no evidence


# --------------------------------------------------------------------------------------------------- Triton: the pieces

# ln(1 + f) = f + f^2 N(f) on [1/sqrt 2 - 1, sqrt 2 - 1]: relative error at most 5e-9.
LN_POLY = (-0.4999998829, 0.3333332427, -0.2500158521, 0.2000206242, -0.1660911835, 0.1418020923, -0.1324101729,
          0.1291354441, -0.07637512499)


@jit
def polynomial_tile(t, C: tl.constexpr, N: tl.constexpr):
    value = C[N - 1] * t + C[N - 2]
    for i in tl.static_range(2, N):
        value = value * t + C[N - 1 - i]
    return value


@jit
def exp(x):
    return tl.exp2(x * 1.4426950408889634)                                         # one instruction: denormals are 0


@jit
def log(x, C: tl.constexpr, N: tl.constexpr):
    """ln x of normal x > 0, (1 + f) 2^i with f in [1/sqrt 2 - 1, sqrt 2 - 1]: libdevice's without its special cases."""
    bits = x.to(tl.int32, bitcast=True)
    i = (bits - 0x3F3504F3) >> 23
    f = (bits - (i << 23)).to(tl.float32, bitcast=True) - 1.0
    return i.to(tl.float32) * 0.6931471805599453 + (f * f * polynomial_tile(f, C, N) + f)


HAS_LG2 = tl.constexpr(torch.version.hip is None and os.environ.get("TRITON_INTERPRET") != "1") if triton else None


@jit
def quick_log(x, C: tl.constexpr, N: tl.constexpr):
    """ln x in two instructions on NVIDIA's GPUs: off by at most 1.7e-7 + 1.7e-7 |ln x| (PTX ISA, lg2.approx)."""
    if HAS_LG2:
        return 0.6931471805599453 * tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x],
                                                              dtype=tl.float32, is_pure=True, pack=1)
    else:
        return log(x, C, N)


@jit
def gumbel_tile(seed, step, group, ROWS: tl.constexpr, COLUMNS: tl.constexpr, C: tl.constexpr, N: tl.constexpr):
    """Gumbel noise (ROWS, COLUMNS) from the counters of its groups of four columns, (ROWS, COLUMNS / 4) int64."""
    low, high, zero = group.to(tl.uint32), (group >> 32).to(tl.uint32), (group * 0).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero + step.to(tl.uint32), zero + (step >> 32).to(tl.uint32))
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, COLUMNS))  # w0, w1, w2, w3 side by side
    u = ((words >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07               # 2^-23: u in [2^-24, 1 - 2^-24]
    return -quick_log(-log(u, C, N), C, N)                                         # near u = 1 only `log` will do


@jit
def score_tile(z, EVIDENTIAL: tl.constexpr, L: tl.constexpr, L_N: tl.constexpr):
    """a = ln alpha, t = 1 / alpha and 1 - t of clamped logits; for the softmax a = z and the others are not used."""
    if EVIDENTIAL:
        p = exp(-tl.abs(z))
        inverse = 1.0 / (1.0 + p)
        return (tl.maximum(z, 0.0) + p * polynomial_tile(p, L, L_N), tl.where(z > 0, p, 1.0) * inverse,
                tl.where(z > 0, 1.0, p) * inverse)
    else:
        return z, z, z


@jit
def stirling_row(v, K: tl.constexpr):
    """r(S), S s(S) and g(S) from v = 1/S: see `stirling`."""
    r = v * (1 / 12 - v * v * (1 / 360 - v * v / 1260))
    p = v * (1 / 12 - v * v * (1 / 120 - v * v / 252))
    g = 0.5 + v * (1 / 6 - v * v * (1 / 30 - v * v / 42))
    if K < 8:
        S = 1.0 / tl.maximum(v, 1e-3)
        w = 1.0 / (S + 8)
        r_low = w * (1 / 12 - w * w * (1 / 360 - w * w / 1260))
        p_low = w * w * (1 / 12 - w * w * (1 / 120 - w * w / 252))
        g_low = w * w * (0.5 + w * (1 / 6 - w * w * (1 / 30 - w * w / 42)))
        for i in tl.static_range(8):
            x = S + i
            log = log1p_row(1.0 / x)
            r_low += (x + 0.5) * log - 1.0
            p_low += (1.0 / x + 1.0 / (x + 1.0)) * 0.5 - log
            g_low += 1.0 / (x * x * (x + 1.0))
        r, p, g = tl.where(v > 1e-3, r_low, r), tl.where(v > 1e-3, S * p_low, p), tl.where(v > 1e-3, S * S * g_low, g)
    return r, p, g


@jit
def log1p_row(x):
    w = 1.0 + x
    return tl.where(w == 1.0, x, tl.log(w) * x / tl.where(w == 1.0, 1.0, w - 1.0))  # Kahan's: the rounding of w cancels


# ------------------------------------------------------------------------------------------------------ Triton: forward

@jit
def forward_kernel(logits, codebook, z_q, kl, indices, entropy, u, saved, tau, key, rows, stride_p, stride_k,
                   max_logit, r_k, ln_k, K: tl.constexpr, D: tl.constexpr, EVIDENTIAL: tl.constexpr,
                   BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, L: tl.constexpr,
                   L_N: tl.constexpr, LN: tl.constexpr, LN_N: tl.constexpr, Q: tl.constexpr, Q_N: tl.constexpr,
                   PRECISION: tl.constexpr):
    """Each program streams BLOCK_P rows of logits once, in tiles of BLOCK_K codes, as flash attention streams its keys.

    Running, with m = max(z, 0), the reference of the sums over pi (softmax: max z), v = a + gumbel and top = max v:
        X = sum e^(z - m),  T = sum e^(z - m) (a - m),  A = sum a,  C = sum (1 - t) Q(t)
        norm = sum e^((v - top)/tau),  acc = sum e^((v - top)/tau) M_k
    and at the end z_q = acc / norm, then H, ln(S/K) and KL from the sums, as at the head of this file.
    Kept for the backward: m, ln S - m, K - (E/S) g(S) (softmax: H), top and 1 / norm.
    Bytes: the logits once, and D + 10 numbers a row; nothing K wide is written.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = row < rows
    d = tl.arange(0, BLOCK_D)
    seed, step, first = tl.load(key), tl.load(key + 1), tl.load(key + 2)
    inv_tau = tl.minimum(1.0 / tl.load(tau), 1e30)
    m = tl.full((BLOCK_P,), 0.0 if EVIDENTIAL else -1e30, tl.float32)
    top, best = tl.full((BLOCK_P,), float("-inf"), tl.float32), tl.full((BLOCK_P,), float("-inf"), tl.float32)
    best_k = tl.zeros((BLOCK_P,), tl.int32)
    X, T, A, C, norm = m * 0, m * 0, m * 0, m * 0, m * 0
    acc = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        valid = inside[:, None] if K % BLOCK_K == 0 else inside[:, None] & (k < K)[None, :]
        tile = logits + row[:, None] * stride_p + k[None, :] * stride_k
        raw = tl.load(tile, mask=valid, other=float("-inf")).to(tl.float32)
        peak = tl.max(raw, 1)                                                      # argmax, the first of equals
        best_k = tl.where(peak > best, tl.min(tl.where(raw == peak[:, None], k[None, :], K), 1), best_k)
        best = tl.maximum(best, peak)
        z = tl.maximum(tl.minimum(raw, max_logit), -1e30)                          # (BLOCK_P, BLOCK_K)
        a, t, one_minus_t = score_tile(z, EVIDENTIAL, L, L_N)
        m_new = tl.maximum(m, tl.minimum(peak, max_logit))
        shrink = exp(m - m_new)
        e = exp(z - m_new[:, None])                                                # e^(z - m), 0 beyond K
        T = shrink * (T + (m - m_new) * X) + tl.sum(e * (a - m_new[:, None]), 1)
        X = shrink * X + tl.sum(e, 1)
        m = m_new
        if EVIDENTIAL:                                                             # a = 0 and 1 - t = 0 beyond K
            A += tl.sum(a, 1)
            C += tl.sum(one_minus_t * polynomial_tile(t, Q, Q_N), 1)
        if D > 0:
            group = (first + row)[:, None] * ((K + 3) // 4) + (k0 // 4 + tl.arange(0, BLOCK_K // 4))[None, :]
            v = a + gumbel_tile(seed, step, group, BLOCK_P, BLOCK_K, LN, LN_N)
            if K % BLOCK_K:
                v = tl.where((k < K)[None, :], v, float("-inf"))
            top_new = tl.maximum(top, tl.max(v, 1))
            y = exp((v - top_new[:, None]) * inv_tau)                              # Alg. 1
            shrink = exp((top - top_new) * inv_tau)
            codes = tl.load(codebook + k[:, None] * D + d[None, :], mask=(k < K)[:, None] & (d < D)[None, :], other=0.0)
            norm = shrink * norm + tl.sum(y, 1)
            acc = acc * shrink[:, None] + tl.dot(y, codes, input_precision=PRECISION)
            top = top_new
    X = tl.where(inside, X, 1.0)
    if EVIDENTIAL:                                                                 # alpha = e^z + 1: the ones come last
        ones = exp(-m)
        h = tl.log(X + K * ones) - (T + ones * (A - K * m)) / (X + K * ones)
        C -= 0.5 * A
    else:
        h = tl.log(X) - T / X
    if EVIDENTIAL:
        x = exp(tl.minimum(m, 60.0)) * X / K                                       # E/K
        ln_sk = tl.where(m > 60, m + tl.log(X / K), log1p_row(x))
        scale = tl.where(m > 60, tl.log(X), (ln_sk + ln_k) - m)
        share = tl.where(m > 60, 1.0, x / (1.0 + x))                               # E/S
        r, p, g = stirling_row(exp(-ln_sk) / K, K)
        slope = K - share * g
        tl.store(kl + row, (K - 0.5) * ln_sk + share * (0.5 + p) + (r - r_k) + C, mask=inside)
        tl.store(u + row, exp(-ln_sk), mask=inside)
    else:
        scale, slope = tl.log(X), h
        tl.store(kl + row, ln_k - h, mask=inside)
        tl.store(u + row, m * float("nan"), mask=inside)
    tl.store(entropy + row, h, mask=inside)
    tl.store(indices + row, best_k.to(tl.int64), mask=inside)
    tl.store(saved + row * 5, m, mask=inside)
    tl.store(saved + row * 5 + 1, scale, mask=inside)
    tl.store(saved + row * 5 + 2, slope, mask=inside)
    if D > 0:
        tl.store(saved + row * 5 + 3, top, mask=inside)
        tl.store(saved + row * 5 + 4, 1.0 / norm, mask=inside)
        z_q_tile = z_q + row[:, None] * D + d[None, :]
        tl.store(z_q_tile, acc / norm[:, None], mask=inside[:, None] & (d < D)[None, :])


# ----------------------------------------------------------------------------------------------------- Triton: backward

@jit
def backward_kernel(logits, codebook, dz_q, dkl, inner, saved, dlogits, dcodebook, tau, key, rows, rows_a_program,
                    stride_p, stride_k, max_logit, K: tl.constexpr, D: tl.constexpr, EVIDENTIAL: tl.constexpr,
                    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, L: tl.constexpr,
                    L_N: tl.constexpr, LN: tl.constexpr, LN_N: tl.constexpr, W: tl.constexpr, W_N: tl.constexpr,
                    PRECISION: tl.constexpr):
    """Each program takes one tile of BLOCK_K codes down a stretch of rows; y is recomputed from top and 1 / norm.

        y_k      = e^((v_k - top)/tau) / norm,   dL/da_k = y_k (<dz_q, M_k> - inner) / tau,   inner = <dz_q, z_q>
        dL/dz_k  = (1 - t_k) dL/da_k + dkl [(e_k/S)(K - (E/S) g(S)) - (1 - t_k) w(t_k)]           0 where z_k > c
        softmax:   dL/da_k + dkl pi_k (ln pi_k + H)
        dL/dM_k  = sum over rows of y_k dz_q
    dM stays in registers over the stretch and is written once, to this stretch's own (K, D) slice: no locks, and the
    slices are added in a fixed order. Bytes: the logits read once, their gradient written once, D + 7 numbers a row
    and tile.
    """
    k0 = tl.program_id(0) * BLOCK_K
    k, d = k0 + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    here = (k < K)[:, None] & (d < D)[None, :]
    seed, step, first = tl.load(key), tl.load(key + 1), tl.load(key + 2)
    inv_tau = tl.minimum(1.0 / tl.load(tau), 1e30)
    if D > 0:
        codes = tl.load(codebook + k[:, None] * D + d[None, :], mask=here, other=0.0)   # (BLOCK_K, BLOCK_D)
    acc = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    begin = tl.program_id(1).to(tl.int64) * rows_a_program
    for offset in range(0, rows_a_program, BLOCK_P):
        row = begin + offset + tl.arange(0, BLOCK_P)
        inside = row < rows
        valid = inside[:, None] if K % BLOCK_K == 0 else inside[:, None] & (k < K)[None, :]
        tile = logits + row[:, None] * stride_p + k[None, :] * stride_k
        raw = tl.load(tile, mask=valid, other=0.0).to(tl.float32)
        z = tl.maximum(tl.minimum(raw, max_logit), -1e30)                          # (BLOCK_P, BLOCK_K)
        a, t, one_minus_t = score_tile(z, EVIDENTIAL, L, L_N)
        m = tl.load(saved + row * 5, mask=inside, other=0.0)
        scale = tl.load(saved + row * 5 + 1, mask=inside, other=0.0)
        slope = tl.load(saved + row * 5 + 2, mask=inside, other=0.0)
        upstream = tl.load(dkl + row, mask=inside, other=0.0)
        ln_share = (z - m[:, None]) - scale[:, None]                               # ln(e_k / S); softmax: ln pi_k
        if EVIDENTIAL:
            dz = exp(ln_share) * (upstream * slope)[:, None]
            dz -= upstream[:, None] * one_minus_t * polynomial_tile(t, W, W_N)
        else:
            dz = upstream[:, None] * exp(ln_share) * (ln_share + slope[:, None])
        if D > 0:
            top = tl.load(saved + row * 5 + 3, mask=inside, other=1e30)
            inv_norm = tl.load(saved + row * 5 + 4, mask=inside, other=1.0)
            dzq = tl.load(dz_q + row[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
            group = (first + row)[:, None] * ((K + 3) // 4) + (k0 // 4 + tl.arange(0, BLOCK_K // 4))[None, :]
            v = a + gumbel_tile(seed, step, group, BLOCK_P, BLOCK_K, LN, LN_N)
            y = exp((v - top[:, None]) * inv_tau) * inv_norm[:, None]              # rows beyond the last: dz_q = 0
            dot = tl.dot(dzq, tl.trans(codes), input_precision=PRECISION)
            da = y * (dot - tl.load(inner + row, mask=inside, other=0.0)[:, None]) * inv_tau
            dz += da * one_minus_t if EVIDENTIAL else da
            acc += tl.dot(tl.trans(y), dzq, input_precision=PRECISION)
        dz = tl.where(raw > max_logit, 0.0, dz)
        tl.store(dlogits + row[:, None] * K + k[None, :], dz.to(dlogits.dtype.element_ty), mask=valid)
    if D > 0:
        tl.store(dcodebook + (tl.program_id(1) * K + k)[:, None] * D + d[None, :], acc, mask=here)


# ----------------------------------------------------------------------------------------------------- Triton: launches

def tiles(kernel, D: int) -> dict:
    """Tile sizes for a code dimension D: no register is spilled up to D = 64 on sm_80 and sm_90 (a test counts)."""
    sizes = (((64, 16, 4), (32, 32, 4), (32, 16, 4)) if kernel is forward_kernel else
             ((16, 64, 4), (16, 32, 2), (16, 32, 4)))
    P, K, warps = sizes[0 if D <= 16 else 1 if D <= 64 else 2]
    return dict(BLOCK_P=P, BLOCK_K=K, BLOCK_D=max(16, triton.next_power_of_2(D)), num_warps=warps,
                num_stages=2 if kernel is forward_kernel else 1, enable_fp_fusion=True)


def stirling_remainder(K: int) -> float:
    """r(K) = lnG(K) - [(K - 1/2) ln K - K + ln(2 pi)/2]."""
    return math.lgamma(K) - ((K - 0.5) * math.log(K) - K + 0.5 * math.log(2 * math.pi))


def triton_forward(logits, codebook, tau, key, max_logit: float, evidential: bool):
    (P, K), D, new = logits.shape, codebook.shape[1], codebook.new_empty
    out = new(P, D), new(P), new(P, dtype=torch.int64), new(P), new(P), new(P, 5)
    size = tiles(forward_kernel, D)
    if P:
        forward_kernel[(triton.cdiv(P, size["BLOCK_P"]),)](
            logits, codebook, *out, tau, key, P, *logits.stride(), max_logit, stirling_remainder(K), math.log(K), K, D,
            evidential, L=L_POLY, L_N=len(L_POLY), LN=LN_POLY, LN_N=len(LN_POLY), Q=Q_POLY, Q_N=len(Q_POLY),
            PRECISION="tf32x3", **size)
    return *out, new(P, 0)


def triton_backward(dz_q, dkl, logits, codebook, tau, key, z_q, saved, max_logit: float, evidential: bool):
    (P, K), D = logits.shape, codebook.shape[1]
    dlogits, size = torch.empty(P, K, dtype=logits.dtype, device=logits.device), tiles(backward_kernel, D)
    across = triton.cdiv(K, size["BLOCK_K"])
    down = max(1, min(triton.cdiv(P, size["BLOCK_P"]), 1024 // across))              # programs along the rows
    rows_a_program = triton.cdiv(triton.cdiv(P, down), size["BLOCK_P"]) * size["BLOCK_P"]
    dcodebook = codebook.new_empty(down, K, D)
    backward_kernel[(across, down)](
        logits, codebook, dz_q.contiguous(), dkl.contiguous(), (dz_q * z_q).sum(-1), saved, dlogits, dcodebook, tau,
        key, P, rows_a_program, *logits.stride(), max_logit, K, D, evidential, L=L_POLY,
        L_N=len(L_POLY), LN=LN_POLY, LN_N=len(LN_POLY), W=W_POLY, W_N=len(W_POLY), PRECISION="tf32x3", **size)
    return dlogits, dcodebook.sum(0)


# --------------------------------------------------------------------------------------- operators and public functions

@torch.library.custom_op("edvae::quantize", mutates_args=())
def quantize_op(logits: Tensor, codebook: Tensor, tau: Tensor, key: Tensor, max_logit: float, evidential: bool,
                backend: str) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if backend == "triton":
        return triton_forward(logits, codebook, tau, key, max_logit, evidential)
    with torch.autocast(logits.device.type, enabled=False):
        y = torch.empty(logits.shape, dtype=codebook.dtype, device=logits.device)
        parts = by_rows(forward_rows, (logits, y), codebook, (1 / tau).clamp(max=1e30), key, max_logit, evidential)
        return *(x[0] if len(x) == 1 else torch.cat(x) for x in zip(*parts)), y


@quantize_op.register_fake
def _(logits, codebook, tau, key, max_logit, evidential, backend):
    (P, K), D = logits.shape, codebook.shape[1]
    new, kept = codebook.new_empty, (5, 0) if backend == "triton" else (2, K)       # saved row numbers; y
    return new(P, D), new(P), new(P, dtype=torch.int64), new(P), new(P), new(P, kept[0]), new(P, kept[1])


@torch.library.custom_op("edvae::quantize_backward", mutates_args=())
def quantize_backward_op(dz_q: Tensor, dkl: Tensor, logits: Tensor, codebook: Tensor, tau: Tensor, key: Tensor,
                         z_q: Tensor, entropy: Tensor, saved: Tensor, y: Tensor, max_logit: float, evidential: bool,
                         backend: str) -> Tuple[Tensor, Tensor]:
    if backend == "triton":
        return triton_backward(dz_q, dkl, logits, codebook, tau, key, z_q, saved, max_logit, evidential)
    with torch.autocast(logits.device.type, enabled=False):
        dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        by_row = logits, dlogits, dz_q, dkl, z_q, entropy, saved, y
        inv_tau = (1 / tau).clamp(max=1e30)
        return dlogits, sum(by_rows(backward_rows, by_row, codebook, inv_tau, max_logit, evidential))


@quantize_backward_op.register_fake
def _(dz_q, dkl, logits, codebook, *_):
    return logits.new_empty(logits.shape), torch.empty_like(codebook)


def _save(ctx, inputs, output):
    logits, codebook, tau, key, *ctx.options = inputs
    z_q, _, _, entropy, _, *kept = output
    ctx.save_for_backward(logits, codebook, tau, key, z_q, entropy, *kept)
    ctx.set_materialize_grads(False)                                               # no zeros the size of y


def _backward(ctx, dz_q, dkl, *_):
    z_q, entropy = ctx.saved_tensors[4:6]
    dz_q, dkl = (torch.zeros_like(x) if g is None else g for g, x in ((dz_q, z_q), (dkl, entropy)))
    dlogits, dcodebook = quantize_backward_op(dz_q, dkl, *ctx.saved_tensors, *ctx.options)
    return dlogits, dcodebook, None, None, None, None, None


quantize_op.register_autograd(_backward, setup_context=_save)


def _quantize(logits, codebook, tau, max_logit, seed, backend, evidential) -> Quantized:
    shape, (K, D) = logits.shape[:-1], codebook.shape
    if logits.shape[-1] != K:
        raise ValueError(f"the codebook holds {K} codes but the logits' last dimension is {logits.shape[-1]}")
    backend = resolve_backend(backend, logits.device)
    dtype = torch.float64 if codebook.dtype == torch.float64 else torch.float32  # float32 inside whatever autocast says
    tau = torch.as_tensor(tau, dtype=dtype, device=logits.device)
    key = seed if isinstance(seed, Tensor) else torch.tensor([seed, 0, 0], device=logits.device)
    z_q, kl, indices, entropy, u, *_ = quantize_op(logits.reshape(-1, K), codebook.to(dtype), tau, key,
                                                  check(K, max_logit), evidential, backend)
    return Quantized(z_q.view(*shape, D), kl.view(shape), indices.view(shape), entropy.detach().view(shape),
                     u.detach().view(shape))


def check(K: int, max_logit: float) -> float:
    """The clamp that the arithmetic uses; ValueError for a max_logit or K that means nothing."""
    if K < 2 or not max_logit > -math.inf:
        raise ValueError(f"needs at least 2 codes and a max_logit that is a number or inf, not {K} and {max_logit}")
    return min(float(max_logit), LARGEST)


def resolve_backend(backend: str, device) -> str:
    """"auto" -> "triton" on CUDA, else "torch"; ValueError where the wish cannot be met."""
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend {backend!r} is not one of auto, triton, torch")
    cuda = torch.device(device).type == "cuda"
    if backend == "triton" and not (triton and (cuda or os.environ.get("TRITON_INTERPRET") == "1")):
        raise ValueError(f"the triton backend needs {'a GPU' if triton else 'the package triton'}; use auto or torch")
    return "triton" if backend == "triton" or backend == "auto" and cuda and triton else "torch"


def evidential_quantize(logits: Tensor, codebook: Tensor, tau, max_logit: float = 20.0, seed=0,
                        backend: str = "auto") -> Quantized:
    """EdVAE's bottleneck: logits (..., K), codebook (K, D) -> Quantized; the equations stand at the head of this file.

    tau: temperature, > 0, a number or a 0-dim tensor. max_logit: the clamp c, a number or inf. seed: an int, or an
    int64 tensor (seed, step, first row) on the logits' device, for other noise at each step and on each process.
    Computes in float32 (float64 if the codebook is), whatever autocast says; bf16 logits are accepted.
    Raises ValueError if the shapes do not fit or the backend is not there. Source: EdVAE Eq. 2, 6, 8, Alg. 1, App. A.
    """
    return _quantize(logits, codebook, tau, max_logit, seed, backend, evidential=True)


def gumbel_quantize(logits: Tensor, codebook: Tensor, tau, max_logit: float = math.inf, seed=0,
                    backend: str = "auto") -> Quantized:
    """dVAE's bottleneck: as evidential_quantize with pi = softmax(logits) and kl = KL[Cat(pi) || uniform] = ln K - H.

    Source: Ramesh et al. 2021; Jang et al. 2017. The uncertainty is nan: a softmax has no evidence to be unsure of.
    """
    return _quantize(logits, codebook, tau, max_logit, seed, backend, evidential=False)


class _DirichletKL(torch.autograd.Function):
    """(P, K) logits to (P) nats, with the closed-form backward."""

    @staticmethod
    def forward(ctx, logits, max_logit):
        z = logits.clamp(max=max_logit)
        m = z.amax(-1)
        ln_sk, rest = row_scale(z, m, evidential=True)
        ctx.save_for_backward(logits, m, rest)
        ctx.max_logit = max_logit
        return kl_rows(*score(z), ln_sk)

    @staticmethod
    def backward(ctx, dkl):
        logits, m, rest = ctx.saved_tensors
        z = logits.clamp(max=ctx.max_logit)
        dz = dkl[:, None] * kl_grad_rows(z, *score(z)[1:], m, rest)
        return torch.where(logits > ctx.max_logit, 0.0, dz), None


def dirichlet_kl(logits: Tensor, max_logit: float = 20.0, backend: str = "auto") -> Tensor:
    """KL[Dir(exp(min(logits, max_logit)) + 1) || Dir(1)]: (..., K) -> (...), nats, differentiable. EdVAE App. A.

    float32 inside (float64 for float64 logits); error below 1e-6 max(1, KL) for any finite logits and any max_logit.
    """
    K, max_logit = logits.shape[-1], check(logits.shape[-1], max_logit)
    z = logits.reshape(-1, K)
    if resolve_backend(backend, logits.device) == "triton":
        key = torch.zeros(3, dtype=torch.int64, device=z.device)
        none = torch.empty(K, 0, device=z.device)                                  # no codes: no sample, the KL alone
        return quantize_op(z, none, key[0].float(), key, max_logit, True, "triton")[1].view(logits.shape[:-1])
    return _DirichletKL.apply(z.to(torch.promote_types(z.dtype, torch.float32)), max_logit).view(logits.shape[:-1])


def textbook_kl(logits: Tensor, max_logit: float = 20.0) -> Tensor:
    """The same KL as torch.distributions has it, (..., K) -> (...), nats: the arithmetic behind the paper's numbers.

    In float32 it loses all digits at large evidence: at a logit of 20 its gradient is 0. `--kl textbook` uses it.
    """
    alpha = torch.exp(logits.float().clamp(max=max_logit)) + 1                     # Eq. 2
    prior = torch.distributions.Dirichlet(torch.ones_like(alpha), validate_args=False)
    return torch.distributions.kl_divergence(torch.distributions.Dirichlet(alpha, validate_args=False), prior)


# ---------------------------------------------------------------------------------------------- plain PyTorch path

def polynomial(coefficients, t: Tensor) -> Tensor:
    value = torch.full_like(t, coefficients[-1])
    for c in coefficients[-2::-1]:
        value = value * t + c
    return value


def stirling(inv_s: Tensor, K: int):
    """r(S), S s(S) and g(S) from 1/S: what remains of lnG, psi and psi' after their leading terms.

    lnG(x) = (x - 1/2) ln x - x + ln(2 pi)/2 + r(x);   psi(x) = ln x - 1/(2x) - s(x);   psi'(x) = 1/x + g(x)/x^2.
    S >= K; below 8 the series are not good enough and the recurrences climb from S to S + 8 first.
    """
    def series(v):
        return (v * (1 / 12 - v * v * (1 / 360 - v * v / 1260)),
                v * (1 / 12 - v * v * (1 / 120 - v * v / 252)),
                0.5 + v * (1 / 6 - v * v * (1 / 30 - v * v / 42)))
    r, p, g = series(inv_s)
    if K < 8:
        S = 1 / inv_s.clamp(min=1e-3)
        r_low, p_low, g_low = series(1 / (S + 8))
        p_low, g_low = p_low / (S + 8), g_low / (S + 8) ** 2                       # s(S + 8), g(S + 8)/(S + 8)^2
        for i in range(8):
            x = S + i
            r_low = r_low + (x + 0.5) * torch.log1p(1 / x) - 1
            p_low = p_low + (1 / x + 1 / (x + 1)) / 2 - torch.log1p(1 / x)
            g_low = g_low + 1 / (x * x * (x + 1))
        low = inv_s > 1e-3
        r, p, g = torch.where(low, r_low, r), torch.where(low, S * p_low, p), torch.where(low, S * S * g_low, g)
    return r, p, g


def row_scale(z: Tensor, m: Tensor, evidential: bool):
    """ln(S/K), and ln(S/K) - m, from z = min(logits, c) (P, K) and m = max_k z_k (P): two of (P).

    S = K + sum_k e^z_k (softmax: sum_k e^z_k). The second keeps z_k - ln S precise at large z, the first at small E.
    """
    total = torch.exp(z - m[:, None]).sum(-1) / z.shape[-1]                        # E = K e^m total
    if not evidential:
        return m + torch.log(total), torch.log(total)
    ln_sk = torch.where(m > 60, m + torch.log(total), torch.log1p(torch.exp(m.clamp(max=60)) * total))
    return ln_sk, torch.where(m > 60, torch.log(total), ln_sk - m)


def score(z: Tensor):
    """a = ln alpha, t = 1 / alpha and 1 - t of clamped logits z; compiled, all from one exponential."""
    if not torch.compiler.is_compiling():
        return F.softplus(z), torch.sigmoid(-z), torch.sigmoid(z)
    p = torch.exp(-z.abs())
    low = p / (1 + p)                                                              # the smaller of t and 1 - t
    a = z.clamp(min=0) + p * polynomial(L_POLY, p)
    return a, torch.where(z > 0, low, 1 - low), torch.where(z > 0, 1 - low, low)


def kl_rows(a: Tensor, t: Tensor, one_minus_t: Tensor, ln_sk: Tensor) -> Tensor:
    """KL[Dir(alpha) || Dir(1)] of score(z), three of (P, K), and ln(S/K) (P): (P), nats."""
    K = a.shape[-1]
    r_s, p, _ = stirling(torch.exp(-ln_sk) / K, K)
    per_code = one_minus_t * polynomial(Q_POLY, t) - 0.5 * a                       # (1 - t) Q(t) + 1/2 ln t
    return (K - 0.5) * ln_sk - torch.expm1(-ln_sk) * (0.5 + p) + (r_s - stirling_remainder(K)) + per_code.sum(-1)


def kl_grad_rows(z: Tensor, t: Tensor, one_minus_t: Tensor, m: Tensor, rest: Tensor) -> Tensor:
    """dKL/dz of clamped logits z with their t, 1 - t (P, K), and m, ln(S/K) - m (P): (P, K)."""
    K, v = z.shape[-1], torch.exp(-m - rest)                                       # v = K/S
    _, _, g = stirling(v / K, K)
    a_s = K - (1 - v) * g                                                          # K - (E/S) g(S)
    e_over_s = torch.exp((z - m[:, None]) - (rest + math.log(K))[:, None])
    return e_over_s * a_s[:, None] - one_minus_t * polynomial(W_POLY, t)


def philox(seed: Tensor, step: Tensor, counter: Tensor):
    """Four random 32-bit words (as int64) for each 64-bit counter: Philox4x32-10 (Salmon et al. 2011), key = seed."""
    k0, k1 = seed & LOW32, (seed >> 32) & LOW32
    c0, c1, c2, c3 = counter & LOW32, (counter >> 32) & LOW32, step & LOW32, (step >> 32) & LOW32
    for _ in range(10):
        p0, p1 = c0 * PHILOX_MUL[0], c2 * PHILOX_MUL[1]                            # 64-bit products, high | low
        c0, c1, c2, c3 = ((p1 >> 32) & LOW32) ^ c1 ^ k0, p1 & LOW32, ((p0 >> 32) & LOW32) ^ c3 ^ k1, p0 & LOW32
        k0, k1 = (k0 + PHILOX_ADD[0]) & LOW32, (k1 + PHILOX_ADD[1]) & LOW32
    return c0, c1, c2, c3


def gumbel_noise(key: Tensor, first, rows: int, K: int) -> Tensor:
    """Gumbel(0, 1) noise (rows, K), never infinite, of global rows first, first + 1, ...; key = (seed, step, ...)."""
    quarter = (K + 3) // 4                                                         # a call of Philox serves four codes
    group = first * quarter + torch.arange(rows * quarter, device=key.device).view(rows, quarter)
    words = torch.stack(philox(key[0], key[1], group), -1).view(rows, 4 * quarter)[:, :K]
    return -torch.log(-torch.log(((words >> 9).float() + 0.5) * 2.0 ** -23))       # of U in [2^-24, 1 - 2^-24]


def relax(logits: Tensor, y: Tensor, m: Tensor, key: Tensor, first: Tensor, inv_tau: Tensor, max_logit: float,
          evidential: bool):
    """Logits (P, K), the global rows from `first` on: fills y (P, K); kl, entropy, u, and ln(S/K) - m (P)."""
    z = logits.to(y.dtype).clamp(max=max_logit)
    a, t, one_minus_t = score(z) if evidential else (z, z, z)                      # ln alpha (Eq. 2), or the logits
    v = a + gumbel_noise(key, first, *z.shape)
    e = torch.exp((v - v.amax(-1, keepdim=True)) * inv_tau)
    y.copy_(e * (1 / e.sum(-1, keepdim=True)))                                     # Alg. 1
    ln_sk, rest = row_scale(z, m, evidential)
    ln_pi = (a - m[:, None]) - (rest + math.log(z.shape[-1]))[:, None]
    entropy = -(torch.exp(ln_pi) * ln_pi).sum(-1)
    if evidential:
        return kl_rows(a, t, one_minus_t, ln_sk), entropy, torch.exp(-ln_sk), rest
    return math.log(z.shape[-1]) - entropy, entropy, torch.full_like(ln_sk, math.nan), rest


def relax_grad(logits, dlogits, y, dy, dkl, m, rest, entropy, inv_tau, max_logit: float, evidential: bool):
    """Fills dlogits (P, K) from dy = <dz_q, M_k> - <dz_q, z_q> (P, K): dL/da_k = y_k dy_k / tau, da/dz = 1 - t_k."""
    z, da = logits.to(y.dtype).clamp(max=max_logit), y * dy * inv_tau
    if evidential:
        _, t, one_minus_t = score(z)
        dz = one_minus_t * da + dkl[:, None] * kl_grad_rows(z, t, one_minus_t, m, rest)
    else:
        ln_pi = (z - m[:, None]) - (rest + math.log(z.shape[-1]))[:, None]
        dz = da + dkl[:, None] * torch.exp(ln_pi) * (ln_pi + entropy[:, None])     # -dH/dz_k = pi_k (ln pi_k + H)
    dlogits.copy_(torch.where(logits > max_logit, 0.0, dz))


def forward_rows(fuse, first, logits, y, codebook, inv_tau, key, max_logit: float, evidential: bool):
    """One block of logits (P, K) whose first row is `first`; fills y: z_q, kl, indices, entropy, u, (m, rest)."""
    m, indices = logits.max(-1)
    m = m.to(codebook.dtype).clamp(max=max_logit)
    kl, entropy, u, rest = fuse(relax)(logits, y, m, key, key[2] + first, inv_tau, max_logit, evidential)
    return y @ codebook, kl, indices, entropy, u, torch.stack([m, rest], 1)


def backward_rows(fuse, first, logits, dlogits, dz_q, dkl, z_q, entropy, saved, y, codebook, inv_tau, max_logit: float,
                  evidential: bool):
    """One block of rows: fills dlogits (P, K) and returns the block's share of dM (K, D).

    sum_k y_k <dz_q, M_k> = <dz_q, z_q>, so the softmax's backward needs no second pass over K.
    """
    dy = torch.addmm((dz_q * z_q).sum(-1, keepdim=True), dz_q, codebook.T, beta=-1)
    fuse(relax_grad)(logits, dlogits, y, dy, dkl, *saved.unbind(1), entropy, inv_tau, max_logit, evidential)
    return y.T @ dz_q


COMPILE = True       # on a CPU with a C++ compiler: torch.compile the PyTorch path from COMPILE_FROM logits up
COMPILE_FROM = 2 ** 20
BLOCK = 2 ** 19          # on a CPU: logits in a block, so that what lies between two operations stays in the cache


@functools.cache
def compiled(fn):
    """torch.compile(fn), or fn itself for good once compiling has failed (no headers of Python, say)."""
    fused, broken = torch.compile(fn, dynamic=False, options={"cpp.enable_floating_point_contract_flag": "fast"}), []

    def call(*args):
        if not broken:
            try:
                return fused(*args)
            except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as e:
                broken.append(e)
                print(f"kernels.py: goes on without torch.compile: {str(e).splitlines()[0][:80]}", file=sys.stderr)
        return fn(*args)
    return call


def by_rows(fn, by_row, *args):
    """fn over blocks of rows of the tensors in by_row; the list of what it returns for each block."""
    rows, K = by_row[0].shape
    on_cpu = by_row[0].device.type == "cpu"
    block = max(1, BLOCK // K) if on_cpu else max(1, rows)
    fast = COMPILE and on_cpu and rows * K >= COMPILE_FROM and shutil.which(os.environ.get("CXX", "g++"))
    fuse = lambda f, n: compiled(f) if fast and n == block else f                  # a last short block runs as it is
    return [fn(functools.partial(fuse, n=min(block, rows - i)), i, *(x[i:i + block] for x in by_row), *args)
            for i in range(0, max(1, rows), block)]


# -------------------------------------------------------------------------------------------------- check and benchmark

def textbook_quantize(logits: Tensor, codebook: Tensor, tau: float, max_logit: float = 20.0):
    """What this file replaces: the same z_q and KL by torch.distributions and autograd."""
    alpha = torch.exp(logits.clamp(max=max_logit)) + 1
    pi = alpha / alpha.sum(-1, keepdim=True)
    y = torch.distributions.RelaxedOneHotCategorical(torch.as_tensor(tau, device=pi.device), probs=pi,
                                                     validate_args=False).rsample()
    return y @ codebook, textbook_kl(logits, max_logit)


def main():
    import time
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}, triton {triton.__version__ if triton else 'not installed'}\n")

    # 1. the exact KL against float64 where float64 is good enough, and both backends against each other
    torch.manual_seed(0)
    z, codebook = 3 * torch.randn(1000, 512, device=device), torch.randn(512, 16, device=device)
    a = z.double().exp() + 1
    Dirichlet = torch.distributions.Dirichlet
    want = torch.distributions.kl_divergence(Dirichlet(a), Dirichlet(torch.ones_like(a)))
    error = ((dirichlet_kl(z) - want) / want).abs().max()
    print(f"KL against torch.distributions in float64, logits N(0, 3), K = 512: {error:.1e} relative")
    if cuda and triton:
        results = []
        for backend in ("torch", "triton"):
            zs, ms = z.clone().requires_grad_(), codebook.clone().requires_grad_()
            out = evidential_quantize(zs, ms, 0.7, backend=backend)
            results.append((*out, *torch.autograd.grad(out.z_q.sum() + out.kl.sum(), [zs, ms])))
        errors = {name: ((x - y).abs() / (1 + x.abs())).max().item()
                  for name, x, y in zip((*Quantized._fields, "dlogits", "dM"), *results)}
        print("Triton against PyTorch, relative to 1 + |x|: " + "  ".join(f"{k} {v:.1e}" for k, v in errors.items()))

    # 2. times: this file, the textbook form, the textbook form compiled
    def measure(step):
        """Median milliseconds of step(), and the peak of extra memory in MiB (GPU only)."""
        if cuda:
            step(), torch.cuda.synchronize(), torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(), torch.cuda.synchronize()
            memory = (torch.cuda.max_memory_allocated() - before) / 2 ** 20
            return triton.testing.do_bench(step, quantiles=[0.5]), memory
        times = []
        for _ in range(8):                                                         # two to warm up, and to compile
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
        return sorted(times[2:])[3], math.nan

    compiled_textbook = torch.compile(textbook_quantize, dynamic=False)
    contenders = {"textbook": lambda z, m: textbook_quantize(z, m, 0.7),
                  "textbook, compiled": lambda z, m: compiled_textbook(z, m, 0.7),
                  "this file": lambda z, m: evidential_quantize(z, m, 0.7)[:2]}
    print(f"\n{'rows x K, D':>18} {'':20}{'forward ms':>11}{'backward ms':>12}{'both ms':>9}{'ratio':>7}{'GB/s':>7}"
          f"{'copy GB/s':>10}{'extra MiB':>10}")
    sizes = [(8192, 512), (32768, 512), (131072, 512), (32768, 8192)] if cuda else [(8192, 512), (32768, 512)]
    for (P, K), D in ((size, D) for size in sizes for D in (16, 64)):
        z, m = (scale * torch.randn(n, d, device=device) for scale, n, d in ((3, P, K), (1, K, D)))
        z, m = z.requires_grad_(), m.requires_grad_()
        dz_q, dkl = torch.randn(P, D, device=device), torch.randn(P, device=device)
        floor = 3 * z.numel() * z.element_size()                              # logits read twice, gradient written once
        source, target = torch.empty(floor // 8, device=device), torch.empty(floor // 8, device=device)
        copy = floor / measure(lambda: target.copy_(source))[0] / 1e6           # reads half of these bytes, writes half
        del source, target
        base = math.nan                                                            # the textbook form's time
        for label, f in contenders.items():
            try:
                forward = measure(lambda: f(z, m))[0]
                both, memory = measure(lambda: torch.autograd.grad(f(z, m), [z, m], [dz_q, dkl]))
            except (RuntimeError, torch._inductor.exc.InductorError) as e:         # out of memory, or no C++ compiler
                print(f"{P:>9} x {K}, {D:<3} {label:20} {type(e).__name__}")
                continue
            base = both if label == "textbook" else base
            print(f"{P:>9} x {K}, {D:<3} {label:20}{forward:>11.2f}{both - forward:>12.2f}{both:>9.2f}"
                  f"{base / both:>7.1f}{floor / both / 1e6:>7.0f}{copy:>10.0f}{memory:>10.0f}", flush=True)


if __name__ == "__main__":
    main()
