"""Who may sign: certificates that are accepted, and why others are not."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from kpmask import certificates, config, provenance
from kpmask.errors import ConfigError
from tests.support import signers


@pytest.fixture(scope="module")
def authority() -> signers.Authority:
    return signers.Authority()


# --- somebody's own --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "purpose", "algorithm"),
    [
        ("p256", signers.EMAIL, "es256"),
        ("p384", signers.DOCUMENTS, "es384"),
        ("ed25519", signers.CLAIMS, "ed25519"),
        ("rsa2048", signers.EMAIL, "ps256"),
    ],
)
def test_keys_and_purposes_that_can_sign(
    authority: signers.Authority, tmp_path: Path, kind: str, purpose: str, algorithm: str
) -> None:
    chain, key = signers.write_pair(tmp_path, authority, kind=kind, purpose=purpose)
    signer = certificates.load(chain, key)
    assert (signer.subject, signer.algorithm) == ("Studio Signer", algorithm)
    provenance.try_out(signer)
    assert "PRIVATE" not in repr(signer)


@pytest.mark.parametrize(
    ("issued", "cause"),
    [
        ({"days": (-10, -1)}, "expired on"),
        ({"days": (1, 10)}, "not valid before"),
        ({"purpose": signers.SERVERS}, "not for signing claims"),
        ({"sign": False}, "not for digital signatures"),
        ({"ca": True}, "for issuing certificates"),
        ({"issuer_id": False}, "which key issued it"),
    ],
)
def test_certificates_that_cannot_sign(
    authority: signers.Authority, tmp_path: Path, issued: dict[str, object], cause: str
) -> None:
    chain, key = signers.write_pair(tmp_path, authority, **issued)
    with pytest.raises(ConfigError, match=cause) as caught:
        certificates.load(chain, key)
    assert caught.value.subject == "credentials.certificate"
    assert "Studio Signer" in caught.value.cause
    assert caught.value.hint


def test_an_expired_issuer_counts(authority: signers.Authority, tmp_path: Path) -> None:
    chain, key = signers.write_pair(tmp_path, authority)
    expired = authority.issue(authority.key, days=(-10, -1))
    with open(chain, "ab") as file:  # noqa: PTH123 - the helper gives texts
        file.write(expired)
    with pytest.raises(ConfigError, match="expired"):
        certificates.load(chain, key)


def _other_key(folder: Path) -> None:
    (folder / "key.pem").write_bytes(signers.key_pem(signers.new_key()))


def _weak_curve(folder: Path) -> None:
    (folder / "key.pem").write_bytes(signers.key_pem(signers.new_key("k256")))


def _locked(folder: Path) -> None:
    (folder / "key.pem").write_bytes(signers.key_pem(signers.new_key(), password=b"secret"))


def _no_key(folder: Path) -> None:
    (folder / "key.pem").unlink()


def _no_pem_key(folder: Path) -> None:
    (folder / "key.pem").write_bytes(b"\x30\x82 binary")


def _no_pem(folder: Path) -> None:
    (folder / "chain.pem").write_text("no certificate")


def _no_certificate(folder: Path) -> None:
    (folder / "chain.pem").unlink()


def _a_folder(folder: Path) -> None:
    (folder / "chain.pem").unlink()
    (folder / "chain.pem").mkdir()


def _root_first(folder: Path) -> None:
    leaf, root = re.findall(
        r"-----BEGIN.*?END CERTIFICATE-----\n", (folder / "chain.pem").read_text(), re.DOTALL
    )
    (folder / "chain.pem").write_text(root + leaf)


def _other_root(folder: Path) -> None:
    path = folder / "chain.pem"
    leaf = path.read_text().split("-----END CERTIFICATE-----\n")[0] + "-----END CERTIFICATE-----\n"
    path.write_text(leaf + signers.Authority().pem.decode())


def _huge(folder: Path) -> None:
    with (folder / "chain.pem").open("wb") as file:
        file.truncate(2**30)


@pytest.mark.parametrize(
    ("damage", "field", "cause"),
    [
        (_other_key, "private_key", "is not the key of"),
        (_weak_curve, "private_key", "cannot sign content credentials"),
        (_locked, "private_key", "locked by a password"),
        (_no_key, "private_key", "No such file"),
        (_no_pem_key, "private_key", "no private key in PEM"),
        (_no_pem, "certificate", "no certificate in PEM"),
        (_no_certificate, "certificate", "No such file"),
        (_a_folder, "certificate", "is no certificate"),
        (_root_first, "certificate", "signs itself"),
        (_other_root, "certificate", "did not issue"),
        (_huge, "certificate", "is no certificate"),
    ],
)
def test_files_that_do_not_fit(
    authority: signers.Authority,
    tmp_path: Path,
    damage: Callable[[Path], None],
    field: str,
    cause: str,
) -> None:
    chain, key = signers.write_pair(tmp_path, authority)
    damage(tmp_path)
    with pytest.raises(ConfigError, match=cause) as caught:
        provenance.open_signer(config.Credentials(certificate=chain, private_key=key))
    assert caught.value.subject == f"credentials.{field}"
    assert caught.value.hint, "says the way out"
    assert caught.value.code == "config_invalid"


def test_one_without_the_other_is_refused_with_the_job() -> None:
    for given, lacking in (("certificate", "private_key"), ("private_key", "certificate")):
        with pytest.raises(ConfigError, match=f"without {lacking}") as caught:
            config.validated(config.Credentials, {given: "x.pem"})
        assert given in caught.value.cause


def test_what_of_a_signer_shapes_results(authority: signers.Authority, tmp_path: Path) -> None:
    ids = [
        provenance.identity(config.Credentials(enabled=False)),
        provenance.identity(config.Credentials()),
    ]
    for number in range(2):
        chain, key = signers.write_pair(tmp_path / str(number), authority)
        given = config.Credentials(certificate=chain, private_key=key)
        ids.append(provenance.identity(given))
        assert provenance.identity(given) == ids[-1]
    assert len(set(ids)) == 4
    assert ids[:2] == ["", "development"]
    assert provenance.open_signer(config.Credentials(enabled=False)) is None


# --- for development -------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KPMASK_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_development_certificate_says_so_and_is_made_once(home: Path) -> None:
    signer = certificates.development()
    assert signer.subject == "kpmask development, not trusted"
    assert certificates.development() == signer
    path = certificates.development_file()
    assert path.is_relative_to(home)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    for certificate in x509.load_pem_x509_certificates(path.read_bytes()):
        text = certificate.subject.rfc4514_string() + certificate.issuer.rfc4514_string()
        assert text.count("not trusted") == 4
        assert os.environ.get("USER", "root-less") not in text


def test_an_expired_or_damaged_development_certificate_is_made_again(home: Path) -> None:
    first = certificates.development()
    path = certificates.development_file()
    expired = certificates.make_development(not_after=datetime.now(UTC) - timedelta(days=1))
    for content in (expired.certificates_pem + expired.private_key_pem, b"damaged", b""):
        path.write_bytes(content)
        again = certificates.development()
        assert again not in (first, expired)
        provenance.try_out(again)


def test_processes_that_start_at_once_have_one_certificate(home: Path) -> None:
    code = "from kpmask import certificates; print(certificates.development().sha256)"
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    found = {process.communicate(timeout=60)[0] for process in started}
    assert len(found) == 1
    assert found == {certificates.development().sha256 + "\n"}


def test_where_none_can_be_kept_the_way_out_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KPMASK_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError) as caught:
        certificates.development()
    assert caught.value.subject == "credentials"
    assert "KPMASK_HOME" in caught.value.hint
    assert "--no-credentials" in caught.value.hint


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.environment import state_folder

    for name in ("KPMASK_HOME", "XDG_STATE_HOME", "HOME"):
        assert certificates.development_file().is_relative_to(state_folder()), name
        monkeypatch.delenv(name, raising=False)
