"""Stage 1: train a discrete VAE: EdVAE (Baykal, Kandemir, Unal 2024) or one of five baselines.

    python train_vae.py                                  # generated shapes, minutes on two cores
    python train_vae.py --dataset cifar10                # by this project's recipe, 15,000 steps
    python train_vae.py --dataset cifar10 --preset paper # the paper's experiment, 150,000 steps
    python train_vae.py --dataset cifar10 --model dvae   # one of the baselines
    python train_vae.py --dataset folder --data-dir photos --size 64       # your own images
    python train_vae.py --dataset cifar10 --profile      # where the time of a step goes
    torchrun --standalone --nproc_per_node=4 train_vae.py --dataset cifar10     # four processes

From pixels to pixels, for B images of H x W, N = H / 4 and K codes of D numbers:

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

This file in order: settings, data, networks, quantisers, the model, schedules, measures, the
training loop; last the plumbing: command line, run folder, processes, errors.
"""

import argparse
import contextlib
import copy
import ctypes
import datetime
import functools
import io
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor, nn

import kernels

# ---------------------------------------------------------------------------------------- settings

# Settings of a run. The later wins: DEFAULTS, PRESETS, DATASETS, SYSTEMS, PAIRS, a resumed run's
# own, the flags (`settings`).
DEFAULTS = dict(
    dataset="shapes",
    model="edvae",
    data_dir="data",
    out=None,
    profile=False,
    codebook_size=512,
    code_dim=16,
    codebook_init="normal",  # N(0, 1), or "uniform" in (-1 / K, 1 / K)
    two_heads=False,  # SQ-VAE's variant III: the encoder gives variances too
    batch_size=128,
    max_logit=20.0,
    kl="exact",
    first_kernel=3,
    seed=42,
    backend="auto",
)
# Each *_fraction is a share of --steps; tau_decay is -ln(last tau / first tau).
PRESETS = {
    # What the paper trains all systems with (App. D). Each keeps the network and the
    # initialisation of its authors.
    "paper": dict(
        steps=150_000,
        init="authors",
        lr=1e-3,
        adam_beta2=0.999,
        muon_lr=0.0,
        lr_schedule="quarter-cosine",
        warm_up_fraction=0,
        lr_anneal_fraction=1 / 3,
        beta_ramp_fraction=1 / 30,
        tau_start=1.0,
        tau_hold_fraction=0,
        tau_decay=1.5,
    ),
    # This project's: for EdVAE and dVAE He initialisation, so that the image reaches the logits
    # (the other networks train better from their authors'); Muon, larger rates.
    # tau stays high while the codes differentiate: lowered from the start, it starves them. beta
    # falls with the rate: late in training the KL would only keep pi noisy.
    "fast": dict(
        steps=15_000,
        init="he",
        lr=None,  # see SYSTEMS
        adam_beta2=0.99,
        muon_lr=None,
        lr_schedule="cosine",
        warm_up_fraction=0.02,
        lr_anneal_fraction=1,
        beta_ramp_fraction=0.1,
        tau_start=2.0,
        tau_hold_fraction=0.2,
        tau_decay=2.3,  # to 0.2
    ),
}
DATASETS = {
    "shapes": dict(preset="fast", size=32, steps=600, batch_size=64, codebook_size=64),
    "cifar10": dict(preset="fast", size=32),
    "celeba": dict(preset="paper", size=64, two_heads=True),
    "lsun-church": dict(preset="paper", size=128, first_kernel=7, two_heads=True),
    "folder": dict(preset="fast", size=64, two_heads=True),
}
# beta: the highest weight of the KL; of the commitment loss of VQ-VAE-EMA and VQ-STE++; of all of
# SQ-VAE's latent loss. --preset fast: lr = lr_times_width / width and muon_lr = fast_muon_lr, both
# chosen by runs of 1,000 steps (assets/results.md); VQ-STE++'s are lower, since it collapsed later.
SYSTEMS = {
    "edvae": dict(width=128, beta=1e-7, lr_times_width=0.32, fast_muon_lr=0.03),
    "dvae": dict(width=128, beta=5e-5, lr_times_width=0.32, fast_muon_lr=0.03),
    "vqvae-ema": dict(
        width=256, beta=0.25, codebook_init="uniform", lr_times_width=0.32, fast_muon_lr=0.015
    ),
    "gs-vqvae": dict(
        width=256, beta=5e-6, codebook_init="uniform", lr_times_width=0.32, fast_muon_lr=0.015
    ),
    "sq-vae": dict(width=64, beta=1.0, lr_times_width=2.56, fast_muon_lr=0.12),
    "vq-ste++": dict(width=64, beta=2.0, lr_times_width=0.32, fast_muon_lr=0.015),
}
# What a system takes on one dataset.
PAIRS = {
    ("edvae", "cifar10"): dict(beta=5e-7),
    ("edvae", "shapes"): dict(beta=3e-7, width=32),
    ("dvae", "shapes"): dict(width=32),
    ("vqvae-ema", "shapes"): dict(width=64),
    ("gs-vqvae", "shapes"): dict(width=64),
}

# Set by torchrun: the number of this process and how many there are.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class UserError(Exception):
    """The user's mistake: its one line is printed and the exit code is 2."""


# -------------------------------------------------------------------------------------------- data


def load_images(dataset: str, split: str, data_dir="data", size: int | None = None) -> np.ndarray:
    """All images of a split ("train" or "test"): uint8 (count, size, size, 3), memory-mapped.

    The first use decodes them to <data-dir>/<dataset>-<split>-<size>.npy; after that the originals
    are not needed. Raises UserError if they are neither there nor to be downloaded.
    """
    size = size or DATASETS[dataset]["size"]
    cache = Path(data_dir) / f"{dataset}-{split}-{size}.npy"
    if not cache.exists():
        count, images = READERS[dataset](split, Path(data_dir), size)
        if not count:
            what = f"no images for --dataset {dataset}, split {split}, under {data_dir}"
            if dataset == "folder":
                what += "; every tenth image is for test, or put them in train/ and test/"
            raise UserError(what)
        cache.parent.mkdir(parents=True, exist_ok=True)
        header = dict(descr="|u1", fortran_order=False, shape=(count, size, size, 3))
        with atomic_write(cache) as f:
            np.lib.format.write_array_header_1_0(f, header)
            for i, image in enumerate(images):
                f.write(image.tobytes())
                if i % 1000 == 999 or i + 1 == count:
                    print(f"\r{cache.name}: {i + 1:,} of {count:,} images", end="", flush=True)
        print()
    try:
        # Copy-on-write: PyTorch warns about arrays that it may not write to.
        images = np.load(cache, mmap_mode="c", allow_pickle=False)
        if images.dtype != np.uint8 or images.shape[1:] != (size, size, 3) or not len(images):
            raise ValueError(f"{images.dtype} {images.shape}, not uint8 (count, {size}, {size}, 3)")
        return images
    except Exception as e:  # a malformed header can raise any exception
        raise UserError(f"{cache} is damaged ({e}); delete it to decode again") from None


def draw_shapes(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Generated images, uint8 (count, size, size, 3): one to three shapes on a colour gradient."""

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


# A reader gives the number of a split's images and an iterator of them, uint8 (size, size, 3).


def read_shapes(split: str, data_dir: Path, size: int):
    count, seed = (20_000, 0) if split == "train" else (2_000, 1)
    rng = np.random.default_rng([seed, size])
    chunks = (draw_shapes(500, size, rng) for _ in range(count // 500))
    return count, (image for chunk in chunks for image in chunk)


def read_cifar10(split: str, data_dir: Path, size: int):
    try:
        data = torchvision.datasets.CIFAR10(data_dir, train=split == "train", download=True).data
    except (OSError, RuntimeError) as e:
        cure = f"put cifar-10-python.tar.gz or cifar10-{split}-32.npy there"
        raise UserError(
            f"CIFAR-10 is not under {data_dir} and could not be downloaded ({e}); {cure}"
        ) from None
    return len(data), (to_pixels(image, size) for image in data)


def read_celeba(split: str, data_dir: Path, size: int):
    """Aligned images, centre crop 140. The paper's numbers are from the official valid split."""
    folder = data_dir / "celeba" / "img_align_celeba"
    if not (folder / "000001.jpg").exists():
        try:
            torchvision.datasets.CelebA(data_dir, split="all", download=True)
        except (OSError, RuntimeError, ImportError) as e:
            cure = f"put its aligned images, from 000001.jpg on, in {folder}"
            raise UserError(f"CelebA could not be downloaded ({e}); {cure}") from None
    first, last = (1, 162_770) if split == "train" else (162_771, 182_637)
    paths = [p for p in image_files(folder) if p.stem.isdigit() and first <= int(p.stem) <= last]
    return len(paths), (to_pixels(path, size, crop=140) for path in paths)


def read_lsun_church(split: str, data_dir: Path, size: int):
    folder = data_dir / f"church_outdoor_{'train' if split == 'train' else 'val'}_lmdb"
    try:
        import lmdb
    except ImportError:
        raise UserError("--dataset lsun-church needs the package lmdb: pip install lmdb") from None
    if not folder.is_dir():
        raise UserError(f"{folder} is not there: unpack LSUN's church_outdoor in {data_dir}")
    try:
        database = lmdb.open(str(folder), readonly=True, lock=False)
    except lmdb.Error as e:
        raise UserError(f"{folder} is not an LSUN database ({e})") from None

    def images():
        with database.begin() as transaction:
            for _, value in transaction.cursor():
                yield to_pixels(io.BytesIO(value), size, stretch=True)

    return database.stat()["entries"], images()


def read_folder(split: str, data_dir: Path, size: int):
    """train/ and test/ where both are there; else every tenth image, by name, is for test."""
    if not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir} is not a folder of images")
    if (data_dir / "train").is_dir() and (data_dir / "test").is_dir():
        paths = image_files(data_dir / split)
    else:
        paths = [
            p for i, p in enumerate(image_files(data_dir)) if (i % 10 == 9) == (split == "test")
        ]
    return len(paths), (to_pixels(path, size) for path in paths)


READERS = {
    "shapes": read_shapes,
    "cifar10": read_cifar10,
    "celeba": read_celeba,
    "lsun-church": read_lsun_church,
    "folder": read_folder,
}


def image_files(folder: Path) -> list[Path]:
    kinds = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in kinds and p.is_file())


def to_pixels(source, size: int, crop: int | None = None, stretch: bool = False) -> np.ndarray:
    """An image file or an array as uint8 (size, size, 3).

    Grey, palette and 16-bit images become RGB, transparency becomes white, EXIF orientation is
    applied. The shorter side is scaled to size and the rest cropped; stretch: the aspect ratio is
    not kept.
    """
    try:
        image = Image.fromarray(source) if isinstance(source, np.ndarray) else Image.open(source)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits per pixel
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise UserError(f"cannot read {source}: {e}") from None
    if crop:
        left, top = (image.width - crop) // 2, (image.height - crop) // 2
        image = image.crop((left, top, left + crop, top + crop))
    if stretch:
        return np.asarray(image.resize((size, size), Image.BILINEAR))
    return np.asarray(ImageOps.fit(image, (size, size), Image.BILINEAR))


def resident(images: np.ndarray, device: torch.device) -> Tensor:
    """Images as a tensor, on the device unless they fill more than half of its free memory.

    On a CPU, and for a larger set, they stay memory-mapped: the page cache holds what is in use.
    """
    images = torch.from_numpy(images)
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] // 2:
        return images.to(device)
    return images


def take(images: Tensor, index: Tensor, device: torch.device) -> Tensor:
    """images[index] as floats in [0, 1] on the device: (B, 3, H, W), channels last in memory."""
    if device.type == "cuda":
        index = index.pin_memory()
    batch = images[index.to(images.device, non_blocking=True)]
    if batch.device != device:
        batch = batch.pin_memory().to(device, non_blocking=True)
    return to_float(batch)


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in [0, 1], channels last in memory."""
    return images.permute(0, 3, 1, 2).float() / 255


@functools.lru_cache(2)
def epoch_order(epoch: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator)


def batch_indices(step: int, batch_size: int, count: int, seed: int) -> Tensor:
    """Which of count images step `step` sees: (batch_size), a slice of shuffled epochs in a row.

    A function of its arguments alone, so that a resumed run sees the same batches.
    """
    epoch, start = divmod(step * batch_size, count)
    parts = []
    while batch_size > 0:
        parts.append(epoch_order(epoch, count, seed)[start : start + batch_size])
        batch_size -= len(parts[-1])
        epoch, start = epoch + 1, 0
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------- networks


class Block(nn.Module):
    """x + res(x) / 36: four ReLU-convolution pairs, three of them n_out / 4 channels wide.

    1/36 is the authors' gain, 1 / blocks^2 for six blocks; the paper's text has plain residuals.
    Here it scales the last convolution's weights, which saves a pass over the activations. The
    stream x stays fp32: in bf16 it would lose the small branch.

    upsample: x is enlarged first, (B, n_in, N, N) to (B, n_out, 2N, 2N). The first convolutions are
    then 1x1: they commute with it, and run before it at a quarter of the cost.
    """

    def __init__(self, n_in: int, n_out: int, kernel_sizes: tuple[int, ...], upsample=False):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2) if upsample else nn.Identity()
        n = n_out // 4
        channels = zip((n_in, n, n, n), (n, n, n, n_out), kernel_sizes)
        self.id = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.res = nn.ModuleList(nn.Conv2d(i, o, k, padding=k // 2) for i, o, k in channels)

    def forward(self, x: Tensor) -> Tensor:
        autocast = torch.is_autocast_enabled(x.device.type)
        low = x.to(torch.get_autocast_dtype(x.device.type)) if autocast else x
        first, *middle, last = self.res
        h = self.up(first(F.relu(low)))
        for conv in middle:
            h = conv(F.relu(h))
        h = F.conv2d(F.relu(h), last.weight / 36, last.bias / 36, padding=last.padding)
        skip = x if isinstance(self.id, nn.Identity) else self.id(low).float()
        return self.up(skip) + h


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
            return self.head(h.float())


class Decoder(nn.Sequential):
    """Quantised latents (B, D, N, N) to images minus 1/2, (B, 3, 4N, 4N); linear output."""

    def __init__(self, width: int = 128, code_dim: int = 16):
        n, k = width, (1, 3, 3, 3)
        super().__init__(
            Block(code_dim, 4 * n, k),
            Block(4 * n, 4 * n, k),  # (B, 4n, N, N)
            Block(4 * n, 2 * n, k, upsample=True),  # (B, 2n, 2N, 2N)
            Block(2 * n, 2 * n, k),
            Block(2 * n, n, k, upsample=True),  # (B, n, 4N, 4N)
            Block(n, n, k),
            nn.ReLU(),
            nn.Conv2d(n, 3, 1),  # (B, 3, 4N, 4N)
        )
        self.apply(authors_init)


def authors_init(module: nn.Module):
    """Convolutions N(0, 0.02), their biases PyTorch's default; batch norms N(1, 0.02)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0, 0.02)
    if isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)


@torch.no_grad()
def he_init(encoder: Encoder, decoder: Decoder):
    """He et al. 2015 for every convolution, so that the image reaches the logits.

    The head is N(0, 1 / fan-in); the reconstructions start near mean grey.
    """
    for module in [*encoder.modules(), *decoder.modules()]:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    nn.init.normal_(encoder.head.weight, 0, encoder.head.in_channels**-0.5)
    decoder[-1].weight.mul_(0.1)


class Residual(nn.Module):
    """x + (ReLU, 3x3, ReLU, 1x1)(x), with batch norm after each convolution or without."""

    def __init__(self, n: int, norm: bool):
        super().__init__()
        Norm = nn.BatchNorm2d if norm else nn.Identity
        # No ReLU in place: the first would change x.
        self.res = nn.Sequential(
            nn.ReLU(),
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


class SideBySide(nn.ModuleList):
    """Modules with one input; their outputs become one, along the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([module(x) for module in self], 1)


def sq_encoder(n: int, D: int, size: int, heads: int = 1) -> nn.Sequential:
    """SQ-VAE (Takida et al. 2022): images in [0, 1] to z_e; two networks by size.

    z_e is (B, heads D, N, N): each head has its own last block.
    """
    small = size <= 32

    def block():
        return Residual(n, norm=True)

    return nn.Sequential(
        nn.Conv2d(3, n // 2, 4, 2, 1),  # (B, n/2, H/2, W/2)
        nn.BatchNorm2d(n // 2),
        nn.ReLU(),
        nn.Conv2d(n // 2, n, 4, 2, 1),  # (B, n, N, N)
        nn.BatchNorm2d(n),
        nn.ReLU(),
        nn.Conv2d(n, n, 3, padding=1),
        *([nn.BatchNorm2d(n), nn.ReLU()] if small else []),
        *(block() for _ in range(1 if small else 5)),
        SideBySide(block() for _ in range(heads)) if heads > 1 else block(),  # (B, heads n, N, N)
        nn.Conv2d(heads * n, heads * D, 1, groups=heads) if n != D else nn.Identity(),
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


# -------------------------------------------------------------------------------------- quantisers
#
# Six answers to three questions: which row of the codebook stands for z_e, how does the gradient
# get past the choice, and what keeps rows from dying?
#             choice in training              gradient                  against collapse
# EdVAE       sample of Cat(Dirichlet mean)   relaxed sample            alpha >= 1, see EdVAE; KL
# dVAE        sample of softmax(logits)       relaxed sample            KL to the uniform
# VQ-VAE-EMA  nearest                         straight-through          none
# GS-VQ-VAE   sample of softmax(-distance)    relaxed sample            KL to the uniform
# SQ-VAE      the same, learnt variance       relaxed sample            the variance starts large
# VQ-STE++    nearest                         straight-through, synced  affine map, replacement
#
# To add one: a class with a forward, and a line in QUANTIZERS and in SYSTEMS.


class Quantizer(nn.Module):
    """A codebook and the choice of its rows. Subclasses give forward, and may replace the rest.

    tau and beta are scalar tensors; key is the seed of the noise, see `train`.
    """

    network = "vq"  # "ed", "vq" or "sq": whose encoder and decoder
    learns_by_gradient = True  # False: no optimiser touches the codebook
    ramps_beta = False  # whether beta rises from 0
    init_codebook = None  # or a method that sets the codebook up from z_e of the first batch

    def __init__(self, args: Namespace):
        super().__init__()
        K, D = args.codebook_size, args.code_dim
        uniform = args.codebook_init == "uniform"
        codebook = (2 * torch.rand(K, D) - 1) / K if uniform else torch.randn(K, D)
        self.codebook = nn.Parameter(codebook, requires_grad=self.learns_by_gradient)  # M (K, D)
        self.args = args

    def forward(
        self, z_e: Tensor, tau: Tensor, beta: Tensor, key: Tensor
    ) -> tuple[Tensor, kernels.Quantized]:
        """z_e (B, N, N, C) to the quantiser's part of the loss, weighted, and to z_q and measures.

        At test time z_q is vectors()[indices].
        """
        raise NotImplementedError

    def vectors(self) -> Tensor:
        """The codes as the decoder sees them, (K, D)."""
        return self.codebook

    def assign(self, z_e: Tensor) -> Tensor:
        """The indices of the hard codes, (B, N, N, C) to (B, N, N)."""
        return distances(z_e, self.vectors()).argmin(-1)

    def probabilities(self, z_e: Tensor) -> Tensor:
        """pi (B, N, N, K); one-hot where the choice is deterministic."""
        return F.one_hot(self.assign(z_e), len(self.codebook)).float()

    def reconstruction_loss(self, x_hat: Tensor, x: Tensor) -> Tensor:
        return F.mse_loss(x_hat, x)


class EdVAE(Quantizer):
    """Baykal et al. 2024, Eq. 2 to 8: logits are evidence for a Dirichlet over the codes.

    Every alpha is at least 1, so even a code with a very negative logit keeps the probability
    1 / S: it is still drawn, and its row of the codebook still gets a gradient. (Its logit hardly
    does: that gradient has the factor exp(z_e) / alpha.) Only large evidence for other codes can
    starve it, and the KL penalises large evidence.
    """

    network, ramps_beta = "ed", True

    def forward(self, logits: Tensor, tau, beta, key):
        a = self.args
        options = dict(backend=a.backend, compile=a.compile)
        q = kernels.evidential_quantize(logits, self.codebook, tau, a.max_logit, key, **options)
        if a.kl == "textbook":
            q = q._replace(kl=kernels.textbook_kl(logits, a.max_logit))
        return beta * q.kl.mean(), q

    def assign(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        ln_alpha = F.softplus(logits.float().clamp(max=self.args.max_logit))  # Eq. 2
        return ln_alpha.softmax(-1)  # alpha / S


class SoftmaxQuantizer(Quantizer):
    """pi = softmax(logits(z_e)): a Gumbel-softmax sample of it, and its KL to the uniform."""

    ramps_beta = True

    def logits(self, z_e: Tensor) -> Tensor:
        """(B, N, N, C) to (B, N, N, K)."""
        raise NotImplementedError

    def forward(self, z_e: Tensor, tau, beta, key):
        options = dict(seed=key, backend=self.args.backend, compile=self.args.compile)
        q = kernels.gumbel_quantize(self.logits(z_e), self.codebook, tau, **options)
        return beta * q.kl.mean(), q

    def assign(self, z_e: Tensor) -> Tensor:
        return self.logits(z_e).argmax(-1)

    def probabilities(self, z_e: Tensor) -> Tensor:
        return self.logits(z_e).float().softmax(-1)


class DVAE(SoftmaxQuantizer):
    """Ramesh et al. 2021: the encoder gives the logits."""

    network = "ed"

    def logits(self, z_e: Tensor) -> Tensor:
        return z_e


class VQVAE(Quantizer):
    """van den Oord et al. 2017, A.1: the nearest code.

    A code is the moving average of the vectors z_e that were assigned to it.
    """

    learns_by_gradient = False
    DECAY = 0.99

    def __init__(self, args: Namespace):
        super().__init__(args)
        # Each code starts with a count of one: itself. From zero, the first update would divide the
        # codes that were given no vectors by almost nothing.
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
        nan = torch.full_like(z_q[..., 0], math.nan)
        straight_through = z_e + (z_q - z_e).detach()
        return loss, kernels.Quantized(straight_through, nan, indices, nan, nan)

    @torch.no_grad()
    def update(self, count: Tensor, sums: Tensor, eps: float = 1e-5):
        self.count.lerp_(count, 1 - self.DECAY)  # n <- g n + (1 - g) n_batch
        self.sum.lerp_(sums, 1 - self.DECAY)  # s <- g s + (1 - g) s_batch
        n = self.count.sum()
        smoothed = (self.count + eps) / (n + len(self.count) * eps) * n  # Laplace smoothing
        self.codebook.copy_(self.sum / smoothed[:, None])


class GSVQVAE(SoftmaxQuantizer):
    """Sonderby et al. 2017: pi = softmax(-|z_e - e_k|^2)."""

    def logits(self, z_e: Tensor) -> Tensor:
        return -distances(z_e, self.codebook)


class SQVAE(SoftmaxQuantizer):
    """Takida et al. 2022: pi = softmax(-|z_e - e_k|^2 / (2 sigma^2)). Losses are in nats per image.

    sigma^2 = v + exp(rho) is learnt. v = 1 (variant I), or at each position the exponential of a
    second head's mean over its D channels (III): then z_e is (B, N, N, 2D).
    """

    network, ramps_beta = "sq", False

    def __init__(self, args: Namespace):
        super().__init__(args)
        log_variance = math.log(20 * args.code_dim / 64)  # the original's log 20 at D = 64
        self.rho = nn.Parameter(torch.tensor(log_variance))

    def split(self, z_e: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, N, N, D) and the precision 1 / sigma^2 (B, N, N, 1)."""
        D = self.args.code_dim
        z = z_e[..., :D].float()
        v = torch.ones_like(z[..., :1])
        if z_e.shape[-1] > D:
            v = z_e[..., D:].float().mean(-1, keepdim=True).exp()
        return z, 1 / (v + self.rho.exp()).clamp(min=1e-10)

    def logits(self, z_e: Tensor) -> Tensor:
        """-|z - e_k|^2 / (2 sigma^2): (B, N, N, K)."""
        z, precision = self.split(z_e)
        return -0.5 * precision * distances(z, self.codebook)

    def forward(self, z_e: Tensor, tau, beta, key):
        _, q = super().forward(z_e, tau, beta, key)
        (z, precision), B = self.split(z_e), len(z_e)
        discrete = (q.kl - math.log(len(self.codebook))).sum() / B  # -H, summed over positions
        continuous = (0.5 * precision * (z - q.z_q).square()).sum() / B
        return beta * (discrete + continuous), q

    def reconstruction_loss(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """(d_x / 2) ln of an image's squared error: the decoder's variance at its optimum."""
        return x[0].numel() / 2 * torch.log((x_hat - x).square().sum() / len(x))


class VQSTE(Quantizer):
    """Huh et al. 2023: the nearest code of an affine codebook c_k = (1 + l a) e_k + l t.

    The learnt scale a and shift t are shared, so that unused codes move too. Once z_e is assigned,
    and before z_q is read, e takes a step of SGD with momentum towards its vectors. A share SYNC of
    dL/dz_q also reaches a and t. A code that is unused for REPLACE_AFTER training steps moves onto
    a vector of the batch. Unlike the authors' code with such a step, this keeps the commitment
    loss: without it nothing bounds z_e.
    """

    network, learns_by_gradient = "sq", False
    AFFINE_LR = 10.0  # l
    SYNC = 0.2
    REPLACE_AFTER = 20
    COMMITMENT = 0.1  # 1 - b of the authors' loss, times beta

    def __init__(self, args: Namespace):
        super().__init__(args)
        K, D = self.codebook.shape
        self.scale, self.shift = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))  # a, t
        self.register_buffer("velocity", torch.zeros(K, D))
        self.register_buffer("patience", torch.full((K,), self.REPLACE_AFTER))

    def vectors(self) -> Tensor:
        return (1 + self.AFFINE_LR * self.scale) * self.codebook + self.AFFINE_LR * self.shift

    @torch.compiler.disable  # as VQVAE's
    def forward(self, z_e: Tensor, tau, beta, key):
        indices = self.assign(z_e)
        if self.training:
            count, sums = cell_sums(z_e, indices, len(self.codebook))
            self.replace(z_e, count)
            self.step(count, sums)
        z_q = self.vectors()[indices]  # of the codebook as it is now
        loss = beta * self.COMMITMENT * F.mse_loss(z_e.float(), z_q.detach())
        nan = torch.full_like(z_q[..., 0], math.nan)
        straight_through = z_e + (z_q - z_e).detach()
        synced = straight_through + self.SYNC * (z_q - z_q.detach())
        return loss, kernels.Quantized(synced, nan, indices, nan, nan)

    @torch.no_grad()
    def replace(self, z_e: Tensor, count: Tensor):
        """Codes unused for REPLACE_AFTER steps land on vectors of the batch."""
        self.patience.copy_(torch.where(count > 0, self.REPLACE_AFTER, self.patience - 1))
        z = z_e.float().flatten(0, -2)
        picked = z[torch.randint(len(z), (len(count),), device=z.device)]
        picked = picked + 0.01 * picked.norm(dim=1, keepdim=True) * torch.randn_like(picked)
        self.place(self.patience == 0, broadcast_from_first(picked))
        self.patience.masked_fill_(self.patience == 0, self.REPLACE_AFTER)

    @torch.no_grad()
    def step(self, count: Tensor, sums: Tensor):
        """SGD with momentum 0.9 on mean (c - z_e)^2, for e alone.

        50 is the authors' rate at D = 64. The mean over D channels makes this loss steeper at a
        smaller D, so the rate shrinks with it.
        """
        D = self.codebook.shape[1]
        gradient = 2 * (count[:, None] * self.vectors() - sums) / (count.sum() * D)
        self.velocity.mul_(0.9).add_(gradient * (1 + self.AFFINE_LR * self.scale))
        self.codebook.sub_(50 * D / 64 * self.velocity)

    @torch.no_grad()
    def place(self, which: Tensor, vectors: Tensor):
        """Put c_k on vectors_k where which_k: e follows by the inverse of the affine map."""
        e = (vectors - self.AFFINE_LR * self.shift) / (1 + self.AFFINE_LR * self.scale)
        self.codebook.copy_(torch.where(which[:, None], e, self.codebook))
        self.velocity.masked_fill_(which[:, None], 0)

    @torch.no_grad()
    def init_codebook(self, z_e: Tensor):
        """k-means of the first batch: k-means++ seeds, ten rounds."""
        z, K = z_e.float().flatten(0, -2), len(self.codebook)
        centres = z[torch.randint(len(z), (1,), device=z.device)]
        nearest = distances(z, centres)[:, 0]
        for _ in range(K - 1):  # far vectors are likelier seeds
            chosen = torch.multinomial(nearest.clamp(min=0) + 1e-12, 1)
            centres = torch.cat([centres, z[chosen]])
            nearest = torch.minimum(nearest, distances(z, z[chosen])[:, 0])
        centres = broadcast_from_first(centres)
        for _ in range(10):
            count, sums = cell_sums(z, distances(z, centres).argmin(1), K)
            means = sums / count.clamp(min=1)[:, None]
            centres = torch.where(count[:, None] > 0, means, centres)
        self.place(torch.ones(K, dtype=torch.bool, device=z.device), centres)


def distances(z: Tensor, codes: Tensor) -> Tensor:
    """|z - e_k|^2 in float32, whatever autocast says: (..., D) and (K, D) to (..., K)."""
    with torch.autocast(z.device.type, enabled=False):
        z = z.float()
        return z.square().sum(-1, keepdim=True) - 2 * z @ codes.T + codes.square().sum(-1)


def cell_sums(z: Tensor, indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """How many vectors each code was given, and their sum, over all processes: (K), (K, D)."""
    flat, index = z.detach().float().flatten(0, -2), indices.flatten()
    count = torch.zeros(K, device=z.device).index_add_(0, index, torch.ones_like(flat[:, 0]))
    sums = torch.zeros(K, flat.shape[1], device=z.device).index_add_(0, index, flat)
    return all_reduce_sum(count), all_reduce_sum(sums)


QUANTIZERS = {
    "edvae": EdVAE,
    "dvae": DVAE,
    "vqvae-ema": VQVAE,
    "gs-vqvae": GSVQVAE,
    "sq-vae": SQVAE,
    "vq-ste++": VQSTE,
}


class VAE(nn.Module):
    """Encoder, quantiser and decoder. Images go in and come out as (B, 3, H, W) in [0, 1]."""

    def __init__(self, args: Namespace):
        super().__init__()
        self.args = args
        n, K, D = args.width, args.codebook_size, args.code_dim
        network = QUANTIZERS[args.model].network
        if network == "sq":
            two_heads = args.model == "sq-vae" and args.two_heads
            self.encoder = sq_encoder(n, D, args.size, heads=2 if two_heads else 1)
            self.decoder = sq_decoder(n, D, args.size)
            self.offset = 0.0  # sigmoid outputs are of x
        elif network == "ed":
            self.encoder, self.decoder = Encoder(n, K, args.first_kernel), Decoder(n, D)
            self.offset = 0.5  # linear outputs are of x - 1/2
        else:
            self.encoder, self.decoder = vq_encoder(n, D), vq_decoder(n, D)
            self.offset = 0.5
        self.quantizer = QUANTIZERS[args.model](args)
        if network == "ed" and args.init == "he":
            he_init(self.encoder, self.decoder)
        self.to(memory_format=torch.channels_last)

    def encode_features(self, x: Tensor) -> Tensor:
        z_e = self.encoder(x - self.offset)  # (B, C, N, N)
        return z_e.permute(0, 2, 3, 1)  # (B, N, N, C)

    def reconstruct(self, z_q: Tensor) -> Tensor:
        return self.decoder(z_q.permute(0, 3, 1, 2)).float() + self.offset  # (B, 3, H, W)

    z_e, x_hat = encode_features, reconstruct

    def forward(self, x: Tensor, tau, beta, key, hard: bool = False):
        """The loss (Eq. 8 for EdVAE), the squared error and the quantiser's Quantized.

        hard: decode the hard codes, as at test time, in place of a relaxed sample.
        """
        quantizer_loss, q = self.quantizer(self.z_e(x), tau, beta, key)
        z_q = self.quantizer.vectors()[q.indices] if hard else q.z_q
        x_hat = self.x_hat(z_q)
        loss = self.quantizer.reconstruction_loss(x_hat, x) + quantizer_loss
        return loss, F.mse_loss(x_hat.detach(), x), q

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to the indices of their hard codes (B, N, N), int64."""
        return self.quantizer.assign(self.z_e(x))

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Indices of codes (B, N, N) to images (B, 3, H, W) in [0, 1]."""
        return self.x_hat(self.quantizer.vectors()[indices]).clamp(0, 1)


def load_vae(path, device="cpu") -> VAE:
    """A trained model from a run folder or a checkpoint, in eval mode, fp32; or a UserError."""
    state = load_checkpoint(path, device, "train_vae.py")
    here = dict(device=str(device), precision="fp32", backend="auto", compile=False)
    model = VAE(Namespace(**(DEFAULTS | state["args"] | here))).to(device)
    model.load_state_dict(state["model"])
    return model.eval()


# ------------------------------------------------------------------------- optimiser and schedules


class Optimizer:
    """Adam; Muon (Jordan et al. 2024) for the weights of hidden convolutions, unless muon_lr is 0.

    Muon moves a matrix by a nearly orthogonal one: all its directions at one rate, at any width.
    It takes a weight (O, I, h, w) as the matrix (O, h w I), which shares the weight's memory. (Of a
    transposed convolution O and I change places.) Adam keeps the convolutions that read or write
    pixels, the one that writes z_e, and all else: biases, norms, the codebook.
    """

    def __init__(self, model: VAE, args: Namespace):
        _, *encoder, _ = (p for p in model.encoder.parameters() if p.ndim == 4)  # pixels ... z_e
        *decoder, _ = (p for p in model.decoder.parameters() if p.ndim == 4)  # ... pixels
        self.lr, self.muon_lr = args.lr, args.muon_lr
        self.hidden = [*encoder, *decoder] if args.muon_lr else []
        hidden = set(self.hidden)
        others = [p for p in model.parameters() if p.requires_grad and p not in hidden]
        self.adam = torch.optim.Adam(others, betas=(0.9, args.adam_beta2), fused=True)
        self.matrices = [nn.Parameter(self.as_matrix(p.detach())) for p in self.hidden]
        self.muon = torch.optim.Muon(self.matrices, weight_decay=0) if self.hidden else None

    @staticmethod
    def as_matrix(weight: Tensor) -> Tensor:
        """(O, I, h, w), channels last in memory, as (O, h w I)."""
        return weight.permute(0, 2, 3, 1).flatten(1)

    def step(self, lr: float):
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        if self.muon:
            for p, matrix in zip(self.hidden, self.matrices):
                matrix.grad = self.as_matrix(p.grad)
            self.muon.param_groups[0]["lr"] = self.muon_lr * lr / self.lr
            self.muon.step()

    def state_dict(self) -> dict:
        return dict(adam=self.adam.state_dict(), muon=self.muon and self.muon.state_dict())

    def load_state_dict(self, state: dict):
        self.adam.load_state_dict(state["adam"])
        if self.muon:
            self.muon.load_state_dict(state["muon"])


def quarter_cosine(start: float, end: float, progress: float) -> float:
    """From start to end at progress 1; 29% of the way at 1/2: the paper's "cosine annealing"."""
    return start + (end - start) * (1 - math.cos(math.pi / 2 * min(1.0, progress)))


def schedules(step: int, args: Namespace) -> tuple[float, float, float]:
    """lr, beta and tau at a step, counted from 0. Lengths are in steps (see PRESETS)."""
    if args.lr_schedule == "quarter-cosine":
        lr = quarter_cosine(args.lr, 1.25e-3 * args.lr, step / args.lr_anneal)  # to 1.25e-6
        beta_decay = 1.0
    else:  # beta falls with the rate
        beta_decay = (1 + math.cos(math.pi * min(1.0, step / args.lr_anneal))) / 2
        lr = args.lr * beta_decay * min(1.0, (step + 1) / args.warm_up)
    beta = args.beta
    if QUANTIZERS[args.model].ramps_beta:
        beta = quarter_cosine(0.0, args.beta, step / args.beta_ramp) * beta_decay
    tau = args.tau_start * math.exp(-args.tau_rate * max(0, step - args.tau_hold))
    return lr, beta, tau


# ---------------------------------------------------------------------------------------- measures


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of the codes' frequencies (K): 1 for a single code, K for even use."""
    p = counts.double() / counts.sum()
    return math.exp(-torch.special.xlogy(p, p).sum().item())


class Meter:
    """Sums over passes, kept on the device. read() waits for the device and gives their means."""

    def __init__(self, K: int, device):
        # How often each code was chosen; loss, mse, images, kl, entropy, its square, uncertainty.
        self.counts = torch.zeros(K, dtype=torch.int64, device=device)
        self.sums = torch.zeros(7, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, mse: Tensor, q: kernels.Quantized):
        index, images = q.indices.flatten(), len(q.indices)
        self.counts.scatter_add_(0, index, torch.ones_like(index))
        kl, h, u = q.kl.detach().double(), q.entropy.double(), q.uncertainty.double()
        means = torch.stack([loss.detach().double(), mse.double(), h.new_ones(())])
        positions = torch.stack([kl.sum(), h.sum(), h.square().sum(), u.sum()])
        self.sums += torch.cat([images * means, positions])

    def read(self) -> dict:
        """The numbers of a log line over all processes, None where not finite; starts anew."""
        loss, mse, images, kl, h, h_squared, u = all_reduce_sum(self.sums).tolist()
        positions = all_reduce_sum(self.counts).sum().item()
        variance = h_squared / positions - (h / positions) ** 2
        line = dict(
            loss=loss / images,
            mse=mse / images,
            kl=kl / positions,
            perplexity=perplexity(self.counts),
            codes_used=(self.counts > 0).sum().item(),
            entropy_mean=h / positions,
            entropy_std=math.sqrt(max(0.0, variance)) if math.isfinite(variance) else math.nan,
            uncertainty=u / positions,
        )
        self.counts.zero_()
        self.sums.zero_()
        return {key: value if math.isfinite(value) else None for key, value in line.items()}

    flush = read


@torch.no_grad()
def test_pass(model: VAE, images: np.ndarray, args: Namespace):
    """A split (uint8) with hard codes, in batches: yields (x, z_e, loss, q, x_hat)."""
    device = torch.device(args.device)
    tau = torch.ones((), device=device)
    for i in range(0, len(images), args.batch_size):
        x = to_float(torch.from_numpy(images[i : i + args.batch_size]).to(device))
        with autocast(args):
            z_e = model.encode_features(x)
            loss, q = model.quantizer(z_e, tau, 1.0, 0)
            x_hat = model.reconstruct(model.quantizer.vectors()[q.indices])
        yield x, z_e, model.quantizer.reconstruction_loss(x_hat, x) + loss, q, x_hat


@torch.no_grad()
def evaluate(model: VAE, images: Tensor, args: Namespace, beta: float) -> dict:
    """A test line: one pass over a split with hard codes, perplexity pooled over it.

    entropy_map (N, N) is the entropy of pi at each position of the first image. Each process takes
    its share of the images.
    """
    device = torch.device(args.device)
    meter, entropy_map = Meter(args.codebook_size, device), None
    tau = torch.ones((), device=device)
    model.eval()
    for i in range(128 * RANK, len(images), 128 * WORLD_SIZE):
        x = take(images, torch.arange(i, min(i + 128, len(images))), device)
        with autocast(args):
            loss, mse, q = model(x, tau, beta, key=0, hard=True)
        meter.add(loss, mse, q)
        if i == 0 and q.entropy.isfinite().all():
            entropy_map = [[round(h, 3) for h in row] for row in q.entropy[0].tolist()]
    model.train()
    return meter.read() | dict(split="test", entropy_map=entropy_map)


# ------------------------------------------------------------------------------- the training loop


def train(args: Namespace, checkpoint: dict | None = None) -> Path:
    """Train a model as args say, from the checkpoint if there is one; returns the run's folder."""
    # 1. data
    device = torch.device(args.device)
    with first_process_first():
        train_images, test_images = (
            resident(load_images(args.dataset, split, args.data_dir, args.size), device)
            for split in ("train", "test")
        )
    count, per_process = len(train_images), args.batch_size // WORLD_SIZE
    own = slice(RANK * per_process, (RANK + 1) * per_process)  # this process's part of a batch

    # 2. model and optimiser
    torch.manual_seed(args.seed)
    model = VAE(args).to(device)
    optimizer = Optimizer(model, args)
    if checkpoint:
        start = restore(checkpoint, model, optimizer, device)
        if start == args.steps:
            raise UserError(f"{args.out} is finished; name another --out for a new run")
    else:
        start = 0
        if model.quantizer.init_codebook:
            x = take(train_images, batch_indices(0, args.batch_size, count, args.seed), device)
            with torch.no_grad(), autocast(args):
                model.quantizer.init_codebook(model.z_e(x))
    step_model = distribute(model, device)  # averages gradients over processes
    if args.compile and device.type == "cuda":  # on a CPU oneDNN's convolutions gain nothing
        step_model = kernels.Compiled(step_model)
    # Tensors that each step fills: as Python numbers they would make the compiler start anew.
    tau, beta = torch.ones((), device=device), torch.zeros((), device=device)
    # The noise is a function of (seed, step, position), however a batch is split: so this is the
    # seed, the step, and the number of this process's first position.
    key = torch.tensor([args.seed, 0, own.start * (args.size // 4) ** 2], device=device)

    # 3. the run's folder
    run = Run(args, f"{args.dataset}-{args.model}", start)
    parameters = sum(p.numel() for p in model.parameters())
    run.print(
        f"{run.folder}: {args.model} on {args.dataset}, {count:,} images, {parameters:,} "
        f"parameters, {device}, {args.precision}, steps {start} to {args.steps}"
    )

    meter = Meter(args.codebook_size, device)
    logged, clock = start, time.perf_counter()  # of the last log line
    with run:
        for step in range(start, args.steps):
            # 4. schedules and batch: functions of the step
            lr, beta_now, tau_now = schedules(step, args)
            beta.fill_(beta_now)
            tau.fill_(tau_now)
            key[1].fill_(step)
            index = batch_indices(step, args.batch_size, count, args.seed)
            x = take(train_images, index[own], device)  # (B, 3, H, W)

            # 5. loss, gradients, update
            with autocast(args):
                loss, mse, q = step_model(x, tau, beta, key)  # Eq. 8
            model.zero_grad()
            loss.backward()
            optimizer.step(lr)
            meter.add(loss, mse, q)

            # 6. records: only here does the host wait for the device
            done = step + 1
            log_due = done % args.log_every == 0
            interrupted = run.interrupted(done)
            last = done == args.steps or interrupted
            values = dict(beta=beta_now, tau=tau_now, lr=lr)
            if log_due or last:
                line = meter.read()
                check_finite(model, line["loss"], f"{logged + 1} to {done}", run)
                rate = (done - logged) * args.batch_size / (time.perf_counter() - clock)
                minutes_left = (args.steps - done) * args.batch_size / rate / 60
                text = f"{rate:,.0f} images/s  {minutes_left:.1f} min left"
                run.log(done, line | values | dict(images_per_second=rate), text)
                logged, clock = done, time.perf_counter()
            if done == args.steps or (done % args.eval_every == 0 and not interrupted):
                started = time.perf_counter()
                test_line = evaluate(model, test_images, args, beta_now)
                run.log(done, test_line | values, "(test)")
                if RANK == 0:
                    save_recon(model, test_images, run.folder / "recon.png")
                clock += time.perf_counter() - started
            if last or (log_due and done - run.saved_step >= args.save_every):
                run.save(done, model=model, optimizer=optimizer)
            if last:
                break
    if run.stop_signal and done < args.steps:
        run.print(f"stopped; to continue: python train_vae.py --out {run.folder} --resume")
        sys.exit(128 + run.stop_signal)
    run.print(
        f"\n{args.model} on {args.dataset}: test MSE {test_line['mse']:.3e} ([0, 1] scale), "
        f"perplexity {test_line['perplexity']:.1f} of {args.codebook_size}, "
        f"{test_line['codes_used']} codes used\n"
        f"{run.folder}/: recon.png (inputs above reconstructions), log.jsonl, ckpt.pt"
    )
    return run.folder


def check_finite(model: nn.Module, loss: float | None, steps: str, run: "Run"):
    """Exit with code 1 and one line if the loss or a weight is nan or infinite; nothing is saved.

    A batch is a function of seed and step, so the run can be repeated from its last checkpoint.
    """
    finite = loss is not None and math.isfinite(loss)
    if finite and all(p.isfinite().all() for p in model.parameters()):
        return
    step = run.saved_step
    saved = f"{run.folder}/ckpt.pt is from step {step}" if step else "no checkpoint yet"
    sys.exit(1 if RANK else f"the loss or a weight is not finite, in steps {steps}; {saved}")


@torch.no_grad()
def save_recon(model: VAE, images: Tensor, path: Path, columns: int = 12):
    """Two rows of images, each above the row of its reconstructions from hard codes."""
    columns = min(columns, len(images))
    rows = min(2, len(images) // columns)
    x = take(images, torch.arange(rows * columns), torch.device(model.args.device))
    model.eval()
    x_hat = model.decode(model.encode(x))
    model.train()
    pairs = [half for pair in zip(x.split(columns), x_hat.split(columns)) for half in pair]
    save_grid(torch.cat(pairs), path, columns)


def save_grid(images: Tensor, path: Path, columns: int):
    """Images (B, 3, H, W) in [0, 1] as one picture; small ones are enlarged, to 96 at the most."""
    scale = max(1, 96 // images.shape[-1])
    grid = torchvision.utils.make_grid(images.cpu(), nrow=columns, padding=1, pad_value=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        enlarged = grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        torchvision.utils.save_image(enlarged, path)
    except ValueError as e:  # an unknown ending
        raise UserError(f"cannot write {path}: {e}") from None


def profile(args: Namespace, warm_up: int = 3, steps: int = 20):
    """--profile: median milliseconds of a step, of its parts, and of the textbook's step.

    The step is that of `train` without its measures, compiled if args.compile. Its parts are timed
    apart, not compiled as a whole, synchronised after each. The textbook's step (EdVAE alone) is
    the same network in fp32 and NCHW, with torch.distributions for the bottleneck and Adam. The
    steps take turns.
    """
    device = torch.device(args.device)
    images = torch.from_numpy(draw_shapes(512, args.size, np.random.default_rng(0))).to(device)
    tau, beta = torch.tensor(0.7, device=device), torch.tensor(args.beta, device=device)

    def batch(step):
        return take(images, batch_indices(step, args.batch_size, len(images), args.seed), device)

    def whole_step(step):
        key = torch.tensor([args.seed, step, 0], device=device)
        with autocast(args):
            loss, _, _ = step_model(batch(step), tau, beta, key)
        loss.backward()
        optimizer.step(args.lr)
        model.zero_grad()
        yield "whole"

    def step_parts(step):
        """One step in parts: yields the name of each when it is done."""
        key = torch.tensor([args.seed, step, 0], device=device)
        x = batch(step)
        yield "data"
        with autocast(args):
            z_e = model.z_e(x)
            yield "encoder"
            logits = z_e.detach().requires_grad_()
            quantizer_loss, q = model.quantizer(logits, tau, beta, key)
            yield "bottleneck"
            z_q = q.z_q.detach().requires_grad_()
            loss = model.quantizer.reconstruction_loss(model.x_hat(z_q), x)
            yield "decoder"
        loss.backward()
        yield "backward of the decoder"
        ((q.z_q * z_q.grad).sum() + quantizer_loss).backward()
        yield "backward of the bottleneck"
        z_e.backward(logits.grad)
        yield "backward of the encoder"
        optimizer.step(args.lr)
        model.zero_grad()
        yield "optimiser"

    def textbook_step(step):
        x = batch(step).contiguous()
        z_e = textbook.z_e(x)
        codebook, c = textbook.quantizer.codebook, min(args.max_logit, 80.0)
        z_q, kl = kernels.textbook_quantize(z_e, codebook, tau, c)
        z_q = z_q.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # NCHW in memory
        (F.mse_loss(textbook.x_hat(z_q), x) + beta * kl.mean()).backward()
        textbook_optimizer.step()
        textbook.zero_grad()
        yield "textbook"

    torch.manual_seed(args.seed)
    model = VAE(args).to(device)
    textbook = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    step_model = kernels.Compiled(model) if args.compile and device.type == "cuda" else model
    optimizer = Optimizer(model, args)
    textbook_optimizer = torch.optim.Adam(textbook.parameters(), lr=args.lr)
    contenders = [whole_step, step_parts]
    if args.model == "edvae":
        contenders.append(textbook_step)
    milliseconds = {}
    for step in range(warm_up + steps):
        for contender in contenders:
            clock = time.perf_counter()
            for name in contender(step):
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                now = time.perf_counter()
                if step >= warm_up:
                    milliseconds.setdefault(name, []).append(1e3 * (now - clock))
                clock = now
    medians = {name: float(np.median(values)) for name, values in milliseconds.items()}
    whole, textbook_ms = medians.pop("whole"), medians.pop("textbook", None)
    what = "compiled" if device.type == "cuda" else "bottleneck compiled"
    compiled = what if args.compile else "not compiled"
    print(
        f"{args.model}, width {args.width}, K = {args.codebook_size}, batch {args.batch_size}, "
        f"{args.precision}, {compiled}, {hardware(device)}, torch {torch.__version__}:\n"
        f"{whole:.1f} ms per step, {1e3 * args.batch_size / whole:,.0f} images/s"
    )
    if textbook_ms:
        print(f"the textbook's step: {textbook_ms:.1f} ms, {textbook_ms / whole:.2f} times as long")
    for name, ms in medians.items():
        print(f"{name:28}{ms:>10.2f} ms{100 * ms / sum(medians.values()):>7.1f}%")


# ------------------------------------------------------------------------------- the command line


def number(kind, low, high):
    """An argparse type: an int or a float in [low, high]; never nan."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low:g}, {high:g}]")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def parser() -> argparse.ArgumentParser:
    """The command line; a flag left out is absent from what it parses, and becomes its preset's."""
    p = argparse.ArgumentParser(
        prog="train_vae.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    count = number(int, 1, 10**12)
    positive, not_negative = number(float, 1e-30, 1e30), number(float, 0, 1e30)
    clamp, seed = number(float, -1e30, math.inf), number(int, 0, 2**63 - 1)

    def flag(name, kind, help):
        p.add_argument(name, type=kind, help=help)

    def choice(name, choices, help):
        p.add_argument(name, choices=choices, help=help)

    choice("--dataset", DATASETS, "what to train on (default shapes: generated images)")
    flag("--data-dir", str, "where the data and its cache lie (default data); folder: the images")
    flag("--size", number(int, 8, 1024), "pixels a side, a multiple of 4 (default: the dataset's)")
    flag("--out", Path, "the run's folder (default: a fresh one under runs/)")
    p.add_argument("--resume", action="store_true", help="continue --out's run, or start it")
    choice("--model", SYSTEMS, "the system (default edvae)")
    choice("--preset", PRESETS, "recipe for flags left out (celeba, lsun-church: paper; else fast)")
    flag("--steps", count, "training steps (default: paper 150000, fast 15000, shapes 600)")
    flag("--batch-size", count, "images per step, over all processes (default 128, shapes 64)")
    flag("--lr", positive, "Adam's highest learning rate (default: the preset's)")
    flag("--muon-lr", not_negative, "Muon's for hidden convolutions; 0: Adam trains them too")
    flag("--width", number(int, 4, 4096), "n, channels, a multiple of 4 (default: the system's)")
    flag("--codebook-size", number(int, 2, 16384), "K, codes (default 512, shapes 64)")
    flag("--code-dim", number(int, 1, 256), "D, numbers per code (default 16)")
    flag("--beta", not_negative, "highest weight of the quantiser's loss (default: the system's)")
    flag("--max-logit", clamp, "clamp c of the logits inside alpha, or inf (default 20)")
    choice("--kl", ("exact", "textbook"), "the KL's float32 form (default exact)")
    flag("--beta-ramp", count, "steps of beta's rise from 0 (default: the preset's share)")
    flag("--lr-anneal", count, "steps of the learning rate's fall (default: the preset's share)")
    flag("--tau-start", positive, "first temperature of the relaxed sample (default: the preset's)")
    flag(
        "--tau-rate",
        not_negative,
        "tau = start exp(-rate (step - hold)); hold: fast steps / 5, paper 0",
    )
    flag("--seed", seed, "of weights, data order and noise (default 42)")
    flag("--device", str, "cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    choice("--precision", ("fp32", "bf16"), "of convolutions (default: bf16 where it is faster)")
    compile_help = (
        "torch.compile the model; on a CPU its bottleneck alone (default: there from 500 steps)"
    )
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help=compile_help)
    choice("--backend", ("auto", "triton", "torch"), "of the bottleneck (auto: Triton on a GPU)")
    flag("--log-every", count, "steps between log lines (default steps / 60)")
    flag("--eval-every", count, "steps between tests (default steps / 10)")
    flag("--save-every", count, "fewest steps between checkpoints (default steps / 30, >= 1000)")
    p.add_argument("--profile", action="store_true", help="time a step's parts; writes no run")
    return p


# Flags that may differ on --resume.
MAY_CHANGE = {
    *("data_dir", "out", "resume", "device", "compile", "backend", "profile"),
    *("log_every", "eval_every", "save_every"),
}


def merged_settings(p: argparse.ArgumentParser, argv, free: set) -> tuple[dict, dict | None]:
    """Settings that are given or saved, and --resume's checkpoint, or None.

    UserError for a flag that contradicts the saved run.
    """
    given = vars(p.parse_args(argv))
    out, resume = given.get("out"), given.get("resume", False)
    if resume and not out:
        raise UserError("--resume needs --out, the folder of the run to continue")
    if out and out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    checkpoint, saved = None, {}
    if out and (out / "ckpt.pt").exists():
        checkpoint = load_checkpoint(out)
        saved = checkpoint["args"]
    elif out and (out / "args.json").exists():  # stopped before its first checkpoint
        saved = read_json(out / "args.json")
    if saved and not resume:
        raise UserError(
            f"{out} already holds a run; continue it by --resume, or name another --out"
        )
    if saved and saved.get("script") != p.prog:
        raise UserError(f"{out} holds a run of {saved.get('script')}, not of {p.prog}")
    for name in given.keys() & saved.keys() - free:
        if str(given[name]) != str(saved[name]):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {given[name]} contradicts the run in {out}: {saved[name]}")
    kept = {k: v for k, v in saved.items() if k not in ("out", "resume", "device", "environment")}
    return kept | dict(script=p.prog) | given, checkpoint


def settings(argv=None) -> tuple[Namespace, dict | None]:
    """Every setting of a run, and --resume's checkpoint: tables, then what is saved or given."""
    known, checkpoint = merged_settings(parser(), argv, MAY_CHANGE)
    chosen = DEFAULTS | known
    dataset, model = chosen["dataset"], chosen["model"]
    preset = PRESETS[known.get("preset", DATASETS[dataset]["preset"])]
    pair = PAIRS.get((model, dataset), {})
    args = Namespace(**(DEFAULTS | preset | DATASETS[dataset] | SYSTEMS[model] | pair | known))
    steps = args.steps
    derived = dict(
        beta_ramp=max(1, round(steps * preset["beta_ramp_fraction"])),
        lr_anneal=max(1, round(steps * preset["lr_anneal_fraction"])),
        warm_up=max(1, round(steps * preset["warm_up_fraction"])),
        tau_hold=round(steps * preset["tau_hold_fraction"]),
        log_every=max(1, steps // 60),
        eval_every=max(1, steps // 10),
        save_every=max(1000, steps // 30),
    )
    derived["tau_rate"] = preset["tau_decay"] / (steps - derived["tau_hold"])
    if args.lr is None:
        derived["lr"] = args.lr_times_width / args.width
    if args.muon_lr is None:
        derived["muon_lr"] = args.fast_muon_lr
    vars(args).update(derived | known)
    check_settings(args)
    args.device, args.precision = prepare_device(known.get("device"), known.get("precision"))
    if "compile" not in known:
        args.compile = args.device.startswith("cuda") or args.steps >= 500
    try:
        kernels.resolve_backend(
            args.backend, args.device, torch.float32, args.codebook_size, args.code_dim
        )
    except ValueError as e:
        raise UserError(f"--backend {args.backend} --device {args.device}: {e}") from None
    return args, checkpoint


def check_settings(args: Namespace):
    """UserError for settings that cannot go together."""
    if args.size % 4 or args.width % 4:
        raise UserError(f"--size {args.size} and --width {args.width} must be multiples of 4")
    if args.kl == "textbook" and args.max_logit > 80:
        reason = "overflows float32 at logits over 88: give a --max-logit of at most 80"
        raise UserError(f"--kl textbook {reason}, not {args.max_logit:g}")
    if WORLD_SIZE > 1 and args.model == "sq-vae":
        reason = "its loss is the logarithm of the whole batch's error"
        raise UserError(f"--model sq-vae takes one process: {reason}")
    check_split(args)


def check_split(args: Namespace):
    if args.batch_size % WORLD_SIZE:
        parts = f"{WORLD_SIZE} processes"
        raise UserError(f"--batch-size {args.batch_size} cannot be split over {parts}")


def prepare_device(device: str | None = None, precision: str | None = None) -> tuple[str, str]:
    """The device and precision that run; UserError for a device that is not there.

    From here on fp32 means fp32, without TF32, and the process group of a torchrun is initialised.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not device.startswith(("cpu", "cuda")):
        raise UserError(f"--device {device} is not supported: cpu, cuda or cuda:1, ...")
    if device.startswith("cuda") and WORLD_SIZE > 1:
        processes, cards = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if processes > cards:
            raise UserError(f"{processes} processes need as many GPUs; there are {cards}")
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = str(torch.zeros(1, device=device).device)  # "cuda" becomes "cuda:0"
        if device.startswith("cuda"):
            torch.cuda.set_device(device)  # Triton launches on the current device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {device} is not there: {first_line(e)}") from None
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True  # the shapes of a step never change
    if WORLD_SIZE > 1:
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        a_day = datetime.timedelta(days=1)  # the others wait while the first decodes a dataset
        torch.distributed.init_process_group(backend, timeout=a_day)
    if device.startswith("cuda"):
        fast_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast_bf16 = fast_bf16_cpu()
    return device, precision or ("bf16" if fast_bf16 else "fp32")


def cpu_flags() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def fast_bf16_cpu() -> bool:
    """Whether bf16 convolutions beat fp32 ones on this CPU: with AMX, and on AMD's AVX-512.

    A training step at width 32 took 0.76 of fp32's time on an EPYC with avx512_bf16; on a Xeon with
    avx512_bf16 and no AMX it took longer.
    """
    flags = cpu_flags()
    return "amx_bf16" in flags or ("AuthenticAMD" in flags and "avx512_bf16" in flags)


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    amx = "AMX" if "amx_bf16" in cpu_flags() else "no AMX"
    return f"{platform.machine()} CPU ({amx}), {torch.get_num_threads()} threads"


def autocast(args: Namespace):
    device = torch.device(args.device).type
    return torch.autocast(device, torch.bfloat16, enabled=args.precision == "bf16")


# -------------------------------------------------------------------------------- the run's folder


class Run:
    """A run's folder: args.json, log.jsonl, ckpt.pt and pictures. The first process writes it.

    Within `with run`, SIGINT and SIGTERM only set run.stop_signal: the loop finishes its step and
    saves.
    """

    stop_signal = None

    def __init__(self, args: Namespace, name: str, start: int):
        """--out, or the first free runs/<name>-<i>. Log lines after step `start` are dropped."""
        self.args, self.saved_step, self.folder = args, start, args.out
        if RANK:
            return
        self.folder = args.out or free_folder(name)
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.settings() | dict(environment=environment(args)), indent=1)
        with atomic_write(self.folder / "args.json") as f:
            f.write(text.encode())
        path = self.folder / "log.jsonl"
        lines = read_log(path) if start and path.exists() else []
        with atomic_write(path) as f:
            for line in lines:
                if line["step"] <= start:
                    f.write(json.dumps(line).encode() + b"\n")

    def __enter__(self):
        def note(number, frame):
            self.stop_signal = number

        self.handlers = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def interrupted(self, step: int) -> bool:
        """Whether to stop after this step.

        Processes ask each other every 20 steps, because asking makes them wait for one another;
        torchrun kills them 30 seconds after its signal.
        """
        if WORLD_SIZE == 1:
            return self.stop_signal is not None
        stop = int(self.stop_signal is not None)
        if step % 20 == 0 and all_reduce_sum(torch.tensor(stop)).item():
            self.stop_signal = self.stop_signal or signal.SIGTERM
            return True
        return False

    def settings(self) -> dict:
        """The settings as plain types: for JSON, and for torch.load with weights_only=True."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items()}

    def print(self, text: str):
        if RANK == 0:
            print(text, flush=True)

    def log(self, step: int, line: dict, text: str):
        """A line of log.jsonl, and its main numbers on the screen."""
        if RANK:
            return
        with open(self.folder / "log.jsonl", "a") as f:
            f.write(json.dumps(dict(step=step, **line)) + "\n")
        shown = ("mse", "kl", "perplexity", "entropy_mean")
        numbers = [f"{k} {line[k]:.4g}" for k in shown if line.get(k) is not None]
        self.print(f"step {step:>6}  " + "  ".join([*numbers, text]))

    def save(self, step: int, **parts):
        """ckpt.pt: the states of modules, optimisers and generators, and plain values."""
        self.saved_step = step
        if RANK:
            return
        states = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in parts.items()}
        generators = dict(generator=torch.get_rng_state())
        if torch.cuda.is_available():
            generators["cuda_generator"] = torch.cuda.get_rng_state()
        buffer = io.BytesIO()  # torch.save itself aborts in C++ on a full disk
        torch.save(states | generators | dict(step=step, args=self.settings()), buffer)
        with atomic_write(self.folder / "ckpt.pt") as f:
            f.write(buffer.getbuffer())


def load_checkpoint(path, device="cpu", script: str | None = None) -> dict:
    """The dict in a run folder's ckpt.pt, or in the file itself; UserError if it isn't one.

    script: it must be a run of this one.
    """
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path} is not there: name the folder of a run with a checkpoint")
    try:
        if zipfile.ZipFile(path).testzip():
            raise ValueError("its checksums do not match")
        state = torch.load(path, map_location=device, weights_only=True)
        if not {"model", "step", "args"} <= state.keys():
            raise ValueError("it lacks a model, step or args")
    except Exception as e:  # a damaged file can raise any exception
        what = f"{type(e).__name__}: {first_line(e)}"
        raise UserError(f"{path} is damaged or not a checkpoint ({what})") from None
    if script and state["args"].get("script") != script:
        raise UserError(f"{path} is not a run of {script}, but of {state['args'].get('script')}")
    return state


def read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"{path} cannot be read ({e})") from None


def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl. A killed process may have left the last one unfinished."""
    try:
        text = path.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e})") from None


def restore(checkpoint: dict, model: nn.Module, optimizer, device: torch.device) -> int:
    """Put a checkpoint's states in place; returns its step."""
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    torch.set_rng_state(checkpoint["generator"].cpu())
    if device.type == "cuda" and "cuda_generator" in checkpoint:
        torch.cuda.set_rng_state(checkpoint["cuda_generator"].cpu())
    return checkpoint["step"]


@contextlib.contextmanager
def atomic_write(path: Path):
    """A file that appears at path whole or not at all: written beside it, then renamed."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def free_folder(name: str) -> Path:
    i = 1
    while Path(f"runs/{name}-{i}").exists():
        i += 1
    return Path(f"runs/{name}-{i}")


def environment(args: Namespace) -> dict:
    """The versions, the hardware and the commit behind a run."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return dict(
        command=" ".join(sys.argv),
        commit=commit or None,
        hardware=hardware(torch.device(args.device)),
        python=platform.python_version(),
        numpy=np.__version__,
        torch=torch.__version__,
        torchvision=torchvision.__version__,
        triton=kernels.triton.__version__ if kernels.triton else None,
    )


# ---------------------------------------------------------------------------- processes and errors


@contextlib.contextmanager
def first_process_first():
    """The first process runs the block before the others, which then find its files."""
    if RANK:
        torch.distributed.barrier()
    yield
    if WORLD_SIZE > 1 and not RANK:
        torch.distributed.barrier()


def distribute(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as DistributedDataParallel where there are several processes."""
    if WORLD_SIZE == 1:
        return model
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        raise UserError("on a CPU batch norm does not see other processes' images: use one process")
    return nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of x over all processes, in place."""
    if WORLD_SIZE > 1:
        torch.distributed.all_reduce(x)
    return x


def broadcast_from_first(x: Tensor) -> Tensor:
    """The first process's x on all processes, in place."""
    if WORLD_SIZE > 1:
        torch.distributed.broadcast(x, 0)
    return x


def first_line(e: Exception) -> str:
    return (str(e) or type(e).__name__).splitlines()[0][:120]


def tune_cpu():
    """Two switches for a faster step on a CPU, before any thread starts.

    Denormals become 0: they are slow, and once pi is sharp there are many. And glibc keeps freed
    memory: by default each large tensor is mapped anew, zeroed page by page, and unmapped.
    """
    torch.set_flush_denormal(True)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc
        return
    for option, value in ((-8, 1), (-4, 0), (-1, -1)):  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
        mallopt(option, value)


def run_script(script: str, work, argv=None):
    """work(argv); a user's mistake, a full disk, too little memory: one line and exit code 2."""
    tune_cpu()
    out_of_memory = False
    try:
        work(argv)
        if WORLD_SIZE > 1:  # not after an error: it would wait for processes still at work
            torch.distributed.destroy_process_group()
        return
    except UserError as e:
        message = str(e)
    except KeyboardInterrupt:
        message = "stopped"
    except OSError as e:
        message = f"{e.filename or 'a file'}: {e.strerror or e}"
    except (MemoryError, RuntimeError) as e:
        out_of_memory = isinstance(e, (MemoryError, torch.OutOfMemoryError))
        if not out_of_memory and "allocate memory" not in str(e):
            raise
        message = "out of memory: take a smaller batch, width or codebook"
    if RANK == 0 or out_of_memory:
        print(f"{script}: {message}", file=sys.stderr)
    sys.exit(2)


def run_training(argv):
    args, checkpoint = settings(argv)
    if args.profile:
        profile(args)
    else:
        train(args, checkpoint)


def main(argv=None):
    run_script("train_vae.py", run_training, argv)


if __name__ == "__main__":
    main()
