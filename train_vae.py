"""Stage 1: train a discrete VAE: EdVAE (Baykal, Kandemir, Unal 2024) or one of five baselines.

    python train_vae.py                                  # generated shapes, a minute on two cores
    python train_vae.py --dataset cifar10                # 35,000 steps; without a GPU 3,000, narrow
    python train_vae.py --dataset cifar10 --model dvae   # one of the baselines
    python train_vae.py --dataset folder --data-dir photos --size 64       # your own images
    torchrun --standalone --nproc_per_node=4 train_vae.py --dataset cifar10     # four processes

From pixels to pixels, for B square images, N = H / 4, and K codes of D numbers:

    x        (B, 3, H, W)   pixels in [0, 1]
    z_e      (B, N, N, K)   Encoder(x - 1/2): a logit for each position and code
    alpha    (B, N, N, K)   exp(min(z_e, c)) + 1: a Dirichlet over code probabilities    Eq. 2
    pi       (B, N, N, K)   alpha / S, its mean; dVAE: softmax(z_e)                      App. B
    z        (B, N, N, K)   training: RelaxedOneHotCategorical(tau, pi) sample           Alg. 1
                            at test time: the argmax, a hard code
    z_q      (B, N, N, D)   z M, a mixture of rows of the codebook M (K, D)
    x_hat    (B, 3, H, W)   Decoder(z_q) + 1/2
    loss = mean (x_hat - x)^2 + beta mean KL[Dir(alpha) || Dir(1, ..., 1)]               Eq. 8

c is --max-logit, S = sum_k alpha_k; tau and beta are functions of the step: `schedules`.

Where the paper's text and the authors' code differ, this file does what produced the paper's
numbers: pi is the mean and not a Dirichlet sample, the hard code is the argmax, beta weighs means
over positions, blocks are bottlenecks scaled by 1/36, and "cosine annealing" is the quarter cosine
below. The bottleneck, from logits to alpha, z_q and KL, is in kernels.py: `log_alpha`,
`relaxed_sample`, `kl_rows`.

In order: networks, quantizers, the model, settings, schedules, measures, the training loop. There
the method ends; the rest is plumbing.
"""

import argparse
import contextlib
import ctypes
import datetime
import functools
import hashlib
import io
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
import time
import zipfile
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor, nn

import kernels


# ---------------------------------------------------------------------------------------- networks


def upsample(x: Tensor) -> Tensor:
    """Each pixel four times: (B, C, N, N) to (B, C, 2N, 2N), channels last in memory."""
    if not x.is_cuda:
        return F.interpolate(x, scale_factor=2)
    B, C, H, W = x.shape  # the backward of interpolate would add atomically
    x = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(B, H, 2, W, 2, C)
    return x.reshape(B, 2 * H, 2 * W, C).permute(0, 3, 1, 2)


class Block(nn.Module):
    """x + res(x) / 36: four ReLU-convolution pairs, three of them n_out / 4 channels wide.

    1/36 is the authors' gain, 1 / blocks^2 for six blocks; the paper's text has plain residuals.
    Here it scales the last convolution's weights, which saves a pass over the activations. Under
    autocast the sum is fp32: bf16 would round the small branch away.

    enlarge: x is enlarged first, (B, n_in, N, N) to (B, n_out, 2N, 2N). The first convolutions are
    then 1x1: they commute with it, and run before it at a quarter of the cost.
    """

    def __init__(self, n_in: int, n_out: int, kernel_sizes: tuple[int, ...], enlarge=False):
        super().__init__()
        self.up = upsample if enlarge else nn.Identity()
        n = n_out // 4
        channels = zip((n_in, n, n, n), (n, n, n, n_out), kernel_sizes)
        self.id = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.res = nn.ModuleList(nn.Conv2d(i, o, k, padding=k // 2) for i, o, k in channels)

    def forward(self, x: Tensor) -> Tensor:
        first, *middle, last = self.res
        h = self.up(first(F.relu(x)))
        for conv in middle:
            h = conv(F.relu(h))
        h = F.conv2d(F.relu(h), last.weight / 36, last.bias / 36, padding=last.padding)
        return self.up(self.id(x).float()) + h


class Encoder(nn.Module):
    """Images minus 1/2, (B, 3, H, W), to logits (B, K, N, N). Paper App. D, Table D.4."""

    def __init__(self, width: int = 128, codebook_size: int = 512, first_kernel: int = 3):
        super().__init__()
        n, k = width, (3, 3, 3, 1)
        self.body = nn.Sequential(
            nn.Conv2d(3, n, first_kernel, padding=first_kernel // 2),  # (B, n, H, W)
            Block(n, n, k),
            Block(n, n, k),
            nn.MaxPool2d(2),  # (B, n, H/2, W/2)
            Block(n, 2 * n, k),
            Block(2 * n, 2 * n, k),  # (B, 2n, H/2, W/2)
            nn.MaxPool2d(2),  # (B, 2n, N, N)
            Block(2 * n, 4 * n, k),
            Block(4 * n, 4 * n, k),  # (B, 4n, N, N)
            nn.ReLU(),
        )
        self.head = nn.Conv2d(4 * n, codebook_size, 1)  # (B, K, N, N)
        self.apply(authors_init)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        # In fp32: in bf16 many logits would tie, and the argmax would always take the first.
        with torch.autocast(h.device.type, enabled=False):
            h = h.float()
            if not h.is_cuda:
                return self.head(h)
            # As a matrix product: cuDNN's fp32 convolution is slower.
            h = h.permute(0, 2, 3, 1)  # (B, N, N, 4n)
            logits = F.linear(h, self.head.weight.flatten(1), self.head.bias)  # (B, N, N, K)
            return logits.permute(0, 3, 1, 2)


class Decoder(nn.Sequential):
    """Quantized latents (B, D, N, N) to images minus 1/2, (B, 3, 4N, 4N); linear output."""

    def __init__(self, width: int = 128, code_dim: int = 16):
        n, k = width, (1, 3, 3, 3)
        super().__init__(
            Block(code_dim, 4 * n, k),
            Block(4 * n, 4 * n, k),  # (B, 4n, N, N)
            Block(4 * n, 2 * n, k, enlarge=True),  # (B, 2n, 2N, 2N)
            Block(2 * n, 2 * n, k),
            Block(2 * n, n, k, enlarge=True),  # (B, n, 4N, 4N)
            Block(n, n, k),
            nn.ReLU(),
            nn.Conv2d(n, 3, 1),  # (B, 3, 4N, 4N)
        )
        self.apply(authors_init)


def authors_init(module: nn.Module):
    """Weights around 0, batch norms' around 1, with deviation 0.02; biases PyTorch's default."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0, 0.02)
    if isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)


@torch.no_grad()
def he_init(encoder: Encoder, decoder: Decoder):
    """He et al. 2015, so that the image reaches the logits; reconstructions start near gray."""
    for module in [*encoder.modules(), *decoder.modules()]:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    nn.init.normal_(encoder.head.weight, 0, encoder.head.in_channels**-0.5)  # fan-in^-1/2
    decoder[-1].weight.mul_(0.1)


class Residual(nn.Module):
    """x + (ReLU, 3x3, ReLU, 1x1)(x), with batch norm after each convolution or without."""

    def __init__(self, n: int, norm: bool):
        super().__init__()
        Norm = nn.BatchNorm2d if norm else nn.Identity
        self.res = nn.Sequential(
            nn.ReLU(),  # not in place: it would change x
            nn.Conv2d(n, n, 3, padding=1),
            Norm(n),
            nn.ReLU(),
            nn.Conv2d(n, n, 1),
            Norm(n),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.res(x)


def vq_encoder(n: int, D: int) -> nn.Sequential:
    """VQ-VAE (van den Oord et al. 2017, A.1): images minus 1/2 to z_e (B, D, N, N)."""
    return nn.Sequential(
        nn.Conv2d(3, n, 4, 2, 1),  # (B, n, H/2, W/2)
        nn.ReLU(),
        nn.Conv2d(n, n, 4, 2, 1),  # (B, n, N, N)
        nn.ReLU(),
        Residual(n, norm=False),
        Residual(n, norm=False),
        nn.Conv2d(n, D, 1),  # (B, D, N, N)
    )


def vq_decoder(n: int, D: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(D, n, 3, padding=1),  # (B, n, N, N)
        Residual(n, norm=False),
        Residual(n, norm=False),
        nn.ReLU(),
        nn.ConvTranspose2d(n, n, 4, 2, 1),  # (B, n, 2N, 2N)
        nn.ReLU(),
        nn.ConvTranspose2d(n, 3, 4, 2, 1),  # (B, 3, 4N, 4N)
    )


def sq_encoder(n: int, D: int, size: int) -> nn.Sequential:
    """SQ-VAE (Takida et al. 2022): images in [0, 1] to z_e (B, D, N, N); two networks by size."""
    small = size <= 32
    return nn.Sequential(
        nn.Conv2d(3, n // 2, 4, 2, 1),  # (B, n/2, H/2, W/2)
        nn.BatchNorm2d(n // 2),
        nn.ReLU(),
        nn.Conv2d(n // 2, n, 4, 2, 1),  # (B, n, N, N)
        nn.BatchNorm2d(n),
        nn.ReLU(),
        nn.Conv2d(n, n, 3, padding=1),
        *([nn.BatchNorm2d(n), nn.ReLU()] if small else []),
        *(Residual(n, norm=True) for _ in range(2 if small else 6)),
        nn.Conv2d(n, D, 1) if n != D else nn.Identity(),  # (B, D, N, N)
    ).apply(authors_init)


def sq_decoder(n: int, D: int, size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(D, n, 1) if n != D else nn.Identity(),  # (B, n, N, N)
        *(Residual(n, norm=True) for _ in range(2 if size <= 32 else 5)),
        nn.ConvTranspose2d(n, n, 3, padding=1),
        nn.BatchNorm2d(n),
        nn.ReLU(),
        nn.ConvTranspose2d(n, n // 2, 4, 2, 1),  # (B, n/2, 2N, 2N)
        nn.BatchNorm2d(n // 2),
        nn.ReLU(),
        nn.ConvTranspose2d(n // 2, 3, 4, 2, 1),  # (B, 3, 4N, 4N)
        nn.Sigmoid(),
    ).apply(authors_init)


# -------------------------------------------------------------------------------------- quantizers
#
# Six answers to three questions: which row of the codebook stands for z_e, how does the gradient
# get past the choice, and what keeps rows from dying?
#             in training, z is               gradient                  against collapse
# EdVAE       relaxed sample, alpha / S       through the sample        alpha >= 1, see EdVAE; KL
# dVAE        relaxed sample, softmax         through the sample        KL to the uniform
# VQ-VAE-EMA  nearest code                    straight-through          none
# GS-VQ-VAE   relaxed, softmax(-distance^2)   through the sample        KL to the uniform
# SQ-VAE      the same, learned variance      through the sample        the variance starts large
# VQ-STE++    nearest code                    straight-through, synced  affine map, replacement
#
# To add one: write a class with a name, defaults and a forward, and list it in QUANTIZERS.

ON_CPU, ON_SHAPES = dict(width=32, lr=1e-2), dict(width=24, lr=5e-3)  # EdVAE's and dVAE's


class Quantizer(nn.Module):
    """A codebook and the choice of its rows. Subclasses give forward, and may replace the rest.

    tau and beta are scalar tensors; key is the seed of the noise, see `train`. On a GPU this Python
    runs four times, then the recorded step is replayed: no .item(), no branch on data, and state in
    tensors changed in place (a Python counter would stop); or train with --no-compile. Decorate a
    forward that moves the codebook as VQVAE's. quantizer.eval() freezes such a codebook;
    requires_grad_(False) does not.
    """

    name: str  # for --model
    # Its settings; in special those for one preset or data set, by name. beta is the highest weight
    # of the KL; in VQ-VAE-EMA and VQ-STE++ of the commitment loss, in SQ-VAE of the latent loss.
    defaults = dict(width=64, beta=0.0)
    special = {}
    network = "vq"  # "ed", "vq" or "sq": whose encoder and decoder
    learns_by_gradient = True  # False: forward moves the codebook, or nothing does
    ramps_beta = False  # whether beta rises from 0
    uniform_start = False  # codes uniform in (-1 / K, 1 / K); else N(0, 1)

    def __init__(self, args: Namespace):
        super().__init__()
        K, D = args.codebook_size, args.code_dim
        codebook = (2 * torch.rand(K, D) - 1) / K if self.uniform_start else torch.randn(K, D)
        self.codebook = nn.Parameter(codebook, requires_grad=self.learns_by_gradient)  # M (K, D)
        self.args = args

    def forward(self, z_e: Tensor, tau, beta, key) -> tuple[Tensor, kernels.Quantized]:
        """z_e (B, N, N, C), C = K or D by the network, to the weighted loss and a Quantized.

        The Quantized's z_q is that of training; tests decode vectors()[indices]: `test_pass`.
        """
        raise NotImplementedError

    def vectors(self) -> Tensor:
        """The codes as the decoder sees them, (K, D)."""
        return self.codebook

    def logits(self, z_e: Tensor) -> Tensor:
        """(B, N, N, C) to (B, N, N, K); the "ed" encoder gives them itself."""
        return z_e if self.network == "ed" else -distances(z_e, self.vectors())

    def assign(self, z_e: Tensor) -> Tensor:
        """The indices of the hard codes, (B, N, N, C) to (B, N, N)."""
        return self.logits(z_e).argmax(-1)

    def probabilities(self, z_e: Tensor) -> Tensor:
        """pi (B, N, N, K), for evaluate.py; one-hot where the choice is deterministic."""
        return F.one_hot(self.assign(z_e), len(self.codebook)).float()

    def reconstruction_loss(self, x_hat: Tensor, x: Tensor) -> Tensor:
        return F.mse_loss(x_hat, x)


class EdVAE(Quantizer):
    """Baykal et al. 2024, Eq. 2 to 8: logits are evidence for a Dirichlet over the codes.

    Every alpha is at least 1, so even a code with a very negative logit keeps the probability
    1 / S: it keeps weight in the samples, and its row of the codebook gets a gradient. (Its logit
    hardly does: that gradient has the factor exp(z_e) / alpha.) Only large evidence for other codes
    can starve it, and the KL penalizes large evidence.

    For another evidence function f return ln f(z_e) from `logits`; a trial may change `plain`.
    """

    name, network, ramps_beta = "edvae", "ed", True
    defaults = dict(width=128, beta=1e-7)
    special = {"cpu": ON_CPU, "cifar10": dict(beta=5e-7), "shapes": ON_SHAPES | dict(beta=3e-7)}

    def forward(self, z_e: Tensor, tau, beta, key):
        logits = self.logits(z_e)  # (B, N, N, K)
        if self.args.plain:
            with torch.autocast(logits.device.type, enabled=False):
                q = self.plain(logits.float(), tau)
        else:  # the same in one pass, exact in float32
            options = dict(max_logit=self.args.max_logit, seed=key, compile=self.args.compile)
            q = kernels.evidential_quantize(logits, self.codebook, tau, **options)
        return beta * q.kl.mean(), q

    def plain(self, logits: Tensor, tau) -> kernels.Quantized:
        """The bottleneck as the paper writes it: slow, its KL imprecise for large evidence."""
        dirichlet = functools.partial(torch.distributions.Dirichlet, validate_args=False)
        relaxed = torch.distributions.RelaxedOneHotCategorical
        alpha = torch.exp(logits.clamp(max=self.args.max_logit)) + 1  # (B, N, N, K) Eq. 2
        S = alpha.sum(-1)  # (B, N, N)
        pi = alpha / S[..., None]  # App. B
        z = relaxed(tau, probs=pi, validate_args=False).rsample()  # Alg. 1
        z_q = z @ self.codebook  # (B, N, N, D)
        kl = torch.distributions.kl_divergence(dirichlet(alpha), dirichlet(torch.ones_like(alpha)))
        entropy, u = torch.special.entr(pi).sum(-1), len(self.codebook) / S  # Figures 2 and 3
        return kernels.Quantized(z_q, kl, logits.argmax(-1), entropy.detach(), u.detach())

    def probabilities(self, z_e: Tensor) -> Tensor:
        ln_alpha = F.softplus(self.logits(z_e).float().clamp(max=self.args.max_logit))  # Eq. 2
        return ln_alpha.softmax(-1)  # alpha / S


class SoftmaxQuantizer(Quantizer):
    """pi = softmax(logits(z_e)): a Gumbel-softmax sample of it, and its KL to the uniform."""

    ramps_beta = True

    def forward(self, z_e: Tensor, tau, beta, key):
        options = dict(seed=key, compile=self.args.compile)
        q = kernels.gumbel_quantize(self.logits(z_e), self.codebook, tau, **options)
        return beta * q.kl.mean(), q

    def probabilities(self, z_e: Tensor) -> Tensor:
        return self.logits(z_e).float().softmax(-1)


class DVAE(SoftmaxQuantizer):
    """Ramesh et al. 2021: the encoder gives the logits."""

    name, network = "dvae", "ed"
    defaults = dict(width=128, beta=5e-5)
    special = {"cpu": ON_CPU, "shapes": ON_SHAPES}


class VQVAE(Quantizer):
    """van den Oord et al. 2017, A.1: the nearest code, the moving average of its z_e."""

    name, learns_by_gradient, uniform_start = "vqvae-ema", False, True
    defaults = dict(width=256, beta=0.25)

    def __init__(self, args: Namespace):
        super().__init__(args)
        # Counts start at 1, the code itself: from 0 an unused code would be divided by almost 0.
        self.register_buffer("count", torch.ones(len(self.codebook)))  # n (K)
        self.register_buffer("sum", self.codebook.detach().clone())  # s (K, D)

    # Compiled, the backward would read the codes after they moved: pytorch/pytorch#197039.
    @torch.compiler.disable
    def forward(self, z_e: Tensor, tau, beta, key):
        indices = self.assign(z_e)
        z_q = self.codebook[indices]
        loss = beta * F.mse_loss(z_e.float(), z_q)  # commitment
        if self.training:
            self.update(*cell_sums(z_e, indices, len(self.codebook)))
        straight_through = z_e + (z_q - z_e).detach()
        return loss, kernels.deterministic(straight_through, indices)

    @torch.no_grad()
    def update(self, count: Tensor, sums: Tensor, g: float = 0.99, eps: float = 1e-5):
        self.count.lerp_(count, 1 - g)  # n <- g n + (1 - g) n_batch
        self.sum.lerp_(sums, 1 - g)  # s <- g s + (1 - g) s_batch
        total = self.count.sum()
        smoothed = (self.count + eps) / (total + len(self.count) * eps) * total  # Laplace smoothing
        self.codebook.copy_(self.sum / smoothed[:, None])


class GSVQVAE(SoftmaxQuantizer):
    """Sonderby et al. 2017: pi = softmax(-|z_e - e_k|^2)."""

    name, uniform_start = "gs-vqvae", True
    defaults = dict(width=256, beta=5e-6)


class SQVAE(SoftmaxQuantizer):
    """Takida et al. 2022: pi = softmax(-|z_e - e_k|^2 / (2 sigma^2)); losses in nats per image."""

    name, network, ramps_beta = "sq-vae", "sq", False
    defaults = dict(width=64, beta=1.0)

    def __init__(self, args: Namespace):
        super().__init__(args)
        log_variance = math.log(20 * args.code_dim / 64)  # the original's log 20 at D = 64
        self.rho = nn.Parameter(torch.tensor(log_variance))

    def variance(self) -> Tensor:
        """sigma^2 = 1 + exp(rho) is learned: the original's variant I."""
        return 1 + self.rho.exp()

    def logits(self, z_e: Tensor) -> Tensor:
        return -0.5 / self.variance() * distances(z_e, self.codebook)  # (B, N, N, K)

    def forward(self, z_e: Tensor, tau, beta, key):
        _, q = super().forward(z_e, tau, beta, key)
        B = len(z_e)
        discrete = (q.kl - math.log(len(self.codebook))).sum() / B  # -H, summed over positions
        continuous = (z_e.float() - q.z_q).square().sum() / (2 * self.variance()) / B
        return beta * (discrete + continuous), q

    def reconstruction_loss(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """(d_x / 2) ln of an image's squared error: the decoder's variance at its optimum."""
        return x[0].numel() / 2 * torch.log((x_hat - x).square().sum() / len(x))


class VQSTE(Quantizer):
    """Huh et al. 2023: the nearest code of an affine codebook c_k = (1 + l a) e_k + l t.

    In training (1) a code that was unused for REPLACE_AFTER steps moves onto a vector of the batch,
    as all do at first; (2) z_e is assigned; (3) each e_k takes a step of SGD with momentum toward
    the vectors assigned to it; (4) z_q is read. Adam learns the scale a and the shift t, which all
    codes share, from a share SYNC of dL/dz_q: so unused codes move too. Unlike the authors' code
    with step (3), this keeps the commitment loss: without it nothing bounds z_e.
    """

    name, network, learns_by_gradient = "vq-ste++", "sq", False
    defaults = dict(width=64, beta=2.0)
    AFFINE_LR = 10.0  # l
    SYNC = 0.2
    REPLACE_AFTER = 20
    COMMITMENT = 0.1  # 1 - b of the authors' loss, times beta

    def __init__(self, args: Namespace):
        super().__init__(args)
        K, D = self.codebook.shape
        self.scale, self.shift = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))  # a, t
        self.register_buffer("velocity", torch.zeros(K, D))
        self.register_buffer("patience", torch.zeros(K, dtype=torch.int64))

    def vectors(self) -> Tensor:
        return (1 + self.AFFINE_LR * self.scale) * self.codebook + self.AFFINE_LR * self.shift

    @torch.compiler.disable  # as VQVAE's
    def forward(self, z_e: Tensor, tau, beta, key):
        if self.training:
            self.replace(z_e)
        indices = self.assign(z_e)
        if self.training:
            self.step(*cell_sums(z_e, indices, len(self.codebook)))
        z_q = self.vectors()[indices]  # of the codebook as it is now
        loss = beta * self.COMMITMENT * F.mse_loss(z_e.float(), z_q.detach())
        straight_through = z_e + (z_q - z_e).detach()
        synced = straight_through + self.SYNC * (z_q - z_q.detach())
        return loss, kernels.deterministic(synced, indices)

    @torch.no_grad()
    def replace(self, z_e: Tensor):
        """Codes without patience land near vectors of the batch: so do all at the first step."""
        z, dead = z_e.float().flatten(0, -2), self.patience == 0  # (P, D), (K)
        c = z[torch.randint(len(z), (len(dead),), device=z.device)]  # (K, D)
        c = c + 0.01 * c.norm(dim=1, keepdim=True) * torch.randn_like(c)
        e = (c - self.AFFINE_LR * self.shift) / (1 + self.AFFINE_LR * self.scale)
        self.codebook.copy_(torch.where(dead[:, None], e, self.codebook))
        self.velocity.masked_fill_(dead[:, None], 0)
        self.patience.masked_fill_(dead, self.REPLACE_AFTER)

    @torch.no_grad()
    def step(self, count: Tensor, sums: Tensor):
        """SGD with momentum 0.9 on mean (c - z_e)^2, for e alone; 50 is the authors' rate."""
        D = self.codebook.shape[1]
        self.patience.copy_(torch.where(count > 0, self.REPLACE_AFTER, self.patience - 1))
        gradient = 2 * (count[:, None] * self.vectors() - sums) / (count.sum() * D)
        self.velocity.mul_(0.9).add_(gradient * (1 + self.AFFINE_LR * self.scale))
        self.codebook.sub_(50 * D / 64 * self.velocity)  # theirs has D = 64: smaller D are steeper


def distances(z: Tensor, codes: Tensor) -> Tensor:
    """|z - e_k|^2 in float32, whatever autocast says: (..., D) and (K, D) to (..., K)."""
    with torch.autocast(z.device.type, enabled=False):
        flat = z.float().flatten(0, -2)  # (P, D)
        d = flat.square().sum(-1, keepdim=True) - 2 * flat @ codes.T + codes.square().sum(-1)
        return d.view(*z.shape[:-1], len(codes))


def cell_sums(z: Tensor, indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """How many vectors each code was given, and their sum, over all processes: (K), (K, D)."""
    flat, index = z.detach().float().flatten(0, -2), indices.flatten()
    count = torch.zeros(K, device=z.device).index_add_(0, index, torch.ones_like(flat[:, 0]))
    sums = torch.zeros(K, flat.shape[1], device=z.device).index_add_(0, index, flat)
    return all_reduce_sum(count), all_reduce_sum(sums)


QUANTIZERS = {q.name: q for q in (EdVAE, DVAE, VQVAE, GSVQVAE, SQVAE, VQSTE)}


class VAE(nn.Module):
    """Encoder, quantizer and decoder. Images go in and come out as (B, 3, H, W) in [0, 1]."""

    def __init__(self, args: Namespace):
        super().__init__()
        self.args = args
        n, K, D = args.width, args.codebook_size, args.code_dim
        network = QUANTIZERS[args.model].network
        if network == "sq":
            self.encoder, self.decoder = sq_encoder(n, D, args.size), sq_decoder(n, D, args.size)
        elif network == "ed":
            self.encoder, self.decoder = Encoder(n, K, args.first_kernel), Decoder(n, D)
        else:
            self.encoder, self.decoder = vq_encoder(n, D), vq_decoder(n, D)
        self.quantizer = QUANTIZERS[args.model](args)
        self.offset = 0.0 if network == "sq" else 0.5  # its outputs are sigmoids; else linear
        if network == "ed" and args.init == "he":
            he_init(self.encoder, self.decoder)
        self.to(memory_format=torch.channels_last)

    def encode_features(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) to what the quantizer takes, z_e (B, N, N, C)."""
        return self.encoder(x - self.offset).permute(0, 2, 3, 1)

    def reconstruct(self, z_q: Tensor) -> Tensor:
        """z_q (B, N, N, D) to x_hat (B, 3, H, W), not clamped."""
        return self.decoder(z_q.permute(0, 3, 1, 2)).float() + self.offset

    def forward(self, x: Tensor, tau: Tensor, beta: Tensor, key: Tensor):
        """The loss (Eq. 8 for EdVAE), the squared error and the quantizer's Quantized."""
        quantizer_loss, q = self.quantizer(self.encode_features(x), tau, beta, key)
        x_hat = self.reconstruct(q.z_q)
        loss = self.quantizer.reconstruction_loss(x_hat, x) + quantizer_loss
        return loss, F.mse_loss(x_hat.detach(), x), q

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Images (B, 3, 4N, 4N) in [0, 1] to hard codes (B, N, N), int64; or a ValueError."""
        check_images(x)
        return self.quantizer.assign(self.encode_features(x.to(self.quantizer.codebook.dtype)))

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Codes (B, N, N), any integer type, to images (B, 3, H, W) in [0, 1]; or a ValueError."""
        check_codes(indices, len(self.quantizer.codebook))
        return self.reconstruct(self.quantizer.vectors()[indices.long()]).clamp(0, 1)


def load_vae(path, device="cpu") -> VAE:
    """A trained model from a run's folder or its checkpoint, in eval mode, fp32; or a UserError."""
    state = load_checkpoint(path, "train_vae.py")
    here = dict(device=str(device), precision="fp32", compile=False)
    model = VAE(Namespace(**(DEFAULTS | state["args"] | here)))
    load_state(model, state["model"], path)
    return model.to(device).eval()


# ---------------------------------------------------------------------------------------- settings

# Every flag: its type, its default (None where a table below or the machine decides), what it does.
# A share is a fraction of the run's steps.
SETTINGS = dict(
    dataset=(str, "shapes", "train on this; shapes are generated"),
    model=(str, "edvae", "train this model"),
    preset=(str, None, "take these settings (default: cpu; on a GPU short; for shapes cpu)"),
    data_dir=(Path, "data", "keep the data here; folder: read its images"),
    size=(int, None, "scale images to this, a multiple of 4 (default: the data set's)"),
    width=(int, None, "n, channels, a multiple of 4 (default: the preset's or the model's)"),
    codebook_size=(int, 512, "K, codes; shapes take 64"),
    code_dim=(int, 16, "D, numbers per code"),
    max_logit=(float, 20.0, "clamp the logits inside alpha at c, or inf"),
    plain=(bool, False, "edvae: the bottleneck as the paper writes it, by torch.distributions"),
    steps=(int, None, "training steps (default: the preset's)"),
    batch_size=(int, 128, "images per step, of all processes; shapes take 32"),
    lr=(float, 1e-3, "first learning rate; preset cpu and shapes have others"),
    lr_anneal=(float, None, "let it fall over this share (default: the preset's)"),
    beta=(float, None, "highest weight of the quantizer's loss (default: the model's)"),
    beta_ramp=(float, None, "let it rise from 0 over this share (default: the preset's)"),
    tau_start=(float, 1.0, "first temperature of the relaxed sample; shapes take 2"),
    tau_end=(float, None, "last temperature (default: the preset's)"),
    seed=(int, 42, "seed weights, data order and noise"),
    out=(Path, None, "write the run here (default: a new folder under runs/)"),
    resume=(bool, False, "continue the run in --out"),
    device=(str, None, "cpu, cuda, cuda:1, ... (default: cuda where there is one)"),
    precision=(str, None, "compute convolutions in this (default: fp32; on a GPU bf16)"),
    compile=(bool, None, "compile; a GPU records a graph (default: there, and from 500 steps)"),
    log_every=(int, None, "steps between log lines (default: a sixtieth of the run)"),
    eval_every=(int, None, "steps between tests (default: a tenth of the run, at least 250)"),
)
DEFAULTS = {name: default for name, (_, default, _) in SETTINGS.items()}
DEFAULTS |= dict(init="authors", first_kernel=3)  # these have no flag
# The paper's settings, App. D.
PAPER = dict(steps=150_000, lr_anneal=1 / 3, beta_ramp=1 / 30, tau_end=math.exp(-1.5))
# The paper's first third, in which its learning rate falls, in 35,000 steps.
SHORT = dict(steps=35_000, lr_anneal=1.0, beta_ramp=0.1, tau_end=math.exp(-0.5))
# For two cores. From the authors' initialization a narrow EdVAE learns nothing for long.
CPU = SHORT | dict(steps=3_000, width=64, init="he")
PRESETS = {"paper": PAPER, "short": SHORT, "cpu": CPU}
# Settings of a data set, which beat a preset's; `sources` below reads its images.
DATASETS = {
    "shapes": dict(preset="cpu", size=32, codebook_size=64, steps=1100, batch_size=32)
    | dict(eval_every=550, tau_start=2.0, tau_end=0.2),
    "cifar10": dict(size=32),
    "celeba": dict(size=64),
    "lsun-church": dict(size=128, first_kernel=7),
    "folder": dict(size=64),
}
CHOICES = dict(dataset=DATASETS, model=QUANTIZERS, preset=PRESETS, precision=("fp32", "bf16"))
MAY_CHANGE = {"data_dir", "device", "compile", "log_every", "eval_every"}  # on --resume


def settings(argv=None) -> tuple[Namespace, dict | None]:
    """Every setting of a run, and --resume's checkpoint, or None."""
    given = parse_flags("train_vae.py", SETTINGS, CHOICES, argv)
    join_processes()
    checkpoint, saved = saved_run(given, "train_vae.py", MAY_CHANGE)
    known = DEFAULTS | saved | given
    device, precision = prepare_device(known["device"], known["precision"])
    on_gpu = device.startswith("cuda")
    model, dataset = QUANTIZERS[known["model"]], DATASETS[known["dataset"]]
    preset = known["preset"] or dataset.get("preset") or ("short" if on_gpu else "cpu")
    args = Namespace(
        **DEFAULTS  # the later wins
        | Quantizer.defaults
        | model.defaults
        | PRESETS.get(preset, {})  # an old run's may no longer exist
        | model.special.get(preset, {})
        | dataset
        | model.special.get(known["dataset"], {})
        | saved
        | given
        | dict(preset=preset, device=device, precision=precision)
    )
    if args.dataset == "folder":
        args.data_dir = os.path.abspath(args.data_dir)  # other stages may start elsewhere
    args.log_every = args.log_every or max(1, args.steps // 60)
    args.eval_every = args.eval_every or max(250, args.steps // 10)
    if args.compile is None:
        args.compile = on_gpu or args.steps >= 500
    if args.size % 4 or args.width % 4:
        raise UserError(f"--size {args.size} and --width {args.width} must be multiples of 4")
    if args.plain and not issubclass(model, EdVAE):
        raise UserError(f"--plain is for edvae, and --model is {args.model}")
    if args.batch_size % process_count():
        raise UserError(f"{process_count()} processes cannot share --batch-size {args.batch_size}")
    if process_count() > 1 and model.network == "sq":
        raise UserError(f"--model {args.model} takes one process: batch norm is of the whole batch")
    return args, checkpoint


# --------------------------------------------------------------------------------------- schedules


def quarter_cosine(start: float, end: float, progress: float) -> float:
    """From start to end at progress 1; 29% of the way at 1/2: the paper's "cosine annealing"."""
    return start + (end - start) * (1 - math.cos(math.pi / 2 * min(1.0, progress)))


def schedules(step: int, args: Namespace) -> dict[str, float]:
    """lr, beta and tau at a step, counted from 0."""
    anneal, ramp = (max(1, round(s * args.steps)) for s in (args.lr_anneal, args.beta_ramp))
    lr = quarter_cosine(args.lr, 1.25e-3 * args.lr, step / anneal)  # 1e-3 to 1.25e-6
    beta = args.beta
    if QUANTIZERS[args.model].ramps_beta:
        beta = quarter_cosine(0.0, args.beta, step / ramp)
    tau = args.tau_start * (args.tau_end / args.tau_start) ** (step / args.steps)
    return dict(lr=lr, beta=beta, tau=tau)


# ---------------------------------------------------------------------------------------- measures


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of the codes' frequencies (K): 1 for a single code, K for even use."""
    p = counts.double() / counts.sum()
    return math.exp(-torch.special.xlogy(p, p).sum().item())


class Meter:
    """Accumulates on the device; `flush` waits for it, returns the means and starts anew."""

    def __init__(self, K: int, device):
        # How often each code was the hard code; loss, mse, images, kl, entropy, its square, u.
        self.counts = torch.zeros(K, dtype=torch.int64, device=device)
        self.sums = torch.zeros(7, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, mse: Tensor, q: kernels.Quantized):
        index, images = q.indices.flatten(), len(q.indices)
        self.counts.scatter_add_(0, index, torch.ones_like(index))
        kl, h, u = q.kl.detach().double(), q.entropy.double(), q.uncertainty.double()
        means = torch.stack([loss.detach().double(), mse.double(), h.new_ones(())])
        positions = torch.stack([kl.sum(), h.sum(), h.square().sum(), u.sum()])
        self.sums += torch.cat([images * means, positions])

    def flush(self) -> dict:
        """The numbers of a log line over all processes, None where not finite."""
        loss, mse, images, kl, h, h_squared, u = all_reduce_sum(self.sums).tolist()
        counts = all_reduce_sum(self.counts)
        positions = counts.sum().item()
        variance = h_squared / positions - (h / positions) ** 2
        line = dict(
            loss=loss / images,
            mse=mse / images,
            kl=kl / positions,
            perplexity=perplexity(counts),
            codes_used=(counts > 0).sum().item(),
            entropy_mean=h / positions,
            entropy_std=math.sqrt(max(variance, 0.0)),  # nan remains nan
            uncertainty=u / positions,
        )
        self.counts.zero_()
        self.sums.zero_()
        return {key: value if math.isfinite(value) else None for key, value in line.items()}


@torch.no_grad()
def test_pass(model: VAE, images: np.ndarray, args: Namespace, beta: float = 1.0):
    """Images with hard codes: yields x, z_e, loss, q, x_hat of each batch.

    x (B, 3, H, W), z_e (B, N, N, C), the loss with this beta, the quantizer's Quantized, and x_hat
    from vectors()[q.indices]. Each process takes its share of the batches.
    """
    size = args.batch_size // process_count()
    one = torch.ones((), device=args.device)
    key = torch.zeros(3, dtype=torch.int64, device=args.device)  # no noise reaches a hard code
    for i in range(size * rank(), len(images), size * process_count()):
        x = to_float(torch.from_numpy(images[i : i + size]).to(args.device))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            z_e = model.encode_features(x)
            quantizer_loss, q = model.quantizer(z_e, one, beta * one, key)
            x_hat = model.reconstruct(model.quantizer.vectors()[q.indices])
        yield x, z_e, model.quantizer.reconstruction_loss(x_hat, x) + quantizer_loss, q, x_hat


def test(model: VAE, images: np.ndarray, args: Namespace, beta: float, picture=None) -> dict:
    """A test line: hard codes, perplexity over the split, the first image's entropies of pi (N, N).

    picture: where to save up to twelve images, each above its reconstruction.
    """
    meter, entropy_map = Meter(args.codebook_size, args.device), None
    model.eval()
    for i, (x, _, loss, q, x_hat) in enumerate(test_pass(model, images, args, beta)):
        meter.add(loss, F.mse_loss(x_hat, x), q)
        if i == 0 and q.entropy.isfinite().all():
            entropy_map = [[round(h, 3) for h in row] for row in q.entropy[0].tolist()]
        if i == 0 and picture and rank() == 0:
            save_grid(torch.cat([x[:12], x_hat[:12].clamp(0, 1)], 2), picture, columns=12)
    model.train()
    return meter.flush() | dict(split="test", entropy_map=entropy_map)


# ------------------------------------------------------------------------------- the training loop


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in [0, 1], channels last in memory."""
    return images.permute(0, 3, 1, 2).float() / 255


@functools.lru_cache(2)
def epoch_order(epoch: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator)


def batch_indices(step: int, batch_size: int, count: int, seed: int) -> Tensor:
    """Which of count images step `step` sees: (batch_size), a slice of shuffled epochs in a row."""
    epoch, start = divmod(step * batch_size, count)
    parts = []
    while batch_size > 0:
        parts.append(epoch_order(epoch, count, seed)[start : start + batch_size])
        batch_size -= len(parts[-1])
        epoch, start = epoch + 1, 0
    return torch.cat(parts)


def train(args: Namespace, checkpoint: dict | None = None) -> Path:
    """Train a model as args say, from the checkpoint if there is one; returns the run's folder."""
    # 1. data
    device = torch.device(args.device)
    if rank():
        torch.distributed.barrier()  # until the first process has decoded the images
    where = args.data_dir, args.size
    train_images, test_images = (load_images(args.dataset, s, *where) for s in ("train", "test"))
    if process_count() > 1 and not rank():
        torch.distributed.barrier()

    # 2. static input buffers: a CUDA graph reads these addresses
    share = args.batch_size // process_count()
    batch = torch.zeros(share, args.size, args.size, 3, dtype=torch.uint8, device=device)
    beta, tau = torch.zeros((), device=device), torch.zeros((), device=device)
    # Adam takes lr in float32 on a GPU, in double on a CPU.
    lr = torch.zeros_like(beta, dtype=torch.float32 if device.type == "cuda" else torch.float64)
    # The noise is a function of (seed, step, position), however a batch is split: so this is the
    # seed, the step, and the number of this process's first position. (--plain and VQ-STE++ draw
    # from PyTorch's generator.)
    key = torch.tensor([args.seed, 0, rank() * share * (args.size // 4) ** 2], device=device)

    # 3. model and optimizer
    torch.manual_seed(args.seed + rank())  # the first process's weights will be those of all
    model = VAE(args).to(device)
    weights = [p for p in model.parameters() if p.requires_grad]
    graphed = args.compile and device.type == "cuda" and process_count() == 1
    optimizer = torch.optim.Adam(weights, lr=lr, fused=True, capturable=graphed)
    start = checkpoint["step"] if checkpoint else 0
    if checkpoint:
        load_state(model, checkpoint["model"], args.out)
        load_state(optimizer, checkpoint.get("optimizer"), args.out)
        optimizer.param_groups[0].update(lr=lr, capturable=graphed)  # this run's, this device's
        torch.set_rng_state(checkpoint["generator"])
    if args.compile and device.type == "cuda":  # on a CPU oneDNN's convolutions gain nothing
        model.forward = kernels.Compiled(model.forward)
    step_model = nn.parallel.DistributedDataParallel(model) if process_count() > 1 else model
    meter = Meter(args.codebook_size, device)

    # 4. the step: all that runs on the device
    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            loss, mse, q = step_model(to_float(batch), tau, beta, key)  # Eq. 8
        model.zero_grad()
        loss.backward()
        optimizer.step()
        meter.add(loss, mse, q)

    if graphed:
        step = kernels.Graphed(step)  # the host launches one graph, and not 700 kernels

    # 5. the loop
    run = Run(args, f"{args.dataset}-{args.model}", start)
    if start == args.steps:
        raise UserError(f"{run.folder} is finished; name another --out for a new run")
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{run.folder}: {args.model} on {args.dataset}, preset {args.preset}, "
        f"{len(train_images):,} images, {parameters:,} parameters, {device}, {args.precision}, "
        f"steps {start} to {args.steps}"
    )
    with run:
        run.save(start, model=model.state_dict(), optimizer=optimizer.state_dict())
        logged, clock = start, time.perf_counter()  # of the last log line
        for i in range(start, args.steps):
            # The step's inputs are functions of i, so that a resumed run sees the same.
            now = schedules(i, args)
            lr.fill_(now["lr"])
            beta.fill_(now["beta"])
            tau.fill_(now["tau"])
            key[1].fill_(i)
            index = batch_indices(i, args.batch_size, len(train_images), args.seed)
            images = torch.from_numpy(train_images[index[rank() * share :][:share].numpy()])
            batch.copy_(images.pin_memory() if lr.is_cuda else images, non_blocking=True)
            step()
            done, last = i + 1, i + 1 == args.steps
            if done % args.log_every == 0 or last:  # here the host waits for the device
                line = meter.flush() | now
                run.check_finite(line["loss"], model, logged)
                rate = (done - logged) * args.batch_size / (time.perf_counter() - clock)
                left = (args.steps - done) * args.batch_size / rate / 60
                line["images_per_second"] = rate
                run.log(done, line, f"{rate:,.0f} images/s  {left:.1f} min left")
                logged, clock = done, time.perf_counter()
            if done % args.eval_every == 0 or last:
                started = time.perf_counter()
                tested = test(model, test_images, args, now["beta"], run.folder / "recon.png")
                run.log(done, tested | now, "(test)")
                clock += time.perf_counter() - started
            due = logged == done and time.monotonic() > run.saved_at + run.SAVE_SECONDS
            if due or last:  # after a log line, which checks the loss
                run.save(done, model=model.state_dict(), optimizer=optimizer.state_dict())
    print(
        f"\ntest MSE {tested['mse']:.3e} ([0, 1] scale), perplexity {tested['perplexity']:.1f} of "
        f"{args.codebook_size}, {tested['codes_used']} codes used\n"
        f"{run.folder}/: recon.png (inputs above reconstructions), log.jsonl, ckpt.pt"
    )
    if tested["codes_used"] < args.codebook_size / 10:
        print("fewer than 10% of the codes are in use: the codebook has collapsed")
    return run.folder


# ==================================================================================================
# The method ends here. The rest is plumbing: images, the run's folder, device and processes, flags
# ==================================================================================================


def load_images(dataset: str, split: str, data_dir="data", size: int | None = None) -> np.ndarray:
    """All images of a split ("train" or "test"): uint8 (count, size, size, 3), memory-mapped.

    The first use decodes them to <data-dir>/<dataset>-<split>-<size>.npy. The cache of a folder
    lies under data/, named by its files' paths, sizes and times: a changed one is decoded anew.
    What cannot be read is left out and named in one line: two images, and a tenth, at the most.
    """
    data_dir, size = Path(data_dir).expanduser(), size or DATASETS[dataset]["size"]
    cache = data_dir / f"{dataset}-{split}-{size}.npy"
    if dataset == "folder":
        files = [(str(path), path.stat()) for path in folder_splits(data_dir)[split]]
        key = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]).encode()
        cache = Path("data") / f"folder-{split}-{size}-{hashlib.sha256(key).hexdigest()[:12]}.npy"
    if cache.exists():
        try:
            return np.load(cache, mmap_mode="c")  # not "r": PyTorch warns about read-only arrays
        except (ValueError, EOFError) as e:
            raise UserError(f"{cache} is damaged ({e}); delete it to decode anew") from None
    try:
        count, images = sources(dataset, split, data_dir, size)
    except Exception as e:  # a foreign downloader can raise any exception
        cure = BY_HAND.get(dataset, "name another --data-dir")
        raise UserError(f"{data_dir}: {in_one_line(e)}; {cure}") from None
    print(f"decoding {count:,} images of {dataset}, {split}", flush=True)
    pixels, damaged = np.empty((count, size, size, 3), np.uint8), []
    for i, image in enumerate(images):
        try:
            pixels[i - len(damaged)] = to_pixels(image, size)
        except UserError as e:
            damaged.append(str(e))
    left_out = f"left out {len(damaged)} of {count} images: {'; '.join(damaged[:3])}"
    if 10 * (len(damaged) - 2) > count or len(damaged) == count:
        raise UserError(f"{left_out}: too many to go on")
    if damaged:
        print(left_out, file=sys.stderr)
    cache.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(cache) as f:
        np.save(f, pixels[: count - len(damaged)])
    return np.load(cache, mmap_mode="c")


BY_HAND = {
    "cifar10": "put cifar-10-python.tar.gz there",
    "celeba": "put the aligned images, 000001.jpg and on, into celeba/img_align_celeba there",
    "lsun-church": "install lmdb, and unpack church_outdoor_train_lmdb and _val_lmdb there",
}


def sources(dataset: str, split: str, data_dir: Path, size: int):
    """How many images a split has, and each as a path or a PIL image."""
    train = split == "train"
    if dataset == "shapes":
        count, rng = 20_000 if train else 2_000, np.random.default_rng([int(not train), size])
        chunks = (draw_shapes(500, size, rng) for _ in range(count // 500))
        return count, (Image.fromarray(pixels) for chunk in chunks for pixels in chunk)
    if dataset == "cifar10":
        arrays = torchvision.datasets.CIFAR10(data_dir, train, download=True).data
        return len(arrays), map(Image.fromarray, arrays)
    if dataset == "celeba":
        # The paper's numbers are from the official valid split.
        numbers = range(1, 162_771) if train else range(162_771, 182_638)
        folder = data_dir / "celeba" / "img_align_celeba"
        if not folder.is_dir():
            torchvision.datasets.CelebA(data_dir, "all", download=True)
        paths = [path for path in sorted(folder.glob("*.jpg")) if int(path.stem) in numbers]
        if not paths:
            raise FileNotFoundError(f"{folder} lacks {numbers[0]:06}.jpg and on")
        return len(paths), (Image.open(path).crop((19, 39, 159, 179)) for path in paths)
    if dataset == "lsun-church":  # stretched to a square, as the authors do
        name = f"church_outdoor_{'train' if train else 'val'}"
        data = torchvision.datasets.LSUN(str(data_dir), [name])
        return len(data), (data[i][0].resize((size, size)) for i in range(len(data)))
    paths = folder_splits(data_dir)[split]
    return len(paths), paths


def draw_shapes(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Generated images, uint8 (count, size, size, 3): one to three shapes on a color gradient."""

    def uniform(low, high, *shape):
        return rng.uniform(low, high, (count, *shape)).astype(np.float32)

    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j].astype(np.float32)
    angle = uniform(0, 2 * np.pi, 1, 1)
    mix = ((x * np.cos(angle) + y * np.sin(angle) + 1) / 2).clip(0, 1)[..., None]
    image = (1 - mix) * uniform(0, 1, 1, 1, 3) + mix * uniform(0, 1, 1, 1, 3)
    for probability in (1, 0.6, 0.3):
        angle, radius = uniform(0, 2 * np.pi, 1, 1), uniform(0.25, 0.6, 1, 1)
        dx = (x - uniform(-0.6, 0.6, 1, 1)) / radius
        dy = (y - uniform(-0.6, 0.6, 1, 1)) / radius
        u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
        disc, square = np.hypot(u, v), 1.2 * np.maximum(abs(u), abs(v))
        triangle = 1.6 * np.maximum(0.87 * abs(u) + 0.5 * v, -v)
        ring = 4 * abs(disc - 0.75)
        kind = rng.integers(0, 4, (count, 1, 1))
        distance = np.select([kind == 0, kind == 1, kind == 2], [disc, square, triangle], ring)
        inside = ((1 - distance) * radius * size / 4 + 0.5).clip(0, 1)  # an edge of about a pixel
        drawn = uniform(0, 1, 1, 1) < probability
        image += (inside * drawn)[..., None] * (uniform(0, 1, 1, 1, 3) - image)
    return (image * 255 + 0.5).astype(np.uint8)


def folder_splits(folder: Path) -> dict[str, list[Path]]:
    """The images under a folder by their endings, linked folders once: absolute paths.

    Those below train/ are one split, below test/ or else val/ the other. Without both, a checksum
    of its path puts every tenth image into the test split, where it stays as the folder grows.
    Hidden files do not count, nor does what this project writes.
    """
    folder, images, endings = folder.resolve(), [], Image.registered_extensions()
    seen = {os.path.realpath(name) for name in ("data", "runs", "figures")}
    for top, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(top)
        if top != str(folder) and (real in seen or "args.json" in files):
            folders.clear()  # not to be entered
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        files = {name for name in files if name[0] != "."} - {"recon.png", "samples.png"}
        paths = (Path(top, name) for name in files if Path(name).suffix.lower() in endings)
        images += [path for path in paths if path.is_file()]  # a link may lead nowhere
    images.sort()
    kinds = dict(train="train", test="test", val="val", valid="val", validation="val")
    splits = dict(train=[], test=[], val=[], rest=[])
    for path in images:
        parts = [part.lower() for part in path.relative_to(folder).parts[:-1]]
        splits[next((kinds[part] for part in parts if part in kinds), "rest")].append(path)
    splits["train"] = splits["train"] or splits["rest"]
    splits["test"] = splits["test"] or splits["val"]
    if not splits["train"] or not splits["test"]:
        splits = dict(train=[], test=[])
        for path in images:
            checksum = zlib.adler32(path.relative_to(folder).as_posix().encode())
            splits["train" if checksum % 10 else "test"].append(path)
    if not splits["train"] or not splits["test"]:
        raise UserError(f"--data-dir {folder}: too few images ({len(images)}) for two splits")
    return splits


def to_pixels(source, size: int) -> np.ndarray:
    """An image, or the path of its file, as uint8 (size, size, 3), scaled and cropped.

    Gray, palette, CMYK and 16-bit images become RGB, transparency becomes white, EXIF orientation
    is applied, the first frame counts. UserError for what Pillow cannot read, and for float and
    32-bit pixels, whose range is unknown.
    """
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        image.load()
        if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):
            raise ValueError(f"mode {image.mode} has no fixed range: save it with 8 or 16 bits")
        bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # a TIFF may hold 12
        with contextlib.suppress(Exception):  # EXIF can be odd: no more than its orientation
            image.getexif()
            image.info.pop("exif", None)
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            gray = np.asarray(image) * (255 / (2**bits - 1))
            image = Image.fromarray(gray.clip(0, 255).astype(np.uint8))
        if image.mode[-1] in "APa" or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.BILINEAR))
    except Exception as e:  # of many kinds: struct.error, ZeroDivisionError, SyntaxError, ...
        raise UserError(f"cannot read {source}: {in_one_line(e)}") from None


def check_images(x: Tensor):
    """ValueError unless x is images (B, 3, 4N, 4N), floats in [0, 1]."""
    if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % 4 or x.shape[3] % 4 or not x.numel():
        raise ValueError(f"encode takes images (B, 3, 4N, 4N), not {tuple(x.shape)}")
    if not x.is_floating_point() or not (-1e-3 <= x.min() and x.max() <= 1.001):  # nan neither
        raise ValueError(f"encode takes floats in [0, 1], not {x.dtype}, {x.min()} to {x.max()}")


def check_codes(indices: Tensor, K: int):
    """ValueError unless indices is codes (B, N, N), integers from 0 to K - 1."""
    whole = not (indices.is_floating_point() or indices.dtype == torch.bool)
    if not whole or indices.ndim != 3 or not ((0 <= indices) & (indices < K)).all():
        what = f"{indices.dtype} {tuple(indices.shape)}"
        raise ValueError(f"decode takes codes (B, N, N) from 0 to {K - 1}, not {what}")


def save_grid(images: Tensor, path: Path, columns: int):
    """Images (B, 3, H, W) in [0, 1] as one picture; small ones are enlarged."""
    enlarged = F.interpolate(images, scale_factor=max(1, 96 // images.shape[-1]))
    torchvision.utils.save_image(enlarged, path, nrow=columns, pad_value=1)


# -------------------------------------------------------------------------------- the run's folder


class Run:
    """A run's folder: args.json, log.jsonl, ckpt.pt. Only the first process writes it.

    A stop of any kind loses what came after the last checkpoint. On a CPU the resumed run ends with
    the same bits.
    """

    SAVE_SECONDS = 10  # between checkpoints, and to the next log line

    def __init__(self, args: Namespace, name: str, start: int):
        """In --out, or a new runs/<name>-<i>. Log lines after step `start` will be dropped."""
        self.args, self.saved_step, self.saved_at = args, start, time.monotonic()
        self.folder = Path(args.out or (new_folder(name) if rank() == 0 else "runs"))

    def __enter__(self):
        if rank():
            return
        if "environment" not in self.args:  # a resumed run keeps its first
            here = shlex.quote(str(Path(__file__).parent))
            hardware = f"CPU, {torch.get_num_threads()} threads"
            if self.args.device.startswith("cuda"):
                hardware = torch.cuda.get_device_name(self.args.device)
            self.args.environment = dict(
                command=shlex.join(sys.argv),
                commit=subprocess.getoutput(f"git -C {here} describe --always --dirty"),
                hardware=hardware,
                torch=str(torch.__version__),
            )
        (self.folder / "args.json").write_text(json.dumps(vars(self.args), indent=1))
        log = self.folder / "log.jsonl"
        lines = read_log(log) if self.saved_step and log.exists() else []
        kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= self.saved_step]
        with atomic_write(log) as f:
            f.write("".join(kept).encode())

    def __exit__(self, kind, *_):
        if kind is KeyboardInterrupt:
            where = f"--out {shlex.quote(str(self.folder))} --device {self.args.device}"
            command = f"python {self.args.script} {where} --resume"
            print(f"\nstopped, saved at step {self.saved_step}; to continue: {command}")

    def log(self, step: int, line: dict, text: str):
        """A line of log.jsonl, and its main numbers on the screen."""
        if rank():
            return
        with open(self.folder / "log.jsonl", "a") as f:
            f.write(json.dumps(dict(step=step, **line)) + "\n")
        shown = ("mse", "kl", "perplexity", "codes_used", "entropy_mean")
        numbers = [f"{k} {line[k]:.4g}" for k in shown if line.get(k) is not None]
        print(f"step {step:>6}  " + "  ".join([*numbers, text]), flush=True)

    def check_finite(self, loss: float | None, model: nn.Module, since: int):
        """Ends the process, and leaves the checkpoint, if the loss or a weight is not finite."""
        weights = all(p.isfinite().all() for p in model.parameters())
        if loss is None or not math.isfinite(loss) or not weights:
            kept = f"{self.folder}/ckpt.pt is from step {self.saved_step}"
            stopped = f"after step {since} the loss or a weight is not finite; {kept}"
            sys.exit(1 if rank() else stopped)

    def save(self, step: int, **states):
        """ckpt.pt: the states of modules and optimizers, of the CPU's generator, the settings."""
        if rank():
            return
        states |= dict(step=step, args=vars(self.args), generator=torch.get_rng_state())
        buffer = io.BytesIO()  # torch.save itself aborts in C++ on a full disk
        torch.save(states, buffer)
        with atomic_write(self.folder / "ckpt.pt") as f:
            f.write(buffer.getbuffer())
        self.saved_step, self.saved_at = step, time.monotonic()


def new_folder(name: str) -> Path:
    """Makes the first free runs/<name>-<i>. Runs that start together get one each."""
    for i in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            folder = Path(f"runs/{name}-{i}")
            folder.mkdir(parents=True)
            return folder


def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl. A killed run may have left half a line at its end."""
    try:
        text = path.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    except ValueError as e:
        raise UserError(f"{path} is damaged: {e}") from None


def saved_run(given: dict, script: str, may_change: set) -> tuple[dict | None, dict]:
    """The checkpoint in --out and its settings, to resume; UserError unless that is asked for."""
    if given.get("resume") and "out" not in given:
        raise UserError("--resume needs --out, the folder of the run to continue")
    folder = Path(given.get("out", "runs"))
    folder.mkdir(parents=True, exist_ok=True)
    if "out" not in given or not (folder / "ckpt.pt").exists():
        return None, dict(script=script)
    if not given.get("resume"):
        raise UserError(f"{folder} already holds a run; --resume it, or name another --out")
    checkpoint = load_checkpoint(folder, script)
    here = ("out", "resume", "device")
    saved = {name: value for name, value in checkpoint["args"].items() if name not in here}
    for name in saved.keys() & given.keys() - may_change:
        if given[name] != saved[name]:
            flag = f"--{name.replace('_', '-')} {given[name]}"
            raise UserError(f"{flag} contradicts the run in {folder}: {saved[name]}")
    return checkpoint, saved


def checkpoint_file(path) -> Path:
    """A run's checkpoint; path: the run's folder, or the file itself."""
    path = Path(path).expanduser()
    return path / "ckpt.pt" if path.is_dir() else path


def load_checkpoint(path, script: str | None = None) -> dict:
    """The dict in a run folder's ckpt.pt, or in the file itself, on the CPU.

    UserError unless it is whole and of a run of `script`.
    """
    path = checkpoint_file(path)
    try:
        if zipfile.ZipFile(path).testzip():
            raise ValueError("its checksums do not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
        made_by, model = state["args"]["script"], state["args"].get("model")
    except FileNotFoundError:
        raise UserError(f"{path} is not there: name the folder of a run") from None
    except Exception as e:  # a damaged file can raise any exception
        raise UserError(f"{path} is not a whole checkpoint: {in_one_line(e)}") from None
    if script and made_by != script:
        raise UserError(f"{path} is not a run of {script}, but of {made_by}")
    if model and model not in QUANTIZERS:
        raise UserError(f"{path} is of --model {model}, which this train_vae.py does not have")
    return state


def load_state(part, state, path):
    """Puts a saved state of a module or an optimizer in place; UserError if it is of another."""
    try:
        part.load_state_dict(state)
    except Exception as e:  # of many kinds
        what = "is of another model or version"
        raise UserError(f"the state in {path} {what}: {in_one_line(e)}") from None


@contextlib.contextmanager
def atomic_write(path: Path):
    """A file that appears at path whole or not at all: written beside it, then renamed."""
    part = path.with_name(f"{path.name}.{os.urandom(4).hex()}.part")  # no other process's
    try:
        with open(part, "xb") as f:
            yield f
        os.replace(part, path)
    except OSError as e:
        e.filename = str(path)  # a full disk's error names no file
        raise
    finally:
        part.unlink(missing_ok=True)


# ----------------------------------------------------------------------------- device and processes


def prepare_device(device: str | None = None, precision: str | None = None) -> tuple[str, str]:
    """The device and precision that run; UserError for a device that is not there."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not device.startswith(("cpu", "cuda")):
        raise UserError(f"--device {device} is not supported: cpu, cuda or cuda:1, ...")
    on_gpu = device.startswith("cuda")
    if on_gpu and process_count() > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = str(torch.zeros(1, device=device).device)  # "cuda" becomes "cuda:0"
        if on_gpu:
            torch.cuda.set_device(device)  # Triton launches on the current device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {device} is not there: {in_one_line(e)}") from None
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # fp32 is fp32
    torch.backends.cudnn.benchmark = True  # the shapes of a step never change
    fast_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return device, precision or ("bf16" if fast_bf16 else "fp32")


def joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    return torch.distributed.get_rank() if joined() else 0


def process_count() -> int:
    return torch.distributed.get_world_size() if joined() else 1


def join_processes():
    """Join the other processes of a torchrun, which sets these variables."""
    if joined() or not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    a_day = datetime.timedelta(days=1)  # the others wait while the first decodes a data set
    try:
        torch.distributed.init_process_group(backend, timeout=a_day)
    except ValueError as e:  # some of the variables are missing
        raise UserError(f"{in_one_line(e)}: start by torchrun, or unset RANK, WORLD_SIZE") from None
    if rank():  # the first alone prints
        sys.stdout = open(os.devnull, "w")


def all_reduce_sum(x: Tensor) -> Tensor:
    if process_count() > 1:
        torch.distributed.all_reduce(x)
    return x


# -------------------------------------------------------------------------- flags, errors and main


class UserError(Exception):
    """The user's mistake: its one line is printed and the exit code is 2."""


# What a number may be, where that is not 1 (a float: 0) to 10^12.
BOUNDS = dict(
    size=(8, 1024),
    width=(4, 4096),
    codebook_size=(2, 16_384),  # codes are kept as int16
    seed=(0, 2**63 - 1),
    tau_start=(1e-3, 1e3),  # below 1e-5 the kernels' quick logarithm moves y
    tau_end=(1e-3, 1e3),
    max_logit=(-1e30, math.inf),
    dropout=(0, 0.99),
    ema=(0, 1),
)


def parse_flags(script: str, table: dict, choices: dict, argv=None) -> dict:
    """What the command line gives, of the table's flags: name=(type, default or None, help)."""
    about = "README.md shows the commands, the head of the file says what it does."
    usage = f"python {script} [flags]; --help lists them"
    p = argparse.ArgumentParser(usage=usage, description=about, argument_default=argparse.SUPPRESS)
    for name, (kind, default, text) in table.items():
        how = dict(type=path_flag if kind is Path else kind, choices=choices.get(name))
        if kind is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        if default not in (None, False):
            text += f" (default: {default})"
        p.add_argument("--" + name.replace("_", "-"), help=text, **how)
    given = vars(p.parse_args(argv))
    for name, value in given.items():
        if isinstance(value, Path):
            given[name] = str(value)
        elif type(value) in (int, float):
            low, high = BOUNDS.get(name, (type(value) is int, 1e12))
            if not low <= value <= high:  # nan neither
                p.error(f"--{name.replace('_', '-')} {value} is not in {low:g} to {high:g}")
    return given


def path_flag(text: str) -> Path:
    if not text:  # an unset "$OUT"
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(os.path.expanduser(text))


def in_one_line(e: Exception) -> str:
    """What an exception says, or its name: some begin with a line that says nothing."""
    return " ".join((str(e) or type(e).__name__).split())[:200]


def tune_cpu():
    """For a script's process, before any thread starts: two switches that make a step faster."""
    torch.set_flush_denormal(True)  # denormals are slow, and many once pi is sharp
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        # Freed memory is kept, not mapped and zeroed anew: a sixth of a step's CPU time at n = 32.
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-8, 1), (-4, 0), (-1, -1)):  # ARENA_MAX, MMAP_MAX, TRIM_THRESHOLD
            mallopt(option, value)


def run_script(script: str, work, argv=None):
    """work(argv); a user's mistake, a full disk, too little memory: one line and exit code 2."""
    try:
        work(argv)
        sys.stdout.flush()
        if process_count() > 1:  # not after an error: it would wait for processes still at work
            torch.distributed.destroy_process_group()
        return
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except UserError as e:
        message = str(e)
    except OSError as e:
        message = f"{e.filename or 'a file'}: {e.strerror or e}"
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "allocate" not in str(e):
            raise
        message = "out of memory: take a smaller batch, width or codebook"
    print(f"{script}: {message}", file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    run_script("train_vae.py", lambda argv: train(*settings(argv)), argv)


if __name__ == "__main__":
    tune_cpu()
    main()
