"""An AutoencoderKL's encode and decode in horizontal bands: the same picture, in about half the memory.

Layer by layer. A GroupNorm's statistics are those of the whole map. Norm, SiLU and convolution go through the map in
bands of rows, each read with the rows beside it, so that no seam can come; what they make is written into the map it
belongs to, the second convolution of a ResNet block into that block's own. So a block holds what it was given, one map
more, and a band's intermediates, where diffusers' modules hold a map for each. Tiles that are encoded or decoded by
themselves and blended, as diffusers' enable_tiling does, give another picture.

The middle block's attention is computed whole: its map is the smallest. Nothing is computed twice but the rows at the
bands' edges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor
from torch.nn import Conv2d, GroupNorm
from torch.nn.functional import interpolate, pad, silu

BLOCKS = ("DownEncoderBlock2D", "UpDecoderBlock2D")


class BandedVAE:
    """What stages.encode and stages.decode take for a VAE; differs from `vae` itself by rounding alone.

    vae: an AutoencoderKL of Stable Diffusion 1.x or 2.x, of any float dtype, contiguous or channels_last; it is shared,
        and never written
    rows: of a layer's output that are made at once; even, at least 2
    Raises: ValueError for another number of rows, other blocks than BLOCKS, or another activation than SiLU
    """

    def __init__(self, vae: AutoencoderKL, rows: int) -> None:
        if rows < 2 or rows % 2:
            raise ValueError(f"a band of {rows} rows is not possible; expected an even number, at least 2")
        config = vae.config
        kinds = {*config.down_block_types, *config.up_block_types} - {*BLOCKS}
        if kinds or config.act_fn != "silu":
            raise ValueError(
                f"a VAE with blocks {sorted(kinds)} and activation {config.act_fn!r} cannot work in bands; expected "
                f"only {', '.join(BLOCKS)} and 'silu'; give more memory, or take a smaller picture"
            )
        self.config, self.dtype, self.device = config, vae.dtype, vae.device
        self._vae, self._rows = vae, rows
        kernel = vae.decoder.conv_in.weight
        self._layout = torch.contiguous_format if kernel.is_contiguous() else torch.channels_last

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> AutoencoderKLOutput:
        """The posterior of pixels [B, 3, H, W] in [-1, 1], in the VAE's dtype."""
        vae, encoder = self._vae, self._vae.encoder
        x = self._convolve(pixels, encoder.conv_in)
        for block in encoder.down_blocks:
            for resnet in block.resnets:
                x = self._resnet(x, resnet)
            for sampler in block.downsamplers or ():
                x = self._halve(x, sampler.conv)
        x = self._middle(x, encoder.mid_block)
        x = self._convolve(x, encoder.conv_out, encoder.conv_norm_out)
        return AutoencoderKLOutput(DiagonalGaussianDistribution(vae.quant_conv(x) if vae.quant_conv else x))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> DecoderOutput:
        """The pixels [B, 3, H, W] of unscaled latents [B, C, h, w], in the VAE's dtype."""
        vae, decoder = self._vae, self._vae.decoder
        x = vae.post_quant_conv(latents) if vae.post_quant_conv else latents
        x = self._convolve(x, decoder.conv_in)
        x = self._middle(x, decoder.mid_block)
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x = self._resnet(x, resnet)
            for sampler in block.upsamplers or ():
                x = self._convolve(x, sampler.conv, scale=2)
        return DecoderOutput(self._convolve(x, decoder.conv_out, decoder.conv_norm_out))

    def _middle(self, x: Tensor, block: Any) -> Tensor:
        first, *others = block.resnets
        x = self._resnet(x, first)
        for attention, resnet in zip(block.attentions, others, strict=True):
            x = self._resnet(attention(x) if attention is not None else x, resnet)
        return x

    def _resnet(self, x: Tensor, block: Any) -> Tensor:
        """A ResNet block's output, in x or, if it has other channels, in the map between the two convolutions."""
        hidden = self._convolve(x, block.conv1, block.norm1)
        out, shortcut = (x, None) if block.conv_shortcut is None else (hidden, block.conv_shortcut)

        def add(rows: slice, band: Tensor) -> None:
            if shortcut is None:
                out[:, :, rows].add_(band)
            else:
                out[:, :, rows] = band.add_(shortcut(x[:, :, rows]))

        self._in_bands(hidden, block.conv2, block.norm2, 1, add)
        return out

    def _convolve(self, x: Tensor, layer: Conv2d, norm: GroupNorm | None = None, scale: int = 1) -> Tensor:
        """A map of its own of what _in_bands makes."""
        batch, _, height, width = x.shape
        out = self._empty(x, batch, layer.out_channels, scale * height, scale * width)

        def write(rows: slice, band: Tensor) -> None:
            out[:, :, rows] = band

        self._in_bands(x, layer, norm, scale, write)
        return out

    def _in_bands(
        self, x: Tensor, layer: Conv2d, norm: GroupNorm | None, scale: int, take: Callable[[slice, Tensor], None]
    ) -> None:
        """Norm and SiLU, or nearest-neighbour enlarging by `scale`, or neither; then a 3x3 convolution padded by one.

        take: gets each band of the result with its rows. The band below was read by then, so it may write it to x where
            there is a norm. The band is its own to change
        """
        normed = _WholeNorm(x, norm, self._rows) if norm is not None else None
        done: tuple[slice, Tensor] | None = None
        for rows in self._bands(scale * x.shape[2]):
            # One row of x more on either side. The layer pads this too, which spoils the outermost rows of its answer;
            # they are left out, but for those at the map's own edge, where the padding is right.
            above, below = max(rows.start // scale - 1, 0), -(-rows.stop // scale) + 1
            band = x[:, :, above:below]
            if normed is not None:
                band = normed.activated(band)
            elif scale > 1:
                band = interpolate(band, scale_factor=float(scale), mode="nearest")
            if done is not None:
                take(*done)
                done = None  # its memory is the next one's
            first = rows.start - scale * above
            done = rows, layer(band)[:, :, first : first + rows.stop - rows.start]
            del band
        assert done is not None
        take(*done)

    def _halve(self, x: Tensor, layer: Conv2d) -> Tensor:
        """A 3x3 convolution with stride 2 over the map padded by one row below and one column on the right."""
        batch, _, height, width = x.shape
        out = self._empty(x, batch, layer.out_channels, height // 2, width // 2)
        for rows in self._bands(height // 2, self._rows // 2):
            band = x[:, :, 2 * rows.start : 2 * rows.stop + 1]
            missing = 2 * (rows.stop - rows.start) + 1 - band.shape[2]  # 1 at the map's end
            out[:, :, rows] = layer(pad(band, (0, 1, 0, missing)))
        return out

    def _bands(self, height: int, rows: int | None = None) -> Iterator[slice]:
        rows = rows or self._rows
        return (slice(top, min(top + rows, height)) for top in range(0, height, rows))

    def _empty(self, like: Tensor, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=self._layout)


class _WholeNorm:
    """GroupNorm by the statistics of the whole map, then SiLU; float32 inside, or the map's dtype if that is wider.

    x: [B, C, H, W]; the statistics are taken now, `rows` rows at a time
    """

    def __init__(self, x: Tensor, norm: GroupNorm, rows: int) -> None:
        self._wide = torch.promote_types(x.dtype, torch.float32)
        means, squares, counts = zip(*(self._moments(band, norm.num_groups) for band in x.split(rows, 2)), strict=True)
        mean, square = torch.stack(means), torch.stack(squares)  # [bands, B, G]
        count = torch.tensor(counts, dtype=self._wide, device=x.device)[:, None, None]
        whole = (mean * count).sum(0) / count.sum()
        variance = (square + count * (mean - whole).square()).sum(0) / count.sum()  # exact, unlike E[x^2] - E[x]^2
        each = x.shape[1] // norm.num_groups
        deviation = (variance + norm.eps).rsqrt().repeat_interleave(each, 1)
        self._scale = (deviation * norm.weight)[:, :, None, None]
        self._shift = (norm.bias - whole.repeat_interleave(each, 1) * deviation * norm.weight)[:, :, None, None]

    def _moments(self, band: Tensor, groups: int) -> tuple[Tensor, Tensor, int]:
        """Means and sums of squares about them, [B, G], and how many elements each is of."""
        grouped = band.unflatten(1, (groups, -1)).to(self._wide)
        mean = grouped.mean((2, 3, 4), keepdim=True)
        return mean[:, :, 0, 0, 0], (grouped - mean).square_().sum((2, 3, 4)), grouped[0, 0].numel()

    def activated(self, band: Tensor) -> Tensor:
        """Some rows of the map, normed and activated, as a tensor of its own in the map's dtype."""
        wide = band.to(self._wide)
        normed = torch.addcmul(self._shift, wide, self._scale, out=None if wide is band else wide)
        return silu(normed, inplace=True).to(band.dtype)
