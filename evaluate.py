"""Stage 4: every measurement of the paper, for any runs.

    python evaluate.py runs/A runs/B                     # one table; metrics.json in each run
    python evaluate.py runs/A runs/prior-A-1 --fid       # with FID, by the 2015 Inception
    python evaluate.py runs/A runs/B --figures figures   # the paper's figures; needs matplotlib

A run that cannot be measured does not stop the others; the exit code is 2 then.

For a run of train_vae.py, over its test split with hard codes (or --codes sample):
    mse                   mean (x_hat - x)^2 over all elements, [0, 1] scale
    perplexity            exp of the entropy of the codes' frequencies, pooled over the split
    perplexity_batch128   the same for each 128 images, averaged, a shorter rest left out: the
                          paper's protocol. It reads low if 128 images have few positions.
    codes_used            how many codes occur
    kl                    KL[q || uniform], mean over positions, nats
    entropy_mean, _std    of pi, over positions, nats
    uncertainty           mean u = K / S
    rfid                  FID of the split's reconstructions against the split
For a run of train_prior.py: prior_nats_per_code on the test split, the perplexity of samples beside
that of as many test maps, and fid of -n samples against the training split.
What was not measured, or does not exist for a model, is null. What --fid measured stays in
metrics.json as long as the checkpoint does. Runs that differ in their seed alone are followed by
their mean and deviation.
"""

import argparse
import functools
import hashlib
import json
import os
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

from train_prior import checkpoint_digest, load_codes, load_prior, nats_per_code
from train_vae import (
    DEFAULTS,
    Meter,
    UserError,
    atomic_write,
    in_one_line,
    load_checkpoint,
    load_images,
    load_vae,
    path_flag,
    perplexity,
    prepare_device,
    read_log,
    run_script,
    test_pass,
    to_float,
    tune_cpu,
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
METRICS = [*(key for key, *_ in COLUMNS.values()), "kl", "entropy_std"]  # always in metrics.json
# Settings that are ignored when runs are grouped.
INCIDENTAL = {
    *("seed", "data_dir", "out", "resume", "device", "compile", "vae", "vae_relative"),
    *("log_every", "eval_every", "profile", "environment", "resumed"),  # the last: of old runs
}


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser("evaluate.py", description=__doc__, formatter_class=raw)
    flag = p.add_argument
    run_help = "a run's folder, of train_vae.py or train_prior.py, or a checkpoint such as x.pt"
    flag("runs", type=path_flag, nargs="+", metavar="RUN", help=run_help)
    codes_help = "take hard codes (default), or draw each code from pi (Alg. 2)"
    flag("--codes", choices=("argmax", "sample"), default="argmax", help=codes_help)
    flag("--fid", action="store_true", help="measure FID and rFID too")
    flag("--inception", type=path_flag, help=f"read {INCEPTION} here (or download it)")
    flag("-n", type=int, default=50_000, help="draw this many for a prior's FID (default 50000)")
    flag("--seed", type=int, default=0, help="seed what is drawn at random (default 0)")
    flag("--figures", type=path_flag, help="write the figures that these runs allow in this folder")
    data_help = "look for the data here (default: where each run found it)"
    flag("--data-dir", type=path_flag, help=data_help)
    flag("--device", help="run on cpu, cuda, ... (default: cuda where there is one)")
    return p


def beside(path: Path, name: str) -> Path:
    """A file of a run: in its folder, or beside its checkpoint x.pt as x-name."""
    return path / name if path.is_dir() else path.with_name(f"{path.stem}-{name}")


def split_of(settings: dict, split: str) -> tuple:
    """What load_images takes for a split of a run's data."""
    return settings["dataset"], split, settings["data_dir"], settings["size"]


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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix="6726825d")
    except (OSError, RuntimeError) as e:
        cure = "get it elsewhere and name it by --inception"
        raise UserError(f"{INCEPTION} could not be downloaded ({e}); {cure}") from None
    return InceptionFeatures(path).to(args.device)


@functools.cache  # for all runs of a call
def moments_of(inception: InceptionFeatures, *split) -> Moments:
    images, moments = load_images(*split), Moments()
    for i in range(0, len(images), 64):
        moments.add(inception(torch.from_numpy(images[i : i + 64]).permute(0, 3, 1, 2)))
    return moments


def fid(moments: Moments, inception, settings: dict, split: str) -> tuple[float, str]:
    """FID of a stream of images against a split of a run's data, and its protocol in words."""
    reference = moments_of(inception, *split_of(settings, split))
    against = f"against the {split} split's {reference.n}, weights {inception.digest}"
    if min(moments.n, reference.n) < 2048:
        against += "; under 2,048 images the covariance is singular and FID means little"
    distance = frechet_distance(*moments.read(), *reference.read())
    return distance, f"FID of {moments.n} images {against}"


# ------------------------------------------------------------------------------------ measurements


class Result(NamedTuple):
    """A run and what was measured of it."""

    path: Path
    settings: dict
    metrics: dict


def measure(path: Path, args: Namespace, inception) -> Result:
    """All that is asked for of one run."""
    checkpoint = load_checkpoint(path)
    settings, of_kind = checkpoint["args"], measure_prior
    if "model" in settings:
        settings, of_kind = DEFAULTS | settings, measure_vae  # an old run's may lack some
    trained_on = os.path.abspath(settings["data_dir"])
    settings["data_dir"] = str(args.data_dir or settings["data_dir"])
    metrics = of_kind(path, settings, args, inception)
    folder = trained_on if settings["dataset"] == "folder" else None  # there it is the data set
    settings |= dict(folder=folder, step=checkpoint.get("step"))
    metrics |= dict(checkpoint=checkpoint_digest(path), data_dir=settings["data_dir"])
    try:
        earlier = dict(json.loads(beside(path, "metrics.json").read_text()))
    except (OSError, ValueError, TypeError):  # none, or a damaged one: it is written anew
        earlier = {}
    if all(earlier.get(k) == metrics.get(k) for k in ("checkpoint", "codes", "data_dir")):
        kept = ("fid", "rfid", "fid_protocol")
        metrics = {k: earlier[k] for k in kept if earlier.get(k)} | metrics
    text = json.dumps(dict.fromkeys(METRICS) | metrics)
    metrics = json.loads(text, parse_constant=lambda _: None)  # nan and inf become null
    return Result(path, settings, metrics)


@torch.no_grad()
def measure_vae(path: Path, settings: dict, args: Namespace, inception) -> dict:
    """A first stage's metrics."""
    images, model = load_images(*split_of(settings, "test")), load_vae(path, args.device)
    K, generator = settings["codebook_size"], torch.Generator(args.device).manual_seed(args.seed)
    meter, moments, codes = Meter(K, args.device), Moments(), []
    for x, z_e, loss, q, x_hat in test_pass(model, images, model.args):
        if args.codes == "sample":
            pi = model.quantizer.probabilities(z_e).flatten(0, 2)
            q = q._replace(indices=pi.multinomial(1, generator=generator).view_as(q.indices))
            x_hat = model.reconstruct(model.quantizer.vectors()[q.indices])
        meter.add(loss, F.mse_loss(x_hat, x), q)
        codes.append(q.indices.cpu())
        if inception:
            moments.add(inception(to_uint8(x_hat)))
    metrics, codes = meter.flush(), torch.cat(codes)  # (count, N, N)
    del metrics["loss"]  # its beta is not the run's
    groups = [group.flatten() for group in codes.split(128) if len(group) == 128]
    if groups:
        metrics["perplexity_batch128"] = np.mean([perplexity(g.bincount()) for g in groups])
    metrics["codes"] = args.codes
    if inception:
        metrics["rfid"], metrics["fid_protocol"] = fid(moments, inception, settings, "test")
    return metrics


@torch.no_grad()
def measure_prior(path: Path, settings: dict, args: Namespace, inception) -> dict:
    """A prior's metrics."""
    prior = load_prior(path, args.device)
    vae, K = load_vae(prior.args.vae, args.device), settings["codebook_size"]
    settings |= dict(dataset=vae.args.dataset, size=vae.args.size)
    test = load_codes(prior.args.vae, "test", K, settings["data_dir"], args.device)  # (B, N, N)
    n = args.n if inception else min(256, len(test))
    codes = prior.sample(n, seed=args.seed)  # (n, N, N)
    metrics = dict(
        prior_nats_per_code=nats_per_code(prior, test),
        # Of as many maps, for the same bias.
        perplexity_samples=perplexity(codes[: len(test)].flatten().bincount()),
        perplexity_data=perplexity(test[:n].flatten().bincount()),
    )
    if inception:
        moments = Moments()
        for part in codes.split(vae.args.batch_size):
            moments.add(inception(to_uint8(vae.decode(part))))
            print(f"\r{path}: {moments.n:,} of {n:,} samples", end="", flush=True)
        print()
        metrics["fid"], metrics["fid_protocol"] = fid(moments, inception, settings, "train")
    return metrics


# ------------------------------------------------------------------------------------------- table


def alike(results: list, but: str | None = None) -> list[list]:
    """Results in groups that differ only in `but` and in what INCIDENTAL lists."""
    groups = {}
    for r in results:
        same = {k: v for k, v in r.settings.items() if k not in INCIDENTAL and k != but}
        groups.setdefault(json.dumps(same, sort_keys=True, default=str), []).append(r)
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
        named = {str(r.path): [r] for r in group}
        if len(group) > 1:
            named[f"  mean of {len(group)} runs"] = group
        for name, runs in named.items():
            columns = COLUMNS.values()
            cells = [cell([r.metrics[key] for r in runs], *how) for key, *how in columns]
            rows.append([name, *cells])
        settings = group[0].settings
        paper = paper_of(settings)
        if paper:
            shown = {"MSE x1000": paper[1], "per batch": paper[0], "FID": paper[2]}
            name = f"  paper's {settings['model']}, 150,000 steps"
            rows.append([name, *(f"{shown.get(column, '')}" for column in COLUMNS)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(line) for line in lines)


def cell(values: list, factor: float, form: str) -> str:
    """A metric of one run, or the mean and deviation of several; "-" if one was not measured."""
    if None in values:
        return "-"
    mean = f"{factor * np.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} +- {factor * np.std(values, ddof=1):{form}}"


# ----------------------------------------------------------------------------------------- figures

# Panels of curves: a title, and the key of log.jsonl.
TEST_CURVES = {"test perplexity": "perplexity", "test MSE x 1000": "mse"}
PI_CURVES = {
    "entropy of pi, nats": "entropy_mean",
    "uncertainty K/S": "uncertainty",
    "training perplexity": "perplexity",
}
SWEPT = ("codebook_size", "code_dim", "beta", "max_logit", "tau_start")


def labels_of(runs: list[Result]) -> dict[Path, str]:
    """For figures: a run's model, if that tells all settings apart; else its path's last parts."""
    models = [group[0].settings["model"] for group in alike(runs)]
    if 1 < len(models) == len({*models}):
        return {r.path: as_text(r.settings["model"]) for r in runs}
    for depth in range(1, 1 + max(len(r.path.absolute().parts) for r in runs)):
        labels = {r.path: as_text("/".join(r.path.absolute().parts[-depth:])) for r in runs}
        if len({*labels.values()}) == len(runs):
            break
    return labels


def as_text(name: str) -> str:
    """A name that matplotlib shows as it is: `$` would begin a formula, `_` hide a label."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


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
            from matplotlib.figure import Figure  # pyplot would change a notebook's state
        except ImportError:
            raise UserError("figures need matplotlib: pip install matplotlib") from None
        self.Figure, self.folder = Figure, folder

    def draw(self, runs: list[Result]):
        """runs: of train_vae.py, at least one."""
        self.labels, first = labels_of(runs), {}
        for r in runs:
            first.setdefault(self.labels[r.path], r)  # of the seeds of one label
        self.colors = {label: f"C{i}" for i, label in enumerate(first)}
        self.logs = {r.path: self.read_log(r.path) for r in runs}
        with_pi = [r for r in runs if r.metrics["entropy_mean"] is not None]
        self.curves("training", runs, TEST_CURVES, test=True)
        self.curves("entropy-uncertainty", with_pi, PI_CURVES, test=False)
        self.entropy_maps(first.values())
        self.reconstructions(first.values())
        for setting in SWEPT:
            self.sweep(setting, runs)

    def read_log(self, path: Path) -> list[dict]:
        try:
            return read_log(beside(path, "log.jsonl"))
        except (UserError, OSError, ValueError) as e:
            print(f"{path}: no curves, its log.jsonl cannot be read ({e})", file=sys.stderr)
            return []

    def lines(self, r: Result, key: str, test: bool) -> list[dict]:
        """The lines of a run's log that have this key, of training or of the test split."""
        return [x for x in self.logs[r.path] if ("split" in x) == test and x.get(key) is not None]

    def axes(self, rows: int, columns: int, size: tuple) -> tuple:
        """A figure and its axes (rows, columns)."""
        figure = self.Figure(size, layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False)

    def save(self, figure, axis, name: str):
        """Writes a figure with the legend of this axis beside it, unless the axis is empty."""
        if not axis.has_data():
            return
        handles, labels = axis.get_legend_handles_labels()
        legend = dict(zip(labels, handles))  # each label once
        if legend:
            figure.legend([*legend.values()], [*legend], loc="outside right upper")
        figure.savefig(self.folder / f"{name}.png", dpi=160, bbox_inches="tight")
        print(f"wrote {self.folder / name}.png")

    def curves(self, name: str, runs: list[Result], panels: dict, test: bool):
        """Over training: Figures 2a and 3, and the test split with the paper's last values."""
        figure, (axes,) = self.axes(1, len(panels), (3.7 * len(panels) + 2, 2.7))
        for axis, (title, key) in zip(axes, panels.items()):
            factor, ends = 1000 if key == "mse" else 1, []
            for r in runs:
                lines, label = self.lines(r, key, test), self.labels[r.path]
                if not lines:  # stopped before its first test, or not defined
                    continue
                color = self.colors[label]
                step, value = np.array([(x["step"], factor * x[key]) for x in lines]).T
                marker = "o" if len(lines) == 1 else ""  # one point makes no line
                axis.plot(step, value, marker=marker, color=color, label=label)
                ends.append(value[-1])
                if key == "entropy_mean":  # and the deviation over positions
                    std = np.array([x["entropy_std"] for x in lines])
                    low = np.maximum(0, value - std)
                    axis.fill_between(step, low, value + std, color=color, alpha=0.2)
                if test and paper_of(r.settings):
                    ends.append(paper_of(r.settings)[key == "mse"])
                    axis.axhline(ends[-1], color=color, linestyle="--")
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
                title = f"{self.labels[r.path]}, nats\nsteps {first:,} to {last:,}"
                rows[title] = torch.tensor([x["entropy_map"] for x in lines])
        if rows:
            self.rows("entropy-maps", rows, top=max(row.max() for row in rows.values()))

    def reconstructions(self, runs: list[Result]):
        """Figures 4 and 5: the same test images by every model; a picture for each data set."""
        pictures = {}
        for r in runs:
            split, model = split_of(r.settings, "test"), load_vae(r.path)
            x = to_float(torch.from_numpy(load_images(*split)[:10]))
            title = f"{self.labels[r.path]}, {r.metrics['codes_used']} codes"
            pictures.setdefault(split, {"input": x})[title] = model.decode(model.encode(x))
        for i, ((dataset, *_), rows) in enumerate(pictures.items(), 1):
            number = f"-{i}-{dataset}" if len(pictures) > 1 else ""
            self.rows(f"reconstructions{number}", rows)

    def rows(self, name: str, rows: dict, top=None):
        """A row for each title: images (B, 3, H, W), with their MSE to the first row, or maps.

        top: where the colors of maps end (default: at the row's highest).
        """
        first = next(iter(rows.values()))
        size = (0.9 * len(first) + 2, 0.95 * len(rows))
        figure, axes = self.axes(len(rows), len(first), size)
        for line, (title, row) in zip(axes, rows.items()):
            if row.ndim == 3:
                title += f"\n{row.min():.2g} to {row.max():.2g}"
                low, high = min(0, row.min()), top or row.max()
            else:
                error = 1000 * (row - first).square().mean()
                title += "" if row is first else f"\nMSE x 1000: {error:.1f}"
                low, high, row = 0, 1, row.permute(0, 2, 3, 1)  # (B, H, W, 3)
            line[0].set_ylabel(title, rotation=0, ha="right", va="center")
            for axis, image in zip(line, row):
                axis.imshow(image.numpy(), vmin=low, vmax=high)
                axis.set(xticks=[], yticks=[])
        self.save(figure, axes[0, 0], name)

    def sweep(self, setting: str, runs: list[Result]):
        """Figures 6, E.10, Table E.5, Section E.1: a line for runs alike in all but one setting."""
        groups = [g for g in alike(runs, setting) if len({r.settings[setting] for r in g}) > 1]
        first = [group[0].settings for group in groups]
        labels = [settings["model"] for settings in first]
        if len({*labels}) < len(labels):  # models recur: what tells the lines apart
            keys = [k for k in first[0] if k not in INCIDENTAL and k != setting]
            keys = [k for k in keys if len({str(settings.get(k)) for settings in first}) > 1]
            labels = [", ".join(f"{k} {settings.get(k)}" for k in keys) for settings in first]
        ticks = sorted({r.settings[setting] for group in groups for r in group})
        figure, (axes,) = self.axes(1, 2, (9.4, 2.7))
        for axis, key, factor in zip(axes, ("perplexity", "mse"), (1, 1000)):
            for group, label in zip(groups, labels):
                points = {}  # evenly spaced, as a clamp can be infinite; the values of each seed
                for r in group:
                    at = ticks.index(r.settings[setting])
                    points.setdefault(at, []).append(factor * r.metrics[key])
                at, means = zip(*sorted((at, np.mean(values)) for at, values in points.items()))
                axis.plot(at, means, "o-", label=as_text(label))
            axis.set_xticks(range(len(ticks)), [f"{tick:g}" for tick in ticks])
            axis.set(xlabel=setting.replace("_", " "), ylabel="MSE x 1000" if key == "mse" else key)
        if setting == "codebook_size" and groups:
            axes[0].plot(range(len(ticks)), ticks, "k--", label="all codes alike")
            axes[0].set(yscale="log")
        self.save(figure, axes[0], f"sweep-{setting.replace('_', '-')}")


# -------------------------------------------------------------------------------------------- main


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
        except Exception as e:  # of any kind: it must not take the other runs' table with it
            kind = "" if isinstance(e, (UserError, OSError)) else f"{type(e).__name__}: "
            complaints.append(f"{path}: {kind}{in_one_line(e)}")
    if results:
        print(table(results))
    for r in results:
        if "fid_protocol" in r.metrics:
            print(f"{r.path}: {r.metrics['fid_protocol']}")
        if "perplexity_samples" in r.metrics:
            drawn, data = r.metrics["perplexity_samples"], r.metrics["perplexity_data"]
            print(f"{r.path}: perplexity of samples {drawn:.1f}, of as many test maps {data:.1f}")
    runs = [r for r in results if "model" in r.settings and r.metrics["mse"] is not None]
    if figures and runs:
        figures.draw(runs)
    if figures and len(runs) < len(results):
        print("no figures of priors, nor of runs without a finite error", file=sys.stderr)
    if complaints:
        raise UserError("\n".join(complaints))


def main(argv=None):
    run_script("evaluate.py", measure_runs, argv)


if __name__ == "__main__":
    tune_cpu()
    main()
