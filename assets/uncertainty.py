"""How informative u, H and max pi are: section 4 of results.md. Needs matplotlib.

    python assets/uncertainty.py assets/edvae assets/dvae          # minutes on two cores
    python assets/uncertainty.py assets/prior runs/PRIOR_OF_DVAE   # ten minutes a prior

For a run of train_vae.py, over its test split with hard codes: Spearman's correlation of each score
with the error of the 4 x 4 patch that a code covers, plain and with the patch's contrast held
fixed; the AUROC of each score's mean over an image, for images unlike those trained on; and a
picture of ten images with their scores.

For runs of train_prior.py: the prior may choose the codes of the positions where a score is high,
among those whose pi is at least rho times the largest. A line of JSON for each share of the
positions, bits per code against error, and a figure of all priors.
"""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluate import Figures, path_flag, to_uint8  # noqa: E402
from train_prior import Cache, load_prior, nats_per_code  # noqa: E402
from train_vae import (  # noqa: E402
    draw_shapes,
    load_checkpoint,
    load_images,
    load_vae,
    run_script,
    test_pass,
    to_float,
    tune_cpu,
)

SCORES = ("u", "H", "1 - max pi", "contrast", "error")


def shuffle_patches(x: np.ndarray, rng) -> np.ndarray:
    """Images (B, H, W, 3) with the 4 x 4 patches of each in another order."""
    B, H, W, _ = x.shape
    patches = x.reshape(B, H // 4, 4, W // 4, 4, 3).swapaxes(2, 3).reshape(B, -1, 4, 4, 3)
    patches = np.stack([rng.permutation(of_image) for of_image in patches])
    return patches.reshape(B, H // 4, W // 4, 4, 4, 3).swapaxes(2, 3).reshape(x.shape)


def blur(x: np.ndarray, rng) -> np.ndarray:
    x = to_float(torch.from_numpy(x))
    blurred = torchvision.transforms.functional.gaussian_blur(x, 13, 1.5)
    return to_uint8(blurred).permute(0, 2, 3, 1).numpy()


# Images unlike those trained on, made from test images x, uint8 (B, H, W, 3).
FOREIGN = {
    "uniform noise": lambda x, rng: rng.integers(0, 256, x.shape, dtype=np.uint8),
    "shuffled patches": shuffle_patches,
    "blurred": blur,
    "noise added": lambda x, rng: (x + rng.normal(0.5, 25.5, x.shape)).clip(0, 255).astype("u1"),
    "generated shapes": lambda x, rng: draw_shapes(len(x), x.shape[1], rng),
}


@torch.no_grad()
def scores(model, images: np.ndarray, change=None) -> Tensor:
    """u, H, 1 - max pi, and the contrast and error of the 4 x 4 patch: (5, count, N, N), float32.

    u is ln(K / S); a softmax has none, and -ln sum exp(logits) takes its place. Contrast is the
    standard deviation over the patch's pixels (root mean square over colors). change: one of
    FOREIGN, applied to the images.
    """
    parts = []
    for i in range(0, len(images), 128):
        batch = images[i : i + 128]
        batch = change(batch, np.random.default_rng([0, i])) if change else batch
        for x, z_e, _, q, x_hat in test_pass(model, batch, model.args):
            u = q.uncertainty.clamp(min=1e-38).log()
            if u.isnan().all():
                u = -model.quantizer.logits(z_e).float().logsumexp(-1)
            unsure = 1 - model.quantizer.probabilities(z_e).amax(-1)
            patches = F.pixel_unshuffle(x, 4).unflatten(1, (3, 16))  # (B, 3, 16, N, N)
            contrast = patches.var(2, correction=0).mean(1).sqrt()
            error = F.pixel_unshuffle(x_hat - x, 4).square().mean(1)
            parts.append(torch.stack([u, q.entropy, unsure, contrast, error]).float())
    return torch.cat(parts, 1)


def ranks(x: Tensor) -> Tensor:
    """Ranks of x (P) from 1, float64; equal values share their mean rank."""
    _, inverse, count = x.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2).double()[inverse]


def auroc(usual: Tensor, foreign: Tensor) -> float:
    """The probability that a foreign image's score is above a usual one's; ties count half."""
    n, m = len(usual), len(foreign)
    return ((ranks(torch.cat([usual, foreign]))[n:].sum() - m * (m + 1) / 2) / (n * m)).item()


def correlations(of_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Spearman's, of scores (5, count, N, N) with the error; the partial ones, given contrast."""
    r = torch.corrcoef(torch.stack([ranks(s.flatten()) for s in of_scores]))  # (5, 5)
    with_contrast, with_error = r[3], r[4]
    partial = with_error - with_contrast * r[3, 4]
    return with_error, partial / ((1 - with_contrast.square()) * (1 - r[3, 4] ** 2)).sqrt()


def study_model(path: Path, model, images: np.ndarray, figures: Figures, name: str):
    """Prints the table of one run, and draws its picture."""
    usual = scores(model, images)
    if usual.isnan().any():
        print(f"{path}: {model.args.model} has no pi")
        return
    u = "ln(K/S)" if model.args.model == "edvae" else "-logsumexp of the logits"
    plain, given_contrast = correlations(usual)
    rows = {
        "rank correlation with error": plain[:4],
        "the same, given contrast": given_contrast[:3],
    }
    for foreign, change in FOREIGN.items():
        means = usual.mean((2, 3)), scores(model, images, change).mean((2, 3))  # (5, count)
        rows[f"AUROC, {foreign}"] = [auroc(a, b) for a, b in zip(*means)]
    print(f"\n{path}, u = {u}\n{'':28}" + "".join(f"{score:>12}" for score in SCORES))
    for title, values in rows.items():
        print(f"{title:28}" + "".join(f"{value:12.2f}" for value in values), flush=True)
    of_u, _, _, contrast, error = usual[:, :10]  # (10, N, N) each
    inputs = to_float(torch.from_numpy(images[:10]))
    figures.rows(name, {"input": inputs, "squared error": error, u: of_u, "contrast": contrast})


def choose(prior, codes: Tensor, free: Tensor, plausible: Tensor) -> Tensor:
    """codes (B, N, N); where free (B, N, N) what the prior likes best of plausible (B, N, N, K)."""
    B, N, _ = codes.shape
    codes, cache = codes.clone(), Cache(B, N)
    for i, j in itertools.product(range(N), range(N)):  # in the prior's order
        logits = prior.next_logits(cache).masked_fill(~plausible[:, i, j], -math.inf)  # (B, K)
        codes[:, i, j] = torch.where(free[:, i, j], logits.argmax(-1), codes[:, i, j])
        prior.write_codes(cache, codes[:, i, j])  # goes on to the next position
    return codes


@torch.no_grad()
def redraw(prior, model, images: np.ndarray):
    """Yields a dict for each rho, score and share of positions that the prior may choose."""
    x = to_float(torch.from_numpy(images))
    z_e = torch.cat([model.encode_features(part) for part in x.split(100)])  # (B, N, N, C)
    pi, codes = model.quantizer.probabilities(z_e), model.quantizer.assign(z_e)
    u, H, *_ = scores(model, images)
    random = torch.rand(codes.shape, generator=torch.Generator().manual_seed(0))
    orders = {"u": u, "H": H, "random": random}
    for rho, (score, values) in itertools.product((0.5, 0.1), orders.items()):
        plausible = pi >= rho * pi.amax(-1, keepdim=True)  # (B, N, N, K)
        rank = values.flatten().argsort(descending=True).argsort().view_as(codes)
        for share in (0, 0.1, 0.25, 0.5, 0.75, 1):
            parts = [t.split(100) for t in (codes, rank < share * rank.numel(), plausible)]
            chosen = torch.cat([choose(prior, *part) for part in zip(*parts)])
            x_hat = torch.cat([model.decode(part) for part in chosen.split(100)])
            bits, mse = nats_per_code(prior, chosen) / math.log(2), F.mse_loss(x_hat, x).item()
            yield dict(
                model=model.args.model, rho=rho, score=score, share=share, bits=bits, mse=mse
            )


def study(argv):
    p = argparse.ArgumentParser(
        "assets/uncertainty.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("runs", type=path_flag, nargs="+", metavar="RUN", help="a run's folder")
    p.add_argument("--data-dir", type=path_flag, help="look for the data here")
    p.add_argument("--images", type=int, default=1000, help="redraw the first so many (1000)")
    p.add_argument("--figures", type=path_flag, default=Path("figures"), help="write figures here")
    args = p.parse_args(argv)
    figures = Figures(args.figures)
    figure, ((axis,),) = figures.axes(1, 1, (7.3, 3))
    for i, path in enumerate(args.runs):
        prior = None if "model" in load_checkpoint(path)["args"] else load_prior(path)
        model = load_vae(prior.args.vae if prior else path)
        data_dir = args.data_dir or model.args.data_dir
        images = load_images(model.args.dataset, "test", data_dir, model.args.size)
        if not prior:
            study_model(path, model, images, figures, f"scores-{i + 1}-{path.name}")
            continue
        lines = []
        for line in redraw(prior, model, images[: args.images]):
            print(json.dumps(line), flush=True)
            lines.append(line)
        for score, style in (("u", "o-"), ("H", "s--"), ("random", "x:")):
            curve = [x for x in lines if (x["rho"], x["score"]) == (0.1, score)]
            xy = [(x["bits"], 1000 * x["mse"]) for x in curve]
            axis.plot(*zip(*xy), style, color=f"C{i}", label=f"{model.args.model}, {score}")
    axis.set(xlabel="bits per code, by the prior", ylabel="MSE x 1000")
    figures.save(figure, axis, "redraw")


def main(argv=None):
    run_script("assets/uncertainty.py", study, argv)


if __name__ == "__main__":
    tune_cpu()
    main()
