"""The tests: pytest test_edvae.py. The mathematics against mpmath, closed forms and brute force; the scripts as a user
runs them. Nothing is downloaded and no GPU is needed; `pytest -k kl` and the like run a part.
"""
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import mpmath as mp
import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"                                           # Triton's kernels on CPU tensors
# One thread, here and in the scripts: at these sizes a second gains nothing, and on a busy machine each waits for the
# other (2,000 steps of a tiny EdVAE took 35 s with one; with two and the cores shared, not 1,600 were done in 400 s).
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
import evaluate  # noqa: E402
import kernels  # noqa: E402
import sample  # noqa: E402
import train_prior  # noqa: E402
import train_vae  # noqa: E402

HERE = Path(__file__).parent
mp.mp.dps = 80
INF = math.inf


# -------------------------------------------------------------------------------------------------------------- helpers

def exact_kl(z, c):
    """KL[Dir(alpha) || Dir(1)] and its gradient for one row of logits, by the textbook formula in 80 digits."""
    e = [mp.exp(mp.mpf(v) if v <= c else mp.mpf(c)) for v in z.tolist()]
    K, E = len(e), mp.fsum(e)
    psi_s, trigamma_s = mp.psi(0, K + E), mp.psi(1, K + E)
    kl = mp.loggamma(K + E) - mp.loggamma(K) + mp.fsum(x * (mp.psi(0, 1 + x) - psi_s) - mp.loggamma(1 + x) for x in e)
    grad = [x * (x * mp.psi(1, 1 + x) - E * trigamma_s) if v <= c else mp.mpf(0) for x, v in zip(e, z.tolist())]
    return kl, grad


def run(*argv, cwd=None, **env):
    """A script as a user runs it: the finished process, with its output as text."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | env
    return subprocess.run([sys.executable, str(HERE / argv[0]), *map(str, argv[1:])], cwd=cwd, text=True,
                          capture_output=True, env=environment, timeout=280)


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of 60 small images with structure: what --dataset folder reads."""
    folder = tmp_path_factory.mktemp("photos")
    for i, image in enumerate(train_vae.draw_shapes(60, 16, np.random.default_rng(0))):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    return folder


TINY = ["--dataset", "folder", "--size", "16", "--width", "8", "--codebook-size", "12", "--code-dim", "4",
        "--batch-size", "8", "--device", "cpu", "--precision", "fp32", "--no-compile"]


def tiny(photos, out, *more):
    return [*TINY, "--data-dir", str(photos), "--out", str(out), *map(str, more)]


# ----------------------------------------------------------------------------------------------------- the Dirichlet KL

@pytest.mark.parametrize("c", [20.0, 30.0, INF])
@pytest.mark.parametrize("K", [2, 7, 16, 64, 193, 512])
def test_kl_and_gradient_against_80_digits(K, c):
    generator = torch.Generator().manual_seed(K)
    for mean, sd in [(-6, 1), (0, 1), (8, 4), (20, 5), (40, 20)]:
        z = (torch.randn(1, K, generator=generator) * sd + mean).requires_grad_()
        upstream = -1.7
        kl = kernels.dirichlet_kl(z, c)
        (upstream * kl).sum().backward()
        want, want_grad = exact_kl(z.detach()[0], c)
        assert abs(kl.item() - want) <= 1e-5 * max(1, want), (mean, sd)
        error = mp.norm([g / upstream - w for g, w in zip(z.grad[0].tolist(), want_grad)])
        assert error <= 1e-5 * (mp.norm(want_grad) + 0.1 * mp.sqrt(K)), (mean, sd)


def test_polynomials_against_mpmath():
    for t in np.linspace(0.001, 0.999, 67):
        a = 1 / mp.mpf(t)
        q = (a - 1) * mp.psi(0, a) - mp.loggamma(a) - a + mp.log(a) / 2 + 1
        w = (1 - (a - 1) * mp.psi(1, a)) * a
        value = lambda c: kernels.polynomial(c, torch.tensor(t, dtype=torch.float64)).item()
        assert abs(value(kernels.Q_POLY) - q / (1 - mp.mpf(t))) < 1.4e-8
        assert abs(value(kernels.W_POLY) - w) < 3.2e-9
        assert abs(1 - t * value(kernels.L_POLY) / mp.log1p(t)) < 9e-9
    for f in np.linspace(math.sqrt(0.5) - 1, math.sqrt(2) - 1, 67):
        value = kernels.polynomial(kernels.LN_POLY, torch.tensor(f, dtype=torch.float64)).item()
        assert abs(1 - (f + f * f * value) / mp.log1p(f)) < 5e-9


def test_kl_is_zero_without_evidence_and_finite_at_any_logit():
    for K in (2, 8, 512):
        assert kernels.dirichlet_kl(torch.full((3, K), -200.0)).abs().max() < 1e-6
        for value in (3.4e38, -3.4e38):
            for z in (torch.full((1, K), value), torch.tensor([[value] + [-1.0] * (K - 1)])):
                z.requires_grad_()
                out = kernels.evidential_quantize(z, torch.randn(K, 3), 0.5, INF)
                (out.kl.sum() * 1e-3 + out.z_q.sum()).backward()
                assert all(t.isfinite().all() for t in (*out, z.grad))


def test_textbook_kl_agrees_at_small_evidence_and_fails_at_large():
    z = torch.randn(50, 64)
    assert torch.allclose(kernels.textbook_kl(z), kernels.dirichlet_kl(z), rtol=1e-4)
    z = torch.tensor([[20.0] + [-20.0] * 511], requires_grad=True)                 # why this project has its own form
    kernels.textbook_kl(z).sum().backward()
    assert z.grad[0, 0] == 0
    z.grad = None
    kernels.dirichlet_kl(z).sum().backward()
    assert abs(z.grad[0, 0].item() - exact_kl(z.detach()[0], 20)[1][0]) < 1e-3


# ------------------------------------------------------------------------------------------------------- the bottleneck

@pytest.mark.parametrize("quantize", [kernels.evidential_quantize, kernels.gumbel_quantize])
@pytest.mark.parametrize("K", [3, 13])
def test_gradcheck_in_float64(quantize, K):
    logits = (3 * torch.randn(2, 5, K, dtype=torch.float64)).requires_grad_()
    codebook = torch.randn(K, 4, dtype=torch.float64, requires_grad=True)
    for pick in (lambda q: q.z_q, lambda q: q.kl, lambda q: (q.z_q, q.kl)):
        assert torch.autograd.gradcheck(lambda z, m: pick(quantize(z, m, 0.7, 2.5, seed=3)), (logits, codebook))
    assert torch.autograd.gradcheck(lambda z: kernels.dirichlet_kl(z, INF), logits)


def test_outputs_against_their_definitions():
    logits, codebook = 4 * torch.randn(3, 5, 37), torch.randn(37, 6)
    out = kernels.evidential_quantize(logits, codebook, 1.0, max_logit=5.0)
    alpha = logits.double().clamp(max=5).exp() + 1
    S = alpha.sum(-1)
    entropy = torch.distributions.Categorical(probs=alpha / S[..., None]).entropy()
    assert torch.allclose(out.entropy, entropy.float(), atol=1e-5)
    assert torch.allclose(out.uncertainty, (37 / S).float(), rtol=1e-5)
    assert torch.equal(out.indices, logits.argmax(-1))                             # of the logits before the clamp
    assert torch.allclose(out.kl, kernels.dirichlet_kl(logits, 5.0), rtol=1e-6)
    assert not out.entropy.requires_grad and out.z_q.shape == (3, 5, 6)
    soft = kernels.gumbel_quantize(logits, codebook, 1.0)
    pi = torch.distributions.Categorical(logits=logits)
    assert torch.allclose(soft.entropy, pi.entropy(), atol=1e-5) and soft.uncertainty.isnan().all()
    assert torch.allclose(soft.kl, math.log(37) - pi.entropy(), atol=1e-5)


def test_bf16_logits_and_autocast_compute_in_float32():
    logits, codebook = (5 * torch.randn(64, 40)).bfloat16(), torch.randn(40, 8)
    want = kernels.evidential_quantize(logits.float(), codebook, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        got = kernels.evidential_quantize(logits.requires_grad_(), codebook, 0.5)
    assert got.z_q.dtype == got.kl.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(got[:2], want[:2]))
    got.kl.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


def test_sampled_codes_follow_pi():
    """The winner of ln alpha + gumbel is a draw from Cat(pi): chi-square over 200,000 draws, 1 in 10,000 to fail."""
    logits, n = torch.tensor([[2.0, 0.0, -1.0, 1.0, 3.0, -5.0, 0.5]]), 200_000
    one_hot = kernels.evidential_quantize(logits.expand(n, 7), torch.eye(7), 1e-6, seed=5).z_q
    alpha = logits.double().exp() + 1
    expected = n * (alpha / alpha.sum())[0]
    chi2 = ((one_hot.double().sum(0) - expected) ** 2 / expected).sum().item()
    assert chi2 < 27.9                                                             # 6 degrees of freedom, p = 1e-4
    uneven = one_hot.double().sum(0).roll(1)                                       # the test can fail
    assert ((uneven - expected) ** 2 / expected).sum() > 1000


def test_tau_towards_zero_gives_one_hot_and_large_tau_the_mean():
    logits, codebook = torch.randn(100, 20), torch.randn(20, 4)
    z_q = kernels.evidential_quantize(logits, codebook, 1e-7, seed=1).z_q
    assert torch.allclose(z_q, codebook[torch.cdist(z_q, codebook).argmin(1)], atol=1e-6)
    z_q = kernels.evidential_quantize(logits, codebook, 1e7).z_q
    assert torch.allclose(z_q, codebook.mean(0).expand(100, 4), atol=1e-4)


def test_philox_known_answers():
    """Random123's published vectors for philox4x32-10."""
    def words(counter, step, seed):
        signed = lambda x: x - 2 ** 64 if x >= 2 ** 63 else x
        return [f"{w.item():08x}" for w in kernels.philox(*(torch.tensor(signed(x)) for x in (seed, step, counter)))]
    assert words(0, 0, 0) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    ones = 2 ** 64 - 1
    assert words(ones, ones, ones) == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    digits_of_pi = words(0x85a308d3243f6a88, 0x0370734413198a2e, 0x299f31d0a4093822)
    assert digits_of_pi == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


def test_noise_depends_on_seed_step_and_global_row_alone(monkeypatch):
    logits, codebook = torch.randn(40, 30), torch.randn(30, 4)
    key = lambda *numbers: torch.tensor(numbers)
    whole = kernels.evidential_quantize(logits, codebook, 0.5, seed=key(7, 3, 0)).z_q
    monkeypatch.setattr(kernels, "BLOCK", 90)                                      # blocks of three rows
    assert torch.allclose(whole, kernels.evidential_quantize(logits, codebook, 0.5, seed=key(7, 3, 0)).z_q, atol=1e-6)
    half = kernels.evidential_quantize(logits[25:], codebook, 0.5, seed=key(7, 3, 25)).z_q
    assert torch.allclose(whole[25:], half, atol=1e-6)
    noise = kernels.gumbel_noise(key(7, 3, 0), 0, 40, 30)
    assert torch.equal(kernels.gumbel_noise(key(7, 3, 0), 25, 15, 30), noise[25:])
    for other in (key(8, 3, 0), key(7, 4, 0), key(7, 3, 1)):
        assert not torch.allclose(whole, kernels.evidential_quantize(logits, codebook, 0.5, seed=other).z_q)
    noise = kernels.gumbel_noise(key(1, 2, 0), 0, 4000, 129)                       # an odd K: a cut last quarter
    assert noise.isfinite().all() and abs(noise.mean() - 0.5772) < 0.01 and abs(noise.var() - math.pi ** 2 / 6) < 0.02


def test_blocks_and_odd_sizes_and_strides_change_nothing(monkeypatch):
    logits = torch.randn(7, 33, 3, 3).permute(0, 2, 3, 1)                          # (7, 3, 3, 33), not contiguous
    codebook, upstream = torch.randn(33, 5, requires_grad=True), torch.randn(7, 3, 3, 5)
    results = []
    for block in (10 ** 6, 70):
        monkeypatch.setattr(kernels, "BLOCK", block)
        z = logits.detach().clone().requires_grad_()
        out = kernels.evidential_quantize(z, codebook, 0.6, seed=2)
        grads = torch.autograd.grad([out.z_q, out.kl], [z, codebook], [upstream, torch.full_like(out.kl, -0.3)])
        results.append((*out[:2], *grads))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results))
    empty = kernels.evidential_quantize(torch.zeros(0, 33), codebook, 0.6)
    assert empty.z_q.shape == (0, 5)


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
def test_compiled_cpu_path_agrees(monkeypatch):
    monkeypatch.setattr(kernels, "COMPILE_FROM", 0)
    monkeypatch.setattr(kernels, "BLOCK", 64 * 36)
    for quantize in (kernels.evidential_quantize, kernels.gumbel_quantize):
        results = []
        for compile in (False, True):
            monkeypatch.setattr(kernels, "COMPILE", compile)
            torch.manual_seed(0)
            logits, codebook = (4 * torch.randn(150, 36)).requires_grad_(), torch.randn(36, 5, requires_grad=True)
            out = quantize(logits, codebook, 0.6, 6.0, 4)
            results.append((*out[:4], *torch.autograd.grad(out.z_q.square().sum() - out.kl.sum(), [logits, codebook])))
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*results))


def test_operators_are_registered_rightly():
    """torch.library.opcheck: schema, fake tensors and autograd registration, so that torch.compile can trust them."""
    args = (torch.randn(6, 9), torch.randn(9, 4), torch.tensor(0.5), torch.tensor([1, 2, 0]), 20.0, True, "torch")
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(kernels.quantize_op, args, test_utils=checks)


def test_wrong_arguments_are_named():
    z, m = torch.randn(4, 8), torch.randn(8, 2)
    quantize = kernels.evidential_quantize
    for call in (lambda: quantize(z, m[:7], 1.0), lambda: quantize(z, m, 1.0, math.nan),
                 lambda: quantize(z, m, 1.0, backend="cuda"), lambda: kernels.dirichlet_kl(z[:, :1])):
        with pytest.raises(ValueError):
            call()


# --------------------------------------------------------------------------------------------------- the Triton kernels

needs_triton = pytest.mark.skipif(kernels.triton is None, reason="the package triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEY = torch.tensor([3, 5, 2 ** 33], device=DEVICE)                                 # a row number beyond 32 bits


def both_backends(quantize, logits, codebook, c, dz_q, dkl, tau=0.6):
    """Outputs and gradients by PyTorch and by Triton; dz_q or dkl may be None: that gradient is then not asked for."""
    results = []
    for backend in ("torch", "triton"):
        z, m = logits.detach().clone().requires_grad_(), codebook.clone().requires_grad_()
        out = quantize(z, m, tau, c, KEY, backend)
        loss = (0 if dz_q is None else (out.z_q * dz_q).sum()) + (0 if dkl is None else (out.kl * dkl).sum())
        grads = torch.autograd.grad(loss, [z, m])
        results.append(dict(zip((*out._fields, "dlogits", "dcodebook"), (*out, *grads))))
    return results


def assert_close(got, want, tolerance, names=None):
    for name in names or want:
        x, y = got[name].float(), want[name].float()
        scale = max(0.1, y.abs().max()) if name in ("dlogits", "dcodebook") else 1 # a gradient's own scale
        assert ((x - y).abs() / (scale + y.abs())).nan_to_num(0).max() <= tolerance, name
        assert torch.equal(got[name].isnan(), want[name].isnan()), name


@needs_triton
@pytest.mark.parametrize("quantize", [kernels.evidential_quantize, kernels.gumbel_quantize])
@pytest.mark.parametrize("rows, K, D, c", [(1, 2, 1, 20.0), (5, 7, 3, 20.0), (70, 70, 16, 2.0), (40, 101, 17, INF),
                                           (40, 97, 64, 30.0), (9, 40, 200, 20.0)])
def test_triton_agrees_with_pytorch(quantize, rows, K, D, c):
    generator = torch.Generator().manual_seed(K)
    for scale, mean in [(1, -6), (5, 0), (20, 30)]:
        logits = (torch.randn(rows, K, generator=generator) * scale + mean).to(DEVICE)
        codebook, dz_q = (torch.randn(n, D, generator=generator).to(DEVICE) for n in (K, rows))
        dkl = torch.randn(rows, generator=generator).to(DEVICE)
        for upstream in [(dz_q, dkl), (dz_q, None), (None, dkl)]:
            assert_close(*reversed(both_backends(quantize, logits, codebook, c, *upstream)), 1e-5)


@needs_triton
def test_triton_takes_bf16_and_strided_logits_and_ties():
    logits = (4 * torch.randn(3, 72, 5, 4, device=DEVICE)).bfloat16().permute(0, 2, 3, 1)   # bf16 has many equal maxima
    codebook, dz_q = torch.randn(72, 8, device=DEVICE), torch.randn(3, 5, 4, 8, device=DEVICE)
    dkl = torch.ones(3, 5, 4, device=DEVICE)
    want, got = both_backends(kernels.evidential_quantize, logits, codebook, 20.0, dz_q, dkl)
    assert torch.equal(got["indices"], want["indices"]) and got["dlogits"].dtype == torch.bfloat16
    assert_close(got, want, 1e-5, ("z_q", "kl", "entropy", "uncertainty", "dcodebook"))
    assert_close(got, want, 2 ** -8, ("dlogits",))                                 # rounded to bf16
    channels_last = torch.randn(2, 64, 4, 4, device=DEVICE).contiguous(memory_format=torch.channels_last)
    view = channels_last.permute(0, 2, 3, 1)
    assert view.reshape(-1, 64).data_ptr() == channels_last.data_ptr()            # the encoder's layout: no hidden copy


@needs_triton
def test_triton_kl_against_80_digits():
    for mean, sd, c in [(-6, 1, 20.0), (0, 5, INF), (20, 5, 30.0)]:
        z = (sd * torch.randn(3, 40, device=DEVICE) + mean).requires_grad_()
        kl = kernels.dirichlet_kl(z, c, "triton")
        kl.sum().backward()
        for row in range(3):
            want, want_grad = exact_kl(z.detach()[row].cpu(), c)
            assert abs(kl[row].item() - want) <= 1e-5 * max(1, want)
            error = mp.norm([g - w for g, w in zip(z.grad[row].tolist(), want_grad)])
            assert error <= 1e-5 * (mp.norm(want_grad) + 0.1 * mp.sqrt(40))


@needs_triton
def test_triton_does_not_depend_on_its_tiles(monkeypatch):
    logits, codebook = 3 * torch.randn(70, 100, device=DEVICE), torch.randn(100, 8, device=DEVICE)
    dz_q, dkl, original = torch.randn(70, 8, device=DEVICE), torch.randn(70, device=DEVICE), kernels.tiles
    want = both_backends(kernels.evidential_quantize, logits, codebook, 20.0, dz_q, dkl)[1]
    for size in (dict(BLOCK_P=16, BLOCK_K=128), dict(BLOCK_P=64, BLOCK_K=16)):
        monkeypatch.setattr(kernels, "tiles", lambda kernel, D: original(kernel, D) | size)
        assert_close(both_backends(kernels.evidential_quantize, logits, codebook, 20.0, dz_q, dkl)[1], want, 1e-5)


@needs_triton
def test_triton_samples_follow_pi():
    logits, n = torch.tensor([[2.0, 0.0, -1.0, 1.0, 3.0, -5.0, 0.5]], device=DEVICE), 6000
    eye = torch.eye(7, device=DEVICE)
    one_hot = kernels.evidential_quantize(logits.expand(n, 7), eye, 1e-6, seed=9, backend="triton").z_q
    alpha = logits.double().exp() + 1
    expected = n * (alpha / alpha.sum())[0]
    assert ((one_hot.double().sum(0) - expected) ** 2 / expected).sum() < 27.9     # 6 degrees of freedom, p = 1e-4


COMPILE = """
import re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import kernels as k
cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
for kernel in (k.forward_kernel, k.backward_kernel):
    for K, D, dtype, evidential, arch in [
            (512, 16, "fp32", True, 80), (512, 16, "fp32", True, 90), (512, 16, "bf16", False, 90),
            (8192, 64, "fp32", True, 80), (8192, 64, "bf16", True, 90), (100, 16, "fp32", True, 90)]:
        size = k.tiles(kernel, D)
        options = {n: size.pop(n) for n in ("num_warps", "num_stages", "enable_fp_fusion")}
        polynomials = dict(L=k.L_POLY, LN=k.LN_POLY, Q=k.Q_POLY, W=k.W_POLY)
        fixed = dict(size, **polynomials, **{n + "_N": len(p) for n, p in polynomials.items()},
                     PRECISION="tf32x3", K=K, D=D, EVIDENTIAL=evidential, stride_k=1)
        types = dict(logits="*" + dtype, dlogits="*" + dtype, key="*i64", indices="*i64", rows="i32",
                     rows_a_program="i32", stride_p="i32", max_logit="fp32", r_k="fp32", ln_k="fp32")
        signature = {n: "constexpr" if n in fixed else types.get(n, "*fp32") for n in kernel.arg_names}
        constants = {(i,): fixed[n] for i, n in enumerate(kernel.arg_names) if n in fixed}
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names)
                   if signature[n][0] == "*" or n in ("rows", "rows_a_program") or n == "stride_p" and K % 16 == 0}
        source = ASTSource(kernel, signature, constants, aligned)
        binary = triton.compile(source, GPUTarget("cuda", arch, 32), options).asm["cubin"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(binary), f.flush()
            usage = subprocess.run([cuobjdump, "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
        print(kernel.__name__, K, D, dtype, arch, *re.search(r"REG:(\\d+) STACK:(\\d+)", usage).groups())
"""


@needs_triton
def test_kernels_compile_for_gpus_that_are_not_here_without_spills():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 12
    for *what, registers, stack in lines:
        assert 32 < int(registers) <= 255 and int(stack) == 0, what              # a spilled register lives on the stack


def test_triton_where_it_cannot_run_is_one_clear_line(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a GPU|needs the package"):
        kernels.evidential_quantize(torch.randn(2, 8), torch.randn(8, 2), 1.0, backend="triton")
    assert kernels.evidential_quantize(torch.randn(2, 8), torch.randn(8, 2), 1.0).z_q.shape == (2, 2)


def test_importing_needs_no_triton():
    code = ("import sys; sys.modules['triton'] = None; import kernels, torch; "
            "print(kernels.dirichlet_kl(torch.zeros(2, 512))[0].item())")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and float(done.stdout) == pytest.approx(59.2597, abs=1e-3), done.stderr


def test_operators_work_inside_torch_compile_without_a_graph_break():
    codebook = torch.randn(24, 4, requires_grad=True)

    def step(z, m, tau):
        out = kernels.evidential_quantize(2 * z, m, tau, 20.0, torch.tensor([1, 2, 0]))
        return out.z_q.square().sum() + out.kl.sum()
    grads = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        z = torch.randn(10, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
        grads.append(torch.autograd.grad(f(z, codebook, torch.tensor(0.5)), [z, codebook]))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads))


# --------------------------------------------------------------------------------------- networks, schedules, measures

def vae(**changes):
    args = train_vae.PAPER | dict(width=8, codebook_size=12, code_dim=4, first_kernel=3, size=16, model="edvae",
                                  kl="exact", backend="auto")
    return train_vae.VAE(args | changes)


def test_parameter_count_is_the_authors():
    assert sum(p.numel() for p in vae(width=128, codebook_size=512, code_dim=16).parameters()) == 5_195_907


@pytest.mark.parametrize("size", [16, 32, 64])
def test_shapes_through_the_model(size):
    model, x = vae(first_kernel=7), torch.rand(2, 3, size, size)
    indices = model.encode(x)
    assert indices.shape == (2, size // 4, size // 4) and model.decode(indices).shape == x.shape
    loss, stats = model(x, torch.ones(()), torch.tensor(0.5), 0)
    assert torch.allclose(loss, stats.mse + 0.5 * stats.kl.mean())                 # Eq. 8
    assert model.decode(indices).min() >= 0 and model.decode(indices).max() <= 1


@pytest.mark.parametrize("model", train_vae.SYSTEMS)
def test_every_system_compiles_and_agrees(model):
    """What a GPU run compiles, traced here: the same loss and gradients with a backward that computes anew what it can;
    no graph break, but around quantisers that move their codes in the forward."""
    x, key, results = torch.rand(4, 3, 16, 16), torch.tensor([1, 2, 0]), []
    how = dict(fullgraph=model not in ("vqvae-ema", "vq-ste++"), backend="aot_eager_decomp_partition")
    bottleneck = "triton" if kernels.triton and DEVICE == "cpu" else "auto"        # interpreted
    for compile in (lambda net: net, lambda net: torch.compile(net, **how)):
        torch.manual_seed(0)
        net = vae(model=model, codebook_init="normal", replace_after=0, backend=bottleneck)
        with torch.autocast("cpu", torch.bfloat16, enabled=model in ("edvae", "dvae")):   # their blocks ask about it
            loss, stats = compile(net)(x, torch.tensor(0.7), torch.tensor(0.1), key)
        loss.backward()
        grads = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        results.append((loss.detach(), stats.indices, grads))
    scale = max(1, results[0][2].abs().max())                                      # SQ-VAE's loss is of a whole image
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6 * scale) for a, b in zip(*results))


def test_block_keeps_its_input_and_scales_the_branch():
    block, x = train_vae.Block(8, 8, (3, 3, 3, 1)), torch.randn(2, 8, 6, 6)
    before, h = x.clone(), x
    for conv in block.res:
        h = conv(torch.relu(h))
    assert torch.allclose(block(x), x + h / 36) and torch.equal(x, before)         # no in-place ReLU on the skip


def test_schedules_are_the_papers_and_compress():
    args = train_vae.settings(["--dataset", "cifar10", "--device", "cpu"])[0]
    assert (args.steps, args.beta_ramp, args.lr_anneal) == (150_000, 5000, 50_000)
    lr, beta, tau = zip(*(train_vae.schedules(t, args) for t in (0, 2500, 5000, 25_000, 50_000, 150_000)))
    assert lr == pytest.approx((1e-3, 9.9692e-4, 9.8770e-4, 7.0747e-4, 1.25e-6, 1.25e-6), rel=1e-4)
    assert beta == pytest.approx((0, 5e-7 * 0.292893, 5e-7, 5e-7, 5e-7, 5e-7), rel=1e-5)
    assert tau == pytest.approx((1, 0.975310, 0.951229, 0.778801, 0.606531, 0.223130), rel=1e-5)
    short = train_vae.settings(["--dataset", "cifar10", "--device", "cpu", "--steps", "3000"])[0]
    for t in (0, 50, 100, 999, 3000):
        assert train_vae.schedules(t, short) == pytest.approx(train_vae.schedules(50 * t, args))


def test_perplexity_of_known_histograms():
    assert train_vae.perplexity(torch.full((512,), 7)) == pytest.approx(512)
    assert train_vae.perplexity(torch.tensor([0, 9, 0])) == pytest.approx(1)
    assert train_vae.perplexity(torch.tensor([1, 1, 2, 0])) == pytest.approx(2 ** 1.5)


def test_measures_do_not_depend_on_the_batch_size():
    model, images = vae().eval(), torch.randint(0, 256, (24, 16, 16, 3), dtype=torch.uint8)
    model.encoder.head.weight.data *= 3000                                         # logits with something to measure
    lines = []
    for batch in (24, 5):
        meter = train_vae.Meter(12, "cpu")
        for i in range(0, 24, batch):
            meter.add(*model(train_vae.to_float(images[i:i + batch]), torch.ones(()), 0.1, 0, hard=True))
        lines.append(meter.read())
    assert lines[0] == pytest.approx(lines[1], rel=1e-5)
    x = train_vae.to_float(images)                                                 # against the definitions
    q = kernels.evidential_quantize(model.z_e(x), model.quantizer.codebook, 1.0)
    x_hat = model.x_hat(model.quantizer.codebook[q.indices])
    assert lines[0]["mse"] == pytest.approx((x_hat - x).square().mean().item(), rel=1e-5)
    assert lines[0]["entropy_std"] == pytest.approx(q.entropy.std(correction=0).item(), rel=1e-3)
    p = torch.bincount(model.encode(x).flatten(), minlength=12) / 24 / 16
    entropy = torch.distributions.Categorical(probs=p).entropy()
    assert lines[0]["perplexity"] == pytest.approx(entropy.exp().item(), rel=1e-5)


def test_every_image_is_seen_once_an_epoch_whatever_the_batch():
    for batch in (7, 25, 60):
        seen = torch.cat([train_vae.batch_indices(step, batch, 25, 3) for step in range(25)])
        assert len(seen) == 25 * batch and torch.bincount(seen[:25 * (len(seen) // 25)]).unique().numel() == 1
        assert torch.equal(seen, torch.cat([train_vae.shuffle(e, 25, 3) for e in range(batch)]))


# ----------------------------------------------------------------------------------------------- the other five systems

def quantizer(model, **changes):
    args = dict(model=model, kl="exact", backend="auto", codebook_size=6, code_dim=4, codebook_init="normal")
    return train_vae.QUANTIZERS[model](train_vae.PAPER | train_vae.SYSTEMS[model] | args | changes)


def test_ema_codes_that_are_never_hit_stay_put():
    q = quantizer("vqvae-ema")
    before, z = q.codebook.detach().clone(), quantizer("vqvae-ema").codebook.detach()[:1].expand(50, 4)
    q.codebook.data[0] = z[0]
    for _ in range(5):
        assert (q(z[None, None], 1.0, 0.25, 0).indices == 0).all()
    ratio = q.codebook[1:].norm(dim=1) / before[1:].norm(dim=1)
    assert (ratio > 0.5).all() and (ratio < 2).all()                               # starting from N = 0 it would be 1e5


def test_ema_converges_to_the_mean_of_its_cell_and_eval_changes_nothing():
    q, z = quantizer("vqvae-ema", ema_decay=0.9), torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]).requires_grad_()
    k, errors = q(z, 1.0, 0.25, 0).indices.item(), []
    for _ in range(60):
        out = q(z, 1.0, 0.25, 0)
        errors.append((q.codebook[k] - z[0, 0, 0]).norm().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01
    assert torch.allclose(q.sum[k] / q.count[k], q.codebook[k], rtol=1e-3)
    (out.z_q.sum() + out.loss).backward()
    commitment = 0.25 * (q.sum[k] / q.count[k] - z).square().mean()
    assert q.codebook.grad is None and torch.allclose(out.loss, commitment, atol=1e-4)
    before = [b.clone() for b in q.state_dict().values()]
    q.eval()(torch.randn(1, 3, 3, 4), 1.0, 0.25, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, q.state_dict().values()))


@pytest.mark.parametrize("model", train_vae.SYSTEMS)
def test_eval_changes_no_state_and_encode_repeats(model):
    net, x = vae(model=model, variance="position").eval(), torch.rand(2, 3, 16, 16)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net(x, torch.ones(()), 0.1, 0, hard=True)
    assert torch.equal(net.encode(x), net.encode(x)) and same(before, net.state_dict())
    assert torch.equal(net(x, torch.ones(()), 0.1, 0)[1].indices, net.encode(x))


def test_straight_through_gradient_and_synchronised_share():
    for model in ("vqvae-ema", "vq-ste++"):
        q, z = quantizer(model, alternate=False, replace_after=0), torch.randn(2, 3, 3, 4, requires_grad=True)
        w, nu = torch.randn(2, 3, 3, 4), q.args["sync"]
        out = q(z, 1.0, 0.0, 0)
        (out.z_q * w).sum().backward()
        assert torch.equal(z.grad, w)
        if model == "vq-ste++":
            want = torch.zeros(6, 4).index_add_(0, out.indices.flatten(), w.flatten(0, 2))
            assert torch.allclose(q.codebook.grad, nu * want, atol=1e-6) and nu > 0


@pytest.mark.parametrize("model", ["gs-vqvae", "sq-vae"])
def test_soft_quantisers_at_the_limits(model):
    q, z = quantizer(model), torch.randn(3, 5, 5, 4)
    out = q(z, torch.tensor(1e-6), 1.0, 0)
    assert torch.allclose(out.z_q, q.codebook[torch.cdist(out.z_q, q.codebook[None, None]).argmin(-1)], atol=1e-5)
    assert torch.equal(out.indices, torch.cdist(z, q.codebook[None, None]).argmin(-1))   # most probable = nearest
    q.codebook.data.zero_()
    assert q(z, torch.tensor(1.0), 1.0, 0).kl.abs().max() < 1e-6                   # all codes alike: pi is uniform
    q.codebook.data = 1e3 * torch.randn(6, 4)
    assert torch.allclose(q(z, torch.tensor(1.0), 1.0, 0).kl, torch.tensor(math.log(6)), atol=1e-4)   # one-hot


def test_sqvae_variants_agree_at_unit_variance_and_fit_every_map():
    z = torch.randn(2, 8, 8, 4)
    codebook, outputs = torch.randn(6, 4), []
    for variance in ("constant", "image", "position", "element"):
        q = quantizer("sq-vae", variance=variance)
        q.codebook.data = codebook
        z_e = z if variance == "constant" else torch.cat([z, torch.zeros_like(z)], -1)
        outputs.append(q(z_e, torch.tensor(0.7), 1.0, 5))
        for N in (8, 16, 32):
            z_e = torch.randn(2, N, N, 4 if variance == "constant" else 8)
            assert q(z_e, torch.tensor(0.7), 1.0, 0).z_q.shape == (2, N, N, 4)
    for out in outputs[1:]:
        assert torch.allclose(out.z_q, outputs[0].z_q, atol=1e-5)
        assert torch.allclose(out.loss, outputs[0].loss, rtol=1e-5)


def test_sqvae_logits_and_losses_against_their_definitions():
    q, z_e = quantizer("sq-vae", variance="element"), torch.randn(2, 3, 3, 8)
    z, w = q.split(z_e)
    assert torch.allclose(w, 1 / (z_e[..., 4:].exp() + q.rho.exp()))
    want = -((z[..., None, :] - q.codebook) ** 2 * w[..., None, :] / 2).sum(-1)
    assert torch.allclose(q.logits(z, w), want, atol=1e-4)
    out, pi = q(z_e, torch.tensor(0.5), 1.0, 0), want.softmax(-1)
    discrete = (pi * pi.log()).sum() / 2
    continuous = (w / 2 * (z - out.z_q) ** 2).sum() / 2
    assert torch.allclose(out.loss, discrete + continuous, rtol=1e-4)
    slope = torch.autograd.grad((0.5 * q.split(z_e)[1] * (z - out.z_q.detach()) ** 2).sum(), q.rho)[0]
    assert slope < 0                                                        # a larger variance lowers the distance term
    x, x_hat = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8, requires_grad=True)
    total = (x_hat - x).square().sum() / 4
    plain, log = (torch.autograd.grad(f, x_hat, retain_graph=True)[0] for f in (total, q.reconstruction_loss(x_hat, x)))
    assert torch.allclose(log, 3 * 8 * 8 / 2 / total * plain, rtol=1e-4)


def test_vqste_is_plain_vq_without_its_tricks():
    q, z = quantizer("vq-ste++", alternate=False, replace_after=0, sync=0.0), torch.randn(2, 3, 3, 4)
    out = q(z, 1.0, 2.0, 0)
    nearest = train_vae.distances(z, q.codebook).argmin(-1)
    assert torch.equal(out.indices, nearest) and torch.equal(q.codes(), q.codebook)
    assert torch.allclose(out.loss, 2 * (z - q.codebook[nearest]).square().mean()) # (0.05 + 0.95) of one distance


def test_vqste_reads_the_codebook_again_after_the_inner_step_and_moves_unused_codes():
    q, z = quantizer("vq-ste++", replace_after=0), torch.randn(4, 3, 3, 4)
    q.shift.data += 0.05                                                           # an affine map that does something
    before = q.codes().detach().clone()
    out = q(z, 1.0, 1.0, 0)
    used = torch.bincount(out.indices.flatten(), minlength=6)
    assert torch.allclose(out.z_q, q.codes()[out.indices], atol=1e-6)              # of the moved codebook
    k = used.argmax()
    mean = z[out.indices == k].mean(0)
    assert (q.codes()[k] - mean).norm() < (before[k] - mean).norm()
    out.z_q.square().sum().backward()                                              # through the sync, no stale graph
    assert q.codebook.grad is None and q.shift.grad.abs().sum() > 0 and q.scale.grad.abs().sum() > 0
    moved = q.codes().detach().clone()
    q.shift.data += 0.01
    assert ((q.codes() - moved).abs().sum(1) > 0).all()                            # a, t are shared: all codes move


def test_vqste_replaces_a_dead_code_on_time_and_through_the_affine_map():
    q = quantizer("vq-ste++", replace_after=3, alternate=False)
    q.scale.data += 0.02
    q.shift.data += 0.03
    z = q.codes()[:1].detach().expand(1, 5, 5, 4) + 0.01 * torch.randn(1, 5, 5, 4)
    q.codebook.data[1:] += 50                                                      # codes 1 to 5 are never nearest
    for forward in range(1, 4):
        q.eval()(z, 1.0, 0.0, 0)                                                   # never counts in eval
        before = q.codes()[1:].detach().clone()
        q.train()(z, 1.0, 0.0, 0)
        moved = (q.codes()[1:] - before).abs().sum(1) > 0
        assert moved.all() if forward == 3 else not moved.any()
    assert torch.cdist(q.codes()[1:], z.flatten(0, 2)).min(1).values.max() < 0.1   # c, not e, lies on z_e


def test_vqste_kmeans_start_covers_the_data():
    q = quantizer("vq-ste++")
    clusters = 10 * torch.randn(6, 4)
    z = clusters[torch.arange(600) % 6].view(1, 20, 30, 4) + 0.01 * torch.randn(1, 20, 30, 4)
    q.shift.data += 0.2
    q.start(z)
    assert torch.cdist(clusters, q.codes()).min(1).values.max() < 0.1


PROCESSES = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {here!r})
import train_vae, test_edvae
def work(rank, world, path):
    if world > 1:
        dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=world)
    torch.manual_seed(0)
    z = torch.randn(4, 6, 6, 4)[rank * 4 // world:(rank + 1) * 4 // world]
    torch.manual_seed(1)
    states = []
    for model in ("vqvae-ema", "vq-ste++"):
        q = test_edvae.quantizer(model, replace_after=0)
        for _ in range(3):
            q(z, 1.0, 0.25, 0)
        states.append(q.codebook.detach().clone())
    torch.manual_seed(2 + rank)                                                    # what is drawn must come from rank 0
    q = test_edvae.quantizer("vq-ste++", replace_after=1)
    q.codebook.data = torch.arange(24.).view(6, 4)
    q.start(z)
    q.codebook.data[3] = 99.0
    q(z, 1.0, 0.25, 0)
    torch.save([*states, q.codebook.detach()], path + str(rank) + "of" + str(world))
    if world > 1:
        dist.destroy_process_group()
if __name__ == "__main__":
    import torch.multiprocessing as mp
    work(0, 1, sys.argv[1])
    mp.spawn(work, (2, sys.argv[1]), nprocs=2)
"""


def test_codebook_statistics_are_those_of_all_processes(tmp_path):
    (tmp_path / "work.py").write_text(PROCESSES.format(here=str(HERE)))
    command = [sys.executable, tmp_path / "work.py", tmp_path / "x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    one, first, second = (torch.load(tmp_path / f"x{name}") for name in ("0of1", "0of2", "1of2"))
    for alone, a, b in zip(one, first, second):
        assert torch.equal(a, b)
    assert all(torch.allclose(alone, a, atol=1e-6) for alone, a in zip(one[:2], first[:2]))
    assert first[2].abs().max() < 50                                               # the dead code was replaced on both


# ----------------------------------------------------------------------------------------------------------------- data

def test_cache_is_used_alone(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "cifar10-test-32.npy", images)
    assert np.array_equal(train_vae.load_images("cifar10", "test", tmp_path), images)


def test_cifar10_reader(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        (folder / name).write_bytes(pickle.dumps({"data": pixels[i].reshape(1, -1), "labels": [0]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["x"]}))
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a: True)
    assert np.array_equal(train_vae.load_images("cifar10", "train", tmp_path), pixels[:5].transpose(0, 2, 3, 1))
    assert np.array_equal(train_vae.load_images("cifar10", "test", tmp_path), pixels[5:].transpose(0, 2, 3, 1))


def test_celeba_reader_crops_and_splits_a_folder_placed_by_hand(tmp_path):
    folder = tmp_path / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    image = np.zeros((218, 178, 3), np.uint8)
    image[39:179, 19:159] = 200                                                    # the centre 140 x 140
    for name in ("000001", "162770", "162771", "182638"):
        Image.fromarray(image).save(folder / f"{name}.jpg", quality=100)
    train, test = (train_vae.load_images("celeba", split, tmp_path) for split in ("train", "test"))
    assert train.shape == (2, 64, 64, 3) and test.shape == (1, 64, 64, 3) and abs(train.astype(int) - 200).max() <= 2


def test_lsun_reader(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    import io
    database = lmdb.open(str(tmp_path / "church_outdoor_val_lmdb"), map_size=2 ** 22)
    with database.begin(write=True) as transaction:
        for key in (b"a", b"b"):
            buffer = io.BytesIO()
            Image.new("RGB", (200, 100), (10, 20, 30)).save(buffer, "png")
            transaction.put(key, buffer.getvalue())
    database.close()
    images = train_vae.load_images("lsun-church", "test", tmp_path)
    assert images.shape == (2, 128, 128, 3) and (images == (10, 20, 30)).all()


def test_folder_reader_takes_every_kind_of_image(tmp_path):
    Image.new("L", (9, 12), 100).save(tmp_path / "0-grey.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "1-alpha.png")       # transparent: white shows
    Image.new("RGB", (8, 8), (1, 2, 3)).quantize(4).save(tmp_path / "2-palette.gif")
    Image.fromarray(np.full((8, 8), 257 * 50, np.uint16)).save(tmp_path / "3-sixteen-bit.png")
    Image.new("RGB", (1, 1), (7, 8, 9)).save(tmp_path / "4-tiny.bmp")
    rotated = Image.fromarray(np.repeat(np.array([[[0] * 3, [255] * 3]], np.uint8), 2, 0).repeat(8, 0).repeat(8, 1))
    exif = Image.Exif()
    exif[0x112] = 3                                                                # upside down
    rotated.save(tmp_path / "5-turned.jpg", exif=exif, quality=100)
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (30, 10), (9, 9, 9)).save(tmp_path / "sub" / "wide.webp", lossless=True)
    (tmp_path / "notes.txt").write_text("not an image")
    images = train_vae.load_images("folder", "train", tmp_path, 8).astype(int)
    assert images.shape == (7, 8, 8, 3)
    for i, value in enumerate([(100,) * 3, (255,) * 3, (1, 2, 3), (50,) * 3, (7, 8, 9)]):
        assert abs(images[i] - value).max() <= 1, i
    assert images[5, :, 0].min() > 200 and images[5, :, -1].max() < 55 and (images[6] == 9).all()


def test_folder_reader_splits(tmp_path):
    for i in range(20):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:02}.png")
    test = train_vae.load_images("folder", "test", tmp_path, 8)
    train = train_vae.load_images("folder", "train", tmp_path, 8)
    assert test[:, 0, 0, 0].tolist() == [9, 19] and len(train) == 18


def test_shapes_are_varied_and_repeatable():
    a, b = (train_vae.draw_shapes(200, 32, np.random.default_rng(1)) for _ in range(2))
    assert np.array_equal(a, b) and a.dtype == np.uint8 and a.mean((1, 2)).std() > 30 and a.std((1, 2)).mean() > 20


# --------------------------------------------------------------------------------------------------------- the script

def states(folder):
    ckpt = torch.load(folder / "ckpt.pt", weights_only=True)
    return ckpt, [ckpt["model"], {str(i): s for i, s in ckpt["optimizer"]["state"].items()}]


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b)


@pytest.mark.parametrize("model", train_vae.SYSTEMS)
def test_a_run_from_start_to_finish(photos, tmp_path, capsys, model):
    arguments = tiny(photos, tmp_path / "r", "--steps", 6, "--log-every", 2, "--eval-every", 3, "--model", model)
    done = run("train_vae.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stdout and "min left" in done.stdout and "perplexity" in done.stdout.splitlines()[-2]
    lines = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 6]
    assert [line.get("split") for line in lines] == [None, "test", None, None, "test"]
    keys = {"step", "loss", "mse", "kl", "beta", "tau", "lr", "perplexity", "entropy_mean", "entropy_std",
            "uncertainty"}
    assert all(keys <= line.keys() for line in lines) and "images_per_second" in lines[0]
    assert (lines[0]["uncertainty"] is None) == (model != "edvae")
    assert json.loads((tmp_path / "r" / "args.json").read_text())["environment"]["torch"] == torch.__version__
    assert Image.open(tmp_path / "r" / "recon.png").size[0] > 100
    loaded = train_vae.load_vae(tmp_path / "r")
    x = train_vae.to_float(torch.from_numpy(np.array(train_vae.load_images("folder", "test", photos, 16))))
    indices = loaded.encode(x)
    assert indices.shape == (6, 4, 4) and torch.equal(indices, loaded.encode(x)) and not loaded.training
    with pytest.raises(SystemExit) as e:
        train_vae.main(arguments)
    assert e.value.code == 2 and re.fullmatch(".* already holds a run.*\n", capsys.readouterr().err)


def test_textbook_kl_trains_and_is_logged(photos, tmp_path):
    logged = []
    for kl in ("exact", "textbook"):
        train_vae.main(tiny(photos, tmp_path / kl, "--steps", 2, "--kl", kl))
        logged.append(json.loads((tmp_path / kl / "log.jsonl").read_text().splitlines()[0])["kl"])
    assert logged[0] == pytest.approx(logged[1], rel=1e-3) and logged[0] != logged[1]   # alike at small evidence


def test_resume_ends_with_the_same_bits(photos, tmp_path, monkeypatch):
    original = train_vae.save_checkpoint

    def save_and_keep(folder, state):
        original(folder, state)
        if state["step"] == 4:                                                     # as if killed after it
            shutil.copytree(folder, tmp_path / "cut", dirs_exist_ok=True)
    monkeypatch.setattr(train_vae, "save_checkpoint", save_and_keep)
    train_vae.main(tiny(photos, tmp_path / "whole", "--steps", 9, "--save-every", 4, "--log-every", 3))
    with open(tmp_path / "cut" / "log.jsonl", "a") as f:
        f.write('{"step": 5, "loss": 1}\n')                                        # a line from after the checkpoint
    train_vae.main(["--out", str(tmp_path / "cut"), "--resume"])
    (a, a_states), (b, b_states) = states(tmp_path / "whole"), states(tmp_path / "cut")
    assert a["step"] == b["step"] == 9 and all(same(x, y) for x, y in zip(a_states, b_states))
    lines = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "split" not in line]
    assert steps == sorted(set(steps)) and 5 not in steps


def test_resume_of_nothing_starts_and_contradictions_are_named(photos, tmp_path, capsys):
    train_vae.main(tiny(photos, tmp_path / "new", "--steps", 2, "--resume"))
    (tmp_path / "new" / "ckpt.pt").unlink()                                  # as if stopped before its first checkpoint
    train_vae.main(["--out", str(tmp_path / "new"), "--resume"])
    assert torch.load(tmp_path / "new" / "ckpt.pt", weights_only=True)["step"] == 2
    with pytest.raises(SystemExit) as e:
        train_vae.main(tiny(photos, tmp_path / "new", "--steps", 2, "--resume", "--beta", "0.5"))
    assert e.value.code == 2 and "--beta 0.5 contradicts" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["edvae", "dvae", "vqvae-ema"])
def test_two_processes_train_as_one(photos, tmp_path, model):
    arguments = ["--steps", 4, "--log-every", 2, "--eval-every", 4, "--model", model]
    train_vae.main(tiny(photos, tmp_path / "one", *arguments))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    parts = ["--grad-accum", 2] if model == "edvae" else []                         # two processes, each in two parts
    command = [*torchrun, HERE / "train_vae.py", *tiny(photos, tmp_path / "two", *arguments, *parts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("images/s") == 2                                      # one process speaks
    a, b = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in ("one", "two"))
    for name, value in a["model"].items():
        assert torch.allclose(value.float(), b["model"][name].float(), atol=1e-5), name
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    for pair in zip(*logs, strict=True):                                           # measures are of the whole batch
        one, two = ({k: v for k, v in json.loads(line).items() if isinstance(v, (int, float))} for line in pair)
        one.pop("images_per_second", 0), two.pop("images_per_second", 0)
        assert one == pytest.approx(two, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("cause", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_and_leaves_its_batch(photos, tmp_path, monkeypatch, capsys, cause):
    train = tiny(photos, tmp_path / "r", "--steps", 9, "--save-every", 2, "--log-every", 9)
    schedules, forward = train_vae.schedules, train_vae.VAE.forward
    if cause == "loss":
        monkeypatch.setattr(train_vae, "schedules", lambda step, args: (1e-3, math.nan if step == 4 else 0.0, 1.0))
    else:
        def infinite_slope(self, x, tau, beta, key, hard=False):
            loss, stats = forward(self, x, tau, beta, key, hard)
            return loss + (0.0 if hard or key[1] != 4 else (0 * loss).sqrt()), stats   # adds 0; d sqrt(0) = 0 inf = nan
        monkeypatch.setattr(train_vae.VAE, "forward", infinite_slope)
    with pytest.raises(SystemExit, match="not finite at step 4: loss .* gradient norm nan, least z_e -?[0-9]"):
        train_vae.main(train)
    state = torch.load(tmp_path / "r" / "ckpt.pt", weights_only=True)
    assert state["step"] == 4 and all(v.isfinite().all() for v in state["model"].values())
    left = torch.load(tmp_path / "r" / "postmortem.pt", weights_only=True)
    images = train_vae.load_images("folder", "train", photos, 16)
    assert left["step"] == 4 and np.array_equal(left["images"], images[left["index"].tolist()])
    assert math.isfinite(left["loss"]) == (cause == "gradient") and math.isfinite(left["largest z_e"])
    monkeypatch.setattr(train_vae, "schedules", schedules), monkeypatch.setattr(train_vae.VAE, "forward", forward)
    train_vae.main(["--out", str(tmp_path / "r"), "--resume"])


def test_sigkill_and_resume_end_with_the_same_bits_and_a_folder_has_one_run(photos, tmp_path):
    arguments = ["--steps", 150, "--save-every", 7, "--log-every", 5, "--eval-every", 75]
    command = [sys.executable, HERE / "train_vae.py", *tiny(photos, tmp_path / "cut", *arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while "step     30" not in process.stdout.readline():
        pass
    second = run("train_vae.py", "--out", tmp_path / "cut", "--resume")
    running = process.poll() is None
    process.kill()
    process.wait()
    if running:                                                                    # else it was too fast to meet
        assert second.returncode == 2 and "another process is training" in second.stderr
    with open(tmp_path / "cut" / "log.jsonl", "a") as f:
        f.write('{"step": 12')                                                     # a line cut short
    (tmp_path / "cut" / "ckpt.pt.part").write_bytes(b"half a checkpoint")
    # Both in processes of their own: in this one, threads of earlier tests began before denormals were flushed.
    both = [subprocess.Popen([sys.executable, HERE / "train_vae.py", *argv], stderr=subprocess.PIPE, text=True)
            for argv in (["--out", tmp_path / "cut", "--resume"], tiny(photos, tmp_path / "whole", *arguments))]
    for process in both:
        error = process.communicate(timeout=280)[1]
        assert process.returncode == 0, error
    (a, a_states), (b, b_states) = states(tmp_path / "whole"), states(tmp_path / "cut")
    assert a["step"] == b["step"] == 150 and all(same(x, y) for x, y in zip(a_states, b_states))
    logs = []
    for name in ("whole", "cut"):
        logs.append([json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()])
        for line in logs[-1]:
            line.pop("images_per_second", None)
    # Sums of a log line cover the steps since the line before or since the resumption: those two may differ.
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]
    assert sum(a != b for a, b in zip(*logs)) <= 1


def test_a_disk_that_is_full_spares_the_checkpoint(photos, tmp_path):
    import resource
    train_vae.main(tiny(photos, tmp_path / "r", "--steps", 4))
    state = torch.load(tmp_path / "r" / "ckpt.pt", weights_only=True)
    state["step"], before = 2, (tmp_path / "r" / "ckpt.pt").stat().st_size         # as if two steps were left
    torch.save(state, tmp_path / "r" / "ckpt.pt")
    before = (tmp_path / "r" / "ckpt.pt").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2)
    command = [sys.executable, HERE / "train_vae.py", "--out", tmp_path / "r", "--resume", "--save-every", "1"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=100)
    assert done.returncode == 2 and "the one from before is whole" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "r" / "ckpt.pt").read_bytes() == before
    train_vae.main(["--out", str(tmp_path / "r"), "--resume"])
    assert torch.load(tmp_path / "r" / "ckpt.pt", weights_only=True)["step"] == 4


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_is_flat_over_2000_steps(photos, tmp_path, monkeypatch):
    resident, schedules = {}, train_vae.schedules

    def watch(step, args):
        if step in (500, 1999):
            resident[step] = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20
        return schedules(step, args)
    monkeypatch.setattr(train_vae, "schedules", watch)
    train_vae.main(["--dataset", "folder", "--data-dir", str(photos), "--out", str(tmp_path / "r"), "--size", "8",
                    "--model", "gs-vqvae", "--width", "4", "--codebook-size", "4", "--batch-size", "4", "--steps",
                    "2000", "--no-compile", "--precision", "fp32", "--device", "cpu", "--log-every", "10",
                    "--save-every", "100"])
    assert resident[1999] - resident[500] < 8                                      # MiB


def test_too_little_memory_is_one_clear_line(photos, tmp_path):
    import resource
    command = [sys.executable, HERE / "train_vae.py", *tiny(photos, tmp_path / "r", "--batch-size", 2 ** 18)]
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (6 * 2 ** 30,) * 2)
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=100)
    assert done.returncode == 2 and "out of memory: take a smaller --batch-size" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("model", ["edvae", "dvae", "gs-vqvae"])
def test_parts_of_a_batch_add_up_to_it(photos, tmp_path, model):
    for parts in (1, 4):
        train_vae.main(tiny(photos, tmp_path / str(parts), "--steps", 4, "--model", model, "--grad-accum", parts))
    (a, _), (b, _) = states(tmp_path / "1"), states(tmp_path / "4")
    assert all(torch.allclose(v, b["model"][k], atol=1e-5) for k, v in a["model"].items())
    assert a["args"]["grad_accum"] == 1 and b["args"]["grad_accum"] == 4


def test_the_fast_path_has_the_plain_paths_loss_curve(photos, tmp_path, monkeypatch):
    curves = []
    monkeypatch.setattr(kernels, "COMPILE_FROM", 0)
    for how in (["fp32", "--no-compile"], ["bf16", "--compile"]):
        arguments = ["--dataset", "folder", "--data-dir", photos, "--out", tmp_path / how[0], "--size", 16, "--width",
                     32, "--codebook-size", 64, "--batch-size", 16, "--steps", 120, "--log-every", 20, "--lr", 2e-3,
                     "--lr-anneal", 320, "--beta-ramp", 24, "--max-logit", "inf", "--device", "cpu",
                     "--precision", *how]
        train_vae.main([str(a) for a in arguments])
        lines = [json.loads(line) for line in (tmp_path / how[0] / "log.jsonl").read_text().splitlines()]
        curves.append([line["mse"] for line in lines if "split" not in line])
    assert curves[0][-1] < 0.85 * curves[0][0]                                     # it learns
    assert curves[1] == pytest.approx(curves[0], rel=0.01)


def test_profile_names_every_part_and_writes_no_run(photos, tmp_path, capsys):
    train_vae.main(tiny(photos, tmp_path / "r", "--profile"))
    told = capsys.readouterr().out
    assert not (tmp_path / "r").exists()
    parts = dict(re.findall(r"^([a-z ]+?)  +([-0-9.]+) ms", told, re.M))
    assert parts.keys() == {"data", "encoder", "bottleneck", "decoder", "backward of the bottleneck",
                            "backward of the rest", "optimiser", "all else"}
    total = float(re.search(r"([0-9.]+) ms a step", told)[1])
    assert all(float(v) > 0 for k, v in parts.items() if k != "all else")
    assert sum(map(float, parts.values())) == pytest.approx(total, abs=0.1)


def test_contenders_of_the_benchmark_train(photos):
    argv = tiny(photos, "unused", "--steps", 50)
    times = train_vae.compete({"textbook": (argv, True, False), "this file": (argv, False, True)}, 2, 2)
    assert all(0 < seconds < 60 and 100 < memory < 20_000 for seconds, memory in times.values())
    args = train_vae.settings(["--dataset", "cifar10", "--width", "4", "--device", "cpu"])[0]
    kept, largest, parameters = train_vae.saved_bytes(args)
    assert parameters == sum(p.numel() for p in train_vae.VAE(vars(args)).parameters())
    assert kept > largest >= 64 * 512 * 4                                          # the logits of 8 x 8 positions


def test_interrupt_finishes_the_step_and_keeps_it(photos, tmp_path):
    command = [sys.executable, HERE / "train_vae.py", *tiny(photos, tmp_path / "r", "--steps", 10 ** 6)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "parameters" in line:
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "--resume" in output
    step = torch.load(tmp_path / "r" / "ckpt.pt", weights_only=True)["step"]
    assert step > 0 and json.loads((tmp_path / "r" / "log.jsonl").read_text().splitlines()[-1])["step"] == step


def test_a_folder_of_few_images(tmp_path, capsys):
    for i, image in enumerate(train_vae.draw_shapes(21, 16, np.random.default_rng(0))):   # 1 and 20: a row and a part
        path = tmp_path / "images" / ("test" if i else "train") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    train_vae.main(tiny(tmp_path / "images", tmp_path / "r", "--steps", 2))
    assert Image.open(tmp_path / "r" / "recon.png").size[1] < 300                  # the one whole row of twelve
    with pytest.raises(SystemExit) as stop:
        train_prior.main(prior_arguments(tmp_path / "r", tmp_path / "p"))
    assert stop.value.code == 2 and "a prior needs at least 2" in capsys.readouterr().err
    with pytest.raises(train_vae.UserError, match="at least 2 images"):
        evaluate.Moments().read()


def test_the_embedded_default_runs_alone(tmp_path):
    done = run("train_vae.py", "--steps", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "shapes-edvae-1" / "recon.png").exists() and "codes used" in done.stdout
    assert np.load(tmp_path / "data" / "shapes-train-32.npy", mmap_mode="r").shape == (20_000, 32, 32, 3)


# ---------------------------------------------------------------------------------------------- the prior and sampling

def pixelsnail(K=7, N=5, **changes):
    model = train_prior.PixelSNAIL(K, N, **dict(width=16, blocks=2, layers=2, dropout=0.0) | changes).eval()
    for p in model.parameters():                                                   # large enough that a leak would show
        p.data.mul_(1.5)
    return model


def test_prior_sees_only_earlier_positions():
    model, codes = pixelsnail(), torch.randint(7, (2, 5, 5))
    want = model(codes)
    for p in range(25):                                                            # by perturbation, at every position
        changed = codes.clone()
        changed[:, p // 5, p % 5] = (changed[:, p // 5, p % 5] + 1) % 7
        difference = (model(changed) - want).abs().flatten(1, 2).sum((0, 2))       # (N N)
        assert difference[:p + 1].max() == 0 and (p == 24 or difference[p + 1:].max() > 0)
    assert torch.equal(model(torch.randint(7, (2, 5, 5)))[:, 0, 0], want[:, 0, 0])   # position 0 sees nothing
    x = model.embedding(codes).permute(0, 3, 1, 2).detach().requires_grad_()       # and by autograd
    logits = model.after_stem(model.stem(x), model.background.expand(2, -1, -1, -1)).flatten(2)   # (B, K, N N)
    for p in range(25):
        grad = torch.autograd.grad(logits[..., p].square().sum(), x, retain_graph=True)[0]
        assert grad.flatten(2)[..., p:].abs().max() == 0


def test_attention_of_the_first_position_is_zero():
    attention = train_prior.CausalAttention(6, 10, 16)
    out = attention(torch.randn(3, 6, 4, 4), torch.randn(3, 10, 4, 4))
    assert (out[:, :, 0, 0] == 0).all() and (out[:, :, 0, 1] != 0).any() and out.isfinite().all()


@pytest.mark.parametrize("K, N, width, blocks", [(7, 5, 16, 2), (30, 8, 32, 1), (3, 1, 16, 1)])
def test_incremental_logits_are_the_full_networks(K, N, width, blocks):
    model, codes = pixelsnail(K, N, width=width, blocks=blocks), torch.randint(K, (3, N, N))
    want, cache = model(codes), train_prior.Cache(3, N)
    with torch.no_grad():
        for i in range(N):
            for j in range(N):
                assert (model.step(cache) - want[:, i, j]).abs().max() < 1e-4
                model.put(cache, codes[:, i, j])


def test_samples_follow_the_model_and_do_not_depend_on_the_batch():
    model = pixelsnail(K=2, N=2)
    every = torch.tensor([[(m >> p) & 1 for p in range(4)] for m in range(16)]).view(16, 2, 2)   # all 16 maps
    log_p = model(every).log_softmax(-1).gather(-1, every[..., None]).sum((1, 2, 3))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)                  # the chain rule, by brute force
    n = 4000
    drawn = (model.sample(n, seed=1).view(n, 4) * torch.tensor([1, 2, 4, 8])).sum(1)
    expected = n * log_p.exp()
    assert ((torch.bincount(drawn, minlength=16) - expected) ** 2 / expected).sum() < 45   # 15 degrees, p = 1e-4
    model = pixelsnail()
    whole = model.sample(6, seed=3)
    assert torch.equal(whole[4:], model.sample(2, seed=3, first=4)) and not torch.equal(whole, model.sample(6, seed=4))


def test_sampling_options():
    model = pixelsnail()
    greedy = model.sample(2, top_k=1)
    assert torch.equal(model(greedy).argmax(-1), greedy) and torch.equal(greedy, model.sample(2, temperature=1e-4))
    given = torch.full((2, 5, 5), -1)
    given[:, :2] = 6
    done = model.sample(2, given=given)
    assert (done[:, :2] == 6).all()
    best_two = model(done).topk(2).indices
    kept = model.sample(2, top_k=2, given=given)
    assert (model(kept).topk(2).indices == kept[..., None]).any(-1)[:, 2:].all() and best_two.shape == (2, 5, 5, 2)


def test_prior_learns_a_batch_by_heart():
    model, codes = pixelsnail().train(), torch.randint(7, (4, 5, 5))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(120):
        loss = torch.nn.functional.cross_entropy(model(codes).flatten(0, 2), codes.flatten())
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss < 0.3 < math.log(7)


@pytest.fixture(scope="session")
def chain(photos, tmp_path_factory):
    """A tiny model and a tiny prior, trained by their scripts: their folders."""
    folder = tmp_path_factory.mktemp("chain")
    train_vae.main(tiny(photos, folder / "vae", "--steps", 30, "--lr", 0.01))
    train_prior.main(prior_arguments(folder / "vae", folder / "prior"))
    return folder


def prior_arguments(vae, out, *more):
    return [str(a) for a in ("--vae", vae, "--out", out, "--steps", 9, "--width", 16, "--blocks", 1, "--layers", 1,
                             "--batch-size", 8, "--eval-every", 3, "--device", "cpu", "--precision", "fp32", *more)]


def test_the_prior_keeps_its_run_and_its_codes(chain, photos):
    lines = [json.loads(line) for line in (chain / "prior" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9, 9] and lines[-1]["split"] == "test"
    assert lines[0]["uniform"] == pytest.approx(math.log(12)) and 0 < lines[-1]["prior_nats_per_code"] < 10
    prior, vae = train_prior.load_prior(chain / "prior"), train_vae.load_vae(chain / "vae")
    codes = train_prior.load_codes(chain / "vae", "test")
    images = torch.from_numpy(np.array(train_vae.load_images("folder", "test", photos, 16)))
    assert torch.equal(codes, vae.encode(train_vae.to_float(images)))
    args = train_prior.argparse.Namespace(device="cpu", precision="fp32")
    nats = -prior(codes).log_softmax(-1).gather(-1, codes[..., None]).mean().item()
    assert train_prior.nats_per_code(prior, codes, args) == pytest.approx(nats, rel=1e-5)
    assert not prior.training                                                      # else samples would see dropout
    assert train_prior.nats_per_code(prior.train(), codes, args) == pytest.approx(nats, rel=1e-5) and prior.training
    assert nats == pytest.approx(lines[-1]["prior_nats_per_code"], rel=1e-4)


def test_the_prior_resumes_to_the_same_bits(chain, tmp_path, monkeypatch):
    original = train_vae.save_checkpoint

    def save_and_keep(folder, state):
        original(folder, state)
        if state["step"] == 6:
            shutil.copytree(folder, tmp_path / "cut", dirs_exist_ok=True)
    monkeypatch.setattr(train_vae, "save_checkpoint", save_and_keep)
    train_prior.main(prior_arguments(chain / "vae", tmp_path / "whole"))
    train_prior.main([str(a) for a in ("--vae", chain / "vae", "--out", tmp_path / "cut", "--resume")])   # as printed
    a, b = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in ("whole", "cut"))
    assert all(same(a[k], b[k]) for k in ("model", "ema", "best")) and a["step"] == b["step"] == 9


def test_a_prior_that_is_terminated_goes_on(chain, tmp_path):
    arguments = prior_arguments(chain / "vae", tmp_path / "r")
    arguments[arguments.index("--steps") + 1] = "100000"
    process = subprocess.Popen([sys.executable, HERE / "train_prior.py", *arguments], stdout=subprocess.PIPE, text=True)
    while "step      3" not in process.stdout.readline():
        pass
    second = run("train_prior.py", *arguments, "--resume")
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert second.returncode == 2 and "another process is training" in second.stderr
    assert process.returncode == 143 and "--resume" in output
    step = torch.load(tmp_path / "r" / "ckpt.pt", weights_only=True)["step"]
    assert json.loads((tmp_path / "r" / "log.jsonl").read_text().splitlines()[-1])["step"] == step


def test_two_processes_fit_the_prior_as_one(chain, tmp_path):
    no_dropout = ["--dropout", 0]
    train_prior.main(prior_arguments(chain / "vae", tmp_path / "one", *no_dropout))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = prior_arguments(chain / "vae", tmp_path / "two", *no_dropout, "--grad-accum", 2)
    command = [*torchrun, HERE / "train_prior.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True)["model"] for name in ("one", "two"))
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


def test_a_prior_that_is_not_finite_stops_and_leaves_its_batch(chain, tmp_path, monkeypatch):
    lerp = torch._foreach_lerp_
    calls = []

    def spoil(averages, weights, share):                                           # nan from the fifth step on
        lerp(averages, weights, share)
        calls.append(0)
        if len(calls) == 5:
            weights[0].fill_(math.nan)
    monkeypatch.setattr(torch, "_foreach_lerp_", spoil)
    with pytest.raises(SystemExit, match="not finite at step 5: loss nan"):
        train_prior.main(prior_arguments(chain / "vae", tmp_path / "r"))
    left = torch.load(tmp_path / "r" / "postmortem.pt", weights_only=True)
    assert left["codes"].shape == (8, 4, 4) and torch.load(tmp_path / "r" / "ckpt.pt", weights_only=True)["step"] == 3


def test_sampling_script(chain, photos, tmp_path):
    prior = str(chain / "prior")
    six = ["--prior", prior, "-n", "6", "--device", "cpu", "--save-images"]
    done = run("sample.py", *six, tmp_path / "a", "--batch-size", 4)
    assert done.returncode == 0 and "6 of 6 images" in done.stdout, done.stderr
    sample.main([*six, str(tmp_path / "b"), "--batch-size", "3"])
    files = sorted((tmp_path / "a").iterdir())
    assert len(files) == 6 and all(f.read_bytes() == (tmp_path / "b" / f.name).read_bytes() for f in files)
    sample.main(["--prior", prior, "-n", "5", "--device", "cpu", "--out", str(tmp_path / "grid.png")])
    assert Image.open(tmp_path / "grid.png").size[0] > 100
    photo = str(photos / "03.png")
    sample.main(["--prior", prior, "-n", "6", "--device", "cpu", "--complete", photo, "--out", str(tmp_path / "c.png")])
    sample.main(["--vae", str(chain / "vae"), "--device", "cpu", "--reconstruct", photo, photo, "--out",
                 str(tmp_path / "r.png")])
    assert Image.open(tmp_path / "c.png").size[0] > 100 and Image.open(tmp_path / "r.png").size[0] > 100


# -------------------------------------------------------------------------------------------------------- evaluation

def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    assert evaluate.frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx(4 + (2 - 3) ** 2)
    a, b = rng.uniform(0.1, 3, (2, 6))                                             # commuting: sum of (sd - sd)^2
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    mu1, mu2 = rng.normal(size=(2, 6))
    want = ((mu1 - mu2) ** 2).sum() + ((a ** 0.5 - b ** 0.5) ** 2).sum()
    assert evaluate.frechet_distance(mu1, turn * a @ turn.T, mu2, turn * b @ turn.T) == pytest.approx(want)
    x, y = rng.normal(size=(2, 50, 6))
    c1, c2 = np.cov(x.T), np.cov(y.T @ np.diag(np.arange(50)))                     # not commuting
    want = np.trace(c1) + np.trace(c2) - 2 * np.sqrt(np.linalg.eigvals(c1 @ c2).real).sum()
    assert evaluate.frechet_distance(mu1, c1, mu1, c2) == pytest.approx(want, rel=1e-6)
    singular = np.outer(mu1, mu1)
    assert abs(evaluate.frechet_distance(mu1, singular, mu1, singular)) < 1e-5


def test_moments_stream():
    x, moments = torch.randn(100, 5) + 3, evaluate.Moments()
    for part in x.split(7):
        moments.add(part)
    mean, cov = moments.read()
    assert np.allclose(mean, x.double().mean(0)) and np.allclose(cov, np.cov(x.double().numpy().T))


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Random weights in the layout of the 2015 Inception's file."""
    torch.manual_seed(0)
    net = evaluate.torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(net.state_dict(), path)
    return path


def test_inception_pools_differ_from_torchvisions_where_they_should(inception_file):
    assert len(torch.load(inception_file)) == 566
    features = evaluate.InceptionFeatures(inception_file)
    plain = evaluate.torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False,
                                                     init_weights=False)
    plain.load_state_dict(torch.load(inception_file))
    for name, channels in (("Mixed_5b", 192), ("Mixed_6b", 768), ("Mixed_7b", 1280)):
        x = torch.rand(1, channels, 8, 8)
        with torch.no_grad():
            ours, theirs = (net._modules[name].eval()(x) for net in (features.net, plain))
        difference = (ours - theirs).abs().amax((0, 1))
        assert difference[1:-1, 1:-1].max() == 0 and difference[0].min() > 0       # padding is left out at the border
    with torch.no_grad():
        x = torch.rand(1, 2048, 8, 8)
        assert (features.net.Mixed_7c(x) - plain.Mixed_7c.eval()(x)).abs()[0, :, 1:-1, 1:-1].max() > 0   # a maximum
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    out = features(images)
    assert out.shape == (3, 2048) and torch.allclose(out[:1], features(images[:1]), atol=1e-4)


def test_inception_agrees_with_pytorch_fid(inception_file, monkeypatch):
    theirs = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *a, **k: torch.load(inception_file))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        want = theirs.InceptionV3([3]).eval()(images / 255)[0].flatten(1)
    assert torch.allclose(evaluate.InceptionFeatures(inception_file)(images), want, rtol=1e-4, atol=1e-5)


def test_metrics_of_a_run_against_an_independent_computation(chain, photos, capsys):
    evaluate.main([str(chain / "vae"), str(chain / "prior"), "--device", "cpu"])
    shown = capsys.readouterr().out
    metrics = json.loads((chain / "vae" / "metrics.json").read_text())
    assert set(evaluate.KEYS) <= metrics.keys() and "FID not measured" in shown
    assert metrics["fid"] is None and metrics["rfid"] is None and "--fid" in metrics["not_measured"]["rfid"]
    assert metrics["perplexity_batch128"] is None and "fewer than 128" in metrics["not_measured"]["perplexity_batch128"]
    model = train_vae.load_vae(chain / "vae")
    x = train_vae.to_float(torch.from_numpy(np.array(train_vae.load_images("folder", "test", photos, 16))))
    codes = model.encode(x)
    x_hat = model.decoder(model.quantizer.codebook[codes].permute(0, 3, 1, 2)) + 0.5
    assert metrics["mse"] == pytest.approx((x_hat - x).square().mean().item(), rel=1e-5)
    p = np.bincount(codes.flatten().numpy(), minlength=12) / codes.numel()
    assert metrics["perplexity"] == pytest.approx(np.exp(-sum(v * np.log(v) for v in p if v)), rel=1e-6)
    assert metrics["codes_used"] == (p > 0).sum() and metrics["codes_used"] + metrics["dead_codes"] == 12
    log = [json.loads(line) for line in (chain / "vae" / "log.jsonl").read_text().splitlines()]
    assert metrics["mse"] == pytest.approx(log[-1]["mse"], rel=1e-4)               # the training script's own test line
    assert metrics["entropy_mean"] == pytest.approx(log[-1]["entropy_mean"], rel=1e-4)
    prior = json.loads((chain / "prior" / "metrics.json").read_text())
    assert prior["prior_nats_per_code"] > 0 and prior["fid"] is None and (chain / "prior" / "nearest.png").exists()


def test_perplexity_protocols_and_sampled_codes(tmp_path):
    images = train_vae.draw_shapes(300, 16, np.random.default_rng(0))
    np.save(tmp_path / "folder-train-16.npy", images), np.save(tmp_path / "folder-test-16.npy", images)
    train_vae.main(tiny(tmp_path, tmp_path / "run", "--steps", 3))
    evaluate.main([str(tmp_path / "run"), "--device", "cpu"])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    codes = train_vae.load_vae(tmp_path / "run").encode(train_vae.to_float(torch.from_numpy(images)))
    full = codes.split(128)[:2]                                                    # the last 44 are dropped
    batches = [train_vae.perplexity(torch.bincount(c.flatten(), minlength=12)) for c in full]
    assert metrics["perplexity_batch128"] == pytest.approx(sum(batches) / 2)
    evaluate.main([str(tmp_path / "run"), "--device", "cpu", "--codes", "sample"])
    sampled = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert sampled["codes"] == "sample"
    assert sampled["perplexity"] > 11.5 > metrics["perplexity"]                    # pi is nearly uniform so early


@pytest.mark.parametrize("model", train_vae.SYSTEMS)
def test_probabilities_are_what_entropy_says(model):
    net, x = vae(model=model), torch.rand(2, 3, 16, 16)
    z_e = net.z_e(x)
    pi, latent = net.quantizer.eval().probabilities(z_e), net.quantizer(z_e, torch.ones(()), 1.0, 0)
    assert torch.allclose(pi.sum(-1), torch.ones(2, 4, 4), atol=1e-5)
    assert torch.equal(net.quantizer.assign(z_e), latent.indices)
    if latent.entropy.isfinite().all():
        assert torch.allclose(torch.distributions.Categorical(probs=pi).entropy(), latent.entropy, atol=1e-4)


def test_fid_of_a_run_and_of_samples(chain, photos, inception_file, capsys):
    evaluate.main([str(chain / "vae"), str(chain / "prior"), "--fid", "--inception", str(inception_file), "-n", "8",
                   "--device", "cpu"])
    out, err = capsys.readouterr()
    rfid = json.loads((chain / "vae" / "metrics.json").read_text())["rfid"]
    fid = json.loads((chain / "prior" / "metrics.json").read_text())["fid"]
    assert rfid > 0 and fid > 0 and "under 2,048" in err and "FID not measured" not in out
    x = np.array(train_vae.load_images("folder", "test", photos, 16))
    features = evaluate.InceptionFeatures(inception_file)
    model, parts = train_vae.load_vae(chain / "vae"), []
    images = torch.from_numpy(x).permute(0, 3, 1, 2)
    for batch in (images, (model.decode(model.encode(images / 255)) * 255).round().byte()):
        f = features(batch).double().numpy()
        parts += [f.mean(0), (f - f.mean(0)) / math.sqrt(len(f) - 1)]
    mu1, a1, mu2, a2 = parts                                                       # C = a^T a: tr (C1 C2)^(1/2) is a
    roots = np.linalg.svd(a1 @ a2.T, compute_uv=False).sum()                       # sum of singular values of a1 a2^T
    want = np.square(mu1 - mu2).sum() + np.square(a1).sum() + np.square(a2).sum() - 2 * roots
    assert rfid == pytest.approx(want, rel=1e-3)


def test_table_has_the_papers_row_and_the_mean_of_seeds():
    run = dict(model="edvae", dataset="cifar10", steps=3, seed=1)
    metrics = dict(mse=0.004, perplexity=100.0, codes_used=200)
    shown = evaluate.table([("a", run, metrics), ("b", run | dict(seed=2), metrics | dict(perplexity=104.0))])
    assert "420.33" in shown and "2.99" in shown and "102.0 ± 2.8" in shown and "mean of 2 seeds" in shown
    assert len({len(line) for line in shown.splitlines()}) == 1


def test_figures_are_made_from_run_folders(chain, photos, tmp_path):
    pytest.importorskip("matplotlib")
    train_vae.main(tiny(photos, tmp_path / "small", "--steps", 30, "--lr", 0.01, "--beta", 0.01))
    figures = ["--figures", str(tmp_path / "figures")]
    evaluate.main([str(chain / "vae"), str(tmp_path / "small"), "--device", "cpu", *figures])
    made = {path.name for path in (tmp_path / "figures").iterdir()}
    assert made >= {"training.png", "entropy.png", "entropy-maps.png", "usage.png", "reconstructions.png",
                    "sweep-beta.png", "uncertainty-vae.png", "uncertainty-small.png"}
    assert "sweep-max-logit.png" not in made                                       # the same in both
    runs = [("a", dict(model="edvae", beta=1, seed=1), {}), ("b", dict(model="edvae", beta=2, seed=2), {}),
            ("c", dict(model="dvae", beta=1, seed=1), {})]
    assert list(map(len, evaluate.alike(runs))) == [1, 1, 1] and list(map(len, evaluate.alike(runs, "beta"))) == [2, 1]


LATER = [  # script, arguments, and what the one line says
    (train_prior, [], "required"), (train_prior, ["--vae", "/nowhere"], "is not there"),
    (train_prior, ["--vae", "{vae}", "--width", "24"], "multiple of 16"),
    (train_prior, ["--vae", "{vae}", "--dropout", "1"], "at most 0.95"),
    (train_prior, ["--vae", "{vae}", "--dropout", "nan"], "at least 0"),
    (train_prior, ["--vae", "{vae}", "--steps", "0"], "at least 1"),
    (train_prior, ["--vae", "{vae}", "--resume"], "needs --out"),
    (train_prior, ["--vae", "{vae}", "--out", "{prior}"], "already holds a run"),
    (train_prior, ["--vae", "{vae}", "--out", "{prior}", "--resume", "--width", "32"], "contradicts"),
    (train_prior, ["--vae", "{vae}", "--out", "{prior}", "--resume", "--preset", "small"], "contradicts"),
    (train_prior, ["--vae", "{vae}", "--out", "{vae}", "--resume"], "no prior's checkpoint"),
    (train_prior, ["--vae", "{vae}", "--device", "tpu"], "--device tpu"),
    (sample, [], "needs --prior"), (sample, ["--prior", "/nowhere"], "is not there"),
    (sample, ["--prior", "{vae}"], "is no prior's run"), (sample, ["--prior", "{prior}", "-n", "0"], "at least 1"),
    (sample, ["--prior", "{prior}", "--temperature", "0"], "above 0"),
    (sample, ["--prior", "{prior}", "--top-k", "0"], "at least 1"),
    (sample, ["--prior", "{prior}", "--save-images", "{vae}"], "exists; name a new folder"),
    (sample, ["--prior", "{prior}", "--complete", "/nowhere.png"], "cannot read /nowhere.png"),
    (sample, ["--vae", "{vae}", "--reconstruct", "{text}"], "cannot read"),
    (sample, ["--prior", "{prior}", "-n", "1", "--out", "{text}/x.png"], "cannot write"),
    (evaluate, [], "required"), (evaluate, ["/nowhere"], "is not there"),
    (evaluate, ["{vae}", "--fid", "--inception", "/nowhere"], "is not a file"),
    (evaluate, ["{vae}", "--fid", "--inception", "{text}"], "does not hold the 2015 Inception"),
    (evaluate, ["{vae}", "-n", "0"], "at least 1"), (evaluate, ["{vae}", "--codes", "soft"], "invalid choice"),
    (evaluate, ["{vae}", "{broken}"], "damaged or not a checkpoint"),
    (evaluate, ["{vae}", "--data-dir", "{text}"], "not a folder"),
]


@pytest.mark.parametrize("script, argv, says", LATER, ids=[f"{s.__name__} {' '.join(a)}" for s, a, _ in LATER])
def test_bad_input_to_the_later_stages(script, argv, says, chain, tmp_path, capsys):
    (tmp_path / "text").write_text("not an image")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "ckpt.pt").write_bytes((chain / "vae" / "ckpt.pt").read_bytes()[:5000])
    names = dict(broken=tmp_path / "broken", vae=chain / "vae", prior=chain / "prior", text=tmp_path / "text")
    with pytest.raises(SystemExit) as e:
        script.main([a.format(**names) for a in argv])
    assert e.value.code == 2 and says in capsys.readouterr().err.strip().splitlines()[-1]


BAD = [  # arguments, and what the one line says
    (["--dataset", "mnist"], "invalid choice"), (["--model", "vae"], "invalid choice"),
    (["--steps", "0"], "at least 1"), (["--steps", "-3"], "at least 1"), (["--steps", "ten"], "whole number"),
    (["--lr", "0"], "above 0"), (["--lr", "nan"], "above 0"),
    (["--lr", "inf"], "at most"), (["--batch-size", "0"], "at least 1"), (["--width", "3"], "at least 4"),
    (["--width", "6"], "multiples of 4"), (["--codebook-size", "1"], "at least 2"),
    (["--codebook-size", "20000"], "at most 16384"),
    (["--code-dim", "0"], "at least 1"), (["--code-dim", "1000"], "at most 256"), (["--beta", "-1"], "at least 0"),
    (["--max-logit", "nan"], "at least"), (["--max-logit=-inf"], "at least"),
    (["--kl", "approximate"], "invalid choice"),
    (["--tau-rate", "-1"], "at least 0"), (["--seed", "-1"], "at least 0"), (["--device", "tpu"], "--device tpu"),
    (["--precision", "fp8"], "invalid choice"), (["--backend", "cuda"], "invalid choice"),
    (["--resume"], "needs --out"), (["--backend", "triton", "--device", "cpu"], "needs a GPU"),
    (["--dataset", "folder", "--data-dir", "/nowhere"], "not a folder"), (["--size", "30"], "multiples of 4"),
    (["--log-every", "0"], "at least 1"), (["--nonsense"], "unrecognized"),
    (["--dataset", "cifar10", "--data-dir", "{empty}"], "could not be downloaded"),
    (["--dataset", "celeba", "--data-dir", "{empty}"], "could not be downloaded"),
    (["--dataset", "folder", "--data-dir", "{empty}"], "no images"),
    (["--dataset", "folder", "--size", "16", "--data-dir", "{photos}", "--out", "{file}"], "is a file"),
    (["--dataset", "folder", "--size", "16", "--data-dir", "{photos}", "--out", "{file}/x"], "cannot make the folder"),
    (["--dataset", "folder", "--size", "16", "--data-dir", "{broken}"], "broken.png"),
    (["--dataset", "cifar10", "--data-dir", "{foreign}"], "delete it"),
    (["--dataset", "folder", "--data-dir", "{bomb}"], "cannot read"),
    (["--out", "{damaged}", "--resume"], "damaged or not a checkpoint"),
    (["--kl", "textbook", "--max-logit", "inf"], "overflows"), (["--lr-anneal", "0"], "at least 1"),
    (["--beta-ramp", "x"], "whole number"), (["--save-every", "-1"], "at least 1"), (["--steps", "1e9"], "whole"),
]


@pytest.mark.parametrize("argv, says", BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_input_gets_one_clear_line_and_code_2(argv, says, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("empty", "broken", "foreign", "damaged", "bomb"):
        (tmp_path / name).mkdir()
    if "{bomb}" in argv:
        for i in range(10):                                                        # of 400 million pixels, 50 kB
            Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb" / f"{i}.png")
    (tmp_path / "file").write_text("")
    (tmp_path / "broken" / "broken.png").write_bytes(b"\x89PNG not really")
    (tmp_path / "foreign" / "cifar10-train-32.npy").write_bytes(b"not numpy")
    (tmp_path / "damaged" / "ckpt.pt").write_bytes(b"PK not a checkpoint")
    made = ("empty", "broken", "foreign", "damaged", "file", "bomb")
    names = {name: tmp_path / name for name in made} | {"photos": photos}

    def no_network(self):
        raise OSError("no network")
    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", no_network)
    monkeypatch.setattr("torchvision.datasets.CelebA.download", no_network)
    with pytest.raises(SystemExit) as e:
        train_vae.main([a.format(**names) for a in argv])
    assert e.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert says in message and "Traceback" not in message


# -------------------------------------------------------------------------------------------------------------- README

def readme_changes():
    text = (HERE / "README.md").read_text().split("## Changing it")[1].split("\n## ")[0]
    return re.findall(r"```python\n(class (\w+).*?)```", text, re.S)


@pytest.mark.parametrize("code, name", readme_changes(), ids=lambda x: x if x.isidentifier() else "")
def test_the_readmes_changes_run_as_they_stand(code, name, photos, tmp_path):
    source = (HERE / "train_vae.py").read_text()
    assert source.count("\n\nclass Stats") == 1
    (tmp_path / "train_vae.py").write_text(source.replace("\n\nclass Stats", f"\n\n{code}\n\nclass Stats"))
    shutil.copy(HERE / "kernels.py", tmp_path)
    model = dict(re.findall(r'QUANTIZERS\["(.+?)"\] = (\w+)', code))
    model = next(k for k, v in model.items() if v == name)
    command = [sys.executable, "train_vae.py", *tiny(photos, "r", "--steps", 3, "--log-every", 1, "--model", model)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    loss = [json.loads(line)["loss"] for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    assert all(map(math.isfinite, loss))


def test_the_readmes_prior_is_the_kl_of_dirichlets():
    code = next(code for code, name in readme_changes() if name == "AnotherPrior")
    space = vars(train_vae) | {"QUANTIZERS": {}}
    exec(code, space)
    args = train_vae.plain(train_vae.settings(["--codebook-size", "9", "--code-dim", "3", "--device", "cpu"])[0])
    logits = torch.randn(2, 3, 3, 9)
    kl = space["AnotherPrior"](args)(logits, torch.ones(()), 0.1, torch.zeros(3, dtype=torch.int64)).kl
    Dirichlet = torch.distributions.Dirichlet
    want = torch.distributions.kl_divergence(Dirichlet(logits.exp() + 1), Dirichlet(torch.full_like(logits, 0.9)))
    assert torch.allclose(kl, want, atol=1e-4)


# -------------------------------------------------------------------------------------------------------------- fuzzing

SCRIPTS = dict(train_vae=train_vae, train_prior=train_prior, sample=sample, evaluate=evaluate)
ODD = ["0", "-1", "1", "7", "nan", "inf", "-inf", "1e400", "1e-300", "x", "", "3.5", "9" * 30, "None", "/nowhere",
       "cpu", "cuda:99", "é", "-0", "0x10", "1_000", " 4", "--", "../.."]


def unclear(call, argv) -> str:
    """What a call did wrong: anything but a return or an exit with code 2."""
    try:
        call([str(a) for a in argv])
    except SystemExit as e:
        return "" if e.code == 2 else f"exit {e.code}"
    except train_vae.UserError:                                                    # settings() leaves it to main()
        return ""
    except BaseException as e:
        at = traceback.extract_tb(e.__traceback__)[-1]
        return f"{type(e).__name__}: {str(e)[:100]} in {at.name}, line {at.lineno}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_fuzzed_flags_find_no_traceback(name, chain, photos, tmp_path, capsys, monkeypatch):
    rng, script = np.random.default_rng(int(os.environ.get("FUZZ", 1))), SCRIPTS[name]
    monkeypatch.chdir(tmp_path)
    base = dict(train_vae=TINY + ["--data-dir", str(photos)], train_prior=["--vae", str(chain / "vae")],
                sample=["--prior", str(chain / "prior"), "-n", "1"], evaluate=[str(chain / "vae")])[name]
    actions = [a for a in script.parser()._actions if a.option_strings and a.dest != "help"]
    call, found = getattr(script, "settings", script.main), []                     # of the trainers: all but the work
    for case in range(50 if call is script.main else 150):
        argv = list(base)
        for action in rng.choice(actions, rng.integers(1, 4)):
            argv.append(rng.choice(action.option_strings))
            if action.nargs != 0:
                argv.append(str(rng.choice([*ODD, *(action.choices or []), str(photos), str(photos / "03.png")])))
        if wrong := unclear(call, argv):
            found.append((case, argv[len(base):], wrong))
    capsys.readouterr()
    assert not found, "\n".join(map(str, found))


def damage(path, rng):
    """Spoil a file one way or another; what was done."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(["cut", "flip", "empty", "foreign", "gone", "longer", "tampered"])
    if kind == "cut":
        path.write_bytes(data[:rng.integers(0, len(data))])
    elif kind == "flip":
        for i in rng.integers(0, len(data), rng.integers(1, 50)):
            data[i] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "foreign":
        path.write_bytes(rng.bytes(1000))
    elif kind == "gone":
        path.unlink()
    elif kind == "longer":
        path.write_bytes(data + rng.bytes(100))
    elif path.suffix == ".pt":
        state = torch.load(path, weights_only=True)
        part = state["args"] if rng.random() < 0.7 else state
        key = rng.choice(sorted(part))
        part[key] = [None, "x", -1, 0, 3, 1.5, [], True, {}, torch.ones(2)][rng.integers(10)]
        if rng.random() < 0.3:
            del part[key]
        torch.save(state, path)
        kind = f"tampered {key}: {part.get(key)!r:.40}"
    else:
        path.write_text('{"step": "x", "dataset": 3}\n[]\n')
    return f"{path.name} {kind}"


def test_fuzzed_run_folders_find_no_traceback(chain, tmp_path, capsys, monkeypatch):
    rng, found = np.random.default_rng(int(os.environ.get("FUZZ", 1))), []
    monkeypatch.chdir(tmp_path)
    for case in range(120):
        folder = tmp_path / str(case)
        which = rng.choice(["vae", "prior"])
        shutil.copytree(chain, folder, ignore=shutil.ignore_patterns("*.png"))
        files = [f for f in sorted((folder / which).iterdir()) if f.suffix in (".pt", ".json", ".jsonl", ".npy")]
        told = which, damage(files[rng.integers(len(files))], rng)
        vae, prior = str(folder / "vae"), str(folder / "prior")
        script, argv = [
            (train_vae, ["--out", vae, "--resume"]), (train_vae, ["--out", prior, "--resume"]),
            (train_prior, prior_arguments(vae, prior, "--resume")),
            (train_prior, prior_arguments(vae, folder / "new", "--steps", 1)),
            (sample, ["--prior", prior, "--vae", vae, "-n", "1", "--out", str(folder / "s.png")]),
            (evaluate, [vae, prior]), (evaluate, [vae])][rng.integers(7)]
        if wrong := unclear(script.main, argv):
            found.append((case, *told, script.__name__, argv, wrong))
        shutil.rmtree(folder)
    capsys.readouterr()
    assert not found, "\n".join(map(str, found))
