"""Teacher-forced decoding of a GPT-2 frame with a static cache, one step per call, captured into a CUDA graph.

A step feeds the text's own next token to every sequence, adds the loss of the token after it and what the routers chose
to sums on the device, and moves on by one position; nothing is read back. So perplexity, distinct experts and joules of
a routing policy come from the same forwards, as they are in generation.

Shape letters: B sequences, S positions, L layers, H heads, D model width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from cuda_graph import captured
from torch import Tensor, nn
from torch.nn import functional as F

from thermoe.moe.layer import routed_modules


class StaticDecoder:
    """Decodes rows of text position by position.

    Args:
        model: a GPT-2 frame (`thermoe.models.frame.build_frame`), in evaluation, on its device.
        rows: int64 (B, S + 1).
    """

    def __init__(self, model: nn.Module, rows: Tensor) -> None:
        self.model, self.body = model, model.transformer
        self.layers = [layer for _, layer in routed_modules(model)]
        batch, length = rows.shape[0], rows.shape[1] - 1
        config, device, dtype = model.config, rows.device, self.body.wte.weight.dtype
        self.batch, self.length, self.heads = batch, length, config.n_head
        shape = (len(self.body.h), batch, config.n_head, length, config.n_embd // config.n_head)
        self.keys, self.values = torch.zeros(2, *shape, device=device, dtype=dtype).unbind()
        self.rows = rows.clone()
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.places = torch.arange(length, device=device)
        self.nll = torch.zeros(batch, dtype=torch.float64, device=device)
        self.opened = torch.zeros(len(self.layers), dtype=torch.float64, device=device)
        self.pairs = torch.zeros_like(self.opened)
        self.done = 0
        self.run: Callable[[], object] = self._step

    def _step(self) -> Tensor:
        at = self.position
        x = self.body.wte(self.rows.index_select(1, at)) + self.body.wpe(at)
        seen = (self.places <= at).view(1, 1, 1, -1)
        for i, block in enumerate(self.body.h):
            q, k, v = (
                part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for part in block.attn.c_attn(block.ln_1(x)).chunk(3, dim=-1)
            )
            self.keys[i].index_copy_(2, at, k)
            self.values[i].index_copy_(2, at, v)
            y = F.scaled_dot_product_attention(q, self.keys[i], self.values[i], attn_mask=seen)
            x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
        logits = self.model.lm_head(self.body.ln_f(x))[:, 0].float()
        target = self.rows.index_select(1, at + 1)
        self.nll += (logits.logsumexp(-1, keepdim=True) - logits.gather(-1, target))[:, 0]
        decisions = [layer.last_routing for layer in self.layers]
        self.opened += torch.stack([d.opened.sum() for d in decisions])
        self.pairs += torch.stack([d.active.sum() for d in decisions])
        self.position += 1
        return logits

    @torch.no_grad()
    def capture(self) -> None:
        """Record the step into a CUDA graph; on a CPU it stays as it is."""
        if not self.rows.is_cuda:
            return
        self.run = captured(self._step)
        self.restart()

    @torch.no_grad()
    def restart(self, rows: Tensor | None = None) -> None:
        """Begin again at position 0, with other text if given; the sums begin at 0."""
        if rows is not None:
            self.rows.copy_(rows)
        for tensor in (self.position, self.nll, self.opened, self.pairs):
            tensor.zero_()
        self.done = 0

    @torch.no_grad()
    def step(self) -> None:
        """Decode one position of every sequence; begins again at the end of the text, the sums going on."""
        if self.done and self.done % self.length == 0:
            self.position.zero_()
        self.run()
        self.done += 1

    def means(self) -> dict[str, float]:
        """Return loss per token, distinct experts per layer and experts per token since `restart`; reads the device."""
        steps = max(1, self.done)
        return {
            "nll": float(self.nll.sum()) / (steps * self.batch),
            "distinct_experts": float(self.opened.mean()) / steps,
            "experts_per_token": float(self.pairs.mean()) / (steps * self.batch),
        }
