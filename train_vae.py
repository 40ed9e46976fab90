"""Stage 1: train a discrete VAE: EdVAE (Baykal, Kandemir, Unal 2024) or one of five baselines.

    python train_vae.py                                  # generated shapes, minutes on two cores
    python train_vae.py --dataset cifar10                # the paper's settings in 35,000 steps
    python train_vae.py --dataset cifar10 --preset cpu   # the paper's effect without a GPU
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

This file in order: data, networks, quantisers, the model, settings, the optimiser and the
schedules, measures, the training loop; last the device, the run's folder, processes and errors.
"""

import argparse
import contextlib
import ctypes
import datetime
import functools
import hashlib
import io
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
import zipfile
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor, nn

import kernels


class UserError(Exception):
    """The user's mistake: its one line is printed and the exit code is 2."""


# -------------------------------------------------------------------------------------------- data


def load_images(dataset: str, split: str, data_dir="data", size: int | None = None) -> np.ndarray:
    """All images of a split ("train" or "test"): uint8 (count, size, size, 3), memory-mapped.

    The first use decodes them to <data-dir>/<dataset>-<split>-<size>.npy; after that the originals
    are not needed. The cache of --dataset folder lies under data/ and is named by the images'
    paths, sizes and times, so that a changed folder is decoded anew. Raises UserError where images
    are missing or more than a tenth of them cannot be read.
    """
    data_dir, size = Path(data_dir), size or DATASETS[dataset][1]["size"]
    home, splits, key = data_dir, [split], ""
    if dataset == "folder":
        files = [(str(p), p.stat()) for p in image_files(data_dir)[0]]
        files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
        key = "-" + hashlib.sha256(repr(files).encode()).hexdigest()[:12]
        home, splits = Path("data"), ["train", "test"]
    caches = {s: home / f"{dataset}-{s}-{size}{key}.npy" for s in splits}
    cache = caches[split]
    if not cache.exists():
        decode(dataset, data_dir, size, caches)
    try:
        # Copy-on-write: PyTorch warns about arrays that it may not write to.
        images = np.load(cache, mmap_mode="c", allow_pickle=False)
        if images.dtype != np.uint8 or images.shape[1:] != (size, size, 3) or not len(images):
            raise ValueError(f"{images.dtype} {images.shape}, not uint8 (count, {size}, {size}, 3)")
        return images
    except Exception as e:  # a malformed header can raise any exception
        raise UserError(f"{cache} is damaged ({e}); delete it to decode again") from None


def decode(dataset: str, data_dir: Path, size: int, caches: dict[str, Path]):
    """Write the caches {split: path}, all or none. A line names what is left out.

    A reader gives the number of a split's images, what to_pixels takes for each, its options, and
    what is not used. It may raise anything: the user's line is that error and its docstring.
    """
    (reader, _), written, damaged, others = DATASETS[dataset], Counter(), [], Counter()
    asked = f"--dataset {dataset} --data-dir {data_dir}"
    with contextlib.ExitStack() as files:
        for split, cache in caches.items():
            try:
                count, sources, options, unused = reader(split, data_dir, size)
                if not count:
                    raise FileNotFoundError(f"no images for {split}")
            except Exception as e:  # a foreign downloader can raise any exception
                raise UserError(f"{asked}: {in_one_line(e)}. {reader.__doc__}") from None
            others.update(unused)
            cache.parent.mkdir(parents=True, exist_ok=True)
            f = files.enter_context(atomic_write(cache))
            f.seek(128)  # after the header, which needs the number of images that can be read
            for i, source in enumerate(sources):
                try:
                    f.write(to_pixels(source, size, **options).tobytes())
                    written[split] += 1
                except UserError as e:
                    damaged.append(str(e))
                if i % 1000 == 999 or i + 1 == count:
                    print(f"\r{cache.name}: {i + 1:,} of {count:,} images", end="", flush=True)
            print()
            f.seek(0)
            header = dict(descr="|u1", fortran_order=False, shape=(written[split], size, size, 3))
            np.lib.format.write_array_header_1_0(f, header)
        total = written.total() + len(damaged)
        left_out = f"{len(damaged)} of {total} images ({'; '.join(damaged[:3])})"
        if 10 * len(damaged) > total or len(written) < len(caches):
            raise UserError(f"{asked}: too many files are damaged, {left_out}")
    if damaged or others:
        parts = [left_out] * bool(damaged) + [f"{n} {what}" for what, n in others.most_common(9)]
        print(f"left out of {data_dir}: {', '.join(parts)}", file=sys.stderr)


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


def read_shapes(split: str, data_dir: Path, size: int):
    """Generated images need no files."""
    count, seed = (20_000, 0) if split == "train" else (2_000, 1)
    rng = np.random.default_rng([seed, size])
    chunks = (draw_shapes(500, size, rng) for _ in range(count // 500))
    return count, (image for chunk in chunks for image in chunk), {}, []


def read_cifar10(split: str, data_dir: Path, size: int):
    """Put cifar-10-python.tar.gz there."""
    images = torchvision.datasets.CIFAR10(data_dir, train=split == "train", download=True).data
    return len(images), images, {}, []


def read_celeba(split: str, data_dir: Path, size: int):
    """Put the aligned images, 000001.jpg and on, in celeba/img_align_celeba/ there."""
    folder = data_dir / "celeba" / "img_align_celeba"
    if not (folder / "000001.jpg").exists():
        torchvision.datasets.CelebA(data_dir, split="all", download=True)
    # The paper's numbers are from the official valid split.
    first, last = (1, 162_770) if split == "train" else (162_771, 182_637)
    numbered = sorted(p for p in folder.iterdir() if p.stem.isdigit())
    paths = [p for p in numbered if first <= int(p.stem) <= last]
    return len(paths), paths, dict(crop=140), []


def read_lsun_church(split: str, data_dir: Path, size: int):
    """Install the package lmdb and unpack church_outdoor_{train,val}_lmdb.zip there."""
    import lmdb

    name = "train" if split == "train" else "val"
    database = lmdb.open(str(data_dir / f"church_outdoor_{name}_lmdb"), readonly=True, lock=False)
    values = (io.BytesIO(value) for _, value in database.begin().cursor())
    return database.stat()["entries"], values, dict(stretch=True), []


def read_folder(split: str, data_dir: Path, size: int):
    """Name a folder of ten images or more; train/ and test/ (or val/) in it are the splits."""
    images, others = image_files(data_dir)
    parts = {path: path.relative_to(data_dir.resolve()).parts for path in images}
    kinds = dict(train="train", test="test", val="val", valid="val", validation="val")
    found = dict(train=[], test=[], val=[], rest=[])
    for path in images:
        kind = next((kinds[p.lower()] for p in parts[path][:-1] if p.lower() in kinds), "rest")
        found[kind].append(path)
    splits = dict(train=found["train"] or found["rest"], test=found["test"] or found["val"])
    if not all(splits.values()):  # every tenth by name is for the test
        splits = dict(train=[p for i, p in enumerate(images) if i % 10 < 9], test=images[9::10])
    unused = [path.suffix or path.name for path in others]
    if not all(splits.values()):
        other = dict(Counter(unused)) or "none"
        raise FileNotFoundError(f"only {len(images)} images; other files: {other}")
    neither = {*images} - {*splits["train"], *splits["test"]}
    tops = [parts[path][:-1] for path in neither]  # val, beside test
    unused += [f"of {top[0]}" if top else "beside train and test" for top in tops]
    return len(splits[split]), splits[split], {}, unused if split == "train" else []


def image_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images under a folder, linked folders once, and the other files: absolute paths.

    An image has an ending of Pillow's, or Pillow opens it. Hidden files do not count, nor does what
    this project writes: folders with an args.json, and these names.
    """
    folder = folder.resolve()
    seen = {folder, *(Path(p).resolve() for p in ("data", "runs", "figures", "samples.png"))}
    if (folder / "args.json").exists():  # a run beside the images
        seen |= {folder / name for name in ("recon.png", "samples.png", "nearest.png")}

    def files(folder: Path):
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or path in seen:
                continue
            if not path.is_dir() or not os.access(path, os.R_OK | os.X_OK):
                yield path
            elif path.resolve() not in seen and not (path / "args.json").exists():
                seen.add(path.resolve())
                yield from files(path)

    endings = Image.registered_extensions()
    endings = {e for e in endings if Image.MIME.get(endings[e], "").startswith("image/")}
    images, others = [], []
    for path in files(folder) if folder.is_dir() else []:
        known = path.suffix.lower() in endings
        with contextlib.suppress(Exception):
            known = path.is_file() and (known or Image.open(path))
        (images if known else others).append(path)
    return images, others


def to_pixels(source, size: int, crop: int | None = None, stretch: bool = False) -> np.ndarray:
    """An image file (a path or an open file) or an array as uint8 (size, size, 3).

    Grey, palette, CMYK and 16-bit images become RGB, transparency becomes white, EXIF orientation
    is applied, the first frame counts. The shorter side is scaled to size and the rest cropped;
    stretch: the aspect ratio is not kept. UserError for what Pillow cannot read, and for float and
    32-bit pixels, whose range is unknown.
    """
    try:
        image = Image.fromarray(source) if isinstance(source, np.ndarray) else Image.open(source)
        image.load()
        if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):
            raise ValueError(f"mode {image.mode} has no fixed range: save it with 8 or 16 bits")
        bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # a TIFF may hold 12 bits
        if image.format != "TIFF":  # Pillow turns a TIFF as it loads it
            with contextlib.suppress(Exception):  # EXIF can be odd: no more than its orientation
                image.getexif()
                image.info.pop("exif", None)
                image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            grey = np.asarray(image) * (255 / (2**bits - 1))
            image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
        if image.mode[-1] in "APa" or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    except Exception as e:  # of many kinds: struct.error, ZeroDivisionError, SyntaxError, ...
        name = source if isinstance(source, (str, Path)) else getattr(source, "name", "an image")
        raise UserError(f"cannot read {name}: {in_one_line(e)}") from None
    if crop:
        left, top = (image.width - crop) // 2, (image.height - crop) // 2
        image = image.crop((left, top, left + crop, top + crop))
    if stretch:
        return np.asarray(image.resize((size, size), Image.BILINEAR))
    return np.asarray(ImageOps.fit(image, (size, size), Image.BILINEAR))


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
    Here it scales the last convolution's weights, which saves a pass over the activations. The
    stream x stays fp32: in bf16 it would lose the small branch.

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
            h = h.float()
            if not h.is_cuda:
                return self.head(h)
            # As a matrix product: cuDNN's fp32 convolution is slower.
            h = h.permute(0, 2, 3, 1)  # (B, N, N, 4n)
            logits = F.linear(h, self.head.weight.flatten(1), self.head.bias)  # (B, N, N, K)
            return logits.permute(0, 3, 1, 2)


class Decoder(nn.Sequential):
    """Quantised latents (B, D, N, N) to images minus 1/2, (B, 3, 4N, 4N); linear output."""

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
    """He et al. 2015 for every convolution, so that the image reaches the logits.

    The head's standard deviation is fan-in^-1/2; the reconstructions start near mean grey.
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
# To add one: write a class with a name, defaults and a forward, and list it in QUANTIZERS.


class Quantizer(nn.Module):
    """A codebook and the choice of its rows. Subclasses give forward, and may replace the rest.

    tau and beta are scalar tensors; key is the seed of the noise, see `train`.
    """

    name: str  # for --model
    # Settings: width is n; beta the highest weight of the KL, of the commitment loss of VQ-VAE-EMA
    # and VQ-STE++, of all of SQ-VAE's latent loss. Preset fast: lr = lr_times_width / width and
    # muon_lr = fast_muon_lr, both chosen by runs of 1,000 steps (assets/results.md).
    defaults = dict(width=64, beta=0.0, lr_times_width=0.32, fast_muon_lr=0.015)
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
        """z_e (B, N, N, C) to the quantiser's part of the loss, already weighted, and a Quantized.

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

    name, network, ramps_beta = "edvae", "ed", True
    defaults = dict(width=128, beta=1e-7, lr_times_width=0.32, fast_muon_lr=0.03)

    def forward(self, logits: Tensor, tau, beta, key):
        c, compile = self.args.max_logit, self.args.compile
        q = kernels.evidential_quantize(logits, self.codebook, tau, c, key, compile=compile)
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
        options = dict(seed=key, compile=self.args.compile)
        q = kernels.gumbel_quantize(self.logits(z_e), self.codebook, tau, **options)
        return beta * q.kl.mean(), q

    def assign(self, z_e: Tensor) -> Tensor:
        return self.logits(z_e).argmax(-1)

    def probabilities(self, z_e: Tensor) -> Tensor:
        return self.logits(z_e).float().softmax(-1)


class DVAE(SoftmaxQuantizer):
    """Ramesh et al. 2021: the encoder gives the logits."""

    name, network = "dvae", "ed"
    defaults = dict(width=128, beta=5e-5, lr_times_width=0.32, fast_muon_lr=0.03)

    def logits(self, z_e: Tensor) -> Tensor:
        return z_e


class VQVAE(Quantizer):
    """van den Oord et al. 2017, A.1: the nearest code.

    A code is the moving average of the vectors z_e that were assigned to it.
    """

    name, learns_by_gradient = "vqvae-ema", False
    defaults = Quantizer.defaults | dict(width=256, beta=0.25, codebook_init="uniform")
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
        straight_through = z_e + (z_q - z_e).detach()
        return loss, kernels.hard_code(straight_through, indices)

    @torch.no_grad()
    def update(self, count: Tensor, sums: Tensor, eps: float = 1e-5):
        self.count.lerp_(count, 1 - self.DECAY)  # n <- g n + (1 - g) n_batch
        self.sum.lerp_(sums, 1 - self.DECAY)  # s <- g s + (1 - g) s_batch
        n = self.count.sum()
        smoothed = (self.count + eps) / (n + len(self.count) * eps) * n  # Laplace smoothing
        self.codebook.copy_(self.sum / smoothed[:, None])


class GSVQVAE(SoftmaxQuantizer):
    """Sonderby et al. 2017: pi = softmax(-|z_e - e_k|^2)."""

    name = "gs-vqvae"
    defaults = Quantizer.defaults | dict(width=256, beta=5e-6, codebook_init="uniform")

    def logits(self, z_e: Tensor) -> Tensor:
        return -distances(z_e, self.codebook)


class SQVAE(SoftmaxQuantizer):
    """Takida et al. 2022: pi = softmax(-|z_e - e_k|^2 / (2 sigma^2)). Losses are in nats per image.

    sigma^2 = v + exp(rho) is learnt. v = 1 (variant I), or at each position the exponential of a
    second head's mean over its D channels (III): then z_e is (B, N, N, 2D).
    """

    name, network, ramps_beta = "sq-vae", "sq", False
    defaults = dict(width=64, beta=1.0, lr_times_width=2.56, fast_muon_lr=0.12)

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

    name, network, learns_by_gradient = "vq-ste++", "sq", False
    defaults = Quantizer.defaults | dict(beta=2.0)  # at lr 2e-2 it collapsed
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
        straight_through = z_e + (z_q - z_e).detach()
        synced = straight_through + self.SYNC * (z_q - z_q.detach())
        return loss, kernels.hard_code(synced, indices)

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


QUANTIZERS = {q.name: q for q in (EdVAE, DVAE, VQVAE, GSVQVAE, SQVAE, VQSTE)}


class VAE(nn.Module):
    """Encoder, quantiser and decoder. Images go in and come out as (B, 3, H, W) in [0, 1]."""

    def __init__(self, args: Namespace):
        super().__init__()
        self.args = args
        n, K, D = args.width, args.codebook_size, args.code_dim
        network = QUANTIZERS[args.model].network
        if network == "sq":
            self.encoder = sq_encoder(n, D, args.size, heads=2 if args.two_heads else 1)
            self.decoder = sq_decoder(n, D, args.size)
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
        """x (B, 3, H, W) to what the quantiser takes, z_e (B, N, N, C)."""
        return self.encoder(x - self.offset).permute(0, 2, 3, 1)

    def reconstruct(self, z_q: Tensor) -> Tensor:
        """z_q (B, N, N, D) to x_hat (B, 3, H, W), not clamped."""
        return self.decoder(z_q.permute(0, 3, 1, 2)).float() + self.offset

    def forward(self, x: Tensor, tau: Tensor, beta: Tensor, key: Tensor):
        """The loss (Eq. 8 for EdVAE), the squared error and the quantiser's Quantized."""
        quantizer_loss, q = self.quantizer(self.encode_features(x), tau, beta, key)
        x_hat = self.reconstruct(q.z_q)
        loss = self.quantizer.reconstruction_loss(x_hat, x) + quantizer_loss
        return loss, F.mse_loss(x_hat.detach(), x), q

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W), floats in [0, 1], to the indices of hard codes (B, N, N), int64.

        H and W are multiples of 4. Raises TypeError or ValueError for other images.
        """
        if not x.is_floating_point():
            raise TypeError(f"encode takes floats in [0, 1], not {x.dtype}: divide bytes by 255")
        if x.min() < -1e-3 or x.max() > 1.001:
            raise ValueError(f"encode takes floats in [0, 1], not {x.min():.3g} to {x.max():.3g}")
        if x.shape[-1] % 4 or x.shape[-2] % 4:
            raise ValueError(f"encode takes sizes that are multiples of 4, not {tuple(x.shape)}")
        return self.quantizer.assign(self.encode_features(x))

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Indices of codes (B, N, N), of any integer type, to images (B, 3, H, W) in [0, 1]."""
        return self.reconstruct(self.quantizer.vectors()[indices.long()]).clamp(0, 1)


def load_vae(path, device="cpu") -> VAE:
    """A trained model from a run's folder or its checkpoint, in eval mode, fp32; or a UserError."""
    state = load_checkpoint(path, device, "train_vae.py")
    here = dict(device=str(device), precision="fp32", compile=False)
    model = VAE(Namespace(**(DEFAULTS | state["args"] | here))).to(device)
    load_weights(model, state, path)
    return model.eval()


# ---------------------------------------------------------------------------------------- settings

# Settings of a run. The later wins: DEFAULTS, the system's (`Quantizer.defaults`), PRESETS and
# DATASETS, each with its PAIRS, the shape of --init-from's network, a resumed run's, the flags. So
# a data set's steps beat a preset's. warm_up, lr_anneal, beta_ramp, tau_hold are shares of them.
DEFAULTS = dict(
    dataset="shapes",
    model="edvae",
    data_dir="data",
    codebook_size=512,
    code_dim=16,
    codebook_init="normal",  # N(0, 1), or "uniform" in (-1 / K, 1 / K)
    two_heads=False,  # SQ-VAE's variant III: the encoder gives variances too
    first_kernel=3,
    max_logit=20.0,
    batch_size=128,
    seed=42,
    # What the paper trains all systems with (App. D), each with its authors' network.
    steps=150_000,
    init="authors",
    lr=1e-3,
    adam_beta2=0.999,
    muon_lr=0.0,
    lr_schedule="quarter-cosine",
    warm_up=0.0,
    lr_anneal=1 / 3,
    beta_ramp=1 / 30,
    tau_start=1.0,
    tau_hold=0.0,
    tau_end=math.exp(-1.5),
)
# The paper's settings, but the learning rate ends where the run ends.
SHORT = dict(steps=35_000, lr_anneal=1.0, beta_ramp=0.1, tau_end=math.exp(-0.5))
PRESETS = {
    "paper": {},
    "short": SHORT,
    # Shows the paper's effect on two CPU cores.
    "cpu": SHORT | dict(steps=3_000, width=64),
    # This project's: for EdVAE and dVAE He initialisation (the other networks train better from
    # their authors'); Muon, larger rates. tau stays high while the codes differentiate: lowered
    # from the start, it starves them. beta falls with the rate: late in training the KL would only
    # keep pi noisy.
    "fast": dict(
        steps=15_000,
        init="he",
        lr=None,  # lr_times_width / width
        adam_beta2=0.99,
        muon_lr=None,  # fast_muon_lr
        lr_schedule="cosine",
        warm_up=0.02,
        lr_anneal=1.0,
        beta_ramp=0.1,
        tau_start=2.0,
        tau_hold=0.2,
        tau_end=2 * math.exp(-2.3),  # 0.2
    ),
}
# A reader, and the settings that go with its images.
SHAPES = dict(preset="fast", size=32, steps=600, batch_size=64, codebook_size=64)
DATASETS = {
    "shapes": (read_shapes, SHAPES),
    "cifar10": (read_cifar10, dict(preset="short", size=32)),
    "celeba": (read_celeba, dict(preset="short", size=64)),
    "lsun-church": (read_lsun_church, dict(preset="short", size=128, first_kernel=7)),
    "folder": (read_folder, dict(preset="fast", size=64)),
}
# By the authors' initialisation, at this width, nothing of the image reaches the logits for
# thousands of steps.
NARROW = dict(width=32, init="he", lr=1e-2)
# What a system takes in one preset, or on one data set.
PAIRS = {
    ("edvae", "cpu"): NARROW,
    ("dvae", "cpu"): NARROW,
    ("edvae", "cifar10"): dict(beta=5e-7),
    ("edvae", "shapes"): dict(beta=3e-7, width=32),
    ("dvae", "shapes"): dict(width=32),
    ("vqvae-ema", "shapes"): dict(width=64),
    ("gs-vqvae", "shapes"): dict(width=64),
    ("sq-vae", "celeba"): dict(two_heads=True),
    ("sq-vae", "lsun-church"): dict(two_heads=True),
    ("sq-vae", "folder"): dict(two_heads=True),
}
MAY_CHANGE = {  # on --resume
    *("data_dir", "out", "resume", "init_from", "device", "compile", "profile"),
    *("log_every", "eval_every", "environment", "resumed"),
}


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
    p = argparse.ArgumentParser(
        prog="train_vae.py",
        description="Train a discrete VAE. A flag left out takes the preset of the data set and "
        "the system. README.md shows the commands, the head of train_vae.py the equations.",
    )
    count, share = number(int, 1, 10**12), number(float, 0, 1)
    positive, not_negative = number(float, 1e-30, 1e30), number(float, 0, 1e30)

    flag = p.add_argument_group("the run").add_argument
    flag("--dataset", choices=DATASETS, help="train on this (default: shapes, generated images)")
    flag("--data-dir", type=str, help="keep the data here (default: data); folder: read its images")
    flag("--size", type=number(int, 8, 1024), help="scale images to this, a multiple of 4")
    flag("--model", choices=QUANTIZERS, help="train this system (default: edvae)")
    flag("--preset", choices=PRESETS, help="take these settings (default: the data set's)")
    flag("--out", type=Path, help="write the run here (default: a new folder under runs/)")
    flag("--resume", action="store_true", help="continue the run in --out")
    flag("--init-from", type=Path, help="start from this run's weights, width, K, D")
    seed = number(int, 0, 2**63 - 1)
    flag("--seed", type=seed, help="seed weights, data order and noise (default: 42)")
    flag = p.add_argument_group("the model").add_argument
    flag("--width", type=number(int, 4, 4096), help="n, channels (default: the system's)")
    flag("--codebook-size", type=number(int, 2, 16384), help="K, codes (default: 512; shapes: 64)")
    flag("--code-dim", type=number(int, 1, 256), help="D, numbers per code (default: 16)")
    clamp = number(float, -1e30, math.inf)
    flag("--max-logit", type=clamp, help="clamp the logits inside alpha at c, or inf (default: 20)")
    flag = p.add_argument_group("training").add_argument
    flag("--steps", type=count, help="training steps (default: the preset's; shapes: 600)")
    flag("--batch-size", type=count, help="images per step, of all processes (default: 128)")
    flag("--lr", type=positive, help="Adam's highest learning rate (default: the preset's)")
    flag("--muon-lr", type=not_negative, help="Muon's, for hidden convolutions; 0: Adam")
    flag("--beta", type=not_negative, help="highest weight of the quantiser's loss")
    flag = p.add_argument_group("schedules, in shares of the run").add_argument
    flag("--lr-anneal", type=positive, help="let the learning rate fall over this share")
    flag("--beta-ramp", type=share, help="let beta rise from 0 over this share")
    flag("--tau-start", type=positive, help="first temperature of the relaxed sample")
    flag(
        "--tau-hold", type=number(float, 0, 0.99), help="hold it over this share; then let it fall"
    )
    flag("--tau-end", type=positive, help="last temperature")
    flag = p.add_argument_group("the machine and the log").add_argument
    flag("--device", type=str, help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    precision = "compute convolutions in this (default: bf16 where it is faster)"
    flag("--precision", choices=("fp32", "bf16"), help=precision)
    compile_help = "compile (default: from 500 steps, and on a GPU; there each step is one graph)"
    flag("--compile", action=argparse.BooleanOptionalAction, help=compile_help)
    flag("--log-every", type=count, help="steps between log lines (default: a sixtieth of the run)")
    flag("--eval-every", type=count, help="steps between tests (default: a tenth, at least 250)")
    flag("--profile", action="store_true", help="time ten steps; write no run")
    return p


def settings(argv=None) -> tuple[Namespace, dict | None]:
    """Every setting of a run, and --resume's checkpoint, or None."""
    join_processes()
    p = parser()
    p.set_defaults(**DEFAULTS)
    first = p.parse_args(argv)
    checkpoint, saved = saved_run(first, p.prog)
    start = load_checkpoint(first.init_from, script=p.prog)["args"] if first.init_from else {}
    shape = ("model", "width", "codebook_size", "code_dim", "first_kernel", "two_heads")
    start = {name: start[name] for name in shape if name in start}
    p.set_defaults(**start | saved)
    first = p.parse_args(argv)  # now with the model, the data set and the preset
    _, dataset = DATASETS[first.dataset]
    preset, system = first.preset or dataset["preset"], QUANTIZERS[first.model].defaults
    in_preset, on_dataset = (PAIRS.get((first.model, x), {}) for x in (preset, first.dataset))
    p.set_defaults(**system | PRESETS[preset] | in_preset | dataset | on_dataset | start | saved)
    args = p.parse_args(argv)
    refuse_changes(args, saved, MAY_CHANGE)
    if args.lr is None:
        args.lr = args.lr_times_width / args.width
    if args.muon_lr is None:
        args.muon_lr = args.fast_muon_lr
    args.log_every = args.log_every or max(1, args.steps // 60)
    args.eval_every = args.eval_every or max(250, args.steps // 10)
    if args.size % 4 or args.width % 4:
        raise UserError(f"--size {args.size} and --width {args.width} must be multiples of 4")
    args.device, args.precision = prepare_device(args.device, args.precision)
    if args.compile is None:
        args.compile = args.device.startswith("cuda") or args.steps >= 500
    if args.batch_size % process_count():
        raise UserError(f"{process_count()} processes cannot share --batch-size {args.batch_size}")
    if process_count() > 1 and args.model == "sq-vae":
        raise UserError("--model sq-vae takes one process: its loss is of the whole batch")
    if process_count() > 1 and args.model == "vq-ste++" and args.device == "cpu":
        raise UserError("--model vq-ste++ takes one process on a CPU: SyncBatchNorm needs GPUs")
    return args, checkpoint


def saved_run(args: Namespace, script: str) -> tuple[dict | None, dict]:
    """The checkpoint in --out and its settings, to resume; UserError unless that is asked for."""
    if args.resume and not args.out:
        raise UserError("--resume needs --out, the folder of the run to continue")
    folder = args.out or Path("runs")
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # fails now, not after the work, if it must
    if not args.out or not (folder / "ckpt.pt").exists():
        return None, dict(script=script)
    if not args.resume:
        cure = "continue it by --resume, or name another --out"
        raise UserError(f"{folder} already holds a run; {cure}")
    checkpoint = load_checkpoint(folder, script=script)
    if "optimizer" not in checkpoint:
        cure = "train_vae.py --init-from starts from its weights"
        raise UserError(f"{folder}/ckpt.pt has no optimiser, so it cannot be continued; {cure}")
    here = ("out", "resume", "device", "profile")
    return checkpoint, {k: v for k, v in checkpoint["args"].items() if k not in here}


def refuse_changes(args: Namespace, saved: dict, may_change: set):
    """UserError for a flag that contradicts the run to resume."""
    for name in saved.keys() - may_change:
        value = getattr(args, name)
        if str(value) != str(saved[name]):
            flag = f"--{name.replace('_', '-')} {value}"
            raise UserError(f"{flag} contradicts the run in {args.out}: {saved[name]}")


# ------------------------------------------------------------------------- optimiser and schedules


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): moves a weight matrix by a nearly orthogonal one.

    So all directions of the matrix move at one rate, at any width. A convolution's weight
    (O, I, h, w) is the matrix (O, h w I). (Of a transposed convolution O and I change places.)
    Equal to torch.optim.Muon up to bf16's rounding; but the rate, lr_scale lr, is a tensor, so that
    a CUDA graph can record the step, and on a GPU the weights of one shape are one batch.
    """

    def __init__(self, weights: list[Tensor], lr: Tensor, lr_scale: float, momentum: float = 0.95):
        super().__init__(weights, dict(lr=lr, lr_scale=lr_scale, momentum=momentum))
        for weight in weights:
            self.state[weight]["momentum"] = torch.zeros_like(as_matrix(weight))

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        momentum, batches = group["momentum"], {}
        for i, weight in enumerate(group["params"]):  # on a CPU batches are slower
            batches.setdefault(weight.shape if weight.is_cuda else i, []).append(weight)
        for weights in batches.values():
            gradients = [as_matrix(w.grad) for w in weights]
            averages = [self.state[w]["momentum"] for w in weights]
            torch._foreach_lerp_(averages, gradients, 1 - momentum)
            nesterov = torch.stack(torch._foreach_lerp(gradients, averages, momentum))  # (G, m, n)
            update = orthogonal(nesterov.squeeze(0)).float().view_as(nesterov)
            _, m, n = update.shape
            update *= group["lr"] * (-group["lr_scale"] * max(1, m / n) ** 0.5)
            # A view, so that the weight itself moves; it fails where that is not channels last.
            matrices = [w.permute(0, 2, 3, 1).view(m, n) for w in weights]
            torch._foreach_add_(matrices, list(update.unbind()))


def as_matrix(weight: Tensor) -> Tensor:
    """(O, I, h, w) as (O, h w I)."""
    return weight.detach().permute(0, 2, 3, 1).flatten(1)


def orthogonal(x: Tensor) -> Tensor:
    """(m, n) or (G, m, n) with its singular values near 1: five Newton-Schulz rounds."""
    if x.shape[-2] > x.shape[-1]:
        return orthogonal(x.mT).mT
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    x = x.bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT  # (G, m, m)
        polynomial = add_product(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = add_product(x, polynomial, x, beta=3.4445)
    return x


def make_optimizers(model: VAE, args: Namespace, lr: Tensor) -> list[torch.optim.Optimizer]:
    """Adam, and Muon for the weights of hidden convolutions unless muon_lr is 0.

    Adam keeps the convolutions that read or write pixels, the one that writes z_e, and all else:
    biases, norms, the codebook. The training loop fills lr.
    """
    _, *encoder, _ = (p for p in model.encoder.parameters() if p.ndim == 4)  # pixels ... z_e
    *decoder, _ = (p for p in model.decoder.parameters() if p.ndim == 4)  # ... pixels
    hidden = [*encoder, *decoder] if args.muon_lr else []
    others = [p for p in model.parameters() if p.requires_grad and p not in set(hidden)]
    # A CUDA graph can record an Adam that is capturable.
    options = dict(betas=(0.9, args.adam_beta2), fused=True, capturable=lr.is_cuda)
    adam = torch.optim.Adam(others, lr=lr, **options)
    return [adam, Muon(hidden, lr, args.muon_lr / args.lr)] if hidden else [adam]


def quarter_cosine(start: float, end: float, progress: float) -> float:
    """From start to end at progress 1; 29% of the way at 1/2: the paper's "cosine annealing"."""
    return start + (end - start) * (1 - math.cos(math.pi / 2 * min(1.0, progress)))


def schedules(step: int, args: Namespace) -> dict[str, float]:
    """lr, beta and tau at a step, counted from 0."""

    def progress(share: float, step: int = step) -> float:
        """How far the step is through a share of the run; above 1 after it."""
        return step / max(1, round(share * args.steps))

    if args.lr_schedule == "quarter-cosine":
        cosine = 1.0
        lr = quarter_cosine(args.lr, 1.25e-3 * args.lr, progress(args.lr_anneal))  # 1e-3: 1.25e-6
    else:  # beta falls with the rate
        cosine = (1 + math.cos(math.pi * min(1.0, progress(args.lr_anneal)))) / 2
        lr = args.lr * cosine * min(1.0, progress(args.warm_up, step + 1))
    beta = args.beta
    if QUANTIZERS[args.model].ramps_beta:
        beta = quarter_cosine(0.0, args.beta, progress(args.beta_ramp)) * cosine
    hold = round(args.tau_hold * args.steps)
    fall = max(0, step - hold) / max(1, args.steps - hold)
    tau = args.tau_start * (args.tau_end / args.tau_start) ** fall  # ln tau falls linearly
    return dict(lr=lr, beta=beta, tau=tau)


# ---------------------------------------------------------------------------------------- measures


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of the codes' frequencies (K): 1 for a single code, K for even use."""
    p = counts.double() / counts.sum()
    return math.exp(-torch.special.xlogy(p, p).sum().item())


class Meter:
    """Sums over passes, kept on the device. flush() waits for the device and gives their means."""

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

    def flush(self) -> dict:
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


@torch.no_grad()
def test_pass(model: VAE, images: np.ndarray, args: Namespace, beta: float = 1.0):
    """Images with hard codes: yields x, z_e, loss, q, x_hat of each batch.

    x (B, 3, H, W), z_e (B, N, N, C), the loss with this beta, the quantiser's Quantized, and x_hat
    from vectors()[q.indices]. Each process takes its share of the batches.
    """
    size = args.batch_size // process_count()
    one = torch.ones((), device=args.device)
    key = torch.zeros(3, dtype=torch.int64, device=args.device)  # no noise reaches a hard code
    for i in range(size * rank(), len(images), size * process_count()):
        x = to_float(torch.from_numpy(images[i : i + size]).to(args.device))
        with autocast(args):
            z_e = model.encode_features(x)
            quantizer_loss, q = model.quantizer(z_e, one, beta * one, key)
            x_hat = model.reconstruct(model.quantizer.vectors()[q.indices])
        yield x, z_e, model.quantizer.reconstruction_loss(x_hat, x) + quantizer_loss, q, x_hat


def test(model: VAE, images: np.ndarray, args: Namespace, beta: float) -> dict:
    """A test line: hard codes, perplexity pooled over the split.

    entropy_map (N, N) is the entropy of pi at each position of the first image.
    """
    meter, entropy_map = Meter(args.codebook_size, args.device), None
    model.eval()
    for i, (x, _, loss, q, x_hat) in enumerate(test_pass(model, images, args, beta)):
        meter.add(loss, F.mse_loss(x_hat, x), q)
        if i == 0 and q.entropy.isfinite().all():
            entropy_map = [[round(h, 3) for h in row] for row in q.entropy[0].tolist()]
    model.train()
    return meter.flush() | dict(split="test", entropy_map=entropy_map)


# ------------------------------------------------------------------------------- the training loop


def train(args: Namespace, checkpoint: dict | None = None) -> Path | None:
    """Train a model as args say, from the checkpoint if there is one; returns the run's folder."""
    # 1. data
    device = torch.device(args.device)
    if rank():
        torch.distributed.barrier()  # until the first process has decoded the images
    train_images, test_images = (
        load_images(args.dataset, split, args.data_dir, args.size) for split in ("train", "test")
    )
    if process_count() > 1 and not rank():
        torch.distributed.barrier()

    # 2. the tensors that the loop fills and the step reads
    share = args.batch_size // process_count()
    batch = torch.zeros(share, args.size, args.size, 3, dtype=torch.uint8, device=device)
    beta, tau = torch.zeros((), device=device), torch.zeros((), device=device)
    # Adam takes lr in float32 on a GPU, in double on a CPU.
    lr = torch.zeros_like(beta, dtype=torch.float32 if device.type == "cuda" else torch.float64)
    # The noise is a function of (seed, step, position), however a batch is split: so this is the
    # seed, the step, and the number of this process's first position.
    key = torch.tensor([args.seed, 0, rank() * share * (args.size // 4) ** 2], device=device)

    # 3. model and optimiser
    torch.manual_seed(args.seed)
    model = VAE(args).to(device)
    optimizers = make_optimizers(model, args, lr)
    start = 0
    if checkpoint:
        start = restore(checkpoint, model, optimizers, args.out)
    elif args.init_from:
        load_weights(model, load_checkpoint(args.init_from), args.init_from)
    elif model.quantizer.init_codebook:
        first = batch_indices(0, args.batch_size, len(train_images), args.seed).numpy()
        x = to_float(torch.from_numpy(train_images[first]).to(device))
        with torch.no_grad(), autocast(args):
            model.quantizer.init_codebook(model.encode_features(x))
    step_model = distribute(model, device)  # averages gradients over processes
    if args.compile and device.type == "cuda":  # on a CPU oneDNN's convolutions gain nothing
        step_model = kernels.Compiled(step_model)
    meter = Meter(args.codebook_size, device)

    # 4. the step: all that runs on the device
    def step():
        with autocast(args):
            loss, mse, q = step_model(to_float(batch), tau, beta, key)  # Eq. 8
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        meter.add(loss, mse, q)

    if one_graph(args):
        step = kernels.Graphed(step)

    def fill(i: int):
        """The step's inputs are functions of i, so that a resumed run sees the same."""
        now = schedules(i, args)
        lr.fill_(now["lr"])
        beta.fill_(now["beta"])
        tau.fill_(now["tau"])
        key[1].fill_(i)
        index = batch_indices(i, args.batch_size, len(train_images), args.seed)
        images = torch.from_numpy(train_images[index[rank() * share :][:share].numpy()])
        batch.copy_(images.pin_memory() if device.type == "cuda" else images, non_blocking=True)

    if args.profile:
        fill(0)
        return profile(step, device)

    # 5. the loop
    run = Run(args, f"{args.dataset}-{args.model}", start)
    if start == run.tested == args.steps:
        raise UserError(f"{run.folder} is finished; name another --out for a new run")
    parameters = sum(p.numel() for p in model.parameters())
    run.print(
        f"{run.folder}: {args.model} on {args.dataset}, {len(train_images):,} images, "
        f"{parameters:,} parameters, {device}, {args.precision}, steps {start} to {args.steps}"
    )
    seconds = 1.1 * share / 128 * (args.size / 32 * args.width / 128) ** 2  # EdVAE's step: README
    if device.type == "cpu" and args.steps * seconds > 3600 and model.quantizer.network == "ed":
        hours = f"about {args.steps * seconds / 3600:.0f} hours on two cores"
        run.print(f"without a GPU this takes {hours}; --preset cpu is for CPUs")
    logged, clock = start, time.perf_counter()  # of the last log line

    def save(done: int):
        optimizer = [o.state_dict() for o in optimizers]
        run.save(done, model=model.state_dict(), optimizer=optimizer)

    with run:
        save(start)
        for i in range(start, args.steps + 1):
            if (i % args.eval_every == 0 or i == args.steps) and i > run.tested:
                started = time.perf_counter()
                last = schedules(i - 1, args)  # of the step before
                tested = test(model, test_images, args, last["beta"]) | last
                run.log(i, tested, "(test)")
                if rank() == 0:
                    save_recon(model, test_images, run.folder / "recon.png")
                clock += time.perf_counter() - started
            if i == args.steps:
                break
            fill(i)
            step()
            done = i + 1
            if done % args.log_every == 0 or done == args.steps:  # here the host waits
                line = meter.flush() | schedules(i, args)
                check_finite(model, line["loss"], f"{logged + 1} to {done}", run)
                rate = (done - logged) * args.batch_size / (time.perf_counter() - clock)
                left = (args.steps - done) * args.batch_size / rate / 60
                line["images_per_second"] = rate
                run.log(done, line, f"{rate:,.0f} images/s  {left:.1f} min left")
                if run.save_is_due() or done == args.steps:
                    save(done)
                logged, clock = done, time.perf_counter()
    run.print(
        f"\n{args.model} on {args.dataset}: test MSE {tested['mse']:.3e} ([0, 1] scale), "
        f"perplexity {tested['perplexity']:.1f} of {args.codebook_size}, "
        f"{tested['codes_used']} codes used\n"
        f"{run.folder}/: recon.png (inputs above reconstructions), log.jsonl, ckpt.pt"
    )
    if tested["codes_used"] < args.codebook_size / 10:
        run.print("under a tenth of the codes is in use: the codebook has collapsed")
    return run.folder


def one_graph(args: Namespace) -> bool:
    """Whether steps are replays of one CUDA graph: the host launches it, and not 700 kernels."""
    return args.compile and args.device.startswith("cuda") and process_count() == 1


def check_finite(model: nn.Module, loss: float | None, steps: str, run: "Run"):
    """Exit with code 1 and one line if the loss (None in a log line) or a weight is not finite.

    Nothing is saved. A batch is a function of seed and step, so the run can be repeated from its
    last checkpoint.
    """
    if loss is not None and all(p.isfinite().all() for p in model.parameters()):
        return
    saved = f"{run.folder}/ckpt.pt is from step {run.saved_step}"
    sys.exit(1 if rank() else f"the loss or a weight is not finite, in steps {steps}; {saved}")


@torch.no_grad()
def save_recon(model: VAE, images: np.ndarray, path: Path):
    """Rows of twelve images, each above the row of its reconstructions from hard codes."""
    x = to_float(torch.from_numpy(images[: 24 if len(images) >= 24 else 12]))
    model.eval()
    parts = (part.to(model.args.device) for part in x.split(model.args.batch_size))
    x_hat = torch.cat([model.decode(model.encode(part)).cpu() for part in parts])
    model.train()
    rows = [row for pair in zip(x.split(12), x_hat.split(12)) for row in pair]
    save_grid(torch.cat(rows), path, min(12, len(x)))


def save_grid(images: Tensor, path: Path, columns: int):
    """Images (B, 3, H, W) in [0, 1] as one picture; small ones are enlarged, to 96 at the most."""
    enlarged = F.interpolate(images.cpu(), scale_factor=max(1, 96 // images.shape[-1]))
    torchvision.utils.save_image(enlarged, path, nrow=columns, pad_value=1)


def profile(step, device: torch.device):
    """--profile: print where the time of ten steps goes."""
    for _ in range(5):  # compile, record
        step()
    with torch.profiler.profile() as p:
        for _ in range(10):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    if rank() == 0:
        sort_by = f"self_{device.type}_time_total"
        print(p.key_averages().table(sort_by=sort_by, row_limit=20, max_name_column_width=50))


# -------------------------------------------------------------------- the device and its precision


def prepare_device(device: str | None = None, precision: str | None = None) -> tuple[str, str]:
    """The device and precision that run; UserError for a device that is not there.

    From here on fp32 means fp32, without TF32.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not device.startswith(("cpu", "cuda")):
        raise UserError(f"--device {device} is not supported: cpu, cuda or cuda:1, ...")
    if device.startswith("cuda") and process_count() > 1:
        processes, cards = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if processes > cards:
            raise UserError(f"{processes} processes need as many GPUs; there are {cards}")
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = str(torch.zeros(1, device=device).device)  # "cuda" becomes "cuda:0"
        if device.startswith("cuda"):
            torch.cuda.set_device(device)  # Triton launches on the current device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {device} is not there: {in_one_line(e)}") from None
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True  # the shapes of a step never change
    if device.startswith("cuda"):
        fast_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # At width 32 bf16 took 0.76 of fp32's time on an EPYC with avx512_bf16, and more than it on
        # a Xeon with avx512_bf16 and no AMX.
        fast_bf16 = cpu_has("amx_bf16") or cpu_has("AuthenticAMD", "avx512_bf16")
    return device, precision or ("bf16" if fast_bf16 else "fp32")


def cpu_has(*flags: str) -> bool:
    try:
        return all(flag in Path("/proc/cpuinfo").read_text() for flag in flags)
    except OSError:
        return False


def autocast(args: Namespace):
    device = torch.device(args.device).type
    return torch.autocast(device, torch.bfloat16, enabled=args.precision == "bf16")


# -------------------------------------------------------------------------------- the run's folder


class Run:
    """A run's folder: args.json, log.jsonl, ckpt.pt. Only the first process writes it.

    A stop of any kind loses what came after the last checkpoint: at most SAVE_SECONDS and the steps
    to the next log line. On a CPU the resumed run ends with the same bits.
    """

    SAVE_SECONDS = 10  # between checkpoints

    def __init__(self, args: Namespace, name: str, start: int):
        """--out, or a new runs/<name>-<i>. Log lines after step `start` will be dropped."""
        self.args, self.saved_step, self.saved_at = args, start, time.monotonic()
        self.folder = args.out or (Path("runs") if rank() else new_folder(name))
        lines = read_log(self.folder / "log.jsonl") if start else []
        self.lines = [line for line in lines if line["step"] <= start]
        tests = [line["step"] for line in self.lines if line.get("split") == "test"]
        self.tested = max(tests, default=0)  # the step of the last test

    def __enter__(self):
        if rank():
            return
        now, saved = environment(self.args), vars(self.args).get("environment")
        self.args.environment = saved or now  # a resumed run keeps its first command
        self.args.resumed = [*vars(self.args).get("resumed", []), *([now] if saved else [])]
        with atomic_write(self.folder / "args.json") as f:
            f.write(json.dumps(self.settings(), indent=1).encode())
        with atomic_write(self.folder / "log.jsonl") as f:
            f.write("".join(json.dumps(line) + "\n" for line in self.lines).encode())

    def __exit__(self, kind, *_):
        if kind is KeyboardInterrupt:
            where = f"--out {shlex.quote(str(self.folder))} --device {self.args.device}"
            command = f"python {self.args.script} {where} --resume"
            self.print(f"\nstopped, saved at step {self.saved_step}; to continue: {command}")

    def print(self, text: str):
        if rank() == 0:
            print(text, flush=True)

    def log(self, step: int, line: dict, text: str):
        """A line of log.jsonl, and its main numbers on the screen."""
        if rank():
            return
        with open(self.folder / "log.jsonl", "a") as f:
            f.write(json.dumps(dict(step=step, **line)) + "\n")
        shown = ("mse", "kl", "perplexity", "codes_used", "entropy_mean")
        numbers = [f"{k} {line[k]:.4g}" for k in shown if line.get(k) is not None]
        self.print(f"step {step:>6}  " + "  ".join([*numbers, text]))

    def settings(self) -> dict:
        """As plain types: for JSON, and for torch.load with weights_only=True."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items()}

    def save_is_due(self) -> bool:
        return time.monotonic() >= self.saved_at + self.SAVE_SECONDS

    def save(self, step: int, **states):
        """ckpt.pt: the states of modules and optimisers, of the generators, the settings."""
        if rank():
            return
        generators = dict(generator=torch.get_rng_state())
        if self.args.device.startswith("cuda"):
            generators["cuda_generator"] = torch.cuda.get_rng_state()
        buffer = io.BytesIO()  # torch.save itself aborts in C++ on a full disk
        torch.save(states | generators | dict(step=step, args=self.settings()), buffer)
        with atomic_write(self.folder / "ckpt.pt") as f:
            f.write(buffer.getbuffer())
        self.saved_step, self.saved_at = step, time.monotonic()


def new_folder(name: str) -> Path:
    """Make the first free runs/<name>-<i>. Runs that start together get one each."""
    i = 1
    while True:
        folder = Path(f"runs/{name}-{i}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            i += 1


def environment(args: Namespace) -> dict:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    device = torch.device(args.device)
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        amx = "AMX" if cpu_has("amx_bf16") else "no AMX"
        hardware = f"{platform.machine()} CPU ({amx}), {torch.get_num_threads()} threads"
    command = " ".join(sys.argv)
    return dict(command=command, commit=commit, hardware=hardware, torch=str(torch.__version__))


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
        what = f"{type(e).__name__}: {in_one_line(e)}"
        raise UserError(f"{path} is damaged or not a checkpoint ({what})") from None
    made_by, system = state["args"].get("script"), state["args"].get("model")
    if script and made_by != script:
        raise UserError(f"{path} is not a run of {script}, but of {made_by}")
    if system and system not in QUANTIZERS:
        raise UserError(f"{path} is of --model {system}, which this train_vae.py does not have")
    return state


def load_weights(model: nn.Module, state: dict, path):
    """Put a checkpoint's weights in place; UserError if they are of another network."""
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as e:
        raise UserError(f"{path}: its weights do not fit this network: {in_one_line(e)}") from None


def restore(checkpoint: dict, model: nn.Module, optimizers: list, path) -> int:
    """Put a checkpoint's states in place; returns its step."""
    load_weights(model, checkpoint, path)
    for optimizer, saved in zip(optimizers, checkpoint["optimizer"]):
        (group,) = optimizer.param_groups
        here = {k: group[k] for k in ("lr", "capturable") if k in group}
        optimizer.load_state_dict(saved)
        optimizer.param_groups[0].update(here)  # not the saved run's tensor and device
    torch.set_rng_state(checkpoint["generator"].cpu())
    if torch.cuda.is_available() and "cuda_generator" in checkpoint:
        torch.cuda.set_rng_state(checkpoint["cuda_generator"].cpu())
    return checkpoint["step"]


def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl. A killed process may have left the last one unfinished."""
    try:
        text = path.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e})") from None


@contextlib.contextmanager
def atomic_write(path: Path):
    """A file that appears at path whole or not at all: written beside it, then renamed."""
    part = path.with_name(f"{path.name}.{os.urandom(4).hex()}.part")  # no other process's
    try:
        with open(part, "xb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        e.filename = str(path)  # a full disk's error names no file
        raise
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------------------- processes and errors


def rank() -> int:
    """The number of this process."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def process_count() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def join_processes():
    """Join the other processes of a torchrun, which sets these variables."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    if "RANK" in missing and "WORLD_SIZE" in missing:
        return
    if torch.distributed.is_initialized():
        return
    if missing:
        cure = "start by torchrun, or unset RANK and WORLD_SIZE"
        raise UserError(f"{', '.join(missing)} not set in the environment: {cure}")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    a_day = datetime.timedelta(days=1)  # the others wait while the first decodes a data set
    torch.distributed.init_process_group(backend, timeout=a_day)


def distribute(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as DistributedDataParallel where there are several processes."""
    if process_count() == 1:
        return model
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of x over all processes, in place."""
    if process_count() > 1:
        torch.distributed.all_reduce(x)
    return x


def broadcast_from_first(x: Tensor) -> Tensor:
    """The first process's x on all processes, in place."""
    if process_count() > 1:
        torch.distributed.broadcast(x, 0)
    return x


def in_one_line(e: Exception) -> str:
    """What an exception says, or its name: some begin with a line that says nothing."""
    return " ".join((str(e) or type(e).__name__).split())[:200]


def tune_cpu():
    """Two switches for a faster step on a CPU, before any thread starts.

    Denormals become 0: they are slow, and once pi is sharp there are many. And glibc keeps freed
    memory: by default each large tensor is mapped anew, zeroed page by page, and unmapped, which
    takes a sixth of a step's CPU time at n = 32.
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
    try:
        work(argv)
        if process_count() > 1:  # not after an error: it would wait for processes still at work
            torch.distributed.destroy_process_group()
        return
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as e:
        message = str(e)
    except OSError as e:
        message = f"{e.filename or 'a file'}: {e.strerror or e}"
    except (MemoryError, RuntimeError) as e:
        memory = isinstance(e, (MemoryError, torch.OutOfMemoryError))
        if not memory and "allocate memory" not in str(e):
            raise
        message = "out of memory: take a smaller batch, width or codebook"
    print(f"{script}: {message}", file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    run_script("train_vae.py", lambda argv: train(*settings(argv)), argv)


if __name__ == "__main__":
    main()
