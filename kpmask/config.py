"""Jobs and their parts: frozen, typed, unknown keys refused, presets loaded.

- A job is one pydantic model. A preset is a TOML file with a table for each job that it sets.
- Order of precedence: defaults here, then the preset, then a job file, then `--set key=value`,
  then the command's own flags.
- Whatever is wrong is a `ConfigError` that names the field, the value and what is allowed.

Where the two papers and their code differ, the comment beside the field names both values.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError, model_validator

from kpmask.errors import ConfigError
from kpmask.metric_names import SET_METRICS, known_metric
from kpmask.model_config import SYSTEMS, Fraction, ModelConfig, Part, PositiveInt, Weight
from kpmask.records import (
    MAX_GIF_FPS,
    Average,
    Delivery,
    Motion,
    OutputFormat,
    Partition,
    Quantise,
    Setting,
    parse_box,
)

Seconds = Annotated[float, Field(gt=0)]


# --- shared parts ----------------------------------------------------------------------------


class MediaLimits(Part):
    """What an untrusted image or video may ask of us."""

    max_side_px: PositiveInt = 4096
    min_side_px: PositiveInt = 32
    max_frames: PositiveInt = 1_000_000
    max_bytes: PositiveInt = 8 * 2**30
    max_gap_s: Seconds = 60.0  # a longer hole between two frames ends the video there
    timeout_s: Seconds = 30.0  # of one open or read


class Cluster(Part):
    """How much of the Ray cluster a job takes. RAY_ADDRESS chooses the cluster itself."""

    num_workers: PositiveInt | None = None  # None: one for every CPU (or GPU) that Ray has
    cpus_per_worker: Annotated[float, Field(ge=0)] = 1.0  # 0: of work that only waits
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    max_deaths: PositiveInt = 2  # an item that killed this many workers is given up
    max_attempts: PositiveInt = 3  # of an item whose error says that a retry can help
    item_timeout_s: Seconds = 3600.0
    outage_s: Seconds = 300.0  # a store may be away for so long before the run ends


# --- preprocess ------------------------------------------------------------------------------


class Download(Part):
    """How videos that are not at hand are fetched: files by HTTP, pages by yt-dlp, S3 objects."""

    enabled: bool = True
    url_template: str = "https://www.youtube.com/watch?v={video_id}"
    max_attempts: PositiveInt = 4
    backoff_s: Seconds = 2.0  # doubles with every attempt
    timeout_s: Seconds = 20.0  # of one connection, or one silence
    max_time_s: Seconds = 1800.0  # of one video, all attempts together
    min_bytes_per_s: Annotated[int, Field(ge=0)] = 1000  # a host that is slower is given up
    max_bytes: PositiveInt = 4 * 2**30
    max_height_px: PositiveInt = 720
    rate_bytes_per_s: PositiveInt | None = None
    keep: bool = True  # False: a downloaded video is removed as soon as it is cut
    concurrency: PositiveInt = 4  # downloads at once, on one machine
    per_host: PositiveInt = 2  # of them from one host
    host_interval_s: Annotated[float, Field(ge=0)] = 0.0  # between two requests to one host
    max_pause_s: Annotated[float, Field(ge=0)] = 120.0  # as long as a host may ask us to wait
    # Where tables of strangers may point with s3:// addresses, which are read with our own keys.
    s3_prefixes: tuple[Annotated[str, Field(pattern=r"^s3://[^/]")], ...] = ()
    cookies_file: str | None = Field(default=None, repr=False)
    proxy: str | None = Field(default=None, repr=False)
    allow_private_hosts: bool = False  # loopback and private networks, for a mirror of one's own


class Retry(Part):
    """When a later run tries again what failed for a passing reason."""

    backoff_s: Annotated[float, Field(ge=0)] = 900.0  # after the second failure; then it doubles
    max_backoff_s: Seconds = 86400.0
    max_attempts: Annotated[int, Field(ge=0)] = 10  # over all runs; 0: as often as it takes


class Clips(Part):
    """How a span of a video becomes a clip."""

    size_px: PositiveInt = 256
    min_frames: PositiveInt = 16
    max_frames: PositiveInt = 1024
    min_box_px: Annotated[int, Field(ge=0)] = 0  # refuse a box with both sides smaller
    increase: Annotated[float, Field(ge=0)] = 0.0  # growth of the box on each side
    # The paper crops "while preserving the aspect ratio" (square); the published code stretches a
    # box that is not square.
    fit: Literal["square", "stretch"] = "square"
    test_fraction: Fraction = 0.1  # for videos that come without a split, by identity
    # Where any are named, they are tested on and all others trained on, whatever the source says.
    test_identities: tuple[str, ...] = ()


# What the input is. Annotated: a table or annotations say which seconds and pixels of which video;
# of the others there are the videos themselves. `kpmask.data.sources` tells them apart.
SourceKind = Literal["table", "taichi", "voxceleb1", "voxceleb2", "nemo", "robonet", "videos"]
ANNOTATED_SOURCES: frozenset[SourceKind] = frozenset({"table", "taichi", "voxceleb1", "voxceleb2"})


class RoboNet(Part):
    """What is taken of RoboNet's trajectories (HDF5 files)."""

    robots: tuple[str, ...] = ("sawyer",)  # the paper's; none named: every robot
    # A camera's frames are cut to a whole number of clips of so many, so that a trajectory of 31
    # frames does not become clips of 15 and 16; None: all frames.
    num_frames: PositiveInt | None = 30
    cameras: tuple[Annotated[int, Field(ge=0, le=63)], ...] | None = None  # None: all
    # The order of colours in a decoded picture; file: as its attribute says.
    channels: Literal["file", "rgb", "bgr"] = "file"
    max_bytes: PositiveInt = 2**28  # of one trajectory's file, and of the pictures out of it


class Subject(Part):
    """What is cut out of videos that come without boxes, and for how long it is followed.

    A row of a table has a box: none of this is for it.
    """

    # none: the largest square about the frame's centre. auto: a face where one is seen, else a
    # person, else what moves. face needs `kpmask weights fetch yunet`, or `pip install
    # 'kpmask[faces]'`, and so does auto.
    detector: Literal["none", "auto", "face", "person", "motion"] = "none"
    # follow: the union of a subject's boxes, while they overlap its first (VoxCeleb). fixed: the
    # first box, grown, while the subject stays in it (Tai-Chi-HD). first: the box of the video's
    # first second for all of it, cuts or not (UvA-NEMO).
    rule: Literal["follow", "fixed", "first"] = "follow"
    # Of the box, on each side; then it is made square. VoxCeleb and NEMO: 0.1, Tai-Chi-HD: 0.05.
    increase: Annotated[float, Field(ge=0)] = 0.1
    # What becomes of a grown box that leaves the frame: refused, as in all three data sets, or
    # moved inside (and made smaller, where it is larger than the frame).
    border: Literal["refuse", "move"] = "refuse"
    min_iou: Fraction = 0.25  # follow: with the first box
    min_inside: Fraction = 0.8  # fixed: how much of the subject must stay in the box
    alone: bool = True  # it ends where another subject touches its box; VoxCeleb has it off
    max_missed: PositiveInt = 5  # it ends after so many looks in a row that do not find it
    every_s: Seconds | None = None  # between two looks; None: face, motion 0.1, person 0.2
    min_score: float | None = None  # None: face 0.7, person 0.3, motion 0.1
    min_frames: Annotated[int, Field(ge=0)] = 0  # clips.min_frames holds too
    min_box_px: Annotated[int, Field(ge=0)] = 0  # before growth; clips.min_box_px holds too
    min_side_px: Annotated[int, Field(ge=0)] = 0  # the shorter side of the video
    max_tubes: PositiveInt = 1000  # clips of one video; the rest of it is not looked at
    # PySceneDetect's detectors; adaptive compares a change with those around it, so that a moving
    # camera is no cut.
    shots: Literal["adaptive", "content", "none"] = "adaptive"
    shot_threshold: Annotated[float, Field(gt=0)] | None = None  # None: adaptive 3, content 27


class Quality(Part):
    """Which clips are not worth training on; by default every clip is kept.

    `kpmask.data.quality` says how each is measured; a clip's record has the values. A clip is
    refused where its value is beyond the limit, by the first that is, in this order.
    """

    # Mean luma, 0 (black) to 1 (white).
    min_brightness: Fraction = 0.0
    max_brightness: Fraction = 1.0
    # Mean change of luma from frame to frame, as a part of its range: a still picture has 0, a
    # talking head 0.001 to 0.02.
    min_motion: Fraction = 0.0
    # The largest such change: below 0.07 while people move, above 0.1 at most cuts.
    max_jump: Fraction = 1.0
    # Variance of the Laplacian of 8-bit luma, which grows with detail, noise and size_px: at 256 px
    # 10 to 30 where a clip is out of focus or enlarged, 100 and more where it is sharp.
    min_sharpness: Annotated[float, Field(ge=0)] = 0.0
    # Share of pixels on edges that stay while what is about them moves: a logo has 0.01 and more.
    max_overlay: Fraction = 1.0
    # drop: of clips that repeat each other, the first is kept.
    duplicates: Literal["keep", "drop"] = "keep"
    # How many of a hash's 64 bits may differ between clips that repeat each other: 0 for equal
    # ones, 6 finds most that were coded again or cropped by a hundredth, 8 by two. Other spans of
    # the same video have 14 and more. A million clips take 10 s at 6, a minute at 8.
    max_hash_bits: Annotated[int, Field(ge=0, le=12)] = 6

    @model_validator(mode="after")
    def _range(self) -> Quality:
        if self.min_brightness >= self.max_brightness:
            raise ValueError(
                f"min_brightness {self.min_brightness:g} is not under "
                f"max_brightness {self.max_brightness:g}"
            )
        return self


class Storage(Part):
    """How clips are stored."""

    layout: Literal["shards", "folders"] = "shards"
    image_format: Literal["png", "jpeg"] = "png"
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 95
    clips_per_shard: PositiveInt = 64  # at most; two thirds of it on average
    # Older versions of the dataset that stay readable: their manifests and shards are kept.
    keep_versions: Annotated[int, Field(ge=0)] = 0


class PreprocessJob(Part):
    """Cut raw videos into a dataset of clips."""

    out: str  # folder or s3://bucket/prefix of the dataset
    metadata: str | None = None  # table or annotations of the clips: this or `videos`
    videos: str | None = None  # folder or glob of whole videos
    raw: str | None = None  # folder or s3:// of raw videos; what lacks is downloaded into it
    source: SourceKind | None = None  # None: a table with metadata, else videos
    clips: Clips = Clips()
    subject: Subject = Subject()
    robonet: RoboNet = RoboNet()
    quality: Quality = Quality()
    storage: Storage = Storage()
    download: Download = Download()
    retry: Retry = Retry()
    limits: MediaLimits = MediaLimits()
    cluster: Cluster = Cluster()
    max_failed_fraction: Fraction = 0.5  # of what was asked for; beyond it the run fails

    @model_validator(mode="after")
    def _one_input(self) -> PreprocessJob:
        if (self.metadata is None) == (self.videos is None):
            raise ValueError("give exactly one of metadata and videos")
        annotated = self.source_kind in ANNOTATED_SOURCES
        if annotated != (self.metadata is not None):
            wanted, given = ("metadata", "videos") if annotated else ("videos", "metadata")
            raise ValueError(f"source {self.source} takes {wanted}, not {given}")
        return self

    @property
    def source_kind(self) -> SourceKind:
        """What the input is, where that was left open, too."""
        if self.source is not None:
            return self.source
        return "videos" if self.metadata is None else "table"


# --- exchange --------------------------------------------------------------------------------

ExchangeForm = Literal["folders", "mp4", "webdataset"]


class ExportJob(Part):
    """Write a dataset's clips as media files that other programs read."""

    data: str
    out: str
    form: ExchangeForm
    partition: Partition | None = None  # None: both splits
    # Of videos: x264's quality, 0 to 51 and lossy whatever it is (colours at half the resolution);
    # lossless keeps every pixel, in a form that few browsers play.
    crf: Annotated[int, Field(ge=0, le=51)] = 18
    lossless: bool = False
    media: Literal["frames", "mp4"] = "frames"  # in WebDataset tars
    max_samples: PositiveInt = 1000  # in a tar
    max_tar_bytes: PositiveInt = 2**30
    cluster: Cluster = Cluster()
    max_failed_fraction: Fraction = 0.5


class ImportJob(Part):
    """Make a dataset of clips that are media files."""

    source: str
    out: str
    form: ExchangeForm
    size_px: PositiveInt | None = None  # None: frames are kept as they are
    fps: Annotated[float, Field(gt=0, le=1000)] = 25.0  # of pictures that do not say it
    test_fraction: Fraction = 0.1  # of identities that come without a split
    storage: Storage = Storage()
    limits: MediaLimits = MediaLimits()
    cluster: Cluster = Cluster()
    max_failed_fraction: Fraction = 0.5


# --- train -----------------------------------------------------------------------------------


class Losses(Part):
    """Loss weights (FOMM's, which paper 002 takes over). A system reads those that it has."""

    perceptual: Weight = 10.0
    scales: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125)
    pixel: Weight = 0.0  # L1; 0 in both papers
    # The mean of a learning detector's masks: keeps out of them what need not move. 0 in both
    # papers; without it, a detector that learns with the generator also draws the background.
    mask_mean: Weight = 0.0
    # Strength of uneven light on the driving frame that a learning detector sees: what is only
    # bright or dark is then no part of the mask, so that scenes may differ. 0 in both papers.
    driving_light: Weight = 0.0
    # Paper 003: L1 of the refined mask against the driver's own; from this epoch on (from 0).
    refinement: Weight = 100.0
    refinement_from_epoch: Weight = 1.0
    equivariance_value: Weight = 10.0
    equivariance_jacobian: Weight = 10.0
    transform_sigma_affine: float = 0.05
    transform_sigma_tps: float = 0.005
    transform_points_tps: PositiveInt = 5
    # Systems with a discriminator: (1 - D(fake))^2, features of its blocks, and its own loss.
    adversarial: Weight = 1.0
    feature_matching: tuple[Weight, ...] = (10.0, 10.0, 10.0, 10.0)
    discriminator: Weight = 1.0


class Augmentation(Part):
    """The papers' augmentation. Half the clips are reversed in time, else half are mirrored."""

    flip: bool = True
    brightness: Annotated[float, Field(ge=0, le=1)] = 0.1
    contrast: Annotated[float, Field(ge=0, le=1)] = 0.1
    saturation: Annotated[float, Field(ge=0, le=1)] = 0.1
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1


class Phase(Part):
    """One training phase: a system, its optimiser and its length.

    `takes` says what it starts from: the detector of the phase before (or of `detector_weights`),
    all weights of the phase before that it has a place for, or nothing.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    model: ModelConfig
    takes: Literal["detector", "weights", "nothing"] = "nothing"
    detector_weights: str | None = None
    # Paper 002 freezes the detector. True: it goes on learning from the first stage's loss, as
    # paper 003's mask generator does; the mask may then carry more of the driver's shape.
    train_detector: bool = False
    epochs: PositiveInt = 100
    max_steps: PositiveInt | None = None  # ends the phase before its epochs do
    batch_size: PositiveInt = 28  # over all workers; 002 code: 28 (heatmap), 15 (circles)
    accumulate: PositiveInt = 1  # a step's batch in so many parts, whose gradients are averaged
    optimizer: Literal["adam", "sgd"] = "adam"  # sgd: momentum is the first beta (X2Face)
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    detector_learning_rate: Weight | None = None  # None: as the rest; FOMM's taichi-adv has 0
    betas: tuple[float, float] = (0.5, 0.999)  # the 002 code's; paper 003 says (.5, .9)
    schedule: Literal["milestones", "cosine"] = "milestones"
    milestones: tuple[Fraction, ...] = (0.6, 0.9)  # of the phase's length; then lr * 0.1
    # Of the moving average of the weights that becomes the result; 0 keeps the last weights.
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    losses: Losses = Losses()

    @model_validator(mode="after")
    def _parts_fit(self) -> Phase:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide by accumulate {self.accumulate}"
            )
        if self.detector_weights is not None and self.takes != "detector":
            raise ValueError("detector_weights goes with takes = 'detector'")
        return self


Perceptual = Literal["vgg19", "efficientnet-lite0", "random", "none"]


class TrainSettings(Part):
    """How systems are trained, whichever they are."""

    perceptual: Perceptual = "vgg19"
    perceptual_weights: str | None = None  # a local file; else downloaded once and verified
    augmentation: Augmentation = Augmentation()
    num_repeats: PositiveInt = 150  # pairs drawn of each identity in an epoch
    seed: Annotated[int, Field(ge=0)] = 0
    num_workers: PositiveInt = 1
    use_gpu: bool = False
    # auto: convolutions in bfloat16 where the processor computes it, all else in float32.
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False  # torch.compile; slower on every CPU that was measured
    threads_per_worker: PositiveInt | None = None  # None: the CPUs shared out
    log_every_steps: PositiveInt = 10
    sample_every_steps: PositiveInt = 200
    checkpoint_every_steps: PositiveInt = 200
    validate_every_steps: PositiveInt | None = None  # on test clips; None: with each checkpoint
    tensorboard: bool = False  # also write events for TensorBoard
    # After a loss, train on with this many workers, if no more can be had; None: wait for all.
    min_workers: PositiveInt | None = None
    max_restarts: Annotated[int, Field(ge=0)] = 2
    resume: bool = True


class TrainJob(TrainSettings):
    """Train one or more phases on a dataset; the last phase's weights are the run's result."""

    data: str
    out: str
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)]
    # Of the training identities of a dataset that has no test clips: left out and validated on.
    holdout_fraction: Fraction = 0.0

    @model_validator(mode="after")
    def _phases_fit(self) -> TrainJob:
        check_phases(self.phases, num_workers=self.num_workers)
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers {self.min_workers} is more than num_workers {self.num_workers}"
            )
        return self


def check_phases(phases: Sequence[Phase], *, num_workers: int) -> None:
    """Refuse phases that cannot follow each other.

    Raises:
        ValueError: naming the phase.
    """
    names = [phase.name for phase in phases]
    if len(set(names)) != len(names):
        raise ValueError(f"phase names repeat: {', '.join(names)}")
    for before, phase in zip((None, *phases), phases, strict=False):
        if phase.batch_size % (num_workers * phase.accumulate):
            raise ValueError(
                f"phase {phase.name!r}: batch_size {phase.batch_size} does not divide by "
                f"num_workers {num_workers} times accumulate {phase.accumulate}"
            )
        _check_start(phase, before)
    sizes = {phase.model.image_size_px for phase in phases}
    if len(sizes) > 1:
        raise ValueError(f"phases differ in image_size_px: {sorted(sizes)}")


def _check_start(phase: Phase, before: Phase | None) -> None:
    """Refuse a phase that takes what is not there."""
    detector = getattr(phase.model, "detector", None)
    if phase.takes == "nothing":
        if phase.model.system == "keypoint-mask" and not phase.train_detector:
            raise ValueError(
                f"phase {phase.name!r} needs a trained keypoint detector: put a fomm phase before "
                f"it or set detector_weights, with takes = 'detector'"
            )
        return
    if before is None and (phase.takes == "weights" or phase.detector_weights is None):
        raise ValueError(f"phase {phase.name!r} takes {phase.takes}, and none is before it")
    if phase.takes == "detector" and detector is None:
        raise ValueError(f"phase {phase.name!r}: a {phase.model.system} system has no detector")
    if before is None or phase.detector_weights is not None:
        return
    if phase.takes == "detector" and detector != getattr(before.model, "detector", None):
        raise ValueError(f"phase {phase.name!r}: its detector differs from the one before")


# --- animate ---------------------------------------------------------------------------------


CROP_RULES: dict[str, tuple[str, ...]] = {
    "crop": ("centre", "auto", "face", "person"),
    "driving_crop": ("centre", "auto", "face", "person", "motion"),
}
FPS_RANGE = (0.1, 240.0)  # of frame rates that may be asked for


class Output(Part):
    """What is cut out of image and video, and what the result is delivered as.

    Cells of a catalog come before the fields of the same name.
    """

    # What is animated of an image: its largest centred square, its largest face or person (auto:
    # a face that is large enough, else a person), or a box left-top-right-bottom in pixels as
    # displayed, which is made square. face needs `kpmask weights fetch yunet`, or `pip install
    # 'kpmask[faces]'`, and so does auto.
    crop: str = "centre"
    # The same of a video, for all of it: found in its first second; motion: what moves.
    driving_crop: str = "centre"
    # Of a found subject's box, on each side; then it is made square and moved into the picture.
    # YuNet's boxes end at chin and forehead; FOMM's crops of talking heads leave about this room.
    crop_increase: Annotated[float, Field(ge=0, le=5)] = 0.3
    no_subject: Literal["fail", "centre"] = "fail"  # where a crop is to be found and is not
    # None: by the name's ending of `out` for one pair, else mp4. mp4: H.264; webm: VP9; gif: 255
    # colours for all of it; png: a .zip of numbered pictures, which alone keeps every pixel.
    format: OutputFormat | None = None
    # None: the driving video's; of a GIF at most 50. Frames are those shown at their times, so
    # that the duration stays and sound fits.
    fps: Annotated[float, Field(ge=FPS_RANGE[0], le=FPS_RANGE[1])] | None = None
    paste_back: bool = False  # into the whole image, which is as it was outside the crop
    feather: Annotated[float, Field(ge=0, le=0.5)] = 0.08  # of the crop's side: the seam's width
    # Source, driving video and result in a row, at most 720 px high: it is for looking at.
    side_by_side: bool = False

    @model_validator(mode="after")
    def _makes_sense(self) -> Output:
        for name, rule in (("crop", self.crop), ("driving_crop", self.driving_crop)):
            if parse_box(rule) is None and rule not in CROP_RULES[name]:
                allowed = ", ".join(CROP_RULES[name])
                raise ValueError(f"{name} {rule!r} is not {allowed} or left-top-right-bottom")
        if self.format == "gif" and self.fps is not None and self.fps > MAX_GIF_FPS:
            raise ValueError(f"a gif has at most {MAX_GIF_FPS:g} frames/s, not {self.fps:g}")
        return self

    def delivery(self) -> Delivery:
        """What a result has whose catalog row says nothing else."""
        return Delivery(
            crop=self.crop,
            driving_crop=self.driving_crop,
            format=self.format or "mp4",
            fps=self.fps,
            paste_back=self.paste_back,
            side_by_side=self.side_by_side,
        )


class Credentials(Part):
    """A signed statement (C2PA) in each video: that it is generated, by what and from what."""

    enabled: bool = True
    # PEM files: the signer's certificate, then those that issued it; its key, without a password,
    # which workers on other machines are handed. None: a development certificate of this machine,
    # which nobody trusts.
    certificate: str | None = None
    private_key: str | None = None

    @model_validator(mode="after")
    def _together(self) -> Credentials:
        if (self.certificate is None) != (self.private_key is None):
            given, lacking = "certificate", "private_key"
            if self.certificate is None:
                given, lacking = lacking, given
            raise ValueError(f"{given} is of no use without {lacking}: give both or neither")
        return self


class MediaWorkers(Part):
    """Processes that decode and encode beside each worker of a catalog, which has the model."""

    # None: 3 beside a GPU, else 1. With 0 the worker decodes and encodes by itself.
    per_worker: Annotated[int, Field(ge=0)] | None = None
    # Of each; None: 1 beside a GPU if Ray has so many, else 0.
    cpus: Annotated[float, Field(ge=0)] | None = None


class AnimateJob(Part):
    """Animate one pair or a catalog."""

    checkpoint: str
    out: str
    source: str | None = None
    driving: str | None = None
    catalog: str | None = None
    sources: str | None = None
    drivings: str | None = None
    motion: Motion = "absolute"
    adapt_scale: bool = False
    best_frame: bool = False  # relative motion from the frame most like the source
    audio: bool = False
    output: Output = Output()
    device: str = "auto"
    # plain is the system as it was trained; auto is bfloat16 where frames stay what they are.
    precision: Literal["auto", "float32", "bfloat16", "plain"] = "auto"
    batch_size: PositiveInt | None = None  # frames at once; None: 8, on a GPU 32
    limits: MediaLimits = MediaLimits()
    min_driving_frames: PositiveInt = 2
    credentials: Credentials = Credentials()
    cluster: Cluster = Cluster()
    media_workers: MediaWorkers = MediaWorkers()
    max_failed_fraction: Fraction = 0.5

    @model_validator(mode="after")
    def _one_input(self) -> AnimateJob:
        pair = (self.source is not None, self.driving is not None)
        grid = (self.sources is not None, self.drivings is not None)
        if pair.count(True) == 1 or grid.count(True) == 1:
            raise ValueError("source goes with driving, and sources with drivings")
        if [pair[0], self.catalog is not None, grid[0]].count(True) != 1:
            raise ValueError("give one of: source + driving, catalog, sources + drivings")
        return self


# --- evaluate --------------------------------------------------------------------------------

MetricName = Annotated[str, AfterValidator(known_metric)]


class ScoreProtocol(Part):
    """What scores are over. Numbers of different protocols do not compare."""

    # Frame 0 is the source itself: the papers' text leaves it out, their code counts it.
    first_frame: Literal["out", "in"] = "out"
    # Drawn frames before they are scored: as they are, or in 8 bits. The papers' code scored
    # keypoints and identities of PNGs that were cut off (truncate), half a level too dark.
    quantise: Quantise = "none"
    # Which mean is shown first: of the videos' means, or over all frames as in the papers' code.
    average: Average = "videos"


class ScoreSetting(Part):
    """What is drawn from what, of the clips of a split. Numbers of different settings do not
    compare.

    - reconstruction: each clip from its own frame 0.
    - cross: one clip's frame 0 by the motion of another identity's clip; the metrics compare with
      the driving frames, and those of identities with the source. A catalog's results are scored
      in this setting, whoever moves whom.
    - few_shot: a person's held-out frames from one frame of the same person, as paper 003 has it
      with no frame to fine-tune on.
    """

    kind: Setting = "reconstruction"
    # cross: how drivers' motion is taken; relative is from its own frame 0 on. None: absolute; of a
    # catalog the one that all rows have, else which rows count.
    motion: Motion | None = None
    num_pairs: PositiveInt = 50  # cross: at most, spread over sources and drivers
    pairs: str | None = None  # cross: a CSV with columns source and driving, of clips' names or ids
    num_frames: PositiveInt = 32  # few_shot: held out of each person

    @model_validator(mode="after")
    def _means_something(self) -> ScoreSetting:
        of = {"motion": "cross", "num_pairs": "cross", "pairs": "cross", "num_frames": "few_shot"}
        for name, kind in of.items():
            # Jobs that were written out before say absolute, whatever their kind.
            unsaid = (type(self).model_fields[name].default, "absolute")
            if self.kind != kind and getattr(self, name) not in unsaid:
                raise ValueError(f"{name} is for kind = {kind}, not {self.kind}")
        if (
            self.pairs is not None
            and self.num_pairs != type(self).model_fields["num_pairs"].default
        ):
            raise ValueError("give num_pairs or pairs, not both")
        return self


# A catalog's, where nobody names others: of faces and of bodies, by weights that are to be had
# without terms. Coverages, which come along, say what was there.
CATALOG_METRICS: Sequence[MetricName] = (
    *("csim_source_sface", "akd_motion_facemesh", "akd_facemesh", "mkr_facemesh"),
    *("jitter_facemesh", "akd_motion_movenet_found", "akd_movenet_found", "mkr_movenet"),
)


class EvaluateJob(Part):
    """Score a checkpoint on a test split, one folder of videos against another, or a catalog."""

    out: str
    checkpoint: str | None = None
    data: str | None = None
    generated: str | None = None
    reference: str | None = None
    catalog: str | None = None  # what `animate` left: scored as it is, nothing is drawn again
    metrics: Annotated[tuple[MetricName, ...], Field(min_length=1)] = (
        "l1",
        "l1_with_first",
        "l1_moving",
        "psnr",
        "ssim",
        "temporal_error",
        "flicker",
        "warping_error",
    )
    protocol: ScoreProtocol = ScoreProtocol()
    setting: ScoreSetting = ScoreSetting()
    partition: Literal["train", "test"] = "test"
    holdout_fraction: Fraction = 0.0  # as the training had it
    max_clips: PositiveInt | None = None
    device: str = "auto"
    batch_size: PositiveInt = 8
    limits: MediaLimits = MediaLimits()
    cluster: Cluster = Cluster()
    max_failed_fraction: Fraction = 0.5

    @model_validator(mode="before")
    @classmethod
    def _of_a_catalog(cls, given: Any) -> Any:  # noqa: ANN401 - as pydantic hands it over
        """What a catalog is scored by, where nothing else is said."""
        if not isinstance(given, dict) or given.get("catalog") is None:
            return given
        setting = given.get("setting", {})
        if isinstance(setting, dict):
            setting = {"kind": "cross", **setting}
        return {"metrics": list(CATALOG_METRICS), **given, "setting": setting}

    @model_validator(mode="after")
    def _one_input(self) -> EvaluateJob:
        model = (self.checkpoint is not None, self.data is not None)
        folders = (self.generated is not None, self.reference is not None)
        if self.catalog is not None:
            self._check_catalog()
        elif model.count(True) == 1 or folders.count(True) == 1:
            raise ValueError("checkpoint goes with data, and generated with reference")
        elif model[0] == folders[0]:
            raise ValueError("give one of: checkpoint + data, generated + reference, catalog")
        elif folders[0] and self.setting.kind != "reconstruction":
            raise ValueError("setting is of a checkpoint on a dataset; two folders have none")
        return self

    def _check_catalog(self) -> None:
        for name in ("checkpoint", "data", "generated", "reference"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} does not go with catalog, which has all that is scored")
        if self.setting.kind != "cross":
            raise ValueError(f"setting.kind is cross for a catalog, not {self.setting.kind}")
        for name in ("pairs", "num_pairs"):
            if getattr(self.setting, name) != ScoreSetting.model_fields[name].default:
                raise ValueError(f"setting.{name} is of a dataset's clips; a catalog has its rows")


# --- compare ---------------------------------------------------------------------------------


class ComparedSystem(Part):
    """A system under comparison, and the phases that train it."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)]


class CompareJob(Part):
    """Train several systems on the same data with the same budget, and score them side by side."""

    data: str
    out: str
    systems: Annotated[tuple[ComparedSystem, ...], Field(min_length=1)]
    train: TrainSettings = TrainSettings()
    # The budget of each system, all its phases together: steps, or minutes, of which a short
    # measurement at the start makes steps. Neither: the phases' own lengths.
    steps: PositiveInt | None = None
    minutes: Annotated[float, Field(gt=0)] | None = None
    batch_size: PositiveInt | None = None  # None: the phases' own, which must be the same
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    baseline: str = "fomm"  # whose scores margins are counted from
    # Of the identities, where the dataset has no test clips.
    holdout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    metrics: Annotated[tuple[MetricName, ...], Field(min_length=1)] = (
        "l1",
        "l1_with_first",
        "l1_moving",
        "ssim",
    )
    max_clips: PositiveInt | None = None
    cross_pairs: Annotated[int, Field(ge=0)] = 24  # sources moved by another identity's video
    cross_frames: PositiveInt = 64  # of each driving video, from its start
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one

    @model_validator(mode="after")
    def _comparable(self) -> CompareJob:
        for what, values in (("systems", [s.name for s in self.systems]), ("seeds", self.seeds)):
            if len(set(values)) != len(values):
                raise ValueError(f"{what} repeat: {', '.join(map(str, values))}")
        if self.steps is not None and self.minutes is not None:
            raise ValueError("give steps or minutes, not both")
        if self.train.num_workers != 1:
            raise ValueError("a comparison trains with one worker: train.num_workers must be 1")
        if of_sets := [name for name in self.metrics if name in SET_METRICS]:
            raise ValueError(
                f"{', '.join(of_sets)}: has no value for a video, by which systems are compared; "
                "kpmask evaluate has it"
            )
        for system in self.systems:
            _check_compared(system, self.steps)
        phases = [phase for system in self.systems for phase in system.phases]
        sizes = {phase.model.image_size_px for phase in phases}
        if len(sizes) > 1:
            raise ValueError(f"systems differ in image_size_px: {sorted(sizes)}")
        batches = {phase.batch_size for phase in phases}
        if len(batches) > 1 and self.batch_size is None:
            raise ValueError(f"systems differ in batch_size ({sorted(batches)}): set batch_size")
        return self


def _check_compared(system: ComparedSystem, steps: int | None) -> None:
    try:
        check_phases(system.phases, num_workers=1)
    except ValueError as error:
        raise ValueError(f"system {system.name!r}: {error}") from None
    if steps is not None and steps < len(system.phases):
        raise ValueError(
            f"steps {steps} are too few for the {len(system.phases)} phases of {system.name!r}"
        )


# --- presets and overrides -------------------------------------------------------------------

Job = PreprocessJob | TrainJob | AnimateJob | EvaluateJob | CompareJob
J = TypeVar("J", bound=Part)

JOB_TYPES: Mapping[str, type[Part]] = {
    "preprocess": PreprocessJob,
    "train": TrainJob,
    "animate": AnimateJob,
    "evaluate": EvaluateJob,
    "compare": CompareJob,
}
NOT_COMPARED = frozenset({"fomm-adv"})  # unless asked for: its budget would go into two trainings


def preset_names() -> list[str]:
    """The presets that the package carries."""
    folder = resources.files("kpmask") / "presets"
    return sorted(
        p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml")
    )


def load_preset(name: str, *, systems: Sequence[str] | None = None) -> dict[str, Any]:
    """A preset's tables: one of the package's by name, or a TOML file by path.

    A preset that lists several systems becomes a `train` table with the phases of the first of
    `systems` (by default its own first), and a `compare` table with the phases of all of them.

    Raises:
        ConfigError: no such preset or system, not TOML, or a table that is not a job's.
    """
    tables = _read_preset(name)
    listed = tables.pop("systems", None)
    shared = tables.pop("shared", {})
    if listed is None:
        if systems:
            raise ConfigError(f"preset {name} has one system only", subject="--system")
        return _checked_tables(tables, name)
    phases = {system: _phases(system, listed, shared) for system in listed}
    chosen = list(systems or listed)
    for system in chosen:
        if system not in phases:
            raise ConfigError(
                f"preset {name} has no system {system!r}; it has: {', '.join(phases)}",
                subject="--system",
            )
    train = tables.get("train", {})
    compared = {"systems": [{"name": s, "phases": phases[s]} for s in chosen], "train": train}
    tables["compare"] = _merged(compared, tables.get("compare", {}))
    tables["train"] = {**train, "phases": phases[chosen[0]]}
    return _checked_tables(tables, name)


def compared_systems(preset: str) -> list[str]:
    """The systems of a preset that are compared when none are named.

    Raises:
        ConfigError: the preset does not list systems.
    """
    listed = load_preset(preset).get("compare", {}).get("systems")
    if not listed:
        raise ConfigError(f"preset {preset} has one system only", subject="preset")
    return [system["name"] for system in listed if system["name"] not in NOT_COMPARED]


def _phases(
    system: str, listed: Mapping[str, Sequence[Mapping[str, Any]]], shared: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A system's phases: each starts from `shared`, or from the last phase of another system."""
    phases = []
    for own in listed[system]:
        like = own.get("like")
        if like is not None and like not in listed:
            raise ConfigError(f"no system {like!r}", subject=f"systems.{system}.like")
        base = shared if like is None else _phases(like, listed, shared)[-1]
        phase = {"name": like or system, **_merged(base, own)}
        phase.pop("like", None)
        phases.append(phase)
    return phases


def _read_preset(name: str) -> dict[str, Any]:
    """A preset's file over that which it extends."""
    if name.endswith(".toml"):
        tables = _read_toml(Path(name))
    elif name in preset_names():
        path = resources.files("kpmask") / "presets" / f"{name}.toml"
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    else:
        raise ConfigError(
            f"no preset {name!r}; there are: {', '.join(preset_names())}",
            subject="preset",
            code="unknown_preset",
            hint="or give the path of a .toml file",
        )
    base = tables.pop("extends", None)
    if base is not None and base not in preset_names():
        raise ConfigError(f"extends {base!r}, which is no preset of the package", subject=name)
    return tables if base is None else _merged(_read_preset(base), tables)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(error.strerror or str(error), subject=str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"not TOML: {error}", subject=str(path)) from error


def _checked_tables(tables: dict[str, Any], subject: str) -> dict[str, Any]:
    allowed = list(JOB_TYPES)
    unknown = sorted(set(tables) - set(allowed))
    if unknown:
        raise ConfigError(
            f"unknown table {unknown[0]!r}; allowed: {', '.join(allowed)}", subject=subject
        )
    return tables


def parse_override(text: str) -> tuple[list[str], Any]:
    """`a.b=value` as a path and a value; the value is JSON where it parses, else a string."""
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{text!r} is not key=value", subject="--set")
    try:
        value = json.loads(raw)
    except json.JSONDecodeError:
        value = raw
    return key.strip().split("."), value


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _apply_override(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:  # noqa: ANN401
    """Set `path` in nested dicts and lists; a list is indexed by number or by its items' name."""
    subject = f"--set {'.'.join(path)}"
    node: Any = tree
    for key in path[:-1]:
        node = node[_list_index(node, key, subject)] if isinstance(node, list) else _part(node, key)
        if not isinstance(node, dict | list):
            raise ConfigError(f"{key!r} has no parts", subject=subject)
    if isinstance(node, list):
        node[_list_index(node, path[-1], subject)] = value
    else:
        node[path[-1]] = value


def _part(node: dict[str, Any], key: str) -> Any:  # noqa: ANN401 - plain data
    return node.setdefault(key, {})


def _list_index(items: list[Any], key: str, subject: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if key in names:
        return names.index(key)
    if key.isdigit() and int(key) < len(items):
        return int(key)
    allowed = [str(n) for n in names if n] or [str(i) for i in range(len(items))]
    raise ConfigError(f"no part {key!r}; allowed: {', '.join(allowed)}", subject=subject)


def resolve_job(
    job_type: type[J],
    *,
    preset: str | None = None,
    job_file: str | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    systems: Sequence[str] | None = None,
) -> J:
    """One job from a preset, a job file, overrides and the command's own flags.

    Args:
        job_type: one of `JOB_TYPES`.
        preset: a preset's name or path.
        job_file: a TOML file in a preset's form.
        overrides: `key=value` texts; keys are dotted paths within the job.
        flags: values given on the command line; None means not given.
        systems: which of the preset's systems; see `load_preset`.

    Raises:
        ConfigError: naming the field, the value and what is allowed.
    """
    name = next(n for n, t in JOB_TYPES.items() if t is job_type)
    tree: dict[str, Any] = {}
    if preset is not None:
        tree = _merged(tree, load_preset(preset, systems=systems).get(name, {}))
    if job_file is not None:
        tree = _merged(tree, _checked_tables(_read_toml(Path(job_file)), job_file).get(name, {}))
    tree = json.loads(json.dumps(tree))  # a copy of our own to change
    for text in overrides:
        path, value = parse_override(text)
        _apply_override(tree, path, value)
    tree = _merged(tree, {k: v for k, v in (flags or {}).items() if v is not None})
    return validated(job_type, tree)


def overridden(job: J, overrides: Sequence[str]) -> J:
    """A job with some settings changed by `key=value` texts; raises as `resolve_job`."""
    tree = job.model_dump(mode="json")
    for text in overrides:
        path, value = parse_override(text)
        _apply_override(tree, path, value)
    return validated(type(job), tree)


def validated(part_type: type[J], tree: Mapping[str, Any]) -> J:
    """A part from plain data.

    Raises:
        ConfigError: the first thing that is wrong, by its dotted field name.
    """
    try:
        return part_type.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise _config_error(part_type, error) from None


def _config_error(part_type: type[Part], error: ValidationError) -> ConfigError:
    problem = error.errors()[0]
    # pydantic puts the tag of a tagged union into the location; it is no field of ours.
    place = [str(p) for p in problem["loc"] if p not in SYSTEMS]
    field = ".".join(place) or part_type.__name__.removesuffix("Job").lower()
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = f"no such setting; allowed here: {', '.join(_fields_at(part_type, place[:-1]))}"
    elif problem["type"] == "missing":
        message = "is needed and was not given"
    elif "input" in problem and not isinstance(problem["input"], dict):
        message = f"{message}, not {problem['input']!r}"
    return ConfigError(message, subject=field)


def _fields_at(part_type: type[Part], place: Sequence[str]) -> list[str]:
    """Field names of the part that a dotted place leads to, as far as it can be followed."""
    node: Any = part_type
    for key in place:
        if key.isdigit():
            continue
        node = _inner_part(node.model_fields[key].annotation) or node
    return sorted(node.model_fields)


def _inner_part(annotation: Any) -> type[Part] | None:  # noqa: ANN401 - a type expression
    import typing

    if isinstance(annotation, type) and issubclass(annotation, Part):
        return annotation
    found = [_inner_part(a) for a in typing.get_args(annotation)]
    return next((f for f in found if f), None)


def to_toml(tables: Mapping[str, Any]) -> str:
    """Plain data as TOML in a preset's form, so that a run's own settings can be run again.

    None is left out, since TOML has no such value and a missing key means the same here.
    """
    return "".join(_toml_table(value, [name]) for name, value in tables.items()).lstrip("\n")


def _toml_table(table: Mapping[str, Any], path: Sequence[str], *, item: bool = False) -> str:
    """A table and those within it; its own values come first, as TOML wants them."""
    head = ".".join(path)
    lines = ["", f"[[{head}]]" if item else f"[{head}]"]
    inner = []
    for key, value in table.items():
        if isinstance(value, Mapping):
            inner.append(_toml_table(value, [*path, key]))
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            inner += [_toml_table(v, [*path, key], item=True) for v in value]
        elif value is not None:
            # JSON's strings (but for DEL), numbers, booleans and lists of them are TOML's, too.
            text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            lines.append(f"{key} = {text}")
    return "\n".join(lines) + "\n" + "".join(inner)
