"""More quantizers. Paste a class, with its last line, into train_vae.py above `class VAE`; then
`python train_vae.py --model NAME` trains it. README has one more, FSQ, in "Changing it".
"""

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from train_vae import QUANTIZERS, EdVAE, Quantizer

# To start from another run's weights, put this below `model = VAE(args).to(device)` in `train`:
#     model.load_state_dict(load_vae("runs/NAME").state_dict())


class SimVQ(Quantizer):
    """Zhu et al. 2024: the nearest row of C W, a fixed random codebook C behind a learned map W.

    A gradient of W moves every code, so unused codes stay near the others.
    """

    name, learns_by_gradient = "simvq", False  # C is fixed; W learns
    defaults = Quantizer.defaults | dict(beta=0.25)

    def __init__(self, args):
        super().__init__(args)
        self.codebook.mul_(args.code_dim**-0.5)  # C (K, D)
        self.map = nn.Linear(args.code_dim, args.code_dim)  # W

    def vectors(self):
        with torch.autocast(self.codebook.device.type, enabled=False):  # in fp32
            return self.map(self.codebook)  # (K, D)

    def forward(self, z_e, tau, beta, key):
        z, indices = z_e.float(), self.assign(z_e)
        z_q = self.vectors()[indices]  # (B, N, N, D)
        loss = F.mse_loss(z_q, z.detach()) + beta * F.mse_loss(z, z_q.detach())
        straight_through = z + (z_q - z).detach()
        return loss, kernels.deterministic(straight_through, indices)


QUANTIZERS["simvq"] = SimVQ


class SoftplusEvidence(EdVAE):
    """alpha = softplus(z_e) + 1 in place of exp(z_e) + 1.

    The bottleneck takes the logarithm of the evidence, so any positive evidence will do. This keeps
    the fused operator and the exact KL. For a quick trial change the line `alpha = ...` in
    `EdVAE.plain` and train with --plain; `probabilities` then needs the same change.
    """

    name = "edvae-softplus"

    def logits(self, z_e):
        return F.softplus(z_e.float()).clamp(min=1e-30).log()  # (B, N, N, K) ln evidence


QUANTIZERS["edvae-softplus"] = SoftplusEvidence
