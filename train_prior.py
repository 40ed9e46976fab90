"""Stage 2: fit a PixelSNAIL prior (Chen et al. 2018) to the codes of a trained model.

    python train_prior.py --vae runs/NAME                            # 20,000 steps: hours on a CPU
    python train_prior.py --vae runs/NAME --preset small             # two minutes on two CPU cores
    torchrun --standalone --nproc_per_node=4 train_prior.py --vae runs/NAME --out runs/prior   # four processes

The training images are encoded once, in eval mode, to indices (B, N, N); the prior factorises them in raster order,

    p(z) = prod_p p(z_p | z_<p),    loss = -mean log p(z_p | z_<p), nats a code,

and is judged on codes that it has not seen, beside two yardsticks: log K, which knows nothing, and the entropy of the
codes' frequencies, which knows no context. Every layer has two ways to run, in one forward: over a whole map, to train;
or one position at a time with a Cache of what its receptive field still needs, to sample, so that each layer computes
each position once: N^2 position evaluations a map where running the network anew at each position takes N^4.
"""
import argparse
import contextlib
import hashlib
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import train_vae as tv
from train_vae import UserError, number

# What a flag left out becomes: a small prior for a CPU, or a full one, deeper for a larger map (N: blocks).
SMALL = dict(steps=2000, width=32, blocks=1, lr=2e-3, ema=0.99)
FULL, BLOCKS = dict(steps=20_000, width=128, lr=3e-4, ema=0.9995), {8: 2, 16: 3, 32: 4}
# What may change on --resume.
FREE = "vae", "data_dir", "out", "resume", "device", "patience", "eval_every", "grad_accum"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = p.add_argument
    flag("--vae", type=Path, required=True, help="the run of train_vae.py whose codes to model")
    flag("--data-dir", type=Path, help="where its data lies (default: where the run found it)")
    flag("--out", type=Path, help="the run's folder (default: a fresh one under runs/)")
    flag("--resume", action="store_true", help="go on from --out's checkpoint; starts afresh if there is none")
    flag("--preset", choices=("full", "small"), help="settings left out (default full; small after a "
         "run on shapes)")
    flag("--steps", type=tv.COUNT, help="training steps (default 20000, small 2000)")
    flag("--batch-size", type=tv.COUNT, default=64, help="maps a step (default 64)")
    flag("--lr", type=number(float, 0, tv.FINITE, open_low=True), help="AdamW's first rate, falling by a cosine "
         "(default 3e-4, small 2e-3)")
    flag("--width", type=number(int, 8, 4096), help="channels, a multiple of 16 (default 128, small 32)")
    flag("--blocks", type=number(int, 1, 64), help="PixelBlocks, each with one attention (default 2 to 4, by map size; "
         "small 1)")
    flag("--layers", type=number(int, 1, 64), default=4, help="gated residual blocks in each (default 4)")
    flag("--dropout", type=number(float, 0, 0.95), default=0.1, help="in every residual block (default 0.1)")
    flag("--ema", type=number(float, 0, 0.999999), help="decay of the averaged weights, which are the ones judged and "
         "kept (default 0.9995, small 0.99)")
    flag("--patience", type=tv.COUNT, default=10, help="stop after so many evaluations without a gain (default 10)")
    flag("--seed", type=number(int, 0, 2 ** 63 - 1), default=42, help="of weights, dropout and order (default 42)")
    flag("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    flag("--precision", choices=("fp32", "bf16"), help="of convolutions and attention (default bf16 with units for it)")
    flag("--eval-every", type=tv.COUNT, metavar="STEPS", help="steps between evaluations (default steps / 20)")
    flag("--grad-accum", type=tv.COUNT, default=1, metavar="PARTS", help="take each batch in so many parts, for a "
         "small card (default 1)")
    return p


# ------------------------------------------------------------------------------------------------------------ the codes

@torch.no_grad()
def load_codes(vae_folder: Path, split: str, data_dir=None, device="cpu") -> Tensor:
    """The codes of a split in eval mode, int64 (B, N, N); kept in the run's folder under its checkpoint's hash."""
    ckpt = tv.load_checkpoint(vae_folder)
    args = ckpt["args"]
    path = vae_folder / "ckpt.pt"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    cache = vae_folder / f"codes-{split}-{digest}.npy"
    if tv.many() and tv.RANK:
        torch.distributed.barrier()                                                # the first process encodes
    if not cache.exists():
        model = tv.load_vae(vae_folder, device)
        images = tv.load_images(args["dataset"], split, data_dir or args["data_dir"], args["size"], alone=True)
        codes = [model.encode(tv.to_float(torch.from_numpy(np.array(images[i:i + 256])).to(device))).short().cpu()
                 for i in range(0, len(images), 256)]
        with tv.whole(cache) as f:
            np.save(f, torch.cat(codes).numpy())
    if tv.many() and not tv.RANK:
        torch.distributed.barrier()
    try:
        codes, N, K = np.load(cache, allow_pickle=False), args["size"] // 4, args["codebook_size"]
        fitting = codes.dtype == np.int16 and codes.shape[1:] == (N, N) and len(codes)
        if not (fitting and 0 <= codes.min() <= codes.max() < K):
            raise ValueError(f"{codes.dtype} {codes.shape}, not int16 (B, {N}, {N}) below {K}")
    except Exception as e:                                                         # a foreign header raises anything
        raise UserError(f"{cache} is damaged ({tv.first_line(e)}); delete it to encode again") from None
    return torch.from_numpy(codes).long().to(device)


# -------------------------------------------------------------------------------------------------------------- the net

class Cache:
    """What one-position-at-a-time evaluation keeps, for B maps of N x N: rows of convolutions' inputs, keys, values.

    The position lives on the device and no shape depends on it, so that one CUDA graph serves every position.
    """

    def __init__(self, B: int, N: int, device="cpu"):
        self.B, self.N, self.done, self.kept = B, N, 0, {}                         # done: positions behind us
        self.p = torch.zeros(1, dtype=torch.int64, device=device)                  # the present position, i N + j
        self.j = self.p.clone()                                                    # and its column
        self.order = torch.arange(N * N + 1, device=device)

    def rows(self, conv) -> Tensor:
        """The last rows of conv's input, (B, rows, N + columns - 1, C), zero where nothing is written yet (none of a
        1x1 convolution's, which looks nowhere else), and its weight as a matrix."""
        if conv not in self.kept:
            rows, columns = conv.kernel_size
            shape = self.B, rows if rows * columns > 1 else 0, self.N + columns - 1, conv.in_channels
            # (out, C, rows, columns) to (rows * columns * C, out): a step is one matrix product
            weight = (conv.weight * conv.mask).permute(2, 3, 1, 0).flatten(0, 2).contiguous()
            self.kept[conv] = torch.zeros(shape, device=weight.device), weight
        return self.kept[conv]

    def write(self, conv, x: Tensor):
        """Put x (B, C), conv's input at the present position, in its place."""
        self.rows(conv)[0][:, -1].index_copy_(1, self.j + conv.kernel_size[1] // 2, x[:, None])

    def advance(self):
        """On to the next position; at the end of a row, all rows move up and a row of zeros comes in."""
        self.done += 1
        self.p.fill_(self.done), self.j.fill_(self.done % self.N)
        if self.done % self.N == 0:
            for conv, (rows, _) in self.kept.items():
                if isinstance(conv, CausalConv2d) and rows.numel():
                    rows[:, :-1] = rows[:, 1:].clone()
                    rows[:, -1] = 0


class CausalConv2d(nn.Conv2d):
    """A convolution that sees rows above and, in its own row, columns up to its own (centre) or before it."""

    def __init__(self, n_in: int, n_out: int, rows: int = 1, columns: int = 1, centre: bool = True):
        super().__init__(n_in, n_out, (rows, columns))
        mask = torch.ones(rows, columns)
        mask[-1, columns // 2 + centre:] = 0
        self.register_buffer("mask", mask, persistent=False)
        self.centre = centre
        weight_norm(self)

    def forward(self, x: Tensor, cache: Cache = None) -> Tensor:
        rows, columns = self.kernel_size
        if cache is None:
            x = F.pad(x, (columns // 2, columns // 2, rows - 1, 0))
            return F.conv2d(x, self.weight * self.mask, self.bias)                 # (B, n_out, N, N)
        kept, weight = cache.rows(self)
        if rows == columns == 1:
            window = x[:, :, 0, 0]                                                 # (B, C)
        else:
            if self.centre:
                cache.write(self, x[:, :, 0, 0])
            here = cache.j + torch.arange(columns, device=kept.device)
            window = kept.index_select(2, here).flatten(1)                         # (B, rows * columns * C)
        return torch.addmm(self.bias, window, weight)[:, :, None, None]            # (B, n_out, 1, 1)


class GatedResBlock(nn.Module):
    """x + GLU(conv(drop(ELU(conv(ELU(x)) + aux)))): causal convolutions of rows x columns, aux through a 1x1."""

    def __init__(self, n: int, hidden: int, dropout: float, rows: int = 1, columns: int = 1, aux: int = 0):
        super().__init__()
        self.conv1 = CausalConv2d(n, hidden, rows, columns)
        self.aux = CausalConv2d(aux, hidden) if aux else None
        self.conv2 = CausalConv2d(hidden, 2 * n, rows, columns)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: Cache = None, aux: Tensor = None) -> Tensor:
        u = self.conv1(F.elu(x), cache)
        if self.aux:
            u = u + self.aux(F.elu(aux), cache)
        return x + F.glu(self.conv2(self.dropout(F.elu(u)), cache), 1)


class CausalAttention(nn.Module):
    """Attention over strictly earlier positions. A null key with value zero stands first: position 0 attends to it
    alone and gets exactly zero, where a softmax over nothing would be nan or look ahead."""

    def __init__(self, n_query: int, n_key: int, n: int, heads: int = 8):
        super().__init__()
        self.query, self.key, self.value = (weight_norm(nn.Linear(i, n, bias=False)) for i in (n_query, n_key, n_key))
        self.heads = heads

    def forward(self, query: Tensor, key: Tensor, cache: Cache = None) -> Tensor:
        B, _, H, W = query.shape

        def split(linear, x):                                                      # (B, heads, H W, n / heads)
            return linear(x.flatten(2).transpose(1, 2)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        q, k, v = split(self.query, query), split(self.key, key), split(self.value, key)
        if cache is None:
            k, v = F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0))                  # null, then positions 0, 1, ...
            mask = torch.ones(H * W, H * W + 1, dtype=torch.bool, device=q.device).tril()   # p sees null and all < p
            if q.device.type == "cpu":                                             # fp32: bf16's backward is 10x slower
                q, k, v = q.float(), k.float(), v.float()
            with torch.autocast(q.device.type, enabled=False):
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            if self not in cache.kept:
                shape = B, self.heads, cache.N ** 2 + 1, k.shape[-1]
                cache.kept[self] = torch.zeros(shape, device=q.device), torch.zeros(shape, device=q.device)
            keys, values = cache.kept[self]
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=(cache.order <= cache.p)[None])
            keys.index_copy_(2, cache.p + 1, k), values.index_copy_(2, cache.p + 1, v)
        return out.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, (H, W))  # (B, n, H, W)


class PixelBlock(nn.Module):
    """Gated residual blocks with 5 x 5 causal convolutions, then attention over all that lies before."""

    def __init__(self, n: int, layers: int, dropout: float):
        super().__init__()
        self.res = nn.ModuleList(GatedResBlock(n, n, dropout, 5, 5) for _ in range(layers))
        self.key = GatedResBlock(2 * n + 2, n, dropout)
        self.query = GatedResBlock(n + 2, n, dropout)
        self.attention = CausalAttention(n + 2, 2 * n + 2, n // 2)
        self.out = GatedResBlock(n, n, dropout, aux=n // 2)

    def forward(self, x: Tensor, background: Tensor, cache: Cache = None) -> Tensor:
        out = x
        for block in self.res:
            out = block(out, cache)
        key = self.key(torch.cat([x, out, background], 1), cache)                  # (B, 2n + 2, H, W)
        query = self.query(torch.cat([out, background], 1), cache)                 # (B, n + 2, H, W)
        return self.out(out, cache, self.attention(query, key, cache))


class PixelSNAIL(nn.Module):
    """p(z_p | z_<p) over maps of N x N codes: forward(indices (B, N, N)) -> logits (B, N, N, K)."""

    def __init__(self, codebook_size: int, size: int, width: int = 128, blocks: int = 2, layers: int = 4,
                 dropout: float = 0.1):
        super().__init__()
        self.size = size
        self.embedding = nn.Embedding(codebook_size, width)
        self.stem = CausalConv2d(width, width, 3, 5, centre=False)                 # the one that shifts
        self.blocks = nn.ModuleList(PixelBlock(width, layers, dropout) for _ in range(blocks))
        self.head = CausalConv2d(width, codebook_size)
        place = (torch.arange(size) - size / 2) / size
        background = torch.stack(torch.meshgrid(place, place, indexing="ij"))[None]   # (1, 2, N, N): row, column
        self.register_buffer("background", background, persistent=False)

    def forward(self, indices: Tensor) -> Tensor:
        x = self.embedding(indices).permute(0, 3, 1, 2)                            # (B, n, N, N)
        return self.after_stem(self.stem(x), self.background.expand(len(x), -1, -1, -1)).permute(0, 2, 3, 1)

    def after_stem(self, x: Tensor, background: Tensor, cache: Cache = None) -> Tensor:
        for block in self.blocks:
            x = block(x, background, cache)
        return self.head(F.elu(x), cache)

    def step(self, cache: Cache) -> Tensor:
        """Logits (B, K) of the present position; the codes before it were given by `put`."""
        here = self.background.flatten(2).index_select(2, cache.p)[..., None]       # (1, 2, 1, 1)
        return self.after_stem(self.stem(None, cache), here.expand(cache.B, -1, -1, -1), cache)[:, :, 0, 0]

    def put(self, cache: Cache, codes: Tensor):
        """The present position's codes (B) are known: remember them and go on to the next."""
        cache.write(self.stem, self.embedding(codes))
        cache.advance()

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, top_k: int = None, seed: int = 0, first: int = 0,
               given: Tensor = None) -> Tensor:
        """n maps of codes (n, N, N), drawn position by position, each layer computing each position once.

        temperature divides the logits; top_k keeps the most probable codes; given (n, N, N) fixes the codes where it is
        not negative. Map number first + b draws from its own stream of seed, so the batch size changes nothing.
        """
        device, N = self.background.device, self.size
        streams = [torch.Generator().manual_seed((seed * 1_000_003 + first + b) % 2 ** 63) for b in range(n)]
        uniform = torch.stack([torch.rand(N * N, generator=g, dtype=torch.float64) for g in streams]).to(device)
        cache, codes = Cache(n, N, device), torch.zeros(n, N * N, dtype=torch.int64, device=device)

        def draw():
            """The present position's codes; done twice, it changes nothing more."""
            logits = self.step(cache).double() / temperature                       # (n, K)
            if top_k:
                logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[1])).values[:, -1:], -math.inf)
            cumulative = logits.softmax(1).cumsum(1)
            threshold = uniform.index_select(1, cache.p) * cumulative[:, -1:]
            drawn = (cumulative < threshold).sum(1, keepdim=True).clamp(max=logits.shape[1] - 1)   # (n, 1)
            if given is not None:
                fixed = given.flatten(1).index_select(1, cache.p)
                drawn = torch.where(fixed >= 0, fixed, drawn)
            codes.index_copy_(1, cache.p, drawn)
            cache.write(self.stem, self.embedding(drawn[:, 0]))
        draw = captured(draw, device)
        for _ in range(N * N):
            draw()
            cache.advance()
        return codes.view(n, N, N)


def captured(f, device: torch.device):
    """On a GPU f as one CUDA graph: its hundreds of small kernels at one launch; f runs twice more, to warm up."""
    if device.type != "cuda":
        return f
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):                                                # caches are made, libraries loaded
        f(), f()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        f()
    return graph.replay


def load_prior(path, device="cpu") -> PixelSNAIL:
    """A trained prior from a run folder (or its ckpt.pt): the best averaged weights, in eval mode; .args: settings."""
    state = tv.load_checkpoint(path, device)
    if "ema" not in state:
        raise UserError(f"{path} is no prior's run: make one with train_prior.py --vae {path}")
    with tv.fits(path):
        model = make_prior(state["args"]).to(device)
        model.load_state_dict(state["best"])
    model.args = state["args"]
    return model.eval()


def make_prior(args: dict) -> PixelSNAIL:
    return PixelSNAIL(args["codebook_size"], args["map_size"], args["width"], args["blocks"], args["layers"],
                      args["dropout"])


# ------------------------------------------------------------------------------------------------------------- the loop

@torch.no_grad()
def nats_per_code(model: PixelSNAIL, codes: Tensor, args) -> float:
    """Mean -log p(z_p | z_<p) over maps (B, N, N) in eval mode; the model's mode is kept."""
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=codes.device)
    for batch in codes.split(128):
        with tv.autocast(args):
            logits = model(batch)
        total += F.cross_entropy(logits.float().flatten(0, 2), batch.flatten(), reduction="sum")
    model.train(training)
    return (total / codes.numel()).item()


def settings(argv=None) -> tuple:
    p, ckpt = parser(), None
    args, given = tv.parse(p, argv)
    tv.check_out(args)
    vae_args = tv.load_checkpoint(args.vae)["args"]
    codes = dict(codebook_size=vae_args["codebook_size"], map_size=vae_args["size"] // 4)
    if args.resume and (args.out / "ckpt.pt").exists():
        ckpt = tv.load_checkpoint(args.out)
        if "ema" not in ckpt:
            raise UserError(f"{args.out} holds no prior's checkpoint")
        tv.keep(args, given, tv.checked(ckpt["args"], p, args.out, FREE), FREE)
        for name, value in codes.items():
            if getattr(args, name, None) != value:
                raise UserError(f"{args.out} was fitted to other codes than those of {args.vae}: its {name} is "
                                f"{getattr(args, name, None)}, not {value}")
    vars(args).update(codes)
    args.vae, args.data_dir = args.vae.resolve(), args.data_dir or Path(vae_args["data_dir"])
    args.preset = args.preset or ("small" if vae_args["dataset"] == "shapes" else "full")
    preset = SMALL if args.preset == "small" else FULL | dict(blocks=BLOCKS.get(args.map_size, 4))
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.eval_every = args.eval_every or max(1, args.steps // 20)
    if args.batch_size % (tv.WORLD * args.grad_accum):
        raise UserError(f"--batch-size {args.batch_size} cannot be split over {tv.WORLD} processes of "
                        f"{args.grad_accum} parts")
    if args.width % 16:
        raise UserError(f"--width {args.width} must be a multiple of 16: eight heads share half of it")
    tv.resolve_device(args)
    return args, ckpt


def train(args, ckpt=None) -> Path:
    """Fit the prior; returns the run's folder."""
    # 1. the codes: 5% of the training set held out, to stop by; the test split, to report
    device = torch.device(args.device)
    tv.start_processes(device)
    codes = load_codes(args.vae, "train", args.data_dir, device)
    if len(codes) < 2:
        raise UserError(f"{args.vae} was trained on a single image; a prior needs at least 2, since it holds some out")
    test = load_codes(args.vae, "test", args.data_dir, device)
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0)).to(device)
    held, codes = codes[order[:max(1, len(codes) // 20)]], codes[order[max(1, len(codes) // 20):]]
    counts = torch.bincount(codes.flatten(), minlength=args.codebook_size)
    p = counts.double() / counts.sum()
    unigram = -(torch.bincount(test.flatten(), minlength=len(p)) / test.numel() * (p + 1e-12).log()).sum().item()
    yardsticks = dict(uniform=math.log(args.codebook_size), unigram=unigram)
    if math.exp(unigram) < 2:
        print(f"warning: the codes hardly vary (perplexity {math.exp(unigram):.2f}): the first stage has collapsed, "
              f"and no prior will make images of it", file=sys.stderr)

    # 2. model, average and optimiser
    torch.manual_seed(args.seed)
    model, ema = make_prior(vars(args)).to(device), make_prior(vars(args)).to(device)
    ema.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    start, best, waited, best_state = 0, math.inf, 0, ema.state_dict()
    if ckpt:
        with tv.fits(args.out):
            for module, name in ((model, "model"), (ema, "best"), (ema, "ema")):   # best: read here, used at the end
                module.load_state_dict(ckpt[name])
            optimizer.load_state_dict(ckpt["optimizer"])
            torch.set_rng_state(ckpt["generator"].cpu())
            start, best, waited, best_state = ckpt["step"], ckpt["best_nats"], ckpt["waited"], ckpt["best"]
    if tv.RANK:
        torch.manual_seed(args.seed + tv.RANK)                                     # other dropout on each process
    step_model, share = tv.spread(model, device), args.batch_size // tv.WORLD
    folder = tv.fresh_folder(args, f"prior-{args.vae.name}")
    tv.write_args(args, folder)
    log = tv.Log(folder, start)
    if not tv.RANK:
        print(f"{folder}: PixelSNAIL, {sum(p.numel() for p in model.parameters()):,} parameters, {len(codes):,} maps "
              f"of {args.map_size} x {args.map_size} codes; nats a code: uniform {yardsticks['uniform']:.3f}, unigram "
              f"{unigram:.3f}", flush=True)

    def save(step):
        tv.RANK or tv.save_checkpoint(folder, dict(
            model=model.state_dict(), ema=ema.state_dict(), best=best_state, optimizer=optimizer.state_dict(),
            step=step, best_nats=best, waited=waited, args=tv.plain(args), generator=torch.get_rng_state()))

    # 3. steps
    with tv.Interrupts() as stop:
        seen, clock = torch.zeros((), device=device), time.perf_counter()
        bad = torch.full((3,), -1.0, device=device)                                # the first step not finite, its loss
        for step in range(start, args.steps):
            optimizer.param_groups[0]["lr"] = args.lr * (1 + math.cos(math.pi * step / args.steps)) / 2
            index = tv.batch_indices(step, args.batch_size, len(codes), args.seed)[tv.RANK * share:][:share]
            optimizer.zero_grad(set_to_none=True)
            loss, parts = 0.0, codes[index.to(device)].chunk(args.grad_accum)
            for i, part in enumerate(parts):
                alone = tv.many() and i + 1 < len(parts)                           # the last part's backward averages
                with step_model.no_sync() if alone else contextlib.nullcontext():
                    with tv.autocast(args):
                        logits = step_model(part)                                  # (B, N, N, K)
                    nats = F.cross_entropy(logits.float().flatten(0, 2), part.flatten()) / len(parts)
                    nats.backward()
                loss += nats.detach()                                              # nats a code
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            now = torch.stack([torch.full_like(norm, step), loss, norm])
            bad = torch.where((bad[0] < 0) & ~now.isfinite().all(), now, bad)
            decay = min(args.ema, (1 + step) / (10 + step))                        # the average forgets its first steps
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
            seen += loss

            # 4. records
            done = step + 1
            last = done == args.steps or stop.agreed(done % args.eval_every == 0)
            if done % args.eval_every == 0 or last:
                if bad[0] >= 0:
                    at, *told = bad.tolist()
                    index = tv.batch_indices(int(at), args.batch_size, len(codes), args.seed).to(device)
                    tv.leave_postmortem(folder, int(at), dict(codes=codes[index].cpu()),
                                        dict(zip(("loss", "gradient norm"), told)))
                spent = time.perf_counter() - clock
                trained = tv.total(seen).item() / tv.WORLD / ((done - 1) % args.eval_every + 1)
                nats = nats_per_code(ema, held, args)
                waited += 1
                if nats < best:
                    best, waited, best_state = nats, 0, {k: v.clone() for k, v in ema.state_dict().items()}
                left = (args.steps - done) * spent / args.eval_every / 60
                log.write(done, dict(loss=trained, held_out=nats, **yardsticks),
                          f"train {trained:.3f}  held out {nats:.3f} nats a code ({nats / math.log(2):.3f} bits)  "
                          f"{left:.1f} min left")
                seen.zero_()
                save(done)
                if waited >= args.patience:
                    tv.RANK or print(f"no better for {waited} evaluations: stopping")
                    break
                clock = time.perf_counter()
            if last:
                break
    if stop:
        stop.leave(f"python train_prior.py --vae {args.vae} --out {folder} --resume", done)
    ema.load_state_dict(best_state)
    nats = nats_per_code(ema, test, args)
    log.write(done if start < args.steps else start, dict(split="test", prior_nats_per_code=nats, **yardsticks),
              f"test split: {nats:.3f} nats a code, {nats / math.log(2):.3f} bits (unigram {unigram:.3f}, uniform "
              f"{yardsticks['uniform']:.3f} nats)")
    tv.RANK or print(f"{folder}/: ckpt.pt, log.jsonl, args.json; next: python sample.py --prior {folder}")
    return folder


def main(argv=None):
    tv.tune_cpu()
    try:
        with tv.clear_errors("train_prior.py"):
            train(*settings(argv))
    finally:
        tv.release()
        if tv.many():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
