"""hub/publish.py against the loopback Hub: what arrives, what a user sees when it goes wrong, and what is left."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
import torch
from loopback_hub import HURRY, REPOSITORY_ROOT, LoopbackHub
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_export import small_export

from tffd_zoo.data import open_source
from tffd_zoo.export import rewrite_card
from tffd_zoo.export_record import write_sums
from tffd_zoo.models import Release

PUBLISH = REPOSITORY_ROOT / "hub" / "publish.py"
COMMAND = "run_cli(publish.main, publish.PublishConfig, arguments)"
SERVER = """
import contextlib, io, json, os, sys
sys.path.insert(0, sys.argv[1])
import publish
from tffd_zoo.cli import run_cli
for line in sys.stdin:
    program, arguments, token = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            exec(program, {"publish": publish, "run_cli": run_cli, "arguments": arguments})
        except SystemExit as left:
            code = left.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""
LOAD = """
import sys, timm, torch, tffd_zoo
images = torch.ones(1, 3, 16, 16)
outputs = [timm.create_model(name, pretrained=True).eval()(images) for name in sys.argv[1:]]
assert all(torch.equal(outputs[0], output) for output in outputs)
"""


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def entry(self) -> dict[str, Any]:
        return json.loads(self.out[self.out.index("\n{") :])


Publish = Callable[..., Done]


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def publish(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Publish]:
    """The command line, in one process for all tests (each import of timm takes seconds), with a token unless None."""
    patience = {"HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DOWNLOAD_TIMEOUT": "2"}
    environment = hub.env(tmp_path_factory.mktemp("home"), **patience)
    command = [sys.executable, "-c", HURRY + SERVER, str(PUBLISH.parent)]
    streams: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **streams) as process:
        orders, answers = process.stdin, process.stdout
        assert orders is not None
        assert answers is not None

        def run(*arguments: str | Path, token: str | None = hub.token, program: str = COMMAND) -> Done:
            order = [program, [str(argument) for argument in arguments], token]
            print(json.dumps(order), file=orders, flush=True)
            done = Done(*json.loads(answers.readline()))
            assert hub.token not in done.out + done.err
            said = [line for line in done.err.splitlines() if " classes from " not in line]  # what data were found
            assert done.code == 0 or (len(said) == 1 and said[0].startswith("error: ")), done
            return done

        yield run
        orders.close()


@pytest.fixture
def repo(hub: LoopbackHub, request: pytest.FixtureRequest) -> str:
    """A repository name of this test's own."""
    hub.log.clear()
    hub.faults.clear()
    return f"org/{request.node.name[:40].replace('[', '-').rstrip(']-_.')}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_export(tmp_path_factory.mktemp("run"))


def served(hub: LoopbackHub, repo: str) -> dict[str, bytes]:
    """The files on `main`, without the Hub's own."""
    files = hub.repo(repo).head.files
    return {name: blob.data for name, blob in files.items() if name != ".gitattributes"}


def commits(hub: LoopbackHub, repo: str) -> list[str]:
    return [commit.title for commit in hub.repo(repo).commits.values()]


def test_a_release_is_one_commit_of_all_files_tagged(
    hub: LoopbackHub, publish: Publish, run: Path, repo: str, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in (run / "export").iterdir()}
    done = publish(run, "--repo", repo)
    assert done.code == 0, done
    assert {path.name: path.read_bytes() for path in (run / "export").iterdir()} == before, "the export stays as it is"
    head = hub.repo(repo).head
    assert commits(hub, repo) == ["initial commit", "tffd_resnet20.digits, v1"]
    assert hub.repo(repo).tags == {"v1": head.sha}

    files = served(hub, repo)
    assert files.keys() == before.keys()
    assert all(files[name] == before[name] for name in files.keys() - {"README.md", "SHA256SUMS"})
    assert f"hf-hub:{repo}".encode() in files["README.md"]
    assert files["README.md"].startswith(b"---\n")
    lines = (line.split("  ") for line in files["SHA256SUMS"].decode().splitlines())
    sums = {name: digest for digest, name in lines}
    assert sums == {n: hashlib.sha256(data).hexdigest() for n, data in files.items() if n != "SHA256SUMS"}

    entry = Release.from_json(done.entry, tmp_path)
    assert (entry.name, entry.file.pretrained_cfg()["hf_hub_id"]) == ("tffd_resnet20.digits", f"{repo}@{head.sha}")
    assert (entry.size, entry.sha256) == (len(before["model.safetensors"]), sums["model.safetensors"])
    assert (entry.training.hours, entry.metrics.result.images, entry.input.input_size) == (0.25, 360, (3, 16, 16))


def test_one_command_releases_what_loads_by_registered_name_hub_name_tag_and_commit(
    hub: LoopbackHub, run: Path, repo: str, tmp_path: Path
) -> None:
    """In a copy of the clone, whose manifest the command changes: online, from the cache, and with bad bytes."""
    for part in ("tffd_zoo", "hub"):
        shutil.copytree(REPOSITORY_ROOT / part, tmp_path / "package" / part)
    environment = {"PYTHONPATH": str(tmp_path / "package"), "HF_HUB_OFFLINE": "0"}
    script = tmp_path / "package" / "hub" / "publish.py"
    command = [str(script), str(run), "--repo", repo, "--add-to-manifest"]
    done = hub.python(command, tmp_path / "a", token=hub.token, **environment)
    assert done.returncode == 0, done.stderr
    places = [f"{repo}{at}" for at in ("", "@v1", f"@{hub.repo(repo).head.sha}")]
    names = [f"local-dir:{run / 'export'}", "tffd_resnet20.digits", *(f"hf-hub:{place}" for place in places)]
    for offline in ("0", "1"):
        loaded = hub.python(["-c", HURRY + LOAD, *names], tmp_path / "b", **environment | {"HF_HUB_OFFLINE": offline})
        assert loaded.returncode == 0, loaded.stderr

    hub.fail("corrupt", "GET /cdn/")
    refused = hub.python(["-c", HURRY + LOAD, "tffd_resnet20.digits"], tmp_path / "c", **environment)
    assert refused.returncode == 1
    assert "is not the released file" in refused.stderr
    assert f"{hub.url}/{repo} does not serve" in refused.stderr

    hub.fail("status", "GET /cdn/")
    failed = hub.python(["-c", HURRY + LOAD, "tffd_resnet20.digits"], tmp_path / "d", **environment)
    line = failed.stderr.splitlines()[-1]
    assert f"cannot fetch model.safetensors from {hub.url}/{repo} at " in line
    assert ": 503 a fault of the loopback Hub. Check the connection" in line
    assert hub.cdn_url not in line, "a CDN's address holds a key"


def test_a_published_model_is_evaluated_on_a_data_set_of_the_same_hub(
    hub: LoopbackHub, publish: Publish, run: Path, repo: str, tmp_path: Path
) -> None:
    digits = open_source("digits", "test")
    columns = {"image": [{"bytes": digits.image_bytes(i)} for i in range(len(digits))], "label": digits.labels.tolist()}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(digits.label_names)))
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "test.parquet")
    data = (tmp_path / "test.parquet").read_bytes()
    hub.add("org/digits", {"data/test-00000-of-00001.parquet": data, "README.md": b"---\n{}\n---\n"}, "dataset")

    published = publish(run, "--repo", repo, "--evaluate", "org/digits")
    assert published.code == 0, published
    record = tmp_path / "record.json"
    done = publish(f"hf-hub:{repo}@v1", "--data", "org/digits", "--json", record, program=EVALUATE)
    assert done.code == 0, done
    (found,) = json.loads(record.read_text())
    expected = published.entry["metrics"]
    assert {name: found[name] for name in ("images", "correct1", "correct5")} == {
        name: expected[name] for name in ("images", "correct1", "correct5")
    }
    assert found["evaluation"]["revision"] == hub.repo("org/digits", "dataset").head.sha

    hub.add("org/rare", {"data/test-00000-of-00001.parquet": data}, "dataset")
    for fault, message in {"drop": "Server disconnected", "status": "503 a fault", "truncate": "peer closed"}.items():
        hub.fail(fault, "GET /cdn/datasets", count=99)  # type: ignore[arg-type]
        failed = publish(f"hf-hub:{repo}@v1", "--data", "org/rare", program=EVALUATE)
        assert (failed.code, f"org/rare cannot be downloaded: {message}" in failed.err) == (2, True), failed
        hub.faults.clear()


EVALUATE = "from tffd_zoo import eval as e\nrun_cli(e.main, e.EvalConfig, arguments)"


@pytest.mark.parametrize(
    ("fault", "count", "message"),
    [
        ("corrupt", 1, "is not the model.safetensors that SHA256SUMS lists; delete that file and try again"),
        ("drop", 99, "cannot be loaded: Server disconnected without sending a response"),
        ("truncate", 99, "cannot be loaded: peer closed connection"),
        ("status", 1, "cannot be loaded: 503 a fault of the loopback Hub"),
    ],
)
def test_an_evaluation_from_a_failing_hub_ends_with_one_line_and_not_with_other_bytes(
    fault: Any, count: int, message: str, hub: LoopbackHub, publish: Publish, run: Path, repo: str
) -> None:
    repo = f"org/evaluated-{fault}"
    assert publish(run, "--repo", repo).code == 0
    hub.fail(fault, "GET /cdn/", count=count)
    order = (f"hf-hub:{repo}", "--data", "digits")
    done = publish(*order, program=EVALUATE)
    assert (done.code, message in done.err) == (2, True), done
    assert hub.cdn_url not in done.err
    hub.faults.clear()
    if fault == "corrupt":
        assert publish(*order, program=EVALUATE).code == 2, "the bad file is in the cache"
        Path(done.err.split("cannot be loaded: ")[-1].removeprefix("error: ").split(" is not the ")[0]).unlink()
    again = publish(*order, program=EVALUATE)
    assert again.code == 0, again


def test_a_dry_run_shows_every_file_and_touches_no_network(
    hub: LoopbackHub, publish: Publish, run: Path, repo: str
) -> None:
    done = publish(run, "--repo", repo, "--dry-run", token=None)
    assert done.code == 0, done
    assert hub.log == []
    shown = {line.split()[3]: line.split() for line in done.out.splitlines() if " bytes " in line}
    assert publish(run, "--repo", repo).code == 0
    assert shown.keys() == served(hub, repo).keys()
    for name, data in served(hub, repo).items():
        assert shown[name][0] == f"{len(data):,}"
        assert shown[name][2] == hashlib.sha256(data).hexdigest()


def test_publishing_again_changes_nothing_and_other_weights_need_another_tag(
    hub: LoopbackHub, publish: Publish, run: Path, repo: str, tmp_path: Path
) -> None:
    first = publish(run, "--repo", repo)
    again = publish(run, "--repo", repo)
    assert (again.code, again.entry) == (0, first.entry)
    assert len(hub.requests("POST", "/commit/")) == 1
    assert len(hub.requests("POST", "/tag/")) == 1

    other = small_export(tmp_path, seed=1)
    refused = publish(other, "--repo", repo)
    assert refused.code == 2
    assert "has v1 already" in refused.err
    assert "another --tag" in refused.err
    assert len(hub.requests("POST", "/commit/")) == 1
    second = publish(other, "--repo", repo, "--tag", "v2")
    assert second.code == 0, second
    assert hub.repo(repo).tags == {"v1": first.entry["file"]["commit"], "v2": second.entry["file"]["commit"]}

    older = publish(run, "--repo", repo)
    assert (older.code, older.entry) == (0, first.entry), "the older release is still what its tag says"


FAULTS = {
    "the commit never arrives": ("drop", "POST .*/commit/main", "could not commit: Server disconnected"),
    "the commit fails": ("status", "POST .*/commit/main", "could not commit: 503 a fault of the loopback Hub"),
    "the answer to the commit is lost": ("lose_answer", "POST .*/commit/main", "could not commit: Server disconnected"),
    "half of the weights arrive": ("truncate", "PUT /cdn/", "could not commit: Error while uploading 'model.safetenso"),
    "other weights arrive": ("corrupt", "PUT /cdn/", "could not commit: Error while uploading 'model.safetensors'"),
    "the weights come back changed": ("corrupt", "GET /cdn/", "model.safetensors came back changed"),
    "the Hub refuses the download": ("status", "GET /cdn/", "could not download what was published: 5"),
    "the tag fails": ("status", "POST .*/tag/", "could not tag: 503 a fault of the loopback Hub"),
    "the answer to the tag is lost": ("lose_answer", "POST .*/tag/", "could not tag: Server disconnected"),
    "the repository cannot be made": ("drop", "POST /api/repos/create", "could not prepare the repository: Server dis"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_leaves_all_or_nothing_and_the_same_command_goes_on(
    fault: str, hub: LoopbackHub, publish: Publish, run: Path, repo: str
) -> None:
    repo = f"org/{fault.replace(' ', '-')}"
    kind, where, message = FAULTS[fault]
    hub.fail(kind, where)  # type: ignore[arg-type]
    failed = publish(run, "--repo", repo)
    assert failed.code == 2
    assert message in failed.err
    if ("model", repo) in hub.repos:
        assert len(served(hub, repo)) in (0, 7)
        assert hub.repo(repo).tags == {} or fault == "the answer to the tag is lost"

    done = publish(run, "--repo", repo)
    assert done.code == 0, done
    assert commits(hub, repo) == ["initial commit", "tffd_resnet20.digits, v1"]
    assert hub.repo(repo).tags == {"v1": hub.repo(repo).head.sha}


def test_a_hub_that_has_too_many_requests_is_waited_for_as_long_as_it_says(
    hub: LoopbackHub, publish: Publish, run: Path, repo: str
) -> None:
    for where in (f"GET /api/models/{repo}", "POST .*/commit/", "POST .*/tag/"):
        hub.fail("status", where, status=429, retry_after=1)
    done = publish(run, "--repo", repo)
    assert done.code == 0, done
    assert done.err.count("the Hub asks for 1 s of patience (429)") == 3
    assert hub.repo(repo).tags == {"v1": hub.repo(repo).head.sha}


@pytest.mark.parametrize("fault", ["drop", "delay", "truncate"])
def test_a_passing_fault_of_the_download_is_got_over(
    fault: Any, hub: LoopbackHub, publish: Publish, run: Path, repo: str
) -> None:
    hub.fail(fault, "GET /cdn/", seconds=60.0)
    done = publish(run, "--repo", repo)
    assert done.code == 0, done
    assert len(hub.requests("GET", "/cdn/")) >= 2


def test_a_killed_upload_is_not_seen_and_the_same_command_goes_on(
    hub: LoopbackHub, publish: Publish, run: Path, repo: str, tmp_path: Path
) -> None:
    command = [sys.executable, str(PUBLISH), str(run), "--repo", repo]
    hub.fail("delay", "POST .*/info/lfs/objects/batch", seconds=60.0)
    with subprocess.Popen(command, env=hub.env(tmp_path, hub.token)) as process:
        while not hub.requests("POST", f"{repo}.git/info/lfs"):
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    assert served(hub, repo) == {}
    done = publish(run, "--repo", repo)
    assert done.code == 0, done
    assert commits(hub, repo) == ["initial commit", "tffd_resnet20.digits, v1"]


def test_what_must_not_be_published_is_refused_before_anything_is_sent(
    hub: LoopbackHub, publish: Publish, run: Path, repo: str, tmp_path: Path
) -> None:
    def broken(name: str, change: Callable[[Path], None], sums: bool = True) -> Path:
        folder = tmp_path / name
        shutil.copytree(run / "export", folder)
        change(folder)
        if sums:
            write_sums(folder)
        return folder

    def flip(folder: Path) -> None:
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-5] ^= 1
        (folder / "model.safetensors").write_bytes(data)

    def spoil(folder: Path) -> None:
        with safe_open(folder / "model.safetensors", "pt") as file:
            metadata = file.metadata()
        tensors = load_file(folder / "model.safetensors")
        next(tensor for tensor in tensors.values() if tensor.is_floating_point()).view(-1)[0] = float("nan")
        save_file(tensors, folder / "model.safetensors", metadata)

    def miscount(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_classes": 7}))

    weights = "model.safetensors"
    other = {"x": torch.zeros(1)}
    cases = {
        broken("flip", flip, sums=False): "model.safetensors is not the file that was exported",
        broken("pickle", lambda folder: torch.save(other, folder / weights)): "is not a safetensors file",
        broken("extra", lambda folder: torch.save(other, folder / "model.pt")): "model.pt, which no release has",
        broken("bare", lambda folder: (folder / "recipe.json").unlink()): "SHA256SUMS does not list recipe.json",
        broken("nan", spoil): "is not finite; export other weights (nothing was sent)",
        broken("count", miscount): "config.json says 7 classes, and",
        tmp_path: "is neither an export nor the folder of a run",
        tmp_path / "nothing": "is neither an export nor the folder of a run",
    }
    for folder, message in cases.items():
        done = publish(folder, "--repo", repo)
        assert (done.code, message in done.err) == (2, True), done
    for arguments, message in {
        ("--repo", "model"): "has no organisation",
        ("--repo", "or g/model"): "Repo id must use alphanumeric chars",
        ("--repo", repo, "--tag", "main"): "could be taken for a branch",
        ("--repo", repo, "--tag", "v 1"): "is no name of a tag on the Hub",
        ("--repo", repo, "--tag", "v1..2"): "is no name of a tag on the Hub",
        ("--repo", repo, "--tag", "v1.lock"): "is no name of a tag on the Hub",
    }.items():
        done = publish(run, *arguments)
        assert (done.code, message in done.err) == (2, True), done
    assert hub.log == []


def test_a_repository_of_something_else_is_left_alone(
    hub: LoopbackHub, publish: Publish, run: Path, repo: str, tmp_path: Path
) -> None:
    other = repo + "-other"
    hub.add(repo, {"thesis.pdf": b"years of work"})
    assert publish(small_export(tmp_path, tag="ce_digits"), "--repo", other).code == 0
    for name, message in {repo: "holds thesis.pdf", other: "holds tffd_resnet20.ce_digits"}.items():
        before = hub.repo(name).head
        done = publish(run, "--repo", name, "--tag", "v2")
        assert (done.code, message in done.err) == (2, True), done
        assert hub.repo(name).head == before
        done = publish(run, "--repo", name, "--private", "--tag", "v2")
        assert (done.code, "is public already" in done.err) == (2, True), done


def test_a_private_release_is_private(hub: LoopbackHub, publish: Publish, run: Path, repo: str) -> None:
    assert publish(run, "--repo", repo, "--private").code == 0
    assert hub.repo(repo).private
    assert publish(run, "--repo", repo, "--private").code == 0


def test_someone_elses_commit_meanwhile_is_not_overwritten(
    hub: LoopbackHub, publish: Publish, run: Path, repo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(repo, {"README.md": b"---\nlicense: mit\n---\n"})
    respond = hub.respond

    def interfere(request: Any) -> Any:
        if "/commit/" in request.path and commits(hub, repo)[-1] != "Add files again":
            hub.repo(repo).commit(hub.repo(repo).head.files, "Add files again")
        return respond(request)

    monkeypatch.setattr(hub, "respond", interfere)
    done = publish(run, "--repo", repo)
    assert done.code == 2
    assert "could not commit: 412 A commit has happened since" in done.err
    assert served(hub, repo) == {"README.md": b"---\nlicense: mit\n---\n"}
    assert publish(run, "--repo", repo).code == 0


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "there is no token; set HF_TOKEN or run `hf auth login`"),
        ("hf_\x01secret", "the token holds characters that no token has"),
        ("hf_wrongsecret", "could not prepare the repository: 401 Invalid credentials in Authorization header"),
        ("read", "could not prepare the repository: 403 You don't have the required permissions to write to org/"),
    ],
)
def test_a_token_that_will_not_do_is_named_but_never_shown(
    token: str | None, message: str, hub: LoopbackHub, publish: Publish, run: Path, repo: str
) -> None:
    token = hub.read_token if token == "read" else token
    done = publish(run, "--repo", "org/no-token", token=token)
    assert (done.code, message in done.err) == (2, True), done
    assert "secret" not in done.err
    assert hub.read_token not in done.err
    assert ("model", "org/no-token") not in hub.repos


def test_a_token_of_hf_auth_serves_too(
    hub: LoopbackHub, publish: Publish, run: Path, repo: str, tmp_path: Path
) -> None:
    store = "from huggingface_hub import constants\nopen(constants.HF_TOKEN_PATH, 'w').write(arguments[0])"
    assert publish(hub.token, program=store).code == 0
    done = publish(run, "--repo", repo, token=None)
    forget = "import os\nfrom huggingface_hub import constants\nos.remove(constants.HF_TOKEN_PATH)"
    assert publish(program=forget).code == 0
    assert done.code == 0, done


def test_a_published_model_with_other_logits_is_not_tagged(
    hub: LoopbackHub, publish: Publish, run: Path, repo: str
) -> None:
    shifted = "logits = publish._logits\npublish._logits = lambda name, **at: logits(name, **at) + ('hf-hub' in name)\n"
    back = "\nfinally:\n    publish._logits = logits"
    done = publish(run, "--repo", repo, program=f"{shifted}try:\n    {COMMAND}{back}")
    assert (done.code, "gives other logits than the export" in done.err) == (2, True), done
    assert hub.repo(repo).tags == {}


def test_an_evaluation_that_disagrees_stops_the_release(
    hub: LoopbackHub, publish: Publish, run: Path, repo: str, tmp_path: Path
) -> None:
    measured = json.loads((run / "export" / "metrics.json").read_text())
    correct = measured["correct1"]
    better = {"correct1": correct + 2, "top1": 100 * (correct + 2) / 360, "correct5": 360, "top5": 100.0}
    wrong = small_export(tmp_path / "wrong", **better)
    done = publish(wrong, "--repo", repo, "--evaluate", "digits")
    assert done.code == 2
    assert f"metrics.json says correct1 {correct + 2}, but on digits it is {correct}" in done.err
    assert hub.log == []

    near = small_export(tmp_path / "near", **{key: better[key] for key in ("correct1", "top1")})
    assert publish(near, "--repo", repo, "--evaluate", "digits", "--dry-run").code == 2
    assert publish(near, "--repo", repo, "--evaluate", "digits", "--dry-run", "--tolerance", "2").code == 0
    done = publish(run, "--repo", repo, "--evaluate", "digits")
    assert done.code == 0, done


def test_the_card_compares_with_the_twin(
    hub: LoopbackHub, publish: Publish, run: Path, repo: str, tmp_path: Path
) -> None:
    assert publish(run, "--repo", repo).code == 0
    assert "There is no plain twin" in served(hub, repo)["README.md"].decode()
    twin = small_export(tmp_path, seed=1, tag="ce_digits") / "export"
    assert publish(run, "--repo", repo, "--tag", "v2", "--twin", twin).code == 0
    assert "`tffd_resnet20.ce_digits`" in served(hub, repo)["README.md"].decode()
    told = publish(run, "--repo", repo, "--tag", "v2", "--twin", twin).entry["plain_twin"]
    assert told["metrics"]["nll"] == json.loads((twin / "metrics.json").read_text())["nll"]
    assert len(hub.requests("PUT", "/cdn/")) <= 1, "the weights have not changed and are not sent again"


def test_a_file_that_a_new_release_lacks_goes_with_the_same_commit(
    hub: LoopbackHub, publish: Publish, run: Path, repo: str, tmp_path: Path
) -> None:
    with_curves = tmp_path / "run"
    shutil.copytree(run, with_curves)
    (with_curves / "export" / "curves.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    write_sums(with_curves / "export")
    rewrite_card(with_curves / "export")
    assert publish(with_curves, "--repo", repo).code == 0
    assert "curves.png" in served(hub, repo)
    assert publish(run, "--repo", repo, "--tag", "v2").code == 0
    assert "curves.png" not in served(hub, repo)
    assert len(commits(hub, repo)) == 3


def test_training_hours_are_asked_for_where_the_export_has_none(
    hub: LoopbackHub, publish: Publish, run: Path, repo: str, tmp_path: Path
) -> None:
    shutil.copytree(run / "export", tmp_path / "export")
    (tmp_path / "export" / "environment.json").write_text('{"hardware": "a small machine"}')
    write_sums(tmp_path / "export")
    done = publish(tmp_path, "--repo", repo)
    assert (done.code, "pass --hours" in done.err) == (2, True), done
    assert hub.log == []
    assert publish(tmp_path, "--repo", repo, "--hours", "1.5").entry["training"]["hours"] == 1.5
