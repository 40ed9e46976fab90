"""The tests: pytest test_edvae.py. They download nothing and need no GPU.

The mathematics is tested against mpmath, closed forms and brute force, the scripts as a user runs
them. `pytest -k kl` and the like run a part.
"""

import contextlib
import functools
import importlib.util
import io
import json
import math
import os
import pickle
import re
import runpy
import shutil
import struct
import subprocess
import sys
import traceback
from argparse import Namespace
from pathlib import Path
from unittest.mock import MagicMock

import mpmath as mp
import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels on CPU tensors
# One thread, here and in the scripts: at these sizes a second one gains nothing, and on a busy
# machine each waits for the other.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
import evaluate  # noqa: E402
import kernels  # noqa: E402
import sample  # noqa: E402
import train_prior  # noqa: E402
import train_vae  # noqa: E402

HERE = Path(__file__).parent
INF = math.inf
mp.mp.dps = 80
Categorical = torch.distributions.Categorical


@pytest.fixture(scope="session", autouse=True)
def working_folder(tmp_path_factory):
    os.chdir(tmp_path_factory.mktemp("work"))  # data/ and runs/ go there


@pytest.fixture(autouse=True)
def seed_and_folder(tmp_path):
    torch.manual_seed(0)
    os.chdir(tmp_path)


# ------------------------------------------------------------------------------------------ helpers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
TINY = "--dataset folder --size 16 --width 8 --codebook-size 12 --code-dim 4 --batch-size 8".split()
TINY += "--device cpu --precision fp32 --no-compile --preset paper".split()
DEVICE_FLAGS = ["--device", "cpu"]  # also where there is a GPU


def tiny(photos, out, *more):
    """Arguments of a small run on the CPU; more of them as values or as strings of several."""
    return [*TINY, "--data-dir", str(photos), "--out", str(out), *" ".join(map(str, more)).split()]


def run(*command, **variables):
    """What Python prints that runs a command as a user's, without an error."""
    environment = os.environ | dict(PYTHONPATH=str(HERE)) | variables
    environment.pop("TRITON_INTERPRET", None)
    options = dict(text=True, capture_output=True, env=environment, timeout=280)
    done = subprocess.run([sys.executable, *map(str, command)], **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def refused(main, *argv):
    """The line with which a script refuses its arguments, by exit code 2."""
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit) as e:
        main([*map(str, argv)])
    lines = said.getvalue().splitlines()
    assert e.value.code == 2 and (len(lines) == 1 or lines[0].startswith("usage:")), lines
    return lines[-1]


def settings(arguments):
    """train_vae.py's, of arguments in one string."""
    return train_vae.settings([*arguments.split(), "--device", "cpu"])[0]


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("images_per_second", None)
    return lines


def checkpoint(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)


def same(a, b):
    """Whether two states hold the same bits."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def tiles_of(path, size):
    """The images of a grid that save_grid wrote, by row."""
    grid, scale = np.asarray(Image.open(path))[2:, 2:], 96 // size  # lines of two pixels
    tile = scale * size + 2
    grid = grid.reshape(grid.shape[0] // tile, tile, grid.shape[1] // tile, tile, 3)
    return grid.swapaxes(1, 2)[:, :, : tile - 2 : scale, : tile - 2 : scale]


def pixels(images):
    """(B, 3, H, W) in [0, 1] as save_grid writes them: uint8 (B, H, W, 3)."""
    return (images * 255 + 0.5).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def folder_of_images(folder, count, seed=0):
    """Small images with structure."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(train_vae.draw_shapes(count, 16, np.random.default_rng(seed))):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """What --dataset folder reads."""
    return folder_of_images(tmp_path_factory.mktemp("photos"), 60)


def prior_arguments(vae_folder, out, *more):
    small = "--steps 9 --width 16 --blocks 1 --layers 1 --batch-size 8 --eval-every 3".split()
    given = "--vae", vae_folder, "--out", out, *small, "--precision", "fp32", *DEVICE_FLAGS, *more
    return [*map(str, given)]


@pytest.fixture(scope="session")
def chain(photos, tmp_path_factory):
    """A tiny model and a tiny prior, trained by their scripts: the folder of both runs."""
    folder = tmp_path_factory.mktemp("chain")
    train_vae.main(tiny(photos, folder / "vae", "--steps", 30, "--lr", 0.01, "--preset", "fast"))
    assert log_of(folder / "vae")[-1]["codes_used"] > 3  # else much below could not fail
    train_prior.main(prior_arguments(folder / "vae", folder / "prior"))
    return folder


TWO = """
import json, os, runpy, sys
sys.modules["triton"] = None  # not installed
import kernels, test_edvae, torch
kl = kernels.dirichlet_kl(torch.zeros(2, 512))[0].item()
print(f"{kl}\\n", end="")  # a line is one write: torchrun sets PYTHONUNBUFFERED
folder, *scripts = json.loads(sys.argv[1])
test_edvae.train_vae.join_processes()
torch.save(test_edvae.step_codebooks(), folder + "/codes-" + os.environ["RANK"])
dist, leave = torch.distributed, torch.distributed.destroy_process_group
dist.init_process_group = dist.destroy_process_group = lambda *_, **__: None  # all use this one
for sys.argv in scripts:
    runpy.run_path(sys.argv[0], run_name="__main__")
leave()
"""
FOR_TWO = "--steps 4 --log-every 2 --eval-every 4 --preset fast --muon-lr 0"  # paper: one code


@pytest.fixture(scope="session")
def two_processes(photos, chain, tmp_path_factory):
    """What two processes of torchrun make and print, in a Python without triton: the folder."""
    folder = tmp_path_factory.mktemp("two")
    prior = prior_arguments(chain / "vae", folder / "prior", "--dropout", 0)
    vae, here = tiny(photos, folder / "vae", FOR_TWO), str(HERE)
    scripts = [here + "/train_vae.py", *vae], [here + "/train_prior.py", *prior]
    (folder / "two.py").write_text(TWO)
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    arguments = folder / "two.py", json.dumps([str(folder), *scripts])
    (folder / "printed").write_text(run(*torchrun, *arguments))
    return folder


@pytest.fixture(scope="session")
def first_stage(chain, photos):
    """The chain's tiny model and what it makes of the test split."""
    model = train_vae.load_vae(chain / "vae")
    images = train_vae.load_images("folder", "test", photos, 16)
    x = train_vae.to_float(torch.from_numpy(images))
    codes = model.encode(x)
    return Namespace(model=model, images=images, x=x, codes=codes, x_hat=model.decode(codes))


# ----------------------------------------------------------------------------------- the exact KL


def exact_kl(z, c):
    """KL[Dir(alpha) || Dir(1)] and its gradient for a row of logits: the textbook, 80 digits."""
    e = [mp.exp(mp.mpf(min(v, c))) for v in z.tolist()]
    K, E = len(e), mp.fsum(e)
    psi_s, trigamma_s = mp.psi(0, K + E), mp.psi(1, K + E)
    terms = (x * (mp.psi(0, 1 + x) - psi_s) - mp.loggamma(1 + x) for x in e)
    kl = mp.loggamma(K + E) - mp.loggamma(K) + mp.fsum(terms)
    grad = [x * (x * mp.psi(1, 1 + x) - E * trigamma_s) for x in e]
    return kl, [g if v <= c else mp.mpf(0) for g, v in zip(grad, z.tolist())]


def check_against_80_digits(z, c, backend, tolerance):
    z.requires_grad_()
    upstream = -1.7
    kl = kernels.dirichlet_kl(z, c, backend)
    (upstream * kl).sum().backward()
    for row, value, gradient in zip(z.detach(), kl, z.grad):
        want, want_grad = exact_kl(row, c)
        assert abs(value.item() - want) <= tolerance * max(1, want)
        error = mp.norm([g / upstream - w for g, w in zip(gradient.tolist(), want_grad)])
        assert error <= 3 * tolerance * mp.norm(want_grad) + 1e-8 * mp.sqrt(len(row))


@pytest.mark.parametrize("K", [2, 3, 7, 8, 16, 64, 193, 512])
def test_kl_and_gradient_against_80_digits(K):
    generator = torch.Generator().manual_seed(K)
    cases = [(-6, 1, INF), (0, 1, 20), (8, 4, 20), (20, 5, 20), (20, 5, 30), (40, 20, 30)]
    for mean, sd, c in [*cases, (40, 20, INF)]:
        z = torch.randn(1, K, generator=generator) * sd + mean
        check_against_80_digits(z, c, "torch", 1e-6)
    little_evidence = 0.5 * torch.randn(2, K, generator=generator) - 3  # terms of size E cancel
    check_against_80_digits(little_evidence, 20, "torch", 6e-6)


def test_polynomials_against_mpmath():
    def value(coefficients, at):
        return kernels.polynomial(coefficients, torch.tensor(at, dtype=torch.float64)).item()

    for t in np.linspace(0.001, 0.999, 67):
        a = 1 / mp.mpf(t)
        q = (a - 1) * mp.psi(0, a) - mp.loggamma(a) - a + mp.log(a) / 2 + 1
        w = (1 - (a - 1) * mp.psi(1, a)) * a
        assert abs(value(kernels.Q_POLY, t) - q / (1 - mp.mpf(t))) < 1.4e-8
        assert abs(value(kernels.W_POLY, t) - w) < 3.2e-9
        assert abs(1 - t * value(kernels.L_POLY, t) / mp.log1p(t)) < 9e-9
    for d in np.linspace(1e-6, 0.125, 67):
        assert abs(1 + d * value(kernels.LN_POLY, d) / mp.log1p(-d)) < 1.4e-8
    for S in 2 / np.linspace(0.001, 1, 67):  # K = 2: E/S = 1 - 2/S, and the largest e_k/S
        r, S_times_s, g = kernels.stirling(1 / mp.mpf(S))
        want_r = mp.loggamma(S) - ((S - 0.5) * mp.log(S) - S + mp.log(2 * mp.pi) / 2)
        want_s = mp.log(S) - 1 / mp.mpf(2 * S) - mp.psi(0, S)
        assert abs(r - want_r) < 3e-9
        assert (1 - 2 / S) * abs(S_times_s - S * want_s) < 4e-9
        assert (1 - 2 / S) ** 2 * abs(g - (mp.psi(1, S) - 1 / mp.mpf(S)) * S**2) < 9.5e-9


def test_kl_is_zero_without_evidence_and_finite_at_any_logit():
    for K in (2, 3, 8, 512):
        assert kernels.dirichlet_kl(torch.full((3, K), -200.0)).abs().max() < 1e-6
        for value in (3.4e38, -3.4e38):
            for z in (torch.full((1, K), value), torch.tensor([[value] + [-1.0] * (K - 1)])):
                z.requires_grad_()
                out = kernels.evidential_quantize(z, torch.randn(K, 3), 0.5, INF)
                (out.kl.sum() * 1e-3 + out.z_q.sum()).backward()
                assert all(t.isfinite().all() for t in (*out, z.grad))
        for value in (-100.0, -1e8, -3.4e38):  # no evidence: pi is uniform
            for c in (20.0, -1e8):
                z, codebook = torch.full((1, K), value), torch.randn(K, 3)
                out = kernels.evidential_quantize(z, codebook, 0.5, c)
                assert out.entropy.item() == pytest.approx(math.log(K), rel=1e-6)


def test_textbook_kl_agrees_at_small_evidence_and_fails_at_large():
    z = torch.randn(50, 64)
    assert torch.allclose(kernels.textbook_kl(z), kernels.dirichlet_kl(z), rtol=1e-4)
    z = torch.tensor([[20.0] + [-20.0] * 511], requires_grad=True)  # why there is an exact form
    kernels.textbook_kl(z).sum().backward()
    assert z.grad[0, 0] == 0
    z.grad = None
    kernels.dirichlet_kl(z).sum().backward()
    assert abs(z.grad[0, 0].item() - exact_kl(z.detach()[0], 20)[1][0]) < 1e-3


# ---------------------------------------------------------------------------------- the bottleneck

both_bottlenecks = pytest.mark.parametrize(
    "quantize", [kernels.evidential_quantize, kernels.gumbel_quantize]
)


@both_bottlenecks
@pytest.mark.parametrize("K", [3, 13])
def test_gradcheck_in_float64(quantize, K):
    logits = (3 * torch.randn(2, 5, K, dtype=torch.float64)).requires_grad_()
    codebook = torch.randn(K, 4, dtype=torch.float64, requires_grad=True)

    def bottleneck(z, m):
        z_q, kl, *_ = quantize(z, m, 0.7, 2.5, seed=3)
        return z_q, kl, z_q.sum(-1) + kl  # each alone, and both at once

    assert torch.autograd.gradcheck(bottleneck, (logits, codebook))
    assert torch.autograd.gradcheck(lambda z: kernels.dirichlet_kl(z, INF), logits)


def test_outputs_against_their_definitions():
    logits, codebook = 4 * torch.randn(3, 5, 37), torch.randn(37, 6)
    out = kernels.evidential_quantize(logits.requires_grad_(), codebook, 1.0, max_logit=5.0)
    alpha = logits.double().clamp(max=5).exp() + 1
    S = alpha.sum(-1)
    entropy = Categorical(probs=alpha / S[..., None]).entropy()
    assert torch.allclose(out.entropy, entropy.float(), atol=1e-5)
    assert torch.allclose(out.uncertainty, (37 / S).float(), rtol=1e-5)
    assert torch.equal(out.indices, logits.argmax(-1))  # of the logits before the clamp
    assert torch.allclose(out.kl, kernels.dirichlet_kl(logits, 5.0), rtol=1e-6)
    assert out.z_q.requires_grad and out.z_q.shape == (3, 5, 6)
    assert not out.entropy.requires_grad and not out.uncertainty.requires_grad
    soft, pi = kernels.gumbel_quantize(logits, codebook, 1.0), Categorical(logits=logits)
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
    """The winner of ln alpha + gumbel is a draw from Cat(pi): chi-square, 1 in 10,000 to fail."""
    logits, n = torch.tensor([[2.0, 0.0, -1.0, 1.0, 3.0, -5.0, 0.5, 1.5]]), 50_000
    out = kernels.evidential_quantize(logits.expand(n, 8), torch.eye(8), 1e-6, seed=5)
    alpha = logits.double().exp() + 1
    expected, drawn = n * (alpha / alpha.sum())[0], out.z_q.double().sum(0)
    assert ((drawn - expected) ** 2 / expected).sum() < 29.9  # 7 degrees of freedom, p = 1e-4
    assert ((drawn.roll(1) - expected) ** 2 / expected).sum() > 100  # the test can fail


def test_tau_towards_zero_gives_one_hot_and_large_tau_the_mean():
    logits, codebook = torch.randn(100, 20), torch.randn(20, 4)
    z_q = kernels.evidential_quantize(logits, codebook, 1e-7, seed=1).z_q
    assert torch.allclose(z_q, codebook[torch.cdist(z_q, codebook).argmin(1)], atol=1e-6)
    z_q = kernels.evidential_quantize(logits, codebook, 1e7).z_q
    assert torch.allclose(z_q, codebook.mean(0).expand(100, 4), atol=1e-4)


def test_philox_known_answers():
    """Random123's published vectors for philox4x32-10."""

    def words(counter, step, seed):
        signed = [x - 2**64 if x >= 2**63 else x for x in (seed, step, counter)]
        return [f"{w.item():08x}" for w in kernels.philox(*map(torch.tensor, signed))]

    ones = 2**64 - 1
    assert words(0, 0, 0) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert words(ones, ones, ones) == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    digits_of_pi = words(0x85A308D3243F6A88, 0x0370734413198A2E, 0x299F31D0A4093822)
    assert digits_of_pi == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


def test_noise_depends_on_seed_step_and_global_row_alone(monkeypatch):
    logits, codebook = torch.randn(40, 30), torch.randn(30, 4)

    def z_q(z, *key):
        return kernels.evidential_quantize(z, codebook, 0.5, seed=torch.tensor(key)).z_q

    want = z_q(logits, 7, 3, 0)
    assert torch.allclose(want[25:], z_q(logits[25:], 7, 3, 25), atol=1e-6)
    for other in ((8, 3, 0), (7, 4, 0), (7, 3, 1)):
        assert not torch.allclose(want, z_q(logits, *other))
    monkeypatch.setattr(kernels, "BLOCK", 90)  # blocks of three rows
    assert torch.allclose(want, z_q(logits, 7, 3, 0), atol=1e-6)
    key = torch.tensor([7, 3, 0])
    noise = kernels.gumbel_noise(key, 0, 40, 30)
    assert torch.equal(kernels.gumbel_noise(key, 25, 15, 30), noise[25:])
    noise = kernels.gumbel_noise(key, 0, 4000, 129)  # an odd K: the last call is cut
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772) < 0.01 and abs(noise.var() - math.pi**2 / 6) < 0.02


@both_bottlenecks
@pytest.mark.parametrize("compile", [False, True])
def test_blocks_strides_and_compiling_change_nothing(monkeypatch, capsys, quantize, compile):
    if compile and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("torch.compile needs a C++ compiler")
    strided = 4 * torch.randn(36, 63).T  # (63, 36)
    codebook, upstream = torch.randn(36, 5, requires_grad=True), torch.randn(63, 5)
    results = []
    ways = (10**6, False, strided.contiguous()), (5 * 36, compile, strided)
    for block, compiled, logits in ways:
        monkeypatch.setattr(kernels, "BLOCK", block)
        monkeypatch.setattr(kernels, "COMPILE_FROM", 0)
        z = logits.clone().requires_grad_()
        out = quantize(z, codebook, 0.6, 6.0, seed=2, backend="torch", compile=compiled)
        upstreams = [upstream, torch.full_like(out.kl, -0.3)]
        grads = torch.autograd.grad([out.z_q, out.kl], [z, codebook], upstreams)
        results.append((*out[:4], *grads))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(*results))
    assert "continuing without" not in capsys.readouterr().err  # it did compile
    empty = quantize(torch.zeros(0, 36), codebook, 0.6)
    assert empty.z_q.shape == (0, 5)


def test_without_a_compiler_it_continues_uncompiled(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/nowhere")
    monkeypatch.setattr(kernels, "COMPILE_FROM", 0)
    monkeypatch.setattr(kernels, "BLOCK", 27)
    broken = kernels.Compiled(kernels.relaxed_sample)

    def fail(*args):
        raise torch._dynamo.exc.TorchDynamoException("no compiler")

    broken.compiled = fail
    monkeypatch.setattr(kernels, "compiled", lambda fn: broken)
    z, m = torch.randn(6, 9), torch.randn(9, 2)
    out = kernels.evidential_quantize(z, m, 1.0)
    want = kernels.evidential_quantize(z, m, 1.0, compile=False)
    assert torch.equal(out.z_q, want.z_q) and broken.compiled is broken.fn
    assert capsys.readouterr().err.count("continuing without torch.compile: no compiler") == 1


def test_operators_are_registered_rightly():
    """torch.library.opcheck: schema, fake tensors and autograd, so that torch.compile can trust."""
    key = torch.tensor([1, 2, 0])
    inputs = torch.randn(6, 9), torch.randn(9, 4), torch.tensor(0.5), key
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    options = 20.0, True, "torch", False
    torch.library.opcheck(kernels.quantize_op, (*inputs, *options), test_utils=checks)
    strided = torch.randn(9, 6).T.requires_grad_()  # a backward for it must keep the fake's strides
    upstream = torch.randn(6, 4), torch.randn(6)
    out = kernels.quantize_op(strided.detach(), *inputs[1:], *options)
    backward = *upstream, strided.detach(), *inputs[1:], out[0], out[3], out[5], out[6], *options
    torch.library.opcheck(kernels.quantize_backward_op, backward, test_utils=checks[:2])


class NoHostReads(TorchDispatchMode):
    """Fails at what a CUDA graph cannot record: the host reads a value, the device host memory."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten  # .item() and the like; torch.tensor(number)
        assert function not in (aten._local_scalar_dense.default, aten.lift_fresh.default)
        tensors = (x for x in args if isinstance(x, torch.Tensor))
        assert all(x.device.type == "cuda" for x in tensors), f"{function} of host memory"
        return function(*args, **(kwargs or {}))


def test_nothing_in_the_bottleneck_waits_for_the_host(monkeypatch):
    monkeypatch.setattr(kernels, "forward_kernel", MagicMock())  # their launchers run
    monkeypatch.setattr(kernels, "backward_kernel", MagicMock())
    with FakeTensorMode(), NoHostReads():  # a GPU that is not here
        new = functools.partial(torch.empty, device="cuda")
        z, m, tau, key = new(6, 24), new(24, 4), new(()), new(3, dtype=torch.int64)
        for control in (tau.item, lambda: bool(tau > 0), lambda: torch.tensor(1.0, device="cuda")):
            with pytest.raises(AssertionError):
                control()
        for how in ((tau, 20.0, key), (0.5, 20.0, 7)):
            assert kernels.evidential_quantize(z, m, *how).z_q.device.type == "cuda"
        assert kernels.dirichlet_kl(z).shape == (6,)
        for evidential in (True, False):
            options = 20.0, evidential
            z_q, kl, _, H, _, saved, y = kernels.torch_forward(z, m, tau, key, *options, True)
            upstream = z_q, kl, z, m, tau
            kernels.torch_backward(*upstream, z_q, H, saved, y, *options, True)
            if kernels.triton:
                z_q, _, _, _, _, saved, _ = kernels.triton_forward(z, m, tau, key, *options)
                kernels.triton_backward(*upstream, key, z_q, saved, *options)
    if kernels.triton:
        assert kernels.forward_kernel.__getitem__.call_count == 2


def test_wrong_arguments_are_named(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    z, m = torch.randn(4, 8), torch.randn(8, 2)
    for arguments, words in [
        ((z, m[:7], 1.0), "7 codes"),
        ((z, m, 1.0, math.nan), "max_logit"),
        ((z, m, 1.0, 20.0, 0, "cuda"), "not one of"),
        ((z, m, 1.0, 20.0, 0, "triton"), "needs a GPU|needs the package"),
        ((z[:, :1], m[:1], 1.0), "at least 2"),
    ]:
        with pytest.raises(ValueError, match=words):
            kernels.evidential_quantize(*arguments)
    assert kernels.evidential_quantize(z, m, 1.0).z_q.shape == (4, 2)


# -------------------------------------------------------------------------------------- CUDA graphs


def test_graphed_takes_one_step_a_call_and_records_the_fourth(monkeypatch):
    cuda = MagicMock()  # notes each call; the step is one of them
    cuda.graph.return_value.__exit__.return_value = False
    cuda.step.side_effect = [None, None, None, RuntimeError("cannot be recorded"), None]
    monkeypatch.setattr(torch, "cuda", cuda)
    graphed = kernels.Graphed(cuda.step)
    ordinary = ["current_stream", "Stream().wait_stream", "stream", "stream().__enter__", "step"]
    ordinary += ["stream().__exit__", "current_stream", "current_stream().wait_stream"]
    record = ["CUDAGraph", "graph", "graph().__enter__", "step", "graph().__exit__"]
    replay = ["CUDAGraph().replay"]
    for want in (ordinary, ordinary, ordinary, record, record + replay, replay, replay):
        cuda.mock_calls.clear()
        if want is record:
            with pytest.raises(RuntimeError, match="recorded"):
                graphed()
        else:
            graphed()
        assert [name for name, *_ in cuda.mock_calls] == want


@needs_gpu
def test_graphed_training_equals_plain_training():
    def trained(wrap):
        torch.manual_seed(0)
        z, m = (torch.randn(n, 24, device="cuda").requires_grad_() for n in (4096, 24))
        tau, key = torch.ones((), device="cuda"), torch.zeros(3, dtype=torch.int64, device="cuda")
        lr, total = torch.zeros((), device="cuda"), torch.zeros((), device="cuda")
        optimizer = torch.optim.Adam([z, m], lr=lr, fused=True, capturable=True)

        def step():
            optimizer.zero_grad()
            q = kernels.evidential_quantize(z, m, tau, 20.0, key)
            loss = q.z_q.square().mean() + q.kl.mean()
            loss.backward()
            optimizer.step()
            total.add_(loss.detach())

        call = wrap(step)
        for i in range(12):
            tau.fill_(1 - i / 20)
            lr.fill_(0.1 / (1 + i))
            key[1].fill_(i)
            call()
        return total.item(), z.detach(), m.detach()

    graphed, plain = trained(kernels.Graphed), trained(lambda step: step)
    assert graphed[0] == pytest.approx(plain[0], rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(graphed[1:], plain[1:]))


# ------------------------------------------------------------------------------ the Triton kernels

needs_triton = pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
KEY = torch.tensor([3, 5, 2**33], device=DEVICE)  # a row number beyond 32 bits


def by_torch_and_triton(quantize, logits, codebook, c, dz_q, dkl, tau=0.6):
    """Outputs and gradients by PyTorch and by Triton; of z_q alone and of kl alone too."""
    results = []
    for backend in ("torch", "triton"):
        z, m = logits.detach().clone().requires_grad_(), codebook.detach().requires_grad_()
        out = quantize(z, m, tau, c, KEY, backend)
        result = out._asdict()
        ways = dict(z_q=(out.z_q * dz_q).sum(), kl=(out.kl * dkl).sum())
        for of, loss in dict(ways, both=ways["z_q"] + ways["kl"]).items():
            dlogits, dcodebook = torch.autograd.grad(loss, [z, m], retain_graph=True)
            result |= {f"dlogits of {of}": dlogits, f"dcodebook of {of}": dcodebook}
        results.append(result)
    return results


def assert_close(want, got, tolerance, names=None):
    for name in names or want:
        x, y = got[name].float(), want[name].float()
        scale = max(0.1, y.abs().max().item()) if name.startswith("d") else 1
        close = dict(rtol=tolerance, atol=scale * tolerance, equal_nan=True)
        torch.testing.assert_close(x, y, **close, msg=lambda text, name=name: f"{name}: {text}")


@needs_triton
@both_bottlenecks
@pytest.mark.parametrize(
    "rows, K, D, c",
    [
        (1, 8, 1, 20.0),
        (40, 70, 16, 2.0),  # tiles of 32 rows forward, of 16 backward; of 32 and 64 codes
        (40, 37, 17, INF),  # of 32 codes
        (40, 33, 64, 30.0),
        (9, 40, 100, 20.0),
    ],
)
def test_triton_agrees_with_pytorch(quantize, rows, K, D, c):
    codebook, dz_q = (torch.randn(n, D, device=DEVICE) for n in (K, rows))
    dkl = torch.randn(rows, device=DEVICE)
    for scale, mean in [(1, -6), (5, 0), (20, 30)]:
        logits = torch.randn(rows, K, device=DEVICE) * scale + mean
        assert_close(*by_torch_and_triton(quantize, logits, codebook, c, dz_q, dkl), 1e-5)


@needs_triton
def test_triton_takes_bf16_strides_and_ties():
    # (60, 72) with strides (1, 60), which the kernels see: to copy it is not for the wrapper.
    logits = (4 * torch.randn(72, 60, device=DEVICE)).bfloat16().T  # many equal maxima
    codebook = torch.randn(8, 72, device=DEVICE).T  # not contiguous either
    dz_q, dkl = torch.randn(60, 8, device=DEVICE), torch.ones(60, device=DEVICE)
    want, got = by_torch_and_triton(kernels.evidential_quantize, logits, codebook, 20.0, dz_q, dkl)
    assert torch.equal(got["indices"], want["indices"])
    assert got["dlogits of both"].dtype == torch.bfloat16
    assert_close(want, got, 1e-5, ("z_q", "kl", "entropy", "uncertainty", "dcodebook of both"))
    assert_close(want, got, 2**-8, ("dlogits of both",))  # rounded to bf16


@needs_triton
def test_triton_keeps_nan_and_leaves_what_it_cannot_do_to_pytorch():
    z = torch.randn(3, 16, device=DEVICE)
    z[1, 4] = math.nan
    out = kernels.evidential_quantize(z, torch.randn(16, 2, device=DEVICE), 1.0, backend="triton")
    for value in (out.z_q, out.kl, out.entropy, out.uncertainty):
        assert value[1].isnan().all() and value[::2].isfinite().all()
    for what in ((torch.float64, 16, 4), (torch.float32, 7, 4), (torch.float32, 16, 129)):
        assert kernels.resolve_backend("auto", "cuda", *what) == "torch"
        with pytest.raises(ValueError, match="takes float32, K >= 8 and D <= 128"):
            kernels.resolve_backend("triton", "cuda", *what)
    assert kernels.resolve_backend("auto", "cuda", torch.float32, 16, 4) == "triton"


@needs_triton
@pytest.mark.parametrize("mean, sd, c", [(-6, 1, 20.0), (0, 5, INF), (20, 5, 30.0)])
def test_triton_kl_against_80_digits(mean, sd, c):
    z = sd * torch.randn(3, 40, device=DEVICE) + mean
    check_against_80_digits(z, c, "triton", 3e-6)  # a GPU's exp and log are approximate


@needs_triton
def test_triton_does_not_depend_on_its_tiles(monkeypatch):
    logits = 3 * torch.randn(70, 100, device=DEVICE)
    codebook, dz_q = torch.randn(100, 8, device=DEVICE), torch.randn(70, 8, device=DEVICE)
    inputs = logits, codebook, 20.0, dz_q, torch.randn(70, device=DEVICE)
    want, original = by_torch_and_triton(kernels.evidential_quantize, *inputs)[1], kernels.tiles
    for size in (dict(BLOCK_P=16, BLOCK_K=128), dict(BLOCK_P=64, BLOCK_K=16)):
        monkeypatch.setattr(kernels, "tiles", lambda *a, s=size: original(*a) | s)
        assert_close(want, by_torch_and_triton(kernels.evidential_quantize, *inputs)[1], 1e-5)


COMPILE = """
import re, subprocess, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import kernels as k
cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
types = dict(key="*i64", indices="*i64", rows="i32", rows_per_program="i32", stride_p="i32",
             max_logit="fp32", r_k="fp32", ln_k="fp32")
for K, D, dtype, evidential, arch in [
        (512, 16, "fp32", True, 80), (512, 16, "fp32", True, 90), (512, 64, "fp32", True, 80),
        (512, 64, "fp32", True, 90), (512, 16, "fp32", False, 90), (97, 64, "bf16", True, 90),
        (97, 128, "fp32", True, 80)]:
    for kernel, rows in [(k.forward_kernel, 16384), (k.backward_kernel, 16384)] + (
            [(k.forward_kernel, 16383)] if D <= 16 else []):
        size = k.tiles(kernel, rows, K, D)
        options = {n: size.pop(n) for n in ("num_warps", "num_stages", "enable_fp_fusion")}
        fixed = dict(size, K=K, D=D, EVIDENTIAL=evidential, stride_k=1)
        of = types | dict(logits="*" + dtype, dlogits="*" + dtype)
        names = kernel.arg_names
        signature = {n: "constexpr" if n in fixed else of.get(n, "*fp32") for n in names}
        constants = {(i,): fixed[n] for i, n in enumerate(names) if n in fixed}
        multiples = [n for n in names if signature[n][0] == "*" or n.startswith("rows")]
        multiples += ["stride_p"] * (K % 16 == 0)
        aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in multiples}
        source = ASTSource(kernel, signature, constants, aligned)
        binary = triton.compile(source, GPUTarget("cuda", arch, 32), options).asm["cubin"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(binary)
            f.flush()
            command = [cuobjdump, "-res-usage", f.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = re.search(r"REG:(\\d+) STACK:(\\d+)", usage).groups()
        print(kernel.__name__, size["BLOCK_P"], K, D, dtype, evidential, arch, registers, stack)
"""


@needs_triton
def test_compiled_kernels_spill_nothing():
    """For GPUs that are not here, with every tile of `kernels.tiles`."""
    lines = run("-c", COMPILE).splitlines()
    for line in lines:
        registers, stack = map(int, line.split()[-2:])
        assert 32 < registers <= 255 and stack == 0, line  # the stack holds spills
    assert len(lines) == 17
    assert {line.split()[1] for line in lines if line.startswith("forward")} == {"32", "64"}


def test_checks_and_benchmark_of_the_kernels(capsys):
    kernels.print_checks("cpu")
    assert float(capsys.readouterr().out.split()[-1]) < 1e-5  # the KL's error
    times = kernels.forward_and_both_ms(kernels.evidential_quantize, 8, 16, 4, "cpu")
    assert 0 < times[0] < times[1] < math.inf


def test_the_benchmark_on_a_gpu_names_the_package_that_it_needs(monkeypatch):
    monkeypatch.setattr(kernels, "triton", None)
    monkeypatch.setattr(kernels, "print_checks", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert "needs the package triton" in refused(lambda _: kernels.main())


def test_importing_needs_no_triton(two_processes):
    kl = (two_processes / "printed").read_text().splitlines()[:2]
    assert [float(x) for x in kl] == pytest.approx([59.2597] * 2, abs=1e-3)


# ---------------------------------------------------------------------------- networks and measures


def vae(**changes):
    """A tiny model by the paper's preset."""
    args = train_vae.DEFAULTS | dict(width=8, codebook_size=12, code_dim=4, size=16)
    args |= dict(compile=False, device="cpu", precision="fp32")
    args |= train_vae.QUANTIZERS[changes.get("model", "edvae")].defaults | dict(width=8)
    return train_vae.VAE(Namespace(**(args | changes)))


def test_parameter_counts():
    def count(model, width):
        net = vae(model=model, width=width, codebook_size=512, code_dim=16, size=32)
        return sum(p.numel() for p in net.parameters())

    assert count("edvae", 128) == 5_195_907  # the authors'
    widths = dict.fromkeys(train_vae.QUANTIZERS, 64) | dict(edvae=32, dvae=32)
    counts = {model: count(model, width) for model, width in widths.items()}
    want = {"edvae": 386_211, "dvae": 386_211, "vqvae-ema": 320_275, "gs-vqvae": 320_275}
    assert counts == want | {"sq-vae": 318_804, "vq-ste++": 318_835}  # as in README's Results


@pytest.mark.parametrize("model", train_vae.QUANTIZERS)
@pytest.mark.parametrize("size", [16, 32, 64])
def test_shapes_and_the_loss_of_every_system(model, size):
    net = vae(model=model, first_kernel=7, size=size, init="he", codebook_init="normal")
    x = torch.rand(2, 3, size, size)
    indices = net.encode(x)
    assert indices.shape == (2, size // 4, size // 4) and net.decode(indices).shape == x.shape
    tau, beta, key = torch.ones(()), torch.tensor(0.5), torch.tensor([1, 2, 0])
    loss, mse, q = net(x, tau, beta, key)
    if model in ("edvae", "dvae", "gs-vqvae"):
        assert torch.allclose(loss, mse + 0.5 * q.kl.mean()) and q.kl.mean() > 0.01  # Eq. 8
    else:
        assert loss.isfinite() and net.quantizer(net.encode_features(x), tau, beta, key)[0] != 0
    if net.offset:  # a linear output
        list(net.decoder.parameters())[-1].data += torch.tensor([5.0, -5.0, 0.0])  # its last bias
        red, green, _ = net.decode(indices).unbind(1)
        assert red.min() == 1 and green.max() == 0  # clamped


@pytest.mark.parametrize("model", train_vae.QUANTIZERS)
def test_every_system_compiles_and_agrees(model, monkeypatch):
    """What a GPU run compiles, traced here by a backend that recomputes activations.

    No graph break, but around quantisers that move their codes in the forward.
    """
    fullgraph = model not in ("vqvae-ema", "vq-ste++")
    how = dict(fullgraph=fullgraph, backend="aot_eager_decomp_partition")
    if kernels.triton and DEVICE == "cpu":  # interpreted
        monkeypatch.setattr(kernels, "resolve_backend", lambda *_: "triton")
    x, key, results = torch.rand(4, 3, 16, 16), torch.tensor([1, 2, 0]), []
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=model in ("edvae", "dvae"))
    for wrap in (lambda net: net, lambda net: torch.compile(net, **how)):
        torch.manual_seed(0)
        net = vae(model=model, init="he", codebook_init="normal")
        with autocast:
            loss, _, q = wrap(net)(x, torch.tensor(0.7), torch.tensor(0.1), key)
        loss.backward()
        grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
        results.append((loss.detach(), q.indices, grads))
    (loss, indices, grads), (compiled_loss, compiled_indices, compiled_grads) = results
    assert torch.allclose(compiled_loss, loss, rtol=1e-5) and torch.equal(indices, compiled_indices)
    assert all(p.grad is not None and p.grad.any() for p in net.encoder.parameters())
    rounding = 1e-6 * max(grad.norm() for grad in grads.values())  # of biases before batch norms
    for name, grad in grads.items():
        assert (compiled_grads[name] - grad).norm() <= 1e-4 * grad.norm() + rounding, name


def test_block_keeps_its_input_and_scales_the_branch():
    block, x = train_vae.Block(8, 8, (3, 3, 3, 1)), torch.randn(2, 8, 6, 6)
    before, h = x.clone(), x
    for conv in block.res:
        h = conv(torch.relu(h))
    assert torch.allclose(block(x), x + h / 36)
    assert torch.equal(x, before)  # no in-place ReLU on the skip


def test_the_stream_and_the_logits_stay_fp32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        for n_out in (8, 16):
            block, x = train_vae.Block(8, n_out, (3, 3, 3, 1)), torch.rand(1, 8, 4, 4)
            assert block.res[0](x).dtype == torch.bfloat16 and block(x).dtype == torch.float32
        assert train_vae.Encoder(8, 12)(torch.rand(1, 3, 16, 16)).dtype == torch.float32


def test_upsampling_commutes_with_a_blocks_first_convolutions():
    block, x = train_vae.Block(8, 4, (1, 3, 3, 3), enlarge=True), torch.randn(2, 8, 6, 6)
    late = train_vae.Block(8, 4, (1, 3, 3, 3))
    late.load_state_dict(block.state_dict())
    enlarged = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    want = late(enlarged)
    assert want.shape == (2, 4, 12, 12) and torch.allclose(block(x), want, atol=1e-6)


def test_what_a_gpu_computes_in_another_way(monkeypatch):
    x, encoder = torch.randn(2, 3, 16, 16), train_vae.Encoder(8, 12)
    want = train_vae.upsample(x), encoder(x)
    assert torch.equal(want[0], x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # the other branches, on CPU tensors
    assert torch.equal(train_vae.upsample(x), want[0])
    assert torch.allclose(encoder(x), want[1], atol=1e-7) and encoder(x).std() > 0


def test_he_init_passes_the_image_on_to_the_logits():
    torch.manual_seed(3)
    x = torch.from_numpy(train_vae.draw_shapes(64, 32, np.random.default_rng(0)))
    spread = {}
    for init in ("authors", "he"):
        model = vae(width=16, codebook_size=64, code_dim=16, size=32, init=init)
        z_e = model.encode_features(train_vae.to_float(x)).detach()
        spread[init] = z_e.std(0).mean()  # over images
    assert spread["authors"] < 1e-4 and 0.1 < spread["he"] < 3


@pytest.mark.parametrize("model", train_vae.QUANTIZERS)
def test_muon_turns_hidden_convolutions_and_adam_the_rest(model):
    args = settings(f"--model {model} --preset fast --muon-lr 0.1")
    net, lr = train_vae.VAE(args), torch.tensor(args.lr / 2)  # half of both rates
    adam, muon = train_vae.make_optimizers(net, args, lr)
    learnt = [p for p in net.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in learnt]
    for p in learnt:
        p.grad = torch.randn_like(p)
    hidden = set(muon.param_groups[0]["params"])
    for p in hidden:  # singular values of 1 to 2 that Muon makes equal
        matrix = torch.nn.init.orthogonal_(torch.empty(len(p), p[0].numel()))
        p.grad = (torch.linspace(1, 2, len(p))[:, None] * matrix).view_as(p)
    adam.step()
    muon.step()
    for p, old in zip(learnt, before):
        step = p.detach() - old
        if p in hidden:
            rows, columns = len(p), p[0].numel()
            values = torch.linalg.svdvals(step.flatten(1)) / (0.05 * max(1, rows / columns) ** 0.5)
            assert 0.6 < values.min() and values.max() < 1.3
        else:  # Adam's first step is its rate, whatever the gradient
            assert torch.allclose(step.abs(), torch.full_like(step, args.lr / 2), rtol=1e-2)
    others = [p for p in learnt if p not in hidden and p.ndim == 4]
    assert len(hidden) >= 8 and len(others) == 3  # from pixels, to z_e, to pixels


@pytest.mark.parametrize("batched", [False, True])
def test_muon_is_pytorchs_up_to_rounding(batched, monkeypatch):
    shapes = [(8, 4, 3, 3), (8, 4, 3, 3), (4, 8, 1, 1), (6, 16, 3, 3)]
    last = dict(memory_format=torch.channels_last)
    ours = [torch.nn.Parameter(torch.randn(s).to(**last)) for s in shapes]
    theirs = [torch.nn.Parameter(train_vae.as_matrix(w).clone()) for w in ours]
    lr = torch.tensor(0.0)
    monkeypatch.setattr(torch.Tensor, "is_cuda", batched)  # on a GPU shapes are batches
    muon = train_vae.Muon(ours, lr, lr_scale=2.0)
    reference = torch.optim.Muon(theirs, weight_decay=0)
    start = [w.clone() for w in theirs]
    for i in range(12):
        lr.fill_(0.01 * (i + 1))
        reference.param_groups[0]["lr"] = 0.02 * (i + 1)
        for w, m in zip(ours, theirs):
            w.grad = torch.randn(w.shape).to(**last)
            m.grad = train_vae.as_matrix(w.grad)
        muon.step()
        reference.step()
        if i == 5:  # momenta are saved by weight
            state, muon = muon.state_dict(), train_vae.Muon(ours, lr, lr_scale=2.0)
            muon.load_state_dict(state)
            muon.param_groups[0]["lr"] = lr
    for w, m, old in zip(ours, theirs, start):
        moved = (m - old).norm()
        assert (train_vae.as_matrix(w) - m).norm() < 0.01 * moved and moved > 1
    whole = torch.nn.Parameter(torch.randn(8, 4, 3, 3))  # not channels last
    whole.grad = torch.randn(8, 4, 3, 3)
    with pytest.raises(RuntimeError, match="view"):
        train_vae.Muon([whole], lr, 1.0).step()


def test_perplexity_of_known_histograms():
    assert train_vae.perplexity(torch.full((512,), 7)) == pytest.approx(512)
    assert train_vae.perplexity(torch.tensor([0, 9, 0])) == pytest.approx(1)
    assert train_vae.perplexity(torch.tensor([1, 1, 2, 0])) == pytest.approx(2**1.5)


def test_measures_do_not_depend_on_the_batch_size():
    images = torch.randint(0, 256, (24, 16, 16, 3), dtype=torch.uint8)
    model = vae().eval()
    model.encoder.head.weight.data *= 3000  # logits with something to measure
    lines = []
    for batch in (24, 5):
        args = Namespace(**vars(model.args) | dict(batch_size=batch))
        lines.append(train_vae.test(model, images.numpy(), args, beta=0.1))
        model.eval()
    entropy_map = lines[0].pop("entropy_map")
    assert np.allclose(entropy_map, lines[1].pop("entropy_map"), atol=2e-3)
    assert lines[0].pop("split") == lines[1].pop("split") == "test"
    assert lines[0] == pytest.approx(lines[1], rel=1e-5)
    x = train_vae.to_float(images)  # and against the definitions
    z_e = model.encode_features(x)
    assert z_e.is_contiguous()  # as the encoder leaves them, channels last: no copy
    q = kernels.evidential_quantize(z_e, model.quantizer.codebook, 1.0)
    x_hat = model.reconstruct(model.quantizer.codebook[q.indices])
    assert lines[0]["mse"] == pytest.approx((x_hat - x).square().mean().item(), rel=1e-5)
    assert lines[0]["entropy_std"] == pytest.approx(q.entropy.std(correction=0).item(), rel=1e-3)
    p = torch.bincount(model.encode(x).flatten(), minlength=12) / 24 / 16
    assert lines[0]["perplexity"] == pytest.approx(Categorical(p).entropy().exp().item(), rel=1e-5)


# --------------------------------------------------------------------------- settings and schedules


def scheduled(args, steps):
    """lr, beta and tau at each of the steps."""
    return zip(*(train_vae.schedules(t, args).values() for t in steps))


def test_schedules_are_the_papers_and_compress():
    args = settings("--dataset cifar10 --preset paper")
    assert args.steps == 150_000
    lr, beta, tau = scheduled(args, (0, 2500, 5000, 25_000, 50_000, 150_000))
    want = (1e-3, 9.9692e-4, 9.8770e-4, 7.0747e-4, 1.25e-6, 1.25e-6)
    assert lr == pytest.approx(want, rel=1e-4)
    assert beta == pytest.approx((0, 5e-7 * 0.292893, 5e-7, 5e-7, 5e-7, 5e-7), rel=1e-5)
    assert tau == pytest.approx((1, 0.975310, 0.951229, 0.778801, 0.606531, 0.223130), rel=1e-5)
    short = settings("--dataset cifar10 --preset paper --steps 3000")
    for t in (0, 50, 100, 999, 3000):
        assert train_vae.schedules(t, short) == pytest.approx(train_vae.schedules(50 * t, args))


def test_short_preset_ends_where_the_learning_rate_ends():
    args = settings("--dataset cifar10")
    assert (args.preset, args.steps, args.width) == ("short", 35_000, 128)
    lr, beta, tau = scheduled(args, (0, 1750, 3500, 17_500, 35_000))
    assert lr[3] == pytest.approx(7.0747e-4, rel=1e-4) and lr[4] == pytest.approx(1.25e-6)
    assert beta[:3] == pytest.approx((0, 5e-7 * 0.292893, 5e-7), rel=1e-5)
    assert tau[0] == 1 and tau[4] == pytest.approx(0.606531)
    cpu = settings("--dataset cifar10 --preset cpu")
    assert (cpu.steps, cpu.width, cpu.lr, cpu.init, cpu.muon_lr) == (3000, 32, 1e-2, "he", 0)
    assert train_vae.schedules(1500, cpu)["tau"] == pytest.approx(tau[3])


def test_fast_preset_warms_up_and_ends_at_zero():
    args = settings("--preset fast --steps 1000")
    lr, beta, tau = scheduled(args, range(1001))
    assert tau[:200] == (2.0,) * 200 and tau[1000] == pytest.approx(0.2, rel=0.01)
    peak = int(np.argmax(lr))
    assert 0 < lr[0] < 0.1 * args.lr and lr[-1] == pytest.approx(0, abs=1e-12)
    assert lr[peak] == pytest.approx(args.lr, rel=0.01) and peak < 100
    assert list(lr[peak:]) == sorted(lr[peak:], reverse=True)
    assert beta[0] == 0 and beta[100] == pytest.approx(args.beta, rel=0.03)  # the ramp's end
    assert beta[500] == pytest.approx(args.beta / 2) and beta[1000] == pytest.approx(0, abs=1e-20)


def test_the_weight_of_a_kl_rises_from_zero_and_no_other():
    for model in train_vae.QUANTIZERS:
        args = settings(f"--model {model} --preset paper")
        has_kl = model in ("edvae", "dvae", "gs-vqvae")
        assert train_vae.schedules(0, args)["beta"] == (0 if has_kl else args.beta), model


def test_fast_rate_follows_the_width():
    for model, width, lr in (("edvae", 32, 1e-2), ("edvae", 128, 2.5e-3), ("sq-vae", 64, 4e-2)):
        args = settings(f"--dataset cifar10 --preset fast --width {width} --model {model}")
        assert args.lr == pytest.approx(lr)


def test_flags_override_the_tables_and_every_table_acts(monkeypatch):
    args = settings("--beta-ramp 0.5 --lr-anneal 0.9 --tau-end 0.25 --lr 0.125 --steps 100")
    assert (args.beta_ramp, args.lr_anneal, args.tau_end, args.lr) == (0.5, 0.9, 0.25, 0.125)
    _, shapes = train_vae.DATASETS["shapes"]
    monkeypatch.setitem(shapes, "beta_ramp", 0.75)  # a share, as one of a data set
    monkeypatch.setitem(train_vae.PAIRS, ("dvae", "shapes"), dict(beta=0.5, width=64))
    args = settings("--model dvae")
    assert (args.beta_ramp, args.beta, args.width) == (0.75, 0.5, 64)
    for model, want in dict(edvae=(32, 1e-2, "he"), gs_vqvae=(64, 1e-3, "authors")).items():
        args = settings(f"--dataset cifar10 --preset cpu --model {model.replace('_', '-')}")
        assert (args.width, args.lr, args.init) == want
    monkeypatch.setitem(train_vae.PAIRS, ("sq-vae", "shapes"), dict(two_heads=True))
    args = settings("--model sq-vae")
    x = torch.rand(1, 3, 32, 32)
    assert train_vae.VAE(args).encode_features(x).shape == (1, 8, 8, 2 * args.code_dim)
    args = settings("--dataset celeba --model vq-ste++")
    assert train_vae.VAE(args).encode_features(x).shape == (1, 8, 8, args.code_dim)


def test_another_gpu_than_the_first_is_made_current(monkeypatch):
    current, zeros = [], torch.zeros

    def zeros_on_a_gpu(*shape, device=None, **more):
        index = torch.device(device).index or 0
        return Namespace(device=torch.device("cuda", index)) if "cuda" in device else zeros(*shape)

    monkeypatch.setattr(torch, "zeros", zeros_on_a_gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert train_vae.prepare_device("cuda:1") == ("cuda:1", "bf16")
    assert train_vae.prepare_device() == ("cuda:0", "bf16")
    assert current == ["cuda:1", "cuda:0"]
    assert not torch.backends.cudnn.allow_tf32  # fp32 is fp32


def test_bf16_is_the_default_where_it_is_faster(monkeypatch):
    for flags, fast in {
        "GenuineIntel avx512_bf16 amx_bf16": True,
        "AuthenticAMD avx512_bf16": True,
        "GenuineIntel avx512_bf16": False,
        "AuthenticAMD avx2": False,
    }.items():
        has = lambda *names, flags=flags: all(name in flags for name in names)  # noqa: E731
        monkeypatch.setattr(train_vae, "cpu_has", has)
        assert train_vae.prepare_device("cpu")[1] == ("bf16" if fast else "fp32"), flags


def test_what_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr(train_vae, "process_count", lambda: 2)
    for arguments, words in {
        "--batch-size 9": "2 processes cannot share --batch-size 9",
        "--model sq-vae": "takes one process",
        "--model vq-ste++": "SyncBatchNorm",
    }.items():
        with pytest.raises(train_vae.UserError, match=words):
            settings(arguments)


def test_torchruns_variables_are_whole_or_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refused(train_vae.main, "--steps", 2)
    assert "RANK, LOCAL_RANK" in said and "start by torchrun" in said


# ------------------------------------------------------------------------- the other five systems


def make_quantizer(model, **changes):
    args = dict(model=model, compile=False, max_logit=20.0) | train_vae.QUANTIZERS[model].defaults
    args |= dict(codebook_size=6, code_dim=4, codebook_init="normal")
    return train_vae.QUANTIZERS[model](Namespace(**(args | changes)))


ONE, KEY0 = torch.ones(()), torch.zeros(3, dtype=torch.int64)


def test_ema_codes_that_are_never_hit_stay_put():
    q = make_quantizer("vqvae-ema")
    before, z = q.codebook.detach().clone(), torch.randn(1, 4).expand(50, 4)
    q.codebook.data[0] = q.sum[0] = z[0]
    for _ in range(5):
        assert (q(z[None, None], ONE, 0.25, KEY0)[1].indices == 0).all()
    ratio = q.codebook[1:].norm(dim=1) / before[1:].norm(dim=1)
    assert (ratio > 0.5).all() and (ratio < 2).all()  # from N = 0 it would be 1e5


def test_ema_converges_to_the_mean_of_its_cell_and_eval_changes_nothing():
    q, z = make_quantizer("vqvae-ema"), torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]], requires_grad=True)
    q.DECAY = 0.9
    old, (loss, out) = q.codebook.detach().clone(), q(z, ONE, 0.25, KEY0)
    k, errors = out.indices.item(), []
    assert torch.allclose(loss, 0.25 * (old[k] - z).square().mean())  # the commitment
    for _ in range(60):
        loss, out = q(z, ONE, 0.25, KEY0)
        errors.append((q.codebook[k] - z[0, 0, 0]).norm().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01
    mean = q.sum[k] / q.count[k]
    assert torch.allclose(mean, q.codebook[k], rtol=1e-3)
    (out.z_q.sum() + loss).backward()
    assert q.codebook.grad is None


@pytest.mark.parametrize("model", train_vae.QUANTIZERS)
def test_eval_changes_no_state_and_pi_is_what_entropy_says(model):
    net = vae(model=model, two_heads=model == "sq-vae", init="he", max_logit=0.5).eval()
    x = torch.rand(2, 3, 16, 16)
    if net.quantizer.network != "ed":  # codes among the vectors, so that several are the nearest
        net.quantizer.codebook.data = net.encode_features(x).detach().flatten(0, 2)[:12, :4].clone()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    _, _, q = net(x, ONE, 0.1, 0)
    assert torch.equal(net.encode(x), q.indices) and same(before, net.state_dict())
    assert len(q.indices.unique()) > 3
    pi = net.quantizer.probabilities(net.encode_features(x))
    assert torch.allclose(pi.sum(-1), torch.ones(2, 4, 4), atol=1e-5)
    if q.entropy.isfinite().all():
        assert torch.allclose(Categorical(probs=pi).entropy(), q.entropy, atol=1e-4)


@pytest.mark.parametrize("model", ["vqvae-ema", "vq-ste++"])
def test_straight_through_gradient_and_synchronised_share(model):
    q, z = make_quantizer(model), torch.randn(2, 3, 3, 4, requires_grad=True)
    w = torch.randn(2, 3, 3, 4)
    _, out = q(z, ONE, 0.0, KEY0)
    assert out.z_q.shape == (2, 3, 3, 4) and out.indices.dtype == torch.int64
    for value in (out.kl, out.entropy, out.uncertainty):  # of a hard code: none
        assert value.shape == (2, 3, 3) and value.isnan().all() and value.dtype == torch.float32
    (out.z_q * w).sum().backward()
    assert torch.equal(z.grad, w)
    if model == "vq-ste++":  # c = (1 + l a) e + l t: the share nu of w reaches a and t
        chosen = q.codebook[out.indices]
        want_a = (q.SYNC * q.AFFINE_LR * w * chosen).sum((0, 1, 2))
        assert torch.allclose(q.scale.grad, want_a, rtol=1e-4, atol=1e-5)
        want_t = (q.SYNC * q.AFFINE_LR * w).sum((0, 1, 2))
        assert torch.allclose(q.shift.grad, want_t, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["gs-vqvae", "sq-vae"])
def test_soft_quantisers_at_the_limits(model):
    q, z = make_quantizer(model), torch.randn(3, 5, 5, 4)
    _, out = q(z, torch.tensor(1e-6), 1.0, KEY0)
    nearest = torch.cdist(out.z_q, q.codebook[None, None]).argmin(-1)
    assert torch.allclose(out.z_q, q.codebook[nearest], atol=1e-5)
    assert torch.equal(out.indices, torch.cdist(z, q.codebook[None, None]).argmin(-1))
    q.codebook.data.zero_()
    assert q(z, ONE, 1.0, KEY0)[1].kl.abs().max() < 1e-6  # all codes alike: pi is uniform
    q.codebook.data = 1e3 * torch.randn(6, 4)  # pi is one-hot
    assert torch.allclose(q(z, ONE, 1.0, KEY0)[1].kl, torch.tensor(math.log(6)), atol=1e-4)


def test_sqvaes_two_heads_share_all_but_their_last_block():
    args = dict(model="sq-vae", two_heads=True, size=64)
    net, x = vae(**args).eval(), torch.rand(1, 3, 64, 64)
    D = net.args.code_dim
    z_e = net.encode_features(x)
    assert z_e.shape == (1, 16, 16, 2 * D)
    heads = next(m for m in net.encoder if isinstance(m, train_vae.SideBySide))
    for p in heads[1].parameters():
        p.data.add_(0.3)
    moved = net.encode_features(x)
    assert torch.equal(moved[..., :D], z_e[..., :D])
    assert not torch.allclose(moved[..., D:], z_e[..., D:])


@pytest.mark.parametrize("D", [4, 8])
def test_sqvae_logits_and_losses_against_their_definitions(D):
    q, z_e = make_quantizer("sq-vae"), torch.randn(2, 3, 3, D)  # D = 8: a second head of 4 channels
    z, precision = q.split(z_e)
    v = z_e[..., 4:].mean(-1, keepdim=True).exp() if D == 8 else torch.ones(2, 3, 3, 1)
    assert torch.allclose(precision, 1 / (v + q.rho.exp()))
    want = -(z[..., None, :] - q.codebook).square().sum(-1) * precision / 2
    assert torch.allclose(q.logits(z_e), want, atol=1e-4)
    (loss, out), pi = q(z_e, torch.tensor(0.5), 1.0, KEY0), want.softmax(-1)
    discrete = (pi * pi.log()).sum() / 2
    continuous = (precision / 2 * (z - out.z_q).square()).sum() / 2
    assert torch.allclose(loss, discrete + continuous, rtol=1e-4)
    distance = (0.5 * q.split(z_e)[1] * (z - out.z_q.detach()).square()).sum()
    assert torch.autograd.grad(distance, q.rho)[0] < 0  # a larger variance lowers this term
    x, x_hat = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8, requires_grad=True)
    plain = (x_hat - x).square().sum() / 4
    log_loss = q.reconstruction_loss(x_hat, x)
    (plain_grad,), (log_grad,) = (torch.autograd.grad(f, x_hat) for f in (plain, log_loss))
    assert torch.allclose(log_grad, 3 * 8 * 8 / 2 / plain * plain_grad, rtol=1e-4)


def test_vqste_steps_its_codebook_before_it_is_read_and_moves_unused_codes():
    q, z = make_quantizer("vq-ste++"), torch.randn(4, 3, 3, 4)
    q.shift.data += 0.05  # an affine map that does something
    before = q.vectors().detach().clone()
    loss, out = q(z, ONE, 1.0, KEY0)
    assert torch.equal(out.indices, torch.cdist(z, before[None, None]).argmin(-1))
    assert torch.allclose(out.z_q, q.vectors()[out.indices], atol=1e-6)  # of the moved codebook
    assert torch.allclose(loss, 0.1 * (z - out.z_q).square().mean(), rtol=1e-5)  # commitment
    k = torch.bincount(out.indices.flatten(), minlength=6).argmax()
    mean = z[out.indices == k].mean(0)
    assert (q.vectors()[k] - mean).norm() < (before[k] - mean).norm()
    out.z_q.square().sum().backward()  # through the sync: no stale graph
    assert q.codebook.grad is None and q.shift.grad.abs().sum() > 0
    moved = q.vectors().detach().clone()
    q.shift.data += 0.01
    assert ((q.vectors() - moved).abs().sum(1) > 0).all()  # a and t are shared: all codes move


def test_vqste_codes_move_by_sgd_with_momentum():
    q, z = make_quantizer("vq-ste++"), torch.randn(4, 3, 3, 4)
    q.scale.data += 0.02
    e, velocity = q.codebook.detach().clone(), torch.zeros(6, 4)
    for _ in range(2):
        e.requires_grad_()
        c = (1 + 10 * q.scale.detach()) * e
        nearest = torch.cdist(z, c[None, None]).argmin(-1)
        (gradient,) = torch.autograd.grad((c[nearest] - z).square().mean(), e)
        velocity = 0.9 * velocity + gradient
        e = (e - 50 * 4 / 64 * velocity).detach()
        q(z, ONE, 1.0, KEY0)
        assert torch.allclose(q.codebook, e, rtol=1e-4, atol=1e-5)


def test_vqste_replaces_a_dead_code_on_time_and_through_the_affine_map():
    q = make_quantizer("vq-ste++")
    q.REPLACE_AFTER = 3
    q.patience.fill_(3)
    q.scale.data += 0.02
    q.shift.data += 0.03
    z = q.vectors()[:1].detach().expand(1, 5, 5, 4) + 0.01 * torch.randn(1, 5, 5, 4)
    q.codebook.data[1:] += 50  # codes 1 to 5 are never nearest
    for forward in range(1, 4):
        q.eval()(z, ONE, 0.0, KEY0)  # eval does not count
        before = q.vectors()[1:].detach().clone()
        q.train()(z, ONE, 0.0, KEY0)
        moved = (q.vectors()[1:] - before).abs().sum(1) > 1e-3
        assert moved.all() if forward == 3 else not moved.any()
    assert torch.cdist(q.vectors()[1:], z.flatten(0, 2)).min(1).values.max() < 0.1  # c lies on z_e


def test_vqste_kmeans_start_covers_the_data():
    q = make_quantizer("vq-ste++")
    clusters = 10 * torch.randn(6, 4)
    z = clusters[torch.arange(600) % 6].view(1, 20, 30, 4) + 0.01 * torch.randn(1, 20, 30, 4)
    q.shift.data += 0.2
    q.init_codebook(z)
    assert torch.cdist(clusters, q.vectors()).min(1).values.max() < 0.1


def step_codebooks():
    """Two systems' codebooks after three steps, and one of which a dead code was replaced."""
    rank, codebooks = train_vae.rank(), []
    torch.manual_seed(0)
    z = torch.randn(4, 6, 6, 4).chunk(train_vae.process_count())[rank]
    torch.manual_seed(1)
    for model in ("vqvae-ema", "vq-ste++"):
        q = make_quantizer(model)
        for _ in range(3):
            q(z, ONE, 0.25, KEY0)
        codebooks.append(q.codebook.detach())
    torch.manual_seed(2 + rank)  # what is drawn must come from rank 0
    q = make_quantizer("vq-ste++")
    q.REPLACE_AFTER = 1
    q.patience.fill_(1)
    q.codebook.data = torch.arange(24.0).view(6, 4)
    q.init_codebook(z)
    q.codebook.data[3] = 99.0
    q(z, ONE, 0.25, KEY0)
    return [*codebooks, q.codebook.detach()]


def test_codebook_statistics_are_those_of_all_processes(two_processes):
    one, first, second = step_codebooks(), *map(torch.load, sorted(two_processes.glob("codes-*")))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one[:2], first[:2]))
    assert first[2].abs().max() < 50  # the dead code was replaced on both


# -------------------------------------------------------------------------------------------- data


def test_cifar10_reader(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for image, name in zip(pixels, names):
        (folder / name).write_bytes(pickle.dumps({"data": image.reshape(1, -1), "labels": [0]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["x"]}))
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a: True)
    want = pixels.transpose(0, 2, 3, 1)
    assert np.array_equal(train_vae.load_images("cifar10", "train", tmp_path), want[:5])
    assert np.array_equal(train_vae.load_images("cifar10", "test", tmp_path), want[5:])
    shutil.rmtree(folder)  # the cache is used alone
    assert np.array_equal(train_vae.load_images("cifar10", "test", tmp_path), want[5:])


def test_celeba_reader_crops_and_splits_a_folder_placed_by_hand(tmp_path):
    folder = tmp_path / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    image = np.zeros((218, 178, 3), np.uint8)
    image[39:179, 19:159] = 200  # the centre 140 x 140
    for name in ("000001", "162770", "162771", "182638"):
        Image.fromarray(image).save(folder / f"{name}.jpg", quality=100)
    train, test = (train_vae.load_images("celeba", split, tmp_path) for split in ("train", "test"))
    assert train.shape == (2, 64, 64, 3) and test.shape == (1, 64, 64, 3)
    assert abs(train.astype(int) - 200).max() <= 2


def test_lsun_reader(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    database = lmdb.open(str(tmp_path / "church_outdoor_val_lmdb"), map_size=2**22)
    picture = np.full((100, 200, 3), (10, 20, 30), np.uint8)
    picture[:, :40] = (200, 0, 0)  # lost if the image was cropped to a square
    Image.fromarray(picture).save(tmp_path / "image.png")
    with database.begin(write=True) as transaction:
        for key in (b"a", b"b"):
            transaction.put(key, (tmp_path / "image.png").read_bytes())
    database.close()
    images = train_vae.load_images("lsun-church", "test", tmp_path)
    assert images.shape == (2, 128, 128, 3) and (images[:, :, :24] == (200, 0, 0)).all()
    assert (images[:, :, 28:] == (10, 20, 30)).all()


def write_images(folder, names, value=9):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (value,) * 3).save(folder / name, format="PNG")


def tiff_of_12_bits(value):
    """Grey, 8 x 8: two pixels in three bytes."""
    data = bytes([value >> 4, (value & 15) << 4 | value >> 8, value & 255]) * 32
    tags = {256: 8, 257: 8, 258: 12, 259: 1, 262: 1, 273: 110, 277: 1, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def odd_exif(orientation):
    """An orientation, and an XResolution of -1/0, which Pillow cannot write again."""
    tags = struct.pack("<HHII", 0x112, 3, 1, orientation) + struct.pack("<HHII", 0x11A, 10, 1, 38)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4) + struct.pack("<ii", -1, 0)


def test_an_image_is_read_by_its_format_or_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.delattr(Image.Image, "has_transparency_data", raising=False)  # Pillow before 10.1
    plain, red = Image.new("RGB", (8, 8), (7, 8, 9)), (255, 0, 0)
    holes = Image.new("P", (8, 8))
    holes.putpalette(red)
    sixteen = np.full((8, 8), 257 * 50, np.uint16)
    rows = {  # a file: an image and how it is saved, or bytes; what is read
        "grey.png": (Image.new("L", (9, 12), 100), {}, 100),
        "grey-alpha.png": (Image.new("LA", (8, 8), (0, 51)), {}, 204),  # white shows through
        "alpha.png": (Image.new("RGBA", (8, 8), (*red, 0)), {}, 255),
        "holes.gif": (holes, dict(transparency=0), 255),
        "palette.gif": (plain.quantize(4), {}, (7, 8, 9)),
        "frames.gif": (plain, dict(save_all=True, append_images=[holes]), (7, 8, 9)),
        "bit.tif": (Image.new("1", (8, 8), 1), {}, 255),
        "cmyk.jpg": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), {}, red),
        "tiny.bmp": (Image.new("RGB", (1, 1), (7, 8, 9)), {}, (7, 8, 9)),
        "wide.webp": (Image.new("RGB", (30, 10), (9, 9, 9)), dict(lossless=True), 9),
        "name of none": (plain, dict(format="PNG"), (7, 8, 9)),
        "sixteen.png": (Image.fromarray(sixteen), {}, 50),
        "sixteen.pgm": (b"P5 8 8 65535\n" + sixteen.byteswap().tobytes(), {}, 50),
        "twelve.tif": (tiff_of_12_bits(4095 * 50 // 255), {}, 50),
        "float.tif": (Image.fromarray(np.full((8, 8), 0.5, np.float32)), {}, "no fixed range"),
        "int32.tif": (Image.fromarray(np.full((8, 8), 50, np.int32)), {}, "no fixed range"),
        "bomb.png": (Image.new("1", (20_000, 20_000)), {}, "exceeds limit"),  # 50 kB
        "empty.jpg": (b"", {}, "cannot identify"),
        "page.jpg": (b"<html>", {}, "cannot identify"),
    }
    for name, (image, how, want) in rows.items():
        path = tmp_path / name
        path.write_bytes(image) if isinstance(image, bytes) else image.save(path, **how)
        if isinstance(want, str):
            with pytest.raises(train_vae.UserError, match=f"{name}.*{want}"):
                train_vae.to_pixels(path, 8)
        else:
            got = train_vae.to_pixels(path, 8)
            assert got.shape == (8, 8, 3) and abs(got - np.int32(want)).max() <= 1, (name, got)
    train_vae.to_pixels(io.BytesIO((tmp_path / "cmyk.jpg").read_bytes()), 8)
    cut = (tmp_path / "cmyk.jpg").read_bytes()[:-20]
    (tmp_path / "cut.jpg").write_bytes(cut)
    with pytest.raises(train_vae.UserError, match="cut.jpg"):
        train_vae.to_pixels(tmp_path / "cut.jpg", 8)

    corners = np.zeros((16, 16, 3), np.uint8)
    corners[:8, :8] = 255
    for orientation, corner in {1: (0, 0), 2: (0, 8), 3: (8, 8), 6: (0, 8), 8: (8, 0)}.items():
        for name in ("turned.jpg", "turned.png", "turned.tif"):
            exif = Image.Exif()
            exif[0x112] = orientation
            exif = exif if name.endswith("tif") else odd_exif(orientation)
            Image.fromarray(corners).save(tmp_path / name, exif=exif, quality=100)
            got = train_vae.to_pixels(tmp_path / name, 16)
            assert (got[corner[0] :, corner[1] :][:8, :8] > 200).all(), (orientation, name)


@pytest.mark.parametrize(
    "names, train, test",
    [
        (["{i:02}.png"], 18, 2),  # every tenth
        (["a/{i:02}.png", "b/{i:02}.png"], 36, 4),
        (["train/{i}.png"], 18, 2),
        (["test/{i}.png"], 18, 2),
        (["Train/{i}.png", "TEST/{i}.png"], 20, 20),
        (["train/{i}.png", "val/{i}.png"], 20, 20),
        (["train/{i}.png", "valid/x/{i}.png"], 20, 20),
        (["images/train/{i}.png", "images/Validation/{i}.png"], 20, 20),
        (["{i}.png", "test/{i}.png"], 20, 20),
        (["train/{i}.png", "test/{i}.png", "val/{i}.png"], 20, 20),
        (["bus/{i}.png", "train/{i}.png"], 36, 4),  # classes
    ],
)
def test_splits_of_a_folder_do_not_leak(names, train, test, tmp_path, capsys):
    for value, name in enumerate(names):
        write_images(tmp_path / "p", [name.format(i=i) for i in range(20)], value)
    sets = [train_vae.load_images("folder", split, "p", 8) for split in ("train", "test")]
    assert [len(images) for images in sets] == [train, test]
    if train == test == 20:  # each of one folder: nothing of the test's is trained on
        first, second = (set(images.ravel().tolist()) for images in sets)
        assert first == {0} and second == {1}
    assert ("20 of val" in capsys.readouterr().err) == (len(names) == 3)


def test_what_is_no_image_is_left_out_and_counted_in_one_line(tmp_path, capsys):
    p = tmp_path / "p"
    write_images(p, [f"{i:02}.png" for i in range(30)] + ["b/é 1.jfif", "d/no-ending"], 1)
    write_images(tmp_path / "elsewhere", ["a.png", "b.png"], 2)
    (p / "link").symlink_to("../elsewhere")  # counts
    (p / "again").symlink_to("../elsewhere")
    (p / "d" / "loop").symlink_to("..")
    hidden = [".hidden.png", "._00.png", ".thumbnails/0.png"]
    write_images(p, [*hidden, "v/recon.png", "v/deep/0.png"])
    (p / "v" / "args.json").write_text("{}")  # a run
    (p / "notes.txt").write_text("not an image")
    (p / "labels.csv").write_text("neither")
    for name in ("03.png", "09.png", "19.png"):
        (p / name).write_bytes(b"")
    train, test = (train_vae.load_images("folder", split, "p", 8) for split in ("train", "test"))
    assert sorted(np.concatenate([train, test])[:, 0, 0, 0].tolist()) == [1] * 29 + [2] * 2
    lines = capsys.readouterr().err.splitlines()
    said = ("3 of 34 images", "03.png: cannot identify", "09.png", "1 .txt", "1 .csv")
    assert len(lines) == 1 and all(words in lines[0] for words in said)
    (p / "04.png").write_bytes(b"")
    with pytest.raises(train_vae.UserError, match="4 of 34 images .*03.png"):
        train_vae.load_images("folder", "train", "p", 8)
    with pytest.raises(train_vae.UserError, match="--data-dir p/b: only 1 images"):
        train_vae.load_images("folder", "train", "p/b", 8)
    assert len(list(Path("data").iterdir())) == 2  # no cache of either


def test_a_runs_own_files_are_not_data(tmp_path):
    write_images(tmp_path, [f"photos/{i:02}.png" for i in range(20)])
    own = ["runs/a/recon.png", "data/celeba/1.jpg", "figures/u.png", "samples.png", "recon.png"]
    write_images(tmp_path, own)
    (tmp_path / "args.json").write_text("{}")  # --out .
    assert len(train_vae.load_images("folder", "train", ".", 8)) == 18
    assert len(train_vae.load_images("folder", "train", "photos", 8)) == 18


def test_a_folders_cache_is_of_its_images(tmp_path, monkeypatch):
    names = [f"{i:02}.png" for i in range(20)]
    write_images(tmp_path / "a", names, 1)

    def value_and_caches(folder="a", size=8):
        images = train_vae.load_images("folder", "test", folder, size)
        return images.shape[0], int(images[0, 0, 0, 0]), len(list(Path("data").iterdir()))

    assert value_and_caches() == (2, 1, 2)
    monkeypatch.setattr(train_vae, "decode", None)  # the cache is taken
    assert value_and_caches(tmp_path / "a") == (2, 1, 2)
    monkeypatch.undo()
    assert value_and_caches(size=4) == (2, 1, 4)
    shutil.copytree("a", "b")
    times = os.stat("a/09.png")
    write_images(tmp_path / "b", names, 3)  # as many, of the same names and bytes
    for name in names:
        os.utime(f"b/{name}", ns=(times.st_atime_ns, os.stat(f"a/{name}").st_mtime_ns))
    assert value_and_caches("b") == (2, 3, 6)
    write_images(tmp_path / "a", [f"{i:02}.png" for i in range(20, 40)], 4)
    assert value_and_caches() == (4, 1, 8)
    write_images(tmp_path / "a", names, 5)
    assert value_and_caches() == (4, 5, 10)
    assert sorted(os.listdir("a")) == [f"{i:02}.png" for i in range(40)]


def test_a_cache_is_whole_or_not_there(tmp_path, monkeypatch):
    original, calls = train_vae.to_pixels, []

    def fail(*args):
        calls.append(args)
        if len(calls) == 1500:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(train_vae, "to_pixels", fail)
    with pytest.raises(KeyboardInterrupt):
        train_vae.load_images("shapes", "test", tmp_path / "new", 8)
    assert not list((tmp_path / "new").iterdir())

    def another_starts(*args):  # while the first decodes
        monkeypatch.setattr(train_vae, "to_pixels", original)
        first.append(train_vae.load_images("shapes", "test", tmp_path / "new", 8))
        return original(*args)

    first = []
    monkeypatch.setattr(train_vae, "to_pixels", another_starts)
    images = train_vae.load_images("shapes", "test", tmp_path / "new", 8)
    assert np.array_equal(images, first[0]) and (images.max((1, 2, 3)) > 0).all()
    assert len(images) == 2000 and os.listdir(tmp_path / "new") == ["shapes-test-8.npy"]


class Quota(Exception):
    """Foreign: gdown's, lmdb's."""


@pytest.mark.parametrize("error", [Quota("Failed:\n\n too many users"), OSError("HTTP Error 403")])
@pytest.mark.parametrize(
    "dataset, place, cure",
    [
        ("cifar10", "torchvision.datasets.CIFAR10", "cifar-10-python.tar.gz"),
        ("celeba", "torchvision.datasets.CelebA", "img_align_celeba"),
        ("lsun-church", "lmdb", "church_outdoor"),
    ],
)
def test_what_a_downloader_raises_is_one_line(dataset, place, cure, error, tmp_path, monkeypatch):
    def fail(*args, **how):
        raise error

    monkeypatch.setitem(sys.modules, "lmdb", Namespace(open=fail))
    if place != "lmdb":
        monkeypatch.setattr(place, fail)
    with pytest.raises(train_vae.UserError) as e:
        train_vae.load_images(dataset, "train", tmp_path)
    words = (dataset, str(tmp_path), cure, " ".join(str(error).split()))
    assert all(word in str(e.value) for word in words) and "\n" not in str(e.value)


def test_shapes_are_varied_and_repeatable():
    a, b = (train_vae.draw_shapes(200, 32, np.random.default_rng(1)) for _ in range(2))
    assert np.array_equal(a, b) and a.dtype == np.uint8
    assert a.mean((1, 2)).std() > 30 and a.std((1, 2)).mean() > 20


def test_every_image_is_seen_once_an_epoch_whatever_the_batch():
    orders = [train_vae.epoch_order(*a).tolist() for a in ((0, 25, 3), (1, 25, 3), (0, 25, 4))]
    assert len({tuple(order) for order in [range(25), *orders]}) == 4
    for batch in (7, 25, 60):
        seen = torch.cat([train_vae.batch_indices(step, batch, 25, 3) for step in range(25)])
        assert torch.equal(seen, torch.cat([train_vae.epoch_order(e, 25, 3) for e in range(batch)]))
        assert torch.bincount(seen).unique().tolist() == [batch]


# --------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("model", train_vae.QUANTIZERS)
def test_a_run_from_start_to_finish(photos, tmp_path, capsys, model):
    folder = tmp_path / "r"
    flags = "--steps 6 --log-every 2 --eval-every 3 --model"
    arguments = tiny(photos, folder, flags, model)
    train_vae.main(arguments)
    shown = capsys.readouterr().out
    assert "images/s" in shown and "min left" in shown
    assert re.search(r"perplexity [\d.]+ of 12, \d+ codes used", shown)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 6]
    assert [line.get("split") for line in lines] == [None, "test", None, None, "test"]
    keys = {"step", "loss", "mse", "kl", "beta", "tau", "lr", "perplexity", "entropy_mean"}
    keys |= {"entropy_std", "uncertainty"}
    assert all(keys <= line.keys() for line in lines) and "images_per_second" in lines[0]
    assert (lines[0]["uncertainty"] is None) == (model != "edvae")
    environment = json.loads((folder / "args.json").read_text())["environment"]
    assert environment["torch"] == torch.__version__
    loaded = train_vae.load_vae(folder)
    x = torch.from_numpy(train_vae.load_images("folder", "test", photos, 16))
    indices = loaded.encode(train_vae.to_float(x))
    inputs, reconstructions = tiles_of(folder / "recon.png", 16)
    assert np.array_equal(inputs[0], x[0])
    assert np.array_equal(reconstructions[0], pixels(loaded.decode(indices))[0])
    assert indices.shape == (6, 4, 4) and not loaded.training
    assert "already holds a run" in refused(train_vae.main, *arguments)


def test_the_embedded_default_runs_alone(tmp_path, capsys):
    train_vae.main(["--steps", "2", "--eval-every", "2"])
    assert Path("runs/shapes-edvae-1/recon.png").exists()
    assert "codes used" in capsys.readouterr().out
    train, test = (np.load(f"data/shapes-{split}-32.npy") for split in ("train", "test"))
    assert train.shape == (20_000, 32, 32, 3) and test.shape == (2000, 32, 32, 3)
    assert not np.array_equal(train[:2000], test)


def copy_run_at(monkeypatch, step, folder):
    """Copy a run's folder as its checkpoint of `step` is written: as if it was killed after it."""
    save = train_vae.Run.save

    def save_and_copy(self, done, **parts):
        save(self, done, **parts)
        if done == step and self.folder != folder:
            shutil.copytree(self.folder, folder, dirs_exist_ok=True)

    monkeypatch.setattr(train_vae.Run, "SAVE_SECONDS", 0)
    monkeypatch.setattr(train_vae.Run, "save", save_and_copy)


def sees(monkeypatch, owner, name, watch):
    """Let watch(*arguments) see each call of owner's function `name` before it is made."""
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: (watch(*a, **k), function(*a, **k))[1])


@pytest.mark.parametrize("preset", train_vae.PRESETS)
def test_a_run_killed_at_any_step_ends_with_the_same_bits(preset, photos, tmp_path, monkeypatch):
    """Killed before the test of step 4, and before its last."""
    flags = "--resume --steps 9 --log-every 2 --eval-every 4 --preset"  # of nothing: it starts
    with monkeypatch.context() as patched:
        copy_run_at(patched, 4, tmp_path / "4")
        copy_run_at(patched, 9, tmp_path / "9")
        train_vae.main(tiny(photos, tmp_path / "whole", flags, preset))
    for step in (4, 9):
        cut = tmp_path / str(step)
        assert "split" not in log_of(cut)[-1] and log_of(cut)[-1]["step"] == step
        with open(cut / "log.jsonl", "a") as f:  # after the checkpoint, and cut short
            f.write(f'{{"step": {step + 1}, "loss": 1}}\n{{"step": 12')
        train_vae.main(["--out", str(cut), "--resume", *DEVICE_FLAGS])
        a, b = checkpoint(tmp_path / "whole"), checkpoint(cut)
        assert a["step"] == b["step"] == 9 and same(a["model"], b["model"])
        assert step == 9 or same(a["optimizer"], b["optimizer"])  # after 9 no step sets the rate
        assert log_of(tmp_path / "whole") == log_of(cut)
        first, kept = (json.loads((f / "args.json").read_text()) for f in (tmp_path / "whole", cut))
        assert kept["environment"] == first["environment"] and len(kept["resumed"]) == 1


def test_init_from_takes_weights_and_shape_and_nothing_else(photos, tmp_path):
    train_vae.main(tiny(photos, tmp_path / "a", "--steps 3 --model dvae"))
    start = f"--dataset folder --size 24 --data-dir {photos} --batch-size 4 --steps 1 --lr 1e-30"
    start += f" --muon-lr 0 --device cpu --init-from {tmp_path / 'a'} --out {tmp_path / 'b'}"
    train_vae.main(start.split())
    a, b = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b")
    assert all(torch.allclose(a["model"][k], b["model"][k], atol=1e-6) for k in a["model"])
    args = b["args"]
    assert (args["model"], args["width"], args["code_dim"], args["beta"]) == ("dvae", 8, 4, 5e-5)
    assert b["step"] == 1 and log_of(tmp_path / "b")[0]["step"] == 1


def test_each_step_has_its_own_noise_tau_beta_and_rate(photos, tmp_path, monkeypatch):
    seen, rates = [], []

    def note(self, logits, tau, beta, key):
        if self.training:
            seen.append((tau.item(), beta.item(), *key.tolist()))

    sees(monkeypatch, train_vae.EdVAE, "forward", note)
    note_rate = lambda adam: rates.append(adam.param_groups[0]["lr"].item())  # noqa: E731
    sees(monkeypatch, torch.optim.Adam, "step", note_rate)
    train_vae.main(tiny(photos, tmp_path / "r", "--steps 4 --eval-every 2 --seed 7"))
    args = Namespace(**checkpoint(tmp_path / "r")["args"])
    lr, beta, tau = scheduled(args, range(4))
    want = [(tau[t], beta[t], 7, t, 0) for t in range(4)]
    assert rates == pytest.approx(lr, rel=1e-6)
    assert torch.allclose(torch.tensor(seen), torch.tensor(want), rtol=1e-6, atol=0)


class Tape(torch.utils._python_dispatch.TorchDispatchMode):
    """A CUDA graph's stand-in: records a step's operations, then undoes what they wrote.

    A replay runs them again on the same tensors. An operation that reads from the host fails.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.outside, self.made = [], {}, set()
        self.noise = torch.get_rng_state()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        assert "local_scalar_dense" not in str(f), "the step waits for the device"
        for x in tensors_in((args, kwargs)):
            memory = x.untyped_storage()
            if memory.data_ptr() not in self.made | self.outside.keys():
                self.outside[memory.data_ptr()] = memory, memory.clone()
        out = f(*args, **(kwargs or {}))
        self.made |= {x.untyped_storage().data_ptr() for x in tensors_in(out)} - self.outside.keys()
        self.calls.append((f, args, kwargs or {}, out))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for memory, before in self.outside.values():
            memory.copy_(before)
        torch.set_rng_state(self.noise)

    @torch.no_grad()
    def replay(self):
        for f, args, kwargs, out in self.calls:
            for old, new in zip(tensors_in(out), tensors_in(f(*args, **kwargs))):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def tensors_in(tree):
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def use_tapes(monkeypatch) -> list:
    """Let kernels.Graphed record tapes, and train_vae.py use it on a CPU; gives the tapes."""
    tapes = []

    def new_tape():
        tapes.append(Tape())
        return tapes[-1]

    stream = Namespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", new_tape)
    monkeypatch.setattr(torch.cuda, "graph", lambda tape: tape)
    monkeypatch.setattr(train_vae, "one_graph", lambda args: True)
    return tapes


@pytest.mark.parametrize("model", train_vae.QUANTIZERS)
def test_recorded_steps_are_the_ordinary_ones(model, photos, tmp_path, monkeypatch):
    """The graph's four rules, without a GPU: see `kernels.Graphed`."""
    flags = "--preset fast --steps 12 --log-every 5 --eval-every 6 --model"
    train_vae.main(tiny(photos, tmp_path / "plain", flags, model))
    tapes = use_tapes(monkeypatch)
    train_vae.main(tiny(photos, tmp_path / "tape", flags, model))
    (tape,) = tapes
    assert len(tape.calls) > 300  # forward, backward, optimisers and measures
    a, b = checkpoint(tmp_path / "plain"), checkpoint(tmp_path / "tape")
    assert same(a["model"], b["model"]) and same(a["optimizer"], b["optimizer"])
    assert log_of(tmp_path / "plain") == log_of(tmp_path / "tape")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("model", train_vae.QUANTIZERS)
def test_a_graph_trains_as_steps_do(model, photos, tmp_path):
    for how in ("--compile", "--no-compile"):
        flags = f"--model {model} --preset fast --steps 12 --device cuda {how}"
        train_vae.main(tiny(photos, tmp_path / how, flags))
    graph, plain = (checkpoint(tmp_path / how)["model"] for how in ("--compile", "--no-compile"))
    for name, weight in plain.items():
        assert torch.allclose(graph[name].float(), weight.float(), rtol=1e-2, atol=1e-3), name


def test_two_processes_train_as_one(two_processes, photos, tmp_path):
    train_vae.main(tiny(photos, tmp_path / "one", FOR_TWO))
    assert (two_processes / "printed").read_text().count("images/s") == 2  # one process speaks
    state, b = checkpoint(tmp_path / "one"), checkpoint(two_processes / "vae")["model"]
    torch.manual_seed(42)
    start = train_vae.VAE(Namespace(**state["args"])).state_dict()
    for name, value in state["model"].items():  # each CPU rounds half a batch in its own way
        moved = (value - start[name]).norm()
        assert (value - b[name]).norm() < 1e-3 * moved and moved > 0, name
    for one, two in zip(log_of(tmp_path / "one"), log_of(two_processes / "vae"), strict=True):
        for key, value in one.items():  # measures are of the whole batch
            if isinstance(value, (int, float)):
                assert value == pytest.approx(two[key], rel=1e-3, abs=1e-6), key


def test_what_is_not_finite_stops_the_run_and_spares_the_checkpoint(photos, tmp_path, monkeypatch):
    schedules = train_vae.schedules

    def bad_step(step, args):
        return schedules(step, args) | (dict(beta=math.nan) if step == 5 else {})

    monkeypatch.setattr(train_vae, "schedules", bad_step)
    monkeypatch.setattr(train_vae.Run, "SAVE_SECONDS", 0)
    with pytest.raises(SystemExit) as e:
        train_vae.main(tiny(photos, tmp_path / "r", "--steps", 9, "--log-every", 2))
    assert re.search("not finite, in steps 5 to 6; .*ckpt.pt is from step 4", e.value.code)
    state = checkpoint(tmp_path / "r")
    assert state["step"] == 4 and all(v.isfinite().all() for v in state["model"].values())
    monkeypatch.setattr(train_vae, "schedules", schedules)
    train_vae.main(["--out", str(tmp_path / "r"), "--resume", *DEVICE_FLAGS])


def test_ctrl_c_says_how_to_go_on(photos, tmp_path, monkeypatch, capsys):
    def interrupt(step, args):
        if step == 5:
            raise KeyboardInterrupt  # what Python makes of Ctrl-C

    sees(monkeypatch, train_vae, "schedules", interrupt)
    monkeypatch.setattr(train_vae.Run, "SAVE_SECONDS", 0)
    with pytest.raises(SystemExit) as e:
        train_vae.main(tiny(photos, tmp_path / "r", "--steps", 10**6, "--log-every", 2))
    said = capsys.readouterr().out.splitlines()[-1]
    assert e.value.code == 130 and "saved at step 4; to continue: python train_vae.py" in said
    assert checkpoint(tmp_path / "r")["step"] == 4
    assert train_vae.settings([*said.split("train_vae.py ")[1].split()])[0].steps == 10**6


def test_checkpoints_are_written_every_ten_seconds_and_at_the_end(photos, tmp_path, monkeypatch):
    saved, now = [], iter(range(0, 1000, 3))  # 3 s a look at the clock
    monkeypatch.setattr(train_vae.time, "monotonic", lambda: next(now))
    sees(monkeypatch, train_vae.Run, "save", lambda self, step, **_: saved.append(step))
    train_vae.main(tiny(photos, tmp_path / "r", "--steps", 10, "--log-every", 1))
    assert saved == [0, 4, 8, 10]


def test_a_collapsed_codebook_is_said(photos, tmp_path, capsys):
    train_vae.main(tiny(photos, tmp_path / "r", "--steps", 1, "--codebook-size", 200, "--lr", 1e-9))
    shown = capsys.readouterr().out
    assert "codes_used" in shown and "the codebook has collapsed" in shown.splitlines()[-1]


@contextlib.contextmanager
def limited(kind, size):
    resource = pytest.importorskip("resource")
    kind = getattr(resource, kind)
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


def memory():
    """This process's virtual and resident memory in MiB."""
    pages = Path("/proc/self/statm").read_text().split()[:2]
    return [int(n) * os.sysconf("SC_PAGE_SIZE") / 2**20 for n in pages]


def test_a_disk_that_is_full_spares_the_checkpoint(photos, tmp_path):
    folder = tmp_path / "r"
    train_vae.main(tiny(photos, folder, "--steps 4"))
    state = checkpoint(folder)
    state["step"] = 2  # as if two steps were left
    torch.save(state, folder / "ckpt.pt")
    before = (folder / "ckpt.pt").read_bytes()
    resume = ["--out", str(folder), "--resume", *DEVICE_FLAGS]
    with limited("RLIMIT_FSIZE", len(before) // 2):
        assert "ckpt.pt: File too large" in refused(train_vae.main, *resume)
    assert (folder / "ckpt.pt").read_bytes() == before
    assert not [f for f in folder.iterdir() if f.name.startswith(".")]  # no half file is left
    train_vae.main(resume)
    assert checkpoint(folder)["step"] == 4


@needs_proc
def test_too_little_memory_is_one_clear_line(photos, tmp_path):
    arguments = tiny(photos, tmp_path / "r", "--batch-size", 2**18, "--size 128")  # 13 GB
    with limited("RLIMIT_AS", int(memory()[0] + 2048) * 2**20):
        assert "out of memory: take a smaller batch" in refused(train_vae.main, *arguments)


@needs_proc
def test_memory_is_flat_over_500_steps(photos, tmp_path, monkeypatch):
    resident = []
    sees(monkeypatch, train_vae, "schedules", lambda *_: resident.append(memory()[1]))
    smaller = "--size 8 --model gs-vqvae --width 4 --codebook-size 4 --batch-size 4"
    train_vae.main(tiny(photos, tmp_path / "r", smaller, "--steps 500 --log-every 10"))
    assert min(resident[400:]) - min(resident[50:150]) < 4  # 12 kB a step


def test_bf16_has_the_loss_curve_of_fp32(photos, tmp_path):
    curves = []
    for how in ("fp32", "bf16"):
        larger = "--width 32 --codebook-size 64 --batch-size 16 --steps 120 --log-every 20"
        more = "--lr 2e-3 --lr-anneal 1 --beta-ramp 0.2 --precision"
        train_vae.main(tiny(photos, tmp_path / how, larger, more, how))
        curves.append([x["mse"] for x in log_of(tmp_path / how) if "split" not in x])
    assert curves[0][-1] < 0.85 * curves[0][0]  # it learns
    assert curves[1] == pytest.approx(curves[0], rel=0.01) and curves[1] != curves[0]


def test_profile_prints_a_table_and_writes_no_run(photos, tmp_path, capsys):
    train_vae.main(tiny(photos, tmp_path / "r", "--profile"))
    shown = capsys.readouterr().out
    assert "Self CPU time total" in shown and "edvae::quantize" in shown
    calls = re.search(r"edvae::quantize_backward .* (\d+) *\n", shown)
    assert calls[1] == "10" and not list((tmp_path / "r").iterdir())


def test_a_folder_of_few_images(tmp_path):
    folder_of_images(tmp_path / "images" / "train", 1)
    folder_of_images(tmp_path / "images" / "test", 20)  # a row of twelve and a part
    train_vae.main(tiny(tmp_path / "images", tmp_path / "r", "--steps", 2))
    assert Image.open(tmp_path / "r" / "recon.png").size[1] < 300  # the whole row alone
    arguments = prior_arguments(tmp_path / "r", tmp_path / "p")
    assert "a prior needs at least 2" in refused(train_prior.main, *arguments)


# --------------------------------------------------------------------------- the prior and samples


def pixelsnail(K=7, N=5, **changes):
    options = dict(width=16, blocks=2, layers=2, dropout=0.0) | changes
    model = train_prior.PixelSNAIL(K, N, **options).eval()
    for p in model.parameters():  # large enough that a leak would show
        p.data.mul_(1.5)
    return model


def test_prior_sees_only_earlier_positions():
    model, codes = pixelsnail(), torch.randint(7, (2, 5, 5))
    want = model(codes)
    for p in range(25):  # by perturbation, at every position
        changed = codes.clone()
        changed[:, p // 5, p % 5] = (changed[:, p // 5, p % 5] + 1) % 7
        difference = (model(changed) - want).abs().flatten(1, 2).sum((0, 2))  # (N N)
        assert difference[: p + 1].max() == 0
        assert p == 24 or difference[p + 1 :].max() > 0
    x = model.embedding(codes).permute(0, 3, 1, 2).detach().requires_grad_()  # and by autograd
    background = model.background.expand(2, -1, -1, -1)
    logits = model.after_stem(model.stem(x), background).flatten(2)  # (B, K, N N)
    for p in range(25):
        grad = torch.autograd.grad(logits[..., p].square().sum(), x, retain_graph=True)[0]
        assert grad.flatten(2)[..., p:].abs().max() == 0


def test_attention_of_the_first_position_is_zero():
    attention = train_prior.CausalAttention(6, 10, 16)
    out = attention(torch.randn(3, 6, 4, 4), torch.randn(3, 10, 4, 4))
    assert (out[:, :, 0, 0] == 0).all() and (out[:, :, 0, 1] != 0).any() and out.isfinite().all()


@pytest.mark.parametrize("K, N, width, blocks", [(7, 5, 16, 2), (30, 8, 32, 1), (3, 1, 16, 1)])
@torch.no_grad()
def test_incremental_logits_are_the_full_networks(K, N, width, blocks):
    model, codes = pixelsnail(K, N, width=width, blocks=blocks), torch.randint(K, (3, N, N))
    want, cache = model(codes), train_prior.Cache(3, N)
    for i in range(N):
        for j in range(N):
            assert (model.next_logits(cache) - want[:, i, j]).abs().max() < 1e-4
            model.write_codes(cache, codes[:, i, j])
            cache.advance()


def test_samples_follow_the_model_and_do_not_depend_on_the_batch():
    model, n = pixelsnail(K=2, N=2), 4000
    every = torch.tensor([[(m >> p) & 1 for p in range(4)] for m in range(16)]).view(16, 2, 2)
    log_p = model(every).log_softmax(-1).gather(-1, every[..., None]).sum((1, 2, 3))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)  # the chain rule, by brute force
    drawn = (model.sample(n, seed=1).view(n, 4) * torch.tensor([1, 2, 4, 8])).sum(1)
    expected = n * log_p.exp()
    counts = torch.bincount(drawn, minlength=16)
    assert ((counts - expected) ** 2 / expected).sum() < 45  # 15 degrees of freedom, p = 1e-4
    model = pixelsnail()
    six = model.sample(6, seed=3)
    assert torch.equal(six[4:], model.sample(2, seed=3, first=4))
    assert not torch.equal(six, model.sample(6, seed=4))
    sampler = model.sampler
    assert torch.equal(six, model.sample(6, seed=3)) and model.sampler is sampler  # kept
    with torch.no_grad():
        model.head.bias.add_(torch.arange(7.0))  # new weights: a new sampler
    assert not torch.equal(six, model.sample(6, seed=3)) and model.sampler is not sampler


def test_recorded_draws_are_the_ordinary_ones(monkeypatch):
    prior = pixelsnail().eval()
    want = [prior.sample(3, seed=seed) for seed in (0, 1)]
    use_tapes(monkeypatch)
    prior.sampler.step = kernels.Graphed(prior.sampler.draw)
    assert all(map(torch.equal, [prior.sample(3, seed=seed) for seed in (0, 1)], want))


def test_sampling_options():
    model = pixelsnail()
    greedy = model.sample(2, top_k=1)
    assert torch.equal(model(greedy).argmax(-1), greedy)
    assert torch.equal(greedy, model.sample(2, temperature=1e-4))
    given = torch.full((2, 5, 5), -1)
    given[:, :2] = 6
    kept = model.sample(2, top_k=2, given=given)
    assert (kept[:, :2] == 6).all()
    best_two = model(kept).topk(2).indices
    assert (best_two == kept[..., None]).any(-1)[:, 2:].all()


def test_prior_learns_a_batch_by_heart():
    model, codes = pixelsnail().train(), torch.randint(7, (4, 5, 5))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(120):
        loss = torch.nn.functional.cross_entropy(model(codes).flatten(0, 2), codes.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3 < math.log(7)


def test_the_prior_keeps_its_run_and_its_codes(chain, first_stage):
    lines = log_of(chain / "prior")
    assert [line["step"] for line in lines] == [*range(1, 10), 9] and lines[-1]["split"] == "test"
    evaluations = [line for line in lines if "validation" in line]
    assert [line["step"] for line in evaluations] == [3, 6, 9]
    assert lines[-1]["uniform"] == pytest.approx(math.log(12))
    prior = train_prior.load_prior(chain / "prior")
    codes = train_prior.load_codes(chain / "vae", "test", 12)
    assert torch.equal(codes, first_stage.codes)
    nats = -prior(codes).log_softmax(-1).gather(-1, codes[..., None]).mean().item()
    sizes = []  # of the passes: the run's
    prior.register_forward_hook(lambda model, x, logits: sizes.append(len(logits)))
    four_times = train_prior.nats_per_code(prior, codes.repeat(4, 1, 1))
    assert four_times == pytest.approx(nats, rel=1e-5) and sizes == [8, 8, 8]
    assert not prior.training  # else samples would see dropout
    assert nats < math.log(12) - 0.1  # it learns
    assert nats == pytest.approx(lines[-1]["prior_nats_per_code"], rel=1e-4)


def test_codes_are_kept_by_checkpoint_and_images(chain, photos, tmp_path, monkeypatch, capsys):
    shutil.copytree(chain / "vae", tmp_path / "vae")
    other = folder_of_images(tmp_path / "other", 60, 1)
    encoded = []
    sees(monkeypatch, train_vae.VAE, "encode", lambda self, x: encoded.append(len(x)))

    def codes(data_dir, vae=tmp_path / "vae"):
        encoded.clear()
        return train_prior.load_codes(vae, "train", 12, data_dir)

    one, two = codes(photos), codes(other)
    assert len(one) == len(two) == 54 and not torch.equal(one, two)
    assert encoded == [8] * 6 + [6]  # in the first stage's batches
    assert torch.equal(codes(photos), one) and torch.equal(codes(other), two) and not encoded
    state = checkpoint(tmp_path / "vae")
    state["model"]["encoder.head.bias"] += torch.linspace(-1, 1, 12)
    torch.save(state, tmp_path / "vae" / "ckpt.pt")
    assert not torch.equal(codes(photos), one) and encoded  # other weights, other codes

    def fail(*_):  # as a folder that cannot be written
        raise OSError(30, "Read-only file system")

    shutil.copy(chain / "vae" / "ckpt.pt", tmp_path / "vae.pt")  # a file stands for a run
    monkeypatch.setattr(os, "replace", fail)
    assert torch.equal(codes(photos, tmp_path / "vae.pt"), one) and encoded
    assert "not kept" in capsys.readouterr().out and not list(tmp_path.glob("*codes*"))


def test_a_moved_prior_finds_its_first_stage(chain, tmp_path):
    (tmp_path / "one").mkdir()
    shutil.copytree(chain / "vae", tmp_path / "one" / "v")
    train_prior.main(prior_arguments(tmp_path / "one" / "v", tmp_path / "one" / "p", "--steps", 1))
    (tmp_path / "one").rename(tmp_path / "two")
    draw = ["-n", "1", "--device", "cpu", "--out", str(tmp_path / "x.png"), "--prior"]
    sample.main([*draw, str(tmp_path / "two" / "p")])
    resumed, _ = train_prior.settings(["--out", str(tmp_path / "two" / "p"), "--resume"])
    assert resumed.vae == tmp_path / "two" / "v"
    assert resumed.eval_every == 3 and resumed.steps == 1  # as they were
    shutil.move(tmp_path / "two" / "p", tmp_path / "alone")
    assert "name its run by --vae" in refused(sample.main, *draw, tmp_path / "alone")
    sample.main([*draw, str(tmp_path / "alone"), "--vae", str(tmp_path / "two" / "v")])
    short, _ = train_prior.settings(["--vae", "two/v", "--steps", "15"])
    assert short.eval_every == 250  # 15 steps were validated fifteen times


def test_a_prior_is_judged_by_maps_that_it_was_not_trained_on(chain, tmp_path, monkeypatch):
    tens_and_units = torch.tensor([10, 1] * 8).view(4, 4)
    maps = torch.arange(50)[:, None, None] // tens_and_units % 10  # all differ
    judged, fitted = [], []

    def judge(model, codes):
        judged.extend(codes[:, 0, :2].tolist())

    def fit(self, codes):
        if self.training:
            fitted.extend(codes[:, 0, :2].tolist())

    monkeypatch.setattr(train_prior, "load_codes", lambda *a: maps)
    sees(monkeypatch, train_prior, "nats_per_code", judge)
    sees(monkeypatch, train_prior.PixelSNAIL, "forward", fit)
    train_prior.main(prior_arguments(chain / "vae", tmp_path / "r", "--eval-every", 20))
    held_out = {tuple(code) for code in judged[:2]}  # 5%; the test split comes last
    seen = {tuple(code) for code in fitted}
    assert len(judged) == 2 + 50 and len(seen) == 48 and not held_out & seen
    p = torch.zeros(12)
    for tens, units in seen:
        p[tens] += 0.5 / 48
        p[units] += 0.5 / 48
    unigram = -(torch.bincount(maps.flatten()) / maps.numel() * p[:10].log()).sum().item()
    assert log_of(tmp_path / "r")[-1]["unigram"] == pytest.approx(unigram, rel=1e-5)


def test_a_prior_killed_at_any_step_ends_with_the_same_bits(chain, tmp_path, monkeypatch):
    """Killed after the checkpoint of step 4; evaluations are at 3, 6 and 9. Then in the test."""
    whole = chain / "prior"
    with monkeypatch.context() as patched:
        copy_run_at(patched, 4, tmp_path / "4")
        copy_run_at(patched, 9, tmp_path / "9")  # before its test pass
        train_prior.main(prior_arguments(chain / "vae", tmp_path / "r"))
    for step in (4, 9):
        cut = tmp_path / str(step)
        assert checkpoint(cut)["step"] == step
        assert all("split" not in line for line in log_of(cut))
        resume = ["--vae", str(chain / "vae"), "--out", str(cut), "--resume", *DEVICE_FLAGS]
        train_prior.main(resume)
        a, b = checkpoint(cut), checkpoint(whole)
        assert all(same(a[k], b[k]) for k in ("step", "model", "ema", "best", "waited"))
        assert same(a["optimizer"]["state"], b["optimizer"]["state"])
        assert log_of(cut) == log_of(whole)
        assert "is finished" in refused(train_prior.main, *resume)
        assert log_of(cut) == log_of(whole)  # no line was added


def test_a_prior_that_is_not_finite_keeps_its_checkpoint(chain, tmp_path, monkeypatch, capsys):
    """nan in step 5 of 9, which is logged."""
    monkeypatch.setattr(train_vae.Run, "SAVE_SECONDS", 0)
    steps = iter(range(9))

    def spoil(self, codes):
        if self.training and next(steps) == 4:
            self.head.bias.data.fill_(math.nan)

    sees(monkeypatch, train_prior.PixelSNAIL, "forward", spoil)
    with pytest.raises(SystemExit) as e:
        train_prior.main(prior_arguments(chain / "vae", tmp_path / "r", "--log-every", 2))
    assert e.value.code == 1
    assert re.search("not finite, in steps 5 to 6; .*is from step 4", capsys.readouterr().out)
    assert checkpoint(tmp_path / "r")["step"] == 4


def test_a_prior_does_not_decode_by_another_first_stage(chain, tmp_path):
    shutil.copytree(chain / "vae", tmp_path / "vae")
    state = checkpoint(tmp_path / "vae")
    state["model"]["quantizer.codebook"] += 1
    torch.save(state, tmp_path / "vae" / "ckpt.pt")
    state = checkpoint(chain / "prior")
    state["args"]["vae"] = str(tmp_path / "vae")
    (tmp_path / "prior").mkdir()
    torch.save(state, tmp_path / "prior" / "ckpt.pt")
    wrong = "--prior", chain / "prior", "--vae", tmp_path / "vae", *DEVICE_FLAGS
    assert "is not the checkpoint" in refused(sample.main, *wrong)
    assert "is not the checkpoint" in refused(evaluate.main, tmp_path / "prior")


def test_patience_stops_and_the_best_average_is_kept(chain, tmp_path, monkeypatch):
    scripted = iter([3.0, 2.0, 4.0, 4.0, 9.0])  # validation at steps 1 to 4, then the test split
    monkeypatch.setattr(train_prior, "nats_per_code", lambda *a: next(scripted))
    copy_run_at(monkeypatch, 2, tmp_path / "two")
    more = ["--eval-every", 1, "--patience", 2, "--ema", 0]
    train_prior.main(prior_arguments(chain / "vae", tmp_path / "r", *more))
    end, two = checkpoint(tmp_path / "r"), checkpoint(tmp_path / "two")
    assert end["step"] == 4 and log_of(tmp_path / "r")[-1]["prior_nats_per_code"] == 9
    assert same(end["best"], two["ema"]) and not same(end["best"], end["ema"])
    assert same(end["ema"], end["model"])  # a decay of 0
    assert same(train_prior.load_prior(tmp_path / "r").state_dict(), two["ema"])


def test_two_processes_fit_the_prior_as_one(two_processes, chain, tmp_path):
    train_prior.main(prior_arguments(chain / "vae", tmp_path / "one", "--dropout", 0))
    a, b = checkpoint(tmp_path / "one")["model"], checkpoint(two_processes / "prior")["model"]
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


def test_sampling_script(chain, photos, tmp_path):
    prior, photo = str(chain / "prior"), str(photos / "03.png")
    many = sorted(photos.iterdir())[:30]
    six = ["--prior", prior, "-n", "6", "--device", "cpu", "--save-images"]
    left_over = dict(WORLD_SIZE="2", RANK="")  # of a torchrun: nothing to it
    printed = run(HERE / "sample.py", *six, tmp_path / "a", "--batch-size", 4, **left_over)
    assert "6 of 6 images" in printed
    sample.main([*six, str(tmp_path / "b"), "--batch-size", "3"])
    files = sorted((tmp_path / "a").iterdir())
    assert len(files) == 6
    assert all(f.read_bytes() == (tmp_path / "b" / f.name).read_bytes() for f in files)
    for name, how in {
        "grid.png": ["--prior", prior, "-n", "5"],
        "completed.png": ["--prior", prior, "-n", "6", "--complete", photo],
        "reconstructed.png": ["--vae", str(chain / "vae"), "--reconstruct", photo, photo],
        "many.png": ["--vae", str(chain / "vae"), "--reconstruct", *map(str, many)],
    }.items():
        sample.main([*how, "--device", "cpu", "--out", str(tmp_path / name)])
    vae, x = train_vae.load_vae(chain / "vae"), sample.read_image(photos / "03.png", 16)[None]
    inputs, reconstructions = tiles_of(tmp_path / "reconstructed.png", 16)
    assert np.array_equal(inputs[1], pixels(x)[0])
    assert np.array_equal(reconstructions[1], pixels(vae.decode(vae.encode(x)))[0])
    rows = tiles_of(tmp_path / "many.png", 16)
    assert rows.shape[:2] == (6, 12)  # pairs of rows: 12, 12 and 6 images, and white
    inputs = torch.stack([sample.read_image(path, 16) for path in many])
    x_hat = vae.decode(vae.encode(inputs))
    assert np.array_equal(rows[::2].reshape(36, 16, 16, 3)[:30], pixels(inputs))
    assert np.abs(rows[1::2].reshape(36, 16, 16, 3)[:30] - pixels(x_hat).astype(int)).max() <= 1
    assert (rows[4:, 6:] == 255).all()
    assert tiles_of(tmp_path / "grid.png", 16).shape[:2] == (3, 2)
    (completed,) = tiles_of(tmp_path / "completed.png", 16)
    assert np.array_equal(completed[0], pixels(x)[0]) and len(completed) == 8
    assert np.array_equal(completed[1, :8], completed[0, :8]) and (completed[1, 8:] == 255).all()


def test_sample_passes_on_what_it_is_told(chain, photos, monkeypatch):
    drawn, draw = [], train_prior.PixelSNAIL.sample

    def spy(*arguments):
        drawn.append(draw(*arguments))
        return drawn[-1]

    monkeypatch.setattr(train_prior.PixelSNAIL, "sample", spy)
    base = f"--prior {chain / 'prior'} --device cpu -n 6 "
    sample.main(f"{base} --complete {photos / '03.png'} --batch-size 4".split())
    codes, x = torch.cat(drawn), sample.read_image(photos / "03.png", 16)[None]
    assert (codes[:, :2] == train_vae.load_vae(chain / "vae").encode(x)[:, :2]).all()
    assert len(codes.unique(dim=0)) > 1
    drawn.clear()
    for how in ("--top-k 1", "--temperature 1e-4", "--seed 1", "--seed 2"):
        sample.main((base + how).split())
    assert len(drawn[0].unique(dim=0)) == 1 and torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[2], drawn[3])


def test_sample_without_flags_draws_from_the_shipped_prior(tmp_path, capsys):
    assert (sample.SHIPPED_PRIOR / "ckpt.pt").stat().st_size < 6_000_000
    sample.main(["-n", "4", "--device", "cpu"])
    assert "wrote samples.png" in capsys.readouterr().out
    assert Image.open(tmp_path / "samples.png").size == (2 * 98 + 2, 2 * 98 + 2)
    prior = train_prior.load_prior(sample.SHIPPED_PRIOR)
    vae = train_vae.load_vae(prior.args.vae)
    codes = prior.sample(16, seed=1)
    assert len(codes.unique()) > 200  # of 1,024 drawn, of 512
    again = vae.encode(vae.decode(codes))  # images from codes give these codes again
    assert (again == codes).float().mean() > 0.8
    shuffled = codes[:, torch.randperm(8)][:, :, torch.randperm(8)]
    nats = [
        torch.nn.functional.cross_entropy(prior(z).flatten(0, 2), z.flatten())
        for z in (codes, shuffled)
    ]
    assert nats[0] < nats[1] - 0.5  # it learnt which codes stand together


# -------------------------------------------------------------------------------------- evaluation


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    one_dimension = evaluate.frechet_distance([1.0], [[4.0]], [3.0], [[9.0]])
    assert one_dimension == pytest.approx(4 + (2 - 3) ** 2)
    a, b = rng.uniform(0.1, 3, (2, 6))  # commuting: sum of (sd - sd)^2
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    mu1, mu2 = rng.normal(size=(2, 6))
    want = ((mu1 - mu2) ** 2).sum() + ((a**0.5 - b**0.5) ** 2).sum()
    got = evaluate.frechet_distance(mu1, turn * a @ turn.T, mu2, turn * b @ turn.T)
    assert got == pytest.approx(want)
    x, y = rng.normal(size=(2, 50, 6))
    c1, c2 = np.cov(x.T), np.cov(y.T @ np.diag(np.arange(50)))  # not commuting
    want = np.trace(c1) + np.trace(c2) - 2 * np.sqrt(np.linalg.eigvals(c1 @ c2).real).sum()
    assert evaluate.frechet_distance(mu1, c1, mu1, c2) == pytest.approx(want, rel=1e-6)
    singular = np.outer(mu1, mu1)
    assert abs(evaluate.frechet_distance(mu1, singular, mu1, singular)) < 1e-5


def test_moments_stream():
    x, moments = torch.randn(100, 5) + 3, evaluate.Moments()
    with pytest.raises(train_vae.UserError, match="at least 2 images"):
        moments.read()
    for part in x.split(7):
        moments.add(part)
    mean, cov = moments.read()
    with FakeTensorMode():  # features of a GPU that is not here
        fake = evaluate.Moments()
        fake.add(torch.empty(3, 5, device="cuda"))
        assert fake.read()[1].device.type == "cpu"
    assert np.allclose(mean, x.double().mean(0)) and np.allclose(cov, np.cov(x.double().numpy().T))


def plain_inception():
    options = dict(num_classes=1008, aux_logits=False, init_weights=False)
    return evaluate.torchvision.models.inception_v3(weights=None, **options)


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Random weights in the layout of the 2015 Inception's file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(plain_inception().state_dict(), path)
    return path


@torch.no_grad()
def test_inception_pools_differ_from_torchvisions_where_they_should(inception_file):
    features, plain = evaluate.InceptionFeatures(inception_file), plain_inception().eval()
    plain.load_state_dict(torch.load(inception_file))
    widths = {"5b": 192, "5c": 256, "5d": 288} | {f"6{x}": 768 for x in "bcde"} | {"7b": 1280}
    for name, channels in widths.items():
        x = torch.rand(1, channels, 8, 8)
        ours, theirs = (getattr(net, f"Mixed_{name}")(x) for net in (features.net, plain))
        difference = (ours - theirs).abs().amax((0, 1))
        assert difference[1:-1, 1:-1].max() == 0 and difference[0].min() > 0  # padding left out
    x = torch.rand(1, 2048, 8, 8)
    difference = (features.net.Mixed_7c(x) - plain.Mixed_7c(x)).abs()
    assert difference[0, :, 1:-1, 1:-1].max() > 0  # a maximum
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    out = features(images)
    assert out.shape == (3, 2048) and torch.allclose(out[:1], features(images[:1]), atol=1e-4)


def test_inception_agrees_with_pytorch_fid(inception_file, monkeypatch):
    theirs = pytest.importorskip("pytorch_fid.inception")
    weights = torch.load(inception_file)
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *a, **k: weights)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        want = theirs.InceptionV3([3]).eval()(images / 255)[0].flatten(1)
    ours = evaluate.InceptionFeatures(inception_file)(images)
    assert torch.allclose(ours, want, rtol=1e-4, atol=1e-5)


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def evaluated(*arguments):
    """evaluate.py on the CPU, without an error."""
    evaluate.main([*map(str, arguments), "--device", "cpu"])


def test_metrics_of_a_run_against_an_independent_computation(chain, first_stage, capsys):
    model, x, codes = first_stage.model, first_stage.x, first_stage.codes
    evaluated(chain / "vae", chain / "prior")
    out = capsys.readouterr().out
    metrics = metrics_of(chain / "vae")
    assert evaluate.METRICS.keys() <= metrics.keys()
    missing = metrics["not_measured"]
    assert metrics["fid"] is None and metrics["rfid"] is None and "--fid" in missing["rfid"]
    assert metrics["auroc"] is None and "--uncertainty" in missing["auroc"]
    assert metrics["perplexity_batch128"] is None
    assert "128 images" in missing["perplexity_batch128"]
    x_hat = model.decoder(model.quantizer.codebook[codes].permute(0, 3, 1, 2)) + 0.5
    mse = (x_hat - x).square().mean().item()
    assert metrics["mse"] == pytest.approx(mse, rel=1e-5)
    assert f" {1000 * mse:.2f} " in out  # in the table, x 1000
    p = np.bincount(codes.flatten().numpy(), minlength=12) / codes.numel()
    perplexity = np.exp(-sum(v * np.log(v) for v in p if v))
    assert metrics["perplexity"] == pytest.approx(perplexity, rel=1e-6)
    assert metrics["codes_used"] == (p > 0).sum()
    args = evaluate.parser().parse_args([str(chain / "vae"), "--device", "cpu"])
    counts = evaluate.measure(chain / "vae", args, None).counts
    assert counts.tolist() == codes.flatten().bincount(minlength=12).tolist()
    logits = model.encode_features(x)
    assert metrics["logit_max"] == pytest.approx(logits.max().item(), rel=1e-5)
    assert metrics["saturated"] == 0 and 0 < metrics["textbook_grad_error"] < 1e-2
    alpha = logits.clamp(max=20).exp() + 1
    assert metrics["uncertainty"] == pytest.approx((12 / alpha.sum(-1)).mean().item(), rel=1e-4)
    last = log_of(chain / "vae")[-1]  # the training script's own test line
    assert metrics["mse"] == pytest.approx(last["mse"], rel=1e-4)
    assert metrics["entropy_mean"] == pytest.approx(last["entropy_mean"], rel=1e-4)
    measured, prior = metrics_of(chain / "prior"), train_prior.load_prior(chain / "prior")
    nats = log_of(chain / "prior")[-1]["prior_nats_per_code"]
    assert measured["prior_nats_per_code"] == pytest.approx(nats, rel=1e-4)
    assert measured["fid"] is None and measured["compared"] == 6  # as many as the test maps
    drawn = torch.bincount(prior.sample(6, seed=0).flatten(), minlength=12)
    assert measured["perplexity_samples"] == pytest.approx(train_vae.perplexity(drawn))
    assert measured["perplexity_data"] == pytest.approx(perplexity, rel=1e-6)
    assert f"of 6 samples {train_vae.perplexity(drawn):.1f}, of as many" in out and out.isascii()


def test_a_checkpoint_file_is_measured_as_its_run_is(chain, tmp_path, capsys):
    shutil.copy(chain / "vae" / "ckpt.pt", tmp_path / "small.pt")
    evaluated(tmp_path / "small.pt", chain / "vae", chain / "vae" / "ckpt.pt")
    file = json.loads((tmp_path / "small-metrics.json").read_text())
    assert file == metrics_of(chain / "vae")
    _, header, table = capsys.readouterr().out.partition("run ")  # before it: the images' caches
    assert header and len(table.splitlines()) == 4  # the run, named twice, has one row


def test_the_runs_that_can_be_measured_are(chain, tmp_path, capsys):
    for name in ("good", "unwritable", "bad"):
        shutil.copytree(chain / "vae", tmp_path / name)
        (tmp_path / name / "metrics.json").unlink(missing_ok=True)
    (tmp_path / "unwritable" / "metrics.json").mkdir()
    (tmp_path / "bad" / "ckpt.pt").write_bytes(b"no checkpoint")
    names = ["bad", "unwritable", "nowhere", "good"]
    with pytest.raises(SystemExit) as e:
        evaluated(*(tmp_path / name for name in names))
    out, err = capsys.readouterr()
    assert e.value.code == 2
    assert [x for x in names if f"{tmp_path / x} " in out] == ["unwritable", "good"]
    wrong = err.strip().splitlines()
    assert len(wrong) == 3 and "damaged or not a checkpoint" in wrong[0]
    assert "metrics.json" in wrong[1] and "is not there" in wrong[2]
    assert metrics_of(tmp_path / "good")["mse"] > 0


def test_nearest_images():
    images = np.random.default_rng(0).integers(0, 256, (5000, 4, 4, 3), dtype=np.uint8)
    picked = train_vae.to_float(torch.from_numpy(images[[3, 4095, 4096, 4999]]))
    slightly_off = (picked + 0.01 * torch.randn_like(picked)).clamp(0, 1)
    assert torch.equal(evaluate.nearest(slightly_off, images), picked)


def test_perplexity_protocols_and_sampled_codes(tmp_path):
    images = train_vae.draw_shapes(300, 16, np.random.default_rng(0))
    np.save(tmp_path / "celeba-train-16.npy", images)
    np.save(tmp_path / "celeba-test-16.npy", images)
    train_vae.main(tiny(tmp_path, tmp_path / "run", "--dataset celeba --steps 3 --preset fast"))
    evaluated(tmp_path / "run")
    metrics = metrics_of(tmp_path / "run")
    model = train_vae.load_vae(tmp_path / "run")
    assert model.args.batch_size == 8  # groups of 128 whatever the batch
    codes = model.encode(train_vae.to_float(torch.from_numpy(images)))
    full = codes.split(128)[:2]  # the last 44 are dropped
    batches = [train_vae.perplexity(torch.bincount(c.flatten(), minlength=12)) for c in full]
    assert metrics["perplexity_batch128"] == pytest.approx(sum(batches) / 2)
    evaluated(tmp_path / "run", "--codes", "sample")
    sampled = metrics_of(tmp_path / "run")
    assert sampled["codes"] == "sample"  # pi is nearly uniform so early
    assert sampled["perplexity"] > 8 > metrics["perplexity"] > 2
    assert sampled["mse"] > metrics["mse"]  # of the drawn codes


class FewFeatures(torch.nn.Module):
    """In place of Inception, whose 299 x 299 pixels take long: 12 colour means, nonlinear."""

    digest = "few"

    def forward(self, images):
        means = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2)
        return means.flatten(1).square()  # (B, 12)


def test_fid_of_a_run_and_of_samples(chain, first_stage, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "find_inception", lambda args: FewFeatures())
    runs = chain / "vae", chain / "prior"
    evaluated(*runs, "--fid", "-n", 30)
    out, err = capsys.readouterr()
    rfid, fid = metrics_of(chain / "vae")["rfid"], metrics_of(chain / "prior")["fid"]
    assert "under 2,048" in err
    assert f"{runs[0]}: FID of 6 images against the test split's 6, weights few" in out
    assert f"{runs[1]}: FID of 30 images against the train split's 54, weights few" in out
    samples = train_prior.load_prior(chain / "prior").sample(30, seed=0)

    def fid_between(images, made):
        moments, real = [], torch.from_numpy(images).permute(0, 3, 1, 2)
        for batch in (real, (made * 255).round().byte()):
            f = FewFeatures()(batch).double().numpy()
            moments += [f.mean(0), (f - f.mean(0)) / math.sqrt(len(f) - 1)]
        mu1, a1, mu2, a2 = moments
        roots = np.linalg.svd(a1 @ a2.T, compute_uv=False).sum()  # C = a^T a: tr (C1 C2)^(1/2)
        traces = np.square(a1).sum() + np.square(a2).sum()
        return np.square(mu1 - mu2).sum() + traces - 2 * roots

    assert rfid == pytest.approx(fid_between(first_stage.images, first_stage.x_hat), rel=1e-3)
    train = train_vae.load_images("folder", "train", photos, 16)
    assert fid == pytest.approx(fid_between(train, first_stage.model.decode(samples)), rel=1e-3)
    evaluated(runs[0])  # the same checkpoint: an FID is not lost
    assert metrics_of(chain / "vae")["rfid"] == pytest.approx(rfid, rel=1e-6)
    shutil.copytree(chain / "vae", tmp_path / "other")
    state = checkpoint(tmp_path / "other")
    state["model"]["quantizer.codebook"] += 1  # another run of as many steps in its folder
    torch.save(state, tmp_path / "other" / "ckpt.pt")
    evaluated(tmp_path / "other")
    assert metrics_of(tmp_path / "other")["rfid"] is None
    evaluated(runs[0], "--codes", "sample")
    assert metrics_of(chain / "vae")["rfid"] is None
    (chain / "vae" / "metrics.json").write_text("{")  # damaged: written anew
    evaluated(runs[0])
    assert metrics_of(chain / "vae")["rfid"] is None


def brute_force_ranks(x):
    return np.array([(x < v).sum() + ((x == v).sum() + 1) / 2 for v in x])


@pytest.mark.parametrize("model", ["edvae", "sq-vae", "vqvae-ema"])
def test_what_pi_knows_of_errors_and_of_foreign_images(model, photos, tmp_path, capsys):
    flags = "--steps 60 --lr 0.01 --preset fast --width 16 --model"
    train_vae.main(tiny(photos, tmp_path / "r", flags, model))
    evaluated(tmp_path / "r", "--uncertainty")
    metrics, out = metrics_of(tmp_path / "r"), capsys.readouterr().out
    if model == "vqvae-ema":
        assert metrics["auroc"] is None and "has pi" in metrics["not_measured"]["auroc"]
        assert "no --uncertainty, for vqvae-ema has no pi" in out
        return
    vae = train_vae.load_vae(tmp_path / "r")

    @torch.no_grad()
    def scores(images):
        """u, H, error and contrast of each patch: (4, images, positions)."""
        x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
        z_e = vae.encode_features(x)
        logits = z_e.clamp(max=20) if model == "edvae" else vae.quantizer.logits(z_e)
        weights = logits.double().exp() + (model == "edvae")
        u = (12 if model == "edvae" else 1) / weights.sum(-1)
        pi = weights / weights.sum(-1, keepdim=True)
        x_hat = vae.reconstruct(vae.quantizer.vectors()[vae.encode(x)])
        of_x, of_error = (
            y.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4) for y in (x, (x_hat - x).square())
        )
        error, contrast = of_error.mean((1, -1)), of_x.var(-1, correction=0).mean(1).sqrt()
        return torch.stack([u.log(), -(pi * pi.log()).sum(-1), error, contrast]).flatten(2).numpy()

    images = train_vae.load_images("folder", "test", photos, 16)
    usual = scores(images)
    u, H, error, contrast = (brute_force_ranks(s.ravel()) for s in usual)
    of_u, of_H = (np.corrcoef(rank, error)[0, 1] for rank in (u, H))
    assert metrics["u_error_correlation"] == pytest.approx(of_u, abs=2e-3) and abs(of_u) > 0.02
    assert metrics["entropy_error_correlation"] == pytest.approx(of_H, abs=2e-3)
    line = np.stack([contrast, np.ones_like(contrast)], 1)  # what contrast explains, taken away
    rest = [y - line @ np.linalg.lstsq(line, y, rcond=None)[0] for y in (u, error)]
    partial = metrics["scores"]["the same, given contrast"]["u"]
    assert partial == pytest.approx(np.corrcoef(*rest)[0, 1], abs=2e-3)
    foreign = scores(evaluate.FOREIGN["blurred"](images, None))
    for name, a, b in zip(("u", "H", "error", "contrast"), usual.mean(2), foreign.mean(2)):
        pairs = (b[:, None] > a).mean() + (b[:, None] == a).mean() / 2
        assert metrics["scores"]["AUROC, blurred"][name] == pytest.approx(pairs, abs=0.03)
    assert metrics["auroc"].keys() == evaluate.FOREIGN.keys()
    assert metrics["auroc"]["blurred"] == metrics["scores"]["AUROC, blurred"]["u"]
    assert f"{of_u:.2f}" in out
    assert ("u = ln(K/S)" if model == "edvae" else "u = -logsumexp of the logits") in out
    evaluated(tmp_path / "r")  # the same checkpoint: the scores are not lost
    assert metrics_of(tmp_path / "r")["auroc"] == metrics["auroc"]


def test_ranks_and_auroc_with_ties():
    x = torch.tensor([3.0, 1, 3, 2, 3])
    assert evaluate.ranks(x).tolist() == [4, 1, 4, 2, 4]
    assert evaluate.auroc(torch.tensor([1.0, 2]), torch.tensor([2.0, 3, 0])) == 3.5 / 6


def test_foreign_images_are_what_their_names_say():
    images = train_vae.draw_shapes(4, 16, np.random.default_rng(0))
    made = {k: f(images, np.random.default_rng(1)) for k, f in evaluate.FOREIGN.items()}
    assert all(x.shape == images.shape and x.dtype == np.uint8 for x in made.values())
    assert not any(np.array_equal(x, images) for x in made.values())

    def patches(image):
        corners = [(r, c) for r in range(0, 16, 4) for c in range(0, 16, 4)]
        return sorted(image[r : r + 4, c : c + 4].tobytes() for r, c in corners)

    shuffled = made["shuffled patches"]
    assert all(patches(a) == patches(b) for a, b in zip(images, shuffled))
    inside = (images > 100) & (images < 155)  # hardly clipped
    noise = made["noise added"][inside] - images[inside].astype(float)
    assert abs(noise.mean()) < 4 and noise.std() == pytest.approx(25.5, rel=0.15)
    dot = np.zeros((1, 32, 32, 3), np.uint8)
    dot[0, 16, 16] = 255
    spread = evaluate.FOREIGN["blurred"](dot, None)
    assert spread[0, 16, 16, 0] == pytest.approx(255 / (2 * math.pi * 1.5**2), abs=1)
    assert made["uniform noise"].std() == pytest.approx(256 / 12**0.5, rel=0.1)


def a_result(name, run, **metrics):
    counts = torch.tensor([5, 0, 2, 1])
    return evaluate.Result(Path(name), run, dict.fromkeys(evaluate.METRICS) | metrics, counts)


def test_table_has_the_papers_row_and_the_mean_of_seeds():
    run = dict(model="edvae", dataset="cifar10", codebook_size=512, code_dim=16, steps=3, seed=1)
    numbers = dict(mse=0.004, perplexity=100.0, codes_used=200)
    first = a_result("a", run, **numbers)
    other = a_result("b", run | dict(seed=2), **numbers | dict(perplexity=104.0))
    shown = evaluate.table([first, other])
    for cell in ("420.33", "2.99", "102.0 +- 2.8", "mean of 2 runs"):
        assert cell in shown
    assert len({len(line) for line in shown.splitlines()}) == 1 and shown.isascii()

    def table(**other):
        return evaluate.table([a_result("a", run | other, **numbers)])

    assert "190.33" in table(model="dvae")
    assert "1.07" in table(model="vqvae-ema", dataset="celeba")
    assert "420.33" not in table(codebook_size=256)


def test_runs_alike_in_all_but_their_seed_are_grouped():
    runs = [dict(model="edvae", beta=1, seed=1), dict(model="edvae", beta=2, seed=2)]
    runs.append(dict(model="dvae", beta=1))
    results = [a_result(str(i), run) for i, run in enumerate(runs)]
    assert [len(group) for group in evaluate.alike(results)] == [1, 1, 1]
    assert [len(group) for group in evaluate.alike(results, but="beta")] == [2, 1]


def test_short_names_tell_runs_apart():
    names = evaluate.short_names([Path("/r/x/run"), Path("/r/y/run"), Path("/r/z")])
    assert list(names.values()) == ["x-run", "y-run", "r-z"]
    names = evaluate.short_names([Path("/r/a-b/c"), Path("/s/a/b-c")])
    assert len(set(names.values())) == 2
    assert list(evaluate.short_names([Path("/r/x.pt")]).values()) == ["x.pt"]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that evaluate.py makes, by name, as matplotlib's objects."""
    pytest.importorskip("matplotlib")
    figures, save = {}, evaluate.Figures.save

    def keep(self, figure, axis, name):
        assert name not in figures
        figures[name] = figure
        save(self, figure, axis, name)

    monkeypatch.setattr(evaluate.Figures, "save", keep)
    return figures


def curves_of(axis):
    return {line.get_label(): line.get_xydata() for line in axis.lines}


def pictures_of(figure, row):
    """The images or maps in a row of a picture, and its title."""
    columns = figure.axes[0].get_subplotspec().get_gridspec().ncols
    axes = figure.axes[row * columns : (row + 1) * columns]
    return np.stack([axis.images[0].get_array() for axis in axes]), axes[0].get_ylabel()


def test_figures_show_what_was_logged_and_measured(
    chain, first_stage, photos, tmp_path, drawn, capsys
):
    other = "--steps 30 --lr 0.01 --preset fast --beta 0.01"
    train_vae.main(tiny(photos, tmp_path / "vae", other))
    runs = chain / "vae", tmp_path / "vae"  # of one name
    capsys.readouterr()
    evaluated(*runs, chain / "prior", "--figures", tmp_path / "figures")
    first, second = (f"{run.parent.name}-vae" for run in runs)
    names = {"training", "entropy-uncertainty", "entropy-maps", "usage", "reconstructions"}
    names |= {"sweep-beta", f"scores-{first}", f"scores-{second}"}
    names |= {f"nearest-{chain.name}-prior"}
    written = {line for line in capsys.readouterr().out.splitlines() if line.startswith("wrote")}
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == names
    assert written == {f"wrote {tmp_path / 'figures' / name}.png" for name in names}

    log = log_of(chain / "vae")
    tests, steps = [x for x in log if "split" in x], [x for x in log if "split" not in x]
    for axis, key, factor in zip(drawn["training"].axes, ("perplexity", "mse"), (1, 1000)):
        want = [(x["step"], factor * x[key]) for x in tests]
        assert np.allclose(curves_of(axis)[first], want)
    entropy, evidence, _ = drawn["entropy-uncertainty"].axes
    want = [(x["step"], x["entropy_mean"]) for x in steps]
    assert np.allclose(curves_of(entropy)[first], want)
    top = entropy.collections[0].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(max(x["entropy_mean"] + x["entropy_std"] for x in steps))
    others = [x for x in log_of(tmp_path / "vae") if "split" not in x]
    want = [(x["step"], x["uncertainty"]) for x in others]
    assert np.allclose(curves_of(evidence)[second], want)
    maps, title = pictures_of(drawn["entropy-maps"], 0)
    assert np.allclose(maps[-1], tests[-1]["entropy_map"]) and first in title

    model, x, codes, x_hat = (getattr(first_stage, k) for k in ("model", "x", "codes", "x_hat"))
    counts = np.sort(np.bincount(codes.flatten()))[::-1]
    counts = counts[counts > 0]  # unused codes have no share
    ((label, curve),) = [c for c in curves_of(drawn["usage"].axes[0]).items() if first in c[0]]
    assert np.allclose(curve[:, 1], counts / counts.sum()) and f"{len(counts)} of 12" in label
    shown, _ = pictures_of(drawn["reconstructions"], 0)
    assert np.allclose(shown, first_stage.images / 255, atol=1e-6)
    shown, title = pictures_of(drawn["reconstructions"], 1)
    assert np.allclose(shown, x_hat.permute(0, 2, 3, 1), atol=1e-5)
    assert f"{1000 * (x_hat - x).square().mean():.1f}" in title and first in title
    u, title = pictures_of(drawn[f"scores-{first}"], 2)
    alpha = model.encode_features(x).detach().exp() + 1
    assert np.allclose(u, (12 / alpha.sum(-1)).log(), atol=1e-4) and title.startswith("ln(K/S)")
    drawn_images, title = pictures_of(drawn[f"nearest-{chain.name}-prior"], 0)
    samples = model.decode(train_prior.load_prior(chain / "prior").sample(8))
    assert np.allclose(drawn_images, samples.permute(0, 2, 3, 1), atol=1e-4) and title == "samples"
    perplexities = [metrics_of(run)["perplexity"] for run in runs]
    (line,) = drawn["sweep-beta"].axes[0].lines
    betas = [train_vae.load_vae(run).args.beta for run in runs]
    order = np.argsort(betas)
    assert np.allclose(line.get_ydata(), np.array(perplexities)[order])


def test_figures_of_two_data_sets_and_of_the_papers_runs(chain, photos, tmp_path, drawn, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    train_vae.main(tiny(tmp_path / "photos", tmp_path / "b", "--steps", 2, "--model", "vqvae-ema"))
    evaluated(chain / "vae", tmp_path / "b", "--figures", tmp_path)
    for i, title in enumerate(("vae, ", "b, 1 codes"), 1):
        assert title in pictures_of(drawn[f"reconstructions-{i}-folder"], 1)[1]
    paper = dict(dataset="cifar10", model="edvae", codebook_size=512, code_dim=16)
    figures = evaluate.Figures(tmp_path)
    runs = [a_result("a", paper), a_result("b", paper | dict(code_dim=8)), a_result("c", paper)]
    figures.names = evaluate.short_names([r.path for r in runs])
    figures.colours = dict.fromkeys(figures.names, "C0")
    log = [dict(step=i, split="test", perplexity=300 + i, mse=4e-3 - 1e-5 * i) for i in range(9)]
    figures.logs = {Path("a"): log, Path("b"): log, Path("c"): []}
    drawn.clear()
    figures.curves("training", runs, evaluate.TEST_CURVES, test=True)
    for axis, level in zip(drawn["training"].axes, (420.33, 2.99)):
        dashed = [x.get_ydata() for x in axis.lines if x.get_linestyle() == "--"]
        assert [list(y) for y in dashed if len(y)] == [[level, level]]  # of run a alone
    labels = drawn["training"].axes[0].get_legend_handles_labels()[1]
    assert sorted(labels) == ["a", "b", "paper (per batch)"]
    low, high = drawn["training"].axes[1].get_ylim()
    assert low < 2.99 and high == pytest.approx(1.5 * 3.92)


def test_a_sweep_has_a_line_for_each_system_or_setting(tmp_path, drawn):
    figures = evaluate.Figures(tmp_path)
    run = dict(model="edvae", width=8, init="he", codebook_size=4)
    runs = [run | dict(codebook_size=K, seed=s) for K, s in ((8, 1), (4, 1), (8, 2))]
    others = [r | dict(model="dvae", init="authors") for r in runs]  # only the system names it

    def lines(settings):
        numbers = zip(settings, (5.0, 3.0, 7.0) * 2)
        results = [a_result("r", s, perplexity=x, mse=x / 1000) for s, x in numbers]
        drawn.clear()
        figures.sweep("codebook_size", evaluate.alike(results, but="codebook_size"))
        return [curves_of(axis) for axis in drawn["sweep-codebook-size"].axes]

    perplexity, mse = lines(runs + others)
    assert perplexity.keys() == {"edvae", "dvae", "all codes alike"}
    assert perplexity["edvae"].tolist() == [[0, 3], [1, 6]] == mse["dvae"].tolist()
    assert perplexity["all codes alike"].tolist() == [[0, 4], [1, 8]]
    perplexity, _ = lines(runs + [r | dict(width=16) for r in runs])
    assert perplexity.keys() == {"width 8", "width 16", "all codes alike"}


def test_a_run_without_a_log_has_no_curves_and_says_so(chain, tmp_path, drawn, capsys):
    (tmp_path / "r").mkdir()
    shutil.copy(chain / "vae" / "ckpt.pt", tmp_path / "r" / "ckpt.pt")
    evaluated(tmp_path / "r", "--figures", tmp_path / "f")
    assert "no curves" in capsys.readouterr().err
    names = {path.stem for path in (tmp_path / "f").iterdir()}
    assert names == {"usage", "reconstructions", "scores-r"}


def test_figures_without_matplotlib_are_refused_before_the_work(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "measure", None)  # not reached
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    said = refused(evaluate.main, chain / "vae", "--figures", tmp_path / "f")
    assert "pip install matplotlib" in said


# --------------------------------------------------------------------------------------- bad input

SCRIPTS = dict(vae=train_vae, prior=train_prior, sample=sample, evaluate=evaluate)
FOLDER = "vae --dataset folder --size 16 --data-dir"
PRIOR, SAMPLE = "prior --vae {vae}", "sample --prior {prior}"
BAD = {  # a script's arguments, and what the one line says
    "vae --dataset mnist": "invalid choice",
    "vae --model vae": "invalid choice",
    "vae --steps 0": "not in [1",
    "vae --steps ten": "whole number",
    "vae --steps 1e9": "whole number",
    "vae --lr 0": "not in [1e-30",
    "vae --lr nan": "not in",
    "vae --lr inf": "not in",
    "vae --width 3": "not in [4",
    "vae --width 6": "multiples of 4",
    "vae --size 30": "multiples of 4",
    "vae --codebook-size 1": "not in [2",
    "vae --codebook-size 20000": "16384",
    "vae --code-dim 1000": "256",
    "vae --beta -1": "expected one argument|not in",
    "vae --max-logit nan": "not in",
    "vae --max-logit=-inf": "not in",
    "vae --seed=-1": "not in",
    "vae --device tpu": "--device tpu",
    "vae --precision fp8": "invalid choice",
    "vae --device mps": "is not supported",
    "vae --init-from /nowhere": "is not there",
    "vae --init-from {prior}": "not a run of train_vae.py",
    f"{FOLDER} {{photos}} --init-from {{vae}} --width 16": "do not fit this network",
    "vae --out {stripped} --resume": "no optimiser, so it cannot be continued",
    "vae --out {vae} --resume --beta 0.5": "--beta 0.5 contradicts",
    "vae --resume": "needs --out",
    "vae --out {vae} --resume": "is finished",
    "vae --nonsense": "unrecognized",
    "vae --dataset cifar10 --data-dir {empty}": "no network. Put cifar-10-python.tar.gz",
    "vae --dataset celeba --data-dir {empty}": "no network. Put the aligned images",
    "vae --dataset cifar10 --data-dir {foreign}": "delete it",
    "vae --dataset folder --data-dir {empty}": "only 0 images",
    "vae --dataset folder --data-dir /nowhere": "only 0 images",
    f"{FOLDER} {{broken}}": "damaged, 10 of 10 images (cannot read",
    f"{FOLDER} {{photos}} --out {{text}}": "text: File exists",
    f"{FOLDER} {{photos}} --out {{text}}/x": "text",
    "vae --out {damaged} --resume": "damaged or not a checkpoint",
    "vae --out {flipped} --resume": "checksums do not match",
    "vae --out {prior} --resume": "not a run of train_vae.py, but of train_prior.py",
    "prior": "required",
    "prior --vae /nowhere": "is not there",
    "prior --vae {prior}": "not a run of train_vae.py",
    "prior --vae {text}": "not a checkpoint",
    f"{PRIOR} --width 24": "multiple of 16",
    f"{PRIOR} --dropout 1": "0.95",
    f"{PRIOR} --resume": "needs --out",
    f"{PRIOR} --out {{prior}}": "already holds a run",
    f"{PRIOR} --out {{prior}} --resume --width 32": "contradicts",
    f"{PRIOR} --out {{prior}} --resume --preset small": "contradicts",
    f"{PRIOR} --out {{vae}} --resume": "not a run of train_prior.py",
    "sample --vae {vae}": "needs --prior",
    "sample --prior /nowhere": "is not there",
    "sample --prior {vae}": "not a run of train_prior.py",
    "sample --vae {prior} --reconstruct {photos}/00.png": "not a run of train_vae.py",
    f"{SAMPLE} -n 0": "n 0 is not at least 1",
    f"{SAMPLE} --temperature nan": "temperature nan is not at least",
    f"{SAMPLE} --complete a.png --save-images b": "not allowed with",
    f"{SAMPLE} --save-images {{vae}}": "exists; name a new folder",
    f"{SAMPLE} --complete /nowhere.png": "cannot read /nowhere.png",
    f"{SAMPLE} --out {{text}}/x.png": "text: File exists",
    f"{SAMPLE} --out x.nonsense": "name a .png or .jpg",
    f"{SAMPLE} --out {{folder}}": "cannot write",
    f"{SAMPLE} --out x.png -n 100000": "--save-images writes each",
    "sample --vae {vae} --reconstruct {text}": "cannot read",
    "evaluate": "required",
    "evaluate /nowhere": "is not there",
    "evaluate {text}": "damaged or not a checkpoint",
    "evaluate {vae} {damaged}": "damaged or not a checkpoint",
    "evaluate {vae} --data-dir {text}": "only 0 images",
    "evaluate {vae} --codes soft": "invalid choice",
    "evaluate {vae} --figures {text}/f": "cannot be written to",
    "evaluate {vae} --figures {text}": "cannot be written to",
    "evaluate {vae} --fid -n 1": "too few",
    "evaluate {vae} --fid": "could not be downloaded",
    "evaluate {vae} --fid --inception /nowhere": "is not a file",
    "evaluate {vae} --fid --inception {text}": "does not hold the 2015 Inception",
}


def no_network(monkeypatch, home):
    """No network, and another home: nothing is downloaded or kept."""

    def fail(*args, **how):
        raise OSError("no network")

    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", fail)
    monkeypatch.setattr("torchvision.datasets.CelebA.download", fail)
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)


@pytest.mark.parametrize("command", BAD)
def test_bad_input_gets_one_clear_line_and_code_2(command, chain, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    names = dict(photos=photos, vae=chain / "vae", prior=chain / "prior")
    for name in ("empty", "broken", "foreign", "damaged", "flipped", "stripped"):
        names[name] = tmp_path / name
        names[name].mkdir()
    names |= dict(text=tmp_path / "text", folder=tmp_path / "folder.png")
    names["text"].write_text("not an image")
    names["folder"].mkdir()
    for i in range(10):
        (tmp_path / "broken" / f"{i}.png").write_bytes(b"\x89PNG not really")
    (tmp_path / "foreign" / "cifar10-train-32.npy").write_bytes(b"not numpy")
    cut = (chain / "vae" / "ckpt.pt").read_bytes()[:5000]
    (tmp_path / "damaged" / "ckpt.pt").write_bytes(cut)
    if "stripped" in command:
        state = checkpoint(chain / "vae")
        del state["optimizer"]
        torch.save(state, tmp_path / "stripped" / "ckpt.pt")
    if "flipped" in command:
        flipped = bytearray((chain / "vae" / "ckpt.pt").read_bytes())
        codebook = checkpoint(chain / "vae")["model"]["quantizer.codebook"]
        flipped[flipped.index(codebook.numpy().tobytes())] ^= 1  # a bit of a weight
        (tmp_path / "flipped" / "ckpt.pt").write_bytes(flipped)

    no_network(monkeypatch, tmp_path)
    monkeypatch.setattr(sample, "draw", None)  # not reached: nor is measure, below
    if "--figures" in command:
        monkeypatch.setattr(evaluate, "measure", None)
    script, *argv = command.format(**names).split(" ")
    message = refused(SCRIPTS[script].main, *argv)
    assert any(words in message for words in BAD[command].split("|")), message


def failure_of(main, argv) -> str:
    """What a call did wrong: anything but a return or an exit with code 2."""
    try:
        main([str(a) for a in argv])
    except SystemExit as e:
        return "" if e.code == 2 else f"exit {e.code}"
    except (train_vae.UserError, OSError):  # settings() leaves them to main()
        return ""
    except Exception as e:
        at = traceback.extract_tb(e.__traceback__)[-1]
        return f"{type(e).__name__}: {str(e)[:100]} in {at.name}, line {at.lineno}"
    return ""


ODD = ["0", "-1", "1", "7", "nan", "inf", "-inf", "1e400", "1e-300", "x", "", "3.5", "9" * 30]
ODD += ["None", "/proc/nowhere", "cpu", "cuda:99", "é", "-0", "0x10", "1_000", " 4", "--", "../.."]


@pytest.mark.parametrize("name", SCRIPTS)
def test_fuzzed_flags_find_no_traceback(name, chain, photos, tmp_path, capsys, monkeypatch):
    # FUZZ=2 pytest -k fuzz: other flags.
    rng, script = np.random.default_rng(int(os.environ.get("FUZZ", 1))), SCRIPTS[name]
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    images = shutil.copytree(photos, tmp_path / "images")  # --out may write to it

    def value(action):
        if rng.random() < 0.3:
            return str(rng.choice(ODD))
        if action.choices:
            return str(rng.choice(list(action.choices)))
        likely = {"whole number": ["1", "8"], "number": ["0.5"]}
        kind = getattr(action.type, "__name__", "")
        return str(rng.choice(likely.get(kind, [images, images / "03.png"])))

    no_network(monkeypatch, tmp_path)
    base = {
        "vae": [*TINY, "--data-dir", photos],
        "prior": ["--vae", chain / "vae"],
        "sample": ["--prior", chain / "prior", "-n", "1"],
        "evaluate": [chain / "vae"],
    }[name]
    actions = [a for a in script.parser()._actions if a.option_strings and a.dest != "help"]
    call, cases = (script.settings, 100) if hasattr(script, "settings") else (script.main, 25)
    found = []
    for _ in range(cases):
        argv = []
        for action in rng.choice(actions, rng.integers(1, 4)):
            argv.append(rng.choice(action.option_strings))
            if action.nargs != 0:
                argv.append(value(action))
        wrong = failure_of(call, [*base, *argv])
        if wrong:
            found.append(f"{argv}: {wrong}")
    capsys.readouterr()
    assert not found, "\n".join(found)


def damage(path, rng):
    """Spoil a file one way or another; what was done."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(["cut", "flip", "empty", "foreign", "gone", "longer"])
    for i in rng.integers(0, len(data), rng.integers(1, 50)):
        data[i] ^= int(rng.integers(1, 256))
    spoilt = dict(flip=data, empty=b"", foreign=rng.bytes(1000))
    spoilt["cut"] = path.read_bytes()[: rng.integers(0, len(data))]
    spoilt["longer"] = path.read_bytes() + rng.bytes(100)
    if kind == "gone":
        path.unlink()
    else:
        path.write_bytes(spoilt[kind])
    return f"{path.name} {kind}"


def test_damaged_run_folders_find_no_traceback(chain, tmp_path, capsys):
    rng, found = np.random.default_rng(int(os.environ.get("FUZZ", 1))), []
    for case in range(50):
        folder = tmp_path / str(case)
        shutil.copytree(chain, folder, ignore=shutil.ignore_patterns("*.png"))
        which = rng.choice(["vae", "prior"])
        kinds = (".pt", ".json", ".jsonl", ".npy")
        files = [f for f in sorted((folder / which).iterdir()) if f.suffix in kinds]
        spoilt = damage(files[rng.integers(len(files))], rng)
        vae_folder, prior = folder / "vae", folder / "prior"
        script, argv = [
            (train_vae, ["--out", vae_folder, "--resume"]),
            (train_prior, prior_arguments(vae_folder, prior, "--resume")),
            (train_prior, prior_arguments(vae_folder, folder / "new", "--steps", 1)),
            (sample, ["--prior", prior, "--vae", vae_folder, "-n", 1, "--out", folder / "s.png"]),
            (evaluate, [vae_folder, prior]),
        ][rng.integers(5)]
        wrong = failure_of(script.main, argv)
        if wrong:
            found.append(f"{case} {which} {spoilt} {script.__name__} {argv}: {wrong}")
        shutil.rmtree(folder)
    capsys.readouterr()
    assert not found, "\n".join(found)


# ------------------------------------------------------------------------------------------ README


CHANGES = ["FSQ", "SimVQ", "SoftplusEvidence", "TextbookKL"]


@pytest.mark.parametrize("name", CHANGES)
def test_the_readmes_changes_run_as_they_stand(name, photos, tmp_path):
    text = (HERE / "README.md").read_text().split("## Changing it")[1].split("\n## ")[0]
    changes = dict(
        (n, code) for code, n in re.findall(r"```python\n(class (\w+).*?)```", text, re.S)
    )
    assert list(changes) == CHANGES
    code = changes[name]
    source = (HERE / "train_vae.py").read_text()
    assert source.count("\n\nclass VAE") == 1
    changed = source.replace("\n\nclass VAE", f"\n\n{code}\n\nclass VAE")
    (tmp_path / "changed.py").write_text(changed)
    spec = importlib.util.spec_from_file_location("changed", tmp_path / "changed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = re.search(rf'QUANTIZERS\["(.+?)"\] = {name}', code)[1]
    assert model == module.QUANTIZERS[model].name
    flags = "--steps 3 --log-every 1 --codebook-size 16 --model"  # FSQ's is a fourth power
    module.main(tiny(photos, tmp_path / "r", flags, model))
    assert all(math.isfinite(line["loss"]) for line in log_of(tmp_path / "r"))
    with pytest.raises(train_vae.UserError, match=f"of --model {model}, which this train_vae.py"):
        train_vae.load_vae(tmp_path / "r")  # without the change


def test_the_textbooks_step_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    """results.md's script times the network of train_vae.py, only written plainly."""
    text = (HERE / "assets" / "results.md").read_text().split("**The textbook's step.**")[1]
    (tmp_path / "textbook.py").write_text(re.search(r"```python\n(.*?)```", text, re.S)[1])
    monkeypatch.setattr(train_vae, "upsample", train_vae.upsample)  # the script replaces it
    argv = ["textbook.py", *TINY, "--steps", "3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    after = runpy.run_path(str(tmp_path / "textbook.py"))
    milliseconds = re.fullmatch(r".*\bcpu: ([0-9.]+) ms\n", capsys.readouterr().out)
    assert float(milliseconds[1]) > 0 and math.isfinite(after["loss"].item())
    model, x = after["model"], after["x"]
    torch.manual_seed(after["args"].seed)
    before = train_vae.VAE(after["args"])
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters())]
    assert sum(moved) > len(moved) / 2
    with torch.no_grad():  # the network as train_vae.py runs it, with the script's weights
        z_e = model.encode_features(x)
        torch.testing.assert_close(after["encode"](x), z_e, atol=1e-5, rtol=1e-4)
        z_q = model.quantizer.vectors()[model.quantizer.assign(z_e)]
        torch.testing.assert_close(after["decode"](z_q), model.reconstruct(z_q))


@pytest.mark.parametrize(
    "model, row, mse, codes",
    [("edvae", "| EdVAE |", 7.484e-3, 149), ("dvae", "| dVAE (softmax) |", 9.272e-3, 106)],
)
def test_the_shipped_models_are_those_of_the_table(model, row, mse, codes):
    """Against stored values: of 8 generated images, and what README says of all test images."""
    net = train_vae.load_vae(HERE / "assets" / model)
    x = train_vae.to_float(torch.from_numpy(train_vae.draw_shapes(8, 32, np.random.default_rng(0))))
    indices = net.encode(x)
    assert (net.decode(indices) - x).square().mean().item() == pytest.approx(mse, rel=0.01)
    assert abs(len(indices.unique()) - codes) <= 2  # another CPU may round a tie in another way
    metrics = json.loads((HERE / "assets" / model / "metrics.json").read_text())
    last = [line for line in log_of(HERE / "assets" / model) if line.get("split") == "test"][-1]
    assert metrics["mse"] == pytest.approx(last["mse"], rel=0.01)  # the log is in bf16
    lines = (HERE / "README.md").read_text().splitlines()
    shown = next(line for line in lines if line.startswith(row))
    values = f"{1000 * metrics['mse']:.2f}", f"{metrics['perplexity_batch128']:.1f}"
    values += f"{metrics['perplexity']:.1f}", f"{metrics['codes_used']}"
    cells = shown.replace("*", "").split(" | ")
    assert set(values) <= {cell.strip(" |") for cell in cells}


def test_every_file_that_a_document_links_is_tracked():
    tracked = subprocess.run(["git", "-C", HERE, "ls-files"], capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a clone")
    for document in (HERE / "README.md", HERE / "assets" / "results.md"):
        for link in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
            if not link.startswith("http"):
                path = (document.parent / link).resolve().relative_to(HERE.resolve())
                assert str(path) in tracked.stdout.splitlines(), link
