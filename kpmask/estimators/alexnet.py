"""AlexNet (Krizhevsky 2014, One weird trick) without its classifier, as torchvision numbers it."""

from __future__ import annotations

from typing import Final

from torch import Tensor, nn

from kpmask.estimators.networks import frozen

CHANNELS: Final = (64, 192, 384, 256, 256)  # of each map
MIN_SIDE_PX: Final = 31  # of less nothing is left before the third convolution

_MAPS: Final = (1, 4, 7, 9, 11)  # layers: the five ReLUs


class AlexNet(nn.Module):
    """The maps of images after each of five convolutions."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third, fourth, fifth = CHANNELS
        self.features = nn.Sequential(
            nn.Conv2d(3, first, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(first, second, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(second, third, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(third, fourth, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(fourth, fifth, 3, padding=1),
            nn.ReLU(),
        )
        frozen(self)

    def forward(self, image_NCHW: Tensor) -> list[Tensor]:
        """The five maps of images that are normalised as in training, `MIN_SIDE_PX` or more."""
        maps = []
        for index, layer in enumerate(self.features):
            image_NCHW = layer(image_NCHW)
            if index in _MAPS:
                maps.append(image_NCHW)
        return maps
