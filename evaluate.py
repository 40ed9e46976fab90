"""Stage 4: every measurement of the paper, for any runs.

    python evaluate.py runs/A runs/B                   # one table, beside the paper's rows; metrics.json in each run
    python evaluate.py runs/A runs/prior-A-1 --fid     # with FID, by the 2015 Inception (downloaded once, hash checked)
    python evaluate.py runs/A runs/B --figures figures # the paper's figures from these runs (needs matplotlib)

For a run of train_vae.py, in one pass over its test split with the codes in use:
    mse                 mean (x_hat - x)^2 over all elements, [0, 1] scale
    perplexity          exp of the entropy of the codes' frequencies, pooled over the split: the number to compare
    perplexity_batch128 the same for each batch of 128 images, averaged, the last short one dropped: the paper's
                        protocol, which reads low where a batch has few positions for its K
    entropy, uncertainty  of pi per position (nats) and K / S
    rfid                FID of the split's reconstructions against the split
For a run of train_prior.py: prior_nats_per_code on the test split, and fid of -n samples against the training split.
Runs that differ in their seed alone are also shown as mean and standard deviation.
"""
import argparse
import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import train_prior
import train_vae as tv
from train_vae import UserError, number

# Tables 1, 2 and 3 of the paper, 512 x 16, mean of three seeds: perplexity (per batch), MSE x 1000, FID.
PAPER = {
    "cifar10": {
        "vqvae-ema": (412.67, 3.21, 57.04), "gs-vqvae": (208.33, 3.63, 56.35), "sq-vae": (407.33, 4.01, 54.17),
        "vq-ste++": (414.33, 3.82, 55.53), "dvae": (190.33, 3.42, 58.85), "edvae": (420.33, 2.99, 51.82)},
    "celeba": {
        "vqvae-ema": (405.33, 1.07, 34.30), "gs-vqvae": (193.33, 1.32, 33.12), "sq-vae": (409.33, 1.05, 33.03),
        "vq-ste++": (370.33, 1.11, 32.98), "dvae": (254.67, 1.01, 37.29), "edvae": (371.33, 0.89, 32.51)},
    "lsun-church": {
        "vqvae-ema": (379.67, 1.71, 71.22), "gs-vqvae": (189.67, 1.84, 72.52), "sq-vae": (374.00, 1.79, 63.41),
        "vq-ste++": (375.67, 1.83, 71.03), "dvae": (363.33, 1.60, 71.32), "edvae": (385.67, 1.58, 69.63)},
}
WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + WEIGHTS
KEYS = ("mse", "perplexity", "perplexity_batch128", "codes_used", "entropy_mean", "entropy_std", "uncertainty", "fid",
        "rfid", "prior_nats_per_code")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = p.add_argument
    flag("runs", type=Path, nargs="+", metavar="RUN", help="folders of train_vae.py and train_prior.py")
    flag("--data-dir", type=Path, help="where the data lies (default: where each run found it)")
    flag("--codes", choices=("argmax", "sample"), default="argmax", help="argmax: the codes in use, as the paper's "
         "numbers; sample: one draw from pi, as its Algorithm 2 (default argmax)")
    flag("--fid", action="store_true", help="measure FID too")
    flag("--inception", type=Path, metavar="FILE", help=f"{WEIGHTS}, for --fid (default: downloaded once to "
         "~/.cache/edvae)")
    flag("-n", type=tv.COUNT, default=50_000, help="samples for a prior's FID (default 50000)")
    flag("--figures", type=Path, metavar="DIR", help="write the figures that these runs allow; needs matplotlib")
    flag("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="of what is drawn (default 0)")
    flag("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    return p


# ------------------------------------------------------------------------------------------------------------------ FID

class InceptionFeatures(nn.Module):
    """uint8 images (B, 3, H, W) to the 2048 pool features of TensorFlow's 2015 Inception, float32: FID's definition.

    path: the weights in pytorch-fid's layout, whose keys are torchvision's. Three kinds of block differ: their average
    pools leave the padding out of the mean, and the last block's pool takes the maximum, a quirk of the original graph.
    """

    def __init__(self, path):
        super().__init__()
        self.net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False,
                                                   transform_input=False)
        try:
            self.net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as e:
            what = tv.first_line(e)
            raise UserError(f"{path} does not hold the 2015 Inception's weights ({what})") from None
        self.digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]
        for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
            self.repool(name, lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
        self.repool("7c", lambda x: F.max_pool2d(x, 3, 1, 1))
        self.net.fc = nn.Identity()
        self.eval()

    def repool(self, name: str, pool):
        block = getattr(self.net, f"Mixed_{name}")
        branches = block._forward                                                  # gives a list, its pool branch last
        block._forward = lambda x: [*branches(x)[:-1], block.branch_pool(pool(x))]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(images.float() / 255, size=(299, 299), mode="bilinear", align_corners=False)
        return self.net(2 * x - 1)                                                 # (B, 2048)


class Moments:
    """Mean and covariance of a stream of feature vectors, in float64."""

    def __init__(self):
        self.n, self.sum, self.outer = 0, 0.0, 0.0

    def add(self, x: Tensor):
        x = x.double()
        self.n, self.sum, self.outer = self.n + len(x), self.sum + x.sum(0), self.outer + x.T @ x

    def read(self) -> tuple:
        if self.n < 2:
            raise UserError("FID compares covariances: it needs at least 2 images on either side")
        mean = self.sum / self.n
        return mean, (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)


def frechet_distance(mu1, cov1, mu2, cov2) -> float:
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), float64: means (D), covariances (D, D), tensors or arrays.

    tr (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of A C2 A, A = C1^(1/2): symmetric, so nothing complex.
    """
    mu1, cov1, mu2, cov2 = (torch.as_tensor(x, dtype=torch.float64) for x in (mu1, cov1, mu2, cov2))
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    roots = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt()
    return ((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * roots.sum()).item()


def to_uint8(images: Tensor) -> Tensor:
    """[0, 1] to uint8, rounded, as a saved picture would be."""
    return (images.clamp(0, 1) * 255).round().byte()


def find_inception(args) -> Path:
    if args.inception:
        if not args.inception.is_file():
            raise UserError(f"--inception {args.inception} is not a file")
        return args.inception
    path = Path.home() / ".cache" / "edvae" / WEIGHTS
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(WEIGHTS_URL, str(path), hash_prefix="6726825d")
        except (OSError, RuntimeError) as e:
            raise UserError(f"{WEIGHTS} could not be downloaded ({tv.first_line(e)}); get it elsewhere and name "
                            f"it by --inception") from None
    return path


def reference(inception, images: np.ndarray, cache: Path, device) -> tuple:
    """Mean and covariance of a data set's features, kept beside its images under the weights' hash."""
    if not cache.exists():
        moments = Moments()
        for i in range(0, len(images), 64):
            moments.add(inception(torch.from_numpy(np.array(images[i:i + 64])).permute(0, 3, 1, 2).to(device)))
        mean, cov = (x.cpu().numpy() for x in moments.read())
        with tv.whole(cache) as f:
            np.savez(f, mean=mean, cov=cov)
    with np.load(cache, allow_pickle=False) as kept:
        return kept["mean"], kept["cov"]


def warn_few(n: int):
    if n < 2048:
        print(f"warning: FID of {n} images: under 2,048 the covariance is singular and the number means little",
              file=sys.stderr)


# --------------------------------------------------------------------------------------------------------- measurements

@torch.no_grad()
def measure_vae(folder: Path, state: dict, args, inception) -> tuple:
    """The metrics of a first-stage run, and how often each code was used (K)."""
    run = state["args"]
    images = tv.load_images(run["dataset"], "test", args.data_dir or run["data_dir"], run["size"])
    model = tv.load_vae(folder, args.device)
    K, device = run["codebook_size"], args.device
    counts, batches, moments, squares = torch.zeros(K, dtype=torch.int64, device=device), [], Moments(), 0.0
    generator = torch.Generator(device).manual_seed(args.seed)
    entropies, uncertainties = [], []
    for i in range(0, len(images), 128):
        x = tv.to_float(torch.from_numpy(np.array(images[i:i + 128])).to(device))
        z_e = model.z_e(x)
        q = model.quantizer(z_e, torch.ones((), device=device), 1.0, 0)
        indices = q.indices
        if args.codes == "sample":
            indices = torch.multinomial(model.quantizer.probabilities(z_e).flatten(0, 2), 1, generator=generator)
            indices = indices.view(q.indices.shape)
        x_hat = model.x_hat(model.quantizer.codes()[indices])
        squares += (x_hat - x).double().square().sum().item()
        batch = torch.bincount(indices.flatten(), minlength=K)
        counts += batch
        if len(x) == 128:
            batches.append(tv.perplexity(batch))
        entropies.append(q.entropy.flatten().double()), uncertainties.append(q.uncertainty.flatten().double())
        if inception:
            moments.add(inception(to_uint8(x_hat)))
    entropy, used = torch.cat(entropies), int((counts > 0).sum())
    metrics = dict(mse=squares / images.size, perplexity=tv.perplexity(counts), codes_used=used, dead_codes=K - used,
                   perplexity_batch128=sum(batches) / len(batches) if batches else None, codes=args.codes,
                   entropy_mean=entropy.mean().item(), entropy_std=entropy.std(correction=0).item(),
                   uncertainty=torch.cat(uncertainties).mean().item())
    reasons = dict(fid="FID is of a prior's samples: give its run", prior_nats_per_code="give the prior's run")
    if not batches:
        reasons["perplexity_batch128"] = "the split has fewer than 128 images"
    if inception:
        warn_few(len(images))
        name = f"{run['dataset']}-test-{run['size']}-fid-{inception.digest}.npz"
        cache = Path(args.data_dir or run["data_dir"]) / name
        metrics["rfid"] = frechet_distance(*moments.read(), *reference(inception, images, cache, device))
        metrics["fid_protocol"] = (f"{len(images)} reconstructions against the test split, bilinear resize to 299, "
                                   f"weights {inception.digest}")
    else:
        reasons["rfid"] = args.no_fid
    for name in ("entropy_mean", "entropy_std", "uncertainty"):
        if not math.isfinite(metrics[name]):
            metrics[name], reasons[name] = None, f"not defined for {run['model']}"
    return metrics, reasons, counts.cpu()


@torch.no_grad()
def measure_prior(folder: Path, state: dict, args, inception) -> tuple:
    """The metrics of a prior's run; writes nearest.png, samples above their nearest training images."""
    run, prior = state["args"], train_prior.load_prior(folder, args.device)
    vae_folder = Path(run["vae"])
    vae, vae_run = tv.load_vae(vae_folder, args.device), tv.load_checkpoint(vae_folder)["args"]
    data_dir = args.data_dir or run["data_dir"]
    test = train_prior.load_codes(vae_folder, "test", data_dir, args.device)
    images = tv.load_images(vae_run["dataset"], "train", data_dir, vae_run["size"])
    how = argparse.Namespace(device=args.device, precision="fp32")
    metrics, reasons = dict(prior_nats_per_code=train_prior.nats_per_code(prior, test, how)), {}
    n, moments, counts = args.n if inception else 256, Moments(), torch.zeros(run["codebook_size"], dtype=torch.int64)
    first = None
    for start in range(0, n, 256):
        codes = prior.sample(min(256, n - start), seed=args.seed, first=start)
        counts += torch.bincount(codes.flatten().cpu(), minlength=len(counts))
        drawn = vae.decode(codes)
        first = drawn[:8] if first is None else first
        if inception:
            moments.add(inception(to_uint8(drawn)))
            print(f"\r{folder}: {start + len(codes):,} of {n:,} samples", end="", flush=True)
    data = torch.bincount(test[:n].flatten().cpu(), minlength=len(counts))         # as many maps: the same bias
    metrics |= dict(samples=n, perplexity_samples=tv.perplexity(counts), perplexity_data=tv.perplexity(data))
    flat = first.permute(0, 2, 3, 1).flatten(1).cpu()                              # nearest in squared pixel distance
    best, where = torch.full((len(flat),), math.inf), torch.zeros(len(flat), dtype=torch.int64)
    for i in range(0, len(images), 4096):
        chunk = torch.from_numpy(np.array(images[i:i + 4096])).flatten(1).float() / 255
        distance, k = tv.distances(flat, chunk).min(1)
        where, best = torch.where(distance < best, k + i, where), torch.minimum(best, distance)
    nearest = tv.to_float(torch.from_numpy(np.array(images[where.tolist()])))
    tv.save_grid(torch.cat([first.cpu(), nearest]), folder / "nearest.png", len(flat))
    if inception:
        print()
        warn_few(n)
        cache = Path(data_dir) / f"{vae_run['dataset']}-train-{vae_run['size']}-fid-{inception.digest}.npz"
        metrics["fid"] = frechet_distance(*moments.read(), *reference(inception, images, cache, args.device))
        metrics["fid_protocol"] = (f"{n} samples against the {len(images)} training images, bilinear resize to 299, "
                                   f"weights {inception.digest}")
    else:
        reasons["fid"] = args.no_fid
    return metrics, reasons | {k: "give the first stage's run" for k in KEYS if k not in (*metrics, "fid")}, None


# ---------------------------------------------------------------------------------------------------- table and figures

COLUMNS = {"MSE x1000": ("mse", 1000, "{:.2f}"), "perplexity": ("perplexity", 1, "{:.1f}"),
           "per batch": ("perplexity_batch128", 1, "{:.1f}"), "codes used": ("codes_used", 1, "{:.0f}"),
           "entropy": ("entropy_mean", 1, "{:.2f}"), "K/S": ("uncertainty", 1, "{:.2g}"), "rFID": ("rfid", 1, "{:.2f}"),
           "FID": ("fid", 1, "{:.2f}"), "nats/code": ("prior_nats_per_code", 1, "{:.3f}")}


APART = (*tv.FREE, "seed", "vae")  # what may differ between runs of one setting


def alike(results: list, but: str = None) -> list:
    """Runs (name, args, metrics) in groups that differ in seed, in where and how they ran, and in `but` alone."""
    groups = {}
    for name, run, metrics in results:
        same = {k: v for k, v in run.items() if k not in (*APART, but)}
        groups.setdefault(json.dumps(same, sort_keys=True, default=str), []).append((name, run, metrics))
    return list(groups.values())


def table(results: list) -> str:
    """results: (name, args, metrics) of each run. Seeds of one setting are followed by their mean and deviation."""
    rows = []
    for members in alike(results):
        for name, _, metrics in members:
            rows.append([name, *(f.format(s * metrics[k]) if metrics.get(k) is not None else "-"
                                 for k, s, f in COLUMNS.values())])
        if len(members) > 1:
            cells = []
            for k, scale, form in COLUMNS.values():
                values = [scale * m[k] for _, _, m in members if m.get(k) is not None]
                cells.append(f"{form.format(np.mean(values))} ± {form.format(np.std(values, ddof=1))}"
                             if len(values) == len(members) else "-")
            rows.append([f"  mean of {len(members)} seeds", *cells])
        run = members[0][1]
        paper = PAPER.get(run.get("dataset"), {}).get(run.get("model"))
        if paper:
            told = {"MSE x1000": paper[1], "per batch": paper[0], "FID": paper[2]}
            rows.append(["  paper, 150,000 steps", *(f"{told[c]:g}" if c in told else "" for c in COLUMNS)])
    rows.insert(0, ["run", *COLUMNS])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
                     for row in rows)


def draw_figures(results: list, usage: dict, args):
    """The paper's figures that these first-stage runs allow, as PNGs in args.figures, from the run folders alone."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--figures needs the optional package matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    runs = [(name, run, metrics) for name, run, metrics in results if "model" in run]
    logs = {name: tv.read_lines(Path(name) / "log.jsonl") for name, _, _ in runs}
    label = {name: run["model"] if sum(r["model"] == run["model"] for _, r, _ in runs) == 1 else Path(name).name
             for name, run, _ in runs}
    args.figures.mkdir(parents=True, exist_ok=True)

    def save(figure, name):
        figure.tight_layout()
        figure.savefig(args.figures / name, dpi=110, bbox_inches="tight")
        plt.close(figure)
        print(f"wrote {args.figures / name}")

    # Error and perplexity of the test split over training
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for name, _, _ in runs:
        lines = [line for line in logs[name] if "split" in line and line["mse"] is not None]
        for axis, key, scale in zip(axes, ("perplexity", "mse"), (1, 1000)):
            axis.plot([line["step"] for line in lines], [scale * line[key] for line in lines], "o-", label=label[name])
    for axis, y in zip(axes, ("perplexity", "MSE x 1000")):
        axis.set(xlabel="step", ylabel=f"{y}, test split")
    axes[0].legend()
    save(figure, "training.png")

    # Figure 2a: entropy of pi over training, mean and standard deviation over positions
    figure, axis = plt.subplots(figsize=(6, 4))
    for name, run, _ in runs:
        lines = [line for line in logs[name] if "split" not in line and line["entropy_mean"] is not None]
        step, mean, std = (np.array([line[k] for line in lines]) for k in ("step", "entropy_mean", "entropy_std"))
        if len(step):
            axis.plot(step, mean, label=label[name])
            axis.fill_between(step, np.maximum(0, mean - std), mean + std, alpha=0.2)
    axis.set(xlabel="step", ylabel="entropy of pi (nats)", title="Entropy of the code probabilities in training")
    axis.legend()
    save(figure, "entropy.png")

    # Figure 2b: the same for each position of the first test image
    maps = {name: [line for line in logs[name] if line.get("entropy_map")] for name, _, _ in runs}
    maps = {name: lines for name, lines in maps.items() if lines}
    if maps:
        columns = min(6, min(map(len, maps.values())))
        figure, axes = plt.subplots(len(maps), columns, figsize=(1.8 * columns + 1, 1.9 * len(maps) + 0.4),
                                    squeeze=False)
        top = max(max(map(max, line["entropy_map"])) for lines in maps.values() for line in lines)
        for row, (name, lines) in zip(axes, maps.items()):
            for axis, k in zip(row, np.linspace(0, len(lines) - 1, columns).round().astype(int)):
                shown = axis.imshow(lines[k]["entropy_map"], vmin=0, vmax=top)
                axis.set(xticks=[], yticks=[], title=f"step {lines[k]['step']:,}")
            row[0].set_ylabel(label[name])
        figure.colorbar(shown, ax=axes.ravel().tolist(), label="entropy (nats)")
        figure.savefig(args.figures / "entropy-maps.png", dpi=110, bbox_inches="tight")
        plt.close(figure)
        print(f"wrote {args.figures / 'entropy-maps.png'}")

    # Figure 3: uncertainty against perplexity over training
    for name, run, _ in runs:
        lines = [line for line in logs[name] if "split" not in line and line["uncertainty"] is not None]
        if lines:
            figure, left = plt.subplots(figsize=(6, 4))
            right = left.twinx()
            step = [line["step"] for line in lines]
            left.plot(step, [line["perplexity"] for line in lines], "C0")
            right.plot(step, [line["uncertainty"] for line in lines], "C1")
            left.set(xlabel="step", title=f"{label[name]}: perplexity and uncertainty in training")
            left.set_ylabel("perplexity", color="C0")
            right.set_ylabel("uncertainty K/S", color="C1")
            save(figure, f"uncertainty-{Path(name).name}.png")

    # How often each code is used, most used first
    figure, axis = plt.subplots(figsize=(6, 4))
    for name, _, metrics in runs:
        share = np.sort(usage[name].numpy() / usage[name].sum().item())[::-1]
        axis.plot(np.arange(1, len(share) + 1), np.maximum(share, 1e-7),
                  label=f"{label[name]}: perplexity {metrics['perplexity']:.0f}, {metrics['codes_used']} used")
    axis.set(xlabel="code, most used first", ylabel="share of positions", yscale="log",
             title="Use of the codebook, test split")
    axis.legend()
    save(figure, "usage.png")

    # Figures 4, 5: the same test images by every model
    first = runs[0][1]
    same = [name for name, run, _ in runs if (run["dataset"], run["size"]) == (first["dataset"], first["size"])]
    images = tv.load_images(first["dataset"], "test", args.data_dir or first["data_dir"], first["size"])
    x = tv.to_float(torch.from_numpy(np.array(images[:10])))
    rows = [x, *(m.decode(m.encode(x)) for m in (tv.load_vae(name) for name in same))]
    figure, axes = plt.subplots(len(rows), 1, figsize=(10, 1.05 * len(rows)))
    for axis, row, title in zip(axes, rows, ["input", *(label[name] for name in same)]):
        axis.imshow(torch.cat(list(row), 2).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(title, rotation=0, ha="right", va="center")
    save(figure, "reconstructions.png")

    # Figures 6 and E.10, Tables E.5 and E.1: a line for runs alike in all but one setting, the mean of seeds
    swept = dict(codebook_size="codebook size K", code_dim="code dimension D", beta="weight of the KL, beta",
                 max_logit="clamp of the logits", tau_start="first temperature")
    for setting, title in swept.items():
        lines = [members for members in alike(runs, but=setting) if len({run[setting] for _, run, _ in members}) > 1]
        if not lines:
            continue
        settings = [members[0][1] for members in lines]
        differ = [k for k in settings[0] if k not in (*APART, setting)
                  and len({str(s.get(k)) for s in settings}) > 1] or ["model"]
        figure, axes = plt.subplots(1, 2, figsize=(10, 4))
        for members in lines:
            points = {}
            for _, run, metrics in members:
                points.setdefault(float(run[setting]), []).append((metrics["perplexity"], 1000 * metrics["mse"]))
            points = {x: np.mean(points[x], 0) for x in sorted(points)}
            finite, name = [x for x in points if x < math.inf], ", ".join(f"{k} {members[0][1][k]}" for k in differ)
            for i, axis in enumerate(axes):
                line, = axis.plot(finite, [points[x][i] for x in finite], "o-", label=name)
                if math.inf in points:                                             # no clamp: a level, not a point
                    axis.axhline(points[math.inf][i], color=line.get_color(), linestyle=":", label=f"{name}: none")
        for axis, y in zip(axes, ("perplexity", "MSE x 1000")):
            axis.set(xlabel=title, ylabel=y, xscale="linear" if setting in ("max_logit", "tau_start") else "log")
        axes[0].legend()
        save(figure, f"sweep-{setting.replace('_', '-')}.png")


def main(argv=None):
    tv.tune_cpu()
    args = parser().parse_args(argv)
    args.precision, torch.backends.cudnn.allow_tf32 = "fp32", False                # FID is sensitive to both
    with tv.clear_errors("evaluate.py"):
        tv.resolve_device(args)
        states = {folder: tv.load_checkpoint(folder, args.device) for folder in args.runs}   # all, before any work
        args.no_fid, inception = "ask for it with --fid", None
        if args.fid:
            inception = InceptionFeatures(find_inception(args)).to(args.device)
        results, usage = [], {}
        for folder, state in states.items():
            prior = "ema" in state
            metrics, reasons, counts = (measure_prior if prior else measure_vae)(folder, state, args, inception)
            metrics |= {k: None for k in KEYS if k not in metrics}
            metrics["not_measured"] = {k: reasons.get(k, "") for k, v in metrics.items() if v is None}
            tv.write_json(folder / "metrics.json", metrics)
            results.append((str(folder), state["args"], metrics))
            usage[str(folder)] = counts
        print(table(results))
        for name, _, metrics in results:
            how = f"FID of {metrics['fid_protocol']}" if inception else f"FID not measured, {args.no_fid}"
            print(f"{name}: {how}")
            if metrics.get("samples"):
                print(f"{name}: perplexity of the codes of {metrics['samples']} samples "
                      f"{metrics['perplexity_samples']:.1f}, of as many test maps {metrics['perplexity_data']:.1f}; "
                      f"{name}/nearest.png: samples above their nearest training images")
        if args.figures:
            draw_figures(results, usage, args)


if __name__ == "__main__":
    main()
