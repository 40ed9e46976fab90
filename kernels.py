"""The bottleneck of EdVAE: from logits to z_q, KL, indices, entropy and uncertainty, and back.

    python kernels.py     # the KL's error, on a GPU Triton against PyTorch; then the benchmark

In: logits z_e (..., K) and a codebook M (K, D). Out: z_q (..., D) and four numbers per position.
With c = max_logit, e_k = exp(min(z_k, c)), E = sum_k e_k and S = sum_k alpha_k = K + E:

    alpha = e + 1                               concentrations of a Dirichlet (Eq. 2)
    pi    = alpha / S                           its mean, the code probabilities (App. B)
    y     = softmax((ln alpha + gumbel) / tau)  relaxed one-hot sample of Cat(pi) (Alg. 1)
    z_q   = y M
    KL    = KL[Dir(alpha) || Dir(1, ..., 1)]    nats (App. A)
    H     = -sum_k pi_k ln pi_k                 entropy of pi, nats (Fig. 2)
    u     = K / S                               uncertainty, in (0, 1] (Fig. 3)

`EdVAE.plain` in train_vae.py is the same in ten lines of torch.distributions: change that first.
Here the exponential is built in: into ln alpha, S, e_k/S, w and da/dz = 1 - t. For another evidence
function f give ln f(z) as the logits.

The textbook KL, with lnG = ln Gamma and psi = lnG', is

    KL       = lnG(S) - lnG(K) - E psi(S) + sum_k [(alpha_k - 1) psi(alpha_k) - lnG(alpha_k)]

It subtracts terms of size S ln S: in float32 it loses every digit once the evidence is large. By
Stirling's series (`stirling`) the first three terms become A - E, where A is the first line below:
S ln S cancels on paper. By Q's definition each term of the sum is (1 - t) Q(t) + 1/2 ln t + (alpha
- 1) with t = 1 / alpha, and the alpha_k - 1 add up to E, so E cancels too:

    KL       = (K - 1/2) ln(S/K) + (E/S)(1/2 + S s(S)) + r(S) - r(K)
               + sum_k [(1 - t_k) Q(t_k) + 1/2 ln t_k]
    dKL/dz_k = (e_k/S)(K - (E/S) g(S)) - (1 - t_k) w(t_k)              0 where z_k > c

r, s and g are short series in 1/S (`stirling`); Q and w are smooth on [0, 1], here polynomials.
No terms of size S ln S are left, and all is computed from z in log space: every logit but nan is
legal (beyond +-1e30, infinite too, it counts as +-1e30), and max_logit may be inf.

dVAE's bottleneck is the same with z in place of ln alpha and KL[Cat(pi) || uniform] = ln K - H.

The noise is gumbel = -ln(-ln U). U comes from the counter-based generator Philox4x32-10: its bits
are a function of seed, step, global row, code and K alone, on every device, for every block size
and number of processes. One call of Philox gives the uniforms of four neighboring codes.

This file in order: the mathematics in PyTorch (the reference, and the path on a CPU), torch.compile
and CUDA graphs, the operator in PyTorch, the same as two Triton kernels, the operators' gradient,
the public functions, the benchmark.
"""

import functools
import math
import os
import statistics
import sys
import timeit
import warnings
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the PyTorch path does without
    triton, tl = None, SimpleNamespace(constexpr=None)

# Polynomials on the range given, the constant coefficient first; the tests compare with 80 digits.
# fmt: off

# Q(t) = [(alpha - 1) psi(alpha) - lnG(alpha) - alpha + ln(alpha)/2 + 1] / (1 - t), alpha = 1/t, on
# [0, 1]: error 1.3e-8.
Q_POLY = (-0.4189385436, -0.08560396567, -0.002294685722, 0.008979944843, 0.0002471219712,
          -0.004895921131, 0.003266177207, -0.0007601397698)
# w(t) = (1 - e psi'(1 + e)) / t, e = (1 - t)/t, on [0, 1]: error 3e-9.
W_POLY = (0.5000000029, 0.3333326163, 0.1666959413, 0.03286202824, -0.02941518933,
          -0.04274620046, 0.0791081593, -0.05878635332, 0.02267036001, -0.003721365682)
# ln(1 + x) = x L(x) on [0, 1]: error 6e-9. log1p is slower, in Inductor's C++ and in Triton.
L_POLY = (0.9999999954, -0.4999990399, 0.3333000404, -0.2495455887, 0.1967811726,
          -0.1531186311, 0.1061426469, -0.05706420081, 0.01990716095, -0.00325637848)
# -ln(1 - d) = d N(d) on [0, 1/8]: relative error 1.4e-8.
LN_POLY = (1.000000014, 0.4999946512, 0.3336694809, 0.2426936929, 0.2629016152)
# fmt: on
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
LOW32 = 0xFFFFFFFF
# max_logit = inf acts as this: (K - 1) z, the KL of one huge logit, still fits in float32.
LARGEST_LOGIT = 1e30
# Above this logit exp(z) might overflow, and K is negligible beside E.
EXP_SAFE = 60.0

COMPILE_FROM = 2**20  # CPU: torch.compile pays for itself from this many logits
BLOCK = 2**19  # CPU: logits in a block of rows, so that its intermediate results stay in the cache


class Quantized(NamedTuple):
    """A bottleneck's output for logits (..., K) and a codebook (K, D).

    Gradients flow through z_q and kl alone. A field that a quantizer does not define is nan.
    """

    z_q: Tensor  # (..., D)
    kl: Tensor  # (...)  nats
    indices: Tensor  # (...)  int64, argmax of the logits
    entropy: Tensor  # (...)  nats, of pi
    uncertainty: Tensor  # (...)  K / S in (0, 1]; EdVAE only: a softmax has no evidence


def deterministic(z_q: Tensor, indices: Tensor) -> Quantized:
    """z_q (..., D) and indices (...) as the output of a quantizer that has no pi."""
    nan = torch.full_like(indices, math.nan, dtype=torch.float32)
    return Quantized(z_q, nan, indices, nan, nan)


# ---------------------------------------------------------------------- the mathematics, in PyTorch


def polynomial(coefficients: tuple, x: Tensor) -> Tensor:
    """Horner's rule; the constant coefficient comes first."""
    value = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * x + coefficient
    return value


def stirling(inv_s):
    """r(S), S s(S) and g(S) from 1/S: what remains of lnG, psi and psi' after their leading terms.

        lnG(x)  = (x - 1/2) ln x - x + ln(2 pi)/2 + r(x)
        psi(x)  = ln x - 1/(2x) - s(x)
        psi'(x) = 1/x + g(x)/x^2

    The last two coefficients of each are fitted, so that KL and gradient are good to 1e-8 from
    S = 2 on. Plain arithmetic, for tensors, for numbers and in the Triton kernel.
    """
    sq = inv_s * inv_s
    r = inv_s * (1 / 12 - sq * (1 / 360 - sq * (1 / 1260 - sq * (1 / 1779 - sq / 2315))))
    S_times_s = inv_s * (1 / 12 - sq * (1 / 120 - sq * (1 / 252 - sq * (1 / 255 - sq / 260))))
    g = 0.5 + inv_s * (1 / 6 - sq * (1 / 30 - sq * (1 / 42 - sq * (1 / 32 - sq / 26))))
    return r, S_times_s, g


def log_alpha(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a = ln alpha = ln(exp(z) + 1), t = 1 / alpha and 1 - t of clamped logits z (Eq. 2)."""
    if not torch.compiler.is_compiling():
        return F.softplus(z), torch.sigmoid(-z), torch.sigmoid(z)
    x = torch.exp(-z.abs())  # compiled: all three from one exponential
    smaller = x / (1 + x)
    a = z.clamp(min=0) + x * polynomial(L_POLY, x)
    t = torch.where(z > 0, smaller, 1 - smaller)
    return a, t, torch.where(z > 0, 1 - smaller, smaller)


def ln_total(z: Tensor, m: Tensor, evidential: bool) -> tuple[Tensor, Tensor]:
    """ln(S/K) and ln(S/K) - m, (P) each, from clamped logits z (P, K) and m (P).

    m is max_k z_k; with evidence max(0, max_k z_k), for ln alpha is at least 0.
    S = K + sum_k e^z_k; softmax: sum_k e^z_k. Both are returned, as neither gives the other in
    float32: the first is tiny for little evidence, and at large logits m would round it away.
    """
    mean = torch.exp(z - m[:, None]).sum(-1) / z.shape[-1]  # E/K = e^m mean
    if not evidential:
        return m + torch.log(mean), torch.log(mean)
    small = torch.log1p(torch.exp(m.clamp(max=EXP_SAFE)) * mean)
    ln_sk = torch.where(m > EXP_SAFE, m + torch.log(mean), small)
    return ln_sk, torch.where(m > EXP_SAFE, torch.log(mean), ln_sk - m)


def kl_rows(a: Tensor, t: Tensor, one_minus_t: Tensor, ln_sk: Tensor) -> Tensor:
    """KL[Dir(alpha) || Dir(1)] (P), nats (App. A), of log_alpha(z) (P, K) and ln(S/K) (P)."""
    K = a.shape[-1]
    r, S_times_s, _ = stirling(torch.exp(-ln_sk) / K)
    e_over_s = -torch.expm1(-ln_sk)  # E/S
    of_s = (K - 0.5) * ln_sk + e_over_s * (0.5 + S_times_s) + (r - stirling(1 / K)[0])
    of_codes = one_minus_t * polynomial(Q_POLY, t) - 0.5 * a  # (1 - t) Q(t) + 1/2 ln t
    return of_s + of_codes.sum(-1)


def kl_grad_rows(
    z: Tensor, t: Tensor, one_minus_t: Tensor, m: Tensor, ln_sk_minus_m: Tensor
) -> Tensor:
    """dKL/dz (P, K) of clamped logits z, their t and 1 - t, `ln_total`'s m and ln(S/K) - m (P)."""
    K, u = z.shape[-1], torch.exp(-m - ln_sk_minus_m)  # u = K/S
    slope = K - (1 - u) * stirling(u / K)[2]  # K - (E/S) g(S)
    share = torch.exp((z - m[:, None]) - (ln_sk_minus_m + math.log(K))[:, None])  # e_k/S
    return share * slope[:, None] - one_minus_t * polynomial(W_POLY, t)


def philox(seed: Tensor, step: Tensor, counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011): four random 32-bit words, as int64, for each counter."""
    k0, k1 = seed & LOW32, (seed >> 32) & LOW32
    c0, c1 = counter & LOW32, (counter >> 32) & LOW32
    c2, c3 = step & LOW32, (step >> 32) & LOW32
    for _ in range(10):
        p0, p1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]  # 64 bits: high | low
        c0, c1 = ((p1 >> 32) & LOW32) ^ c1 ^ k0, p1 & LOW32
        c2, c3 = ((p0 >> 32) & LOW32) ^ c3 ^ k1, p0 & LOW32
        k0, k1 = (k0 + PHILOX_INCREMENTS[0]) & LOW32, (k1 + PHILOX_INCREMENTS[1]) & LOW32
    return c0, c1, c2, c3


def gumbel_noise(key: Tensor, first_row, rows: int, K: int) -> Tensor:
    """Gumbel(0, 1) noise (rows, K), always finite, for global rows first_row, ...

    key: (seed, step, ...), int64. A call of Philox serves four codes of a row.
    """
    calls = (K + 3) // 4
    counter = first_row * calls + torch.arange(rows * calls, device=key.device).view(rows, calls)
    words = torch.stack(philox(key[0], key[1], counter), -1).view(rows, 4 * calls)[:, :K]
    uniform = ((words >> 9).float() + 0.5) * 2.0**-23  # in [2^-24, 1 - 2^-24]
    return -torch.log(-torch.log(uniform))


def relaxed_sample(logits, m, y, key, first_row, inv_tau, c: float, evidential: bool) -> tuple:
    """Fills y (P, K); returns kl, entropy, u and ln(S/K) - m, (P) each.

    m (P): that of `ln_total`. Row 0 of the logits (P, K) is global row `first_row`.
    """
    K = logits.shape[-1]
    z = logits.to(y.dtype).clamp(-LARGEST_LOGIT, c)
    a, t, one_minus_t = log_alpha(z) if evidential else (z, z, z)  # Eq. 2
    v = a + gumbel_noise(key, first_row, *z.shape)
    weight = torch.exp((v - v.amax(-1, keepdim=True)) * inv_tau)
    y.copy_(weight * (1 / weight.sum(-1, keepdim=True)))  # Alg. 1
    ln_sk, ln_sk_minus_m = ln_total(z, m, evidential)
    ln_pi = (a - m[:, None]) - (ln_sk_minus_m + math.log(K))[:, None]  # App. B
    entropy = -(torch.exp(ln_pi) * ln_pi).sum(-1)
    if evidential:
        return kl_rows(a, t, one_minus_t, ln_sk), entropy, torch.exp(-ln_sk), ln_sk_minus_m
    return math.log(K) - entropy, entropy, torch.full_like(ln_sk, math.nan), ln_sk_minus_m


def relaxed_sample_grad(
    dlogits, logits, y, dy, dkl, m, ln_sk_minus_m, entropy, inv_tau, c: float, evidential: bool
):
    """Fills dlogits (P, K) by dL/da = y dy / tau and, with evidence, da/dz = 1 - t; adds the KL's.

    dy (P, K) is dL/dy minus its mean under y: <dz_q, M_k> - <dz_q, z_q>.
    """
    z = logits.to(y.dtype).clamp(-LARGEST_LOGIT, c)
    da = y * dy * inv_tau
    if evidential:
        _, t, one_minus_t = log_alpha(z)
        dz = one_minus_t * da + dkl[:, None] * kl_grad_rows(z, t, one_minus_t, m, ln_sk_minus_m)
    else:
        ln_pi = (z - m[:, None]) - (ln_sk_minus_m + math.log(z.shape[-1]))[:, None]
        dz = da + dkl[:, None] * torch.exp(ln_pi) * (ln_pi + entropy[:, None])  # -dH/dz
    dlogits.copy_(torch.where(logits > c, 0.0, dz))


# ------------------------------------------------------------------- torch.compile and CUDA graphs


class Compiled:
    """torch.compile(fn), or fn itself if the first call cannot be compiled (no C++ compiler)."""

    def __init__(self, fn):
        options = {"cpp.enable_floating_point_contract_flag": "fast"}
        self.fn, self.chosen = fn, None
        self.compiled = torch.compile(fn, dynamic=False, options=options)

    def __call__(self, *args):
        if self.chosen:  # later failures raise: a capture would record uncompiled code unnoticed
            return self.chosen(*args)
        try:
            out, self.chosen = self.compiled(*args), self.compiled
        except torch._dynamo.exc.TorchDynamoException as e:
            reason = str(e).splitlines()[0][:80]
            print(f"kernels.py: continuing without torch.compile: {reason}", file=sys.stderr)
            out, self.chosen = self.fn(*args), self.fn
        return out


compiled = functools.cache(Compiled)


class Graphed:
    """step() as one CUDA graph: one launch in place of hundreds. On CUDA, in one process.

    Every call is one step. The first three run step() as it is, on a side stream: libraries load,
    kernels compile, an optimizer makes its state. The fourth records step() without running it,
    then replays the recording, as all later calls do: the same kernels on the same memory. So it

    - takes all that changes from tensors that the caller fills in place, and leaves its results in
      such tensors: a Python number or branch stays as it was when recorded;
    - never makes the host wait or the device read host memory: no .item(), no bool(tensor), no
      torch.tensor(number, device="cuda");
    - keeps no autograd graph between calls: store loss.detach(), clear gradients to None.
    """

    def __init__(self, step):
        self.step, self.calls, self.graph = step, 0, None
        self.stream = torch.cuda.Stream()

    def __call__(self):
        self.calls += 1
        if self.calls <= 3:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream), warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*capturable=True")  # it will be captured
                self.step()
            torch.cuda.current_stream().wait_stream(self.stream)
            return
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step()
            self.graph = graph
        self.graph.replay()


# ------------------------------------------------------------------------- the operator, in PyTorch


def blocks_of_rows(fn, logits: Tensor, compile: bool) -> list:
    """The blocks of rows in which fn takes (P, K) logits: pairs of a slice and fn, or fn compiled.

    One block on a GPU. On a CPU blocks of one shape are compiled; a shorter last one is not.
    """
    P, K = logits.shape
    if logits.device.type != "cpu":
        return [(slice(0, P), fn)]
    size = max(1, BLOCK // K)
    blocks = [slice(i, i + size) for i in range(0, max(1, P), size)]
    worthwhile = compile and P * K >= COMPILE_FROM
    return [(rows, compiled(fn) if worthwhile and rows.stop <= P else fn) for rows in blocks]


def torch_forward(logits, codebook, tau, key, max_logit: float, evidential: bool, compile: bool):
    """The operator by PyTorch: Quantized's five, and for the backward saved (P, 2), y (P, K)."""
    (P, K), new = logits.shape, codebook.new_empty
    z_q, kl, indices = new(P, codebook.shape[1]), new(P), new(P, dtype=torch.int64)
    entropy, u, saved, y = new(P), new(P), new(P, 2), new(P, K)
    inv_tau = (1 / tau).clamp(max=1e30)
    for rows, sample in blocks_of_rows(relaxed_sample, logits, compile):
        largest, indices[rows] = logits[rows].max(-1)
        m = largest.to(codebook.dtype).clamp(max=max_logit)
        m = m.clamp(min=0 if evidential else -LARGEST_LOGIT)
        kl[rows], entropy[rows], u[rows], ln_sk_minus_m = sample(
            logits[rows], m, y[rows], key, key[2] + rows.start, inv_tau, max_logit, evidential
        )
        z_q[rows] = y[rows] @ codebook
        saved[rows] = torch.stack([m, ln_sk_minus_m], 1)
    return z_q, kl, indices, entropy, u, saved, y


def torch_backward(
    dz_q, dkl, logits, codebook, tau, z_q, entropy, saved, y, max_logit, evidential, compile
):
    """dL/dlogits (P, K) and dL/dM (K, D), by PyTorch.

    sum_k y_k <dz_q, M_k> = <dz_q, z_q>, so the softmax's backward needs no second pass over K.
    """
    dlogits, dcodebook = logits.new_empty(logits.shape), torch.zeros_like(codebook)
    inv_tau = (1 / tau).clamp(max=1e30)
    for rows, sample_grad in blocks_of_rows(relaxed_sample_grad, logits, compile):
        inner = (dz_q[rows] * z_q[rows]).sum(-1, keepdim=True)
        dy = torch.addmm(inner, dz_q[rows], codebook.T, beta=-1)
        block = logits[rows], y[rows], dy, dkl[rows], *saved[rows].unbind(1), entropy[rows]
        sample_grad(dlogits[rows], *block, inv_tau, max_logit, evidential)
        dcodebook += y[rows].T @ dz_q[rows]
    return dlogits, dcodebook


# ------------------------------------------------------------------ the same, as two Triton kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

jit = triton.jit if triton else lambda fn: fn
# A global that a kernel may read.
constant = tl.constexpr if triton and not INTERPRETED else lambda value: value
Q, W, L, LN = constant(Q_POLY), constant(W_POLY), constant(L_POLY), constant(LN_POLY)
EXP_SAFE_TILE = constant(EXP_SAFE)
IS_PTX = constant(not INTERPRETED and torch.version.hip is None)
# Columns of what the forward saves for the backward, (P, SLOTS). (`torch_forward` saves m and
# ln(S/K) - m.)
MAX, LN_S_MINUS_M, KL_SLOPE, TOP, INV_NORM = (constant(i) for i in range(5))
SLOTS = constant(5)


@jit
def polynomial_tile(x, C: tl.constexpr):
    value = C[len(C) - 1] * x + C[len(C) - 2]
    for i in tl.static_range(2, len(C)):
        value = value * x + C[len(C) - 1 - i]
    return value


@jit
def exp(x):
    return tl.exp2(x * 1.4426950408889634)  # one instruction; denormal results become 0


@jit
def quick_log(x):
    """ln x of normal x > 0 in two instructions: error at most 1.7e-7 (1 + |ln x|) (lg2.approx)."""
    if IS_PTX:
        lg2 = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.6931471805599453 * lg2
    else:
        return tl.log(x)


@jit
def quick_reciprocal(x):
    """1 / x of 1 <= x <= 2 in one instruction: error at most 1 ulp (rcp.approx)."""
    if IS_PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@jit
def neg_log(u):
    """-ln U for U in (0, 1). Near U = 1, where lg2's absolute error would hurt, by a polynomial."""
    d = 1.0 - u  # exact where it is used
    return tl.where(d < 0.125, d * polynomial_tile(d, LN), -quick_log(u))


@jit
def log1p_row(x):
    above = 1.0 + x  # Kahan's: its rounding cancels
    return tl.where(above == 1.0, x, tl.log(above) * x / tl.where(above == 1.0, 1.0, above - 1.0))


@jit
def philox_tile(seed, step, counter):
    """`philox` for int64 counters, a tile of them."""
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    return tl.philox(seed, c0, c1, step.to(tl.uint32), (step >> 32).to(tl.uint32))


@jit
def gumbel_tile(seed, step, row, k0, K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr):
    """Gumbel noise (BLOCK_P, BLOCK_K) of global rows (BLOCK_P), codes from k0: `gumbel_noise`."""
    call = k0 // 4 + tl.arange(0, BLOCK_K // 4)
    counter = row[:, None] * ((K + 3) // 4) + call[None, :]
    w0, w1, w2, w3 = philox_tile(seed, step, counter)
    # The last join varies fastest: the words of a call lie side by side, w0, w1, w2, w3.
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_P, BLOCK_K))
    # 23 bits as the mantissa of a number in [1, 2), minus 1 - 2^-24: U in [2^-24, 1 - 2^-24].
    uniform = ((words >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 0.999999940395355225
    return -quick_log(neg_log(uniform))


@jit
def log_alpha_tile(z, EVIDENTIAL: tl.constexpr, QUICK: tl.constexpr):
    """a = ln alpha, t = 1 / alpha and 1 - t of clamped logits; softmax: a = z, the rest unused.

    QUICK, for the backward: a is off by at most 3e-7, which moves y by a factor e^(3e-7 / tau).
    """
    if EVIDENTIAL:
        x = exp(-tl.abs(z))
        larger = quick_reciprocal(1.0 + x)  # of t and 1 - t
        smaller = x * larger
        a = tl.maximum(z, 0.0) + (quick_log(1.0 + x) if QUICK else x * polynomial_tile(x, L))
        return a, tl.where(z > 0, smaller, larger), tl.where(z > 0, larger, smaller)
    else:
        return z, z, z


@jit
def split_tf32(x):
    """x = high + low, where high has the 10 bits of mantissa that TF32 keeps."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@jit
def dot(a, b_high, b_low, acc):
    """acc + a b in three TF32 passes, error about 2^-21 |a| |b|. (Triton's "tf32x3" spills.)"""
    a_high, a_low = split_tf32(a)
    acc = tl.dot(a_low, b_high, acc, input_precision="tf32")
    acc = tl.dot(a_high, b_low, acc, input_precision="tf32")
    return tl.dot(a_high, b_high, acc, input_precision="tf32")


@jit
def clamp_tile(raw, max_logit):
    """min(raw, c), with nan kept as nan and -inf made finite."""
    clamped = tl.minimum(raw, max_logit, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(clamped, -1e30, propagate_nan=tl.PropagateNan.ALL)


stirling_row = jit(stirling)


@jit
def forward_kernel(
    logits,  # (P, K), any strides
    codebook,  # (K, D)
    z_q,  # (P, D)
    kl,  # (P), and so the next three
    indices,
    entropy,
    u,
    saved,  # (P, SLOTS)
    tau,
    key,  # (3): seed, step, first row
    rows,  # P
    stride_p,
    stride_k,
    max_logit,
    r_k,  # r(K)
    ln_k,  # ln K
    K: tl.constexpr,
    D: tl.constexpr,  # 0: no sample, the KL alone
    EVIDENTIAL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Each program streams BLOCK_P rows once, BLOCK_K codes at a time, as flash attention its keys.

    It keeps running sums, with m = max(z, 0) (softmax: max z), v = a + gumbel and top = max v:
        sum_e = sum e^(z - m),  sum_ea = sum e^(z - m) (a - m)
        sum_a = sum a,  sum_q = sum (1 - t) Q(t)
        norm = sum e^((v - top)/tau),  acc = sum e^((v - top)/tau) M_k
    and the argmax, best_k. At the end z_q = acc / norm, S e^-m = sum_e + K e^-m (softmax: sum_e),
    H = ln S - sum (alpha a) / S, and the KL as in the head of this file.
    Saved for the backward: m, ln S - m, K - (E/S) g(S) (softmax: H), top and 1 / norm.
    Traffic: the logits once, M once a program, D + 9 numbers per row. Nothing K wide is written.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = row < rows
    d = tl.arange(0, BLOCK_D)
    seed, step, first_row = tl.load(key), tl.load(key + 1), tl.load(key + 2)
    inv_tau_log2 = 1.4426950408889634 * tl.minimum(1.0 / tl.load(tau), 1e30)  # for exp2
    m = tl.full((BLOCK_P,), 0.0 if EVIDENTIAL else -1e30, tl.float32)
    top = tl.full((BLOCK_P,), float("-inf"), tl.float32)
    best = tl.full((BLOCK_P,), float("-inf"), tl.float32)
    best_k = tl.zeros((BLOCK_P,), tl.int32)
    sum_e, sum_ea = m * 0, m * 0
    tile_zero = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    sum_a, sum_q, norm = tile_zero, tile_zero, tile_zero  # reduced over codes at the end
    acc = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        valid = inside[:, None] if K % BLOCK_K == 0 else inside[:, None] & (k < K)[None, :]
        tile = logits + row[:, None] * stride_p + k[None, :] * stride_k
        raw = tl.load(tile, mask=valid, other=float("-inf")).to(tl.float32)  # (BLOCK_P, BLOCK_K)

        # 1. argmax, the first of equals
        peak = tl.max(raw, 1)
        here = tl.min(tl.where(raw == peak[:, None], k[None, :], K), 1)
        best_k = tl.where(peak > best, here, best_k)
        best = tl.maximum(best, peak)

        # 2. evidence, entropy and KL
        z = clamp_tile(raw, max_logit)
        a, t, one_minus_t = log_alpha_tile(z, EVIDENTIAL, QUICK=False)  # Eq. 2
        m_new = tl.maximum(m, tl.minimum(peak, max_logit))
        shrink = exp(m - m_new)
        e = exp(z - m_new[:, None])  # 0 beyond K
        sum_ea = shrink * (sum_ea + (m - m_new) * sum_e) + tl.sum(e * (a - m_new[:, None]), 1)
        sum_e = shrink * sum_e + tl.sum(e, 1)
        m = m_new
        if EVIDENTIAL:  # a and 1 - t are 0 beyond K
            sum_a += a
            sum_q += one_minus_t * polynomial_tile(t, Q)

        # 3. the relaxed sample and its mixture of codes
        if D > 0:
            v = a + gumbel_tile(seed, step, first_row + row, k0, K, BLOCK_P, BLOCK_K)
            if K % BLOCK_K:
                v = tl.where((k < K)[None, :], v, float("-inf"))
            top_new = tl.maximum(top, tl.max(v, 1))
            y = tl.exp2((v - top_new[:, None]) * inv_tau_log2)  # Alg. 1
            shrink = tl.exp2((top - top_new) * inv_tau_log2)
            in_codebook = (k < K)[:, None] & (d < D)[None, :]
            codes = tl.load(codebook + k[:, None] * D + d[None, :], mask=in_codebook, other=0.0)
            norm = shrink[:, None] * norm + y
            acc = dot(y, *split_tf32(codes), acc * shrink[:, None])
            top = top_new

    # A softmax's row of -inf alone: m = -1e30, and codes beyond K have counted e = 1 too.
    sum_e = tl.where(inside & (m > -1e30), sum_e, K)
    sum_a, sum_q, norm = tl.sum(sum_a, 1), tl.sum(sum_q, 1), tl.sum(norm, 1)
    if EVIDENTIAL:  # alpha = e^z + 1: the ones come in here
        ones = exp(-m)
        h = tl.log(sum_e + K * ones) - (sum_ea + ones * (sum_a - K * m)) / (sum_e + K * ones)
        e_over_k = exp(tl.minimum(m, EXP_SAFE_TILE)) * sum_e / K  # E/K
        ln_sk = tl.where(m > EXP_SAFE_TILE, m + tl.log(sum_e / K), log1p_row(e_over_k))
        ln_s_minus_m = tl.where(m > EXP_SAFE_TILE, tl.log(sum_e), (ln_sk + ln_k) - m)
        e_over_s = tl.where(m > EXP_SAFE_TILE, 1.0, e_over_k / (1.0 + e_over_k))  # E/S
        r, S_times_s, g = stirling_row(exp(-ln_sk) / K)
        slope = K - e_over_s * g
        of_s = (K - 0.5) * ln_sk + e_over_s * (0.5 + S_times_s) + (r - r_k)
        row_kl = of_s + (sum_q - 0.5 * sum_a)
        row_u = exp(-ln_sk)
    else:
        h = tl.log(sum_e) - sum_ea / sum_e
        ln_s_minus_m = tl.log(sum_e)
        slope = h
        row_kl = ln_k - h
        row_u = m * float("nan")
    tl.store(kl + row, row_kl, mask=inside)
    tl.store(u + row, row_u, mask=inside)
    tl.store(entropy + row, h, mask=inside)
    tl.store(indices + row, best_k.to(tl.int64), mask=inside)
    tl.store(saved + row * SLOTS + MAX, m, mask=inside)
    tl.store(saved + row * SLOTS + LN_S_MINUS_M, ln_s_minus_m, mask=inside)
    tl.store(saved + row * SLOTS + KL_SLOPE, slope, mask=inside)
    if D > 0:
        tl.store(saved + row * SLOTS + TOP, top, mask=inside)
        tl.store(saved + row * SLOTS + INV_NORM, 1.0 / norm, mask=inside)
        z_q_tile = z_q + row[:, None] * D + d[None, :]
        tl.store(z_q_tile, acc / norm[:, None], mask=inside[:, None] & (d < D)[None, :])


@jit
def backward_kernel(
    logits,  # (P, K), any strides
    codebook,  # (K, D)
    dz_q,  # (P, D)
    dkl,  # (P)
    inner,  # (P): <dz_q, z_q>
    saved,  # (P, SLOTS)
    dlogits,  # (P, K)
    dcodebook,  # (stretches, K, D)
    tau,
    key,  # (3): seed, step, first row
    rows,  # P
    rows_per_program,
    stride_p,
    stride_k,
    max_logit,
    K: tl.constexpr,
    D: tl.constexpr,
    EVIDENTIAL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Each program takes BLOCK_K codes down a stretch of rows, and draws their noise again.

        y_k      = e^((v_k - top)/tau) / norm
        dL/da_k  = y_k (<dz_q, M_k> - <dz_q, z_q>) / tau
        dL/dz_k  = (1 - t_k) dL/da_k + dkl [(e_k/S)(K - (E/S) g(S)) - (1 - t_k) w(t_k)]
        softmax:   dL/da_k + dkl pi_k (ln pi_k + H)
        dL/dM_k  = sum over rows of y_k dz_q

    dL/dM stays in registers over the stretch and is written once, to the stretch's own slice.
    The slices are added in a fixed order, without locks. Traffic: the logits read once, their
    gradient written once, D + 7 numbers per row and tile.
    """
    k0 = tl.program_id(0) * BLOCK_K
    k, d = k0 + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    in_codebook = (k < K)[:, None] & (d < D)[None, :]
    seed, step, first_row = tl.load(key), tl.load(key + 1), tl.load(key + 2)
    inv_tau = tl.minimum(1.0 / tl.load(tau), 1e30)
    if D > 0:
        codes = tl.load(codebook + k[:, None] * D + d[None, :], mask=in_codebook, other=0.0)
        codes_high, codes_low = split_tf32(tl.trans(codes))  # (BLOCK_D, BLOCK_K)
    acc = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    begin = tl.program_id(1).to(tl.int64) * rows_per_program
    for offset in range(0, rows_per_program, BLOCK_P):
        row = begin + offset + tl.arange(0, BLOCK_P)
        inside = row < rows
        valid = inside[:, None] if K % BLOCK_K == 0 else inside[:, None] & (k < K)[None, :]
        tile = logits + row[:, None] * stride_p + k[None, :] * stride_k
        raw = tl.load(tile, mask=valid, other=float("-inf")).to(tl.float32)  # (BLOCK_P, BLOCK_K)
        z = clamp_tile(raw, max_logit)
        a, t, one_minus_t = log_alpha_tile(z, EVIDENTIAL, QUICK=True)  # Eq. 2

        # 1. through the KL
        m = tl.load(saved + row * SLOTS + MAX, mask=inside, other=0.0)
        ln_s_minus_m = tl.load(saved + row * SLOTS + LN_S_MINUS_M, mask=inside, other=0.0)
        slope = tl.load(saved + row * SLOTS + KL_SLOPE, mask=inside, other=0.0)
        upstream = tl.load(dkl + row, mask=inside, other=0.0)
        ln_share = (z - m[:, None]) - ln_s_minus_m[:, None]  # ln(e_k / S); softmax: ln pi_k
        if EVIDENTIAL:
            dz = exp(ln_share) * (upstream * slope)[:, None]
            dz -= upstream[:, None] * one_minus_t * polynomial_tile(t, W)
        else:
            dz = upstream[:, None] * exp(ln_share) * (ln_share + slope[:, None])

        # 2. through the relaxed sample, to the logits and to the codes
        if D > 0:
            # 1e30: y = 0 in rows past the end. Codes beyond K reach no column that is stored.
            top = tl.load(saved + row * SLOTS + TOP, mask=inside, other=1e30)
            inv_norm = tl.load(saved + row * SLOTS + INV_NORM, mask=inside, other=1.0)
            dzq_mask = inside[:, None] & (d < D)[None, :]
            dzq = tl.load(dz_q + row[:, None] * D + d[None, :], mask=dzq_mask, other=0.0)
            v = a + gumbel_tile(seed, step, first_row + row, k0, K, BLOCK_P, BLOCK_K)
            y = exp((v - top[:, None]) * inv_tau) * inv_norm[:, None]  # Alg. 1
            row_inner = tl.load(inner + row, mask=inside, other=0.0)
            none = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
            dy = dot(dzq, codes_high, codes_low, none) - row_inner[:, None]
            da = y * dy * inv_tau
            dz += da * one_minus_t if EVIDENTIAL else da
            acc = dot(tl.trans(y), *split_tf32(dzq), acc)
        dz = tl.where(raw > max_logit, 0.0, dz)
        tl.store(
            dlogits + row[:, None] * K + k[None, :], dz.to(dlogits.dtype.element_ty), mask=valid
        )
    if D > 0:
        stretch = dcodebook + tl.program_id(1) * K * D
        tl.store(stretch + k[:, None] * D + d[None, :], acc, mask=in_codebook)


def tiles(kernel, rows: int, K: int, D: int) -> dict:
    """Launch sizes for logits (rows, K) and D numbers a code; on sm_90 nothing spills (a test)."""
    if kernel is forward_kernel:
        block_p, block_k = (32, 32) if D <= 64 else (32, 16)
        if D <= 16 and rows >= 16384:  # at 8,192 it takes 37.4 us on an H100, (32, 32) 27.4
            block_p, block_k = 64, 16
        warps, stages = 4, 2
    else:
        block_p, block_k = (16, 64) if D <= 16 else (16, 32)
        masked = K % 32 > 0  # masks take registers
        warps, stages = 2 if 16 < D <= 64 and not masked else 4, 1
    options = dict(num_warps=warps, num_stages=stages, enable_fp_fusion=True)
    block_d = max(16, triton.next_power_of_2(D))
    return dict(BLOCK_P=block_p, BLOCK_K=block_k, BLOCK_D=block_d, **options)


def triton_forward(logits, codebook, tau, key, max_logit: float, evidential: bool):
    """The operator by Triton: as torch_forward, with saved (P, SLOTS) and an empty y."""
    (P, K), D, new = logits.shape, codebook.shape[1], codebook.new_empty
    z_q, kl, indices = new(P, D), new(P), new(P, dtype=torch.int64)
    entropy, u, saved = new(P), new(P), new(P, int(SLOTS))
    tensors = logits, codebook, z_q, kl, indices, entropy, u, saved, tau, key
    numbers = P, *logits.stride(), max_logit, stirling(1 / K)[0], math.log(K)
    size = tiles(forward_kernel, P, K, D)
    if P:
        grid = (triton.cdiv(P, size["BLOCK_P"]),)
        forward_kernel[grid](*tensors, *numbers, K=K, D=D, EVIDENTIAL=evidential, **size)
    return z_q, kl, indices, entropy, u, saved, new(P, 0)


def triton_backward(
    dz_q, dkl, logits, codebook, tau, key, z_q, saved, max_logit: float, evidential: bool
):
    """dL/dlogits (P, K) and dL/dM (K, D), by Triton."""
    (P, K), D = logits.shape, codebook.shape[1]
    size = tiles(backward_kernel, P, K, D)
    across = triton.cdiv(K, size["BLOCK_K"])
    stretches = max(1, min(triton.cdiv(P, size["BLOCK_P"]), 1024 // across))
    rows_per_program = triton.cdiv(triton.cdiv(P, stretches), size["BLOCK_P"]) * size["BLOCK_P"]
    dlogits, dcodebook = logits.new_empty(P, K), codebook.new_empty(stretches, K, D)
    upstream = dz_q.contiguous(), dkl.contiguous(), (dz_q * z_q).sum(-1)
    tensors = logits, codebook, *upstream, saved, dlogits, dcodebook, tau, key
    numbers = P, rows_per_program, *logits.stride(), max_logit
    backward_kernel[across, stretches](*tensors, *numbers, K=K, D=D, EVIDENTIAL=evidential, **size)
    return dlogits, dcodebook.sum(0)


# --------------------------------------------------------------------- operators and their gradient


OPTIONS = "float max_logit, bool evidential, str backend, bool compile"


@torch.library.custom_op(
    "edvae::quantize",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor codebook, Tensor tau, Tensor key, {OPTIONS})"
    " -> (Tensor z_q, Tensor kl, Tensor indices, Tensor H, Tensor u, Tensor saved, Tensor y)",
)
def quantize_op(logits, codebook, tau, key, max_logit, evidential, backend, compile):
    if backend == "triton":
        with torch.cuda.device_of(logits):  # Triton launches on the current device
            return triton_forward(logits, codebook, tau, key, max_logit, evidential)
    with torch.autocast(logits.device.type, enabled=False):
        return torch_forward(logits, codebook, tau, key, max_logit, evidential, compile)


@quantize_op.register_fake
def _(logits, codebook, tau, key, max_logit, evidential, backend, compile):
    (P, K), D, new = logits.shape, codebook.shape[1], codebook.new_empty
    slots, y_width = (int(SLOTS), 0) if backend == "triton" else (2, K)
    row_numbers = new(P), new(P, dtype=torch.int64), new(P), new(P)
    return new(P, D), *row_numbers, new(P, slots), new(P, y_width)


@torch.library.custom_op(
    "edvae::quantize_backward",
    mutates_args=(),
    schema="(Tensor dz_q, Tensor dkl, Tensor logits, Tensor codebook, Tensor tau, Tensor key,"
    f" Tensor z_q, Tensor H, Tensor saved, Tensor y, {OPTIONS}) -> (Tensor dlogits, Tensor dM)",
)
def quantize_backward_op(
    dz_q, dkl, logits, codebook, tau, key, z_q, H, saved, y, max_logit, evidential, backend, compile
):
    inputs = dz_q, dkl, logits, codebook, tau
    if backend == "triton":
        with torch.cuda.device_of(logits):
            return triton_backward(*inputs, key, z_q, saved, max_logit, evidential)
    with torch.autocast(logits.device.type, enabled=False):
        return torch_backward(*inputs, z_q, H, saved, y, max_logit, evidential, compile)


@quantize_backward_op.register_fake
def _(dz_q, dkl, logits, codebook, *_):
    return logits.new_empty(logits.shape), torch.empty_like(codebook)


def save_for_backward(ctx, inputs, output):
    logits, codebook, tau, key, *ctx.options = inputs
    z_q, _, _, entropy, _, saved, y = output
    ctx.save_for_backward(logits, codebook, tau, key, z_q, entropy, saved, y)
    ctx.set_materialize_grads(False)  # no zeros of the size of y


def quantize_backward(ctx, dz_q, dkl, *_):
    saved = ctx.saved_tensors  # gradient checkpointing lets it be read once
    z_q, entropy = saved[4:6]
    dz_q = torch.zeros_like(z_q) if dz_q is None else dz_q
    dkl = torch.zeros_like(entropy) if dkl is None else dkl
    dlogits, dcodebook = quantize_backward_op(dz_q, dkl, *saved, *ctx.options)
    return dlogits, dcodebook, None, None, None, None, None, None


quantize_op.register_autograd(quantize_backward, setup_context=save_for_backward)


# ----------------------------------------------------------------------------- the public functions


def evidential_quantize(
    logits: Tensor, codebook: Tensor, tau, max_logit=20.0, seed=0, backend="auto", compile=True
) -> Quantized:
    """EdVAE's bottleneck (head of this file): logits (..., K) and codebook (K, D) to Quantized.

        q = evidential_quantize(logits, codebook, tau, seed=torch.tensor([seed, step, 0]))
        loss = F.mse_loss(decoder(q.z_q), x) + beta * q.kl.mean()  # Eq. 8

    tau: temperature, > 0, a number or a tensor of one; it gets no gradient. max_logit: the clamp c,
    a number or inf. seed: an int, or an integer tensor (seed, step, first row). The same seed draws
    the same noise, and so does each call without one: give the step, and on several processes the
    number of the first row.
    backend: auto, triton or torch. compile: whether the torch backend may compile on a CPU.
    Computes in float32 (float64 if the codebook is), whatever autocast says, from logits of any
    dtype. Raises ValueError for shapes or arguments that do not fit or an unavailable backend.
    Source: EdVAE Eq. 2, 6, 8, Alg. 1, App. A.
    """
    return quantize(logits, codebook, tau, max_logit, seed, backend, compile, evidential=True)


def gumbel_quantize(
    logits: Tensor, codebook: Tensor, tau, max_logit=math.inf, seed=0, backend="auto", compile=True
) -> Quantized:
    """dVAE's bottleneck: as evidential_quantize with pi = softmax(logits) and kl = ln K - H.

    Its uncertainty is nan. Source: Ramesh et al. 2021; Jang et al. 2017.
    """
    return quantize(logits, codebook, tau, max_logit, seed, backend, compile, evidential=False)


def quantize(logits, codebook, tau, max_logit, seed, backend, compile, evidential) -> Quantized:
    shape, dtype = logits.shape[:-1], torch.promote_types(codebook.dtype, torch.float32)
    if codebook.dim() != 2 or len(codebook) < 2 or logits.shape[-1:] != codebook.shape[:1]:
        shapes = f"{tuple(logits.shape)} and {tuple(codebook.shape)}"
        raise ValueError(f"needs logits (..., K) and a codebook (K, D) with K >= 2, not {shapes}")
    if not max_logit > -math.inf:
        raise ValueError(f"max_logit must be a number or inf, not {max_logit}")
    if not (tau.numel() == 1 if isinstance(tau, Tensor) else tau > 0):
        raise ValueError(f"tau must be one number above 0, not {tau}")
    # Numbers are filled in on the device: a copy from the host would wait, and end a capture.
    full = functools.partial(torch.full, (1,), device=logits.device)
    tau = tau if isinstance(tau, Tensor) else full(tau, dtype=dtype)
    key = seed if isinstance(seed, Tensor) else full(seed)
    if key.is_floating_point() or not 1 <= key.numel() <= 3:
        raise ValueError(f"seed must be an int or integers (seed, step, first row), not {seed}")
    key = F.pad(key.to(logits.device, torch.int64).flatten(), (0, 3 - key.numel()))
    tau = tau.to(logits.device, dtype).reshape(())
    backend = resolve_backend(backend, logits.device, dtype, *codebook.shape)
    options = min(float(max_logit), LARGEST_LOGIT), evidential, backend, compile
    rows = logits.reshape(-1, len(codebook))  # (P, K)
    out = quantize_op(rows, codebook.to(dtype).contiguous(), tau, key, *options)
    z_q, kl, indices, entropy, u = (x.view(shape + x.shape[1:]) for x in out[:5])
    return Quantized(z_q, kl, indices, entropy.detach(), u.detach())


def dirichlet_kl(logits: Tensor, max_logit: float = 20.0, backend: str = "auto") -> Tensor:
    """KL[Dir(exp(min(logits, max_logit)) + 1) || Dir(1)] (App. A): (..., K) to (...), nats.

    Differentiable; computed in float32 (float64 if the logits are). The error is below 1e-6
    max(1, KL); only for evidence e of 0.01 to 0.1, where the KL is of order e^2 and terms of order
    E cancel, it reaches 5e-6 max(1, KL) at K = 512.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    no_codes = logits.new_empty(*logits.shape[-1:], 0, dtype=dtype)  # D = 0: the KL alone
    out = evidential_quantize(logits, no_codes, 1.0, max_logit, backend=backend, compile=False)
    return out.kl


def resolve_backend(backend: str, device, dtype: torch.dtype, K: int, D: int) -> str:
    """The backend that runs: "triton" or "torch"; ValueError for an unavailable one.

    Triton takes float32, K >= 8 and D <= 128. "auto" is Triton on CUDA where it can be.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend {backend!r} is not one of auto, triton, torch")
    if not triton:
        obstacle = "needs the package triton"
    elif torch.device(device).type != "cuda" and (backend == "auto" or not INTERPRETED):
        obstacle = "needs a GPU"
    elif dtype != torch.float32 or K < 8 or D > 128:
        obstacle = f"takes float32, K >= 8 and D <= 128, not {dtype}, {K} and {D}"
    else:
        return "torch" if backend == "torch" else "triton"
    if backend == "triton":
        raise ValueError(f"the triton backend {obstacle}; use auto or torch")
    return "torch"


def textbook_kl(logits: Tensor, max_logit: float = 20.0) -> Tensor:
    """The same KL by torch.distributions, (..., K) to (...): the paper's numbers come from it.

    In float32 it loses all digits at large evidence: at a logit of 20 its gradient is 0.
    """
    alpha = torch.exp(logits.clamp(max=max_logit)) + 1  # Eq. 2
    dirichlet = functools.partial(torch.distributions.Dirichlet, validate_args=False)
    return torch.distributions.kl_divergence(dirichlet(alpha), dirichlet(torch.ones_like(alpha)))


def textbook_quantize(logits: Tensor, codebook: Tensor, tau, max_logit: float = 20.0):
    """z_q and KL by torch.distributions and autograd: what this file is timed against."""
    alpha = torch.exp(logits.clamp(max=max_logit)) + 1
    pi = alpha / alpha.sum(-1, keepdim=True)
    y = torch.distributions.RelaxedOneHotCategorical(tau, probs=pi, validate_args=False).rsample()
    return y @ codebook, textbook_kl(logits, max_logit)


# ------------------------------------------------------------------------------ check and benchmark


def print_checks(device: str):
    """The KL against float64 where that is accurate; the two backends against each other."""
    z, codebook = 3 * torch.randn(1000, 512, device=device), torch.randn(512, 16, device=device)
    want = textbook_kl(z.double())
    error = ((dirichlet_kl(z) - want) / want).abs().max()
    print(f"KL, logits N(0, 9), K = 512, relative to torch.distributions in float64: {error:.1e}")
    if device == "cpu":
        return
    results = []
    for backend in ("torch", "triton"):
        inputs = [z.clone().requires_grad_(), codebook.clone().requires_grad_()]
        out = evidential_quantize(*inputs, 0.7, backend=backend)
        results.append((*out, *torch.autograd.grad(out.z_q.sum() + out.kl.sum(), inputs)))
    for name, x, y in zip((*Quantized._fields, "dlogits", "dM"), *results):
        error = ((x - y).abs() / (1 + x.abs())).max()
        print(f"Triton against PyTorch, relative to 1 + |x|: {name} {error:.1e}")


def median_ms(step, device: str) -> float:
    """Median milliseconds of step(), the first runs left out, in which it may compile."""
    if device == "cuda":  # as one graph: the kernels, and not the host that launches them
        return triton.testing.do_bench_cudagraph(step, quantiles=[0.5])
    return 1e3 * statistics.median(timeit.repeat(step, number=1, repeat=8)[2:])


def forward_and_both_ms(bottleneck, P: int, K: int, D: int, device: str) -> tuple[float, float]:
    """Milliseconds of a bottleneck forward, and forward and backward; nan if it cannot run."""
    z = (3 * torch.randn(P, K, device=device)).requires_grad_()
    codebook = torch.randn(K, D, device=device, requires_grad=True)
    tau = torch.tensor(0.7, device=device)
    upstream = [torch.randn(P, D, device=device), torch.randn(P, device=device)]

    def both():
        return torch.autograd.grad(bottleneck(z, codebook, tau)[:2], [z, codebook], upstream)

    try:
        return median_ms(lambda: bottleneck(z, codebook, tau), device), median_ms(both, device)
    except RuntimeError:  # too little memory, or no compiler
        return math.nan, math.nan


def print_benchmark(device: str):
    """Times of the textbook form, of the same under torch.compile, and of this file; a copy's rate.

    GB/s: the least possible traffic (logits read twice, their gradient written once) over the time
    of both.
    """
    key = torch.tensor([0, 0, 0], device=device)
    contenders = {
        "textbook": textbook_quantize,
        "textbook, compiled": torch.compile(textbook_quantize, dynamic=False),
        "this file": functools.partial(evidential_quantize, seed=key),
    }
    columns = "forward ms", "backward ms", "both ms", "ratio", "GB/s", "copy GB/s"
    print(f"\n{'rows x K, D':18}{'form':20}" + "".join(f"{name:>12}" for name in columns))
    sizes = [(8192, 512), (32768, 512)]
    if device == "cuda":
        sizes += [(131072, 512), (32768, 8192)]
    for (P, K), D in ((size, D) for size in sizes for D in (16, 64)):
        traffic = 3 * P * K * 4
        source = torch.empty(traffic // 8, device=device)  # a copy reads half of it, writes half
        copy = functools.partial(torch.empty_like(source).copy_, source)
        copy_rate = traffic / median_ms(copy, device) / 1e6
        textbook_ms = math.nan
        for name, bottleneck in contenders.items():
            forward, both = forward_and_both_ms(bottleneck, P, K, D, device)
            if name == "textbook":
                textbook_ms = both
            row = forward, both - forward, both, textbook_ms / both, traffic / both / 1e6, copy_rate
            numbers = "".join(f"{x:>12.2f}" for x in row)
            print(f"{f'{P} x {K}, {D}':18}{name:20}{numbers}", flush=True)


def main():
    torch.manual_seed(0)
    device = "cuda" if triton and torch.cuda.is_available() else "cpu"
    threads = f"CPU, {torch.get_num_threads()} threads"
    print(torch.cuda.get_device_name() if device == "cuda" else threads, end="; ")
    print(f"torch {torch.__version__}, triton {triton.__version__ if triton else 'not installed'}")
    print_checks(device)
    print_benchmark(device)


if __name__ == "__main__":
    main()
