"""Stage 4: every measurement of the paper, for any runs.

    python evaluate.py runs/A runs/B                     # one table; metrics.json in each run
    python evaluate.py runs/A runs/prior-A-1 --fid       # with FID, by the 2015 Inception
    python evaluate.py runs/A --uncertainty              # what K/S and the entropy of pi know
    python evaluate.py runs/A runs/B --figures figures   # the paper's figures; needs matplotlib

A run that cannot be measured does not stop the others; the exit code is 2 then.

For a run of train_vae.py, over its test split with hard codes (or --codes sample):
    mse                   mean (x_hat - x)^2 over all elements, [0, 1] scale
    perplexity            exp of the entropy of the codes' frequencies, pooled over the split
    perplexity_batch128   the same for each 128 images, averaged, a shorter rest left out: the
                          paper's protocol. It reads low if 128 images have few positions.
    codes_used            how many codes occur
    entropy_mean, _std    of pi, over positions, nats
    uncertainty           mean u = K / S
    rfid                  FID of the split's reconstructions against the split
    logit_max, saturated, textbook_grad_error
                          EdVAE, first batch: the largest logit, the share of logits above the
                          clamp, and |textbook - exact| / |exact| of the KL's float32 gradients
For a run of train_prior.py: prior_nats_per_code on the test split, the perplexity of samples beside
that of as many test maps, and fid of -n samples against the training split.
What --fid and --uncertainty measured stays in metrics.json as long as the checkpoint does. Runs
that differ in their seed alone are followed by their mean and deviation.
"""

import argparse
import functools
import hashlib
import json
import math
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import kernels
from train_prior import check_codes, load_codes, load_prior, nats_per_code
from train_vae import (
    Meter,
    UserError,
    atomic_write,
    draw_shapes,
    load_checkpoint,
    load_images,
    load_vae,
    prepare_device,
    run_script,
    test_pass,
)

# Tables 1, 2 and 3 of the paper, K = 512, D = 16, mean of three seeds: perplexity (per batch),
# MSE x 1000 and FID on these three data sets.
PAPER_DATASETS = ("cifar10", "celeba", "lsun-church")
PAPER = {
    "vqvae-ema": ((412.67, 3.21, 57.04), (405.33, 1.07, 34.30), (379.67, 1.71, 71.22)),
    "gs-vqvae": ((208.33, 3.63, 56.35), (193.33, 1.32, 33.12), (189.67, 1.84, 72.52)),
    "sq-vae": ((407.33, 4.01, 54.17), (409.33, 1.05, 33.03), (374.00, 1.79, 63.41)),
    "vq-ste++": ((414.33, 3.82, 55.53), (370.33, 1.11, 32.98), (375.67, 1.83, 71.03)),
    "dvae": ((190.33, 3.42, 58.85), (254.67, 1.01, 37.29), (363.33, 1.60, 71.32)),
    "edvae": ((420.33, 2.99, 51.82), (371.33, 0.89, 32.51), (385.67, 1.58, 69.63)),
}
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION}"
UNCERTAINTY = ("u_error_correlation", "entropy_error_correlation", "auroc")
# The keys of metrics.json, and what each needs: where that is missing it is null.
METRICS = {
    **dict.fromkeys(("mse", "perplexity", "codes_used"), "a first stage with finite weights"),
    "perplexity_batch128": "a first stage and 128 images",
    **dict.fromkeys(("kl", "entropy_mean", "entropy_std"), "a first stage that has pi"),
    "uncertainty": "an EdVAE",
    "fid": "a prior and --fid",
    "rfid": "a first stage and --fid",
    "prior_nats_per_code": "a prior",
    **dict.fromkeys(UNCERTAINTY, "a first stage that has pi and --uncertainty"),
}
# What an evaluation without --fid or --uncertainty keeps of an earlier one.
KEPT = ("fid", "rfid", "fid_protocol", "scores", *UNCERTAINTY)
# The table: metric, factor, format.
COLUMNS = {
    "MSE x1000": ("mse", 1000, ".2f"),
    "perplexity": ("perplexity", 1, ".1f"),
    "per batch": ("perplexity_batch128", 1, ".1f"),
    "codes used": ("codes_used", 1, ".0f"),
    "entropy": ("entropy_mean", 1, ".2f"),
    "K/S": ("uncertainty", 1, ".2g"),
    "rFID": ("rfid", 1, ".2f"),
    "FID": ("fid", 1, ".2f"),
    "nats/code": ("prior_nats_per_code", 1, ".3f"),
}
# Settings that are ignored when runs are grouped.
INCIDENTAL = {
    *("seed", "data_dir", "out", "resume", "device", "compile", "vae", "vae_relative"),
    *("log_every", "eval_every", "profile", "environment", "resumed"),
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "evaluate.py",
        description=__doc__.split("\n\nFor a run")[0],
        epilog="The head of evaluate.py says what each number in metrics.json means.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run_help = "a run's folder, of train_vae.py or train_prior.py, or a checkpoint such as x.pt"
    p.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=run_help)
    flag = p.add_argument_group("what to measure").add_argument
    codes_help = "take hard codes (default), or draw each code from pi (Alg. 2)"
    flag("--codes", choices=("argmax", "sample"), default="argmax", help=codes_help)
    flag("--fid", action="store_true", help="measure FID and rFID too")
    flag("--inception", type=Path, metavar="FILE", help=f"read {INCEPTION} here (or download it)")
    flag("-n", type=int, default=50_000, help="draw this many for a prior's FID (default 50000)")
    flag("--uncertainty", action="store_true", help="measure what u, H and max pi know of errors")
    flag("--seed", type=int, default=0, help="seed what is drawn at random (default 0)")
    flag = p.add_argument_group("where").add_argument
    flag("--figures", type=Path, metavar="DIR", help="write the figures that these runs allow")
    flag("--data-dir", help="look for the data here (default: where each run found it)")
    flag("--device", help="run on cpu, cuda, ... (default: cuda where there is one)")
    return p


def beside(path: Path, name: str) -> Path:
    """A file of a run: in its folder, or beside its checkpoint x.pt as x-name."""
    return path / name if path.is_dir() else path.with_name(f"{path.stem}-{name}")


def images_of(settings: dict, split: str) -> np.ndarray:
    """The images of a run's split, uint8 (count, H, W, 3)."""
    return load_images(settings["dataset"], split, settings["data_dir"], settings["size"])


def to_float(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) to (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255


def perplexity(codes: Tensor, K: int) -> float:
    """exp of the entropy of the codes' frequencies: 1 for a single code, K for even use."""
    p = torch.bincount(codes.flatten(), minlength=K).double() / codes.numel()
    return torch.special.entr(p).sum().exp().item()


# --------------------------------------------------------------------------------------------- FID


class InceptionFeatures(nn.Module):
    """uint8 images (B, 3, H, W) to the 2048 features of TensorFlow's 2015 Inception, float32.

    path: the weights as pytorch-fid publishes them, whose keys are torchvision's. Two things differ
    from torchvision's network: the average pools leave the padding out of the mean, and the last
    block's pool takes the maximum, a quirk of the original graph.
    """

    def __init__(self, path):
        super().__init__()
        self.net = torchvision.models.inception_v3(
            weights=None, num_classes=1008, aux_logits=False, init_weights=False
        )
        try:
            self.net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as e:  # a foreign file can raise any exception
            what = str(e).splitlines()[0]
            raise UserError(f"{path} does not hold the 2015 Inception's weights ({what})") from None
        self.digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]
        for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
            self.repool(name, lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
        self.repool("7c", lambda x: F.max_pool2d(x, 3, 1, 1))
        self.net.fc = nn.Identity()
        self.eval()

    def repool(self, name: str, pool):
        block = getattr(self.net, f"Mixed_{name}")
        branches = block._forward  # gives a list, its pool branch last
        block._forward = lambda x: [*branches(x)[:-1], block.branch_pool(pool(x))]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        features, device = [], next(self.net.parameters()).device
        for x in images.split(64):  # at 299 x 299 a whole batch may not fit in memory
            x = x.to(device) / 255
            x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
            features.append(self.net(2 * x - 1))
        return torch.cat(features)  # (B, 2048)


class Moments:
    """Mean and covariance of a stream of feature vectors, in float64 on the CPU."""

    def __init__(self):
        self.n, self.sum, self.outer = 0, 0.0, 0.0

    def add(self, x: Tensor):
        x = x.cpu().double()
        self.n += len(x)
        self.sum = self.sum + x.sum(0)
        self.outer = self.outer + x.T @ x

    def read(self) -> tuple[Tensor, Tensor]:
        if self.n < 2:
            raise UserError("FID compares covariances: it needs at least 2 images on either side")
        mean = self.sum / self.n
        return mean, (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)


def frechet_distance(mu1, cov1, mu2, cov2) -> float:
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)): means (D), covariances (D, D); float64.

    tr (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of A C2 A with A = C1^(1/2). That
    matrix is symmetric: nothing complex can come out.
    """
    moments = (mu1, cov1, mu2, cov2)
    mu1, cov1, mu2, cov2 = (torch.as_tensor(x, dtype=torch.float64).cpu() for x in moments)
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    roots = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt()
    return ((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * roots.sum()).item()


def to_uint8(images: Tensor) -> Tensor:
    """[0, 1] to uint8, rounded, as a saved picture would be."""
    return (images.clamp(0, 1) * 255).round().byte()


def find_inception(args: Namespace) -> InceptionFeatures:
    path = args.inception or Path.home() / ".cache" / "edvae" / INCEPTION
    if args.inception and not path.is_file():
        raise UserError(f"--inception {path} is not a file")
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix="6726825d")
        except (OSError, RuntimeError) as e:
            cure = "get it elsewhere and name it by --inception"
            raise UserError(f"{INCEPTION} could not be downloaded ({e}); {cure}") from None
    return InceptionFeatures(path).to(args.device)


@functools.cache  # of one split for all runs of a call
def moments_of(inception: InceptionFeatures, dataset: str, split: str, data_dir: str, size: int):
    images, moments = load_images(dataset, split, data_dir, size), Moments()
    for i in range(0, len(images), 64):
        moments.add(inception(torch.from_numpy(images[i : i + 64]).permute(0, 3, 1, 2)))
    return moments


def fid(moments: Moments, inception, settings: dict, split: str) -> tuple[float, str]:
    """FID of a stream of images against a split of a run's data, and its protocol in words."""
    place = settings["dataset"], split, settings["data_dir"], settings["size"]
    reference = moments_of(inception, *place)
    if min(moments.n, reference.n) < 2048:
        warning = "of under 2,048 images, a singular covariance: the number means little"
        print(f"warning: FID {warning}", file=sys.stderr)
    against = f"against the {split} split's {reference.n}, weights {inception.digest}"
    distance = frechet_distance(*moments.read(), *reference.read())
    return distance, f"FID of {moments.n} images {against}"


# ------------------------------------------------------------------------------------ measurements


class Result(NamedTuple):
    """A run and what was measured of it."""

    path: Path
    settings: dict
    metrics: dict
    counts: Tensor | None = None  # (K) how often each code was used; a prior's: None


def measure(path: Path, args: Namespace, inception) -> Result:
    """All that is asked for of one run; UserError or OSError where that cannot be."""
    settings = load_checkpoint(path)["args"]
    settings["data_dir"] = args.data_dir or settings["data_dir"]
    of_kind = measure_vae if "model" in settings else measure_prior
    metrics, counts = of_kind(path, settings, args, inception)
    weights = path / "ckpt.pt" if path.is_dir() else path
    metrics["checkpoint"] = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    try:
        earlier = dict(json.loads(beside(path, "metrics.json").read_text()))
    except (OSError, ValueError, TypeError):  # none, or a damaged one: it is written anew
        earlier = {}
    if all(earlier.get(k) == metrics.get(k) for k in ("checkpoint", "codes")):
        metrics = {k: earlier[k] for k in KEPT if earlier.get(k)} | metrics
    text = json.dumps(dict.fromkeys(METRICS) | metrics)
    metrics = json.loads(text, parse_constant=lambda _: None)  # nan and inf become null
    missing = [name for name in METRICS if metrics[name] is None]
    metrics["not_measured"] = {name: f"needs {METRICS[name]}" for name in missing}
    return Result(path, settings, metrics, counts)


@torch.no_grad()
def measure_vae(path: Path, settings: dict, args: Namespace, inception) -> tuple:
    """A first stage's metrics, and how often each code was used (K)."""
    images, model = images_of(settings, "test"), load_vae(path, args.device)
    K, generator = settings["codebook_size"], torch.Generator(args.device).manual_seed(args.seed)
    meter, moments, codes, diagnosis = Meter(K, args.device), Moments(), [], {}
    for x, z_e, loss, q, x_hat in test_pass(model, images, model.args):
        if args.codes == "sample":
            pi = model.quantizer.probabilities(z_e).flatten(0, 2)
            q = q._replace(indices=pi.multinomial(1, generator=generator).view_as(q.indices))
            x_hat = model.reconstruct(model.quantizer.vectors()[q.indices])
        meter.add(loss, F.mse_loss(x_hat, x), q)
        if settings["model"] == "edvae" and not codes:
            diagnosis = diagnose(z_e, settings["max_logit"])
        codes.append(q.indices.short().cpu())
        if inception:
            moments.add(inception(to_uint8(x_hat)))
    metrics, codes = meter.flush() | diagnosis, torch.cat(codes)  # (count, N, N)
    del metrics["loss"]  # its beta is not the run's
    groups = [group for group in codes.split(128) if len(group) == 128]
    of_groups = [perplexity(group, K) for group in groups]
    metrics |= dict(codes=args.codes, perplexity_batch128=np.mean(of_groups) if groups else None)
    if inception:
        metrics["rfid"], metrics["fid_protocol"] = fid(moments, inception, settings, "test")
    has_pi, has_evidence = (metrics[k] is not None for k in ("entropy_mean", "uncertainty"))
    if has_pi:
        metrics["u"] = "ln(K/S)" if has_evidence else "-logsumexp of the logits"
    if has_pi and args.uncertainty:
        metrics |= measure_uncertainty(model, images, args.seed)
    elif args.uncertainty:
        print(f"{path}: no --uncertainty, for {settings['model']} has no pi")
    return metrics, torch.bincount(codes.flatten(), minlength=K)


def diagnose(logits: Tensor, c: float) -> dict:
    """How near an EdVAE is to the limits of its clamp c, and of the textbook KL in float32."""
    gradients = []
    for kl in (kernels.dirichlet_kl, kernels.textbook_kl):
        with torch.enable_grad():
            z = logits.detach().clone().requires_grad_()
            gradients.append(torch.autograd.grad(kl(z, c).mean(), z)[0])
    exact, textbook = gradients
    return dict(
        logit_max=logits.max().item(),
        saturated=(logits > c).float().mean().item(),
        textbook_grad_error=((textbook - exact).norm() / exact.norm()).item(),
    )


@torch.no_grad()
def measure_prior(path: Path, settings: dict, args: Namespace, inception) -> tuple:
    """A prior's metrics, and None."""
    prior = load_prior(path, args.device)
    check_codes(prior, prior.args.vae)
    vae, K = load_vae(prior.args.vae, args.device), settings["codebook_size"]
    test = load_codes(prior.args.vae, "test", K, settings["data_dir"], args.device)  # (B, N, N)
    n = args.n if inception else min(256, len(test))
    moments, maps = Moments(), []
    at_once = 1024 if args.device.startswith("cuda") else 256
    for first in range(0, n, at_once):
        codes = prior.sample(min(at_once, n - first), seed=args.seed, first=first)
        maps.append(codes[: max(0, len(test) - first)])  # as many as there are test maps
        if inception:
            for part in codes.split(vae.args.batch_size):
                moments.add(inception(to_uint8(vae.decode(part))))
            print(f"\r{path}: {first + len(codes):,} of {n:,} samples", end="", flush=True)
    metrics = dict(
        prior_nats_per_code=nats_per_code(prior, test),
        compared=min(n, len(test)),
        perplexity_samples=perplexity(torch.cat(maps), K),
        perplexity_data=perplexity(test[:n], K),  # of as many maps: the same bias
    )
    if inception:
        print()
        data = vars(vae.args) | dict(data_dir=settings["data_dir"])
        metrics["fid"], metrics["fid_protocol"] = fid(moments, inception, data, "train")
    return metrics, None


def nearest(samples: Tensor, images: np.ndarray) -> Tensor:
    """The nearest images, in Euclidean pixel distance, to samples (B, 3, H, W): the same shape."""
    flat = samples.permute(0, 2, 3, 1).flatten(1)  # (B, H W 3)
    best, where = torch.full((len(flat),), math.inf), torch.zeros(len(flat), dtype=torch.int64)
    step = max(1, 2**24 // flat.shape[1])
    for i in range(0, len(images), step):
        chunk = torch.from_numpy(images[i : i + step]).flatten(1) / 255
        distance, k = torch.cdist(flat, chunk).min(1)
        where = torch.where(distance < best, k + i, where)
        best = torch.minimum(best, distance)
    return to_float(images[where.numpy()])


# ------------------------------------------------------------------------------------- uncertainty


def shuffle_patches(x: np.ndarray, rng) -> np.ndarray:
    """Images (B, H, W, 3) with the 4 x 4 patches of each in another order."""
    B, H, W, _ = x.shape
    patches = x.reshape(B, H // 4, 4, W // 4, 4, 3).swapaxes(2, 3).reshape(B, -1, 4, 4, 3)
    patches = np.stack([rng.permutation(of_image) for of_image in patches])
    return patches.reshape(B, H // 4, W // 4, 4, 4, 3).swapaxes(2, 3).reshape(x.shape)


def blur(x: np.ndarray, rng) -> np.ndarray:
    blurred = torchvision.transforms.functional.gaussian_blur(to_float(x), 13, 1.5)
    return to_uint8(blurred).permute(0, 2, 3, 1).numpy()


# Images unlike those trained on, made from test images x, uint8 (B, H, W, 3).
FOREIGN = {
    "uniform noise": lambda x, rng: rng.integers(0, 256, x.shape, dtype=np.uint8),
    "shuffled patches": shuffle_patches,
    "blurred": blur,
    "noise added": lambda x, rng: (x + rng.normal(0.5, 25.5, x.shape)).clip(0, 255).astype("u1"),
    "generated shapes": lambda x, rng: draw_shapes(len(x), x.shape[1], rng),
}
SCORES = ("u", "H", "1 - max pi", "contrast", "error")


@torch.no_grad()
def scores(model, images: np.ndarray, change=None, seed: int = 0) -> Tensor:
    """u, H, 1 - max pi, and the contrast and error of the 4 x 4 patch: (5, count, N, N), float32.

    u is ln(K / S); a softmax has none, and -ln sum exp(logits) takes its place. Contrast is the
    standard deviation over the patch's pixels (root mean square over colours). change: one of
    FOREIGN, applied to the images.
    """
    parts = []
    for i in range(0, len(images), 128):
        batch = images[i : i + 128]
        batch = change(batch, np.random.default_rng([seed, i])) if change else batch
        for x, z_e, _, q, x_hat in test_pass(model, batch, model.args):
            u = q.uncertainty.clamp(min=1e-38).log()
            if u.isnan().all():
                u = -model.quantizer.logits(z_e).float().logsumexp(-1)
            unsure = 1 - model.quantizer.probabilities(z_e).amax(-1)
            patches = F.pixel_unshuffle(x, 4).unflatten(1, (3, 16))  # (B, 3, 16, N, N)
            contrast = patches.var(2, correction=0).mean(1).sqrt()
            error = F.pixel_unshuffle(x_hat - x, 4).square().mean(1)
            parts.append(torch.stack([u, q.entropy, unsure, contrast, error]).float().cpu())
    return torch.cat(parts, 1)


def ranks(x: Tensor) -> Tensor:
    """Ranks of x (P) from 1, float64; equal values share their mean rank."""
    _, inverse, count = x.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2).double()[inverse]


def auroc(usual: Tensor, foreign: Tensor) -> float:
    """The probability that a foreign image's score is above a usual one's; ties count half."""
    n, m = len(usual), len(foreign)
    return ((ranks(torch.cat([usual, foreign]))[n:].sum() - m * (m + 1) / 2) / (n * m)).item()


def measure_uncertainty(model, images: np.ndarray, seed: int) -> dict:
    """Spearman's correlation of each score with the patch's error, plain and given its contrast.

    And the AUROC of each score's mean over an image, the test split against each of FOREIGN.
    """
    usual = scores(model, images)
    r = torch.corrcoef(torch.stack([ranks(s.flatten()) for s in usual]))  # (5, 5)
    with_contrast, with_error = r[3], r[4]
    partial = with_error - with_contrast * r[3, 4]
    partial = partial / ((1 - with_contrast.square()) * (1 - r[3, 4] ** 2)).sqrt()
    rows = {"rank correlation with error": with_error[:4].tolist()}
    rows["the same, given contrast"] = partial[:3].tolist()
    for name, change in FOREIGN.items():
        means = usual.mean((2, 3)), scores(model, images, change, seed).mean((2, 3))  # (5, count)
        rows[f"AUROC, {name}"] = [auroc(a, b) for a, b in zip(*means)]
    return dict(
        u_error_correlation=rows["rank correlation with error"][0],
        entropy_error_correlation=rows["rank correlation with error"][1],
        auroc={name: rows[f"AUROC, {name}"][0] for name in FOREIGN},
        scores={name: dict(zip(SCORES, values)) for name, values in rows.items()},
    )


# ------------------------------------------------------------------------------------------- table


def alike(results: list, but: str | None = None) -> list[list]:
    """Results in groups that differ only in `but` and in what INCIDENTAL lists."""
    groups = {}
    for result in results:
        same = {k: v for k, v in result.settings.items() if k not in INCIDENTAL and k != but}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(result)
    return list(groups.values())


def paper_of(settings: dict) -> tuple | None:
    """The paper's perplexity (per batch), MSE x 1000 and FID for these settings, if it has them."""
    if (settings.get("codebook_size"), settings.get("code_dim")) != (512, 16):
        return None
    found = dict(zip(PAPER_DATASETS, PAPER.get(settings.get("model"), ())))
    return found.get(settings.get("dataset"))


def table(results: list[Result]) -> str:
    """One row a run; seeds of a setting are followed by their mean and deviation, and the paper."""
    rows = [["run", *COLUMNS]]
    for group in alike(results):
        columns = []
        for key, factor, form in COLUMNS.values():
            values = [r.metrics[key] for r in group]
            column = ["-" if v is None else f"{factor * v:{form}}" for v in values]
            mean = "-"
            if len(group) > 1 and None not in values:
                deviation = factor * np.std(values, ddof=1)
                mean = f"{factor * np.mean(values):{form}} +- {deviation:{form}}"
            columns.append([*column, mean])
        names = [str(r.path) for r in group]
        if len(group) > 1:
            names.append(f"  mean of {len(group)} runs")
        rows += [[name, *cells] for name, *cells in zip(names, *columns)]
        paper = paper_of(group[0].settings)
        if paper:
            shown = {"MSE x1000": paper[1], "per batch": paper[0], "FID": paper[2]}
            rows.append(["  paper, 150,000 steps", *(f"{shown.get(c, '')}" for c in COLUMNS)])
    return aligned(rows)


def aligned(rows: list[list[str]]) -> str:
    """Rows of cells as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for name, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        lines.append("  ".join([name.ljust(widths[0]), *padded]))
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------- figures

# Panels of curves: a title, and the key of log.jsonl.
TEST_CURVES = {"test perplexity": "perplexity", "test MSE x 1000": "mse"}
PI_CURVES = {
    "entropy of pi, nats": "entropy_mean",
    "uncertainty K/S": "uncertainty",
    "training perplexity": "perplexity",
}
SWEPT = ("codebook_size", "code_dim", "beta", "max_logit", "tau_start")


def short_names(paths: list[Path]) -> dict[Path, str]:
    """As much of the end of each path as tells them apart, for labels and file names."""
    for depth in range(1, 1 + max(len(path.absolute().parts) for path in paths)):
        names = {path: "-".join(path.absolute().parts[1:][-depth:]) for path in paths}
        if len(set(names.values())) == len(paths):
            break
    return names


class Figures:
    """The paper's figures that these runs allow, as PNGs in a folder."""

    def __init__(self, folder: Path):
        """UserError, before any measurement, unless figures can be drawn and written there."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as e:
            raise UserError(f"--figures {folder} cannot be written to ({e.strerror})") from None
        try:
            import matplotlib.pyplot as plt
        except ImportError:
            raise UserError("--figures needs matplotlib: pip install matplotlib") from None
        plt.switch_backend("Agg")
        plt.rcParams.update({"font.size": 15, "lines.linewidth": 2})  # readable at half size
        self.plt, self.folder = plt, folder

    def draw(self, results: list[Result]):
        self.names = short_names([r.path for r in results])
        self.colours = {path: f"C{i}" for i, path in enumerate(self.names)}
        runs = [r for r in results if "model" in r.settings]
        self.logs = {r.path: self.read_log(r.path) for r in runs}
        self.curves("training", runs, TEST_CURVES, test=True)
        with_pi = [r for r in runs if "u" in r.metrics]
        self.curves("entropy-uncertainty", with_pi, PI_CURVES, test=False)
        self.entropy_maps(runs)
        self.codebook_use(runs)
        self.reconstructions(runs)
        for setting in SWEPT:
            self.sweep(setting, alike(runs, but=setting))
        for r in results:
            if "model" not in r.settings:
                self.samples(r)
            elif "u" in r.metrics:
                self.scores(r)

    def read_log(self, path: Path) -> list[dict]:
        try:
            text = beside(path, "log.jsonl").read_text()
            whole = text[: text.rfind("\n") + 1]  # a killed run's last line may be torn
            return [json.loads(line) for line in whole.splitlines()]
        except (OSError, ValueError) as e:
            print(f"{path}: no curves, its log.jsonl cannot be read ({e})", file=sys.stderr)
            return []

    def lines(self, r: Result, key: str, test: bool) -> list[dict]:
        """The lines of a run's log that have this key, of training or of the test split."""
        return [x for x in self.logs[r.path] if ("split" in x) == test and x.get(key) is not None]

    def panels(self, count: int):
        size = (5.5 * count, 4)
        return self.plt.subplots(1, count, figsize=size, squeeze=False, layout="constrained")

    def save(self, figure, axis, name: str):
        """Write a figure, with the legend in one of its axes; none if that is empty."""
        if axis.has_data():
            if axis.get_legend_handles_labels()[0]:
                axis.legend()
            figure.savefig(self.folder / f"{name}.png", dpi=110, bbox_inches="tight")
            print(f"wrote {self.folder / name}.png")
        self.plt.close(figure)

    def curves(self, name: str, runs: list[Result], panels: dict, test: bool):
        """Over training: Figures 2a and 3, and the test split with the paper's last values."""
        figure, (axes,) = self.panels(len(panels))
        for axis, (title, key) in zip(axes, panels.items()):
            ends = []
            for r in runs:
                lines, colour = self.lines(r, key, test), self.colours[r.path]
                if not lines:  # stopped before its first test, or not defined
                    continue
                step, value = np.array([(x["step"], x[key]) for x in lines]).T
                value = 1000 * value if key == "mse" else value
                marker = "o" if len(lines) == 1 else ""  # one point makes no line
                axis.plot(step, value, marker=marker, color=colour, label=self.names[r.path])
                ends.append(value[-1])
                if key == "entropy_mean":  # and the deviation over positions
                    std = np.array([x["entropy_std"] for x in lines])
                    low = np.maximum(0, value - std)
                    axis.fill_between(step, low, value + std, color=colour, alpha=0.2)
                if test and paper_of(r.settings):
                    ends.append(paper_of(r.settings)[key == "mse"])
                    axis.axhline(ends[-1], color=colour, linestyle="--")
            if any(line.get_linestyle() == "--" for line in axis.lines):
                axis.plot([], [], "--", color="gray", label="paper (per batch)")
            if key == "mse" and ends:
                axis.set_ylim(0.95 * min(ends), 1.5 * max(ends))  # high early errors are cut off
            axis.set(xlabel="step", ylabel=title)
            axis.locator_params("x", nbins=4)
        self.save(figure, axes[0], name)

    def entropy_maps(self, runs: list[Result]):
        """Figure 2b: entropy of pi at each position of the first test image, over training."""
        rows = {}
        for r in runs:
            lines = self.lines(r, "entropy_map", test=True)
            if lines:
                lines = [lines[i] for i in np.linspace(0, len(lines) - 1, 6).round().astype(int)]
                first, last = lines[0]["step"], lines[-1]["step"]
                title = f"{self.names[r.path]}, nats\nsteps {first:,} to {last:,}"
                rows[title] = torch.tensor([x["entropy_map"] for x in lines])
        if rows:
            self.rows("entropy-maps", rows, top=max(row.max() for row in rows.values()))

    def codebook_use(self, runs: list[Result]):
        """How often each code is used, most used first; a curve ends with the codes in use."""
        figure, ((axis,),) = self.panels(1)
        for r in runs:
            share = r.counts[r.counts > 0].sort(descending=True).values / r.counts.sum()
            label = f"{self.names[r.path]}: {len(share)} of {len(r.counts)} codes"
            axis.plot(range(1, 1 + len(share)), share, color=self.colours[r.path], label=label)
        axis.set(xlabel="code, most used first", ylabel="share of test positions", yscale="log")
        self.save(figure, axis, "usage")

    def reconstructions(self, runs: list[Result]):
        """Figures 4 and 5: the same test images by every model; a picture for each data set."""
        pictures = {}
        for r in runs:
            x = to_float(images_of(r.settings, "test")[:10])
            place = tuple(r.settings[k] for k in ("dataset", "size", "data_dir"))
            model, rows = load_vae(r.path), pictures.setdefault(place, {"input": x})
            title = f"{self.names[r.path]}, {r.metrics['codes_used']} codes"
            rows[title] = model.decode(model.encode(x))
        for i, ((dataset, *_), rows) in enumerate(pictures.items(), 1):
            number = f"-{i}-{dataset}" if len(pictures) > 1 else ""
            self.rows(f"reconstructions{number}", rows)

    def scores(self, r: Result):
        """What pi knows: u beside the error and the contrast of each patch."""
        images = images_of(r.settings, "test")[:10]
        u, _, _, contrast, error = scores(load_vae(r.path), images)  # (B, N, N) each
        rows = {"input": to_float(images), "squared error": error, r.metrics["u"]: u}
        self.rows(f"scores-{self.names[r.path]}", rows | {"contrast": contrast})

    def samples(self, r: Result):
        """A prior's samples above their nearest training images: are they copies?"""
        prior = load_prior(r.path)
        vae = load_vae(prior.args.vae)
        images = images_of(vars(vae.args) | dict(data_dir=r.settings["data_dir"]), "train")
        drawn = vae.decode(prior.sample(8))
        rows = {"samples": drawn, "nearest in training": nearest(drawn, images)}
        self.rows(f"nearest-{self.names[r.path]}", rows)

    def rows(self, name: str, rows: dict, top=None):
        """A row for each title: images (B, 3, H, W), with their MSE to the first row, or maps.

        top: where the colours of maps end (default: at the row's highest).
        """
        first = next(iter(rows.values()))
        shape, size = (len(rows), len(first)), (1.3 * len(first) + 3, 1.4 * len(rows))
        figure, axes = self.plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
        for line, (title, row) in zip(axes, rows.items()):
            if row.ndim == 3:
                title += f"\n{row.min():.2g} to {row.max():.2g}"
                low, high = min(0, row.min()), top or row.max()
            else:
                error = 1000 * (row - first).square().mean()
                title += "" if row is first else f"\nMSE x 1000: {error:.1f}"
                low, high, row = 0, 1, row.permute(0, 2, 3, 1)  # (B, H, W, 3)
            line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=14)
            for axis, image in zip(line, row):
                axis.imshow(image.numpy(), vmin=low, vmax=high)
                axis.set(xticks=[], yticks=[])
        self.save(figure, axes[0, 0], name)

    def sweep(self, setting: str, groups: list[list[Result]]):
        """Figures 6, E.10, Table E.5, Section E.1: a line for runs alike in all but one setting."""
        groups = [g for g in groups if len({r.settings[setting] for r in g}) > 1]
        first = [group[0].settings for group in groups]
        # A line's label: its system, or if systems recur what tells the lines apart.
        models = [settings["model"] for settings in first]
        names = [] if len({*models}) == len(models) else [*first[0]]
        names = [k for k in names if k not in INCIDENTAL and k != setting]
        differ = [k for k in names if len({str(settings.get(k)) for settings in first}) > 1]
        ticks = sorted({float(r.settings[setting]) for group in groups for r in group})
        figure, (axes,) = self.panels(2)
        for group in groups:
            points = {}  # setting: (perplexity, MSE x 1000) of each seed
            for r in group:
                numbers = r.metrics["perplexity"], 1000 * r.metrics["mse"]
                points.setdefault(float(r.settings[setting]), []).append(numbers)
            at = [ticks.index(x) for x in sorted(points)]  # evenly spaced: an infinite clamp too
            means = np.array([np.mean(points[x], 0) for x in sorted(points)])
            label = ", ".join(f"{k} {group[0].settings[k]}" for k in differ)
            label = label or group[0].settings["model"]
            for axis, mean, y in zip(axes, means.T, ("perplexity", "MSE x 1000")):
                axis.plot(at, mean, "o-", label=label)
                axis.set(xlabel=setting.replace("_", " "), ylabel=y)
                axis.set_xticks(range(len(ticks)), [f"{x:g}" for x in ticks])
        if setting == "codebook_size" and groups:
            axes[0].plot(range(len(ticks)), ticks, "k--", label="all codes alike")
            axes[0].set(yscale="log")
        self.save(figure, axes[0], f"sweep-{setting.replace('_', '-')}")


def measure_runs(argv):
    args = parser().parse_args(argv)
    args.device, _ = prepare_device(args.device)
    args.seed %= 2**63
    if args.n < 2:
        raise UserError(f"-n {args.n} is too few: FID compares covariances")
    figures = Figures(args.figures) if args.figures else None
    inception = find_inception(args) if args.fid else None
    folders = [path.parent if path.name == "ckpt.pt" else path for path in args.runs]
    results, complaints = [], []
    for path in {path.resolve(): path for path in folders}.values():
        try:
            results.append(measure(path, args, inception))
            with atomic_write(beside(path, "metrics.json")) as f:
                f.write((json.dumps(results[-1].metrics, indent=1) + "\n").encode())
        except (UserError, OSError, MemoryError, RuntimeError) as e:  # the last: memory, too
            complaints.append(f"{path}: {' '.join(str(e).split())[:300] or 'out of memory'}")
    if results:
        print(table(results))
    for r in results:
        report(r)
    if results and figures:
        figures.draw(results)
    if complaints:
        raise UserError("\n".join(complaints))


def report(r: Result):
    """What the table has no column for."""
    if "fid_protocol" in r.metrics:
        print(f"{r.path}: {r.metrics['fid_protocol']}")
    if "compared" in r.metrics:
        drawn = f"{r.metrics['compared']} samples {r.metrics['perplexity_samples']:.1f}"
        data = f"as many test maps {r.metrics['perplexity_data']:.1f}"
        print(f"{r.path}: perplexity of the codes of {drawn}, of {data}")
    if "scores" in r.metrics:
        rows = [[f"{r.path}, u = {r.metrics['u']}", *SCORES]]
        for name, found in r.metrics["scores"].items():
            cells = [found.get(score) for score in SCORES]
            rows.append([name, *("" if v is None else f"{v:.2f}" for v in cells)])
        print("\n" + aligned(rows))


def main(argv=None):
    run_script("evaluate.py", measure_runs, argv)


if __name__ == "__main__":
    main()
