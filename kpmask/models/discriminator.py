"""The patch discriminator of adversarial training, and its losses (LSGAN, feature matching).

FOMM's setting of pix2pixHD's: one scale, unpadded 4x4 convolutions, instance norm. Parameter names
are those of the original files. It judges frames in training and animates nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from kpmask.config import Losses
from kpmask.errors import ConfigError
from kpmask.model_config import Discriminator
from kpmask.models.layers import gaussian_maps, widened

KERNEL_PX = 4
LEAK = 0.2


class SpectralConv2d(nn.Module):
    """An unpadded convolution of spectral norm 1 (Miyato et al., 2018).

    Each pass in training mode takes one step of the power iteration towards the weight's largest
    singular value, by which it is then divided. Names and arithmetic are those of
    `torch.nn.utils.spectral_norm`, so that files of it load. That function leaves the divided
    weight on the module, which then cannot be copied any more, and iterates in half precision
    under autocast; this class does neither.
    """

    weight_u: Tensor
    weight_v: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel_px: int) -> None:
        super().__init__()
        plain = nn.Conv2d(in_channels, out_channels, kernel_px)
        self.bias = plain.bias
        self.weight_orig = plain.weight
        rows, columns = plain.weight.flatten(1).shape
        self.register_buffer("weight_u", _unit(torch.randn(rows)))
        self.register_buffer("weight_v", _unit(torch.randn(columns)))

    def weight(self) -> Tensor:
        """The weight that convolves: [out, in, kernel, kernel]."""
        matrix = self.weight_orig.flatten(1)
        if self.training:
            with torch.no_grad():
                self.weight_v.copy_(_unit((matrix * self.weight_u[:, None]).sum(0)))
                self.weight_u.copy_(_unit((matrix * self.weight_v).sum(1)))
        # Copies: the next pass changes the buffers in place before this one's gradients are known.
        u, v = self.weight_u.clone(), self.weight_v.clone()
        return self.weight_orig / (u[:, None] * matrix * v).sum()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return functional.conv2d(x_BCHW, self.weight(), self.bias)


def _unit(vector: Tensor) -> Tensor:
    return functional.normalize(vector, dim=0, eps=1e-12)


def _convolution(
    in_channels: int, out_channels: int, kernel_px: int, *, spectral_norm: bool
) -> nn.Module:
    kind = SpectralConv2d if spectral_norm else nn.Conv2d
    return kind(in_channels, out_channels, kernel_px)


class _PatchBlock(nn.Module):
    """4x4 convolution, instance norm (not in the first block), leaky ReLU, 2x2 means (not in the
    last block).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        spectral_norm: bool,
        is_first: bool,
        is_last: bool,
    ) -> None:
        super().__init__()
        self.conv = _convolution(in_channels, out_channels, KERNEL_PX, spectral_norm=spectral_norm)
        self.norm = None if is_first else nn.InstanceNorm2d(out_channels, affine=True)
        self.is_last = is_last

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW: Tensor = self.conv(x_BCHW)
        if self.norm is not None:
            y_BCHW = self.norm(y_BCHW)
        y_BCHW = functional.leaky_relu(y_BCHW, LEAK)
        return y_BCHW if self.is_last else functional.avg_pool2d(y_BCHW, 2)


class PatchDiscriminator(nn.Module):
    """Tells real frames (1) from generated ones (0), patch by patch."""

    def __init__(self, config: Discriminator, *, num_keypoints: int) -> None:
        super().__init__()
        self.config = config
        in_channels = 3 + (num_keypoints if config.use_keypoints else 0)
        last = config.num_blocks - 1
        widths = [
            min(config.max_features, config.block_expansion * 2 ** (i + 1)) for i in range(last + 1)
        ]
        self.down_blocks = nn.ModuleList(
            _PatchBlock(
                cin,
                cout,
                spectral_norm=config.spectral_norm,
                is_first=i == 0,
                is_last=i == last,
            )
            for i, (cin, cout) in enumerate(zip([in_channels, *widths], widths, strict=False))
        )
        self.conv = _convolution(widths[-1], 1, 1, spectral_norm=config.spectral_norm)

    def map_side_px(self, image_size_px: int) -> int:
        """The side of the prediction map of a square image.

        Raises:
            ConfigError: the unpadded convolutions leave nothing to normalise.
        """
        side_px = image_size_px
        for index in range(self.config.num_blocks):
            side_px = (side_px if index == 0 else side_px // 2) - (KERNEL_PX - 1)
            if side_px < 2:
                raise ConfigError(
                    f"block {index + 1} of {self.config.num_blocks} has no pixels left of an image "
                    f"of {image_size_px} px",
                    subject="discriminator.num_blocks",
                    hint="lower it, and list one weight less in losses.feature_matching",
                )
        return side_px

    def check_losses(self, losses: Losses) -> None:
        """Refuse losses (ConfigError) that do not have a feature weight for every block."""
        if len(losses.feature_matching) != self.config.num_blocks:
            raise ConfigError(
                f"lists {len(losses.feature_matching)} weights, and the discriminator has "
                f"{self.config.num_blocks} blocks",
                subject="losses.feature_matching",
            )

    def forward(
        self, image_BCHW: Tensor, points_BK2: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Every block's output, and the prediction map [B, 1, H, W].

        Args:
            points_BK2: keypoints of the frame, which `use_keypoints` asks for. They get no
                gradient.
        """
        x_BCHW = image_BCHW
        if self.config.use_keypoints:
            assert points_BK2 is not None
            height_px, width_px = image_BCHW.shape[-2:]
            maps_BKHW = gaussian_maps(
                points_BK2.detach(), size_px=(height_px, width_px), variance=self.config.kp_variance
            )
            x_BCHW = torch.cat([image_BCHW, maps_BKHW], dim=1)
        features = []
        for block in self.down_blocks:
            x_BCHW = block(x_BCHW)
            features.append(x_BCHW)
        return features, widened(self.conv(x_BCHW))


def adversarial_terms(
    discriminator: PatchDiscriminator,
    fake_BCHW: Tensor,
    real_BCHW: Tensor,
    points_BK2: Tensor | None,
    losses: Losses,
) -> dict[str, Tensor]:
    """The generator's and the discriminator's losses, to be minimised in one backward pass.

    - `adversarial`: mean (1 - D(fake))^2, and `feature_matching`: mean |feature difference| of
      each block. They move `fake_BCHW` and leave the discriminator alone.
    - `discriminator`: mean (1 - D(real))^2 + mean D(fake)^2. It moves the discriminator alone.

    Args:
        fake_BCHW: generated frames. real_BCHW: the frames that they should be.
        points_BK2: keypoints of the real frames, where the discriminator uses them.
        losses: the terms' weights.
    """
    # Instance norm sees each image by itself, so both kinds go through in one pass.
    both_BCHW = torch.cat([fake_BCHW.detach(), real_BCHW])
    twice_BK2 = None if points_BK2 is None else torch.cat([points_BK2, points_BK2])
    features, map_B1HW = discriminator(both_BCHW, twice_BK2)
    map_fake_B1HW, map_real_B1HW = map_B1HW.chunk(2)
    judging = (1 - map_real_B1HW).square().mean() + map_fake_B1HW.square().mean()

    constant = {name: p.detach() for name, p in discriminator.named_parameters()}
    found, map_B1HW = functional_call(discriminator, constant, (fake_BCHW, points_BK2))
    matching = [
        weight * (widened(mine) - widened(both.detach().chunk(2)[1])).abs().mean()
        for weight, mine, both in zip(losses.feature_matching, found, features, strict=True)
    ]
    return {
        "adversarial": losses.adversarial * (1 - map_B1HW).square().mean(),
        "feature_matching": torch.stack(matching).sum(),
        "discriminator": losses.discriminator * judging,
    }
