"""Stage 2: fit a PixelSNAIL prior (Chen et al. 2018) to the codes of a trained model.

    python train_prior.py --vae runs/NAME                    # 20,000 steps: hours on a CPU
    python train_prior.py --vae runs/NAME --preset small     # two minutes on two CPU cores
    torchrun --standalone --nproc_per_node=4 train_prior.py --vae runs/NAME

The training images are encoded once to indices (B, N, N). In raster order the prior factorises

    p(z) = prod_p p(z_p | z_<p),    loss = -mean log p(z_p | z_<p), nats per code,

and is judged on codes that it has not seen, beside two references: log K, which knows nothing, and
a unigram model, which knows the frequencies of the training codes but no context.

Every layer runs in two ways: over a whole map, to train; or one position at a time with a Cache of
what its receptive field still needs, to sample. So each layer computes each position once: N^2
position evaluations per map, where running the network anew at each position takes N^4.
"""

import argparse
import hashlib
import math
import os
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import kernels
from train_vae import (
    Run,
    UserError,
    batch_indices,
    join_processes,
    load_checkpoint,
    load_images,
    load_vae,
    number,
    prepare_device,
    refuse_changes,
    run_script,
    saved_run,
)

# --------------------------------------------------------------------------------------- the codes


def checkpoint_file(path) -> Path:
    """A run's checkpoint; path: the run's folder, or the file itself."""
    path = Path(path)
    return path / "ckpt.pt" if path.is_dir() else path


def checkpoint_digest(path, *arrays: np.ndarray) -> str:
    """A hash of a checkpoint, and of arrays beside it."""
    digest = hashlib.sha256(checkpoint_file(path).read_bytes())
    for array in arrays:
        digest.update(array.reshape(-1))
    return digest.hexdigest()[:12]


def find_vae(prior, saved: dict) -> Path:
    """A prior's first stage: by its path from the prior's folder, else where it was at first."""
    folder = checkpoint_file(prior).resolve().parent
    places = [folder / saved[name] for name in ("vae_relative", "vae") if name in saved]
    for place in places:
        if checkpoint_file(place).is_file() and checkpoint_digest(place) == saved["vae_digest"]:
            return place
    return places[-1]


def check_codes(prior: "PixelSNAIL", vae):
    """UserError unless the checkpoint at vae is the one to whose codes the prior was fitted."""
    if not checkpoint_file(vae).is_file():
        where = f"neither where it was beside the prior nor at {vae}"
        raise UserError(f"the prior's first stage is {where}; name its run by --vae")
    if checkpoint_digest(vae) != prior.args.vae_digest:
        raise UserError(f"{vae} is not the checkpoint that the prior was fitted to")


def load_codes(vae, split: str, K: int, data_dir=None, device="cpu") -> Tensor:
    """The codes of a split's images, int64 (B, N, N) below K, by the first stage at vae.

    They are kept beside its checkpoint, under a hash of the checkpoint and the images.
    """
    model = load_vae(vae, device)
    args = model.args
    images = load_images(args.dataset, split, data_dir or args.data_dir, args.size)
    digest = checkpoint_digest(vae, images)
    cache = checkpoint_file(vae).parent / f"codes-{split}-{digest}.npy"
    if not cache.exists():
        batches = torch.from_numpy(images).split(args.batch_size)
        floats = (x.to(device).permute(0, 3, 1, 2) / 255 for x in batches)  # (B, 3, H, W)
        codes = torch.cat([model.encode(x).short().cpu() for x in floats])  # K is at most 16,384
        part = cache.with_name(f".{os.getpid()}-{cache.name}")
        try:
            np.save(part, codes.numpy())
            os.replace(part, cache)  # whole or not at all
        except OSError as e:
            part.unlink(missing_ok=True)
            print(f"the codes are not kept for the next time: {cache.parent}: {e.strerror}")
            return codes.long().to(device)
    try:
        codes = torch.from_numpy(np.load(cache, allow_pickle=False)).long()
        if not 0 <= codes.min() <= codes.max() < K:
            raise ValueError(f"codes outside 0 to {K - 1}")
    except Exception as e:  # a malformed header can raise any exception
        raise UserError(f"{cache} is damaged ({e}); delete it to encode again") from None
    return codes.to(device)


# ----------------------------------------------------------------------------------------- the net


class Cache:
    """What sampling keeps for B maps of N x N: convolutions' inputs and weights, keys and values.

    At each position `next_logits` reads it, `write_codes` adds the codes, `advance` goes on. The
    position is a tensor on the device, and no shape depends on it: one captured CUDA graph can be
    replayed at every position.
    """

    def __init__(self, B: int, N: int, device="cpu"):
        self.B, self.N, self.done = B, N, 0
        self.inputs, self.weights = {}, {}  # of each convolution
        self.keys_values = {}  # of each attention
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # i N + j
        self.column = self.position.clone()  # j
        self.slots = torch.arange(N * N + 1, device=device)

    def rows(self, conv: "CausalConv2d") -> Tensor:
        """The last rows of conv's input, zero where not yet written: (B, rows, columns, C)."""
        if conv not in self.inputs:
            rows, columns = conv.kernel_size
            shape = self.B, rows, self.N + columns - 1, conv.in_channels
            self.inputs[conv] = torch.zeros(shape, device=self.slots.device)
        return self.inputs[conv]

    def weight(self, conv: "CausalConv2d") -> Tensor:
        """conv's masked weight (rows columns C, n_out): weight norm is computed once."""
        if conv not in self.weights:
            masked = conv.weight * conv.mask
            self.weights[conv] = masked.permute(2, 3, 1, 0).flatten(0, 2).contiguous()
        return self.weights[conv]

    def write(self, conv: "CausalConv2d", x: Tensor):
        """Put x (B, C), conv's input at the present position, in its place."""
        at = self.column + conv.kernel_size[1] // 2
        self.rows(conv)[:, -1].index_copy_(1, at, x[:, None])

    def advance(self):
        """Go to the next position. At the end of a row all rows move up, and zeros come in."""
        self.done += 1
        self.position.fill_(self.done)
        self.column.fill_(self.done % self.N)
        if self.done % self.N == 0:
            for rows in self.inputs.values():
                rows[:, :-1] = rows[:, 1:].clone()
                rows[:, -1] = 0

    def reset(self):
        """Back to position 0 of empty maps."""
        self.done = 0
        for x in (self.position, self.column, *self.inputs.values()):
            x.zero_()


class CausalConv2d(nn.Conv2d):
    """Sees the rows above, and its own row to the left; with `centre` its own position too."""

    def __init__(self, n_in: int, n_out: int, rows: int = 1, columns: int = 1, centre: bool = True):
        super().__init__(n_in, n_out, (rows, columns))
        mask = torch.ones(rows, columns)
        mask[-1, columns // 2 + centre :] = 0
        self.register_buffer("mask", mask, persistent=False)
        self.centre = centre
        weight_norm(self)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        rows, columns = self.kernel_size
        if cache is None:
            x = F.pad(x, (columns // 2, columns // 2, rows - 1, 0))
            return F.conv2d(x, self.weight * self.mask, self.bias)  # (B, n_out, N, N)
        if rows == columns == 1:
            window = x[:, :, 0, 0]  # (B, C)
        else:
            if self.centre:
                cache.write(self, x[:, :, 0, 0])
            here = cache.column + torch.arange(columns, device=cache.column.device)
            window = cache.rows(self).index_select(2, here).flatten(1)  # (B, rows columns C)
        out = torch.addmm(self.bias, window, cache.weight(self))
        return out[:, :, None, None]  # (B, n_out, 1, 1)


class GatedResBlock(nn.Module):
    """x + GLU(conv(drop(ELU(conv(ELU(x)) + conv1x1(ELU(aux)))))): causal convolutions."""

    def __init__(self, n: int, hidden: int, dropout: float, rows=1, columns=1, aux=0):
        super().__init__()
        self.conv1 = CausalConv2d(n, hidden, rows, columns)
        self.aux = CausalConv2d(aux, hidden) if aux else None
        self.conv2 = CausalConv2d(hidden, 2 * n, rows, columns)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: Cache | None = None, aux: Tensor | None = None) -> Tensor:
        h = self.conv1(F.elu(x), cache)
        if self.aux:
            h = h + self.aux(F.elu(aux), cache)
        return x + F.glu(self.conv2(self.dropout(F.elu(h)), cache), 1)


class CausalAttention(nn.Module):
    """Attention over strictly earlier positions.

    A null key with value zero stands first. Position 0 attends to it alone and gets exactly zero,
    where a softmax over nothing would be nan.
    """

    def __init__(self, n_query: int, n_key: int, n: int, heads: int = 8):
        super().__init__()
        self.query = weight_norm(nn.Linear(n_query, n, bias=False))
        self.key = weight_norm(nn.Linear(n_key, n, bias=False))
        self.value = weight_norm(nn.Linear(n_key, n, bias=False))
        self.heads = heads

    def split(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, heads, H W, n / heads)."""
        return linear(x.flatten(2).transpose(1, 2)).unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, query: Tensor, key: Tensor, cache: Cache | None = None) -> Tensor:
        B, _, H, W = query.shape
        q = self.split(self.query, query)
        k = self.split(self.key, key)
        v = self.split(self.value, key)
        if cache is None:
            k = F.pad(k, (0, 0, 1, 0))  # null, position 0, 1, ...
            v = F.pad(v, (0, 0, 1, 0))
            mask = torch.ones(H * W, H * W + 1, dtype=torch.bool, device=q.device).tril()
            if q.device.type == "cpu":  # bf16's backward is ten times slower there
                q, k, v = q.float(), k.float(), v.float()
            with torch.autocast(q.device.type, enabled=False):
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            if self not in cache.keys_values:
                shape = B, self.heads, cache.N**2 + 1, k.shape[-1]
                cache.keys_values[self] = torch.zeros(2, *shape, device=q.device).unbind()
            keys, values = cache.keys_values[self]
            seen = (cache.slots <= cache.position)[None]  # null and all earlier positions
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
            keys.index_copy_(2, cache.position + 1, k)
            values.index_copy_(2, cache.position + 1, v)
        return out.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, (H, W))  # (B, n, H, W)


class PixelBlock(nn.Module):
    """Gated residual blocks of 5 x 5 causal convolutions, then attention to earlier positions."""

    def __init__(self, n: int, layers: int, dropout: float):
        super().__init__()
        self.res = nn.ModuleList(GatedResBlock(n, n, dropout, 5, 5) for _ in range(layers))
        self.key = GatedResBlock(2 * n + 2, n, dropout)
        self.query = GatedResBlock(n + 2, n, dropout)
        self.attention = CausalAttention(n + 2, 2 * n + 2, n // 2)
        self.out = GatedResBlock(n, n, dropout, aux=n // 2)

    def forward(self, x: Tensor, background: Tensor, cache: Cache | None = None) -> Tensor:
        out = x
        for block in self.res:
            out = block(out, cache)
        key = self.key(torch.cat([x, out, background], 1), cache)  # (B, 2n + 2, H, W)
        query = self.query(torch.cat([out, background], 1), cache)  # (B, n + 2, H, W)
        return self.out(out, cache, self.attention(query, key, cache))


class PixelSNAIL(nn.Module):
    """p(z_p | z_<p) over maps of N x N codes: forward(indices (B, N, N)) -> logits (B, N, N, K)."""

    def __init__(self, K: int, N: int, width=128, blocks=2, layers=4, dropout=0.1):
        super().__init__()
        self.size, self.sampler = N, None
        self.embedding = nn.Embedding(K, width)
        self.stem = CausalConv2d(width, width, 3, 5, centre=False)  # excludes the present position
        self.blocks = nn.ModuleList(PixelBlock(width, layers, dropout) for _ in range(blocks))
        self.head = CausalConv2d(width, K)
        coordinates = (torch.arange(N) - N / 2) / N
        background = torch.stack(torch.meshgrid(coordinates, coordinates, indexing="ij"))[None]
        self.register_buffer("background", background, persistent=False)  # (1, 2, N, N)

    def forward(self, indices: Tensor) -> Tensor:
        x = self.stem(self.embedding(indices).permute(0, 3, 1, 2))  # (B, n, N, N)
        return self.after_stem(x, self.background).permute(0, 2, 3, 1)  # (B, N, N, K)

    def after_stem(self, x: Tensor, background: Tensor, cache: Cache | None = None) -> Tensor:
        background = background.expand(len(x), -1, -1, -1)
        for block in self.blocks:
            x = block(x, background, cache)
        return self.head(F.elu(x), cache)

    def next_logits(self, cache: Cache) -> Tensor:
        """Logits (B, K) of the present position; `write_codes` has given the codes before it."""
        here = self.background.flatten(2).index_select(2, cache.position)[..., None]  # (1, 2, 1, 1)
        x = self.stem(None, cache)  # (B, n, 1, 1); no input: the cache holds all that it sees
        return self.after_stem(x, here, cache)[:, :, 0, 0]

    def write_codes(self, cache: Cache, codes: Tensor):
        """The codes (B) of the present position become known."""
        cache.write(self.stem, self.embedding(codes))

    @torch.no_grad()
    def sample(self, n: int, temperature=1.0, top_k=None, seed=0, first=0, given=None) -> Tensor:
        """n maps of codes (n, N, N), drawn position by position.

        temperature divides the logits; top_k keeps the most probable codes; given (n, N, N) fixes
        the codes where it is not negative. Map first + b has its own stream of random numbers, so
        the batch size changes it by rounding at most.
        """
        seeds = [(seed * 1_000_003 + first + b) % 2**63 for b in range(n)]
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        options = dict(dtype=torch.float64)
        uniform = [torch.rand(self.size**2, generator=g, **options) for g in generators]
        weights = sum(p._version for p in self.parameters())  # grows, but not by a CUDA graph
        if self.sampler is None or self.sampler.key != (n, temperature, top_k, weights):
            self.sampler = None  # frees the old one first
            self.sampler = Sampler(self, (n, temperature, top_k, weights))
        return self.sampler(torch.stack(uniform), given)


class Sampler:
    """Draws n maps from a PixelSNAIL.

    On a GPU each step is one CUDA graph, which reads and writes the memory that it was recorded
    with: so the sampler and its buffers stay from call to call.
    """

    def __init__(self, model: PixelSNAIL, key: tuple):
        self.model, self.key = model, key
        n, self.temperature, self.top_k, _ = key
        device, positions = model.background.device, model.size**2
        self.cache = Cache(n, model.size, device)
        self.uniform = torch.zeros(n, positions, dtype=torch.float64, device=device)
        self.given = torch.full((n, positions), -1, device=device)
        self.codes = torch.zeros_like(self.given)
        self.step = kernels.Graphed(self.draw) if device.type == "cuda" else self.draw

    def draw(self):
        """Draw the codes of the present position."""
        cache = self.cache
        logits = self.model.next_logits(cache).double() / self.temperature  # (n, K)
        if self.top_k:
            least = logits.topk(min(self.top_k, logits.shape[1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -math.inf)
        cumulative = logits.softmax(1).cumsum(1)
        threshold = self.uniform.index_select(1, cache.position) * cumulative[:, -1:]
        drawn = (cumulative <= threshold).sum(1, keepdim=True)  # (n, 1)
        fixed = self.given.index_select(1, cache.position)
        drawn = torch.where(fixed >= 0, fixed, drawn)
        self.codes.index_copy_(1, cache.position, drawn)
        self.model.write_codes(cache, drawn[:, 0])

    def __call__(self, uniform: Tensor, given: Tensor | None) -> Tensor:
        self.uniform.copy_(uniform)
        self.given.copy_(torch.tensor(-1) if given is None else given.flatten(1))
        self.cache.reset()
        for _ in range(uniform.shape[1]):
            self.step()
            self.cache.advance()
        return self.codes.unflatten(1, (self.model.size, -1)).clone()  # (n, N, N)


def make_prior(args: Namespace) -> PixelSNAIL:
    shape = args.width, args.blocks, args.layers, args.dropout
    model = PixelSNAIL(args.codebook_size, args.map_size, *shape)
    model.args = args
    return model


def load_prior(path, device="cpu") -> PixelSNAIL:
    """A trained prior from a run's folder or its checkpoint, in eval mode; or a UserError.

    Its weights are the averages at the best evaluation. .args are its settings, .args.vae is where
    its first stage is now.
    """
    state = load_checkpoint(path, device, "train_prior.py")
    model = make_prior(Namespace(**state["args"])).to(device)
    model.load_state_dict(state["best"])
    model.args.vae = find_vae(path, state["args"])
    return model.eval()


# ---------------------------------------------------------------------------------------- settings

# The later wins: DEFAULTS, what the first stage implies, PRESETS, a resumed run's, the flags.
DEFAULTS = dict(batch_size=64, layers=4, dropout=0.1, patience=10, seed=42)
PRESETS = {
    "small": dict(steps=2000, width=32, blocks=1, lr=2e-3, ema=0.99),
    "full": dict(steps=20_000, width=128, lr=3e-4, ema=0.9995),  # blocks: by the map's size
}
MAY_CHANGE = {"vae", "data_dir", "patience", "log_every", "eval_every"}  # on --resume


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="train_prior.py",
        description="Fit a PixelSNAIL prior to the codes of a run of train_vae.py. A flag left "
        "out takes the preset: small for a run on shapes, else full.",
    )
    count, layers = number(int, 1, 10**12), number(int, 1, 64)

    def flag(name, kind, help):
        group.add_argument(name, type=kind, help=help, metavar=name.lstrip("-").upper())

    group = p.add_argument_group("the run")
    flag("--vae", Path, "model the codes of this run (needed, except to --resume)")
    flag("--data-dir", str, "find its data here (default: where that run found it)")
    group.add_argument("--preset", choices=PRESETS, help="take these settings for flags left out")
    flag("--out", Path, "write the run here (default: a new folder under runs/)")
    group.add_argument("--resume", action="store_true", help="continue the run in --out")
    flag("--seed", number(int, 0, 2**63 - 1), "seed weights, dropout and order (default: 42)")
    group = p.add_argument_group("the network")
    flag("--width", number(int, 16, 4096), "channels, a multiple of 16 (default: 128; small: 32)")
    flag("--blocks", layers, "PixelBlocks (default: 2 to 4, by the map's size; small: 1)")
    flag("--layers", layers, "gated residual blocks in each of them (default: 4)")
    flag("--dropout", number(float, 0, 0.95), "drop in every residual block (default: 0.1)")
    group = p.add_argument_group("training")
    flag("--steps", count, "default: 20000; small: 2000")
    flag("--batch-size", count, "maps per step, over all processes (default: 64)")
    flag("--lr", number(float, 1e-30, 1e30), "first learning rate (default: 3e-4; small: 2e-3)")
    flag("--ema", number(float, 0, 0.999999), "decay of the averaged weights (0.9995; small: 0.99)")
    flag("--patience", count, "stop after so many evaluations without a gain (default: 10)")
    group = p.add_argument_group("the machine and the log")
    flag("--device", str, "cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    precision = "compute convolutions and attention in this (default: bf16 where it is faster)"
    group.add_argument("--precision", choices=("fp32", "bf16"), help=precision)
    flag("--log-every", count, "steps between log lines (default: a sixtieth of the run)")
    flag("--eval-every", count, "steps between evaluations (default: a twentieth, at least 250)")
    return p


def settings(argv=None) -> tuple[Namespace, dict | None]:
    """Every setting of a run, and --resume's checkpoint, or None."""
    join_processes()
    p = parser()
    args = p.parse_args(argv)
    checkpoint, saved = saved_run(args, p.prog)
    if not args.vae and not checkpoint:
        raise UserError("--vae is required: the run of train_vae.py whose codes to model")
    path = (args.vae or find_vae(args.out, saved)).resolve()
    vae = load_checkpoint(path, script="train_vae.py")["args"]
    N = vae["size"] // 4
    codes = dict(codebook_size=vae["codebook_size"], map_size=N, vae_digest=checkpoint_digest(path))
    if checkpoint and any(saved[name] != value for name, value in codes.items()):
        raise UserError(f"{args.out} was fitted to other codes than those of {path}")
    usual = "small" if vae["dataset"] == "shapes" else "full"
    preset = args.preset or saved.get("preset", usual)
    first = dict(preset=preset, blocks=2 if N <= 8 else 3 if N <= 16 else 4)
    first |= codes | dict(data_dir=vae["data_dir"])
    p.set_defaults(**DEFAULTS | first | PRESETS[preset] | saved)
    args = p.parse_args(argv)  # what is given wins
    refuse_changes(args, saved, MAY_CHANGE)
    args.vae = path
    args.log_every = args.log_every or max(1, args.steps // 60)
    args.eval_every = args.eval_every or max(250, args.steps // 20)
    if args.width % 16:
        raise UserError(f"--width {args.width} must be a multiple of 16: 8 heads share half of it")
    _, processes = process()
    if args.batch_size % processes:
        raise UserError(f"{processes} processes cannot share --batch-size {args.batch_size}")
    args.device, args.precision = prepare_device(args.device, args.precision)
    return args, checkpoint


# ------------------------------------------------------------------------------- the training loop


def process() -> tuple[int, int]:
    """The number of this process of a torchrun, and how many there are."""
    group = torch.distributed
    return (group.get_rank(), group.get_world_size()) if group.is_initialized() else (0, 1)


@torch.no_grad()
def nats_per_code(model: PixelSNAIL, codes: Tensor) -> float:
    """Mean -log p(z_p | z_<p) over maps (B, N, N), by a model in eval mode, in fp32."""
    rank, processes = process()
    total = torch.zeros((), dtype=torch.float64, device=codes.device)
    for z in codes[rank::processes].split(model.args.batch_size // processes):
        total += F.cross_entropy(model(z).flatten(0, 2), z.flatten(), reduction="sum")
    if processes > 1:
        torch.distributed.all_reduce(total)
    return total.item() / codes.numel()


def train(args: Namespace, checkpoint: dict | None = None) -> Path:
    """Fit the prior as args say, from the checkpoint if there is one; returns the run's folder."""
    # 1. the codes: 5% of the training set for early stopping; the test split to report
    device = torch.device(args.device)
    rank, processes = process()
    if rank:
        torch.distributed.barrier()  # the first process encodes, the others find its files
    codes, test = (
        load_codes(args.vae, split, args.codebook_size, args.data_dir, device)
        for split in ("train", "test")
    )
    if processes > 1 and not rank:
        torch.distributed.barrier()
    if len(codes) < 2:
        raise UserError(f"{args.vae} was trained on a single image; a prior needs at least 2")
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0)).to(device)
    held_out = max(1, len(codes) // 20)
    validation, codes = codes[order[:held_out]], codes[order[held_out:]]
    p = torch.bincount(codes.flatten(), minlength=args.codebook_size).double() / codes.numel()
    test_p = torch.bincount(test.flatten(), minlength=args.codebook_size) / test.numel()
    unigram = -(test_p * (p + 1e-12).log()).sum().item()
    references = dict(uniform=math.log(args.codebook_size), unigram=unigram)

    # 2. the tensors that the loop fills and the step reads
    share = args.batch_size // processes
    index = torch.zeros(share, dtype=torch.int64, device=device)  # which maps
    lr, pull = (torch.zeros((), device=device) for _ in range(2))  # pull: 1 - the EMA's decay
    loss_sum = torch.zeros((), device=device)  # since the last log line

    # 3. model, averaged weights and optimiser
    torch.manual_seed(args.seed)
    model, ema = make_prior(args).to(device), make_prior(args).to(device).eval()
    ema.load_state_dict(model.state_dict())
    options = dict(fused=True, capturable=lr.is_cuda)  # a CUDA graph can record it
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, **options)
    parts = dict(model=model, ema=ema, optimizer=optimizer)
    start, waited, best_nats = 0, 0, math.inf
    best = ema.state_dict()  # at the best evaluation
    if checkpoint:
        start, waited, best_nats, best = (
            checkpoint[name] for name in ("step", "waited", "best_nats", "best")
        )
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        optimizer.param_groups[0].update(lr=lr, capturable=lr.is_cuda)  # this loop's, this device's
        torch.set_rng_state(checkpoint["generator"])  # of the dropout
        if device.type == "cuda" and "cuda_generator" in checkpoint:
            torch.cuda.set_rng_state(checkpoint["cuda_generator"])
    if rank:
        torch.manual_seed(args.seed + rank + start)  # different dropout on each process
    parallel = nn.parallel.DistributedDataParallel  # averages gradients over processes
    step_model = parallel(model) if processes > 1 else model

    # 4. the step: all that runs on the device
    def step():
        z = codes[index]  # (share, N, N)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            logits = step_model(z)  # (share, N, N, K)
        loss = F.cross_entropy(logits.float().flatten(0, 2), z.flatten())
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for average, weight in zip(ema.parameters(), model.parameters()):
                average.lerp_(weight, pull)
        loss_sum.add_(loss.detach())

    if device.type == "cuda" and processes == 1:
        step = kernels.Graphed(step)

    def fill(i: int):
        """The step's inputs are functions of i, so that a resumed run sees the same."""
        lr.fill_(args.lr * (1 + math.cos(math.pi * i / args.steps)) / 2)
        pull.fill_(1 - min(args.ema, (1 + i) / (10 + i)))  # the average forgets its first steps
        maps = batch_indices(i, args.batch_size, len(codes), args.seed)[rank * share :][:share]
        index.copy_(maps.pin_memory() if device.type == "cuda" else maps, non_blocking=True)

    # 5. the loop
    run = Run(args, f"prior-{args.vae.name.removesuffix('.pt')}", start)
    args.vae_relative = os.path.relpath(args.vae, run.folder.resolve())
    if run.tested == start and (start == args.steps or waited >= args.patience):
        raise UserError(f"{run.folder} is finished; name another --out for a new run")
    run.print(
        f"{run.folder}: PixelSNAIL, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{len(codes):,} maps of {args.map_size} x {args.map_size} codes; nats per code: "
        f"uniform {references['uniform']:.3f}, unigram {unigram:.3f}"
    )
    if math.exp(unigram) < 2:
        run.print("the codes hardly vary: the first stage has collapsed")
    done = logged = start
    began = time.perf_counter()

    def save():
        states = {name: part.state_dict() for name, part in parts.items()}
        run.save(done, **states, best=best, best_nats=best_nats, waited=waited)

    with run:
        save()
        while done < args.steps and waited < args.patience:
            fill(done)
            step()
            done += 1
            evaluate = done % args.eval_every == 0 or done == args.steps
            if not evaluate and done % args.log_every:
                continue
            if processes > 1:
                torch.distributed.all_reduce(loss_sum)
            line = dict(loss=loss_sum.item() / processes / (done - logged))  # here the host waits
            finite = all(p.isfinite().all() for p in ema.parameters())
            if not finite or not math.isfinite(line["loss"]):
                saved = f"{run.folder}/ckpt.pt is from step {run.saved_step}"
                steps = f"steps {logged + 1} to {done}"
                run.print(f"the loss or a weight is not finite, in {steps}; {saved}")
                sys.exit(1)
            text = f"train {line['loss']:.3f}"
            if evaluate:
                nats = nats_per_code(ema, validation)
                waited += 1
                if nats < best_nats:
                    best_nats, waited = nats, 0
                    best = {k: v.clone() for k, v in ema.state_dict().items()}
                line |= dict(validation=nats)
                text += f"  validation {nats:.3f}"
            left = (args.steps - done) * (time.perf_counter() - began) / (done - start) / 60
            run.log(done, line, f"{text} nats per code  {left:.1f} min left")
            loss_sum.zero_()
            logged = done
            if run.save_is_due():
                save()
        save()
        if done < args.steps:
            run.print(f"no better for {waited} evaluations: stopped early")
        ema.load_state_dict(best)
        nats = nats_per_code(ema, test)
        text = f"test split: {nats:.3f} nats per code, {nats / math.log(2):.3f} bits"
        run.log(done, dict(split="test", prior_nats_per_code=nats, **references), text)
    run.print(f"{run.folder}/: ckpt.pt, log.jsonl; next: python sample.py --prior {run.folder}")
    return run.folder


def main(argv=None):
    run_script("train_prior.py", lambda argv: train(*settings(argv)), argv)


if __name__ == "__main__":
    main()
