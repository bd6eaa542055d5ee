"""CosyVoice's flow in small: its Euler loop and its training, transcribed, around an estimator."""

import torch
from torch import nn

from imf_kernels.hosts.cosyvoice import Estimator
from imf_kernels.models import CausalUNet, CausalUNetConfig, DiT
from tests.models.tools import recipe, small_model


def small(family: str):
    """A tiny estimator model of a family, with the clients' 80 channels."""
    if family == "dit":
        return small_model("cosyvoice3", channels=80)
    sizes = {"dim": 32, "mid_blocks": 1, "depth": 1, "heads": 2, "head_dim": 16, "time_dim": 48}
    model = CausalUNet(CausalUNetConfig(**sizes))
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(recipe(shapes, seed=0))
    return model.eval()


class Foreign(nn.Module):
    """What is read of a client's estimator (names, `heads`, chunk size), and what it computes."""

    def __init__(self, model) -> None:
        super().__init__()
        parameters = dict(model.named_parameters())
        for name, value in model.state_dict().items():
            *path, leaf = name.split(".")
            owner = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]
            if name in parameters:
                owner.register_parameter(leaf, nn.Parameter(value.clone()))
            else:
                owner.register_buffer(leaf, value.clone())
        for module in self.modules():
            if "to_q" in module._modules:
                module.heads = model.config.heads
        self.computes = type(model), model.config.heads
        self.static_chunk_size = 50

    def forward(self, x, mask, mu, t, spks=None, cond=None, streaming=False):
        family, heads = self.computes
        variant = ("cosyvoice3",) if family is DiT else ()
        model = family.from_state_dict(self.state_dict(), *variant, heads=heads).to(x.dtype)
        estimator = Estimator(model)
        if streaming:
            estimator.static_chunk_size = self.static_chunk_size
        return estimator(x, mask, mu, t, spks, cond, streaming).to(x.dtype)


class OldForeign(Foreign):
    """Before it was told whether it streams."""

    def forward(self, x, mask, mu, t, spks=None, cond=None):
        return super().forward(x, mask, mu, t, spks, cond, self.static_chunk_size > 0)


class HostCFM(nn.Module):
    """Doubled rows in static buffers of the dtype of `spks`, accumulated times, batch 1."""

    def __init__(self, estimator, **settings) -> None:
        super().__init__()
        self.estimator = estimator
        self.t_scheduler = "cosine"
        self.inference_cfg_rate, self.training_cfg_rate, self.sigma_min = 0.7, 0.2, 1e-6
        for name, value in settings.items():
            setattr(self, name, value)
        self.rand_noise = torch.randn(1, 80, 300, generator=torch.Generator().manual_seed(5))

    def evaluate(self, *given, streaming):
        told = {} if isinstance(self.estimator, OldForeign) else {"streaming": streaming}
        return self.estimator(*given, **told)

    @torch.inference_mode()
    def forward(
        self, mu, mask, n_timesteps, temperature=1.0, spks=None, cond=None, streaming=False
    ):
        x = self.rand_noise[:, :, : mu.shape[2]].to(mu) * temperature
        span = torch.linspace(0, 1, n_timesteps + 1, dtype=mu.dtype)
        if self.t_scheduler == "cosine":
            span = 1 - torch.cos(span * 0.5 * torch.pi)
        given = [spks.new_zeros(2, *like.shape[1:]) for like in (x, mask, mu, spks, cond)]
        x_in, mask_in, mu_in, spks_in, cond_in = given
        t_in = spks.new_zeros(2)
        t, dt = span[0], span[1] - span[0]
        for step in range(1, len(span)):
            x_in[:], mask_in[:], t_in[:] = x, mask, t
            mu_in[0], spks_in[0], cond_in[0] = mu, spks, cond
            v = self.evaluate(x_in, mask_in, mu_in, t_in, spks_in, cond_in, streaming=streaming)
            c = self.inference_cfg_rate
            x = x + dt * ((1 + c) * v[:1] - c * v[1:])
            t = t + dt
            if step < n_timesteps:
                dt = span[step + 1] - t
        return x.float(), None

    def compute_loss(self, x1, mask, mu, spks=None, cond=None, streaming=False):
        rows = len(mu)
        t = torch.rand([rows, 1, 1])
        z = torch.randn_like(x1)
        y = (1 - (1 - self.sigma_min) * t) * z + t * x1
        kept = torch.rand(rows) > self.training_cfg_rate
        v = self.evaluate(
            y,
            mask,
            mu * kept.view(-1, 1, 1),
            t.squeeze(),
            spks * kept.view(-1, 1),
            cond * kept.view(-1, 1, 1),
            streaming=streaming,
        )
        u = x1 - (1 - self.sigma_min) * z
        return ((v * mask - u * mask) ** 2).sum() / (mask.sum() * 80), y


class HostFlow(nn.Module):
    """Token embedding and encoder, speaker projection, decoder."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.input_embedding = nn.Embedding(10, 16)
        self.encoder = nn.Sequential(nn.Linear(16, 80), nn.Dropout(0.5))
        self.spk_embed_affine_layer = nn.Linear(12, 80)
        self.decoder = decoder
        self.encoded = 0

    def forward(self, token, mel, lengths, speaker, streaming):
        mask = (torch.arange(mel.shape[1]) < lengths[:, None])[:, None].float()
        self.encoded += 1
        mu = self.encoder(self.input_embedding(token)).mT.contiguous()
        spks, cond = self.spk_embed_affine_layer(speaker), torch.zeros_like(mu)
        cond[:, :, :5] = mel.mT[:, :, :5]
        x1 = mel.mT.contiguous()
        loss, _ = self.decoder.compute_loss(x1, mask, mu, spks, cond=cond, streaming=streaming)
        return {"loss": loss}

    @torch.inference_mode()
    def inference(self, token, prompt, speaker, streaming=False):
        spks = self.spk_embed_affine_layer(speaker)
        mu = self.encoder(self.input_embedding(token)).mT.contiguous()
        cond = torch.zeros_like(mu)
        cond[:, :, : prompt.shape[1]] = prompt.mT
        mel, _ = self.decoder(
            mu=mu,
            mask=torch.ones_like(mu[:, :1]),
            spks=spks,
            cond=cond,
            n_timesteps=10,
            streaming=streaming,
        )
        return mel


def host_inputs(lengths, seed=0):
    """mu, mask, spks, cond of a batch; beyond each row's length junk."""
    generator = torch.Generator().manual_seed(seed)
    rows, frames = len(lengths), max(lengths)
    mu, cond = torch.randn(2, rows, 80, frames, generator=generator).unbind()
    cond[:, :, 7:] = 0
    mask = (torch.arange(frames) < torch.tensor(lengths)[:, None])[:, None].float()
    return {
        "mu": mu,
        "mask": mask,
        "spks": torch.randn(rows, 80, generator=generator),
        "cond": cond,
    }
