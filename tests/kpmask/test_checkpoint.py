"""Checkpoints: what goes in comes out, and whatever is wrong with a file is said."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kpmask import checkpoint
from kpmask.errors import CheckpointError
from kpmask.model_config import (
    DenseMotion,
    Discriminator,
    FommGenerator,
    FommModel,
    Hourglass,
    KeypointDetector,
    KeypointMaskModel,
    LowResolution,
    X2FaceModel,
)
from kpmask.models import build_system

DETECTOR = KeypointDetector(
    block_expansion=4, num_blocks=2, max_features=8, num_keypoints=3, scale_factor=0.5
)
FOMM = FommModel(
    image_size_px=32,
    detector=DETECTOR,
    dense_motion=DenseMotion(block_expansion=4, num_blocks=2, max_features=8, scale_factor=0.5),
    generator=FommGenerator(
        block_expansion=4, num_down_blocks=1, num_bottleneck_blocks=1, max_features=8
    ),
)
KEYPOINT_MASK = KeypointMaskModel(
    image_size_px=32,
    mask="circles",
    detector=DETECTOR,
    low_resolution=LowResolution(scale_factor=0.5, block_expansion=4, num_bottleneck_blocks=1),
    high_resolution=Hourglass(block_expansion=4, num_blocks=2, max_features=8),
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    checkpoint.save(path, build_system(KEYPOINT_MASK), {"step": 7})
    return path


@pytest.mark.parametrize("config", [FOMM, KEYPOINT_MASK], ids=["fomm", "keypoint-mask"])
def test_round_trip(tmp_path: Path, config: FommModel | KeypointMaskModel) -> None:
    system = build_system(config).train()
    path = tmp_path / "new" / "weights.safetensors"
    info = {"step": 12, "perceptual": "random", "loss": [1.5, None]}
    sha256 = checkpoint.save(path, system, info)
    loaded = checkpoint.load(path)
    assert sha256 == loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.config == config
    assert loaded.info == info
    before, after = system.state_dict(), loaded.system.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not loaded.system.training
    frozen = {n for n, p in system.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, p in loaded.system.named_parameters() if not p.requires_grad}
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        drawn = [
            s.render(s.encode_source(image), s.encode_driving(image)).image_BCHW
            for s in (system.eval(), loaded.system)
        ]
    assert torch.equal(*drawn)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_equal_weights_are_equal_bytes(tmp_path: Path) -> None:
    system = build_system(KEYPOINT_MASK)
    info = {name: name for name in "abcdefgh"}
    digests = {
        checkpoint.save(tmp_path / f"{i}.safetensors", system, dict(order))
        for i, order in enumerate([info.items(), reversed(info.items()), info.items()])
    }
    system.to(memory_format=torch.channels_last)
    digests.add(checkpoint.save(tmp_path / "last.safetensors", system, info))
    assert len(digests) == 1


def test_loading_leaves_the_random_state_alone(saved: Path) -> None:
    before = torch.get_rng_state()
    checkpoint.load(saved)
    assert torch.equal(before, torch.get_rng_state())


def test_describe(saved: Path) -> None:
    found = checkpoint.describe(saved)
    assert json.loads(json.dumps(found)) == found
    assert found["system"] == "keypoint-mask"
    assert found["image_size_px"] == 32
    assert found["info"] == {"step": 7}
    assert found["size_bytes"] == saved.stat().st_size
    assert KeypointMaskModel.model_validate(found["config"]) == KEYPOINT_MASK
    assert found["parameters"] == sum(p.numel() for p in checkpoint.load(saved).system.parameters())


def test_a_failed_write_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def fail(_tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(saved, build_system(KEYPOINT_MASK), {})
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


# --- what is wrong with a file ---------------------------------------------------------------


def error_of(path: Path, message: str, **options: Any) -> CheckpointError:
    with pytest.raises(CheckpointError, match=message) as raised:
        checkpoint.load(path, **options)
    assert raised.value.subject == str(path)
    return raised.value


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    error_of(path, "No such file")
    error_of(tmp_path, "Is a directory")
    path.write_bytes(b"")
    error_of(path, "is empty")
    path.write_bytes(bytes(range(256)) * 8)
    error_of(path, "not a safetensors file")
    save_file({"a": torch.zeros(2)}, path)
    error_of(path, "not one of kpmask's")


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    mark, path = tmp_path / "was-run", tmp_path / "w.safetensors"
    path.write_bytes(pickle.dumps(Attack(mark)))
    assert "checkpoint import" in error_of(path, "a pickle").hint
    for new_format in (True, False):
        torch.save(Attack(mark), path, _use_new_zipfile_serialization=new_format)
        error_of(path, "a pickle")
    assert not mark.exists()


def test_another_system_than_wanted(saved: Path) -> None:
    error = error_of(saved, "holds a keypoint-mask system, not fomm", system="fomm")
    assert error.code == "checkpoint_mismatch"
    assert checkpoint.load(saved, system="keypoint-mask").config == KEYPOINT_MASK


Change = Callable[[dict[str, Tensor], dict[str, Any]], object]


def changed(path: Path, change: Change) -> Path:
    """The file with other tensors or another document."""
    with safe_open(path, framework="pt") as file:
        document = json.loads(file.metadata()["kpmask"])
    tensors = load_file(path)
    change(tensors, document)
    save_file(tensors, path, metadata={"kpmask": json.dumps(document)})
    return path


def deepen(_: dict[str, Tensor], document: dict[str, Any]) -> None:
    document["config"]["low_resolution"]["num_bottleneck_blocks"] = 10**9


def widen(_: dict[str, Tensor], document: dict[str, Any]) -> None:
    document["config"]["low_resolution"]["block_expansion"] = 2**31


KEY = "detector.kp.weight"
NAN = torch.full((3, 7, 7, 7), float("nan"))
CHANGES: dict[str, tuple[Change, str]] = {
    "missing": (lambda t, d: t.pop(KEY), "1 tensor missing: detector.kp.weight"),
    "left over": (lambda t, d: t.update(x=torch.zeros(1)), "1 tensor left over: x"),
    "shape": (
        lambda t, d: t.update({KEY: torch.zeros(3, 7, 3, 3)}),
        r"detector.kp.weight \[3, 7, 3, 3\], not \[3, 7, 7, 7\]",
    ),
    "NaN": (lambda t, d: t.update({KEY: NAN}), "detector.kp.weight holds NaN"),
    "integers": (
        lambda t, d: t.update({KEY: torch.zeros(3, 7, 7, 7, dtype=torch.int32)}),
        "detector.kp.weight is torch.int32",
    ),
    "many": (lambda t, d: [t.pop(k) for k in list(t)[:20]], "20 tensors missing: .* and 14 more"),
    "format": (lambda t, d: d.update(format="kpmask-9"), "its format is 'kpmask-9'"),
    "other widths": (
        lambda t, d: d["config"]["high_resolution"].update(block_expansion=5),
        "of another shape: high_resolution",
    ),
    "another resolution": (
        lambda t, d: d["config"].update(image_size_px=250),
        "no model's: .*a side of 125 px",
    ),
    "unknown setting": (lambda t, d: d["config"].update(x=1), "no model's: .*x: Extra inputs"),
    "unknown system": (lambda t, d: d["config"].update(system="x"), "no model's"),
    "no settings": (lambda t, d: d.pop("config"), "no model's"),
    "no info": (lambda t, d: d.update(info=[]), "not a JSON object"),
    "a billion blocks": (deepen, "ask for 1000000000 blocks"),
    "a billion channels": (widen, "of another shape|cannot be built"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_files_that_do_not_fit_themselves(saved: Path, name: str) -> None:
    change, message = CHANGES[name]
    error_of(changed(saved, change), message)


def test_half_precision_is_widened(saved: Path) -> None:
    def narrow(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors[KEY] = tensors[KEY].bfloat16()

    assert checkpoint.load(changed(saved, narrow)).system.state_dict()[KEY].dtype == torch.float32


def test_damaged_files(saved: Path) -> None:
    whole = saved.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for cut in torch.randint(1, len(whole), (30,), generator=generator).tolist():
        saved.write_bytes(whole[:cut])
        error_of(saved, "not a safetensors file")
    # A changed byte in the header is refused, or changes nothing that matters.
    for place in torch.randint(0, 8000, (60,), generator=generator).tolist():
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        try:
            checkpoint.load(saved)
        except CheckpointError as error:
            assert error.subject == str(saved)


# --- small files for shipping ----------------------------------------------------------------


def test_float16_parameters_and_float32_statistics(saved: Path) -> None:
    system = build_system(KEYPOINT_MASK)
    statistics = {name: buffer for name, buffer in system.named_buffers()}
    for name, buffer in statistics.items():
        if name.endswith("running_var"):
            buffer.fill_(1e-9 if "first" in name else 3e6)  # nothing that float16 could hold
    long_bytes = saved.stat().st_size
    checkpoint.save(saved, system, {}, half=True)
    assert saved.stat().st_size < 0.6 * long_bytes
    stored = load_file(saved)
    for name, parameter in system.named_parameters():
        assert torch.equal(stored[name], parameter.half())
    assert all(torch.equal(stored[name], buffer) for name, buffer in statistics.items())
    loaded = checkpoint.load(saved).system.state_dict()
    assert all(loaded[k].dtype == v.dtype for k, v in system.state_dict().items())
    assert torch.equal(loaded[KEY], stored[KEY].float())


@pytest.mark.parametrize("value", [65_520.0, -1e9, float("inf"), float("nan")])
def test_what_float16_cannot_hold_is_refused(saved: Path, value: float) -> None:
    before = saved.read_bytes()
    system = build_system(KEYPOINT_MASK)
    with torch.no_grad():
        system.get_parameter(KEY)[0, 0, 0, 0] = value
    with pytest.raises(CheckpointError, match=f"{KEY} holds NaN or a value beyond 65504"):
        checkpoint.save(saved, system, {}, half=True)
    assert saved.read_bytes() == before


def test_a_release_holds_what_animates(tmp_path: Path) -> None:
    training = FOMM.model_copy(
        update={"discriminator": Discriminator(block_expansion=4, num_blocks=2, max_features=8)}
    )
    src, out = tmp_path / "run.safetensors", tmp_path / "new" / "small.safetensors"
    info = {"run_id": "a", "settings_digest": "b", "seed": 3, "phases": [{"steps": 5}]}
    made_from = checkpoint.save(src, build_system(training), info)
    released = checkpoint.release(src, out)
    assert released.config == FOMM
    assert released.info == {"seed": 3, "phases": [{"steps": 5}], "made_from": made_from}
    assert out.stat().st_size < 0.6 * src.stat().st_size
    theirs, parameters = load_file(src), dict(released.system.named_parameters())
    for key, value in released.system.state_dict().items():
        wanted = theirs[key].half().float() if key in parameters else theirs[key]
        assert torch.equal(value, wanted), key
    assert not any(key.startswith("discriminator") for key in load_file(out))
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_a_release_that_is_too_long(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.safetensors"
    with pytest.raises(
        CheckpointError, match=r"would have 0\.\d\d MB, more than 0\.01 MB"
    ) as raised:
        checkpoint.release(saved, out, max_bytes=10_000)
    assert raised.value.subject == str(out)
    assert not out.exists()


# --- the detector of another checkpoint ------------------------------------------------------


def test_a_detector_for_the_next_phase(tmp_path: Path) -> None:
    path = tmp_path / "fomm.safetensors"
    first = build_system(FOMM)
    checkpoint.save(path, first, {})
    second = build_system(KEYPOINT_MASK)
    assert isinstance(second.detector, torch.nn.Module)
    second.load_state_dict(checkpoint.load_detector(path, config=DETECTOR), strict=False)
    theirs = {k: v for k, v in first.state_dict().items() if k.startswith("detector.")}
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in theirs.items())
    other = DETECTOR.model_copy(update={"temperature": 0.2})
    with pytest.raises(CheckpointError, match=r"temperature is 0\.1, not 0\.2") as raised:
        checkpoint.load_detector(path, config=other)
    assert raised.value.code == "checkpoint_mismatch"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # A preset that asks for more points than the checkpoint has; maps of another resolution.
        ({"num_keypoints": 10}, "num_keypoints is 3, not 10"),
        ({"scale_factor": 0.25}, "scale_factor is 0.5, not 0.25"),
        (
            {"block_expansion": 8, "head_padding": 3},
            "expansion is 4, not 8; head_padding is 0, not 3",
        ),
    ],
)
def test_a_detector_of_other_settings(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "fomm.safetensors"
    checkpoint.save(path, build_system(FOMM), {})
    with pytest.raises(CheckpointError, match=message) as raised:
        checkpoint.load_detector(path, config=DETECTOR.model_copy(update=changes))
    assert raised.value.code == "checkpoint_mismatch"
    assert raised.value.subject == str(path)


def test_a_detector_of_a_system_that_has_none(tmp_path: Path) -> None:
    path = tmp_path / "x2face.safetensors"
    x2face = X2FaceModel(image_size_px=32, block_expansion=2, max_features=4, driving_features=2)
    checkpoint.save(path, build_system(x2face), {})
    with pytest.raises(CheckpointError, match="a x2face system has no such keypoint detector"):
        checkpoint.load_detector(path, config=DETECTOR)


def test_a_detector_of_a_damaged_file(saved: Path, tmp_path: Path) -> None:
    mark = tmp_path / "was-run"
    whole = saved.read_bytes()
    cases = {
        b"": "is empty",
        pickle.dumps(Attack(mark)): "a pickle",
        whole[:999]: "not a safetensors",
    }
    for content, message in cases.items():
        saved.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load_detector(saved, config=DETECTOR)
    saved.write_bytes(whole)
    with pytest.raises(CheckpointError, match=f"{KEY} holds NaN"):
        checkpoint.load_detector(changed(saved, CHANGES["NaN"][0]), config=DETECTOR)
    assert not mark.exists()
