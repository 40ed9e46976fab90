"""Stage 4: every measurement of the paper, for any runs.

    python evaluate.py runs/A runs/B                     # one table; metrics.json in each run
    python evaluate.py runs/A runs/prior-A-1 --fid       # with FID, by the 2015 Inception
    python evaluate.py runs/A runs/B --figures figures   # the paper's figures; needs matplotlib

For a run of train_vae.py, in one pass over its test split with hard codes (or --codes sample):
    mse                   mean (x_hat - x)^2 over all elements, [0, 1] scale
    perplexity            exp of the entropy of the codes' frequencies, pooled over the split
    perplexity_batch128   the same for each batch of 128 images, averaged, a shorter last one
                          dropped: the paper's protocol. It reads low if a batch has few positions.
    codes_used            how many codes occur
    entropy_mean, _std    of pi, over positions, nats
    uncertainty           mean K / S
    rfid                  FID of the split's reconstructions against the split; both FIDs are kept
                          when the same step and --codes are evaluated without --fid
    logit_max, saturated, textbook_grad_error
                          EdVAE: the largest logit, the share of logits above the clamp, and
                          |textbook - exact| / |exact| of the KL's float32 gradients, all three
                          of the first batch
For a run of train_prior.py: prior_nats_per_code on the test split, the perplexity of samples beside
that of as many test maps, and fid of -n samples against the training split.
Runs that differ in their seed alone (priors: on one first stage) are followed by their mean and
deviation.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import kernels
from train_prior import check_codes, load_codes, load_prior, nats_per_code
from train_vae import (
    MAY_CHANGE,
    SYSTEMS,
    Meter,
    UserError,
    atomic_write,
    load_checkpoint,
    load_images,
    load_vae,
    number,
    perplexity,
    prepare_device,
    read_json,
    read_log,
    run_script,
    save_grid,
    to_float,
)

# Tables 1, 2 and 3 of the paper, K = 512, D = 16, mean of three seeds: perplexity (per batch),
# MSE x 1000, FID.
PAPER = {
    "cifar10": {
        "vqvae-ema": (412.67, 3.21, 57.04),
        "gs-vqvae": (208.33, 3.63, 56.35),
        "sq-vae": (407.33, 4.01, 54.17),
        "vq-ste++": (414.33, 3.82, 55.53),
        "dvae": (190.33, 3.42, 58.85),
        "edvae": (420.33, 2.99, 51.82),
    },
    "celeba": {
        "vqvae-ema": (405.33, 1.07, 34.30),
        "gs-vqvae": (193.33, 1.32, 33.12),
        "sq-vae": (409.33, 1.05, 33.03),
        "vq-ste++": (370.33, 1.11, 32.98),
        "dvae": (254.67, 1.01, 37.29),
        "edvae": (371.33, 0.89, 32.51),
    },
    "lsun-church": {
        "vqvae-ema": (379.67, 1.71, 71.22),
        "gs-vqvae": (189.67, 1.84, 72.52),
        "sq-vae": (374.00, 1.79, 63.41),
        "vq-ste++": (375.67, 1.83, 71.03),
        "dvae": (363.33, 1.60, 71.32),
        "edvae": (385.67, 1.58, 69.63),
    },
}
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION}"
METRICS = (
    *("mse", "perplexity", "perplexity_batch128", "codes_used"),
    *("entropy_mean", "entropy_std", "uncertainty", "fid", "rfid", "prior_nats_per_code"),
)
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
INCIDENTAL = MAY_CHANGE | {"seed"}


def parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser("evaluate.py", description=__doc__, formatter_class=formatter)
    flag = p.add_argument
    flag("runs", type=Path, nargs="+", metavar="RUN", help="of train_vae.py and train_prior.py")
    flag("--data-dir", help="where the data lies (default: where each run found it)")
    codes_help = "hard codes (default), or one draw from pi at each position (Alg. 2)"
    flag("--codes", choices=("argmax", "sample"), default="argmax", help=codes_help)
    flag("--fid", action="store_true", help="measure FID too")
    inception_help = f"{INCEPTION}, for --fid (default: downloaded once to ~/.cache/edvae)"
    flag("--inception", type=Path, metavar="FILE", help=inception_help)
    count = number(int, 1, 10**12)
    flag("-n", type=count, default=50_000, help="samples for a prior's FID (default 50000)")
    flag("--figures", type=Path, metavar="DIR", help="write the figures that these runs allow")
    flag("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of what is drawn (default 0)")
    flag("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    return p


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
        x = images.float() / 255
        x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
        return self.net(2 * x - 1)  # (B, 2048)


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


def images_of(settings: dict, split: str) -> np.ndarray:
    return load_images(settings["dataset"], split, settings["data_dir"], settings["size"])


def fid(moments: Moments, inception, split: str, settings: dict, device) -> tuple[float, str]:
    """FID of a stream of images against a split of a run's data, and its protocol in words.

    The split's moments are kept beside its images, under the hash of Inception's weights.
    """
    images = images_of(settings, split)
    name = f"{settings['dataset']}-{split}-{settings['size']}"
    data = Path(settings["data_dir"]) / f"{name}.npy"
    cache = data.with_name(f"{name}-fid-{inception.digest}.npz")
    if not cache.exists() or cache.stat().st_mtime < data.stat().st_mtime:
        of_split = Moments()
        for i in range(0, len(images), 64):
            x = torch.from_numpy(images[i : i + 64]).to(device)
            of_split.add(inception(x.permute(0, 3, 1, 2)))
        mean, cov = of_split.read()
        with atomic_write(cache) as f:
            np.savez(f, mean=mean.numpy(), cov=cov.numpy())
    try:
        with np.load(cache, allow_pickle=False) as kept:
            reference = kept["mean"], kept["cov"]
    except Exception as e:  # a damaged file can raise any exception
        raise UserError(f"{cache} is damaged ({e}); delete it to measure again") from None
    distance = frechet_distance(*moments.read(), *reference)
    fewest = min(moments.n, len(images))
    if fewest < 2048:
        warning = "under 2,048 the covariance is singular and the number means little"
        print(f"warning: FID of {fewest} images: {warning}", file=sys.stderr)
    against = f"the {split} split's {len(images)}"
    return distance, f"{moments.n} images against {against}, weights {inception.digest}"


def earlier_fid(folder: Path, metrics: dict) -> dict:
    """What an earlier --fid wrote of the same step and --codes: it may have taken hours."""
    try:
        earlier = read_json(folder / "metrics.json")
    except UserError:  # none, or a damaged one: it is written anew
        return {}
    if any(earlier.get(name) != metrics.get(name) for name in ("step", "codes")):
        return {}
    return {name: earlier[name] for name in ("fid", "rfid", "fid_protocol") if earlier.get(name)}


# ------------------------------------------------------------------------------------ measurements


@torch.no_grad()
def measure_vae(
    folder: Path, settings: dict, args: Namespace, inception
) -> tuple[dict, dict, Tensor]:
    """A first stage's metrics, the reasons for missing ones, and how often a code was used (K)."""
    images = images_of(settings, "test")
    model = load_vae(folder, args.device)
    K, device = settings["codebook_size"], args.device
    generator = torch.Generator(device).manual_seed(args.seed)
    meter, moments, per_batch = Meter(K, device), Moments(), []
    for i in range(0, len(images), 128):
        x = to_float(torch.from_numpy(images[i : i + 128]).to(device))
        z_e = model.z_e(x)
        loss, q = model.quantizer(z_e, tau=torch.ones((), device=device), beta=1.0, key=0)
        indices = q.indices
        if args.codes == "sample":
            pi = model.quantizer.probabilities(z_e).flatten(0, 2)
            indices = torch.multinomial(pi, 1, generator=generator).view(q.indices.shape)
        x_hat = model.x_hat(model.quantizer.vectors()[indices])
        meter.add(loss, F.mse_loss(x_hat, x), q._replace(indices=indices))
        if len(x) == 128:
            per_batch.append(perplexity(torch.bincount(indices.flatten(), minlength=K)))
        if i == 0 and settings["model"] == "edvae":
            diagnosis = diagnose(z_e, settings["max_logit"])
        if inception:
            moments.add(inception(to_uint8(x_hat)))
    counts = meter.counts.cpu().clone()  # read() clears them
    metrics = meter.read() | dict(
        perplexity_batch128=np.mean(per_batch).item() if per_batch else None, codes=args.codes
    )
    del metrics["loss"]  # its beta is not the run's
    if settings["model"] == "edvae":
        metrics |= diagnosis
    undefined = ("kl", "entropy_mean", "entropy_std", "uncertainty")
    reasons = dict.fromkeys(undefined, f"not defined for {settings['model']}") | dict(
        fid="FID is of a prior's samples: give its run",
        prior_nats_per_code="give the prior's run",
        perplexity_batch128="the split has fewer than 128 images",
        rfid="ask for it with --fid",
    )
    if inception:
        metrics["rfid"], metrics["fid_protocol"] = fid(
            moments, inception, "test", settings, args.device
        )
    return metrics, reasons, counts


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
def measure_prior(
    folder: Path, settings: dict, args: Namespace, inception
) -> tuple[dict, dict, None]:
    """A prior's metrics; writes nearest.png, samples above their nearest training images."""
    prior = load_prior(folder, args.device)
    check_codes(prior, settings["vae"])
    vae = load_vae(settings["vae"], args.device)
    vae_settings = vars(vae.args) | dict(data_dir=settings["data_dir"])
    test = load_codes(
        settings["vae"], "test", settings["codebook_size"], settings["data_dir"], args.device
    )
    n = args.n if inception else 256
    moments, first = Moments(), None
    counts = torch.zeros(settings["codebook_size"], dtype=torch.int64)
    maps = 1024 if args.device.startswith("cuda") else 256  # at a time
    for start in range(0, n, maps):
        codes = prior.sample(min(maps, n - start), seed=args.seed, first=start)
        compared = codes[: max(0, len(test) - start)]  # as many as there are test maps
        counts += torch.bincount(compared.flatten().cpu(), minlength=len(counts))
        for part in codes.split(128):
            drawn = vae.decode(part)
            if first is None:
                first = drawn[:8].cpu()
            if inception:
                moments.add(inception(to_uint8(drawn)))
        if inception:
            print(f"\r{folder}: {start + len(codes):,} of {n:,} samples", end="", flush=True)
    images = images_of(vae_settings, "train")
    save_grid(torch.cat([first, nearest(first, images)]), folder / "nearest.png", len(first))
    as_many = torch.bincount(test[:n].flatten().cpu(), minlength=len(counts))  # the same bias
    metrics = dict(
        prior_nats_per_code=nats_per_code(prior, test),
        samples=n,
        compared=min(n, len(test)),
        perplexity_samples=perplexity(counts),
        perplexity_data=perplexity(as_many),
    )
    reasons = dict.fromkeys(METRICS, "give the first stage's run")
    reasons["fid"] = "ask for it with --fid"
    if inception:
        print()
        protocol = fid(moments, inception, "train", vae_settings, args.device)
        metrics["fid"], metrics["fid_protocol"] = protocol
    return metrics, reasons, None


def nearest(samples: Tensor, images: np.ndarray) -> Tensor:
    """The nearest images, in Euclidean pixel distance, to samples (B, 3, H, W): the same shape."""
    flat = samples.permute(0, 2, 3, 1).flatten(1)  # (B, H W 3)
    best, where = torch.full((len(flat),), math.inf), torch.zeros(len(flat), dtype=torch.int64)
    for i in range(0, len(images), 4096):
        chunk = torch.from_numpy(images[i : i + 4096]).flatten(1).float() / 255
        distance, k = torch.cdist(flat, chunk).min(1)
        where = torch.where(distance < best, k + i, where)
        best = torch.minimum(best, distance)
    return to_float(torch.from_numpy(images[where.numpy()]))


# ----------------------------------------------------------------------------------------- table


def alike(results: list, but: str | None = None) -> list[list]:
    """Results (name, args, metrics) in groups that differ in seed, in place and in `but` alone."""
    groups = {}
    for result in results:
        settings = result[1]
        same = {k: v for k, v in settings.items() if k not in INCIDENTAL and k != but}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(result)
    return list(groups.values())


def table(results: list) -> str:
    """One row a run; seeds of a setting are followed by their mean and deviation, and the paper."""
    rows = [["run", *COLUMNS]]
    for group in alike(results):
        columns = []
        for key, factor, form in COLUMNS.values():
            found = [metrics[key] for _, _, metrics in group]
            values = [None if v is None else factor * v for v in found]
            column = ["-" if v is None else f"{v:{form}}" for v in values]
            if None in values:
                column.append("-")
            elif len(group) > 1:
                column.append(f"{np.mean(values):{form}} ± {np.std(values, ddof=1):{form}}")
            columns.append(column)
        names = [name for name, _, _ in group]
        if len(group) > 1:
            names.append(f"  mean of {len(group)} seeds")
        rows += [[name, *(c[i] for c in columns)] for i, name in enumerate(names)]
        settings = group[0][1]
        paper = PAPER.get(settings.get("dataset"), {}).get(settings.get("model"))
        if paper and (settings["codebook_size"], settings["code_dim"]) == (512, 16):
            shown = {"MSE x1000": paper[1], "per batch": paper[0], "FID": paper[2]}
            rows.append(["  paper, 150,000 steps", *(f"{shown.get(c, '')}" for c in COLUMNS)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for name, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        lines.append("  ".join([name.ljust(widths[0]), *padded]))
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------- figures

SWEPT = {
    "codebook_size": "codebook size K",
    "code_dim": "code dimension D",
    "beta": "weight of the KL, beta",
    "max_logit": "clamp of the logits",
    "tau_start": "first temperature",
}


class Figures:
    """The paper's figures that first-stage runs allow, as PNGs in a folder."""

    def __init__(self, results: list, usage: dict, args: Namespace):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        order = list(SYSTEMS)
        runs = [r for r in results if "model" in r[1]]
        self.runs = sorted(runs, key=lambda r: order.index(r[1]["model"]))
        self.plt, self.usage, self.args = plt, usage, args
        self.logs = {name: read_log(Path(name) / "log.jsonl") for name, _, _ in self.runs}
        models = [settings["model"] for _, settings, _ in self.runs]
        self.label, self.colour = {}, {}
        for i, (name, settings, _) in enumerate(self.runs):
            only_one = models.count(settings["model"]) == 1
            self.label[name] = settings["model"] if only_one else Path(name).name
            self.colour[name] = f"C{i}"
        args.figures.mkdir(parents=True, exist_ok=True)

    def save(self, figure, name: str):
        path = self.args.figures / name
        figure.savefig(path, dpi=110, bbox_inches="tight")
        self.plt.close(figure)
        print(f"wrote {path}")

    def lines(self, name: str, key: str, test: bool) -> list[dict]:
        return [x for x in self.logs[name] if ("split" in x) == test and x.get(key) is not None]

    def training(self):
        """Perplexity and error of the test split over training; high early errors are cut off."""
        figure, axes = self.plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
        last = []
        for name in self.label:
            lines = self.lines(name, "mse", test=True)
            if not lines:  # stopped before its first test
                continue
            for axis, key, factor in zip(axes, ("perplexity", "mse"), (1, 1000)):
                steps, values = [x["step"] for x in lines], [factor * x[key] for x in lines]
                axis.plot(steps, values, "o-", color=self.colour[name], label=self.label[name])
            last.append(1000 * lines[-1]["mse"])
        if not last:
            self.plt.close(figure)
            return
        for axis, y in zip(axes, ("perplexity", "MSE x 1000")):
            axis.set(xlabel="step", ylabel=f"{y}, test split")
        axes[1].set_ylim(0.95 * min(last), 1.5 * max(last))
        axes[0].legend()
        self.save(figure, "training.png")

    def entropy(self):
        """Figure 2a: entropy of pi over training, mean and standard deviation over positions."""
        figure, axis = self.plt.subplots(figsize=(6, 3.6), layout="constrained")
        for name in self.label:
            lines = self.lines(name, "entropy_mean", test=False)
            columns = [[x[k] for x in lines] for k in ("step", "entropy_mean", "entropy_std")]
            step, mean, std = map(np.array, columns)
            if len(step):
                axis.plot(step, mean, color=self.colour[name], label=self.label[name])
                low = np.maximum(0, mean - std)
                axis.fill_between(step, low, mean + std, color=self.colour[name], alpha=0.2)
        if not axis.lines:
            self.plt.close(figure)
            return
        axis.set(xlabel="step", ylabel="entropy of pi (nats)")
        axis.set_title("Entropy in training, mean and deviation")
        axis.legend()
        self.save(figure, "entropy.png")

    def entropy_maps(self):
        """Figure 2b: the same for each position of the first test image."""
        maps = {name: self.lines(name, "entropy_map", test=True) for name in self.label}
        maps = {name: lines for name, lines in maps.items() if lines}
        if not maps:
            return
        columns = min(6, *map(len, maps.values()))
        size = (1.8 * columns + 1, 1.9 * len(maps) + 0.4)
        figure, axes = self.plt.subplots(
            len(maps), columns, figsize=size, squeeze=False, layout="constrained"
        )
        top = max(np.max(line["entropy_map"]) for lines in maps.values() for line in lines)
        for row, (name, lines) in zip(axes, maps.items()):
            for axis, k in zip(row, np.linspace(0, len(lines) - 1, columns).round().astype(int)):
                shown = axis.imshow(lines[k]["entropy_map"], vmin=0, vmax=top)
                axis.set(xticks=[], yticks=[], title=f"step {lines[k]['step']:,}")
            row[0].set_ylabel(self.label[name])
        figure.colorbar(shown, ax=axes, label="entropy (nats)")
        self.save(figure, "entropy-maps.png")

    def uncertainty(self):
        """Figure 3: uncertainty and perplexity over training."""
        for name, label in self.label.items():
            lines = self.lines(name, "uncertainty", test=False)
            if not lines:
                continue
            figure, left = self.plt.subplots(figsize=(6, 3.6), layout="constrained")
            right, step = left.twinx(), [x["step"] for x in lines]
            left.plot(step, [x["perplexity"] for x in lines], color="black")
            right.plot(step, [x["uncertainty"] for x in lines], color="gray")
            left.set(xlabel="step", title=f"{label}: perplexity and uncertainty in training")
            left.set_ylabel("perplexity of training codes")
            right.set_ylabel("uncertainty K/S", color="gray")
            self.save(figure, f"uncertainty-{Path(name).name}.png")

    def codebook_use(self):
        """How often each code is used, most used first."""
        figure, axis = self.plt.subplots(figsize=(6, 3.6), layout="constrained")
        for name, _, metrics in self.runs:
            share = self.usage[name].double().sort(descending=True).values
            share = (share / share.sum()).clamp(min=1e-7)
            numbers = f"perplexity {metrics['perplexity']:.0f}, {metrics['codes_used']} used"
            label = f"{self.label[name]}: {numbers}"
            axis.plot(range(1, len(share) + 1), share, color=self.colour[name], label=label)
        axis.set(xlabel="code, most used first", ylabel="share of positions", yscale="log")
        axis.set_title("Use of the codebook, test split")
        axis.legend()
        self.save(figure, "usage.png")

    def reconstructions(self):
        """Figures 4 and 5: the same test images by every model of the first run's dataset."""
        first = self.runs[0][1]
        same = [n for n, r, _ in self.runs if all(r[k] == first[k] for k in ("dataset", "size"))]
        x = to_float(torch.from_numpy(images_of(first, "test")[:10]))
        models = [load_vae(name) for name in same]
        used = {name: metrics["codes_used"] for name, _, metrics in self.runs}
        titles = [f"{self.label[name]}, {used[name]} codes" for name in same]
        rows = [model.decode(model.encode(x)) for model in models]
        self.rows({"input": x, **dict(zip(titles, rows))}, "reconstructions.png")

    def redrawn(self):
        """What pi knows: the least sure quarter of the codes drawn anew from pi, and from all."""
        for name, settings, metrics in self.runs:
            if metrics["entropy_mean"] is None:
                continue
            x = to_float(torch.from_numpy(images_of(settings, "test")[:10]))
            model = load_vae(name)
            with torch.no_grad():
                pi = model.quantizer.probabilities(model.z_e(x))  # (B, N, N, K)
            entropy = torch.special.entr(pi).sum(-1)  # (B, N, N)
            unsure = entropy >= entropy.flatten(1).quantile(0.75, 1)[:, None, None]
            codes, generator = model.encode(x), torch.Generator().manual_seed(0)
            drawn = pi.flatten(0, 2).multinomial(1, generator=generator).view_as(codes)
            evenly = torch.randint(pi.shape[-1], codes.shape, generator=generator)
            rows = {"input": x, "entropy of pi": entropy, "reconstruction": model.decode(codes)}
            rows["least sure 25%,\ndrawn from pi"] = model.decode(torch.where(unsure, drawn, codes))
            rows["least sure 25%,\ndrawn evenly"] = model.decode(torch.where(unsure, evenly, codes))
            self.rows(rows, f"redrawn-{Path(name).name}.png")

    def rows(self, rows: dict, file: str):
        """A row for each title: images (B, 3, H, W) with their MSE to the first row, or maps."""
        first = next(iter(rows.values()))
        figure, axes = self.plt.subplots(
            len(rows),
            len(first),
            figsize=(len(first), len(rows)),
            squeeze=False,
            layout="constrained",
        )
        for line, (title, row) in zip(axes, rows.items()):
            if row.ndim == 4:
                error = 1000 * (row - first).square().mean()
                title += f"\nMSE x 1000: {error:.1f}" if error else ""
                row = row.permute(0, 2, 3, 1)  # (B, H, W, 3)
            else:
                title += f"\n0 to {row.max():.1f} nats"
            for axis, image in zip(line, row):
                axis.imshow(image.numpy(), vmin=0, vmax=row.max().item())
                axis.set(xticks=[], yticks=[])
            line[0].set_ylabel(title, rotation=0, ha="right", va="center")
        self.save(figure, file)

    def sweeps(self):
        """Figures 6, E.10, Table E.5, Section E.1: a line for runs alike in all but one setting."""
        for setting, title in SWEPT.items():
            groups = alike(self.runs, but=setting)
            groups = [g for g in groups if len({settings[setting] for _, settings, _ in g}) > 1]
            if groups:
                self.sweep(setting, title, groups)

    def sweep(self, setting: str, title: str, groups: list):
        runs = [group[0][1] for group in groups]
        names = [k for k in runs[0] if k not in INCIDENTAL and k != setting]
        values = {k: {str(settings.get(k)) for settings in runs} for k in names}
        differ = [k for k in names if len(values[k]) > 1] or ["model"]
        figure, axes = self.plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
        for group in groups:
            points = {}  # setting: (perplexity, MSE x 1000) of each seed
            for _, settings, metrics in group:
                numbers = metrics["perplexity"], 1000 * metrics["mse"]
                points.setdefault(float(settings[setting]), []).append(numbers)
            label = ", ".join(f"{k} {group[0][1][k]}" for k in differ)
            finite = sorted(x for x in points if x < math.inf)
            for i, axis in enumerate(axes):
                means = [np.mean(points[x], 0)[i] for x in finite]
                (line,) = axis.plot(finite, means, "o-", label=label)
                if math.inf in points:  # no clamp: a level and not a point
                    level, style = np.mean(points[math.inf], 0)[i], dict(linestyle=":")
                    axis.axhline(level, color=line.get_color(), label=f"{label}: none", **style)
        scale = "linear" if setting in ("max_logit", "tau_start") else "log"
        for axis, y in zip(axes, ("perplexity", "MSE x 1000")):
            axis.set(xlabel=title, ylabel=y, xscale=scale)
        axes[0].legend()
        self.save(figure, f"sweep-{setting.replace('_', '-')}.png")

    def draw(self):
        self.training()
        self.entropy()
        self.entropy_maps()
        self.uncertainty()
        self.codebook_use()
        self.reconstructions()
        self.redrawn()
        self.sweeps()


def measure_runs(argv):
    args = parser().parse_args(argv)
    args.device, _ = prepare_device(args.device)
    runs, steps = {}, {}
    for folder in args.runs:  # all are read before any work
        if folder.is_file():
            raise UserError(f"{folder} is a file; name the run's folder")
        checkpoint = load_checkpoint(folder)
        runs[folder], steps[folder] = checkpoint["args"], checkpoint["step"]
        runs[folder]["data_dir"] = args.data_dir or runs[folder]["data_dir"]
    if args.figures and not importlib.util.find_spec("matplotlib"):
        raise UserError("--figures needs the package matplotlib: pip install matplotlib")
    if args.figures and not any("model" in settings for settings in runs.values()):
        raise UserError("--figures needs a run of train_vae.py")
    inception = find_inception(args) if args.fid else None
    results, usage = [], {}
    for folder, settings in runs.items():
        measure = measure_vae if "model" in settings else measure_prior
        metrics, reasons, usage[str(folder)] = measure(folder, settings, args, inception)
        for name, value in metrics.items():
            if isinstance(value, float) and not math.isfinite(value):
                metrics[name] = None
        metrics["step"] = steps[folder]
        if not args.fid:
            metrics |= earlier_fid(folder, metrics)
        metrics |= {name: None for name in METRICS if name not in metrics}
        missing = [name for name, value in metrics.items() if value is None]
        metrics["not_measured"] = {name: reasons.get(name, "not finite") for name in missing}
        with atomic_write(folder / "metrics.json") as f:
            f.write((json.dumps(metrics, indent=1) + "\n").encode())
        results.append((str(folder), settings, metrics))
    print(table(results))
    for name, _, metrics in results:
        protocol = metrics.get("fid_protocol")
        print(f"{name}: FID of {protocol}" if protocol else f"{name}: FID not measured (add --fid)")
        if "samples" in metrics:
            drawn = f"{metrics['compared']} samples {metrics['perplexity_samples']:.1f}"
            data = f"as many test maps {metrics['perplexity_data']:.1f}"
            print(f"{name}: perplexity of the codes of {drawn}, of {data}; see {name}/nearest.png")
    if args.figures:
        Figures(results, usage, args).draw()


def main(argv=None):
    run_script("evaluate.py", measure_runs, argv)


if __name__ == "__main__":
    main()
