"""Stage 3: draw images from a prior, complete one, or reconstruct your own.

    python sample.py                           # 64 images of the model in assets: samples.png
    python sample.py --prior runs/prior-NAME-1                           # from your own prior
    python sample.py --prior runs/prior-NAME-1 -n 9999 --save-images out # one PNG per image
    python sample.py --prior runs/prior-NAME-1 --complete photo.png      # keeps the upper half
    python sample.py --vae runs/NAME --reconstruct a.png b.jpg           # inputs above outputs

z ~ prior (n, N, N), drawn in raster order; images = decode(z). Each image has its own stream of
random numbers: -n and --batch-size change it by rounding at most.
"""

import argparse
import time
from pathlib import Path

import torch
import torchvision

from train_prior import check_codes, load_prior
from train_vae import (
    UserError,
    load_vae,
    number,
    prepare_device,
    run_script,
    save_grid,
    to_float,
    to_pixels,
)


# A small EdVAE and its prior, trained on CIFAR-10: assets/results.md says how.
SMALL_VAE = Path(__file__).parent / "assets" / "cifar10-vae.pt"
SMALL_PRIOR = Path(__file__).parent / "assets" / "cifar10-prior.pt"


def parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser("sample.py", description=__doc__, formatter_class=formatter)
    count, temperature = number(int, 1, 10**12), number(float, 1e-30, 100)
    flag = p.add_argument
    flag("--prior", type=Path, help="a run of train_prior.py (default: assets)")
    flag("--vae", type=Path, help="the run of train_vae.py (default: the prior's)")
    flag("-n", type=count, default=64, help="how many images (default 64)")
    flag("--out", type=Path, default=Path("samples.png"), help="the grid (default samples.png)")
    flag("--temperature", type=temperature, default=1.0, help="divides the logits (default 1)")
    flag("--top-k", type=count, help="draw among the k most probable codes (default: all)")
    flag("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of the draws (default 0)")
    flag("--batch-size", type=count, help="maps drawn at a time (default 64, on a GPU 512)")
    complete_help = (
        "draw the codes of this image's lower half anew, -n times; first the image itself"
    )
    output = p.add_mutually_exclusive_group()
    output.add_argument("--complete", type=Path, metavar="IMAGE", help=complete_help)
    reconstruct_help = "no drawing: encode these and decode their codes"
    output.add_argument(
        "--reconstruct", type=Path, metavar="IMAGE", nargs="+", help=reconstruct_help
    )
    save_help = "write DIR/000000.png, ... to a new DIR"
    output.add_argument("--save-images", type=Path, metavar="DIR", help=save_help)
    flag("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    return p


def draw(prior, vae, args, given=None):
    """args.n images, yielded in batches (B, 3, H, W), with a progress line."""
    start = time.perf_counter()
    for first in range(0, args.n, args.batch_size):
        count = min(args.batch_size, args.n - first)
        fixed = None if given is None else given.expand(count, -1, -1)
        codes = prior.sample(count, args.temperature, args.top_k, args.seed, first, fixed)
        yield torch.cat([vae.decode(part) for part in codes.split(128)])
        done, spent = first + count, time.perf_counter() - start
        left = (args.n - done) * spent / done
        progress = (
            f"\r{done:,} of {args.n:,} images, {done / spent:.1f} a second, {left:.0f} s left "
        )
        print(progress, end="" if done < args.n else "\n", flush=True)


def read_image(path: Path, size: int) -> torch.Tensor:
    """An image file as (3, size, size) in [0, 1]."""
    return to_float(torch.from_numpy(to_pixels(path, size).copy())[None])[0]


def save_images(folder: Path, batches):
    """One PNG per image: folder/000000.png, ..."""
    if folder.exists():
        raise UserError(f"{folder} exists; name a new folder")
    folder.mkdir(parents=True)
    i = 0
    for images in batches:
        for image in images:
            torchvision.utils.save_image(image, folder / f"{i:06}.png")
            i += 1


def draw_images(argv):
    args = parser().parse_args(argv)
    if not args.prior and not args.vae:
        args.prior, args.vae = SMALL_PRIOR, SMALL_VAE
    if not args.prior and not args.reconstruct:
        raise UserError("--vae needs --prior, a run of train_prior.py, or --reconstruct")
    device, _ = prepare_device(args.device)
    args.batch_size = args.batch_size or (512 if device.startswith("cuda") else 64)
    prior = load_prior(args.prior, device) if args.prior else None
    args.vae = args.vae or prior.args.vae
    vae = load_vae(args.vae, device)
    size = vae.args.size
    if prior:
        check_codes(prior, args.vae)
    if args.reconstruct:
        x = torch.stack([read_image(path, size) for path in args.reconstruct]).to(device)
        save_grid(torch.cat([x, vae.decode(vae.encode(x))]), args.out, len(x))
    elif args.save_images:
        save_images(args.save_images, draw(prior, vae, args))
    elif args.complete:
        x = read_image(args.complete, size)[None].to(device)
        given = vae.encode(x)  # codes near the middle have seen a little of the lower half
        kept = prior.size // 2
        given[:, kept:] = -1  # to be drawn
        half = x.clone()
        half[:, :, 4 * kept :] = 1
        images = torch.cat([x, half, *draw(prior, vae, args, given)])
        save_grid(images, args.out, 8)
    else:
        images = torch.cat(list(draw(prior, vae, args)))
        save_grid(images, args.out, max(1, round(args.n**0.5)))
    print(f"wrote {args.save_images or args.out}")


def main(argv=None):
    run_script("sample.py", draw_images, argv)


if __name__ == "__main__":
    main()
