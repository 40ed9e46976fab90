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
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.utils import save_image

from train_prior import check_codes, load_prior
from train_vae import UserError, load_vae, prepare_device, run_script, to_pixels

# A prior of the full-size EdVAE beside it; assets/results.md says how it was trained.
SHIPPED_PRIOR = Path(__file__).parent / "assets" / "prior"


def parser() -> argparse.ArgumentParser:
    description = "Draw images from a prior, complete an image, or reconstruct images."
    p = argparse.ArgumentParser("sample.py", description=description)

    def flag(name, kind, help, default=None, **more):
        group.add_argument(name, type=kind, help=help, default=default, **more)

    group = p.add_argument_group("the models (default: those in assets)")
    flag("--prior", Path, "draw from this run of train_prior.py")
    flag("--vae", Path, "decode by this run of train_vae.py (default: the prior's first stage)")
    flag("--device", str, "cpu, cuda, ... (default: cuda where there is one)")
    group = p.add_argument_group("drawing")
    flag("-n", int, "draw so many images (default: 64)", 64)
    flag("--temperature", float, "divide the logits by it (default: 1)", 1.0)
    flag("--top-k", int, "draw among the k most probable codes only")
    flag("--seed", int, "seed the draws (default: 0)", 0)
    flag("--batch-size", int, "draw so many maps at a time (default: 64, on a GPU 512)")
    output = p.add_argument_group("the output")
    group = output.add_mutually_exclusive_group()
    flag("--complete", Path, "draw this image's lower half anew, -n times", metavar="IMAGE")
    flag("--reconstruct", Path, "encode and decode these", nargs="+", metavar="IMAGE")
    flag("--save-images", Path, "write DIR/000000.png, ... to a new DIR, no grid", metavar="DIR")
    group = output
    flag("--out", Path, "write the grid here (default: samples.png)", Path("samples.png"))
    return p


def check(args):
    """UserError, before any work, for numbers and outputs that cannot be."""
    for name in ("n", "temperature", "top_k", "seed", "batch_size"):
        value, least = getattr(args, name), dict(temperature=1e-30, seed=0).get(name, 1)
        if value is not None and not value >= least:  # nan neither
            raise UserError(f"{name.replace('_', '-')} {value} is not at least {least}")
    if args.save_images and args.save_images.exists():
        raise UserError(f"{args.save_images} exists; name a new folder")
    if args.save_images:
        return
    if Image.registered_extensions().get(args.out.suffix.lower()) not in Image.SAVE:
        raise UserError(f"cannot write {args.out}: name a .png or .jpg")
    if args.n > 10_000:
        raise UserError(f"a grid of {args.n:,} images is too large; --save-images writes each")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    place = args.out if args.out.exists() else args.out.parent
    if args.out.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"cannot write {args.out}: name another --out")


def draw(prior, vae, args, given=None):
    """args.n images, yielded in batches (B, 3, H, W), with a progress line."""
    start = time.perf_counter()
    for first in range(0, args.n, args.batch_size):
        count = min(args.batch_size, args.n - first)
        fixed = None if given is None else given.expand(count, -1, -1)
        codes = prior.sample(count, args.temperature, args.top_k, args.seed, first, fixed)
        yield torch.cat([vae.decode(part).cpu() for part in codes.split(vae.args.batch_size)])
        done, spent = first + count, time.perf_counter() - start
        rate = f"{done / spent:.1f} a second, {(args.n - done) * spent / done:.0f} s left "
        print(f"\r{done:,} of {args.n:,} images, {rate}", end="", flush=True)
    print()


def read_image(path: Path, size: int) -> torch.Tensor:
    """An image file as (3, size, size) in [0, 1]."""
    return torch.from_numpy(to_pixels(path, size).copy()).permute(2, 0, 1) / 255


def save_grid(images: torch.Tensor, path: Path, columns: int):
    """Images (B, 3, H, W) in [0, 1] as one picture; small ones are enlarged."""
    enlarged = F.interpolate(images, scale_factor=max(1, 96 // images.shape[-1]))
    save_image(enlarged, path, nrow=columns, pad_value=1)


def draw_images(argv):
    args = parser().parse_args(argv)
    check(args)
    if not args.prior and not args.vae:
        args.prior = SHIPPED_PRIOR
    if not args.prior and not args.reconstruct:
        raise UserError("--vae needs --prior, a run of train_prior.py, or --reconstruct")
    device, _ = prepare_device(args.device)
    args.batch_size = args.batch_size or (512 if device.startswith("cuda") else 64)
    prior = load_prior(args.prior, device) if args.prior else None
    args.vae = args.vae or prior.args.vae
    if prior:
        check_codes(prior, args.vae)
    vae = load_vae(args.vae, device)
    size, wrote = vae.args.size, args.out
    if args.reconstruct:
        x = torch.stack([read_image(path, size) for path in args.reconstruct])
        columns = min(12, len(x))
        parts = (part.to(device) for part in x.split(vae.args.batch_size))
        x_hat = torch.cat([vae.decode(vae.encode(part)).cpu() for part in parts])
        white = torch.ones(-len(x) % columns, 3, size, size)  # to the end of the last row
        rows = zip(*(torch.cat([images, white]).split(columns) for images in (x, x_hat)))
        save_grid(torch.cat([row for pair in rows for row in pair]), args.out, columns)
        wrote = f"{args.out}: each row of images is above the row of its reconstructions"
    elif args.complete:
        x = read_image(args.complete, size)[None]
        given = vae.encode(x.to(device))  # codes near the middle have seen a little below it
        kept = prior.size // 2
        given[:, kept:] = -1  # to be drawn
        half = x.clone()
        half[:, :, 4 * kept :] = 1
        save_grid(torch.cat([x, half, *draw(prior, vae, args, given)]), args.out, 8)
        wrote = f"{args.out}: the image, its upper half, and then {args.n} completions"
    elif args.save_images:
        wrote = args.save_images
        wrote.mkdir(parents=True)
        for first, images in enumerate(draw(prior, vae, args)):
            for i, image in enumerate(images, first * args.batch_size):
                save_image(image, wrote / f"{i:06}.png")
    else:
        save_grid(torch.cat([*draw(prior, vae, args)]), args.out, max(1, round(args.n**0.5)))
    print(f"wrote {wrote}")


def main(argv=None):
    run_script("sample.py", draw_images, argv)


if __name__ == "__main__":
    main()
