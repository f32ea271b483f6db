"""Content credentials: what is signed, what a reader makes of it, and what breaks it."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import c2pa
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image, ImageSequence

import kpmask
from kpmask import certificates, provenance
from kpmask.errors import MediaError, StorageError
from kpmask.media.encode import encode, verify
from kpmask.provenance import Claim, label, read_credentials, sign
from kpmask.records import EncodedVideo
from tests.support import signers

CLAIM = Claim(model_sha256="1f" * 32, source_sha256="2e" * 32, driving_sha256="3d" * 32)


@pytest.fixture(scope="module")
def signer() -> certificates.Signer:
    return certificates.make_development()


@pytest.fixture
def video(tmp_path: Path) -> tuple[Path, EncodedVideo]:
    """A path of a private name, and what lies there."""
    frames = np.random.default_rng(0).integers(0, 255, (12, 48, 48, 3), dtype=np.uint8)
    path = tmp_path / "private-client-name.mp4"
    return path, encode(path, frames, fps=25)


def decoded(path: Path) -> list[Any]:
    with av.open(str(path)) as file:
        return [(f.pts, f.to_ndarray(format="yuv420p")) for f in file.decode(video=0)]


def boxes(data: bytes) -> list[tuple[bytes, int]]:
    """Names and offsets of an MP4 file's outermost boxes."""
    found, place = [], 0
    while place < len(data):
        found.append((bytes(data[place + 4 : place + 8]), place))
        place += int.from_bytes(data[place : place + 4], "big")
    return found


def gif_frames(path: Path) -> list[np.ndarray]:
    with Image.open(path) as file:
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(file)]


def ffmpeg(*arguments: str) -> None:
    binary = imageio_ffmpeg.get_ffmpeg_exe()
    subprocess.run([binary, "-nostdin", "-v", "error", *arguments], check=True, timeout=60)


def test_a_signed_video_says_what_it_is(
    video: tuple[Path, EncodedVideo], signer: certificates.Signer
) -> None:
    path, encoded = video
    before, unsigned_bytes = decoded(path), path.stat().st_size
    labelled = label(path, encoded, CLAIM, signer)
    assert labelled == dataclasses.replace(
        encoded, size_bytes=path.stat().st_size, credentials="kpmask development, not trusted"
    )
    assert 0 < labelled.size_bytes - unsigned_bytes < 8000
    found = read_credentials(path)
    assert found == provenance.Credentials(
        state="valid",
        signer="kpmask development, not trusted",
        issuer="kpmask development, not trusted",
        algorithm="Es256",
        generator=f"kpmask {kpmask.__version__}",
        source_type="trainedAlgorithmicMedia",
        ingredients=(
            ("model", f"sha256:{'1f' * 32}"),
            ("source image", f"sha256:{'2e' * 32}"),
            ("driving video", f"sha256:{'3d' * 32}"),
        ),
        problems=("signingCredential.untrusted",),
    )
    after = decoded(path)
    assert [pts for pts, _ in after] == [pts for pts, _ in before]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(before, after, strict=True))
    assert verify(path, num_frames=12).size_bytes == labelled.size_bytes
    # The index is still in front, so that browsers start at once.
    assert [name for name, _ in boxes(path.read_bytes())] == [
        *(b"ftyp", b"uuid", b"moov", b"free", b"mdat")
    ]


def test_the_library_reads_the_same_and_the_action_names_its_inputs(
    video: tuple[Path, EncodedVideo], signer: certificates.Signer
) -> None:
    path, _ = video
    sign(path, dataclasses.replace(CLAIM, composite=True), signer)
    with path.open("rb") as file, c2pa.Reader("video/mp4", file) as reader:
        store = json.loads(reader.json())
    manifest = store["manifests"][store["active_manifest"]]
    assert len(store["manifests"]) == 1
    (action,) = next(
        a["data"]["actions"] for a in manifest["assertions"] if "actions" in a["label"]
    )
    assert action["action"] == "c2pa.created"
    assert action["digitalSourceType"].endswith("/compositeWithTrainedAlgorithmicMedia")
    assert len(action["parameters"]["ingredients"]) == 3
    model = manifest["ingredients"][0]
    assert model["data_types"] == [{"type": "c2pa.types.model.pytorch"}]
    assert {one["relationship"] for one in manifest["ingredients"]} == {"inputTo"}
    assert not any("thumbnail" in one for one in (manifest, *manifest["ingredients"]))
    succeeded = {one["code"] for one in store["validation_results"]["activeManifest"]["success"]}
    assert {"claimSignature.validated", "assertion.bmffHash.match"} <= succeeded


def test_nothing_private_and_no_time_is_told(
    video: tuple[Path, EncodedVideo], signer: certificates.Signer
) -> None:
    path, _ = video
    sign(path, CLAIM, signer)
    with path.open("rb") as file, c2pa.Reader("video/mp4", file) as reader:
        told = reader.detailed_json()
    manifest = json.dumps(json.loads(told)["manifests"])
    assert "private-client-name" not in told
    assert str(path.parent) not in told
    assert b"private-client-name" not in path.read_bytes()
    assert not re.search(r'"(when|time|timestamp|dc:title|title)": *"20', manifest)
    assert '"when"' not in manifest


def test_two_signatures_differ_in_nothing_that_is_shown_or_counted(
    video: tuple[Path, EncodedVideo], signer: certificates.Signer, tmp_path: Path
) -> None:
    path, encoded = video
    again = tmp_path / "again.mp4"
    again.write_bytes(path.read_bytes())
    assert label(path, encoded, CLAIM, signer) == label(again, encoded, CLAIM, signer)
    assert read_credentials(path) == read_credentials(again)


def test_a_trusted_signer_is_told_from_others(
    video: tuple[Path, EncodedVideo], tmp_path: Path
) -> None:
    path, encoded = video
    authority = signers.Authority()
    chain, key = signers.write_pair(tmp_path / "s", authority, purpose=signers.CLAIMS)
    labelled = label(path, encoded, CLAIM, certificates.load(chain, key))
    assert labelled.credentials == "Studio Signer"
    trusted = read_credentials(path, anchors_pem=authority.pem.decode())
    assert trusted is not None
    assert (trusted.state, trusted.signer, trusted.problems) == ("trusted", "Studio Signer", ())
    other = read_credentials(path, anchors_pem=signers.Authority().pem.decode())
    assert other is not None
    assert other.state == "valid"


def test_an_expired_signature_is_invalid(video: tuple[Path, EncodedVideo], tmp_path: Path) -> None:
    authority, key = signers.Authority(), signers.new_key()
    expired = certificates.Signer(
        subject="expired",
        algorithm="es256",
        sha256="",
        certificates_pem=authority.issue(key, days=(-10, -1)) + authority.pem,
        private_key_pem=signers.key_pem(key),
    )
    path, _ = video
    before = path.read_bytes()
    with pytest.raises(MediaError, match=r"cannot be signed|not valid") as caught:
        sign(path, CLAIM, expired)
    assert caught.value.code == "signing_failed"
    assert "--no-credentials" in caught.value.cause
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# --- what becomes of it ----------------------------------------------------------------------


def test_a_changed_byte_is_found_and_another_encoding_has_none(
    video: tuple[Path, EncodedVideo], signer: certificates.Signer, tmp_path: Path
) -> None:
    path, _ = video
    sign(path, CLAIM, signer)
    data = bytearray(path.read_bytes())
    data[dict(boxes(data))[b"mdat"] + 500] ^= 1
    changed = tmp_path / "changed.mp4"
    changed.write_bytes(data)
    found = read_credentials(changed)
    assert found is not None
    assert found.state == "invalid"
    assert "assertion.bmffHash.mismatch" in found.problems
    for name, options in (("encoded.mp4", ["-crf", "30"]), ("copied.mp4", ["-c", "copy"])):
        ffmpeg("-i", str(path), *options, str(tmp_path / name))
        assert read_credentials(tmp_path / name) is None


def test_a_changed_claim_is_found(
    video: tuple[Path, EncodedVideo], signer: certificates.Signer
) -> None:
    path, _ = video
    sign(path, CLAIM, signer)
    data = path.read_bytes()
    assert data.count(b"sha256:" + b"2e" * 32) == 1
    path.write_bytes(data.replace(b"sha256:" + b"2e" * 32, b"sha256:" + b"2f" * 32))
    found = read_credentials(path)
    assert found is not None
    assert found.state == "invalid"


def test_damaged_files_raise_or_are_invalid(
    video: tuple[Path, EncodedVideo], signer: certificates.Signer
) -> None:
    path, _ = video
    sign(path, CLAIM, signer)
    whole, random = path.read_bytes(), np.random.default_rng(3)
    start = whole.index(b"jumb") - 4
    for _ in range(150):
        data = bytearray(whole)
        for place in random.integers(start, start + 3500, 4):
            data[place] = random.integers(256)
        path.write_bytes(data[: random.integers(100, len(data))] if random.random() < 0.2 else data)
        try:
            found = read_credentials(path)
        except MediaError:
            continue
        assert found is None or found.state == "invalid" or bytes(data) == whole


def test_memory_does_not_grow_with_the_video(tmp_path: Path) -> None:
    """Signing and reading back 60 MB, in a process of its own."""
    long = tmp_path / "long.mov"
    source = ["-f", "lavfi", "-i", "testsrc=s=640x480", "-frames:v", "65"]
    ffmpeg(*source, "-c:v", "rawvideo", "-pix_fmt", "rgb24", str(long))
    code = (
        "import resource, sys; from pathlib import Path; from kpmask import certificates;"
        "from kpmask.provenance import Claim, sign;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "signer = certificates.make_development(); before = peak();"
        "sign(Path(sys.argv[1]), Claim('0' * 64, '0' * 64, '0' * 64), signer);"
        "print(peak() - before)"
    )
    command = [sys.executable, "-c", code, str(long)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert long.stat().st_size > 50e6
    assert int(done.stdout) < 30_000, "KiB"
    found = read_credentials(long)
    assert found is not None
    assert found.state == "valid"


# --- formats ---------------------------------------------------------------------------------


def test_a_format_without_room_has_a_file_beside_it(
    video: tuple[Path, EncodedVideo], signer: certificates.Signer, tmp_path: Path
) -> None:
    webm = tmp_path / "a.webm"
    ffmpeg("-i", str(video[0]), "-c:v", "libvpx", str(webm))
    before = webm.read_bytes()
    assert read_credentials(webm) is None
    assert not provenance.carries(webm)
    assert sign(webm, CLAIM, signer) == tmp_path / "a.c2pa"
    assert webm.read_bytes() == before
    found = read_credentials(webm)
    assert found is not None
    assert (found.state, found.sidecar, len(found.ingredients)) == ("valid", True, 3)
    webm.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    changed = read_credentials(webm)
    assert changed is not None
    assert changed.state == "invalid"
    (tmp_path / "a.c2pa").write_bytes(b"no manifest")
    with pytest.raises(MediaError, match="cannot be read"):
        read_credentials(webm)


def test_moving_pictures_and_packed_ones_carry_it(
    signer: certificates.Signer, tmp_path: Path
) -> None:
    frames = np.random.default_rng(1).integers(0, 255, (5, 20, 20, 3), dtype=np.uint8)
    pictures = [Image.fromarray(frame) for frame in frames]
    gif, packed = tmp_path / "a.gif", tmp_path / "a.zip"
    pictures[0].save(gif, save_all=True, append_images=pictures[1:])
    before = gif_frames(gif)
    with zipfile.ZipFile(packed, "w") as file:
        for number, picture in enumerate(pictures):
            buffer = BytesIO()
            picture.save(buffer, "PNG")
            file.writestr(f"{number:06d}.png", buffer.getvalue())
    for path in (gif, packed):
        assert sign(path, CLAIM, signer) == path
        found = read_credentials(path)
        assert found is not None
        assert (found.state, found.sidecar) == ("valid", False)
    after = gif_frames(gif)
    assert np.array_equal(before, after)
    with zipfile.ZipFile(packed) as file:
        assert file.testzip() is None
        for number, frame in enumerate(frames):
            with Image.open(BytesIO(file.read(f"{number:06d}.png"))) as picture:
                assert np.array_equal(np.asarray(picture), frame)


# --- failures --------------------------------------------------------------------------------


def test_without_a_signer_nothing_happens(video: tuple[Path, EncodedVideo]) -> None:
    path, encoded = video
    before = path.read_bytes()
    assert label(path, encoded, CLAIM, None) == encoded
    assert encoded.credentials == provenance.NONE
    assert path.read_bytes() == before
    assert read_credentials(path) is None


def test_what_is_no_video_is_not_signed(signer: certificates.Signer, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_text("no video")
    with pytest.raises(MediaError) as caught:
        sign(path, CLAIM, signer)
    assert caught.value.code == "signing_failed"
    assert path.read_text() == "no video"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_said(
    video: tuple[Path, EncodedVideo],
    signer: certificates.Signer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> bytes:
        raise c2pa.C2paError.Io("write failed")

    monkeypatch.setattr(provenance, "_sign", refuse)
    path, _ = video
    with pytest.raises(MediaError, match="write failed"):
        sign(path, CLAIM, signer)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(StorageError) as caught:
        sign(path, CLAIM, signer)
    assert caught.value.code == "no_space"


def test_what_was_signed_is_compared_with_what_was_wanted(
    video: tuple[Path, EncodedVideo],
    signer: certificates.Signer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, _ = video
    before = path.read_bytes()
    other = dataclasses.replace(CLAIM, driving_sha256="00" * 32)
    manifest = provenance._manifest(other)
    monkeypatch.setattr(provenance, "_manifest", lambda _: manifest)
    with pytest.raises(MediaError, match="does not say what it should"):
        sign(path, CLAIM, signer)
    assert path.read_bytes() == before


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MediaError) as caught:
        read_credentials(tmp_path / "absent.mp4")
    assert caught.value.code == "not_found"
    with pytest.raises(MediaError):
        read_credentials(tmp_path)
    text = tmp_path / "a.txt"
    text.write_text("text")
    assert read_credentials(text) is None


def test_a_strangers_words_cannot_move_the_cursor() -> None:
    assert provenance._plain("a\x1b[2Jb\nc\u202e") == "a�[2Jb�c�"
    assert len(provenance._plain("x" * 10_000)) < 250


def test_threads_sign_at_once(
    video: tuple[Path, EncodedVideo], signer: certificates.Signer, tmp_path: Path
) -> None:
    data = video[0].read_bytes()
    paths = [tmp_path / f"{number}.mp4" for number in range(12)]
    for path in paths:
        path.write_bytes(data)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda path: sign(path, CLAIM, signer), paths))
    assert {read_credentials(path) for path in paths} == {read_credentials(paths[0])}
