"""Stage 2: fit a PixelSNAIL prior (Chen et al. 2018) to the codes of a trained model.

    python train_prior.py --vae runs/NAME                    # 20,000 steps: hours on a CPU
    python train_prior.py --vae runs/NAME --preset small     # two minutes on two CPU cores
    torchrun --standalone --nproc_per_node=4 train_prior.py --vae runs/NAME

The training images are encoded once to indices (B, N, N). In raster order the prior factorizes

    p(z) = prod_p p(z_p | z_<p),    loss = -mean log p(z_p | z_<p), nats per code,

and is judged on codes that it has not seen, beside two references: log K, which knows nothing, and
a unigram model, which knows the frequencies of the training codes but no context.

Every layer runs in two ways: over a whole map, to train; or one position at a time with a Cache of
what its receptive field still needs, to sample. So each layer computes each position once: N^2
position evaluations per map, where running the network anew at each position takes N^4.

In order: the network, the sampler, settings, the training loop; then the codes.
"""

import copy
import hashlib
import math
import os
import shlex
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
    all_reduce_sum,
    atomic_write,
    batch_indices,
    checkpoint_file,
    join_processes,
    load_checkpoint,
    load_images,
    load_state,
    load_vae,
    parse_flags,
    prepare_device,
    process_count,
    rank,
    run_script,
    saved_run,
    to_float,
    tune_cpu,
)

# ------------------------------------------------------------------------------------- the network


class CausalConv2d(nn.Conv2d):
    """Sees the rows above, and its own row to the left; with `center` its own position too."""

    def __init__(self, n_in: int, n_out: int, rows: int = 1, columns: int = 1, center: bool = True):
        super().__init__(n_in, n_out, (rows, columns))
        mask = torch.ones(rows, columns)
        mask[-1, columns // 2 + center :] = 0
        self.register_buffer("mask", mask, persistent=False)
        self.center = center
        weight_norm(self)

    def forward(self, x: Tensor, cache: "Cache | None" = None) -> Tensor:
        rows, columns = self.kernel_size
        if cache is None:
            x = F.pad(x, (columns // 2, columns // 2, rows - 1, 0))
            return F.conv2d(x, self.weight * self.mask, self.bias)  # (B, n_out, N, N)
        if rows == columns == 1:
            window = x[:, :, 0, 0]  # (B, C)
        else:
            if self.center:
                cache.write(self, x[:, :, 0, 0])
            window = cache.input(self).index_select(1, cache.window(self))
            window = window.flatten(1)  # (B, rows columns C)
        out = torch.addmm(self.bias, window, cache.weight(self))
        return out[:, :, None, None]  # (B, n_out, 1, 1)


class GatedResBlock(nn.Module):
    """x + GLU(conv(drop(ELU(conv(ELU(x)) + conv1x1(ELU(aux)))))): causal convolutions."""

    def __init__(self, n: int, hidden: int, dropout: float, rows=1, columns=1, aux=0):
        super().__init__()
        self.conv1 = CausalConv2d(n, hidden, rows, columns)
        self.aux = CausalConv2d(aux, hidden) if aux else None
        self.conv2 = CausalConv2d(hidden, 2 * n, rows, columns)
        self.dropout = dropout

    def forward(self, x: Tensor, cache: "Cache | None" = None, aux: Tensor | None = None) -> Tensor:
        h = self.conv1(F.elu(x), cache)
        if self.aux:
            h = h + self.aux(F.elu(aux), cache)
        h = F.dropout(F.elu(h), self.dropout, self.training and cache is None)
        return x + F.glu(self.conv2(h, cache), 1)


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

    def forward(self, query: Tensor, key: Tensor, cache: "Cache | None" = None) -> Tensor:
        H, W = query.shape[2:]
        q = self.split(self.query, query)
        k = self.split(self.key, key)
        v = self.split(self.value, key)
        if cache is None:
            k = F.pad(k, (0, 0, 1, 0))  # null, position 0, 1, ...
            v = F.pad(v, (0, 0, 1, 0))
            mask = torch.ones(H * W, H * W + 1, dtype=torch.bool, device=q.device).tril()
            if q.device.type == "cpu":  # bf16's backward is ten times slower there
                q, k, v = (x.to(query.dtype) for x in (q, k, v))
            with torch.autocast(q.device.type, enabled=False):
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            if self not in cache.keys_values:
                shape = *k.shape[:2], cache.N**2 + 1, k.shape[3]
                cache.keys_values[self] = k.new_zeros(shape), k.new_zeros(shape)
            keys, values = cache.keys_values[self]  # (B, heads, 1 + N N, n / heads)
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

    def forward(self, x: Tensor, background: Tensor, cache: "Cache | None" = None) -> Tensor:
        out = x
        for block in self.res:
            out = block(out, cache)
        key = self.key(torch.cat([x, out, background], 1), cache)  # (B, 2n + 2, H, W)
        query = self.query(torch.cat([out, background], 1), cache)  # (B, n + 2, H, W)
        return self.out(out, cache, self.attention(query, key, cache))


class PixelSNAIL(nn.Module):
    """p(z_p | z_<p) over maps of N x N codes: forward(indices (B, N, N)) -> logits (B, N, N, K)."""

    def __init__(self, args: Namespace):
        super().__init__()
        self.args = args
        K, N, n = args.codebook_size, args.map_size, args.width
        self.embedding = nn.Embedding(K, n)
        self.stem = CausalConv2d(n, n, 3, 5, center=False)  # excludes the present position
        blocks = (PixelBlock(n, args.layers, args.dropout) for _ in range(args.blocks))
        self.blocks = nn.ModuleList(blocks)
        self.head = CausalConv2d(n, K)
        coordinates = (torch.arange(N) - N / 2) / N
        background = torch.stack(torch.meshgrid(coordinates, coordinates, indexing="ij"))[None]
        self.register_buffer("background", background, persistent=False)  # (1, 2, N, N)

    def forward(self, indices: Tensor) -> Tensor:
        x = self.stem(self.embedding(indices).permute(0, 3, 1, 2))  # (B, n, N, N)
        return self.after_stem(x, self.background).permute(0, 2, 3, 1)  # (B, N, N, K)

    def after_stem(self, x: Tensor, background: Tensor, cache: "Cache | None" = None) -> Tensor:
        background = background.expand(len(x), -1, -1, -1)
        for block in self.blocks:
            x = block(x, background, cache)
        return self.head(F.elu(x), cache)

    def next_logits(self, cache: "Cache") -> Tensor:
        """Logits (B, K) of the present position; `write_codes` has given the codes before it."""
        here = self.background.flatten(2).index_select(2, cache.position)[..., None]  # (1, 2, 1, 1)
        with torch.autocast(here.device.type, enabled=False):
            x = self.stem(None, cache)  # (B, n, 1, 1); no input: the cache holds all that it sees
            return self.after_stem(x, here, cache)[:, :, 0, 0]

    def write_codes(self, cache: "Cache", codes: Tensor):
        """The codes (B) of the present position become known; the next one is present."""
        cache.write(self.stem, self.embedding(codes))
        cache.position += 1

    @torch.no_grad()
    def sample(
        self, n: int, temperature=1.0, top_k=None, seed=0, first=0, given=None, batch_size=256
    ) -> Tensor:
        """n maps of codes, int64 (n, N, N), drawn position by position, batch_size at a time.

        temperature divides the logits; top_k keeps the most probable codes; given (n, N, N) fixes
        the codes where it is not negative. Map b is drawn by stream first + b of random numbers, so
        the batch size changes it by rounding at most. With several batches stderr shows progress.
        Raises ValueError for what cannot be.
        """
        N, K, device = self.args.map_size, self.args.codebook_size, self.background.device
        possible = n >= 1 and batch_size >= 1 and temperature >= 1e-30  # nan is not
        if not possible or top_k is not None and top_k < 1:
            least = "n, batch_size and top_k must be 1 or more, temperature 1e-30 or more"
            raise ValueError(f"{least}, not {n}, {batch_size}, {top_k}, {temperature}")
        if given is None:
            given = torch.full((n, N, N), -1)
        whole = not (given.is_floating_point() or given.dtype == torch.bool)
        if not whole or given.shape != (n, N, N) or given.max() >= K:
            raise ValueError(f"given must be {n, N, N} codes below {K}, not {tuple(given.shape)}")
        B = math.ceil(n / math.ceil(n / batch_size))  # equal batches; the last may draw some extra
        # Static input buffers: a CUDA graph reads these addresses.
        cache = Cache(B, N, device)
        uniform = torch.zeros(B, N * N, dtype=torch.float64, device=device)
        fixed = torch.zeros(B, N * N, dtype=torch.int64, device=device)
        codes = torch.zeros_like(fixed)

        def draw():
            """Draw the codes of the present position."""
            logits = self.next_logits(cache).double() / temperature  # (B, K)
            if top_k:
                least = logits.topk(min(top_k, K)).values[:, -1:]
                logits = logits.masked_fill(logits < least, -math.inf)
            cumulative = logits.softmax(1).cumsum(1)
            threshold = uniform.index_select(1, cache.position) * cumulative[:, -1:]
            drawn = (cumulative <= threshold).sum(1, keepdim=True)  # (B, 1)
            known = fixed.index_select(1, cache.position)
            drawn = torch.where(known >= 0, known, drawn)
            codes.index_copy_(1, cache.position, drawn)
            self.write_codes(cache, drawn[:, 0])

        step = kernels.Graphed(draw) if uniform.is_cuda else draw
        maps = []
        for start in range(0, n, B):
            for b in range(B):
                stream = (seed * 1_000_003 + first + start + b) % 2**63
                generator = torch.Generator().manual_seed(stream)
                uniform[b] = torch.rand(N * N, generator=generator, dtype=torch.float64)
            part = given[start : start + B].flatten(1)
            fixed[: len(part)] = part
            cache.position.zero_()
            for _ in range(N * N):
                step()
            maps.append(codes.clone())
            if B < n:  # stderr is not buffered
                end = "\r" if start + B < n else "\n"
                print(f"{min(n, start + B):,} of {n:,} maps", end=end, file=sys.stderr)
        return torch.cat(maps)[:n].unflatten(1, (N, N))


def load_prior(path, device="cpu", vae=None) -> PixelSNAIL:
    """A trained prior from a run's folder or its checkpoint, in eval mode; or a UserError.

    Its weights are the averages at the best evaluation. .args are its settings, .args.vae is where
    its first stage is now: at vae, or where `first_stage` finds it.
    """
    state = load_checkpoint(path, "train_prior.py")
    model = PixelSNAIL(Namespace(**state["args"]))
    load_state(model, state.get("best"), path)
    model.args.vae = first_stage(path, state["args"], vae)
    return model.to(device).eval()


# ------------------------------------------------------------------------------------- the sampler


class Cache:
    """What sampling keeps for B maps of N x N: convolutions' inputs and weights, keys and values.

    At each position `next_logits` reads it; `write_codes` adds the codes and goes on. The position
    is a tensor on the device, and no shape depends on it: one captured CUDA graph can be replayed
    at every position. Set it to 0 for new maps: what is left of others meets masked weights only.
    """

    def __init__(self, B: int, N: int, device="cpu"):
        self.B, self.N = B, N
        self.inputs, self.weights, self.windows = {}, {}, {}  # of convolutions
        self.keys_values = {}  # of attentions
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # i N + j
        self.slots = torch.arange(N * N + 1, device=device)

    def input(self, conv: CausalConv2d) -> Tensor:
        """conv's padded input, (B, (N + rows - 1) (N + columns - 1), C)."""
        if conv not in self.inputs:
            rows, columns = conv.kernel_size
            pixels = (self.N + rows - 1) * (self.N + columns - 1)
            self.inputs[conv] = conv.bias.new_zeros(self.B, pixels, conv.in_channels)
        return self.inputs[conv]

    def weight(self, conv: CausalConv2d) -> Tensor:
        """conv's masked weight (rows columns C, n_out): weight norm is computed once."""
        if conv not in self.weights:
            masked = conv.weight * conv.mask
            self.weights[conv] = masked.permute(2, 3, 1, 0).flatten(0, 2).contiguous()
        return self.weights[conv]

    def window(self, conv: CausalConv2d) -> Tensor:
        """Which pixels of its padded input conv sees from the present position: (rows columns)."""
        rows, columns = size = conv.kernel_size
        if size not in self.windows:
            H, W = self.N + rows - 1, self.N + columns - 1
            pixels = torch.arange(H * W, dtype=torch.float64, device=self.slots.device)
            self.windows[size] = F.unfold(pixels.view(1, 1, H, W), size)[0].T.long()  # by position
        return self.windows[size].index_select(0, self.position)[0]

    def write(self, conv: CausalConv2d, x: Tensor):
        """Put x (B, C), conv's input at the present position, in its place."""
        here = self.window(conv).unflatten(0, conv.kernel_size)[-1, conv.kernel_size[1] // 2]
        self.input(conv).index_copy_(1, here[None], x[:, None])


# ---------------------------------------------------------------------------------------- settings

# Every flag: its type, its default (None where a table below or the first stage decides), its help.
SETTINGS = dict(
    vae=(Path, None, "model the codes of this run (needed, except to --resume)"),
    data_dir=(Path, None, "find its data here (default: where that run found it)"),
    preset=(str, None, "take these settings (default: full; for a run on shapes small)"),
    width=(int, None, "channels, a multiple of 16 (default: 128; small: 32)"),
    blocks=(int, None, "PixelBlocks (default: 2 to 4, by the map's size; small: 1)"),
    layers=(int, 4, "gated residual blocks in each of them"),
    dropout=(float, 0.1, "drop in every residual block"),
    steps=(int, None, "training steps (default: 20000; small: 2000)"),
    batch_size=(int, 64, "maps per step, of all processes"),
    lr=(float, None, "first learning rate (default: 3e-4; small: 2e-3)"),
    ema=(float, None, "decay of the averaged weights (default: 0.9995; small: 0.99)"),
    seed=(int, 42, "seed weights, dropout and order"),
    out=(Path, None, "write the run here (default: a new folder under runs/)"),
    resume=(bool, False, "continue the run in --out"),
    device=(str, None, "cpu, cuda, cuda:1, ... (default: cuda where there is one)"),
    precision=(str, None, "compute convolutions and attention in this (default: on a GPU bf16)"),
    compile=(bool, True, "on a GPU record a step as a graph"),
    log_every=(int, None, "steps between log lines (default: a sixtieth of the run)"),
    eval_every=(int, None, "steps between evaluations (default: a twentieth, at least 250)"),
)
DEFAULTS = {name: default for name, (_, default, _) in SETTINGS.items()}
PRESETS = {
    "small": dict(steps=2000, width=32, blocks=1, lr=2e-3, ema=0.99),
    "full": dict(steps=20_000, width=128, lr=3e-4, ema=0.9995),  # blocks: by the map's size
}
CHOICES = dict(preset=PRESETS, precision=("fp32", "bf16"))
MAY_CHANGE = {"vae", "data_dir", "device", "compile", "log_every", "eval_every"}  # on --resume


def settings(argv=None) -> tuple[Namespace, dict | None]:
    """Every setting of a run, and --resume's checkpoint, or None."""
    given = parse_flags("train_prior.py", SETTINGS, CHOICES, argv)
    join_processes()
    checkpoint, saved = saved_run(given, "train_prior.py", MAY_CHANGE)
    if "vae" not in given and not checkpoint:
        raise UserError("--vae is required: the run of train_vae.py whose codes to model")
    path = first_stage(given["out"], saved, given.get("vae")) if checkpoint else Path(given["vae"])
    vae = load_checkpoint(path, "train_vae.py")["args"]
    N, first = vae["size"] // 4, saved | given
    preset = first.get("preset") or ("small" if vae["dataset"] == "shapes" else "full")
    device, precision = prepare_device(first.get("device"), first.get("precision"))
    args = Namespace(
        **DEFAULTS  # the later wins
        | dict(blocks=2 if N <= 8 else 3 if N <= 16 else 4, data_dir=vae["data_dir"])
        | dict(codebook_size=vae["codebook_size"], map_size=N, vae_digest=checkpoint_digest(path))
        | PRESETS[preset]
        | saved
        | given
        | dict(vae=str(path.resolve()), preset=preset, device=device, precision=precision)
    )
    args.log_every = args.log_every or max(1, args.steps // 60)
    args.eval_every = args.eval_every or max(250, args.steps // 20)
    if args.width % 16:
        raise UserError(f"--width {args.width} must be a multiple of 16: 8 heads share half of it")
    if args.batch_size % process_count():
        raise UserError(f"{process_count()} processes cannot share --batch-size {args.batch_size}")
    return args, checkpoint


# ------------------------------------------------------------------------------- the training loop


@torch.no_grad()
def nats_per_code(model: PixelSNAIL, codes: Tensor) -> float:
    """Mean -log p(z_p | z_<p) over maps (B, N, N), by a model in eval mode, in fp32."""
    total = torch.zeros((), dtype=torch.float64, device=codes.device)
    for z in codes[rank() :: process_count()].split(model.args.batch_size // process_count()):
        total += F.cross_entropy(model(z).flatten(0, 2), z.flatten(), reduction="sum")
    return all_reduce_sum(total).item() / codes.numel()


def train(args: Namespace, checkpoint: dict | None = None) -> Path:
    """Fit the prior as args say, from the checkpoint if there is one; returns the run's folder."""
    # 1. the codes: 5% of the training set to choose the best average; the test split to report
    device = torch.device(args.device)
    if rank():
        torch.distributed.barrier()  # the first process encodes, the others find its files
    codes, test = (
        load_codes(args.vae, split, args.codebook_size, args.data_dir, device)
        for split in ("train", "test")
    )
    if process_count() > 1 and not rank():
        torch.distributed.barrier()
    if len(codes) < 2:
        raise UserError(f"{args.vae} was trained on a single image; a prior needs at least 2")
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0)).to(device)
    held_out = max(1, len(codes) // 20)
    validation, codes = codes[order[:held_out]], codes[order[held_out:]]
    p = torch.bincount(codes.flatten(), minlength=args.codebook_size).double() / codes.numel()
    unigram = -(p + 1e-12).log()[test].mean().item()
    references = dict(uniform=math.log(args.codebook_size), unigram=unigram)

    # 2. static input buffers: a CUDA graph reads these addresses
    share = args.batch_size // process_count()
    index = torch.zeros(share, dtype=torch.int64, device=device)  # which maps
    lr, one_minus_decay = torch.zeros((), device=device), torch.zeros((), device=device)
    loss_sum = torch.zeros((), device=device)  # since the last log line

    # 3. model, averaged weights, the best of them, and optimizer
    torch.manual_seed(args.seed)
    model = PixelSNAIL(args).to(device)
    ema, best = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    graphed = args.compile and device.type == "cuda" and process_count() == 1
    undecayed = "original0", "bias", "embedding.weight"  # original0 is weight norm's gain
    decayed = [p for name, p in model.named_parameters() if not name.endswith(undecayed)]
    others = [p for name, p in model.named_parameters() if name.endswith(undecayed)]
    groups = [dict(params=decayed), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True, capturable=graphed)
    parts = dict(model=model, ema=ema, best=best, optimizer=optimizer)
    start, best_nats = 0, math.inf
    if checkpoint:
        for name, part in parts.items():
            load_state(part, checkpoint.get(name), args.out)
        for group in optimizer.param_groups:
            group.update(lr=lr, capturable=graphed)  # this run's, this device's
        start, best_nats = checkpoint["step"], checkpoint["best_nats"]
        torch.set_rng_state(checkpoint["generator"])  # of the dropout
    if rank():
        torch.manual_seed(args.seed + rank() + start)  # different dropout on each process
    parallel = nn.parallel.DistributedDataParallel  # averages gradients over processes
    step_model = parallel(model) if process_count() > 1 else model

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
                average.lerp_(weight, one_minus_decay)
        loss_sum.add_(loss.detach())

    if graphed:
        step = kernels.Graphed(step)

    # 5. the loop
    run = Run(args, f"prior-{Path(args.vae).name.removesuffix('.pt')}", start)
    try:
        relative = os.path.relpath(args.vae, run.folder.resolve())
    except ValueError:  # it is on another drive
        relative = args.vae
    args.vae_relative = Path(relative).as_posix()
    if start == args.steps:
        raise UserError(f"{run.folder} is finished; name another --out for a new run")
    print(
        f"{run.folder}: PixelSNAIL, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{len(codes):,} maps of {args.map_size} x {args.map_size} codes; nats per code: "
        f"uniform {references['uniform']:.3f}, unigram {unigram:.3f}"
    )

    def save(step: int):
        run.save(step, best_nats=best_nats, **{name: p.state_dict() for name, p in parts.items()})

    with run:
        save(start)
        logged, clock = start, time.perf_counter()  # of the last log line
        for i in range(start, args.steps):
            # The step's inputs are functions of i, so that a resumed run sees the same.
            lr.fill_(args.lr * (1 + math.cos(math.pi * i / args.steps)) / 2)
            one_minus_decay.fill_(1 - min(args.ema, (1 + i) / (10 + i)))  # forgets its first steps
            maps = batch_indices(i, args.batch_size, len(codes), args.seed)
            mine = maps[rank() * share :][:share]
            index.copy_(mine.pin_memory() if lr.is_cuda else mine, non_blocking=True)
            step()
            done, last = i + 1, i + 1 == args.steps
            if done % args.log_every == 0 or last:  # here the host waits for the device
                loss = all_reduce_sum(loss_sum).item() / process_count() / (done - logged)
                run.check_finite(loss, ema, logged)
                left = (args.steps - done) * (time.perf_counter() - clock) / (done - logged) / 60
                run.log(done, dict(loss=loss), f"{loss:.3f} nats per code  {left:.1f} min left")
                loss_sum.zero_()
                logged, clock = done, time.perf_counter()
            if done % args.eval_every == 0 or last:
                nats = nats_per_code(ema, validation)
                if nats < best_nats:
                    best_nats = nats
                    best.load_state_dict(ema.state_dict())
                run.log(done, dict(validation=nats), f"{nats:.3f} nats per code (validation)")
            if last:
                nats = nats_per_code(best, test)
                text = f"{nats:.3f} nats per code, {nats / math.log(2):.3f} bits (test)"
                run.log(done, dict(split="test", prior_nats_per_code=nats, **references), text)
            if last or logged == done and time.monotonic() > run.saved_at + run.SAVE_SECONDS:
                save(done)
    command = f"python sample.py --prior {shlex.quote(str(run.folder))}"
    print(f"{run.folder}/: ckpt.pt, log.jsonl; next: {command}")
    return run.folder


# ---------------------------------------------------------------- the codes, and their first stage


def checkpoint_digest(path, *arrays: np.ndarray) -> str:
    """A hash of a checkpoint, and of arrays beside it."""
    digest = hashlib.sha256(checkpoint_file(path).read_bytes())
    for array in arrays:
        digest.update(array.reshape(-1))
    return digest.hexdigest()[:12]


def first_stage(prior, saved: dict, vae=None) -> Path:
    """The first stage of the prior at prior: at vae, or else where the prior's settings say.

    UserError unless that is the checkpoint to whose codes the prior was fitted.
    """
    folder = checkpoint_file(prior).resolve().parent
    path = Path(vae or folder / saved.get("vae_relative", saved["vae"])).expanduser()
    if not checkpoint_file(path).is_file():
        raise UserError(f"{path}, to which {prior} was fitted, is not there; name it by --vae")
    if checkpoint_digest(path) != saved.get("vae_digest"):
        raise UserError(f"{path} is not the checkpoint that {prior} was fitted to")
    return path


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
        codes = torch.cat([model.encode(to_float(x.to(device))).short().cpu() for x in batches])
        try:
            with atomic_write(cache) as f:
                np.save(f, codes.numpy())
        except OSError as e:
            print(f"the codes are not kept for the next time: {cache.parent}: {e.strerror}")
            return codes.long().to(device)
    try:
        codes = torch.from_numpy(np.load(cache, allow_pickle=False)).long()
        if not 0 <= codes.min() <= codes.max() < K:
            raise ValueError(f"codes outside 0 to {K - 1}")
    except Exception as e:  # a malformed header can raise any exception
        raise UserError(f"{cache} is damaged ({e}); delete it to encode again") from None
    return codes.to(device)


def main(argv=None):
    run_script("train_prior.py", lambda argv: train(*settings(argv)), argv)


if __name__ == "__main__":
    tune_cpu()
    main()
