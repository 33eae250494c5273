"""Tasks: what one training step is, for every model that train.py trains and sample.py draws from.

A task holds a model and answers, for the one loop:
    prepare(dataset, device) -> dataset     once: for instance pictures to latents, captions to ids
    draw(n, generator, device) -> tensors   every random number of a step of n pictures
    loss(net, batch) -> (scalar, metrics)   a pure function of tensors: it compiles, resumes, and splits over devices
    preview(model, dataset, device, path)   a picture of what has been learned
    finish(model, dataset, device)          after the last step, before the last save
    state() -> dict                         what else travels in the checkpoint
and, if it is generative, for the sampler: sample, to_pictures, encode, shrink_mask, examples.

To add a model: write its file, then a build function here, and a line in TASKS. The loop does not change.

    python train.py --model unet-tiny --data scenes     # the loop asks TASKS["unet"]

Contents: AutoencoderTask, VQVAETask, TextToImage, TextToTokens, DiffusionTask, TokenTask, AdapterTask, ConceptTask,
the builders, TASKS.
"""
import copy
import dataclasses
import difflib
import math

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
from adapters import adapter_state, add_adapters
from custom_diffusion import (RARE, SIZE_WORDS, concept_loss, mix, personalise, rare_tokens, save_concept,
                              select_prior)
from data import save_grid, to_float, to_uint8
from diffusion import GaussianDiffusion, RectifiedFlow, randn
from dit import DIT_CONFIGS, DiT, dit_config
from text import CLIPTokenizer, TextEncoder, WordTokenizer
from udit import UDIT_CONFIGS, UDiT
from unet import UNET_CONFIGS, UNet
from vae import AutoencoderKL, TinyAutoencoder
from vqdiffusion import VQ_CONFIGS, VQVAE, MaskReplace, VQTransformer
from weights import build, load_checkpoint, load_weights, read_weights, save_checkpoint, split_compvis


class AutoencoderTask:
    """Train an autoencoder to give pictures back: tiny-ae, or kl-ae, a small AutoencoderKL. Source: LDM §3.1."""
    frozen = frozenset()        # names of tensors that do not learn and need not be saved: see AdapterTask

    def __init__(self, config, info):
        self.config, self.info = config, info
        if config.model == "kl-ae":
            self.model = AutoencoderKL(32, (1, 2, 2), 1, info["channels"], config.latent_channels, scale=1.0)
        else:
            self.model = TinyAutoencoder(info["channels"], config.latent_channels, config.factor)
        self.latent_shape, self.scale = model_shape(info, self.model), 1.0

    def prepare(self, dataset, device):
        return dataset

    def macs(self):
        """Multiply-accumulates of one forward of one picture. Source: torch.utils.flop_counter (2 flops each)."""
        meta = copy.deepcopy(self.model).to("meta")
        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            picture = torch.zeros(1, self.info["channels"], *[self.info["image_size"]] * 2)
            meta(picture, torch.zeros(1, *self.latent_shape))
        return counter.get_total_flops() // 2

    def draw(self, n, generator, device):
        return {"noise": randn((n, *self.latent_shape), generator, device),
                "flip": torch.rand(n, generator=generator, device=device)}

    def loss(self, net, batch):
        x = to_float(batch["x"])
        if self.config.model == "kl-ae":            # L1, and a little of the KL to a standard normal
            recon, mean, logvar = (out.float() for out in net(x, batch["noise"]))
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            loss = (recon - x).abs().mean() + 1e-4 * kl
        else:                                       # squares, and a small pull that keeps latents bounded; see vae.py
            recon, z = (out.float() for out in net(x, batch["noise"], self.config.latent_noise))
            loss = (recon - x).square().mean() + 1e-4 * z.square().mean()
        mse = (recon - x).detach().square().mean()
        return loss, {"mse": mse, "psnr": 10 * torch.log10(4 / mse)}

    def preview(self, model, dataset, device, path):
        x = to_float(dataset.images[:32]).to(device)
        pairs = torch.stack([x, model.decode(model.encode(x)).clamp(-1, 1)], 1)         # (32, 2, C, H, W)
        rows = pairs.flatten(0, 1)                                                      # (64, C, H, W)
        save_grid(rows.cpu(), path, nrow=16, scale=2)

    def finish(self, model, dataset, device):
        """Put the latents on a scale of their own, so that every user of this checkpoint finds the same."""
        model.standardise(to_float(dataset.images[:2000]).to(device))
        self.scale = getattr(model, "scale", None)

    def state(self):
        return {"scale": self.scale}


class VQVAETask:
    """Train a VQ-VAE, the tokeniser of VQ-Diffusion. Source: VQ-Diffusion §3.1."""
    frozen = frozenset()

    def __init__(self, config, info):
        self.config, self.info = config, info
        self.model = VQVAE(info["image_size"], info["channels"], config.codes, config.factor)

    def prepare(self, dataset, device):
        return dataset

    def macs(self):
        """Multiply-accumulates of one forward of one picture. Source: torch.utils.flop_counter (2 flops each)."""
        meta = copy.deepcopy(self.model).eval().to("meta")
        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            meta(torch.zeros(1, self.info["channels"], *[self.info["image_size"]] * 2))
        return counter.get_total_flops() // 2

    def draw(self, n, generator, device):
        return {"flip": torch.rand(n, generator=generator, device=device)}

    def loss(self, net, batch):
        x = to_float(batch["x"])
        recon, commitment, ids = net(x)
        mse = (recon.float() - x).square().mean()
        return mse + commitment, {"psnr": 10 * torch.log10(4 / mse.detach()),
                                  "perplexity": self.model.perplexity(ids)}

    def preview(self, model, dataset, device, path):
        x = to_float(dataset.images[:32]).to(device)
        pairs = torch.stack([x, model.decode(model.encode(x)).clamp(-1, 1)], 1)         # (32, 2, C, H, W)
        save_grid(pairs.flatten(0, 1).cpu(), path, nrow=16, scale=2)                    # (64, C, H, W)

    def finish(self, model, dataset, device):
        x = to_float(dataset.images[:2000])
        ids = torch.cat([model.encode(part.to(device)) for part in x.split(500)])           # (n, N)
        mse = torch.cat([model.decode(i).cpu() for i in ids.split(500)]).sub_(x).square().mean()
        print(f"{len(ids.unique())} of {self.config.codes} codes in use, perplexity {self.model.perplexity(ids):.0f}, "
              f"{10 * math.log10(4 / mse):.1f} dB")

    def state(self):
        return {}


class TextToImage(nn.Module):
    """A text encoder and a U-Net: model(x (B, C, H, W), t (B,), ids (B, L) or encoded text (B, L, D_ctx)) -> like x.

    null_ids: the empty caption's ids (L,), which stands in for a share class_dropout_prob of captions, so that guidance
    has something to compare with. Source: LDM §3.3.
    """
    matrices = rf"unet\.{UNet.matrices}|text\.text_model\.encoder\.layers\."         # Muon's share

    def __init__(self, unet, text, null_ids, class_dropout_prob):
        super().__init__()
        self.unet, self.text, self.class_dropout_prob = unet, text, class_dropout_prob
        self.register_buffer("null_ids", null_ids, persistent=False)

    def forward(self, x, t, y):
        context = y if y.is_floating_point() else self.text(y)                          # (B, L, D_ctx)
        return self.unet(x.to(context.dtype), t, context)                               # (B, C, H, W)

    def null_condition(self, count, device="cpu"):
        """The empty caption, (count, L)."""
        return self.null_ids.to(device).expand(count, -1)

    def drop_labels(self, ids, draws):
        """Replace captions ids (B, L) by the empty one where draws (B,), uniform in [0, 1), are small."""
        return torch.where((draws < self.class_dropout_prob)[:, None], self.null_ids, ids)


class TextToTokens(TextToImage):
    """The same with a VQTransformer: model(tokens (B, N), t (B,), ids (B, L) or encoded text) -> logits (B, N, K).

    Source: VQ-Diffusion §4.3.
    """
    matrices = rf"transformer\.{VQTransformer.matrices}|text\.text_model\.encoder\.layers\."

    def __init__(self, transformer, text, null_ids, class_dropout_prob):
        super().__init__(None, text, null_ids, class_dropout_prob)
        self.transformer = transformer

    def forward(self, tokens, t, y):
        return self.transformer(tokens, t, y if y.is_floating_point() else self.text(y))   # (B, N, K)


class DiffusionTask:
    """Train and sample a diffusion model, on pixels or on the latents of a frozen first stage.

    model: model(x, t, y) with y classes (B,) or, with a tokenizer, caption ids (B, L). It also answers
    null_condition(count, device) and drop_labels(y, draws). Raises ValueError for flags that clash.
    Source: DiT §3; LDM §3.
    """
    frozen = frozenset()

    def __init__(self, config, info, model, first_stage=None, tokenizer=None):
        self.config, self.info, self.model = config, info, model
        self.first_stage, self.tokenizer = first_stage, tokenizer
        if config.schedule == "flow" and config.learn_sigma:
            raise ValueError("--learn-sigma belongs to a Gaussian schedule: add --schedule linear or cosine")
        self.process = RectifiedFlow(config.flow_shift) if config.schedule == "flow" else GaussianDiffusion(
            schedule=config.schedule, prediction=config.prediction, learn_sigma=config.learn_sigma)
        self.shape = model_shape(info, first_stage)
        self.at_once = max(1, 1_024_000 // info["image_size"] ** 2)         # pictures that fit into a small memory

    @torch.no_grad()
    def prepare(self, dataset, device):
        """Pictures -> what DiT is trained on: with a first stage, all latents at once, so no step encodes anything."""
        if self.tokenizer is not None:
            dataset = dataclasses.replace(dataset, labels=self.tokenizer(dataset.captions))     # (N, L)
        if self.first_stage is None or dataset.images.is_floating_point():      # pixels, or latents already
            return dataset
        vae, x = self.first_stage.to(device), dataset.images
        x = torch.cat([x, x.flip(-1)]) if dataset.flip else x      # a latent cannot be mirrored: mirror before encoding
        if not vae.standardised:
            vae.standardise(to_float(x[:2000]).to(device))
        z = torch.cat([vae.encode(to_float(c.to(device))) for c in x.split(self.at_once)])  # (N, c, h, w)
        labels = torch.cat([dataset.labels] * 2) if dataset.flip else dataset.labels
        return dataclasses.replace(dataset, images=z, labels=labels, flip=False)

    def macs(self):
        """Multiply-accumulates that one more picture adds to a forward. Source: torch.utils.flop_counter."""
        meta, flops = copy.deepcopy(self.model).to("meta"), []
        for count in (1, 2):                        # the difference leaves out products of weights alone (udit.py)
            with FlopCounterMode(display=False) as counter, torch.device("meta"):
                meta(torch.zeros(count, *self.shape), torch.zeros(count), self.model.null_condition(count).to("meta"))
            flops.append(counter.get_total_flops())
        return (flops[1] - flops[0]) // 2          # one multiply-accumulate is two flops

    def draw(self, n, generator, device):
        uniform = lambda: torch.rand(n, generator=generator, device=device)
        return {"drop": uniform(), "flip": uniform(), **self.process.draw((n, *self.shape), generator, device)}

    def loss(self, net, batch):
        x0 = batch["x"].float() if batch["x"].is_floating_point() else to_float(batch["x"])
        y = self.model.drop_labels(batch["y"], batch["drop"])
        return self.process.loss(net, x0, y, batch["t"], batch["eps"])

    @torch.no_grad()
    def sample(self, model, y, null=None, cfg_scale=None, steps=None, sampler=None, callback=None, **options):
        """Draw one example per condition y (B,) or (B, L) -> (B, C, H, W) in model space; see to_pictures.

        null: what guidance steers away from, like y (default: nothing asked for); cfg_scale, steps, sampler: default to
        the run's guidance, and ddpm in 250 steps for a learned variance, else ddim in 50, or euler in 25 for a flow;
        callback(x0 guess) is called after every step; options as in diffusion's sample. Source: DiT §3.1.
        """
        cfg_scale = self.config.cfg_scale if cfg_scale is None else cfg_scale
        if self.model.class_dropout_prob == 0 or getattr(self.model, "num_classes", 1) == 0:
            cfg_scale = 1.0                                          # nothing to guide by
        null = self.model.null_condition(len(y), y.device) if null is None else null
        if self.tokenizer is not None:                               # encode the words once, not at every step
            y, null = model.text(y), model.text(null)                # (B, L, D_ctx)
        sampler = sampler or ("ddpm" if self.config.learn_sigma else self.process.samplers[0])
        options = {"clip": self.first_stage is None and self.shape[0] in (1, 3), "device": y.device, **options}
        walk = self.process.trajectory(model, (len(y), *self.shape), y, null, sampler=sampler, cfg_scale=cfg_scale,
                                       steps=steps or {"ddpm": 250, "euler": 25}.get(sampler, 50), **options)
        for x, x0 in walk:
            if callback is not None:
                callback(x0)
        return x

    @torch.no_grad()
    def encode(self, x):
        """Pictures (B, C, H, W) in [-1, 1] -> model space. Source: LDM §3.1."""
        if self.first_stage is None:
            return x
        vae = self.first_stage.to(x.device)
        return vae.encode(x.to(next(vae.parameters()).dtype)).float()

    def shrink_mask(self, mask):
        """Mask (B, 1, H, W), 1 = paint here -> model space: a latent cell is painted if any of its pixels is.

        Source: LDM §4.5.
        """
        if mask is None or self.first_stage is None:
            return mask
        return torch.nn.functional.max_pool2d(mask, self.first_stage.factor)                # (B, 1, h, w)

    @torch.no_grad()
    def to_pictures(self, x):
        """Model space -> uint8 pictures (B, C, H, W). Latents without a first stage: three channels in false colours.

        Source: LDM §3.1.
        """
        if self.first_stage is not None:
            vae = self.first_stage.to(x.device)
            return to_uint8(vae.decode(x.to(next(vae.parameters()).dtype)).float())
        return to_uint8(x if x.shape[1] in (1, 3) else x[:, :3] / 3)

    def examples(self):
        """What to draw when nothing is asked for: (conditions, their names or None), at most 48."""
        if self.tokenizer is not None:
            return self.tokenizer(self.info["examples"]), self.info["examples"]
        names = self.info["class_names"]
        each = max(1, 40 // max(1, len(names)))                     # a few of each class, when there are few
        y = torch.arange(min(48, max(1, len(names)) * each)) % max(1, len(names))
        return y, [names[i] for i in y.tolist()] if names else None

    def preview(self, model, dataset, device, path):
        y, names = self.examples()
        seeds = [torch.Generator(device).manual_seed(i) for i in range(len(y))]
        sampler = "ddim" if self.config.learn_sigma else None       # 250 ancestral steps would outlast the training
        images = self.to_pictures(self.sample(model, y.to(device), generator=seeds, steps=25, sampler=sampler))
        save_grid(images.cpu(), path, nrow=8, captions=names, scale=None if names else max(1, 64 // images.shape[-1]))

    def finish(self, model, dataset, device):
        pass

    def state(self):
        if self.first_stage is None:
            return {}
        return {"first_stage": {"factor": self.first_stage.factor, "scale": getattr(self.first_stage, "scale", None),
                                "model": self.first_stage.state_dict()}}


class TokenTask(DiffusionTask):
    """VQ-Diffusion: the same on a VQ-VAE's tokens (B, N), with the mask-and-replace chain. Source: VQ-Diffusion §4."""

    def __init__(self, config, info, model, first_stage, tokenizer=None):
        self.config, self.info, self.model = config, info, model
        self.first_stage, self.tokenizer = first_stage, tokenizer
        self.process = MaskReplace(num_codes=first_stage.num_codes, aux_weight=config.aux_weight)
        self.shape = (first_stage.grid ** 2,)                                               # (N,) tokens

    @torch.no_grad()
    def prepare(self, dataset, device):
        """Pictures -> tokens, all at once, so that no step encodes anything."""
        if self.tokenizer is not None:
            dataset = dataclasses.replace(dataset, labels=self.tokenizer(dataset.captions))     # (N, L)
        if dataset.images.dtype == torch.int64:                                 # tokens already
            return dataset
        x, labels = dataset.images, dataset.labels
        if dataset.flip:                                                        # tokens cannot be mirrored afterwards
            x, labels = torch.cat([x, x.flip(-1)]), torch.cat([labels, labels])
        ids = torch.cat([self.encode(to_float(part.to(device))) for part in x.split(1000)])
        return dataclasses.replace(dataset, images=ids, labels=labels, flip=False)

    def macs(self):
        """Multiply-accumulates of one forward of one picture. Source: torch.utils.flop_counter (2 flops each)."""
        meta = copy.deepcopy(self.model).to("meta")
        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            step = torch.zeros(1, dtype=torch.int64)
            meta(torch.zeros(1, *self.shape, dtype=torch.int64), step, self.model.null_condition(1).to("meta"))
        return counter.get_total_flops() // 2

    def loss(self, net, batch):
        y = self.model.drop_labels(batch["y"], batch["drop"])
        return self.process.loss(net, batch["x"], y, batch["t"], batch["pt"], batch["u"])

    @torch.no_grad()
    def sample(self, model, y, null=None, cfg_scale=None, steps=None, sampler=None, callback=None, eta=0.0,
               cfg_interval=(0.0, 1.0), cfg_channels=None, noise=None, **options):
        """Draw one grid of tokens per condition -> (B, N). Arguments as in DiffusionTask.sample; options as in
        MaskReplace.sample. Raises ValueError for what codes do not have: eta, cfg_interval, cfg_channels, noise.

        Source: VQ-Diffusion algorithm 2; Improved VQ-Diffusion §3.
        """
        if eta or tuple(cfg_interval) != (0.0, 1.0) or cfg_channels or noise is not None:
            raise ValueError("--eta, --cfg-interval, --cfg-channels and --interpolate are for numbers, not for codes")
        cfg_scale = self.config.cfg_scale if cfg_scale is None else cfg_scale
        if self.model.class_dropout_prob == 0:
            cfg_scale = 1.0
        null = self.model.null_condition(len(y), y.device) if null is None else null
        if self.tokenizer is not None:                               # encode the words once, not at every step
            y, null = model.text(y), model.text(null)                # (B, L, D_ctx)
        options = {"strength": 1.0, **options, "device": y.device}
        walk = self.process.trajectory(model, (len(y), *self.shape), y, null, sampler=sampler or "posterior",
                                       steps=steps or 25, cfg_scale=cfg_scale, **options)
        for tokens, guess in walk:
            if callback is not None:
                callback(guess)
        return tokens

    @torch.no_grad()
    def encode(self, x):
        """Pictures (B, C, H, W) in [-1, 1] -> tokens (B, N). Source: VQ-Diffusion §3.1."""
        return self.first_stage.to(x.device).encode(x)

    def shrink_mask(self, mask):
        """Mask (B, 1, H, W), 1 = paint here -> (B, N): a token is painted if any of its pixels is. Source: §5."""
        return None if mask is None else nn.functional.max_pool2d(mask, self.first_stage.factor).flatten(1)

    @torch.no_grad()
    def to_pictures(self, ids):
        """Tokens (B, N) -> uint8 pictures (B, C, H, W). Source: VQ-Diffusion §3.1."""
        return to_uint8(self.first_stage.to(ids.device).decode(ids))

    def state(self):
        vqvae = self.first_stage
        return {"first_stage": {"factor": vqvae.factor, "image_size": vqvae.image_size, "scale": None,
                                "model": vqvae.state_dict()}}


def _not_learned(model):
    """Names of the tensors of a model that training leaves alone."""
    return frozenset(model.state_dict()) - {name for name, p in model.named_parameters() if p.requires_grad}


class AdapterTask(DiffusionTask):
    """Train an adapter (config.adapter, config.rank) beside the frozen model of the task `base`.

    adapter.pt, in the run's folder, is what sample.py draws from. Source: Xiang et al. 2023.
    """

    def __init__(self, config, base, dataset):
        super().__init__(config, base.info, base.model, base.first_stage, base.tokenizer)
        if dataset.captions is None:
            raise ValueError(f"an adapter learns from captions, and {config.data} has none: give --data a folder with "
                             "metadata.jsonl")
        read, _, add = config.adapter.partition("-")
        add_adapters(self.model, read, add, rank=config.rank)
        self.frozen = _not_learned(self.model)
        self.info = {**base.info, "examples": dataset.captions[:min(24, self.at_once)]}

    def finish(self, model, dataset, device):
        save_checkpoint(f"{self.config.out}/adapter.pt", {**adapter_state(model), "init": self.config.init})

    def state(self):
        return {}


class ConceptTask(DiffusionTask):
    """Teach the model of the task `base` things (config.concept, config.category) from a few pictures each.

    dataset: the prior's pictures, or where to find them by their captions. config.part: what learns besides the new
    words <new1>, <new2>, ...: "kv" is Custom Diffusion, "all" is DreamBooth, "none" textual inversion.
    concept.pt, in the run's folder, is what sample.py and custom_diffusion.py read. Raises ValueError for a category
    that the vocabulary or the prior does not know. Source: Custom Diffusion §3.
    """

    def __init__(self, config, base, dataset):
        super().__init__(config, base.info, base.model, base.first_stage, base.tokenizer)
        self.small = isinstance(self.tokenizer, WordTokenizer)      # else CLIP, which can spell every word
        unknown = [c for c in config.category if self.small and c not in self.tokenizer.ids]
        if unknown:
            near = difflib.get_close_matches(unknown[0], list(self.tokenizer.ids), 3)
            raise ValueError(f"--category {unknown[0]}: {config.init} does not know this word"
                             + (f"; near it: {', '.join(near)}" if near else ""))
        if not self.small and len(config.concept) > len(RARE):
            raise ValueError(f"{len(config.concept)} things at once, and {len(RARE)} rare tokens to start from: teach "
                             "some of them apart, and merge")
        self.W0 = {name: w.clone() for name, w in self.model.unet.state_dict().items() if ".attn2." in name}
        rare = rare_tokens(self.tokenizer, base.info["examples"] + (dataset.captions or []),
                           len(config.concept)) if self.small else RARE
        free = (f"<new{k}>" for k in range(1, 1000) if f"<new{k}>" not in self.tokenizer.ids)
        self.words, self.prompt = dict(zip(free, rare[:len(config.concept)])), "a {}" if self.small else "photo of a {}"
        self.things = [f"{word} {category}" for word, category in zip(self.words, config.category)]
        self.pictures = [data.load(name, config.image_size, data_dir=config.data_dir) for name in config.concept]
        self.prior = self.select(dataset)
        personalise(self.model, self.tokenizer, self.words, config.part)
        self.frozen = _not_learned(self.model)
        asked = [self.prompt.format(thing) for thing in (*self.things, *config.category)]
        self.info = {**base.info, "examples": (asked * 8)[:max(len(asked), min(8 * len(asked), self.at_once))]}

    @torch.no_grad()
    def select(self, dataset):
        """The prior, (pictures (n, C, S, S), captions), or None: drawn by the base, or those of the data set whose
        captions name a category (for CLIP: are near to one). Where there are no captions, classes will do; and a folder
        of pictures without either shows the one category. Source: the paper's details of training.
        """
        categories = self.config.category
        bare = [self.prompt.format(category) for category in categories]
        if self.config.prior == "none":
            return None
        if self.config.prior == "generated":
            device, n, captions = self.config.device, min(50, self.at_once), (bare * 200)[:200]
            model, ids = copy.deepcopy(self.model).eval().to(device), self.tokenizer(captions).to(device)
            seeds = [torch.Generator(device).manual_seed(k) for k in range(200)]
            drawn = [self.to_pictures(self.sample(model, ids[k:k + n], generator=seeds[k:k + n])).cpu()
                     for k in tqdm(range(0, 200, n), desc="prior", leave=False)]
            return to_float(torch.cat(drawn)), captions
        said, classes = dataset.captions, dataset.class_names
        if said is None and len(classes) < 2 and len(categories) > 1:
            raise ValueError(f"{dataset.name} has no captions: with two categories the prior's pictures need them")
        if said is None:
            said = [self.prompt.format(classes[k]) for k in dataset.labels.tolist()] if len(classes) > 1 else (
                bare * len(dataset))
        if not self.small:
            rows = torch.cat([select_prior(self.model.text, self.tokenizer, said, text) for text in bare])
            return to_float(dataset.images[rows]), [said[i] for i in rows.tolist()]
        names = {i: [c for c in categories if c in caption.split()] for i, caption in enumerate(said)}
        rows = [i for i, named in names.items() if named][:2000]
        if not rows:
            raise ValueError(f"no caption of {dataset.name} names {', '.join(sorted(categories))}: choose another "
                             "--prior, or --prior generated")
        # every second one says the bare category, which is what would otherwise become the new thing
        captions = [said[i] if k % 2 else f"a {names[i][0]}" for k, i in enumerate(rows)]
        return to_float(dataset.images[rows]), captions

    @torch.no_grad()
    def prepare(self, dataset, device):
        """All pictures of the whole run, augmented and encoded at once, so that no step encodes anything."""
        c, factor, parts = self.config, self.first_stage.factor if self.first_stage else 1, []
        things = [(to_float(d.images), d.captions or [self.prompt.format(thing)] * len(d))
                  for d, thing in zip(self.pictures, self.things)]
        generator, total = torch.Generator().manual_seed(c.seed), c.steps * c.batch_size // 2
        words = () if self.small else SIZE_WORDS
        for first in range(0, total, 500):
            x, captions, mask = mix(things, self.prior, min(500, total - first), factor, words, c.augment, generator)
            z = torch.cat([self.encode(some.to(device)) for some in x.split(self.at_once)])
            parts.append((z, self.tokenizer(captions), mask))
        z, ids, mask = (torch.cat(column) for column in zip(*parts))
        self.mask = mask.to(device)                                                         # (N, 1, h, w)
        print(f"{', '.join(self.things)}: {total} target pictures will be seen ({sum(len(x) for x, _ in things)} "
              f"different ones), and {'as many' if self.prior else 'none'} of the prior; learning rate {c.lr:g}, "
              f"of the words {c.word_lr:g}")
        return dataclasses.replace(dataset, images=z, labels=ids, flip=False)

    def loss(self, net, batch):
        return concept_loss(self.process, net, batch["x"].float(), batch["y"], self.mask[batch["index"]], batch["t"],
                            batch["eps"])

    def finish(self, model, dataset, device):
        W = {name.removeprefix("unet."): w for name, w in model.state_dict().items()
             if name.startswith("unet.") and name not in self.frozen}
        save_concept(f"{self.config.out}/concept.pt", W, dict(zip(self.words, model.text.rows)),
                     self.things, self.W0)

    def state(self):
        return {}


def model_shape(info, first_stage):
    """(C, H, W) of what the diffusion model sees: pixels, or the first stage's latents. Raises ValueError."""
    size, channels = info["image_size"], info["channels"]
    if first_stage is None:
        return channels, size, size
    if isinstance(first_stage, VQVAE):
        raise ValueError("this first stage is a VQ-VAE, whose tokens are for vq-tiny and its like: give a tiny-ae or a "
                         "kl-ae")
    if size % first_stage.factor:
        raise ValueError(f"image size {size} is not divisible by the first stage's factor {first_stage.factor}")
    return first_stage.latent_channels, size // first_stage.factor, size // first_stage.factor


def build_autoencoder(config, info, first_stage=None):
    """Config -> AutoencoderTask. Source: LDM §3.1."""
    return AutoencoderTask(config, info)


def build_dit(config, info, first_stage=None):
    """Config -> DiffusionTask with a class-conditional DiT. Source: DiT §3."""
    channels, size, _ = model_shape(info, first_stage)
    model = DiT(input_size=size, in_channels=channels, num_classes=len(info["class_names"]),
                learn_sigma=config.learn_sigma, class_dropout_prob=config.class_dropout,
                conditioning=config.conditioning, **dit_config(config.model))
    return DiffusionTask(config, info, model, first_stage)


def build_udit(config, info, first_stage=None):
    """Config -> DiffusionTask with a class-conditional U-DiT. Source: U-DiT §4.1."""
    channels, size, _ = model_shape(info, first_stage)
    model = UDiT(input_size=size, in_channels=channels, num_classes=len(info["class_names"]),
                 learn_sigma=config.learn_sigma, class_dropout_prob=config.class_dropout, **UDIT_CONFIGS[config.model])
    return DiffusionTask(config, info, model, first_stage)


def build_unet(config, info, first_stage=None):
    """Config -> DiffusionTask with a text-conditional U-Net and its text encoder. Source: LDM §3.3."""
    if config.learn_sigma:
        raise ValueError("--learn-sigma (and so --recipe paper) is DiT's; the U-Net predicts eps, v or a velocity")
    channels, _, _ = model_shape(info, first_stage)
    tokenizer, sizes = WordTokenizer.from_state(info["vocabulary"]), UNET_CONFIGS[config.model]
    unet = UNet(**{**sizes, "in_channels": channels, "out_channels": channels})
    text = TextEncoder(tokenizer.vocab_size, tokenizer.max_length, hidden_size=unet.context_dim)
    model = TextToImage(unet, text, tokenizer([""])[0], config.class_dropout)
    return DiffusionTask(config, info, model, first_stage, tokenizer)


def stable_diffusion(config, parts, dtype, bpe, path):
    """Stable Diffusion v1's parts, from the file or folder `path`, see weights.build -> DiffusionTask.

    config: SD_V1 of train.py, and the side of the pictures; bpe: CLIP's list of merges. Raises ValueError.
    Source: LDM §4.3.1; its released code.
    """
    missing = [name for name in ("unet", "vae", "text") if name not in parts]
    if missing:
        raise ValueError(f"{path} has no {' and no '.join(missing)}: give the full file" +
                         (", or a --vae" if "vae" in missing else ""))
    models, tokenizer = build(parts, dtype), CLIPTokenizer(bpe)
    model = TextToImage(models["unet"], models["text"], tokenizer([""])[0], config.class_dropout)
    info = {"name": "", "class_names": [], "channels": 3, "image_size": config.image_size,
            "examples": ["an astronaut riding a horse"]}
    return DiffusionTask(config, info, model, models["vae"].eval().requires_grad_(False), tokenizer)


def build_vqvae(config, info, first_stage=None):
    """Config -> VQVAETask. Source: VQ-Diffusion §3.1."""
    return VQVAETask(config, info)


def build_vq(config, info, first_stage=None):
    """Config -> TokenTask: text to tokens where there are captions, else classes, else nothing to ask for.

    Raises ValueError if the first stage is no VQ-VAE. Source: VQ-Diffusion §4.
    """
    if not isinstance(first_stage, VQVAE):
        raise ValueError(f"{config.model} works on a VQ-VAE's tokens: give --first-stage FILE of --model vq-vae, or "
                         "leave --first-stage out to train one")
    common = dict(num_codes=first_stage.num_codes, grid=first_stage.grid, **VQ_CONFIGS[config.model])
    if "vocabulary" not in info:
        classes = len(info["class_names"])
        model = VQTransformer(condition="class" if classes else "none", num_classes=classes,
                              class_dropout_prob=config.class_dropout if classes else 0.0, **common)
        return TokenTask(config, info, model, first_stage)
    tokenizer = WordTokenizer.from_state(info["vocabulary"])
    text = TextEncoder(tokenizer.vocab_size, tokenizer.max_length)
    transformer = VQTransformer(condition="text", context_dim=text.hidden_size, **common)
    model = TextToTokens(transformer, text, tokenizer([""])[0], config.class_dropout)
    return TokenTask(config, info, model, first_stage, tokenizer)


def build_first_stage(config, channels):
    """config.first_stage -> frozen autoencoder for pictures of so many channels, or None.

    It is a checkpoint's path, "none", or "tiny" (untrained, for --bench and --overfit-batch). Raises ValueError.
    """
    if config.first_stage == "none" or config.model in AUTOENCODERS:
        return None
    if config.first_stage == "tiny" and config.model in VQ_CONFIGS:
        return VQVAE(config.image_size, channels, config.codes, config.factor).eval().requires_grad_(False)
    if config.first_stage == "tiny":
        return TinyAutoencoder(channels, config.latent_channels, config.factor).eval().requires_grad_(False)
    path = config.first_stage
    state = {"model": read_weights(path)} if path.endswith(".safetensors") else load_checkpoint(path)
    first_stage = load_first_stage(state, path)
    if first_stage is None:
        raise ValueError(f"{path} holds no autoencoder: --first-stage wants that of --model tiny-ae or kl-ae, or an "
                         "official AutoencoderKL")
    return first_stage


def load_first_stage(state, path):
    """The frozen autoencoder that a checkpoint is, or carries; or an official AutoencoderKL file; else None.

    Source: LDM §3.1.
    """
    if state.get("task") in AUTOENCODERS:
        state = {"factor": state["config"]["factor"], "scale": state.get("scale"), "model": state["ema"],
                 "image_size": state["info"]["image_size"]}
    elif "first_stage" in state:
        state = state["first_stage"]
    elif "format" not in state and "x_embedder.proj.weight" not in state["model"]:
        state = {"scale": 0.18215, "model": split_compvis(state["model"]).get("vae", {})}   # of the published weights
    else:
        return None
    weights = state["model"]
    if "decoder.conv_in.weight" in weights:
        vae = build({"vae": weights}, torch.float32, {"vae": {"scale": state["scale"]}})["vae"]
    elif "codebook.embedding" in weights:
        cell, codes = weights["encoder.1.weight"].shape[1], len(weights["codebook.embedding"])
        vae = VQVAE(state["image_size"], cell // state["factor"] ** 2, codes, state["factor"])
        load_weights(vae, weights, path)
    elif "encoder.1.weight" in weights:
        cell, latent = weights["encoder.1.weight"].shape[1], weights["mean"].shape[0]
        vae = TinyAutoencoder(cell // state["factor"] ** 2, latent, state["factor"])
        load_weights(vae, weights, path)
    else:
        return None
    return vae.eval().requires_grad_(False)


AUTOENCODERS = ("tiny-ae", "kl-ae", "vq-vae")
# name -> how to build it; the loop never asks which one it runs
TASKS = {"tiny-ae": build_autoencoder, "kl-ae": build_autoencoder, "dit": build_dit, "udit": build_udit,
         "unet": build_unet, "vq-vae": build_vqvae, "vq": build_vq}


def task_name(model):
    """Which task trains a model of this name. Raises ValueError with the nearest legal names."""
    if model in AUTOENCODERS:
        return model
    if model in UNET_CONFIGS:
        return "unet"
    if model in UDIT_CONFIGS:
        return "udit"
    if model in VQ_CONFIGS:
        return "vq"
    try:
        dit_config(model)
    except ValueError as error:
        known = [*AUTOENCODERS, "DiT-128x4/2", *DIT_CONFIGS, *UDIT_CONFIGS, *UNET_CONFIGS, *VQ_CONFIGS]
        near = difflib.get_close_matches(model, known, 1)
        hint = f". Did you mean {near[0]}?" if near else ""
        others = ", ".join([*UDIT_CONFIGS, *UNET_CONFIGS, *VQ_CONFIGS, *AUTOENCODERS])
        raise ValueError(f"{error}; or {others}{hint}") from error
    return "dit"


def describe(dataset, config, first_stage=None):
    """What a model needs to know of its data, as plain values that travel in the checkpoint. Raises ValueError."""
    channels, side = dataset.images.shape[1], dataset.images.shape[-1]
    if dataset.images.is_floating_point() and first_stage is not None:          # latents, and what can decode them
        if channels != first_stage.latent_channels:
            raise ValueError(f"{config.data} has {channels} channels, the first stage {first_stage.latent_channels}: "
                             "give the --first-stage that made these latents")
        channels, side = 3, side * first_stage.factor
    info = {"name": dataset.name, "class_names": list(dataset.class_names), "channels": channels, "image_size": side}
    if task_name(config.model) == "unet" or task_name(config.model) == "vq" and dataset.captions is not None:
        if dataset.captions is None:
            raise ValueError(f"{config.model} wants captions, and {config.data} has none: try --data scenes, or a "
                            "folder with metadata.jsonl")
        spread = dataset.captions[::max(1, len(dataset) // 24)][:24]                # a folder may be sorted by kind
        info |= {"vocabulary": WordTokenizer.from_captions(dataset.captions).state(), "examples": spread}
    return info
