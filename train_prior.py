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
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from train_vae import (
    RANK,
    WORLD_SIZE,
    Run,
    UserError,
    atomic_write,
    autocast,
    batch_indices,
    broadcast_from_first,
    check_finite,
    check_split,
    distribute,
    first_process_first,
    load_checkpoint,
    load_images,
    load_vae,
    merged_settings,
    number,
    prepare_device,
    restore,
    run_script,
    to_float,
)

# Defaults of the flags. `full` is deeper for a larger map: see `settings`.
DEFAULTS = dict(
    batch_size=64,
    layers=4,
    dropout=0.1,
    patience=10,
    seed=42,
)
PRESETS = {
    "small": dict(steps=2000, width=32, blocks=1, lr=2e-3, ema=0.99),
    "full": dict(steps=20_000, width=128, lr=3e-4, ema=0.9995),
}


# --------------------------------------------------------------------------------------- the codes


def checkpoint_digest(path) -> str:
    """The hash of a run's checkpoint; path: the run's folder, or the file itself."""
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def check_codes(prior: "PixelSNAIL", vae):
    """UserError unless the checkpoint at vae is the one to whose codes the prior was fitted."""
    if checkpoint_digest(vae) != prior.args.vae_digest:
        raise UserError(f"{vae} has other codes than the prior was fitted to")


@torch.no_grad()
def load_codes(vae_folder, split: str, K: int, data_dir=None, device="cpu") -> Tensor:
    """The codes of a split, int64 (B, N, N) below K; kept under the hash of the checkpoint."""
    cache = Path(vae_folder) / f"codes-{split}-{checkpoint_digest(vae_folder)}.npy"
    if not cache.exists():
        model = load_vae(vae_folder, device)
        args = model.args
        images = load_images(args.dataset, split, data_dir or args.data_dir, args.size)
        codes = []  # int16: K is at most 16,384
        for i in range(0, len(images), 256):
            x = to_float(torch.from_numpy(images[i : i + 256]).to(device))
            codes.append(model.encode(x).short().cpu())
        with atomic_write(cache) as f:
            np.save(f, torch.cat(codes).numpy())
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

    The position is a tensor on the device, and no shape depends on it: one captured CUDA graph can
    be replayed at every position.
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
    """Sees the rows above, and its own row up to its own column: with it (centre) or without."""

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
    """x + GLU(conv(drop(ELU(conv(ELU(x)) + aux)))): causal convolutions, aux through a 1x1 one."""

    def __init__(
        self, n: int, hidden: int, dropout: float, rows: int = 1, columns: int = 1, aux: int = 0
    ):
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
    """Gated residual blocks with 5 x 5 causal convolutions, then attention over all before."""

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

    def __init__(
        self,
        codebook_size: int,
        size: int,
        width: int = 128,
        blocks: int = 2,
        layers: int = 4,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.size, self.sampler = size, None
        self.embedding = nn.Embedding(codebook_size, width)
        self.stem = CausalConv2d(width, width, 3, 5, centre=False)  # excludes the present position
        self.blocks = nn.ModuleList(PixelBlock(width, layers, dropout) for _ in range(blocks))
        self.head = CausalConv2d(width, codebook_size)
        coordinates = (torch.arange(size) - size / 2) / size
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
    def sample(
        self,
        n: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        first: int = 0,
        given: Tensor | None = None,
    ) -> Tensor:
        """n maps of codes (n, N, N), drawn position by position.

        temperature divides the logits; top_k keeps the most probable codes; given (n, N, N) fixes
        the codes where it is not negative. Map first + b has its own stream of random numbers, so
        the batch size changes it by rounding at most.
        """
        device, N = self.background.device, self.size
        seeds = [(seed * 1_000_003 + first + b) % 2**63 for b in range(n)]
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        uniform = [torch.rand(N * N, generator=g, dtype=torch.float64) for g in generators]
        weights = sum(p._version for p in self.parameters())  # grows when one changes
        if self.sampler is None or self.sampler.key != (n, temperature, top_k, weights):
            self.sampler = None  # frees the old one first
            self.sampler = Sampler(self, (n, temperature, top_k, weights))
        return self.sampler(torch.stack(uniform).to(device), given)


class Sampler:
    """Draws n maps from a PixelSNAIL in buffers that stay; on a GPU each step is one CUDA graph."""

    def __init__(self, model: PixelSNAIL, key: tuple):
        self.model, self.key = model, key
        n, self.temperature, self.top_k, _ = key
        device, positions = model.background.device, model.size**2
        self.cache = Cache(n, model.size, device)
        self.uniform = torch.zeros(n, positions, dtype=torch.float64, device=device)
        self.given = torch.full((n, positions), -1, device=device)
        self.codes = torch.zeros_like(self.given)
        self.step = as_cuda_graph(self.draw, device)

    def draw(self):
        """Draw the codes of the present position. A second call there changes nothing."""
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
        if given is None:
            self.given.fill_(-1)
        else:
            self.given.copy_(given.flatten(1))
        self.cache.reset()
        for _ in range(uniform.shape[1]):
            self.step()
            self.cache.advance()
        return self.codes.unflatten(1, (self.model.size, -1)).clone()  # (n, N, N)


def as_cuda_graph(f, device: torch.device):
    """On a GPU, f as a CUDA graph: one launch in place of hundreds. f runs twice at once."""
    if device.type != "cuda":
        return f
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # caches are made, libraries loaded
        f()
        f()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        f()
    return graph.replay


def make_prior(args: Namespace) -> PixelSNAIL:
    shape = args.width, args.blocks, args.layers, args.dropout
    return PixelSNAIL(args.codebook_size, args.map_size, *shape)


def load_prior(path, device="cpu") -> PixelSNAIL:
    """A trained prior from a run: the best averaged weights, in eval mode; .args: its settings."""
    state = load_checkpoint(path, device, "train_prior.py")
    args = Namespace(**state["args"])
    model = make_prior(args).to(device)
    model.load_state_dict(state["best"])
    model.args = args
    return model.eval()


# ---------------------------------------------------------------------------------------- the loop


@torch.no_grad()
def nats_per_code(model: PixelSNAIL, codes: Tensor) -> float:
    """Mean -log p(z_p | z_<p) over maps (B, N, N), by a model in eval mode, in fp32."""
    total = torch.zeros((), dtype=torch.float64, device=codes.device)
    for batch in codes.split(128):
        total += F.cross_entropy(model(batch).flatten(0, 2), batch.flatten(), reduction="sum")
    # The first process's, for all: by different numbers they would stop at different steps.
    return broadcast_from_first(total / codes.numel()).item()


def train(args: Namespace, checkpoint: dict | None = None) -> Path:
    """Fit the prior; returns the run's folder."""
    # 1. the codes: 5% of the training set for early stopping; the test split to report
    device = torch.device(args.device)
    with first_process_first():
        codes, test = (
            load_codes(args.vae, split, args.codebook_size, args.data_dir, device)
            for split in ("train", "test")
        )
    if len(codes) < 2:
        raise UserError(f"{args.vae} was trained on a single image; a prior needs at least 2")
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0)).to(device)
    held_out = max(1, len(codes) // 20)
    validation, codes = codes[order[:held_out]], codes[order[held_out:]]
    p = torch.bincount(codes.flatten(), minlength=args.codebook_size).double() / codes.numel()
    test_p = torch.bincount(test.flatten(), minlength=args.codebook_size) / test.numel()
    unigram = -(test_p * (p + 1e-12).log()).sum().item()
    references = dict(uniform=math.log(args.codebook_size), unigram=unigram)
    if math.exp(unigram) < 2 and RANK == 0:
        print("warning: the codes hardly vary: the first stage has collapsed", file=sys.stderr)

    # 2. model, averaged weights and optimiser
    torch.manual_seed(args.seed)
    model, ema = make_prior(args).to(device), make_prior(args).to(device).eval()
    ema.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    start, waited, seen_steps = 0, 0, 0
    best, best_nats = ema.state_dict(), math.inf  # at the best evaluation
    loss_sum = torch.zeros((), device=device)  # of seen_steps steps, since the last log line
    if checkpoint:
        start = restore(checkpoint, model, optimizer, device)
        ema.load_state_dict(checkpoint["ema"])
        best_nats, waited = checkpoint["best_nats"], checkpoint["waited"]
        loss_sum, seen_steps = checkpoint["loss_sum"].to(device), checkpoint["seen_steps"]
        best = {k: v.to(device) for k, v in checkpoint["best"].items()}
    if start == args.steps or waited >= args.patience:
        raise UserError(f"{args.out} is finished; name another --out for a new run")
    if RANK:
        torch.manual_seed(args.seed + RANK + start)  # different dropout on each process
    step_model = distribute(model, device)
    share = args.batch_size // WORLD_SIZE
    run = Run(args, f"prior-{Path(args.vae).name}", start)
    run.print(
        f"{run.folder}: PixelSNAIL, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{len(codes):,} maps of {args.map_size} x {args.map_size} codes; nats per code: "
        f"uniform {references['uniform']:.3f}, unigram {unigram:.3f}"
    )

    # 3. steps
    logged, clock = start, time.perf_counter()  # of the last log line
    with run:
        for step in range(start, args.steps):
            falling = (1 + math.cos(math.pi * step / args.steps)) / 2
            optimizer.param_groups[0]["lr"] = args.lr * falling
            index = batch_indices(step, args.batch_size, len(codes), args.seed)
            own = index[RANK * share : (RANK + 1) * share]
            if device.type == "cuda":
                own = own.pin_memory().to(device, non_blocking=True)
            optimizer.zero_grad(set_to_none=True)
            z = codes[own]  # (B, N, N)
            with autocast(args):
                logits = step_model(z)  # (B, N, N, K)
            loss = F.cross_entropy(logits.float().flatten(0, 2), z.flatten())
            loss.backward()
            loss_sum += loss.detach()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            decay = min(args.ema, (1 + step) / (10 + step))  # the average forgets its first steps
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)

            # 4. records
            done = step + 1
            seen_steps += 1
            due = done % args.eval_every == 0 or done == args.steps
            interrupted = run.interrupted(done)
            if due or interrupted:
                mean_loss = loss_sum.item() / seen_steps  # of the first process's share
                check_finite(model, mean_loss, f"{done - seen_steps + 1} to {done}", run)
            if due:
                left = (args.steps - done) * (time.perf_counter() - clock) / (done - logged) / 60
                nats = nats_per_code(ema, validation)
                waited += 1
                if nats < best_nats:
                    best_nats, waited = nats, 0
                    best = {k: v.clone() for k, v in ema.state_dict().items()}
                loss_text = f"train {mean_loss:.3f}  validation {nats:.3f} nats per code"
                line = dict(loss=mean_loss, validation=nats, **references)
                run.log(done, line, f"{loss_text}  {left:.1f} min left")
                loss_sum.zero_()
                seen_steps, logged, clock = 0, done, time.perf_counter()
            if due or interrupted:
                parts = dict(model=model, ema=ema, best=best, optimizer=optimizer)
                parts |= dict(best_nats=best_nats, waited=waited)
                run.save(done, **parts, loss_sum=loss_sum, seen_steps=seen_steps)
            finished = done == args.steps or waited >= args.patience
            if finished or interrupted:
                break
    if run.stop_signal and not finished:
        resume = f"--vae {args.vae} --out {run.folder} --resume"
        run.print(f"stopped; to continue: python train_prior.py {resume}")
        sys.exit(128 + run.stop_signal)
    if done < args.steps:
        run.print(f"no better for {waited} evaluations: stopped early")
    ema.load_state_dict(best)
    nats = nats_per_code(ema, test)
    text = f"test split: {nats:.3f} nats per code, {nats / math.log(2):.3f} bits"
    run.log(done, dict(split="test", prior_nats_per_code=nats, **references), text)
    run.print(f"{run.folder}/: ckpt.pt, log.jsonl; next: python sample.py --prior {run.folder}")
    return run.folder


# ------------------------------------------------------------------------------- the command line

# Flags that may differ on --resume.
MAY_CHANGE = {"vae", "data_dir", "out", "resume", "device", "patience", "eval_every"}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="train_prior.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    count, positive = number(int, 1, 10**12), number(float, 1e-30, 1e30)

    def flag(name, kind, help, **more):
        p.add_argument(name, type=kind, help=help, **more)

    flag("--vae", Path, "the run of train_vae.py whose codes to model", required=True)
    flag("--data-dir", str, "where its data lies now (default: where the run found it)")
    flag("--out", Path, "the run's folder (default: a fresh one under runs/)")
    p.add_argument("--resume", action="store_true", help="continue --out's run, or start it")
    preset_help = "recipe for the flags left out (default full; small after a run on shapes)"
    p.add_argument("--preset", choices=PRESETS, help=preset_help)
    flag("--steps", count, "training steps (default 20000, small 2000)")
    flag("--batch-size", count, "maps per step (default 64)")
    flag("--lr", positive, "AdamW's first rate, falling by a cosine (default 3e-4, small 2e-3)")
    flag("--width", number(int, 16, 4096), "channels, a multiple of 16 (default 128, small 32)")
    flag("--blocks", number(int, 1, 64), "PixelBlocks (default 2 to 4, by map size; small 1)")
    flag("--layers", number(int, 1, 64), "gated residual blocks in each (default 4)")
    flag("--dropout", number(float, 0, 0.95), "in every residual block (default 0.1)")
    flag("--ema", number(float, 0, 0.999999), "decay of the averaged weights, which are kept")
    flag("--patience", count, "stop after so many evaluations without a gain (default 10)")
    flag("--seed", number(int, 0, 2**63 - 1), "of weights, dropout and order (default 42)")
    flag("--device", str, "cpu, cuda, ... (default: cuda where there is one)")
    precision_help = "of convolutions and attention (default: bf16 where it is faster)"
    p.add_argument("--precision", choices=("fp32", "bf16"), help=precision_help)
    flag("--eval-every", count, "steps between evaluations and checkpoints (default steps / 20)")
    return p


def settings(argv=None) -> tuple[Namespace, dict | None]:
    """Every setting of a run, and --resume's checkpoint."""
    known, checkpoint = merged_settings(parser(), argv, MAY_CHANGE)
    if known["vae"].is_file():
        raise UserError(f"--vae {known['vae']} is a file; name the run's folder")
    vae = load_checkpoint(known["vae"], script="train_vae.py")["args"]
    codes = dict(codebook_size=vae["codebook_size"], map_size=vae["size"] // 4)
    codes["vae_digest"] = checkpoint_digest(known["vae"])
    if any(known.get(name, value) != value for name, value in codes.items()):
        raise UserError(f"{known['out']} was fitted to other codes than those of {known['vae']}")
    preset = known.get("preset", "small" if vae["dataset"] == "shapes" else "full")
    defaults = DEFAULTS | PRESETS[preset] | dict(preset=preset, data_dir=vae["data_dir"])
    defaults.setdefault(
        "blocks", 2 if codes["map_size"] <= 8 else 3 if codes["map_size"] <= 16 else 4
    )
    args = Namespace(**(defaults | dict(out=None) | known | codes))
    args.vae = Path(args.vae).resolve()
    args.eval_every = known.get("eval_every", max(1, args.steps // 20))
    if args.width % 16:
        raise UserError(f"--width {args.width} must be a multiple of 16: 8 heads share half of it")
    check_split(args)
    args.device, args.precision = prepare_device(known.get("device"), known.get("precision"))
    return args, checkpoint


def run_training(argv):
    train(*settings(argv))


def main(argv=None):
    run_script("train_prior.py", run_training, argv)


if __name__ == "__main__":
    main()
