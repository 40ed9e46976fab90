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
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import save_image

from train_prior import load_prior
from train_vae import (
    UserError,
    load_vae,
    path_flag,
    prepare_device,
    run_script,
    save_grid,
    to_pixels,
    tune_cpu,
)

# A prior of the full-size EdVAE beside it; assets/results.md says how it was trained.
SHIPPED_PRIOR = Path(__file__).parent / "assets" / "prior"


def parser() -> argparse.ArgumentParser:
    description = "Draw images from a prior, complete an image, or reconstruct images."
    p = argparse.ArgumentParser("sample.py", description=description)
    flag = p.add_argument
    flag(
        "--prior", type=path_flag, help="draw from this run of train_prior.py (default: in assets)"
    )
    flag("--vae", type=path_flag, help="decode by this run of train_vae.py (default: the prior's)")
    flag("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    flag("-n", type=int, default=64, help="draw so many images (default: 64)")
    flag("--temperature", type=float, default=1.0, help="divide the logits by it (default: 1)")
    flag("--top-k", type=int, help="draw among the k most probable codes only")
    flag("--seed", type=int, default=0, help="seed the draws (default: 0)")
    flag("--batch-size", type=int, default=256, help="draw so many maps at a time (default: 256)")
    flag("--out", type=path_flag, default="samples.png", help="write the grid here (%(default)s)")
    flag = p.add_mutually_exclusive_group().add_argument
    flag("--complete", type=path_flag, metavar="IMAGE", help="draw its lower half anew, -n times")
    flag(
        "--reconstruct", type=path_flag, metavar="IMAGE", nargs="+", help="encode and decode these"
    )
    flag("--save-images", type=path_flag, metavar="DIR", help="write DIR/000000.png, ..., no grid")
    return p


def prepare_output(args):
    """UserError or OSError, before any work, if the output cannot be written."""
    if args.save_images:
        args.save_images.mkdir(parents=True, exist_ok=True)
        if any(args.save_images.iterdir()):
            raise UserError(f"{args.save_images} is not empty; name a new folder")
        return
    if args.out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"cannot write {args.out}: name a .png or .jpg")
    if args.n > 10_000:
        raise UserError(f"a grid of {args.n:,} images is too large; --save-images writes each")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    open(args.out, "ab").close()
    if args.out.stat().st_size == 0:
        args.out.unlink()


def draw(prior, vae, args, given=None):
    """args.n images, yielded one by one, (3, H, W) in [0, 1]."""
    options = args.temperature, args.top_k, args.seed
    try:
        codes = prior.sample(args.n, *options, given=given, batch_size=args.batch_size)
    except ValueError as e:
        raise UserError(str(e)) from None
    for part in codes.split(vae.args.batch_size):
        yield from vae.decode(part).cpu()


def read_image(path: Path, size: int) -> Tensor:
    """An image file as (3, size, size) in [0, 1]."""
    return torch.from_numpy(to_pixels(path, size).copy()).permute(2, 0, 1) / 255


def draw_images(argv):
    args = parser().parse_args(argv)
    if not args.prior and not args.vae:
        args.prior = SHIPPED_PRIOR
    if not args.prior and not args.reconstruct:
        raise UserError("--vae needs --prior, a run of train_prior.py, or --reconstruct")
    device, _ = prepare_device(args.device)
    prior = load_prior(args.prior, device, args.vae) if args.prior else None
    vae = load_vae(prior.args.vae if prior else args.vae, device)
    prepare_output(args)
    size, wrote = vae.args.size, args.out
    if args.reconstruct:
        x = torch.stack([read_image(path, size) for path in args.reconstruct])
        parts = (part.to(device) for part in x.split(vae.args.batch_size))
        x_hat = torch.cat([vae.decode(vae.encode(part)).cpu() for part in parts])
        save_grid(torch.cat([x, x_hat], 2), args.out, min(12, len(x)))
        wrote = f"{args.out}: each image above its reconstruction"
    elif args.complete:
        x = read_image(args.complete, size)[None]
        given = vae.encode(x.to(device)).repeat(args.n, 1, 1)  # (n, N, N)
        kept = prior.args.map_size // 2
        given[:, kept:] = -1  # to be drawn; codes just above have seen a little of what is below
        half = x.clone()
        half[:, :, 4 * kept :] = 1
        save_grid(torch.stack([x[0], half[0], *draw(prior, vae, args, given)]), args.out, 8)
        wrote = f"{args.out}: the image, its upper half, and then {args.n} completions"
    elif args.save_images:
        wrote = args.save_images
        for i, image in enumerate(draw(prior, vae, args)):
            save_image(image, wrote / f"{i:06}.png")
    else:
        save_grid(torch.stack([*draw(prior, vae, args)]), args.out, max(1, round(args.n**0.5)))
    print(f"wrote {wrote}")


def main(argv=None):
    run_script("sample.py", draw_images, argv)


if __name__ == "__main__":
    tune_cpu()
    main()
