"""`slidelake submit`: the commands of each place, what is refused before anything runs, and what a client gets."""

import json
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

from jobs import submit
from tests.messages import plain

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PLACES = sorted(path.stem for path in (ROOT / "conf/places").glob("*.yaml") if not path.stem.startswith("mine"))
SECRET = "c2VjcmV0LW9mLXRoZS1jbGk"
YOURS = {
    "master": "spark://node0:7077",
    "queue": "team_a",
    "node_python": "/opt/slidelake/bin/python",
    "event_logs": "hdfs:///spark-logs",
    "image": "registry/slidelake:1",
    "namespace": "team-a",
    "uploads": "s3a://bucket/uploads",
    "executor": "executor.yaml",
    "volume": "/Volumes/lab/slides/files",
    "schema": "lab.slides",
    "tables": "s3://bucket/tables",
    "cluster": "j-1",
    "bucket": "s3://bucket/slidelake",
}
Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose places are filled in and whose dist/ is built, with settings my.yaml in the current folder."""
    checkout = tmp_path / "check out"
    places = checkout / "conf/places"
    places.mkdir(parents=True)
    for name in PLACES:
        place = yaml.safe_load((ROOT / f"conf/places/{name}.yaml").read_text())
        place["yours"] = {key: YOURS[key] for key in place.get("yours", {})}
        (places / f"{name}.yaml").write_text(yaml.safe_dump(place))
    for top in ("jobs", "udfs"):
        (checkout / top).mkdir()
        (checkout / top / "code.py").touch()
    (checkout / "conf/locks").mkdir()
    (checkout / "conf/locks/runtime.txt").touch()
    (checkout / "pyproject.toml").touch()
    (checkout / "dist").mkdir()
    for end in (".zip", "-py3-none-any.whl"):
        with ZipFile(checkout / f"dist/slidelake-{version('slidelake')}{end}", "w") as code:
            for name in ("jobs/code.py", "udfs/code.py", "jobs/runtime/spark/conf/spark-defaults.conf"):
                code.writestr(name, "")
    (checkout / "dist/environment.tar.gz").touch()
    monkeypatch.setattr(submit, "ROOT", checkout)
    monkeypatch.chdir(tmp_path)
    settings = {"patients": "s3://lab/p.csv", "output": {"root": "s3://lab/tables"}}
    settings["slides"] = {"root": "s3://lab/slides", "storage_options": {"key": "${NOT_SET_HERE}"}}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(settings))
    return checkout


@pytest.fixture
def say(checkout: Path, capfd: pytest.CaptureFixture[str]) -> Say:
    """The command in that checkout: (exit status, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            status = submit.main(arguments)
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        said = capfd.readouterr()
        return status, said.out, plain(said.err)

    return run


def lines(said: tuple[int, str, str]) -> list[list[str]]:
    status, out, err = said
    assert (status, err) == (0, "")
    return [shlex.split(line) for line in out.splitlines()]


def test_a_cluster_of_ones_own_gets_the_code_and_the_settings_stay_here(say: Say, checkout: Path) -> None:
    arguments = ["tiling.mpp=0.5", "--retry-failed"]
    [words] = lines(say("--on", "standalone", "--dry-run", "preprocess", "--config", "my.yaml", *arguments))
    code = f"{checkout}/dist/slidelake-{version('slidelake')}.zip"
    assert words[:3] == ["spark-submit", "--master", "spark://node0:7077"]
    options = dict(zip(words[1:-6:2], words[2:-5:2], strict=True))
    assert options["--py-files"] == code
    assert f"spark.pyspark.driver.python={sys.executable}" in words
    assert words[-5:] == [f"{checkout}/jobs/preprocess.py", "--config", f"{checkout.parent}/my.yaml", *arguments]


@pytest.mark.parametrize("place", ["yarn", "k8s"])
def test_where_the_driver_is_in_the_cluster_the_settings_go_along(say: Say, checkout: Path, place: str) -> None:
    [words] = lines(say("--on", place, "--dry-run", "train", "--config", "my.yaml", "--resume", "R1"))
    assert words[0] == "spark-submit" and words[words.index("--deploy-mode") + 1] == "cluster"
    assert f"{checkout.parent}/my.yaml" in words[words.index("--files") + 1].split(",")
    assert words[-5:] == [f"{checkout}/jobs/train.py", "--config", "my.yaml", "--resume", "R1"]


def test_emr_gets_a_step_whose_arguments_are_whole_whatever_is_in_them(say: Say, checkout: Path) -> None:
    override = 'slides.extensions=[".tif", ".svs"]'
    *copies, step = lines(say("--on", "emr", "--dry-run", "slides", "--config", "my.yaml", override))
    assert [copy[:3] for copy in copies] == [["aws", "s3", "cp"]] * 3
    assert all(Path(copy[3]).is_relative_to(checkout.parent) for copy in copies)
    assert step[:-1] == ["aws", "emr", "add-steps", "--cluster-id", "j-1", "--steps"]
    [told] = json.loads(step[-1])
    assert told["Args"][0] == "spark-submit"
    assert told["Args"][-3:] == ["--config", "my.yaml", override]
    there = [copy[4] for copy in copies]
    assert {word for word in told["Args"] if word.startswith("s3://")} == set(there)
    folder = there[0].rpartition("/")[0]
    assert folder.rpartition("/")[0] == "s3://bucket/slidelake"
    code = f"slidelake-{version('slidelake')}.zip"
    assert there == [f"{folder}/{name}" for name in (code, "slides.py", "my.yaml")]


def test_databricks_runs_the_task_of_the_job_with_the_settings_in_a_volume(say: Say, checkout: Path) -> None:
    wheel, deploy, mkdir, copy, run = lines(  # the first deployment makes the volume
        say("--on", "databricks", "--dry-run", "features", "--config", "my.yaml", "run.unit_tiles=9")
    )
    assert wheel == ["test", "-f", f"{checkout}/dist/slidelake-{version('slidelake')}-py3-none-any.whl"]
    folder = mkdir[-1].removeprefix("dbfs:")
    assert folder.rpartition("/")[0] == "/Volumes/lab/slides/files"
    assert copy[-2:] == [f"{checkout.parent}/my.yaml", f"dbfs:{folder}/my.yaml"]
    assert deploy[2:] == ["databricks", "bundle", "deploy", "--var", "tables=s3://bucket/tables"]
    task, arguments = run[: run.index("--")], run[run.index("--") + 1 :]
    assert task[2:] == ["databricks", "bundle", "run", *deploy[-2:], "--only", "features", "alone"]
    settings = ["--config", f"{folder}/my.yaml", "output.root=s3://bucket/tables", "output.schema=lab.slides"]
    assert arguments == ["features", *settings, "run.unit_tiles=9"]


@pytest.mark.parametrize(("place", "copy"), [("emr", ["aws", "s3", "cp"]), ("databricks", ["databricks", "fs", "cp"])])
def test_no_submission_writes_over_what_one_that_waits_has_sent(say: Say, place: str, copy: list[str]) -> None:
    first, second = (
        {
            words[-1]
            for words in lines(say("--on", place, "--dry-run", "slides", "--config", "my.yaml"))
            if words[:3] == copy
        }
        for _ in range(2)
    )
    assert first and not first & second


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "override",
    [
        f"slides.storage_options={{account_key: {SECRET}}}",
        f"slides.storage_options.account_key={SECRET}",
        f"slides={{root: s3://lab/slides, storage_options: {{account_key: {SECRET}}}}}",
        f"patients=https://me:{SECRET}@host/p.csv",
        f"patients=https://host/p.csv?sig={SECRET}",
    ],
)
def test_no_secret_of_an_override_is_printed(say: Say, place: str, override: str) -> None:
    status, out, err = say("--on", place, "--dry-run", "preprocess", "--config", "my.yaml", override)
    assert (status, err) == (0, "")
    assert SECRET not in out and f"{override.partition('=')[0]}=***" in out


@pytest.mark.parametrize("place", PLACES)
def test_the_name_of_a_secret_is_none(say: Say, place: str) -> None:
    named = ("slides.storage_options={account_key: '${AZURE_STORAGE_KEY}'}", "slides.storage_options.sas=${A_SAS}")
    status, out, err = say("--on", place, "--dry-run", "preprocess", "--config", "my.yaml", *named)
    assert (status, err) == (0, "")
    assert "***" not in out and all(part in out for part in ("${AZURE_STORAGE_KEY}", "${A_SAS}"))
    for more in ("x", "${B}"):
        _, out, _ = say("--on", place, "--dry-run", "preprocess", "--config", "my.yaml", named[1] + more)
        assert "***" in out and "A_SAS" not in out


PATHS = {
    "slides": ["patients", "slides.root", "output.root", "encoders.b0.weights", "stain.weights"],
    "stainnet": ["stainnet.checkpoint"],
    "splits": ["splits.csv"],
    "train": ["training.output", "training.mlflow"],
    "predict": ["predict.model", "predict.csv"],
    "patches": ["patches.folder"],
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("job", "key"), [(job, key) for job, keys in PATHS.items() for key in keys])
def test_a_path_below_the_current_folder_is_refused_where_the_driver_has_another(
    say: Say, place: str, job: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.runtime.settings.job_sections.find_spec", lambda _: True)  # MLflow is an extra
    command = ("--on", place, "--dry-run", job, "--config", "my.yaml")
    status, out, err = say(*command, f"{key}=data/x")
    if place in ("local", "standalone"):
        assert (status, err) == (0, "")
    else:
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"{key} = data/x would be below a folder of the driver's own" in err
    assert say(*command, f"{key}=/shared/x")[0] == 0


@pytest.mark.parametrize(
    "path",
    [
        "x.pth",
        "./x.pth",
        "../x.pth",
        "~/x.pth",
        "file:x.pth",
        "file://x.pth",
        "local://x",
        "simplecache::x.pth",
        "C:/x",
    ],
)
def test_every_way_to_write_a_path_of_this_machine_is_refused(say: Say, path: str) -> None:
    status, _, err = say("--on", "yarn", "--dry-run", "slides", "--config", "my.yaml", f"encoders.b0.weights={path}")
    assert status == 2 and f"encoders.b0.weights = {path} would be below a folder of the driver's own" in err


@pytest.mark.parametrize(
    "path", ["s3://b/x", "file:///x", "file:/x", "simplecache::s3://b/x", "hdfs:///x", "/x", "'/x y #z'"]
)
def test_what_means_the_same_anywhere_is_passed_on(say: Say, path: str) -> None:
    assert say("--on", "yarn", "--dry-run", "slides", "--config", "my.yaml", f"encoders.b0.weights={path}")[0] == 0


def test_paths_that_a_job_does_not_read_do_not_matter(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.runtime.settings.job_sections.find_spec", lambda _: True)
    assert say("--on", "yarn", "--dry-run", "slides", "--config", "my.yaml", "predict.csv=x.csv")[0] == 0
    assert say("--on", "yarn", "--dry-run", "train", "--config", "my.yaml", "training.mlflow=databricks")[0] == 0


def test_words_that_are_no_settings_show_no_secret(say: Say) -> None:
    _, out, _ = say(
        "--on", "yarn", "--dry-run", "train", "--config", "my.yaml", SECRET, "--resume", "20261130T065049-abc123"
    )
    assert SECRET not in out and "--resume 20261130T065049-abc123" in out


def test_what_a_place_of_ones_own_does_not_ask_for_is_left_empty(say: Say, checkout: Path) -> None:
    """As conf/places/standalone.yaml says of nodes that have no packages."""
    text = (ROOT / "conf/places/standalone.yaml").read_text()
    [(given, instead)] = re.findall(r"in place of `(.*)`:\n *# +(\S.*)\n", text)
    *_, commands = text.partition("commands:\n")
    text = text.replace(commands, commands.replace(f"    {given} ", f"    {instead} ")).replace(
        "master:", "master: spark://a:7077"
    )
    (checkout / "conf/places/mine.yaml").write_text(text)
    [words] = lines(say("--on", "mine", "--dry-run", "slides", "--config", "my.yaml"))
    assert words[words.index("--archives") + 1] == f"{checkout}/dist/environment.tar.gz#environment"
    assert [word for word in words if word.startswith("spark.pyspark.python=")] == [
        "spark.pyspark.python=./environment/bin/python"
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--on", "yran", "slides", "--config", "my.yaml"],
            "no place 'yran' in conf/places; there are databricks, emr",
        ),
        (["--on", "yarn", "slide", "--config", "my.yaml"], "no job 'slide'; there are preprocess, slides"),
        (["--on", "yarn", "slides", "--config", "none.yaml"], "--config none.yaml: no such file here"),
        (["--on", "yarn", "slides", "--config", "s3://lab/my.yaml"], "give a local one"),
        (["--on", "yarn", "slides", "--config", "my.yaml", "tiling.mp=1"], "did you mean tiling.mpp?"),
        (["--on", "yarn", "slides"], "--config"),
        (["slides", "--config", "my.yaml"], "--on"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(say: Say, arguments: list[str], said: str) -> None:
    status, out, err = say(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("slidelake submit: ") and said in err


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({"commands": []}, "at least 1 item"),
        ({"commands": ["true"], "your": {}}, "your"),
        ({"commands": ["true"], "yours": {"name": [SECRET]}}, "yours.name: Input should be a valid string"),
        ({"commands": ["true $nmae"], "yours": {"name": "x"}}, "no $nmae: there are config, "),
        (
            {"commands": ["true $name $other"], "yours": {"name": None, "other": None}},
            "fill in name, other under yours",
        ),
    ],
)
def test_a_place_that_can_not_be_used_is_one_line_and_status_2(
    say: Say, checkout: Path, place: dict[str, object], said: str
) -> None:
    (checkout / "conf/places/lab.yaml").write_text(yaml.safe_dump(place))
    status, out, err = say("--on", "lab", "--dry-run", "slides", "--config", "my.yaml")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "conf/places" in err and said in err and SECRET not in err


def test_without_what_make_dist_builds_or_with_what_is_older_than_the_code_nothing_runs(
    say: Say, checkout: Path
) -> None:
    command = ("--on", "yarn", "--dry-run", "slides", "--config", "my.yaml")
    code, packages = (checkout / f"dist/slidelake-{version('slidelake')}.zip"), checkout / "dist/environment.tar.gz"
    for file, source, target in (
        (code, "jobs/code.py", "dist"),
        (code, "pyproject.toml", "dist"),
        (packages, "conf/locks/runtime.txt", "dist-env"),
    ):
        assert say(*command)[0] == 0
        then = file.stat().st_mtime + 1
        os.utime(checkout / source, (then, then))
        older = f"slidelake submit: {file} is older than {source}: run `make {target}`\n"
        assert say(*command) == (2, "", older)
        os.utime(file, (then, then))
    packages.unlink()
    assert say(*command) == (2, "", f"slidelake submit: {packages} does not exist: run `make dist-env`\n")
    standalone = ("--on", "standalone", *command[2:])
    assert say(*standalone)[0] == 0  # which asks for no environment
    code.unlink()
    assert say(*standalone) == (2, "", f"slidelake submit: {code} does not exist: run `make dist`\n")


@pytest.mark.parametrize(("place", "end"), [("standalone", ".zip"), ("databricks", "-py3-none-any.whl")])
def test_code_with_a_module_that_went_is_not_sent(say: Say, checkout: Path, place: str, end: str) -> None:
    (checkout / "jobs/code.py").unlink()
    code = checkout / f"dist/slidelake-{version('slidelake')}{end}"
    refusal = f"slidelake submit: {code} and the checkout differ in jobs/code.py: run `make dist`\n"
    assert say("--on", place, "--dry-run", "slides", "--config", "my.yaml") == (2, "", refusal)


def test_a_client_that_is_not_there_is_named(say: Say, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    status, out, err = say("--on", "emr", "slides", "--config", "my.yaml")
    assert (status, out) == (2, "")
    assert err == "slidelake submit: no aws on PATH: install it, or activate the environment that has it\n"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The one client on PATH, aws, for the test to write."""
    client = tmp_path / "bin/aws"
    client.parent.mkdir()
    client.touch(0o755)
    monkeypatch.setenv("PATH", str(client.parent))
    return client


def test_clients_get_every_word_as_given_and_the_first_that_fails_ends_it(say: Say, client: Path) -> None:
    client.write_text(
        f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\nsys.exit(7 * ('emr' in sys.argv))\n"
    )
    override = f"slides.storage_options={{account_key: {SECRET}}}"
    status, out, _ = say("--on", "emr", "slides", "--config", "my.yaml", override)
    asked = [json.loads(line) for line in out.splitlines()]
    assert (status, len(asked)) == (7, 4)
    assert json.loads(asked[-1][-1])[0]["Args"][-1] == override
    client.write_text("#!/bin/sh\nexit 3\n")
    assert say("--on", "emr", "slides", "--config", "my.yaml") == (3, "", "")
    assert shutil.which("aws") == str(client)


def test_ctrl_c_leaves_the_client_its_time_to_end_in_order(say: Say, client: Path) -> None:
    """A terminal sends it to both, submit and client."""
    client.write_text(
        f"#!{sys.executable}\nimport os, signal, sys, time\n"
        "def end(*_):\n    time.sleep(1)\n    print('ended in order', flush=True)\n    sys.exit(9)\n"
        "signal.signal(signal.SIGINT, end)\n"
        "for process in (os.getppid(), os.getpid()):\n    os.kill(process, signal.SIGINT)\n"
        "time.sleep(60)\n"
    )
    assert say("--on", "emr", "slides", "--config", "my.yaml") == (9, "ended in order\n", "")


@pytest.mark.parametrize(
    ("sent", "ends", "status"),
    [
        ("SIGTERM", "sys.exit(9)", 9),
        ("SIGHUP", "sys.exit(9)", 9),
        ("SIGTERM", "sys.exit(0)", 128 + signal.SIGTERM),  # not done, whatever the client says
        ("SIGTERM", "os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL),
    ],
)
def test_a_signal_to_submit_alone_is_passed_on_to_the_client(
    say: Say, client: Path, sent: str, ends: str, status: int
) -> None:
    client.write_text(
        f"#!{sys.executable}\nimport os, signal, sys, time\n"
        f"def end(*_):\n    time.sleep(0.5)\n    print('ended in order', flush=True)\n    {ends}\n"
        f"signal.signal(signal.{sent}, end)\nos.kill(os.getppid(), signal.{sent})\ntime.sleep(60)\n"
    )
    line = f"slidelake: submit: stopped by {sent}: aws gets it too, and ends in order\n"
    assert say("--on", "emr", "slides", "--config", "my.yaml") == (status, "ended in order\n", line)


@pytest.mark.parametrize("place", PLACES)
def test_what_only_its_owner_knows_of_a_place_is_left_to_be_filled_in(place: str) -> None:
    assert set(yaml.safe_load((ROOT / f"conf/places/{place}.yaml").read_text()).get("yours", {}).values()) <= {None}


@pytest.mark.parametrize("place", PLACES)
def test_what_a_place_names_is_in_the_repository_and_the_place_in_the_readme(place: str) -> None:
    named = re.findall(r"\$root/([\w./]+)", (ROOT / f"conf/places/{place}.yaml").read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert f"`{place}`" in README
