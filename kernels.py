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
index). It is recomputed in the backward, never stored, and does not depend on device, block size or number of
processes. One call yields four uniforms: with Q = ceil(K/4) they go to codes j, j + Q, j + 2Q, j + 3Q of a row.
"""
import functools
import math
import os
import shutil
from typing import NamedTuple, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Q(t) = q(t) / (1 - t) with q(t) = (a - 1) psi(a) - lnG(a) - a + ln(a)/2 + 1, a = 1/t;   w(t) = (1 - e psi'(1 + e)) / t,
# e = (1 - t)/t. Least-squares Chebyshev fits on [0, 1]: error at most 1.3e-8 and 3e-9 (test_edvae.py compares with mpmath).
Q_POLY = (-0.4189385436, -0.08560396567, -0.002294685722, 0.008979944843, 0.0002471219712, -0.004895921131,
          0.003266177207, -0.0007601397698)
W_POLY = (0.5000000029, 0.3333326163, 0.1666959413, 0.03286202824, -0.02941518933, -0.04274620046, 0.0791081593,
          -0.05878635332, 0.02267036001, -0.003721365682)
PHILOX_MUL, PHILOX_ADD, LOW32 = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 0xFFFFFFFF
LARGEST = 1e30  # max_logit = inf acts as this, so that (K - 1) z, the KL of one huge logit, still fits in float32


class Quantized(NamedTuple):
    """What a bottleneck returns for logits (..., K) and a codebook (K, D); gradients flow through z_q and kl."""
    z_q: Tensor          # (..., D)
    kl: Tensor           # (...)  nats
    indices: Tensor      # (...)  int64, argmax of the logits
    entropy: Tensor      # (...)  nats, of pi
    uncertainty: Tensor  # (...)  K / S in (0, 1]; nan for the softmax, which has no evidence


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


def kl_rows(z: Tensor, a: Tensor, ln_sk: Tensor) -> Tensor:
    """KL[Dir(alpha) || Dir(1)] of clamped logits z (P, K), a = ln alpha (P, K) and ln(S/K) (P): (P), nats."""
    K = z.shape[-1]
    r_s, p, _ = stirling(torch.exp(-ln_sk) / K, K)
    r_k = math.lgamma(K) - ((K - 0.5) * math.log(K) - K + 0.5 * math.log(2 * math.pi))
    per_code = torch.sigmoid(z) * polynomial(Q_POLY, torch.sigmoid(-z)) - 0.5 * a  # (1 - t) Q(t) + 1/2 ln t
    return (K - 0.5) * ln_sk - torch.expm1(-ln_sk) * (0.5 + p) + (r_s - r_k) + per_code.sum(-1)


def kl_grad_rows(z: Tensor, m: Tensor, rest: Tensor) -> Tensor:
    """dKL/dz of clamped logits z (P, K) with m (P) and ln(S/K) - m (P): (P, K)."""
    K, ln_sk = z.shape[-1], m + rest
    _, _, g = stirling(torch.exp(-ln_sk) / K, K)
    a_s = K + torch.expm1(-ln_sk) * g                                              # K - (E/S) g(S)
    e_over_s = torch.exp((z - m[:, None]) - (rest + math.log(K))[:, None])
    return e_over_s * a_s[:, None] - torch.sigmoid(z) * polynomial(W_POLY, torch.sigmoid(-z))


def philox(seed: Tensor, step: Tensor, counter: Tensor):
    """Four random 32-bit words (as int64) for each 64-bit counter: Philox4x32-10 (Salmon et al. 2011), key = seed."""
    k0, k1 = seed & LOW32, (seed >> 32) & LOW32
    c0, c1, c2, c3 = counter & LOW32, (counter >> 32) & LOW32, step & LOW32, (step >> 32) & LOW32
    for _ in range(10):
        p0, p1 = c0 * PHILOX_MUL[0], c2 * PHILOX_MUL[1]                            # 64-bit products, high | low
        c0, c1, c2, c3 = ((p1 >> 32) & LOW32) ^ c1 ^ k0, p1 & LOW32, ((p0 >> 32) & LOW32) ^ c3 ^ k1, p0 & LOW32
        k0, k1 = (k0 + PHILOX_ADD[0]) & LOW32, (k1 + PHILOX_ADD[1]) & LOW32
    return c0, c1, c2, c3


def four_gumbels(key: Tensor, group: Tensor):
    """Four Gumbel(0, 1) tensors for 64-bit counters `group`; key = (seed, step, ...). Never infinite."""
    uniform = lambda word: ((word >> 9).float() + 0.5) * 2.0 ** -23                # in [2^-24, 1 - 2^-24]
    return [-torch.log(-torch.log(uniform(word))) for word in philox(key[0], key[1], group)]


def gumbel_noise(key: Tensor, first: int, rows: int, K: int, jit=lambda f: f) -> Tensor:
    """Gumbel noise (rows, K) for rows first, first + 1, ... of a call; key = (seed, step, global row of the call's first)."""
    quarter = (K + 3) // 4
    group = (key[2] + first) * quarter + torch.arange(rows * quarter, device=key.device).view(rows, quarter)
    return torch.stack(jit(four_gumbels)(key, group), 1).view(rows, 4 * quarter)[:, :K]


def relax(z: Tensor, m: Tensor, a: Tensor, noise: Tensor, tau: Tensor, evidential: bool):
    """Clamped logits z, scores a (P, K): y (P, K), kl, entropy, u, and ln(S/K) - m (P)."""
    v = a + noise
    y = torch.exp((v - v.amax(-1, keepdim=True)) / tau)
    y = y / y.sum(-1, keepdim=True)                                                # Alg. 1
    ln_sk, rest = row_scale(z, m, evidential)
    ln_pi = (a - m[:, None]) - (rest + math.log(z.shape[-1]))[:, None]
    entropy = -(torch.exp(ln_pi) * ln_pi).sum(-1)
    if evidential:
        return y, kl_rows(z, a, ln_sk), entropy, torch.exp(-ln_sk), rest
    return y, math.log(z.shape[-1]) - entropy, entropy, torch.full_like(ln_sk, math.nan), rest


def relax_grad(logits, z, y, dy, dkl, m, rest, entropy, tau, max_logit: float, evidential: bool):
    """dlogits (P, K) from dy = <dz_q, M_k> - <dz_q, z_q> (P, K): dL/da_k = y_k dy_k / tau, da/dz = 1 - t_k."""
    da = y * dy / tau
    if evidential:
        dz = torch.sigmoid(z) * da + dkl[:, None] * kl_grad_rows(z, m, rest)
    else:
        ln_pi = (z - m[:, None]) - (rest + math.log(z.shape[-1]))[:, None]
        dz = da + dkl[:, None] * torch.exp(ln_pi) * (ln_pi + entropy[:, None])     # -dH/dz_k = pi_k (ln pi_k + H)
    return torch.where(logits > max_logit, 0.0, dz).to(logits.dtype)


def forward_rows(jit, first, logits, codebook, tau, key, max_logit: float, evidential: bool):
    """One block of logits (P, K) whose first row is `first`: z_q, kl, indices, entropy, u; then y, m, rest, kept."""
    m, indices = logits.max(-1)
    z, m = logits.to(codebook.dtype).clamp(max=max_logit), m.to(codebook.dtype).clamp(max=max_logit)
    a = F.softplus(z) if evidential else z                                         # ln alpha (Eq. 2), or the logits
    noise = gumbel_noise(key, first, *z.shape, jit)
    y, kl, entropy, u, rest = jit(relax)(z, m, a, noise, tau, evidential)
    return y @ codebook, kl, indices, entropy, u, y, m, rest


def backward_rows(jit, first, logits, dz_q, dkl, z_q, entropy, y, m, rest, codebook, tau, max_logit: float,
                  evidential: bool):
    """Gradients of one block of rows: dlogits (P, K), and the block's share of dM (K, D).

    sum_k y_k <dz_q, M_k> = <dz_q, z_q>, so the softmax's backward needs no second pass over K.
    """
    z = logits.to(codebook.dtype).clamp(max=max_logit)
    dy = torch.addmm((dz_q * z_q).sum(-1, keepdim=True), dz_q, codebook.T, beta=-1)
    return jit(relax_grad)(logits, z, y, dy, dkl, m, rest, entropy, tau, max_logit, evidential), y.T @ dz_q


# ----------------------------------------------------------------------------------------- operators and public functions

COMPILE = True           # on a CPU with a C++ compiler: torch.compile the PyTorch path for inputs of COMPILE_FROM logits up
COMPILE_FROM = 2 ** 20
BLOCK = 2 ** 19          # on a CPU: logits in a block, so that what lies between two operations stays in the cache


@functools.cache
def compiled(fn):
    return torch.compile(fn, dynamic=False)


def by_rows(fn, by_row, *args):
    """fn over blocks of rows of the tensors in by_row; the list of what it returns for each block."""
    rows, K = by_row[0].shape
    block = max(1, BLOCK // K) if by_row[0].device.type == "cpu" else max(1, rows)
    fast = COMPILE and by_row[0].device.type == "cpu" and rows * K >= COMPILE_FROM and shutil.which(
        os.environ.get("CXX", "g++"))
    jit = lambda f, n: compiled(f) if fast and n == block else f                   # a last short block runs as it is
    return [fn(functools.partial(jit, n=min(block, rows - i)), i, *(x[i:i + block] for x in by_row), *args)
            for i in range(0, max(1, rows), block)]


def join(parts):
    return parts[0] if len(parts) == 1 else tuple(torch.cat(p) for p in zip(*parts))


@torch.library.custom_op("edvae::quantize", mutates_args=())
def quantize_op(logits: Tensor, codebook: Tensor, tau: Tensor, key: Tensor, max_logit: float, evidential: bool,
                backend: str) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(logits.device.type, enabled=False):
        return join(by_rows(forward_rows, (logits,), codebook, tau, key, max_logit, evidential))


@quantize_op.register_fake
def _(logits, codebook, tau, key, max_logit, evidential, backend):
    (P, K), D = logits.shape, codebook.shape[1]
    new = codebook.new_empty
    return new(P, D), new(P), new(P, dtype=torch.int64), new(P), new(P), new(P, K), new(P), new(P)


@torch.library.custom_op("edvae::quantize_backward", mutates_args=())
def quantize_backward_op(dz_q: Tensor, dkl: Tensor, logits: Tensor, codebook: Tensor, tau: Tensor, key: Tensor,
                         z_q: Tensor, entropy: Tensor, y: Tensor, m: Tensor, rest: Tensor, max_logit: float,
                         evidential: bool, backend: str) -> Tuple[Tensor, Tensor]:
    with torch.autocast(logits.device.type, enabled=False):
        parts = by_rows(backward_rows, (logits, dz_q, dkl, z_q, entropy, y, m, rest), codebook, tau, max_logit,
                        evidential)
        dlogits, dcodebook = zip(*parts)
        return torch.cat(dlogits), sum(dcodebook[1:], dcodebook[0])


@quantize_backward_op.register_fake
def _(dz_q, dkl, logits, codebook, *_):
    return torch.empty_like(logits), torch.empty_like(codebook)


def _save(ctx, inputs, output):
    logits, codebook, tau, key, *ctx.options = inputs
    z_q, _, _, entropy, _, *kept = output
    ctx.save_for_backward(logits, codebook, tau, key, z_q, entropy, *kept)


def _backward(ctx, dz_q, dkl, *_):
    dlogits, dcodebook = quantize_backward_op(dz_q, dkl, *ctx.saved_tensors, *ctx.options)
    return dlogits, dcodebook, None, None, None, None, None


quantize_op.register_autograd(_backward, setup_context=_save)


def _quantize(logits, codebook, tau, max_logit, seed, backend, evidential) -> Quantized:
    shape, (K, D) = logits.shape[:-1], codebook.shape
    if logits.shape[-1] != K:
        raise ValueError(f"the codebook holds {K} codes but the logits' last dimension is {logits.shape[-1]}")
    backend = resolve_backend(backend, logits.device)
    dtype = torch.float64 if codebook.dtype == torch.float64 else torch.float32    # float32 inside whatever autocast says
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
    return "torch" if backend == "auto" else backend


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
    @staticmethod
    def forward(ctx, logits, max_logit):
        z = logits.clamp(max=max_logit)
        m = z.amax(-1)
        ln_sk, rest = row_scale(z, m, evidential=True)
        ctx.save_for_backward(logits, m, rest)
        ctx.max_logit = max_logit
        return kl_rows(z, F.softplus(z), ln_sk)

    @staticmethod
    def backward(ctx, dkl):
        logits, m, rest = ctx.saved_tensors
        dz = dkl[:, None] * kl_grad_rows(logits.clamp(max=ctx.max_logit), m, rest)
        return torch.where(logits > ctx.max_logit, 0.0, dz), None


def dirichlet_kl(logits: Tensor, max_logit: float = 20.0, backend: str = "auto") -> Tensor:
    """KL[Dir(exp(min(logits, max_logit)) + 1) || Dir(1)]: (..., K) -> (...), nats, differentiable. EdVAE App. A.

    float32 inside (float64 for float64 logits); relative error below 1e-6 for any finite logits, max_logit = inf included.
    """
    K = logits.shape[-1]
    z = logits.reshape(-1, K).to(torch.promote_types(logits.dtype, torch.float32))
    return _DirichletKL.apply(z, check(K, max_logit)).view(logits.shape[:-1])


def textbook_kl(logits: Tensor, max_logit: float = 20.0) -> Tensor:
    """The same KL as torch.distributions computes it, (..., K) -> (...), nats: the arithmetic behind the paper's numbers.

    In float32 it loses all digits at large evidence: at logits of 20 its gradient is 0 (`--kl textbook`, for comparison).
    """
    alpha = torch.exp(logits.float().clamp(max=max_logit)) + 1                     # Eq. 2
    prior = torch.distributions.Dirichlet(torch.ones_like(alpha), validate_args=False)
    return torch.distributions.kl_divergence(torch.distributions.Dirichlet(alpha, validate_args=False), prior)
