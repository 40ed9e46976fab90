"""Stage 3: draw images from a prior, or see what the codes of your own images keep of them.

    python sample.py --prior runs/prior-NAME-1                               # 64 images in samples.png
    python sample.py --prior runs/prior-NAME-1 -n 50000 --save-images out    # one PNG an image, for FID
    python sample.py --prior runs/prior-NAME-1 --complete photo.png     # keeps the upper half's codes
    python sample.py --vae runs/NAME --reconstruct a.png b.jpg               # inputs above what their codes give back

z ~ prior (n, N, N), drawn in raster order, each layer of the prior computing each position once; images = decode(z).
Image number b of a seed is the same whatever -n and --batch-size are.
"""
import argparse
import time
from pathlib import Path

import torch
import torchvision

import train_vae as tv
from train_prior import load_prior
from train_vae import UserError, number


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = p.add_argument
    flag("--prior", type=Path, help="a run of train_prior.py")
    flag("--vae", type=Path, help="the run of train_vae.py (default: the one whose codes the prior was fitted to)")
    flag("-n", type=tv.COUNT, default=64, help="how many images (default 64)")
    flag("--out", type=Path, default=Path("samples.png"), help="the grid's file (default samples.png)")
    flag("--save-images", type=Path, metavar="DIR", help="write DIR/000000.png, ... instead; DIR must be new")
    flag("--temperature", type=number(float, 0, 100, open_low=True), default=1.0, help="divides the logits (default 1)")
    flag("--top-k", type=tv.COUNT, help="draw among the k most probable codes (default: all)")
    flag("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="of the draws (default 0)")
    flag("--batch-size", type=tv.COUNT, default=64, help="maps drawn at a time (default 64)")
    flag("--complete", type=Path, metavar="IMAGE", help="keep the codes of this image's upper half and draw the lower, "
         "-n times")
    flag("--reconstruct", type=Path, metavar="IMAGE", nargs="+", help="no drawing: encode these and decode the codes")
    flag("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    return p


def read(paths: list, size: int, device) -> torch.Tensor:
    """Image files as (B, 3, size, size) in [0, 1]; UserError names one that cannot be read."""
    arrays = [torch.from_numpy(tv.pixels(path, size, name=path).copy()) for path in paths]
    return tv.to_float(torch.stack(arrays)).to(device)


def draw(prior, vae, args, given=None):
    """args.n images, yielded in batches (b, 3, H, W), with a progress line."""
    start = time.perf_counter()
    for first in range(0, args.n, args.batch_size):
        count = min(args.batch_size, args.n - first)
        codes = prior.sample(count, args.temperature, args.top_k, args.seed, first,
                             None if given is None else given.expand(count, -1, -1))
        yield vae.decode(codes)
        done, spent = first + count, time.perf_counter() - start
        print(f"\r{done:,} of {args.n:,} images, {done / spent:.1f} a second, "
              f"{(args.n - done) * spent / done:.0f} s left ", end="" if done < args.n else "\n", flush=True)


def main(argv=None):
    tv.tune_cpu()
    args = parser().parse_args(argv)
    args.precision = "fp32"
    with tv.clear_errors("sample.py"):
        if not args.prior and not (args.vae and args.reconstruct):
            raise UserError("needs --prior, a run of train_prior.py (or --vae with --reconstruct)")
        tv.resolve_device(args)
        prior = load_prior(args.prior, args.device) if args.prior else None
        vae = tv.load_vae(args.vae or prior.args["vae"], args.device)
        if prior and (prior.args["codebook_size"], prior.size) != (vae.args["codebook_size"], vae.args["size"] // 4):
            raise UserError(f"--vae {args.vae} has other codes than the prior was fitted to")
        if args.reconstruct:
            x = read(args.reconstruct, vae.args["size"], args.device)
            tv.save_grid(torch.cat([x, vae.decode(vae.encode(x))]), args.out, len(x))
        elif args.save_images:
            if args.save_images.exists():
                raise UserError(f"{args.save_images} exists; name a new folder")
            try:
                args.save_images.mkdir(parents=True)
                for images, first in zip(draw(prior, vae, args), range(0, args.n, args.batch_size)):
                    for i, image in enumerate(images):
                        torchvision.utils.save_image(image, args.save_images / f"{first + i:06}.png")
            except OSError as e:
                raise UserError(f"cannot write to {args.save_images}: {e.strerror or e}") from None
        elif args.complete:
            x = read([args.complete], vae.args["size"], args.device)
            given = vae.encode(x)
            given[:, prior.size // 2:] = -1                                        # the lower half is to be drawn
            images = torch.cat(list(draw(prior, vae, args, given)))
            half = x.clone()
            half[:, :, x.shape[2] // 2:] = 1                                       # shown: input, kept half, draws
            tv.save_grid(torch.cat([x, half, images]), args.out, 8)
        else:
            tv.save_grid(torch.cat(list(draw(prior, vae, args))), args.out, max(1, round(args.n ** 0.5)))
        print(f"wrote {args.save_images or args.out}")


if __name__ == "__main__":
    main()
