"""Stage 1: train a discrete VAE on images: EdVAE (Baykal, Kandemir, Unal 2024), or one of its five rivals.

    python train_vae.py                                              # generated shapes, minutes on two CPU cores
    python train_vae.py --dataset cifar10                            # the paper's CIFAR10 experiment: 150,000 steps
    python train_vae.py --dataset cifar10 --model dvae               # the same for the model whose codebook collapses
    python train_vae.py --dataset folder --data-dir photos --size 64 # your own images
    python train_vae.py --dataset cifar10 --profile                  # where a step's time goes; --bench: speed tables
    torchrun --standalone --nproc_per_node=4 train_vae.py --dataset cifar10   # the same training on four processes

From pixels to pixels, with B images of H x W, N = H / 4, K codes of D numbers:

    x        (B, 3, H, W)    pixels in [0, 1]
    z_e      (B, N, N, K)    Encoder(x - 1/2): one logit for each position and code
    alpha    (B, N, N, K)    exp(min(z_e, c)) + 1, concentrations of a Dirichlet over code probabilities    Eq. 2
    pi       (B, N, N, K)    alpha / S, its mean; dVAE: softmax(z_e)                                        App. B
    z        (B, N, N, K)    RelaxedOneHotCategorical(tau, pi) sample in training, one-hot argmax in use    Alg. 1
    z_q      (B, N, N, D)    z M, a mixture of rows of the codebook M (K, D)
    x_hat    (B, 3, H, W)    Decoder(z_q) + 1/2
    loss = mean (x_hat - x)^2 + beta mean KL[Dir(alpha) || Dir(1, ..., 1)]                                  Eq. 8

Where the paper's text and the authors' code differ, this file does what produced the paper's numbers: pi is the mean
and not a Dirichlet sample, codes are the argmax in use, beta weighs means over positions, blocks are bottlenecks scaled
by 1/36, and "cosine annealing" is the quarter cosine below. The bottleneck (alpha to z_q, KL) is in kernels.py.
"""
import argparse
import contextlib
import ctypes
import functools
import io
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.profiler import record_function

import kernels

# ------------------------------------------------------------------------------------------------------------ settings

# What a flag left out becomes. The paper's values (App. D) but for shapes, the embedded default.
# edvae-common, the default --preset: what the paper trains all systems with (Tables 1 to 3), each in its own network.
PAPER = dict(codebook_size=512, code_dim=16, steps=150_000, batch_size=128, lr=1e-3, max_logit=20.0, optimizer="adam",
             lr_schedule="quarter-cosine", codebook_init="normal", ema_decay=0.99, variance="constant", affine_lr=10.0,
             sync=0.2, alternate=True, replace_after=20, tau_start=1.0,
             schedule=(1 / 30, 1 / 3, 1.5))  # beta's ramp and the rate's fall as shares of the run; -ln tau at its end
SHORT = (1 / 10, 4 / 3, 0.75)  # for a few thousand steps: the paper's schedule would freeze them before they have begun
DATASETS = {
    "shapes": dict(size=32, first_kernel=3, codebook_size=64, steps=1400, batch_size=64, schedule=SHORT,
                   max_logit=math.inf),
    "cifar10": dict(size=32, first_kernel=3),
    "celeba": dict(size=64, first_kernel=3, variance="position"),
    "lsun-church": dict(size=128, first_kernel=7, variance="position"),
    "folder": dict(size=64, first_kernel=3, variance="position"),
}
SYSTEMS = {  # beta: the upper bound of the KL's weight; of VQ-VAE-EMA the constant weight of its commitment loss
    "edvae": dict(width=128, beta=1e-7),
    "dvae": dict(width=128, beta=5e-5),
    "vqvae-ema": dict(width=256, beta=0.25, codebook_init="uniform"),
    "gs-vqvae": dict(width=256, beta=5e-6, codebook_init="uniform"),
    "sq-vae": dict(width=64, beta=1.0),
    "vq-ste++": dict(width=64, beta=2.0),
}
OWN = {  # what a dataset asks of a system
    ("edvae", "cifar10"): dict(beta=5e-7),
    ("edvae", "shapes"): dict(beta=3e-7, width=32), ("dvae", "shapes"): dict(width=32),
    ("vqvae-ema", "shapes"): dict(width=64), ("gs-vqvae", "shapes"): dict(width=64),
}
NATIVE = {  # --preset native: each method's own paper or code (SQ-VAE's rate falls on plateaus there, here by a cosine)
    "edvae": {}, "dvae": {},
    "vqvae-ema": dict(code_dim=64, lr=2e-4, lr_schedule="constant", steps=250_000),
    "gs-vqvae": dict(code_dim=64, lr=5e-4, lr_schedule="constant", steps=250_000, tau_start=0.5, tau_rate=0.0),
    "sq-vae": dict(code_dim=64, batch_size=32, steps=125_000, lr_schedule="cosine", schedule=(1, 1, 1.25)),
    "vq-ste++": dict(codebook_size=1024, code_dim=64, batch_size=32, steps=140_000, lr=1e-4,
                     lr_schedule="warm-up-cosine", schedule=(1, 1, 1), optimizer="adamw", alternate=False, beta=5.0),
}


# Set by torchrun: this process's number and how many there are.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class UserError(Exception):
    """A mistake of the user's: main prints its one line and exits with code 2."""


def first_line(e: Exception) -> str:
    return (str(e) or type(e).__name__).splitlines()[0][:120]


@contextlib.contextmanager
def clear_errors(script: str):
    """UserErrors, a full disk and too little memory as one line on stderr and exit code 2."""
    try:
        yield
    except UserError as e:
        told = str(e)
    except OSError as e:
        told = f"{e.filename or 'a file'}: {e.strerror or e}"
    except (MemoryError, RuntimeError) as e:
        if not (isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(e)):
            raise
        told = "out of memory: take a smaller --batch-size, --width or --codebook-size"
    else:
        return
    RANK or print(f"{script}: {told}", file=sys.stderr)
    sys.exit(2)


def number(kind, low, high=math.inf, open_low=False):
    """An argparse type: kind (int or float) in [low, high], or (low, high] with open_low; nan is never in."""
    def parse(text):
        value = kind(text)
        if not (low < value <= high if open_low else low <= value <= high):
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if open_low else 'at least'} {low:g}"
                                             + (f" and at most {high:g}" if high < math.inf else ""))
        return value
    parse.__name__ = "whole number" if kind is int else "number"
    return parse


COUNT, FINITE = number(int, 1, 10 ** 12), 1e30


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = p.add_argument
    flag("--dataset", choices=DATASETS, default="shapes", help="what to train on (default shapes, which are generated)")
    flag("--data-dir", type=Path, default=Path("data"), help="where data and its uint8 cache lie (default data); "
         "for --dataset folder the tree of images itself, with train/ and test/ or else every tenth image as test: "
         "grey, palette and 16-bit ones become RGB, alpha lies over white, EXIF turns are done, the shorter side is "
         "scaled to --size and the rest cropped; an unreadable file or a decompression bomb is named, and refused")
    flag("--size", type=number(int, 8, 1024), help="pixels a side, a multiple of 4; images are scaled to it (default: "
         "the dataset's, folder 64)")
    flag("--out", type=Path, help="the run's folder (default: a fresh one under runs/)")
    flag("--resume", action="store_true", help="go on from --out's checkpoint; starts afresh if there is none")
    flag("--model", choices=SYSTEMS, default="edvae", help="the system (default edvae)")
    flag("--preset", choices=("edvae-common", "native"), default="edvae-common", help="settings left out: as the EdVAE "
         "paper trained all systems (default), or each method's own")
    flag("--steps", type=COUNT, help="training steps; schedules stretch with it (default: 150000, shapes 1400)")
    flag("--batch-size", type=COUNT, help="images a step (default 128, shapes 64)")
    flag("--lr", type=number(float, 0, FINITE, open_low=True), help="Adam's first learning rate (default 1e-3)")
    flag("--width", type=number(int, 4, 4096), help="n, channels, a multiple of 4: of EdVAE's and dVAE's first block "
         "(default 128, shapes 32), of the whole network of the VQ-VAEs (256) and of SQ-VAE and VQ-STE++ (64)")
    flag("--codebook-size", type=number(int, 2, 16384), help="K, codes (default 512, shapes 64)")
    flag("--code-dim", type=number(int, 1, 256), help="D, numbers a code (default 16)")
    flag("--beta", type=number(float, 0, FINITE), help="the KL's weight after its ramp (default: EdVAE 5e-7 on "
         "cifar10, else 1e-7; dVAE 5e-5; SYSTEMS in the source has all)")
    flag("--max-logit", type=number(float, -FINITE), help="clamp c of the logits inside alpha, or inf (default 20, "
         "shapes inf)")
    flag("--kl", choices=("exact", "textbook"), default="exact", help="exact: this project's float32 form; textbook: "
         "torch.distributions' float32, which produced the paper's numbers (default exact)")
    flag("--beta-ramp", type=COUNT, metavar="STEPS", help="length of beta's rise from 0 (default steps / 30, "
         "shapes steps / 10)")
    flag("--lr-anneal", type=COUNT, metavar="STEPS", help="length of the learning rate's fall (default steps / 3, "
         "shapes 4/3 steps)")
    flag("--tau-start", type=number(float, 0, FINITE, open_low=True), help="first temperature of the relaxed sample "
         "(default 1)")
    flag("--tau-rate", type=number(float, 0, FINITE), help="tau = start exp(-rate step) (default 1.5 / steps, shapes "
         "0.75 / steps)")
    flag("--seed", type=number(int, 0, 2 ** 63 - 1), default=42, help="of weights, data order and noise (default 42)")
    flag("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    flag("--precision", choices=("fp32", "bf16"), help="of the convolutions; weights, residual stream, logits and "
         "bottleneck stay fp32 (default bf16 on a GPU or a CPU with bf16 units, else fp32)")
    flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile: the model on a GPU, the bottleneck "
         "on a CPU (default: on a GPU on; on a CPU for 500 steps and up)")
    flag("--backend", choices=("auto", "triton", "torch"), default="auto", help="of the bottleneck (auto: Triton "
         "on a GPU, PyTorch elsewhere)")
    flag("--log-every", type=COUNT, metavar="STEPS", help="steps between log lines (default steps / 60)")
    flag("--eval-every", type=COUNT, metavar="STEPS", help="steps between tests (default steps / 10)")
    flag("--save-every", type=COUNT, metavar="STEPS", help="steps between checkpoints (default steps / 30, at least "
         "1000)")
    flag("--grad-accum", type=COUNT, default=1, metavar="PARTS", help="take each batch in so many parts, for a small "
         "card; moving averages and batch norms see the parts (default 1)")
    flag("--profile", action="store_true", help="time 20 steps by part with torch.profiler, and write no run")
    flag("--bench", action="store_true", help="print tables of the step's speed, growth and memory; write no run")
    return p


# What may change on --resume.
FREE = ("data_dir", "out", "resume", "device", "compile", "backend", "log_every", "eval_every", "save_every",
        "grad_accum", "profile", "bench")


def parse(p: argparse.ArgumentParser, argv) -> tuple:
    """The command line with defaults filled in, and with None for each flag that the user left out."""
    given = argparse.Namespace(**{action.dest: None for action in p._actions if action.dest != "help"})
    p.parse_args(argv, given)
    return p.parse_args(argv), given


def checked(before: dict, p: argparse.ArgumentParser, folder: Path, free=FREE) -> dict:
    """The settings of a run to go on with, held to the same bounds as the command line's."""
    for action in p._actions:
        name = action.dest
        if name == "help":
            continue
        try:
            value = before.get(name) if name in free else before[name]
            if value is not None and action.type:
                action.type(str(value))
            if action.choices and value not in action.choices:
                raise ValueError(f"not one of {', '.join(action.choices)}")
        except (KeyError, TypeError, ValueError, argparse.ArgumentTypeError) as e:
            raise UserError(f"{folder} holds no run of this script, or a damaged one (setting {name}: {e})") from None
    return before


def keep(args: argparse.Namespace, given: argparse.Namespace, before: dict, free=FREE):
    """Take a run's settings for every flag left out; UserError for one that contradicts them."""
    for name in before.keys() - {"out", "resume", "device"}:
        new, old = getattr(given, name, None), before[name]
        if name not in free and new is not None and new != old:
            raise UserError(f"--{name.replace('_', '-')} {new} contradicts the run in {args.out}, which has {old}; "
                            f"leave the flag out, or start a new run with another --out")
        if new is None:
            setattr(args, name, Path(old) if name == "data_dir" else old)


def settings(argv=None) -> tuple:
    """The command line with every preset filled in, and --resume's checkpoint or None; a run keeps its settings."""
    p, ckpt, before = parser(), None, {}
    args, given = parse(p, argv)
    check_out(args)
    if args.resume:
        if (args.out / "ckpt.pt").exists():
            ckpt = load_checkpoint(args.out)
            before = checked(ckpt["args"], p, args.out)
        elif (args.out / "args.json").exists():                                    # stopped before its first checkpoint
            before = checked(read_json(args.out / "args.json"), p, args.out)
            before.pop("environment", None)
    keep(args, given, before)
    presets = PAPER | DATASETS[args.dataset] | SYSTEMS[args.model] | OWN.get((args.model, args.dataset), {})
    if args.preset == "native":
        presets |= NATIVE[args.model]
    steps = args.steps or presets["steps"]
    ramp, fall, cooling = presets.pop("schedule")
    presets = dict(beta_ramp=max(1, round(steps * ramp)), lr_anneal=max(1, round(steps * fall)),
                   tau_rate=cooling / steps, log_every=max(1, steps // 60), eval_every=max(1, steps // 10),
                   save_every=max(1000, steps // 30)) | presets
    for name, value in presets.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.size % 4 or args.width % 4:
        raise UserError(f"--size {args.size} and --width {args.width} must be multiples of 4")
    if args.kl == "textbook" and args.max_logit > 80:
        raise UserError(f"--kl textbook overflows float32 at logits over 88: give it a --max-logit of at most 80, not "
                        f"{args.max_logit:g}, or take --kl exact")
    if args.batch_size % (WORLD * args.grad_accum):
        raise UserError(f"--batch-size {args.batch_size} is the whole batch and cannot be split over {WORLD} processes "
                        f"of {args.grad_accum} parts")
    if WORLD > 1 and (args.bench or args.profile):
        raise UserError("--bench and --profile measure one process: leave torchrun out")
    resolve_device(args)
    try:
        kernels.resolve_backend(args.backend, args.device)
    except ValueError as e:
        raise UserError(f"--backend {args.backend} --device {args.device}: {e}") from None
    if args.compile is None:
        args.compile = args.device.startswith("cuda") or args.steps >= 500
    return args, ckpt


def resolve_device(args):
    """Fill in args.device and args.precision; UserError for a device that is not there."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and WORLD > 1:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {args.device} is not there: {first_line(e)}") from None
    args.precision = args.precision or ("bf16" if args.device.startswith("cuda") or has_bf16_units() else "fp32")


def has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AMX or AVX-512 bf16); elsewhere bf16 is slower than fp32."""
    try:
        return bool(re.search(r"\b(amx_bf16|avx512_bf16)\b", Path("/proc/cpuinfo").read_text()))
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------------------------- data

def load_images(dataset: str, split: str, data_dir="data", size: int = None, alone: bool = False) -> np.ndarray:
    """All images of a split ("train" or "test"): uint8 (N, size, size, 3), memory-mapped from the cache.

    The first use decodes them to <data-dir>/<dataset>-<split>-<size>.npy; after that no original is needed. Of several
    processes the first decodes and the others wait for it, but for a call that one process makes alone.
    Raises UserError where they can't be had.
    """
    size = size or DATASETS[dataset]["size"]
    cache = Path(data_dir) / f"{dataset}-{split}-{size}.npy"
    if many() and RANK and not alone:
        torch.distributed.barrier()
    if not cache.exists():
        count, images = READERS[dataset](split, Path(data_dir), size)           # images: an iterator of (size, size, 3)
        if not count:
            raise UserError(f"no images for --dataset {dataset}, split {split}, under {data_dir}")
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            part = cache.with_suffix(f".{os.getpid()}.part")
            array = np.lib.format.open_memmap(part, "w+", np.uint8, (count, size, size, 3))
            for i, image in enumerate(images):
                array[i] = image
                if i % 1000 == 999 or i == count - 1:
                    print(f"\r{cache.name}: {i + 1:,} of {count:,} images", end="", flush=True)
            print()
            array.flush()
            part.rename(cache)
        except OSError as e:
            raise UserError(f"cannot write the cache {cache}: {e.strerror or e}") from None
        finally:
            part.unlink(missing_ok=True)
    if many() and not RANK and not alone:
        torch.distributed.barrier()
    try:
        images = np.load(cache, mmap_mode="r", allow_pickle=False)
    except Exception as e:                                                         # a foreign header raises anything
        raise UserError(f"{cache} is no .npy file ({first_line(e)}); delete it to decode again") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (size, size, 3) or not len(images):
        raise UserError(f"{cache} holds {images.dtype} {images.shape}, not uint8 (N, {size}, {size}, 3); delete it")
    return images


def draw_shapes(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Generated images, uint8 (count, size, size, 3): one to three textured shapes on a textured background."""
    def uniform(low, high):
        return rng.uniform(low, high, (count, 1, 1)).astype(np.float32)

    def texture(u, v):
        """Two colours, mixed flat, as a gradient, in stripes, in checks or in dots along the coordinates u, v."""
        c0, c1 = rng.uniform(0, 1, (2, count, 1, 1, 3)).astype(np.float32)
        f, kind = uniform(4, 14), rng.integers(0, 5, (count, 1, 1))
        wave_u, wave_v = np.sin(f * u), np.sin(f * v)
        mix = np.select([kind == 0, kind == 1, kind == 2, kind == 3], [0 * u, (u + 1) / 2, 4 * wave_u + 0.5,
                        8 * wave_u * wave_v + 0.5], 4 * (wave_u + wave_v) - 2).clip(0, 1)[..., None]
        return c0 + mix * (c1 - c0)                                                # (count, size, size, 3)

    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j].astype(np.float32)
    angle = uniform(0, 2 * np.pi)
    image = texture(x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle))
    for i in range(3):
        angle, radius = uniform(0, 2 * np.pi), uniform(0.25, 0.6)
        dx, dy = (x - uniform(-0.6, 0.6)) / radius, (y - uniform(-0.6, 0.6)) / radius
        u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
        r, box = np.hypot(u, v), np.maximum(abs(u), abs(v))
        cross = np.minimum(np.maximum(abs(u), 3 * abs(v)), np.maximum(3 * abs(u), abs(v)))
        star = r * (1 + 0.35 * np.cos(5 * np.arctan2(v, u)))
        kind = rng.integers(0, 6, (count, 1, 1))
        distance = np.select([kind == 0, kind == 1, kind == 2, kind == 3, kind == 4],
                             [r, 1.2 * box, np.maximum(abs(u) * 1.5 + v, -v) * 1.4, abs(r - 0.75) * 4, cross], star)
        inside = ((1 - distance) * radius * size / 4 + 0.5).clip(0, 1)[..., None]   # a soft edge of about a pixel
        inside = inside * (uniform(0, 1) < (1, 0.6, 0.3)[i])[..., None]
        image = image + inside * (texture(u, v) - image)
    return (image * 255 + 0.5).astype(np.uint8)


def shapes_reader(split, data_dir, size):
    count, chunk = {"train": 20_000, "test": 2_000}[split], 500
    rng = np.random.default_rng([{"train": 0, "test": 1}[split], size])
    return count, (image for _ in range(count // chunk) for image in draw_shapes(chunk, size, rng))


def cifar10_reader(split, data_dir, size):
    try:
        data = torchvision.datasets.CIFAR10(data_dir, train=split == "train", download=True).data
    except (OSError, RuntimeError) as e:
        raise UserError(f"CIFAR-10 is not under {data_dir} and could not be downloaded ({first_line(e)}); put "
                        f"cifar-10-python.tar.gz or cifar10-{split}-32.npy there, or use --dataset shapes") from None
    return len(data), data if size == 32 else (pixels(image, size) for image in data)


def pixels(image, size: int, crop: int = None, stretch: bool = False, name: str = "image") -> np.ndarray:
    """A PIL image, path or array as uint8 (size, size, 3), the way that --help states."""
    from PIL import Image, ImageOps
    try:
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else Image.open(image)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):                                             # 16 bits a pixel
            image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise UserError(f"cannot read {name}: {first_line(e)}") from None
    if crop:                                                                       # CelebA's CenterCrop
        left, top = (image.width - crop) // 2, (image.height - crop) // 2
        image = image.crop((left, top, left + crop, top + crop))
    if stretch:                                                                    # LSUN: the aspect ratio is not kept
        return np.asarray(image.resize((size, size), Image.BILINEAR))
    return np.asarray(ImageOps.fit(image, (size, size), Image.BILINEAR))           # shorter side to size, centre crop


def image_files(folder: Path) -> list:
    kinds = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in kinds and path.is_file())


def celeba_reader(split, data_dir, size):
    """Aligned CelebA, centre crop 140. "test" is the official valid split, on which the paper's numbers were taken."""
    home = data_dir / "celeba" / "img_align_celeba"                                # where torchvision puts them
    folder = next((d for d in (home, data_dir / "img_align_celeba", home.parent) if (d / "000001.jpg").exists()), home)
    if not (folder / "000001.jpg").exists():
        try:
            torchvision.datasets.CelebA(data_dir, split="all", download=True)
        except (OSError, RuntimeError, ImportError) as e:
            raise UserError(f"CelebA is not under {data_dir} and could not be downloaded ({first_line(e)}); "
                            f"put its aligned images, 000001.jpg on, in {home}") from None
    first, last = {"train": (1, 162_770), "test": (162_771, 182_637)}[split]        # the official partition
    paths = [path for path in image_files(folder) if path.stem.isdigit() and first <= int(path.stem) <= last]
    return len(paths), (pixels(path, size, crop=140, name=path) for path in paths)


def lsun_reader(split, data_dir, size):
    folder = data_dir / f"church_outdoor_{ {'train': 'train', 'test': 'val'}[split] }_lmdb"
    try:
        import lmdb
    except ImportError:
        raise UserError("--dataset lsun-church needs the optional package lmdb: pip install lmdb") from None
    if not folder.is_dir():
        raise UserError(f"{folder} is not there: download church_outdoor from LSUN's site and unpack it in {data_dir}")
    database = lmdb.open(str(folder), readonly=True, lock=False)
    def images():
        with database.begin() as transaction:
            for key, value in transaction.cursor():
                yield pixels(io.BytesIO(value), size, stretch=True, name=f"{folder}, key {key!r}")
    return database.stat()["entries"], images()


def folder_reader(split, data_dir, size):
    if not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir} is not a folder; --dataset folder takes the images from it")
    if (data_dir / "train").is_dir() and (data_dir / "test").is_dir():
        paths = image_files(data_dir / split)
    else:
        paths = image_files(data_dir)
        paths = paths[9::10] if split == "test" else [p for i, p in enumerate(paths) if i % 10 != 9]
    return len(paths), (pixels(path, size, name=path) for path in paths)


READERS = {"shapes": shapes_reader, "cifar10": cifar10_reader, "celeba": celeba_reader, "lsun-church": lsun_reader,
           "folder": folder_reader}


@functools.lru_cache(2)
def shuffle(epoch: int, count: int, seed: int) -> Tensor:
    """The order of the images in an epoch: a function of its number, so that a resumed run sees the same."""
    return torch.randperm(count, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2 ** 63))


def batch_indices(step: int, batch_size: int, count: int, seed: int) -> Tensor:
    """Which images step `step` sees: (batch_size), a slice of the endless row of shuffled epochs."""
    epoch, start = divmod(step * batch_size, count)
    parts = []
    while batch_size > 0:
        parts.append(shuffle(epoch, count, seed)[start:start + batch_size])
        batch_size, epoch, start = batch_size - len(parts[-1]), epoch + 1, 0
    return torch.cat(parts)


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in [0, 1], channels last in memory."""
    return images.permute(0, 3, 1, 2).float() / 255


# ------------------------------------------------------------------------------------------------------------ networks

class Block(nn.Module):
    """x + res(x) / 36, res four ReLU-conv pairs through n_out / 4 channels; a 1x1 convolution on x if channels differ.

    1/36 is the authors' post gain, 1 / layers^2 with six blocks; the paper's text has plain residuals. It scales the
    last convolution's weights here, one pass over the activations less each way. The stream x stays fp32: in bf16 a
    36th of the branch would be lost in it.
    """

    def __init__(self, n_in: int, n_out: int, kernels: tuple):
        super().__init__()
        channels = (n_in, n_out // 4, n_out // 4, n_out // 4, n_out)
        self.id = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.res = nn.ModuleList(nn.Conv2d(i, o, k, padding=k // 2) for i, o, k in zip(channels, channels[1:], kernels))

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        h = half = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
        for conv in self.res[:-1]:
            h = conv(F.relu(h))
        last = self.res[-1]
        h = F.conv2d(F.relu(h), last.weight / 36, last.bias / 36, padding=last.padding)
        return (x if isinstance(self.id, nn.Identity) else self.id(half)).float() + h


class Encoder(nn.Module):
    """Images minus 1/2, (B, 3, H, W), to logits (B, K, H/4, W/4). Paper App. D, Table D.4."""

    def __init__(self, width: int = 128, codebook_size: int = 512, first_kernel: int = 3):
        super().__init__()
        n, k = width, (3, 3, 3, 1)
        self.body = nn.Sequential(
            nn.Conv2d(3, n, first_kernel, padding=first_kernel // 2),              # (B, n, H, W)
            Block(n, n, k), Block(n, n, k), nn.MaxPool2d(2),                       # (B, n, H/2, W/2)
            Block(n, 2 * n, k), Block(2 * n, 2 * n, k), nn.MaxPool2d(2),           # (B, 2n, N, N)
            Block(2 * n, 4 * n, k), Block(4 * n, 4 * n, k), nn.ReLU())             # (B, 4n, N, N)
        self.head = nn.Conv2d(4 * n, codebook_size, 1)                             # (B, K, N, N)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        with torch.autocast(h.device.type, enabled=False):                     # bf16 logits would tie, and starve codes
            return self.head(h.float())


class Decoder(nn.Sequential):
    """Quantised latents (B, D, N, N) to images minus 1/2, (B, 3, 4N, 4N); linear output."""

    def __init__(self, width: int = 128, code_dim: int = 16):
        n, k = width, (1, 3, 3, 3)
        super().__init__(
            Block(code_dim, 4 * n, k), Block(4 * n, 4 * n, k), nn.Upsample(scale_factor=2),  # (B, 4n, 2N, 2N)
            Block(4 * n, 2 * n, k), Block(2 * n, 2 * n, k), nn.Upsample(scale_factor=2),     # (B, 2n, 4N, 4N)
            Block(2 * n, n, k), Block(n, n, k),                                              # (B, n, 4N, 4N)
            nn.ReLU(), nn.Conv2d(n, 3, 1))                                                   # (B, 3, 4N, 4N)
        self.apply(init_weights)


def init_weights(module: nn.Module):
    """The authors' start: convolution weights N(0, 0.02), biases PyTorch's default; SQ-VAE's norms N(1, 0.02)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0, 0.02)
    if isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)


class Residual(nn.Module):
    """x + (ReLU, 3x3, ReLU, 1x1)(x), batch norm after each convolution or none; no ReLU in place: it would hit x."""

    def __init__(self, n: int, norm: bool):
        super().__init__()
        normed = (lambda: nn.BatchNorm2d(n)) if norm else nn.Identity
        self.res = nn.Sequential(nn.ReLU(), nn.Conv2d(n, n, 3, padding=1), normed(),
                                 nn.ReLU(), nn.Conv2d(n, n, 1), normed())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.res(x)


def vq_encoder(n: int, D: int) -> nn.Sequential:
    """VQ-VAE (van den Oord et al. 2017, A.1), n = 256: images minus 1/2 to z_e (B, D, H/4, W/4)."""
    return nn.Sequential(nn.Conv2d(3, n, 4, 2, 1), nn.ReLU(), nn.Conv2d(n, n, 4, 2, 1), nn.ReLU(),   # (B, n, N, N)
                         Residual(n, False), Residual(n, False), nn.Conv2d(n, D, 1))                 # (B, D, N, N)


def vq_decoder(n: int, D: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(D, n, 3, padding=1), Residual(n, False), Residual(n, False), nn.ReLU(),
                         nn.ConvTranspose2d(n, n, 4, 2, 1), nn.ReLU(),                               # (B, n, 2N, 2N)
                         nn.ConvTranspose2d(n, 3, 4, 2, 1))                                          # (B, 3, 4N, 4N)


def sq_encoder(n: int, D: int, size: int) -> nn.Sequential:
    """SQ-VAE (Takida et al. 2022), n = 64: images in [0, 1] to z_e (B, D, N, N); its 32 or its 64 pixel network."""
    small = size <= 32
    layers = [nn.Conv2d(3, n // 2, 4, 2, 1), nn.BatchNorm2d(n // 2), nn.ReLU(),                      # (B, n/2, 2N, 2N)
              nn.Conv2d(n // 2, n, 4, 2, 1), nn.BatchNorm2d(n), nn.ReLU(),                           # (B, n, N, N)
              nn.Conv2d(n, n, 3, padding=1), *([nn.BatchNorm2d(n), nn.ReLU()] if small else []),
              *(Residual(n, True) for _ in range(2 if small else 6)),
              nn.Conv2d(n, D, 1) if n != D else nn.Identity()]                                       # (B, D, N, N)
    return nn.Sequential(*layers).apply(init_weights)


def sq_decoder(n: int, D: int, size: int) -> nn.Sequential:
    layers = [nn.Conv2d(D, n, 1) if n != D else nn.Identity(),                                       # (B, n, N, N)
              *(Residual(n, True) for _ in range(2 if size <= 32 else 5)),
              nn.ConvTranspose2d(n, n, 3, padding=1), nn.BatchNorm2d(n), nn.ReLU(),
              nn.ConvTranspose2d(n, n // 2, 4, 2, 1), nn.BatchNorm2d(n // 2), nn.ReLU(),             # (B, n/2, 2N, 2N)
              nn.ConvTranspose2d(n // 2, 3, 4, 2, 1), nn.Sigmoid()]                                  # (B, 3, 4N, 4N)
    return nn.Sequential(*layers).apply(init_weights)


# ------------------------------------------------------------------------------------------------------- the quantisers
#
# Six answers to one question: which row of the codebook stands for z_e, how does the gradient get past the choice, and
# what keeps all rows in use?
#             choice in training              gradient                     against collapse
# EdVAE       sample of Cat(Dirichlet mean)   relaxed sample               evidence: pi stays wide; KL to Dir(1, ..., 1)
# dVAE        sample of softmax(logits)       relaxed sample               KL to the uniform
# VQ-VAE-EMA  nearest                         straight-through             none; codes follow the means of their cells
# GS-VQ-VAE   sample of softmax(-distance)    relaxed sample               KL to the uniform
# SQ-VAE      the same, learnt variance       relaxed sample               the variance starts large and anneals itself
# VQ-STE++    nearest                         straight-through, synced     shared affine map, own steps, replacement

class Latent(NamedTuple):
    """What a quantiser makes of z_e (B, N, N, C). In use, z_q = codes()[indices]."""
    z_q: Tensor          # (B, N, N, D)
    loss: Tensor         # scalar, weighted: what the quantiser adds to the reconstruction's loss
    indices: Tensor      # (B, N, N)  the codes in use: the most probable, or the nearest
    kl: Tensor           # (B, N, N)  nats, of the code posterior to its prior; nan where there is none
    entropy: Tensor      # (B, N, N)  nats, of pi; nan where there is none
    uncertainty: Tensor  # (B, N, N)  K / S; nan but for EdVAE


def many() -> bool:
    """Whether this process is one of several."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def total(x: Tensor) -> Tensor:
    """The sum of x over all processes, in place; x itself where there is but one."""
    if many():
        torch.distributed.all_reduce(x)
    return x


def from_first(x: Tensor) -> Tensor:
    """The first process's x on all processes."""
    if many():
        torch.distributed.broadcast(x, 0)
    return x


def distances(z: Tensor, codes: Tensor) -> Tensor:
    """|z - e_k|^2 in float32, whatever autocast says: (..., D), (K, D) to (..., K)."""
    with torch.autocast(z.device.type, enabled=False):
        z = z.float()
        return z.square().sum(-1, keepdim=True) - 2 * z @ codes.T + codes.square().sum(-1)


def cell_sums(z: Tensor, indices: Tensor, K: int) -> tuple:
    """How many vectors each code was given and their sum, over all processes: (K), (K, D)."""
    flat, index = z.detach().float().flatten(0, -2), indices.flatten()
    count = torch.zeros(K, device=z.device).index_add_(0, index, torch.ones_like(flat[:, 0]))
    return total(count), total(torch.zeros(K, flat.shape[1], device=z.device).index_add_(0, index, flat))


class Quantizer(nn.Module):
    def __init__(self, args: dict, learn_codebook: bool = True):
        super().__init__()
        K, D = args["codebook_size"], args["code_dim"]
        codebook = torch.randn(K, D) if args["codebook_init"] == "normal" else (2 * torch.rand(K, D) - 1) / K
        self.codebook = nn.Parameter(codebook, requires_grad=learn_codebook)       # M (K, D)
        self.args = args

    def codes(self) -> Tensor:
        return self.codebook

    def assign(self, z_e: Tensor) -> Tensor:
        """The codes in use, (B, N, N, C) to (B, N, N)."""
        return distances(z_e, self.codes()).argmin(-1)

    def probabilities(self, z_e: Tensor) -> Tensor:
        """pi (B, N, N, K); one-hot where the choice is deterministic."""
        return F.one_hot(self.assign(z_e), len(self.codebook)).float()

    def reconstruction_loss(self, x_hat: Tensor, x: Tensor) -> Tensor:
        return F.mse_loss(x_hat, x)

    def start(self, z_e: Tensor):
        """Called once, before the first step, with the first batch's z_e."""

    def diagnose(self, z_e: Tensor) -> dict:
        """Further numbers for a log's test lines, from one batch."""
        return {}


class EdVAE(Quantizer):
    """Baykal et al. 2024: the encoder's logits are evidence for a Dirichlet over code probabilities (Eq. 2 to 8)."""

    def forward(self, logits: Tensor, tau, beta, key) -> Latent:
        a = self.args
        q = kernels.evidential_quantize(logits, self.codebook, tau, a["max_logit"], key, a["backend"])
        kl = q.kl if a["kl"] == "exact" else kernels.textbook_kl(logits, a["max_logit"])
        return Latent(q.z_q, beta * kl.mean(), q.indices, kl, q.entropy, q.uncertainty)

    def assign(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        return F.softplus(logits.float().clamp(max=self.args["max_logit"])).softmax(-1)   # ln alpha to alpha / S

    def diagnose(self, logits: Tensor) -> dict:
        """The largest logit, the share of logits above the clamp, which get no gradient, and the error of the textbook
        KL's float32 gradient, |textbook - exact| / |exact| over the batch (nan where it overflows: logits over 88)."""
        c, grads = self.args["max_logit"], []
        for kl in (kernels.dirichlet_kl, kernels.textbook_kl):
            with torch.enable_grad():
                z = logits.detach().float().requires_grad_()
                grads.append(torch.autograd.grad(kl(z, c).mean(), z)[0])
        exact, textbook = grads
        return dict(logit_max=logits.max().item(), saturated=(logits > c).float().mean().item(),
                    textbook_grad_error=((textbook - exact).norm() / exact.norm()).item())


class DVAE(Quantizer):
    """Ramesh et al. 2021: pi = softmax(logits), a Gumbel-softmax sample of it, KL to the uniform."""

    def forward(self, logits: Tensor, tau, beta, key) -> Latent:
        q = kernels.gumbel_quantize(logits, self.codebook, tau, seed=key, backend=self.args["backend"])
        return Latent(q.z_q, beta * q.kl.mean(), q.indices, q.kl, q.entropy, q.uncertainty)

    def assign(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.float().softmax(-1)


class VQVAE(Quantizer):
    """van den Oord et al. 2017, A.1: the nearest code; the codebook is the moving average of what it was given."""

    def __init__(self, args: dict):
        super().__init__(args, learn_codebook=False)
        # Cells start with one member, their code: at zero, the first update would blow up every code not hit in it.
        self.register_buffer("count", torch.ones(len(self.codebook)))              # N (K)
        self.register_buffer("sum", self.codebook.detach().clone())                # M (K, D)

    # Compiled, the backward would read z_q anew, from the codes already moved: pytorch/pytorch#197039.
    @torch.compiler.disable
    def forward(self, z_e: Tensor, tau, beta, key) -> Latent:
        indices = self.assign(z_e)
        z_q = self.codebook[indices]
        loss = beta * F.mse_loss(z_e.float(), z_q)                                 # commitment
        if self.training:
            self.update(*cell_sums(z_e, indices, len(self.codebook)))
        nan = torch.full_like(z_q[..., 0], math.nan)
        return Latent(z_e + (z_q - z_e).detach(), loss, indices, nan, nan, nan)    # straight-through

    @torch.no_grad()
    def update(self, count: Tensor, sums: Tensor, eps: float = 1e-5):
        self.count.lerp_(count, 1 - self.args["ema_decay"])                        # N <- g N + (1 - g) n
        self.sum.lerp_(sums, 1 - self.args["ema_decay"])                           # M <- g M + (1 - g) s
        n = self.count.sum()
        smooth = (self.count + eps) / (n + len(self.count) * eps) * n              # Laplace smoothing, not kept
        self.codebook.copy_(self.sum / smooth[:, None])


class GSVQVAE(Quantizer):
    """Sonderby et al. 2017: a Gumbel-softmax sample of pi = softmax(-|z_e - e_k|^2), KL to the uniform."""

    def forward(self, z_e: Tensor, tau, beta, key) -> Latent:
        logits = -distances(z_e, self.codebook)                                    # (B, N, N, K)
        q = kernels.gumbel_quantize(logits, self.codebook, tau, seed=key, backend=self.args["backend"])
        return Latent(q.z_q, beta * q.kl.mean(), q.indices, q.kl, q.entropy, q.uncertainty)

    def probabilities(self, z_e: Tensor) -> Tensor:
        return (-distances(z_e, self.codebook)).softmax(-1)


class SQVAE(Quantizer):
    """Takida et al. 2022, Gaussian: pi = softmax(-sum_c (z_e - e_k)^2 / (2 sigma^2)), sigma^2 learnt. Nats an image.

    sigma^2 = v + s with s = exp(rho) and v = 1 (variant I, "constant"), or exp of the mean of a second head's output
    over the image (II), the position (III), or over nothing (IV, "element"); z_e is then both, (B, N, N, 2D).
    """

    def __init__(self, args: dict):
        super().__init__(args)
        self.rho = nn.Parameter(torch.tensor(math.log(20 * args["code_dim"] / 64)))   # the original's log 20 at D = 64

    def split(self, z_e: Tensor) -> tuple:
        """z (B, N, N, D) and the precision 1/sigma^2, same shape."""
        kind, D = self.args["variance"], self.args["code_dim"]
        z, v = z_e[..., :D].float(), torch.ones((), device=z_e.device)
        if kind != "constant":
            over = {"image": (1, 2, 3), "position": (3,), "element": ()}[kind]
            log_v = z_e[..., D:].float()
            v = (log_v.mean(over, keepdim=True) if over else log_v).exp()
        return z, (1 / (v + self.rho.exp()).clamp(min=1e-10)).expand_as(z)

    def logits(self, z: Tensor, w: Tensor) -> Tensor:
        """-sum_c w_c (z_c - e_kc)^2 / 2: (B, N, N, K)."""
        with torch.autocast(z.device.type, enabled=False):
            M = self.codebook
            return -0.5 * ((w * z * z).sum(-1, keepdim=True) - 2 * (w * z) @ M.T + w @ M.square().T)

    def forward(self, z_e: Tensor, tau, beta, key) -> Latent:
        z, w = self.split(z_e)
        q = kernels.gumbel_quantize(self.logits(z, w), self.codebook, tau, seed=key, backend=self.args["backend"])
        images = len(z_e)
        discrete = (q.kl - math.log(len(self.codebook))).sum() / images            # -H, summed over positions
        continuous = (0.5 * w * (z - q.z_q).square()).sum() / images
        return Latent(q.z_q, beta * (discrete + continuous), q.indices, q.kl, q.entropy, q.uncertainty)

    def assign(self, z_e: Tensor) -> Tensor:
        return self.logits(*self.split(z_e)).argmax(-1)

    def probabilities(self, z_e: Tensor) -> Tensor:
        return self.logits(*self.split(z_e)).softmax(-1)

    def reconstruction_loss(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """(d_x / 2) ln of the mean squared error summed over an image: the decoder's variance at its optimum."""
        return x[0].numel() / 2 * torch.log((x_hat - x).square().sum() / len(x))


class VQSTE(Quantizer):
    """Huh et al. 2023: nearest code of the affine codebook c_k = (1 + l a) e_k + l t, so that unused codes move too.

    loss beta [(1 - b) commitment + b codebook], b = 0.9. alternate: no codebook term; e takes its own momentum step
    towards its cells first, and z_q is read again from the moved codebook. The authors' code then drops the commitment
    too (b = 1). Run so on CIFAR-10 (width 64), z_e grew to a standard deviation of 120 in 3,000 steps and test
    perplexity fell to 44: here the commitment stays. sync: the share of dL/dz_q that reaches the codebook.
    replace_after: a code not chosen for that many training steps lands on a vector of the current batch (0: never).
    """

    def __init__(self, args: dict):
        super().__init__(args, learn_codebook=not args["alternate"])
        K, D = self.codebook.shape
        self.scale, self.shift = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))   # a, t: one group
        self.register_buffer("velocity", torch.zeros(K, D))
        self.register_buffer("patience", torch.full((K,), args["replace_after"]))

    def codes(self) -> Tensor:
        l = self.args["affine_lr"]
        return (1 + l * self.scale) * self.codebook + l * self.shift

    @torch.compiler.disable                                                        # as VQVAE's
    def forward(self, z_e: Tensor, tau, beta, key) -> Latent:
        indices = self.assign(z_e)
        if self.training:
            self.update(z_e, *cell_sums(z_e, indices, len(self.codebook)))
        z_q = self.codes()[indices]                                                # of the codebook as it is now
        loss = beta * 0.1 * F.mse_loss(z_e.float(), z_q.detach())                  # commitment
        if not self.args["alternate"]:
            loss = loss + beta * 0.9 * F.mse_loss(z_q, z_e.detach().float())       # codebook
        nan = torch.full_like(z_q[..., 0], math.nan)
        out = z_e + (z_q - z_e).detach() + self.args["sync"] * (z_q - z_q.detach())   # straight-through, synchronised
        return Latent(out, loss, indices, nan, nan, nan)

    @torch.no_grad()
    def update(self, z_e: Tensor, count: Tensor, sums: Tensor):
        D, T = self.codebook.shape[1], self.args["replace_after"]
        if T:                                                                    # codes unused for T steps are replaced
            self.patience.copy_(torch.where(count > 0, T, self.patience - 1))
            z = z_e.float().flatten(0, -2)
            picked = z[torch.randint(len(z), (len(count),), device=z.device)]
            picked = picked + 0.01 * picked.norm(dim=1, keepdim=True) * torch.randn_like(picked)
            self.place(self.patience == 0, from_first(picked))
            self.patience.masked_fill_(self.patience == 0, T)
        if self.args["alternate"]:
            # A step of SGD, momentum 0.9, on mean (c - sg z_e)^2, for e alone. 50 is the authors' rate at D = 64; the
            # mean over D channels makes this loss steeper at a smaller D, so the rate shrinks with it.
            gradient = 2 * (count[:, None] * self.codes() - sums) / (count.sum() * D)
            self.velocity.mul_(0.9).add_(gradient * (1 + self.args["affine_lr"] * self.scale))
            self.codebook.sub_(50 * D / 64 * self.velocity)

    @torch.no_grad()
    def place(self, which: Tensor, vectors: Tensor):
        """Put c_k on vectors_k where which_k, by way of e: the affine map is inverted."""
        l, which = self.args["affine_lr"], which[:, None]
        self.codebook.copy_(torch.where(which, (vectors - l * self.shift) / (1 + l * self.scale), self.codebook))
        self.velocity.masked_fill_(which, 0)

    @torch.no_grad()
    def start(self, z_e: Tensor):
        """k-means of the first batch: k-means++ seeds, ten rounds."""
        z, K = z_e.float().flatten(0, -2), len(self.codebook)
        centres = z[torch.randint(len(z), (1,), device=z.device)]
        nearest = distances(z, centres)[:, 0]
        for _ in range(K - 1):                                                    # the next seed: far ones are likelier
            chosen = torch.multinomial(nearest.clamp(min=0) + 1e-12, 1)
            centres = torch.cat([centres, z[chosen]])
            nearest = torch.minimum(nearest, distances(z, z[chosen])[:, 0])
        centres = from_first(centres)
        for _ in range(10):
            count, sums = cell_sums(z, distances(z, centres).argmin(1), K)
            centres = torch.where(count[:, None] > 0, sums / count.clamp(min=1)[:, None], centres)
        self.place(torch.ones(K, dtype=torch.bool, device=z.device), centres)


QUANTIZERS = {"edvae": EdVAE, "dvae": DVAE, "vqvae-ema": VQVAE, "gs-vqvae": GSVQVAE, "sq-vae": SQVAE, "vq-ste++": VQSTE}


class Stats(NamedTuple):
    """What a pass tells besides its loss: mean squared error (scalar), then one number a position as in Latent."""
    mse: Tensor
    kl: Tensor           # (B, N, N)
    indices: Tensor      # (B, N, N)
    entropy: Tensor      # (B, N, N)
    uncertainty: Tensor  # (B, N, N)
    z_e_range: Tensor    # (2)  the least and the largest element


class VAE(nn.Module):
    """Encoder, quantiser and decoder; images go in and come out as (B, 3, H, W) in [0, 1]."""

    def __init__(self, args: dict):
        super().__init__()
        self.args = args
        n, K, D, size = (args[name] for name in ("width", "codebook_size", "code_dim", "size"))
        if args["model"] in ("edvae", "dvae"):
            self.encoder, self.decoder = Encoder(n, K, args["first_kernel"]), Decoder(n, D)
        elif args["model"] in ("vqvae-ema", "gs-vqvae"):
            self.encoder, self.decoder = vq_encoder(n, D), vq_decoder(n, D)
        else:
            two_heads = args["model"] == "sq-vae" and args["variance"] != "constant"
            self.encoder, self.decoder = sq_encoder(n, D * (1 + two_heads), size), sq_decoder(n, D, size)
        self.offset = 0.0 if isinstance(self.decoder[-1], nn.Sigmoid) else 0.5     # linear outputs are of x - 1/2
        self.quantizer = QUANTIZERS[args["model"]](args)
        self.to(memory_format=torch.channels_last)

    def z_e(self, x: Tensor) -> Tensor:
        return self.encoder(x - self.offset).permute(0, 2, 3, 1)                   # (B, N, N, C), no copy

    def x_hat(self, z_q: Tensor) -> Tensor:
        return self.decoder(z_q.permute(0, 3, 1, 2)).float() + self.offset         # (B, 3, H, W)

    def forward(self, x: Tensor, tau, beta, key, hard: bool = False):
        """The loss (Eq. 8 for EdVAE) and Stats; hard: the codes in use in place of a relaxed sample, as in tests."""
        z_e = self.z_e(x)
        q = self.quantizer(z_e, tau, beta, key)
        x_hat = self.x_hat(self.quantizer.codes()[q.indices] if hard else q.z_q)
        loss = self.quantizer.reconstruction_loss(x_hat, x) + q.loss
        z_e_range = torch.stack(torch.aminmax(z_e.detach())).float()
        return loss, Stats(F.mse_loss(x_hat.detach(), x), q.kl.detach(), q.indices, q.entropy, q.uncertainty, z_e_range)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to the codes in use (B, N, N), int64: the most probable, or the nearest."""
        return self.quantizer.assign(self.z_e(x))

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Codes (B, N, N) to images (B, 3, H, W) in [0, 1]."""
        return self.x_hat(self.quantizer.codes()[indices]).clamp(0, 1)


# ----------------------------------------------------------------------------------------------------------- schedules

def quarter_cosine(start: float, end: float, fraction: float) -> float:
    """start at fraction 0, end from 1 on, 29% of the way at 1/2: the "cosine annealing" behind the paper's numbers."""
    return start + (end - start) * (1 - math.cos(math.pi / 2 * min(1.0, fraction)))


def schedules(step: int, args) -> tuple:
    """lr, beta and tau at a step, 0 the first: at 150,000 steps the paper's (App. D), at fewer the same compressed."""
    done = step / args.lr_anneal
    half_cosine = (1 + math.cos(math.pi * min(1.0, done))) / 2
    lr = {"quarter-cosine": quarter_cosine(args.lr, args.lr * 1.25e-3, done),      # 1e-3 to 1.25e-6 over 50,000 steps
          "constant": args.lr, "cosine": args.lr * half_cosine,
          "warm-up-cosine": args.lr * min(9 * done, half_cosine)}[args.lr_schedule]
    ramped = args.model in ("edvae", "dvae", "gs-vqvae")
    beta = quarter_cosine(0.0, args.beta, step / args.beta_ramp) if ramped else args.beta   # 0 to beta over 5,000 steps
    tau = args.tau_start * math.exp(-args.tau_rate * step)                         # exp(-1e-5 t)
    return lr, beta, tau


# ------------------------------------------------------------------------------------------------- measures and records

class Meter:
    """Sums of what passes tell, kept on the device; read() synchronises once and gives the line's numbers."""

    def __init__(self, K: int, device):
        self.counts = torch.zeros(K, dtype=torch.int64, device=device)             # how often each code was chosen
        self.sums = torch.zeros(7, dtype=torch.float64, device=device)
        self.bad = torch.full((7,), -1.0, dtype=torch.float64, device=device)  # of the first step that was not finite

    def watch(self, step: int, loss: Tensor, s: Stats, norm: Tensor):
        """Note the first step whose loss or gradient's norm is not finite: step, loss, mse, kl, norm, range of z_e."""
        at = torch.full_like(loss, step)
        now = torch.cat([torch.stack([at, loss.detach(), s.mse, s.kl.mean(), norm]), s.z_e_range]).double()
        self.bad = torch.where((self.bad[0] < 0) & ~(loss.detach() + norm).isfinite(), now, self.bad)

    def stop_if_bad(self, folder: Path, images: Tensor, args):
        """End the run where watch noted a step, leaving its batch in postmortem.pt; synchronises."""
        step, *values = self.bad.tolist()
        if step < 0:
            return
        told = dict(zip(("loss", "mse", "kl", "gradient norm", "least z_e", "largest z_e"), values))
        index = batch_indices(int(step), args.batch_size, len(images), args.seed)
        leave_postmortem(folder, int(step), dict(index=index, images=images[index.to(images.device)].cpu()), told)

    def add(self, loss: Tensor, s: Stats):
        index, images = s.indices.flatten(), len(s.indices)
        self.counts.scatter_add_(0, index, torch.ones_like(index))
        h = s.entropy.double()
        self.sums += torch.stack([images * loss.detach().double(), images * s.mse.double(), s.kl.double().sum(),
                                  h.sum(), h.square().sum(), s.uncertainty.double().sum(),
                                  torch.full_like(h[0, 0, 0], images)])

    def read(self) -> dict:
        total(self.counts), total(self.sums)
        positions = int(self.counts.sum())
        loss, mse, kl, h, hh, u, images = self.sums.tolist()
        numbers = dict(loss=loss / images, mse=mse / images, kl=kl / positions, perplexity=perplexity(self.counts),
                       codes_used=int((self.counts > 0).sum()), entropy_mean=h / positions,
                       entropy_std=max(0.0, hh / positions - (h / positions) ** 2) ** 0.5, uncertainty=u / positions)
        self.counts.zero_(), self.sums.zero_()
        return {k: v if math.isfinite(v) else None for k, v in numbers.items()}


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of the codes' frequencies, from their counts (K): 1 for one code, K for even use."""
    p = counts.double() / counts.sum()
    return math.exp(-torch.special.xlogy(p, p).sum().item())


@torch.no_grad()
def evaluate(model: VAE, images: Tensor, args, beta: float) -> dict:
    """One pass over a split with the codes in use: the numbers of a log line, perplexity pooled over the split, the
    entropy of pi at each position of its first image, entropy_map (N, N), and what the quantiser diagnoses in the first
    batch. Each process takes its share of images."""
    meter, tau, entropy_map = Meter(args.codebook_size, images.device), torch.ones((), device=images.device), None
    model.eval()
    for i in range(128 * RANK, len(images), 128 * WORLD):
        with autocast(args):
            loss, stats = model(to_float(images[i:i + 128]), tau, beta, 0, hard=True)
        meter.add(loss, stats)
        entropy_map = stats.entropy[0].tolist() if entropy_map is None else entropy_map
    with autocast(args):
        diagnosis = model.quantizer.diagnose(model.z_e(to_float(images[:128])))
    model.train()
    defined = entropy_map and math.isfinite(entropy_map[0][0])
    return meter.read() | {k: v if math.isfinite(v) else None for k, v in diagnosis.items()} | dict(
        entropy_map=[[round(h, 3) for h in row] for row in entropy_map] if defined else None)


def autocast(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bf16")


@torch.no_grad()
def save_recon(model: VAE, images: Tensor, path: Path, columns: int = 12, rows: int = 2):
    """A picture of inputs, each row above the row of their reconstructions from the codes in use; whole rows alone."""
    columns = min(columns, len(images))
    x = to_float(images[:min(rows, len(images) // columns) * columns])
    model.eval()
    pairs = torch.stack([x.unflatten(0, (-1, columns)) for x in (x, model.decode(model.encode(x)))], 1)
    model.train()
    save_grid(pairs.flatten(0, 2), path, pairs.shape[2])


def save_grid(images: Tensor, path: Path, columns: int):
    """Images (B, 3, H, W) in [0, 1] as one PNG, small ones enlarged to about 96 screen pixels."""
    scale = max(1, 96 // images.shape[-1])
    grid = torchvision.utils.make_grid(images.cpu(), nrow=columns, padding=1, pad_value=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torchvision.utils.save_image(grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2), path)
    except (OSError, ValueError) as e:
        raise UserError(f"cannot write {path}: {e}") from None


def check_out(args):
    """UserError where --out or --resume cannot be meant; called before any work."""
    if args.resume and not args.out:
        raise UserError("--resume needs --out, the folder of the run to go on with")
    if args.out and args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file; name a folder")
    if args.out and not args.resume and any((args.out / name).exists() for name in ("args.json", "ckpt.pt")):
        raise UserError(f"{args.out} already holds a run; go on with it by --resume, or choose another --out")


HELD = []  # descriptors of the folders that this process trains into


def hold(folder: Path) -> Path:
    """Lock a run's folder against other processes; UserError if one has it. The lock goes with the process, killed or
    not, or by release()."""
    if os.name == "posix":
        import fcntl
        HELD.append(os.open(folder, os.O_RDONLY))
        try:
            fcntl.flock(HELD[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is training into it now; wait for it, or choose another "
                            f"--out") from None
    return folder


def release():
    while HELD:
        os.close(HELD.pop())


def fresh_folder(args, name: str) -> Path:
    """The run's folder, made and held: --out, or the first free runs/<name>-<number>; the first process's is used."""
    if args.out or RANK:
        try:
            if not RANK:
                args.out.mkdir(parents=True, exist_ok=True)
                hold(args.out)
            return args.out or Path("runs")
        except OSError as e:
            raise UserError(f"cannot make the folder {args.out}: {e.strerror}") from None
    for i in range(1, 100_000):
        folder = Path("runs") / f"{name}-{i}"
        try:
            folder.mkdir(parents=True)
            return hold(folder)
        except FileExistsError:
            pass


def write_args(args, folder: Path):
    """args.json: every setting, the versions, the device and the commit behind a run."""
    if RANK:
        return
    try:
        commit = subprocess.run(["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"],
                                capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    cuda = torch.device(args.device).type == "cuda"
    environment = dict(commit=commit or None, command=" ".join(sys.argv), python=platform.python_version(),
                       torch=torch.__version__, torchvision=torchvision.__version__, numpy=np.__version__,
                       triton=kernels.triton.__version__ if kernels.triton else None,
                       hardware=torch.cuda.get_device_name(args.device) if cuda else
                       f"{platform.machine()} CPU, {torch.get_num_threads()} threads")
    write_json(folder / "args.json", plain(args) | dict(environment=environment))


def leave_postmortem(folder: Path, step: int, batch: dict, told: dict):
    """Exit with code 1 and one line on what was not finite; the batch stays in postmortem.pt (weights_only=True)."""
    RANK or save_whole(folder / "postmortem.pt", dict(step=step, **batch, **told))
    sys.exit(1 if RANK else f"{Path(sys.argv[0]).name}: not finite at step {step}: "
             + ", ".join(f"{k} {v:.4g}" for k, v in told.items())
             + f"; {folder}/ckpt.pt is from before it, if it was saved, and postmortem.pt holds the batch")


def write_json(path: Path, content: dict):
    with whole(path) as f:
        f.write((json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e})") from None


def plain(args) -> dict:
    """The settings as plain types, for JSON and for a checkpoint that loads with weights_only=True."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


def read_lines(path: Path) -> list:
    """The objects of a log.jsonl; a last line that a killed process left unfinished is passed over."""
    try:
        lines = path.read_text().splitlines()
        parsed = [json.loads(line) for line in lines[:-1]]
        with contextlib.suppress(ValueError):
            parsed += [json.loads(line) for line in lines[-1:]]
        if not all(isinstance(line, dict) and type(line.get("step")) is int for line in parsed):
            raise ValueError("a line without a step")
        return parsed
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e})") from None


class Log:
    """log.jsonl and the lines on the screen. Lines from after a resumed checkpoint go: no step stands twice."""

    def __init__(self, folder: Path, start: int):
        if RANK:
            return
        self.path = folder / "log.jsonl"
        lines = read_lines(self.path) if start and self.path.exists() else []
        with whole(self.path) as f:
            f.write("".join(json.dumps(line) + "\n" for line in lines if line["step"] <= start).encode())

    def write(self, step: int, numbers: dict, text: str):
        if RANK:
            return
        with open(self.path, "a") as f:
            f.write(json.dumps(dict(step=step, **numbers)) + "\n")
        print(f"step {step:>6}  {text}", flush=True)


class Interrupts(list):
    """Within it, SIGINT and SIGTERM only note their number here, so that the loop can finish its step and save."""

    def __enter__(self):
        self.before = {s: signal.signal(s, lambda number, frame: self.append(number))
                       for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def agreed(self, asking: bool) -> bool:
        """Whether to stop now: several processes ask each other, at log lines alone, since that makes them wait."""
        if not many():
            return bool(self)
        if asking and total(torch.tensor(len(self))).item():
            self.append(self[0] if self else signal.SIGTERM)
            return True
        return False

    def leave(self, command: str, step: int):
        RANK or print(f"stopped at step {step}; go on with: {command}")
        sys.exit(128 + self[0])


@contextlib.contextmanager
def whole(path: Path):
    """A file to write that comes to stand at path whole, or not at all: written beside it, flushed, renamed."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as e:                                           # torch.save's are RuntimeErrors
        before = "; the one from before is whole" if path.exists() else ""
        raise UserError(f"cannot write {path} ({first_line(e)}){before}") from None
    finally:
        if part.is_file():
            part.unlink()


def save_whole(path: Path, state: dict):
    buffer = io.BytesIO()                                                # a full disk in mid-archive would end in C++
    torch.save(state, buffer)
    with whole(path) as f:
        f.write(buffer.getbuffer())


def save_checkpoint(folder: Path, state: dict):
    save_whole(folder / "ckpt.pt", state)


def load_checkpoint(path, device="cpu") -> dict:
    """A run folder's ckpt.pt, or the file itself, as the dict that save_checkpoint wrote; UserError if it isn't one."""
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path} is not there: name the folder of a run that has saved a checkpoint")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        if not {"model", "step", "args"} <= state.keys():
            raise KeyError("not this project's checkpoint")
        return state
    except Exception as e:
        what = f"{type(e).__name__}: {first_line(e)}"
        raise UserError(f"{path} is damaged or not a checkpoint ({what})") from None


def start_processes(device: torch.device):
    """Join the other processes of a torchrun; nothing where there is but one."""
    if WORLD > 1 and not many():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def spread(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as DistributedDataParallel where there are several processes; it holds the same parameters."""
    if not many():
        return model
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    devices = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, devices)


def load_vae(path, device="cpu") -> VAE:
    """A trained model from a run folder (or its ckpt.pt), in eval mode, fp32: .encode(x), .decode(indices)."""
    state = load_checkpoint(path, device)
    with fits(path):
        model = VAE(state["args"]).to(device)
        model.load_state_dict(state["model"])
    return model.eval()


@contextlib.contextmanager
def fits(path):
    """UserError where a checkpoint does not hold what its reader asks of it: tampered with, or from another version."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as e:
        what = f"{type(e).__name__}: {first_line(e)}"
        raise UserError(f"{path}: its checkpoint does not hold what it should ({what})") from None


# ------------------------------------------------------------------------------------------------------------ the loop

def prepare(args, device: torch.device) -> tuple:
    """A new model, its optimiser, and the model as a step calls it: compiled, or spread over processes, or itself."""
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True                                          # a step's shapes never change
    kernels.COMPILE = args.compile
    model = VAE(plain(args)).to(device)
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learnt, lr=args.lr, fused=True) if args.optimizer == "adam" else torch.optim.AdamW(
        learnt, lr=args.lr, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    step_model = spread(model, device)                                             # gradients: averaged over processes
    return model, optimizer, torch.compile(step_model) if args.compile and device.type == "cuda" else step_model


def scalars(args, device: torch.device) -> tuple:
    """What changes from step to step and lives on the device: tau, beta, and the noise's (seed, step, first row)."""
    return torch.ones((), device=device), torch.zeros((), device=device), torch.tensor([args.seed, 0, 0], device=device)


def train_step(step: int, step_model, optimizer, images: Tensor, meter: Meter, moving: tuple, args) -> tuple:
    """One step on batch number `step` of images (uint8, on the device): lr, beta, tau. The host waits for nothing.

    Each process takes its share of the batch, in --grad-accum parts whose gradients add up.
    """
    lr, beta, tau = schedules(step, args)
    tau_t, beta_t, key = moving
    optimizer.param_groups[0]["lr"] = lr
    tau_t.fill_(tau), beta_t.fill_(beta), key[1].fill_(step)
    index = batch_indices(step, args.batch_size, len(images), args.seed).to(images.device, non_blocking=True)
    optimizer.zero_grad(set_to_none=True)
    share = args.batch_size // WORLD
    part = share // args.grad_accum
    for first in range(RANK * share, (RANK + 1) * share, part):
        key[2].fill_(first * (args.size // 4) ** 2)                                # the part's first row in the batch
        with record_function("data"):
            x = to_float(images[index[first:first + part]])                        # (B, 3, H, W)
        alone = many() and first + part < (RANK + 1) * share                       # the last part's backward averages
        with step_model.no_sync() if alone else contextlib.nullcontext():
            with autocast(args):
                loss, stats = step_model(x, tau_t, beta_t, key)                    # Eq. 8
            with record_function("backward"):
                (loss / args.grad_accum).backward()
        meter.add(loss, stats)
    norm = nn.utils.get_total_norm([p.grad for p in step_model.parameters() if p.grad is not None])
    optimizer.step()
    meter.watch(step, loss, stats, norm)
    return lr, beta, tau


def train(args, ckpt=None) -> Path:
    """Train one model as args say, from ckpt's step if there is one; returns the run's folder."""
    # 1. data: the whole set lives on the device as uint8
    device = torch.device(args.device)
    start_processes(device)
    data = {split: load_images(args.dataset, split, args.data_dir, args.size) for split in ("train", "test")}
    train_images, test_images = (torch.from_numpy(np.array(data[split])).to(device) for split in ("train", "test"))

    # 2. model and optimiser
    model, optimizer, step_model = prepare(args, device)
    start = 0
    if ckpt:
        with fits(args.out):
            model.load_state_dict(ckpt["model"])
            optimizer.load_state_dict(ckpt["optimizer"])
            torch.set_rng_state(ckpt["generator"].cpu())
            start = ckpt["step"]
    else:
        first = batch_indices(0, args.batch_size, len(train_images), args.seed).to(device)
        with torch.no_grad(), autocast(args):
            model.quantizer.start(model.z_e(to_float(train_images[first])))

    # 3. the run's folder; a log never holds a step twice
    folder = fresh_folder(args, f"{args.dataset}-{args.model}")
    write_args(args, folder)
    log = Log(folder, start)
    if not RANK:
        print(f"{folder}: {args.model} on {args.dataset}, {len(train_images):,} images of {args.size} x {args.size}, "
              f"{sum(p.numel() for p in model.parameters()):,} parameters, {device}, {args.precision}, steps {start} "
              f"to {args.steps}", flush=True)

    def record(step, numbers, text):
        told = (f"{k} {numbers[k]:.4g}" for k in ("mse", "kl", "perplexity", "entropy_mean") if numbers[k] is not None)
        log.write(step, numbers, "  ".join(told) + text)

    # 4. steps
    meter, clock, timed, spent = Meter(args.codebook_size, device), time.perf_counter(), 0, 0.0
    moving = scalars(args, device)
    with Interrupts() as stop:
        for step in range(start, args.steps):
            lr, beta, tau = train_step(step, step_model, optimizer, train_images, meter, moving, args)

            # 5. records: log line, test split, picture, checkpoint; only here does the host wait for the device
            done, timed = step + 1, timed + 1
            last = done == args.steps or stop.agreed(done % args.log_every == 0)
            if last or done % args.log_every == 0 or done % args.save_every == 0:
                meter.stop_if_bad(folder, train_images, args)
            if done % args.log_every == 0 or last:
                numbers = meter.read()
                spent += time.perf_counter() - clock
                rate = timed * args.batch_size / spent
                record(done, numbers | dict(beta=beta, tau=tau, lr=lr, images_per_second=rate),
                       f"  {rate:,.0f} images/s  {(args.steps - done) * args.batch_size / rate / 60:.1f} min left")
                clock, timed, spent = time.perf_counter(), 0, 0.0
            if done % args.eval_every == 0 or last:
                spent += time.perf_counter() - clock
                tested = evaluate(model, test_images, args, beta)
                record(done, tested | dict(split="test", beta=beta, tau=tau, lr=lr), "  (test)")
                RANK or save_recon(model, test_images, folder / "recon.png")
                clock = time.perf_counter()
            if (done % args.save_every == 0 or last) and not RANK:
                save_checkpoint(folder, dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=done,
                                             args=plain(args), generator=torch.get_rng_state()))
            if last:
                break
    if stop:
        stop.leave(f"python train_vae.py --out {folder} --resume", done)
    if start < args.steps and not RANK:
        print(f"\n{args.model} on {args.dataset}: test MSE {tested['mse']:.3e} (codes in use, [0, 1] scale), "
              f"perplexity {tested['perplexity']:.1f} of {args.codebook_size}, {tested['codes_used']} codes used\n"
              f"{folder}/: recon.png (inputs above reconstructions), log.jsonl, ckpt.pt, args.json")
    return folder


# ----------------------------------------------------------------------------------------------- where the time goes

def finish(device: torch.device):
    """Wait until a GPU has done what it was told; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile(args, warm_up: int = 10, steps: int = 20):
    """--profile: milliseconds a step of each part, by torch.profiler; no run is written. The model is not compiled as a
    whole, since its parts could not be told apart then."""
    device = torch.device(args.device)
    images = torch.from_numpy(np.array(load_images(args.dataset, "train", args.data_dir, args.size))).to(device)
    compiled, args.compile = args.compile, args.compile and device.type == "cpu"
    model, optimizer, step_model = prepare(args, device)
    open_parts = []
    for name, module in (("encoder", model.encoder), ("bottleneck", model.quantizer), ("decoder", model.decoder)):
        module.register_forward_pre_hook(lambda *_, name=name: open_parts.append(record_function(name).__enter__()))
        module.register_forward_hook(lambda *_: open_parts.pop().__exit__(None, None, None))
    meter, moving = Meter(args.codebook_size, device), scalars(args, device)
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
    for step in range(warm_up):
        train_step(step, step_model, optimizer, images, meter, moving, args)
    finish(device)
    with torch.profiler.profile(activities=kinds) as told:
        clock = time.perf_counter()
        for step in range(warm_up, warm_up + steps):
            train_step(step, step_model, optimizer, images, meter, moving, args)
        finish(device)
        whole_ms = 1e3 * (time.perf_counter() - clock) / steps
    events = told.key_averages()
    ms = {}
    for e in events:                                                               # total: what an event spans
        spent = e.device_time_total if device.type == "cuda" else e.cpu_time_total
        ms[e.key] = max(ms.get(e.key, 0.0), spent / 1e3 / steps)
    optimiser = sum(v for k, v in ms.items() if k.startswith("Optimizer.step"))
    inside = ms.get("edvae::quantize_backward", 0.0)
    parts = {"data": ms["data"], "encoder": ms["encoder"], "bottleneck": ms["bottleneck"], "decoder": ms["decoder"],
             "backward of the bottleneck": inside, "backward of the rest": ms["backward"] - inside,
             "optimiser": optimiser}
    parts["all else"] = whole_ms - sum(parts.values())
    print(f"{args.model}, width {args.width}, K = {args.codebook_size}, batch {args.batch_size}, {args.precision}, "
          f"{device}: {whole_ms:.1f} ms a step under the profiler, {1e3 * args.batch_size / whole_ms:,.0f} images/s"
          + ("; uncompiled" if compiled and not args.compile else "") + "\n")
    for name, value in parts.items():
        print(f"{name:28}{value:>10.2f} ms{100 * value / whole_ms:>7.1f}%")
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print("\n" + events.table(sort_by=order, row_limit=10, max_name_column_width=60))


class Textbook(EdVAE):
    """What --bench compares with: the bottleneck by torch.distributions and autograd."""

    def forward(self, logits: Tensor, tau, beta, key) -> Latent:
        z_q, kl = kernels.textbook_quantize(logits.float(), self.codebook, tau)
        nan = torch.full_like(kl, math.nan)
        return Latent(z_q, beta * kl.mean(), logits.argmax(-1), kl, nan, nan)


def bench_worker(pipe, argv: list, textbook: bool, tuned: bool):
    """A process that trains one contender of --bench: for each number received, that many steps, and the seconds."""
    if tuned:
        tune_cpu()
    args = settings(argv)[0]
    device = torch.device(args.device)
    model, optimizer, step_model = prepare(args, device)
    if textbook:                                                                   # as most would write it first
        model.quantizer = Textbook(plain(args)).to(device)
        model.to(memory_format=torch.contiguous_format)
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    images = torch.from_numpy(draw_shapes(512, args.size, np.random.default_rng(0))).to(device)
    meter, moving, done = Meter(args.codebook_size, device), scalars(args, device), 0
    pipe.send("ready")
    while steps := pipe.recv():
        finish(device)
        clock = time.perf_counter()
        for _ in range(steps):
            train_step(done, step_model, optimizer, images, meter, moving, args)
            done += 1
        finish(device)
        pipe.send(time.perf_counter() - clock)
    if device.type == "cuda":
        pipe.send(torch.cuda.max_memory_allocated() / 2 ** 20)
    else:
        import resource
        pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)       # the whole process, PyTorch too


def compete(contenders: dict, steps: int, rounds: int) -> dict:
    """Seconds a step and peak MiB of each contender, (argv, textbook, tuned): each in its own process, in turn."""
    import multiprocessing
    context, workers, seconds = multiprocessing.get_context("spawn"), {}, {}
    for name, how in contenders.items():
        ours, theirs = context.Pipe()
        workers[name] = ours, context.Process(target=bench_worker, args=(theirs, *how), daemon=True)
        workers[name][1].start()
        theirs.close()
        assert ours.recv() == "ready"
        ours.send(3)                                                               # to warm up, and to compile
        ours.recv()
    for _ in range(rounds):
        for name, (pipe, _) in workers.items():
            pipe.send(steps)
            seconds.setdefault(name, []).append(pipe.recv() / steps)
    memory = {}
    for name, (pipe, process) in workers.items():
        pipe.send(0)
        memory[name] = pipe.recv()
        process.join()
    return {name: (float(np.median(seconds[name])), memory[name]) for name in contenders}


def saved_bytes(args) -> tuple:
    """Bytes that the step's backward needs kept for one image, and the largest of its tensors; counted on the CPU."""
    kept, model = {}, VAE(plain(args))

    def note(t):
        kept[t.untyped_storage()._cdata] = t.untyped_storage(), t.untyped_storage().nbytes()
        return t
    x = torch.zeros(1, 3, args.size, args.size).contiguous(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        model(x, torch.ones(()), torch.zeros(()), torch.zeros(3, dtype=torch.int64))
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    sizes = [n for at, (_, n) in kept.items() if at not in own]
    return sum(sizes), max(sizes), sum(p.numel() for p in model.parameters())


def bench(args):
    """--bench: the whole step against the textbook's, how time and memory grow, and the largest batches. No run is
    written; every contender is a process of its own, and they take turns."""
    device = ["--device", args.device, "--dataset", "cifar10", "--steps", "1000"]
    name = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else \
        f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}; EdVAE, K = 512, D = 16, batches of 128 of 32 x 32\n\n"
          f"{'width':>6} {'step':42}{'ms':>9}{'images/s':>10}{'ratio':>7}{'peak MiB':>10}")
    plainly = ["--precision", "fp32", "--no-compile"]
    for width in (32, 128):
        argv = [*device, "--width", str(width), "--batch-size", "128"]
        times = compete({"textbook: fp32, eager": (argv + plainly, True, False),
                         "textbook, with this file's tune_cpu()": (argv + plainly, True, True),
                         "this file, --precision fp32 --no-compile": (argv + plainly, False, True),
                         "this file": (argv, False, True)}, 3, 5)
        base = times["textbook: fp32, eager"][0]
        for label, (seconds, memory) in times.items():
            print(f"{width:>6} {label:42}{1e3 * seconds:>9.1f}{128 / seconds:>10,.0f}"
                  f"{base / seconds:>7.2f}{memory:>10,.0f}", flush=True)
    print(f"\nHow this file's step grows, width 32: expected of the bottleneck K B N^2, of the rest B N^2\n\n"
          f"{'K':>6}{'N':>4}{'batch':>7}{'step ms':>10}{'bottleneck ms':>15}{'of one logit, ns':>18}{'peak MiB':>10}")
    rows = [(K, 8, 32) for K in (128, 512, 2048, 8192, 16384)] + [(512, N, 32) for N in (16, 32)] + \
        [(512, 8, B) for B in (128, 512)]
    for K, N, B in rows:
        argv = [*device, "--width", "32", "--codebook-size", str(K), "--size", str(4 * N), "--batch-size", str(B)]
        seconds, memory = compete({0: (argv, False, True)}, 3, 3)[0]
        z, M = torch.randn(B * N * N, K, device=args.device), torch.randn(K, 16, device=args.device)
        spent = bottleneck_seconds(z.requires_grad_(), M.requires_grad_())
        print(f"{K:>6}{N:>4}{B:>7}{1e3 * seconds:>10.1f}{1e3 * spent:>15.2f}{1e9 * spent / z.numel():>18.3f}"
              f"{memory:>10,.0f}", flush=True)
    print("\nThe largest batch, computed from what the backward keeps (bf16; 16 bytes a parameter for weights,\n"
          "gradients, moments; three times the largest tensor for what comes and goes; a tenth of the memory free)\n\n"
          f"{'dataset':>14}{'width':>7}{'MiB an image':>14}{'24 GB':>8}{'80 GB':>8}")
    for dataset in ("cifar10", "celeba", "lsun-church"):
        a = settings(["--dataset", dataset, "--device", "cpu"])[0]
        kept, largest, parameters = saved_bytes(a)
        image = kept - a.codebook_size * (a.size // 4) ** 2 * 4 + 3 * largest      # Triton keeps no y
        fits_in = [int((0.9 * gb * 1e9 - 16 * parameters) / image) for gb in (24, 80)]
        print(f"{dataset:>14}{a.width:>7}{image / 2 ** 20:>14.1f}{fits_in[0]:>8,}{fits_in[1]:>8,}")


def bottleneck_seconds(z: Tensor, codebook: Tensor) -> float:
    """Median seconds of the bottleneck, forward and backward."""
    times = []
    for _ in range(7):
        clock = time.perf_counter()
        q = kernels.evidential_quantize(z, codebook, 0.7)
        grad = torch.autograd.grad(q.z_q.sum() + q.kl.sum(), [z, codebook])[1]
        grad.sum().item()                                                          # waits for the device
        times.append(time.perf_counter() - clock)
    return float(np.median(times[2:]))


def tune_cpu():
    """Two switches for a faster step on a CPU; call it before any thread starts. The README has the ratios.

    Denormals become 0: they are slow, and once pi is sharp there are many. And glibc keeps freed memory: by default
    each large tensor is mapped anew, zeroed page by page at its first use, and unmapped.
    """
    torch.set_flush_denormal(True)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):                                   # not glibc
        return
    for option, value in ((-8, 1), (-4, 0), (-1, -1)):  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD: one heap, kept
        mallopt(option, value)


def main(argv=None):
    tune_cpu()
    try:
        with clear_errors("train_vae.py"):
            args, ckpt = settings(argv)
            if args.bench or args.profile:
                (bench if args.bench else profile)(args)
            else:
                train(args, ckpt)
    finally:
        release()
        if many():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
