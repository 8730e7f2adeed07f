"""Refusals of settings and arguments: a secret in the wrong place is not echoed, and what is none is."""

from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from jobs.runtime.run.cli import main_alone
from jobs.runtime.settings.arguments import BAD_CONFIG, Parser
from jobs.runtime.settings.config import Config, ConfigError, load_config
from jobs.runtime.settings.withheld import arguments_without_secrets
from jobs.runtime.spark.streams import log_to_stderr
from jobs.submit import ROOT, main
from tests.messages import plain
from udfs.wsi.encoder.timm_network import is_known_to_timm

MINIMAL = {"patients": "patients.csv", "output": {"root": "tables"}}


def refusal(folder: Path, override: str) -> str:
    """The one line that a setting is refused with."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), [override])
    line = str(caught.value)
    assert line and "\n" not in line
    return line


SECRETS = [
    "c2VjcmV0LW9mLXRoZS1jbGk+/x==",  # an Azure key
    "AKIAIOSFODNN7EXAMPLE",
    "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "hf_AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh",
    "ghp_0123456789abcdefABCDEF0123456789abcd",
    "550e8400-e29b-41d4-a716-446655440000",
    "deadbeef01deadbeef02deadbeef0304",
    "Tr0ub4dor&3",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc",
    "41234567890123",
    "https://user:hunter2x@store.example/a",
    "https://store.example/a?sv=1&sig=hunter2x",
    "AccountKey=hunter2x;EndpointSuffix=x",
    "fromtheenvironment",
    "x" * 10_000,
]
_PLACES = [  # where somebody may put a secret
    *(
        "inference.batch_size={}",
        "tiling.tile_px={}",
        "inference.device={}",
        "output.embedding_dtype={}",
        "{}",
        "{}={}",
        "tiling={}",
    ),
    *(
        "storage_options.account_key={}",
        "slide.storage_options.account_key={}",
        "slides.storage_option.key={}",
        "x.{}=1",
    ),
    *(
        "slides.storage_options={}",
        "slides.extensions.{}=1",
        "patients.key={}",
        "encoders.b0.token={}",
        "slides.{}={}",
    ),
    *("inference.batch_size=[{}]", "tiling.tile_px={{a: {}}}", "output.schema=a b {}"),
]


@pytest.mark.parametrize("place", _PLACES)
def test_a_secret_in_the_wrong_place_is_not_echoed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv("SOME_STORAGE_KEY", "fromtheenvironment")
    for secret in SECRETS:
        line = refusal(tmp_path, place.format(secret, secret))
        hidden = "hunter2x" if "hunter2x" in secret else secret
        assert hidden not in line and len(line) < 2000


def test_a_value_that_may_be_a_secret_is_described(tmp_path: Path) -> None:
    described = "a text of 20 characters that may be a secret"
    assert f"inference.device: Input should be 'auto', 'cpu' or 'cuda' (it is {described})" in refusal(
        tmp_path, f"inference.device={SECRETS[1]}"
    )
    assert refusal(tmp_path, f"inference.batch_size={SECRETS[1]}").count(f"(it is {described})") == 2
    assert "***" not in refusal(tmp_path, f"inference.batch_size={SECRETS[1]}")
    assert f"{described} is no setting" in refusal(tmp_path, SECRETS[1])
    assert "may be a secret" in refusal(tmp_path, "inference.device=my-secret")


@pytest.mark.parametrize(
    "value",
    [
        "tpu",
        "5.5",
        "vit_large_patch14_reg4_dinov2.lvd142m",
        "EfficientNet-B0",
        "data/tables",
        "384x384",
        "hf-hub:MahmoodLab/UNI2-h",
        "@x",
        "123456789",
        "1234567890",
        "448,448",
        "[448, 448] px",
        ".svs,.tif",
        "/data/models/20261126T095120-eedc0d",
        "20261126T095120-eedc0d/attention, 20261126T095121-eedc0d",
    ],
)
def test_what_is_no_secret_is_shown(tmp_path: Path, value: str) -> None:
    assert f"(it is {value!r})" in refusal(tmp_path, f"inference.device={value!r}")


def test_arguments_at_fault_are_told_in_one_line_without_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_STORAGE_KEY", "fromtheenvironment")
    log_to_stderr()
    for secret in SECRETS:
        for arguments in (
            [f"--token={secret}"],
            [f"--{secret}"],
            ["--n", f"n{secret}"],
            ["--kind", secret],
            [secret],
            ["--n=1\x1b[2J"],
        ):
            parser = Parser(prog="job")
            parser.add_argument("--n", type=int)
            parser.add_argument("--kind", choices=["one", "two"])
            with pytest.raises(SystemExit):
                parser.parse_args(arguments)
            line = plain(capsys.readouterr().err).removesuffix("\n")
            assert line.startswith("job: ") and line.isprintable()
            assert secret not in line and "hunter2x" not in line


def test_a_refusal_of_any_job_shows_no_secret_of_its_settings(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def work(config: Config, arguments: Namespace) -> int:
        raise ConfigError("hunter2xy opens https://u@h/x?sig=hunter3xy and s3://b/y#hunter4xy")

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | {"slides": {"storage_options": {"account_key": "hunter2xy"}}}))
    assert main_alone("train", work, ["--config", str(path)]) == BAD_CONFIG
    assert plain(capfd.readouterr().err) == "slidelake train: *** opens https://u@h/x and s3://b/y\n"


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--password", "one two --three"], ["--password", "one", "two", "--three", "-four", "a=five"]),
        *(
            ["--api-key=one two"],
            ["--api-key=one", "two"],
            ["seen", "--account_key", "one", "two"],
            ["db.password=one two"],
        ),
    ],
)
def test_all_words_of_a_password_are_hidden(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    log_to_stderr()
    with pytest.raises(SystemExit):
        Parser(prog="job", allow_abbrev=False).parse_args(arguments)
    line = plain(capsys.readouterr().err)
    assert not any(word in line for word in ("one", "two", "three", "four", "five"))
    names = [word.partition("=")[0] for word in arguments[: 2 if arguments[0] == "seen" else 1]]
    assert all(name in line for name in names) and line.count("***") == 1


def test_words_of_a_command_line_are_hidden_as_a_whole() -> None:
    given = ["--password", "hunter two words", "--resume", "20261126T095120-eedc0d", "--token=a b", "x", "--key", "-k"]
    shown = ["--password", "***", "--resume", "20261126T095120-eedc0d", "--token=***", "x", "--key", "***"]
    assert arguments_without_secrets(given) == shown
    assert arguments_without_secrets([]) == []


@pytest.mark.parametrize("secret", [secret for secret in SECRETS if "://" not in secret and len(secret) < 255])
def test_a_secret_in_place_of_a_settings_file_is_not_echoed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], secret: str
) -> None:
    monkeypatch.setenv("SOME_STORAGE_KEY", "fromtheenvironment")
    with pytest.raises(
        ConfigError, match=r"--config a text of \d+ characters that may be a secret: no such file"
    ) as caught:
        load_config(secret)
    assert secret not in str(caught.value)
    place = sorted((ROOT / "conf/places").glob("*.yaml"))[0].stem
    main(["--on", place, "slides", "--config", secret])
    assert secret not in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"--config /a/b c&d1\.yaml: no such file"):
        load_config("/a/b c&d1.yaml")


def test_names_that_timm_knows_are_known() -> None:
    assert all(map(is_known_to_timm, ("dla60_res2net", "dla60_res2net.in1k", "efficientnet_b0")))
    assert not any(map(is_known_to_timm, ("dla60_res2net.AKIAIOSFODNN7EXAMPLE", "AKIAIOSFODNN7EXAMPLE")))
