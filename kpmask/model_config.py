"""Settings of the systems' networks: what a checkpoint keeps beside its weights.

Where the two papers and their code differ, the comment beside the field names both values.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from kpmask.records import digest

PositiveInt = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Scale = Annotated[float, Field(gt=0, le=1)]


class Part(BaseModel):
    """Base of every job and part of one: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def digest(self) -> str:
        """The SHA-256 of these settings in canonical form."""
        return digest(self.model_dump(mode="json"))

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """The schema that forms are made of; the comment beside a field describes it there."""
        from kpmask.field_comments import field_comments

        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for name, text in field_comments(cls).items():
            if name in properties:
                properties[name].setdefault("description", text)
        return schema


# --- models ----------------------------------------------------------------------------------


class Hourglass(Part):
    """Widths of a U-Net: block i has min(max_features, block_expansion * 2**i) channels."""

    block_expansion: PositiveInt = 64
    num_blocks: PositiveInt = 5
    max_features: PositiveInt = 1024


class KeypointDetector(Hourglass):
    """The FOMM keypoint detector (FOMM section 3.1; K = 10 in every published setting)."""

    block_expansion: PositiveInt = 32
    num_keypoints: PositiveInt = 10
    scale_factor: Scale = 0.25
    temperature: Annotated[float, Field(gt=0)] = 0.1
    estimate_jacobian: bool = True
    single_jacobian_map: bool = False
    # The heads are 7x7 convolutions. Published: no padding, so the maps lose 6 px and keypoint
    # space is stretched against image space (64/58 at 256 px). Small maps want 3.
    head_padding: Literal[0, 3] = 0


class DenseMotion(Hourglass):
    """FOMM's dense motion network (FOMM section 3.2)."""

    scale_factor: Scale = 0.25
    kp_variance: Annotated[float, Field(gt=0)] = 0.01
    estimate_occlusion: bool = True


class FommGenerator(Part):
    """FOMM's generator: encoder, warp, residual bottleneck, decoder (Johnson et al.)."""

    block_expansion: PositiveInt = 64
    num_down_blocks: PositiveInt = 2
    num_bottleneck_blocks: PositiveInt = 6
    max_features: PositiveInt = 512


class Discriminator(Part):
    """FOMM's patch discriminator (pix2pixHD's at one scale): block i has
    min(max_features, block_expansion * 2**(i + 1)) channels.
    """

    block_expansion: PositiveInt = 32
    num_blocks: Annotated[int, Field(gt=0, le=16)] = 4  # each takes 3 px, then halves the side
    max_features: PositiveInt = 512
    spectral_norm: bool = False  # true in FOMM's vox, bair, mgif and nemo settings
    use_keypoints: bool = False  # it also sees Gaussians at the driving keypoints
    kp_variance: Annotated[float, Field(gt=0)] = 0.01


class FommModel(Part):
    """First order motion model, which also pretrains the keypoint detector."""

    system: Literal["fomm"] = "fomm"
    image_size_px: PositiveInt = 256
    detector: KeypointDetector = KeypointDetector()
    dense_motion: DenseMotion = DenseMotion()
    generator: FommGenerator = FommGenerator()
    discriminator: Discriminator | None = None  # of adversarial training; animates nothing
    # grid_sample without the argument was True on torch 1.0, with which the public weights were
    # trained, and is False since 1.3, under which the identity grid is not an identity.
    align_corners: bool = True

    @model_validator(mode="after")
    def _sides_divide(self) -> FommModel:
        _check_side(self.image_size_px, self.detector.scale_factor, self.detector.num_blocks)
        _check_side(
            self.image_size_px, self.dense_motion.scale_factor, self.dense_motion.num_blocks
        )
        return self


class LowResolution(Part):
    """First generator stage: source at `scale_factor` and two masks -> full-size prediction."""

    scale_factor: Scale = 0.25
    block_expansion: PositiveInt = 64  # width after the last up block
    num_bottleneck_blocks: PositiveInt = 6

    @property
    def num_up_blocks(self) -> int:
        """log2(1 / scale_factor): the stage's output has the image's size."""
        return round(1 / self.scale_factor).bit_length() - 1


class KeypointMaskModel(Part):
    """Keypoint mask (paper 002): a mask from a frozen keypoint detector, two generator stages."""

    system: Literal["keypoint-mask"] = "keypoint-mask"
    image_size_px: PositiveInt = 256
    # heatmap: sum of the K logit maps, absolute motion only (section 2.1). circles: Gaussians at
    # the soft-argmax points, also relative motion (2.2). softmax: sum of the softmaxed maps (a
    # third setting of the published code, not in the paper).
    mask: Literal["heatmap", "circles", "softmax"] = "heatmap"
    circle_variance: Annotated[float, Field(gt=0)] = 0.003
    # padded: circles are drawn on the detector's map, as in training. full: on the mask's full
    # grid, as the published animation code does, which misplaces them by 64/58 at 256 px.
    circle_grid: Literal["padded", "full"] = "padded"
    detector: KeypointDetector = KeypointDetector()
    low_resolution: LowResolution = LowResolution()
    high_resolution: Hourglass = Hourglass()

    @model_validator(mode="after")
    def _sides_divide(self) -> KeypointMaskModel:
        _check_side(self.image_size_px, self.detector.scale_factor, self.detector.num_blocks)
        _check_side(self.image_size_px, 1.0, self.high_resolution.num_blocks)
        _check_power_of_two(self.low_resolution)
        return self


class EncoderDecoder(Hourglass):
    """A U-Net without its skips (paper 003); widths as `Hourglass`."""

    block_expansion: PositiveInt = 32


class MaskGenerator(EncoderDecoder):
    """Paper 003's mask network m: one map instead of K, sharpened by its temperature."""

    scale_factor: Scale = 0.25
    head_padding: Literal[0, 3] = 0
    temperature: Annotated[float, Field(gt=0)] = 0.1


class Perturbation(Part):
    """Paper 003's identity perturbation P of the driving mask."""

    # On 0 to 255. The paper takes the mask's median; its code 60 (taichi, bair) or 100 (vox).
    threshold: Annotated[float, Field(ge=0, le=255)] | Literal["median"] = 60.0
    zoom: Scale = 0.75  # of the whole mask, at test time
    num_strips: PositiveInt = 6  # in either direction, at training time
    strip_scale: Fraction = 0.25  # each strip is scaled by 1 - this to 1 + this
    noise: Weight = 20.0  # rate of the random-sign Poisson noise, on 0 to 255


class ColourChange(Part):
    """How far factors of brightness, contrast and saturation are from 1, and hues from 0."""

    brightness: Fraction = 0.1
    contrast: Fraction = 0.1
    saturation: Fraction = 0.1
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1  # of a full turn


Ablation = Literal["none", "no_pert", "no_ref", "no_id"]


class RefinedMaskModel(Part):
    """Refined masking (paper 003): a learned mask, perturbed and refined for the source."""

    system: Literal["refined-mask"] = "refined-mask"
    image_size_px: PositiveInt = 256
    mask: MaskGenerator = MaskGenerator()
    refinement: EncoderDecoder = EncoderDecoder(block_expansion=64)
    refinement_temperature: Annotated[float, Field(gt=0)] = 0.1
    perturbation: Perturbation = Perturbation()
    # Paper 003's A: in training the mask network sees the driver in other colours than are drawn.
    driving_colours: ColourChange = ColourChange()
    low_resolution: LowResolution = LowResolution()
    high_resolution: Hourglass = Hourglass()
    # What animation leaves out: P (no_pert), the refinement (no_ref), both (no_id).
    ablation: Ablation = "none"

    @model_validator(mode="after")
    def _sides_divide(self) -> RefinedMaskModel:
        _check_side(self.image_size_px, self.mask.scale_factor, self.mask.num_blocks)
        small = self.low_resolution.scale_factor
        _check_side(self.image_size_px, small, self.refinement.num_blocks)
        _check_side(self.image_size_px, 1.0, self.high_resolution.num_blocks)
        _check_power_of_two(self.low_resolution)
        return self


class MonkeyDetector(Hourglass):
    """Monkey-Net's keypoint detector: points with 2x2 covariances."""

    block_expansion: PositiveInt = 32
    max_features: PositiveInt = 512
    num_keypoints: PositiveInt = 10
    temperature: Annotated[float, Field(gt=0)] = 0.1
    scale_factor: Scale = 1.0


class MonkeyMotion(Hourglass):
    """Monkey-Net's dense motion network: a mask a keypoint, and a residual flow."""

    block_expansion: PositiveInt = 32
    max_features: PositiveInt = 512
    num_group_blocks: Annotated[int, Field(ge=0)] = 2
    background_bias: float = 2.0
    scale_factor: Scale = 1.0


class MonkeyGenerator(Hourglass):
    """Monkey-Net's generator: a U-Net whose skips are warped, then residual blocks."""

    block_expansion: PositiveInt = 32
    max_features: PositiveInt = 512
    num_refinement_blocks: PositiveInt = 4


class MonkeyNetModel(Part):
    """Monkey-Net (Siarohin et al., CVPR 2019): zero-order motion from learned keypoints."""

    system: Literal["monkey-net"] = "monkey-net"
    image_size_px: PositiveInt = 256
    detector: MonkeyDetector = MonkeyDetector()
    motion: MonkeyMotion = MonkeyMotion()
    generator: MonkeyGenerator = MonkeyGenerator()
    discriminator: Discriminator | None = None
    heatmap_divisor: Annotated[float, Field(gt=0)] = 100.0  # of the difference heatmaps
    align_corners: bool = True

    @model_validator(mode="after")
    def _sides_divide(self) -> MonkeyNetModel:
        _check_side(self.image_size_px, self.detector.scale_factor, self.detector.num_blocks)
        _check_side(self.image_size_px, self.motion.scale_factor, self.motion.num_blocks)
        _check_side(self.image_size_px, 1.0, self.generator.num_blocks)
        return self


class X2FaceModel(Part):
    """X2Face (Wiles et al., ECCV 2018): an embedded source, warped by the driving frame."""

    system: Literal["x2face"] = "x2face"
    image_size_px: PositiveInt = 256
    block_expansion: PositiveInt = 64
    max_features: PositiveInt = 512
    num_blocks: PositiveInt | None = None  # None: down to one pixel, log2 of the side
    driving_features: PositiveInt = 128  # the driver's bottleneck
    align_corners: bool = True

    @model_validator(mode="after")
    def _sides_divide(self) -> X2FaceModel:
        if self.num_blocks is None:
            if self.image_size_px < 2 or self.image_size_px & (self.image_size_px - 1):
                raise ValueError(f"image_size_px {self.image_size_px} is no power of 2 above 1")
        else:
            _check_side(self.image_size_px, 1.0, self.num_blocks)
        return self


class KpmaskPlusModel(Part):
    """What the papers leave as future work, and more: every channel of a learned mask by itself.

    - The mask has `num_keypoints` channels, each fed to the generator (separate), or
      `num_combined` learned combinations of them (learned).
    - The frame is put together, pixel by pixel, of what is drawn, of the source warped, and of the
      source as it is.
    """

    system: Literal["kpmask-plus"] = "kpmask-plus"
    image_size_px: PositiveInt = 256
    detector: KeypointDetector = KeypointDetector(num_keypoints=16, estimate_jacobian=False)
    combination: Literal["separate", "learned", "sum"] = "separate"
    num_combined: PositiveInt = 8
    # Of the normal noise on the masks in training. The more, the less of the driver's looks they
    # carry, and the coarser the pose.
    mask_noise: Weight = 0.0
    warp: bool = True  # a warped source is one of the parts
    low_resolution: LowResolution = LowResolution()
    high_resolution: Hourglass = Hourglass()

    @model_validator(mode="after")
    def _sides_divide(self) -> KpmaskPlusModel:
        _check_side(self.image_size_px, self.detector.scale_factor, self.detector.num_blocks)
        _check_side(self.image_size_px, 1.0, self.high_resolution.num_blocks)
        _check_power_of_two(self.low_resolution)
        return self


def _check_side(image_size_px: int, scale_factor: float, num_blocks: int) -> None:
    side = image_size_px * scale_factor
    if side % 2**num_blocks:
        raise ValueError(
            f"a side of {side:g} px ({image_size_px} * {scale_factor:g}) does not divide by "
            f"2**{num_blocks}; lower num_blocks or change the size"
        )


def _check_power_of_two(stage: LowResolution) -> None:
    if 1 / stage.scale_factor != 2**stage.num_up_blocks:
        raise ValueError("low_resolution.scale_factor must be 1/2, 1/4, 1/8, ...")


AnyModel = (
    FommModel
    | KeypointMaskModel
    | RefinedMaskModel
    | MonkeyNetModel
    | X2FaceModel
    | KpmaskPlusModel
)
ModelConfig = Annotated[AnyModel, Field(discriminator="system")]
SYSTEMS = ("fomm", "keypoint-mask", "refined-mask", "monkey-net", "x2face", "kpmask-plus")
