"""The tests: pytest test_edvae.py. They download nothing and need no GPU.

The mathematics is tested against mpmath, closed forms and brute force, the scripts as a user runs
them. `pytest -k kl` and the like run a part.
"""

import concurrent.futures
import contextlib
import copy
import functools
import gc
import importlib.util
import io
import json
import math
import os
import re
import runpy
import shlex
import shutil
import struct
import subprocess
import sys
import warnings
import weakref
from argparse import Namespace
from pathlib import Path
from unittest.mock import MagicMock

import mpmath as mp
import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels on CPU tensors
# One thread, here and in the scripts: at these sizes a second one gains nothing.
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


@pytest.fixture(autouse=True)
def seed_and_folder(tmp_path):
    torch.manual_seed(0)
    os.chdir(tmp_path)  # data/ and runs/ go there


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


def sees(monkeypatch, owner, name, watch):
    """Let watch(*arguments) see each call of owner's function `name` before it is made."""
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: (watch(*a, **k), function(*a, **k))[1])


def copy_run_at(monkeypatch, step, folder):
    """Copy a run's folder as its checkpoint of `step` is written: as if it was killed after it."""
    save = train_vae.Run.save

    def save_and_copy(self, done, **parts):
        save(self, done, **parts)
        if done == step and self.folder != folder:
            shutil.copytree(self.folder, folder, dirs_exist_ok=True)

    monkeypatch.setattr(train_vae.Run, "SAVE_SECONDS", 0)
    monkeypatch.setattr(train_vae.Run, "save", save_and_copy)


def log_of(folder):
    """A log's lines without their speed."""
    lines = train_vae.read_log(folder / "log.jsonl")
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def checkpoint(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)


def same(a, b):
    """Whether two states hold the same bits."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def tiles_of(path, size, stacked=1):
    """The tiles of a grid that save_grid wrote, by row; stacked: images above others in a tile."""
    grid, scale = np.asarray(Image.open(path))[2:, 2:], 96 // size  # lines of two pixels
    H, W = stacked * scale * size + 2, scale * size + 2
    grid = grid.reshape(grid.shape[0] // H, H, grid.shape[1] // W, W, 3)
    return grid.swapaxes(1, 2)[:, :, : H - 2 : scale, : W - 2 : scale]


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
    os.chdir(tmp_path_factory.mktemp("work"))  # a test's own folder comes later
    train_vae.main(tiny(photos, folder / "vae", "--steps 30 --preset cpu"))
    assert log_of(folder / "vae")[-1]["codes_used"] > 3  # else much below could not fail
    train_prior.main(prior_arguments(folder / "vae", folder / "prior"))
    return folder


TWO = """
import json, runpy, sys
sys.modules["triton"] = None  # not installed
import kernels, torch, train_vae
kl = kernels.dirichlet_kl(torch.zeros(2, 512))[0].item()
print(f"{kl}\\n", end="")  # a line is one write: torchrun sets PYTHONUNBUFFERED
scripts = json.loads(sys.argv[1])
train_vae.join_processes()
class TinyBuckets(torch.nn.parallel.DistributedDataParallel):
    def __init__(self, model):  # compiled and then wrapped, as on a GPU
        if "edvae" in sys.argv:
            model.forward = torch.compile(model.forward, backend="aot_eager")
        super().__init__(model, bucket_cap_mb=1e-2)
torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 1000
torch.nn.parallel.DistributedDataParallel = TinyBuckets
leave = torch.distributed.destroy_process_group
torch.distributed.destroy_process_group = lambda: None  # the scripts share one group
for sys.argv in scripts:
    runpy.run_path(sys.argv[0], run_name="__main__")
leave()
"""
FOR_TWO = "--steps 4 --log-every 2 --eval-every 4 --preset cpu --model"  # paper: one code


@pytest.fixture(scope="session")
def two_processes(photos, chain, tmp_path_factory):
    """What two processes of torchrun make and print, in a Python without triton: the folder."""
    folder = tmp_path_factory.mktemp("two")
    prior = prior_arguments(chain / "vae", folder / "prior", "--dropout", 0)
    vaes = (tiny(photos, folder / model, FOR_TWO, model) for model in ("edvae", "vqvae-ema"))
    scripts = [[str(HERE / "train_vae.py"), *vae] for vae in vaes]
    scripts.append([str(HERE / "train_prior.py"), *prior])
    (folder / "two.py").write_text(TWO)
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    (folder / "printed").write_text(run(*torchrun, folder / "two.py", json.dumps(scripts)))
    return folder


@pytest.fixture(scope="session")
def first_stage(chain, photos):
    """The chain's tiny model and what it makes of the test split."""
    model = train_vae.load_vae(chain / "vae")
    images = train_vae.load_images("folder", "test", photos, 16)
    x = train_vae.to_float(torch.from_numpy(images))
    codes = model.encode(x)
    return Namespace(model=model, images=images, x=x, codes=codes, x_hat=model.decode(codes))


# ------------------------------------------------------------------------------------- kernels.py


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
    for mean, sd, c in [*cases, (-200, 1, 20), (40, 20, INF)]:
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


both_bottlenecks = pytest.mark.parametrize(
    "quantize", [kernels.evidential_quantize, kernels.gumbel_quantize]
)


@both_bottlenecks
@pytest.mark.parametrize("K", [2, 512])
def test_logits_beyond_1e30_infinite_too_count_as_1e30(quantize, K):
    z, codebook, results = 4 * torch.randn(6, K), torch.randn(K, 2, requires_grad=True), []
    z[:, -1], z[1, 0], z[2, 0], z[3], z[4] = -INF, INF, -3.4e38, -INF, 3.4e38
    for logits in (z, z.clamp(-1e30, 1e30)):
        logits = logits.clone().requires_grad_()
        out = quantize(logits, codebook, 0.7, INF)
        grads = torch.autograd.grad(out.z_q.sum() + 1e-3 * out.kl.sum(), [logits, codebook])
        results.append([*out[:4], *grads])
    beyond = z > 1e30  # where the clamp stops the gradient
    results[1][4][beyond] = 0
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*results))


@both_bottlenecks
def test_gradcheck_in_float64(quantize):
    logits = (3 * torch.randn(2, 5, 13, dtype=torch.float64)).requires_grad_()
    codebook = torch.randn(13, 4, dtype=torch.float64, requires_grad=True)

    def bottleneck(z, m):
        z_q, kl, *_ = quantize(z, m, 0.7, 2.5, seed=3)
        return z_q, kl, z_q.sum(-1) + kl  # each alone, and both at once

    assert torch.autograd.gradcheck(bottleneck, (logits, codebook))
    assert torch.autograd.gradcheck(lambda z: kernels.dirichlet_kl(z, INF), logits)


def test_gradient_checkpointing_changes_no_gradient():
    inputs = torch.randn(5, 8, requires_grad=True), torch.randn(8, 2, requires_grad=True)

    def loss(z, m):
        q = kernels.evidential_quantize(z, m, 0.7)
        return q.z_q.sum() + q.kl.sum()

    checkpointed = torch.utils.checkpoint.checkpoint(loss, *inputs, use_reentrant=False)
    both = (torch.autograd.grad(x, inputs) for x in (checkpointed, loss(*inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*both))


def test_outputs_against_their_definitions():
    logits, codebook = 4 * torch.randn(3, 5, 37), torch.randn(37, 6)
    logits[0, 0] = -100.0  # no evidence: pi is uniform
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


def test_noise_depends_on_seed_step_and_global_row_alone():
    logits, codebook = torch.randn(40, 30), torch.randn(30, 4)

    def z_q(z, *key):
        return kernels.evidential_quantize(z, codebook, 0.5, seed=torch.tensor(key)).z_q

    want = z_q(logits, 7, 3, 0)
    assert torch.allclose(want[25:], z_q(logits[25:], 7, 3, 25), atol=1e-6)
    for other in ((8, 3, 0), (7, 4, 0)):
        assert not torch.allclose(want, z_q(logits, *other))


@both_bottlenecks
def test_blocks_strides_and_compiling_change_nothing(monkeypatch, capsys, tmp_path, quantize):
    compile = bool(shutil.which(os.environ.get("CXX", "g++")))
    # torch.compile's own cache would give AVX-512's code under ATEN_CPU_CAPABILITY=avx2.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path.parent))
    strided = 4 * torch.randn(36, 63).T  # (63, 36)
    codebook, upstream = torch.randn(36, 5, requires_grad=True), torch.randn(63, 5)
    results = []
    monkeypatch.setattr(kernels, "COMPILE_FROM", 0)
    # The last of the blocks is shorter, and not compiled.
    for block, compiled, logits in [(10**6, False, strided.contiguous()), (180, compile, strided)]:
        monkeypatch.setattr(kernels, "BLOCK", block)
        z = logits.clone().requires_grad_()
        out = quantize(z, codebook, 0.6, 6.0, seed=2, backend="torch", compile=compiled)
        upstreams = [upstream, torch.full_like(out.kl, -0.3)]
        grads = torch.autograd.grad([out.z_q, out.kl], [z, codebook], upstreams)
        results.append((*out[:4], *grads))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(*results))
    assert "continuing without" not in capsys.readouterr().err  # it did compile
    empty = quantize(torch.zeros(0, 36), codebook, 0.6)
    assert empty.z_q.shape == (0, 5)


def test_compiled_goes_on_uncompiled_if_its_first_call_fails_and_raises_later(monkeypatch, capsys):
    error = torch._dynamo.exc.TorchDynamoException("no compiler")
    compiled = MagicMock(side_effect=error)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: compiled)
    fn = kernels.Compiled(lambda x: x + 1)
    assert [fn(1), fn(2)] == [2, 3] and compiled.call_count == 1
    assert capsys.readouterr().err == "kernels.py: continuing without torch.compile: no compiler\n"
    compiled.side_effect = [5, error]
    fn = kernels.Compiled(lambda x: x + 1)
    assert fn(1) == 5
    with pytest.raises(type(error)):  # in a CUDA graph's recording, for example
        fn(1)


def test_operators_are_registered_rightly():
    """torch.library.opcheck: schema, fake tensors and autograd, so that torch.compile can trust."""
    inputs = torch.randn(6, 9), torch.randn(9, 4), torch.tensor(0.5), torch.tensor([1, 2, 0])
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    options = 20.0, True, "torch", False
    torch.library.opcheck(kernels.quantize_op, (*inputs, *options), test_utils=checks)
    strided = torch.randn(9, 6).T.requires_grad_()  # a backward for it must keep the fake's strides
    upstream = torch.randn(6, 4), torch.randn(6)
    out = kernels.quantize_op(strided.detach(), *inputs[1:], *options)
    backward = *upstream, strided.detach(), *inputs[1:], out[0], out[3], out[5], out[6], *options
    torch.library.opcheck(kernels.quantize_backward_op, backward, test_utils=checks[:2])


class NoHostReads(TorchDispatchMode):
    """Fails where the host reads a value or the device host memory: no CUDA graph records that."""

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
        for how in ((tau, 20.0, key), (0.5, 20.0, 7)):
            assert kernels.evidential_quantize(z, m, *how).z_q.device.type == "cuda"
        for evidential in (True, False):
            options = 20.0, evidential
            z_q, kl, _, H, _, saved, y = kernels.torch_forward(z, m, tau, key, *options, True)
            upstream = z_q, kl, z, m, tau
            kernels.torch_backward(*upstream, z_q, H, saved, y, *options, True)
            if kernels.triton:
                z_q, _, _, _, _, saved, _ = kernels.triton_forward(z, m, tau, key, *options)
                kernels.triton_backward(*upstream, key, z_q, saved, *options)


def test_wrong_arguments_are_named(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    right = dict(logits=torch.randn(4, 8), codebook=torch.randn(8, 2), tau=1.0)
    for wrong, words in [
        (dict(codebook=torch.randn(7, 2)), r"K >= 2, not \(4, 8\) and \(7, 2\)"),
        (dict(tau=math.nan), "tau must be one number above 0"),
        (dict(max_logit=math.nan), "max_logit must be a number"),
        (dict(seed=torch.arange(4)), "seed must be an int"),
        (dict(backend="cuda"), "not one of"),
        (dict(backend="triton"), "needs a GPU|needs the package"),
    ]:
        with pytest.raises(ValueError, match=words):
            kernels.evidential_quantize(**right | wrong)


def test_a_single_row_and_a_key_of_any_integers_will_do():
    z, m = torch.randn(1, 8), torch.randn(8, 2)
    for quantize in (kernels.evidential_quantize, kernels.gumbel_quantize):
        one, row = quantize(z[0], m, torch.ones(1), seed=7), quantize(z, m, 1.0, seed=7)
        assert all(torch.equal(a, b[0]) for a, b in zip(one[:4], row[:4]))
        for key in (torch.tensor(7), torch.tensor([7], dtype=torch.int32), torch.tensor([7, 0])):
            assert torch.equal(quantize(z, m, 1.0, seed=key).z_q, row.z_q)
    assert torch.equal(kernels.dirichlet_kl(z[0]), kernels.dirichlet_kl(z)[0])


@pytest.mark.filterwarnings("error")
def test_graphed_takes_one_step_a_call_and_records_the_fourth(monkeypatch):
    cuda = MagicMock()  # notes each call; the step is one of them

    def step():
        cuda.step()
        if cuda.step.call_count <= 3:  # as Adam does outside a recording
            warnings.warn("This instance was constructed with capturable=True or", stacklevel=2)

    monkeypatch.setattr(torch, "cuda", cuda)
    graphed = kernels.Graphed(step)
    ordinary = ["current_stream", "Stream().wait_stream", "stream", "stream().__enter__", "step"]
    ordinary += ["stream().__exit__", "current_stream", "current_stream().wait_stream"]
    replay = ["CUDAGraph().replay"]
    record = ["CUDAGraph", "graph", "graph().__enter__", "step", "graph().__exit__", *replay]
    for want in (ordinary, ordinary, ordinary, record, replay, replay):
        cuda.mock_calls.clear()
        graphed()
        assert [name for name, *_ in cuda.mock_calls] == want


needs_triton = pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
KEY = torch.tensor([3, 5, 2**33], device=DEVICE)  # a row number beyond 32 bits
tl = kernels.tl


@kernels.jit
def philox_kernel(key, counters, words):
    counter = tl.load(counters + tl.arange(0, 8))
    w0, w1, w2, w3 = kernels.philox_tile(tl.load(key), tl.load(key + 1), counter)
    joined = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (8, 2, 2): the four of a counter
    tl.store(words + tl.arange(0, 32), tl.reshape(joined, (32,)).to(tl.int64))


@needs_triton
@pytest.mark.parametrize("seed, step", [(3, 5), (-(2**62) - 5, 2**40 + 1), (2**63 - 1, -(2**63))])
def test_triton_draws_the_words_of_philox(seed, step):
    key = torch.tensor([seed, step], device=DEVICE)
    counters = torch.arange(8, device=DEVICE) * (2**61 - 3) - 5  # in both halves
    words = torch.empty(8, 4, dtype=torch.int64, device=DEVICE)
    philox_kernel[(1,)](key, counters, words)
    assert torch.equal(words, torch.stack(kernels.philox(*key, counters), -1))


def by_torch_and_triton(quantize, logits, codebook, c, dz_q, dkl):
    """Outputs and gradients by PyTorch and by Triton; of z_q alone and of kl alone too."""
    results = []
    for backend in ("torch", "triton"):
        z, m = logits.detach().clone().requires_grad_(), codebook.detach().requires_grad_()
        out = quantize(z, m, 0.6, c, KEY, backend)
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
        (70, 70, 16, 2.0),
        (40, 37, 17, INF),
        (40, 33, 64, 30.0),
        (9, 40, 100, 20.0),
    ],
)
def test_triton_agrees_with_pytorch(quantize, rows, K, D, c, monkeypatch):
    tiles = kernels.tiles
    if rows == 70:  # by the tiles of many rows
        monkeypatch.setattr(kernels, "tiles", lambda kernel, _, *a: tiles(kernel, 16384, *a))
    codebook, dz_q = (torch.randn(n, D, device=DEVICE) for n in (K, rows))
    dkl = torch.randn(rows, device=DEVICE)
    for scale, mean in [(1, -6), (5, 0), (20, 30)]:
        logits = torch.randn(rows, K, device=DEVICE) * scale + mean
        if scale == 5:  # masked codes, and a row without any
            logits[:, 3], logits[-1] = -INF, -INF
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


COMPILE = """
import re, subprocess
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import kernels as k

cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
kernels = (k.forward_kernel, 16384), (k.forward_kernel, 1), (k.backward_kernel, 1)  # and rows
cases = [(97, 16, "fp32", 90), (97, 32, "fp32", 90), (97, 64, "bf16", 90), (97, 128, "fp32", 90),
         (512, 32, "fp32", 90), (512, 64, "fp32", 90), (512, 16, "fp32", 80),
         (97, 128, "fp32", 80)]  # 97: masks take registers, so these stand first
compiled = set()
for K, D, dtype, arch in cases:
    types = dict(key="*i64", indices="*i64", logits="*" + dtype, dlogits="*" + dtype, rows="i32",
                 rows_per_program="i32", stride_p="i32", max_logit="fp32", r_k="fp32", ln_k="fp32")
    for kernel, rows in kernels:
        size = k.tiles(kernel, rows, K, D)
        key = arch, kernel.__name__, *size.values()
        if key in compiled:
            continue
        compiled.add(key)
        options = {n: size.pop(n) for n in ("num_warps", "num_stages", "enable_fp_fusion")}
        fixed = dict(size, K=K, D=D, EVIDENTIAL=True, stride_k=1)
        names = kernel.arg_names
        signature = {n: "constexpr" if n in fixed else types.get(n, "*fp32") for n in names}
        constants = {(i,): fixed[n] for i, n in enumerate(names) if n in fixed}
        multiples = [n for n in names if signature[n][0] == "*" or n.startswith("rows")]
        multiples += ["stride_p"] * (K % 16 == 0)
        aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in multiples}
        source = ASTSource(kernel, signature, constants, aligned)
        binary = triton.compile(source, GPUTarget("cuda", arch, 32), options).asm["cubin"]
        Path("cubin").write_bytes(binary)
        usage = subprocess.check_output([cuobjdump, "-res-usage", "cubin"], text=True)
        registers, stack = map(int, re.findall("(?:REG|STACK):([0-9]+)", usage))
        assert 32 < registers <= 255 and stack == 0, (key, usage)  # the stack holds spills
every = {(90, kernel.__name__, *k.tiles(kernel, rows, K, D).values())
         for kernel, rows in kernels for K in (97, 512) for D in range(1, 129)}
assert every <= compiled, every - compiled
"""


@needs_triton
def test_compiled_kernels_spill_nothing():
    """For GPUs that are not here, with every tile of `kernels.tiles`."""
    run("-c", COMPILE)


def test_checks_and_benchmark_of_the_kernels(capsys):
    kernels.print_checks("cpu")
    assert float(capsys.readouterr().out.split()[-1]) < 1e-5  # the KL's error
    times = kernels.forward_and_both_ms(kernels.evidential_quantize, 8, 16, 4, "cpu")
    assert all(0 < ms < math.inf for ms in times)


def test_importing_needs_no_triton(two_processes):
    kl = (two_processes / "printed").read_text().splitlines()[:2]
    assert [float(x) for x in kl] == pytest.approx([59.2597] * 2, abs=1e-3)


# ------------------------------------------------------------------------------------ train_vae.py

ONE, KEY0 = torch.ones(()), torch.zeros(3, dtype=torch.int64)


def vae(**changes):
    """A tiny model by the paper's settings."""
    args = train_vae.DEFAULTS | train_vae.QUANTIZERS[changes.get("model", "edvae")].defaults
    args |= dict(width=8, codebook_size=12, code_dim=4, size=16)
    args |= dict(compile=False, device="cpu", precision="fp32")
    return train_vae.VAE(Namespace(**(args | changes)))


def make_quantizer(model, **changes):
    """A quantizer of six codes of four numbers, N(0, 1)."""
    args = vae(model=model, codebook_size=6, **changes).args
    return type("Q", (train_vae.QUANTIZERS[model],), dict(uniform_start=False))(args)


@pytest.mark.parametrize(
    "model, width, count",
    [("edvae", 128, 5_195_907), ("dvae", 32, 386_211), ("vqvae-ema", 64, 320_275)]  # authors': 1st
    + [("gs-vqvae", 64, 320_275), ("sq-vae", 64, 318_804), ("vq-ste++", 64, 318_835)],
)
def test_parameter_counts(model, width, count):
    net = vae(model=model, width=width, codebook_size=512, code_dim=16, size=32)
    assert sum(p.numel() for p in net.parameters()) == count


def test_block_adds_a_36th_of_its_branch_in_fp32():
    block, x = train_vae.Block(8, 8, (3, 3, 3, 1)), torch.randn(2, 8, 6, 6)
    before, h = x.clone(), x
    for conv in block.res:
        h = conv(torch.relu(h))
    assert torch.allclose(block(x), x + h / 36)
    assert torch.equal(x, before)  # no in-place ReLU on the skip
    with torch.autocast("cpu", torch.bfloat16):
        assert block.res[0](x).dtype == torch.bfloat16 and block(x).dtype == torch.float32
        assert train_vae.Block(8, 16, (3, 3, 3, 1))(x).dtype == torch.float32
        assert train_vae.Encoder(8, 12)(torch.rand(1, 3, 16, 16)).dtype == torch.float32  # logits


def test_upsampling_commutes_with_a_blocks_first_convolutions():
    block, x = train_vae.Block(8, 4, (1, 3, 3, 3), enlarge=True), torch.randn(2, 8, 6, 6)
    late = train_vae.Block(8, 4, (1, 3, 3, 3))
    late.load_state_dict(block.state_dict())
    want = late(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert want.shape == (2, 4, 12, 12) and torch.allclose(block(x), want, atol=1e-6)


def test_gpu_branches_equal_the_cpus(monkeypatch):
    x, encoder = torch.randn(2, 3, 16, 16), train_vae.Encoder(8, 12)
    want = train_vae.upsample(x), encoder(x)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # the other branches, on CPU tensors
    assert torch.equal(train_vae.upsample(x), want[0])
    assert torch.allclose(encoder(x), want[1], atol=1e-7) and encoder(x).std() > 0


def test_he_init_passes_the_image_on_to_the_logits():
    x = torch.from_numpy(train_vae.draw_shapes(64, 32, np.random.default_rng(0)))
    for init, least, most in (("authors", 0, 1e-4), ("he", 0.1, 3)):
        model = vae(width=16, codebook_size=64, code_dim=16, size=32, init=init)
        z_e = model.encode_features(train_vae.to_float(x)).detach()
        assert least < z_e.std(0).mean() < most  # over images


@pytest.mark.parametrize("model", train_vae.QUANTIZERS)
@pytest.mark.parametrize("size", [16, 64])
def test_shapes_and_loss_of_every_model(model, size):
    net = vae(model=model, first_kernel=7, size=size, init="he")
    x = torch.rand(2, 3, size, size)
    tau, beta, key = ONE, torch.tensor(0.5), torch.tensor([1, 2, 0])
    loss, mse, q = net(x, tau, beta, key)
    if model in ("edvae", "dvae", "gs-vqvae"):
        assert torch.allclose(loss, mse + 0.5 * q.kl.mean()) and q.kl.mean() > 0  # Eq. 8
    else:
        assert loss.isfinite() and net.quantizer(net.encode_features(x), tau, beta, key)[0] != 0
    indices = net.encode(x)
    assert indices.shape == (2, size // 4, size // 4) and net.decode(indices).shape == x.shape
    if net.offset:  # a linear output
        list(net.decoder.parameters())[-1].data += torch.tensor([5.0, -5.0, 0.0])  # its last bias
        red, green, _ = net.decode(indices).unbind(1)
        assert red.min() == 1 and green.max() == 0  # clamped


@pytest.mark.parametrize("model", train_vae.QUANTIZERS)
def test_compiled_model_equals_the_eager(model, monkeypatch):
    """As a GPU compiles it; no graph break, but where codes move in the forward."""
    how = dict(fullgraph=model not in ("vqvae-ema", "vq-ste++"))
    if kernels.triton and DEVICE == "cpu":  # interpreted
        monkeypatch.setattr(kernels, "resolve_backend", lambda *_: "triton")
    x, key, results = torch.rand(4, 3, 16, 16), torch.tensor([1, 2, 0]), []
    compile = functools.partial(torch.compile, backend="aot_eager_decomp_partition", **how)
    for wrap in (lambda net: net, compile):
        torch.manual_seed(0)
        net = vae(model=model, init="he")
        with torch.autocast("cpu", torch.bfloat16, enabled=model in ("edvae", "dvae")):
            loss, _, q = wrap(net)(x, torch.tensor(0.7), torch.tensor(0.1), key)
        loss.backward()
        grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
        results.append((loss, q.indices, grads))
    (loss, indices, grads), (compiled_loss, compiled_indices, compiled_grads) = results
    assert torch.allclose(compiled_loss, loss, rtol=1e-5) and torch.equal(indices, compiled_indices)
    assert all(p.grad is not None and p.grad.any() for p in net.encoder.parameters())
    rounding = 1e-6 * max(grad.norm() for grad in grads.values())  # of biases before batch norms
    for name, grad in grads.items():
        assert (compiled_grads[name] - grad).norm() <= 1e-4 * grad.norm() + rounding, name


@pytest.mark.parametrize("tau", [0.2, 1.0, 5.0])
def test_plain_equals_the_fused_operator_of_the_same_noise(tau, monkeypatch):
    q, key = make_quantizer("edvae", max_logit=1.5).double(), torch.tensor([3, 5, 0])
    logits = (2 * torch.randn(2, 3, 3, 6, dtype=torch.float64)).requires_grad_()
    fused = kernels.evidential_quantize(logits, q.codebook, tau, 1.5, key)
    # RelaxedOneHotCategorical's noise is -ln(-ln U) of torch.rand's U.
    uniform = torch.exp(-torch.exp(-kernels.gumbel_noise(key, 0, 18, 6).double())).view(2, 3, 3, 6)
    monkeypatch.setattr(torch, "rand", lambda *shape, **how: uniform)
    plain = q.plain(logits, torch.tensor(tau))
    results, w = [], torch.randn(2, 3, 3, 4)
    for out in (plain, fused):
        kl_grad = torch.autograd.grad(out.kl.sum(), logits, retain_graph=True)
        results.append(
            (*out, *kl_grad, *torch.autograd.grad((out.z_q * w).sum(), (logits, q.codebook)))
        )
        assert [x.requires_grad for x in out] == [True, True, False, False, False]
    for a, b in zip(*results):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("model", train_vae.QUANTIZERS)
def test_eval_freezes_a_quantizers_state_and_entropy_is_that_of_pi(model):
    net, x = vae(model=model, init="he", max_logit=0.5).eval(), torch.rand(2, 3, 16, 16)
    z_e = net.encode_features(x)
    if net.quantizer.network != "ed":  # codes among the vectors, so that several are the nearest
        net.quantizer.codebook.data = z_e.detach().flatten(0, 2)[:12].clone()
    before = {k: v.clone() for k, v in net.quantizer.state_dict().items()}
    net.encoder.train()  # the quantizer alone is frozen
    net(x, ONE, 0.1, KEY0)
    assert same(before, net.quantizer.state_dict())
    _, q = net.quantizer(z_e, ONE, 0.1, KEY0)
    assert torch.equal(net.quantizer.assign(z_e), q.indices) and len(q.indices.unique()) > 3
    pi = net.quantizer.probabilities(z_e)
    assert torch.allclose(pi.sum(-1), torch.ones(2, 4, 4), atol=1e-5)
    if q.entropy.isfinite().all():
        assert torch.allclose(Categorical(probs=pi).entropy(), q.entropy, atol=1e-4)


@pytest.mark.parametrize("model", ["vqvae-ema", "vq-ste++"])
def test_straight_through_gradient_and_synced_share(model):
    q, z = make_quantizer(model), torch.randn(2, 3, 3, 4, requires_grad=True)
    w = torch.randn(2, 3, 3, 4)
    _, out = q(z, ONE, 0.0, KEY0)
    assert out.z_q.shape == (2, 3, 3, 4) and out.indices.dtype == torch.int64
    for value in (out.kl, out.entropy, out.uncertainty):  # of a hard code: none
        assert value.shape == (2, 3, 3) and value.isnan().all() and value.dtype == torch.float32
    (out.z_q * w).sum().backward()
    assert torch.equal(z.grad, w) and q.codebook.grad is None
    if model == "vq-ste++":  # c = (1 + l a) e + l t: the share SYNC of w reaches a and t
        share = q.SYNC * q.AFFINE_LR * w
        want = (share * q.codebook[out.indices]).sum((0, 1, 2)), share.sum((0, 1, 2))
        assert torch.allclose(q.scale.grad, want[0], rtol=1e-4, atol=1e-5)
        assert torch.allclose(q.shift.grad, want[1], rtol=1e-4, atol=1e-5)


def test_ema_codes_are_the_moving_averages_of_their_cells():
    q, z = make_quantizer("vqvae-ema"), torch.randn(2, 3, 3, 4)
    q.codebook.data[0] = q.sum[0] = 9.0  # never the nearest
    count, sums = torch.ones(6), q.codebook.detach().clone()
    for _ in range(20):
        old = q.codebook.detach().clone()
        loss, out = q(z, ONE, 0.25, KEY0)
        assert torch.equal(out.indices, torch.cdist(z, old[None, None]).argmin(-1))
        assert torch.allclose(loss, 0.25 * (old[out.indices] - z).square().mean())  # commitment
        cells = torch.nn.functional.one_hot(out.indices.flatten(), 6).float()
        count = 0.99 * count + 0.01 * cells.sum(0)
        sums = 0.99 * sums + 0.01 * cells.T @ z.view(18, 4)
        assert torch.allclose(q.codebook, sums / count[:, None], rtol=1e-3)
    assert torch.allclose(q.codebook[0], torch.tensor(9.0), rtol=1e-3)  # stays put


@pytest.mark.parametrize("model", ["gs-vqvae", "sq-vae"])
def test_soft_quantizers_at_the_limits(model):
    q, z = make_quantizer(model), torch.randn(3, 5, 5, 4)
    _, out = q(z, torch.tensor(1e-6), 1.0, KEY0)
    nearest = torch.cdist(out.z_q, q.codebook[None, None]).argmin(-1)
    assert torch.allclose(out.z_q, q.codebook[nearest], atol=1e-5)
    assert torch.equal(out.indices, torch.cdist(z, q.codebook[None, None]).argmin(-1))
    q.codebook.data.zero_()
    assert q(z, ONE, 1.0, KEY0)[1].kl.abs().max() < 1e-6  # all codes alike: pi is uniform
    q.codebook.data = 1e3 * torch.randn(6, 4)  # pi is one-hot
    assert torch.allclose(q(z, ONE, 1.0, KEY0)[1].kl, torch.tensor(math.log(6)), atol=1e-4)


def test_sqvae_logits_and_losses_against_their_definitions():
    q, z = make_quantizer("sq-vae"), torch.randn(2, 3, 3, 4)
    variance = 1 + q.rho.exp()
    assert q.rho.item() == pytest.approx(math.log(20 * 4 / 64))
    want = -(z[..., None, :] - q.codebook).square().sum(-1) / (2 * variance)
    assert torch.allclose(q.logits(z), want, atol=1e-4)
    (loss, out), pi = q(z, torch.tensor(0.5), 1.0, KEY0), want.softmax(-1)
    continuous = ((z - out.z_q).square() / (2 * variance)).sum() / 2
    assert torch.allclose(loss, (pi * pi.log()).sum() / 2 + continuous, rtol=1e-4)
    x, x_hat = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8)
    # -ln N(x; x_hat, s^2) at its best s^2, the mean squared error, less what is constant
    log_loss = 3 * 8 * 8 / 2 * math.log(4 * 3 * 8 * 8 * (x_hat - x).square().mean() / 4)
    assert q.reconstruction_loss(x_hat, x).item() == pytest.approx(log_loss, rel=1e-4)


def test_vqste_puts_codes_on_vectors_at_its_start_and_when_they_are_dead():
    q, z = make_quantizer("vq-ste++"), 5 + torch.randn(4, 8, 8, 4)
    q.REPLACE_AFTER = 3
    q.scale.data += 0.02
    q.shift.data += 0.03
    q.replace(z)
    distance, vector = torch.cdist(q.vectors(), z.view(256, 4)).min(1)
    assert distance.max() < 0.05 * z.norm(dim=-1).max() and len(vector.unique()) > 2
    z = q.vectors()[:1].detach().expand(1, 5, 5, 4) + 0.01 * torch.randn(1, 5, 5, 4)
    q.codebook.data[1:] += 50  # codes 1 to 5 are never nearest
    for forward in range(1, 5):
        q.eval()(z, ONE, 0.0, KEY0)  # eval does not count
        before = q.vectors()[1:].detach().clone()
        q.train()(z, ONE, 0.0, KEY0)
        moved = (q.vectors()[1:] - before).abs().sum(1) > 1e-3
        assert moved.all() if forward == 4 else not moved.any()
    assert torch.cdist(q.vectors()[1:], z.flatten(0, 2)).min(1).values.max() < 0.5


def test_vqste_codes_move_by_sgd_with_momentum_before_z_q_is_read():
    q, z = make_quantizer("vq-ste++"), torch.randn(4, 3, 3, 4)
    q.patience.fill_(q.REPLACE_AFTER)  # as after the start
    q.scale.data += 0.02
    q.shift.data += 0.05
    a, t = 10 * q.scale.detach(), 10 * q.shift.detach()
    e, velocity = q.codebook.detach().clone(), torch.zeros(6, 4)
    for _ in range(2):
        e.requires_grad_()
        c = (1 + a) * e + t
        nearest = torch.cdist(z, c[None, None]).argmin(-1)
        (gradient,) = torch.autograd.grad((c[nearest] - z).square().mean(), e)
        velocity = 0.9 * velocity + gradient
        e = (e - 50 * 4 / 64 * velocity).detach()
        loss, out = q(z, ONE, 1.0, KEY0)
        assert torch.equal(out.indices, nearest)
        assert torch.allclose(q.codebook, e, rtol=1e-4, atol=1e-5)
        z_q = ((1 + a) * e + t)[nearest]
        assert torch.allclose(out.z_q, z_q, atol=1e-5)
        assert torch.allclose(loss, 0.1 * (z - z_q).square().mean(), rtol=1e-4)  # commitment


def test_encode_takes_images_in_0_to_1_and_decode_codes_and_nothing_else():
    net, x = vae(), torch.rand(2, 3, 16, 16)
    spoilt, gray = x.clone(), x[:, :1]
    spoilt[1, 2, 3, 4] = math.nan
    bytes_ = (255 * x).byte()
    for bad in (spoilt, gray, x[0], x[:0], x[..., 1:], bytes_, bytes_.float(), x - 1, x[:, :, 0]):
        with pytest.raises(ValueError, match="encode takes"):
            net.encode(bad)
    indices = net.encode(x.double())
    assert torch.equal(net.decode(indices.short()), net.decode(indices))
    for bad in (indices - 99, indices + 99, indices[0], indices.float(), indices > 0):
        with pytest.raises(ValueError, match="decode takes"):
            net.decode(bad)


def test_state_has_the_names_of_earlier_checkpoints():
    networks = dict(
        ed="encoder.body.8.res.3.bias encoder.body.4.id.weight encoder.head.weight decoder.7.bias",
        vq="encoder.4.res.1.weight encoder.6.weight decoder.2.res.4.bias decoder.6.bias",
        sq="encoder.1.running_mean encoder.10.res.5.bias decoder.2.res.1.weight decoder.9.bias",
    )
    more = {"vqvae-ema": "count sum", "sq-vae": "rho", "vq-ste++": "scale shift velocity patience"}
    for model, quantizer in train_vae.QUANTIZERS.items():
        state = vae(model=model).state_dict().keys()
        own = {name.split(".")[1] for name in state if name.startswith("quantizer")}
        assert own == {"codebook", *more.get(model, "").split()}
        assert set(networks[quantizer.network].split()) <= state


def test_every_table_of_settings_acts_and_flags_win(monkeypatch):
    rows = {
        "": "preset=cpu size=32 codebook_size=64 code_dim=16 init=he beta=3e-07 seed=42",
        "--dataset cifar10": "preset=cpu steps=3000 eval_every=300 width=32 lr=0.01 beta=5e-07",
        "--dataset cifar10 --model sq-vae": "preset=cpu width=64 lr=0.001 init=he beta=1.0",
        "--dataset cifar10 --preset paper": "steps=150000 width=128 lr=0.001 init=authors",
        "--dataset celeba --preset short --model dvae": "steps=35000 lr_anneal=1.0 beta=5e-05",
        "--dataset lsun-church --preset paper": "size=128 first_kernel=7 beta=1e-07",
        "--steps 8 --lr 0.5 --width 8 --tau-end 0.25": "steps=8 lr=0.5 width=8 tau_end=0.25",
        "--steps 500 --max-logit inf": "compile=True log_every=8 max_logit=inf",
    }
    for flags, want in rows.items():
        args = vars(settings(flags))
        for name, value in (pair.split("=") for pair in want.split()):
            assert str(args[name]) == value, (flags, name)
    monkeypatch.setitem(train_vae.DATASETS["shapes"], "beta_ramp", 0.75)
    monkeypatch.setattr(train_vae.DVAE, "special", dict(shapes=dict(beta=0.5)))
    args = settings("--model dvae")
    assert (args.beta_ramp, args.beta, args.width) == (0.75, 0.5, train_vae.CPU["width"])
    for device, preset in (("cpu", "cpu"), ("cuda:0", "short")):  # the device decides
        monkeypatch.setattr(train_vae, "prepare_device", lambda *_, d=device: (d, "fp32"))
        assert settings("--dataset cifar10").preset == preset
        assert settings("--dataset shapes").preset == "cpu"


def scheduled(args, steps):
    """lr, beta and tau at each of the steps."""
    return zip(*(train_vae.schedules(t, args).values() for t in steps))


def test_schedules_are_the_papers_and_follow_the_runs_length():
    args = settings("--dataset cifar10 --preset paper")
    lr, beta, tau = scheduled(args, (0, 2500, 5000, 25_000, 50_000, 150_000))
    want = (1e-3, 9.9692e-4, 9.8770e-4, 7.0747e-4, 1.25e-6, 1.25e-6)
    assert lr == pytest.approx(want, rel=1e-4)
    assert beta == pytest.approx((0, 5e-7 * 0.292893, 5e-7, 5e-7, 5e-7, 5e-7), rel=1e-5)
    assert tau == pytest.approx((1, 0.975310, 0.951229, 0.778801, 0.606531, 0.223130), rel=1e-5)
    at_end = train_vae.schedules(3000, settings("--dataset cifar10"))
    assert tuple(at_end.values()) == pytest.approx((1.25e-5, 5e-7, 0.606531))
    tenth = settings("--dataset cifar10 --preset paper --steps 15000")
    for t in (0, 50, 100, 999, 15000):
        assert train_vae.schedules(t, tenth) == pytest.approx(train_vae.schedules(10 * t, args))
    for model in train_vae.QUANTIZERS:
        args = settings(f"--model {model} --preset short")
        has_kl = model in ("edvae", "dvae", "gs-vqvae")
        assert train_vae.schedules(0, args)["beta"] == (0 if has_kl else args.beta), model


def test_measures_are_their_definitions_whatever_the_batch():
    images, model = torch.randint(0, 256, (24, 16, 16, 3), dtype=torch.uint8), vae()
    model.encoder.head.weight.data *= 3000  # logits with something to measure
    x = train_vae.to_float(images)
    z_e = model.encode_features(x)
    assert z_e.is_contiguous()  # as the encoder leaves them, channels last: no copy
    q = kernels.evidential_quantize(z_e, model.quantizer.codebook, 1.0)
    mse = (model.reconstruct(model.quantizer.codebook[q.indices]) - x).square().mean()
    p = torch.bincount(model.encode(x).flatten(), minlength=12) / 24 / 16
    want = dict(mse=mse.item(), kl=q.kl.mean().item(), loss=(mse + 0.1 * q.kl.mean()).item())
    want |= dict(entropy_mean=q.entropy.mean().item(), uncertainty=q.uncertainty.mean().item())
    want |= dict(entropy_std=q.entropy.std(correction=0).item(), codes_used=(p > 0).sum().item())
    want |= dict(perplexity=Categorical(p).entropy().exp().item())
    meter = train_vae.Meter(12, "cpu")
    for loss in (torch.tensor(1.0), torch.tensor(3.0)):
        meter.add(loss, mse, q)
        line = meter.flush()  # starts anew
        assert line["loss"] == loss and line["kl"] == pytest.approx(want["kl"])
    for batch in (24, 5):
        args = Namespace(**vars(model.args) | dict(batch_size=batch))
        line = train_vae.test(model, images.numpy(), args, beta=0.1)
        assert np.allclose(line.pop("entropy_map"), q.entropy[0].detach(), atol=2e-3)
        assert line.pop("split") == "test" and model.training
        assert line == pytest.approx(want, rel=1e-4)


def test_batch_indices_see_each_image_once_an_epoch():
    orders = [train_vae.epoch_order(*a).tolist() for a in ((0, 25, 3), (1, 25, 3), (0, 25, 4))]
    assert len({tuple(order) for order in [range(25), *orders]}) == 4
    for batch in (7, 25, 60):
        seen = torch.cat([train_vae.batch_indices(step, batch, 25, 3) for step in range(25)])
        assert torch.equal(seen, torch.cat([train_vae.epoch_order(e, 25, 3) for e in range(batch)]))
        assert torch.bincount(seen).unique().tolist() == [batch]


@pytest.mark.parametrize("model", train_vae.QUANTIZERS)
def test_a_run_from_start_to_finish(photos, tmp_path, capsys, model):
    folder = tmp_path / "r"
    train_vae.main(tiny(photos, folder, "--steps 6 --log-every 2 --eval-every 3 --model", model))
    shown = capsys.readouterr().out
    assert f"r: {model} on folder, preset paper, 54 images, " in shown and "min left" in shown
    assert re.search(r"test MSE .*, perplexity [\d.]+ of 12, \d+ codes used\n", shown)
    lines = train_vae.read_log(folder / "log.jsonl")
    assert ("the codebook has collapsed" in shown) == (lines[-1]["codes_used"] < 1.2)  # of 12
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 6]
    assert [line.get("split") for line in lines] == [None, "test", None, None, "test"]
    keys = {*"loss mse kl beta tau lr perplexity entropy_mean entropy_std uncertainty".split()}
    assert all(keys <= line.keys() for line in lines) and "images_per_second" in lines[0]
    assert (lines[0]["uncertainty"] is None) == (model != "edvae")
    assert "torch" in json.loads((folder / "args.json").read_text())["environment"]
    loaded = train_vae.load_vae(folder)
    x = torch.from_numpy(train_vae.load_images("folder", "test", photos, 16))
    indices = loaded.encode(train_vae.to_float(x))
    (pairs,) = tiles_of(folder / "recon.png", 16, stacked=2)
    assert np.array_equal(pairs[0, :16], x[0])
    assert np.array_equal(pairs[0, 16:], pixels(loaded.decode(indices))[0])
    assert indices.shape == (len(x), 4, 4) and not loaded.training


def test_the_default_command_runs_alone(capsys):
    train_vae.main(["--steps", "2", "--eval-every", "2"])
    assert Path("runs/shapes-edvae-1/recon.png").exists()
    assert "codes used" in capsys.readouterr().out
    train, test = (np.load(f"data/shapes-{split}-32.npy") for split in ("train", "test"))
    assert train.shape == (20_000, 32, 32, 3) and not np.array_equal(train[:2000], test)
    assert str(train_vae.new_folder("shapes-edvae")) == "runs/shapes-edvae-2"


@pytest.mark.parametrize("model", ["edvae", "edvae --plain", "vqvae-ema", "sq-vae", "vq-ste++"])
def test_a_killed_run_resumes_to_the_same_bits(model, photos, tmp_path, monkeypatch):
    flags = "--resume --steps 9 --log-every 2 --eval-every 4 --preset cpu --model"  # of nothing
    if "plain" in model:
        monkeypatch.setattr(kernels, "evidential_quantize", None)
    with monkeypatch.context() as patched:
        for step in (0, 4, 8):
            copy_run_at(patched, step, tmp_path / str(step))
        train_vae.main(tiny(photos, tmp_path / "whole", flags, model))
    for step in (0, 4, 8):
        cut = tmp_path / str(step)
        with open(cut / "log.jsonl", "a") as f:  # after the checkpoint, and cut short
            f.write(f'{{"step": {step + 1}, "loss": 1}}\n{{"step": 12')
        train_vae.main(["--out", str(cut), "--resume", *DEVICE_FLAGS])
        a, b = checkpoint(tmp_path / "whole"), checkpoint(cut)
        assert a["step"] == b["step"] == 9
        assert same(a["model"], b["model"]) and same(a["optimizer"], b["optimizer"])
        assert log_of(tmp_path / "whole") == log_of(cut)


def test_a_resumed_run_keeps_its_settings(photos, tmp_path):
    out, other = tmp_path / "r", folder_of_images(tmp_path / "other", 20)
    train_vae.main(tiny(photos, out, "--steps 2"))
    state = checkpoint(out)
    state["args"] |= dict(preset="fast", muon_lr=0.1)  # as of an earlier version
    torch.save(state, out / "ckpt.pt")
    assert train_vae.load_vae(out).args.muon_lr == 0.1
    free = f"--beta {state['args']['beta']} --log-every 7 --data-dir {other}"
    resumed = settings(f"--out {out} --resume {free}")
    assert (resumed.width, resumed.preset, resumed.log_every) == (8, "fast", 7)
    assert resumed.data_dir == str(other)


def test_each_step_has_its_own_noise_tau_beta_and_rate(photos, tmp_path, monkeypatch):
    seen, rates = [], []

    def note(self, logits, tau, beta, key):
        seen.append((tau.item(), beta.item(), *key.tolist()))

    sees(monkeypatch, train_vae.EdVAE, "forward", note)
    note_rate = lambda adam: rates.append(adam.param_groups[0]["lr"].item())  # noqa: E731
    sees(monkeypatch, torch.optim.Adam, "step", note_rate)
    train_vae.main(tiny(photos, tmp_path / "r", "--steps 4 --seed 7"))
    lr, beta, tau = scheduled(Namespace(**checkpoint(tmp_path / "r")["args"]), range(4))
    assert rates == pytest.approx(lr, rel=1e-6)
    want = torch.tensor([(tau[t], beta[t], 7, t, 0) for t in range(4)])
    assert torch.allclose(torch.tensor(seen[:4]), want, rtol=1e-6, atol=0)  # then it is tested


class Tape(TorchDispatchMode):
    """A CUDA graph's stand-in: records a step, undoes it, replays it on the same tensors."""

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
    """Let kernels.Graphed record tapes; gives the tapes."""
    tapes = []

    def new_tape():
        tapes.append(Tape())
        return tapes[-1]

    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", new_tape)
    monkeypatch.setattr(torch.cuda, "graph", lambda tape: tape)
    return tapes


class OnTheCPU(TorchFunctionMode):
    """Puts on the CPU what is meant for a GPU."""

    def __torch_function__(self, f, types, args=(), kwargs=None):
        def here(x):
            gpu = isinstance(x, (str, torch.device)) and str(x).startswith("cuda")
            return "cpu" if gpu and f is not torch.device else x

        return f(*map(here, args), **{name: here(x) for name, x in (kwargs or {}).items()})


def train_as_on_a_gpu(monkeypatch, arguments):
    """train_vae.py with --device cuda, on the CPU; gives what Adam was told of graphs."""
    told = []
    with monkeypatch.context() as patched, OnTheCPU():
        patched.setattr(train_vae, "prepare_device", lambda *_: ("cuda:0", "fp32"))
        patched.setattr(torch.cuda, "get_device_name", lambda device: "none")
        patched.setattr(kernels, "Compiled", lambda fn: fn)
        sees(patched, torch.optim, "Adam", lambda *_, capturable, **more: told.append(capturable))
        train_vae.main(arguments)
    return told


@pytest.mark.filterwarnings("ignore:User provided device_type")
@pytest.mark.parametrize("model", [*train_vae.QUANTIZERS, "edvae --plain"])
def test_recorded_steps_are_the_ordinary_ones(model, photos, tmp_path, monkeypatch):
    """The graph's rules, without a GPU: see `kernels.Graphed`."""
    tapes, flags = use_tapes(monkeypatch), "--steps 12 --log-every 5 --eval-every 6 --preset cpu"
    for how in ("--no-compile", "--compile"):
        arguments = tiny(photos, tmp_path / how, flags, how, "--model", model)
        assert train_as_on_a_gpu(monkeypatch, arguments) == [how == "--compile"]
    (tape,) = tapes
    assert len(tape.calls) > 200  # forward, backward, optimizer and measures
    a, b = checkpoint(tmp_path / "--no-compile"), checkpoint(tmp_path / "--compile")
    assert same(a["model"], b["model"])
    assert same(a["optimizer"]["state"], b["optimizer"]["state"])
    assert log_of(tmp_path / "--no-compile") == log_of(tmp_path / "--compile")


class Counting(train_vae.GSVQVAE):
    """A new quantizer with what it must have alone; it counts its training steps."""

    name, defaults = "counting", dict(beta=1e-6)
    python_count = 0

    def __init__(self, args):
        super().__init__(args)
        self.register_buffer("tensor_count", torch.zeros((), dtype=torch.int64))

    def forward(self, *inputs):
        if self.training:
            Counting.python_count += 1
            self.tensor_count += 1
        return super().forward(*inputs)


@pytest.mark.filterwarnings("ignore:User provided device_type")
def test_a_new_quantizer_trains_and_counts_in_tensors(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(train_vae.QUANTIZERS, "counting", Counting)
    args = settings("--dataset cifar10 --model counting")
    assert (args.preset, args.width, args.lr, args.beta) == ("cpu", 64, 1e-3, 1e-6)
    use_tapes(monkeypatch)
    flags = "--steps 12 --preset cpu --compile --model counting"
    train_as_on_a_gpu(monkeypatch, tiny(photos, tmp_path / "r", flags))
    assert checkpoint(tmp_path / "r")["model"]["quantizer.tensor_count"] == 12
    assert Counting.python_count == 4  # three plain steps and the recording


@needs_gpu
@pytest.mark.parametrize("model", train_vae.QUANTIZERS)
def test_a_graph_trains_as_steps_do(model, photos, tmp_path):
    for how in ("--compile", "--no-compile"):
        flags = f"--model {model} --preset cpu --steps 12 --device cuda {how}"
        train_vae.main(tiny(photos, tmp_path / how, flags))
    graph, plain = (checkpoint(tmp_path / how)["model"] for how in ("--compile", "--no-compile"))
    for name, weight in plain.items():
        assert torch.allclose(graph[name].float(), weight.float(), rtol=1e-2, atol=1e-3), name


@pytest.mark.parametrize("model", ["edvae", "vqvae-ema"])
def test_two_processes_train_as_one(model, two_processes, photos, tmp_path):
    train_vae.main(tiny(photos, tmp_path / "one", FOR_TWO, model))
    printed = (two_processes / "printed").read_text()
    assert printed.count(f"{model} on folder") == 1  # one process speaks
    state, b = checkpoint(tmp_path / "one"), checkpoint(two_processes / model)["model"]
    torch.manual_seed(42)
    start = train_vae.VAE(Namespace(**state["args"])).state_dict()
    for name, value in state["model"].items():  # each CPU rounds half a batch in its own way
        moved = (value - start[name]).norm()
        assert (value - b[name]).norm() < 1e-3 * moved and moved > 0, name
    for one, two in zip(log_of(tmp_path / "one"), log_of(two_processes / model), strict=True):
        for key, value in one.items():  # measures are of the whole batch
            if isinstance(value, (int, float)):
                assert value == pytest.approx(two[key], rel=1e-3, abs=1e-6), key


def test_what_is_not_finite_stops_the_run_and_spares_the_checkpoint(photos, tmp_path, monkeypatch):
    schedules = train_vae.schedules

    def spoilt(step, args):
        return schedules(step, args) | ({"beta": math.nan} if step == 5 else {})

    monkeypatch.setattr(train_vae.Run, "SAVE_SECONDS", 0)
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as e:
        patched.setattr(train_vae, "schedules", spoilt)
        train_vae.main(tiny(photos, tmp_path / "r", "--steps 9 --log-every 2"))
    assert re.search("after step 4 .* not finite; .*ckpt.pt is from step 4", e.value.code)
    state = checkpoint(tmp_path / "r")
    assert state["step"] == 4 and all(v.isfinite().all() for v in state["model"].values())
    train_vae.main(["--out", str(tmp_path / "r"), "--resume", *DEVICE_FLAGS])


def test_bf16_measures_what_fp32_does(photos, tmp_path):
    mse = {}
    for name in ("fp32", "bf16"):
        train_vae.main(tiny(photos, tmp_path / name, "--steps 1 --preset cpu --precision", name))
        mse[name] = log_of(tmp_path / name)[0]["mse"]
    assert mse["bf16"] == pytest.approx(mse["fp32"], rel=0.01) and mse["bf16"] != mse["fp32"]


def test_celeba_is_cropped_and_split_as_by_its_authors(tmp_path):
    folder = tmp_path / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    image = np.zeros((218, 178, 3), np.uint8)
    image[39:179, 19:159] = 200  # the center 140 x 140
    for name in ("000001", "162770", "162771", "182637", "182638"):
        Image.fromarray(image).save(folder / f"{name}.jpg", quality=100)
    train, test = (train_vae.load_images("celeba", split, tmp_path) for split in ("train", "test"))
    assert train.shape == test.shape == (2, 64, 64, 3) and abs(train - np.int32(200)).max() <= 2


def test_lsun_is_squeezed_to_a_square(tmp_path, monkeypatch):
    picture = np.full((100, 200, 3), (10, 20, 30), np.uint8)
    picture[:, :40] = (200, 0, 0)  # lost if the image was cropped
    rows = {(str(tmp_path), ("church_outdoor_val",)): [(Image.fromarray(picture), 0)] * 2}
    monkeypatch.setattr("torchvision.datasets.LSUN", lambda top, names: rows[top, tuple(names)])
    images = train_vae.load_images("lsun-church", "test", tmp_path)
    assert images.shape == (2, 128, 128, 3) and (images[:, :, :24] == (200, 0, 0)).all()
    assert (images[:, :, 28:] == (10, 20, 30)).all()


@pytest.mark.parametrize("reader", ["CIFAR10", "CelebA", "LSUN"])
def test_what_a_downloader_raises_is_one_line(reader, tmp_path, monkeypatch):
    error = struct.error("Failed:\n\n too many users")  # any exception
    monkeypatch.setattr(f"torchvision.datasets.{reader}", MagicMock(side_effect=error))
    name = "lsun-church" if reader == "LSUN" else reader.lower()
    with pytest.raises(train_vae.UserError) as e:
        train_vae.load_images(name, "train", tmp_path)
    assert str(e.value) == f"{tmp_path}: Failed: too many users; {train_vae.BY_HAND[name]}"


def write_images(folder, values, brighter=0):
    """An image by the name of each value, that much brighter; all files are of one size."""
    folder.mkdir(parents=True, exist_ok=True)
    for value in values:
        Image.new("RGB", (8, 8), (value + brighter,) * 3).save(folder / f"{value:02}.bmp")


def values_of(split, folder="p"):
    """The gray values of a split's images, in order."""
    return sorted(train_vae.load_images("folder", split, folder, 8)[:, 0, 0, 0].tolist())


def test_a_folder_is_split_by_names_or_by_a_checksum(tmp_path):
    for names in ("train TEST", "i/train i/Validation/x", ". test", "train test val"):
        folder = tmp_path / names.replace("/", "-")
        for i, name in enumerate(names.split()):
            write_images(folder / name, range(10 * i, 10 * i + 10))
        assert values_of("train", folder) == [*range(10)], names
        assert values_of("test", folder) == [*range(10, 20)], names  # val's are in neither
    write_images(tmp_path / "p" / "train", range(40))  # without test: no more than a name
    fitted, judged = values_of("train"), values_of("test")
    assert sorted(fitted + judged) == [*range(40)] and 1 < len(judged) < 8
    write_images(tmp_path / "p" / "new", range(40, 53))
    (tmp_path / "p").rename(tmp_path / "q")
    assert [v for v in values_of("train", "q") if v < 40] == fitted  # each image stays where it was


def test_damaged_images_are_named_and_other_files_are_not_read(tmp_path, capsys):
    write_images(tmp_path / "p", range(30))
    write_images(tmp_path / "elsewhere", range(30, 40))
    write_images(tmp_path / "p" / "run", [90])
    for name, target in {"link": "../elsewhere", "again": "../elsewhere", "loop": "."}.items():
        (tmp_path / "p" / name).symlink_to(target)  # each folder counts once
    own = "run/args.json", "recon.png", "samples.png", ".hidden.png", "notes.txt"
    for name in (*own, "03.bmp", "21.bmp"):
        (tmp_path / "p" / name).write_text("not an image")
    assert sorted(values_of("train") + values_of("test")) == sorted({*range(40)} - {3, 21})
    (line,) = capsys.readouterr().err.splitlines()
    assert all(words in line for words in ("left out 2 of", "cannot read", "03.bmp", "21.bmp"))


def test_a_cache_is_whole_and_of_these_images(tmp_path, monkeypatch):
    save, want = np.save, []

    def interrupted_while_another_saves(f, pixels):
        f.write(b"half")
        monkeypatch.setattr(np, "save", save)
        want.extend(values_of("test"))
        raise KeyboardInterrupt

    write_images(tmp_path / "p", range(20))
    monkeypatch.setattr(np, "save", interrupted_while_another_saves)
    with pytest.raises(KeyboardInterrupt):
        values_of("test")
    assert len(os.listdir("data")) == 1 and want
    with monkeypatch.context() as patched:
        patched.setattr(train_vae, "to_pixels", None)  # the cache is taken
        assert values_of("test") == want
    write_images(tmp_path / "q", range(20), 9)  # as many, of the same names, sizes and times
    for image in (tmp_path / "p").iterdir():
        os.utime(tmp_path / "q" / image.name, ns=(0, image.stat().st_mtime_ns))
    assert values_of("test", "q") == [value + 9 for value in want]
    write_images(tmp_path / "p", range(20), 5)
    assert values_of("test") == [value + 5 for value in want]


def test_an_image_is_read_by_its_format_or_refused_by_name(tmp_path):
    plain, red = Image.new("RGB", (8, 8), (7, 8, 9)), (255, 0, 0)
    holes = Image.new("P", (8, 8))
    holes.putpalette(red)
    sixteen = np.full((8, 8), 257 * 50, np.uint16)
    rows = {  # a file: an image and how it is saved, or bytes; what is read
        "gray.png": (Image.new("L", (9, 12), 100), {}, 100),
        "gray-alpha.png": (Image.new("LA", (8, 8), (0, 51)), {}, 204),  # white shows through
        "holes.gif": (holes, dict(transparency=0), 255),
        "frames.gif": (plain.quantize(4), dict(save_all=True, append_images=[holes]), (7, 8, 9)),
        "cmyk.jpg": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), {}, red),
        "sixteen.png": (Image.fromarray(sixteen), {}, 50),
        "sixteen.pgm": (b"P5 8 8 65535\n" + sixteen.byteswap().tobytes(), {}, 50),
        "float.tif": (Image.fromarray(np.full((8, 8), 0.5, np.float32)), {}, "no fixed range"),
        "bomb.png": (Image.new("1", (20_000, 20_000)), {}, "exceeds limit"),  # 50 kB
        "page.jpg": (b"<html>", {}, "cannot identify"),
    }
    for name, (image, how, want) in rows.items():
        path = tmp_path / name
        path.write_bytes(image) if isinstance(image, bytes) else image.save(path, **how)
        if isinstance(want, str):
            with pytest.raises(train_vae.UserError, match=f"{name}.*{want}"):
                train_vae.to_pixels(path, 8)
        else:
            got = train_vae.to_pixels(path, 8)  # (8, 8, 3)
            assert got.shape == (8, 8, 3) and abs(got - np.int32(want)).max() <= 1, (name, got)


def test_exif_orientation_is_applied(tmp_path):
    corners = np.zeros((16, 16, 3), np.uint8)
    corners[:8, :8] = 255
    for orientation, (y, x) in {1: (0, 0), 2: (0, 8), 3: (8, 8), 6: (0, 8), 8: (8, 0)}.items():
        # With an XResolution of -1/0, which Pillow cannot write again.
        tags = 0x112, 3, 1, orientation, 0x11A, 10, 1, 38
        exif = b"Exif\0\0II*\0" + struct.pack("<IHHHIIHHIIIii", 8, 2, *tags, 0, -1, 0)
        Image.fromarray(corners).save(tmp_path / "turned.jpg", exif=exif, quality=100)
        got = train_vae.to_pixels(tmp_path / "turned.jpg", 16)
        assert (got[y : y + 8, x : x + 8] > 200).all(), orientation


def test_ctrl_c_says_how_to_go_on(photos, tmp_path, monkeypatch, capsys):
    def interrupt(step, args):
        if step == 5:
            raise KeyboardInterrupt  # what Python makes of Ctrl-C

    sees(monkeypatch, train_vae, "schedules", interrupt)
    monkeypatch.setattr(train_vae.Run, "SAVE_SECONDS", 0)
    with pytest.raises(SystemExit) as e:
        train_vae.main(tiny(photos, tmp_path / "it's", "--steps 99 --log-every 2"))
    said = capsys.readouterr().out.splitlines()[-1]
    assert e.value.code == 130 and "saved at step 4; to continue: python train_vae.py" in said
    args, state = train_vae.settings(shlex.split(said.split("train_vae.py ")[1]))
    assert (state["step"], args.steps, args.width) == (4, 99, 8)


def test_checkpoints_are_written_every_ten_seconds_and_at_the_end(photos, tmp_path, monkeypatch):
    saved, now = [], iter(range(0, 1000, 3))  # 3 s a look at the clock
    monkeypatch.setattr(train_vae.time, "monotonic", lambda: next(now))
    sees(monkeypatch, train_vae.Run, "save", lambda self, step, **_: saved.append(step))
    train_vae.main(tiny(photos, tmp_path / "r", "--steps", 10, "--log-every", 1))
    assert saved == [0, 4, 8, 10]


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


def test_a_full_disk_spares_the_checkpoint(photos, tmp_path):
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
    assert not list(folder.glob("*.part"))  # no half file is left
    train_vae.main(resume)
    assert checkpoint(folder)["step"] == 4


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_too_little_memory_is_one_clear_line(photos, tmp_path):
    arguments = tiny(photos, tmp_path / "r", "--batch-size", 2**18, "--size 128")  # 13 GB
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    with limited("RLIMIT_AS", used + 2**31):
        assert "out of memory: take a smaller batch" in refused(train_vae.main, *arguments)


def test_another_gpu_than_the_first_is_made_current(monkeypatch):
    there, current = Namespace(device=torch.device("cuda:1")), []
    monkeypatch.setattr(torch, "zeros", lambda _, device: there)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert train_vae.prepare_device("cuda:1") == ("cuda:1", "bf16") and current == ["cuda:1"]


def test_what_processes_cannot_share_is_refused(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setenv("WORLD_SIZE", "2")  # and no more of torchrun's variables
        assert "start by torchrun" in refused(train_vae.main, "--steps", 2)
    monkeypatch.setattr(train_vae, "process_count", lambda: 2)
    for model in ("edvae --batch-size 9", "sq-vae", "vq-ste++"):
        with pytest.raises(
            train_vae.UserError, match="cannot share --batch-size|takes one process"
        ):
            settings(f"--model {model}")


def test_a_closed_pipe_ends_quietly(photos, tmp_path):
    command = [sys.executable, HERE / "train_vae.py", *tiny(photos, tmp_path / "r", "--steps 400")]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command + ["--log-every", "1"], **pipes) as process:
        process.stdout.readline()
        process.stdout.close()  # `| head -1`
        assert process.stderr.read() == "" and process.wait() == 141


def test_help_names_every_flag_and_no_default_that_a_table_decides(capsys):
    with pytest.raises(SystemExit):
        train_vae.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in shown for name in train_vae.SETTINGS)
    assert "(default: 42)" in shown and "150000" not in shown and "(default: None)" not in shown


# ------------------------------------------------------------------------ train_prior.py, sample.py


def pixelsnail(K=7, N=5, **changes):
    args = Namespace(codebook_size=K, map_size=N, width=16, blocks=2, layers=2, dropout=0.0)
    vars(args).update(changes)
    model = train_prior.PixelSNAIL(args).eval()
    for p in model.parameters():  # large enough that a leak would show
        p.data.mul_(1.5)
    return model


def test_logits_see_only_earlier_positions():
    model, codes = pixelsnail(), torch.randint(7, (2, 5, 5))
    want = model(codes)
    for p in range(25):
        changed = codes.clone()
        changed[:, p // 5, p % 5] = (changed[:, p // 5, p % 5] + 1) % 7
        difference = (model(changed) - want).abs().flatten(1, 2).sum((0, 2))  # (N N)
        assert difference[: p + 1].max() == 0
        assert p == 24 or difference[p + 1 :].max() > 0


@pytest.mark.parametrize("K, N, width, blocks", [(7, 5, 16, 2), (30, 8, 32, 1), (3, 1, 16, 1)])
@torch.no_grad()
def test_incremental_logits_are_the_full_networks(K, N, width, blocks):
    model, cache = pixelsnail(K, N, width=width, blocks=blocks).double(), train_prior.Cache(3, N)
    for _ in range(2):  # other maps, in what is left of the first
        codes = torch.randint(K, (3, N, N))
        want = model(codes)
        cache.position.zero_()
        for p in range(N * N):
            difference = model.next_logits(cache) - want[:, p // N, p % N]
            assert difference.abs().max() < 1e-12
            model.write_codes(cache, codes[:, p // N, p % N])


def test_samples_follow_the_model():
    model, n = pixelsnail(K=2, N=2), 4000
    every = torch.tensor([[(m >> p) & 1 for p in range(4)] for m in range(16)]).view(16, 2, 2)
    log_p = model(every).log_softmax(-1).gather(-1, every[..., None]).sum((1, 2, 3))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)  # the chain rule, by brute force
    drawn = (model.sample(n, seed=1).view(n, 4) * torch.tensor([1, 2, 4, 8])).sum(1)
    expected = n * log_p.exp()
    counts = torch.bincount(drawn, minlength=16)
    assert ((counts - expected) ** 2 / expected).sum() < 45  # 15 degrees of freedom, p = 1e-4


def test_a_sample_does_not_depend_on_the_batch(capsys):
    model = pixelsnail()
    seven = model.sample(7, seed=3)
    for batch_size in (1, 4, 1000):
        assert torch.equal(model.sample(7, seed=3, batch_size=batch_size), seven)
    assert "4 of 7 maps\r7 of 7 maps\n" in capsys.readouterr().err
    assert torch.equal(model.sample(2, seed=3, first=5), seven[5:])
    assert not torch.equal(model.sample(7, seed=4), seven)
    given = torch.where(torch.rand(7, 5, 5) < 0.5, torch.randint(7, (7, 5, 5)), -1)
    drawn = model.sample(7, given=given, batch_size=3)
    assert torch.equal(drawn, model.sample(7, given=given))
    assert (drawn == given)[given >= 0].all() and not torch.equal(drawn, model.sample(7))


def test_a_sample_is_of_the_weights_as_they_are():
    model = pixelsnail(dropout=0.5)
    want = model.sample(3)
    with torch.inference_mode():
        assert torch.equal(model.sample(3), want)
        assert torch.equal(copy.deepcopy(model).sample(3), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.sample(3), want)
    assert torch.equal(model.train().sample(3), want) and model.training
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        seeds = [0, 1, 0, 2] * 3
        drawn = [*threads.map(lambda seed: model.sample(3, seed=seed), seeds)]
    assert all(torch.equal(x, drawn[seeds.index(seed)]) for seed, x in zip(seeds, drawn))
    assert torch.equal(drawn[0], want)
    model.head.bias.data.add_(torch.randn(7))
    trained = model.sample(3)
    assert torch.equal(trained, copy.deepcopy(model).sample(3)) and not torch.equal(trained, want)
    for dtype in (torch.float64, torch.bfloat16):
        assert model.to(dtype).sample(3).shape == (3, 5, 5)


def test_sampling_options():
    model = pixelsnail()
    greedy = model.sample(2, top_k=1)
    assert torch.equal(model(greedy).argmax(-1), greedy)
    assert torch.equal(greedy, model.sample(2, temperature=1e-30))
    kept = model.sample(2, top_k=2, given=torch.full((2, 5, 5), -1))
    best_two = model(kept).topk(2).indices
    assert (best_two == kept[..., None]).any(-1).all()
    bad = [dict(temperature=0), dict(top_k=0), dict(batch_size=0)]
    for options in (*bad, dict(given=kept[:, :4]), dict(given=kept + 7)):
        with pytest.raises(ValueError, match="must be"):
            model.sample(2, **options)


def test_recorded_draws_are_the_ordinary_ones_and_leave_nothing(monkeypatch):
    model, made = pixelsnail(), []
    want = model.sample(5, seed=1, batch_size=3)
    tapes = use_tapes(monkeypatch)
    for made_anew in (train_prior.Cache, kernels.Graphed):
        sees(monkeypatch, made_anew, "__init__", lambda self, *_: made.append(weakref.ref(self)))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    gc.disable()
    drawn, left = model.sample(5, seed=1, batch_size=3), [ref() for ref in made]
    gc.enable()
    assert torch.equal(drawn, want) and len(tapes) == 1 and left == [None, None]


def test_the_prior_keeps_its_run_and_its_codes(chain, first_stage):
    lines = log_of(chain / "prior")
    assert [line["step"] for line in lines if "validation" in line] == [3, 6, 9]
    assert lines[-1]["step"] == 9 and lines[-1]["split"] == "test"
    assert lines[-1]["uniform"] == pytest.approx(math.log(12))
    prior = train_prior.load_prior(chain / "prior")
    codes = train_prior.load_codes(chain / "vae", "test", 12)
    assert torch.equal(codes, first_stage.codes)
    nats = -prior(codes).log_softmax(-1).gather(-1, codes[..., None]).mean().item()
    four_times = train_prior.nats_per_code(prior, codes.repeat(4, 1, 1))  # in three batches
    assert four_times == pytest.approx(nats, rel=1e-5)
    assert nats < math.log(12) - 0.1  # it learns
    assert nats == pytest.approx(lines[-1]["prior_nats_per_code"], rel=1e-4)


@pytest.mark.filterwarnings("ignore:User provided device_type")
def test_recorded_steps_of_a_prior_are_the_ordinary_ones(chain, tmp_path, monkeypatch):
    tapes, told, flags = use_tapes(monkeypatch), [], ["--dropout", 0, "--device", "cuda"]
    note = lambda *_, capturable, **more: told.append(capturable)  # noqa: E731
    with monkeypatch.context() as patched, OnTheCPU():
        patched.setattr(train_prior, "prepare_device", lambda *_: ("cuda:0", "fp32"))
        patched.setattr(torch.cuda, "get_device_name", lambda device: "none")
        sees(patched, torch.optim, "AdamW", note)
        for how in ("--no-compile", "--compile"):
            train_prior.main(prior_arguments(chain / "vae", tmp_path / how, *flags, how))
    assert told == [False, True] and len(tapes) == 1
    a, b = checkpoint(tmp_path / "--no-compile"), checkpoint(tmp_path / "--compile")
    assert all(same(a[name], b[name]) for name in ("model", "ema", "best"))
    assert log_of(tmp_path / "--no-compile") == log_of(tmp_path / "--compile")


def test_weights_decay_only_where_their_scale_does_not_count(chain, tmp_path, monkeypatch):
    """Weight norm's directions decay; gains, biases and the embedding do not."""
    groups, models, codes = [], [], torch.randint(12, (2, 4, 4))
    sees(monkeypatch, torch.optim, "AdamW", lambda given, **_: groups.extend(given))
    sees(monkeypatch, train_prior.PixelSNAIL, "forward", lambda model, _: models.append(model))
    train_prior.main(prior_arguments(chain / "vae", tmp_path / "r", "--steps", 1))
    model = models[0].eval()
    want = model(codes)
    assert [group["weight_decay"] for group in groups] == [0.01, 0]
    assert sum(len(group["params"]) for group in groups) == len([*model.parameters()])
    for group in groups:
        for p in group["params"]:
            p.data.mul_(2)
            unchanged = torch.allclose(model(codes), want, atol=1e-5)
            p.data.div_(2)
            assert unchanged == (group["weight_decay"] > 0)


def test_a_prior_is_judged_by_maps_that_it_was_not_trained_on(chain, tmp_path, monkeypatch):
    maps, judged, fitted = torch.randint(12, (50, 4, 4)), [], []
    fit = lambda self, codes: self.training and fitted.extend(codes)  # noqa: E731
    monkeypatch.setattr(train_prior, "load_codes", lambda *a: maps)
    sees(monkeypatch, train_prior, "nats_per_code", lambda model, codes: judged.append(codes))
    sees(monkeypatch, train_prior.PixelSNAIL, "forward", fit)
    train_prior.main(prior_arguments(chain / "vae", tmp_path / "r", "--eval-every", 20))
    held_out, test = judged
    seen = torch.stack(fitted).unique(dim=0)
    assert torch.equal(test, maps) and len(held_out) == 2 and len(seen) == 48
    assert torch.equal(torch.cat([held_out, seen]).unique(dim=0), maps.unique(dim=0))
    p = torch.bincount(seen.flatten(), minlength=12) / seen.numel()
    unigram = -p.log()[maps].mean().item()
    assert log_of(tmp_path / "r")[-1]["unigram"] == pytest.approx(unigram, rel=1e-5)


def test_a_prior_killed_after_a_checkpoint_ends_with_the_same_bits(chain, tmp_path, monkeypatch):
    whole, cut = chain / "prior", tmp_path / "cut"
    with monkeypatch.context() as patched:
        copy_run_at(patched, 4, cut)  # of 9; evaluations are at 3, 6 and 9
        train_prior.main(prior_arguments(chain / "vae", tmp_path / "r"))
    assert checkpoint(cut)["step"] == log_of(cut)[-1]["step"] == 4
    resume = ["--vae", str(chain / "vae"), "--out", str(cut), "--resume", *DEVICE_FLAGS]
    train_prior.main(resume)
    a, b = checkpoint(cut), checkpoint(whole)
    assert all(same(a[name], b[name]) for name in ("step", "model", "ema", "best", "best_nats"))
    assert same(a["optimizer"]["state"], b["optimizer"]["state"])
    assert "is finished" in refused(train_prior.main, *resume)
    assert log_of(cut) == log_of(whole)


def test_a_prior_that_is_not_finite_keeps_its_checkpoint(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(train_vae.Run, "SAVE_SECONDS", 0)
    values = iter([0, 0, 0, 0, math.nan, 0])
    spoil = lambda self, _: self.training and self.head.bias.data.add_(next(values))  # noqa: E731
    sees(monkeypatch, train_prior.PixelSNAIL, "forward", spoil)
    with pytest.raises(SystemExit) as e:
        train_prior.main(prior_arguments(chain / "vae", tmp_path / "r", "--log-every", 2))
    assert re.search("after step 4 .* not finite; .*is from step 4", e.value.code)
    assert checkpoint(tmp_path / "r")["step"] == 4


def test_the_best_average_is_kept(chain, tmp_path, monkeypatch):
    scripted = iter([3.0, 2.0, 4.0, 4.0, 9.0])  # validation at steps 1 to 4, then the test split
    monkeypatch.setattr(train_prior, "nats_per_code", lambda *a: next(scripted))
    copy_run_at(monkeypatch, 2, tmp_path / "two")
    more = ["--eval-every", 1, "--steps", 4, "--ema", 0]
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


def test_a_moved_prior_finds_its_first_stage(chain, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(chain / "vae", tmp_path / "one" / "v")
    train_prior.main(prior_arguments(tmp_path / "one" / "v", tmp_path / "one" / "p", "--steps", 1))
    (tmp_path / "one").rename(tmp_path / "two")
    draw = ["-n", "1", "--device", "cpu", "--out", "~/x.png", "--prior"]
    sample.main([*draw, "~/two/p"])
    assert (tmp_path / "x.png").stat().st_size and train_prior.load_prior("~/two/p")
    resumed, _ = train_prior.settings(["--out", str(tmp_path / "two" / "p"), "--resume"])
    assert (resumed.vae, resumed.steps) == (str(tmp_path / "two" / "v"), 1)  # as they were
    shutil.move(tmp_path / "two" / "p", tmp_path / "alone")
    assert "is not there; name it by --vae" in refused(sample.main, *draw, "~/alone")
    sample.main([*draw, "~/alone", "--vae", "~/two/v"])


def test_a_first_stage_on_another_drive_keeps_its_absolute_path(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "relpath", MagicMock(side_effect=ValueError))
    train_prior.main(prior_arguments(chain / "vae", tmp_path / "r", "--steps", 1))
    assert train_prior.load_prior(tmp_path / "r").args.vae == chain / "vae"


def test_a_prior_does_not_decode_by_another_first_stage(chain, tmp_path):
    shutil.copytree(chain / "vae", tmp_path / "vae")
    state = checkpoint(tmp_path / "vae")
    state["model"]["quantizer.codebook"] += 1
    torch.save(state, tmp_path / "vae" / "ckpt.pt")
    wrong = "--vae", tmp_path / "vae", *DEVICE_FLAGS
    resume = "--out", chain / "prior", "--resume"
    assert "is not the checkpoint" in refused(sample.main, "--prior", chain / "prior", *wrong)
    assert "is not the checkpoint" in refused(train_prior.main, *resume, *wrong)


def test_codes_are_kept_by_checkpoint_and_images(chain, photos, tmp_path, monkeypatch, capsys):
    shutil.copytree(chain / "vae", tmp_path / "vae")
    other = folder_of_images(tmp_path / "other", 60, 1)
    encoded = []
    sees(monkeypatch, train_vae.VAE, "encode", lambda self, x: encoded.append(x))

    def codes(data_dir, vae=tmp_path / "vae"):
        encoded.clear()
        return train_prior.load_codes(vae, "train", 12, data_dir)

    one, two = codes(photos), codes(other)
    assert len(one) == len(two) == 54 and not torch.equal(one, two)
    assert torch.equal(codes(photos), one) and torch.equal(codes(other), two) and not encoded
    state = checkpoint(tmp_path / "vae")
    state["model"]["encoder.head.bias"] += torch.linspace(-1, 1, 12)
    torch.save(state, tmp_path / "vae" / "ckpt.pt")
    assert not torch.equal(codes(photos), one) and encoded  # other weights, other codes

    shutil.copy(chain / "vae" / "ckpt.pt", tmp_path / "vae.pt")  # a file stands for a run
    monkeypatch.setattr(os, "replace", MagicMock(side_effect=OSError(30, "Read-only file system")))
    assert torch.equal(codes(photos, tmp_path / "vae.pt"), one) and encoded
    assert "not kept" in capsys.readouterr().out and not list(tmp_path.glob("*codes*"))


def test_sample_saves_images_and_a_grid(chain, tmp_path):
    prior = ["--prior", str(chain / "prior"), "-n", "6", "--device", "cpu"]
    left_over = dict(WORLD_SIZE="2", RANK="")  # of a torchrun: nothing to it
    save_images = "--save-images", tmp_path / "a", "--batch-size", 4
    run(HERE / "sample.py", *prior, *save_images, **left_over)
    sample.main([*prior, "--out", str(tmp_path / "grid.png")])
    files = sorted((tmp_path / "a").iterdir())
    images = np.stack([np.asarray(Image.open(f)) for f in files])
    assert np.array_equal(tiles_of(tmp_path / "grid.png", 16).reshape(-1, 16, 16, 3), images)


def test_sample_reconstructs_and_completes_images(chain, photos, tmp_path):
    many, out = sorted(photos.iterdir())[:30], ["--device", "cpu", "--out", "x.png"]
    sample.main(["--vae", str(chain / "vae"), "--reconstruct", *map(str, many), *out])
    pairs = tiles_of(tmp_path / "x.png", 16, stacked=2)  # (3, 12, 32, 16, 3)
    assert pairs.shape[:2] == (3, 12)
    pairs, vae = pairs.reshape(36, 32, 16, 3), train_vae.load_vae(chain / "vae")
    x = torch.stack([sample.read_image(path, 16) for path in many])
    x_hat = pixels(vae.decode(vae.encode(x))).astype(int)
    assert np.array_equal(pairs[:30, :16], pixels(x)) and (pairs[30:] == 255).all()
    assert np.abs(pairs[:30, 16:] - x_hat).max() <= 1
    complete = ["--complete", str(many[3]), "-n", "6", *out]
    sample.main(["--prior", str(chain / "prior"), *complete])
    (completed,) = tiles_of(tmp_path / "x.png", 16)
    assert np.array_equal(completed[0], pixels(x)[3]) and len(completed) == 8
    assert np.array_equal(completed[1, :8], completed[0, :8]) and (completed[1, 8:] == 255).all()


def test_sample_passes_on_what_it_is_told(chain, photos, monkeypatch):
    told, prior = [], f"--prior {chain / 'prior'} --device cpu -n 2"
    note = lambda _, *options, given, **more: told.append((given, *options, more))  # noqa: E731
    sees(monkeypatch, train_prior.PixelSNAIL, "sample", note)
    sample.main(f"{prior} --temperature 0.5 --top-k 3 --seed 4 --batch-size 1".split())
    assert told.pop() == (None, 2, 0.5, 3, 4, dict(batch_size=1))
    sample.main(f"{prior} --complete {photos / '03.png'}".split())
    codes = train_vae.load_vae(chain / "vae").encode(sample.read_image(photos / "03.png", 16)[None])
    assert (told[0][0][:, :2] == codes[:, :2]).all() and (told[0][0][:, 2:] == -1).all()


def test_sample_without_flags_draws_from_the_shipped_prior(tmp_path, capsys):
    sample.main(["-n", "4", "--device", "cpu"])
    assert "wrote samples.png" in capsys.readouterr().out
    assert tiles_of(tmp_path / "samples.png", 32).shape[:2] == (2, 2)
    prior = train_prior.load_prior(sample.SHIPPED_PRIOR)
    codes = prior.sample(16, seed=1)
    assert len(codes.unique()) > 200  # of 1,024 drawn, of 512
    shuffled = codes[:, torch.randperm(8)][:, :, torch.randperm(8)]
    nats = [train_prior.nats_per_code(prior, maps) for maps in (codes, shuffled)]
    assert nats[0] < nats[1] - 0.5  # it learned which codes stand together


# ------------------------------------------------------------------------------------- evaluate.py


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def evaluated(*arguments):
    """evaluate.py on the CPU, without an error."""
    evaluate.main([*map(str, arguments), "--device", "cpu"])


def measured(run, *arguments):
    """A run's Result."""
    args = evaluate.parser().parse_args([*map(str, (run, *arguments)), "--device", "cpu"])
    return evaluate.measure(run, args, None)


def copy_of(run, folder, change=None):
    """A copy of a run; change(state) alters its checkpoint."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("metrics.json"), dirs_exist_ok=True)
    if change:
        state = checkpoint(folder)
        change(state)
        torch.save(state, folder / "ckpt.pt")
    return folder


def test_paths_begin_in_the_home_folder(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda text: text.replace("~", "/home/me"))
    args = evaluate.parser().parse_args("~/r --inception ~/i --figures ~/f --data-dir ~/d".split())
    paths = [*args.runs, args.inception, args.figures, args.data_dir]
    assert paths == [Path(f"/home/me/{name}") for name in "rifd"]


@torch.no_grad()
def test_inception_pools_differ_from_torchvisions_where_they_should(tmp_path, monkeypatch):
    options = dict(num_classes=1008, aux_logits=False, init_weights=False)
    plain = evaluate.torchvision.models.inception_v3(weights=None, **options).eval()
    torch.save(plain.state_dict(), tmp_path / "weights.pth")
    features = evaluate.InceptionFeatures(tmp_path / "weights.pth")
    widths = {"5b": 192, "5c": 256, "5d": 288} | {f"6{x}": 768 for x in "bcde"} | {"7b": 1280}
    for name, channels in (widths | {"7c": 2048}).items():
        x = torch.rand(1, channels, 8, 8)
        ours, theirs = (getattr(net, f"Mixed_{name}")(x) for net in (features.net, plain))
        difference = (ours - theirs).abs().amax((0, 1))
        assert difference[0].min() > 0  # padding is left out of the mean
        assert (difference[1:-1, 1:-1].max() > 0) == (name == "7c")  # a maximum
    seen, black_and_white = [], torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    sees(monkeypatch, features.net, "forward", seen.append)
    assert features(black_and_white.expand(2, 3, 32, 32)).shape == (2, 2048)
    black, white = seen[0]  # the original network's range, (3, 299, 299)
    assert black.shape == (3, 299, 299) and (black + 1).abs().max() < 1e-5 > (white - 1).abs().max()


def test_moments_of_a_stream():
    x, moments = torch.randn(100, 5) + 3, evaluate.Moments()
    with pytest.raises(train_vae.UserError, match="at least 2 images"):
        moments.read()
    for part in x.split(7):
        moments.add(part)
    mean, cov = moments.read()
    assert np.allclose(mean, x.double().mean(0)) and np.allclose(cov, np.cov(x.double().numpy().T))


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    mu1, mu2 = rng.normal(size=(2, 6))
    c1, c2 = (m @ m.T for m in rng.normal(size=(2, 6, 6)))  # not commuting
    roots = np.sqrt(np.linalg.eigvals(c1 @ c2).real)
    want = ((mu1 - mu2) ** 2).sum() + np.trace(c1 + c2) - 2 * roots.sum()
    assert evaluate.frechet_distance(mu1, c1, mu2, c2) == pytest.approx(want)
    singular = np.outer(mu1, mu1)
    assert abs(evaluate.frechet_distance(mu1, singular, mu1, singular)) < 1e-5


class FewFeatures(torch.nn.Module):
    """In place of Inception, whose 299 x 299 pixels take long: 12 color means, nonlinear."""

    digest = "few"

    def forward(self, images):
        means = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2)
        return means.flatten(1).square()  # (B, 12)


def test_fid_of_a_run_and_of_samples(chain, first_stage, photos, tmp_path, monkeypatch, capsys):
    def fid_between(images, made):
        moments, real = [], torch.from_numpy(images).permute(0, 3, 1, 2)
        for batch in (real, (made * 255).round().byte()):
            f = FewFeatures()(batch).double().numpy()
            moments += [f.mean(0), np.cov(f.T)]
        return evaluate.frechet_distance(*moments)

    monkeypatch.setattr(evaluate, "find_inception", lambda args: FewFeatures())
    runs = [copy_of(chain / name, tmp_path / name) for name in ("vae", "prior")]
    evaluated(*runs, "--fid", "-n", 30)
    out, (of_run, of_prior) = capsys.readouterr().out, map(metrics_of, runs)
    assert of_run["fid_protocol"] in out and of_prior["fid_protocol"] in out
    want = fid_between(first_stage.images, first_stage.x_hat)
    assert of_run["rfid"] == pytest.approx(want, rel=1e-3)
    samples = first_stage.model.decode(train_prior.load_prior(runs[1]).sample(30, seed=0))
    want = fid_between(train_vae.load_images("folder", "train", photos, 16), samples)
    assert of_prior["fid"] == pytest.approx(want, rel=1e-3)


def test_an_fid_is_kept_while_the_checkpoint_and_the_kind_of_codes_stay(chain, tmp_path):
    run = copy_of(chain / "vae", tmp_path / "run")

    def rfid(*arguments):
        evaluated(run, *arguments)
        return metrics_of(run)["rfid"]

    assert rfid() is None
    with_fid = json.dumps(metrics_of(run) | dict(rfid=3.0))
    (run / "metrics.json").write_text(with_fid)
    assert rfid() == 3 and rfid("--codes", "sample") is None
    (run / "metrics.json").write_text(with_fid)
    copy_of(chain / "vae", run, lambda state: state["model"]["quantizer.codebook"].add_(1))
    assert rfid() is None  # another run of as many steps in this folder
    (run / "metrics.json").write_text("{")  # damaged: written anew
    assert rfid() is None and metrics_of(run)["mse"] > 0


@torch.no_grad()
def test_metrics_of_a_run_against_an_independent_computation(chain, first_stage):
    model, x, codes = first_stage.model, first_stage.x, first_stage.codes
    evaluated(chain / "vae", chain / "prior")
    metrics, of_prior = metrics_of(chain / "vae"), metrics_of(chain / "prior")
    alpha = (model.encode_features(x).clamp(max=20).exp() + 1).double()
    Dirichlet, entropy = torch.distributions.Dirichlet, Categorical(alpha).entropy()
    kl = torch.distributions.kl_divergence(Dirichlet(alpha), Dirichlet(torch.ones_like(alpha)))
    x_hat = model.decoder(model.quantizer.codebook[codes].permute(0, 3, 1, 2)) + 0.5
    p = np.bincount(codes.flatten().numpy()) / codes.numel()
    p = p[p > 0]
    wanted = dict(mse=(x_hat - x).square().mean(), perplexity=np.exp(-p @ np.log(p)))
    wanted |= dict(codes_used=len(p), kl=kl.mean(), uncertainty=(12 / alpha.sum(-1)).mean())
    wanted |= dict(entropy_mean=entropy.mean(), entropy_std=entropy.std(correction=0))
    for key, value in wanted.items():
        assert metrics[key] == pytest.approx(float(value), rel=1e-4), key
    missing = {key for key in evaluate.METRICS if metrics[key] is None}
    assert missing == {"fid", "rfid", "prior_nats_per_code", "perplexity_batch128"}  # few images

    prior = train_prior.load_prior(chain / "prior")
    nats = torch.nn.functional.cross_entropy(prior(codes).flatten(0, 2), codes.flatten())
    assert of_prior["prior_nats_per_code"] == pytest.approx(nats.item(), rel=1e-4)
    drawn = train_vae.perplexity(prior.sample(len(x), seed=0).flatten().bincount())
    assert of_prior["perplexity_samples"] == pytest.approx(drawn)  # of as many as the test maps
    assert of_prior["perplexity_data"] == pytest.approx(metrics["perplexity"])


@torch.no_grad()
def test_perplexity_batch128_and_codes_drawn_from_pi(chain, first_stage, tmp_path, monkeypatch):
    for split, count in (("train", 2), ("test", 300)):
        folder_of_images(tmp_path / split, count)
    model, images = first_stage.model, train_vae.load_images("folder", "test", tmp_path, 16)
    x = train_vae.to_float(torch.from_numpy(images))
    full = model.encode(x).split(128)[:2]  # whatever the batch; the last 44 are dropped
    perplexities = [train_vae.perplexity(codes.flatten().bincount()) for codes in full]
    metrics = measured(chain / "vae", "--data-dir", tmp_path).metrics
    assert metrics["perplexity_batch128"] == pytest.approx(sum(perplexities) / 2)

    batches, drawing = [], ("--data-dir", tmp_path, "--codes", "sample")
    sees(monkeypatch, evaluate.Meter, "add", lambda *added: batches.append(added[-1].indices))
    sampled, codes = measured(chain / "vae", *drawing).metrics, torch.cat(batches)
    pi = model.quantizer.probabilities(model.encode_features(x))
    of_drawn = pi.gather(-1, codes[..., None]).sum()  # each from the pi of its position
    assert (of_drawn - pi.square().sum()).abs() < 2.5 * codes.numel() ** 0.5  # five deviations
    mse = (model.decode(codes) - x).square().mean().item()
    assert sampled["mse"] == pytest.approx(mse, rel=1e-5)
    assert measured(chain / "vae", *drawing).metrics == sampled  # by one seed


def test_each_run_that_can_be_measured_is_and_once(chain, tmp_path, capsys):
    names = ["damaged", "odd", "nowhere", "unwritable", "good", "small.pt"]
    damaged, odd, nowhere, unwritable, good, file = runs = [tmp_path / name for name in names]
    copy_of(chain / "vae", damaged).joinpath("ckpt.pt").write_bytes(b"no checkpoint")
    copy_of(chain / "vae", odd, lambda state: state["args"].update(max_logit=None))
    copy_of(chain / "vae", unwritable).joinpath("metrics.json").mkdir()
    shutil.copy(copy_of(chain / "vae", good) / "ckpt.pt", file)
    with pytest.raises(SystemExit) as e:
        evaluated(*runs, good / "ckpt.pt")
    out, err = capsys.readouterr()
    assert e.value.code == 2
    for line, run in zip(err.strip().splitlines(), runs[:4], strict=True):
        assert str(run) in line
    assert [out.count(str(run)) for run in runs] == [0, 0, 0, 1, 1, 1]
    assert metrics_of(good) == json.loads((tmp_path / "small-metrics.json").read_text())


def test_runs_alike_in_all_but_their_seed_are_grouped(chain, photos, tmp_path):
    base = measured(chain / "vae")

    def groups(change):
        """Of the chain's run and of a copy with other settings."""
        return len(evaluate.alike([base, measured(copy_of(chain / "vae", tmp_path / "c", change))]))

    shutil.copytree(photos, tmp_path / "photos")
    assert groups(lambda state: state["args"].update(seed=7)) == 1
    assert groups(lambda state: state["args"].pop("plain")) == 1  # of an earlier version
    assert groups(lambda state: state["args"].update(data_dir=str(tmp_path / "photos"))) == 2
    assert groups(lambda state: state.update(step=12)) == 2  # stopped early


def a_result(name, run, **metrics):
    return evaluate.Result(Path(name), run, dict.fromkeys(evaluate.METRICS) | metrics)


def test_table_has_the_papers_row_and_the_mean_of_seeds():
    run = dict(model="edvae", dataset="cifar10", codebook_size=512, code_dim=16, seed=1)

    def table(*changes):
        """Of runs with these perplexities and other settings."""
        runs = [a_result(f"{x}", run | more, mse=0.004, perplexity=x) for x, more in changes]
        return evaluate.table(runs)

    shown = table((100.0, {}), (104.0, dict(seed=2)))
    for cell in ("4.00", "102.0 +- 2.8", "420.33", "2.99"):
        assert cell in shown
    assert len({len(line) for line in shown.splitlines()}) == 1 and shown.isascii()
    assert "1.07" in table((1.0, dict(model="vqvae-ema", dataset="celeba")))
    assert "paper" not in table((1.0, dict(codebook_size=256)))


def test_labels_are_models_or_else_the_paths_that_tell_runs_apart():
    def labels(*runs):
        return [*evaluate.labels_of([a_result(path, run) for path, run in runs]).values()]

    edvae, dvae = dict(model="edvae", seed=1), dict(model="dvae", seed=1)
    seeds = ("/r/a", edvae), ("/r/b", edvae | dict(seed=2))
    assert labels(*seeds, ("/r/c", dvae)) == ["edvae", "edvae", "dvae"]
    assert labels(*seeds) == ["a", "b"]
    assert labels(("/r/x/run", edvae), ("/r/y/run", edvae)) == ["x/run", "y/run"]
    assert labels(("/r/_a", edvae), ("/r/a$b$", edvae)) == ["\u200b_a", r"a\$b\$"]  # no markup


@pytest.fixture
def drawn(monkeypatch):
    """The figures that evaluate.py makes, by name, as matplotlib's objects."""
    pytest.importorskip("matplotlib")
    figures = {}
    sees(monkeypatch, evaluate.Figures, "save", lambda *of: figures.update({of[3]: of[1]}))
    return figures


def curves_of(axis):
    return {line.get_label(): line.get_xydata() for line in axis.lines}


def test_figures_show_what_was_logged_and_measured(chain, first_stage, tmp_path, drawn, capsys):
    import matplotlib

    before, folder = dict(matplotlib.rcParams), tmp_path / "figures"
    other = copy_of(chain / "vae", tmp_path / "b", lambda state: state["args"].update(beta=1))
    (other / "log.jsonl").unlink()
    evaluated(chain / "vae", other, chain / "prior", "--figures", folder)
    assert dict(matplotlib.rcParams) == before  # a notebook's
    out, err = capsys.readouterr()
    names = "entropy-maps entropy-uncertainty reconstructions sweep-beta training".split()
    assert sorted(path.stem for path in folder.iterdir()) == names
    assert out.count("wrote ") == len(names)  # each once
    assert f"{other}: no curves" in err

    log = log_of(chain / "vae")
    tests, steps = [x for x in log if "split" in x], [x for x in log if "split" not in x]
    entropy, uncertainty, _ = drawn["entropy-uncertainty"].axes
    shown = [*drawn["training"].axes, entropy, uncertainty]
    keys = ("perplexity", "mse", "entropy_mean", "uncertainty")
    for axis, key, lines in zip(shown, keys, (tests, tests, steps, steps)):
        want = [(x["step"], x[key] * (1000 if key == "mse" else 1)) for x in lines]
        assert np.allclose(curves_of(axis)["vae"], want)
    top = entropy.collections[0].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(max(x["entropy_mean"] + x["entropy_std"] for x in steps))
    entropy_map = drawn["entropy-maps"].axes[-1].images[0].get_array()
    assert np.allclose(entropy_map, tests[-1]["entropy_map"])

    x, x_hat, axes = first_stage.x[:10], first_stage.x_hat[:10], drawn["reconstructions"].axes
    rows = np.stack([axis.images[0].get_array() for axis in axes]).reshape(3, len(x), 16, 16, 3)
    assert np.allclose(rows[:2], torch.stack([x, x_hat]).permute(0, 1, 3, 4, 2), atol=1e-5)
    assert f"{1000 * (x_hat - x).square().mean():.1f}" in axes[len(x)].get_ylabel()


def test_figures_of_several_models_seeds_and_settings(tmp_path, drawn):
    figures = evaluate.Figures(tmp_path)
    paper = dict(dataset="cifar10", model="edvae", width=8, codebook_size=512, code_dim=16, seed=1)
    log = [dict(step=i, split="test", perplexity=300 + i, mse=4e-3 - 1e-5 * i) for i in range(9)]
    changes = {}, dict(seed=2), dict(model="dvae"), dict(model="sq-vae")
    runs = [a_result(f"{i}", paper | change) for i, change in enumerate(changes)]
    figures.labels = evaluate.labels_of(runs)
    figures.colors = {"edvae": "C0", "dvae": "C1", "sq-vae": "C2"}
    figures.logs = dict.fromkeys((r.path for r in runs[:3]), log) | {runs[3].path: []}
    figures.curves("training", runs, evaluate.TEST_CURVES, test=True)
    for axis, levels in zip(drawn["training"].axes, ({420.33, 190.33}, {2.99, 3.42})):
        dashed = [x.get_ydata() for x in axis.lines if x.get_linestyle() == "--"]
        assert {y[0] for y in dashed if len(y)} == levels  # of the models that have curves
    (legend,) = drawn["training"].legends
    assert [text.get_text() for text in legend.get_texts()][:2] == ["edvae", "dvae"]  # once each

    def sweep(settings):
        numbers = zip(settings, (5.0, 3.0, 7.0) * 2)
        results = [a_result("r", s, perplexity=x, mse=x / 1000) for s, x in numbers]
        figures.sweep("codebook_size", results)
        return [curves_of(axis) for axis in drawn["sweep-codebook-size"].axes]

    settings = [paper | dict(codebook_size=K, seed=seed) for K, seed in ((8, 1), (4, 1), (8, 2))]
    others = [s | dict(model="dvae", width=16) for s in settings]  # only the model names it
    perplexity, mse = sweep(settings + others)
    assert perplexity.keys() == {"edvae", "dvae", "all codes alike"}
    assert perplexity["edvae"].tolist() == [[0, 3], [1, 6]] == mse["dvae"].tolist()
    assert perplexity["all codes alike"].tolist() == [[0, 4], [1, 8]]
    perplexity, _ = sweep(settings + [s | dict(width=16) for s in settings])
    assert perplexity.keys() == {"width 8", "width 16", "all codes alike"}


def test_figures_without_matplotlib_are_refused_before_the_work(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "measure", None)  # not reached
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = refused(evaluate.main, chain / "vae", "--figures", tmp_path / "f")
    assert "pip install matplotlib" in said


def test_uncertainty_script_against_brute_force(chain, first_stage, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    script = runpy.run_path(str(HERE / "assets" / "uncertainty.py"))

    def ranks(x):
        x = x.flatten()
        return [(x < v).sum().item() + ((x == v).sum().item() + 1) / 2 for v in x]

    scores = torch.randint(0, 9, (5, 2, 4, 4)).float()  # with ties
    of_u, _, _, contrast, error = map(ranks, scores)
    line = np.stack([contrast, np.ones(len(error))], 1)  # what contrast explains is taken away
    rests = [y - line @ np.linalg.lstsq(line, np.array(y), rcond=None)[0] for y in (of_u, error)]
    wanted = [np.corrcoef(of_u, error)[0, 1], np.corrcoef(*rests)[0, 1]]
    assert [r[0].item() for r in script["correlations"](scores)] == pytest.approx(wanted)
    usual, foreign = scores[:2].flatten(1)
    wins = (foreign[:, None] > usual).double() + (foreign[:, None] == usual).double() / 2
    assert script["auroc"](usual, foreign) == pytest.approx(wins.mean().item())

    runs = str(chain / "vae"), str(chain / "prior")
    script["main"]([*runs, "--figures", str(tmp_path), "--images", "2"])
    assert {path.name for path in tmp_path.glob("*.png")} == {"scores-1-vae.png", "redraw.png"}
    redrawn = [json.loads(x) for x in capsys.readouterr().out.splitlines() if x[:1] == "{"]
    own = [x["mse"] for x in redrawn if x["share"] == 0]  # of the model's own codes
    mse = (first_stage.x_hat - first_stage.x)[:2].square().mean().item()
    assert own == pytest.approx([mse] * 6, rel=1e-4)


# ------------------------------------------------------------------------- bad input, and README

SCRIPTS = dict(vae=train_vae, prior=train_prior, sample=sample, evaluate=evaluate)
BAD = {  # a script's arguments, and what the one line says
    "vae --dataset mnist": "invalid choice",
    "vae --steps 0": "--steps 0 is not in 1 to",
    "vae --steps 1e9": "invalid int value",
    "vae --lr nan": "--lr nan is not in 0 to",
    "vae --width 6": "multiples of 4",
    "vae --codebook-size 20000": "--codebook-size 20000 is not in 2 to 16384",
    "vae --seed=-1": "--seed -1 is not in",
    "vae --device mps": "--device mps is not supported",
    "vae --device cuda:99": "--device cuda:99 is not there",
    "vae --nonsense": "unrecognized",
    "vae --model dvae --plain": "--plain is for edvae",
    "vae --resume": "needs --out",
    "vae --out {vae} --resume": "is finished",
    "vae --out {vae}": "already holds a run",
    "vae --out {vae} --resume --beta 0.5": "--beta 0.5 contradicts",
    "vae --out {stripped} --resume": "is of another model or version",
    "vae --out {damaged} --resume": "is not a whole checkpoint",
    "vae --out {flipped} --resume": "is not a whole checkpoint",
    "vae --out {foreign} --resume": "of --model pasted, which this train_vae.py does not have",
    "vae --out {prior} --resume": "is not a run of train_vae.py, but of train_prior.py",
    "vae --dataset cifar10 --data-dir {empty}": "no network; put cifar-10-python.tar.gz there",
    "vae --dataset celeba --data-dir {empty}": "no network; put the aligned images",
    "vae --dataset cifar10 --data-dir {foreign}": "cifar10-train-32.npy is damaged",
    "vae --dataset folder --data-dir {empty}": "too few images (0)",
    "vae --dataset folder --data-dir {broken}": "left out 9 of 9 images: cannot read",
    "vae --dataset folder --data-dir {photos} --out {text}": "text: File exists",
    "prior": "--vae is required",
    "prior --vae /nowhere": "is not there",
    "prior --vae {prior}": "is not a run of train_vae.py",
    "prior --vae {vae} --width 24": "multiple of 16",
    "prior --vae {vae} --dropout 1": "--dropout 1.0 is not in 0 to 0.99",
    "prior --vae {vae} --out {prior} --resume --layers 7": "contradicts",
    "sample --vae {vae}": "needs --prior",
    "sample --prior {vae}": "is not a run of train_prior.py",
    "sample --vae {vae} --reconstruct {text}": "cannot read",
    "sample --prior {prior} -n 0": "must be 1 or more",
    "sample --prior {prior} --temperature nan": "nan",
    "sample --prior {prior} --complete a.png --save-images b": "not allowed with",
    "sample --prior {prior} --save-images {vae}": "is not empty; name a new folder",
    "sample --prior {prior} --complete /nowhere.png": "cannot read /nowhere.png",
    "sample --prior {prior} --out x.nonsense": "name a .png or .jpg",
    "sample --prior {prior} --out x.png -n 100000": "--save-images writes each",
    "evaluate": "required",
    "evaluate {damaged}": "is not a whole checkpoint",
    "evaluate {vae} --data-dir {text}": "too few images (0)",
    "evaluate {vae} --figures {text}/f": "cannot be written to",
    "evaluate {vae} --fid -n 1": "too few",
    "evaluate {vae} --fid": "could not be downloaded",
    "evaluate {vae} --fid --inception {text}": "does not hold the 2015 Inception",
}


@pytest.fixture(scope="session")
def places(chain, photos, tmp_path_factory):
    """Folders and files for the commands above, most of them spoilt."""
    top, vae, places = tmp_path_factory.mktemp("bad"), chain / "vae", {}
    for name in ("empty", "broken", "foreign", "damaged", "flipped", "stripped"):
        places[name] = top / name
        places[name].mkdir()
    (top / "text").write_text("not an image")
    for i in range(10):
        (top / "broken" / f"{i}.png").write_bytes(b"\x89PNG not really")
    (top / "foreign" / "cifar10-train-32.npy").write_bytes(b"not numpy")
    whole, state = (vae / "ckpt.pt").read_bytes(), checkpoint(vae)
    (top / "damaged" / "ckpt.pt").write_bytes(whole[:5000])
    flipped = bytearray(whole)
    flipped[flipped.index(state["model"]["quantizer.codebook"].numpy().tobytes())] ^= 1  # a weight
    (top / "flipped" / "ckpt.pt").write_bytes(flipped)
    del state["optimizer"]
    torch.save(state, top / "stripped" / "ckpt.pt")
    state["args"]["model"] = "pasted"
    torch.save(state, top / "foreign" / "ckpt.pt")
    return places | dict(photos=photos, vae=vae, prior=chain / "prior", text=top / "text")


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No network, and another home: nothing is downloaded or kept."""
    fail = MagicMock(side_effect=OSError("no network"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", fail)
    monkeypatch.setattr("torchvision.datasets.CelebA.download", fail)
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)


@pytest.mark.parametrize("command", BAD)
def test_bad_input_gets_one_clear_line_and_code_2(command, places, no_network):
    script, *argv = command.format(**places).split(" ")
    assert BAD[command] in refused(SCRIPTS[script].main, *argv)


def ends_well(main, argv):
    """A call that returns, or ends with code 2 or an error that main() makes of it."""
    try:
        main([*map(str, argv)])
    except SystemExit as e:
        assert e.code == 2, argv
    except (train_vae.UserError, OSError):
        pass


@pytest.mark.parametrize("script", [train_vae, train_prior])
def test_odd_values_of_flags_find_no_traceback(script, chain, capsys):
    odd = "0 -1 7 nan 1e400 1e-300 x /proc/nowhere cuda:99 é -0 1_000 ../.. --".split()
    first = [] if script is train_vae else ["--vae", chain / "vae"]
    for name in script.SETTINGS:
        for value in [*odd, "", "9" * 30]:
            ends_well(script.settings, [*first, f"--{name.replace('_', '-')}", value])


def test_damaged_run_folders_find_no_traceback(chain, tmp_path, capsys):
    rng = np.random.default_rng(int(os.environ.get("FUZZ", 1)))  # FUZZ=2: another trial
    for case in range(40):
        vae, prior = tmp_path / str(case) / "vae", tmp_path / str(case) / "prior"
        shutil.copytree(chain, tmp_path / str(case), ignore=shutil.ignore_patterns("*.png"))
        files = sorted(f for f in rng.choice([vae, prior]).iterdir() if f.is_file())
        path = files[rng.integers(len(files))]
        whole, flipped = path.read_bytes(), bytearray(path.read_bytes())
        for i in rng.integers(0, len(whole), rng.integers(1, 50)):
            flipped[i] ^= int(rng.integers(1, 256))
        cut = whole[: rng.integers(len(whole))]
        path.write_bytes([flipped, b"", rng.bytes(1000), cut, whole + b"\0\xff\n"][case % 5])
        script, argv = [
            (train_vae, ["--out", vae, "--resume"]),
            (train_prior, prior_arguments(vae, prior, "--resume")),
            (sample, ["--prior", prior, "--vae", vae, "-n", 1, "--out", tmp_path / "s.png"]),
            (evaluate, [vae, prior]),
        ][rng.integers(4)]
        ends_well(script.main, argv)


README, RESULTS = HERE / "README.md", HERE / "assets" / "results.md"


def python_blocks(document, words):
    """A document's blocks of Python that hold these words."""
    blocks = re.findall(r"```python\n(.*?)```", document.read_text(), re.S)
    return [block for block in blocks if words in block]


def test_readmes_loss_in_another_model_has_gradients():
    (code,) = python_blocks(README, "evidential_quantize(")
    encoder, decoder = torch.nn.Linear(6, 512), torch.nn.Linear(16, 6)
    names = dict(encoder=encoder, decoder=decoder, x=torch.rand(2, 3, 3, 6), step=3)
    exec(code, names)
    names["loss"].backward()
    assert all(p.grad.any() for p in (names["codebook"], encoder.weight, decoder.weight))


def test_readmes_tokenizer_encodes_and_decodes(monkeypatch):
    (code,) = python_blocks(README, "vae.encode(")
    monkeypatch.chdir(HERE)
    names = dict(x=torch.rand(2, 3, 32, 32))
    exec(code, names)
    shapes = {value.shape for value in names.values() if isinstance(value, torch.Tensor)}
    assert shapes == {(2, 3, 32, 32), (2, 8, 8)}


def changes():
    """The classes of README and of assets/quantizers.py that may stand above `class VAE`."""
    text = "\n".join(python_blocks(README, "QUANTIZERS["))
    text += (HERE / "assets" / "quantizers.py").read_text()
    return re.findall(r'^class \w+\(.*?^QUANTIZERS\["[\w-]+"\] = \w+\n', text, re.S | re.M)


@pytest.mark.parametrize("code", changes(), ids=lambda code: code.split("(")[0])
def test_changes_of_the_documents_run_as_they_stand(code, photos, tmp_path):
    source = (HERE / "train_vae.py").read_text()
    assert source.count("\n\nclass VAE(") == 1
    changed = source.replace("\n\nclass VAE(", f"\n\n{code}\n\nclass VAE(")
    (tmp_path / "changed.py").write_text(changed)
    spec = importlib.util.spec_from_file_location("changed", tmp_path / "changed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = re.search(r'QUANTIZERS\["(.+?)"\]', code)[1]
    assert model == module.QUANTIZERS[model].name
    flags = "--steps 3 --log-every 1 --codebook-size 16 --preset cpu --model"  # FSQ's: a 4th power
    module.main(tiny(photos, tmp_path / "r", flags, model))
    assert all(math.isfinite(line["loss"]) for line in log_of(tmp_path / "r"))
    assert module.load_vae(tmp_path / "r").decode(torch.zeros(1, 4, 4).int()).shape == (
        1,
        3,
        16,
        16,
    )


def test_readmes_and_assets_have_three_changes():
    assert len(changes()) >= 3


@pytest.mark.parametrize(
    "model, row, mse, codes",
    [("edvae", "| **EdVAE** |", 7.484e-3, 149), ("dvae", "| dVAE |", 9.272e-3, 106)],
)
def test_the_shipped_models_are_those_of_the_table(model, row, mse, codes):
    """Against stored values: of 8 generated images, and what README says of all test images."""
    net = train_vae.load_vae(HERE / "assets" / model)
    x = train_vae.to_float(torch.from_numpy(train_vae.draw_shapes(8, 32, np.random.default_rng(0))))
    indices = net.encode(x)
    assert (net.decode(indices) - x).square().mean().item() == pytest.approx(mse, rel=0.01)
    assert abs(len(indices.unique()) - codes) <= 2  # another CPU may round a tie in another way
    metrics = json.loads((HERE / "assets" / model / "metrics.json").read_text())
    shown = next(line for line in README.read_text().splitlines() if line.startswith(row))
    values = f"{1000 * metrics['mse']:.2f}", f"{metrics['perplexity_batch128']:.0f}"
    cells = {cell.strip(" |") for cell in shown.replace("*", "").split(" | ")}
    assert {*values, str(metrics["codes_used"])} <= cells


def test_every_file_that_a_document_names_is_tracked_and_every_asset_named():
    listed = subprocess.run(["git", "-C", HERE, "ls-files"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a clone")
    tracked = listed.stdout.splitlines()
    texts = {path: path.read_text() for path in (README, RESULTS, *HERE.glob("*.py"))}
    for document in (README, RESULTS):
        for link in re.findall(r"\]\(([^)#\s]+)", texts[document]):
            if not link.startswith("http"):
                path = (document.parent / link).resolve().relative_to(HERE.resolve())
                assert str(path) in tracked, link
    for path in (Path(name) for name in tracked if name.startswith("assets/")):
        of_a_run = path.parent.name != "assets"  # then its folder is named
        name = path.parent.name if of_a_run else path.name
        assert any(name in text for text in texts.values()), f"{path} is named nowhere"
